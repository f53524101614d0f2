"""Where bfloat16 is slow, runs are told, and the quick start does without it."""

import pytest
import torch

from lightning_distill import bfloat16
from lightning_distill.bfloat16 import bfloat16_pays
from lightning_distill.cli import trainer_cli
from lightning_distill.commands import quickstart, trainer, trajectories


@pytest.fixture
def processor(monkeypatch):
    """A processor whose product of matrices takes so many seconds in float32 and bfloat16."""

    def of(single, half):
        bfloat16_pays.cache_clear()
        monkeypatch.setattr(bfloat16, "_seconds", {torch.float32: single, torch.bfloat16: half}.get)

    yield of
    bfloat16_pays.cache_clear()


@pytest.mark.parametrize(("single", "half", "pays"), [(1.0, 0.4, True), (1.0, 3.8, False)])
def test_a_processor_is_measured(processor, monkeypatch, single, half, pays):
    processor(single, half)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert bfloat16_pays("cpu") is bfloat16_pays() is pays
    assert bfloat16_pays("mps")


def test_the_measurement_is_one():
    assert all(0 < bfloat16._seconds(dtype) < 1 for dtype in (torch.float32, torch.bfloat16))


@pytest.mark.sparse(3)
@pytest.mark.parametrize(("half", "precision", "told"), [(2, "bf16-mixed", True), (2, 32, False), (0.5, "bf16", False)])
def test_a_run_in_slow_bfloat16_is_told(processor, monkeypatch, tmp_path, half, precision, told):
    processor(1.0, half)
    said = []
    monkeypatch.setattr(trainer, "rank_zero_info", said.append)
    config = tmp_path / "run.yaml"
    config.write_text(
        "model: {class_path: DMD2, init_args: {teacher: {class_path: AnalyticTeacher, init_args: {problem: ring, "
        "process: FlowMatching}}, "
        "student: &n {class_path: Explicit, init_args: {spec: {class_path: NewDenoiser, init_args: {network: "
        "{class_path: ResidualMLP, init_args: {shape: [2], width: 8, depth: 1}}, process: FlowMatching, "
        "prediction_type: flow_prediction}}}}, fake_score: *n, shape: [2]}}\n"
        "data: {class_path: Prior, init_args: {batch_size: 4}}\n"
        "trainer: {accelerator: cpu, logger: false, enable_checkpointing: false, enable_progress_bar: false}\n"
    )
    words = ["fit", "-c", str(config), "--trainer.max_steps=1", f"--trainer.precision={precision}"]
    trainer_cli(words)
    assert ("--trainer.precision=32-true" in "".join(said)) is told


@pytest.mark.parametrize(("half", "told"), [(2.0, True), (0.5, False)])
def test_a_store_in_slow_bfloat16_is_told(processor, capsys, tmp_path, half, told):
    processor(1.0, half)
    words = ["--teacher=digits", f"--out={tmp_path}", "--num=2", "--steps=1", "--bf16", "--device=cpu"]
    trajectories.main(words)
    assert ("leave --bf16 out" in capsys.readouterr().err) is told


def test_the_quick_start_chooses(processor, monkeypatch):
    class StopHereError(Exception):
        pass

    asked = []

    def no_run(words):
        asked.append(words)
        raise StopHereError

    monkeypatch.setattr(quickstart, "trainer_cli", no_run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for half in (0.5, 2.0):
        processor(1.0, half)
        with pytest.raises(StopHereError):
            quickstart.main([])
    assert ["--trainer.precision=32-true" in words for words in asked] == [False, True]
