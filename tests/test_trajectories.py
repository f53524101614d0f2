"""Teacher trajectories: the records, and the command that writes them."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from lightning_distill.checkpoints import fingerprint
from lightning_distill.cli import main
from lightning_distill.commands.trajectories import teacher_spec
from lightning_distill.data.store import Store, StoreWriter
from lightning_distill.generation import default_cond, generate
from lightning_distill.guidance import guided
from lightning_distill.methods import DMD2
from lightning_distill.networks.analytic import GaussianMixture, analytic_denoiser, gaussian_flow_map, ring4
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.guidance_adapters import GuidanceAdapters
from lightning_distill.networks.merging import merged_network
from lightning_distill.networks.roles import with_network
from lightning_distill.networks.run_denoiser import RunDenoiser
from lightning_distill.networks.specs import PretrainedDenoiser, ZooDenoiser
from lightning_distill.prediction import Prediction
from lightning_distill.processes import EDM, FlowMatching, VariancePreserving
from lightning_distill.samplers import simulate
from lightning_distill.times import few_step_times
from lightning_distill.trajectories import (
    Recipe,
    describe_denoiser,
    describe_process,
    point_indices,
    record_noise,
    run_solver,
    trajectory_key,
    trajectory_records,
)


@pytest.fixture(scope="module")
def digits():
    return ZooDenoiser("digits").build().requires_grad_(False).eval()


def recipe(teacher, records="pairs", steps=6, **settings):
    settings = {"points": 0 if records == "pairs" else 3, "dtype": "float32", **settings}
    return Recipe(records, tuple(few_step_times(teacher.process, steps)), **settings)


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in Path(folder).iterdir()}


# --------------------------------------------------------------------------------------------- the solver
@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("solver", ["ode", "heun", "dpmpp_2m"])
def test_the_end_points_are_those_of_generate_to_the_bit(digits, solver, scale):
    made = trajectory_records(
        digits, recipe(digits, "points", solver=solver, guidance=(scale, scale)), 16, 12, digits.sample_shape
    )
    cond = default_cond(digits, 12, 16)
    noise = record_noise(0, 16, 12, digits.sample_shape)
    times = few_step_times(digits.process, 6)
    want = generate(digits, noise, cond, times, solver, guidance_scale=scale)
    assert torch.equal(made["x0"], want)
    assert torch.equal(made["noise"], noise)
    assert torch.equal(made["class_labels"], cond["class_labels"])
    other = generate(digits, noise, cond, times, solver, guidance_scale=scale + 0.5)
    assert not torch.equal(made["x0"], other)


def test_the_states_of_euler_are_those_of_the_training_rollout_to_the_bit(digits):
    made = trajectory_records(digits, recipe(digits, "points", solver="euler"), 0, 5, digits.sample_shape)
    times, cond = few_step_times(digits.process, 6), default_cond(digits, 5)

    def denoise(x, t):
        return digits(x, t.expand(len(x)), cond)

    with torch.no_grad():
        for k, index in enumerate((0, 2, 4)):
            start = digits.process.prior(made["noise"], times[0])
            want = simulate(denoise, start, times, digits.process, index, "ode")
            assert torch.equal(made["states"][:, k], want)


@pytest.mark.parametrize("process", [FlowMatching(), VariancePreserving(zero_terminal_snr=True), EDM()])
@pytest.mark.parametrize(
    ("solver", "steps", "error"), [("ode", 400, 2e-2), ("heun", 100, 2e-3), ("dpmpp_2m", 100, 1e-2)]
)
def test_states_lie_on_the_exact_trajectory_of_a_gaussian(process, solver, steps, error):
    """x_t = T_t(x_T) of N(1, .7^2) in closed form, at every kept time and at the end."""
    teacher = analytic_denoiser(GaussianMixture([[1.0, -0.5]], std=0.7), process)
    times, keep = few_step_times(process, steps), point_indices(steps, 4)
    noise = torch.randn(64, 2, dtype=torch.float64)
    run = run_solver(teacher, noise, {}, times, solver, keep=keep)
    start = process.prior(noise, times[0])
    mean, cov = torch.tensor([1.0, -0.5], dtype=torch.float64), 0.49 * torch.eye(2, dtype=torch.float64)
    for k, index in enumerate(keep):
        t, r = (torch.full((64,), times[i], dtype=torch.float64) for i in (0, index))
        want = gaussian_flow_map(mean, cov, start, t, r, process)
        sigma = float((process.alpha(r[:1]) ** 2 * 0.49 + process.sigma(r[:1]) ** 2).sqrt())
        assert (run.states[:, k] - want).abs().max() < error * sigma, times[index]
        prediction = teacher(want, r, {}).flow_prediction
        assert (run.guided[:, k] - prediction).abs().max() < 10 * error
    end = gaussian_flow_map(mean, cov, start, t * 0 + times[0], t * 0, process)
    assert (run.x0 - end).abs().max() < 0.03  # the last step, to 0, is first order in all of them


def test_kept_states_do_not_change_the_run(digits):
    noise, times = record_noise(0, 0, 4, digits.sample_shape), few_step_times(digits.process, 5)
    for solver in ("heun", "dpmpp_2m"):
        runs = [run_solver(digits, noise, default_cond(digits, 4), times, solver, keep=keep) for keep in ((), (0, 3))]
        assert torch.equal(runs[0].x0, runs[1].x0)
        assert runs[0].states.shape[1] == 0
        assert runs[1].states.shape == (4, 2, *digits.sample_shape)


def test_points_are_the_input_times_of_a_student():
    assert point_indices(8, 8) == list(range(8))
    assert point_indices(50, 4) == [0, 12, 25, 37]
    for process in (FlowMatching(), FlowMatching(3.0), VariancePreserving()):
        grid = few_step_times(process, 48)
        for k in (1, 2, 4, 8):
            assert [grid[i] for i in point_indices(48, k)] == pytest.approx(few_step_times(process, k), abs=1e-12)


# -------------------------------------------------------------------------------------------- the records
def test_a_record_depends_on_its_index_alone():
    whole = record_noise(3, 0, 40, (2, 3))
    assert torch.equal(record_noise(3, 5, 20, (2, 3)), whole[5:25])
    assert not torch.equal(record_noise(4, 0, 40, (2, 3)), whole)
    teacher = analytic_denoiser(ring4(labelled=True), FlowMatching())
    how = recipe(teacher, "guided", guidance=(1.0, 5.0))
    whole = trajectory_records(teacher, how, 0, 40, (2,))
    part = trajectory_records(teacher, how, 21, 9, (2,))
    assert torch.equal(part["scale"], whole["scale"][21:30])
    for name, values in part.items():
        torch.testing.assert_close(values, whole[name][21:30], rtol=1e-4, atol=1e-4)


def test_half_precision_pairs_start_from_the_noise_that_is_stored(digits):
    made = trajectory_records(digits, recipe(digits, dtype="float16"), 0, 8, digits.sample_shape)
    assert {k: v.dtype for k, v in made.items()} == {
        "noise": torch.float16,
        "x0": torch.float16,
        "class_labels": torch.int64,
    }
    times = few_step_times(digits.process, 6)
    want = generate(digits, made["noise"].float(), default_cond(digits, 8), times, "dpmpp_2m")
    assert torch.equal(made["x0"], want.half())


def test_guidance_of_an_interval_is_none_outside(digits):
    cond = default_cond(digits, 4)
    times = few_step_times(digits.process, 4)  # 1, .75, .5, .25
    noise = torch.randn(4, 1, 8, 8)
    run = run_solver(digits, noise, cond, times, "euler", guidance_scale=4.0, interval=(0.4, 0.8), keep=range(4))
    for k, t in enumerate(times):
        w = 4.0 if 0.4 <= t <= 0.8 else 1.0
        at = torch.full((4,), t, dtype=torch.float64)
        want = guided(digits, run.states[:, k], at, cond, w).flow_prediction
        torch.testing.assert_close(run.guided[:, k], want, rtol=1e-5, atol=1e-5)
    plain = recipe(digits)
    assert "interval" not in trajectory_key(digits, plain, (1, 8, 8), "classes")  # keys of older stores stay
    assert trajectory_key(digits, replace(plain, interval=(0.4, 0.8)), (1, 8, 8), "classes")["interval"] == [0.4, 0.8]


def test_guided_records_hold_both_branches_of_the_guidance(digits):
    """From guided g and conditional c with scale w the unconditional prediction follows: (g - w c) / (1 - w)."""
    how = recipe(digits, "guided", guidance=(1.5, 6.0))
    made = trajectory_records(digits, how, 0, 20, digits.sample_shape)
    assert made["scale"].shape == (20,)
    assert made["scale"].min() >= 1.5
    assert made["scale"].max() <= 6.0
    assert made["scale"].std() > 0.5
    w = made["scale"].view(-1, 1, 1, 1)
    for k, index in enumerate((0, 2, 4)):
        x, t = made["states"][:, k], torch.full((20,), how.times[index], dtype=torch.float64)
        cond = {"class_labels": made["class_labels"]}
        with torch.no_grad():
            conditional = digits(x, t, cond).flow_prediction
            unconditional = digits(x, t, digits.null_cond(cond)).flow_prediction
        torch.testing.assert_close(made["unguided"][:, k], conditional, rtol=1e-4, atol=1e-4)
        inferred = (made["guided"][:, k] - w * made["unguided"][:, k]) / (1 - w)
        torch.testing.assert_close(inferred, unconditional, rtol=1e-2, atol=1e-2)
        stored = Prediction(made["guided"][:, k], x, t, digits.process, "flow_prediction")
        with torch.no_grad():
            torch.testing.assert_close(stored.x0, guided(digits, x, t, cond, made["scale"]).x0, rtol=1e-4, atol=1e-4)


def test_bad_recipes_and_bad_teachers(digits):
    for change, message in (
        ({"records": "triples"}, "records='triples' is unknown"),
        ({"solver": "renoise"}, "solver='renoise' is unknown; choose one of ode, euler"),
        ({"dtype": "int8"}, "dtype='int8' is unknown"),
        ({"points": 3}, "points=3 of pairs"),
        ({"records": "points", "points": 7}, "points=7 of points with 6 solver steps"),
        ({"guidance": (3.0, 2.0)}, r"guidance=\(3.0, 2.0\)"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(recipe(digits), **change)
    broken = Denoiser(torch.nn.Flatten(0, 0), FlowMatching(), "sample")
    broken.network.forward = lambda x, t: x * torch.tensor([1.0, float("nan")]).repeat(8)[:, None]
    with pytest.raises(ValueError, match="8 of the records 0 to 15 have NaN or inf in x0; check the teacher"):
        trajectory_records(broken, recipe(broken), 0, 16, (2,))


def test_the_key_names_everything(digits):
    base = trajectory_key(digits, recipe(digits), (1, 8, 8), "classes")
    module = DMD2(ZooDenoiser("digits"))
    module.configure_model()
    assert base["teacher"] == module.teacher_fingerprint()
    assert base["teacher"] == fingerprint(digits.network.state_dict().values())
    for change in (
        {"steps": 7},
        {"solver": "heun"},
        {"guidance": (2.0, 2.0)},
        {"seed": 1},
        {"dtype": "float16"},
        {"bf16": True},
        {"records": "points"},
    ):
        assert trajectory_key(digits, recipe(digits, **change), (1, 8, 8), "classes") != base
    assert describe_process(FlowMatching(3.0)) == describe_process(FlowMatching()) == {"name": "FlowMatching"}
    assert describe_process(VariancePreserving()) != describe_process(VariancePreserving(zero_terminal_snr=True))


class Shifted(torch.nn.Module):
    """The weight of every teacher below is the same."""

    shape = (2,)

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x, t, y, guidance=None):
        return self.weight * x + y * (1.0 if guidance is None else guidance[:, None])


def shifted(process=None, kind="sample", null=0.0, **settings):
    null_cond = {"y": torch.full((1, 2), null)}
    return Denoiser(Shifted(), process or FlowMatching(), kind, null_cond=null_cond, **settings).requires_grad_(False)


def table(power):
    return VariancePreserving.from_alphas_cumprod(torch.linspace(0.999, 0.01, 1000, dtype=torch.float64) ** power)


INSIDE = {"network_process": VariancePreserving(), "data_scale": 1.0}
Y = {"names": ["y"]}


@pytest.mark.parametrize(
    ("one", "other", "scale", "entry"),
    [
        ({}, {"kind": "flow_prediction"}, 1.0, "denoiser.prediction_type"),
        ({}, INSIDE, 1.0, "denoiser.process."),
        ({"process": table(1)}, {"process": table(3)}, 1.0, "denoiser.process.angles"),
        (INSIDE, {**INSIDE, "data_scale": 0.5}, 1.0, "denoiser.data_scale"),
        ({}, {"null": 0.3}, 3.0, "denoiser.null.y"),
        ({"guidance": 2.0}, {"guidance": 3.0}, 1.0, "denoiser.told"),
    ],
    ids=["type", "process", "table", "scale", "null", "told"],
)
def test_the_key_names_how_the_network_is_read(tmp_path, one, other, scale, entry):
    """With the same weights the records differ, and a store of the one is not continued with the other."""
    teachers = [shifted(**settings) for settings in (one, other)]
    how = Recipe("pairs", (0.9, 0.6, 0.3), "ode", (scale, scale), dtype="float32")
    cond = {"y": torch.ones(4, 2)}
    made = [trajectory_records(teacher, how, 0, 4, (2,), cond)["x0"] for teacher in teachers]
    assert (made[0] - made[1]).abs().max() > 0.05
    keys = [trajectory_key(teacher, how, (2,), Y) for teacher in teachers]
    assert keys[0]["teacher"] == keys[1]["teacher"]
    StoreWriter(tmp_path / "s", keys[0], 8)
    with pytest.raises(ValueError, match=f"holds a store with {entry}"):
        StoreWriter(tmp_path / "s", keys[1], 8)


def test_the_key_leaves_out_what_records_do_not_depend_on():
    def facts(scale, interval=None, **settings):
        return describe_denoiser(shifted(**settings), (scale, scale), interval, Y)

    assert facts(1.0, null=0.3) == facts(1.0)  # without guidance nothing reads the null
    assert facts(3.0, guidance=2.0) == facts(3.0, guidance=1.0)  # it is told 3 at all times
    assert facts(3.0, (0.2, 0.6), guidance=2.0) != facts(3.0, (0.2, 0.6), guidance=1.0)
    assert facts(1.0, process=VariancePreserving()) == facts(1.0, **INSIDE)  # the same network, seen from two processes


def test_guided_teachers_are_told_apart_by_their_adapters(digits):
    def teacher(seed):
        made = GuidanceAdapters("additive", width=8).build(digits)
        made.family = replace(made.family, guidance_scale=1.0)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(torch.randn_like(parameter))
        return with_network(made, merged_network(made)).requires_grad_(False).eval()

    teachers, how = [teacher(1), teacher(2)], recipe(digits, guidance=(3.0, 3.0))
    made = [trajectory_records(t, how, 0, 2, (1, 8, 8))["x0"] for t in teachers]
    keys = [trajectory_key(t, how, (1, 8, 8), "classes") for t in teachers]
    assert (made[0] - made[1]).abs().max() > 0.1
    assert keys[0] != keys[1]
    module = DMD2(teachers[0])
    module.configure_model()
    assert module.teacher_fingerprint() == keys[0]["teacher"] != keys[1]["teacher"]


# -------------------------------------------------------------------------------------------- the command
ARGUMENTS = ["--teacher", "digits", "--num", "70", "--steps", "4", "--shard-size", "16", "--batch-size", "6"]
ANALYTIC = "{class_path: AnalyticTeacher, init_args: {problem: NAME, process: FlowMatching}}"
POINTS = ["--records", "points", "--points", "2", "--guidance", "2"]


def command(folder, *more):
    return main(["trajectories", *ARGUMENTS, "--out", str(folder), *more])


def test_the_command_writes_what_the_functions_make(tmp_path, capsys, digits):
    assert command(tmp_path / "s", *POINTS) == 0
    assert "70/70 records" in capsys.readouterr().out
    store = Store(tmp_path / "s")
    assert len(store) == 70
    assert store.names == ["class_labels", "noise", "states", "x0"]
    how = recipe(digits, "points", 4, points=2, guidance=(2.0, 2.0), dtype="float16")
    assert store.key == {
        **trajectory_key(digits, how, (1, 8, 8), "classes"),
        "guidance": [2.0, 2.0],
        "shape": [1, 8, 8],
    }
    want = trajectory_records(digits, how, 0, 6, (1, 8, 8))
    found = store.gather(range(6))
    assert all(torch.equal(found[name], values) for name, values in want.items())
    assert store.gather([69])["class_labels"].tolist() == [9]
    before = digests(tmp_path / "s")
    assert command(tmp_path / "s", *POINTS) == 0
    assert "70 of 70 records are there already" in capsys.readouterr().out
    assert digests(tmp_path / "s") == before


def test_an_interrupted_command_goes_on_to_the_same_bytes(tmp_path, monkeypatch, capsys):
    assert command(tmp_path / "whole") == 0
    written = []
    real = StoreWriter.write

    def write(self, shard, *arguments):
        if len(written) % 2:
            written.append(-1)
            raise KeyboardInterrupt
        written.append(shard)
        real(self, shard, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "write", write)
        assert command(tmp_path / "parts") == 130
        assert command(tmp_path / "parts") == 130
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) == 2
    assert "32 of 70 records" not in capsys.readouterr().out
    assert command(tmp_path / "parts") == 0
    assert "32 of 70 records are there already" in capsys.readouterr().out
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")


def test_damaged_shards_are_named_and_made_again(tmp_path, capsys):
    assert command(tmp_path / "s") == 0
    before = digests(tmp_path / "s")
    flipped, cut, gone = (tmp_path / "s" / f"shard_00000{i}.safetensors" for i in (0, 2, 3))
    data = flipped.read_bytes()
    flipped.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    cut.write_bytes(cut.read_bytes()[:-7])
    gone.unlink()
    capsys.readouterr()
    assert command(tmp_path / "s") == 0
    shown = capsys.readouterr()
    assert "22 of 70 records are there already" in shown.out
    lines = shown.err.splitlines()
    assert lines[0] == f"{flipped} does not match its checksum; made again"
    assert lines[1].startswith(f"{cut} has ")
    assert lines[2] == f"{gone} is missing; made again"
    assert len(lines) == 3
    assert digests(tmp_path / "s") == before


def test_damaged_conditions_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LIGHTNING_DISTILL_CACHE", str(tmp_path / "user"))
    StoreWriter(tmp_path / "cache", {}, 3).write(0, {"class_labels": torch.tensor([7, 1, 4])})
    file = tmp_path / "cache" / "shard_000000.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-8] + b"\5" + data[-7:])
    assert command(tmp_path / "s", "--cond", str(tmp_path / "cache")) == 2
    shown = capsys.readouterr().err
    assert f"{file} does not match its checksum; run the command that wrote the store" in shown
    assert "leave the comparison out with --no-verify" in shown
    assert not (tmp_path / "s").exists()
    assert command(tmp_path / "s", "--cond", str(tmp_path / "cache"), "--no-verify") == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num", "0"], "--num 0: give 1 or more"),
        (["--workers", "0"], "--workers 0: give 1 or more"),
        (["--guidance", "1", "2", "3"], "give one scale, or the smallest and the largest"),
        (["--points", "2"], "points=2 of pairs"),
        (["--device", "cuda:99"], "--device cuda:99: there is no such device"),
        (["--teacher", "nowhere"], "'nowhere') is not a folder"),
        (["--solver", "renoise"], "invalid choice: 'renoise'"),
        (["--cond", "nowhere"], "nowhere is not a store"),
        (["--shape", "3", "4"], "takes samples of shape (1, 8, 8), got a batch (1, 3, 4)"),
        (["--teacher", ANALYTIC.replace("NAME", "ring4"), "--guidance", "2"], "guidance_scale=2.0 needs conditions"),
        (["--teacher", ANALYTIC.replace("NAME", "nothing")], "'nothing') is unknown"),
    ],
)
def test_bad_arguments_are_one_sentence_and_leave_nothing(tmp_path, capsys, words, message):
    assert command(tmp_path / "s", *words) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "s").exists()


def test_another_setting_in_the_same_folder_is_refused(tmp_path, capsys):
    assert command(tmp_path / "s") == 0
    for words, message in ((["--seed", "1"], "seed=0, not 1"), (["--num", "71"], "num_records=70, not 71")):
        assert command(tmp_path / "s", *words) == 2
        assert message in capsys.readouterr().err


def test_another_teacher_is_refused_by_the_beginnings_of_both_digests(tmp_path, capsys):
    assert command(tmp_path / "s") == 0
    header = tmp_path / "s" / "store.json"
    content = json.loads(header.read_text())
    teacher = content["key"]["teacher"]
    content["key"]["teacher"] = 32 * "ab"
    header.write_text(json.dumps(content))
    assert command(tmp_path / "s") == 2
    assert f"holds a store with teacher=sha256 {6 * 'ab'}, not sha256 {teacher[:12]};" in capsys.readouterr().err


def test_a_store_that_an_earlier_version_began_is_finished(tmp_path, capsys):
    assert command(tmp_path / "s") == 0
    before = digests(tmp_path / "s")
    header = tmp_path / "s" / "store.json"
    content = json.loads(header.read_text())
    del content["key"]["denoiser"]
    header.write_text(json.dumps(content))
    before["store.json"] = hashlib.sha256(header.read_bytes()).hexdigest()
    (tmp_path / "s" / "shard_000001.json").unlink()
    capsys.readouterr()
    assert command(tmp_path / "s") == 0
    assert "was begun by an earlier version" in capsys.readouterr().err
    assert digests(tmp_path / "s") == before


def test_teachers_by_name_folder_run_and_text(tmp_path):
    assert isinstance(teacher_spec("digits"), ZooDenoiser)
    run = tmp_path / "run" / "version_0"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("model: {}\n")
    assert isinstance(teacher_spec(str(tmp_path / "run")), RunDenoiser)
    assert isinstance(teacher_spec(str(tmp_path)), PretrainedDenoiser)
    content = {"class_path": "ZooDenoiser", "init_args": {"name": "digits", "method_process": "EDM"}}
    (tmp_path / "teacher.yaml").write_text(yaml.safe_dump(content))
    for text in (str(tmp_path / "teacher.yaml"), yaml.safe_dump(content, default_flow_style=True)):
        spec = teacher_spec(text)
        assert isinstance(spec, ZooDenoiser)
        assert isinstance(spec.method_process, EDM)


def test_a_run_is_a_teacher(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = {"class_path": "ResidualMLP", "init_args": {"shape": [2], "width": 8, "depth": 1}}
    new = {"network": network, "process": "FlowMatching", "prediction_type": "flow_prediction"}
    spec = {"class_path": "NewDenoiser", "init_args": new}
    config = {
        "seed_everything": 0,
        "trainer": {"max_steps": 2, "accelerator": "cpu", "enable_progress_bar": False},
        "model": {"class_path": "TeacherTraining", "init_args": {"network": spec, "check_data": False}},
        "data": {"class_path": "Toy2D", "init_args": {"batch_size": 4}},
    }
    Path("toy.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "-c", "toy.yaml"]) == 0
    assert main(["trajectories", "--teacher", "runs/toy", "--num", "4", "--steps", "2", "--out", "s"]) == 0
    key = Store("s").key
    assert (key["shape"], key["cond"], key["num_classes"]) == ([2], "none", None)
    module = DMD2(RunDenoiser("runs/toy"))
    module.configure_model()
    assert key["teacher"] == module.teacher_fingerprint()


def test_conditions_come_from_a_store_by_index(tmp_path):
    """Class labels stand for embeddings: a store of three rows for seven trajectories."""
    cache = StoreWriter(tmp_path / "cache", {"kind": "cache", "prompts": "abc"}, 3)
    labels = torch.tensor([7, 1, 4])
    cache.write(0, {"class_labels": labels, "latents": torch.zeros(3, 2)})
    words = ["trajectories", "--teacher", "digits", "--steps", "3", "--num", "7", "--dtype", "float32"]
    assert main([*words, "--cond", str(tmp_path / "cache"), "--out", str(tmp_path / "s")]) == 0
    store = Store(tmp_path / "s")
    assert store.names == ["noise", "x0"]
    assert store.key["cond"]["names"] == ["class_labels"]
    assert store.key["cond"]["records"] == 3
    digits = ZooDenoiser("digits").build()
    noise, cond = record_noise(0, 0, 7, (1, 8, 8)), {"class_labels": labels[torch.arange(7) % 3]}
    want = generate(digits, noise, cond, few_step_times(digits.process, 3), "dpmpp_2m")
    assert torch.equal(store.gather(range(7))["x0"], want)


def _start(folder, *more):
    words = [sys.executable, "-m", "lightning_distill", "trajectories", *ARGUMENTS[:2], "--out", str(folder), *more]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


@pytest.mark.slow
@pytest.mark.distributed
def test_the_command_survives_kill_9_and_shares_its_work(tmp_path):
    """Killed five times, once with its two processes at work, and finished by two commands at once: the same bytes."""
    work = ["--num", "3000", "--steps", "30", "--shard-size", "64", "--batch-size", "16"]
    assert main(["trajectories", *ARGUMENTS[:2], "--out", str(tmp_path / "calm"), *work]) == 0
    chance = random.Random(1)
    for life in range(5):
        known = {lock.read_text() for lock in (tmp_path / "killed").glob("shard*.lock")}
        process = _start(tmp_path / "killed", *work, "--workers", "2" if life == 4 else "1")
        for _ in range(1200):  # until it works: of the killed ones' locks, it takes over the first
            with suppress(FileNotFoundError):
                if {lock.read_text() for lock in (tmp_path / "killed").glob("shard*.lock")} - known:
                    break
            time.sleep(0.05)
        time.sleep(chance.uniform(0.0, 0.7))
        os.kill(process.pid, signal.SIGKILL)  # its children leave by themselves
        process.wait()
    time.sleep(1.0)
    left = StoreWriter(tmp_path / "killed", Store(tmp_path / "calm").key, 3000, 64).missing()
    assert 0 < len(left) < 47
    both = [_start(tmp_path / "killed", *work) for _ in range(2)]
    assert [process.wait(300) for process in both] == [0, 0]
    assert digests(tmp_path / "killed") == digests(tmp_path / "calm")


@pytest.mark.slow
@pytest.mark.distributed
def test_a_process_that_fails_says_why(tmp_path, capsys, monkeypatch):
    assert command(tmp_path / "alone") == 0
    assert command(tmp_path / "both", "--workers", "2") == 0
    assert digests(tmp_path / "both") == digests(tmp_path / "alone")
    run = tmp_path / "teacher.yaml"
    run.write_text("{class_path: ZooDenoiser, init_args: {name: digits}}")
    capsys.readouterr()
    from lightning_distill.commands import trajectories

    real = trajectories._make_in_processes

    def vanish(*arguments):
        run.write_text("{class_path: ZooDenoiser, init_args: {name: gone}}")
        real(*arguments)

    monkeypatch.setattr(trajectories, "_make_in_processes", vanish)
    assert command(tmp_path / "lost", "--workers", "2", "--teacher", str(run)) == 2
    assert "the zoo has no entry 'gone'" in capsys.readouterr().err
