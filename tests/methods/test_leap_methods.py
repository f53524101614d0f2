"""SnapFlow, ROSE-CD, VideoScene, FlashVDM: zeros, orders, starts, decoded losses, what they learn, messages."""

from __future__ import annotations

import pytest
import torch
from exact_students import COV, F64, FLOW, MEAN, MIXTURE, data, exact_module, loss_and_slope
from small_problems import mlp, ready, shift
from test_trajectory_learning import distilled, error, ring_problem, two_times  # noqa: F401  (a fixture)

from lightning_distill.batch import Batch
from lightning_distill.ema import ConstantEMA
from lightning_distill.export.pipeline import export_denoiser
from lightning_distill.generation import generate
from lightning_distill.guidance import Guidance
from lightning_distill.losses.audio import SISDR, DecodedLoss, si_sdr
from lightning_distill.losses.flow_maps import euler_slope
from lightning_distill.losses.leaps import leap_grid, shifted_pair
from lightning_distill.methods import PCM, ROSECD, ConsistencyDistillation, FlashVDM, SnapFlow, VideoScene
from lightning_distill.networks.adversary import Adversary
from lightning_distill.networks.analytic import analytic_denoiser, gaussian_flow_map
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.small import ResidualMLP, small_unet
from lightning_distill.processes import EDM, FlowMatching, VariancePreserving
from lightning_distill.times import bounded


# ------------------------------------------------------------------------------------------------ SnapFlow
def test_two_steps_of_a_linear_flow():
    """v = a x: x - t/2 a x, then half the time later: slope a x (1 - a t / 4)."""
    x, t, a = torch.randn(5, 2, dtype=F64), torch.linspace(0.2, 1.0, 5, dtype=F64), 0.7
    seen = []

    def velocity(y, s):
        seen.append(s)
        return a * y

    found = euler_slope(velocity, x, t)
    torch.testing.assert_close(found, a * x * (1 - a * t / 4)[:, None])
    torch.testing.assert_close(torch.stack(seen), torch.stack([t, t / 2]))
    torch.testing.assert_close(euler_slope(velocity, x, t, 1), a * x)


def test_many_steps_are_the_average_velocity():
    x, t = torch.randn(6, 2, dtype=F64), torch.linspace(0.3, 1.0, 6, dtype=F64)
    want = (x - end_of(x, t)) / t[:, None]
    errors = [
        float((euler_slope(lambda y, s: MIXTURE.velocity(y, s, FLOW), x, t, n) - want).abs().max()) for n in (32, 64)
    ]
    assert errors[0] / errors[1] == pytest.approx(2.0, rel=0.1)
    leaf = torch.randn(2, dtype=F64, requires_grad=True)
    assert not euler_slope(lambda y, s: leaf * y, x, t).requires_grad


def end_of(x, t):
    return gaussian_flow_map(MEAN, COV, x, t, torch.zeros_like(t), FLOW)


def test_the_exact_map_has_no_loss_but_that_of_its_steps():
    def losses(steps, fault=0.0, **settings):
        module = exact_module(SnapFlow, two_times=True, fault=fault, euler_steps=steps, from_data=False, **settings)
        _, slope, terms = loss_and_slope(module, data())
        return {name: float(value.detach()) for name, value in terms.losses.items()} | {"slope": slope}

    few, many = losses(16), losses(32)
    assert few["flow"] < 1e-12
    assert few["shortcut"] / many["shortcut"] == pytest.approx(4.0, rel=0.15)
    assert many["shortcut"] < 1e-3
    spoilt = losses(32, 0.1)
    assert spoilt["flow"] > 1e-3
    assert spoilt["slope"] > 5 * abs(many["slope"])


def test_velocities_of_pairs_are_right_in_the_mean_alone():
    module = exact_module(SnapFlow, two_times=True, euler_steps=32, shortcut_share=0.25)
    _, slope, terms = loss_and_slope(module, data(20_000))
    _, away, _ = loss_and_slope(exact_module(SnapFlow, two_times=True, fault=0.3, euler_steps=32), data(20_000))
    assert float(terms.losses["flow"].detach()) > 0.3
    assert abs(slope) < 0.05 * away


def test_a_student_starts_as_its_own_eulers_step():
    teacher = mlp()
    module = ready(SnapFlow(teacher))
    noise = torch.randn(5, 2)
    assert torch.equal(module.sample(5, noise=noise), generate(teacher, noise, {}, [1.0], "ode"))
    # told r = 0 when sampled, in every step
    seen = []
    original = module.sampling_network().forward
    module.sampling_network().forward = lambda *args, r=None, **kw: (seen.append(r), original(*args, r=r, **kw))[1]
    module.sample(5, num_steps=3, generator=torch.Generator().manual_seed(0))
    assert [float(r.max()) for r in seen] == [0.0, 0.0, 0.0]
    for settings, message in (
        ({"euler_steps": 0}, "at least one step"),
        ({"shortcut_share": 1.0}, "both need samples"),
        ({"sampler": "flow_map"}, "choose renoise"),
    ):
        with pytest.raises(ValueError, match=message):
            SnapFlow(mlp(), **settings)


@pytest.mark.learn
@pytest.mark.filterwarnings("ignore:ConstantEMA", "ignore:.*eval mode")
def test_one_step_is_as_good_as_its_own_steps(ring_problem):  # noqa: F811
    """The student's one step reaches the N Euler steps of its target: 6 of them, beside the teacher's two."""
    mixture, _, noise, ends = ring_problem
    settings = {"student": two_times(), "from_data": False, "euler_steps": 6}
    module = distilled(ring_problem, SnapFlow, settings, 2e-3, updates=160, batch_size=128)
    found = error(module.sample(len(noise), noise=noise), ends)
    teacher = analytic_denoiser(mixture, FLOW)
    two = error(generate(teacher, noise, {}, [1.0, 0.5], "ode"), ends)
    print(f"snap: {found:.3f}, the teacher in two steps {two:.3f}")
    assert found < 0.45 < two


# ------------------------------------------------------------------------------------------------ ROSE-CD
def test_si_sdr_is_the_ratio_of_two_lengths():
    torch.manual_seed(0)
    s, n = torch.randn(3, 4000, dtype=F64), torch.randn(3, 4000, dtype=F64)
    s, n = s - s.mean(1, keepdim=True), n - n.mean(1, keepdim=True)
    n = n - (n * s).sum(1, keepdim=True) / s.square().sum(1, keepdim=True) * s
    n = n * (s.norm(dim=1) / n.norm(dim=1))[:, None]
    gains = torch.tensor([1.0, 0.1, 0.5], dtype=F64)[:, None]
    want = torch.tensor([0.0, 20.0, 10 * torch.tensor(4.0).log10()], dtype=F64)
    torch.testing.assert_close(si_sdr(s + gains * n, s), want, rtol=1e-6, atol=1e-6)
    # neither scale nor offset of the estimate, nor the scale of the target
    torch.testing.assert_close(si_sdr(3.0 * (s + gains * n) + 2.0, 0.2 * s), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(si_sdr(s, s), torch.full((3,), 80.0, dtype=F64))
    silent = si_sdr(torch.zeros(2, 8, requires_grad=True), torch.zeros(2, 8))
    assert bool(silent.isfinite().all())
    x = (s + gains * n).requires_grad_()
    slope = torch.autograd.grad(SISDR()(x, s).sum(), x)[0]
    assert float(SISDR()(x - 0.1 * slope / slope.norm() * s.norm(), s).sum()) < float(SISDR()(x, s).sum())


def test_decoded_losses_see_signals():
    decode = torch.nn.Linear(2, 5, dtype=F64)
    made, clean = torch.randn(4, 2, dtype=F64, requires_grad=True), torch.randn(4, 2, dtype=F64)
    loss = DecodedLoss(lambda a, b: (a - b).square().sum(1), decode)
    torch.testing.assert_close(loss(made, clean), ((made - clean) @ decode.weight.T).square().sum(1))
    assert torch.autograd.grad(loss(made, clean).sum(), made)[0].any()
    with pytest.raises(ValueError, match=r"returned shape \(\) for 4 samples"):
        DecodedLoss(lambda a, b: (a - b).square().mean())(made, clean)


def test_moved_grids_keep_their_steps():
    grid = torch.tensor([1.0, 0.7, 0.5, 0.1], dtype=F64)
    u = torch.rand(2000, dtype=F64)
    t, r = shifted_pair(grid, u, torch.zeros(2000))
    assert set(zip(t.tolist(), r.tolist())) == {(1.0, 0.7), (0.7, 0.5), (0.5, 0.1)}
    t, r = shifted_pair(grid, torch.tensor([0.0, 0.5, 0.99], dtype=F64), torch.tensor([0.5, 0.25, 0.5], dtype=F64))
    torch.testing.assert_close(t, torch.tensor([0.85, 0.65, 0.3], dtype=F64))
    torch.testing.assert_close(r, torch.tensor([0.6, 0.4, 0.1], dtype=F64))
    t, r = shifted_pair(grid, u, torch.ones(2000))
    assert bool((t > r).all())
    assert float(r.min()) == 0.1


def test_a_plain_grid_and_no_auxiliary_loss_is_consistency_distillation():
    settings = {"intervals": 8, "metric": "mse", "solver": "heun"}
    rose = loss_and_slope(exact_module(ROSECD, fault=0.1, jitter=0.0, **settings), data())
    plain = loss_and_slope(exact_module(ConsistencyDistillation, fault=0.1, **settings), data())
    assert rose[:2] == plain[:2]
    moved = exact_module(ROSECD, fault=0.1, **settings)
    t, _ = moved.pair_times(4000)
    assert len(t.unique()) == 4000
    assert float(t.max()) <= 1.0


def test_the_exact_function_is_consistent_on_moved_grids():
    """Heun's local error is of third order, so that halved steps have a 64th of the squared loss, away from the end."""
    loss = [loss_and_slope(exact_module(ROSECD, intervals=n, metric="mse"), data(2000))[0] for n in (16, 32)]
    assert loss[0] / loss[1] > 20
    assert loss_and_slope(exact_module(ROSECD, intervals=32, metric="mse", fault=0.1), data(2000))[0] > 20 * loss[1]


def test_auxiliary_losses_have_names_and_weights():
    seen = []

    def far(made, clean):
        seen.append((made, clean))
        return (made - clean).square().sum(1)

    module = exact_module(ROSECD, intervals=8, auxiliary={"far": DecodedLoss(far)}, loss_weights={"student/far": 0.5})
    batch = data()
    _, slope, terms = loss_and_slope(module, batch)
    assert set(terms.losses) == {"consistency", "far"}
    assert torch.equal(seen[0][1], batch.x0)
    without = loss_and_slope(exact_module(ROSECD, intervals=8), batch)
    assert slope != without[1]
    total = module.weighted_sum("student", terms)
    torch.testing.assert_close(total, terms.losses["consistency"] + 0.5 * terms.losses["far"])
    with pytest.raises(ValueError, match="0 to 1 intervals"):
        ROSECD(mlp(), jitter=1.5)
    with pytest.raises(ValueError, match="named 'consistency'"):
        ROSECD(mlp(), auxiliary={"consistency": SISDR()})


# ------------------------------------------------------------------------------------------------ VideoScene
def scenes(n=64):
    batch = data(n)
    return Batch(x0=batch.x0, noise=batch.x0 + 0.3)


def test_pairs_lie_below_the_leap():
    assert leap_grid([1.0, 0.75, 0.5, 0.25, 1e-4], 0.6) == [0.6, 0.5, 0.25, 1e-4]
    assert leap_grid([1.0, 0.5, 1e-4], 0.5) == [0.5, 1e-4]
    with pytest.raises(ValueError, match="outside of the grid"):
        leap_grid([0.9, 0.5, 0.1], 0.05)
    module = exact_module(VideoScene, intervals=10, rendering_share=0.5)
    batch = scenes(4000)
    pair = module.pair(batch)
    grid = module.grid()
    assert set(pair.t.tolist()) <= set(grid[:-1])
    at_leap = pair.t == 0.6
    assert float(at_leap.double().mean()) > 0.5
    eps = module.draws.normal("noise", batch.x0.shape)
    starts = module.draws.uniform("start", 4000) < 0.5
    start = FLOW.add_noise(batch.noise, eps, torch.full((4000,), 0.6, dtype=F64))
    torch.testing.assert_close(pair.x_t[starts], start[starts])
    torch.testing.assert_close(pair.x_t[~starts], FLOW.add_noise(batch.x0, eps, pair.t)[~starts])
    assert bool((pair.r[starts] == grid[1]).all())


def test_the_exact_function_has_no_loss_below_the_leap():
    loss = [loss_and_slope(exact_module(VideoScene, intervals=n, metric="mse"), scenes(2000))[0] for n in (16, 32)]
    assert loss[0] / loss[1] > 15
    assert loss_and_slope(exact_module(VideoScene, intervals=32, metric="mse", fault=0.1), scenes())[0] > 20 * loss[1]


def test_a_leap_is_one_step_of_the_noised_rendering():
    given = data(4)
    assert exact_module(VideoScene, rendering="data").renderings(given) is given.x0
    module = exact_module(VideoScene)
    rendering = scenes(6).noise
    made = module.leap_from(rendering, generator=torch.Generator().manual_seed(4))
    eps = torch.randn(6, 2, generator=torch.Generator().manual_seed(4)).double()
    torch.testing.assert_close(made, end_of(0.4 * rendering + 0.6 * eps, torch.full((6,), 0.6, dtype=F64)))
    for settings, message in (
        ({"leap": 0.0}, "share of t_max above 0"),
        ({"rendering_share": 0.0}, "share above 0"),
        ({"num_steps": 2}, "one step from its leap time"),
        ({"student_times": [0.5]}, "one step from its leap time"),
    ):
        with pytest.raises(ValueError, match=message):
            VideoScene(mlp(), **settings)
    with pytest.raises(ValueError, match=r"the batch has none of their shape in cond\['coarse'\]"):
        ready(VideoScene(mlp(), rendering="coarse")).student_loss(data(4))
    with pytest.raises(ValueError, match=r"none of their shape in Batch\(noise=...\)"):
        ready(VideoScene(mlp())).student_loss(data(4))


def test_a_leap_is_made_from_the_leap_time_alone(tmp_path):
    module = exact_module(VideoScene)
    assert module.sample(4, num_steps=1).shape == (4, 2)  # its own step
    for steps in (2, 3):
        with pytest.raises(ValueError, match=f"num_steps={steps} begins at t=1, and .* from its leap time, 0.6"):
            module.sample(4, num_steps=steps)
    assert exact_module(VideoScene, leap=1.0).sample(4, num_steps=1).shape == (4, 2)
    unet = small_unet(8, 1, 0, (8, 16), norm_num_groups=4, attention_head_dim=8)
    teacher = Denoiser(unet, VariancePreserving(zero_terminal_snr=True), "v_prediction")
    for leap, folder in ((0.6, "noise"), (1.0, "whole")):
        module = ready(VideoScene(teacher, leap=leap, ema=[ConstantEMA(0.5)]))
        student = (module.sampling_network(), module.student_times, module.sampler)
        if leap == 1.0:
            assert export_denoiser(*student, tmp_path / folder).is_dir()
            continue
        with pytest.raises(ValueError, match="no stock pipeline has the rest"):
            export_denoiser(*student, tmp_path / folder)
        assert not (tmp_path / folder).exists()
    for process, leap in ((FlowMatching(), 5e-5), (EDM(), 2e-5), (VariancePreserving(), 1e-3)):
        with pytest.raises(ValueError, match=f"leap={leap:g} is t=.*the grid ends at .*give a larger one"):
            exact_module(VideoScene, process=process, leap=leap)


class Sees(torch.nn.Module):
    """A network whose input has the rendering beside the sample."""

    def __init__(self):
        super().__init__()
        self.inner, self.shape = ResidualMLP((2,), 8, 1), (2,)

    def forward(self, x, t, coarse):
        self.seen = coarse
        return self.inner(x + 0.1 * coarse, t)


@pytest.mark.parametrize("network", [None, Sees])
def test_renderings_come_by_name(network):
    """They are no condition of a network that does not know them, and one of a network that does."""
    teacher = mlp() if network is None else Denoiser(network(), FLOW, "flow_prediction")
    coarse, eps = torch.randn(6, 2), torch.randn(6, 2)
    batch = Batch(x0=torch.randn(6, 2), cond={"coarse": coarse})
    by_name, by_noise = (
        ready(VideoScene(teacher, rendering=name, rendering_share=1.0, ema=[], intervals=6))
        for name in ("coarse", None)
    )
    loss = by_name.student_loss(batch).losses["consistency"]
    if network is None:
        want = by_noise.student_loss(Batch(x0=batch.x0, noise=coarse)).losses["consistency"]
        assert torch.equal(loss, want)
    else:
        assert torch.equal(by_name.student.network.seen, coarse)
        assert torch.equal(by_name.teacher.network.seen, coarse)
    made = by_name.sample(6, {"coarse": coarse}, noise=eps)
    x = 0.4 * coarse + 0.6 * eps
    told = {"coarse": coarse} if network else {}
    torch.testing.assert_close(made, by_name.student(x, torch.full((6,), 0.6), told).x0.detach())
    leap = by_name.leap_from(coarse, {"coarse": coarse}, torch.Generator().manual_seed(3))
    torch.testing.assert_close(
        by_name.sample(6, {"coarse": coarse}, generator=torch.Generator().manual_seed(3)), leap, rtol=1e-5, atol=1e-6
    )
    torch.manual_seed(0)
    assert by_name.predict_step(batch, 0).shape == (6, 2)
    with pytest.raises(ValueError, match=r"none of their shape in cond\['coarse'\]"):
        by_name.sample(6, {"coarse": coarse[:, :1]})


# ------------------------------------------------------------------------------------------------ FlashVDM
def staged(update, **settings):
    module = ready(
        FlashVDM(mlp(4), **{"num_steps": 2, "intervals": 8, "guidance_updates": 3, "gan_from": 6, **settings})
    )
    shift(module.student)
    return ready(module, update=update)


def labelled(n=16):
    return Batch(x0=torch.randn(n, 2), cond={"class_labels": torch.arange(n) % 4})


def test_stages_follow_one_another():
    gan = Adversary(taps=["blocks.0"], features="teacher", width=4)
    for update, stage, terms in ((0, 1, {"guidance"}), (3, 2, {"consistency", "gan"}), (6, 3, {"consistency", "gan"})):
        module = staged(update, gan=gan)
        assert module.stage() == stage
        losses = module.student_loss(labelled()).losses
        assert set(losses) == terms
        if "gan" in losses:
            assert bool(losses["gan"] != 0) == (stage == 3)
        ready(module, "discriminator0", update=update)
        game = module.discriminator_loss(labelled()).losses["gan"]
        assert bool(game != 0) == (stage > 1)
        slopes = torch.autograd.grad(game, list(module.discriminator.parameters()), allow_unused=True)
        assert all(g is not None for g in slopes)
        assert any(bool(g.any()) for g in slopes) == (stage > 1)


def test_the_first_stage_is_the_guided_velocity():
    module = staged(0, guidance=Guidance(3.0), metric="mse")
    batch = labelled()
    found = module.student_loss(batch).losses["guidance"]
    x, t, _ = module.renoise(batch.x0, bounded(FLOW, 0.0, 1.0), "guidance")
    teacher, null = module.teacher, {"class_labels": torch.full((16,), 4)}
    without, told = teacher(x, t, null).flow_prediction, teacher(x, t, batch.cond).flow_prediction
    goal = without + 3.0 * (told - without)
    torch.testing.assert_close(found, (module.student(x, t, batch.cond).flow_prediction - goal).square().mean())


def test_skips_end_with_their_phase():
    module = staged(4, skips=[1, 3])
    t, r = module.pair_times(4000)
    grid = torch.tensor(module.grid(), dtype=F64)
    index = {round(float(g), 9): k for k, g in enumerate(grid)}
    pairs = {(index[round(a, 9)], index[round(b, 9)]) for a, b in zip(t.tolist(), r.tolist())}
    first = {(k, min(k + s, 4)) for k in range(4) for s in (1, 3)}
    assert pairs == first | {(k, min(k + s, 8)) for k in range(4, 8) for s in (1, 3)}
    plain = loss_and_slope(exact_module(PCM, fault=0.1, num_steps=2, intervals=8), data())
    same = exact_module(FlashVDM, fault=0.1, num_steps=2, intervals=8, skips=[1], guidance_updates=0, gan_from=0)
    assert loss_and_slope(same, data())[:2] == plain[:2]
    for settings, message in (
        ({"guidance_updates": 7}, "stages follow one another"),
        ({"skips": [0]}, "1 to intervals=8"),
        ({"skips": [9]}, "1 to intervals=8"),
    ):
        with pytest.raises(ValueError, match=message):
            staged(0, **settings)


# ------------------------------------------------------------------------------------------------ learning
@pytest.mark.long
@pytest.mark.learn
@pytest.mark.filterwarnings("ignore:ConstantEMA", "ignore:.*eval mode")
def test_a_random_start_learns_as_well(ring_problem):  # noqa: F811
    mixture, _, noise, ends = ring_problem
    settings = {"intervals": 12, "weight": "inverse_gap"}
    module = distilled(ring_problem, ROSECD, settings, 2e-3, updates=400, batch_size=128)
    found = error(module.sample(len(noise), noise=noise), ends)
    two = error(generate(analytic_denoiser(mixture, FLOW), noise, {}, [1.0, 0.5], "ode"), ends)
    print(f"rose_cd: {found:.3f}, the teacher in two steps {two:.3f}")
    assert found < two


@pytest.mark.long
@pytest.mark.learn
@pytest.mark.filterwarnings("ignore:ConstantEMA", "ignore:.*eval mode")
def test_one_leap_is_near_the_end_of_the_trajectory(ring_problem):  # noqa: F811
    mixture, clean, noise, _ = ring_problem
    blurred = Batch(x0=clean.x0, noise=clean.x0 + 0.3 * torch.randn(clean.x0.shape))
    problem = (mixture, blurred, noise, None)
    module = distilled(problem, VideoScene, {"intervals": 10, "leap": 0.6, "weight": "inverse_gap"}, 2e-3, 300, 128)
    coarse = blurred.noise[:1000]
    start = 0.4 * coarse + 0.6 * torch.randn(1000, 2, generator=torch.Generator().manual_seed(1))
    ends = mixture.flow_map(start, 0.6, 0.0, FLOW)
    found = error(module.leap_from(coarse, generator=torch.Generator().manual_seed(1)), ends)
    teacher = analytic_denoiser(mixture, FLOW)
    one = error(generate(teacher, start, {}, [0.6], "ode", noisy=True), ends)
    print(f"video_scene: {found:.3f}, the teacher in one step {one:.3f}")
    assert found < 0.6 * one


@pytest.mark.long
@pytest.mark.learn
@pytest.mark.filterwarnings("ignore:ConstantEMA", "ignore:.*eval mode")
def test_three_stages_make_two_good_steps(ring_problem):  # noqa: F811
    mixture, _, noise, ends = ring_problem
    settings = {"num_steps": 2, "intervals": 12, "guidance_updates": 80, "gan_from": 400, "solver": "heun"}
    module = distilled(ring_problem, FlashVDM, settings, 2e-3, 320, 128)
    found = error(module.sample(len(noise), noise=noise), ends)
    two = error(generate(analytic_denoiser(mixture, FLOW), noise, {}, [1.0, 0.5], "ode"), ends)
    print(f"flash_vdm: {found:.3f} in two steps, the teacher {two:.3f}")
    assert found < 0.75 * two
