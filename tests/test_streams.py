"""Several streams in one sample: packing, the process of each, and what samplers make of them."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from lightning_distill.batch import Batch, as_batch, pack_streams
from lightning_distill.prediction import PREDICTION_TYPES, Prediction
from lightning_distill.processes import FlowMatching, change_process, expand
from lightning_distill.samplers import adams, dpmpp_2m, heun, ode, renoise
from lightning_distill.streams import Stream, StreamProcess
from lightning_distill.times import LogNormal, Uniform, few_step_times

F64 = torch.float64
PROCESS = StreamProcess({"video": Stream([2, 2], 5.0), "action": Stream([3], 0.5)})
TIMES = torch.tensor([0.02, 0.4, 0.85, 1.0], dtype=F64)
FLOW = FlowMatching()


def separate_times(t):
    """The paper's shift of each stream, written down again."""
    return {name: 1.0 / (1.0 + (1.0 / t - 1.0) / k) for name, k in (("action", 0.5), ("video", 5.0))}


def sample(n=4, seed=0):
    return torch.randn(n, 7, generator=torch.Generator().manual_seed(seed), dtype=F64)


# ------------------------------------------------------------------------------------------------ packing
def test_packing_is_undone_exactly_and_does_not_depend_on_the_order():
    parts = {"video": torch.randn(4, 2, 2), "action": torch.randn(4, 3)}
    packed = PROCESS.pack(parts)
    assert packed.shape == (4, 7)
    assert torch.equal(packed, PROCESS.pack(dict(reversed(parts.items()))))
    assert torch.equal(packed[:, :3], parts["action"])
    back = PROCESS.unpack(packed)
    assert all(torch.equal(back[name], part) for name, part in parts.items())
    assert torch.equal(PROCESS.pack(back), packed)
    other = StreamProcess({"action": Stream([3], 0.5), "video": Stream([2, 2], 5.0)})
    assert torch.equal(other.sigma(TIMES), PROCESS.sigma(TIMES))


def test_a_batch_may_be_a_dictionary_of_streams():
    parts = {"video": torch.randn(4, 2, 2), "action": torch.randn(4, 3)}
    noise = {"video": torch.randn(4, 2, 2), "action": torch.randn(4, 3)}
    labels = torch.arange(4)
    batch = as_batch({"x0": parts, "noise": noise, "cond": {"class_labels": labels}})
    assert torch.equal(batch.x0, PROCESS.pack(parts))
    assert torch.equal(batch.noise, PROCESS.pack(noise))
    assert torch.equal(PROCESS.unpack(batch.rows(1, 3).x0)["video"], parts["video"][1:3])
    assert torch.equal(batch.cond["class_labels"], labels)
    assert torch.equal(Batch(x0=pack_streams(parts)).x0, batch.x0)


def test_parts_that_do_not_fit_are_refused():
    parts = {"video": torch.randn(4, 2, 2), "action": torch.randn(4, 3)}
    with pytest.raises(ValueError, match=r"shapes .*'action': \(3,\)"):
        PROCESS.pack({**parts, "action": torch.randn(4, 2)})
    with pytest.raises(ValueError, match="the streams of a sample"):
        PROCESS.pack({"video": parts["video"]})
    with pytest.raises(ValueError, match="one number of samples"):
        as_batch({"x0": {**parts, "action": torch.randn(3, 3)}})
    with pytest.raises(ValueError, match=r"shape \(B, 7\), and these \(4, 6\)"):
        PROCESS.unpack(torch.randn(4, 6))
    with pytest.raises(ValueError, match="at least one stream"):
        StreamProcess({})
    with pytest.raises(ValueError, match=r"'a' has shape .*shift 0\.0"):
        StreamProcess({"a": Stream([2], 0.0)})


# ------------------------------------------------------------------------------------------------ process
def test_each_stream_has_the_noise_level_of_its_shift():
    own = separate_times(TIMES)
    for name, sigma in PROCESS.unpack(PROCESS.sigma(TIMES)).items():
        torch.testing.assert_close(sigma, expand(own[name], sigma).expand_as(sigma))
    snr = PROCESS.unpack(PROCESS.log_snr(TIMES))
    # a shift k moves the log-SNR by -2 ln k (SD3, Eq. 23)
    torch.testing.assert_close(
        snr["action"][:3, 0] - snr["video"][:3, 0, 0], torch.full((3,), 2.0 * math.log(10.0), dtype=F64)
    )
    assert (PROCESS.alpha(TIMES)[-1] == 0).all()
    assert (PROCESS.sigma(TIMES)[-1] == 1).all()


def test_derivatives_are_those_of_the_coefficients():
    t, h = TIMES[:3], 1e-6
    for f, slope in ((PROCESS.alpha, PROCESS.d_alpha), (PROCESS.sigma, PROCESS.d_sigma)):
        torch.testing.assert_close(slope(t), (f(t + h) - f(t - h)) / (2 * h), rtol=1e-6, atol=1e-6)


def test_coefficients_of_one_time_fit_every_sample():
    one, x0, eps = torch.tensor(0.4, dtype=F64), sample(), sample(seed=1)
    assert PROCESS.sigma(one).shape == (1, 7)
    repeated = PROCESS.add_noise(x0, eps, one.expand(4))
    assert torch.equal(PROCESS.add_noise(x0, eps, one), repeated)


def test_noising_is_that_of_every_stream_by_itself():
    x0, eps = sample(), sample(seed=1)
    x_t, own = PROCESS.unpack(PROCESS.add_noise(x0, eps, TIMES)), separate_times(TIMES)
    for name, part in x_t.items():
        torch.testing.assert_close(part, FLOW.add_noise(PROCESS.unpack(x0)[name], PROCESS.unpack(eps)[name], own[name]))


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_predictions_are_read_for_every_stream_by_itself(kind):
    raw, x_t, t = sample(), sample(seed=1), TIMES[:3].repeat(2)[:4]
    packed, own = Prediction(raw, x_t, t, PROCESS, kind), separate_times(t)
    parts = {
        name: Prediction(PROCESS.unpack(raw)[name], PROCESS.unpack(x_t)[name], own[name], FLOW, kind) for name in own
    }
    for form in ("x0", "eps", "v_prediction", "flow_prediction", "score"):
        for name, part in PROCESS.unpack(getattr(packed, form)).items():
            torch.testing.assert_close(part, getattr(parts[name], form), msg=f"{form} of {name}")
    # dx/dt of a stream is its own velocity times d sigma_s / dt
    for name, part in PROCESS.unpack(packed.velocity).items():
        rate = PROCESS.unpack(PROCESS.d_sigma(t))[name]
        torch.testing.assert_close(part, parts[name].velocity * rate)


def test_a_change_of_process_is_that_of_every_stream():
    t, scale = change_process(TIMES, PROCESS, FLOW)
    torch.testing.assert_close(t, PROCESS.sigma(TIMES))
    torch.testing.assert_close(scale, torch.ones_like(scale))


def test_starting_noise_has_the_level_of_every_stream():
    eps = sample()
    assert torch.equal(PROCESS.prior(eps), eps)
    torch.testing.assert_close(PROCESS.prior(eps, 0.4), PROCESS.sigma(torch.tensor(0.4)) * eps)
    assert PROCESS.prior_std(1.0) == 1.0
    with pytest.raises(ValueError, match=r"outside \(0, 1.0\]"):
        PROCESS.prior(eps, 1.5)
    with pytest.raises(ValueError, match="different noise levels"):
        PROCESS.prior_std(0.4)


def test_times_in_noise_levels_are_refused_and_others_are_not():
    u = torch.tensor([0.25, 0.5])
    with pytest.raises(ValueError, match="no common noise level"):
        LogNormal().quantile(u, PROCESS)
    torch.testing.assert_close(Uniform(0.0, 1.0).quantile(u, PROCESS), u.double())
    assert few_step_times(PROCESS, 4) == [1.0, 0.75, 0.5, 0.25]


# ------------------------------------------------------------------------------------------------ samplers
@pytest.mark.parametrize("sampler", [ode, heun, renoise, adams, dpmpp_2m])
def test_a_sampler_does_with_each_stream_what_it_does_with_it_alone(sampler):
    """Streams whose denoisers do not look at each other are sampled as if they were alone, at their own times."""
    gains = {"video": 0.7, "action": -0.4}

    def alone(name):
        def denoise(x, t):
            return Prediction(torch.tanh(gains[name] * x + t.reshape(-1, *[1] * (x.ndim - 1))), x, t, FLOW, "sample")

        return denoise

    def together(x, t):
        t = t.expand(len(x)) if t.ndim == 0 else t
        own = PROCESS.stream_times(t)
        parts = {name: alone(name)(part, own[name]).x0 for name, part in PROCESS.unpack(x).items()}
        return Prediction(PROCESS.pack(parts), x, t, PROCESS, "sample")

    start, grid = sample(), [1.0, 0.6, 0.3]
    fresh = {i: sample(seed=10 + i) for i in (1, 2)}
    made = PROCESS.unpack(sampler(together, start, grid, PROCESS, noise=lambda i, _x: fresh[i]))
    for name, part in made.items():
        times = separate_times(torch.tensor(grid, dtype=F64))[name].tolist()
        own = sampler(
            alone(name),
            PROCESS.unpack(start)[name],
            times,
            FLOW,
            noise=lambda i, _x, n=name: PROCESS.unpack(fresh[i])[n],
        )
        torch.testing.assert_close(part, own)


def test_processes_are_copied_and_named():
    assert repr(copy.deepcopy(PROCESS)) == "StreamProcess(action [3] shift 0.5, video [2, 2] shift 5)"
