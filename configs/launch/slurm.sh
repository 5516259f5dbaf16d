#!/bin/bash
# growmoe on Slurm: one task for each GPU, and the job goes back into the queue when its time is over. docs/launching.md
#   sbatch configs/launch/slurm.sh --config configs/experiment/bilingual_micro.yaml --trainer.default_root_dir runs/mine
#SBATCH --job-name=growmoe
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
#SBATCH --signal=B:USR1@300
set -uo pipefail
if [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
# export NCCL_SOCKET_IFNAME=ib0    # where NCCL takes the wrong network

requeue=no run=""
# USR1 comes to this shell alone, before the time is over; TERM when somebody cancels the job, which then stays out.
trap 'requeue=yes; kill -TERM "$run" 2>/dev/null' USR1
trap 'kill -TERM "$run" 2>/dev/null' TERM

# What does not work is found in seconds, by all tasks together.
srun growmoe doctor || exit

# srun hands TERM on to all tasks: they finish their step, save, and end with 143.
srun --kill-on-bad-exit=1 growmoe fit "$@" --ckpt_path auto \
    --trainer.devices "$SLURM_NTASKS_PER_NODE" --trainer.num_nodes "$SLURM_JOB_NUM_NODES" &
run=$!
wait "$run"
code=$?
while kill -0 "$run" 2>/dev/null; do # a trap ends `wait` before srun has ended
    wait "$run"
    code=$?
done

if [ "$requeue" = yes ] && [ "$code" -ne 0 ] && [ "$code" -ne 2 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
