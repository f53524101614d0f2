"""The progress bar counts student updates, shows losses and rates, and rarely waits for the device."""

from __future__ import annotations

import io
import re

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_distill import progress
from lightning_distill.progress import StudentProgressBar


class Module(LightningModule):
    def __init__(self, prog_bar: bool = False, fail_at: int = -1) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.prog_bar = prog_bar
        self.fail_at = fail_at

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if batch_idx == self.fail_at:
            raise RuntimeError("boom")
        loss = self.layer(batch).square().mean()
        self.log("train/student/total", torch.tensor(0.125), batch_size=1)
        self.log("train/student/hidden", torch.tensor(77.0), batch_size=1)
        if self.prog_bar:
            self.log("critic", torch.tensor(2.5), prog_bar=True, batch_size=1)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Clock:
    """A clock that advances by a fixed amount at every training batch."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class Tick(StudentProgressBar):
    """The bar with a clock of its own: 0.5 s per batch."""

    def __init__(self, clock: Clock, **kwargs) -> None:
        super().__init__(**kwargs)
        self.clock = clock

    def on_train_batch_end(self, *args) -> None:
        self.clock.now += 0.5
        super().on_train_batch_end(*args)


def fit(bar: StudentProgressBar, module: Module | None = None, steps: int = 20, **trainer) -> None:
    options = {"max_steps": steps, "max_epochs": -1, "accelerator": "cpu", "logger": False, **trainer}
    runner = Trainer(callbacks=[bar], enable_checkpointing=False, enable_model_summary=False, **options)
    runner.fit(module or Module(), DataLoader(torch.ones(64, 2), batch_size=8))


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def text_console(terminal: bool) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=terminal, width=140, color_system=None), out


def test_without_a_terminal_one_line_per_tenth(clock):
    console, out = text_console(False)
    fit(Tick(clock, console=console), Module(prog_bar=True))
    lines = out.getvalue().splitlines()
    assert [int(line.split("/")[0]) for line in lines] == list(range(2, 21, 2))
    # 8 samples and 1 update per 0.5 s; 10 updates are left after the first 10
    assert lines[4] == "10/20  student 0.125  critic 2.5  16 samples/s  ETA 0:05"
    assert lines[-1].endswith("ETA 0:00")
    assert "hidden" not in out.getvalue()


@pytest.mark.parametrize("steps", [3, 10, 17, 1000])
def test_number_of_lines(clock, steps):
    console, out = text_console(False)
    bar = Tick(clock, console=console)
    trainer = type("T", (), {"global_step": 0, "world_size": 1, "callback_metrics": {}, "progress_bar_metrics": {}})()
    trainer.estimated_stepping_batches = steps
    bar.on_train_start(trainer, None)
    for step in range(1, steps + 1):
        trainer.global_step = step
        bar.on_train_batch_end(trainer, None, None, torch.ones(4, 2), step)
    bar.on_train_end(trainer, None)
    drawn = [int(line.split("/")[0]) for line in out.getvalue().splitlines()]
    assert len(drawn) == min(10, steps)
    assert drawn[-1] == steps


def test_on_a_terminal_at_the_refresh_rate(clock):
    console, out = text_console(True)
    bar = Tick(clock, console=console, refresh_seconds=2.0)
    drawn = []
    draw = bar._draw
    bar._draw = lambda trainer: (drawn.append(trainer.global_step), draw(trainer))
    fit(bar)
    assert drawn == [4, 8, 12, 16, 20]
    text = out.getvalue()
    assert "updates" in text
    assert "━" in text
    assert re.search(r"12/20  student 0\.125  16 samples/s  ETA 0:04", text)
    assert bar._progress is None


def test_losses_are_read_only_when_drawn(clock, monkeypatch):
    reads = []

    def spy(name: str) -> None:
        original = getattr(Tensor, name)

        def read(self: Tensor, *args: object) -> object:
            value = original(self, *args)
            reads.append(value)
            return value

        monkeypatch.setattr(Tensor, name, read)

    for name in ("item", "__float__", "tolist"):
        spy(name)
    for lines in (2, 20):
        reads.clear()
        fit(Tick(clock, console=text_console(False)[0], lines=lines))
        assert reads.count(0.125) == lines


def test_unknown_length_prints_every_minute(clock):
    console, out = text_console(False)
    bar = Tick(clock, console=console)
    trainer = type("T", (), {"global_step": 0, "world_size": 2, "callback_metrics": {}, "progress_bar_metrics": {}})()
    trainer.estimated_stepping_batches = float("inf")
    bar.on_train_start(trainer, None)
    for step in range(1, 241):
        trainer.global_step = step
        bar.on_train_batch_end(trainer, None, None, torch.ones(4, 2), step)
    assert out.getvalue().splitlines() == ["120  16 samples/s", "240  16 samples/s"]


def test_disabled_and_failing_runs(clock):
    console, out = text_console(True)
    bar = Tick(clock, console=console)
    bar.disable()
    bar.on_train_start(None, None)
    bar.on_train_batch_end(None, None, None, None, 0)
    bar.on_train_end(None, None)
    assert out.getvalue() == ""
    bar.enable()
    with pytest.raises(RuntimeError, match="boom"):
        fit(bar, Module(fail_at=3))
    assert bar._progress is None  # the live line is closed, the terminal usable


def test_samples_per_update_and_bad_arguments(clock):
    console, out = text_console(False)
    fit(Tick(clock, console=console, samples_per_update=100, metrics=()))
    assert "10/20  200 samples/s" in out.getvalue()
    assert "student" not in out.getvalue()
    with pytest.raises(ValueError, match="one line or more"):
        StudentProgressBar(lines=0)
    with pytest.raises(ValueError, match="positive time"):
        StudentProgressBar(refresh_seconds=0)


def test_lightning_takes_it_for_its_progress_bar():
    bar = StudentProgressBar()
    assert Trainer(callbacks=[bar], logger=False, enable_checkpointing=False).progress_bar_callback is bar
