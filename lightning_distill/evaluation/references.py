"""Where the reference of an evaluation comes from: shipped, a file, or the data of the run."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_distill.batch import as_batch
from lightning_distill.data.base import DistillationDataModule
from lightning_distill.data.loader import Source
from lightning_distill.metrics.extractors import Extractor, ZooClassifier
from lightning_distill.metrics.reference import (
    Reference,
    ReferenceCache,
    load_reference,
    reference_from_images,
    reference_from_points,
    statistics_reference,
)
from lightning_distill.zoo import list_zoo

__all__ = ["check_reference", "reference_samples", "resolve_reference"]

DATA = "data"


def check_reference(source: str | None, extractor: Extractor) -> None:
    """Raise for a reference that is not there, before anything is loaded.

    Args:
        source: see ``GenerativeEvaluation.reference``.
        extractor: extractor that it is for.

    Raises:
        FileNotFoundError: there is no such file, folder or zoo entry.
        ValueError: the entry was made with another extractor.
    """
    if source is None or source == DATA:
        return
    if source in list_zoo():
        if not isinstance(extractor, ZooClassifier) or extractor.data != source:
            raise ValueError(
                f"reference={source!r} holds features of the classifier shipped for {source!r}, not of "
                f"{extractor.name!r}; give reference=data, or an .npz with mu and sigma of that extractor."
            )
        return
    if not Path(source).expanduser().exists():
        raise FileNotFoundError(
            f"reference={source!r} does not exist; give an .npz with mu and sigma, a folder with "
            f"reference.safetensors, 'data', or a zoo entry ({', '.join(list_zoo())})."
        )


def resolve_reference(
    source: str | None,
    extractor: Extractor | None,
    data: Any,
    limit: int = 50_000,
    cache: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> Reference:
    """The reference for an extractor.

    Args:
        source: zoo entry, folder, ``.npz`` file, ``data``, or None for the extractor's own zoo entry, else ``data``.
        extractor: feature extractor; None for points that are compared as they are.
        data: the run's data module, for ``data``.
        limit: most samples taken from it.
        cache: folder of the cache.
        device: where features are computed.
    """
    if source is None and isinstance(extractor, ZooClassifier):
        source = extractor.data
    if source is not None and source != DATA:
        path = Path(source).expanduser()
        return statistics_reference(path) if path.suffix == ".npz" else load_reference(source)
    samples, labels = reference_samples(data, limit)
    if extractor is None:
        return reference_from_points(samples)
    key = f"{extractor.key}-{_content_key(samples)}"

    def build() -> Reference:
        return reference_from_images(extractor, samples, labels, device=device)

    return ReferenceCache(cache).get(key, build)


def reference_samples(data: Any, limit: int) -> tuple[Tensor, Tensor | None]:
    """The first ``limit`` clean samples of a data module and their classes.

    Args:
        data: a ``DistillationDataModule``, or any data module whose validation or training loader yields clean samples.
        limit: most samples.

    Raises:
        ValueError: the data module has no clean samples.
    """
    batches: list[Any] = []
    if isinstance(data, DistillationDataModule):
        source = data.source
        count = min(limit, len(source))  # type: ignore[arg-type]
        if isinstance(source, Source):
            rows = torch.arange(count)
            batches = [source.gather(part, 0) for part in rows.split(4096)]
        else:
            from torch.utils.data import default_collate

            batches = [
                as_batch(default_collate([source[i] for i in part.tolist()])) for part in torch.arange(count).split(256)
            ]
    elif data is not None:
        loader = data.val_dataloader() if _has_loader(data, "val_dataloader") else data.train_dataloader()
        seen = 0
        for raw in loader:
            batches.append(as_batch(raw))
            seen += batches[-1].size
            if seen >= limit:
                break
    if not batches or batches[0].x0 is None:
        name = "no data module" if data is None else f"{type(data).__name__}, which yields no clean samples"
        raise ValueError(
            f"the reference of the evaluation would come from the data of the run, but the run has {name}; give "
            "reference=... (an .npz with mu and sigma, or a folder with reference.safetensors), or a data module with "
            "images."
        )
    samples = torch.cat([b.x0.float().cpu() for b in batches])[:limit]
    labels = None
    if "class_labels" in batches[0].cond:
        labels = torch.cat([b.cond["class_labels"].cpu() for b in batches])[:limit]
    return samples, labels


def _has_loader(data: Any, name: str) -> bool:
    from lightning.pytorch.utilities.model_helpers import is_overridden

    return is_overridden(name, data)


def _content_key(samples: Tensor) -> str:
    """Hash of the number, shape and a spread of the samples themselves."""
    digest = hashlib.sha256(repr(tuple(samples.shape)).encode())
    digest.update(samples[:: max(1, len(samples) // 512)].contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
