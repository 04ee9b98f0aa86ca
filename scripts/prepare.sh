#!/usr/bin/env bash
# Makes a fresh Debian 12 with a Rust toolchain ready for `make demo` and `make test`: packages, an unprivileged user for
# PostgreSQL, and PostgreSQL 13 to 18. Does only what is missing; run again it takes a fraction of a second.
#
# WALFLEET_CACHE says where the servers lie (default /var/cache/walfleet-test for root, else ~/.cache/walfleet-test).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

die() { echo "prepare: $*" >&2; exit 1; }
say() { echo "prepare: $*" >&2; }

user=walfleet-test
packages=(gcc libc6-dev patchelf python3 python3-pip util-linux iproute2 ca-certificates tzdata
  libssl3 libxml2 libgssapi-krb5-2 libreadline8 liblz4-1 libzstd1 zlib1g libsasl2-2 libgnutls30 libpam0g libsystemd0)

command -v cargo >/dev/null || die "no Rust toolchain: install rustup, it takes the version from rust-toolchain.toml"

missing_packages() {
  local installed
  installed=$(dpkg-query -W -f '${Package} ${db:Status-Status}\n' "${packages[@]}" 2>/dev/null || true)
  for package in "${packages[@]}"; do
    grep -q "^$package installed$" <<<"$installed" || echo "$package"
  done
}

# A machine that is not Debian 12 may still have all that is needed, under other names: then go on.
missing_commands() {
  for command in gcc patchelf python3 setpriv dpkg apt-get; do command -v "$command" >/dev/null || echo "$command"; done
}

install_packages() {
  local missing errors release=
  [ -r /etc/os-release ] && release=$(. /etc/os-release; echo "${ID:-} ${VERSION_ID:-}")
  if [ "$release" != "debian 12" ]; then
    missing=$(missing_commands | xargs)
    [ -z "$missing" ] || die "this is ${release:-an unknown system}, not debian 12: please install $missing yourself"
    return
  fi
  missing=$(missing_packages | xargs)
  [ -n "$missing" ] || return 0
  [ "$(id -u)" = 0 ] || die "missing packages; run as root: apt-get install $missing"
  say "installing $missing"
  # shellcheck disable=SC2086
  errors=$({ DEBIAN_FRONTEND=noninteractive apt-get -qq update &&
    DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install $missing; } 2>&1 >/dev/null) ||
    die "apt-get could not install $missing: $(grep -m 1 '^E:' <<<"$errors" || tail -n 1 <<<"$errors")"
}

# PostgreSQL refuses to run as root.
create_user() {
  [ "$(id -u)" = 0 ] || return 0
  id "$user" >/dev/null 2>&1 && return 0
  say "creating the user $user, which runs PostgreSQL in tests"
  useradd --system --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin "$user" || die "cannot create the user $user"
}

install_packages
create_user
exec "$here/get_postgres.sh"
