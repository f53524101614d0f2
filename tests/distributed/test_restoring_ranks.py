"""What strategies with several processes put back: knots, generators, figures; and processes that disagree."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from method_cases import CASES, trainer
from rank_runs import build, start, train
from torch.utils.data import DataLoader

from lightning_distill.callbacks import TrainingHealth
from lightning_distill.callbacks.good_state import restore
from lightning_distill.strategies import RoleFSDP2

pytestmark = pytest.mark.distributed
GAN = next(case for case in CASES if case.name == "gan_fake_score")


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_health_of_sharded_networks_is_that_of_whole_ones(tmp_path):
    found = {}
    for name, strategy in (("whole", "auto"), ("sharded", RoleFSDP2())):
        health = TrainingHealth(every_n_steps=2, terms_every_n_steps=0, num_samples=4)
        train(GAN, tmp_path / name, strategy, steps=2, callbacks=[health])
        found[name] = {k: v for k, v in health.latest.items() if "time/" not in k and "per_second" not in k}
    assert any(name.startswith("ema_distance/") for name in found["whole"])
    assert found["sharded"] == pytest.approx(found["whole"], rel=1e-3, abs=1e-5)


class Times(Callback):
    """The student's times at validation."""

    def on_validation_start(self, trainer, pl_module):
        self.found = list(pl_module.student_times)


@pytest.mark.usefixtures("alone")
def test_searched_knots_come_back_with_the_weights(tmp_path):
    case = next(case for case in CASES if case.method.__name__ == "BOSS")
    saving = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2, filename="{step}")
    train(case, tmp_path / "first", "auto", steps=2, callbacks=[saving], enable_checkpointing=True)
    weights = torch.load(tmp_path / "step=2.ckpt", weights_only=True)["state_dict"]
    for strategy in ("auto", RoleFSDP2()):
        module, times = build(case, tmp_path / "again"), Times()
        run = trainer(2, devices=1, strategy=strategy, callbacks=[times])
        run.validate(
            module, DataLoader([case.data()], batch_size=None), ckpt_path=tmp_path / "step=2.ckpt", verbose=False
        )
        assert times.found == pytest.approx(weights["knots"].tolist())


class GoesBack(Callback):
    """A state that is kept after two updates and put back after three."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, *_):
        torch.rand(3)  # what dropout would draw
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.path)
        if trainer.global_step == 3:
            before = torch.get_rng_state()
            restore(trainer, pl_module, self.path, 1.0)
            self.untouched = torch.equal(before, torch.get_rng_state())


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("strategy", ["auto", "role_fsdp2"])
def test_a_rollback_does_not_draw_the_same_numbers_again(strategy, tmp_path):
    back = GoesBack(tmp_path / "good.ckpt")
    kind = RoleFSDP2() if strategy == "role_fsdp2" else strategy
    train(GAN, tmp_path / "run", kind, steps=4, callbacks=[back])
    assert back.untouched


SCRIPT = """
import sys, torch
from pathlib import Path
sys.path[:0] = [{here!r}, {contracts!r}]
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from method_cases import CASES
from rank_runs import leave, train
from lightning_distill.strategies import RoleDataParallel
import os
rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
case = next(case for case in CASES if case.name == "gan_fake_score")
saving = ModelCheckpoint(dirpath=folder, every_n_train_steps=2, filename="{{step}}", enable_version_counter=False)
masks = LambdaCallback(on_train_batch_start=lambda *_: print("MASK", torch.rand(4).tolist()))
torch.manual_seed(0)  # as seed_everything does on every process
callbacks = [saving, masks]
train(case, folder / f"f{{rank}}", RoleDataParallel(), rank, 2, 2, callbacks=callbacks, enable_checkpointing=True)
try:
    path = None if rank else folder / "step=2.ckpt"
    train(case, folder / f"f{{rank}}", RoleDataParallel(), rank, 2, 4, ckpt_path=path)
    print("ENDED")
except RuntimeError as error:
    print(f"REFUSED {{error}}")
leave()
"""


def test_processes_draw_masks_of_their_own_and_must_begin_at_one_update(tmp_path):
    """The second run is one where a node does not see the checkpoint."""
    script = tmp_path / "script.py"
    here = Path(__file__).parent
    script.write_text(SCRIPT.format(here=str(here), contracts=str(here.parent / "contracts")))
    printed = start(tmp_path, script=script, processes=2)
    masks = [line for line in printed.splitlines() if line.startswith("MASK")]
    assert len(set(masks)) == len(masks) == 4
    assert "ENDED" not in printed
    assert printed.count("REFUSED the processes would begin at updates 0 to 2 (process ") == 2
