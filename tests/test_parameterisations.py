"""Boundary functions, trajectory maps, and what samplers may do with a student."""

from types import SimpleNamespace

import pytest
import torch

from lightning_distill.networks.analytic import GaussianMixture, analytic_denoiser, gaussian_flow_map, ring
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.small import ResidualMLP
from lightning_distill.parameterisations import (
    ConsistencyFunction,
    FewStep,
    SegmentMap,
    TrajectoryMap,
    average_velocity,
    edm_boundary,
    lcm_boundary,
    segment_end,
)
from lightning_distill.prediction import Prediction
from lightning_distill.processes import EDM, FlowMatching, TrigFlow, VariancePreserving
from lightning_distill.samplers import SAMPLERS, check_capability, flow_map, ode, renoise

F64 = torch.float64
MEAN, COV = torch.zeros(2, dtype=F64), torch.tensor([[0.8, 0.3], [0.3, 0.4]], dtype=F64)


# ------------------------------------------------------------------------------------------------ boundaries
def test_boundary_of_consistency_models():
    """f = c_skip x + c_out F of a network F that is EDM's (arXiv:2206.00364, Table 1), and x at sigma_min."""
    edm, sd = EDM(), 0.5
    torch.manual_seed(0)
    network = ResidualMLP((2,), width=16, depth=1)
    torch.nn.init.normal_(network.output.weight)
    denoiser = Denoiser(network.double(), edm, "v_prediction", network_process=TrigFlow(), sigma_data=sd)
    f = ConsistencyFunction(denoiser, boundary="edm", sigma_data=sd)
    x, sigma = torch.randn(4, 2, dtype=F64), torch.tensor([0.002, 0.1, 3.0, 80.0], dtype=F64)
    length = (sigma**2 + sd**2).sqrt()
    raw = -network(x / length[:, None], (sigma / sd).atan())  # EDM's F has the other sign
    c_skip, c_out = sd**2 / ((sigma - 0.002) ** 2 + sd**2), (sigma - 0.002) * sd / length
    torch.testing.assert_close(f(x, sigma).x0, c_skip[:, None] * x + c_out[:, None] * raw, rtol=0, atol=1e-10)
    torch.testing.assert_close(f(x[:1], sigma[:1]).x0, x[:1], rtol=0, atol=1e-12)
    for mine, theirs in zip(edm_boundary(sigma), (c_skip, c_out)):
        torch.testing.assert_close(mine, theirs)


def test_boundary_of_latent_consistency_models():
    """The coefficients of diffusers' LCMScheduler."""
    from diffusers import LCMScheduler

    scheduler = LCMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    for index in (0, 1, 499, 999):
        expected = scheduler.get_scalings_for_boundary_condition_discrete(torch.tensor(index))
        mine = lcm_boundary(torch.tensor(index))
        assert [c.item() for c in mine] == pytest.approx([float(c) for c in expected], rel=1e-6)
    process = VariancePreserving()
    denoise = analytic_denoiser(ring(), process)
    f = ConsistencyFunction(denoise, boundary="lcm")
    x, t = torch.randn(2, 2, dtype=F64), process.t_from_index(torch.tensor([0, 500]))
    torch.testing.assert_close(f(x, t).x0[0], x[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(f(x, t).x0[1], denoise(x, t).x0[1], rtol=0, atol=1e-4)


def test_boundaries_need_their_process():
    denoise = analytic_denoiser(ring(), FlowMatching())
    for boundary, message in (("edm", "noise levels"), ("lcm", "timesteps"), ("ict", "unknown")):
        with pytest.raises(ValueError, match=message):
            ConsistencyFunction(denoise, boundary=boundary)


# ------------------------------------------------------------------------------------------------ maps
class ExactTwoTime(Denoiser):
    """A two-time student that is perfect on one Gaussian."""

    def forward(self, x_t, t, cond=None, *, r=None, guidance=None, **_):
        t = t.expand(len(x_t))
        r = t if r is None else r.expand(len(x_t))
        velocity = super().forward(x_t, t).velocity
        end = gaussian_flow_map(MEAN, COV, x_t, t, r, self.process)
        if isinstance(self.process, EDM):
            # CTM: X = (r/t) x + (1 - r/t) g
            ratio = (r / t)[:, None]
            same = (r == t)[:, None]
            g = (end - ratio * x_t) / torch.where(same, torch.ones_like(ratio), 1 - ratio)
            x0 = torch.where(same, x_t - t[:, None] * velocity, g)
            return Prediction.from_x0(x0, x_t, t, self.process)
        same = (r == t)[:, None]
        gap = torch.where(same[:, 0], torch.ones_like(t), t - r)
        u = torch.where(same, velocity, average_velocity(x_t, end, t=gap, r=torch.zeros_like(gap)))
        return Prediction(u, x_t, t, self.process, "flow_prediction")


def exact_student(process):
    network = analytic_denoiser(GaussianMixture(MEAN[None], covariances=COV[None]), process)
    return TrajectoryMap(ExactTwoTime(network.network, process, "sample"))


@pytest.mark.parametrize("process", [FlowMatching(), EDM()], ids=["flow", "edm"])
def test_trajectory_maps_in_flow_matching_and_in_edm(process):
    student = exact_student(process)
    x = process.t_max * torch.randn(5, 2, dtype=F64)
    t, r = torch.full((5,), 0.9 * process.t_max, dtype=F64), torch.linspace(0.0, 0.8, 5, dtype=F64) * process.t_max
    expected = gaussian_flow_map(MEAN, COV, x, t, r, process)
    torch.testing.assert_close(student.jump(x, t, r), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(student.jump(x, t, t), x, rtol=0, atol=1e-9)
    # any number of steps gives the same end, by jumps or with fresh noise of the right size
    times = [process.t_max * s for s in (1.0, 0.6, 0.3)]
    start = process.prior(torch.randn(5, 2, dtype=F64))
    ends = [flow_map(student, start, times[:n], process) for n in (1, 2, 3)]
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=1e-9)
    # renoise jumps to 0 in every step, ode follows the direction at r = t
    noise = torch.randn(5, 2, dtype=F64)
    out = renoise(student, start, times[:2], process, noise=lambda i, x: noise)
    middle = process.add_noise(ends[0], noise, torch.tensor(times[1], dtype=F64))
    clean = gaussian_flow_map(MEAN, COV, middle, torch.tensor(times[1], dtype=F64), torch.tensor(0.0), process)
    torch.testing.assert_close(out, clean, rtol=0, atol=1e-9)
    plain = analytic_denoiser(GaussianMixture(MEAN[None], covariances=COV[None]), process)
    torch.testing.assert_close(
        ode(student, start, times, process), ode(plain, start, times, process), rtol=0, atol=1e-8
    )


def test_segments():
    edges = [1.0, 0.6, 0.25]
    t = torch.tensor([1.0, 0.61, 0.6, 0.3, 0.25, 0.1], dtype=F64)
    assert segment_end(t, edges).tolist() == [0.6, 0.6, 0.25, 0.25, 0.0, 0.0]
    process = FlowMatching()
    student = SegmentMap(analytic_denoiser(ring(), process), edges)
    x = torch.randn(6, 2, dtype=F64)
    prediction = student(x, t)
    ends = segment_end(t, edges)
    expected = x + (ends - t)[:, None] * prediction.velocity
    torch.testing.assert_close(student.jump(x, t), expected)
    # just above an edge the map is almost the identity
    near = torch.full((6,), 0.6 + 1e-9, dtype=F64)
    torch.testing.assert_close(student.jump(x, near), x, rtol=0, atol=1e-7)
    start = torch.randn(4, 2, dtype=F64)
    by_hand = start
    for edge in edges:
        by_hand = student.jump(by_hand, torch.full((4,), edge, dtype=F64))
    torch.testing.assert_close(ode(student, start, edges, process), by_hand)
    for wrong in ([], [0.5, 0.5], [0.5, 0.7], [0.5, 0.0]):
        with pytest.raises(ValueError, match="fall strictly"):
            SegmentMap(student.denoiser, wrong)


# ------------------------------------------------------------------------------------------------ capabilities
ONE_STEP = {(name, 1) for name in ("renoise", "ode", "heun", "dpmpp_2m", "adams", "start_noise")}
ALLOWED = {
    "one_step_only": ONE_STEP,
    "any_step": {*ONE_STEP, ("renoise", 2)},
    "two_time": {*ONE_STEP, *((name, n) for name in ("renoise", "ode", "heun", "flow_map", "gamma") for n in (1, 2))},
    "segments": {*ONE_STEP, ("ode", 2)},
}


@pytest.mark.parametrize("capability", list(ALLOWED))
def test_samplers_refuse_what_a_student_was_not_trained_for(capability):
    process = FlowMatching()
    network = analytic_denoiser(GaussianMixture(MEAN[None], covariances=COV[None]), process)
    students = {
        "one_step_only": FewStep(network),
        "any_step": ConsistencyFunction(network),
        "two_time": exact_student(process),
        "segments": SegmentMap(network, [1.0, 0.5]),
    }
    student, x = students[capability], torch.randn(3, 2, dtype=F64)
    for name, sampler in SAMPLERS.items():
        for times in ([1.0], [1.0, 0.5]):
            if (name, len(times)) in ALLOWED[capability]:
                assert sampler(student, x, times, process).isfinite().all()
            else:
                with pytest.raises(ValueError, match=f"{capability}.*use sampler"):
                    sampler(student, x, times, process)
    if capability == "segments":
        with pytest.raises(ValueError, match="edges"):
            ode(student, x, [1.0, 0.4], process)
    if capability == "one_step_only":
        with pytest.raises(ValueError, match="one step from t_max"):
            renoise(student, x, [0.8], process)


@pytest.mark.parametrize("chained", [False, True])
def test_students_of_their_own_times_are_sampled_at_these(chained):
    process, own = FlowMatching(), [1.0, 0.7, 0.2]
    student = SimpleNamespace(capability="own_times", student_times=own, sampler="ode", edges=own if chained else None)
    check_capability(student, "ode", list(own), process)
    for times in ([1.0], [1.0, 0.2]):
        if chained:  # each time leads to the next one
            with pytest.raises(ValueError, match=r"own times alone.*use sampler 'ode' with \[1.0, 0.7, 0.2\]"):
                check_capability(student, "ode", times, process)
        else:
            check_capability(student, "ode", times, process)
    for name, times in (("ode", [1.0, 0.5]), ("heun", own), ("ode", [0.7, 0.5, 0.2])):
        with pytest.raises(ValueError, match="own_times"):
            check_capability(student, name, times, process)


def test_policies_are_sampled_with_their_own_segments():
    student = SimpleNamespace(capability="two_time", edges=[1.0, 0.5], takes_target=True)
    check_capability(student, "flow_map", [1.0, 0.5], FlowMatching())
    for times in ([1.0], [1.0, 0.4]):
        with pytest.raises(ValueError, match=r"with these: \[1.0, 0.5\]"):
            check_capability(student, "flow_map", times, FlowMatching())


def test_functions_without_capability_pass():
    check_capability(lambda x, t: None, "heun", [1.0, 0.5], FlowMatching())
