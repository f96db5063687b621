#!/bin/sh
# Applies an overlay step by step, each step when the one before it is done:
#
#     k8s/run.sh OVERLAY [STEP...]      for example: k8s/run.sh cpu-demo generate generate-merge
#
# It says how the pods are at every change and once a minute: why those that wait do so, and the last words of those
# that failed. When a step fails, it exits with 1. Run again, it resumes: finished steps stay. It outlasts an API server
# that does not answer for ten minutes.
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
minute=12 # looks
patience=120 # looks that may stay unanswered
errors=$(mktemp)
trap 'rm -f "$errors"' EXIT
reached="" # whether the API server has answered: before, the address may be wrong

# What kubectl says when the API server, or what it needs, is away: restarting, overloaded, or behind a broken network.
away='connection to the server|Unable to connect|connection refused|connection reset|connection lost|broken pipe'
away="$away|no route to host|i/o timeout|TLS handshake timeout|deadline exceeded|EOF|etcdserver"
away="$away|ServiceUnavailable|ServerTimeout|\(Timeout\)|GatewayTimeout|TooManyRequests|InternalError"

# kubectl; asks again while the API server is away.
ask() {
    unanswered=0
    until answer=$(kubectl "$@" 2>"$errors"); do
        unanswered=$((unanswered + 1))
        if [ -z "$reached" ] || [ $unanswered -gt $patience ] || ! grep -Eq "$away" "$errors"; then
            cat "$errors" >&2
            return 1
        fi
        [ $unanswered -gt 1 ] || echo "no answer, asking again: $(head -n 1 "$errors")" >&2
        sleep "$poll_seconds"
    done
    cat "$errors" >&2
    [ -z "$answer" ] || printf '%s\n' "$answer"
}

in_overlay() { echo "$rendered" | grep -qx "    app.kubernetes.io/component: $1"; }

apply() { ask apply -k "$overlay" -l "app.kubernetes.io/component=$1" -o name; }

# A line for each pod of a step: name, phase, and if it failed: how, and what it said last, in quotes.
pods() {
    ended='{{with .state.terminated}}{{if .exitCode}}{{.finishedAt}} with code {{.exitCode}}, {{.reason}}: '
    ended="$ended"'{{printf "%q" (or .message "")}}{{end}}{{end}}'
    template='{{range .items}}{{.metadata.name}} {{.status.phase}} {{with .status.message}}{{printf "%q" .}}{{else}}'
    template="$template{{range .status.initContainerStatuses}}$ended{{end}}"
    template="$template{{range .status.containerStatuses}}$ended{{end}}"'{{end}}{{"\n"}}{{end}}'
    ask -n "$namespace" get pods -l "app.kubernetes.io/component=$1" -o "go-template=$template"
}

# The last warning about each of the given objects, each text once: by the scheduler, the node, the Job controller.
warnings() {
    kubectl -n "$namespace" get events --field-selector type=Warning --sort-by .metadata.creationTimestamp \
        -o 'go-template={{range .items}}{{.involvedObject.name}} {{.reason}}: {{.message}}{{"\n"}}{{end}}' 2>/dev/null |
        awk -v names=" $* " 'index(names, " " $1 " ") { name = $1; sub(/^[^ ]* /, ""); last[name] = $0 }
            END { for (name in last) print last[name] }' | sort -u
}

# Of a quoted text, the line that says most: the last error, else the last line.
last_words() {
    printf '%s\n' "$1" | sed 's/^"//; s/" *$//; s/\\n/\
/g' | sed 's/\\"/"/g' | awk 'NF { last = $0 } /error: / { error = $0 } END { print error != "" ? error : last }'
}

# Waits for a Job or JobSet to end.
finished() {
    said="" looks=0 told=" "
    while :; do
        conditions=$(ask -n "$namespace" get "$2" -o 'jsonpath={.status.conditions[?(@.status=="True")].type}')
        list=$(pods "$1")
        while read -r pod phase words; do
            case "$phase$told" in
                Failed*" $pod "*) ;;
                Failed*)
                    told="$told$pod "
                    printf '%s: %s failed %s%s\n' "$1" "$pod" "${words%%\"*}" "$(last_words "\"${words#*\"}")" ;;
            esac
        done <<EOF
$list
EOF
        case " $conditions " in
            *" Complete "* | *" Completed "*) echo "$1: done"; return 0 ;;
            *" Failed "*)
                echo "error: $1 has failed. The last lines of its pods:" >&2
                kubectl -n "$namespace" logs --prefix --tail=3 --all-containers \
                    -l "app.kubernetes.io/component=$1" --max-log-requests=100 >&2 || true
                return 1 ;;
        esac
        now=$(printf '%s\n' "$list" | awk 'NF { n[$2]++ } END { for (phase in n) print n[phase], phase }' | sort -k 2 | xargs)
        waiting=$(printf '%s\n' "$list" | awk '$2 == "Pending" { print $1 }' | xargs)
        why=""
        # shellcheck disable=SC2086
        if [ -n "$waiting" ] || [ -z "$now" ]; then why=$(warnings "${2##*/}" $waiting); fi
        if [ "$now$why" != "$said" ] || [ $((looks % minute)) -eq 0 ]; then
            echo "$1: pods: ${now:-none yet}"
            [ -z "$why" ] || printf '%s\n' "$why" | sed "s/^/$1: waits: /"
        fi
        said=$now$why
        looks=$((looks + 1))
        sleep "$poll_seconds"
    done
}

for step in "$@"; do
    case " $every " in *" $step "*) ;; *) echo "error: no step $step; expected one of: $every" >&2; exit 2 ;; esac
done
# shellcheck disable=SC2086
[ $# -gt 0 ] || set -- $every
apply base
reached=yes
for step in "$@"; do
    in_overlay "$step" || continue
    echo "== $step"
    applied=$(apply "$step")
    for thing in $applied; do
        case $thing in job.batch/* | jobset.*) finished "$step" "$thing" ;; esac
    done
done
