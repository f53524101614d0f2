"""benchmarks/dials.py: who is told which scale, figures with known answers, and every part on a small run."""

from __future__ import annotations

import json
import re

import dials
import dials_table
import make_tables
import pytest
import torch
import yaml
from derive import PROBLEMS, derive
from small_problems import mlp, shift

from lightning_distill.configs import config_path
from lightning_distill.generation import generate
from lightning_distill.networks.second_time import add_guidance, add_second_time

pytestmark = pytest.mark.filterwarnings("ignore:ConstantEMA", "ignore:.*eval mode")
N = 6


# ------------------------------------------------------------------------------------------------ the dial
@pytest.mark.parametrize("sampler", ["renoise", "flow_map"])
def test_a_network_is_told_the_scale_whoever_samples_it(sampler):
    denoiser = mlp(classes=3)
    add_guidance(denoiser.network)
    if sampler == "flow_map":
        add_second_time(denoiser.network, "zero_init")
    shift(denoiser.network)
    before, (noise, labels) = denoiser.family, (torch.randn(N, 2), {"class_labels": torch.arange(N) % 3})

    def sample():
        return generate(denoiser, noise, labels, [1.0], sampler)

    made = []
    for scale in (1.0, 4.0, torch.tensor([1.0, 4.0]).repeat(N // 2)):
        with dials.telling(denoiser, scale):
            made.append(sample())
    assert denoiser.family is before
    apart = (made[0] - made[1]).abs().amax(1)
    assert apart.min() > 1e-4
    torch.testing.assert_close(made[2], torch.where((torch.arange(N) % 2 == 0)[:, None], made[0], made[1]))
    with pytest.raises(RuntimeError), dials.telling(denoiser, 4.0):
        raise RuntimeError
    assert denoiser.family is before


@pytest.mark.parametrize("who", dials.STUDENTS)
def test_configurations_are_told(who):
    plane = yaml.safe_load(config_path(dials.STUDENTS[who]).read_text())
    before = json.dumps(plane)
    config = derive(dials.told(plane), PROBLEMS["digits"], 50)
    assert json.dumps(plane) == before
    model = config["model"]["init_args"]
    assert model["guidance"]["init_args"] == {"low": 1.0, "high": 6.0}
    assert model["student"]["init_args"]["guidance"] is True
    assert "Explicit" not in json.dumps(config)
    if who == "dmd2":
        assert model["fake_score"]["init_args"] == {"kind": None, "guidance": True}
        assert model["critic_condition_on"] == "step"


# ------------------------------------------------------------------------------------------------ figures
def row(who, sampler, steps, evaluations, scale, near, **figures):
    """A row whose distances to the teacher at scales 1 and 3 are ``near``."""
    facts = {"fd": 1.0, "precision": 0.8, "recall": 0.5, "class_accuracy": 0.9, "seconds_per_image": 1e-5}
    facts |= {"who": who, "sampler": sampler, "steps": steps, "evaluations": evaluations, "guidance": scale}
    return facts | {"fd_teacher": dict(zip(("1", "3"), near))} | figures


ROWS = [
    row("teacher", "ode", 2, 2.0, 1.0, (0.9, 2.0)),
    row("teacher", "heun", 2, 3.0, 1.0, (0.1, 2.0)),
    row("teacher", "dpmpp_2m", 2, 2.0, 1.0, (0.4, 2.0)),
    row("teacher", "ode", 4, 4.0, 1.0, (0.3, 2.0), recall=0.7),
    row("teacher", "ode", 2, 4.0, 3.0, (2.0, 0.8)),
    row("teacher", "heun", 2, 6.0, 3.0, (2.0, 0.2), recall=0.3),
    row("teacher", "dpmpp_2m", 2, 4.0, 3.0, (2.0, 1.1)),
    row("teacher", "ode", 4, 8.0, 3.0, (2.0, 0.5)),
    row("dmd2", "renoise", 1, 1.0, 1.0, (1.5, 1.4)),
    row("dmd2", "renoise", 1, 1.0, 3.0, (1.5, 1.4)),
    row("dmd2", "renoise", 2, 2.0, 1.0, (0.35, 1.4), recall=0.6),
    row("dmd2", "renoise", 2, 2.0, 3.0, (1.0, 0.15), recall=0.4),
]


def test_the_teacher_has_the_nearest_of_the_solvers_that_it_can_pay_for():
    assert dials_table.best_solver(ROWS, 2, 1.0) is ROWS[2]
    assert dials_table.best_solver(ROWS, 4, 1.0) is ROWS[1]
    assert dials_table.best_solver(ROWS, 2, 3.0) is ROWS[4]
    assert dials_table.best_solver(ROWS, 4, 3.0) is ROWS[5]
    assert dials_table.by_steps(ROWS, "dmd2", [3.0, 1.0]) == [[ROWS[9], ROWS[8]], [ROWS[11], ROWS[10]]]
    assert dials_table.as_many_evaluations(ROWS, ROWS[10]) == 3.0
    assert dials_table.as_many_evaluations(ROWS, ROWS[11]) is None
    assert [dials_table.nearest_scale(r) for r in ROWS[8:]] == [3.0, 3.0, 1.0, 3.0]
    assert dials_table.accurate_rows(ROWS, "teacher") == [ROWS[1], ROWS[5]]


def test_ranks_and_fronts():
    assert dials_table.rank_correlation([1, 2, 3, 4], [0.1, 0.2, 0.3, 5.0]) == pytest.approx(1.0)
    assert dials_table.rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    assert dials_table.rank_correlation([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(1 - 6 * 2 / (4 * 15))
    tied = dials_table.rank_correlation([1, 2, 3], [1, 1, 2])  # ranks 1.5, 1.5, 3
    assert tied == pytest.approx(3**0.5 / 2, abs=1e-4)
    assert dials_table.rank_correlation([1, 1, 1], [1, 2, 3]) is None
    assert dials_table.pareto([(4, 1), (1, 3), (2, 3), (2, 2), (3, 2.5), (1, 4)]) == [(1, 3), (2, 2), (4, 1)]


def test_the_page_says_what_the_record_says(tmp_path):
    assert "run `python benchmarks/dials.py`" in dials_table.table(None)
    done = {"config": "configs/method/dmd2_4step_ring4.yaml", "method": "DMD2", "updates": 50, "cpu_seconds": 9.0}
    result = {"rows": ROWS, "scales": [1.0, 3.0], "range": [1.0, 6.0], "samples": 40, "accurate": "heun, 4 steps"}
    result |= {"training": {"dmd2": done}, "meta": {"machine": {"cpu": "a processor"}}}
    text = dials_table.table(result)
    teacher, student = re.findall(r"^\| (?:teacher|DMD2) \| .*", text, re.M)[:2]
    assert teacher.split(" | ")[2] == "0.50, 0.30"
    assert student.split(" | ")[2:] == ["0.60, 0.40", "0.900, 0.900", "constant, +1.0, constant", "1, 3", "3, more |"]
    lines = [line for line in text.splitlines() if line.startswith("| teacher | ")]
    assert lines[1].split(" | ")[1:4] == ["DPM-Solver++(2M) 2/Euler 2", "2 to 4", "10"]
    assert lines[2].endswith("| 0.10, 0.20 |")
    dials_table.plot(result, tmp_path / "dials.png")
    assert (tmp_path / "dials.png").stat().st_size > 1000


# ------------------------------------------------------------------------------------------------ everything
@pytest.mark.slow
def test_students_are_trained_measured_drawn_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(dials, "STUDENTS", {"dmd2": dials.STUDENTS["dmd2"]})
    monkeypatch.setattr(dials, "SOLVERS", {"ode": (1, 4), "heun": (4,)})
    words = ["--smoke", "--samples", "20", "--runs", str(tmp_path)]
    figures = dials.main(words)
    assert figures["training"]["dmd2"]["updates"] == 2
    assert figures["training"]["dmd2"]["cpu_seconds"] > 0
    assert all(len(r["fd_teacher"]) == 2 for r in figures["rows"])
    found = {(r["sampler"], r["steps"], r["guidance"]): r["evaluations"] for r in figures["rows"]}
    assert found == {
        **{("ode", n, w): n * w for n in (1, 4) for w in (1.0, 2.0)},  # guidance by 2 is two branches
        **{("heun", 4, w): 7 * w for w in (1.0, 2.0)},
        **{("renoise", n, w): n for n in (1, 2, 4) for w in (1.0, 2.0)},
    }
    written = json.loads((tmp_path / "results" / "latest" / "dials.json").read_text())
    assert written["rows"] == figures["rows"]
    assert (tmp_path / "dials.png").stat().st_size > 1000
    monkeypatch.setattr(make_tables, "LATEST", tmp_path / "results" / "latest")
    assert "| DMD2 |" in dials_table.table(make_tables._load("dials"))
    monkeypatch.setattr(dials, "fit", lambda words: pytest.fail(f"trained {words}"))
    assert dials.main(words)["rows"] == figures["rows"]
