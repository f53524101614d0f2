"""Emoji: 3,786 small pictures with their names, from the npm package ``emoji-datasource-google`` (Apache-2.0).

A text-to-image problem that fits on one machine: the pictures stay in memory, and the captions' embeddings in a store
that is computed once. Nothing is downloaded; ``npm pack emoji-datasource-google`` fetches the package.
"""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.data.base import DistillationDataModule, bytes_to_unit
from lightning_distill.data.encoding import Encoders, Plan, fill, make_parts, write_null
from lightning_distill.data.fashion import DATA_VARIABLE
from lightning_distill.data.pictures import read_picture
from lightning_distill.data.prompts import Prompt
from lightning_distill.data.store import Store
from lightning_distill.environment import cache_folder
from lightning_distill.networks.text_entries import MASK, POOLED, TOKENS
from lightning_distill.randomness import derive_seed

__all__ = ["Emoji", "EmojiPicture", "caption_store", "emoji_pictures", "is_held_out", "load_emoji"]

PACKAGE = "emoji-datasource-google"
_FOLDERS = ("", "package", PACKAGE, f"node_modules/{PACKAGE}", f"{PACKAGE}/package")
_SKIN = {
    "1F3FB": "light skin tone",
    "1F3FC": "medium-light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium-dark skin tone",
    "1F3FF": "dark skin tone",
}


@dataclass(frozen=True)
class EmojiPicture:
    """One picture.

    Attributes:
        name: of the emoji, in lower case; the same for all skin tones.
        caption: the name with the skin tone.
        file: PNG of 64 x 64 pixels with transparency.
    """

    name: str
    caption: str
    file: Path


def emoji_pictures(root: str | Path | None = None) -> list[EmojiPicture]:
    """All pictures that the package has, in the order of its list.

    Args:
        root: folder of the unpacked npm package, or one that holds it (also as ``node_modules``); None reads
            ``LIGHTNING_DISTILL_DATA``.

    Raises:
        FileNotFoundError: no such folder, or files are missing in it.
        ValueError: the list of names is damaged.
    """
    given = root if root is not None else os.environ.get(DATA_VARIABLE)
    how = f"unpack the npm package {PACKAGE} (npm pack {PACKAGE}) and give its folder as Emoji(root=...)"
    if not given:
        raise FileNotFoundError(f"Emoji needs the pictures of {PACKAGE}: {how} or through {DATA_VARIABLE}.")
    base = Path(given).expanduser()
    folder = next((base / f for f in _FOLDERS if (base / f / "emoji.json").is_file()), None)
    if folder is None:
        raise FileNotFoundError(f"there is no emoji.json in {base}: {how} or through {DATA_VARIABLE}.")
    try:
        entries = json.loads((folder / "emoji.json").read_text(encoding="utf-8"))
        listed = [picture for entry in entries for picture in _of_entry(entry, folder / "img" / "google" / "64")]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / 'emoji.json'} is damaged ({error!r}); {how} again.") from None
    missing = [picture.file for picture in listed if not picture.file.is_file()]
    if missing or not listed:
        first = missing[0] if missing else folder / "img" / "google" / "64"
        raise FileNotFoundError(f"{first} is missing ({len(missing)} of {len(listed)} pictures): {how} again.")
    return listed


def _of_entry(entry: dict[str, Any], folder: Path) -> list[EmojiPicture]:
    name = (entry["name"] or entry["short_name"].replace("-", " ").replace("_", " ")).lower()
    found = []
    if entry.get("has_img_google"):
        found.append(EmojiPicture(name, name, folder / entry["image"]))
    for tones, variation in (entry.get("skin_variations") or {}).items():
        if variation.get("has_img_google"):
            told = " and ".join(_SKIN.get(tone, tone.lower()) for tone in tones.split("-"))
            found.append(EmojiPicture(name, f"{name}, {told}", folder / variation["image"]))
    return found


def is_held_out(name: str, fraction: float) -> bool:
    """Whether an emoji belongs to the held-out part; a function of its name alone, the same for all skin tones."""
    return derive_seed("emoji", name) % 10_000 < round(fraction * 10_000)


def load_emoji(pictures: list[EmojiPicture], size: int = 64) -> Tensor:
    """Pictures over white, reduced by averaging.

    Args:
        pictures: as listed by ``emoji_pictures``.
        size: side in pixels, 64 or a divisor of it.

    Returns:
        (N, 3, size, size), uint8.

    Raises:
        ValueError: a file is broken, or not of 64 x 64 pixels.
    """
    images = torch.empty(len(pictures), 3, 64, 64, dtype=torch.uint8)
    for index, picture in enumerate(pictures):
        image = read_picture(picture.file, str(picture.file))
        if tuple(image.shape) != (3, 64, 64):
            raise ValueError(f"{picture.file} has {image.shape[2]} x {image.shape[1]} pixels, not 64 x 64.")
        images[index] = image
    if size == 64:
        return images
    reduced = [torch.nn.functional.avg_pool2d(part.float(), 64 // size).round() for part in images.split(512)]
    return torch.cat(reduced).to(torch.uint8)


def caption_store(
    captions: list[str], text_encoder: str, max_length: int = 24, cache: str | None = None, batch_size: int = 64
) -> Store:
    """Embeddings of captions from the cache, computed where they are not there yet.

    Beside the store lies ``null_cond.safetensors``, the embedding of the empty prompt: ``null_cond=...`` of a network.

    Args:
        captions: N texts.
        text_encoder: folder of a plain text model.
        max_length: tokens per caption.
        cache: folder of the cache; None is ``LIGHTNING_DISTILL_CACHE`` or the user's.
        batch_size: captions per network call.

    Returns:
        a store of N records in the order of the captions.
    """
    encoders = Encoders(text_model=text_encoder, dtype="float32", max_length=max_length, keys=(TOKENS, MASK, POOLED))
    (part,) = make_parts(Path(), encoders, [Prompt(caption) for caption in captions])
    name = f"captions-{derive_seed(json.dumps(part.key, sort_keys=True)):016x}"
    (part,) = make_parts(cache_folder(cache) / name, encoders, part.records)
    fill(Plan(encoders, [part], shard_size=512, batch_size=batch_size))
    # networks refuse what they do not take, and none that is conditioned on tokens takes their mean
    write_null(part.folder, replace(encoders, keys=(TOKENS, MASK)).text(), part.key)
    return Store(part.folder)


class _Source:
    """Pictures in memory, and the conditions of their captions by record."""

    def __init__(self, images: Tensor, store: Store | None, rows: Tensor, keys: list[str]) -> None:
        self.images, self.store, self.rows, self.keys = images, store, rows, keys

    def __len__(self) -> int:
        return len(self.images)

    def gather(self, indices: Tensor, epoch: int) -> Batch:
        cond = {} if self.store is None else self.store.gather(self.rows[indices], self.keys)
        return Batch(cond=cond, x0=bytes_to_unit(self.images[indices]), size=len(indices))


class Emoji(DistillationDataModule):
    """Emoji over white, (3, size, size) in [-1, 1], with the embeddings of their names.

    A part of the names is held out, with all their skin tones, to measure what the model makes of unseen captions.
    The captions of both parts, in the order of a store, are ``[p.caption for p in emoji_pictures(root)]``.

    Args:
        root: folder of the npm package ``emoji-datasource-google``; None reads ``LIGHTNING_DISTILL_DATA``.
        size: 64 or 32.
        split: ``train``, or ``held_out`` for the names that training never sees.
        held_out: fraction of the names that is held out.
        text_encoder: folder of a plain text model (a sentence transformer, for example), whose embeddings of all
            captions are computed once into the cache; None with ``store``, or for pictures without conditions.
        store: folder of a store of all captions in their order, in place of ``text_encoder``.
        cond_keys: conditions to give out.
        max_length: tokens per caption.
        cache: folder of the cache; None is ``LIGHTNING_DISTILL_CACHE`` or the user's.
        **kwargs: arguments of ``DistillationDataModule``.

    Attributes:
        captions: of the split, in the order of its samples.

    Raises:
        FileNotFoundError: the package is missing.
        ValueError: a number is out of range, or the store is of other captions.
    """

    num_classes = None
    sigma_data = 0.615
    mean = None

    def __init__(
        self,
        root: str | None = None,
        size: int = 64,
        split: Literal["train", "held_out"] = "train",
        held_out: float = 0.1,
        text_encoder: str | None = None,
        store: str | None = None,
        cond_keys: list[str] | None = None,
        max_length: int = 24,
        cache: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if size not in (32, 64):
            raise ValueError(f"Emoji(size={size}): the pictures come in 64 x 64 or, averaged, in 32 x 32.")
        if not 0 < held_out < 1:
            raise ValueError(f"Emoji(held_out={held_out}): give a fraction between 0 and 1.")
        if text_encoder is not None and store is not None:
            raise ValueError("Emoji(text_encoder=..., store=...): give one of the two; both are captions' embeddings.")
        self.pictures = emoji_pictures(root)
        if text_encoder is not None:
            Encoders(text_model=text_encoder).text()  # complains about an incomplete folder
        self.shape = (3, size, size)
        self.text_encoder, self.store_path, self.max_length, self.cache = text_encoder, store, max_length, cache
        self.cond_keys = [TOKENS, MASK] if cond_keys is None else list(cond_keys)
        wanted = split == "held_out"
        chosen = [i for i, p in enumerate(self.pictures) if is_held_out(p.name, held_out) == wanted]
        if not chosen:
            raise ValueError(f"Emoji(split={split!r}, held_out={held_out}): no emoji is in this part.")
        self.rows = torch.tensor(chosen)

    @property
    def captions(self) -> list[str]:
        """Captions of this split."""
        return [self.pictures[i].caption for i in self.rows.tolist()]

    def prepare_data(self) -> None:
        """Compute the embeddings that are not in the cache."""
        self.open_store()

    def open_store(self) -> Store | None:
        """Embeddings of all captions, of both parts; None without a text encoder."""
        captions = [p.caption for p in self.pictures]
        if self.store_path is not None:
            store = Store(self.store_path)
            if [fact.get("prompt") for fact in store.facts(range(len(store)))] != captions:
                raise ValueError(
                    f"the store {self.store_path} is not of the {len(captions)} captions of these pictures; write it "
                    "from them in their order, or give text_encoder=... instead."
                )
        elif self.text_encoder is not None:
            store = caption_store(captions, self.text_encoder, self.max_length, self.cache)
        else:
            return None
        if missing := [key for key in self.cond_keys if key not in store.names]:
            raise ValueError(f"{store.folder} has no {missing[0]!r}; cond_keys may be {', '.join(store.names)}.")
        return store

    def make_source(self) -> _Source:
        """The pictures of the split."""
        images = load_emoji([self.pictures[i] for i in self.rows.tolist()], self.shape[1])
        return _Source(images, self.open_store(), self.rows, self.cond_keys)
