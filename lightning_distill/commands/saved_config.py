"""What a run keeps of its configuration, so that its folder can be read and its run repeated later."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from lightning_distill.commands.run_folder import find_run
from lightning_distill.environment import environment

__all__ = ["RUNS", "RunConfig"]

#: folder of all runs, below the current one
RUNS = "runs"
#: classes whose argument ``path`` may be the folder of a run's versions
_READ_RUNS = ("lightning_distill.networks.run_denoiser.RunDenoiser", "lightning_distill.networks.roles.FromCheckpoint")


class RunConfig(SaveConfigCallback):
    """Writes ``config.yaml`` and ``environment.json`` into the run folder, unless nothing is kept of the run.

    Earlier runs are named by the version that was read, as the newest may be another one tomorrow. A logger whose
    folder was that of ``trainer.default_root_dir`` keeps following it.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write both files."""
        if trainer.logger is None and not trainer.checkpoint_callbacks:
            return
        if not self.already_saved:
            self.config = copy.deepcopy(self.config)
            _name_versions(self.config)
            _follow_root(self.config.get("trainer"))
        super().setup(trainer, pl_module, stage)
        folder = trainer.log_dir  # a collective
        if trainer.is_global_zero and folder is not None and stage == "fit":
            (Path(folder) / "environment.json").write_text(json.dumps(environment(), indent=1) + "\n")


def _name_versions(part: Any) -> None:
    """Replace the folder of a run's versions by the version that ``find_run`` takes, wherever a class reads one."""
    if isinstance(part, (list, tuple)):
        for value in part:
            _name_versions(value)
    if not isinstance(part, (Namespace, Mapping)):
        return
    for value in list(vars(part).values() if isinstance(part, Namespace) else part.values()):
        _name_versions(value)
    settings = part.get("init_args")
    if part.get("class_path") in _READ_RUNS and settings and any(Path(settings["path"]).expanduser().glob("version_*")):
        settings["path"] = str(find_run(settings["path"], settings.get("checkpoint")))


def _follow_root(trainer: Any) -> None:
    """Undo what ``TrainerCLI`` does where a default_root_dir is given, which a repetition may want elsewhere."""
    root, logger = trainer.get("default_root_dir"), trainer.get("logger")
    settings = logger.get("init_args") if hasattr(logger, "get") else None
    if root and settings is not None and settings.get("save_dir") == str(root):
        settings["save_dir"] = RUNS
