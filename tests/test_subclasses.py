"""What a researcher's own method may forget, and what it may rely on."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from own_methods import Normed, Shift, prior, spec, teacher, trainer
from torch import nn
from torch.optim.lr_scheduler import StepLR

from lightning_distill.data.toy import Toy2D
from lightning_distill.ema import ConstantEMA
from lightning_distill.methods import DMD2, DistillationModule, TeacherTraining
from lightning_distill.methods.base import Terms
from lightning_distill.methods.terms import mean_terms
from lightning_distill.networks.specs import NewDenoiser
from lightning_distill.processes import FlowMatching
from lightning_distill.times import Uniform

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*eval mode", "ignore:Checkpoint directory", "ignore:.*logging interval", "ignore:The dirpath has changed"
)


# ------------------------------------------------------------------------------------------------ what is refused
@pytest.mark.parametrize("hook", ["on_save_checkpoint", "on_train_start", "setup", "configure_model"])
def test_hooks_that_hide_those_of_the_base_are_refused(hook):
    with pytest.raises(TypeError, match=rf"Own\.{hook} does not call super\(\)\.{hook}"):
        type("Own", (Shift,), {hook: lambda self, *args: None})

    def polite(self, *args):
        return getattr(super(Shift, self), hook)(*args)

    type("Own", (Shift,), {hook: polite})

    class ByName(Shift):
        def on_save_checkpoint(self, checkpoint):
            DistillationModule.on_save_checkpoint(self, checkpoint)


def test_the_first_phase_is_the_students():
    class Own(Shift):
        phases = {"generator": ("student",), "student": ("head",)}

    with pytest.raises(ValueError, match=r"Own\.phases begins with 'generator'; the first phase is called 'student'"):
        Own(teacher())


def test_a_role_that_does_not_exist_is_refused():
    class Own(Shift):
        phases = {"student": ("student",), "head": ("head", "haed")}

    with pytest.raises(ValueError, match=r"names the role 'haed', but there is no self\.haed"):
        Own(teacher()).configure_model()

    class Target(Shift):
        targets = ("old",)

    with pytest.raises(ValueError, match=r"Target\.targets names the role 'old'"):
        Target(teacher()).configure_model()


def test_a_network_that_nothing_trains_is_refused_unless_it_is_frozen():
    class Own(Shift):
        frozen = False

        def build_roles(self):
            super().build_roles()
            self.extra = nn.Linear(2, 2).requires_grad_(not self.frozen)

    with pytest.raises(ValueError, match=r"self\.extra of Own has parameters that require gradients and is in no ph"):
        Own(teacher()).configure_model()
    Own.frozen = True
    Own(teacher()).configure_model()


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda x: x.mean(), r"student_loss returned a Tensor; return Terms"),
        (lambda x: Terms({}), r"student_loss returned no loss"),
        (lambda x: Terms({"zero": x.mean(1)}), r"student_loss: 'zero' has shape \(8,\); return one number"),
        (lambda x: Terms({"zero": x.mean(), "w": 0.0}), r"student_loss: the term 'w' is a float; return a scalar"),
        (lambda x: Terms({"zero": x.mean()}, {"std": x.std(0)}), r"student_loss: 'std' has shape \(2,\)"),
        (lambda x: Terms({"zero": x.mean()}, {"w": "one"}), r"student_loss: the diagnostic 'w' is a str; give a numb"),
    ],
)
def test_a_loss_that_is_no_number_is_refused_at_the_first_step(tmp_path, returned, message):
    class Own(Shift):
        def student_loss(self, batch):
            return returned(self.distance(batch))

    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).fit(Own(teacher()), prior())


@pytest.mark.parametrize("draw", ["renoise", "times"])
def test_two_draws_of_one_name_in_a_loss_are_refused(tmp_path, draw):
    class Own(Shift):
        second = {}

        def student_loss(self, batch):
            x = self.distance(batch)
            for name in ({}, self.second):
                arguments = (x, Uniform()) if draw == "renoise" else ("t", Uniform(), len(x))
                getattr(self, draw)(*arguments, **name)
            return Terms({"zero": x.mean()})

    with pytest.raises(ValueError, match="twice, and would get the same numbers again"):
        trainer(tmp_path).fit(Own(teacher()), prior())
    if draw == "renoise":
        Own.second = {"name": "second"}
        trainer(tmp_path).fit(Own(teacher()), prior())


def test_hyper_parameters_that_no_checkpoint_can_hold_are_refused(tmp_path):
    class Own(Shift):
        def __init__(self, teacher=None, width: int = 3, **kwargs):
            super().__init__(teacher, **kwargs)
            self.save_hyperparameters(ignore=self.ignored)

    Own.ignored = []
    with pytest.raises(ValueError, match=r"save_hyperparameters\(\) of Own keeps 'teacher', a NewDenoiser"):
        trainer(tmp_path).fit(Own(spec()), prior())
    Own.ignored = ["teacher"]
    fit = trainer(tmp_path)
    fit.fit(Own(teacher()), prior())
    fit.save_checkpoint(tmp_path / "own.ckpt")
    assert torch.load(tmp_path / "own.ckpt", weights_only=True)["hyper_parameters"]["width"] == 3


# ------------------------------------------------------------------------------------------------ what is trained
def test_a_single_parameter_can_be_a_role(tmp_path):
    class Own(Shift):
        def build_roles(self):
            super().build_roles()
            self.head = nn.Parameter(torch.ones(()))

        def head_loss(self, batch):
            return Terms({"head": self.head.square()})

    module = Own(teacher())
    trainer(tmp_path).fit(module, prior())
    assert float(module.head.detach()) < 1.0
    assert "head" in module.state_dict()


def test_averages_follow_the_statistics_of_batch_norm(tmp_path):
    """Parameters of an average lag behind the student's, and what a network counts does not."""
    normed = NewDenoiser(Normed, FlowMatching(), "flow_prediction", sigma_data=1.0)
    module = TeacherTraining(normed, label_dropout=0.0, check_data=False, shape=[2])
    trainer(tmp_path).fit(module, Toy2D("ring", batch_size=8))
    student, average = (dict(network.named_buffers()) for network in (module.student, module.sampling_network()))
    running = [name for name in student if "running" in name or "num_batches" in name]
    assert len(running) == 3
    assert all(torch.equal(student[name], average[name]) for name in running)
    assert int(student[next(n for n in running if "num_batches" in n)]) == 4
    assert not torch.equal(student[next(n for n in running if "running_var" in n)], torch.ones(2))


@pytest.mark.parametrize("every", [2, 4, 3])
def test_cycles_of_two_student_updates_are_logged(tmp_path, every):
    class Own(Shift):
        logged = ()

        def phase_plan(self):
            return [("student", 0), ("student", 0), ("head", 0)]

        def _log_terms(self, phase, terms):
            if phase == "student":
                Own.logged = (*Own.logged, -(-self.trainer.global_step // 2) * 2)

    trainer(tmp_path, 12, log_every_n_steps=every).fit(Own(teacher()), prior())
    wanted = [n for n in range(2, 13, 2) if n // every > (n - 2) // every]
    assert sorted(set(Own.logged)) == wanted
    assert wanted


def test_schedules_step_once_an_update_of_the_student(tmp_path):
    class Own(Shift):
        def phase_plan(self):
            return [("student", 0), ("student", 0), ("head", 0)]

    module = Own(teacher(), student_scheduler=partial(StepLR, step_size=2, gamma=0.5))
    module.scheduler_factories["head"] = partial(StepLR, step_size=2, gamma=0.5)
    fitted = trainer(tmp_path, 8)
    fitted.fit(module, prior())
    assert [optimizer.param_groups[0]["lr"] for optimizer in fitted.optimizers] == [1e-4 * 0.5**4] * 2


def test_averages_are_found_again_after_tensors_were_assigned(tmp_path):
    module = Shift(teacher(), ema=[ConstantEMA(0.1)])
    trainer(tmp_path, 12).fit(module, prior())
    module.load_state_dict({k: v.clone() for k, v in module.state_dict().items()}, assign=True)
    assert set(map(id, module.role_parameters("student"))) == set(map(id, module.student.parameters()))


def test_numbers_of_some_micro_batches_are_averaged_over_those():
    parts = [Terms({"a": torch.tensor(1.0)}, {"w": torch.tensor(3.0)}), Terms({"a": torch.tensor(3.0)})]
    for order in (parts, parts[::-1]):
        mean = mean_terms(order)
        assert float(mean.losses["a"]) == 2.0
        assert float(mean.diagnostics["w"]) == 3.0


def test_rollouts_of_another_name_are_independent(tmp_path):
    class Own(DMD2):
        seen = {}

        def student_loss(self, batch):
            first, again = self.rollout(batch).x0, self.rollout(batch).x0
            other = self.rollout(batch, grad=False, name="other").x0
            type(self).seen |= {"same": torch.equal(first, again), "gap": float((first - other).detach().abs().mean())}
            return super().student_loss(batch)

        def fake_score_loss(self, batch):
            kept = self.rollout(batch, grad=False, name="other").x0
            type(self).seen |= {"kept": kept, "now": self.rollout(batch, grad=False).x0}
            return super().fake_score_loss(batch)

    trainer(tmp_path, 1).fit(Own(teacher(), fake_score_steps=1), prior())
    assert Own.seen["same"]
    assert Own.seen["gap"] > 0.1
    assert not torch.equal(Own.seen["kept"], Own.seen["now"])


def test_a_plain_network_is_sampled_with_the_classes_that_it_declares(tmp_path):
    network = Normed()
    with pytest.warns(UserWarning, match="nothing says how many classes Normed has"):
        trainer(tmp_path, 1).fit(Shift(teacher(network), shape=[2]), prior(num_classes=4))
    network.num_classes = 4
    module = Shift(teacher(network), shape=[2], ema=[])
    module.configure_model()
    assert module.teacher.num_classes == 4
    noise = torch.zeros(4, 2)
    told, given = module.sample(4, noise=noise), module.sample(4, noise=noise, cond={"class_labels": torch.arange(4)})
    assert torch.equal(told, given)
    assert not torch.equal(told, module.sample(4, noise=noise, cond={}))


# ------------------------------------------------------------------------------------------------ the fit
@pytest.mark.parametrize("saved", ["after the fit", "by Lightning's callback"])
def test_a_fit_that_ended_within_an_epoch_goes_on_there(tmp_path, saved):
    """Lightning counts that epoch as processed; eight batches an epoch, and an end after the seventh."""

    def run(steps, path=None, **settings):
        seed_everything(0, verbose=False)
        module, fit = DMD2(teacher(), fake_score_steps=1), trainer(tmp_path, steps, **settings)
        fit.fit(module, prior(), ckpt_path=path, weights_only=True)
        return module.state_dict(), fit

    want, _ = run(20)
    if saved == "after the fit":
        _, fit = run(7)
        path = tmp_path / "end.ckpt"
        fit.save_checkpoint(path)
    else:
        keep = ModelCheckpoint(tmp_path / "kept")
        run(7, enable_checkpointing=True, callbacks=[keep])
        path = keep.best_model_path
    found, _ = run(20, path)
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name], want[name]) for name in want)


def test_epochs_of_some_batches_go_on_with_the_next_epoch(tmp_path):
    """``limit_train_batches`` ends an epoch early on purpose, and a checkpoint of its end does not go back."""

    def run(epochs, path=None):
        seed_everything(0, verbose=False)
        module = DMD2(teacher(), fake_score_steps=1)
        fit = trainer(tmp_path, -1, max_epochs=epochs, limit_train_batches=5)
        fit.fit(module, prior(), ckpt_path=path, weights_only=True)
        return module.state_dict(), fit

    want, _ = run(3)
    _, fit = run(1)
    fit.save_checkpoint(tmp_path / "epoch.ckpt")
    found, _ = run(3, tmp_path / "epoch.ckpt")
    assert all(torch.equal(found[name], want[name]) for name in want)


@pytest.mark.parametrize("overfit", [2, 0])
def test_overfit_batches_repeats_the_same_ones(tmp_path, overfit):
    seen = []

    class Own(TeacherTraining):
        def student_loss(self, batch):
            seen.append(batch.x0.clone())
            return super().student_loss(batch)

    data = Toy2D("ring", batch_size=4, samples_per_epoch=16)
    trainer(tmp_path, 8, overfit_batches=overfit).fit(Own(spec(), label_dropout=0.0, check_data=False), data)
    assert len(seen) == 8
    different = {tuple(x.flatten().tolist()) for x in seen}
    assert len(different) == (2 if overfit else 8)


def test_the_shape_of_samples_is_that_of_the_data_where_nothing_else_says_it(tmp_path):
    network = NewDenoiser(Normed, FlowMatching(), "flow_prediction")
    module = TeacherTraining(network)
    module.configure_model()
    with pytest.raises(ValueError, match="does not know the shape of its samples"):
        module.sample(1)
    run = trainer(tmp_path, 1)
    run.fit(module, Toy2D("ring4", batch_size=8))
    assert module.sample(3).shape == (3, 2)
    run.save_checkpoint(tmp_path / "last.ckpt")
    found = TeacherTraining.load_from_checkpoint(tmp_path / "last.ckpt", network=network)
    assert found.sample(3).shape == (3, 2)
