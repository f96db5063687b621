#!/bin/sh
# The Debian packages that the tests use, beyond Python's:
#
#     tests/system.sh check [slow]      one line that names those that are missing; always succeeds
#     tests/system.sh install [slow]    installs them; needs root
#
# `slow` adds what only `make test-slow` uses.
set -eu
missing=""
want() { command -v "$1" >/dev/null 2>&1 || [ -x "/usr/sbin/$1" ] || missing="$missing $2"; }
want chromium chromium # draws report.html and the dashboards
want nginx nginx-light # serves shards
want prometheus prometheus # scrapes the programs; its promtool tests the rules
want prometheus-pushgateway prometheus-pushgateway
want ip iproute2 # network namespaces
if [ "${2:-}" = slow ]; then
    want podman "podman buildah runc catatonit containernetworking-plugins" # builds and runs the image
    want debootstrap debootstrap # makes the image's base
    want node nodejs # ONNX Runtime in JavaScript
    want npm npm
    want strace strace # no program asks the network for anything
    want slurmctld "slurmctld slurmd slurm-client munge" # runs the chain as jobs
fi

case "${1:-}" in
    check)
        [ -z "$missing" ] ||
            echo "The tests also use:$missing. \`make system${2:+-$2}\` installs them; tests that lack them are skipped." >&2
        exit 0 ;;
    install) [ -n "$missing" ] || exit 0 ;;
    *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac

if [ "$(id -u)" != 0 ]; then
    echo "error: only root can install$missing; run: sudo make system${2:+-$2}" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# The tests start the servers, on loopback; the system must not.
if [ ! -e /usr/sbin/policy-rc.d ]; then
    printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d
    chmod +x /usr/sbin/policy-rc.d
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
fi
# shellcheck disable=SC2086
apt-get install -qq -y --no-install-recommends $missing
