# What the job scripts share: how a program is started, and what its job does with its exit code (docs/slurm.md).

# Since Slurm 22.05 srun does not take it from the job by itself.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"

# Run a program on the nodes of this job, and end the job with its code; or requeue it where another start helps.
# The time limit's SIGTERM goes to the program alone (--signal=TERM@120). The one of scancel and `scontrol requeue` also
# ends this script: were it caught here, a job that somebody cancels would come again.
step() {
    # shellcheck disable=SC2086 # several words, such as: apptainer exec --nv dcgan.sif
    srun ${DCGAN_RUN:-} "$@"
    code=$?
    case $code in
        143 | 130) ;; # saved after a signal: before the time limit, as a rule
        75 | 137) # a passing fault; killed
            if [ "${SLURM_RESTART_COUNT:-0}" -ge "${DCGAN_RESTARTS:-100}" ]; then
                echo "exit code $code after ${SLURM_RESTART_COUNT:-0} restarts: not started again" >&2
                exit $code
            fi ;;
        *) exit $code ;;
    esac
    echo "exit code $code: requeued" >&2
    scontrol requeue "$SLURM_JOB_ID"
    exit $code
}
