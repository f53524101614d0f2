#!/bin/bash
# Two nodes with eight GPUs each; Lightning reads the processes from SLURM, so that one task is started per GPU.
#   sbatch examples/slurm.sh configs/method/dmd2_fashion.yaml
#SBATCH --job-name=distill
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue

set -euo pipefail
config=${1:?give a configuration file}
shift

export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-8}
# one run folder for all restarts of this job; a job that was requeued goes on from its last checkpoint
run="runs/slurm_${SLURM_JOB_ID}"
resume=()
if [ -e "$run/checkpoints/last.ckpt" ]; then
  resume=(--ckpt_path "$run/checkpoints/last.ckpt")
fi

srun lightning-distill fit -c "$config" -c configs/strategy/role_fsdp2.yaml \
  --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" \
  --trainer.logger.init_args.save_dir=runs --trainer.logger.init_args.name= \
  --trainer.logger.init_args.version="slurm_${SLURM_JOB_ID}" \
  "${resume[@]}" "$@"
