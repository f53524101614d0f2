"""The losses of released code, reproduced: continuous-time consistency of latent models; see ``test_parity``."""

from __future__ import annotations

import math

import pytest
import torch
from parity_networks import F64, STUDENT, TEACHER, Formula, Given, Head, built, check, denoiser, fixture
from torch import nn

from lightning_distill.batch import Batch
from lightning_distill.guidance import Guidance, RandomGuidance
from lightning_distill.methods import TBCM, SANASprint
from lightning_distill.networks.adversary import Adversary
from lightning_distill.processes import FlowMatching, TrigFlow, expand
from lightning_distill.times import Uniform


class Rotated(Formula):
    """The formula as the velocity of TrigFlow, within a network of flow matching."""

    def forward(self, x, t, shift=None):
        tau, scale = torch.atan2(t, 1 - t), expand(torch.hypot(t, 1 - t), x)
        x, cos, sin = x / scale, expand(tau.cos(), x), expand(tau.sin(), x)
        velocity = super().forward(x, tau, shift=shift)
        return sin * x + cos * velocity - (cos * x - sin * velocity)


class Saturating(nn.Module):
    """A log-variance in levels of EDM; less ln 2, as the weight 1 / tan(tau) lacks 1 / sigma_data."""

    def forward(self, tau):
        sigma = 0.5 * tau.tan()
        return 0.3 * sigma / (1 + sigma) - math.log(2.0)


def trigonometric(method, given, process, **settings):
    """A method on latents of unit standard deviation, with the released constant in their units.

    The released code multiplies the latents by sigma_data, and the tangent with them.
    """
    network, kind = (Formula, "v_prediction") if isinstance(process, TrigFlow) else (Rotated, "flow_prediction")
    networks = [
        denoiser(phase, process, kind, network(phase), 1.0, null_cond={"shift": 0.25}) for phase in (TEACHER, STUDENT)
    ]
    module = built(method, *networks, times=Uniform(0.0, 1.0), weight="trig", **settings)
    module.log_variance = Saturating()
    module.consistency.constant = given.constant / given.sigma_data
    return module


class OfSlice(Given):
    """Draws of the samples that phases share, beside those of one phase."""

    def __init__(self, update, shared, **numbers):
        super().__init__(update, **numbers)
        self.shared = Given(update, **shared)

    def of_slice(self):
        return self.shared


@pytest.mark.parametrize(
    ("case", "kind", "update"), [("plain", "hinge", 1000), ("guided", None, 1000), ("ended", "logistic", 5000)]
)
def test_sana_sprint(case, kind, update):
    """The released hinge loss of the discriminator is a mean of its two terms."""
    given, expected = fixture("SANASprint")
    low, high = float(given.scales.min()), float(given.scales.max())
    module = trigonometric(
        SANASprint,
        given,
        TrigFlow(),
        gan=Adversary(taps=("input",), features="teacher", kind=kind or "hinge", times=Uniform(0.0, 1.0)),
        guidance=Guidance(1.0) if case == "plain" else RandomGuidance(low, high),
        largest_share=given.largest_share,
        warmup_updates=given.warmup,
    )
    module.discriminator = head = Head()
    quarter = math.pi / 2
    shared = {"tau": given.later_tau / quarter, "largest": given.largest, "noise": given.later_noise}
    draws = {
        "tau": given.tau / quarter,
        "noise": given.noise,
        "guidance": (given.scales - low) / (high - low),
        "gan__time": given.gan_tau / quarter,
        "gan__noise": given.gan_noise,
        "gan__real_noise": given.real_noise,
    }
    module.draws = OfSlice(update, shared, **draws)
    batch = Batch(x0=given.x0, cond={"shift": torch.zeros(4, dtype=F64)})
    losses, student = module.student_loss(batch).losses, module.student.network
    check(losses["consistency"], student, expected[f"consistency_{case}"], offset=math.log(2.0))
    if kind is None:
        return
    check(losses["gan"], student, expected[f"generator_{kind}"])
    loss = module.discriminator_loss(batch).losses["gan"] * (0.5 if kind == "hinge" else 1.0)
    assert float(loss.detach()) == pytest.approx(expected[f"discriminator_{kind}"]["loss"], rel=1e-9)
    (slope,) = torch.autograd.grad(loss, head.weight)
    assert slope.tolist() == pytest.approx(expected[f"discriminator_{kind}"]["head"], rel=1e-9)


@pytest.mark.parametrize(("case", "update"), [("plain", 1000), ("guided", 1000), ("ended", 5000)])
def test_tbcm(case, update, monkeypatch):
    """The states of pure noise, whose terms are 0, count in the mean here; all trajectories have the same times."""
    given, expected = fixture("TBCM")
    n, states = len(given.noise), len(given.route)
    low, high = float(given.scales.min()), float(given.scales.max())
    module = trigonometric(
        TBCM,
        given,
        FlowMatching(),
        guidance=Guidance(1.0) if case == "plain" else RandomGuidance(low, high),
        solver_steps=states,
        warmup_updates=given.warmup,
    )
    monkeypatch.setattr(module.consistency, "grid", lambda method, n: given.route[:, None].expand(-1, n))
    module.draws = Given(update, noise=given.noise, guidance=(given.scales - low) / (high - low))
    loss = module.student_loss(Batch(size=n, cond={"shift": torch.zeros(n, dtype=F64)})).losses["consistency"]
    check(loss, module.student.network, expected[case], factor=states / (states - 1), offset=math.log(2.0))
