# Sourced by the batch scripts, in the repository root: $python, and ${ranks[@]}, which starts one rank for each task.
python=${PYTHON:-.venv/bin/python}

# cogvlm_ft/runtime/distributed.py takes rank, world size and local rank from SLURM_*, unless these are set.
unset RANK WORLD_SIZE LOCAL_RANK
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Another port for each job and each restart: the former run's may still be held.
MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0}) % 20000))
export MASTER_ADDR MASTER_PORT
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun no longer takes it from sbatch by itself

# One rank's failure ends all: its peers would wait for it.
ranks=(srun --kill-on-bad-exit=1 "$python")
