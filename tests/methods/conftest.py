"""The 2-D learning problem shared by the tests of the methods: four Gaussians, a trained teacher, its distances."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_distill.batch import Batch
from lightning_distill.data import InMemory, ResumableLoader
from lightning_distill.ema import PowerEMA
from lightning_distill.generation import generate
from lightning_distill.methods import TeacherTraining
from lightning_distill.metrics.sliced_wasserstein import sliced_wasserstein
from lightning_distill.networks.analytic import ring4
from lightning_distill.networks.small import ResidualMLP
from lightning_distill.networks.specs import NewDenoiser
from lightning_distill.processes import EDM, TrigFlow
from lightning_distill.times import Karras

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

PROCESS = EDM(0.02, 10.0)
TIMES = Karras(0.02, 10.0)
TEACHER_UPDATES = 1000


def adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-3, betas=(0.0, 0.99), fused=True)


def fit(module, steps, data, batch_size=256, **settings):
    """Train on points in memory and return the trainer."""
    quiet = {
        "accelerator": "cpu",
        "max_steps": steps,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(**{**quiet, **settings})
    trainer.fit(module, ResumableLoader(InMemory(data), batch_size, slices=module.slices_per_cycle))
    return trainer


class Ring4:
    """The data and the two measures of the problem."""

    process, times = PROCESS, TIMES

    def __init__(self):
        mixture = ring4()
        self.means = mixture.means.float()
        self.data = Batch(x0=mixture.sample(50_000, torch.Generator().manual_seed(0))[0])
        self.reference = mixture.sample(5000, torch.Generator().manual_seed(7))[0]
        self.fit, self.adam = fit, adam

    def distance(self, samples) -> float:
        """Sliced Wasserstein-2 distance to fresh data."""
        return sliced_wasserstein(samples, self.reference)

    def shares(self, samples) -> list[float]:
        """Share of the samples nearest to each mode."""
        nearest = torch.cdist(samples, self.means).argmin(1)
        return (nearest.bincount(minlength=4) / len(samples)).tolist()


@pytest.fixture(scope="session")
def ring4_problem() -> Ring4:
    return Ring4()


@pytest.fixture(scope="session")
def trained_teacher(ring4_problem) -> SimpleNamespace:
    """A denoiser trained on the data by ``TeacherTraining``, and the module that trained it."""
    spec = NewDenoiser(
        lambda: ResidualMLP((2,), 128, 3), PROCESS, "v_prediction", network_process=TrigFlow(), sigma_data=1.12
    )
    module = TeacherTraining(spec, label_dropout=0.0, training_times=TIMES, student_optimizer=adam, ema=[PowerEMA(0.1)])
    fit(module, TEACHER_UPDATES, ring4_problem.data)
    denoiser = module.sampling_network()
    noise = torch.randn(5000, 2, generator=torch.Generator().manual_seed(1))

    def sample(steps: int) -> torch.Tensor:
        grid = Karras(0.02, 10.0).levels(torch.linspace(1.0, 0.0, steps, dtype=torch.float64)) if steps > 1 else [10.0]
        times = [min(float(t), 10.0) for t in grid]
        return generate(denoiser, noise, {}, times, "ode")

    return SimpleNamespace(module=module, denoiser=denoiser, sample=sample)
