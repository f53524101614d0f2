"""A researcher's own classes on the command line, in batches, probes and adapters, and as loaders."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from own_methods import Normed, Shift, prior, teacher, trainer
from torch import nn

from lightning_distill.batch import Batch, slice_cond
from lightning_distill.cli import trainer_cli
from lightning_distill.commands.errors import one_line
from lightning_distill.commands.plan import plan_config
from lightning_distill.commands.run_folder import load_run, read_config, read_data
from lightning_distill.data import InMemory, ResumableLoader
from lightning_distill.ema import ConstantEMA
from lightning_distill.methods import DMD2, TeacherTraining
from lightning_distill.methods.base import Terms
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.roles import Lora
from lightning_distill.networks.specs import DenoiserSpec, NewDenoiser
from lightning_distill.processes import FlowMatching
from lightning_distill.strategies.role_data_parallel import tell_of_statistics
from lightning_distill.times import TimeDistribution

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*eval mode", "ignore:Checkpoint directory", "ignore:.*logging interval", "ignore:The dirpath has changed"
)


# ------------------------------------------------------------------------------------------------ from the command line
class Untyped(torch.optim.lr_scheduler.LambdaLR):
    """A schedule in torch's own style."""

    def __init__(self, optimizer, period: int = 5):
        super().__init__(optimizer, lambda update: 0.5 ** (update // period))


class Own(Shift):
    """An argument without annotation, another without a type that can be checked."""

    def __init__(self, teacher: DenoiserSpec | Denoiser | None = None, *, strength=1.0, **kwargs):
        super().__init__(teacher, **kwargs)
        self.strength = strength


class OwnWithoutAnnotation(Shift):
    def __init__(self, teacher, **kwargs):
        super().__init__(teacher, **kwargs)


def settings(**model) -> dict:
    network = {"class_path": "ResidualMLP", "init_args": {"shape": [2], "width": 8, "depth": 1}}
    spec = {"network": network, "process": "FlowMatching", "prediction_type": "flow_prediction", "sigma_data": 1.0}
    own = {"teacher": {"class_path": "NewDenoiser", "init_args": spec}, **model}
    return {
        "model": {"class_path": f"{__name__}.Own", "init_args": own},
        "data": {"class_path": "Prior", "init_args": {"batch_size": 8}},
    }


def test_runs_with_untyped_classes_can_be_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = settings(strength=2.5, student_scheduler={"class_path": f"{__name__}.Untyped", "init_args": {"period": 2}})
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    cli = trainer_cli(["fit", "-c", "run.yaml", "--trainer.max_steps=3", "--trainer.accelerator=cpu"])
    run = Path(cli.trainer.log_dir)
    module = load_run(run)
    assert type(module).__name__ == "Own"
    assert module.strength == 2.5
    assert read_data(read_config(run)).batch_size == 8
    pairs = zip(module.student.parameters(), cli.model.student.parameters())
    assert all(torch.equal(read, trained) for read, trained in pairs)
    assert plan_config(read_config(run)).need > 0


def test_a_short_name_without_an_annotation_says_what_to_write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = settings()
    config["model"]["class_path"] = f"{__name__}.OwnWithoutAnnotation"
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    with pytest.raises((Exception, SystemExit)) as error:
        trainer_cli(["fit", "-c", "run.yaml", "--trainer.max_steps=1"])
    line = one_line(error.value)
    assert "'NewDenoiser'" in line
    assert "annotate it, or write lightning_distill.networks.specs.NewDenoiser" in line


def test_batch_norm_on_several_processes_is_told_of():
    normed = NewDenoiser(Normed, FlowMatching(), "flow_prediction", sigma_data=1.0)
    module = TeacherTraining(normed, label_dropout=0.0, shape=[2])
    module.configure_model()
    with pytest.warns(UserWarning, match="the student has batch normalisation: every process keeps the statistics"):
        tell_of_statistics(module)
    module.student.network.norm = nn.SyncBatchNorm.convert_sync_batchnorm(module.student.network.norm)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tell_of_statistics(module)
        frozen = Shift(teacher(Normed()), shape=[2])  # copies of a teacher stay in eval mode
        frozen.configure_model()
        tell_of_statistics(frozen)


# ------------------------------------------------------------------------------------------------ what is cut, put back
def test_lists_of_conditions_are_cut_like_tensors():
    captions = [f"caption {i}" for i in range(6)]
    cond = {"labels": torch.arange(6), "caption": captions, "size": (16, 16), "scale": torch.tensor(2.0)}
    batch = Batch(cond=cond, x0=torch.zeros(6, 2))
    part = batch.rows(2, 4)
    assert part.cond["caption"] == captions[2:4]
    assert part.cond["size"] == (16, 16)
    assert part.cond["labels"].tolist() == [2, 3]
    picked = slice_cond(cond, torch.tensor([5, 0, 5]), 6)
    assert picked["caption"] == [captions[5], captions[0], captions[5]]
    alone = Batch(cond={"caption": captions}, size=6)
    assert alone.rows(4, 6).cond["caption"] == captions[4:]
    assert alone.cond_of(torch.tensor([1, 1]))["caption"] == [captions[1]] * 2


def test_a_loss_outside_of_an_update_leaves_targets_alone():
    class Bank(Shift):
        targets = ("bank",)

        def build_roles(self):
            super().build_roles()
            self.bank = nn.BatchNorm1d(2, affine=False)

        def student_loss(self, batch):
            self.bank(self.draws.normal("b", (batch.size, 2)))
            terms = super().student_loss(batch)
            return Terms({**terms.losses, "more": terms.losses["zero"] * 0.5})

    module = Bank(teacher())
    module.configure_model()
    before = {name: value.clone() for name, value in module.bank.named_buffers()}
    gradients = module.term_gradients(Batch(size=8), "probe")
    assert set(gradients) == {"zero", "more"}
    assert all(torch.equal(value, before[name]) for name, value in module.bank.named_buffers())


def test_adapters_of_layers_that_are_never_called_are_refused():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(2, 1, batch_first=True)

        def forward(self, x, t):
            return self.attention(x[:, None], x[:, None], x[:, None])[0][:, 0]

    with pytest.raises(ValueError, match=r"match 'attention.out_proj' of Attention, a layer that torch.nn.Multihead"):
        DMD2(teacher(Attention()), student=Lora(target_modules=["out_proj"]), shape=[2]).configure_model()


@pytest.mark.parametrize("targets", [["linear1", "linear2"], None], ids=["named", "all"])
def test_adapters_within_layers_of_fused_inference_are_heard(targets):
    """torch's ``TransformerEncoderLayer`` in eval mode without gradients reads weights and calls no layer."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 8)
            self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.outer = nn.Linear(8, 2)

        def forward(self, x, t):
            return self.outer(self.block(self.inner(x)[:, None]))[:, 0]

    role = Lora(rank=2) if targets is None else Lora(rank=2, target_modules=targets)
    module = DMD2(teacher(Tokens()), student=role, shape=[2])
    module.configure_model()
    if targets is None:
        assert not any("out_proj" in name for name, _ in module.student.named_parameters())
    with torch.no_grad():
        for parameter in module.role_parameters("student"):
            parameter.normal_()
    x, t = torch.randn(3, 2), torch.full((3,), 0.5, dtype=torch.float64)
    with torch.no_grad():
        sampled, untouched = module.student.eval()(x, t).x0, module.teacher(x, t).x0
    trained = module.student(x, t).x0.detach()
    assert (sampled - untouched).abs().max() > 1e-2
    torch.testing.assert_close(sampled, trained)


def test_adapters_that_nothing_hears_are_told(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(2, 8), nn.Linear(8, 2)

        def forward(self, x, t):
            return nn.functional.linear(x, self.inner.weight) @ self.outer.weight.T + self.outer(self.inner(x))

        def half(self, x, t):
            return self.outer(nn.functional.linear(x, self.inner.weight))

    trainer(tmp_path, 1).fit(DMD2(teacher(Tied()), student=Lora(rank=2), fake_score_steps=1, shape=[2]), prior())
    Tied.forward = Tied.half
    module = DMD2(teacher(Tied()), student=Lora(rank=2), fake_score_steps=1, shape=[2])
    with pytest.warns(UserWarning, match=r"1 of the 2 adapters of student are without effect \('inner' is the first\)"):
        trainer(tmp_path, 1).fit(module, prior())


def test_a_denoiser_that_is_adapted_already_says_what_to_give():
    shared = teacher()
    DMD2(shared, student=Lora(rank=2)).configure_model()
    with pytest.raises(ValueError, match="Give each method a Denoiser of its own, or a spec"):
        DMD2(shared, student=Lora(rank=2)).configure_model()


@pytest.mark.parametrize("name", ["student", "a.b"])
def test_averages_have_names_of_their_own(name):
    profile = ConstantEMA(0.9)
    profile.name = name
    with pytest.raises(ValueError, match=f"an ema profile is named '{name}'"):
        Shift(teacher(), ema=[profile])


def test_times_beyond_the_process_are_refused(tmp_path):
    class Late(TimeDistribution):
        def quantile(self, u, process):
            return 1.5 * u

    class Own(Shift):
        def student_loss(self, batch):
            self.times("t", Late(), batch.size)
            return super().student_loss(batch)

    with pytest.raises(ValueError, match=r"Late gives training times from .* outside of \[0, 1\] of FlowMatching"):
        trainer(tmp_path).fit(Own(teacher()), prior(batch_size=64))


def test_a_module_can_be_sampled_before_any_fit():
    assert Shift(teacher()).sample(3).shape == (3, 2)


def test_a_last_batch_that_cannot_be_cut_is_refused_before_training(tmp_path):
    class Own(DMD2):
        steps = 0

        def student_loss(self, batch):
            Own.steps += 1
            return super().student_loss(batch)

    def loader(**settings):
        return torch.utils.data.DataLoader(torch.zeros(13, 2), batch_size=4, **settings)

    def module():
        return Own(teacher(), fake_score_steps=1, accumulate_grad_batches=2, check_data=False)

    with pytest.raises(ValueError, match=r"last batch of an epoch has 1 samples, .* drop_last=True"):
        trainer(tmp_path, 8).fit(module(), loader())
    assert Own.steps == 0
    trainer(tmp_path, 4).fit(module(), loader(drop_last=True))


def test_a_loader_made_for_another_process_is_refused(tmp_path):
    """Else all processes would see the same samples, or one process a part of them."""
    source = InMemory(Batch(x0=torch.zeros(16, 2)))
    loader = ResumableLoader(source, 4, rank=1, world_size=2)
    with pytest.raises(ValueError, match=r"rank=1 and world_size=2, and this is process 0 of 1; .*global_rank"):
        trainer(tmp_path, 1).fit(DMD2(teacher(), fake_score_steps=1, check_data=False), loader)


def test_a_second_fit_from_the_beginning_is_told_of(tmp_path):
    module = Shift(teacher())
    trainer(tmp_path, 2).fit(module, prior())
    with pytest.warns(UserWarning, match="has been trained for 2 updates, and this fit begins at 0"):
        trainer(tmp_path, 2).fit(module, prior())
