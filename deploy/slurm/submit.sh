#!/bin/sh
# Submits the steps of a chain, each to begin when the one before it has succeeded:
#
#     deploy/slurm/submit.sh SETTINGS            data, data-merge, train, export, generate, generate-merge
#     deploy/slurm/submit.sh SETTINGS STEP...    these
#
# SETTINGS is a copy of settings.sh. Prints the number of each job.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
if [ $# -eq 0 ] || [ ! -f "$1" ]; then
    [ $# -eq 0 ] || echo "error: $1: no such file; expected a copy of $here/settings.sh" >&2
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
set -a # sbatch hands the environment on to the jobs
# shellcheck source=settings.sh
. "$(cd "$(dirname "$1")" && pwd)/$(basename "$1")"
DCGAN_SLURM=$here
set +a
shift
[ $# -gt 0 ] || set -- data data-merge train export generate generate-merge
for step; do
    [ -f "$here/$step.sbatch" ] || { echo "error: $step: no such step; expected one of" "$here"/*.sbatch >&2; exit 2; }
done

after=""
for step; do
    case $step in
        data) options="--array=0-$((DATA_PARTS - 1)) $DATA_JOB" ;;
        data-merge) options=$DATA_JOB ;;
        train) options=$TRAIN_JOB ;;
        export) options=$EXPORT_JOB ;;
        generate) options="--array=0-$((PARTS - 1)) $GENERATE_JOB" ;;
        generate-merge) options=$GENERATE_JOB ;;
    esac
    # shellcheck disable=SC2086 # several options
    job=$(sbatch --parsable --kill-on-invalid-dep=yes ${after:+--dependency=afterok:$after} $options "$here/$step.sbatch")
    after=${job%%;*}
    echo "$step: job $after"
done
