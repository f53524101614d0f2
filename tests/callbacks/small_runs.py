"""Small runs that callbacks watch."""

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_distill.data.digits import Digits
from lightning_distill.data.prior import Prior
from lightning_distill.methods import DMD2
from lightning_distill.networks.specs import ZooDenoiser


def student(**settings):
    """DMD2 on the shipped digits teacher, without data."""

    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.05)

    defaults = {"fake_score_steps": 1, "student_optimizer": sgd, "fake_score_optimizer": sgd}
    return DMD2(ZooDenoiser("digits"), **{**defaults, **settings})


def prior(batch_size=16):
    return Prior(num_classes=10, batch_size=batch_size)


def digits(batch_size=16):
    return Digits(batch_size=batch_size)


def trainer(folder, steps=4, **settings):
    quiet = {
        "accelerator": "cpu",
        "max_steps": steps,
        "logger": TensorBoardLogger(str(folder), name="run"),
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 2,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**{**quiet, **settings})
