"""Compiled blocks: the same figures, one compilation per variant, eager where something looks inside."""

import copy

import pytest
import torch
from lightning.pytorch import Trainer
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader, Dataset

from lightning_distill.batch import Batch
from lightning_distill.methods import DMD2, MeanFlow
from lightning_distill.networks import compiling
from lightning_distill.networks.adversary import Adversary
from lightning_distill.networks.compiling import CompiledForward, compile_blocks
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.roles import Lora
from lightning_distill.networks.specs import ZooDenoiser, as_denoiser
from lightning_distill.processes import EDM
from lightning_distill.tangents import value_and_tangent


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """Compile for the test alone, by dynamo without the compiler behind it, which has nothing to do with hooks."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(compiling, "_compiled", {})
    monkeypatch.setattr(compiling, "_BACKEND", "eager")
    yield
    torch._dynamo.reset()


def graphs():
    return counters["stats"]["unique_graphs"]


@pytest.fixture
def inputs():
    return torch.randn(4, 1, 8, 8), torch.full((4,), 0.5, dtype=torch.float64), {"class_labels": torch.arange(4)}


@pytest.fixture
def pair():
    plain = as_denoiser(ZooDenoiser("digits"))
    compiled = copy.deepcopy(plain)
    assert compile_blocks(compiled) == 4
    assert compile_blocks(compiled) == 0  # a network that roles share
    return plain, compiled


def test_figures_and_names_are_the_same_and_blocks_share_their_code(pair, inputs):
    plain, compiled = pair
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    for network in pair:
        network(*inputs).x0.square().mean().backward()
    for a, b in zip(plain.parameters(), compiled.parameters()):
        torch.testing.assert_close(a.grad, b.grad)
    assert graphs() == 1  # four blocks


def test_a_copy_has_weights_of_its_own(pair, inputs):
    plain, compiled = pair
    twin, doubled = copy.deepcopy(compiled), copy.deepcopy(plain)
    for network in (twin, doubled):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(2.0)
    assert isinstance(twin.network.blocks[0].forward, CompiledForward)
    assert torch.equal(twin(*inputs).x0, doubled(*inputs).x0)
    assert torch.equal(compiled(*inputs).x0, plain(*inputs).x0)


@pytest.mark.parametrize("taps", [["blocks.1"], ["blocks.0", "blocks.2.inner"]])
def test_taps_at_and_inside_blocks(pair, inputs, taps):
    plain, compiled = pair
    compiled(*inputs)
    before = graphs()
    for _ in range(3):
        found, expected = (network.feature_maps(*inputs, taps) for network in (compiled, plain))
        assert all(torch.equal(found[name], expected[name]) for name in taps)
    assert graphs() == before
    assert not any(block.forward.paused for block in compiled.network.blocks)


def test_hooks_inside_of_blocks_act_from_the_call_after_they_are_put_there(pair, inputs):
    """As second times and told scales have them where a block embeds the time itself."""
    plain, compiled = pair
    first = compiled(*inputs).x0
    name = next(n for n, m in plain.network.blocks[1].named_modules() if isinstance(m, torch.nn.Linear))

    def hooked(factor):
        return [
            network.network.blocks[1].get_submodule(name).register_forward_hook(lambda *a: a[2] * factor)
            for network in pair
        ]

    for factor in (2.0, 3.0):
        handles = hooked(factor)
        want, got = (network(*inputs).x0 for network in pair)
        torch.testing.assert_close(got, want)
        assert not torch.allclose(got, first)
        for handle in handles:
            handle.remove()
    compiled_before = graphs()
    torch.testing.assert_close(compiled(*inputs).x0, first)
    assert graphs() == compiled_before


def test_tangents_run_the_blocks_as_they_are_written(pair, inputs):
    x, t, cond = inputs
    before = graphs()
    results = []
    for network in pair:
        results.append(
            value_and_tangent(lambda x, network=network: network(x, t, cond).x0, (x,), (torch.ones_like(x),))
        )
    torch.testing.assert_close(results[0], results[1])
    assert graphs() - before == 1  # of the value, none of the tangent


class Samples(Dataset):
    """Batches of a method; notes how many graphs were compiled before each."""

    def __init__(self, size):
        self.size, self.compiled = size, []

    def __len__(self):
        return 8

    def __getitem__(self, index):
        self.compiled.append(graphs())
        x0 = torch.randn(self.size, 1, 8, 8, generator=torch.Generator().manual_seed(index)).clamp(-1, 1)
        return Batch(x0=x0, cond={"class_labels": torch.arange(self.size) % 10}, size=self.size)


def four_cycles(compile_blocks, make, **settings):
    torch.manual_seed(0)
    module = make(ZooDenoiser("digits"), compile_blocks=compile_blocks, ema=[], **settings)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    samples = Samples(4 * module.slices_per_cycle)
    Trainer(max_steps=4, enable_model_summary=False, **quiet).fit(module, DataLoader(samples, batch_size=None))
    return module, samples.compiled


METHODS = {
    "phases": (DMD2, {"gan": Adversary(["blocks.1"])}),
    "adapters on one backbone": (DMD2, {"student": Lora(rank=2), "fake_score": Lora(rank=2)}),
    "tangents": (MeanFlow, {}),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_train_the_same_and_compile_nothing_after_the_first_cycle(name):
    make, settings = METHODS[name]
    plain, _ = four_cycles(False, make, **settings)
    compiled, after = four_cycles(True, make, **settings)
    for (key, a), b in zip(plain.student.state_dict().items(), compiled.student.state_dict().values()):
        torch.testing.assert_close(a, b, msg=key)
    assert after[-1] == after[2] > 0
    assert all(isinstance(block.forward, CompiledForward) for block in compiled.student.network.blocks)


def test_a_network_without_known_blocks_is_refused():
    class Nameless(torch.nn.Module):
        def forward(self, x, t):
            return x

    with pytest.raises(ValueError, match="no blocks are known of Nameless"):
        compile_blocks(Denoiser(Nameless(), EDM(), "sample"))


def test_a_compiler_that_is_missing_is_one_sentence(pair, inputs, monkeypatch):
    def broken(graph, example_inputs):
        raise RuntimeError("no C++ compiler found")

    monkeypatch.setattr(compiling, "_BACKEND", broken)
    with pytest.raises(
        RuntimeError, match=r"compile_blocks: torch cannot compile ResidualBlock.*set compile_blocks: false"
    ):
        pair[1](*inputs)
