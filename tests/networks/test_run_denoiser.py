import pytest
import torch

from lightning_distill.cli import main
from lightning_distill.configs import config_path
from lightning_distill.networks.run_denoiser import RunDenoiser


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


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        RunDenoiser(str(tmp_path)).check()
