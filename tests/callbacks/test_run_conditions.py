"""Samples inside runs of text and of latents: their conditions come from the run's data, and nothing is cut off."""

import pytest
import tiny_pipelines
import tiny_text
import torch
from PIL import Image
from small_runs import trainer
from torch import nn
from torch.utils.data import DataLoader, StackDataset

from lightning_distill.batch import Batch
from lightning_distill.callbacks.evaluation import GenerativeEvaluation
from lightning_distill.callbacks.samples import SampleGrid
from lightning_distill.data.base import DistillationDataModule
from lightning_distill.data.cached import CachedConditions, CachedLatents
from lightning_distill.data.loader import InMemory
from lightning_distill.data.prior import Prior
from lightning_distill.data.store import StoreWriter
from lightning_distill.evaluation import sample_many
from lightning_distill.evaluation.conditions import RunConditions
from lightning_distill.evaluation.references import reference_samples
from lightning_distill.evaluation.sampling import makes_pixels
from lightning_distill.generation import generate, index_noise, needed_conditions
from lightning_distill.guidance import Guidance
from lightning_distill.methods import DMD2
from lightning_distill.metrics.clip_score import CLIPScore
from lightning_distill.metrics.extractors import ModuleExtractor
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.pixel_decoder import PixelDecoder
from lightning_distill.networks.small import ResidualMLP
from lightning_distill.processes import FlowMatching

pytestmark = pytest.mark.filterwarnings("ignore:.*eval mode", "ignore:Checkpoint directory")
#: tokens of a prompt, another number than that of example conditions
TOKENS = 12


class Texts(DistillationDataModule):
    """Seven prompts and their latents."""

    num_classes, sigma_data, shape = None, 1.0, (4, 8, 8)

    def make_source(self):
        generator = torch.Generator().manual_seed(5)
        self.rows = torch.randn(7, TOKENS, 8, generator=generator)
        x0 = torch.randn(7, *self.shape, generator=generator)
        return InMemory(Batch(cond={"encoder_hidden_states": self.rows}, x0=x0))


def text_denoiser():
    null = torch.randn(1, TOKENS, 8, generator=torch.Generator().manual_seed(6))
    return tiny_pipelines.sd15().denoiser(null_cond={"encoder_hidden_states": null})


def text_run(**settings):
    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.01)

    own = {"fake_score_steps": 1, "student_optimizer": sgd, "fake_score_optimizer": sgd, "check_data": False}
    return DMD2(text_denoiser(), guidance=Guidance(3.0), **{**own, **settings})


def test_conditions_are_rows_of_the_data_by_index():
    denoiser, data = text_denoiser(), Texts()
    conditions = RunConditions(data)
    assert needed_conditions(denoiser) == ["encoder_hidden_states"]
    assert conditions.from_data(denoiser)
    got = conditions(denoiser, 5, first=4)["encoder_hidden_states"]
    assert torch.equal(got, data.rows[[4, 5, 6, 0, 1]])
    whole, labels = sample_many(denoiser, 9, [1.0], "ode", 0, conditions=conditions, batch_size=4)
    assert labels is None
    part, _ = sample_many(denoiser, 3, [1.0], "ode", 0, first=5, conditions=conditions)
    torch.testing.assert_close(part, whole[5:8], rtol=1e-4, atol=1e-4)
    cond = {"encoder_hidden_states": data.rows[torch.arange(9) % 7]}
    expected = generate(denoiser, index_noise(9, (4, 8, 8), 0), cond, [1.0], "ode")
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-4)
    assert whole.abs().max() > 1.5  # latents are not pixels
    with pytest.raises(ValueError, match="needs encoder_hidden_states for every sample, and no data are given"):
        sample_many(denoiser, 3, [1.0], "ode", 0)


@pytest.mark.parametrize("kind", ["items", "batches"])
def test_conditions_of_loaders(kind):
    rows = torch.randn(6, TOKENS, 8)
    items = [{"cond": {"encoder_hidden_states": row}} for row in rows]
    loader = DataLoader(items, batch_size=2, shuffle=True)
    if kind == "batches":
        loader = DataLoader([Batch(cond={"encoder_hidden_states": rows})], batch_size=None)
    state = torch.get_rng_state()
    got = RunConditions(loader)(text_denoiser(), 8)["encoder_hidden_states"]
    assert torch.equal(got, rows[torch.arange(8) % 6])
    assert torch.equal(torch.get_rng_state(), state)


def test_classes_in_turn_unless_the_data_have_more():
    labelled = Denoiser(ResidualMLP((2,), width=8, depth=1, num_classes=3), FlowMatching(), "flow_prediction")
    for data in (None, Prior(num_classes=3), DataLoader(StackDataset(torch.randn(4, 2), torch.zeros(4).long()), 2)):
        conditions = RunConditions(data)
        assert conditions(labelled, 4, first=1)["class_labels"].tolist() == [1, 2, 0, 1]
        assert not conditions.from_data(labelled)
    plain = Denoiser(ResidualMLP((2,), width=8, depth=1), FlowMatching(), "flow_prediction")
    assert RunConditions()(plain, 4) == {}

    class Own(nn.Module):
        def forward(self, x, t, words):
            return x * words.mean()

    own = Denoiser(Own(), FlowMatching(), "flow_prediction")
    assert needed_conditions(own) == ["words"]
    given = RunConditions(DataLoader([{"cond": {"words": torch.tensor([float(i)])}} for i in range(3)], 2))
    assert given(own, 4)["words"].flatten().tolist() == [0.0, 1.0, 2.0, 0.0]


def test_pixels_are_clamped_and_latents_are_not(tmp_path):
    class Large(nn.Module):
        config: dict = {}

        def forward(self, x, t):
            return -9.0 * torch.ones_like(x)

    denoiser = Denoiser(Large(), FlowMatching(), "flow_prediction")
    for shape, most in (((3, 4, 4), 1.0), ((1, 4, 4), 1.0), ((4, 4, 4), 9.0), ((3, 4), 9.0)):
        samples, _ = sample_many(denoiser, 2, [1.0], "ode", 0, shape=shape)
        assert (samples.abs().max() == 1.0) if most == 1.0 else (samples.abs().max() > most - 4), shape
    # latents of three channels are known by the autoencoder of their pipeline
    (tmp_path / "vae").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    denoiser.network.config = {"_name_or_path": str(tmp_path)}
    assert not makes_pixels(denoiser, (3, 4, 4))
    assert sample_many(denoiser, 2, [1.0], "ode", 0, shape=(3, 4, 4))[0].abs().max() > 5


def test_grids_of_guided_text_runs(tmp_path):
    decoder = PixelDecoder(str(tiny_text.vae(tmp_path / "pipeline")))
    grid = SampleGrid(2, num_samples=3, teacher_steps=2, strip=2, strip_samples=2, decoder=decoder)
    run, module, data = trainer(tmp_path, 2, callbacks=[grid]), text_run(), Texts(batch_size=2)
    run.fit(module, data)
    folder = tmp_path / "run" / "version_0" / "samples"
    assert sorted(p.name for p in folder.iterdir()) == ["step_000002.png", "strip_000002.png"]
    with Image.open(folder / "strip_000002.png") as strip:  # two rows a sample, of 16 pixels enlarged and a border
        assert strip.size == (2 * (2 * 16 + 2) + 2, 4 * (2 * 16 + 2) + 2)
    samples = grid.panels(module)["student, 1 step"]
    cond = {"encoder_hidden_states": data.rows[:3]}
    noise = index_noise(3, (4, 8, 8), grid.seed)
    expected = generate(module.sampling_network(), noise, cond, module.student_times, "renoise")
    torch.testing.assert_close(samples, expected, rtol=1e-4, atol=1e-4)


def test_grids_of_latents_are_told(tmp_path):
    run = trainer(tmp_path, 1, callbacks=[SampleGrid(num_samples=2, teacher_steps=0, strip=0)])
    with pytest.warns(UserWarning, match="first channels of latents of shape"):
        run.fit(text_run(), Texts(batch_size=2))
    with Image.open(tmp_path / "run" / "version_0" / "samples" / "step_000001.png") as picture:
        assert picture.size[0] > 0


@pytest.mark.parametrize("callback", [SampleGrid(2), GenerativeEvaluation(2, extractors=[])])
def test_runs_without_such_conditions_are_refused_before_they_begin(tmp_path, callback):
    module = text_run()
    run = trainer(tmp_path, 2, callbacks=[callback])
    with pytest.raises(ValueError, match="needs encoder_hidden_states for every sample, and Prior has no conditions"):
        run.fit(module, Prior(batch_size=2))
    assert run.global_step == 0


def test_evaluation_of_text_runs(tmp_path):
    seen = []

    class Watched(nn.Module):
        num_features = 6

        def forward(self, x):
            seen.append(x)
            return x.flatten(1)[:, :6]

    callback = GenerativeEvaluation(
        num_samples=10,
        extractors=[ModuleExtractor(Watched(), name="flat")],
        reference="data",
        measures=["fd"],
        teacher_steps=1,
        table=False,
    )
    run, module, data = trainer(tmp_path, 1, callbacks=[callback]), text_run(), Texts(batch_size=2)
    run.fit(module, data)
    cond = {"encoder_hidden_states": data.rows[torch.arange(10) % 7]}
    noise = index_noise(10, (4, 8, 8), callback.seed)
    expected = generate(module.sampling_network(), noise, cond, module.student_times, "renoise")
    torch.testing.assert_close(seen[-1].float(), expected, rtol=1e-3, atol=1e-3)
    kept = list((tmp_path / "cache" / "conditions").rglob("teachers/*.json"))
    assert len(kept) == 1  # apart from the teacher's rows for other prompts
    other = Texts()
    other.source.data.cond["encoder_hidden_states"] += 1.0
    assert RunConditions(other).digest != RunConditions(Texts()).digest == callback._conditions.digest


# ------------------------------------------------------------------------------------------------ stores of prompts
def store(folder, n=7, latent=(4, 8, 8), prompts="prompt {}"):
    """Record i has the weight 1 + i % 3."""
    writer = StoreWriter(folder, {"what": "test"}, n, shard_size=n)
    generator = torch.Generator().manual_seed(n)
    tensors = {"encoder_hidden_states": torch.randn(n, TOKENS, 8, generator=generator)}
    tensors["x0"] = torch.randn(n, *latent, generator=generator)
    writer.write(0, tensors, [{"prompt": prompts.format(i), "weight": 1.0 + i % 3} for i in range(n)])
    return str(folder)


class Flat(nn.Module):
    num_features = 6

    def forward(self, x):
        return x.flatten(1)[:, :6]


class Looks(CLIPScore):
    """A text-image score and a perceptual distance for anything; remembers what was compared."""

    def __init__(self):
        super().__init__()
        self.seen, self.pairs = [], []

    def check(self, shape=None):
        assert shape == (4, 8, 8)

    def score(self, images, prompts):
        self.seen += prompts
        return torch.ones(len(images))

    def __call__(self, a, b):
        self.pairs.append((a, b))
        return torch.ones(len(a))


def test_text_and_repeated_conditions_of_stores_are_measured(tmp_path):
    looks = Looks()
    callback = GenerativeEvaluation(
        num_samples=11,
        extractors=[ModuleExtractor(Flat(), name="flat")],
        reference="data",
        measures=["clip_score", "lpips_diversity"],
        clip=looks,
        perceptual=looks,
        teacher_steps=0,
        table=False,
    )
    data, module = CachedLatents(store(tmp_path / "store"), batch_size=2), text_run()
    trainer(tmp_path, 1, callbacks=[callback]).fit(module, data)
    assert {"clip_score", "lpips_diversity"} <= callback.history.rows[0].metrics.keys()
    records = data.source.records(torch.arange(7), 0)
    assert records.tolist() != list(range(7))  # drawn by weight
    rows = torch.arange(11) % 5  # half as many conditions as samples, so that each comes twice
    assert looks.seen == [f"prompt {i}" for i in records[rows].tolist()]
    samples, _ = sample_many(
        module.sampling_network(), 11, [1.0], "renoise", callback.seed, conditions=RunConditions(data, most=5)
    )
    (pair,) = looks.pairs
    assert len(pair[0]) == 6  # five conditions, one of them three times
    expected = [(i, i + 5) for i in range(6)]
    order = sorted(expected, key=lambda pair: (pair[0] % 5, pair[0]))
    for side, rows in zip(pair, zip(*order)):
        torch.testing.assert_close(side, samples[list(rows)], rtol=1e-3, atol=1e-3)


def conditions_for(tmp_path, kind):
    if kind == "classes":
        return RunConditions(Prior(num_classes=3)), Denoiser(
            ResidualMLP((2,), width=8, depth=1, num_classes=3), FlowMatching(), "flow_prediction"
        )
    if kind == "nothing":
        return RunConditions(), Denoiser(ResidualMLP((2,), width=8, depth=1), FlowMatching(), "flow_prediction")
    data = CachedConditions(store(tmp_path / kind, prompts="" if kind == "wordless" else "prompt {}"))
    return RunConditions(data), text_denoiser()


@pytest.mark.parametrize(
    ("kind", "measure", "n", "prompts", "message"),
    [
        ("text", "lpips_diversity", 7, (), "7 samples have 7 conditions: use 14 samples or more"),
        ("classes", "lpips_diversity", 3, (), "3 samples have 3 conditions: use 6 samples or more"),
        ("wordless", "clip_score", 20, (), "there are 0 prompts for 7 rows of CachedConditions; give one for each"),
        ("text", "clip_score", 20, ("a", "b"), "there are 2 prompts for 7 rows of CachedConditions"),
        ("classes", "clip_score", 20, ("a", "b"), "there are 2 prompts for 3 classes; give one for each"),
        ("nothing", "clip_score", 20, ("a",), "the network takes neither"),
    ],
)
def test_measures_that_the_conditions_do_not_allow(tmp_path, kind, measure, n, prompts, message):
    conditions, denoiser = conditions_for(tmp_path, kind)
    with pytest.raises(ValueError, match=message):
        conditions.facts(denoiser, [measure], n, prompts)
    conditions.facts(denoiser, ["fd"], n, prompts)


def test_what_an_evaluator_is_told_of_the_conditions(tmp_path):
    conditions, denoiser = conditions_for(tmp_path, "text")
    both = ["clip_score", "lpips_diversity"]
    told = conditions.facts(denoiser, both, 14)
    assert (told["num_classes"], told["rows"], len(told["prompts"])) == (None, 7, 7)
    assert conditions.facts(denoiser, both, 14, list("abcdefg"))["prompts"] == list("abcdefg")
    conditions, denoiser = conditions_for(tmp_path, "classes")
    assert conditions.facts(denoiser, both, 14, list("abc")) == {"num_classes": 3, "rows": None, "prompts": list("abc")}


def test_references_of_stores_of_several_sizes(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr("lightning_distill.evaluation.references._say_once", lines.append)
    for name, n, latent in (("a", 12, (4, 8, 8)), ("b", 9, (4, 4, 16))):
        store(tmp_path / "sizes" / name, n, latent)
    data = CachedLatents(str(tmp_path / "sizes"), batch_size=2)
    first = data.source.sizes[0]
    samples, labels = reference_samples(data, 50)
    assert labels is None
    torch.testing.assert_close(samples, data.source.gather(torch.arange(first), 0).x0)
    assert lines == [f"The reference has {first} of the 21 samples of CachedLatents, of the first size."]
    assert reference_samples(data, 5)[0].shape == (5, 4, 8, 8)
    assert lines[1:] == ["The reference has 5 of the 21 samples of CachedLatents, of the first size, drawn at random."]
