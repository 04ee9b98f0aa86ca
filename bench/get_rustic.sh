#!/usr/bin/env bash
# rustic, built by cargo into a folder, where it stays: a quarter of an hour on two cores, once. Prints the program's path.
#
# usage: get_rustic.sh FOLDER
set -euo pipefail

die() { echo "get_rustic: $*" >&2; exit 1; }

version=0.11.4
root=${1:?usage: get_rustic.sh FOLDER}
program=$root/$version/bin/rustic
[ -x "$program" ] && { echo "$program"; exit; }
command -v cargo >/dev/null || die "cargo is missing; set WALFLEET_BENCH_RUSTIC to a rustic of your own"
mkdir -p "$root"
exec 9>"$root/lock"
flock -w 3600 9 || die "another run holds $root/lock for an hour"
[ -x "$program" ] && { echo "$program"; exit; }
echo "get_rustic: building rustic $version, once" >&2
# What it shows, mounts and measures of itself is not needed.
(cd "$root" && CARGO_TARGET_DIR=$root/target nice cargo install rustic-rs --version "$version" --locked \
  --no-default-features --quiet --root "$root/$version" 9>&-) >"$root/log" 2>&1 ||
  die "cargo cannot build it: $(grep -m 1 '^error' "$root/log" || tail -n 1 "$root/log")"
rm -rf "$root/target"
chmod -R a+rX "$root/$version"
"$program" --version >&2 || die "the rustic that was built does not run"
echo "$program"
