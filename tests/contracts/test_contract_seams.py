"""Splitting a batch over ranks or micro-batches changes neither its draws nor its gradients."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from method_cases import BATCH, Batches, trainer

from lightning_distill.batch import Batch
from lightning_distill.methods import InstaFlow
from lightning_distill.methods.regression import PairRegression

pytestmark = pytest.mark.filterwarnings(
    "ignore:ConstantEMA",
    "ignore:.*eval mode",
    "ignore:Using ModelCheckpoint with manual",
    "ignore:Checkpoint directory",
    "ignore:Be aware",
)


def frozen(parameters):
    return torch.optim.SGD(parameters, lr=0.0)


class Recorder(Callback):
    """Inputs of every network call and gradients of every phase, in order."""

    def __init__(self):
        self.inputs: list[list[torch.Tensor]] = [[]]
        self.gradients: list[list[torch.Tensor]] = []

    def on_fit_start(self, trainer, pl_module):
        for name in ("student", "fake_score", "teacher"):
            network = getattr(pl_module, name, None)
            if network is not None:
                network.register_forward_pre_hook(self.record)

    def record(self, _module, args):
        x, t = args[0].detach().clone(), args[1].detach().clone()
        self.inputs[-1] += [x, t.expand(len(x))]

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.gradients.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters])
        self.inputs.append([])


def cycle(build, batch, rank=0, precision="32-true", **overrides):
    """One cycle with frozen weights, as process ``rank`` sees it."""
    module = build(gradient_clip_val=None, **overrides)
    for phase in module.phases:
        module.optimizer_factories[phase] = frozen
        module.scheduler_factories[phase] = None

    class Rank(type(module)):
        global_rank = rank

    module.__class__ = Rank
    if isinstance(regression := getattr(module, "regression", None), PairRegression):
        regression.pairs(module)  # solved by every rank, and not a part of the cycle
    recorder = Recorder()
    trainer(1, callbacks=[recorder], precision=precision).fit(module, Batches([batch]))
    return module, recorder


def whole_batch(case, module) -> Batch:
    return next(iter(case.loader(module)))


def part_of(batch: Batch, slices: int, rank: int) -> Batch:
    """The half of every slice that process ``rank`` of two gets."""
    half = BATCH // 2
    rows = torch.cat([torch.arange(half) + s * BATCH + rank * half for s in range(slices)])
    return Batch(
        cond={k: v[rows] for k, v in batch.cond.items()},
        x0=None if batch.x0 is None else batch.x0[rows],
        noise=None if batch.noise is None else batch.noise[rows],
        size=len(rows),
    )


def check_gradients(whole, parts, tolerance=1e-4):
    """Equal to float32's rounding, which processors differ in (1e-5 to 5e-5); a lost or double part is of order one."""
    assert len(whole) == len(parts[0]) > 0
    for phase, wanted in enumerate(whole):
        assert any(bool(g.abs().max() > 0) for g in wanted)
        for i, gradient in enumerate(wanted):
            mean = sum(part[phase][i] for part in parts) / len(parts)
            scale = max(1e-3, float(gradient.abs().max()))
            torch.testing.assert_close(mean, gradient, rtol=0, atol=tolerance * scale)


def test_two_ranks_draw_and_learn_what_one_does(case, build):
    module = build()
    batch = whole_batch(case, module)
    if module.accumulate_grad_batches > 1:
        pytest.skip("micro-batches have their own test")
    _, whole = cycle(build, batch)
    ranks = [cycle(build, part_of(batch, module.slices_per_cycle, rank), rank)[1] for rank in range(2)]
    for calls, first, second in zip(whole.inputs, ranks[0].inputs, ranks[1].inputs, strict=True):
        for one, a, b in zip(calls, first, second, strict=True):
            joined = torch.cat([a, b])
            if len(one) % BATCH == 0 and len(one) > BATCH:  # calls that hold several copies of the batch
                copies = len(one) // BATCH
                one = one.unflatten(0, (copies, BATCH))
                joined = torch.cat([part.unflatten(0, (copies, -1)) for part in (a, b)], dim=1)
                if not torch.isclose(joined, one, rtol=1e-5, atol=1e-5).all():  # or several states of each sample
                    one, joined = one.flatten(0, 1), torch.cat([a, b])
            torch.testing.assert_close(joined, one, rtol=1e-5, atol=1e-5)
    check_gradients(whole.gradients, [r.gradients for r in ranks])


def test_ranks_draw_different_noise(case, build):
    module = build()
    if isinstance(module, InstaFlow) and case.data().noise is not None:
        pytest.skip("its first input is the stored noise itself")
    batch = part_of(whole_batch(case, module), module.slices_per_cycle, 0)
    inputs = [cycle(build, batch, rank)[1].inputs[0][0] for rank in range(2)]
    assert torch.isclose(*inputs).float().mean() < 0.6  # stored pairs may be drawn twice


def test_accumulated_gradients_are_those_of_the_whole_batch(case, build):
    module = build()
    batch = whole_batch(case, module)
    _, whole = cycle(build, batch, accumulate_grad_batches=1)
    for parts in (2, 4):
        _, accumulated = cycle(build, batch, accumulate_grad_batches=parts)
        check_gradients(whole.gradients, [accumulated.gradients])


@pytest.mark.filterwarnings("ignore:.*autocast")
def test_mixed_precision_keeps_float32_weights_and_gradients(case, build):
    module = build()
    batch = whole_batch(case, module)
    _, full = cycle(build, batch)
    mixed_module, mixed = cycle(build, batch, precision="bf16-mixed")
    assert all(p.dtype == torch.float32 for p in mixed_module.parameters())
    differs = False
    for want, got in zip(full.gradients, mixed.gradients, strict=True):
        a, b = (torch.cat([g.flatten() for g in gradients]) for gradients in (want, got))
        assert b.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.9
        assert float((a - b).norm() / a.norm()) < 0.4
        differs |= not torch.equal(a, b)
    assert differs  # the networks did run in bfloat16
