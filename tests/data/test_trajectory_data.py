"""Training batches from a store of trajectories, and the refusal of another teacher's."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning import Trainer

from lightning_distill.batch import Batch
from lightning_distill.cli import main
from lightning_distill.data import Pairs, Prior, Trajectories
from lightning_distill.data.store import Store, StoreWriter
from lightning_distill.data.trajectories import StoredConditions, StoredTrajectories, check_teacher
from lightning_distill.generation import default_cond, generate
from lightning_distill.guidance import Guidance, IntervalGuidance, RandomGuidance
from lightning_distill.methods import DMD, DMD2, KnowledgeDistillation, PairRegression
from lightning_distill.methods.solved_pairs import SolvedPairs
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.small import ResidualMLP
from lightning_distill.networks.specs import NewDenoiser, ZooDenoiser
from lightning_distill.networks.two_time import TwoTime
from lightning_distill.processes import FlowMatching, VariancePreserving
from lightning_distill.times import few_step_times
from lightning_distill.trajectories import describe_process, record_noise

TOLD = TwoTime(kind=None, guidance=True)


def write(folder, *more, num=96, teacher="digits"):
    words = ["--teacher", teacher, "--num", str(num), "--steps", "8", "--shard-size", "32", "--out", str(folder)]
    assert main(["trajectories", *words, *more]) == 0
    return str(folder)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """One store of each kind, made by the shipped teacher of digits."""
    root = tmp_path_factory.mktemp("stores")
    return {
        "pairs": write(root / "pairs", num=512),
        "points": write(root / "points", "--records", "points", "--points", "4"),
        "guided": write(root / "guided", "--records", "guided", "--points", "2", "--guidance", "1", "4"),
    }


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_DISTILL_CACHE", str(tmp_path / "user_cache"))


def fit(model, data, updates=1):
    trainer = Trainer(
        max_steps=updates,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    return model


def method(teacher=None, **settings):
    return DMD2(teacher or ZooDenoiser("digits"), ema=[], **{"fake_score_steps": 1, **settings})


class Kept(DMD2):
    """Keeps the slices of its batches."""

    def student_loss(self, batch):
        self.kept = batch
        return super().student_loss(batch)


# ---------------------------------------------------------------------------------------------- batches
def test_batches_hold_what_was_stored(stores):
    data = Trajectories(stores["guided"], batch_size=8, seed=3)
    data.setup("fit")
    loader = data.train_dataloader()
    batch, rows = next(iter(loader)), loader.indices(0)[0]
    stored = Store(stores["guided"]).gather(rows)
    assert batch.size == 8
    for name in ("x0", "noise", "states"):
        value = getattr(batch, name)
        assert value.dtype == torch.float32
        assert torch.equal(value, stored[name].float())
    assert batch.states.shape == (8, 2, 1, 8, 8)
    assert set(batch.predictions) == {"guided", "unguided", "scale"}
    for name, value in batch.predictions.items():
        assert torch.equal(value, stored[name].float())
    assert torch.equal(batch.cond["class_labels"], rows % 10)
    assert set(batch.cond) == {"class_labels"}
    assert batch.times.tolist() == few_step_times(ZooDenoiser("digits").build().process, 2)
    assert (data.shape, data.num_classes, data.sigma_data) == ((1, 8, 8), 10, 0.752)
    assert Trajectories(stores["guided"], sigma_data=0.7).sigma_data == 0.7


def test_pairs_are_what_the_teacher_makes(stores):
    source, digits = StoredTrajectories(stores["pairs"]), ZooDenoiser("digits").build()
    batch = source.gather(torch.arange(16), 0)
    noise = record_noise(0, 0, 16, (1, 8, 8), torch.float16)
    assert torch.equal(batch.noise, noise)
    want = generate(digits, noise, default_cond(digits, 16), few_step_times(digits.process, 8), "dpmpp_2m")
    torch.testing.assert_close(batch.x0, want.half().float(), rtol=0, atol=0)
    assert batch.states is None
    assert batch.times is None
    assert batch.predictions == {}


def test_slices_and_maps_of_batches_keep_all_fields(stores):
    whole = StoredTrajectories(stores["guided"]).gather(torch.arange(10), 0)
    part = whole.rows(3, 5)
    assert part.size == 2
    assert torch.equal(part.states, whole.states[3:5])
    assert torch.equal(part.predictions["scale"], whole.predictions["scale"][3:5])
    assert torch.equal(part.times, whole.times)
    doubled = whole.map(lambda value: 2 * value)
    for name in ("x0", "noise", "states", "times"):
        assert torch.equal(getattr(doubled, name), 2 * getattr(whole, name))
    assert torch.equal(doubled.predictions["guided"], 2 * whole.predictions["guided"])
    assert torch.equal(doubled.cond["class_labels"], 2 * whole.cond["class_labels"])
    assert doubled.size == 10
    assert Batch(states=torch.zeros(3, 2, 1)).size == 3


def test_a_method_sees_its_slice_of_everything(stores):
    module = Kept(ZooDenoiser("digits"), ema=[], fake_score_steps=1)
    data = Trajectories(stores["guided"], batch_size=6, allow_other_teacher=True)  # DMD2 is told no scale
    fit(module, data)
    assert module.kept.size == 6
    assert module.kept.states.shape == (6, 2, 1, 8, 8)
    assert module.kept.predictions["scale"].shape == (6,)
    assert module.kept.times.shape == (2,)


# ------------------------------------------------------------------------------------------- the teacher
def other_teacher():
    return NewDenoiser(
        lambda: ResidualMLP((1, 8, 8), width=8, depth=1, num_classes=10),
        ZooDenoiser("digits").build().process,
        "flow_prediction",
        sigma_data=0.752,
        null_class=10,
    )


def test_trajectories_of_another_teacher_are_refused(stores):
    message = r"were made by another teacher \(sha256 fa5858f00780\) than the method's .*allow_other_teacher=true"
    module = method(other_teacher())
    with pytest.raises(ValueError, match=message):
        fit(module, Trajectories(stores["pairs"], batch_size=4))
    assert module.skipped_steps.sum() == 0
    assert fit(method(other_teacher()), Trajectories(stores["pairs"], batch_size=4, allow_other_teacher=True))
    assert fit(method(), Trajectories(stores["pairs"], batch_size=4))


@pytest.mark.parametrize(
    ("made", "settings", "message"),
    [
        (("3",), {}, r"made with guidance 3, and the method has another; give it guidance=Guidance\(3\)"),
        (("3",), {"guidance": Guidance(3.0)}, None),
        (("3",), {"guidance": Guidance(2.0)}, "made with guidance 3, and the method has another"),
        (("1",), {"guidance": Guidance(2.0)}, "made with guidance 1, and the method has another"),
        (("1", "4"), {}, "made with guidance between 1 and 4, which this student is not told"),
        (("1", "4"), {"guidance": RandomGuidance(1.0, 4.0), "student": TOLD}, None),
        (("1", "2"), {"guidance": RandomGuidance(1.0, 6.0), "student": TOLD}, "samples would be told 3.5"),
        (("3",), {"guidance": RandomGuidance(1.0, 4.0), "student": TOLD}, "made with guidance 3"),
        (("3", "--guidance-interval", ".2", ".6"), {"guidance": Guidance(3.0)}, r"IntervalGuidance\(3, 0.2, 0.6\)"),
        (("3", "--guidance-interval", ".2", ".6"), {"guidance": IntervalGuidance(3.0, 0.2, 0.6)}, None),
    ],
)
def test_trajectories_of_other_guidance_are_refused(tmp_path, made, settings, message):
    path = write(tmp_path / "made", "--guidance", *made, num=8)
    module = KnowledgeDistillation(ZooDenoiser("digits"), ema=[], **settings)
    if message is None:
        assert fit(module, Trajectories(path, batch_size=4))
        return
    with pytest.raises(ValueError, match=message):
        fit(module, Trajectories(path, batch_size=4))
    other = KnowledgeDistillation(ZooDenoiser("digits"), ema=[], **settings)
    assert fit(other, Trajectories(path, batch_size=4, allow_other_teacher=True))


def test_states_of_another_process_are_refused_and_pairs_are_not(stores):
    teacher = ZooDenoiser("digits", method_process=VariancePreserving(zero_terminal_snr=True))
    with pytest.raises(
        ValueError, match=r"process FlowMatching\(\), but the teacher works in VariancePreserving\(beta_"
    ):
        fit(method(teacher), Trajectories(stores["points"], batch_size=4))
    assert fit(method(teacher), Trajectories(stores["pairs"], batch_size=4))


def test_the_same_weights_read_otherwise_are_another_teacher(stores):
    digits, key = ZooDenoiser("digits").build(), Store(stores["guided"]).key
    module = SimpleNamespace(teacher=digits, teacher_fingerprint=lambda: key["teacher"])
    check_teacher(key, module, "here")
    digits.null_class = 9
    with pytest.raises(ValueError, match=r"a teacher with null.class_labels=10, but the method's has 9; make them"):
        check_teacher(key, module, "here")
    old = {k: v for k, v in key.items() if k != "denoiser"}
    check_teacher(old, module, "here")  # it does not say


def test_states_in_a_table_of_alphas_belong_to_it():
    def made(power):
        squared = torch.linspace(0.999, 0.01, 100, dtype=torch.float64) ** power
        process = VariancePreserving.from_alphas_cumprod(squared)
        return Denoiser(ResidualMLP((2,), width=4, depth=1), FlowMatching(), "sample"), process

    teacher, process = made(1)
    teacher.process = process
    key = {"teacher": "", "point_times": [0.5], "process": describe_process(process)}
    module = SimpleNamespace(teacher=teacher, teacher_fingerprint=lambda: "")
    check_teacher(key, module, "here")
    teacher.process = made(3)[1]
    with pytest.raises(ValueError, match=r"belong to the noise process VariancePreserving\("):
        check_teacher(key, module, "here")
    del key["process"]["angles"]  # of an earlier version
    check_teacher(key, module, "here")


def test_stores_that_do_not_fit_are_refused(stores, tmp_path):
    StoreWriter(tmp_path / "other", {"kind": "cache"}, 1).write(0, {"x0": torch.zeros(1, 2)})
    with pytest.raises(ValueError, match=r"holds no trajectories .*kind='cache'"):
        Trajectories(str(tmp_path / "other"))
    with pytest.raises(FileNotFoundError, match=r"is not a store: it has no store\.json"):
        Trajectories(str(tmp_path))
    with pytest.raises(ValueError, match="made with the conditions 'classes', not with a store"):
        Trajectories(stores["pairs"], conditions=str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"is a store; read it with Trajectories\(path=...\)"):
        Pairs(stores["pairs"])
    wrong = Trajectories(stores["pairs"], sigma_data=2.0)
    with pytest.raises(ValueError, match="Trajectories has a standard deviation of"):
        wrong.setup("fit")


def test_conditions_are_read_from_their_own_store(tmp_path):
    for name, labels in (("cache", [7, 1, 4]), ("foreign", [7, 1, 5])):
        writer = StoreWriter(tmp_path / name, {"kind": "cache", "labels": labels}, 3)
        writer.write(0, {"class_labels": torch.tensor(labels)})
    cache = str(tmp_path / "cache")
    made = write(tmp_path / "made", "--cond", cache, num=7)
    source = StoredTrajectories(made, conditions=cache)
    batch = source.gather(torch.tensor([6, 2, 0, 4]), 0)
    assert batch.cond["class_labels"].tolist() == [7, 4, 7, 1]
    with pytest.raises(ValueError, match=r"conditions of the trajectories in .* \(class_labels\) lie in the store"):
        Trajectories(made)
    with pytest.raises(ValueError, match="were made with other conditions than those in"):
        Trajectories(made, conditions=str(tmp_path / "foreign"))
    fit(method(), Trajectories(made, conditions=cache, batch_size=4))


def test_conditions_of_a_store_can_be_chosen(tmp_path, capsys):
    writer = StoreWriter(tmp_path / "cache", {"kind": "cache"}, 3)
    writer.write(0, {"class_labels": torch.tensor([7, 1, 4]), "size": torch.zeros(3)})
    cache = str(tmp_path / "cache")
    made = write(tmp_path / "made", "--cond", cache, "--cond-keys", "class_labels", num=4)
    assert set(StoredTrajectories(made, conditions=cache).gather(torch.arange(4), 0).cond) == {"class_labels"}
    words = [
        "trajectories",
        "--teacher",
        "digits",
        "--num",
        "1",
        "--out",
        str(tmp_path / "none"),
        "--cond-keys",
        "taste",
    ]
    assert main([*words, "--cond", cache]) != 0
    assert f"cond keys: the store {cache} has no 'taste', but class_labels, size" in capsys.readouterr().err
    assert main(words) != 0
    assert "give the store that has them as --cond" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------- regression
def test_regression_reads_a_store_and_refuses_another_teachers(stores):
    module = method(other_teacher(), regression_pairs=stores["pairs"], regression_steps=1)
    with pytest.raises(ValueError, match=r"were made by another teacher .* set regression_allow_other_teacher=true"):
        fit(module, Prior(num_classes=10, batch_size=4))
    for cls, settings in ((DMD2, {"regression_steps": 1}), (DMD, {"num_steps": 1})):
        module = cls(
            other_teacher(), regression_pairs=stores["pairs"], regression_allow_other_teacher=True, ema=[], **settings
        )
        fit(module, Prior(num_classes=10, batch_size=4))
    module = method(other_teacher())
    module.configure_model()
    tolerant = PairRegression(stores["pairs"], allow_other_teacher=True)
    assert tolerant.loss(module, 4) > 0


@pytest.mark.parametrize("reader", ["data", "DMD", "DMD2"])
def test_a_flipped_bit_is_refused_before_training_and_repaired_by_the_command(tmp_path, capsys, stores, reader):
    folder = tmp_path / "pairs"
    shutil.copytree(stores["pairs"], folder)
    file = folder / "shard_000005.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))

    def training(verify=True):
        if reader == "data":
            return method(), Trajectories(str(folder), batch_size=4, verify=verify)
        more = {"fake_score_steps": 1, "regression_steps": 1} if reader == "DMD2" else {}
        cls = {"DMD": DMD, "DMD2": DMD2}[reader]
        module = cls(ZooDenoiser("digits"), regression_pairs=str(folder), regression_verify=verify, ema=[], **more)
        return module, Prior(num_classes=10, batch_size=4)

    switch = "verify=false" if reader == "data" else "regression_verify=false"
    sentence = (
        rf"^{file} does not match its checksum; run the command that wrote the store \(lightning-distill trajectories "
        rf"\.\.\. --out {folder}\) once more, .* with {switch}\.$"
    )
    with pytest.raises(ValueError, match=sentence):
        fit(*training())
    fit(*training(verify=False))
    capsys.readouterr()
    write(folder, num=512)
    assert f"{file} does not match its checksum; made again" in capsys.readouterr().err
    assert file.read_bytes() == whole
    fit(*training())
    assert len(list((tmp_path / "user_cache" / "verified").iterdir())) == 1


def test_the_conditions_of_trajectories_are_compared_too(tmp_path):
    StoreWriter(tmp_path / "cache", {"kind": "cache"}, 3).write(0, {"class_labels": torch.tensor([7, 1, 4])})
    cache = str(tmp_path / "cache")
    made = write(tmp_path / "made", "--cond", cache, num=4)
    file = Path(cache, "shard_000000.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-8] + b"\5" + whole[-7:])
    for solved in (True, False):
        pairs = SolvedPairs(num=4, steps=2, conditions=cache) if solved else made
        module = method(regression_pairs=pairs, regression_steps=1, regression_conditions=None if solved else cache)
        with pytest.raises(ValueError, match=r"shard_000000\.safetensors does not match its checksum"):
            fit(module, Prior(num_classes=10, batch_size=4))
    with pytest.raises(ValueError, match=r"shard_000000\.safetensors does not match its checksum"):
        Trajectories(made, conditions=cache).prepare_data()
    Trajectories(made, conditions=cache, verify=False).prepare_data()


def test_a_warm_up_on_the_teachers_pairs_brings_the_student_closer_to_them(stores):
    """One step of the untrained student misses the teacher's end points; 40 updates of regression halve the error."""
    module = method(
        regression_pairs=stores["pairs"],
        regression_steps=40,
        student_optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
    )
    module.configure_model()
    batch = StoredTrajectories(stores["pairs"]).gather(torch.arange(256), 0)

    @torch.no_grad()
    def error():
        x = generate(module.student, batch.noise, batch.cond, module.student_times)
        return float((x - batch.x0).square().mean())

    before = error()
    fit(module, Prior(num_classes=10, batch_size=64), 40)
    assert error() < 0.6 * before


@pytest.mark.parametrize(("weights", "rows"), [([1, 0, 1, 1], [0, 2, 3, 0]), ([1, 0, 3, 1], [0, 2, 3, 0])])
def test_conditions_of_weight_zero_are_left_out(tmp_path, weights, rows):
    writer = StoreWriter(tmp_path, {"text_encoder": "x"}, 4)
    values = torch.arange(4.0)[:, None]
    writer.write(0, {"encoder_hidden_states": values}, [{"weight": weight} for weight in weights])
    told = pytest.warns(UserWarning, match="have weights, and each that is not 0") if 3 in weights else nullcontext()
    with told:
        conditions = StoredConditions(str(tmp_path))
    assert conditions.gather(torch.arange(4))["encoder_hidden_states"].flatten().tolist() == rows
    assert conditions.identity()["records"] == 3
