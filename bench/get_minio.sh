#!/usr/bin/env bash
# MinIO, an S3 server, built by Go into a folder, where it stays: some minutes on two cores, once. Prints the program's path.
#
# usage: get_minio.sh FOLDER
set -euo pipefail

die() { echo "get_minio: $*" >&2; exit 1; }

version=v0.0.0-20260212201848-7aac2a2c5b7c # the newest; releases have no versions that Go knows
root=${1:?usage: get_minio.sh FOLDER}
program=$root/$version/minio
[ -x "$program" ] && { echo "$program"; exit; }
command -v go >/dev/null || die "go is missing; set WALFLEET_BENCH_MINIO to a minio of your own"
mkdir -p "$root"
exec 9>"$root/lock"
flock -w 3600 9 || die "another run holds $root/lock for an hour"
[ -x "$program" ] && { echo "$program"; exit; }
echo "get_minio: building MinIO $version, once" >&2
(cd "$root" && export GOBIN=$root/new GOPATH=$root/path GOCACHE=$root/cache GOFLAGS=-modcacherw CGO_ENABLED=0 &&
  nice go install -trimpath -ldflags '-s -w' "github.com/minio/minio@$version" 9>&-) >"$root/log" 2>&1 ||
  die "go cannot build it: $(tail -n 1 "$root/log")"
rm -rf "$root/path" "$root/cache"
mkdir -p "$root/$version"
mv "$root/new/minio" "$program"
chmod -R a+rX "$root/$version"
"$program" --version >&2 || die "the MinIO that was built does not run"
echo "$program"
