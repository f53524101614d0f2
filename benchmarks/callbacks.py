"""What evaluation and monitoring cost: the share of a training run's CPU seconds that each callback takes.

    python benchmarks/callbacks.py                       # the quick start, about three minutes

``share`` is the sum over callbacks divided by all CPU seconds of the run, loading included.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from results import write_result

from lightning_distill.cli import import_everything, trainer_cli

HOOKS = ("setup", "on_train_start", "on_train_batch_end", "on_train_end")


def timed(hook: Callable[..., Any], name: str, spent: dict[str, float]) -> Callable[..., Any]:
    """The hook, which adds its CPU seconds to ``spent[name]``."""

    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return hook(*args, **kwargs)
        finally:
            spent[name] = spent.get(name, 0.0) + time.process_time() - start

    return call


def main() -> None:
    """Train with timed callbacks and write ``callbacks``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    args = parser.parse_args()
    os.chdir(Path(__file__).resolve().parent.parent)
    import_everything()
    spent: dict[str, float] = {}
    for cls in Callback.__subclasses__():
        if not cls.__module__.startswith("lightning_distill."):
            continue
        for hook in HOOKS:
            if hook in vars(cls):
                setattr(cls, hook, timed(vars(cls)[hook], cls.__name__, spent))
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        words = [f"--trainer.logger.init_args.save_dir={folder}", "--trainer.enable_progress_bar=false"]
        trainer_cli(["fit", "-c", args.config, *words])
        total = time.process_time() - start
    figures = {
        "config": args.config,
        "cpu_seconds": total,
        "callbacks": dict(sorted(spent.items())),
        "share": sum(spent.values()) / total,
    }
    print({k: round(v, 3) if isinstance(v, float) else v for k, v in figures.items()})
    write_result("callbacks", figures, seeds=[0], threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
