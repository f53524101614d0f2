"""The command line: our own commands, and LightningCLI for everything a Trainer does.

    lightning-distill fit|validate|test|predict -c CONFIG.yaml ...     LightningCLI
    lightning-distill quickstart|sample|export|methods ...             lightning_distill/commands
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["DEBUG_VARIABLE", "import_everything", "main", "trainer_cli"]

DEBUG_VARIABLE = "LIGHTNING_DISTILL_DEBUG"
OWN_COMMANDS = ("quickstart", "sample", "export", "methods")
_USAGE = """usage: lightning-distill COMMAND ...

  fit | validate | test | predict   train or evaluate from a YAML file (lightning-distill fit --help)
  quickstart                        distil the shipped Fashion-MNIST teacher and show the result
  sample RUN_DIR                    pictures from a run
  export RUN_DIR OUT_DIR            write a folder that stock diffusers loads
  methods                           what can be trained
"""


def main(args: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        args: command line without the program name; None reads ``sys.argv``.

    Returns:
        exit status: 0, or 2 after an error that is the user's to repair (one line on stderr).
    """
    words = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in words or bool(os.environ.get(DEBUG_VARIABLE))
    words = [w for w in words if w != "--debug"]
    if not words or words[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if words else 2
    try:
        if words[0] in OWN_COMMANDS:
            command: ModuleType = importlib.import_module(f"lightning_distill.commands.{words[0]}")
            command.main(words[1:])
        else:
            trainer_cli(words)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if debug or not _is_user_error(error):
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _is_user_error(error: Exception) -> bool:
    """Errors that are told in one sentence; anything else is a bug and keeps its traceback."""
    from jsonargparse import ArgumentError
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    kinds = (ValueError, TypeError, FileNotFoundError, FileExistsError, RuntimeError, ArgumentError)
    return isinstance(error, (*kinds, MisconfigurationException))


def one_line(error: Exception) -> str:
    """The sentence of an error, without the parser's nesting around it."""
    lines = [line.strip().removeprefix("- ").strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if len(lines) == 1:
        return lines[0]
    # jsonargparse wraps the cause in lines that only say where it is
    where = [line for line in lines if line.startswith(("Parser key", "Problem with", "Does not validate", "Given value"))]
    rest = [line for line in lines if line not in where]
    head = next((line for line in where if line.startswith(("Parser key", "Problem with"))), "")
    return " ".join(part for part in (head, rest[-1] if rest else "") if part)


def import_everything() -> None:
    """Import all methods and everything a YAML file may name, and the methods of installed plugins."""
    import lightning_distill.methods as methods

    for module in pkgutil.iter_modules(methods.__path__):
        importlib.import_module(f"lightning_distill.methods.{module.name}")
    for name in ("data", "ema", "guidance", "processes", "schedules", "times"):
        importlib.import_module(f"lightning_distill.{name}")
    for name in ("adversary", "roles", "small", "specs"):
        importlib.import_module(f"lightning_distill.networks.{name}")
    for entry in entry_points(group="lightning_distill.methods"):
        try:
            entry.load()
        except Exception as error:  # a broken plugin must not take the program down
            warnings.warn(f"the plugin {entry.name!r} ({entry.value}) cannot be imported: {error}", stacklevel=2)


def _run_name(words: Sequence[str]) -> str:
    """Name of the run folder: that of the last configuration file."""
    names = [b for a, b in zip(words, words[1:]) if a in ("-c", "--config")]
    names += [w.split("=", 1)[1] for w in words if w.startswith("--config=")]
    return Path(names[-1]).stem if names else "run"


def trainer_cli(words: Sequence[str], **trainer_overrides: Any) -> Any:
    """LightningCLI with our defaults; returns it after the subcommand has run."""
    import jsonargparse
    from lightning.pytorch import LightningDataModule
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.cli import LightningCLI

    from lightning_distill.methods import DistillationModule
    from lightning_distill.progress import StudentProgressBar

    import_everything()
    try:
        jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    except (TypeError, ValueError):  # older jsonargparse: interpolation works within one file only
        pass
    _quiet()

    class DistillCLI(LightningCLI):
        """LightningCLI that adds a progress bar and checkpoints counted in student updates, unless given."""

        def instantiate_trainer(self, **kwargs: Any) -> Any:
            config = self._get(self.config_init, "trainer")
            given = config.get("callbacks") or []
            given = list(given) if isinstance(given, (list, tuple)) else [given]
            if config.get("enable_checkpointing") is not False and not config.get("fast_dev_run"):
                every = max(1, min(1000, (config.get("max_steps") or 1000) // 4))
                kwargs["callbacks"] = _with(
                    given,
                    ModelCheckpoint(every_n_train_steps=every, save_last=True, filename="step{step}", auto_insert_metric_name=False),
                )
            if config.get("enable_progress_bar") is not False:
                kwargs["callbacks"] = _with(kwargs.get("callbacks", given), StudentProgressBar())
            return super().instantiate_trainer(**kwargs, **trainer_overrides)

    options = {"parser_mode": "omegaconf+", "exit_on_error": False}
    logger = {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": "runs", "name": _run_name(words)},
    }
    return DistillCLI(
        DistillationModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={"logger": logger, "num_sanity_val_steps": 0, "max_epochs": -1, "log_every_n_steps": 25},
        parser_kwargs={**options, **{name: options for name in ("fit", "validate", "test", "predict")}},
        args=list(words),
    )


def _with(callbacks: list[Any], extra: Any) -> list[Any]:
    return callbacks if any(isinstance(c, type(extra)) for c in callbacks) else [*callbacks, extra]


def _quiet() -> None:
    """Silence warnings that are about Lightning's own defaults, not about the user's run."""
    for message in (
        "You defined a `validation_step` but have no",
        ".*module.* in eval mode at the start of training",
        "The `train_dataloader`|The 'train_dataloader'",
        ".*isinstance.treespec, LeafSpec.* is deprecated",
        "Using ModelCheckpoint with manual optimization",
        "Starting from v1.9.0, `tensorboardX`",
        ".*does not have many workers",
        "LightningCLI's args parameter is intended",
    ):
        warnings.filterwarnings("ignore", message=message)


if __name__ == "__main__":
    sys.exit(main())
