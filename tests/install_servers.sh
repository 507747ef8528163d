#!/bin/sh
# Installs the servers that the tests start: PostgreSQL, RabbitMQ and Ceph's S3 gateway. Valkey comes as a Python wheel.
# Installs only what is missing, starts nothing, and says nothing when all is there. Debian and its relatives.
set -eu

PATH="$PATH:/usr/sbin:/usr/local/sbin"
missing=""

need() { # need PACKAGE PROGRAM
    command -v "$2" >/dev/null 2>&1 || missing="$missing $1"
}

ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || need postgresql initdb
need rabbitmq-server rabbitmq-server
need ceph-mon ceph-mon
need ceph-osd ceph-osd
need radosgw radosgw
need ceph-common ceph
[ -n "$missing" ] || exit 0

if ! command -v apt-get >/dev/null 2>&1; then
    echo "the tests need these servers; install them with your system's package manager:$missing" >&2
    exit 1
fi
as_root=""
if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null 2>&1 || { echo "run as root: apt-get install$missing" >&2; exit 1; }
    as_root="sudo"
fi

# Debian starts what it installs, unless this file says 101. One that is there already is left alone and put back.
policy=/usr/sbin/policy-rc.d
kept=""
restore() {
    $as_root rm -f "$policy"
    [ -z "$kept" ] || $as_root mv "$kept" "$policy"
}
if [ -e "$policy" ]; then
    kept="$policy.before-piecework"
    $as_root mv "$policy" "$kept"
fi
trap restore EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
printf '#!/bin/sh\nexit 101\n' | $as_root tee "$policy" >/dev/null
$as_root chmod 755 "$policy"

echo "installing for the tests:$missing"
$as_root apt-get update -qq
# shellcheck disable=SC2086  # a list of packages
$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
