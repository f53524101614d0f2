"""Prompts and pictures to stores of text embeddings and latents: planned once, filled by any number of processes.

A ``Plan`` says everything that decides the records, so that the same plan always gives the same shards: the draw from
the autoencoder's posterior is a function of the record's number, and batches begin anew with every shard.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lightning_distill.data.base import bytes_to_unit
from lightning_distill.data.buckets import Bucket, assign, fit_to_bucket, time_ids
from lightning_distill.data.image_text import ImageText, records_digest
from lightning_distill.data.pictures import READING
from lightning_distill.data.prompts import Prompt
from lightning_distill.data.shards import write_file
from lightning_distill.data.store import StoreWriter
from lightning_distill.networks.autoencoders import LatentCodec, autoencoder_identity
from lightning_distill.networks.plain_text import TransformersText
from lightning_distill.networks.sources import NULL_FILE
from lightning_distill.networks.text import PipelineText, TextEncoder
from lightning_distill.networks.text_entries import MASK, TOKENS
from lightning_distill.randomness import RandomStreams

__all__ = ["Encoders", "Part", "Plan", "fill", "make_parts", "write_null"]

Record = Prompt | ImageText
#: where the file of the unconditional embedding says what it was made of
_NULL_DIGEST = "made_of"


@dataclass(frozen=True)
class Encoders:
    """Which networks make the records.

    Attributes:
        pipeline: folder of a diffusers pipeline; None with ``text_model``.
        text_model: folder of a plain text model; None with ``pipeline``.
        autoencoder: folder of the autoencoder, None for prompts without pictures.
        dtype: of the networks and of the stored embeddings; latents are stored as float32, or as float16 where this is
            a half-precision type.
        max_length: tokens per prompt, None for the default.
        keys: conditions wanted of a plain text model.
    """

    pipeline: str | None = None
    text_model: str | None = None
    autoencoder: str | None = None
    dtype: str = "bfloat16"
    max_length: int | None = None
    keys: tuple[str, ...] = (TOKENS, MASK)

    def text(self, device: str = "cpu", size: tuple[int, int] | None = None) -> PipelineText | TransformersText:
        """The text encoder; a pipeline's is loaded on first use."""
        dtype = getattr(torch, self.dtype)
        if self.pipeline is not None:
            return PipelineText(self.pipeline, dtype, device, self.max_length, size)
        assert self.text_model is not None
        return TransformersText(self.text_model, dtype, device, self.max_length, self.keys)

    def codec(self, device: str = "cpu") -> LatentCodec | None:
        """The autoencoder, loaded."""
        return None if self.autoencoder is None else LatentCodec(self.autoencoder, getattr(torch, self.dtype), device)


@dataclass(frozen=True)
class Part:
    """One store of a plan: all records of one size.

    Attributes:
        folder: of the store.
        key: what the records depend on.
        records: prompts, or pictures with captions.
        bucket: size of the pictures, None for prompts alone.
    """

    folder: Path
    key: dict[str, Any]
    records: Sequence[Record]
    bucket: Bucket | None = None


@dataclass(frozen=True)
class Plan:
    """What is to be encoded, and how.

    Attributes:
        encoders: the networks.
        parts: the stores.
        shard_size: records per shard.
        batch_size: records per network call.
        frames: frames of a video, 1 for pictures.
        skip_broken: give pictures that cannot be read the weight 0 instead of stopping.
        size: height and width in pixels that prompts without pictures are conditioned on, where the model is.
    """

    encoders: Encoders
    parts: Sequence[Part] = field(default_factory=list)
    shard_size: int = 1024
    batch_size: int = 32
    frames: int = 1
    skip_broken: bool = False
    size: tuple[int, int] | None = None

    def writer(self, part: Part) -> StoreWriter:
        """The store of a part, begun or continued."""
        return StoreWriter(part.folder, part.key, len(part.records), self.shard_size)


def make_parts(
    out: Path,
    encoders: Encoders,
    records: Sequence[Record],
    buckets: Sequence[Bucket] = (),
    frames: int = 1,
    size: tuple[int, int] | None = None,
    negative: str | None = None,
    skip_broken: bool = False,
) -> list[Part]:
    """The stores of a set of records, with their keys.

    Args:
        out: folder of the store; with several buckets, of one store per bucket.
        encoders: the networks; the weights are hashed.
        records: prompts, or pictures with captions.
        buckets: sizes of pictures; empty for prompts alone.
        frames: frames per video.
        size: size that prompts are conditioned on.
        negative: negative prompt of the null embedding.
        skip_broken: put pictures whose size cannot be read into the bucket nearest to the square.

    Raises:
        ValueError: a picture's size cannot be read.
    """
    key = dict(encoders.text(size=size).identity())
    key |= {"negative_prompt": negative, "size": None if size is None else list(size)}
    pictures = [r for r in records if isinstance(r, ImageText)]
    if not pictures:
        return [Part(out, {**key, "records": _prompts_digest(records)}, records)]
    assert encoders.autoencoder is not None
    key |= {**autoencoder_identity(encoders.autoencoder), "frames": frames, "reading": READING}
    members: dict[Bucket, list[ImageText]] = {}
    for record in pictures:
        bucket = buckets[0] if len(buckets) == 1 else buckets[assign(*_size(record, skip_broken), buckets)]
        members.setdefault(bucket, []).append(record)
    return [
        Part(
            out if len(buckets) == 1 else out / str(bucket),
            {**key, "size": [bucket.height, bucket.width], "records": records_digest(chosen)},
            chosen,
            bucket,
        )
        for bucket, chosen in sorted(members.items())
    ]


def _size(record: ImageText, skip_broken: bool) -> tuple[int, int]:
    """Height and width of a picture; of a broken one those of a square, if that is wished."""
    try:
        return record.image_size()
    except ValueError as error:
        if not skip_broken:
            raise ValueError(f"{error} Or go on with --skip-broken.") from None
        return 1, 1


def _prompts_digest(records: Sequence[Record]) -> str:
    digest = hashlib.sha256()
    for record in records:
        digest.update(repr((record.text, record.negative, record.weight)).encode())
    return digest.hexdigest()


def write_null(out: Path, encoder: TextEncoder, key: Mapping[str, Any]) -> Path:
    """Write the unconditional embedding beside a store, in the form that ``PretrainedDenoiser(null_cond=...)`` reads.

    One that is there already is kept if it was made for the same key, and written anew if not.

    Args:
        out: folder of the store, or of its buckets.
        encoder: text encoder of the store.
        key: of the store, or of the first of its buckets, with the negative prompt; None there stands for what the
            pipeline takes where none is given.

    Raises:
        ValueError: the embedding has NaN or inf.
    """
    file = out / NULL_FILE
    digest = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()
    if _null_digest(file) != digest:
        negative: str | None = key["negative_prompt"]
        made = encoder.null(negative)
        _check_finite(made, [f"the negative prompt {(negative or '')[:60]!r}"])
        write_file(file, save({k: v.contiguous() for k, v in made.items()}, {_NULL_DIGEST: digest}))
    return file


def _null_digest(file: Path) -> str | None:
    """What is written down about the origin of an unconditional embedding; None if there is no whole one."""
    try:
        with safe_open(file, framework="pt") as opened:
            return (opened.metadata() or {}).get(_NULL_DIGEST)
    except (OSError, SafetensorError):
        return None


def fill(
    plan: Plan,
    device: str = "cpu",
    first: int = 0,
    report: Callable[[int], None] = lambda records: None,
    encoder: TextEncoder | None = None,
) -> None:
    """Encode what is missing, until every shard of every part is there.

    Args:
        plan: what to encode.
        device: where the networks run.
        first: where in the list of missing shards to begin, so that processes do not all ask for the same one.
        report: told the number of records after each batch.
        encoder: text encoder of the plan, if it is there already.
    """
    codec: LatentCodec | None = None
    for part in plan.parts:
        writer = plan.writer(part)
        missing = writer.missing()
        shift = first % len(missing) if missing else 0
        for shard in writer.claims(missing[shift:] + missing[:shift]):
            encoder = encoder or plan.encoders.text(device, plan.size)
            codec = codec or plan.encoders.codec(device)
            batches, facts = [], []
            for rows in _batches(writer.rows(shard), plan.batch_size):
                made, told = encode_rows(plan, part, rows, encoder, codec)
                batches.append(made)
                facts += told
                report(len(rows))
            writer.write(shard, {k: torch.cat([b[k] for b in batches]) for k in batches[0]}, facts)


def _batches(rows: range, size: int) -> Iterator[range]:
    for start in range(rows.start, rows.stop, size):
        yield range(start, min(start + size, rows.stop))


def encode_rows(
    plan: Plan, part: Part, rows: range, encoder: TextEncoder, codec: LatentCodec | None
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Records of one batch.

    Args:
        plan: settings.
        part: the records.
        rows: which of them, consecutive.
        encoder: for the text.
        codec: for the pictures, None for prompts alone.

    Returns:
        by name (B, ...): the conditions, and ``x0`` of pictures; and the facts of each record.

    Raises:
        ValueError: a record has NaN or inf, or a picture cannot be read.
    """
    records = [part.records[i] for i in rows]
    made = encoder.encode([record.text for record in records])
    facts: list[dict[str, Any]] = [{"prompt": r.text, "weight": r.weight} for r in records]
    names = [f"record {i} ({r.name if isinstance(r, ImageText) else r.text[:60]!r})" for i, r in zip(rows, records)]
    if codec is None or part.bucket is None:
        _check_finite(made, names)
        return made, facts
    images, originals, crops = [], [], []
    for record, fact in zip(records, facts):
        assert isinstance(record, ImageText)
        image, original, crop = _image(record, part.bucket, plan, fact)
        images.append(image)
        originals.append(original)
        crops.append(crop)
    x = bytes_to_unit(torch.stack(images))
    streams = RandomStreams(0)
    x0 = codec.encode(x, lambda shape: streams.normal("latents", 0, rows.start, shape))
    made["x0"] = x0 if made["encoder_hidden_states"].dtype == torch.float32 else x0.to(torch.float16)
    sizes = {
        "time_ids": lambda i: time_ids(originals[i], crops[i], part.bucket),
        "resolution": lambda i: torch.tensor([part.bucket.height, part.bucket.width]).float(),
        "aspect_ratio": lambda i: torch.tensor([part.bucket.height / part.bucket.width]),
    }
    for key in sizes.keys() & made.keys():
        made[key] = torch.stack([sizes[key](i) for i in range(len(records))])
    _check_finite(made, names)
    return made, facts


def _check_finite(made: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """Refuse what a network made of its inputs, one row of each, where it is not finite as it would be stored."""
    for key, value in made.items():
        finite = value.reshape(len(value), -1).isfinite().all(dim=1)
        if not finite.all():
            raise ValueError(
                f"{key} of {names[int(finite.int().argmin())]} has NaN or inf as {str(value.dtype)[6:]}; encode with a "
                "wider type, --dtype float32 or bfloat16, or check the encoder's weights."
            )


def _image(
    record: ImageText, bucket: Bucket, plan: Plan, fact: dict[str, Any]
) -> tuple[Tensor, tuple[int, int], tuple[int, int]]:
    """One picture in its bucket's size; a broken one is black and never drawn, if that is wished."""
    try:
        image = record.image() if plan.frames == 1 else record.frames(plan.frames)
    except ValueError as error:
        if not plan.skip_broken:
            raise ValueError(f"{error} Or go on with --skip-broken; what is encoded already is kept.") from None
        fact |= {"weight": 0.0, "broken": True}
        frames = () if plan.frames == 1 else (plan.frames,)
        image = torch.zeros(3, *frames, bucket.height, bucket.width, dtype=torch.uint8)
    fitted, crop = fit_to_bucket(image, bucket)
    return fitted, (image.shape[-2], image.shape[-1]), crop
