"""benchmarks/compare.py: configurations of the plane on pictures, and what is run again."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import budget_table
import compare
import pytest
import yaml
from derive import PROBLEMS, derive

from lightning_distill.configs import config_path

ROOT = Path(__file__).parents[1]
PLANE = sorted(
    f"{file.parent.name}/{file.name}" for file in config_path("quickstart.yaml").parent.glob("method/*_ring*.yaml")
)
OTHERWISE = ("method/flash_wam_ring_action.yaml", "method/lcm_ring.yaml", "method/video_scene_ring.yaml")


def load(name: str) -> dict:
    return yaml.safe_load(config_path(name).read_text())


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", [name for name in PLANE if name not in OTHERWISE])
def test_every_method_of_the_plane_has_a_configuration_for_pictures(name, problem):
    wanted = PROBLEMS[problem]
    plane, pictures = load(name), derive(load(name), wanted, 90)
    before, after = plane["model"]["init_args"], pictures["model"]["init_args"]
    assert pictures["trainer"]["max_steps"] == 90
    assert after["teacher"] == {"class_path": "ZooDenoiser", "init_args": {"name": problem}}
    assert "Explicit" not in str(after)
    given = plane["data"].get("init_args", {}).get("batch_size", wanted.batch)
    assert pictures["data"]["init_args"]["batch_size"] == min(wanted.batch, given)
    if "gan" in before:
        assert after["gan"]["init_args"] == {**before["gan"]["init_args"], "taps": list(wanted.taps)}
    for role in ("student", "fake_score", "discriminator"):
        if f"{role}_optimizer" in before:
            rate = before[f"{role}_optimizer"]["init_args"]["lr"]
            assert after[f"{role}_optimizer"]["init_args"]["lr"] == pytest.approx(wanted.rate.get(role, 1.0) * rate)
            assert wanted.tail is None or f"{role}_scheduler" in after
    for key in after:
        if key.endswith("_scheduler"):
            schedule = after[key]["init_args"]
            if before.get(key, {"init_args": {"total_steps": None}})["init_args"]["total_steps"] in (
                None,
                plane["trainer"]["max_steps"],
            ):
                assert schedule["total_steps"] == 90
            start = schedule.get("decay_start", schedule["total_steps"])
            assert schedule.get("warmup_steps", 0) < start <= schedule["total_steps"]
    assert before.keys() - after.keys() <= {"shape", "student", "fake_score"}  # everything else is the method's own


@pytest.mark.parametrize("name", OTHERWISE)
def test_methods_of_other_teachers_are_refused(name):
    with pytest.raises(ValueError, match=r"digits has a network and pictures|starts from renderings"):
        derive(load(name), PROBLEMS["digits"], 90)


def test_moments_follow_the_number_of_updates():
    plane = load("method/tscd_ring.yaml")
    length, stages = plane["trainer"]["max_steps"], plane["model"]["init_args"]["segment_updates"]
    halved = derive(plane, PROBLEMS["digits"], length // 2)["model"]["init_args"]["segment_updates"]
    assert halved == [pytest.approx(n / 2, abs=1) for n in stages]
    assert plane["trainer"]["max_steps"] == length  # the argument stays as it was


def test_snapshots_fit_into_the_shortest_run():
    problem = PROBLEMS["fashion"]
    model = derive(load("method/disback_ring4.yaml"), problem, problem.probe)["model"]["init_args"]
    assert model["degradation_updates"] > model["waypoints"] == 3
    assert model["backtracking_updates"] > 0


def test_words_and_patterns(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert compare.matching("method/kd.yaml:num_steps=2") == ["method/kd.yaml:num_steps=2"]
    assert compare.matching("method/*_ring4.yaml") == [name for name in PLANE if name.endswith("_ring4.yaml")]
    row = compare.parse("method/a.yaml+method/b.yaml:num_steps=2:sampler=ode")
    assert row == {
        "config": "configs/method/b.yaml",
        "settings": {"num_steps": "2", "sampler": "ode"},
        "after": ["configs/method/a.yaml"],
    }
    weighted = compare.parse("method/a.yaml:loss_weights={student/gan: 0.02}:times.init_args.mean=-0.4")
    assert weighted["settings"] == {"loss_weights": "{student/gan: 0.02}", "times.init_args.mean": "-0.4"}
    begun = "method/a.yaml:form=flow_map@10~method/b.yaml@20"
    assert compare.parse(begun) == {
        "config": "configs/method/b.yaml",
        "after": ["configs/method/a.yaml:form=flow_map@10~"],
    }
    assert compare.stages_of(begun) == [
        compare.Stage("configs/method/a.yaml", {"form": "flow_map"}, 10.0, start=True),
        compare.Stage("configs/method/b.yaml", {}, 20.0),
    ]
    plane = "method/cmt_ring.yaml@10~method/scm_ring.yaml"
    assert [compare.parse(plane + end, 60.0)["seconds"] for end in ("@20", "")] == [30.0, 70.0]
    # what is no configuration of the plane takes what it takes
    assert compare.parse("method/dmd2_fashion.yaml~method/scm_ring.yaml@20", 60.0)["seconds"] == 20.0
    assert "seconds" not in compare.parse("method/cmt_ring.yaml@10~method/dmd2_fashion.yaml", 60.0)
    assert compare.fits(plane + "@20", Namespace(problem="digits", seconds=None))
    assert not compare.fits(plane, Namespace(problem="digits", seconds=None))


def test_a_student_begins_as_that_of_an_earlier_run():
    for name in ("method/scm_ring.yaml", "method/mean_flow_ring.yaml"):
        student = derive(load(name), PROBLEMS["fashion"], 90, "runs/cmt")["model"]["init_args"]["student"]
        role = student if name == "method/scm_ring.yaml" else student["init_args"]["role"]
        assert role == {"class_path": "FromCheckpoint", "init_args": {"path": "runs/cmt"}}


def test_configurations_that_do_not_fit_are_left_out_before_anything_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    digits, plane = Namespace(problem="digits", seconds=60.0), Namespace(problem="digits", seconds=None)
    assert [compare.fits(name, digits) for name in ("method/ctm_ring.yaml", "method/lcm_ring.yaml")] == [True, False]
    assert "left out: method/lcm_ring.yaml: LCM has the teacher" in capsys.readouterr().err
    assert not compare.fits("method/ctm_ring.yaml", plane)
    assert compare.fits("method/ctm_ring.yaml", Namespace(problem="fashion", seconds=60.0))
    assert "rewritten for pictures, with --seconds" in capsys.readouterr().err
    assert compare.fits("method/dmd2_digits.yaml", plane)
    assert not any(compare.of_the_plane(f"configs/method/{name}_fashion.yaml") for name in ("dmd2", "straightening"))
    assert all(compare.of_the_plane(f"configs/{name}") for name in PLANE)


def test_rows_are_sorted_by_track_steps_and_progress():
    names = ["dmd2_ring4", "dmd2_4step_ring4", "ladd_ring4", "sid_ring4"]
    steps, good = [1, 4, 1, 1], [0.5, 0.7, 0.6, 0.9]
    figures = {"progress_judge": 0.5, "fd": 1.0, "recall": 0.5, "class_accuracy": 0.9, "student_updates": 10}
    rows = [
        {"config": f"configs/method/{n}.yaml", "method": n, "nfe": k, "progress": p, "seconds": 60.0, **figures}
        | {"objections": [] if p == 0.9 else ["no"]}
        for n, k, p in zip(names, steps, good, strict=True)
    ]
    rows.append({"config": "configs/method/dmd2_digits.yaml", "progress": 1.0})  # of another budget
    tracks = {k: [r[0]["method"] for r in found] for k, found in budget_table.grouped(rows).items()}
    assert tracks == {
        "learn from the teacher alone": ["sid_ring4", "dmd2_ring4", "dmd2_4step_ring4"],
        "see real pictures": ["ladd_ring4"],
    }
    text = budget_table.table({"rows": rows, "meta": {"machine": {"cpu": "some CPU"}}}, "digits")
    assert "| [`sid_ring4`](../configs/method/sid_ring4.yaml) | sid_ring4 | 1 | 0.900 | 0.500 | 1.00 |" in text
    assert text.count("| yes |") == 1


def test_other_settings_and_starts_have_a_table_of_their_own():
    figures = {"seed": 0, "progress": 0.9, "recall": 0.7, "student_updates": 265, "method": "SCM", "nfe": 1}
    figures |= {"class_accuracy": 0.95, "cpu_seconds": 32.1}
    begun = compare.parse("method/cmt_ring.yaml:form=flow_map@20~method/scm_ring.yaml@10")
    rows = [begun | figures, {"config": "configs/method/dmd2_digits.yaml", "settings": {"a": "1"}}]
    assert budget_table.grouped(rows) == {}
    lines = budget_table.variants({"rows": rows}).splitlines()
    config = "[`scm_ring`](../configs/method/scm_ring.yaml)"
    assert lines[2:] == [f"| {config} | cmt_ring form=flow_map (20 s) |  | 30 | 32 | 0.900 | 0.70 | 0.950 | 265 |"]
    plain = compare.parse("method/scm_ring.yaml", 60.0) | figures
    rows += [plain, plain | {"seconds": 300.0, "progress": 0.95}, plain | {"config": "configs/method/ctm_ring.yaml"}]
    (track,) = budget_table.grouped(rows).values()
    assert [[row["seconds"] for row in found] for found in track] == [[60.0], [60.0]]
    assert [line.split(" | ")[3] for line in budget_table.variants({"rows": rows}).splitlines()[2:]] == [
        "30",
        "60",
        "300",
    ]


@pytest.mark.slow
def test_a_run_from_the_plane_to_the_figures(tmp_path):
    words = ["configs/method/knowledge_distillation_ring.yaml", "--trainer.enable_progress_bar=false"]
    words += [f"--trainer.logger.init_args.save_dir={tmp_path}"]
    stages = [{"words": words, "seconds": 2.0, "start": False}]
    job = {"stages": stages, "problem": "digits", "samples": 256, "many": 50, "folder": str(tmp_path)}
    out = tmp_path / "figures.json"
    command = [sys.executable, "benchmarks/compare_run.py", json.dumps(job), str(out)]
    subprocess.run(command, cwd=ROOT, check=True)
    figures = json.loads(out.read_text())
    assert figures["method"] == "KnowledgeDistillation"
    assert figures["student_updates"] >= 48
    assert "256 samples are too few" in figures["objections"][0]
    assert -5 < figures["progress"] <= 1.2
