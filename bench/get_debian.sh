#!/usr/bin/env bash
# A program's newest release as Debian unstable ships it, unpacked into a folder, so that nothing on this machine changes;
# with its own libraries and loader if this machine's do not do. Prints the program's path. Looks for a newer release once
# a day.
#
# usage: get_debian.sh FOLDER PACKAGE        the program is called like the package and knows the word `version`
set -euo pipefail

root=${1:?usage: get_debian.sh FOLDER PACKAGE}
package=${2:?usage: get_debian.sh FOLDER PACKAGE}
program=$root/$package

die() { echo "get_debian: $package: $*" >&2; exit 1; }

for tool in apt-get dpkg patchelf; do
  command -v $tool >/dev/null || die "$tool is missing; set WALFLEET_BENCH_${package^^} to a $package of your own"
done
mkdir -p "$root"
exec 9>"$root/lock"
flock -w 600 9 || die "another run holds $root/lock for 10 minutes"
if [ -x "$program" ] && [ -z "$(find "$program" -mmin +1440)" ]; then echo "$program"; exit; fi

# Where apt gets Debian from on this machine; the security archive has no unstable.
debian_uri() {
  { sed -n 's/^URIs: *//p' /etc/apt/sources.list.d/*.sources 2>/dev/null || true
    awk '$1 == "deb" {for (i = 2; i <= NF; i++) if ($i ~ /:\/\//) {print $i; break}}' /etc/apt/sources.list 2>/dev/null || true
  } | tr ' ' '\n' | grep '/debian/*$' | sort -u | head -n 1
}

# Whatever fails on the way, a program that an earlier run got still serves.
fall_back() {
  [ -x "$program" ] || die "$1"
  echo "get_debian: $package: $1; using the one at hand" >&2
  echo "$program"
  exit
}

new=$root/new
rm -rf "$new"
mkdir -p "$new"/lists/partial "$new"/cache/archives/partial "$new"/packages "$new"/tree
: > "$new/status"
uri=$(debian_uri) || true
[ -n "$uri" ] || fall_back "apt has no Debian archive configured"
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $uri sid main" > "$new/sources.list"
apt=(-qq -o "Dir::Etc::sourcelist=$new/sources.list" -o Dir::Etc::sourceparts=- -o "Dir::State::Lists=$new/lists"
  -o "Dir::State::status=$new/status" -o "Dir::Cache=$new/cache" -o "APT::Sandbox::User=$(id -un)")
apt-get "${apt[@]}" update >/dev/null 2>"$new/errors" || fall_back "apt cannot read unstable: $(tail -n 1 "$new/errors")"

download() { (cd "$new/packages" && apt-get "${apt[@]}" download "$@" >/dev/null 2>"$new/errors"); }
download "$package" || fall_back "apt cannot download it: $(tail -n 1 "$new/errors")"
dpkg -x "$new"/packages/*.deb "$new/tree"

if "$new/tree/usr/bin/$package" version >/dev/null 2>&1; then
  cp "$new/tree/usr/bin/$package" "$program.new"
else
  # Only libraries: what else the package wants (pgBackRest's Perl, postgresql-common) serves its set-up, not the program.
  needs=(--no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces --no-enhances)
  direct=$(apt-cache "${apt[@]}" depends "${needs[@]}" "$package" | awk '$1 == "Depends:" && $2 ~ /^(lib|zlib)/ {print $2}')
  [ -n "$direct" ] || fall_back "apt does not know what it needs"
  # shellcheck disable=SC2086
  libraries=$(apt-cache "${apt[@]}" depends --recurse "${needs[@]}" $direct | grep -E '^(lib|zlib|openssl-provider)' | sort -u)
  # shellcheck disable=SC2086
  download $libraries || fall_back "apt cannot download its libraries: $(tail -n 1 "$new/errors")"
  for file in "$new"/packages/*.deb; do dpkg -x "$file" "$new/tree"; done
  folder=$(dirname "$(find "$new/tree/usr/lib" -name 'libc.so.6' | head -n 1)")
  loader=$(basename "$(find "$folder" -maxdepth 1 -name 'ld-linux*.so.*' | head -n 1)")
  [ -n "$loader" ] || fall_back "the unpacked libc6 has no loader"
  final=$root/tree${folder#"$new/tree"}
  rm -rf "$root/tree"
  mv "$new/tree" "$root/tree"
  cp "$root/tree/usr/bin/$package" "$program.new"
  patchelf --force-rpath --set-interpreter "$final/$loader" --set-rpath "$final" "$program.new"
  chmod -R a+rX "$root/tree"
fi
chmod a+rx "$program.new"
"$program.new" version >&2 || die "the unpacked program does not run"
mv "$program.new" "$program"
touch "$program"
rm -rf "$new"
echo "$program"
