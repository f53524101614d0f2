"""The command line: what a run leaves behind, how it goes on, and the commands that read it."""

import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from lightning.pytorch.cli import LightningCLI
from sampling_of_cases import long

from lightning_distill import __version__
from lightning_distill.cli import main, trainer_cli
from lightning_distill.commands.methods import method_rows
from lightning_distill.commands.run_folder import find_run, load_run
from lightning_distill.configs import config_path, with_shipped
from lightning_distill.data.prior import Prior
from lightning_distill.methods import DMD2, DistillationModule
from lightning_distill.networks.small import small_unet

RING4 = "lightning_distill.networks.specs.AnalyticTeacher"


def spec(class_path, /, **arguments):
    return {"class_path": class_path, "init_args": arguments}


def ring4():
    """A run on ring4 with tiny networks, silent."""
    network = spec(
        "Explicit",
        spec=spec(
            "NewDenoiser",
            network=spec("ResidualMLP", shape=[2], width=8, depth=1),
            process="FlowMatching",
            prediction_type="flow_prediction",
            sigma_data=1.12,
        ),
    )
    return {
        "trainer": {"accelerator": "cpu", "max_steps": 7, "enable_progress_bar": False, "enable_model_summary": False},
        "model": spec(
            "DMD2",
            teacher=spec("AnalyticTeacher", problem="ring4", process="FlowMatching"),
            student=network,
            fake_score=network,
            fake_score_steps=1,
            shape=[2],
        ),
        "data": spec("Toy2D", name="ring4", batch_size=8, samples_per_epoch=80),
    }


def pictures(folder, steps=2):
    """A run with a UNet of 8x8 pictures and three classes, distilled without data."""
    network = small_unet(8, 1, 3, (8, 8), norm_num_groups=4, attention_head_dim=8)
    network.save_pretrained(folder / "teacher")
    teacher = spec(
        "PretrainedDenoiser",
        path=str(folder / "teacher"),
        process=spec("VariancePreserving", beta_schedule="squaredcos_cap_v2", zero_terminal_snr=True),
        prediction_type="v_prediction",
        null_class=3,
        sigma_data=0.5,
    )
    config = ring4()
    config["model"] = spec("DMD2", teacher=teacher, fake_score_steps=1, num_steps=steps, student_optimizer=sgd())
    config["data"] = spec("Prior", num_classes=3, batch_size=2)
    return config


def sgd():
    return spec("torch.optim.SGD", lr=0.05)


def fit(config, folder, *words, name="toy"):
    """Run ``fit`` as the command line does; returns LightningCLI."""
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    return trainer_cli(["fit", "-c", str(file), f"--trainer.logger.init_args.save_dir={folder / 'runs'}", *words])


def states(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


# ------------------------------------------------------------------------------------------------ before a run
def test_help_is_quick_and_names_every_command(capsys):
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "lightning_distill", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert all(word in done.stdout for word in ("fit", "validate", "quickstart", "sample", "export", "methods"))
    assert not any(heavy in done.stderr for heavy in ("torch._C", "lightning.pytorch", "jsonargparse"))
    assert main([]) == 2
    assert main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


def test_help_of_fit_and_of_a_method(capsys):
    assert main(["fit", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "usage: lightning-distill" in shown
    assert "--model.help" in shown
    assert main(["fit", "--model.help=DMD2"]) == 0
    shown = capsys.readouterr().out
    assert "--model.fake_score_steps" in shown
    assert "--model.max_skipped_steps" in shown


def test_debug_shows_where(monkeypatch):
    with pytest.raises(FileNotFoundError):
        main(["sample", "nowhere", "--debug"])
    monkeypatch.setenv("LIGHTNING_DISTILL_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        main(["sample", "nowhere"])


def test_methods_lists_all_and_their_configurations(capsys):
    rows = {row.name: row for row in method_rows()}
    assert {"DMD2", "TeacherTraining"} <= set(rows)
    assert rows["DMD2"].paper == "2405.14867"
    assert rows["DMD2"].roles.startswith("student, fake_score")
    assert "DistillationModule" not in rows
    assert "FakeScoreMethod" not in rows
    # the one that bears its name, on the simplest problem; not another method's, nor what needs a run before it
    own = {"DMD2": "dmd2_ring4", "SwiftBrush": "swiftbrush_digits", "SiD": "sid_ring4", "InstaFlow": "insta_flow_ring"}
    assert {name: Path(rows[name].config).stem for name in own} == own
    for row in rows.values():
        if row.config:
            assert (Path(__file__).parents[1] / row.config).is_file()
        assert row.summary.endswith(".")
    assert main(["methods"]) == 0
    shown = capsys.readouterr().out
    assert rows["DMD2"].config in shown
    assert "arXiv:2405.14867" in shown


def test_a_broken_plugin_is_named_and_the_others_work(monkeypatch, tmp_path):
    (tmp_path / "good_plugin.py").write_text(
        "from lightning_distill.methods import DMD2\nclass Plugged(DMD2):\n    '''From elsewhere.'''\n"
    )
    (tmp_path / "broken_plugin.py").write_text("raise OSError('no licence')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    entries = [
        importlib.metadata.EntryPoint(name, f"{name}_plugin", "lightning_distill.methods")
        for name in ("broken", "good")
    ]
    monkeypatch.setattr("lightning_distill.cli.entry_points", lambda group: entries)
    with pytest.warns(UserWarning, match=r"plugin 'broken' \(broken_plugin\).*no licence"):
        names = [row.name for row in method_rows()]
    assert "Plugged" in names
    config = ring4()
    config["model"]["class_path"] = "Plugged"
    with pytest.warns(UserWarning, match="broken"):
        assert type(fit(config, tmp_path, "--trainer.fast_dev_run=true").model).__name__ == "Plugged"


# ------------------------------------------------------------------------------------------------ a run
def test_a_run_leaves_configuration_checkpoints_and_curves(tmp_path):
    cli = fit(ring4(), tmp_path)
    run = tmp_path / "runs" / "toy" / "version_0"
    assert Path(cli.trainer.log_dir) == run
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"last.ckpt", "step6.ckpt", "step7.ckpt"}
    assert list(run.glob("events.out.tfevents*"))
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["seed_everything"] == 0
    assert saved["model"]["init_args"]["teacher"]["class_path"] == RING4
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 7
    assert not any(key.startswith("teacher.") for key in checkpoint["state_dict"])


@pytest.mark.sparse(3)
@pytest.mark.parametrize("max_steps", [5, 10, 13])
def test_the_last_checkpoint_is_the_end_of_the_run(tmp_path, max_steps):
    # batches of 8 in epochs of 80: 10 is the end of an epoch, 5 and 13 lie within one; every 1, 2 and 3 updates
    cli = fit(ring4(), tmp_path, f"--trainer.max_steps={max_steps}")
    checkpoint = torch.load(find_run(cli.trainer.log_dir) / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == max_steps
    for key, value in states(cli.model).items():
        assert torch.equal(value, checkpoint["state_dict"][key])


@pytest.mark.long
def test_a_run_of_epochs_ends_with_a_checkpoint(tmp_path):
    cli = fit(ring4(), tmp_path, "--trainer.max_steps=-1", "--trainer.max_epochs=1")
    assert {p.name for p in (find_run(cli.trainer.log_dir) / "checkpoints").iterdir()} == {"last.ckpt", "step10.ckpt"}


@pytest.mark.long
def test_runs_go_where_the_trainer_is_told(tmp_path):
    file = tmp_path / "toy.yaml"
    file.write_text(yaml.safe_dump(ring4(), sort_keys=False))
    words = ["fit", "-c", str(file), "--trainer.max_steps=1", f"--trainer.default_root_dir={tmp_path / 'here'}"]
    assert Path(trainer_cli(words).trainer.log_dir) == tmp_path / "here/toy/version_0"
    cli = trainer_cli([*words, f"--trainer.logger.init_args.save_dir={tmp_path / 'there'}"])
    assert Path(cli.trainer.log_dir) == tmp_path / "there/toy/version_0"
    saved = ["fit", "-c", str(tmp_path / "here/toy/version_0/config.yaml")]
    assert Path(trainer_cli(saved).trainer.log_dir) == tmp_path / "here/toy/version_1"
    again = trainer_cli([*saved, f"--trainer.default_root_dir={tmp_path / 'elsewhere'}"])
    assert Path(again.trainer.log_dir) == tmp_path / "elsewhere/toy/version_0"


@pytest.mark.long
def test_a_second_run_gets_its_own_folder_and_run_names_find_the_newest(tmp_path):
    first = fit(ring4(), tmp_path, "--trainer.max_steps=1")
    before = (Path(first.trainer.log_dir) / "checkpoints" / "last.ckpt").read_bytes()
    second = fit(ring4(), tmp_path, "--trainer.max_steps=2")
    assert Path(second.trainer.log_dir).name == "version_1"
    assert (Path(first.trainer.log_dir) / "checkpoints" / "last.ckpt").read_bytes() == before
    runs = tmp_path / "runs" / "toy"
    assert find_run(runs) == runs / "version_1"
    with pytest.raises(ValueError, match="multiple of 3"):
        fit(ring4(), tmp_path, "--model.init_args.accumulate_grad_batches=3")
    assert (runs / "version_2" / "config.yaml").is_file()
    assert find_run(runs) == runs / "version_1", "a run without checkpoints hides an earlier one"


@pytest.mark.sparse(2)
@pytest.mark.parametrize("stop", [4, 10])
def test_resuming_through_the_command_line_is_exact(tmp_path, stop):
    # within the first epoch of 10 batches, and at its end
    whole = fit(ring4(), tmp_path, "--trainer.max_steps=14")
    part = fit(ring4(), tmp_path, f"--trainer.max_steps={stop}")
    last = Path(part.trainer.log_dir) / "checkpoints" / "last.ckpt"
    rest = fit(ring4(), tmp_path, "--trainer.max_steps=14", f"--ckpt_path={last}")
    assert rest.trainer.global_step == 14
    expected = states(whole.model)
    for key, value in states(rest.model).items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.slow
def test_resuming_within_the_same_folder(tmp_path):
    part = fit(ring4(), tmp_path, "--trainer.max_steps=2")
    folder = Path(part.trainer.log_dir)
    time.sleep(0.02)  # the newest file decides
    fit(
        ring4(),
        tmp_path,
        "--trainer.max_steps=4",
        "--trainer.logger.init_args.version=0",
        f"--ckpt_path={folder / 'checkpoints' / 'last.ckpt'}",
    )
    module = load_run(folder)
    files = (folder / "checkpoints").glob("last*.ckpt")
    steps = {torch.load(f, weights_only=True)["global_step"]: f for f in files}
    newest = torch.load(steps[4], weights_only=True)["state_dict"]
    assert all(torch.equal(v, newest[k]) for k, v in states(module).items())


@pytest.mark.parametrize("last", [False, long(True)])
def test_a_run_keeps_its_last_state_beside_what_the_user_keeps(tmp_path, last):
    own = spec("lightning.pytorch.callbacks.ModelCheckpoint", filename="mine", every_n_train_steps=3, save_last=last)
    config = ring4()
    config["trainer"]["callbacks"] = [own]
    cli = fit(config, tmp_path)
    names = {p.name for p in (Path(cli.trainer.log_dir) / "checkpoints").iterdir()}
    assert {"mine.ckpt", "last.ckpt"} <= names
    assert any(name.startswith("step") for name in names) != last


@pytest.mark.long
def test_a_figure_that_nothing_measures_is_told(tmp_path):
    config = ring4()
    monitored = {"monitor": "val/sw2/nfe3", "every_n_train_steps": 2}
    config["trainer"]["callbacks"] = [spec("lightning.pytorch.callbacks.ModelCheckpoint", **monitored)]
    with pytest.warns(UserWarning, match="monitors 'val/sw2/nfe3', which nothing has measured at update 2"):
        fit(config, tmp_path)


def test_early_stopping_that_never_looks_is_told(tmp_path):
    config = ring4()
    watch = spec("lightning.pytorch.callbacks.EarlyStopping", monitor="val/sw2", strict=False)
    config["trainer"] |= {"callbacks": [watch], "max_steps": 1}
    with pytest.warns(
        UserWarning, match=r"EarlyStopping looks at 'val/sw2' at the end of an epoch, .* it does nothing"
    ):
        fit(config, tmp_path)


def test_a_timer_can_be_given_and_its_run_repeated(tmp_path):
    config = ring4()
    timer = spec("lightning.pytorch.callbacks.Timer", duration={"days": 1})
    config["trainer"] |= {"callbacks": [timer], "max_steps": 1}
    run = Path(fit(config, tmp_path).trainer.log_dir)
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["trainer"]["callbacks"][0]["init_args"]["interval"] == "step"
    assert trainer_cli(["fit", "-c", str(run / "config.yaml")]).trainer.global_step == 1


def test_a_checkpoint_may_be_named_as_the_run_names_it(tmp_path, capsys):
    run = fit(ring4(), tmp_path).trainer.log_dir
    assert main(["sample", str(run), "--n", "4", "--checkpoint", "last.ckpt"]) == 0
    assert main(["sample", str(run), "--n", "4", "--checkpoint", "first.ckpt"]) == 2
    assert "first.ckpt does not exist; the run has" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--n", "100", "--reference", "nowhere.npz"]) == 2
    assert "reference='nowhere.npz': samples of shape (2,) are compared with" in capsys.readouterr().err


def test_predict_makes_samples_for_a_batch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("toy.yaml").write_text(yaml.safe_dump(ring4()))
    made = []
    original = DistillationModule.predict_step
    monkeypatch.setattr(
        DistillationModule, "predict_step", lambda self, *args: made.append(original(self, *args)) or made[-1]
    )
    assert main(["predict", "-c", "toy.yaml"]) == 0
    assert [x.shape[1:] for x in made] == [(2,)]


@pytest.mark.long
def test_a_class_of_this_folder_can_be_named_and_its_run_needs_no_compiler(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    Path("mine.py").write_text(
        "from lightning_distill.methods import DMD2\n\n\nclass MyMethod(DMD2):\n    '''Mine.'''\n"
    )
    config = ring4()
    config["model"]["class_path"] = "mine.MyMethod"
    config["trainer"]["max_steps"] = 1
    Path("toy.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "-c", "toy.yaml"]) == 0
    run = Path("runs/toy/version_0")
    recorded = yaml.safe_load((run / "config.yaml").read_text())
    recorded["model"]["init_args"]["compile_blocks"] = True
    (run / "config.yaml").write_text(yaml.safe_dump(recorded))
    student = load_run(run).student
    assert type(load_run(run)).__name__ == "MyMethod"
    assert not any("forward" in vars(block) for block in student.network.blocks)


def test_settings_of_the_trainer_that_belong_to_the_method(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"give model\.init_args\.gradient_clip_val=1\.0"):
        fit(ring4(), tmp_path, "--trainer.gradient_clip_val=1.0")


def test_without_logger_and_checkpoints_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = ring4()
    config["trainer"] |= {"logger": False, "enable_checkpointing": False}
    Path("toy.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "-c", "toy.yaml"]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["toy.yaml"]


def test_files_are_merged_and_refer_to_each_other(tmp_path):
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"data": spec("Toy2D", name="ring4", batch_size=4)}))
    config = ring4()
    del config["data"]
    config["model"]["init_args"]["accumulate_grad_batches"] = "${data.init_args.batch_size}"
    cli = fit(config, tmp_path, "-c", str(tmp_path / "data.yaml"), "--trainer.max_steps=1")
    assert cli.model.accumulate_grad_batches == 4
    assert Path(cli.trainer.log_dir).parent.name == "toy", "the run is named after the file with the model"


def test_shipped_configurations_are_found_from_any_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shipped = str(config_path("method/dmd2_ring4.yaml"))
    for name in ("configs/method/dmd2_ring4.yaml", "method/dmd2_ring4.yaml", "dmd2_ring4"):
        assert with_shipped(["fit", "-c", name, "--x=-c"]) == ["fit", "-c", shipped, "--x=-c"]
        assert with_shipped(["fit", f"--config={name}"]) == ["fit", f"--config={shipped}"]
    run = trainer_cli(["fit", "-c", "configs/method/dmd2_ring4.yaml", "--trainer.max_steps=1"])
    assert Path(run.trainer.log_dir).parent.name == "dmd2_ring4"
    own = tmp_path / "dmd2_ring4"
    own.write_text("trainer: {}\n")
    assert with_shipped(["-c", "dmd2_ring4"]) == ["-c", "dmd2_ring4"], "a file is what its name says"
    for command in (["fit"], ["plan"]):
        assert main([*command, "-c", "configs/method/dmd2_rin4.yaml"]) == 2
        told = capsys.readouterr().err
        assert "configs/method/dmd2_rin4.yaml does not exist, here or among the shipped ones" in told
        assert "configs/method/dmd2_ring4.yaml" in told


def test_another_optimizer_keeps_its_own_defaults(tmp_path):
    config = ring4()
    config["model"]["init_args"] |= {"student_optimizer": sgd()}
    cli = fit(config, tmp_path, "--trainer.fast_dev_run=true")
    student, critic = (optimizer.optimizer for optimizer in cli.model.optimizers())
    assert isinstance(student, torch.optim.SGD)
    assert student.defaults["weight_decay"] == 0.0
    assert isinstance(critic, torch.optim.AdamW)
    assert critic.defaults["fused"]


def test_any_lightning_datamodule_will_do(tmp_path):
    (tmp_path / "own_data.py").write_text(
        "import torch\n"
        "from lightning.pytorch import LightningDataModule\n"
        "class Own(LightningDataModule):\n"
        "    def train_dataloader(self):\n"
        "        return torch.utils.data.DataLoader(torch.randn(16, 2), batch_size=8)\n"
    )
    config = ring4()
    config["data"] = "own_data.Own"
    sys.path.insert(0, str(tmp_path))
    try:
        cli = fit(config, tmp_path, "--trainer.max_steps=2")
    finally:
        sys.path.remove(str(tmp_path))
    assert cli.trainer.global_step == 2


# ------------------------------------------------------------------------------------------------ sampling and export
@pytest.fixture(scope="module")
def picture_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    return Path(fit(pictures(folder), folder).trainer.log_dir)


@pytest.mark.long
def test_a_run_is_loaded_as_it_was(tmp_path):
    cli = fit(ring4(), tmp_path)
    module = load_run(cli.trainer.log_dir)
    assert type(module) is DMD2
    assert not module.training
    trained = states(cli.model)
    loaded = states(module)
    assert set(trained) == set(loaded)
    assert all(torch.equal(v, trained[k]) for k, v in loaded.items())
    noise = torch.randn(5, 2)
    assert torch.equal(module.sample(5, noise=noise), cli.model.eval().sample(5, noise=noise))


def test_loading_a_run_leaves_the_global_generator_alone(picture_run):
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    load_run(picture_run)
    assert torch.equal(torch.randn(4), expected)


def test_sample(picture_run, tmp_path, capsys):
    words = ["sample", str(picture_run), "--n", "7", "--classes", "2", "0", "--seed", "5", "--out", str(tmp_path)]
    assert main(words) == 0
    assert str(tmp_path / "samples.png") in capsys.readouterr().out
    files = np.load(tmp_path / "samples.npz")
    assert files["x0"].shape == (7, 1, 8, 8)
    assert files["class_labels"].tolist() == [2, 0, 2, 0, 2, 0, 2]
    assert files["seed"] == 5
    assert files["images"].dtype == np.uint8
    module = load_run(picture_run)
    cond = {"class_labels": torch.tensor([2, 0, 2, 0, 2, 0, 2])}
    x0 = module.sample(7, cond, generator=torch.Generator().manual_seed(5))
    np.testing.assert_allclose(files["x0"], x0.numpy(), atol=1e-6)
    shade = (x0.clamp(-1, 1).numpy() + 1) / 2 * 255
    assert np.abs(files["images"] - shade).max() <= 0.5001
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")

    first = files["x0"]
    for extra in (["--weights", "student"], ["--steps", "1"], ["--seed", "6"]):
        assert main([*words, *extra]) == 0
        assert not np.array_equal(np.load(tmp_path / "samples.npz")["x0"], first), extra
    assert main([*words, "--weights", "ema"]) == 0
    assert np.array_equal(np.load(tmp_path / "samples.npz")["x0"], first)


@pytest.mark.long
def test_sample_of_points(tmp_path):
    run = fit(ring4(), tmp_path).trainer.log_dir
    assert main(["sample", str(run), "--n", "50"]) == 0
    files = np.load(Path(run) / "samples.npz")
    assert files["x0"].shape == (50, 2)
    assert "images" not in files
    assert (Path(run) / "samples.png").is_file()


@pytest.mark.slow
def test_export_gives_the_images_of_sample_in_stock_diffusers(picture_run, tmp_path, capsys):
    out = tmp_path / "pipeline"
    assert main(["export", str(picture_run), str(out)]) == 0
    shown = capsys.readouterr().out
    assert str(out) in shown
    difference = float(shown.split("largest difference to sample()")[1].split()[0])
    assert difference <= 1e-5

    main(["sample", str(picture_run), "--n", "6", "--seed", "4", "--out", str(tmp_path)])
    ours = np.load(tmp_path / "samples.npz")
    pipe = DiffusionPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        batch_size=6,
        class_labels=ours["class_labels"].tolist(),
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(4),
        output_type="np",
    ).images
    expected = (ours["x0"] / 2 + 0.5).clip(0, 1).transpose(0, 2, 3, 1)
    assert np.abs(theirs - expected).max() <= 1e-5

    weights = (out / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert main(["export", str(picture_run), str(out), "--weights", "student", "--overwrite"]) == 0
    assert (out / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() != weights


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("lightning_distill.commands.methods.method_rows", lambda: {}["bug"])
    with pytest.raises(KeyError, match="bug"):
        main(["methods"])


@pytest.mark.slow
def test_the_quick_start_runs_in_all_its_parts(tmp_path, capsys):
    latest = Path(__file__).parents[1] / "benchmarks" / "results" / "latest" / "quickstart.json"
    before = latest.read_bytes() if latest.exists() else None
    assert main(["quickstart", "--smoke", "--out", str(tmp_path)]) == 0
    run = find_run(tmp_path / "quickstart")
    figures = json.loads((run / "quickstart.json").read_text())
    assert {"progress", "nfe", "fd_cnn", "recall", "class_accuracy", "images_per_second", "seconds"} <= set(figures)
    assert set(figures["fd_cnn"]) == {"teacher_1", "teacher_2", "teacher_4", "teacher_50", "student_1"}
    assert figures["nfe"] == 1
    assert figures["student_updates"] == 3
    assert (run / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "pipeline" / "model_index.json").is_file()
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("progress", "tensorboard --logdir", "lightning-distill sample"))
    assert (latest.read_bytes() if latest.exists() else None) == before, "a smoke run is no measurement"


@pytest.mark.long
def test_runs_of_lightnings_own_command_line_are_read(tmp_path, capsys):
    """A program with ``LightningCLI(DMD2, Prior)``, whose configuration names no classes."""
    teacher = ["--model.teacher=lightning_distill.networks.specs.ZooDenoiser", "--model.teacher.name=digits"]
    words = ["fit", *teacher, "--model.fake_score_steps=1", "--data.num_classes=10", "--data.batch_size=4"]
    words += ["--trainer.max_steps=2", "--trainer.accelerator=cpu", f"--trainer.default_root_dir={tmp_path}"]
    run = LightningCLI(DMD2, Prior, args=words).trainer.log_dir
    (checkpoint,) = Path(run, "checkpoints").glob("*.ckpt")
    assert main(["sample", run, "--n", "4", "--checkpoint", checkpoint.name]) == 0, capsys.readouterr().err
    config = Path(run, "config.yaml")
    found = torch.load(checkpoint, weights_only=True)
    found["lightning_distill"]["method"] = "Unknown"
    torch.save(found, checkpoint)
    for other in Path(run, "checkpoints").glob("*.sha256"):
        other.unlink()
    assert main(["sample", run, "--n", "4", "--checkpoint", checkpoint.name]) == 2
    assert f"{config} does not say the class of its model" in capsys.readouterr().err
