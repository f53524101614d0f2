"""The Trainer's own commands (fit, validate, test, predict): LightningCLI with this package's defaults."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonargparse
import yaml
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn

from lightning_distill import checkpoints
from lightning_distill.bfloat16 import bfloat16_advice
from lightning_distill.callbacks.evaluation import GenerativeEvaluation
from lightning_distill.checkpoint_files import AtomicCheckpointIO, damage, last_good, remove_parts
from lightning_distill.commands.run_folder import find_run
from lightning_distill.commands.saved_config import RUNS, RunConfig
from lightning_distill.configs import read_mapping, with_shipped
from lightning_distill.methods.base import DistillationModule
from lightning_distill.progress import StudentProgressBar
from lightning_distill.requeue import start_without_hpc
from lightning_distill.run_checkpoints import (
    MonitorWatch,
    StopSignals,
    StopWithoutSaving,
    StudentCheckpoint,
    checkpoint_folder,
)
from lightning_distill.run_metrics import EarlierRows
from lightning_distill.run_safety import memory_advice, run_lock

__all__ = ["StudentCheckpoint", "TrainerCLI", "run_trainer"]

_KEYWORDS = ("best", "last", "hpc", "registry")


class TrainerCLI(LightningCLI):
    """LightningCLI with checkpoints and a progress bar counted in student updates, unless the user gives others.

    Args:
        command: the only subcommand that will be asked for; parsers of the others take time to build. None for all.
        **kwargs: see ``LightningCLI``.
    """

    def __init__(self, *args: Any, command: str | None = None, **kwargs: Any) -> None:
        self._command = command
        super().__init__(*args, **kwargs)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Subcommands with the arguments of the Trainer's method that are ours to give."""
        known = LightningCLI.subcommands()
        return known if self._command is None else {self._command: known[self._command]}

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
        if (folder := self._run_folder()) is None or not any((folder / "checkpoints").glob("*.ckpt")):
            return
        if resumed not in _KEYWORDS and (
            resumed is None or folder not in Path(resumed).expanduser().absolute().parents
        ):
            raise FileExistsError(
                f"{folder} holds the checkpoints of an earlier run; give another folder with "
                "--trainer.logger.init_args.version=... (or --trainer.default_root_dir=... without a logger), or "
                "continue that run with --ckpt_path."
            )

    def fit(self, **kwargs: Any) -> None:
        """Train, alone in the run folder; ``ckpt_path=last`` is the newest checkpoint that is whole.

        Raises:
            FileExistsError: another run writes into the folder.
            ValueError: none of its checkpoints is whole.
        """
        if str(self.trainer.precision).startswith("bf16") and (
            advice := bfloat16_advice(self.trainer.strategy.root_device.type, "train with --trainer.precision=32-true")
        ):
            rank_zero_info(advice)
        self._say_if_idle()
        folder = self._run_folder()
        with ExitStack() as stack:
            stack.enter_context(memory_advice(self._batch))
            if folder is not None:
                saved = checkpoint_folder(self.trainer, folder)
                if getattr(rank_zero_only, "rank", 0) == 0 and self.trainer.global_rank == 0:
                    stack.enter_context(run_lock(folder, inside=self.trainer.logger is None))
                    remove_parts(saved)
                if kwargs.get("ckpt_path") == "last":
                    kwargs["ckpt_path"] = _last(saved)
            if kwargs.get("ckpt_path") is None:
                start_without_hpc(self.trainer)
            elif folder is not None:
                self._keep_rows(stack)
            self.trainer.fit(**kwargs)

    def _keep_rows(self, stack: ExitStack) -> None:
        rows = EarlierRows()
        rows.put_aside(self.trainer)
        self.trainer.callbacks.insert(0, rows)  # type: ignore[attr-defined]
        stack.callback(rows.take_back, self.trainer)

    def _say_if_idle(self) -> None:
        if self.trainer.limit_train_batches == 0 or self.trainer.max_steps == 0 or self.trainer.max_epochs == 0:
            rank_zero_warn(
                "nothing is trained: trainer.limit_train_batches, max_steps or max_epochs is 0; leave it out to train."
            )

    def _batch(self) -> str:
        """The samples of an update, and of one forward."""
        size, parts = getattr(self.datamodule, "batch_size", None), self.model.accumulate_grad_batches
        return f"{parts} micro-batches per update" if size is None else f"batch of {size} in {parts} micro-batches"

    def _run_folder(self) -> Path | None:
        """Where this run writes; None if nothing is kept of it."""
        trainer = self.trainer
        if getattr(trainer, "fast_dev_run", False) or (trainer.logger is None and not trainer.checkpoint_callbacks):
            return None
        return Path(trainer.log_dir or trainer.default_root_dir).absolute()

    def before_instantiate_classes(self) -> None:
        """Runs go to ``trainer.default_root_dir`` where that is given, and the logger has no folder of its own."""
        trainer = self._get(self.config, "trainer")
        root, logger = trainer.get("default_root_dir"), trainer.get("logger")
        settings = logger.get("init_args") if hasattr(logger, "get") else None
        if root and settings is not None and settings.get("save_dir") == RUNS:
            settings["save_dir"] = str(root)
        if self.subcommand == "fit" and settings is not None and self._get(self.config, "ckpt_path") == "last":
            _continue_newest(settings)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the default callbacks and the plugin that writes checkpoints."""
        config = self._get(self.config_init, "trainer")
        given = config.get("callbacks") or []
        callbacks: list[Callback] = list(given) if isinstance(given, (list, tuple)) else [given]
        quick = bool(config.get("fast_dev_run"))
        for name, off in (("accumulate_grad_batches", 1), ("gradient_clip_val", None)):
            if config.get(name) not in (None, off):
                raise ValueError(
                    f"trainer.{name} is for modules with one optimizer; give model.init_args.{name}={config.get(name)}."
                )
        kept = [c for c in callbacks if isinstance(c, ModelCheckpoint)]
        if config.get("enable_checkpointing") is not False and not quick and not any(c.save_last for c in kept):
            total = config.get("max_steps") or -1
            callbacks.append(StudentCheckpoint(max(1, min(1000, total // 4)) if total > 0 else 1000))
        if sum(isinstance(c, GenerativeEvaluation) for c in callbacks) > 1:
            raise ValueError(
                "trainer.callbacks has several GenerativeEvaluation, which write the same figures; give one with all "
                "numbers of steps, weights and extractors (steps: [1, 4])."
            )
        if any(c.monitor for c in kept) or _has(callbacks, EarlyStopping):
            callbacks.append(MonitorWatch())
        if not _has(callbacks, StopWithoutSaving) and not quick:
            saves = _has(callbacks, Checkpoint)
            callbacks.append(StopSignals() if saves else StopWithoutSaving())
        if config.get("enable_progress_bar") is not False and not _has(callbacks, ProgressBar):
            callbacks.append(StudentProgressBar())
        trainer = super().instantiate_trainer(**{**kwargs, "callbacks": callbacks})
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer


def run_trainer(words: Sequence[str]) -> TrainerCLI:
    """Run ``fit``, ``validate``, ``test`` or ``predict``; returns the finished command line.

    Args:
        words: command line from the subcommand on; configurations may be named as ``configs.with_shipped`` knows.
    """
    from lightning_distill.cli import import_everything

    words = with_shipped(words)
    import_everything()
    jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    # defaults such as those of Lightning's Timer, which are written into config.yaml
    yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, value: dumper.represent_str(str(value.value)))
    _quiet()
    options = {"parser_mode": "omegaconf+", "exit_on_error": False, "prog": "lightning-distill"}
    logger = {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": RUNS, "name": _run_name(words)},
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
        command=words[0] if words[0] in LightningCLI.subcommands() else None,
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


def _last(folder: Path) -> str | None:
    """The newest whole checkpoint of a folder, None if it has none at all."""
    if (good := last_good(folder)) is not None:
        return str(good)
    if found := sorted(folder.glob("*.ckpt")):
        raise ValueError(
            f"none of the {len(found)} checkpoints in {folder} is whole ({found[-1].name}: {damage(found[-1])}); "
            "start a new run in another folder."
        )
    rank_zero_warn(f"--ckpt_path last: there is no checkpoint in {folder} yet, so the run starts from the beginning.")
    return None


def _continue_newest(settings: dict[str, Any]) -> None:
    """Give a logger without a version, which would begin a new one, the newest that has checkpoints."""
    if settings.get("version") is not None or not settings.get("save_dir"):
        return
    root = Path(settings["save_dir"], settings.get("name") or "").expanduser()
    try:
        run = find_run(root)
    except FileNotFoundError:
        return
    if run != root and any((run / "checkpoints").glob("*.ckpt")):
        settings["version"] = int(run.name.removeprefix("version_"))
        rank_zero_info(f"--ckpt_path last: {run} is the newest run with checkpoints and goes on.")


def _has(callbacks: Sequence[Callback], kind: type[Callback]) -> bool:
    return any(isinstance(callback, kind) for callback in callbacks)


def _run_name(words: Sequence[str]) -> str:
    """Name of the run folder: that of the last configuration file with a model."""
    files = [b for a, b in pairwise(words) if a in ("-c", "--config")]
    files += [w.split("=", 1)[1] for w in words if w.startswith(("--config=", "-c="))]
    described = [name for name in files if "model" in read_mapping(Path(name))]
    return Path((described or files or ["run"])[-1]).stem


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
