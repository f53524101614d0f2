"""Datamodules: where training batches come from."""

from lightning_distill.data.base import DistillationDataModule, Scaling, check_scaling
from lightning_distill.data.cached import CachedConditions, CachedLatents
from lightning_distill.data.digits import Digits
from lightning_distill.data.emoji import Emoji
from lightning_distill.data.fashion import FashionMNIST
from lightning_distill.data.image_folder import ImageFolder
from lightning_distill.data.loader import InMemory, ResumableLoader, Source
from lightning_distill.data.pairs import Pairs
from lightning_distill.data.prior import Prior
from lightning_distill.data.store import Store, StoreWriter
from lightning_distill.data.super_resolution import SuperResolution
from lightning_distill.data.toy import Toy2D
from lightning_distill.data.trajectories import Trajectories

__all__ = [
    "CachedConditions",
    "CachedLatents",
    "Digits",
    "DistillationDataModule",
    "Emoji",
    "FashionMNIST",
    "ImageFolder",
    "InMemory",
    "Pairs",
    "Prior",
    "ResumableLoader",
    "Scaling",
    "Source",
    "Store",
    "StoreWriter",
    "SuperResolution",
    "Toy2D",
    "Trajectories",
    "check_scaling",
]
