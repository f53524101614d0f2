"""DisBack: a student that stands still, snapshots, the way back, and blended targets."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from small_problems import assert_same_cycle, gaussian_problem, mlp, ready, shift

from lightning_distill.batch import Batch
from lightning_distill.methods import DMD2, DisBack
from lightning_distill.methods.solved_pairs import SolvedPairs
from lightning_distill.networks.adversary import Adversary
from lightning_distill.networks.roles import Explicit, FromCheckpoint, Lora
from lightning_distill.networks.small import ResidualMLP
from lightning_distill.networks.specs import NewDenoiser
from lightning_distill.processes import FlowMatching
from lightning_distill.randomness import Draws

pytestmark = pytest.mark.filterwarnings("ignore:ConstantEMA", "ignore:.*eval mode", "ignore:Checkpoint", "ignore:Using")


def test_without_snapshots_and_blend_it_is_dmd2_bit_for_bit():
    assert_same_cycle(DisBack(mlp(), num_steps=2), DMD2(mlp(), num_steps=2), Batch(size=16))


def at(module, update):
    module.draws = Draws(module.streams, update, 0, "student0")
    return module


def test_the_list_is_walked_backwards_and_ends_with_the_teacher():
    module = ready(DisBack(mlp(), waypoints=3, degradation_updates=8, backtracking_updates=2))
    found = [at(module, update).target_index() for update in range(8, 18)]
    assert found == [2, 2, 1, 1, 0, 0, None, None, None, None]
    assert at(module, 14).real_score() is module.teacher
    assert at(module, 8).real_score() is module.waypoints[2]
    assert [at(module, u).degrading for u in (0, 7, 8)] == [True, True, False]


class Weights(Callback):
    def __init__(self):
        self.student, self.average, self.fake_score = [], [], []

    def on_train_batch_end(self, trainer, module, *_):
        self.student.append([p.detach().clone() for p in module.student.parameters()])
        self.fake_score.append([p.detach().clone() for p in module.fake_score.parameters()])
        for average in module.student_ema.values():
            self.average.append([p.detach().clone() for p in average.parameters()])


def decaying_adam(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, fused=True)


def small(**settings):
    module = DisBack(
        mlp(),
        waypoints=2,
        degradation_updates=6,
        backtracking_updates=2,
        fake_score_steps=2,
        student_optimizer=decaying_adam,
        fake_score_optimizer=decaying_adam,
        **settings,
    )
    module.configure_model()
    shift(module.student)
    return module


def test_the_student_stands_still_while_snapshots_are_taken(ring4_problem):
    module, seen = small(), Weights()
    before = [p.detach().clone() for p in module.student.parameters()]
    ring4_problem.fit(module, 8, Batch(size=64), batch_size=16, callbacks=[seen])
    for update in range(6):
        assert all(torch.equal(a, b) for a, b in zip(before, seen.student[update]))
        torch.testing.assert_close(seen.average[update], seen.average[0], atol=1e-6, rtol=0)
    assert any(not torch.equal(a, b) for a, b in zip(before, seen.student[6]))
    for waypoint, update in zip(module.waypoints, (2, 4)):  # a third and two thirds of six updates
        assert all(torch.equal(a, b) for a, b in zip(waypoint.parameters(), seen.fake_score[update - 1]))
    assert not any(p.requires_grad for p in module.waypoints.parameters())


def test_runs_resume_bit_for_bit_in_every_stage(tmp_path, ring4_problem):
    """Snapshots are in checkpoints, the teacher is not."""

    def run(steps, path=None):
        module = small(ema=[])
        trainer = ring4_problem.fit(module, steps, Batch(size=64), batch_size=16) if path is None else None
        if trainer is None:
            from conftest import ResumableLoader
            from lightning.pytorch import Trainer

            from lightning_distill.data import InMemory

            trainer = Trainer(
                accelerator="cpu",
                max_steps=steps,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            loader = ResumableLoader(InMemory(Batch(size=64)), 16, slices=module.slices_per_cycle)
            trainer.fit(module, loader, ckpt_path=path)
        return module, trainer

    whole, _ = run(10)
    for stop in (3, 7):
        _, trainer = run(stop)
        trainer.save_checkpoint(tmp_path / f"{stop}.ckpt")
        keys = torch.load(tmp_path / f"{stop}.ckpt", weights_only=True)["state_dict"]
        assert sum(k.startswith("waypoints.") for k in keys) == 2 * len(list(whole.fake_score.state_dict()))
        again, _ = run(10, tmp_path / f"{stop}.ckpt")
        for name in ("student", "fake_score", "waypoints"):
            pairs = zip(getattr(whole, name).parameters(), getattr(again, name).parameters())
            assert all(torch.equal(a, b) for a, b in pairs), (stop, name)


def test_degraded_gaussians_lie_between_teacher_and_student(ring4_problem):
    """Means of the snapshots fall from the teacher's 1 towards the student's -.5, one after the other."""
    module = gaussian_problem(
        0.7, -0.5, fake=(1.0, 0.7), method=DisBack, waypoints=3, degradation_updates=40, backtracking_updates=10
    )
    module.optimizer_factories["fake_score"] = lambda p: torch.optim.SGD(p, lr=0.004)
    ring4_problem.fit(module, 41, Batch(size=512), batch_size=128)
    means = [1.0, *(float(w.network.mean) for w in module.waypoints), -0.5]
    assert all(a > b + 0.02 for a, b in pairwise(means)), means


# ------------------------------------------------------------------------------------------------ blend
def test_a_blend_leans_to_the_fake_score_less_and_less():
    module = ready(DisBack(mlp(), blend=0.75, blend_updates=10))
    shift(module.fake_score)
    shares = [at(module, update).blend_share() for update in (0, 5, 10, 50)]
    assert shares == pytest.approx([0.75, 0.375, 0.0, 0.0])
    target = at(module, 5).real_score()
    for mixed, real, fake in zip(target.parameters(), module.teacher.parameters(), module.fake_score.parameters()):
        torch.testing.assert_close(mixed, real + 0.375 * (fake - real))
    assert at(module, 10).real_score() is module.teacher
    before = [p.clone() for p in module.teacher.parameters()]
    at(module, 0).student_loss(Batch(size=8))
    assert all(torch.equal(a, b) for a, b in zip(before, module.teacher.parameters()))
    assert not any(k.startswith("blended") for k in module.state_dict())


def test_an_adapter_of_an_earlier_run_is_not_blended(tmp_path):
    """It runs on the teacher's own weights, which are no mixture of the two."""
    lora = Lora(rank=2, target_modules=["inner", "outer"])
    state = ready(DMD2(mlp(), fake_score=lora, ema=[])).state_dict()
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    role = FromCheckpoint(str(tmp_path / "a.ckpt"), role="fake_score")
    with pytest.raises(ValueError, match="an adapter on the teacher's backbone"):
        DisBack(mlp(), blend=0.5, fake_score=role, ema=[]).configure_model()
    role.merge = True
    DisBack(mlp(), blend=0.5, fake_score=role, ema=[]).configure_model()


@pytest.mark.parametrize("blend", [0.0, 0.5])
def test_scores_of_the_first_stage_are_compared_with_the_teachers(blend):
    gan = Adversary(taps=["blocks.0"], features="teacher")
    settings = {"waypoints": 2, "degradation_updates": 10, "backtracking_updates": 5, "gan_at_scores": True}
    module = ready(DisBack(mlp(), gan=gan, blend=blend, blend_updates=10, ema=[], **settings))
    batch = Batch(x0=torch.randn(8, 2))
    counts = module.forward_counts()
    assert counts == at(module, 12).forward_counts()
    assert at(module, 0).target_index() is None
    assert module.blend_share() == pytest.approx(blend)
    shift(module.fake_score)
    scores = module.scores(module.rollout(batch).x0, batch)
    with torch.no_grad():
        assert torch.equal(scores.real, module.real_score()(scores.x_t, scores.t).x0)
        assert blend or torch.equal(scores.real, module.teacher(scores.x_t, scores.t).x0)


def test_settings_that_cannot_work_are_refused():
    def refused(message, **settings):
        with pytest.raises(ValueError, match=message):
            DisBack(mlp(), **settings).configure_model()

    warm_up = {"regression_steps": 5, "regression_pairs": SolvedPairs()}
    refused("regression_steps=5 has no place there", waypoints=2, degradation_updates=30, **warm_up)
    refused("waypoints=3 snapshots need more degradation_updates", waypoints=3, degradation_updates=3)
    refused("blend=1.0 is a share", blend=1.0)
    refused("an adapter on the teacher's backbone", blend=0.5, fake_score=Lora(rank=2))
    other = Explicit(NewDenoiser(lambda: ResidualMLP((2,), 4, 1), FlowMatching(), "flow_prediction", sigma_data=1.12))
    refused("the two networks differ", blend=0.5, fake_score=other)
