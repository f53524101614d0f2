"""What a method needs beside a teacher, a student and latents, to make one update of any family."""

from __future__ import annotations

from typing import Any

from tiny_pipelines import Tiny

from lightning_distill.guidance import Guidance
from lightning_distill.losses.reward_weights import MeanValue
from lightning_distill.methods import ArcFlow, DistillationModule, PiFlow
from lightning_distill.methods.trajectory import TwoTimeMethod
from lightning_distill.networks.adversary import Adversary
from lightning_distill.networks.guidance_adapters import GuidanceAdapters
from lightning_distill.networks.roles import Copy, Lora
from lightning_distill.networks.two_time import TwoTime

__all__ = ["DATA_FREE", "LEFT_OUT", "settings_of"]

#: stands for an argument that the method does not take
LEFT_OUT: Any = object()
#: methods that solve trajectories from noise where batches have no stored ones
DATA_FREE = {
    *("AGD", "HiPA", "InstaFlow", "KnowledgeDistillation", "LearnedSolver"),
    *("RFPlusPlus", "Reflow", "SlimFlow", "SlimFlowDistillation"),
}
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


def settings_of(method: type[DistillationModule], tiny: Tiny, lora: bool) -> dict[str, Any]:
    """Arguments without which a method does not run on text-conditioned latents.

    Args:
        method: class of the method.
        tiny: of the family.
        lora: whether the student is to be an adapter.
    """
    name = method.__name__
    if name in _GAN:
        return {"gan": Adversary(taps=(tiny.block,), **_GAN[name])}
    if issubclass(method, TwoTimeMethod) and method not in (PiFlow, ArcFlow) and tiny.name != "anyflow":
        return {"student": TwoTime(Lora(rank=2) if lora else Copy())}
    if name in ("HiPA", "InstaFlow", "SlimFlowDistillation"):
        return {"num_steps": 1}
    if name == "VDOT":
        return {"group_size": 2}
    if name in ("DCM", "MLCM", "TSCD", "VideoScene"):
        return {"num_steps": LEFT_OUT}
    if name == "GuidanceDistillation":
        return {"guidance": Guidance(2.0)}
    if name == "RewardedDMD":
        return {"reward": MeanValue(channel=0)}
    if name == "LearnedSolver":
        return {"student": LEFT_OUT, "ema": LEFT_OUT}
    if name == "AGD" and not lora:
        return {"student": GuidanceAdapters(width=8)}
    return {}
