#!/bin/bash
#SBATCH --job-name=%%{name}
#SBATCH --array=0-%%{last_task}%%{at_once}
#SBATCH --time=%%{minutes}
#SBATCH --nodes=%%{nodes}
#SBATCH --ntasks-per-node=%%{tasks_per_node}
#SBATCH --cpus-per-task=%%{cpus}
%%{resources}#SBATCH --signal=USR2@%%{signal_s}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%%{output}_%a.out
%%{options}IFS=$'\t' read -r folder name < <(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" %%{listing})
scontrol update "JobId=$SLURM_JOB_ID" "JobName=$name" # tasks that wait have the array's name
exec >> "$folder/log.txt" 2>&1
trap : TERM USR2  # they are for the processes below; this shell stays to requeue
%%{setup}export PYTHONPATH=%%{python_path} %%{environment}
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export PREFOPT_SLURM_JOB=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
# The first bad exit ends the other processes. To have saved and left is none: they may still be about it.
srun --cpus-per-task=$SLURM_CPUS_PER_TASK --kill-on-bad-exit=1 bash -c \
    'trap "" TERM USR2  # until Python takes them
    RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID "$@"
    code=$?
    exit $((code == %%{interrupted} ? 0 : code))' - \
    %%{python} -m prefopt.job "$folder"
code=$?
if [ $code -eq 0 ] && grep -qs '^  "status": "interrupted"' "$folder/record.json"; then
    code=%%{interrupted}
    # A job that is being cancelled saves and leaves in the same way, and is no longer RUNNING.
    if [ ${SLURM_RESTART_COUNT:-0} -lt %%{requeues} ] &&
        [ "$(squeue --noheader --array --jobs=$PREFOPT_SLURM_JOB --format=%T)" = RUNNING ]; then
        scontrol requeue $PREFOPT_SLURM_JOB
    fi
fi
exit $code
