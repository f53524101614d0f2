"""What a method needs beside a teacher, a student and latents, to make one update of any family."""

from __future__ import annotations

import math
import tempfile
from typing import Any

import torch
from tiny_pipelines import Tiny

from lightning_distill.data.store import StoreWriter
from lightning_distill.guidance import Guidance
from lightning_distill.losses.reward_weights import MeanValue
from lightning_distill.methods import ArcFlow, DistillationModule, PiFlow
from lightning_distill.methods.solved_pairs import SolvedPairs
from lightning_distill.methods.trajectory import TwoTimeMethod
from lightning_distill.networks.adversary import Adversary
from lightning_distill.networks.frozen_features import FrozenFeatures
from lightning_distill.networks.guidance_adapters import GuidanceAdapters
from lightning_distill.networks.roles import Copy, Lora
from lightning_distill.networks.shared_encoder import SharedEncoder
from lightning_distill.networks.two_time import TwoTime

__all__ = ["DATA_FREE", "FROM_PICTURES", "LEFT_OUT", "settings_of"]

#: stands for an argument that the method does not take
LEFT_OUT: Any = object()
#: methods that solve trajectories from noise where batches have no stored ones
DATA_FREE = {
    *("AGD", "HiPA", "InstaFlow", "KnowledgeDistillation", "LearnedSolver"),
    *("RFPlusPlus", "Reflow", "SlimFlow", "SlimFlowDistillation"),
}
#: methods that start from a picture: a coarse rendering, or what is to be restored
FROM_PICTURES = {"OFTSR", "VideoScene"}
_GAN = {
    "ADD": {"features": "teacher"},
    "ADM": {"features": "teacher", "kind": "hinge"},
    "ASD": {"features": "fake_score"},
    "AccVideo": {"features": "teacher"},
    "CDM": {"features": "fake_score"},
    "FDistill": {"features": "fake_score"},
    "LADD": {"features": "teacher"},
    "SANASprint": {"features": "teacher"},
    "TADSR": {"features": "teacher"},
    "UniInstruct": {"features": "fake_score"},
}


def small_features(tiny: Tiny) -> FrozenFeatures:
    """Random features of the family's latents, frames as channels."""
    frames = torch.nn.Flatten(1, -3) if len(tiny.shape) == 4 else torch.nn.Identity()
    convolution = torch.nn.Conv2d(math.prod(tiny.shape[:-2]), 8, 3, padding=1)
    return FrozenFeatures(torch.nn.Sequential(frames, convolution, torch.nn.SiLU()), ["2"], channels=tiny.shape[0])


def stored_conditions(tiny: Tiny) -> str:
    """A store of two conditions of the family."""
    folder, tensors = tempfile.mkdtemp(prefix="conditions_"), tiny.cond(2)
    StoreWriter(folder, {"kind": "cache"}, 2).write(0, {k: v.contiguous() for k, v in tensors.items()})
    return folder


def settings_of(method: type[DistillationModule], tiny: Tiny, lora: bool) -> dict[str, Any]:
    """Arguments without which a method does not run on text-conditioned latents.

    Args:
        method: class of the method.
        tiny: of the family.
        lora: whether the student is to be an adapter.
    """
    name = method.__name__
    if name in _GAN:
        steps = {"num_steps": 1} if name == "TADSR" else {}
        return {"gan": Adversary(taps=(tiny.block,), **_GAN[name]), **steps}
    if name in ("BOOT", "CorrectedFreeFlow", "FreeFlow", "OFTSR"):
        student = {} if tiny.name == "anyflow" else {"student": TwoTime(Lora(rank=2) if lora else Copy())}
        return {"num_steps": 1, **student}
    if name in ("GDD", "GDDI"):
        return {"features": small_features(tiny), "num_steps": 1}
    if name == "DMD":
        return {"num_steps": 1, "regression_pairs": SolvedPairs(num=4, steps=2, conditions=stored_conditions(tiny))}
    if name == "TiUE":
        return {"num_steps": 1, "student": SharedEncoder(decoders=2), "guidance": Guidance(1.0)}
    if issubclass(method, TwoTimeMethod) and method not in (PiFlow, ArcFlow) and tiny.name != "anyflow":
        return {"student": TwoTime(Lora(rank=2) if lora else Copy())}
    if name in ("HiPA", "InstaFlow", "SlimFlowDistillation"):
        return {"num_steps": 1}
    if name == "VDOT":
        return {"group_size": 2}
    if name in ("DCM", "MLCM", "TSCD", "VideoScene"):
        frames = tiny.shape[1] if len(tiny.shape) == 4 else 1
        return {"num_steps": LEFT_OUT} | ({"frame_lag": 1 if frames > 1 else None} if name == "DCM" else {})
    if name == "FlashVDM":
        return {"guidance_updates": 0}
    if name == "GuidanceDistillation":
        return {"guidance": Guidance(2.0)}
    if name == "RewardedDMD":
        return {"reward": MeanValue(channel=0)}
    if name == "LearnedSolver":
        return {"student": LEFT_OUT, "ema": LEFT_OUT}
    if name == "AGD" and not lora:
        return {"student": GuidanceAdapters(width=8)}
    return {}
