"""AGD: the goal is the guided teacher, adapters learn it, and the teacher's weights stay what they are."""

from __future__ import annotations

import pytest
import torch
from conftest import fit
from small_problems import mlp, ready
from torch import nn

from lightning_distill.batch import Batch
from lightning_distill.ema import PowerEMA
from lightning_distill.generation import generate
from lightning_distill.guidance import Guidance, RandomGuidance, guided
from lightning_distill.methods import AGD, GuidanceDistillation
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.guidance_adapters import GuidanceAdapters, GuidedDenoiser
from lightning_distill.networks.merging import base_state_dict
from lightning_distill.networks.roles import Copy, FromCheckpoint, Lora
from lightning_distill.processes import FlowMatching
from lightning_distill.times import few_step_times
from lightning_distill.trajectories import run_solver

N = 6
SMALL = {"width": 8}


def agd(teacher=None, **settings):
    settings = {"shape": [2], "ema": [], "student": GuidanceAdapters(**SMALL), **settings}
    return ready(AGD(teacher or mlp(classes=3), **settings))


def labels(n=N):
    return {"class_labels": torch.arange(n) % 3}


def records(teacher, scale, steps=4, seed=0):
    """Guided trajectories of a teacher with a scale each, as a store hands them out."""
    cond, noise = labels(len(scale)), torch.randn(len(scale), 2, generator=torch.Generator().manual_seed(seed))
    times = few_step_times(teacher.process, steps)
    made = run_solver(teacher, noise, cond, times, "euler", guidance_scale=scale, keep=range(steps))
    return Batch(
        cond=cond,
        noise=noise,
        x0=made.x0,
        states=made.states,
        times=torch.tensor(times, dtype=torch.float64),
        predictions={"guided": made.guided, "scale": scale.float()},
    )


def test_the_settings_are_the_paper_s():
    module = ready(AGD(mlp(classes=3), shape=[2]))
    assert (module.guidance.low, module.guidance.high) == (1.0, 6.0)
    assert module.space == "flow_prediction"  # of a flow; the paper's models have variance-preserving noise
    assert isinstance(module.student, GuidedDenoiser)
    assert module.student.adapters[0].query.out_features == 320
    (entry,) = module.configure_optimizers()
    (group,) = entry["optimizer"].param_groups
    assert (type(entry["optimizer"]), group["lr"], group["weight_decay"]) == (torch.optim.AdamW, 1e-4, 0.0)
    assert {id(p) for p in group["params"]} == {id(p) for p in module.student.parameters()}


@pytest.mark.filterwarnings("ignore:space='epsilon' compares nothing at the first input")
@pytest.mark.parametrize("space", ["epsilon", "flow_prediction"])
def test_at_scale_one_the_goal_is_the_conditional_teacher(space):
    module = agd(space=space)
    assert module.student_loss(records(module.teacher, torch.ones(N))).losses["guidance"].item() < 1e-12
    batch = records(module.teacher, torch.full((N,), 3.0))
    x, t = batch.states.flatten(0, 1), batch.times.repeat(N)
    cond = {"class_labels": batch.cond["class_labels"].repeat_interleave(4)}
    with_cond = module.teacher(x, t, cond).as_type(space)
    without = module.teacher(x, t, module.teacher.null_cond(cond)).as_type(space)
    # guidance adds w - 1 = 2 times the difference of the branches
    expected = (2.0 * (with_cond - without)).square().mean().item()
    assert expected > 1e-4
    assert module.student_loss(batch).losses["guidance"].item() == pytest.approx(expected, rel=1e-3)


def test_the_student_is_told_the_scale_of_its_record_and_the_teacher_is_not_asked():
    module, scale = agd(), torch.linspace(1.5, 5.0, N)
    batch, calls = records(module.teacher, scale), []
    module.teacher.register_forward_pre_hook(lambda *_: calls.append(1))
    *_, told = module.examples(batch)
    torch.testing.assert_close(told, scale.double().repeat_interleave(4))
    module.student_loss(batch)
    assert not calls


def test_from_noise_alone_a_trajectory_has_one_scale_and_the_student_is_told_it():
    module = agd(guidance=RandomGuidance(1.0, 5.0), solver_steps=4, solver="euler")
    batch = Batch(cond=labels())
    x, t, velocity, cond, told = module.examples(batch)
    assert told.std() > 0.1
    noise = module.draws.normal("noise", (N, 2))
    again = records(module.teacher, told)
    states = module.solve(batch, noise, module.solver_times())[0]
    x_again = noise
    for i in range(4):  # the solver's states are those of the told scales
        torch.testing.assert_close(states[i], x_again, rtol=1e-4, atol=1e-5)
        at = again.times[i].expand(N)
        step = (again.times[i + 1] if i < 3 else 0.0) - again.times[i]
        x_again = x_again + float(step) * guided(module.teacher, x_again, at, cond, told).flow_prediction
    expected = guided(module.teacher, x, t, cond, told).flow_prediction
    torch.testing.assert_close(velocity, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*eval mode")
def test_updates_train_adapters_and_leave_the_shared_weights_alone():
    module = agd(check_data=False, solver_steps=2)
    before = {k: v.clone() for k, v in base_state_dict(module.teacher.network).items()}
    start = [p.clone() for p in module.student.parameters()]
    fit(module, 3, Batch(cond=labels(48)), 16)
    after = base_state_dict(module.teacher.network)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert any(not torch.equal(a, b) for a, b in zip(start, module.student.parameters()))
    assert module.student.network is module.teacher.network
    # it is sampled with the scale of the policy, in half of the calls
    z = torch.randn(4, 2)
    made = module.sample(4, labels(4), noise=z, num_steps=3)
    told = generate(module.student, z, labels(4), few_step_times(module.process, 3), "ode")
    assert module.student.family.guidance_scale == 3.5
    assert torch.equal(made, told)


@pytest.mark.filterwarnings("ignore:.*eval mode")
def test_a_checkpoint_holds_the_adapters_and_starts_no_student_of_another_kind(tmp_path):
    module = agd(check_data=False, solver_steps=2, ema=[PowerEMA(0.1)])
    fit(module, 2, Batch(cond=labels(32)), 16).save_checkpoint(tmp_path / "run.ckpt")
    names = set(torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"])
    adapters = {f"{role}.{key}" for role in ("student", "student_ema.power_0_1") for key in module.student.state_dict()}
    assert names == adapters | {"skipped_steps", "skipped_in_a_row"}
    with pytest.raises(ValueError, match="holds guidance adapters"):
        FromCheckpoint(str(tmp_path / "run.ckpt"), role="student").build(mlp(classes=3))


def test_guidance_distillation_takes_the_same_role_with_noised_data():
    module = ready(
        GuidanceDistillation(
            mlp(classes=3), shape=[2], ema=[], guidance=RandomGuidance(1.0, 4.0), student=GuidanceAdapters(**SMALL)
        )
    )
    batch = Batch(x0=torch.randn(N, 2), cond=labels())
    x, t, velocity, cond, told = module.examples(batch)
    assert told.std() > 0.1
    plain = module.teacher(x, t, cond).flow_prediction
    assert module.student_loss(batch).losses["guidance"].item() == pytest.approx(
        (plain - velocity).square().mean().item(), rel=1e-5
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"student": Copy()}, "trains adapters on the teacher's frozen network"),
        ({"student": Lora(rank=2)}, "trains adapters on the teacher's frozen network"),
        ({"guidance": Guidance(1.0)}, "nothing to distil"),
        ({"space": "velocity"}, "space='velocity' is unknown"),
    ],
)
def test_contradictions_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        agd(**settings)


def test_data_without_trajectories_are_refused():
    with pytest.raises(ValueError, match="learns on guided trajectories"):
        agd().student_loss(Batch(x0=torch.randn(N, 2), cond=labels()))


# ------------------------------------------------------------------------------------------------ learning
class Gaussians(nn.Module):
    """Velocity of the classes N(m_c, s^2), with m = 0 for none: guidance adds (w - 1) b(t) m_c, whatever x is."""

    def __init__(self, std=0.5):
        super().__init__()
        self.std = std
        self.register_buffer("means", torch.tensor([[1.0, 0.0], [-0.5, 0.8], [0.2, -1.0], [0.0, 0.0]]))
        self.block = nn.Linear(2, 2)
        with torch.no_grad():
            self.block.weight.copy_(torch.eye(2))
            self.block.bias.zero_()

    def forward(self, x, t, class_labels):
        t = t.to(x)[:, None]
        gain = (1 - t) * self.std**2 / ((1 - t) ** 2 * self.std**2 + t**2)
        x0 = gain * x + (1 - gain * (1 - t)) * self.means[class_labels]
        return self.block((x - x0) / t)


@pytest.mark.long
@pytest.mark.learn
def test_adapters_reach_zero_where_the_guided_velocity_is_linear_in_the_scale():
    teacher = Denoiser(Gaussians(), FlowMatching(), "flow_prediction", null_class=3)
    role = GuidanceAdapters("additive", width=32, target_modules=["block"])
    scale = 1.0 + 3.0 * torch.rand(96, generator=torch.Generator().manual_seed(2))
    batch = records(teacher, scale, steps=8)

    def loss_after(updates, batch):
        module = agd(teacher, student=role, guidance=RandomGuidance(1.0, 4.0), space="flow_prediction")
        start = module.student_loss(batch).losses["guidance"].item()
        optimizer = torch.optim.Adam(module.student.parameters(), lr=3e-3)
        for update in range(updates):
            optimizer.param_groups[0]["lr"] = 3e-3 * (1 - update / updates)
            optimizer.zero_grad()
            module.student_loss(batch).losses["guidance"].backward()
            optimizer.step()
        return module.student_loss(batch).losses["guidance"].item() / start

    assert loss_after(400, batch) < 2e-3
    # one that is told the same scale for all can learn the mean of the goals only
    deaf = Batch(**{**vars(batch), "predictions": {**batch.predictions, "scale": torch.full((96,), 2.5)}})
    assert loss_after(400, deaf) > 0.05
