"""Datamodules: where training batches come from."""

from lightning_distill.data.base import DistillationDataModule, Scaling, check_scaling
from lightning_distill.data.digits import Digits
from lightning_distill.data.fashion import FashionMNIST
from lightning_distill.data.image_folder import ImageFolder
from lightning_distill.data.loader import InMemory, ResumableLoader, Source
from lightning_distill.data.pairs import Pairs
from lightning_distill.data.prior import Prior
from lightning_distill.data.toy import Toy2D

__all__ = [
    "Digits",
    "DistillationDataModule",
    "FashionMNIST",
    "ImageFolder",
    "InMemory",
    "Pairs",
    "Prior",
    "ResumableLoader",
    "Scaling",
    "Source",
    "Toy2D",
    "check_scaling",
]
