import pytest
import torch
from sampling_of_cases import long

from lightning_distill.cli import main
from lightning_distill.commands.run_folder import load_run, read_config
from lightning_distill.configs import config_path
from lightning_distill.guidance import is_told
from lightning_distill.methods import DMD2, ConsistencyDistillation, InstaFlow
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.guidance_adapters import GuidedDenoiser
from lightning_distill.networks.roles import Copy, FromCheckpoint, Lora, role_state
from lightning_distill.networks.run_denoiser import RunDenoiser
from lightning_distill.networks.second_time import second_time_of
from lightning_distill.networks.specs import ZooDenoiser


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


def test_a_run_keeps_its_teacher_when_the_teacher_is_trained_again(tmp_path, capsys):
    quiet = [f"--trainer.default_root_dir={tmp_path}", "--trainer.enable_progress_bar=false"]
    teacher = ["fit", "-c", str(config_path("teacher/checkerboard.yaml")), "--trainer.max_steps=2", *quiet]
    assert main(teacher) == 0, capsys.readouterr().err
    words = ["fit", "--model=DMD2", "--model.teacher=RunDenoiser", f"--model.teacher.path={tmp_path / 'checkerboard'}"]
    words += ["--model.student=FromCheckpoint", f"--model.student.path={tmp_path / 'checkerboard'}"]
    words += ["--data=Prior", "--data.batch_size=8", "--trainer.max_steps=2", "--trainer.logger.init_args.name=student"]
    assert main([*words, *quiet]) == 0, capsys.readouterr().err
    before = load_run(tmp_path / "student").state_dict()
    assert main([*teacher, "--model.init_args.seed=1"]) == 0, capsys.readouterr().err
    after = load_run(tmp_path / "student").state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    saved = read_config(tmp_path / "student/version_0")["model"]["init_args"]
    assert saved["student"]["init_args"]["path"] == str(tmp_path / "checkerboard/version_0")
    last = tmp_path / "student/version_0/checkpoints/last.ckpt"
    assert main([*words, *quiet, f"--ckpt_path={last}"]) == 2
    assert "version_N" in capsys.readouterr().err


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


@pytest.mark.long
@pytest.mark.sparse(3)
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


AGD_RUN = """
model:
  class_path: AGD
  init_args:
    teacher: {class_path: ZooDenoiser, init_args: {name: digits}}
    guidance: {class_path: RandomGuidance, init_args: {low: 1, high: 6}}
    student: {class_path: GuidanceAdapters, init_args: {width: 16}}
    num_steps: 4
    solver_steps: 2
    student_optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.3}}
"""
SMALL = ["--model.student.rank=2", "--model.student.target_modules=[inner,outer]"]


@pytest.fixture(scope="module")
def guided_run(tmp_path_factory):
    """A run of AGD whose adapters have learned something."""
    folder = tmp_path_factory.mktemp("agd")
    (folder / "first.yaml").write_text(AGD_RUN)
    words = ["fit", "-c", str(folder / "first.yaml"), "--data=Prior", "--data.batch_size=8", "--data.num_classes=10"]
    words += [f"--trainer.logger.init_args.save_dir={folder}", "--trainer.logger.init_args.name=first"]
    assert (
        main([*words, "--trainer.max_steps=3", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]) == 0
    )
    return folder / "first"


def call():
    return torch.randn(4, 1, 8, 8), torch.full((4,), 0.5, dtype=torch.float64), {"class_labels": torch.arange(4)}


def test_the_guided_teacher_of_a_run_owns_its_network(guided_run):
    teacher, own = RunDenoiser(str(guided_run)).build(), load_run(guided_run).sampling_network(None)
    assert isinstance(teacher, GuidedDenoiser)
    assert is_told(teacher)
    assert teacher.family.guidance_scale == 3.5
    # parts of it that another device, a checkpoint or a copy has to take along
    owned = {name.partition(".")[0] for name, _ in teacher.named_parameters()}
    assert owned == {"network", "adapters"}
    with torch.no_grad():
        for w in (None, torch.tensor(1.0), torch.tensor(5.0)):
            at = call()
            assert torch.equal(teacher(*at, guidance=w).x0, own(*at, guidance=w).x0)
        at = call()
        scales = [teacher(*at, guidance=torch.tensor(w)).x0 for w in (1.0, 5.0)]
        assert (scales[0] - scales[1]).abs().max() > 1e-4


@pytest.mark.parametrize("role", [Copy(), Lora(rank=2, target_modules=["inner", "outer"])], ids=["copy", "lora"])
@pytest.mark.parametrize("method", [DMD2, ConsistencyDistillation, InstaFlow])
def test_a_one_step_student_is_its_guided_teacher_at_first(guided_run, role, method):
    settings = {"fake_score": role} if method is DMD2 else {}
    module = method(RunDenoiser(str(guided_run)), student=role, num_steps=1, **settings)
    module.configure_model()
    x, _, cond = call()
    t = torch.full((4,), module.student_times[0], dtype=torch.float64)
    names = ["student", *settings, *(f"student_ema.{name}" for name in module.student_ema)]
    with torch.no_grad():
        for name in names:
            assert torch.equal(module.get_submodule(name)(x, t, cond).raw, module.teacher(x, t, cond).raw), name
        assert torch.equal(module.sample(4, cond, noise=x), module.teacher(x, t, cond).x0)


@pytest.mark.parametrize(
    "second",
    [
        ["--model=DMD2", "--model.student=Copy", "--model.fake_score_steps=1"],
        long(["--model=DMD2", "--model.student=Lora", *SMALL, "--model.fake_score_steps=1"]),
        long(["--model=ConsistencyDistillation", "--model.guidance=Guidance", "--model.guidance.scale=4"]),
        long(["--model=MeanFlow", "--model.student=TwoTime", "--model.student.role=Copy"]),
    ],
    ids=["dmd2", "dmd2-lora", "consistency", "mean-flow"],
)
def test_a_run_of_agd_is_distilled_further(guided_run, tmp_path, capsys, second):
    """Guidance adapters are trained on with the network, or beside low-rank adapters on it; resume; no export."""
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    quiet += [f"--trainer.logger.init_args.save_dir={tmp_path}", "--data=Digits", "--data.batch_size=8"]
    words = ["fit", *second, "--model.num_steps=1"] if "MeanFlow" not in second[0] else ["fit", *second]
    words += ["--model.teacher=RunDenoiser", f"--model.teacher.path={guided_run}", *quiet]
    assert main([*words, "--trainer.max_steps=4", "--trainer.logger.init_args.name=second"]) == 0, (
        capsys.readouterr().err
    )
    module = load_run(tmp_path / "second", None)
    student = module.sampling_network("student")
    assert student.family.guidance_scale == (4.0 if "--model.guidance.scale=4" in second else 3.5)
    teacher = RunDenoiser(str(guided_run)).build()
    changed = [not torch.equal(a, b) for a, b in zip(student.adapters.parameters(), teacher.adapters.parameters())]
    assert any(changed)
    # the run is a teacher again, and says that no stock pipeline has its adapters
    third, at = RunDenoiser(str(tmp_path / "second"), weights="student").build(), call()
    with torch.no_grad():
        torch.testing.assert_close(third(*at).x0, student(*at).x0, rtol=1e-5, atol=1e-5)
    capsys.readouterr()
    assert main(["export", str(tmp_path / "second"), str(tmp_path / "out")]) != 0
    assert "need more than its network, and no stock pipeline has the rest" in capsys.readouterr().err


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("role", [Copy(), Lora(rank=2, target_modules=["inner", "outer"])], ids=["copy", "lora"])
def test_a_student_begins_as_the_guided_student_of_a_checkpoint(guided_run, tmp_path, role, merge):
    first = ConsistencyDistillation(RunDenoiser(str(guided_run)), student=role, num_steps=1, ema=[])
    first.configure_model()
    with torch.no_grad():
        for parameter in first.student.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    state = {f"student.{key}": value for key, value in role_state(first.student).items()}
    torch.save({"state_dict": state, "pytorch-lightning_version": "2.5"}, tmp_path / "first.ckpt")
    start = FromCheckpoint(str(tmp_path / "first.ckpt"), role="student", merge=merge)
    teacher = RunDenoiser(str(guided_run)).build().requires_grad_(False)
    student, at = start.build(teacher, "student"), call()
    with torch.no_grad():
        torch.testing.assert_close(student(*at).x0, first.student(*at).x0, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(student(*at).x0, teacher(*at).x0, atol=1e-4)
    with pytest.raises(ValueError, match="holds guidance adapters, which are no weights of the teacher's network"):
        start.build(ZooDenoiser("digits").build(), "student")
