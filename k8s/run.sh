#!/bin/sh
# Applies an overlay step by step, each step when the one before it is done:
#
#     k8s/run.sh OVERLAY [STEP...]      for example: k8s/run.sh cpu-demo generate generate-merge
#
# When a step fails, it prints the last lines of its pods and exits with 1. Run again, it resumes: finished steps stay.
# To run a step again, delete its Job first: kubectl -n dcgan delete job STEP.
set -eu
[ $# -ge 1 ] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
overlays="$(cd "$(dirname "$0")" && pwd)/overlays"
overlay="$overlays/$1"
[ -f "$overlay/kustomization.yaml" ] || { echo "error: no overlay $1; expected one of: $(cd "$overlays" && echo *)" >&2; exit 2; }
shift
rendered=$(kubectl kustomize "$overlay")
namespace=$(echo "$rendered" | sed -n 's/^  namespace: //p' | sort -u)
every="data data-merge train export generate generate-merge serve"
poll_seconds=${POLL_SECONDS:-5}

in_overlay() { echo "$rendered" | grep -qx "    app.kubernetes.io/component: $1"; }

apply() { kubectl apply -k "$overlay" -l "app.kubernetes.io/component=$1" -o name; }

# Waits for a Job or JobSet to end.
finished() {
    said=""
    while :; do
        conditions=$(kubectl -n "$namespace" get "$2" -o 'jsonpath={.status.conditions[?(@.status=="True")].type}')
        case " $conditions " in
            *" Complete "* | *" Completed "*) echo "$1: done"; return 0 ;;
            *" Failed "*)
                echo "error: $1 has failed. The last lines of its pods:" >&2
                kubectl -n "$namespace" logs --prefix --tail=3 --all-containers \
                    -l "app.kubernetes.io/component=$1" --max-log-requests=100 >&2 || true
                return 1 ;;
        esac
        pods=$(kubectl -n "$namespace" get pods -l "app.kubernetes.io/component=$1" -o 'jsonpath={.items[*].status.phase}')
        now=$(echo "$pods" | tr ' ' '\n' | sort | uniq -c | xargs)
        [ "$now" = "$said" ] || echo "$1: pods: ${now:-none yet}"
        said=$now
        sleep "$poll_seconds"
    done
}

for step in "$@"; do
    case " $every " in *" $step "*) ;; *) echo "error: no step $step; expected one of: $every" >&2; exit 2 ;; esac
done
# shellcheck disable=SC2086
[ $# -gt 0 ] || set -- $every
apply base
for step in "$@"; do
    in_overlay "$step" || continue
    echo "== $step"
    applied=$(apply "$step")
    for thing in $applied; do
        case $thing in job.batch/* | jobset.*) finished "$step" "$thing" ;; esac
    done
done
