"""The file that an evaluated run leaves behind."""

import json

import pytest

from lightning_distill.records import EvaluationLog, EvaluationRow, metric_name


def log():
    rows = [
        EvaluationRow("student", 1, {"fd_cnn": 9.0}, weights="ema", step=10),
        EvaluationRow("student", 2, {"fd_cnn": 8.0}, weights="ema", step=10),
        EvaluationRow("student", 1, {"fd_cnn": 7.0}, weights="ema", step=20),
    ]
    teacher = [EvaluationRow("teacher", n, {"fd_cnn": 50.0 / n}) for n in (1, 50)]
    return EvaluationLog(rows, teacher, {"floors": {"fd_cnn": 0.1}})


def test_what_is_saved_is_read(tmp_path):
    assert log().save(tmp_path / "run") == tmp_path / "run" / "metrics.json"
    assert EvaluationLog.load(tmp_path / "run") == log()
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["metrics.json"]


def test_rows_are_found():
    assert [row.step for row in log().of("ema", 1)] == [10, 20]
    assert log().baseline().nfe == 50
    assert log().baseline(1).metrics == {"fd_cnn": 50.0}
    assert log().baseline(4) is None
    assert EvaluationLog().baseline() is None
    assert metric_name("val", "fd_cnn", 4, "ema") == "val/fd_cnn/nfe4/ema"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"metrics.json is damaged"),
        ('{"format": 1, "student": [{}], "teacher": [], "reference": {}}', r"metrics.json is damaged"),
        ('{"format": 1}', r"metrics.json is damaged"),
        (json.dumps({"format": 99}), r"metrics of format 99 cannot be read"),
    ],
)
def test_damaged_files(tmp_path, content, message):
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        EvaluationLog.load(tmp_path)


def test_runs_that_were_not_evaluated(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"was not evaluated. Add GenerativeEvaluation .*lightning-distill eval"
    ):
        EvaluationLog.load(tmp_path)
