"""Wrong settings and broken files through the real command line: one sentence, exit status 2, nothing damaged."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import lightning.pytorch  # noqa: F401  (its log handler keeps the stream it finds: not one of a single test)
import pytest
import torch
import yaml
from safetensors.torch import save_file

from lightning_distill.cli import main
from lightning_distill.commands.errors import _choices
from lightning_distill.networks.small import small_unet
from lightning_distill.zoo import zoo_path


def spec(class_path, /, **arguments):
    return {"class_path": class_path, "init_args": arguments}


def network(shape=(2,), **arguments):
    """A tiny student of ring4."""
    new = {
        "network": spec("ResidualMLP", shape=list(shape), width=8, depth=1),
        "process": spec("FlowMatching"),
        "prediction_type": "flow_prediction",
        "sigma_data": 1.12,
        **arguments,
    }
    return spec("Explicit", spec=spec("NewDenoiser", **new))


def settings(changes=None):
    """A run of two updates that works, with dotted keys changed."""
    config = {
        "seed_everything": 0,
        "trainer": {
            "max_steps": 2,
            "accelerator": "cpu",
            "log_every_n_steps": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "model": spec(
            "DMD2",
            teacher=spec("AnalyticTeacher", problem="ring4", process=spec("FlowMatching")),
            student=network(),
            fake_score=network(),
            fake_score_steps=1,
            shape=[2],
        ),
        "data": spec("Toy2D", name="ring4", batch_size=8, samples_per_epoch=64),
    }
    for key, value in (changes or {}).items():
        *parents, last = key.split(".")
        place = config
        for parent in parents:
            place = place[parent]
        place[last] = value
    return config


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a configuration into the (current) temporary folder and returns its name."""
    monkeypatch.chdir(tmp_path)
    for name in ("LIGHTNING_DISTILL_DATA", "LIGHTNING_DISTILL_WEIGHTS", "LIGHTNING_DISTILL_DEBUG"):
        monkeypatch.delenv(name, raising=False)

    def write(changes=None):
        Path("run.yaml").write_text(yaml.safe_dump(settings(changes)))
        return "run.yaml"

    return write


@pytest.fixture
def refused(write, capfd):
    """Runs a command that must fail with one sentence that mentions the given words."""

    def check(words, *mentioned):
        capfd.readouterr()
        status = main(words)
        lines = capfd.readouterr().err.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        assert status == 2, lines
        assert len(errors) == 1, lines
        assert lines[-1] == errors[0]
        assert not any("Traceback" in line for line in lines), "\n".join(lines)
        assert "--debug" not in errors[0], "an error that nobody foresaw"
        for words_of_sentence in mentioned:
            assert words_of_sentence in errors[0]
        assert len(errors[0]) < 600
        return errors[0]

    return check


MODEL = "model.init_args"
FIT = ["fit", "-c", "run.yaml"]

CONFIGURATIONS = {
    # names and keys
    "unknown_method": ({"model.class_path": "DMD3"}, ["model:", "'DMD3'", "did you mean DMD"]),
    "not_a_method": ({"model": spec("torch.nn.Linear", in_features=1, out_features=1)}, ["model:", "torch.nn.Linear"]),
    "unknown_argument": ({f"{MODEL}.num_stepss": 3}, ["model.init_args.num_stepss", "DMD2", "did you mean num_steps"]),
    "unknown_nested_argument": (
        {f"{MODEL}.guidance": spec("Guidance", scal=2.0)},
        [f"{MODEL}.guidance", "'scal'", "scale"],
    ),
    "argument_of_a_parent": (
        {"model": spec("TSCD", teacher=spec("ZooDenoiser", name="digits"), num_steps=2)},
        [f"{MODEL}.num_steps: TSCD sets 'num_steps' itself; leave it out"],
    ),
    "a_base_of_methods": (
        {"model.class_path": "FakeScoreMethod", f"{MODEL}.fake_score_steps": 1},
        ["FakeScoreMethod has no student_loss"],
    ),
    "a_choice": (
        {"trainer.callbacks": [spec("CollapseAlarm", action="explode")]},
        ["trainer.callbacks", "action: choose one of warn, stop, rollback"],
    ),
    "two_evaluations": (
        {"trainer.callbacks": [spec("GenerativeEvaluation", steps=[1]), spec("GenerativeEvaluation", steps=[4])]},
        ["several GenerativeEvaluation", "steps: [1, 4]"],
    ),
    "unknown_part": ({f"{MODEL}.guidance": spec("Guidanc")}, [f"{MODEL}.guidance", "'Guidanc'", "Guidance"]),
    "unknown_teacher": ({f"{MODEL}.teacher": spec("ZooDenoizer", name="digits")}, [f"{MODEL}.teacher", "ZooDenoiser"]),
    "unknown_data": ({"data": spec("Toy2")}, ["data:", "'Toy2'", "Toy2D"]),
    "unknown_trainer_option": ({"trainer.max_stepss": 3}, ["trainer.max_stepss", "trainer.max_steps"]),
    "wrong_type": ({f"{MODEL}.num_steps": "many"}, [f"{MODEL}.num_steps", "expected int", "many"]),
    "missing_reference": ({f"{MODEL}.seed": "${data.init_args.sed}"}, ["data.init_args.sed", f"{MODEL}.seed"]),
    # numbers
    "no_steps": ({f"{MODEL}.num_steps": -1}, ["num_steps=-1", "at least one step"]),
    "steps_and_times": (
        {f"{MODEL}.num_steps": 3, f"{MODEL}.student_times": [1.0, 0.5]},
        ["num_steps=3", "2 student_times", "leave num_steps out"],
    ),
    "unknown_precision": ({"trainer.precision": "fp8"}, ["trainer.precision: choose one of 64, 32", "bf16-mixed"]),
    "half_precision_weights": ({"trainer.precision": "16-true"}, ["precision=16-true", "bf16-mixed"]),
    "bfloat16_weights": ({"trainer.precision": "bf16-true"}, ["precision=bf16-true", "bf16-mixed", "dtype: bfloat16"]),
    "negative_updates": ({"trainer.max_steps": -5}, ["max_steps", "-5"]),
    "empty_batch": ({"data.init_args.batch_size": 0}, ["batch_size=0"]),
    "indivisible_batch": ({f"{MODEL}.accumulate_grad_batches": 3}, ["8 samples", "3 micro-batches", "multiple of 3"]),
    "impossible_decay": ({f"{MODEL}.ema": [spec("ConstantEMA", decay=1.5)]}, ["decay=1.5", "between 0 and 1"]),
    "endless_decay": (
        {f"{MODEL}.student_scheduler": spec("WarmupDecay", decay="linear")},
        ["total_steps", "max_steps"],
    ),
    "waiting_schedule": (
        {f"{MODEL}.student_scheduler": spec("lightning.pytorch.cli.ReduceLROnPlateau", monitor="train/student/total")},
        ["student_scheduler", "ReduceLROnPlateau", "WarmupDecay"],
    ),
    "repeated_losses": (
        {f"{MODEL}.student_optimizer": spec("torch.optim.LBFGS")},
        ["student_optimizer", "LBFGS computes the loss several times", "torch.optim.AdamW"],
    ),
    "unknown_loss_weight": ({f"{MODEL}.loss_weights": {"gan": 1.0}}, ["'gan'", "phase/term", "fake_score"]),
    # times
    "ascending_times": ({f"{MODEL}.student_times": [0.5, 1.0]}, ["[0.5, 1.0]", "fall strictly"]),
    "times_beyond_noise": ({f"{MODEL}.student_times": [1.5]}, ["1.5", "outside (0, 1]", "FlowMatching"]),
    "uncovered_times": ({f"{MODEL}.critic_times": spec("Uniform", low=0.5, high=1.0)}, ["does not cover", "low=0.5"]),
    # parts that do not fit
    "unknown_prediction": (
        {f"{MODEL}.student": network(prediction_type="velocity")},
        ["'velocity'", "flow_prediction"],
    ),
    "blind_prediction": ({f"{MODEL}.student": network(prediction_type="epsilon")}, ["epsilon", "alpha is 0"]),
    "contradicting_prediction": (
        {f"{MODEL}.teacher": spec("PretrainedDenoiser", path=str(zoo_path("digits")), prediction_type="epsilon")},
        ["prediction_type", "'epsilon'", "'flow_prediction'", "card.json"],
    ),
    "other_shape": ({f"{MODEL}.student": network(shape=(3,))}, ["student", "(3,)", "(2,)"]),
    "other_shape_than_network": (
        {f"{MODEL}.teacher": spec("ZooDenoiser", name="digits")},
        ["student", "(2,)", "teacher", "(1, 8, 8)"],
    ),
    "other_process": ({f"{MODEL}.student": network(process=spec("TrigFlow"))}, ["student", "TrigFlow", "FlowMatching"]),
    "guidance_without_null": ({f"{MODEL}.guidance": spec("Guidance", scale=2.0)}, ["guidance scale 2", "null_class"]),
    "copy_of_nothing": ({f"{MODEL}.student": spec("Copy")}, ["no parameters", "Explicit"]),
    "unknown_tap": ({f"{MODEL}.gan": spec("Adversary", taps=["mid_block"])}, ["'mid_block'", "blocks.0"]),
    "gan_without_data": (
        {f"{MODEL}.gan": spec("Adversary", taps=["blocks.0"]), "data": spec("Prior", batch_size=8)},
        ["GAN", "without x0"],
    ),
    "training_without_data": (
        {"model": spec("TeacherTraining", network=network()["init_args"]["spec"]), "data": spec("Prior", batch_size=8)},
        ["TeacherTraining needs data"],
    ),
    # files
    "unknown_zoo": ({f"{MODEL}.teacher": spec("ZooDenoiser", name="fashio")}, ["'fashio'", "digits", "fashion"]),
    "unknown_problem": (
        {f"{MODEL}.teacher": spec("AnalyticTeacher", problem="rings", process=spec("FlowMatching"))},
        ["'rings'", "ring4"],
    ),
    "missing_weights": (
        {f"{MODEL}.teacher": spec("PretrainedDenoiser", path="nowhere")},
        ["'nowhere'", "path", "LIGHTNING_DISTILL_WEIGHTS"],
    ),
    "no_network": (
        {f"{MODEL}.teacher": spec("PretrainedDenoiser", path="org/model", allow_download=True)},
        ["'org/model'", "Hugging Face", "local folder"],
    ),
    "missing_pictures": ({"data": spec("ImageFolder", root="nowhere")}, ["nowhere", "ImageFolder(root=...)"]),
    "no_pictures": ({"data": spec("ImageFolder", root=".")}, ["no pictures", ".png"]),
    "missing_data": ({"data": spec("FashionMNIST")}, ["FashionMNIST(root=...)", "LIGHTNING_DISTILL_DATA"]),
    "empty_data": ({"data": spec("FashionMNIST", root=".")}, ["train-images-idx3-ubyte", "LIGHTNING_DISTILL_DATA"]),
    "missing_pairs": ({"data": spec("Pairs", path="nowhere.safetensors")}, ["nowhere.safetensors", "Pairs(path=...)"]),
    "missing_start": ({f"{MODEL}.student": spec("FromCheckpoint", path="nowhere.ckpt")}, ["'nowhere.ckpt'"]),
    "missing_checkpoint": ({"ckpt_path": "nowhere.ckpt"}, ["ckpt_path=nowhere.ckpt", "last.ckpt"]),
}


def test_the_settings_work(write):
    assert main(["fit", "-c", write()]) == 0


@pytest.mark.sparse(3)
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configurations(refused, write, name):
    changes, mentioned = CONFIGURATIONS[name]
    write(changes)
    refused(FIT, *mentioned)


@pytest.mark.parametrize(
    ("words", "mentioned"),
    [
        (["fitt"], ["'fitt'", "fit", "sample"]),
        (["fit"], ["model", "-c CONFIG.yaml"]),
        (["fit", "-c", "nowhere.yaml"], ["nowhere.yaml"]),
        ([*FIT, "--model.init_args.num_step=2"], ["model.init_args.num_step", "num_steps"]),
        ([*FIT, "--trainer.maxsteps=2"], ["trainer.maxsteps", "trainer.max_steps"]),
        (["sample"], ["run_dir", "--help"]),
        (["sample", "nowhere"], ["nowhere is not a run folder", "config.yaml"]),
        (["sample", "nowhere", "--steps", "x"], ["--steps", "'x'"]),
        (["export", "nowhere", "out"], ["nowhere is not a run folder"]),
        (["methods", "--bogus"], ["--bogus"]),
        (["quickstart", "--teacher"], ["--teacher"]),
    ],
    ids=lambda value: "-".join(value[:3]).replace("/", "") if isinstance(value, list) else None,
)
def test_command_lines(refused, write, words, mentioned):
    write()
    refused(words, *mentioned)


def test_files_that_are_no_configuration(refused):
    Path("broken.yaml").write_text("trainer:\n  max_steps: [1\nmodel: x\n")
    refused(["fit", "-c", "broken.yaml"], "broken.yaml is not valid YAML", "line")
    Path("list.yaml").write_text("- a\n- b\n")
    refused(["fit", "-c", "list.yaml"], "list.yaml", "keys")
    Path("empty.yaml").write_text("# later\n")
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00")
    for command in ("fit", "plan"):
        refused([command, "-c", "broken.yaml"], "broken.yaml is not valid YAML", "line")
        refused([command, "-c", "empty.yaml"], "empty.yaml is empty")
        refused([command, "-c", "binary.yaml"], "binary.yaml is not a text file")


def test_weights_that_are_pickles_or_damaged(refused, write):
    folder = Path("model")
    small_unet(8, 1, 0, (8, 8), norm_num_groups=4, attention_head_dim=8).save_pretrained(folder)
    weights = folder / "diffusion_pytorch_model.safetensors"
    teacher = spec("PretrainedDenoiser", path="model", process=spec("FlowMatching"), prediction_type="flow_prediction")
    write({f"{MODEL}.teacher": teacher})
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused(FIT, str(weights), "damaged or incomplete")
    weights.unlink()
    refused(FIT, str(weights), "does not exist")
    torch.save({}, folder / "diffusion_pytorch_model.bin")
    refused(FIT, "diffusion_pytorch_model.bin", "pickle", "safetensors")
    (folder / "config.json").write_text('{"_class_name": "UNet9DModel"}')
    refused(FIT, "'UNet9DModel'", "diffusers")


def test_data_with_nan_or_another_scale(refused, write):
    x0 = torch.randn(32, 2)
    x0[3] = float("nan")
    save_file({"noise": torch.randn(32, 2), "x0": x0}, "pairs.safetensors")
    write({"data": spec("Pairs", path="pairs.safetensors", sigma_data=1.0)})
    refused(FIT, "pairs.safetensors", "1 of 32 samples of x0", "NaN")
    write({f"{MODEL}.student": network(sigma_data=0.2), f"{MODEL}.fake_score": network(sigma_data=0.2)})
    refused(FIT, "standard deviation", "sigma_data=0.2")


def test_pictures_that_cannot_be_read(refused, write):
    Path("pictures").mkdir()
    Path("pictures/one.png").write_bytes(b"not a picture")
    write({"data": spec("ImageFolder", root="pictures", size=8)})
    refused(FIT, "one.png", "cannot be read")


def test_an_exploding_run_stops(refused, write):
    exploding = spec("torch.optim.SGD", lr=1e30)
    write(
        {
            f"{MODEL}.student_optimizer": exploding,
            f"{MODEL}.fake_score_optimizer": exploding,
            f"{MODEL}.max_skipped_steps": 3,
            "trainer.max_steps": 100,
        }
    )
    refused(FIT, "not finite", "learning rate")


# ------------------------------------------------------------------------------------------------ runs and checkpoints
@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """The folder of a run of two updates, with its configuration and checkpoints."""
    folder = tmp_path_factory.mktemp("finished")
    config = settings()
    del config["trainer"]["logger"], config["trainer"]["enable_checkpointing"]
    config["trainer"]["logger"] = spec("lightning.pytorch.loggers.CSVLogger", save_dir=str(folder), name="run")
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "-c", str(folder / "run.yaml")]) == 0
    return folder / "run" / "version_0"


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy of the finished run that may be damaged."""
    return Path(shutil.copytree(finished_run, tmp_path / "earlier"))


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def damage(file, how):
    content = file.read_bytes()
    if how == "truncated":
        file.write_bytes(content[: len(content) * 6 // 10])
    elif how == "garbled":
        file.write_bytes(bytes(reversed(content)))
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "foreign":
        torch.save({"weight": torch.zeros(3)}, file)
    elif how == "headless":
        checkpoint = torch.load(file, weights_only=True)
        del checkpoint["lightning_distill"]
        torch.save(checkpoint, file)
    elif how == "code":
        torch.save({"state_dict": {}, "run": os.system}, file)


DAMAGES = {
    "truncated": ["cannot be read as a checkpoint"],
    "garbled": ["cannot be read as a checkpoint"],
    "empty": ["cannot be read as a checkpoint"],
    "foreign": ["no Lightning checkpoint", "'weight'"],
    "headless": ["not written by lightning_distill"],
    "code": ["cannot be read as a checkpoint"],
}


@pytest.mark.sparse(4, test=2)
@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_checkpoints(refused, write, run, how):
    file = run / "checkpoints" / "last.ckpt"
    damage(file, how)
    before = contents(run)
    write({"ckpt_path": str(file), "trainer.max_steps": 4})
    given = ["--checkpoint", str(file)]  # without it, the newest whole checkpoint is taken
    for words in (FIT, ["sample", str(run), *given], ["export", str(run), "out", *given]):
        refused(words, *DAMAGES[how])
    if how != "headless":  # weights alone are enough to start from
        write({f"{MODEL}.student": spec("FromCheckpoint", path=str(file), role="student")})
        refused(FIT, str(file))
    assert contents(run) == before
    assert not Path("out").exists()


@pytest.mark.long
def test_resuming_with_another_configuration(refused, write, run):
    resume = {"ckpt_path": str(run / "checkpoints" / "last.ckpt"), "trainer.max_steps": 4}
    before = contents(run)
    write({**resume, f"{MODEL}.teacher": spec("AnalyticTeacher", problem="ring", process=spec("FlowMatching"))})
    refused(FIT, "the teacher of this configuration", "sha256")
    write({**resume, "model": spec("TeacherTraining", network=network()["init_args"]["spec"])})
    refused(FIT, "written by DMD2", "TeacherTraining")
    write({**resume, f"{MODEL}.ema": []})
    refused(FIT, "does not fit this DMD2", "student_ema")
    write({**resume, f"{MODEL}.gan": spec("Adversary", taps=["blocks.0"])})
    refused(FIT, "does not fit this DMD2", "discriminator")
    write({**resume, f"{MODEL}.student": network(network=spec("ResidualMLP", shape=[2], width=9, depth=1))})
    refused(FIT, "does not fit this DMD2", "has shape")
    assert contents(run) == before


def test_a_run_is_not_written_over(refused, write, run):
    before = contents(run)
    logger = spec("lightning.pytorch.loggers.CSVLogger", save_dir=str(run.parent), name="", version=run.name)
    write({"trainer.logger": logger, "trainer.enable_checkpointing": True})
    refused(FIT, "holds the checkpoints of an earlier run", "--ckpt_path")
    assert contents(run) == before


@pytest.mark.parametrize(
    ("words", "mentioned"),
    [
        (["--weights", "teacher"], ["'teacher'", "student", "power_0_1"]),
        (["--n", "0"], ["--n 0"]),
        (["--steps", "0"], ["num_steps=0"]),
        (["--classes", "1"], ["no classes"]),
        (["--checkpoint", "nowhere.ckpt"], ["nowhere.ckpt", "last.ckpt"]),
        (["--out", "earlier/config.yaml"], ["earlier/config.yaml: File exists"]),
    ],
)
def test_sampling(refused, run, words, mentioned):
    before = contents(run)
    refused(["sample", str(run), *words], *mentioned)
    assert contents(run) == before


def test_a_checkpoint_of_another_run(refused, run):
    other = run.parent / "version_1"
    shutil.copytree(run, other)
    last = other / "checkpoints" / "last.ckpt"
    for command in (["sample", str(run)], ["evaluate", str(run), "--n", "10"]):
        refused([*command, "--checkpoint", str(last)], f"is a checkpoint of the run {other}, not of {run}")
    os.rename(run, run.parent / "version_0")
    assert (
        main(
            ["sample", str(run.parent), "--n", "4", "--checkpoint", str(run.parent / "version_0/checkpoints/last.ckpt")]
        )
        == 0
    )
    assert (run.parent / "version_0" / "samples.npz").is_file()
    assert not (other / "samples.npz").exists()


def test_relative_paths_of_a_run_seen_from_elsewhere(refused, run):
    file = run / "config.yaml"
    config = yaml.safe_load(file.read_text())
    config["model"]["init_args"]["teacher"] = spec("PretrainedDenoiser", path="models/mine")
    file.write_text(yaml.safe_dump(config))
    refused(["sample", str(run)], "'models/mine' in", "is relative to the folder of its fit")


def test_run_folders_that_are_incomplete(refused, run):
    for file in (run / "checkpoints").iterdir():
        file.unlink()
    refused(["sample", str(run)], "last.ckpt does not exist", "no checkpoints")
    (run / "config.yaml").write_text("model: {class_path: DMD2, init_args: {num_stepss: 1}}")
    (run / "checkpoints" / "last.ckpt").write_bytes(b"")
    refused(["sample", str(run)], "cannot be read as a checkpoint")
    (run / "config.yaml").write_text("trainer: {}")
    refused(["sample", str(run)], "config.yaml", "model")
    (run / "config.yaml").write_text("model: [")
    refused(["sample", str(run)], "config.yaml is damaged")


def test_exporting(refused, run):
    Path("taken").mkdir()
    Path("taken/precious.txt").write_text("mine")
    refused(["export", str(run), "taken"], "taken", "exists", "overwrite")
    refused(["export", str(run), "taken", "--overwrite"], "taken", "not the folder of an earlier export")
    assert Path("taken/precious.txt").read_text() == "mine"
    refused(["export", str(run), "out", "--weights", "teacher"], "'teacher'")
    refused(["export", str(run), "out"], "ResidualMLP", "no stock diffusers pipeline")
    assert not Path("out").exists()


# ------------------------------------------------------------------------------------------------ the program itself
@pytest.mark.slow
def test_the_program_prints_one_line_and_returns_2(tmp_path):
    (tmp_path / "run.yaml").write_text(json.dumps(settings({"model.class_path": "DMD3"})))
    words = [sys.executable, "-m", "lightning_distill", "fit", "-c", "run.yaml"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: model: there is no class 'DMD3'")
    assert "Traceback" not in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.yaml"]


@pytest.mark.parametrize(
    ("types", "values"),
    [
        ("[typing.Literal[64, 32], typing.Literal['32', 'bf16-mixed'], <class 'NoneType'>]", "64 32 bf16-mixed"),
        ("[typing.Literal['auto'], <class 'float'>]", ""),
        ("", ""),
    ],
    ids=["literals", "a number will do as well", "no union"],
)
def test_choices_are_named_where_nothing_else_will_do(types, values):
    assert _choices(types) == values.split()
