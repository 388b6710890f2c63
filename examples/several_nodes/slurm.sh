#!/usr/bin/env bash
# Fine-tune on several machines of a Slurm cluster: sbatch examples/several_nodes/slurm.sh [key=value …]
# A preempted or timed-out job resumes when it is submitted again; output_dir must be on a shared disk. After a
# preemption or a lost node, Slurm submits it again by itself (--requeue).
#SBATCH --job-name=tune2gguf
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=08:00:00
#SBATCH --requeue
# SIGTERM two minutes before the time limit: the run saves a checkpoint.
#SBATCH --signal=TERM@120
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

config="${CONFIG:-configs/llama3_1_8b/lora.yaml}"
first_node="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"

# One torchrun per machine. They meet at the first one.
srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$first_node:${RENDEZVOUS_PORT:-29500}" \
    --rdzv-id "$SLURM_JOB_ID" \
    --max-restarts 2 \
    recipes/lora_finetune.py --config "$config" resume=auto "$@"
