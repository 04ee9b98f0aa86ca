#!/usr/bin/env bash
# Benchmarks, peers beside us in one run: builds the agent, gets the peers, measures (bench/run.py).
# docs/performance.md says what is measured and how.
#
# AREA=backup  only that area, or AREA=wal. The other one's rows stay in the report if it is of the same program, settings
#              and data
# QUICK=1      on small data
# ROWS=a,b     only rows whose names begin so, for example ROWS=backup.changed,wal.push; added to the report as well
# PEERS=a,b    of restic, rustic and minio (the object store of our rows on S3), or none; all if not given, but for AREA=wal,
#              where they have no rows. pgBackRest and PostgreSQL's own are always there
#
# WALFLEET_BENCH             where data and repositories lie (default /var/tmp/walfleet-bench)
# WALFLEET_BENCH_USER        whom PostgreSQL runs as, for root (default postgres, else walfleet-test)
# WALFLEET_BENCH_POSTGRES    folder of PostgreSQL's programs (default version 17 of scripts/get_postgres.sh)
# WALFLEET_BENCH_PATIENCE    seconds to wait for a quiet machine before each sample (default 180, with QUICK=1 6)
# WALFLEET_BENCH_AGENT       measure this walfleet-agent instead of building one
# WALFLEET_BENCH_PGBACKREST, WALFLEET_BENCH_RESTIC, WALFLEET_BENCH_RUSTIC, WALFLEET_BENCH_MINIO
#                            measure with this program instead of getting one
set -euo pipefail
cd "$(dirname "$0")/.."

work=${WALFLEET_BENCH:-/var/tmp/walfleet-bench}
# Those are measured in the area backup only.
case ${AREA:-} in ''|backup) peers=restic,rustic,minio ;; *) peers=none ;; esac
peers=${PEERS:-$peers}
for peer in ${peers//,/ }; do
  case $peer in restic|rustic|minio|none) ;; *) echo "bench: there is no peer $peer; there are restic, rustic and minio" >&2; exit 2 ;; esac
done
agent=${WALFLEET_BENCH_AGENT:-}
if [ -z "$agent" ]; then
  echo 'bench: building walfleet-agent as for a release' >&2
  # -p: features that other crates would ask for are not measured along.
  nice cargo build --release --quiet -p walfleet-agent
  agent=${CARGO_TARGET_DIR:-target}/release/walfleet-agent
fi
command -v zstd >/dev/null || apt-get -qq -y install zstd >/dev/null
mkdir -p "$work"
pgbackrest=${WALFLEET_BENCH_PGBACKREST:-}
[ -n "$pgbackrest" ] || pgbackrest=$(bench/get_debian.sh "$work/pgbackrest" pgbackrest)
arguments=(--agent "$agent" --pgbackrest "$pgbackrest")

# A peer that cannot be had leaves its rows out, and says so.
further() { # name, command that prints its path
  local name=$1 given program; shift
  case ",$peers," in *",$name,"*) ;; *) return 0 ;; esac
  given=WALFLEET_BENCH_${name^^}
  if program=${!given:-} && [ -n "$program" ] || program=$("$@"); then arguments+=("--$name" "$program")
  else arguments+=(--note "$name could not be got, its rows are left out"); fi
}
further restic bench/get_debian.sh "$work/restic" restic
further rustic bench/get_rustic.sh "$work/rustic"
further minio bench/get_minio.sh "$work/minio"

[ -z "${AREA:-}" ] || arguments+=(--area "$AREA")
[ -z "${ROWS:-}" ] || arguments+=(--rows "$ROWS")
[ -z "${QUICK:-}" ] || [ "$QUICK" = 0 ] || arguments+=(--quick)
exec env PYTHONDONTWRITEBYTECODE=1 python3 -u bench/run.py "${arguments[@]}"
