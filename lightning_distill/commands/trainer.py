"""The Trainer's own commands (fit, validate, test, predict): LightningCLI with this package's defaults."""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonargparse
import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_distill import checkpoints
from lightning_distill.environment import environment
from lightning_distill.methods.base import DistillationModule
from lightning_distill.progress import StudentProgressBar

__all__ = ["RunConfig", "StudentCheckpoint", "TrainerCLI", "run_trainer"]

_KEYWORDS = ("best", "last", "hpc", "registry")


class StudentCheckpoint(ModelCheckpoint):
    """Checkpoints counted in student updates; ``last.ckpt`` is always the state at the end of the run.

    Lightning's own saves at multiples of ``every_n_train_steps`` only. The state is saved within the last batch, as
    every other checkpoint is, so that a run continued with more updates equals one that was never stopped.

    Args:
        every_n_train_steps: student updates between checkpoints.
    """

    def __init__(self, every_n_train_steps: int = 1000) -> None:
        super().__init__(
            every_n_train_steps=every_n_train_steps,
            save_last=True,
            filename="step{step}",
            auto_insert_metric_name=False,
        )
        self._saved_step = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save at multiples of ``every_n_train_steps``, and when this batch was the last."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step == trainer.max_steps or trainer.should_stop:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what the last batch did not know to be the end (a number of epochs)."""
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if self._saved_step == trainer.global_step or trainer.global_step == 0:
            return
        candidates = self._monitor_candidates(trainer)
        self._save_topk_checkpoint(trainer, candidates)
        self._save_last_checkpoint(trainer, candidates)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        self._saved_step = trainer.global_step


class RunConfig(SaveConfigCallback):
    """Writes ``config.yaml`` and ``environment.json`` into the run folder, unless nothing is kept of the run."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write both files."""
        if trainer.logger is None and not trainer.checkpoint_callbacks:
            return
        super().setup(trainer, pl_module, stage)
        folder = trainer.log_dir  # a collective
        if trainer.is_global_zero and folder is not None and stage == "fit":
            (Path(folder) / "environment.json").write_text(json.dumps(environment(), indent=1) + "\n")


class TrainerCLI(LightningCLI):
    """LightningCLI with checkpoints and a progress bar counted in student updates, unless the user gives others."""

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parse, then look at the checkpoint to resume from before anything is built."""
        super().parse_arguments(parser, args)
        path = self.config[self.config.subcommand].get("ckpt_path")
        if path and path not in _KEYWORDS:
            _check_checkpoint(Path(path).expanduser())

    def before_fit(self) -> None:
        """Refuse to write into the folder of an earlier run, unless that run goes on; loggers delete what they find."""
        resumed = self._get(self.config, "ckpt_path")
        if resumed and Path(resumed).is_dir() and not isinstance(self.trainer.strategy, ModelParallelStrategy):
            raise ValueError(
                f"ckpt_path={resumed} is a sharded checkpoint, which only strategy role_fsdp2 reads; make it one file "
                f"with lightning-distill convert {resumed} OUT.ckpt, and give that."
            )
        if self.trainer.logger is None and not self.trainer.checkpoint_callbacks:
            return
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir).absolute()
        if not any((folder / "checkpoints").glob("*.ckpt")):
            return
        if resumed not in _KEYWORDS and (
            resumed is None or folder not in Path(resumed).expanduser().absolute().parents
        ):
            raise FileExistsError(
                f"{folder} holds the checkpoints of an earlier run; give another folder with "
                "--trainer.logger.init_args.version=... (or --trainer.default_root_dir=... without a logger), or "
                "continue that run with --ckpt_path."
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the default callbacks."""
        config = self._get(self.config_init, "trainer")
        given = config.get("callbacks") or []
        callbacks: list[Callback] = list(given) if isinstance(given, (list, tuple)) else [given]
        quick = bool(config.get("fast_dev_run"))
        if config.get("enable_checkpointing") is not False and not quick and not _has(callbacks, ModelCheckpoint):
            total = config.get("max_steps") or -1
            callbacks.append(StudentCheckpoint(max(1, min(1000, total // 4)) if total > 0 else 1000))
        if config.get("enable_progress_bar") is not False and not _has(callbacks, ProgressBar):
            callbacks.append(StudentProgressBar())
        return super().instantiate_trainer(**{**kwargs, "callbacks": callbacks})


def run_trainer(words: Sequence[str]) -> TrainerCLI:
    """Run ``fit``, ``validate``, ``test`` or ``predict``; returns the finished command line.

    Args:
        words: command line from the subcommand on.
    """
    from lightning_distill.cli import import_everything

    import_everything()
    with contextlib.suppress(TypeError, ValueError):  # older jsonargparse: interpolation works within one file only
        jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    _quiet()
    options = {"parser_mode": "omegaconf+", "exit_on_error": False, "prog": "lightning-distill"}
    logger = {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": "runs", "name": _run_name(words)},
    }
    return TrainerCLI(
        DistillationModule,
        LightningDataModule,
        save_config_callback=RunConfig,
        save_config_kwargs={"overwrite": True},
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        seed_everything_default=0,
        trainer_defaults={"logger": logger, "num_sanity_val_steps": 0, "max_epochs": -1, "log_every_n_steps": 25},
        parser_kwargs=options,
        args=list(words),
    )


def _check_checkpoint(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(
            f"ckpt_path={path} does not exist; give the checkpoint of an earlier run, for example "
            "runs/NAME/version_0/checkpoints/last.ckpt."
        )
    if path.is_dir() and not (path / "meta.pt").is_file():
        raise ValueError(
            f"ckpt_path={path} is a folder, but no complete sharded checkpoint (meta.pt is missing); give a .ckpt "
            "file, or the folder that a run with strategy role_fsdp2 wrote."
        )
    if path.is_file() and "lightning_distill" not in checkpoints.read_checkpoint(path):
        raise ValueError(
            f"{path} was not written by lightning_distill (its header is missing); give a checkpoint of a distillation "
            "run, or start from plain weights with PretrainedDenoiser(path)."
        )


def _has(callbacks: Sequence[Callback], kind: type[Callback]) -> bool:
    return any(isinstance(callback, kind) for callback in callbacks)


def _run_name(words: Sequence[str]) -> str:
    """Name of the run folder: that of the last configuration file with a model."""
    files = [b for a, b in pairwise(words) if a in ("-c", "--config")]
    files += [w.split("=", 1)[1] for w in words if w.startswith(("--config=", "-c="))]
    described = [name for name in files if "model" in _mapping(Path(name))]
    return Path((described or files or ["run"])[-1]).stem


def _mapping(file: Path) -> dict[str, Any]:
    """A configuration file as plain data; nothing for what the parser will refuse with its own words."""
    try:
        content = yaml.safe_load(file.read_text())
    except OSError:
        return {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" in line {mark.line + 1}" if mark else ""
        raise ValueError(f"{file} is not valid YAML: {getattr(error, 'problem', error)}{place}.") from None
    if content is not None and not isinstance(content, dict):
        raise ValueError(f"{file} is no configuration: it holds a {type(content).__name__} instead of keys.")
    return content or {}


def _no_tips(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()


def _quiet() -> None:
    """Silence what is about Lightning's own defaults, not about the user's run."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_tips)
    for message in (
        "You defined a `validation_step` but have no",
        ".*module.* in eval mode at the start of training",
        "The `train_dataloader`|The 'train_dataloader'",
        ".*isinstance.treespec, LeafSpec.* is deprecated",
        "Using ModelCheckpoint with manual optimization",
        "Starting from v1.9.0, `tensorboardX`",
        ".*does not have many workers",
        "LightningCLI's args parameter is intended",
        "Precision .* is not supported by the model summary",
        "The number of training batches .* is smaller than the logging interval",  # we log by student updates
        "Be aware that when using `ckpt_path`, callbacks used to create the checkpoint",
        "Checkpoint directory .* exists and is not empty",  # resumed there; anything else is refused
    ):
        warnings.filterwarnings("ignore", message=message)
