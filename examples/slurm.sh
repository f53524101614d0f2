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
# two minutes before the time is over every task gets SIGUSR1: the running update is finished and saved, and the job is
# put back into the queue
#SBATCH --signal=USR1@120

set -euo pipefail
config=${1:?give a configuration file}
shift

export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-8}
# One run folder for all lives of this job. `last` is the newest whole checkpoint in it; in the job's first life there is
# none, and training starts from the beginning. A task that dies takes the others with it, instead of leaving them to
# wait for it in a collective.
srun --kill-on-bad-exit=1 lightning-distill fit -c "$config" -c configs/strategy/role_fsdp2.yaml \
  --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" \
  --trainer.logger.init_args.save_dir=runs --trainer.logger.init_args.name= \
  --trainer.logger.init_args.version="slurm_${SLURM_JOB_ID}" \
  --ckpt_path=last "$@"
