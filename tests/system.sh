#!/bin/sh
# Installs the Debian packages that the tests use, where they are missing and this user may.
set -eu
missing=""
want() { command -v "$1" >/dev/null 2>&1 || [ -x "/usr/sbin/$1" ] || missing="$missing $2"; }
want chromium chromium           # looks at report.html and the dashboards
want nginx nginx-light           # serves shards
want prometheus prometheus       # scrapes, and tests the rules (promtool)
want prometheus-pushgateway prometheus-pushgateway
want ip iproute2                 # network namespaces
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ]; then
    echo "The tests also use:$missing. Install them as root: apt-get install$missing; tests that need them are skipped." >&2
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# The servers are started by the tests, on loopback, not by the system.
if [ ! -e /usr/sbin/policy-rc.d ]; then
    printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d
    chmod +x /usr/sbin/policy-rc.d
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
fi
# shellcheck disable=SC2086
apt-get install -qq -y --no-install-recommends $missing
