"""Evaluation inside the run: right figures, right names, no trace in the training."""

import time

import numpy as np
import pytest
import scipy.linalg
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from small_runs import digits, prior, student, trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lightning_distill.callbacks.evaluation import GenerativeEvaluation
from lightning_distill.callbacks.samples import SampleGrid
from lightning_distill.data.toy import Toy2D
from lightning_distill.evaluation import sample_many
from lightning_distill.evaluation.runner import EvaluationRunner
from lightning_distill.methods import DMD2, TeacherTraining
from lightning_distill.metrics.extractors import ModuleExtractor
from lightning_distill.metrics.features import extract, load_classifier
from lightning_distill.metrics.lpips_diversity import PerceptualDistance
from lightning_distill.metrics.reference import load_reference
from lightning_distill.networks.roles import Explicit
from lightning_distill.networks.small import ResidualMLP
from lightning_distill.networks.specs import AnalyticTeacher, NewDenoiser, ZooDenoiser
from lightning_distill.processes import FlowMatching
from lightning_distill.records import EvaluationLog
from lightning_distill.times import few_step_times

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*eval mode",
    "ignore:Using ModelCheckpoint with manual",
    "ignore:Checkpoint directory",
    "ignore:The dirpath has changed",
)


def evaluation(**settings):
    return GenerativeEvaluation(**{"num_samples": 200, "table": False, **settings})


def test_fd_is_the_textbook_formula(tmp_path):
    callback, module = evaluation(), student()
    trainer(tmp_path, callbacks=[callback]).fit(module, prior())
    (row,) = callback.history.rows
    images, labels = sample_many(
        module.sampling_network(), 200, module.student_times, "renoise", callback.seed, shape=(1, 8, 8)
    )
    classifier = load_classifier("digits")
    features = extract(classifier, images).double().numpy()
    reference = load_reference("digits").statistics["train"]
    mean, cov = features.mean(0), np.cov(features, rowvar=False)
    real_mean, real_cov = reference.mean.numpy(), reference.cov.numpy()
    cross = scipy.linalg.sqrtm(cov @ real_cov).real
    expected = np.square(mean - real_mean).sum() + np.trace(cov + real_cov - 2 * cross)
    assert row.metrics["fd_cnn"] == pytest.approx(expected, rel=1e-6)
    decided = classifier.logits(images).argmax(1)
    assert row.metrics["class_accuracy"] == pytest.approx((decided == labels).double().mean().item())


def test_rows_names_and_files(tmp_path):
    callback = evaluation(every_n_steps=2, steps=[1, 2], weights=["ema", "student"])
    run = trainer(tmp_path, callbacks=[callback])
    run.fit(student(), prior())
    assert [(r.step, r.weights, r.nfe) for r in callback.history.rows] == [
        (s, w, n) for s in (2, 4) for w in ("ema", "student") for n in (1, 2)
    ]
    logged = EventAccumulator(run.log_dir).Reload()
    for name in ("val/fd_cnn/nfe1/ema", "val/recall_cnn/nfe2/student", "val/progress_cnn/nfe1/ema"):
        assert [e.step for e in logged.Scalars(name)] == [2, 4]
    assert logged.Scalars("val/fd_cnn/nfe1/ema")[1].value == pytest.approx(
        callback.history.of("ema", 1)[-1].metrics["fd_cnn"], rel=1e-5
    )
    kept = EvaluationLog.load(run.log_dir)
    assert kept.rows == callback.history.rows
    assert {r.nfe for r in kept.teacher} == {1, 2, 50}
    assert kept.baseline().nfe == 50
    first = kept.rows[0].metrics
    few, many = (kept.baseline(n).metrics["fd_cnn"] for n in (1, 50))
    assert first["progress_cnn"] == pytest.approx((few - first["fd_cnn"]) / (few - many))


def test_training_does_not_notice(tmp_path):
    def weights(*callbacks):
        torch.manual_seed(0)
        module = student()
        trainer(tmp_path, 4, callbacks=list(callbacks)).fit(module, prior())
        return module.state_dict(), torch.rand(3)

    plain, after = weights()
    watched, same = weights(evaluation(every_n_steps=1, weights=["ema", "student"]), SampleGrid(1, num_samples=10))
    assert torch.equal(after, same)
    assert plain.keys() == watched.keys()
    assert all(torch.equal(plain[k], watched[k]) for k in plain)


def test_checkpoints_and_stopping_follow_the_figures(tmp_path):
    best = ModelCheckpoint(
        tmp_path / "best", monitor="val/fd_cnn/nfe1/ema", mode="min", every_n_train_steps=2, filename="{step}"
    )
    callback = evaluation(every_n_steps=2)
    run = trainer(tmp_path, 6, callbacks=[callback, best], enable_checkpointing=True)
    run.fit(student(), prior())
    values = {r.step: r.metrics["fd_cnn"] for r in callback.history.rows}
    assert best.best_model_score.item() == pytest.approx(min(values.values()), rel=1e-5)
    assert best.best_model_path.endswith(f"step={min(values, key=values.get)}.ckpt")

    stop = EarlyStopping("val/fd_cnn/nfe1/ema", patience=1, min_delta=1e9, check_on_train_epoch_end=True)
    short = trainer(tmp_path, 40, callbacks=[evaluation(every_n_steps=2), stop])
    short.fit(student(), prior_of(2))
    assert short.global_step < 40

    each = EarlyStopping("val/fd_cnn/nfe1/ema", patience=1, min_delta=1e9, check_on_train_epoch_end=False)
    shorter = trainer(tmp_path, 40, callbacks=[evaluation(every_n_steps=2), each])
    shorter.fit(student(), prior_of(1000))
    assert shorter.global_step == 4  # the second evaluation is no better than the first


def prior_of(updates):
    data = prior()
    data.samples_per_epoch = 16 * updates
    return data


def test_the_teacher_is_sampled_once(tmp_path, monkeypatch):
    settings = {"teacher_steps": 3, "reference": "data", "extractors": [ModuleExtractor(tiny(), "tiny")]}
    first = evaluation(**settings)
    trainer(tmp_path, 1, callbacks=[first]).fit(student(), digits())
    assert [r.nfe for r in first.history.teacher] == [1, 3]
    measured = []
    original = EvaluationRunner.measure

    def counted(self, network, times, *rest, **options):
        measured.append(len(times))
        return original(self, network, times, *rest, **options)

    monkeypatch.setattr(EvaluationRunner, "measure", counted)
    second = evaluation(**{**settings, "extractors": [ModuleExtractor(tiny(), "tiny")]})
    trainer(tmp_path, 1, callbacks=[second]).fit(student(), digits())
    assert measured == [1]
    assert second.history.teacher == first.history.teacher
    assert len(list((tmp_path / "cache" / "references").glob("*"))) == 1
    # another number of samples is another row
    third = evaluation(**{**settings, "num_samples": 210})
    trainer(tmp_path, 1, callbacks=[third]).fit(student(), digits())
    assert measured == [1, 1, 3, 1]


def tiny():
    class Tiny(nn.Module):
        num_features = 6

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 6, bias=False)
            with torch.no_grad():
                self.layer.weight.copy_(torch.randn(6, 64, generator=torch.Generator().manual_seed(4)))

        def forward(self, images):
            return self.layer(images.flatten(1))

    return Tiny()


def test_missing_weights_stop_before_training(tmp_path, monkeypatch):
    from lightning_distill.metrics.inception import Inception

    monkeypatch.delenv("LIGHTNING_DISTILL_INCEPTION", raising=False)
    module = student()
    callback = evaluation(extractors=[Inception(weights=str(tmp_path / "no.pth"))], reference="data")
    run = trainer(tmp_path, callbacks=[callback])
    start = time.perf_counter()
    with pytest.raises(FileNotFoundError, match=r"no\.pth.*weights.*LIGHTNING_DISTILL_INCEPTION"):
        run.fit(module, digits())
    assert time.perf_counter() - start < 10.0
    assert run.global_step == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"measures": ["fdd"]}, r"unknown measure 'fdd'; choose from fd, kid"),
        ({"steps": [0]}, r"steps=\[0\]"),
        ({"num_samples": 3}, r"10 samples are the fewest"),
        ({"measures": ["clip_score"]}, r"needs clip="),
        ({"measures": ["lpips_diversity"]}, r"needs perceptual="),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        evaluation(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": ["emma"]}, r"weights='emma' is unknown; choose student or one of"),
        ({"reference": "nowhere.npz"}, r"reference='nowhere.npz' does not exist"),
        ({"reference": "fashion"}, r"holds features of the classifier shipped for 'fashion'"),
    ],
)
def test_what_does_not_fit_the_run_stops_it_before_training(tmp_path, settings, message):
    run = trainer(tmp_path, callbacks=[evaluation(**settings)])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run.fit(student(), prior())
    assert run.global_step == 0


class ReadsColours(nn.Module):
    num_features = 4

    def forward(self, images):
        if images.shape[1] != 3:
            raise ValueError("reads three channels")
        return images.flatten(1)[:, :4]


#: reference and extractor, and what is wrong with them
UNFIT = {
    "empty_folder": ("folder", None, r"reference='.*folder': .*reference.safetensors does not exist"),
    "no_keys": ("keys.npz", None, r"reference='.*keys.npz' cannot be read: .*lacks \['mu', 'sigma'\]"),
    "no_archive": ("text.npz", None, r"reference='.*text.npz' cannot be read"),
    "shapes": ("shapes.npz", None, r"has mu of shape \(7,\) and sigma of \(6, 7\)"),
    "other_width": ("other.npz", None, r"holds statistics of 7 features, and the extractor 'cnn' has 64"),
    "no_data": (None, lambda: tiny(), r"Prior, which yields no clean samples; give reference="),
    "other_name": ({"cnm": "data"}, None, r"there is no extractor 'cnm'; the extractors are cnn"),
    "other_channels": ("other.npz", ReadsColours, r"'user' cannot read samples of shape \(1, 8, 8\): reads three"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_references_and_extractors_are_read_before_training(tmp_path, name):
    reference, network, message = UNFIT[name]
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "keys.npz", mean=np.zeros(7))
    np.savez(tmp_path / "shapes.npz", mu=np.zeros(7), sigma=np.zeros((6, 7)))
    np.savez(tmp_path / "other.npz", mu=np.zeros(7), sigma=np.eye(7))
    settings = {"reference": str(tmp_path / reference) if isinstance(reference, str) else reference}
    if network is not None:
        settings["extractors"] = [ModuleExtractor(network())]
    run = trainer(tmp_path, callbacks=[evaluation(**settings)])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run.fit(student(), prior())
    assert run.global_step == 0


def test_pictures_that_cannot_be_compared_are_told_before_training(tmp_path, monkeypatch):
    (tmp_path / "trunk.pth").write_bytes(b"not read")
    callback = evaluation(
        measures=["lpips_diversity"],
        perceptual=PerceptualDistance(trunk_weights=str(tmp_path / "trunk.pth")),
    )
    monkeypatch.setattr(DMD2, "sample_shape", (4, 8, 8))
    run = trainer(tmp_path, callbacks=[callback])
    with pytest.raises(ValueError, match=r"pictures of 1 or 3 channels, but .* shape \(4, 8, 8\)"):
        run.fit(student(), prior())
    assert run.global_step == 0


def test_validate_and_test(tmp_path):
    callback, module = evaluation(), student()
    run = trainer(tmp_path, callbacks=[callback])
    run.fit(module, prior())
    (logged,) = run.validate(module, prior(), verbose=False)
    assert logged["val/fd_cnn/nfe1/ema"] == pytest.approx(callback.history.rows[0].metrics["fd_cnn"], rel=1e-4)
    (other,) = run.test(module, prior(), verbose=False)
    assert other["test/fd_cnn/nfe1/ema"] != pytest.approx(logged["val/fd_cnn/nfe1/ema"], rel=1e-6)
    stages = [(r.stage, r.half, r.seed) for r in callback.history.rows]
    assert stages == [("fit", "selection", 1000), ("validate", "selection", 1000), ("test", "held_out", 1001)]


def test_points_are_compared_as_they_are(tmp_path):
    network = Explicit(
        NewDenoiser(lambda: ResidualMLP((2,), width=8, depth=1), FlowMatching(), "flow_prediction", sigma_data=1.12)
    )
    module = DMD2(
        AnalyticTeacher("ring4", FlowMatching()), student=network, fake_score=network, fake_score_steps=1, shape=[2]
    )
    callback = evaluation(num_samples=1000, teacher_steps=20)
    run = trainer(tmp_path, 2, callbacks=[callback, SampleGrid(num_samples=50)])
    run.fit(module, Toy2D("ring4", batch_size=16))
    many, few = (callback.history.baseline(n).metrics["sw2"] for n in (20, 1))
    assert many < 0.15 < few
    row = callback.history.rows[-1]
    assert row.metrics["progress_sw2"] == pytest.approx((few - row.metrics["sw2"]) / (few - many))


def test_a_network_in_training_without_teacher(tmp_path):
    module = TeacherTraining(ZooDenoiser("digits"))
    callback = evaluation(steps=[4], extractors=[ModuleExtractor(tiny(), "tiny")])
    trainer(tmp_path, 2, callbacks=[callback]).fit(module, digits())
    assert callback.history.teacher == []
    assert "fd_tiny" in callback.history.rows[0].metrics
    assert not [name for name in callback.history.rows[0].metrics if name.startswith("progress")]


def test_rows_survive_a_resume(tmp_path):
    def settings():
        return {"callbacks": [evaluation(every_n_steps=2)], "enable_checkpointing": True}

    run = trainer(tmp_path, 2, **settings())
    run.fit(student(), prior())
    run.save_checkpoint(tmp_path / "two.ckpt")
    again = trainer(tmp_path, 4, **settings())
    again.fit(student(), prior(), ckpt_path=str(tmp_path / "two.ckpt"))
    rows = again.callbacks[0].history.rows
    assert [r.step for r in rows] == [2, 4]


def test_a_run_of_epochs_that_is_resumed_at_its_end_has_no_row_twice(tmp_path):
    def fit(path=None):
        saving = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
        callbacks = [evaluation(every_n_steps=2), saving]
        run = trainer(tmp_path, -1, callbacks=callbacks, enable_checkpointing=True, max_epochs=1, limit_train_batches=4)
        run.fit(student(), prior(), ckpt_path=path)
        assert run.global_step == 4
        return [row.step for row in callbacks[0].history.rows]

    assert fit() == [2, 4]
    assert fit(str(tmp_path / "step=4.ckpt")) == [2, 4]


def test_grids_and_strips(tmp_path):
    run = trainer(tmp_path, 4, callbacks=[SampleGrid(2, num_samples=20, teacher_steps=4, strip=3)])
    module = student()
    run.fit(module, prior())
    names = sorted(p.name for p in (tmp_path / "run" / "version_0" / "samples").iterdir())
    assert names == ["step_000002.png", "step_000004.png", "strip_000002.png", "strip_000004.png"]
    assert EventAccumulator(run.log_dir, size_guidance={"images": 0}).Reload().Tags()["images"] == ["samples", "strips"]
    panels = SampleGrid(num_samples=20, teacher_steps=4, strip=0).panels(module)
    assert list(panels) == ["student, 1 step", "teacher, 4 steps", "teacher, 1 step"]
    images, labels = sample_many(
        module.teacher, 20, few_step_times(module.process, 4), "ode", 2000, shape=module.sample_shape
    )
    torch.testing.assert_close(panels["teacher, 4 steps"][:2], images[labels == 0])
