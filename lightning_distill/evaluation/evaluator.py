"""What is measured on a set of samples, by name, against a reference.

An ``Evaluator`` turns images into features once and computes every chosen measure from them. It knows no Trainer: the
callback, the ``evaluate`` command, the quick start and the benchmarks all use it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_distill.metrics.class_accuracy import class_accuracy
from lightning_distill.metrics.contents import content
from lightning_distill.metrics.diversity import duplicate_rate, vendi_score
from lightning_distill.metrics.extractors import Extractor
from lightning_distill.metrics.features import FeatureExtractor, extract
from lightning_distill.metrics.frechet import FeatureStatistics, frechet_distance
from lightning_distill.metrics.inception_score import inception_score
from lightning_distill.metrics.kid import kernel_distance
from lightning_distill.metrics.manifold import density_coverage, precision_recall
from lightning_distill.metrics.nearest import nearest_distances
from lightning_distill.metrics.progress import progress
from lightning_distill.metrics.reference import Half, Reference
from lightning_distill.metrics.sliced_wasserstein import sliced_wasserstein

__all__ = ["DEFAULT_MEASURES", "MEASURES", "Evaluator", "Features", "check_measures"]

#: measures by name
MEASURES: dict[str, str] = {
    "fd": "Frechet distance to the reference (arXiv:1706.08500)",
    "kid": "kernel distance, unbiased (arXiv:1801.01401)",
    "precision_recall": "share of samples on the data's manifold, and of data on the samples' (arXiv:1904.06991)",
    "density_coverage": "the same, robust against outliers (arXiv:2002.09797)",
    "class_accuracy": "share of samples that show the class asked for (needs a classifier of these classes)",
    "inception_score": "sharp and varied class decisions (arXiv:1606.03498)",
    "vendi": "effective number of different samples (arXiv:2210.02410)",
    "nearest": "median distance to the nearest reference sample: memorisation",
    "duplicates": "share of samples with a near twin among the samples",
    "lpips_diversity": "perceptual distance of samples of one condition, each sampled twice or more (needs perceptual)",
    "clip_score": "agreement of text and image (needs clip, and prompts that the data do not have)",
}
DEFAULT_MEASURES = ("fd", "precision_recall", "density_coverage", "class_accuracy", "vendi", "nearest")
_NEEDS_FEATURES = {"kid", "precision_recall", "density_coverage", "nearest", "duplicates"}
#: rows of the Gram matrix or of the distance matrix that the quadratic measures look at
_MOST = 5_000
#: images on the device at a time
_AT_A_TIME = 64


def check_measures(names: Sequence[str]) -> tuple[str, ...]:
    """The names, or a clear error."""
    if wrong := [name for name in names if name not in MEASURES]:
        raise ValueError(f"unknown measure {wrong[0]!r}; choose from {', '.join(MEASURES)}.")
    return tuple(names)


@dataclass
class Features:
    """What is kept of a set of samples.

    Attributes:
        points: features by extractor name, (N, d); for samples that are no images ``points[""]`` holds them, flattened.
        labels: classes asked for, (N,), or None.
        images: the samples, (N, C, H, W), where a measure needs them.
    """

    points: dict[str, Tensor]
    labels: Tensor | None = None
    images: Tensor | None = None

    def __len__(self) -> int:
        return len(next(iter(self.points.values())))


@dataclass
class Evaluator:
    """Measures samples against references.

    Args:
        extractors: feature extractors; none for points in a plane or vectors, which are compared as they are
            (sliced Wasserstein distance).
        references: reference by extractor name; ``""`` is that of plain points.
        measures: names in ``MEASURES``; those that need features of single reference samples are left out where a
            reference has only its mean and covariance.
        half: half of the reference for everything but the Frechet distance.
        perceptual: perceptual distance for ``lpips_diversity``.
        clip: text-image score for ``clip_score``.
        prompts: prompt of each class, or of each row where there are no classes, for ``clip_score``.
        num_classes: classes of the network; None is the largest label of samples and references, plus 1. An extractor
            that tells another number of classes apart gives no ``class_accuracy``.
        rows: number of rows of the data that samples have their conditions from, in turn, sample i row i modulo this;
            None where the label is all of the condition. See ``RunConditions.facts``.
        device: where features are computed, and what looks at images looks.
    """

    extractors: Sequence[Extractor]
    references: Mapping[str, Reference]
    measures: Sequence[str] = DEFAULT_MEASURES
    half: Half = "selection"
    perceptual: Any = None
    clip: Any = None
    prompts: Sequence[str] = ()
    num_classes: int | None = None
    rows: int | None = None
    device: torch.device | str = "cpu"
    _built: dict[str, FeatureExtractor] = field(default_factory=dict, repr=False)
    _probed: dict[tuple[str, tuple[int, ...]], int] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.measures = check_measures(self.measures)
        names = [e.name for e in self.extractors]
        if len(set(names)) < len(names):
            raise ValueError(f"two extractors have the same name: {names}; give name=... to one of them.")
        if missing := [name for name in names or [""] if name not in self.references]:
            raise ValueError(f"there is no reference for the extractor {missing[0]!r}.")

    # ------------------------------------------------------------------------------------------------ features
    def network(self, extractor: Extractor) -> FeatureExtractor:
        """The extractor's network, built on first use."""
        if extractor.name not in self._built:
            built = extractor.build()
            if isinstance(built, torch.nn.Module):
                built.to(self.device)
            self._built[extractor.name] = built
        return self._built[extractor.name]

    def probe(self, shape: Sequence[int]) -> None:
        """Give every extractor one blank image, before hours of sampling.

        Args:
            shape: of one sample, (C, H, W).

        Raises:
            ValueError: an extractor cannot read it.
        """
        for extractor in self.extractors:
            if (extractor.name, tuple(shape)) in self._probed:
                continue
            try:
                made = extract(self.network(extractor), torch.zeros(1, *shape))
            except (ValueError, RuntimeError, IndexError) as error:
                reason = str(error).strip().splitlines()[0].rstrip(".")
                raise ValueError(
                    f"the extractor {extractor.name!r} cannot read samples of shape {tuple(shape)}: {reason}."
                ) from error
            self._probed[extractor.name, tuple(shape)] = made.shape[-1]

    @property
    def widths(self) -> dict[str, int]:
        """Number of features by extractor, of those that were probed."""
        return {name: width for (name, _), width in self._probed.items()}

    @property
    def needs_images(self) -> bool:
        """Whether a measure looks at the images themselves."""
        return bool({"lpips_diversity", "clip_score"} & set(self.measures))

    def features(self, samples: Tensor, labels: Tensor | None) -> Features:
        """Features of samples, on the CPU.

        Args:
            samples: images (N, C, H, W) in [-1, 1], or points (N, ...).
            labels: classes asked for, (N,), or None.
        """
        if not self.extractors:
            return Features({"": samples.flatten(1).float()}, labels)
        points = {e.name: extract(self.network(e), samples).cpu() for e in self.extractors}
        return Features(points, labels, samples if self.needs_images else None)

    # ------------------------------------------------------------------------------------------------ figures
    def measure(self, features: Features) -> dict[str, float]:
        """Every chosen measure.

        Returns:
            figures by name: ``fd_cnn`` (``fid`` for published Inception weights), ``kid_cnn``, ``precision_cnn``,
            ``recall_cnn``, ``density_cnn``, ``coverage_cnn``, ``is_cnn``, ``vendi_cnn``, ``nearest_cnn``,
            ``duplicates_cnn``, ``class_accuracy``, ``lpips_diversity``, ``clip_score``; ``sw2`` for points.
        """
        if not self.extractors:
            points = features.points[""]
            return {"sw2": sliced_wasserstein(points, self.references[""].features[self.half])}
        figures: dict[str, float] = {}
        for extractor in self.extractors:
            figures |= self._of_extractor(extractor, features)
        if "class_accuracy" in self.measures and features.labels is not None:
            classes = self._classes(features.labels)
            for extractor in self.extractors:
                logits = self._classify(extractor, features)
                if logits is not None and logits.shape[1] == classes:
                    figures["class_accuracy"] = class_accuracy(logits, features.labels)
                    break
        if features.images is not None:
            figures |= self._of_images(features.images, features.labels)
        return figures

    def _of_extractor(self, extractor: Extractor, features: Features) -> dict[str, float]:
        name, made, reference = extractor.name, features.points[extractor.name], self.references[extractor.name]
        real = reference.features.get(self.half, made[:0])
        chosen = [m for m in self.measures if len(real) or m not in _NEEDS_FEATURES]
        n = min(len(made), len(real), _MOST)
        figures: dict[str, float] = {}
        if "fd" in chosen:
            figures[extractor.frechet_name] = frechet_distance(
                FeatureStatistics.from_features(made), reference.statistics["train"]
            )
        if "kid" in chosen:
            figures[f"kid_{name}"] = kernel_distance(made[:n], real[:n])
        if "precision_recall" in chosen:
            manifold = precision_recall(made[:n], real[:n])
            figures |= {f"precision_{name}": manifold.precision, f"recall_{name}": manifold.recall}
        if "density_coverage" in chosen:
            density = density_coverage(made[:n], real[:n])
            figures |= {f"density_{name}": density.density, f"coverage_{name}": density.coverage}
        if "inception_score" in chosen and (logits := self._classify(extractor, features)) is not None:
            figures[f"is_{name}"] = inception_score(logits)
        if "vendi" in chosen:
            figures[f"vendi_{name}"] = vendi_score(made[:_MOST])
        if "nearest" in chosen:
            figures[f"nearest_{name}"] = nearest_distances(made[:n], real).median().item()
        if "duplicates" in chosen:
            figures[f"duplicates_{name}"] = duplicate_rate(made[:n], real[:n])
        return figures

    @torch.no_grad()
    def _classify(self, extractor: Extractor, features: Features) -> Tensor | None:
        """Class scores, (N, K), of an extractor that decides."""
        network: Any = self.network(extractor)
        if not hasattr(network, "classify"):
            return None
        return network.classify(features.points[extractor.name].to(self.device)).cpu()

    def _classes(self, labels: Tensor) -> int:
        if self.num_classes:
            return self.num_classes
        known = [labels, *(own for reference in self.references.values() for own in reference.labels.values())]
        return 1 + max(int(part.max()) for part in known if len(part))

    def _of_images(self, images: Tensor, labels: Tensor | None) -> dict[str, float]:
        figures: dict[str, float] = {}
        order = torch.arange(len(images)) % (self.rows or 1)
        if "lpips_diversity" in self.measures and self.perceptual is not None:
            from lightning_distill.metrics.lpips_diversity import lpips_diversity

            groups = order if labels is None or self.rows else labels
            figures["lpips_diversity"] = lpips_diversity(self.perceptual, images, groups, device=self.device)
        which = order if labels is None else labels
        if "clip_score" in self.measures and self.clip is not None and (labels is not None or self.rows):
            parts = zip(images.split(_AT_A_TIME), which.split(_AT_A_TIME), strict=True)
            prompts = self.prompts
            scores = [self.clip.score(part.to(self.device), [prompts[i] for i in own.tolist()]) for part, own in parts]
            figures["clip_score"] = torch.cat(scores).mean().item()
        return figures

    # ------------------------------------------------------------------------------------------------ headline
    @property
    def distances(self) -> dict[str, str]:
        """Name of the distance by the suffix of its progress, for example ``{"cnn": "fd_cnn"}``."""
        if not self.extractors:
            return {"sw2": "sw2"}
        return {e.name: e.frechet_name for e in self.extractors} if "fd" in self.measures else {}

    def with_progress(
        self, figures: Mapping[str, float], few: Mapping[str, float] | None, teacher: Sequence[Mapping[str, float]]
    ) -> dict[str, float]:
        """Figures of a student with ``progress_*`` and ``nearest_ratio_*`` added where the teacher's are known.

        Args:
            figures: the student's.
            few: the teacher's with as many steps.
            teacher: all rows of the teacher; the smallest distance is the many-step teacher's.
        """
        result = dict(figures)
        for suffix, distance in self.distances.items():
            known = [row for row in teacher if distance in row]
            if not known or distance not in figures:
                continue
            best = min(known, key=lambda row: row[distance])
            if few is not None and few.get(distance, 0.0) > best[distance]:
                result[f"progress_{suffix}"] = progress(few[distance], figures[distance], best[distance])
            nearest = f"nearest_{suffix}"
            if best.get(nearest) and nearest in figures:
                result[f"nearest_ratio_{suffix}"] = figures[nearest] / best[nearest]
        return result

    @property
    def key(self) -> str:
        """What figures depend on besides the samples: extractors, references, measures, and what those look with."""
        digest = hashlib.sha256(repr((sorted(self.measures), self.half, self.num_classes, self.rows)).encode())
        for name, reference in sorted(self.references.items()):
            digest.update(name.encode())
            for part in reference.statistics.values():
                digest.update(part.mean.numpy().tobytes())
            real = reference.features.get(self.half)
            if real is not None:
                digest.update(real[:64].contiguous().numpy().tobytes())
        for extractor in self.extractors:
            digest.update(extractor.key.encode())
        if "lpips_diversity" in self.measures:
            digest.update(repr(content(self.perceptual, files=True)).encode())
        if "clip_score" in self.measures:
            digest.update(repr((list(self.prompts), content(self.clip, files=True))).encode())
        return digest.hexdigest()[:24]

    def reference_facts(self) -> dict[str, Any]:
        """Name and floors of the references, for ``metrics.json``."""
        facts: dict[str, Any] = {"half": self.half, "floors": {}}
        for extractor in self.extractors:
            info = self.references[extractor.name].info
            floor = info.get("fd_floors", {}).get("held_out_vs_train")
            if floor is not None:
                facts["floors"][extractor.frechet_name] = floor
        return facts
