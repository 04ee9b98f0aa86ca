#!/usr/bin/env bash
# Benchmarks, peers beside us in one run: builds the agent, gets pgBackRest, measures (bench/run.py).
# AREA=backup measures only that area, QUICK=1 on small data. docs/performance.md says what is measured and how.
#
# WALFLEET_BENCH             where data and repositories lie (default /var/tmp/walfleet-bench)
# WALFLEET_BENCH_USER        whom PostgreSQL runs as, for root (default postgres, else walfleet-test)
# WALFLEET_BENCH_POSTGRES    folder of PostgreSQL's programs (default version 17 of scripts/get_postgres.sh)
# WALFLEET_BENCH_PATIENCE    seconds to wait for a quiet machine before each sample (default 180, with QUICK=1 6)
# WALFLEET_BENCH_AGENT       measure this walfleet-agent instead of building one
# WALFLEET_BENCH_PGBACKREST  compare with this pgbackrest instead of the newest one
set -euo pipefail
cd "$(dirname "$0")/.."

work=${WALFLEET_BENCH:-/var/tmp/walfleet-bench}
agent=${WALFLEET_BENCH_AGENT:-}
if [ -z "$agent" ]; then
  echo 'bench: building walfleet-agent as for a release' >&2
  # -p: features that other crates would ask for are not measured along.
  nice cargo build --release --quiet -p walfleet-agent
  agent=${CARGO_TARGET_DIR:-target}/release/walfleet-agent
fi
command -v zstd >/dev/null || apt-get -qq -y install zstd >/dev/null
pgbackrest=${WALFLEET_BENCH_PGBACKREST:-}
[ -n "$pgbackrest" ] || pgbackrest=$(bench/get_pgbackrest.sh "$work/pgbackrest")

arguments=(--agent "$agent" --pgbackrest "$pgbackrest")
[ -z "${AREA:-}" ] || arguments+=(--area "$AREA")
[ -z "${QUICK:-}" ] || [ "$QUICK" = 0 ] || arguments+=(--quick)
exec env PYTHONDONTWRITEBYTECODE=1 python3 -u bench/run.py "${arguments[@]}"
