"""Evaluation shared by two processes gives the figures of one."""

import json
import os
import subprocess
import sys

import pytest
from rank_runs import start

pytestmark = pytest.mark.distributed

SCRIPT = """
import json, sys, torch
torch.set_num_threads(1)
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning_distill.callbacks.evaluation import GenerativeEvaluation
from lightning_distill.callbacks.samples import SampleGrid
from lightning_distill.data.prior import Prior
from lightning_distill.methods import DMD2
from lightning_distill.networks.specs import ZooDenoiser

folder, devices, samples = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
evaluation = GenerativeEvaluation(num_samples=samples, steps=[1, 2], batch_size=7, table=False)
run = Trainer(
    accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", callbacks=[evaluation],
    logger=TensorBoardLogger(folder, name="", version="run"), enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False,
)
run.test(DMD2(ZooDenoiser("digits")), Prior(num_classes=10, batch_size=4), verbose=False)
assert all(key.startswith("test/") for key in run.callback_metrics), run.callback_metrics
if run.is_global_zero:
    rows = [{k: v for k, v in row.metrics.items() if k != "samples_per_second"} for row in evaluation.history.rows]
    print("ROWS" + json.dumps(rows))
"""


def torchrun(*words, script, processes):
    """What the script prints, started as users start it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONFAULTHANDLER": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [sys.executable, *launcher, str(script), *map(str, words)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def rows(folder, devices, samples, script, launch=start):
    printed = launch(folder, devices, samples, script=script, processes=devices)
    line = next(line for line in printed.splitlines() if line.startswith("ROWS"))
    return json.loads(line[4:])


# 61: the second rank's last sample is a surplus; 31 to a rank is not a multiple of the draws' blocks
@pytest.mark.parametrize("launch", [start, pytest.param(torchrun, marks=pytest.mark.slow)])
def test_two_processes_measure_what_one_does(tmp_path, launch):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    one = rows(tmp_path / "one", 1, 61, script)
    two = rows(tmp_path / "two", 2, 61, script, launch)
    assert len(one) == len(two) == 2
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert b[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert (tmp_path / "two" / "run" / "metrics.json").is_file()
