import pytest
import torch

from lightning_distill.cli import main
from lightning_distill.commands.run_folder import load_run
from lightning_distill.configs import config_path
from lightning_distill.guidance import is_told
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.run_denoiser import RunDenoiser
from lightning_distill.networks.second_time import second_time_of


def test_a_trained_teacher_is_distilled_by_naming_its_run_folder(tmp_path, capsys):
    quiet = [f"--trainer.logger.init_args.save_dir={tmp_path}", "--trainer.enable_progress_bar=false"]
    teacher = ["fit", "-c", str(config_path("teacher/checkerboard.yaml")), "--trainer.max_steps=8", *quiet]
    assert main(teacher) == 0, capsys.readouterr().err
    folder = tmp_path / "checkerboard"
    spec = RunDenoiser(str(folder))
    spec.check()
    network = spec.build()
    x, t = torch.randn(4, 2), torch.full((4,), 0.5, dtype=torch.float64)
    again = RunDenoiser(str(folder / "version_0"), weights="student").build()
    with torch.no_grad():
        assert network(x, t).x0.isfinite().all()
        assert not torch.equal(network(x, t).x0, again(x, t).x0)  # the average is not the raw network
    student = ["fit", "--model=DMD2", "--model.teacher=RunDenoiser", f"--model.teacher.path={folder}"]
    student += ["--data=Prior", "--data.batch_size=8", "--trainer.max_steps=2", "--model.fake_score_steps=1", *quiet]
    assert main(student) == 0, capsys.readouterr().err


def test_a_student_begins_as_the_student_of_a_run_folder(tmp_path, capsys):
    """CMT trains a flow map, and MeanFlow goes on with it; its teacher stays without the second time."""
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--trainer.max_steps=2"]
    quiet += [f"--trainer.logger.init_args.save_dir={tmp_path}", "--model.teacher=ZooDenoiser"]
    quiet += ["--model.teacher.name=digits", "--model.student=TwoTime", "--data=Digits", "--data.batch_size=8"]
    first = ["--model=CMT", "--model.form=flow_map", "--model.sampler=flow_map", "--model.solver_steps=2"]
    named = [f"--trainer.logger.init_args.name={name}" for name in ("first", "second")]
    assert main(["fit", *first, *quiet, named[0]]) == 0, capsys.readouterr().err
    start = ["--model.student.role=FromCheckpoint", f"--model.student.role.path={tmp_path / 'first'}"]
    rate = "--model.student_optimizer.lr=0"
    again = ["fit", "--model=MeanFlow", *quiet, *start, "--model.student_optimizer=torch.optim.SGD", rate, named[1]]
    assert main(again) == 0, capsys.readouterr().err
    before, module = load_run(tmp_path / "first"), load_run(tmp_path / "second")
    assert second_time_of(module.teacher.network) is None
    x, t, r = torch.randn(4, 1, 8, 8), torch.full((4,), 0.75), torch.full((4,), 0.25)
    cond = {"class_labels": torch.arange(4)}
    with torch.no_grad():
        wanted, found = (m.sampling_network(None)(x, t, cond, r=r).x0 for m in (before, module))
    assert torch.equal(found, wanted)


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        RunDenoiser(str(tmp_path)).check()


FIRST = """
model:
  class_path: GuidanceDistillation
  init_args:
    teacher: {class_path: ZooDenoiser, init_args: {name: digits}}
    guidance: {class_path: RandomGuidance, init_args: {low: 1, high: 6}}
    student:
      class_path: TwoTime
      init_args: {kind: null, guidance: true, role: {class_path: Lora, init_args: {target_modules: [inner, outer]}}}
"""


@pytest.mark.parametrize(
    "second",
    [
        ["--model=DMD2", "--model.student=Lora", "--model.student.target_modules=[inner,outer]"],
        ["--model=MeanFlow", "--model.student=TwoTime", "--model.student.role=Copy"],
        ["--model=ConsistencyDistillation", "--model.guidance=Guidance", "--model.guidance.scale=4"],
    ],
)
def test_a_stage_of_guidance_distillation_by_adapters_is_distilled_further(tmp_path, capsys, second):
    """LoRA adapters that are told the scale, merged: a network like any other, and no second pass for guidance."""
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--trainer.max_steps=2"]
    quiet += [f"--trainer.logger.init_args.save_dir={tmp_path}", "--data=Digits", "--data.batch_size=8"]
    config = tmp_path / "first.yaml"
    config.write_text(FIRST)
    first = ["fit", "-c", str(config)]
    named = [f"--trainer.logger.init_args.name={name}" for name in ("first", "second")]
    assert main([*first, *quiet, named[0]]) == 0, capsys.readouterr().err
    teacher = RunDenoiser(str(tmp_path / "first")).build()
    assert type(teacher) is Denoiser
    assert is_told(teacher)
    assert not any("lora" in name for name, _ in teacher.network.named_parameters())
    x, t = torch.randn(4, 1, 8, 8), torch.full((4,), 0.5, dtype=torch.float64)
    cond = {"class_labels": torch.arange(4)}
    own = load_run(tmp_path / "first", None).sampling_network(None)
    with torch.no_grad():
        torch.testing.assert_close(teacher(x, t, cond).x0, own(x, t, cond).x0, rtol=1e-5, atol=1e-5)
    words = ["fit", *second, "--model.teacher=RunDenoiser", f"--model.teacher.path={tmp_path / 'first'}", *quiet]
    assert main([*words, named[1]]) == 0, capsys.readouterr().err
    student = load_run(tmp_path / "second", None).sampling_network(None)
    assert student.family.guidance_scale == (4.0 if "--model.guidance.scale=4" in second else 3.5)
