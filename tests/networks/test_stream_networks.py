"""Consistency functions of streams, networks of streams, and their exact teacher."""

from __future__ import annotations

import pytest
import torch

from lightning_distill.data.streams import RingAction
from lightning_distill.export import export_pipeline, export_weights
from lightning_distill.export.pipeline import stock_student
from lightning_distill.methods import ACDMD, TDM, PhasedDMD
from lightning_distill.networks.analytic import GaussianMixture, gaussian_flow_map
from lightning_distill.networks.roles import Copy, averaged_copy
from lightning_distill.networks.stream_mixture import RingActionTeacher, StreamMixture, ring_action
from lightning_distill.networks.streams import StreamMLP, StreamsDenoiser, StreamsNetwork, stream_boundary
from lightning_distill.processes import FlowMatching
from lightning_distill.streams import Stream, StreamProcess

F64 = torch.float64
PROCESS = StreamProcess({"video": Stream([2], 5.0), "action": Stream([1])})
EQUAL = StreamProcess({"video": Stream([2]), "action": Stream([1])})
VIDEO = {"video": "variance_preserving", "action": "linear"}


def spec(**settings):
    return StreamsDenoiser(lambda: StreamMLP({"video": [2], "action": [1]}, 16, 2), PROCESS, **settings)


# ------------------------------------------------------------------------------------------------ boundaries
def test_boundaries_are_the_papers_two_families():
    sigma, sd = torch.linspace(0.0, 1.0, 11, dtype=F64), 0.5
    c_skip, c_out = stream_boundary("linear", sigma)
    torch.testing.assert_close(c_skip, torch.ones_like(sigma))
    torch.testing.assert_close(c_out, -sigma)
    c_skip, c_out = stream_boundary("variance_preserving", sigma, sd)
    # f = k_skip x + k_out (x - sigma F) with the coefficients of consistency models
    k_skip = sd**2 / (sigma**2 + sd**2)
    k_out = sigma * sd / (sigma**2 + sd**2).sqrt()
    torch.testing.assert_close(c_skip, k_skip + k_out)
    torch.testing.assert_close(c_out, -sigma * k_out)
    for kind in ("linear", "variance_preserving"):
        c_skip, c_out = stream_boundary(kind, torch.zeros(1))
        assert c_skip.item() == 1.0
        assert c_out.item() == 0.0
    # variance preserving: k_skip^2 (sigma^2 + sd^2) + k_out^2 = sd^2
    torch.testing.assert_close(k_skip**2 * (sigma**2 + sd**2) + k_out**2, torch.full_like(sigma, sd**2))


def test_the_gradient_vanishes_linearly_or_quadratically():
    small = torch.tensor([1e-3, 2e-3], dtype=F64)
    for kind, power in (("linear", 1), ("variance_preserving", 2)):
        first, second = stream_boundary(kind, small)[1]
        assert (second / first).item() == pytest.approx(2.0**power, rel=1e-3)


class Given(torch.nn.Module):
    """Outputs that do not depend on the input, as parameters."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = torch.nn.ParameterDict(outputs)

    def forward(self, samples, times):
        self.times = times
        return {name: output.expand_as(samples[name]) for name, output in self.outputs.items()}


@pytest.mark.parametrize("kinds", [VIDEO, {"video": "linear", "action": "variance_preserving"}])
def test_a_network_is_the_consistency_function_of_each_stream(kinds):
    from lightning_distill.networks.denoiser import Denoiser

    module = Given({"video": torch.randn(4, 2, dtype=F64), "action": torch.randn(4, 1, dtype=F64)})
    denoiser = Denoiser(StreamsNetwork(module, PROCESS, kinds, 0.6), PROCESS, "flow_prediction")
    x, t = torch.randn(4, 3, dtype=F64), torch.tensor([0.01, 0.3, 0.8, 1.0], dtype=F64)
    made = PROCESS.unpack(denoiser(x, t).x0)
    own = PROCESS.stream_times(t)
    for name, output in module.outputs.items():
        torch.testing.assert_close(module.times[name], own[name])
        c_skip, c_out = (c[:, None] for c in stream_boundary(kinds[name], own[name], 0.6))
        torch.testing.assert_close(made[name], c_skip * PROCESS.unpack(x)[name] + c_out * output)
        (slope,) = torch.autograd.grad(made[name].sum(), output, retain_graph=True)
        torch.testing.assert_close(slope, c_out.expand_as(slope))


def test_at_the_clean_end_the_function_is_the_identity():
    denoiser = spec(boundaries=VIDEO).build()
    x = torch.randn(4, 3)
    torch.testing.assert_close(denoiser(x, torch.zeros(4)).x0, x)


def test_linear_boundaries_leave_a_velocity_as_it_is():
    denoiser = spec().build()
    x, t = torch.randn(4, 3), torch.rand(4)
    made = denoiser.network.module(PROCESS.unpack(x), {n: s.float() for n, s in PROCESS.stream_times(t).items()})
    torch.testing.assert_close(denoiser(x, t).flow_prediction, PROCESS.pack(made))


def test_copies_have_boundaries_of_their_own_and_averages_keep_them():
    source = spec().build()
    student = Copy().build(source, "student")
    student.network.set_boundaries(VIDEO, 0.4)
    average = averaged_copy(student, "ema")
    x, t = torch.randn(4, 3), torch.rand(4)
    assert torch.equal(average(x, t).x0, student(x, t).x0)
    assert not torch.allclose(source(x, t).x0, student(x, t).x0)
    assert set(source.network.boundaries.values()) == {"linear"}


@pytest.mark.parametrize(
    ("boundaries", "message"),
    [({"video": "linear"}, "each of the streams"), ({"video": "cosine", "action": "linear"}, "variance_preserving")],
)
def test_bad_boundaries_are_refused(boundaries, message):
    with pytest.raises(ValueError, match=message):
        spec(boundaries=boundaries).check()


def test_labels_choose_and_unknown_ones_are_refused():
    torch.manual_seed(0)
    network = StreamsNetwork(StreamMLP({"video": [2], "action": [1]}, 16, 1, num_classes=3), PROCESS)
    assert network.num_classes == 3
    with torch.no_grad():
        for layer in network.module.outputs.values():
            layer.weight.mul_(100.0)
    x, t = torch.randn(4, 3), torch.rand(4)
    none = network(x, t)
    assert torch.equal(network(x, t, class_labels=torch.full((4,), 3)), none)
    assert not torch.allclose(network(x, t, class_labels=torch.zeros(4, dtype=torch.long)), none)
    with pytest.raises(ValueError, match="num_classes=0"):
        spec().build()(x, t, {"class_labels": torch.zeros(4, dtype=torch.long)})


# ------------------------------------------------------------------------------------------------ exact teacher
def gaussian(seed=0):
    a = torch.randn(3, 3, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return torch.tensor([[0.3, -0.5, 0.8]], dtype=F64), (a @ a.T + 0.2 * torch.eye(3, dtype=F64))[None]


def test_equal_shifts_are_ordinary_flow_matching():
    means = torch.cat([gaussian()[0], -gaussian()[0]])
    covariances = torch.cat([gaussian()[1], gaussian(1)[1]])
    plain, streams = GaussianMixture(means, covariances=covariances), StreamMixture(means, covariances)
    x, t = torch.randn(6, 3, dtype=F64), torch.tensor([0.0, 0.1, 0.4, 0.7, 0.95, 1.0], dtype=F64)
    for a, b in zip(streams.posterior(x, t, EQUAL), plain.posterior(x, t, FlowMatching())):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(streams.log_prob(x, t, EQUAL), plain.log_prob(x, t, FlowMatching()))
    torch.testing.assert_close(streams.score(x, t, EQUAL), plain.score(x, t, FlowMatching()))


def test_score_and_mean_belong_to_the_density_of_noised_samples():
    mixture = ring_action()
    x = torch.randn(6, 3, dtype=F64).requires_grad_()
    t = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9, 0.99], dtype=F64)
    (slope,) = torch.autograd.grad(mixture.log_prob(x, t, PROCESS).sum(), x)
    torch.testing.assert_close(slope, mixture.score(x, t, PROCESS))
    x0, eps = mixture.posterior(x, t, PROCESS)
    # Tweedie, element by element
    sigma, alpha = PROCESS.sigma(t), PROCESS.alpha(t)
    torch.testing.assert_close(x0, (x + sigma.square() * slope) / alpha)
    torch.testing.assert_close(eps, -sigma * slope)


def test_a_flow_map_of_one_gaussian_carries_its_covariance_and_is_known_for_equal_shifts():
    means, covariances = gaussian()
    mixture = StreamMixture(means, covariances)
    basis = torch.cat([torch.zeros(1, 3, dtype=F64), torch.eye(3, dtype=F64)])
    ends = mixture.flow_map(basis, 0.9, 0.1, PROCESS, num_steps=200)
    matrix = (ends[1:] - ends[0]).T

    def covariance(t):
        t = torch.tensor(t, dtype=F64)
        alpha = PROCESS.alpha(t)[0].diag()
        return alpha @ covariances[0] @ alpha + PROCESS.sigma(t)[0].square().diag()

    torch.testing.assert_close(matrix @ covariance(0.9) @ matrix.T, covariance(0.1), rtol=1e-7, atol=1e-8)
    x, (t, r) = torch.randn(4, 3, dtype=F64), torch.tensor([0.9, 0.2], dtype=F64)
    want = gaussian_flow_map(means[0], covariances[0], x, t, r, FlowMatching())
    torch.testing.assert_close(mixture.flow_map(x, 0.9, 0.2, EQUAL, num_steps=200), want, rtol=1e-7, atol=1e-8)


def test_the_ring_has_the_moments_that_are_declared_and_actions_that_go_with_it():
    data = RingAction(batch_size=8)
    data.setup("fit")
    x0 = data.source.gather(torch.arange(20_000), 0).x0
    assert x0.square().mean().sqrt().item() == pytest.approx(data.sigma_data, rel=0.01)
    parts = PROCESS.unpack(x0)
    residual = parts["action"][:, 0] - parts["video"].prod(1) / 2
    # noise of .15, and the second order of the product: .25^2 / 2
    assert residual.std().item() == pytest.approx((0.15**2 + 0.03125**2) ** 0.5, rel=0.03)
    assert parts["video"].norm(dim=1).mean().item() == pytest.approx(2.0, abs=0.05)
    assert RingAction(labelled=True, batch_size=8).source.gather(torch.arange(9), 0).cond["class_labels"].max() < 8


def test_the_teacher_needs_the_streams_of_the_problem():
    assert RingActionTeacher(PROCESS).build().sample_shape == (3,)
    with pytest.raises(ValueError, match="RingActionTeacher has streams"):
        RingActionTeacher(StreamProcess({"video": Stream([2])})).check()


# ------------------------------------------------------------------------------------------------ export
def test_weights_are_exported_and_stock_pipelines_refused(tmp_path):
    from safetensors.torch import load_file

    student = spec(boundaries=VIDEO).build()
    with pytest.raises(ValueError, match="predictions of this StreamsNetwork student need more"):
        stock_student(student, [1.0])
    with pytest.raises(ValueError, match="StreamsNetwork has no stock"):
        export_pipeline(student.network, PROCESS, "flow_prediction", [1.0], "ode", tmp_path / "pipeline")
    card = {"boundaries": student.network.boundaries}
    folder = export_weights(student.network, PROCESS, "flow_prediction", [1.0], "renoise", tmp_path / "out", card=card)
    weights = load_file(folder / "model.safetensors")
    again = spec(boundaries=VIDEO, seed=5).build()
    again.network.load_state_dict(weights)
    x = torch.randn(4, 3)
    assert torch.equal(again(x, torch.ones(4)).x0, student(x, torch.ones(4)).x0)
    config = (folder / "distill_config.json").read_text()
    assert "action [1] shift 1, video [2] shift 5" in config
    assert "variance_preserving" in config


def test_methods_of_one_noise_level_refuse_streams():
    for method in (TDM, PhasedDMD, ACDMD):
        with pytest.raises(ValueError, match=f"{method.__name__} weighs samples by the noise left where a step ends"):
            method(spec().build(), num_steps=2, ema=[]).configure_model()
