"""Put a SLURM job back into the queue, without Lightning's own handler of the signal.

That handler saves ``hpc_ckpt_N.ckpt`` into the current folder, from where every later job that starts in it goes on,
whatever it was asked to train.
"""

from __future__ import annotations

import os
import subprocess
import sys

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Trainer

__all__ = ["is_requeued_by", "requeue", "start_without_hpc"]


def is_requeued_by(trainer: Trainer, number: int) -> bool:
    """Whether a signal asks this run to be put back into SLURM's queue."""
    environment = trainer._accelerator_connector.cluster_environment  # strategies of one device know of none
    return (
        isinstance(environment, SLURMEnvironment)
        and environment.auto_requeue
        and environment.requeue_signal is not None
        and number == int(environment.requeue_signal)
    )


def requeue(trainer: Trainer) -> None:
    """Ask SLURM to start this job again; the first process asks, and the others wait for it.

    A failure is told and not raised: the state has been saved.
    """
    if trainer.is_global_zero:
        command = ["scontrol", "requeue", _job()]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
            failure = done.stderr.strip() or f"exit status {done.returncode}" if done.returncode else ""
        except (OSError, subprocess.SubprocessError) as error:
            failure = str(error)
        told = f"failed ({failure}); start the job again yourself" if failure else "done"
        print(f"{' '.join(command)}: {told}", file=sys.stderr, flush=True)
    trainer.strategy.barrier("requeued")  # srun may end all processes when the first one leaves


def start_without_hpc(trainer: Trainer) -> None:
    """Let a run that was given no checkpoint start from the beginning, also where a ``hpc_ckpt_N.ckpt`` lies around."""
    connector = trainer._checkpoint_connector
    connector._ckpt_path, connector._user_managed = None, True


def _job() -> str:
    """Of an array only this task: the array's own number stands for all of them."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
