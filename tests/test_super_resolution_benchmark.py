"""benchmarks/super_resolution.py: its rows and figures against known answers, and every part on small stand-ins."""

from __future__ import annotations

import argparse
import json
import math
import re
import struct
from dataclasses import replace
from pathlib import Path

import make_tables
import numpy as np
import pytest
import super_resolution
import torch
import yaml
from small_problems import ready, shift
from torch import nn

from lightning_distill.data.fashion import DATA_VARIABLE
from lightning_distill.data.super_resolution import degrade
from lightning_distill.losses.oftsr import perturbed_source
from lightning_distill.methods import CTMSR, OFTSR, YONOS
from lightning_distill.metrics.features import extract, load_classifier
from lightning_distill.metrics.frechet import FeatureStatistics, frechet_distance
from lightning_distill.metrics.reference import load_reference
from lightning_distill.networks.concatenated import concatenated
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.small import ResidualMLP
from lightning_distill.processes import FlowMatching, ResidualShift

FASHION = {"train": 64, "t10k": 32}
OFTSR_PATH = "method/oftsr_path_fashion.yaml"


def write_fashion(folder):
    """Tiny IDX files with about the mean and the spread of Fashion-MNIST."""
    generator = np.random.default_rng(0)
    for split, count in FASHION.items():
        images = np.where(generator.random((count, 28, 28)) < 0.3645, 200, 0).astype(np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape)
            (folder / f"{split}-{name}-ubyte").write_bytes(header + array.tobytes())


def pictures(n=6, size=32):
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(n, 1, size, size, generator=generator) * 2 - 1
    return x0, torch.randn(n, 1, size, size, generator=generator), {"low": degrade(x0, 4)}


# ------------------------------------------------------------------------------------------------ figures
def test_the_ratio_is_the_mean_of_the_pictures_own():
    x0 = torch.zeros(2, 1, 8, 8)
    made = x0 + torch.tensor([0.2, 0.02]).reshape(2, 1, 1, 1)
    assert super_resolution.mean_psnr(made, x0) == pytest.approx((20.0 + 40.0) / 2, abs=1e-4)  # 10 lg(4 / .04), ...
    assert super_resolution.mean_psnr(x0[:1], x0[:1]) is None
    assert super_resolution.mean_psnr(torch.cat([made, x0[:1]]), torch.cat([x0, x0[:1]])) is None


def test_the_row_of_bicubic_enlargement_is_computed_directly():
    x0, noise, cond = pictures()
    made = super_resolution.bicubic().restore(noise, cond)
    assert torch.equal(made, cond["low"].clamp(-1, 1))
    found = super_resolution.Measures(4)(made, x0, cond["low"])
    errors = (cond["low"].clamp(-1, 1) - x0).square().mean((1, 2, 3))
    assert found["psnr"] == pytest.approx(float((10 * torch.log10(4 / errors)).mean()), abs=1e-3)
    twice = (degrade(made, 4) - cond["low"]).square().mean((1, 2, 3))
    assert found["consistency"] == pytest.approx(float((10 * torch.log10(4 / twice)).mean()), abs=1e-3)
    for name, entry in (("fd_cnn", "fashion"), ("fd_judge", "fashion/judge")):
        statistics = FeatureStatistics.from_features(extract(load_classifier(entry), made))
        assert found[name] == pytest.approx(frechet_distance(statistics, load_reference(entry).statistics["train"]))
    assert found["lpips"] is None


def test_the_truth_has_no_error_and_another_picture_has():
    x0, _, cond = pictures()
    measures = super_resolution.Measures(4)
    truth, other = measures(x0, x0, cond["low"]), measures(x0.roll(1, 0), x0, cond["low"])
    assert (truth["psnr"], truth["consistency"]) == (None, None)
    assert truth["fd_cnn"] == pytest.approx(other["fd_cnn"])  # a distance of sets
    assert other["psnr"] < 12 < super_resolution.mean_psnr(x0 + 0.01, x0)


def test_a_perceptual_distance_is_used_where_it_is_there():
    x0, _, cond = pictures()

    def distance(a, b):
        return (a - b).abs().flatten(1).mean(1)

    found = super_resolution.Measures(4, lpips=distance)(x0 * 0.5, x0, cond["low"])
    assert found["lpips"] == pytest.approx(float(0.5 * x0.abs().mean()))


def test_without_weights_there_is_no_perceptual_distance(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("LIGHTNING_DISTILL_LPIPS_TRUNK", raising=False)
    assert super_resolution.perceptual_distance() is None
    assert "LPIPS needs the weights" in capsys.readouterr().out
    (tmp_path / "alex.pth").write_bytes(b"weights")
    monkeypatch.setenv("LIGHTNING_DISTILL_LPIPS_TRUNK", str(tmp_path / "alex.pth"))
    assert super_resolution.perceptual_distance() is not None


# ------------------------------------------------------------------------------------------------ rows
class Halfway(nn.Module):
    """Predicts x0 = low / 2, and counts."""

    shape = (1, 8, 8)

    def __init__(self):
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.zeros(1)), 0

    def forward(self, x, t, low):
        self.calls += 1
        return 0.5 * low + 0 * self.weight


@pytest.mark.parametrize("steps", [1, 4])
def test_a_row_of_the_teacher_has_as_many_calls_as_it_says(steps):
    _, noise, cond = pictures(size=8)
    network = Halfway()
    row = super_resolution.of_teacher(Denoiser(network, FlowMatching(), "sample"), steps)
    made = row.restore(noise, cond, batch_size=len(noise))
    assert (row.nfe, network.calls) == (steps, steps)
    assert row.name == ("teacher, 1 step" if steps == 1 else "teacher, 4 steps")
    torch.testing.assert_close(made, (0.5 * cond["low"]).clamp(-1, 1), atol=1e-6, rtol=0)


def student(method, process, **settings):
    torch.manual_seed(0)
    network = concatenated(ResidualMLP((2, 8, 8), 16, 2), 1, residual_shift=method is CTMSR)
    module = ready(method(Denoiser(network, process, "flow_prediction", sigma_data=0.6), ema=[], **settings))
    shift(module.student)
    return module.eval()


def test_the_knob_has_a_row_for_each_position():
    _, noise, cond = pictures(size=8)
    module = student(OFTSR, FlowMatching(), source="gaussian")
    rows = super_resolution.of_student(module)
    assert [row.realism for row in rows] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert {row.nfe for row in rows} == {1}
    assert rows[1].name == "OFTSR, realism 0.25"
    for row in rows:
        with torch.autocast("cpu", torch.bfloat16):
            want = module.restore(noise, cond, row.realism).clamp(-1, 1)
        torch.testing.assert_close(row.restore(noise, cond, batch_size=len(noise)), want)
    assert not torch.equal(rows[0].restore(noise, cond), rows[4].restore(noise, cond))


def test_a_flow_from_the_low_resolution_picture_begins_there_at_every_position():
    _, noise, cond = pictures(size=8)
    module = student(OFTSR, FlowMatching(), source="low", perturbation=0.2)
    rows = super_resolution.of_student(module)
    assert [row.name for row in rows][:2] == ["OFTSR from low, realism 0", "OFTSR from low, realism 0.25"]
    source = perturbed_source(cond["low"], noise, 0.2)
    for row in rows:
        with torch.autocast("cpu", torch.bfloat16):
            want = module.restore(source, cond, row.realism).clamp(-1, 1)
        torch.testing.assert_close(row.restore(noise, cond, batch_size=len(noise)), want)
    teacher = module.teacher
    teacher.family = replace(teacher.family, start=("low", 0.2))
    row = super_resolution.of_teacher(teacher, 1)
    assert (row.who, row.name) == ("teacher from low", "teacher from low, 1 step")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        one = source - teacher(source, torch.tensor(1.0), cond).flow_prediction
    torch.testing.assert_close(row.restore(noise, cond, batch_size=len(noise)), one.clamp(-1, 1), atol=2e-2, rtol=0)


def test_a_student_of_a_privileged_teacher_sees_the_low_picture_alone():
    _, noise, cond = pictures(size=8)
    module = student(YONOS, FlowMatching(), easier=[{"low": "low_2"}], num_steps=1)
    (row,) = super_resolution.of_student(module)
    assert (row.who, row.nfe) == ("YONOS", 1)
    assert torch.equal(row.restore(noise, cond), row.restore(noise, {**cond, "low": cond["low"].clone()}))
    assert not torch.allclose(row.restore(noise, cond), row.restore(noise, {"low": cond["low"].flip(0)}), atol=1e-2)


def test_a_student_is_sampled_from_the_given_noise_whatever_the_batches_are():
    _, noise, cond = pictures(size=8)
    module = student(CTMSR, ResidualShift(1.0, "linear"))
    (row,) = super_resolution.of_student(module)
    assert (row.who, row.name, row.realism, row.nfe) == ("CTMSR", "CTMSR", None, 1)
    whole, parts = row.restore(noise, cond), row.restore(noise, cond, batch_size=4)
    torch.testing.assert_close(whole, parts, atol=2e-2, rtol=0)
    assert whole.abs().max() <= 1.0
    assert not torch.allclose(whole, row.restore(noise.flip(0), cond), atol=2e-2)


def test_unseen_pictures_are_those_of_the_test_files(tmp_path, monkeypatch):
    monkeypatch.setenv(DATA_VARIABLE, "nowhere")  # main sets it
    write_fashion(tmp_path)
    x0, cond = super_resolution.unseen(str(tmp_path), 12, 4)
    assert x0.shape == (12, 1, 32, 32)
    assert cond["class_labels"].tolist() == [*range(10), 0, 1]
    assert torch.equal(cond["low"], degrade(x0, 4))
    stored = np.frombuffer((tmp_path / "t10k-images-idx3-ubyte").read_bytes(), np.uint8, offset=16)
    assert x0[3, 0, 2, 2] == pytest.approx(stored[3 * 784] / 127.5 - 1.0)
    with pytest.raises(FileNotFoundError, match=r"t10k-images-idx3-ubyte\[.gz\] is not in"):
        super_resolution.main(["--data", str(tmp_path / "none")])


def test_all_configurations_restore_from_the_same_resolution():
    factors = set()
    read = {c: yaml.safe_load((super_resolution.ROOT / "configs" / c).read_text()) for c in super_resolution.CONFIGS}
    for config, settings in read.items():
        if config != super_resolution.PRIVILEGED:
            factors.add(settings["data"]["init_args"]["factor"])
    assert factors == {4}
    # the privileged teacher sees in its training what the student's batches call low_2
    factor = read[super_resolution.PRIVILEGED]["data"]["init_args"]["factor"]
    yonos = read["method/yonos_fashion.yaml"]
    assert yonos["data"]["init_args"]["easier"] == [factor]
    assert yonos["model"]["init_args"]["easier"] == [{"low": f"low_{factor}"}]
    # both begin at the same source
    path, student = (read[c]["model"]["init_args"] for c in (super_resolution.PATH_TEACHER, OFTSR_PATH))
    assert (path["source"], path["perturbation"]) == (student["source"], student["perturbation"])
    # every teacher is one of those that are trained before
    named = [
        c["model"]["init_args"]["teacher"]["init_args"].get("path")
        for c in read.values()
        if "teacher" in c["model"]["init_args"]
    ]
    teachers = {f"runs/{Path(c).stem}" for c in super_resolution.CONFIGS if c.startswith("teacher/")}
    assert {path for path in named if path} == teachers


# ------------------------------------------------------------------------------------------------ runs
def test_finished_runs_are_read_and_their_seconds_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(super_resolution, "fit", lambda words: pytest.fail(f"trained {words}"))
    checkpoints = tmp_path / "fashion_sr" / "version_0" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints.parent / "config.yaml").write_text("model: {}\n")
    content = {"state_dict": {}, "global_step": 7, "callbacks": {"CpuSeconds": {"seconds": 12.5}}}
    torch.save(content, checkpoints / "last.ckpt")
    args = argparse.Namespace(runs=tmp_path, updates=7, seed=0, batch_size=None, precision=None)
    assert super_resolution.train(super_resolution.TEACHER, args) == {"updates": 7, "cpu_seconds": 12.5}
    torch.save({**content, "callbacks": {}}, checkpoints / "last.ckpt")
    assert super_resolution.train(super_resolution.TEACHER, args)["cpu_seconds"] is None

    words = []

    def fit(given):
        words.extend(given)
        torch.save({**content, "global_step": 9}, checkpoints / "last.ckpt")

    monkeypatch.setattr(super_resolution, "fit", fit)
    args.updates = 9
    assert super_resolution.train(super_resolution.TEACHER, args)["updates"] == 9
    assert f"--ckpt_path={checkpoints / 'last.ckpt'}" in words
    assert "--trainer.logger.init_args.version=version_0" in words
    assert not any(word.startswith("--trainer.precision") for word in words)


@pytest.mark.parametrize("config", [c for c in super_resolution.CONFIGS if c.startswith("method/")])
def test_every_student_is_told_its_own_teacher(config, tmp_path, monkeypatch):
    words = []

    def fit(given):
        words.extend(given)
        folder = tmp_path / Path(config).stem / "version_0" / "checkpoints"
        folder.mkdir(parents=True)
        (folder.parent / "config.yaml").write_text("model: {}\n")
        torch.save({"state_dict": {}, "global_step": 3}, folder / "last.ckpt")

    monkeypatch.setattr(super_resolution, "fit", fit)
    args = argparse.Namespace(runs=tmp_path, updates=3, seed=0, batch_size=None, precision="32-true")
    super_resolution.train(config, args)
    told = [word.partition("=")[2] for word in words if "teacher.init_args.path" in word]
    expected = {
        "oftsr_fashion": "fashion_sr", "tad_sr_fashion": "fashion_sr",
        "oftsr_path_fashion": "fashion_sr_path", "yonos_fashion": "fashion_sr_half",
    }  # fmt: skip
    name = expected.get(Path(config).stem)
    assert told == ([] if name is None else [str(tmp_path / name)])
    assert "--trainer.precision=32-true" in words


def test_rows_without_a_run_are_kept_as_they_were_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv(DATA_VARIABLE, "nowhere")
    write_fashion(tmp_path)
    latest = tmp_path / "results" / "latest"
    latest.mkdir(parents=True)
    record(latest)
    words = ["--data", str(tmp_path), "--runs", str(tmp_path / "runs"), "--samples", "24", "--keep"]
    words += ["--results", str(tmp_path / "results"), "--picture", str(tmp_path / "picture.png")]
    with pytest.raises(ValueError, match=r"has no rows of 24 pictures and seed 0; leave it out"):
        super_resolution.main(words)
    file = latest / "super_resolution.json"
    old = json.loads(file.read_text())
    old |= {"samples": 24, "meta": {"machine": {"cpu": "an older one"}, "seeds": [0]}}
    file.write_text(json.dumps(old))
    trained = []
    monkeypatch.setattr(
        super_resolution, "train", lambda config, args: trained.append(config) or {"updates": 1, "cpu_seconds": 2.0}
    )
    monkeypatch.setattr(
        super_resolution, "restorers", lambda config, args: [replace(super_resolution.bicubic(), who=config)]
    )
    figures = super_resolution.main(words)
    assert trained == [c for c in super_resolution.CONFIGS if c not in old["training"]]
    rows = {row["who"]: row for row in figures["rows"]}
    assert [rows["teacher"], rows["OFTSR"]] == [old["rows"][2], old["rows"][4]]
    assert rows["method/yonos_fashion.yaml"]["psnr"] == pytest.approx(rows["bicubic"]["psnr"])
    assert figures["training"]["teacher/fashion_sr.yaml"] == {"updates": 9, "cpu_seconds": 99.6, "cpu": "an older one"}
    monkeypatch.setattr(make_tables, "LATEST", latest)
    text = make_tables.super_resolution()
    assert "an older one for teacher, OFTSR; " in text
    assert len(re.findall(r"^\| ", text, re.M)) == len(figures["rows"]) + 1


def record(folder, lpips=None):
    figures = {"psnr": 20.123, "consistency": 40.0, "lpips": lpips, "fd_cnn": 3.456, "fd_judge": 2.0}
    rows = [
        {"who": "real", "nfe": 0, "realism": None, **figures, "psnr": None, "consistency": None},
        {"who": "bicubic", "nfe": 0, "realism": None, **figures, "config": None},
        {"who": "teacher", "nfe": 20, "realism": None, **figures, "config": "teacher/fashion_sr.yaml"},
        {"who": "OFTSR", "nfe": 1, "realism": 0.0, **figures, "config": "method/oftsr_fashion.yaml"},
        {"who": "OFTSR", "nfe": 1, "realism": 1.0, **figures, "config": "method/oftsr_fashion.yaml"},
    ]
    training = {"teacher/fashion_sr.yaml": {"updates": 9, "cpu_seconds": 99.6}}
    training["method/oftsr_fashion.yaml"] = {"updates": 9, "cpu_seconds": None}
    reference, machine = {"fd_cnn": 60000, "fd_judge": 60000}, {"machine": {"cpu": "this one"}}
    result = {"rows": rows, "factor": 4, "samples": 5000, "reference": reference, "training": training}
    (folder / "super_resolution.json").write_text(json.dumps({**result, "meta": machine}))


def test_the_table_is_made_from_the_record(tmp_path, monkeypatch):
    monkeypatch.setattr(make_tables, "LATEST", tmp_path)
    assert "to fill this table" in make_tables.super_resolution()
    record(tmp_path)
    text = make_tables.super_resolution()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    titles = ["PSNR", "PSNR to the input", "fd_cnn", "fd_judge", "CPU s"]
    assert lines[0] == ["restored by", "network calls", "realism", *titles]
    assert lines[1] == ["(the true pictures)", "", "", "", "", "3.46", "2.00", ""]
    assert lines[2][:4] == ["bicubic enlargement", "", "", "20.12"]
    assert lines[3][:2] == ["[teacher](../configs/teacher/fashion_sr.yaml)", "20"]
    assert lines[3][-1] == "100"
    assert [line[2] for line in lines[4:]] == ["0", "1"]
    assert "5,000 test pictures of Fashion-MNIST, 8x8 to 32x32" in text
    record(tmp_path, lpips=0.1234)
    assert "| LPIPS |" in make_tables.super_resolution()
    assert "| 0.123 |" in make_tables.super_resolution()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*eval mode")
def test_everything_is_trained_measured_and_drawn(tmp_path, monkeypatch):
    write_fashion(tmp_path)
    monkeypatch.setenv(DATA_VARIABLE, "nowhere")
    words = ["--data", str(tmp_path), "--runs", str(tmp_path / "runs"), "--smoke"]
    figures = super_resolution.main(words)
    rows = [(row["who"], row["nfe"], row["realism"]) for row in figures["rows"]]
    assert rows[:4] == [("real", 0, None), ("bicubic", 0, None), ("teacher", 2, None), ("teacher", 1, None)]
    assert rows[4:6] == [("teacher from low", 2, None), ("teacher from low", 1, None)]
    assert rows[6:11] == [("OFTSR", 1, realism) for realism in super_resolution.REALISM]
    assert rows[11:16] == [("OFTSR from low", 1, realism) for realism in super_resolution.REALISM]
    assert rows[16:] == [("TADSR", 1, None), ("YONOS", 1, None), ("CTMSR", 1, None)]
    assert all(math.isfinite(row["fd_cnn"]) and row["lpips"] is None for row in figures["rows"])
    assert {done["updates"] for done in figures["training"].values()} == {2}
    assert all(done["cpu_seconds"] > 0 for done in figures["training"].values())
    assert (tmp_path / "runs" / "super_resolution.png").stat().st_size > 1000
    written = json.loads((tmp_path / "runs" / "results" / "latest" / "super_resolution.json").read_text())
    assert written["rows"] == figures["rows"]
    monkeypatch.setattr(make_tables, "LATEST", tmp_path / "runs" / "results" / "latest")
    assert len(re.findall(r"^\| ", make_tables.super_resolution(), re.M)) == len(rows) + 1
    monkeypatch.setattr(super_resolution, "fit", lambda words: pytest.fail(f"trained {words}"))
    again = super_resolution.main(words)
    assert [row["psnr"] for row in again["rows"]] == [row["psnr"] for row in figures["rows"]]
