# Sourced by the batch scripts, with $python set: sets ${ranks[@]}, which starts one rank per task.

# cogvlm_ft/runtime/distributed.py reads rank, world size and local rank from SLURM_*, unless these are set.
unset RANK WORLD_SIZE LOCAL_RANK
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# A different port for each job and each restart: that of the previous attempt may still be in use.
# Below 32768, from where the kernel takes the ports of connections.
MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0}) % 12000))
export MASTER_ADDR MASTER_PORT
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun no longer inherits it from sbatch

# If one rank fails, the step is ended: the other ranks would wait for it.
ranks=(srun --kill-on-bad-exit=1 "$python")
