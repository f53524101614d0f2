"""``lightning-distill evaluate``: the figures of a finished run, and the rule by which a result counts."""

import pytest
import torch

from lightning_distill.cli import main
from lightning_distill.configs import config_path
from lightning_distill.evaluation.passing import verdict
from lightning_distill.metrics.clip_score import CLIPScore
from lightning_distill.metrics.lpips_diversity import PerceptualDistance
from lightning_distill.records import EvaluationLog, EvaluationRow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A few updates of the digits configuration."""
    folder = tmp_path_factory.mktemp("runs")
    words = ["fit", "-c", str(config_path("method/dmd2_digits.yaml")), "--trainer.max_steps=3"]
    words += ["--trainer.enable_progress_bar=false", f"--trainer.logger.init_args.save_dir={folder}"]
    assert main(words) == 0
    return next(folder.rglob("config.yaml")).parent


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_DISTILL_CACHE", str(tmp_path / "cache"))


def rows_before(run):
    try:
        return len(EvaluationLog.load(run).rows)
    except FileNotFoundError:
        return 0


def test_rows_are_added(run, capsys):
    before = rows_before(run)
    assert main(["evaluate", str(run), "--n", "300", "--steps", "1", "2", "--weights", "ema", "student"]) == 0
    log = EvaluationLog.load(run)
    new = log.rows[before:]
    assert [(r.weights, r.nfe, r.stage, r.half, r.step) for r in new] == [
        (w, n, "test", "held_out", 3) for w in ("ema", "student") for n in (1, 2)
    ]
    assert {"fd_cnn", "recall_cnn", "progress_cnn", "nearest_ratio_cnn", "class_accuracy"} <= new[0].metrics.keys()
    out = capsys.readouterr().out
    assert "teacher" in out
    assert "metrics.json" in out


@pytest.mark.long
def test_earlier_rows_of_the_teacher_stay(run, capsys):
    words = ["evaluate", str(run), "--measures", "fd", "--n"]
    assert main([*words, "60", "--teacher-steps", "8"]) == 0
    before = EvaluationLog.load(run)
    assert {row.nfe for row in before.baselines(before.rows[-1])} == {1, 8}
    assert main([*words, "70", "--teacher-steps", "0"]) == 0
    assert EvaluationLog.load(run).teacher == before.teacher
    assert main([*words, "50", "--teacher-steps", "3"]) == 0
    log = EvaluationLog.load(run)
    assert log.teacher[: len(before.teacher)] == before.teacher
    assert {row.nfe for row in log.baselines(log.rows[-1])} == {1, 3}
    assert log.baselines(before.rows[-1]) == before.baselines(before.rows[-1])
    assert "held_out" in {row.half for row in log.teacher}


@pytest.mark.long
def test_each_extractor_has_its_reference(run, tmp_path, capsys, monkeypatch):
    import numpy as np

    from lightning_distill.evaluation.runner import EvaluationRunner

    np.savez(tmp_path / "other.npz", mu=np.zeros(7), sigma=np.eye(7))
    np.savez(tmp_path / "a=b.npz", mu=np.ones(64), sigma=np.eye(64))
    second = "{class_path: ZooClassifier, init_args: {data: digits/judge, name: second}}"
    words = ["evaluate", str(run), "--n", "20", "--teacher-steps", "0", "--measures", "fd", "--extractors"]
    words += [f"[{{class_path: ZooClassifier, init_args: {{data: digits}}}}, {second}]", "--reference"]
    assert main([*words, f"cnn={tmp_path / 'a=b.npz'}", "--reference", "second=digits/judge"]) == 0
    figures = EvaluationLog.load(run).rows[-1].metrics
    assert figures["fd_cnn"] > 10 * figures["fd_second"] > 0

    def not_called(*_, **__):
        raise AssertionError("sampled before the references were checked")

    monkeypatch.setattr(EvaluationRunner, "measure", not_called)
    for references, message in (
        ([str(tmp_path / "other.npz")], "holds statistics of 7 features, and the extractor 'cnn' has 64"),
        ([f"cnn={tmp_path / 'other.npz'}"], "holds statistics of 7 features"),
        (["third=data"], "there is no extractor 'third'; the extractors are cnn, second"),
        (["cnn=data", "data"], "--reference data: of several references give NAME=REFERENCE"),
    ):
        capsys.readouterr()
        assert main([*words[:-1], *(word for r in references for word in ("--reference", r))]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_pass_rule_uses_a_second_extractor(run, capsys):
    assert main(["evaluate", str(run), "--pass-rule"]) == 1  # three updates do not make a student
    out = capsys.readouterr().out
    assert "does not pass" in out
    assert "progress in judge is" in out
    row = EvaluationLog.load(run).rows[-1]
    assert {"fd_cnn", "fd_judge", "progress_judge"} <= row.metrics.keys()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--n", "5"], "give 10 samples or more"),
        (["--pass-rule", "--n", "400"], "--pass-rule needs --n 5000 or more"),
        (["--pass-rule", "--half", "selection"], "--half held_out"),
        (["--measures", "fid"], "unknown measure 'fid'"),
        (["--weights", "emma"], "weights='emma' is unknown"),
        (["--reference", "nowhere.npz"], "nowhere.npz"),
        (["--extractors", "class_path: Inceptoin"], "Inceptoin"),
        (
            ["--extractors", "Inceptionn"],
            "did you mean Inception? There are CLIPImage, DINOv2, ",
        ),
        (["--extractors", "ZooClassifier: 3"], "--extractors {'ZooClassifier': 3}: give class_path, one of CLIPImage"),
        (["--extractors", "{class_path: ZooClassifier, init_args: {data: fashion}}"], "cannot read samples of shape"),
        (["--teacher-steps", "-3"], "--teacher-steps -3: give 1 or more, or 0"),
        (["--steps", "1", "0"], "--steps 0: give numbers of 1 or more"),
        (
            ["--measures", "clip_score"],
            "needs --clip FOLDER (a CLIP model) and --prompts FILE",
        ),
        (["--measures", "lpips_diversity"], "needs --perceptual FILE"),
        (["--measures", "lpips_diversity", "--perceptual", "no.pth"], "no.pth does not exist"),
        (["--clip", "folder"], "--clip is for the measure clip_score; add it to --measures"),
        (["--extractors", "class_path: Inception", "--reference", "data"], "LIGHTNING_DISTILL_INCEPTION"),
    ],
)
def test_bad_input(run, words, message, capsys, monkeypatch):
    for name in ("INCEPTION", "CLIP", "LPIPS_TRUNK"):
        monkeypatch.delenv(f"LIGHTNING_DISTILL_{name}", raising=False)
    before = rows_before(run)
    assert main(["evaluate", str(run), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert rows_before(run) == before


def test_another_extractor_with_the_data_of_the_run(run, capsys):
    words = ["--n", "200", "--extractors", "{class_path: ZooClassifier, init_args: {data: digits/judge, name: second}}"]
    assert main(["evaluate", str(run), *words, "--teacher-steps", "0", "--measures", "fd"]) == 0
    assert EvaluationLog.load(run).rows[-1].metrics.keys() >= {"fd_second"}


@pytest.mark.long
def test_runs_without_an_average_measure_the_student(tmp_path, capsys):
    words = [
        "fit",
        "-c",
        str(config_path("method/dmd2_digits.yaml")),
        "--trainer.max_steps=1",
        "--model.init_args.ema=[]",
    ]
    words += ["--trainer.enable_progress_bar=false", f"--trainer.logger.init_args.save_dir={tmp_path}"]
    assert main(words) == 0
    folder = next(tmp_path.rglob("config.yaml")).parent
    short = ["evaluate", str(folder), "--n", "50", "--teacher-steps", "0", "--measures", "fd"]
    assert main(short) == 0
    assert [row.weights for row in EvaluationLog.load(folder).rows] == ["student"]
    assert main([*short, "--weights", "ema"]) == 2
    assert "use --weights student" in capsys.readouterr().err


@pytest.mark.long
def test_measures_with_models_of_their_own(run, tmp_path, monkeypatch, capsys):
    """The options reach the models; what these compute is tested beside them."""
    seen = {}

    class Clip(CLIPScore):
        def check(self, shape=None):
            seen["clip"] = (self.folder, shape)

        def score(self, images, prompts):
            seen["prompts"] = prompts[:11]
            return torch.full((len(images),), 30.0)

    class Perceptual(PerceptualDistance):
        def check(self, shape=None):
            seen["trunk"] = (self.net, self.trunk_weights, shape)

        def __call__(self, a, b, offset=None):
            return (a - b).abs().mean(dim=(1, 2, 3))

    monkeypatch.setattr("lightning_distill.commands.evaluate.CLIPScore", Clip)
    monkeypatch.setattr("lightning_distill.commands.evaluate.PerceptualDistance", Perceptual)
    prompts = tmp_path / "prompts.txt"
    words = ["evaluate", str(run), "--n", "40", "--teacher-steps", "0", "--measures", "clip_score", "lpips_diversity"]
    words += ["--clip", "folder", "--prompts", str(prompts), "--perceptual", "vgg.pth", "--perceptual-net", "vgg"]
    assert main(words) == 2
    assert f"--prompts {prompts} cannot be read (No such file or directory)" in capsys.readouterr().err
    prompts.write_text("too\nfew\n")
    assert main(words) == 2
    assert "there are 2 prompts for 10 classes" in capsys.readouterr().err
    assert main([*words, "--extractors", "nowhere.yaml"]) == 2
    assert "--extractors nowhere.yaml: there is no such file" in capsys.readouterr().err
    prompts.write_text("".join(f"the digit {i}\n" for i in range(10)))
    assert main(words) == 0
    assert seen == {
        "clip": ("folder", (1, 8, 8)),
        "prompts": [f"the digit {i % 10}" for i in range(11)],
        "trunk": ("vgg", "vgg.pth", (1, 8, 8)),
    }
    figures = EvaluationLog.load(run).rows[-1].metrics
    assert figures["clip_score"] == 30.0
    assert figures["lpips_diversity"] > 0


# ------------------------------------------------------------------------------------------------ the rule itself
def student(**changes):
    metrics = {f"{name}_{e}": value for e in ("cnn", "judge") for name, value in FIGURES.items()}
    metrics |= {"class_accuracy": 0.9, **changes}
    return EvaluationRow("student", 1, metrics, weights="ema", num_samples=5000)


FIGURES = {"fd": 2.0, "recall": 0.78, "progress": 0.97, "nearest_ratio": 1.05}
TEACHER = [
    EvaluationRow(
        "teacher",
        50,
        {"fd_cnn": 1.0, "fd_judge": 1.0, "recall_cnn": 0.8, "recall_judge": 0.8, "class_accuracy": 0.91},
    ),
    EvaluationRow("teacher", 1, {"fd_cnn": 50.0, "fd_judge": 40.0, "recall_cnn": 0.0, "recall_judge": 0.0}),
]
DISTANCES = {"cnn": "fd_cnn", "judge": "fd_judge"}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"progress_judge": 0.5}, "progress in judge is 0.500, below 0.90"),
        ({"recall_cnn": 0.7}, "recall in cnn is 0.700, below 0.9 of the teacher's 0.800"),
        ({"nearest_ratio_cnn": 0.5}, "0.50 of the teacher's, outside 0.8 to 1.2"),
        ({"class_accuracy": 0.85}, "class accuracy is 0.850, more than 0.02 from the teacher's 0.910"),
    ],
)
def test_each_condition_counts(changes, problem):
    assert verdict(student(), TEACHER, DISTANCES) == []
    problems = verdict(student(**changes), TEACHER, DISTANCES)
    assert any(problem in p for p in problems)


def test_what_cannot_be_checked_does_not_pass():
    few = EvaluationRow("student", 1, student().metrics, weights="ema", num_samples=2560)
    assert any("2560 samples are too few" in p for p in verdict(few, TEACHER, DISTANCES))
    assert any("only one extractor" in p for p in verdict(student(), TEACHER, {"cnn": "fd_cnn"}))
    assert any("progress in cnn is unknown" in p for p in verdict(student(), [], DISTANCES))
