"""Read a run folder: the configuration and the checkpoint that a training run left behind."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningDataModule

from lightning_distill import checkpoints
from lightning_distill.checkpoint_files import last_good
from lightning_distill.commands.instantiation import instantiate
from lightning_distill.methods.base import DistillationModule

__all__ = ["find_checkpoint", "find_run", "load_run", "read_config", "read_data", "weights_name"]


def find_run(path: str | Path, checkpoint: str | None = None) -> Path:
    """The folder with ``config.yaml``: ``path`` itself, or the newest ``version_N`` below it that has checkpoints.

    Args:
        path: run folder, or the folder of its versions.
        checkpoint: file that is to be read; the version that holds it is the run then.

    Raises:
        FileNotFoundError: there is none.
    """
    root = Path(path).expanduser()
    if checkpoint and (owner := _owner(Path(checkpoint).expanduser())) and owner.parent.resolve() == root.resolve():
        return owner
    if (root / "config.yaml").is_file():
        return root
    versions = {int(m.group(1)): p for p in root.glob("version_*") if (m := re.fullmatch(r"version_(\d+)", p.name))}
    runs = [versions[n] for n in sorted(versions, reverse=True) if (versions[n] / "config.yaml").is_file()]
    if runs:  # a run that failed early has no checkpoint
        return next((run for run in runs if any((run / "checkpoints").glob("*.ckpt"))), runs[0])
    raise FileNotFoundError(
        f"{root} is not a run folder: it has no config.yaml, nor a version_N folder with one; give the folder that "
        "'lightning-distill fit' wrote, for example runs/quickstart/version_0."
    )


def _owner(checkpoint: Path) -> Path | None:
    """The run folder in which a checkpoint lies, None for one that lies elsewhere."""
    folder = checkpoint.absolute().parent.parent
    return folder if checkpoint.exists() and (folder / "config.yaml").is_file() else None


def find_checkpoint(run: Path, checkpoint: str | None = None) -> Path:
    """The checkpoint to read: the given one, a file or the name of one of the run's, else its newest that is whole.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the given one belongs to another run.
    """
    if checkpoint:
        path = Path(checkpoint).expanduser()
        if not path.exists() and (inside := run / "checkpoints" / path).exists():
            path = inside
        if (owner := _owner(path)) and owner.resolve() != run.resolve():
            raise ValueError(f"{path} is a checkpoint of the run {owner}, not of {run}; give {owner} as the run.")
    else:  # a run resumed within its own folder numbers its last checkpoints
        named = any((run / "checkpoints").glob("last*.ckpt")) or (run / "checkpoints" / "interrupted.ckpt").exists()
        path = (last_good(run / "checkpoints") if named else None) or run / "checkpoints" / "last.ckpt"
    if not path.exists():
        found = sorted(p.name for p in (run / "checkpoints").glob("*.ckpt"))
        raise FileNotFoundError(
            f"{path} does not exist; the run has {', '.join(found) or 'no checkpoints'}"
            + ("; name one with --checkpoint." if found else " (was it stopped before its first one?).")
        )
    return path


def read_config(run: Path) -> dict[str, Any]:
    """The configuration of a run as plain data."""
    try:
        config = yaml.safe_load((run / "config.yaml").read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{run / 'config.yaml'} is damaged ({getattr(error, 'problem', error)}).") from None
    if not isinstance(config, dict) or "model" not in config:
        raise ValueError(f"{run / 'config.yaml'} has no model section, so it is not the configuration of a run.")
    return config


def read_data(config: dict[str, Any]) -> LightningDataModule | None:
    """The data module of a run, ready to give samples; None where it has none.

    Args:
        config: what ``read_config`` returned.
    """
    if not config.get("data") or "class_path" not in config["data"]:  # the latter of a LightningCLI told the class
        return None
    data = instantiate(LightningDataModule, "data", config["data"])
    data.prepare_data()
    data.setup("fit")
    return data


def _class_path(checkpoint: dict[str, Any], run: Path) -> str:
    """Full path of the method that wrote a checkpoint."""
    name = (checkpoint.get("lightning_distill") or {}).get("method")
    waiting: list[type] = [DistillationModule]
    while waiting:
        cls = waiting.pop()
        if cls.__name__ == name:
            return f"{cls.__module__}.{name}"
        waiting += cls.__subclasses__()
    raise ValueError(f"{run / 'config.yaml'} does not say the class of its model; write it there as model.class_path.")


@contextmanager
def _seen_from_elsewhere(run: Path, config: Any) -> Iterator[None]:
    """Say of relative paths that are not here whence they were seen."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        if not (missing := _missing(config)):
            raise
        from lightning_distill.commands.errors import one_line

        raise FileNotFoundError(
            f"{one_line(error)} {missing[0]!r} in {run / 'config.yaml'} is relative to the folder of its fit: "
            "run this command there, or write the path out."
        ) from None


def _missing(part: Any) -> list[str]:
    """Relative paths in a configuration that do not exist here."""
    if isinstance(part, dict):
        own = [v for k, v in part.items() if k in ("path", "root") and isinstance(v, str) and not v.startswith("~")]
        return [v for v in own if not Path(v).exists() and not Path(v).is_absolute()] + _missing(list(part.values()))
    return [path for value in part for path in _missing(value)] if isinstance(part, list) else []


def load_run(path: str | Path, checkpoint: str | None = None) -> DistillationModule:
    """The module of a run with the weights of its checkpoint, in eval mode on the CPU.

    Args:
        path: run folder.
        checkpoint: checkpoint file; None is the last.

    Raises:
        FileNotFoundError: no run folder or no checkpoint.
        ValueError: a file that cannot be read, or that belongs to another configuration.
    """
    from lightning_distill.cli import import_everything

    run = find_run(path, checkpoint)
    file = find_checkpoint(run, checkpoint)
    config = read_config(run)
    content = checkpoints.read_checkpoint(file)
    import_everything()
    model = config["model"]
    if "class_path" not in model:  # of a LightningCLI that was told the class
        model = {"class_path": _class_path(content, run), "init_args": model}
    with _seen_from_elsewhere(run, model):
        module = instantiate(DistillationModule, "model", model)
        module.compile_blocks = False  # samples are made sooner than anything is compiled, maybe without a compiler
        module.configure_model()
    checkpoints.check_header(module, content.get("lightning_distill"))
    module.load_state_dict(content["state_dict"])
    return module.eval()


def weights_name(module: DistillationModule, name: str | None) -> str | None:
    """What ``--weights`` names for ``module.sampling_network``: ``ema`` is the first average.

    Raises:
        ValueError: the run has no such network.
    """
    if name == "ema":
        if not module.student_ema:
            raise ValueError("--weights ema: this run has no average (ema: []); use --weights student.")
        name = None
    module.sampling_network(name)
    return name
