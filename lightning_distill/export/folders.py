"""Export folders: written at once, with the other components of the teacher's pipeline."""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from lightning_distill.networks.json_files import read_json

__all__ = [
    "CONFIG",
    "SourceFacts",
    "atomic_folder",
    "check_target",
    "copy_components",
    "drop_local_paths",
    "read_source",
    "source_of",
    "source_vae",
]

#: settings of the student in every export folder
CONFIG = "distill_config.json"

_NETWORKS = ("transformer", "transformer_2", "unet")


# ------------------------------------------------------------------------------------------------ writing at once
def check_target(target: Path, overwrite: bool) -> None:
    """Raise unless a folder can be written, or replaced as an earlier export."""
    if not (target.exists() or target.is_symlink()):
        return
    if not overwrite:
        raise FileExistsError(f"{target} exists already; give another folder, or overwrite=True to replace an export.")
    if target.is_symlink() or not (target / CONFIG).is_file():
        raise FileExistsError(
            f"{target} is not the folder of an earlier export (with {CONFIG}), so it is not replaced."
        )


@contextmanager
def atomic_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder beside ``target``: takes its name when the block succeeds, is removed when it fails."""
    check_target(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex[:8]
    partial, old = (target.parent / f".{target.name}.{mark}.{state}" for state in ("partial", "old"))
    try:
        partial.mkdir()
        yield partial
        check_target(target, overwrite)
        if target.exists():
            target.rename(old)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def drop_local_paths(folder: Path) -> None:
    """Remove the place a network was loaded from out of the configurations that diffusers wrote."""
    for path in folder.rglob("*.json"):
        config = json.loads(path.read_text())
        if isinstance(config, dict) and config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


# ------------------------------------------------------------------------------------------------ the source pipeline
@dataclass(frozen=True)
class SourceFacts:
    """What a teacher's folder says about itself.

    Attributes:
        name: ``maker/model`` where the folder says so, else the folder's name.
        license: licence in the header of its model card, None where it states none.
        license_lines: further lines of the header about the licence.
        components: names of its other components.
    """

    name: str
    license: str | None
    license_lines: dict[str, str]
    components: tuple[str, ...]


def source_of(network: nn.Module) -> Path | None:
    """The pipeline folder that a network of diffusers was read from; None where there is none."""
    config: Any = getattr(network, "config", None) or {}
    path = config.get("_name_or_path") if hasattr(config, "get") else None
    if not isinstance(path, str) or not path:
        return None
    return next((p for p in (Path(path), Path(path).parent) if (p / "model_index.json").is_file()), None)


def read_index(folder: Path) -> dict[str, Any]:
    """``model_index.json`` of a pipeline folder.

    Raises:
        ValueError: the folder is no pipeline.
    """
    file = folder / "model_index.json"
    if not file.is_file():
        raise ValueError(f"{folder} is no pipeline folder (it has no model_index.json); give that of the teacher.")
    index: dict[str, Any] = json.loads(file.read_text())
    return index


def read_source(folder: Path) -> SourceFacts:
    """Name, licence and components of a pipeline folder."""
    index = read_index(folder)
    header: dict[str, Any] = {}
    if (readme := folder / "README.md").is_file():
        match = re.match(r"---\s*\n(.*?)\n---", readme.read_text(errors="replace"), re.S)
        try:
            header = (yaml.safe_load(match[1]) if match else None) or {}
        except yaml.YAMLError:
            header = {}
    header = header if isinstance(header, dict) else {}
    if not header and (card := folder / "card.json").is_file():  # of a shipped teacher
        header = {"license": licence} if (licence := read_json(card).get("licence")) else {}
    cached = re.search(r"models--(.+?)--(.+?)(?:/|$)", folder.absolute().as_posix())
    parts = tuple(
        key
        for key, value in index.items()
        if isinstance(value, list) and value[0] is not None and key not in (*_NETWORKS, "scheduler")
    )
    lines: dict[str, str] = {str(key): str(header[key]) for key in ("license_name", "license_link") if key in header}
    name = f"{cached[1]}/{cached[2]}" if cached else folder.absolute().name
    return SourceFacts(name, str(header["license"]) if "license" in header else None, lines, parts)


def copy_components(source: Path, folder: Path) -> None:
    """Copy what the teacher's pipeline has besides its network and scheduler, and merge the two indices.

    Weights in half precision are taken where there are no others, under the plain name; pickles are left behind where
    there are safetensors.

    Args:
        source: pipeline folder of the teacher.
        folder: pipeline folder of the student, with network, scheduler and index.
    """
    theirs, index = read_index(source), read_index(folder)
    for key, value in theirs.items():
        if key.startswith("_") or key in (*_NETWORKS, "scheduler", "boundary_ratio"):
            continue
        if (folder / key).exists():
            continue
        if isinstance(value, list) and value[0] is not None and (source / key).is_dir():
            _copy_plain(source / key, folder / key)
        index[key] = value
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _copy_plain(source: Path, target: Path) -> None:
    target.mkdir()
    files = [path for path in sorted(source.rglob("*")) if path.is_file() and ".cache" not in path.parts]
    names = {_plain_name(path.name)[0] for path in files if _plain_name(path.name)[1] is None}
    safe = any(path.suffix == ".safetensors" for path in files)
    for path in files:
        plain, variant = _plain_name(path.name)
        if variant is not None and plain in names:
            continue
        if safe and (path.suffix in (".bin", ".ckpt", ".pt", ".msgpack", ".h5") or ".bin.index" in path.name):
            continue
        to = target / path.relative_to(source).with_name(plain)
        to.parent.mkdir(parents=True, exist_ok=True)
        if variant is not None and path.suffix == ".json":
            weights = json.loads(path.read_text())
            weights["weight_map"] = {k: _plain_name(v)[0] for k, v in weights["weight_map"].items()}
            to.write_text(json.dumps(weights, indent=2) + "\n")
        else:
            shutil.copyfile(path, to)


def _plain_name(name: str) -> tuple[str, str | None]:
    """``model.safetensors`` and ``fp16`` of ``model.fp16.safetensors``, its shards and its index."""
    patterns = (
        r"(?P<a>.+)\.(?P<v>fp16|bf16|fp32)(?P<b>(-\d+-of-\d+)?\.(safetensors|bin))",
        r"(?P<a>.+\.index)\.(?P<v>fp16|bf16|fp32)(?P<b>\.json)",
    )
    for pattern in patterns:
        if match := re.fullmatch(pattern, name):
            return match["a"] + match["b"], match["v"]
    return name, None


def source_vae(source: Path) -> Any | None:
    """The autoencoder of a pipeline folder without its weights, for its configuration; None where there is none."""
    import diffusers

    file = source / "vae" / "config.json"
    if not file.is_file():
        return None
    config = json.loads(file.read_text())
    cls: Any = getattr(diffusers, config["_class_name"], None)
    if cls is None:
        return None
    with torch.device("meta"):
        return cls.from_config(config)
