"""A student that lost three of four modes in its first step: the teacher's first step gives them back."""

from __future__ import annotations

import copy

import pytest
import torch
from PIL import Image

from lightning_distill.generation import generate
from lightning_distill.hybrid import hybrid
from lightning_distill.networks.adapter_transfer import transfer_adapter
from lightning_distill.networks.analytic import GaussianMixture, analytic_denoiser
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.lora import add_adapter
from lightning_distill.networks.small import ResidualMLP, small_unet
from lightning_distill.networks.two_time import TwoTime
from lightning_distill.plots import aligned_strips, save_strips, target_strip
from lightning_distill.processes import FlowMatching
from lightning_distill.times import few_step_times

#: the student's two steps: far above the modes' distances, and far below
TIMES = [10.0, 0.6]


# ------------------------------------------------------------------------------------------------ strips
def pair():
    mixture = GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), std=0.2)
    return analytic_denoiser(mixture, FlowMatching()), torch.randn(5, 2)


@pytest.mark.parametrize("sampler", ["ode", "renoise"])
def test_a_strip_is_the_prediction_at_every_step_and_ends_in_the_sample(sampler):
    teacher, z = pair()
    times = [1.0, 0.7, 0.3]
    strip = target_strip(teacher, z, {}, times, sampler, generator=torch.Generator().manual_seed(1))
    assert strip.shape == (5, 3, 2)
    draws = torch.Generator().manual_seed(1)
    x = z
    for k, t in enumerate(times):
        at = torch.full((5,), t, dtype=torch.float64)
        x0 = teacher(x, at).x0
        torch.testing.assert_close(strip[:, k], x0, rtol=1e-5, atol=1e-6)
        if k < 2:
            eps = torch.randn(5, 2, generator=draws) if sampler == "renoise" else (x - (1 - t) * x0) / t
            x = (1 - times[k + 1]) * x0 + times[k + 1] * eps
    made = generate(teacher, z, {}, times, sampler, generator=torch.Generator().manual_seed(1))
    assert torch.equal(strip[:, -1], made)


def test_a_two_time_student_predicts_its_jump_to_clean_data():
    network = ResidualMLP((2,), 8, 1)
    source = Denoiser(network, FlowMatching(), "flow_prediction")
    student = TwoTime().build(source)
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    z, at = torch.randn(4, 2), torch.ones(4, dtype=torch.float64)
    strip = target_strip(student, z, {}, [1.0, 0.5], "renoise", generator=torch.Generator().manual_seed(0))
    assert torch.equal(strip[:, 0], student(z, at, r=torch.zeros_like(at)).x0)
    assert not torch.equal(strip[:, 0], student(z, at, r=at).x0)


def test_fewer_steps_show_their_latest_prediction():
    strips = {"teacher": (torch.arange(5.0).view(1, 5, 1), [1.0, 0.8, 0.6, 0.4, 0.2]),
              "student": (torch.arange(2.0).view(1, 2, 1), [1.0, 0.5])}  # fmt: skip
    made = aligned_strips(strips)
    assert made["teacher"].flatten().tolist() == [0, 1, 2, 3, 4]
    assert made["student"].flatten().tolist() == [0, 0, 0, 1, 1]
    # a student that starts lower than its teacher shows its first one
    made = aligned_strips({**strips, "student": (torch.arange(2.0).view(1, 2, 1), [0.7, 0.3])})
    assert made["student"].flatten().tolist() == [0, 0, 0, 0, 1]


def test_strips_of_pictures_and_of_points_are_written(tmp_path):
    network = small_unet(8, 1, 0, (8, 16), norm_num_groups=4, attention_head_dim=8)
    model = Denoiser(network, FlowMatching(), "flow_prediction").eval()
    z = torch.randn(3, 1, 8, 8)
    grids = {"teacher": few_step_times(model.process, 4), "student": few_step_times(model.process, 2)}
    strips = aligned_strips({name: (target_strip(model, z, {}, grid), grid) for name, grid in grids.items()})
    save_strips(strips, tmp_path / "pictures.png", scale=2)
    with Image.open(tmp_path / "pictures.png") as picture:
        assert picture.size == (4 * (16 + 2) + 2, 6 * (16 + 2) + 2)  # 4 columns, a row for each model and sample
    teacher, z = pair()
    points = {name: target_strip(teacher, z, {}, [1.0, 0.5, 0.2]) for name in ("teacher", "student")}
    save_strips(points, tmp_path / "points.png")
    with Image.open(tmp_path / "points.png") as picture:
        assert picture.size == (3 * 320, 2 * 336)
    with pytest.raises(ValueError, match="one prediction per step"):
        target_strip(teacher, z, {}, [1.0], "heun")


# ------------------------------------------------------------------------------------------------ learning
def collapsed(teacher, problem, updates=300):
    """A copy of the teacher that is taught one mode at the first time and all of them from the second on."""
    student = copy.deepcopy(teacher).requires_grad_(True)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    x0 = problem.data.x0
    lost = x0[torch.cdist(x0, problem.means).argmin(1) == 0]
    generator = torch.Generator().manual_seed(0)

    def loss(pool, t):
        clean = pool[torch.randint(len(pool), (len(t),), generator=generator)]
        noisy = clean + t[:, None].float() * torch.randn(clean.shape, generator=generator)
        return ((student(noisy, t).x0 - clean) / t[:, None].clamp(0.1, 1.0).float()).square().mean()

    for update in range(updates):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - update / updates)
        low = problem.times.quantile(torch.rand(256, generator=generator, dtype=torch.float64), problem.process)
        optimizer.zero_grad()
        first = torch.full((256,), TIMES[0], dtype=torch.float64)
        (loss(lost, first) + loss(x0, low.clamp_max(1.5 * TIMES[1]))).backward()
        optimizer.step()
    return student.requires_grad_(False)


def modes(samples, problem):
    """How many modes have at least a tenth of the samples."""
    return sum(share > 0.1 for share in problem.shares(samples))


def close(samples, problem):
    """Share of the samples within two standard deviations of a mode, .86 for the data."""
    return float((torch.cdist(samples, problem.means).min(1).values < 0.7).float().mean())


@pytest.mark.learn
@pytest.mark.slow
def test_one_step_of_the_teacher_restores_the_modes_and_keeps_the_quality(ring4_problem, trained_teacher):
    teacher, problem = trained_teacher.denoiser, ring4_problem
    student = collapsed(teacher, problem)
    noise = torch.randn(4000, 2, generator=torch.Generator().manual_seed(1))
    draw = lambda first, steps=20: hybrid(  # noqa: E731
        teacher, student, noise, {}, TIMES, first=first, teacher_steps=steps, sampler="ode"
    )
    alone, both, whole = draw(0), draw(1), draw(2)
    assert modes(alone, problem) == 1
    assert modes(both, problem) == 4
    assert close(alone, problem) > 0.7
    assert close(both, problem) > close(alone, problem) - 0.1
    assert close(both, problem) > close(whole, problem) - 0.1
    assert problem.distance(both) < 0.3 * problem.distance(alone)
    # a single call of the teacher is enough for the modes, though not for samples as clean
    single = draw(1, 1)
    assert modes(single, problem) == 4
    assert problem.distance(single) < 0.5 * problem.distance(alone)
    # it is the first step that loses them: with the student's own first step the teacher cannot repair the rest
    reverse = generate(student, noise, {}, TIMES[:1], "ode", until=TIMES[1])
    finished = generate(teacher, reverse, {}, [TIMES[1], 0.3, 0.1], "ode", noisy=True)
    assert modes(finished, problem) == 1
    # what the first step aims at: one mode for all noises, where the teacher aims between them
    targets = target_strip(student, noise[:500], {}, TIMES)
    aims = target_strip(teacher, noise[:500], {}, few_step_times(teacher.process, 20))
    assert (targets[:, 0] - problem.means[0]).norm(dim=1).mean() < 0.4
    assert aims[:, 0].norm(dim=1).mean() < 0.6
    assert modes(aims[:, -1], problem) == 4


@pytest.mark.learn
@pytest.mark.slow
def test_an_adapter_of_the_teacher_moves_a_collapsed_student_and_hybrid_sampling_its_modes(
    ring4_problem, trained_teacher
):
    """The control of arXiv:2503.10637: a LoRA that was trained on the teacher works on the student as it is."""
    teacher, problem = trained_teacher.denoiser, ring4_problem
    student = collapsed(teacher, problem)
    base = copy.deepcopy(teacher).requires_grad_(False)
    adapter = add_adapter(base, "style", rank=16, alpha=16.0, target_modules=["inner", "outer", "input", "output"])
    moved = torch.tensor([1.2, 0.6])
    optimizer = torch.optim.Adam([p for _, p in adapter.adapter_parameters()], lr=5e-3)
    generator = torch.Generator().manual_seed(3)
    for update in range(500):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - update / 500)
        clean = problem.data.x0[torch.randint(len(problem.data.x0), (256,), generator=generator)] + moved
        t = problem.times.quantile(torch.rand(256, generator=generator, dtype=torch.float64), problem.process)
        sigma = t[:, None].float()
        noisy = clean + sigma * torch.randn(clean.shape, generator=generator)
        optimizer.zero_grad()
        (((adapter(noisy, t).x0 - clean) / sigma.clamp(0.1, 1.0)).square().mean()).backward()
        optimizer.step()
    adapter.eval()
    noise = torch.randn(4000, 2, generator=torch.Generator().manual_seed(1))

    def draw(first, model):
        return hybrid(adapter, model, noise, {}, TIMES, first=first, teacher_steps=20, sampler="ode")

    plain = draw(0, student)
    assert transfer_adapter(adapter, student)
    styled, both, whole = draw(0, student), draw(1, student), draw(2, student)
    assert modes(whole - moved, problem) == 4  # the teacher has learned it
    shifted = (styled.mean(0) - plain.mean(0) - moved).norm()
    print(f"styled: off by {shifted:.2f} of {moved.norm():.2f}; near modes {close(both - moved, problem):.2f}")
    assert shifted < 0.5 * moved.norm()
    assert modes(styled - moved, problem) < 3  # it moves and stays collapsed
    assert modes(both - moved, problem) == 4
    assert problem.distance(both - moved) < 0.4 * problem.distance(styled - moved)
    transfer_adapter(adapter, student, -1.0)
    torch.testing.assert_close(draw(0, student), plain, rtol=1e-3, atol=1e-3)
