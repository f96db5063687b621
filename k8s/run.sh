#!/bin/sh
# Runs an overlay step by step, each step when the one before it is done:
#
#     k8s/run.sh OVERLAY [STEP...]      for example: k8s/run.sh cpu-demo generate generate-merge
#     k8s/run.sh OVERLAY files          a pod to copy pictures in and samples out
#     k8s/run.sh OVERLAY down           takes away all that runs; the volume stays, with what is on it
#     k8s/run.sh OVERLAY down --volume  takes away the namespace as well: volume, samples, everything
#
# It says how the pods are at every change and once a minute: why those that wait do so, and the last words of those
# that failed. When a step fails, it exits with 1. It outlasts an API server that does not answer for ten minutes.
#
# Run again, it resumes. What is done stays done, unless the image or a setting that the step uses has changed, or the
# step before it has run since: then the step runs again. What failed runs again. What is running goes on with what it
# was started with: other settings are refused until it has ended.
set -eu
[ $# -ge 1 ] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
overlays="$(cd "$(dirname "$0")" && pwd)/overlays"
name=$1
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

# Without the pages of JSON of a field that cannot change.
errors_in_short() { sed 's/Invalid value: .*: field is immutable/field is immutable/' "$errors"; }

# kubectl on the text in $input; asks again while the API server is away.
ask() {
    unanswered=0
    until answer=$(printf '%s\n' "${input:-}" | kubectl "$@" 2>"$errors"); do
        unanswered=$((unanswered + 1))
        if [ -z "$reached" ] || [ $unanswered -gt $patience ] || ! grep -Eq "$away" "$errors"; then
            errors_in_short >&2
            return 1
        fi
        [ $unanswered -gt 1 ] || echo "no answer, asking again: $(head -n 1 "$errors")" >&2
        sleep "$poll_seconds"
    done
    errors_in_short >&2
    [ -z "$answer" ] || printf '%s\n' "$answer"
}

# What the overlay has for a step; a TrainJob last, which is refused before its runtime is there.
documents() {
    printf '%s\n---\n' "$rendered" | awk -v label="    app.kubernetes.io/component: $1" '
        $0 == "---" { if (mine && kind == "TrainJob") last = text "---\n"; else if (mine) printf "%s---\n", text
            text = mine = ""; next }
        /^kind:/ { kind = $2 }
        $0 == label { mine = 1 }
        { text = text $0 "\n" }
        END { printf "%s", last }'
}

# What of it runs: job/train, jobset/train, trainjob/train, deployment/serve, pod/files.
workload() {
    documents "$1" | awk '/^kind:/ { kind = tolower($2) }
        /^  name:/ && kind ~ /^(job|jobset|trainjob|deployment|pod)$/ { print kind "/" $2 }'
}

apply() {
    input=$1 applied=0
    ask apply -f - -o name >/dev/null || applied=$?
    input=""
    return $applied
}

# The settings of the overlay, KEY=value, as those of a cluster are shown below.
settings() {
    printf '%s\n---\n' "$rendered" | awk '
        $0 == "---" { if (name ~ /^settings-/) printf "%s", data; data = name = inside = ""; next }
        /^  name:/ { name = $2 }
        /^[^ ]/ { inside = $0 == "data:" }
        /^  / && inside { sub(/^  /, ""); sub(/: /, "="); data = data $0 "\n" }' |
        sed "s/=\"\(.*\)\"\$/=\1/; s/='\(.*\)'\$/=\1/"
}

# What differs between what a thing was started with, and what the overlay has for its step: settings and images.
changes() {
    theirs=$(ask -n "$namespace" get configmap "$2" --ignore-not-found \
        -o 'go-template={{range $key, $value := .data}}{{$key}}={{$value}}{{"\n"}}{{end}}')
    ours=$(settings)
    {
        for key in $(documents "$1" | grep -o '\$([A-Z_]*)' | tr -d '$()' | sort -u); do
            was=$(printf '%s\n' "$theirs" | sed -n "s/^$key=//p")
            is=$(printf '%s\n' "$ours" | sed -n "s/^$key=//p")
            [ "$was" = "$is" ] || printf ', %s=%s (now %s)' "$key" "$was" "$is"
        done
        was=$(echo "$3" | tr ' ' '\n' | sort -u | xargs)
        is=$(documents "$1" | sed -n 's/^ *\(- \)\{0,1\}image: //p' | sort -u | xargs)
        [ "$was" = "$is" ] || printf ', image %s (now %s)' "$was" "$is"
    } | sed 's/^, //'
}

# A line for each pod of a step: name, phase, why it waits, and if it failed: how, and what it said last, in quotes.
pods() {
    ended='{{with .state.waiting}}{{.reason}}{{end}}{{with .state.terminated}}{{if .exitCode}}'
    ended="$ended"'{{.finishedAt}} with code {{.exitCode}}, {{.reason}}: {{printf "%q" (or .message "")}}{{end}}{{end}}'
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

# Which setting an option is that a message speaks of.
hints() {
    documents "$1" | sed -n 's/^ *- \(--[a-z-]*\)=\$(\([A-Z_]*\)).*/\1 \2/p' | sort -u | while read -r option key; do
        case " $2 " in *" $option "* | *" $option:"*) echo "$1: $option is $key in $name/edit/kustomization.yaml" ;; esac
    done
}

begin_looking() { said="" looks=0 told=" "; }

# Says how a step's pods are, if that has changed or a minute has passed. Fails when they can never start.
look() {
    list=$(pods "$1") || return 1
    while read -r pod phase words; do
        case "$phase$told" in
            Failed*" $pod "*) ;;
            Failed*)
                told="$told$pod "
                last=$(last_words "\"${words#*\"}")
                printf '%s: %s failed %s%s\n' "$1" "$pod" "${words%%\"*}" "$last"
                hints "$1" "$last" ;;
        esac
        case $words in
            InvalidImageName* | ErrImageNeverPull*)
                echo "error: $1 can never start: $words, $(warnings "$pod")" >&2
                return 1 ;;
        esac
    done <<EOF
$list
EOF
    now=$(printf '%s\n' "$list" | awk 'NF { n[$2 ($2 == "Pending" && $3 ~ /^[A-Z]/ ? " (" $3 ")" : "")]++ }
        END { for (phase in n) print n[phase], phase }' | sort -k 2 | xargs)
    waiting=$(printf '%s\n' "$list" | awk '$2 == "Pending" { print $1 }' | xargs)
    why=""
    case " $3 " in *" Suspended "*) why="suspended until its queue admits it" ;; esac
    # shellcheck disable=SC2086
    [ -z "$waiting$why" ] && [ -n "$now" ] || why=$why$(warnings "${2##*/}" $waiting)
    if [ "$now$why" != "$said" ] || [ $((looks % minute)) -eq 0 ]; then
        echo "$1: pods: ${now:-none yet}"
        [ -z "$why" ] || printf '%s\n' "$why" | sed "s/^/$1: waits: /"
        running=$(printf '%s\n' "$list" | awk '$2 == "Running" { print $1; exit }')
        if [ $looks -gt 0 ] && [ -n "$running" ]; then
            line=$(kubectl -n "$namespace" logs "$running" --tail=1 2>/dev/null) || line=""
            [ -z "$line" ] || echo "$1: $running: $line"
        fi
    fi
    said=$now$why
    looks=$((looks + 1))
    sleep "$poll_seconds"
}

true_conditions() {
    ask -n "$namespace" get "$1" -o 'jsonpath={.status.conditions[?(@.status=="True")].type}'
}

# Waits for a Job, JobSet or TrainJob to end.
finished() {
    begin_looking
    while :; do
        conditions=$(true_conditions "$2") || return 1
        case " $conditions " in
            *" Complete "* | *" Completed "*) echo "$1: done"; return 0 ;;
            *" Failed "*)
                look "$1" "$2" "" || true
                why='{.status.conditions[?(@.type=="Failed")].reason}: {.status.conditions[?(@.type=="Failed")].message}'
                why=$(ask -n "$namespace" get "$2" -o "jsonpath=$why")
                case $why in DeadlineExceeded*) why="$why (DEADLINE, waiting for nodes included)" ;; esac
                echo "error: $1 has failed: $why. The last lines of its pods:" >&2
                kubectl -n "$namespace" logs --prefix --tail=3 --all-containers \
                    -l "app.kubernetes.io/component=$1" --max-log-requests=100 >&2 || true
                echo "Mend the cause, and run the same command again: $1 runs again, and resumes" >&2
                return 1 ;;
        esac
        look "$1" "$2" "$conditions" || return 1
    done
}

# Waits for a Deployment or a Pod that goes on running.
started() {
    begin_looking
    while :; do
        case $2 in
            pod/*) state=$(true_conditions "$2") || return 1 ;;
            *) state=$(ask -n "$namespace" rollout status "$2" --watch=false) || return 1 ;;
        esac
        case " $state " in *" Ready "* | *"successfully rolled out"*) echo "$1: ready"; return 0 ;; esac
        look "$1" "$2" "" || return 1
    done
}

# With its pods, and not before they have ended.
remove() { ask -n "$namespace" delete "$1" --ignore-not-found --cascade=foreground >/dev/null; }

# Runs a Job, JobSet or TrainJob, or finds that this has been done; sets `before` to when it ended.
run() {
    state='{..configMapRef.name}{.metadata.annotations.dcgan\.settings}|{..image}'
    state="$state|{.status.conditions[?(@.status==\"True\")].type}"
    state="$state|{.metadata.creationTimestamp}|{.status.conditions[?(@.status==\"True\")].lastTransitionTime}"
    found=$(ask -n "$namespace" get "$2" --ignore-not-found -o "jsonpath=$state")
    IFS='|' read -r maps images conditions created times <<EOF
$found
EOF
    maps=${maps%% *} again=""
    if [ -n "$found" ]; then
        changed=$(changes "$1" "$maps" "$images")
        case " $conditions " in
            *" Complete "* | *" Completed "*)
                if [ -n "$changed" ]; then
                    again="finished ${times##* } with $changed"
                elif expr "$created" "<" "$before" >/dev/null; then
                    again="finished ${times##* }, and what it works on was made again at $before"
                else
                    echo "$1: done before, at ${times##* }, with the same settings"
                    before=${times##* }
                    return 0
                fi ;;
            *" Failed "*) again="failed ${times##* }${changed:+ with $changed}" ;;
            *)
                if [ -n "$changed" ]; then
                    echo "error: $1 is running, since $created, with $changed. It keeps what it was started with. Put the" \
                        "old values back to wait for it, or stop it: kubectl -n $namespace delete $2 (it saves first)" >&2
                    return 1
                fi ;;
        esac
    fi
    if [ -n "$again" ]; then
        echo "$1: $again; runs again"
        remove "$2"
        maps=""
    fi
    # Settings that the step does not use may have changed: those of a running Job keep their name.
    text=$(documents "$1")
    [ -z "$maps" ] || text=$(printf '%s\n' "$text" | sed "s/name: settings-[a-z0-9]*\$/name: $maps/")
    case $2$maps in
        # Its controller reads the runtime again when a queue lets it go on: the one that it was started with.
        trainjob/*settings-*) text="" ;;
    esac
    if [ -n "$text" ] && ! apply "$text"; then
        ! grep -q "field is immutable" "$errors" || echo "error: $1 is running, and was started from other manifests:" \
            "its pods cannot change. Wait for it, or stop it: kubectl -n $namespace delete $2 (it saves first)" >&2
        return 1
    fi
    finished "$1" "$2"
    before=$(ask -n "$namespace" get "$2" -o 'jsonpath={.status.conditions[?(@.status=="True")].lastTransitionTime}')
    before=${before##* } ran=yes
}

down() {
    ask -n "$namespace" get pods -o name >/dev/null # else the address is wrong, more likely than a pause
    reached=yes
    for step in files serve generate-merge generate export train data-merge data; do
        for thing in $(workload $step); do
            ask -n "$namespace" delete "$thing" --ignore-not-found # Jobs first: a namespace waits for their pods for ever
        done
        input=$(documents $step)
        [ -z "$input" ] || ask delete --ignore-not-found -f -
        input=""
    done
    if [ "${1:-}" = --volume ]; then
        ask -n "$namespace" delete job --all
        ask delete namespace "$namespace" --ignore-not-found
    else
        echo "left: the namespace $namespace with its settings and volumes. To delete them, samples and all:" \
            "k8s/run.sh $name down --volume"
    fi
}

case "$*" in down | "down --volume") down "${2:-}"; exit ;; esac
for step in "$@"; do
    case " $every files " in
        *" $step "*)
            [ -n "$(workload "$step")" ] || { echo "error: the overlay $name has no step $step" >&2; exit 2; } ;;
        *) echo "error: no step $step; expected one of: $every files, or down [--volume] alone" >&2; exit 2 ;;
    esac
done
# shellcheck disable=SC2086
[ $# -gt 0 ] || set -- $every
apply "$(documents base)"
reached=yes
trap 'echo "stopped waiting; the pods go on. To wait again: the same command; to stop them: k8s/run.sh $name down"; exit 130' INT
before="" ran="" # when the step before this one ended, and whether any has run now
for step in "$@"; do
    for thing in $(workload "$step"); do
        echo "== $step"
        case $thing in
            job/* | jobset/* | trainjob/*) run "$step" "$thing" ;;
            *)
                old=$(ask -n "$namespace" get "$thing" --ignore-not-found -o name)
                case $thing in
                    pod/*) [ -z "$old" ] || remove "$thing" ;;
                esac
                apply "$(documents "$step")"
                case $old$ran in
                    deployment*yes) ask -n "$namespace" rollout restart "$thing" ;; # it loads its model at the start
                esac
                started "$step" "$thing" ;;
        esac
    done
done
