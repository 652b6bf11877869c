#!/bin/bash
# A training script on several nodes under Slurm; with fewer than it began with, it goes on:
#     sbatch --nodes=4 runs/slurm.sh train_sft.py config/sft_1b5.py --shard=fsdp
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --signal=TERM@300   # five minutes before the end: the step is finished and saved
set -eu
export HEAD_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# torch 2.13 does not tell a node that joins later where the first one's store is, unless:
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
srun torchrun --nnodes="1:$SLURM_NNODES" --nproc_per_node=8 --max-restarts=3 \
    --rdzv_id="$SLURM_JOB_ID" --rdzv_backend=c10d --rdzv_endpoint="$HEAD_NODE:29400" \
    -- "$@" --resume=auto --save_minutes=10
