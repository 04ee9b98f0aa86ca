#!/usr/bin/env bash
# Runs the demo that `make demo` has built. KEEP=1 leaves the fleet running until Enter or Ctrl-C.
set -euo pipefail
cd "$(dirname "$0")/.."
demo=${CARGO_TARGET_DIR:-target}/debug/demo
[ -x "$demo" ] || { echo "demo.sh: $demo is not built; run: make demo" >&2; exit 1; }
if [ -n "${KEEP:-}" ] && [ "$KEEP" != 0 ]; then exec "$demo" --keep; fi
exec "$demo"
