"""Perceptual distances as parts of methods: LPIPS, or that of the teacher's own features."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_distill.generation import default_cond
from lightning_distill.metrics.lpips_diversity import PerceptualDistance
from lightning_distill.networks.discriminators import tap_shapes
from lightning_distill.networks.teacher_features import TeacherFeatures

if TYPE_CHECKING:
    from lightning_distill.methods.base import DistillationModule

__all__ = ["Perceptual", "check_perceptual", "perceived", "perceiving_calls"]

Perceptual = PerceptualDistance | TeacherFeatures


def check_perceptual(distance: Perceptual | None, module: "DistillationModule") -> None:
    """The distance has its weights and can compare the method's samples, or finds its blocks in the teacher.

    Raises:
        FileNotFoundError: weights are missing.
        ValueError: samples cannot be compared, or there are no such blocks.
    """
    if isinstance(distance, PerceptualDistance):
        distance.check(module.sample_shape)
    elif distance is not None:
        teacher = module.require_teacher()
        cond = {k: v.to(teacher.device) for k, v in default_cond(teacher, 1).items()}
        tap_shapes(teacher, module.sample_shape, distance.taps, cond)


def perceived(
    distance: Perceptual,
    module: "DistillationModule",
    made: Tensor,
    goal: Tensor,
    cond: Mapping[str, Any],
    versions: int = 1,
) -> Tensor:
    """Distance of samples (V B, ...) with the conditions ``cond`` by the module's current draws: (V B,).

    Args:
        distance: of pictures.
        module: owner of the draws.
        made: samples.
        goal: what they should be.
        cond: conditions, V B rows.
        versions: V, predictions of each of B samples one after the other, which share their draws.
    """
    n = len(made) // versions
    if isinstance(distance, PerceptualDistance):
        return distance(made, goal, _crop(distance, module, made, versions))
    u, noise = module.draws.uniform("perceptual/t", n), module.draws.normal("perceptual/noise", (n, *made.shape[1:]))
    noise = noise.repeat(versions, *(1 for _ in made.shape[1:]))
    return distance(module.require_teacher(), made, goal, cond, u.repeat(versions), noise)


def _crop(distance: PerceptualDistance, module: "DistillationModule", made: Tensor, versions: int) -> Tensor | None:
    """Corners at which both pictures are cut, a place of its own for every sample; None where nothing is."""
    if distance.decoder is None or distance.decoder.crop is None:
        return None
    places = (module.draws.uniform(f"perceptual/{side}", len(made) // versions) for side in ("top", "left"))
    u, v = (place.repeat(versions) for place in places)
    return distance.decoder.offsets(u, v, made)


def perceiving_calls(distance: Perceptual | None) -> int:
    """Teacher calls of a distance."""
    return 2 if isinstance(distance, TeacherFeatures) else 0
