"""The posterior mean over a bank of samples, and as the fake score of a method."""

from __future__ import annotations

import pytest
import torch

from lightning_distill.batch import Batch
from lightning_distill.methods import DMD2, PhasedDMD
from lightning_distill.networks.analytic import GaussianMixture, analytic_denoiser
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.oracle import OracleNetwork, OracleScore, bank_posterior_mean
from lightning_distill.networks.small import ResidualMLP
from lightning_distill.processes import EDM, FlowMatching, VariancePreserving
from lightning_distill.randomness import Draws


@pytest.mark.parametrize("process", [FlowMatching(), VariancePreserving(), EDM(0.02, 10.0)], ids=["flow", "vp", "edm"])
@pytest.mark.parametrize("width", [0.05, 0.4])
def test_it_is_the_mixture_of_the_samples(process, width):
    """The same as the exact denoiser of a Gaussian mixture with one component per sample."""
    bank = torch.randn(7, 2, 3)
    mixture = GaussianMixture(bank.flatten(1), std=width, shape=(2, 3))
    x_t, t = torch.randn(5, 2, 3), torch.linspace(0.1, 0.9, 5).double() * process.t_max
    torch.testing.assert_close(
        bank_posterior_mean(x_t, t, bank, process, width), mixture.posterior_mean(x_t, t, process), atol=1e-5, rtol=1e-5
    )


def test_without_blur_it_ends_at_the_nearest_sample():
    bank, x = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.4], [2.5]])
    t = torch.full((2,), 1e-4, dtype=torch.float64)
    torch.testing.assert_close(bank_posterior_mean(x, t, bank, FlowMatching()), torch.tensor([[0.0], [3.0]]))
    t = torch.ones(2, dtype=torch.float64)  # pure noise says nothing
    torch.testing.assert_close(bank_posterior_mean(x, t, bank, FlowMatching()), torch.full((2, 1), 4 / 3))


def test_masked_samples_do_not_count():
    bank, t = torch.randn(6, 2), torch.full((4,), 0.6, dtype=torch.float64)
    x, allowed = torch.randn(4, 2), torch.arange(6) < 4
    masked = bank_posterior_mean(x, t, bank, FlowMatching(), 0.1, allowed.expand(4, -1))
    torch.testing.assert_close(masked, bank_posterior_mean(x, t, bank[:4], FlowMatching(), 0.1))


def test_the_bank_keeps_the_newest_samples():
    network = OracleNetwork((1,), 5, FlowMatching())
    for start in (0, 2, 4):
        network.observe(torch.arange(start, start + 2.0)[:, None], {})
    assert network.bank[:, 0].tolist() == [4.0, 5.0, 2.0, 3.0, 0.0]
    assert network.filled.all()
    network.observe(torch.arange(9.0)[:, None], {})
    assert network.bank[:, 0].tolist() == [4.0, 5.0, 6.0, 7.0, 8.0]


def test_classes_have_their_own_samples():
    network = OracleNetwork((1,), 4, FlowMatching(), num_classes=2, width=0.01)
    x, t = torch.zeros(3, 1), torch.ones(3, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2])
    assert network(x, t, labels).flatten().tolist() == [0.0, 0.0, 0.0]
    network.observe(torch.tensor([[1.0], [3.0]]), {"class_labels": torch.tensor([0, 1])})
    assert network(x, t, labels).flatten().tolist() == pytest.approx([1.0, 3.0, 2.0])


def module(teacher, **settings):
    made = DMD2(teacher, **{"fake_score": OracleScore(bank=64, width=0.2), "shape": [2], "ema": [], **settings})
    made.configure_model()
    return made


def mlp(classes=0):
    network = ResidualMLP((2,), width=8, depth=1, num_classes=classes)
    return Denoiser(network, FlowMatching(), "flow_prediction", sigma_data=1.1)


def test_a_method_fills_the_bank_after_judging_it():
    made = module(mlp(3))
    batch = Batch(cond={"class_labels": torch.arange(8) % 3})
    made.draws = Draws(made.streams, 0, 0, "fake_score0")
    first = made.fake_score_loss(batch).losses["denoising"]
    x = made.rollout(batch, grad=False).x0
    assert torch.equal(made.fake_score.network.bank[:8], x)
    assert made.fake_score.network.labels[:8].tolist() == batch.cond["class_labels"].tolist()
    held = made.fake_score.network.bank.clone()
    again = made.fake_score_loss(batch).losses["denoising"]
    assert float(again.detach()) == 0.0, "its own samples say nothing about its blur"
    assert torch.equal(made.fake_score.network.bank, held), "nor do they enter twice"
    made.draws = Draws(made.streams, 1, 0, "fake_score0")
    made._rollouts.clear()
    assert float(made.fake_score_loss(batch).losses["denoising"].detach()) > 0.0
    first.backward()
    assert float(made.fake_score.network.log_width.grad) != 0
    keys = [k for k in made.state_dict() if k.startswith("fake_score")]
    assert any(k.endswith("bank") for k in keys)


def test_with_it_the_direction_is_that_of_the_exact_score():
    """Many samples of N(b, a^2): the bank's posterior mean is the Gaussian's."""
    generator = torch.Generator().manual_seed(0)
    samples = 0.5 + 0.8 * torch.randn(20_000, 1, generator=generator)
    exact = analytic_denoiser(GaussianMixture([[0.5]], std=0.8), FlowMatching())
    x_t, t = torch.linspace(-1, 1.5, 6)[:, None], torch.full((6,), 0.5, dtype=torch.float64)
    got = bank_posterior_mean(x_t, t, samples, FlowMatching(), 0.05)
    torch.testing.assert_close(got, exact(x_t, t).x0, atol=0.03, rtol=0)


def test_bad_input():
    with pytest.raises(ValueError, match="bank=0"):
        DMD2(mlp(), fake_score=OracleScore(bank=0))
    with pytest.raises(ValueError, match="remembers clean samples"):
        PhasedDMD(
            mlp(), fake_score=OracleScore(bank=8, shape=[2]), num_steps=2, critic_condition_on="none"
        ).configure_model()
