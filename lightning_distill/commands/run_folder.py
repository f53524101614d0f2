"""Read a run folder: the configuration and the checkpoint that a training run left behind."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningDataModule

from lightning_distill import checkpoints
from lightning_distill.checkpoint_files import last_good
from lightning_distill.commands.instantiation import instantiate
from lightning_distill.methods.base import DistillationModule

__all__ = ["find_checkpoint", "find_run", "load_run", "read_config", "read_data", "weights_name"]


def find_run(path: str | Path) -> Path:
    """The folder with ``config.yaml``: ``path`` itself, or the newest ``version_N`` below it that has checkpoints.

    Raises:
        FileNotFoundError: there is none.
    """
    root = Path(path).expanduser()
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


def find_checkpoint(run: Path, checkpoint: str | None = None) -> Path:
    """The checkpoint to read: the given one, a file or the name of one of the run's, else its newest that is whole.

    Raises:
        FileNotFoundError: there is none.
    """
    if checkpoint:
        path = Path(checkpoint).expanduser()
        if not path.exists() and (inside := run / "checkpoints" / path).exists():
            path = inside
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
    if not config.get("data"):
        return None
    data = instantiate(LightningDataModule, "data", config["data"])
    data.prepare_data()
    data.setup("fit")
    return data


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

    run = find_run(path)
    file = find_checkpoint(run, checkpoint)
    config = read_config(run)
    content = checkpoints.read_checkpoint(file)
    import_everything()
    module = instantiate(DistillationModule, "model", config["model"])
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
