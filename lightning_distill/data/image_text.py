"""Pictures with captions: folders and webdataset shards, as one list of records that are read on demand.

    folder           pictures with a .txt or .json of the same name beside each, nested or not
    folder           pictures and a ``metadata.jsonl`` or ``metadata.csv`` with ``file_name`` and the caption
    .tar files       webdataset: members that share a name up to the first dot of the base name are one sample

Where a picture has both a .txt and a .json, the .txt is its caption; a column that is asked for is read from the .json.

A tar's headers are scanned once, without reading its content, and samples are then read in any order. So a set of
shards is as resumable, and as evenly split over ranks, as a folder. Plain tars need nothing but the standard library.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_distill.data.pictures import files_below, open_picture, read_frames, read_picture, shown_size
from lightning_distill.data.prompts import TEXT_COLUMNS, Prompt, check_characters, read_prompts

__all__ = ["ImageText", "find_image_text", "from_prompts", "records_digest"]

_PICTURES = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "ppm")
_METADATA = ("metadata.jsonl", "metadata.csv")
_CAPTIONS = ("txt", "caption", "json")


@dataclass(frozen=True)
class ImageText:
    """One picture with its caption; the content is read when asked for.

    Attributes:
        name: how errors call it: the file, or shard and member.
        text: the caption.
        file: file of the picture, or the shard.
        offset: first byte of the picture in the file.
        size: number of bytes, None for the whole file.
        negative: negative prompt, if any.
        weight: relative frequency.
    """

    name: str
    text: str
    file: Path
    offset: int = 0
    size: int | None = None
    negative: str | None = None
    weight: float = 1.0

    def content(self) -> bytes:
        """The encoded picture."""
        try:
            with self.file.open("rb") as file:
                file.seek(self.offset)
                return file.read() if self.size is None else file.read(self.size)
        except OSError as error:
            raise ValueError(f"the picture {self.name} cannot be read ({error}); restore or remove it.") from None

    def image(self) -> Tensor:
        """The picture, (3, H, W), uint8, upright by its EXIF orientation, transparency over white."""
        return read_picture(self.content(), self.name)

    def frames(self, count: int) -> Tensor:
        """Its first frames, (3, count, H, W), uint8."""
        return read_frames(self.content(), self.name, count)

    def image_size(self) -> tuple[int, int]:
        """Height and width as it is shown, from the header alone where the format allows."""
        with open_picture(self.file if self.size is None else self.content(), self.name) as picture:
            return shown_size(picture)


def find_image_text(root: str | Path, column: str | None = None, skip_broken: bool = False) -> list[ImageText]:
    """All records of a folder or of webdataset shards in a fixed order; no picture is decoded.

    Args:
        root: folder of pictures with captions, folder of .tar shards, or one shard.
        column: key of the caption in .json and metadata files; None takes the first of ``prompt``, ``caption``,
            ``text``.
        skip_broken: leave out samples of shards that have no picture of a known type, with a warning.

    Raises:
        FileNotFoundError: no such folder, or nothing in it.
        ValueError: a picture without a caption, or without one in the column asked for; a sample of a shard without a
            picture; a truncated or compressed shard, or a bad metadata row.
    """
    root = Path(root).expanduser()
    if not root.exists():
        raise FileNotFoundError(f"the image-text set {root} does not exist; give a folder or a .tar file.")
    shards = [root] if root.is_file() else sorted(root.glob("*.tar"))
    if shards:
        left_out: list[str] = []
        records = [record for shard in shards for record in _tar_records(shard, column, left_out)]
        if not records:
            more = f"; {_told(left_out)}" if left_out else ""
            raise FileNotFoundError(f"{root} holds no picture ({', '.join(_PICTURES)}) in its shards{more}.")
        if left_out and not skip_broken:
            raise ValueError(f"{_told(left_out)}; rename or convert them, or leave them out with --skip-broken.")
        if left_out:
            warnings.warn(f"{_told(left_out)}; they are left out.", stacklevel=2)
        return records
    if compressed := sorted([*root.glob("*.tar.gz"), *root.glob("*.tgz")]):
        raise ValueError(f"{compressed[0]} is compressed and cannot be read in any order; unpack it to a plain .tar.")
    for name in _METADATA:
        if (root / name).is_file():
            return _metadata_records(root / name, column)
    paths = files_below(root, [f".{ending}" for ending in _PICTURES])
    if not paths:
        raise FileNotFoundError(f"{root} holds neither pictures ({', '.join(_PICTURES)}) nor .tar shards.")
    return [ImageText(str(path), _caption_beside(path, column), path) for path in paths]


def from_prompts(prompts: Sequence[Prompt]) -> list[ImageText]:
    """Records of a prompt file whose rows all name a picture.

    Raises:
        ValueError: some rows have a picture and others have none.
    """
    without = [p for p in prompts if p.image is None]
    if without:
        raise ValueError(
            f"{len(without)} of {len(prompts)} prompts have no picture (first: {without[0].text[:60]!r}); fill the "
            "column 'image' of every row, or of none."
        )
    return [ImageText(str(p.image), p.text, p.image, negative=p.negative, weight=p.weight) for p in prompts if p.image]


def records_digest(records: Sequence[ImageText]) -> str:
    """SHA-256 of captions, weights, file names, positions and byte counts; the pictures themselves are not read."""
    digest = hashlib.sha256()
    for r in records:
        size = r.file.stat().st_size if r.size is None else r.size
        digest.update(repr((r.file.name, r.text, r.negative, r.weight, r.offset, size)).encode())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------ folders
def _caption_beside(picture: Path, column: str | None) -> str:
    files = {kind: picture.with_suffix(f".{kind}") for kind in ("txt", "json")}
    kind = _caption_kind([kind for kind, file in files.items() if file.is_file()], column)
    if kind is not None:
        return _caption(kind, files[kind].read_bytes(), str(files[kind]), column)
    wanted = files["json"].name if column else f"{files['txt'].name} or {files['json'].name}"
    raise ValueError(
        f"the picture {picture} has no caption{_under(column)}: write {wanted} beside it, or a metadata.jsonl with "
        f"file_name and {column or 'prompt'} for the whole folder."
    )


def _metadata_records(file: Path, column: str | None) -> list[ImageText]:
    records = []
    for name, prompt in zip(_file_names(file), read_prompts(file, column)):
        path = file.parent / name
        if not path.is_file():
            raise FileNotFoundError(f"{file} names the picture {path}, which does not exist; correct its file_name.")
        records.append(ImageText(str(path), prompt.text, path, negative=prompt.negative, weight=prompt.weight))
    return records


def _file_names(file: Path) -> Iterator[str]:
    """The column ``file_name`` of a metadata file, row by row."""
    prompts = read_prompts(file, "file_name")
    for prompt in prompts:
        yield prompt.text


def _caption_kind(there: Collection[str], column: str | None) -> str | None:
    """Which of the files beside a picture holds its caption: a column can only be in a .json."""
    return next((kind for kind in (("json",) if column else _CAPTIONS) if kind in there), None)


def _caption(kind: str, content: bytes, name: str, column: str | None) -> str:
    return _json_caption(content, name, column) if kind == "json" else _text_caption(content, name)


def _under(column: str | None) -> str:
    return f" under {column!r}" if column else ""


def _text_caption(content: bytes, name: str) -> str:
    try:
        text = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from None
    if not text:
        raise ValueError(f"the caption {name} is empty; write a text, or remove the picture.")
    return text


def _json_caption(content: bytes, name: str, column: str | None) -> str:
    try:
        entry: Any = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{name} is no JSON ({error}); repair it, or remove the picture.") from None
    keys = [column] if column else list(TEXT_COLUMNS)
    found = next((k for k in keys if isinstance(entry, dict) and k in entry), None)
    if found is None or not isinstance(entry[found], str) or not entry[found].strip():
        raise ValueError(f"{name} has no text under {' or '.join(keys)}; write the caption there.")
    text: str = entry[found]
    check_characters(text, name)
    return text.strip()


# ------------------------------------------------------------------------------------------------ shards
def _tar_records(shard: Path, column: str | None, left_out: list[str]) -> list[ImageText]:
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    length = shard.stat().st_size
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                if member.offset_data + member.size > length:
                    raise tarfile.ReadError("unexpected end of data")
                folder, _, base = member.name.rpartition("/")
                stem, _, kind = base.partition(".")
                samples.setdefault(f"{folder}/{stem}", {})[kind.lower()] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        raise ValueError(
            f"the shard {shard} is truncated, damaged or compressed ({error}); write it again as a plain .tar."
        ) from None
    return list(_samples(shard, samples, column, left_out))


def _samples(
    shard: Path, samples: Mapping[str, Mapping[str, tuple[int, int]]], column: str | None, left_out: list[str]
) -> Iterator[ImageText]:
    with shard.open("rb") as file:
        for key, parts in samples.items():
            name = f"{shard}:{key.lstrip('/')}"
            picture = next((kind for kind in _PICTURES if kind in parts), None)
            if picture is None:
                # names with dots of their own are several samples to whoever wrote them
                found = [kind for kind in parts if kind.rpartition(".")[2] in (*_PICTURES, *_CAPTIONS)]
                left_out += [f"{name}.{own}".rstrip(".") for own in sorted({k.rpartition(".")[0] for k in found})]
                continue
            kind = _caption_kind(parts, column)
            if kind is None:
                wanted = ".json" if column else ".txt or .json"
                raise ValueError(
                    f"the sample {name} has a .{picture} but no {wanted}; add its caption{_under(column)}."
                )
            offset, size = parts[kind]
            file.seek(offset)
            text = _caption(kind, file.read(size), f"{name}.{kind}", column)
            offset, size = parts[picture]
            yield ImageText(f"{name}.{picture}", text, shard, offset, size)


def _told(left_out: Sequence[str]) -> str:
    return (
        f"{len(left_out)} of the samples in the shards (first: {left_out[0]}) have no picture of a known type, which "
        "is what follows the first dot of a name"
    )
