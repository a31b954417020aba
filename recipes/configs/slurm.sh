#!/bin/bash
# Two nodes of eight GPUs under Slurm: sbatch recipes/configs/slurm.sh --data /shared/photos --out /shared/runs/photos
# Two minutes before its time is over, or when it is preempted, the run gets a SIGTERM, saves itself and ends; requeued,
# the same command goes on where it stopped.
#SBATCH --job-name=finetune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
set -euo pipefail
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export FIRST="$first" OMP_NUM_THREADS=8
srun bash -c 'accelerate launch --config_file recipes/configs/two_nodes.yaml \
    --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * 8)) --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$FIRST" recipes/image_classification.py "$@"' recipe "$@"
