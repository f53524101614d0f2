"""Sampling from denoisers: noise, conditions, chunks and equal seeds."""

from __future__ import annotations

import pytest
import torch
from tiny_pipelines import MAKERS
from torch import nn

from lightning_distill.export import probe_cond
from lightning_distill.generation import default_cond, draw_noise, generate, given_cond, index_noise
from lightning_distill.networks.analytic import GaussianMixture, analytic_denoiser
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.small import ResidualMLP
from lightning_distill.processes import EDM, FlowMatching, VariancePreserving

TIMES = [1.0, 0.6, 0.3]


@pytest.fixture
def denoiser():
    network = ResidualMLP((2,), width=8, depth=1, num_classes=3)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.4)
    return Denoiser(network, FlowMatching(), "flow_prediction")


def test_a_renoise_sampler_is_the_loop_of_the_paper(denoiser):
    noise, cond = torch.randn(5, 2), {"class_labels": torch.arange(5) % 3}
    got = generate(denoiser, noise, cond, TIMES, generator=torch.Generator().manual_seed(3))
    fresh = torch.Generator().manual_seed(3)
    x = noise
    for i, t in enumerate(TIMES):
        x0 = denoiser(x, torch.tensor(t), cond).x0
        if i + 1 < len(TIMES):
            r = TIMES[i + 1]
            x = (1 - r) * x0 + r * torch.randn(5, 2, generator=fresh)
    torch.testing.assert_close(got, x0)
    assert got.dtype == torch.float32
    assert not got.requires_grad


def test_one_generator_draws_the_start_and_then_the_fresh_noise(denoiser):
    cond = {"class_labels": torch.zeros(4, dtype=torch.long)}

    def sample(seed):
        generator = torch.Generator().manual_seed(seed)
        return generate(denoiser, draw_noise((4, 2), generator), cond, TIMES, generator=generator)

    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))
    assert torch.equal(
        draw_noise((4, 2), torch.Generator().manual_seed(5)),
        torch.randn(4, 2, generator=torch.Generator().manual_seed(5)),
    )


@pytest.mark.parametrize("sampler", ["ode", "heun", "dpmpp_2m"])
def test_deterministic_samplers_do_not_depend_on_chunks(denoiser, sampler):
    noise, cond = torch.randn(7, 2), {"class_labels": torch.arange(7) % 3}
    whole = generate(denoiser, noise, cond, TIMES, sampler)
    for size in (1, 3, 7, 100):
        torch.testing.assert_close(generate(denoiser, noise, cond, TIMES, sampler, batch_size=size), whole)


def test_guidance_and_noise_scale_reach_the_sampler(denoiser):
    noise, cond = torch.randn(4, 2), {"class_labels": torch.arange(4) % 3}
    plain = generate(denoiser, noise, cond, TIMES, "ode")
    assert not torch.allclose(generate(denoiser, noise, cond, TIMES, "ode", guidance_scale=3.0), plain)
    null = {"class_labels": torch.full((4,), 3)}
    torch.testing.assert_close(
        generate(denoiser, noise, cond, TIMES, "ode", guidance_scale=0.0), generate(denoiser, noise, null, TIMES, "ode")
    )
    quiet = [
        generate(denoiser, noise, cond, TIMES, noise_scale=0.0, generator=torch.Generator().manual_seed(seed))
        for seed in range(2)
    ]
    assert torch.equal(*quiet)


@pytest.mark.parametrize(
    "process", [FlowMatching(), VariancePreserving(), EDM(0.02, 10.0)], ids=lambda p: type(p).__name__
)
def test_the_exact_teacher_makes_its_own_distribution(process):
    """From the start noise of the process to data N(1, .3^2), by a second-order solver."""
    teacher = analytic_denoiser(GaussianMixture([[1.0]], std=0.3), process)
    from lightning_distill.times import few_step_times

    out = generate(teacher, index_noise(4000, (1,), seed=2), {}, few_step_times(process, 60), "heun")
    # processes that keep data in their noisiest input start a little off
    assert float(out.mean()) == pytest.approx(1.0, abs=0.03)
    assert float(out.std()) == pytest.approx(0.3, abs=0.02)


def test_index_noise_is_independent_of_batching():
    whole = index_noise(50, (3, 4, 4), seed=1)
    assert torch.equal(torch.cat([index_noise(20, (3, 4, 4), 1), index_noise(30, (3, 4, 4), 1, first=20)]), whole)
    assert not torch.equal(index_noise(50, (3, 4, 4), seed=2), whole)


def test_default_conditions_are_the_classes_in_turn(denoiser):
    assert default_cond(denoiser, 5)["class_labels"].tolist() == [0, 1, 2, 0, 1]
    assert default_cond(denoiser, 3, first=4)["class_labels"].tolist() == [1, 2, 0]
    assert default_cond(Denoiser(ResidualMLP((2,), 4, 1), FlowMatching(), "sample"), 5) == {}


def test_unknown_samplers_are_listed_against_the_known(denoiser):
    with pytest.raises(ValueError, match=r"unknown sampler 'euler'; choose one of adams, dpmpp_2m.*renoise"):
        generate(denoiser, torch.randn(2, 2), {}, TIMES, "euler")


@pytest.mark.parametrize("name", ["sd15", "sana"])
def test_example_conditions_are_as_long_as_the_stored_null(name):
    tiny = MAKERS[name]()
    null = {k: torch.cat([v, v, v], dim=1) if v.ndim > 1 else v for k, v in tiny.null().items()}
    denoiser = tiny.denoiser(null_cond=null)
    made = default_cond(denoiser, 2)
    for key, value in null.items():
        assert made[key].shape == (2, *value.shape[1:]), key
    assert set(denoiser.null_cond(made)) == set(made)
    if "encoder_attention_mask" in made:
        assert made["encoder_attention_mask"].all()
        tokens = tiny.denoiser(null_cond={"encoder_hidden_states": null["encoder_hidden_states"]})
        assert default_cond(tokens, 2)["encoder_attention_mask"].shape == (2, null["encoder_hidden_states"].shape[1])
    assert set(probe_cond(denoiser, 2, {"height": 64, "width": 64})) >= set(made)


def test_conditions_of_text_models_must_be_given(denoiser):
    words = MAKERS["sd15"]().denoiser()
    with pytest.raises(ValueError, match="needs encoder_hidden_states for every sample; give cond="):
        given_cond(words, 2, None)
    cond = {"encoder_hidden_states": torch.zeros(2, 3, 8)}
    assert given_cond(words, 2, cond) is cond
    assert given_cond(denoiser, 2, None)["class_labels"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("cond", "error", "words"),
    [
        (torch.arange(2), TypeError, "cond is a Tensor"),
        ({"class_labels": torch.arange(3)}, ValueError, "has 3 rows, and 2 samples are asked for"),
        ({"class_labels": [0, 1]}, ValueError, "must be a tensor of 2 integers"),
        ({"class_labels": torch.ones(2)}, ValueError, "must be a tensor of 2 integers"),
        (
            {"class_labels": torch.tensor([0, 99])},
            ValueError,
            "has the labels 0 to 99; the network has the classes 0 to",
        ),
        ({"class_labels": torch.tensor([-1, 0])}, ValueError, "has the labels -1 to 0"),
    ],
    ids=["tensor", "rows", "list", "floats", "high", "low"],
)
def test_conditions_that_do_not_fit_are_refused(denoiser, cond, error, words):
    with pytest.raises(error, match=words):
        given_cond(denoiser, 2, cond)
