"""Methods and networks as a researcher writes them: small, with parts that no family knows."""

from __future__ import annotations

from functools import partial

import torch
from lightning.pytorch import Trainer
from torch import nn

from lightning_distill.batch import Batch
from lightning_distill.data.prior import Prior
from lightning_distill.methods import DistillationModule
from lightning_distill.methods.base import Terms
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.small import ResidualMLP
from lightning_distill.networks.specs import NewDenoiser
from lightning_distill.processes import FlowMatching


class Normed(nn.Module):
    """A plain network with statistics and optional classes."""

    def __init__(self):
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(2), nn.Linear(2, 2)

    def forward(self, x, t, class_labels=None):
        shift = 0.0 if class_labels is None else class_labels.to(x)[:, None]
        return self.out(self.norm(x)) + shift


def teacher(network: nn.Module | None = None) -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(network or ResidualMLP((2,), 8, 1), FlowMatching(), "flow_prediction", sigma_data=1.0)


def spec() -> NewDenoiser:
    return NewDenoiser(partial(ResidualMLP, (2,), 8, 1), FlowMatching(), "flow_prediction", sigma_data=1.0)


def trainer(folder, steps: int = 4, **settings) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "default_root_dir": folder, "max_steps": steps}
    return Trainer(**{**quiet, **settings})


def prior(**settings) -> Prior:
    return Prior(**{"batch_size": 8, "samples_per_epoch": 64, **settings})


class Shift(DistillationModule):
    """The student goes to zero, with a second phase for whatever else is to be trained."""

    phases = {"student": ("student",), "head": ("head",)}

    def build_roles(self):
        super().build_roles()
        self.head = nn.Linear(2, 1)

    def distance(self, batch: Batch) -> torch.Tensor:
        x = self.draws.normal("x", (batch.size, 2))
        return self.student(x, torch.full((batch.size,), 0.5, dtype=torch.float64), batch.cond).x0.square()

    def student_loss(self, batch: Batch) -> Terms:
        return Terms({"zero": self.distance(batch).mean()}, {"size": batch.size})

    def head_loss(self, batch: Batch) -> Terms:
        return Terms({"head": self.head(self.draws.normal("h", (batch.size, 2))).square().mean()})
