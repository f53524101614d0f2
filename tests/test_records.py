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


def test_rows_of_other_samples_stand_beside_each_other():
    nan = EvaluationRow("student", 1, {"fd_cnn": float("nan")}, "ema", 30, num_samples=0)
    whole = log()
    whole.rows.append(nan)
    again = EvaluationLog.from_dict(json.loads(json.dumps(whole.as_dict())))
    new = EvaluationRow("student", 1, {"fd_cnn": 6.0}, "ema", 30, "test", 60, 7, "held_out")
    held_out = {"num_samples": 60, "seed": 7, "half": "held_out"}
    fewer = [EvaluationRow("teacher", n, {"fd_cnn": 60.0 / n}, **held_out) for n in (1, 8)]
    whole.update(again)
    assert whole.rows == [*log().rows, nan]  # NaN is not equal to itself, the row is
    whole.update(EvaluationLog([new], fewer, {"floors": {"fd_two": 0.3}}))
    assert whole.rows == [*log().rows, nan, new]
    assert whole.reference == {"floors": {"fd_cnn": 0.1, "fd_two": 0.3}}
    assert whole.baselines(new) == fewer
    assert whole.baselines(nan) == log().teacher
    assert [whole.baseline(row=row).nfe for row in (nan, new)] == [50, 8]
    assert whole.baseline(1, new).metrics == {"fd_cnn": 60.0}
    assert whole.compared([new]) == fewer
    assert whole.compared([]) == whole.compared([nan, new]) == [*log().teacher, *fewer]
    # other measures of the same samples
    whole.update(EvaluationLog([], [EvaluationRow("teacher", 8, {"kid_cnn": 0.5, "fd_cnn": 7.0}, **held_out)], {}))
    assert whole.baseline(8, new).metrics == {"fd_cnn": 7.0, "kid_cnn": 0.5}
    assert len(whole.teacher) == 4
    # without the teacher of these samples its card, without a card what there is
    other = EvaluationRow("student", 1, {}, "ema", 30, num_samples=61)
    assert whole.baselines(other) == whole.teacher
    card = EvaluationRow("teacher", 50, {"fd_cnn": 1.0}, stage="card", num_samples=5000)
    whole.update(EvaluationLog([], [card], {}))
    assert whole.baselines(other) == [card]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"metrics.json is damaged"),
        ('{"format": 1, "student": [{}], "teacher": [], "reference": {}}', r"metrics.json is damaged"),
        ('{"format": 1}', r"metrics.json is damaged"),
        ('{"format": 1, "student": [], "teacher": [], "reference": {"floors": 1}}', r"its reference is no mapping"),
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
