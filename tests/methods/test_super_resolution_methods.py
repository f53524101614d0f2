"""YONOS, CTMSR and TAD-SR: losses in closed form, stages, what they learn of digits, messages."""

from __future__ import annotations

import pytest
import torch
from conftest import fit
from small_problems import Given, ready, shift
from torch import nn
from torchmetrics.functional.image import peak_signal_noise_ratio

from lightning_distill.batch import Batch
from lightning_distill.data.digits import load_digits
from lightning_distill.data.super_resolution import degrade
from lightning_distill.ema import PowerEMA
from lightning_distill.methods import CTMSR, TADSR, YONOS, TeacherTraining
from lightning_distill.networks.adversary import Adversary
from lightning_distill.networks.analytic import GaussianMixture, analytic_denoiser, ring
from lightning_distill.networks.concatenated import concatenated
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.small import ResidualMLP
from lightning_distill.processes import FlowMatching, ResidualShift, VariancePreserving
from lightning_distill.schedules import WarmupDecay
from lightning_distill.times import Uniform

F64 = torch.float64


class Told(nn.Module):
    """E[x0 | x_t, low] of x0 ~ N(low, std^2), in flow matching."""

    shape = (1,)

    def __init__(self, std):
        super().__init__()
        self.log_std = nn.Parameter(torch.tensor(std, dtype=F64).log())

    def forward(self, x, t, low):
        t = t.to(x)[:, None]
        variance = (2 * self.log_std).exp()
        return low + (1 - t) * variance / ((1 - t) ** 2 * variance + t**2) * (x - (1 - t) * low)


def mlp(shape=(2,), width=8, classes=0, seed=0, residual_shift=False, process=None):
    torch.manual_seed(seed)
    network = ResidualMLP((2 * shape[0], *shape[1:]), width=width, depth=2, num_classes=classes)
    process = process or (ResidualShift(0.5) if residual_shift else FlowMatching())
    joined = concatenated(network, shape[0], residual_shift)
    return Denoiser(joined, process, "flow_prediction", sigma_data=1.12)


def batch(n=16, *names):
    generator = torch.Generator().manual_seed(1)
    x0 = torch.randn(n, 2, generator=generator)
    lows = {name: x0 + 0.2 * i * torch.randn(n, 2, generator=generator) for i, name in enumerate(names)}
    return Batch(x0=x0, cond={**lows, "low": x0 + torch.randn(n, 2, generator=generator)})


# ------------------------------------------------------------------------------------------------ YONOS
def test_the_student_starts_as_the_teacher_and_equal_conditions_leave_nothing_to_learn():
    data = batch(64, "low_2")
    module = ready(YONOS(mlp(), easier=[{"low": "low_2"}], ema=[]))
    shift(module.teacher)
    module = ready(YONOS(module.teacher, easier=[{"low": "low_2"}], ema=[]))
    t, cond = torch.full((64,), 0.6, dtype=F64), {"low": data.cond["low"]}
    assert torch.equal(module.student(data.x0, t, cond).x0, module.teacher(data.x0, t, cond).x0)
    assert module.student_loss(data).losses["scale"] > 1e-3
    same = Batch(x0=data.x0, cond={"low": data.cond["low"], "low_2": data.cond["low"]})
    assert module.student_loss(same).losses["scale"] < 1e-12


def scale_gradient(std, n=100_000):
    """Slope in ln std of a student told nothing, whose teacher is told a of x0 = a + b."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, n, 1, generator=generator, dtype=F64).unbind()
    data = Batch(x0=a + 0.5 * b, cond={"low": torch.zeros_like(a), "told": a})
    teacher = Denoiser(Told(0.5), FlowMatching(), "sample")
    settings = {"student": Given(Told(std)), "times": Uniform(0.3, 0.7), "shape": [1], "ema": []}
    module = ready(YONOS(teacher, easier=[{"low": "told"}], **settings))
    loss = module.student_loss(data).losses["scale"]
    return torch.autograd.grad(loss, module.student.network.log_std)[0].item()


def test_its_optimum_is_the_posterior_mean_of_the_harder_condition():
    exact = 1.25**0.5
    assert abs(scale_gradient(exact)) < 6e-3
    assert scale_gradient(0.8 * exact) < -0.03
    assert scale_gradient(1.25 * exact) > 0.03


def test_the_space_weights_times():
    def loss(space):
        settings = {"space": space, "times": Uniform(0.5, 0.5 + 1e-9), "ema": []}
        return ready(YONOS(mlp(), easier=[{"low": "low_2"}], **settings)).student_loss(batch(32, "low_2"))

    velocity, x0 = (loss(space).losses["scale"].item() for space in (None, "sample"))
    assert x0 == pytest.approx(0.25 * velocity, rel=1e-5)  # x0 = x_t - t v


def test_each_stage_has_its_views_and_the_last_student_is_the_next_teacher():
    data = batch(16, "low_2", "low_4")
    module = ready(YONOS(mlp(), easier=[{"low": "low_2"}, {"low": "low_4"}], stage_updates=3, ema=[]))
    names = ["low_2", "low_4", "low"]
    for stage, name in enumerate(names):
        seen = module.conditions(data, stage)
        assert set(seen) == {"low"}
        assert torch.equal(seen["low"], data.cond[name])
    shift(module.student)
    before = [p.clone() for p in module.source.parameters()]
    for update in range(2):
        ready(module, update=update).after_phase("student")
        assert all(torch.equal(a, b) for a, b in zip(before, module.source.parameters()))
    ready(module, update=2).after_phase("student")
    assert all(torch.equal(a, b) for a, b in zip(module.student.parameters(), module.source.parameters()))
    # in the second stage the predecessor is asked, with its own condition
    ready(module, update=3)
    x, t = data.x0, torch.full((16,), 0.5, dtype=F64)
    want = module.source(x, t, {"low": data.cond["low_4"]}).x0
    assert torch.equal(module.target(data, x, t, "sample"), want)
    assert not torch.allclose(want, module.teacher(x, t, {"low": data.cond["low_4"]}).x0, atol=1e-3)
    shift(module.student, seed=9)
    ready(module, update=5).after_phase("student")
    assert not all(torch.equal(a, b) for a, b in zip(module.student.parameters(), module.source.parameters()))


def test_a_function_may_make_the_teacher_s_view():
    data = batch(16)
    module = ready(YONOS(mlp(), easier=[lambda cond: {"low": 0.5 * cond["low"]}], ema=[]))
    assert torch.equal(module.conditions(data, 0)["low"], 0.5 * data.cond["low"])
    assert torch.equal(module.conditions(data, 1)["low"], data.cond["low"])
    assert module.student_loss(data).losses["scale"] > 0


def test_what_yonos_cannot_use_is_refused():
    with pytest.raises(ValueError, match="at least one stage has an easier condition"):
        YONOS(mlp())
    with pytest.raises(ValueError, match="a stage has at least one update"):
        YONOS(mlp(), easier=[{"low": "low_2"}], stage_updates=0)
    with pytest.raises(ValueError, match="space='x0' is unknown"):
        YONOS(mlp(), easier=[{"low": "low_2"}], space="x0")
    with pytest.raises(ValueError, match="is to see 'low_2', and the batch has the conditions"):
        ready(YONOS(mlp(), easier=[{"low": "low_2"}], ema=[])).student_loss(batch(4))


# ------------------------------------------------------------------------------------------------ CTMSR
class ExactMap(nn.Module):
    """The end of the trajectory through x_t of data N(low, std^2) on a residual-shift path."""

    shape = (2,)

    def __init__(self, process, std=0.4):
        super().__init__()
        self.process, self.std = process, nn.Parameter(torch.tensor(std, dtype=F64))

    def forward(self, x, t, low):
        alpha, sigma = (c(t)[:, None] for c in (self.process.alpha, self.process.sigma))
        return low + self.std * (x - alpha * low) / (alpha**2 * self.std**2 + sigma**2).sqrt()


def gaussian_restoring(n=4000, std=0.4):
    generator = torch.Generator().manual_seed(0)
    low, noise = torch.randn(2, n, 2, generator=generator, dtype=F64).unbind()
    return Batch(x0=low + std * noise, cond={"low": low})


def exact_ctmsr(std=0.4, process=None, **settings):
    process = process or ResidualShift(0.6, "linear")
    teacher = Denoiser(ExactMap(process), process, "sample")
    student = Given(ExactMap(process, std))
    return ready(CTMSR(teacher, student=student, shape=[2], ema=[], metric="mse", **settings))


def test_the_exact_map_is_consistent_to_the_order_of_the_interval():
    data = gaussian_restoring()
    losses = [exact_ctmsr(last_intervals=n).student_loss(data).losses["consistency"].item() for n in (8, 32)]
    assert losses[0] / losses[1] > 12.0  # squares of differences of first order
    assert exact_ctmsr(0.8, last_intervals=32).student_loss(data).losses["consistency"] > 2 * losses[1]


def test_the_path_ends_at_the_picture_itself():
    module = exact_ctmsr(last_intervals=1)
    assert module.grid() == [1.0, 0.0]
    data = gaussian_restoring(16)
    pair = module.pair(data)
    assert torch.equal(pair.x_r, data.x0)
    assert torch.equal(module.ends(pair)[1], data.x0)
    # whatever the weights are, a network that predicts velocities is the identity there
    learned = ready(CTMSR(mlp(residual_shift=True), ema=[]))
    x, zero = torch.randn(5, 2), torch.zeros(5, dtype=F64)
    low = {"low": torch.randn(5, 2)}
    assert torch.equal(learned.function(learned.student, Batch(cond=low), None)(x, zero).x0, x)
    assert not torch.allclose(learned.student(x, zero + 0.2, low).x0, x, atol=1e-2)


def test_sampling_starts_from_the_noisy_picture_without_its_shift():
    module = exact_ctmsr()
    noise, low = torch.randn(6, 2), torch.randn(6, 2)
    made = module.sample(6, {"low": low}, noise=noise)
    torch.testing.assert_close(made, low + 0.4 * noise)


def test_trajectories_are_matched_from_a_given_update_with_a_copy_that_follows():
    module = exact_ctmsr(trajectory_from=2, proxy_updates=3)
    data = gaussian_restoring(64)
    assert "trajectory" not in ready(module, update=1).student_loss(data).losses
    with torch.no_grad():
        module.student.network.std.fill_(0.7)
    followed = []
    for update in range(9):
        with torch.no_grad():
            module.student.network.std.fill_(1.0 + update)
        ready(module, update=update).after_phase("student")
        followed.append(module.proxy.network.std.item())
    assert followed[0] == pytest.approx(0.4)
    assert followed[1:] == [2.0, 2.0, 2.0, 5.0, 5.0, 5.0, 8.0, 8.0]
    ready(module, update=2)
    terms = module.student_loss(data)
    assert module.weighted_sum("student", terms) == terms.losses["consistency"] + 1.6 * terms.losses["trajectory"]


def test_the_second_term_pulls_restored_pictures_to_the_true_ones():
    module = exact_ctmsr(trajectory_from=0, trajectory_times=Uniform(0.3, 0.3 + 1e-9))
    data = gaussian_restoring(32)
    assert module.trajectory_term(data.x0.clone().requires_grad_(), data).item() == 0.0
    away = torch.randn(32, 2, generator=torch.Generator().manual_seed(4), dtype=F64)
    x = (data.x0 + away).requires_grad_()
    (slope,) = torch.autograd.grad(module.trajectory_term(x, data), x)
    gain = 0.7 * 0.4 / (0.7**2 * 0.4**2 + (0.6 * 0.3) ** 2) ** 0.5
    torch.testing.assert_close(slope * x.numel(), gain * away / away.abs().mean(1, keepdim=True), rtol=1e-6, atol=1e-6)
    assert module.proxy.network.std.grad is None


def test_what_ctmsr_cannot_use_is_refused():
    with pytest.raises(ValueError, match="its copy lasts at least one"):
        CTMSR(mlp(), proxy_updates=0)
    with pytest.raises(ValueError, match=r"give it ResidualShift\(kappa\)"):
        ready(CTMSR(mlp(process=VariancePreserving(zero_terminal_snr=True))))


# ------------------------------------------------------------------------------------------------ TAD-SR
def tad_sr(teacher, **settings):
    gan = Adversary(taps=["input"], features="teacher", width=8)
    return ready(TADSR(teacher, **{"gan": gan, "ema": [], **settings}))


def test_small_times_are_small():
    module = tad_sr(mlp(), small=0.2)
    u = torch.linspace(1e-6, 1 - 1e-6, 101, dtype=F64)
    t = module.small_times.quantile(u, module.process)
    assert 0.0 < t.min() < 0.01
    assert 0.19 < t.max() <= 0.2


def test_a_student_that_makes_the_teacher_s_samples_has_nothing_to_learn():
    data = batch(8)
    module = tad_sr(mlp(), solver_steps=1)  # one step of both
    assert module.student_loss(data).losses["distillation"] < 1e-12
    assert tad_sr(mlp(), solver_steps=4).student_loss(data).losses["distillation"] > 1e-4


def test_the_comparison_of_a_gaussian_is_known():
    teacher = analytic_denoiser(GaussianMixture([[0.7]], std=0.4), FlowMatching())
    module = tad_sr(teacher, student=Given(mlp().network), shape=[1], solver_steps=300)
    data = Batch(size=16)
    noise = module.draws.of_slice().normal("start", (16, 1))
    goal = module.teacher_sample(data)
    torch.testing.assert_close(goal, 0.7 + 0.4 * noise, atol=8e-3, rtol=0)  # the flow's end
    x = (goal + torch.randn(16, 1, generator=torch.Generator().manual_seed(6))).requires_grad_()
    (slope,) = torch.autograd.grad(module.distillation(x, data), x)
    t = module.times("distillation/time", module.small_times, 16).float()[:, None]
    gain = (1 - t) ** 2 * 0.16 / ((1 - t) ** 2 * 0.16 + t**2)
    torch.testing.assert_close(slope * 16, gain * (x - goal).detach().sign(), atol=1e-5, rtol=1e-4)


def test_what_tad_sr_cannot_use_is_refused():
    with pytest.raises(ValueError, match="solver_steps=0"):
        tad_sr(mlp(), solver_steps=0)
    with pytest.raises(ValueError, match=r"small=1\.5"):
        tad_sr(mlp(), small=1.5)
    with pytest.raises(ValueError, match="leave num_steps=1"):
        tad_sr(mlp(), num_steps=2)
    with pytest.raises(ValueError, match="features of the frozen teacher"):
        TADSR(mlp())


# ------------------------------------------------------------------------------------------------ learning
def digits(split):
    x0, labels = load_digits(split)
    return x0, {"low": degrade(x0, 4), "low_2": degrade(x0, 2), "class_labels": labels}


def quality(made, x0):
    return peak_signal_noise_ratio(made.clamp(-1, 1), x0, data_range=2.0).item()


def optimiser(updates):
    return {
        "student_optimizer": lambda p: torch.optim.Adam(p, lr=2e-3, betas=(0.9, 0.99), fused=True),
        "student_scheduler": lambda o: WarmupDecay(o, 10, updates, "linear", final=0.02),
        "ema": [PowerEMA(0.1)],
    }


@pytest.mark.long
@pytest.mark.learn
@pytest.mark.filterwarnings("ignore:.*eval mode")
def test_scale_distillation_restores_digits_in_one_step():
    (x0, cond), (held, held_cond) = digits("train"), digits("test")
    easy = {"low": cond["low_2"], "class_labels": cond["class_labels"]}
    network = mlp((1, 8, 8), 128, classes=10)
    network.sigma_data = 0.752
    training = TeacherTraining(network, label_dropout=0.0, **optimiser(400))
    fit(training, 400, Batch(x0=x0, cond=easy), batch_size=128)
    teacher = training.sampling_network()
    module = YONOS(teacher, easier=[{"low": "low_2"}], **optimiser(300))
    fit(module, 300, Batch(x0=x0, cond=cond), batch_size=128)
    noise = torch.randn(held.shape, generator=torch.Generator().manual_seed(2))
    seen = {"low": held_cond["low"], "class_labels": held_cond["class_labels"]}
    one, low = module.sample(len(held), seen, noise=noise), held_cond["low"]
    t = torch.ones(len(held), dtype=F64)
    before = teacher(noise, t, seen).x0.detach()
    figures = [quality(x, held) for x in (low, before, one)]
    print(f"yonos, PSNR: bicubic {figures[0]:.2f}, teacher there {figures[1]:.2f}, student {figures[2]:.2f}")
    assert figures[2] > max(figures[:2]) + 0.5


@pytest.mark.learn
@pytest.mark.filterwarnings("ignore:.*eval mode")
def test_consistency_training_restores_digits_in_one_step():
    (x0, cond), (held, held_cond) = digits("train"), digits("test")
    names = ("low_2", "class_labels")

    def view(c):
        return {"low": c[names[0]], "class_labels": c[names[1]]}

    network = mlp((1, 8, 8), 128, classes=10, residual_shift=True)
    network.sigma_data = 0.752
    module = CTMSR(network, last_intervals=4, trajectory_from=300, proxy_updates=50, **optimiser(400))
    fit(module, 400, Batch(x0=x0, cond=view(cond)), batch_size=128)
    noise = torch.randn(held.shape, generator=torch.Generator().manual_seed(2))
    made = module.sample(len(held), view(held_cond), noise=noise)
    order = torch.randperm(len(held), generator=torch.Generator().manual_seed(3))
    other = module.sample(len(held), {**view(held_cond), "low": held_cond["low_2"][order]}, noise=noise)
    figures = [quality(x, held) for x in (held_cond["low_2"], made, other)]
    print(f"ctmsr, PSNR: bicubic {figures[0]:.2f}, student {figures[1]:.2f}, told another picture {figures[2]:.2f}")
    assert figures[1] > figures[0] + 0.5
    assert figures[2] < figures[0] - 3.0


@pytest.mark.long
@pytest.mark.learn
@pytest.mark.filterwarnings("ignore:.*eval mode")
def test_one_step_near_the_teacher_s_sample_of_the_same_noise():
    mixture = ring()
    data = Batch(x0=mixture.sample(20_000, torch.Generator().manual_seed(0))[0])
    noise = torch.randn(1000, 2, generator=torch.Generator().manual_seed(1))
    ends = mixture.flow_map(noise, 1.0, 0.0, FlowMatching())

    def error(updates, **settings):
        torch.manual_seed(0)
        network = ResidualMLP((2,), 128, 3)
        start = Given(network)
        start.build = lambda source, name=None: Denoiser(network, source.process, "flow_prediction", sigma_data=1.436)
        gan = Adversary(taps=["input"], features="teacher", width=16)
        teacher = analytic_denoiser(mixture, FlowMatching())
        module = TADSR(teacher, gan=gan, student=start, shape=[2], **settings, **optimiser(updates))
        fit(module, updates, data, batch_size=128)
        return (module.sample(1000, noise=noise) - ends).square().sum(1).mean().item()

    before = (torch.zeros_like(ends) - ends).square().sum(1).mean().item()
    found, game = error(200), error(100, loss_weights={"student/distillation": 0.0})
    print(f"tad_sr: {found:.3f} from the teacher's sample; the mean {before:.3f}, the game alone {game:.3f}")
    assert found < 0.25 * before
    assert game > 0.5 * before
