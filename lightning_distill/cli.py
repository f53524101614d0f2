"""The command line: our own commands, and LightningCLI for everything a Trainer does.

``fit``, ``validate``, ``test`` and ``predict`` are LightningCLI's (``commands/trainer.py``); the others are modules of
``commands``. Nothing heavy is imported before a command is chosen.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

from lightning_distill import __version__

__all__ = ["DEBUG_VARIABLE", "import_everything", "main", "trainer_cli"]

DEBUG_VARIABLE = "LIGHTNING_DISTILL_DEBUG"
TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
OWN_COMMANDS = (
    "quickstart",
    "sample",
    "evaluate",
    "report",
    "export",
    "convert",
    "cache",
    "trajectories",
    "methods",
    "plan",
)
_USAGE = """usage: lightning-distill COMMAND ...

  fit | validate | test | predict   train or evaluate from a YAML file (lightning-distill fit --help)
  quickstart                        distil the shipped Fashion-MNIST teacher and show the result
  sample RUN_DIR | FOLDER           pictures from a run, or from an exported folder
  evaluate RUN_DIR                  measure a run's student against its teacher and the data
  report RUN_DIR [RUN_DIR ...]      one page with curves, pictures and figures of one or several runs
  export RUN_DIR OUT_DIR            write a folder that stock diffusers loads
  convert CKPT OUT                  a sharded checkpoint to a single file, or the other way round
  cache --pipeline P --prompts FILE --out DIR  text embeddings (and latents, --images) computed once into a store;
                                    --text-encoder in place of --pipeline for a plain text model
  trajectories --teacher T --num N --out DIR  store what a teacher's solver makes of noise, to learn from it
  methods                           what can be trained
  plan -c CONFIG.yaml               memory of a run, before anything is allocated

--debug shows the traceback of an error (as does LIGHTNING_DISTILL_DEBUG=1).
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
    if words[0] == "--version":
        print(f"lightning_distill {__version__}")
        return 0
    commands = (*TRAINER_COMMANDS, *OWN_COMMANDS)
    if words[0] not in commands:
        print(f"error: there is no command {words[0]!r}; choose one of {', '.join(commands)}.", file=sys.stderr)
        return 2
    try:
        if not {"", os.getcwd()} & set(sys.path):
            sys.path.append(os.getcwd())  # a YAML file may name classes of modules in this folder, as with python -m
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
        from lightning_distill.commands.errors import is_user_error, one_line

        if debug or not is_user_error(error):
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def import_everything() -> None:
    """Import all methods and everything a YAML file may name, and the methods of installed plugins."""
    import lightning_distill.methods as methods

    for module in pkgutil.iter_modules(methods.__path__):
        importlib.import_module(f"lightning_distill.methods.{module.name}")
    for name in ("callbacks", "data", "ema", "guidance", "processes", "schedules", "strategies", "times"):
        importlib.import_module(f"lightning_distill.{name}")
    for name in ("adversary", "roles", "run_denoiser", "small", "specs"):
        importlib.import_module(f"lightning_distill.networks.{name}")
    for name in ("clip_score", "efficientnet", "extractors", "inception", "lpips_diversity", "towers"):
        importlib.import_module(f"lightning_distill.metrics.{name}")
    for entry in entry_points(group="lightning_distill.methods"):
        try:
            entry.load()
        except Exception as error:  # a broken plugin must not take the program down
            warnings.warn(f"the plugin {entry.name!r} ({entry.value}) cannot be imported: {error}", stacklevel=2)


def trainer_cli(words: Sequence[str]) -> Any:
    """LightningCLI with our defaults; returns it after the subcommand has run."""
    from lightning_distill.commands.trainer import run_trainer

    return run_trainer(words)


if __name__ == "__main__":
    sys.exit(main())
