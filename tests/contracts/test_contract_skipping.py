"""Steps with NaN or inf are skipped without a trace, counted, and end the run when they persist."""

from __future__ import annotations

import copy
import traceback

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from method_cases import CASES, Batches, adam, trainer, without_warm_up
from sampling_of_cases import slow
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.filterwarnings(
    "ignore:ConstantEMA",
    "ignore:.*eval mode",
    "ignore:Using ModelCheckpoint with manual",
    "ignore:Checkpoint directory",
    "ignore:Be aware",
)

SOME = [c for c in CASES if c.name in ("one_step", "lora", "gan_fake_score", "accumulate", "edm_preconditioned")]


def plain_adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-2, fused=False)


#: what is not finite, and the optimiser
BAD = {
    f"{how}-{name}": (how, optimizer)
    for how in ("loss", "gradient")
    for name, optimizer in (("fused", adam), ("plain", plain_adam))
}
BY_DEFAULT = ("loss-fused", "gradient-plain")


class States(Callback):
    """Complete training states at the beginning of every phase and at the end of every cycle."""

    def __init__(self):
        self.before: list[dict] = []
        self.phases: list[str] = []

    def state(self, trainer, module):
        roles = {role for roles in module.phases.values() for role in roles}
        found = {role: list(network.parameters()) for role in roles if (network := getattr(module, role, None))}
        found["ema"] = [p for average in module.student_ema.values() for p in average.parameters()]
        copied = {k: [p.detach().clone() for p in v] for k, v in found.items()}
        optimizers = dict(zip(module.phases, (copy.deepcopy(o.state_dict()["state"]) for o in trainer.optimizers)))
        return {**copied, "optimizers": optimizers}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.before.append(self.state(trainer, pl_module))
        self.phases.append(list(pl_module.phases)[trainer.optimizers.index(optimizer)])

    def on_train_end(self, trainer, pl_module):
        self.before.append(self.state(trainer, pl_module))


def poison(module, phase, updates, how, repeat=0):
    """Spoil the loss, or only its gradient, of one optimizer step of a phase at some student updates."""
    original = module.weighted_sum

    def weighted_sum(name, terms):
        loss = original(name, terms)
        if name == phase and module.draws.update in updates and module.draws.phase == f"{phase}{repeat}":
            if how == "loss":
                return loss * float("inf")
            loss.register_hook(lambda g: g * float("nan"))
        return loss

    module.weighted_sum = weighted_sum


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return all(equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("bad", [name if name in BY_DEFAULT else slow(name) for name in BAD])
@pytest.mark.parametrize("case", SOME, ids=lambda c: c.name)
def test_a_skipped_step_leaves_no_trace(case, bad, tmp_path):
    how, optimizer = BAD[bad]
    for index, phase in enumerate(case.build(tmp_path).phases):
        settings = {"student_optimizer": optimizer}
        if "fake_score_optimizer" in case.settings(tmp_path):
            settings["fake_score_optimizer"] = optimizer
        module = case.build(tmp_path, **settings)
        poison(module, phase, {2}, how)
        states = States()
        fit = trainer(4, callbacks=[states])
        fit.fit(module, case.loader(module))
        assert fit.global_step == 4
        assert module.skipped_steps.tolist() == [float(i == index) for i in range(len(module.phases))]
        assert module.skipped_in_a_row.tolist() == [0.0] * len(module.phases)
        poisoned = 2 * len(module.phase_plan()) + (0 if phase == "student" else 1)
        assert states.phases[poisoned] == phase
        for i, (before, after) in enumerate(zip(states.before, states.before[1:])):
            roles = [r for r in module.phases[states.phases[i]] if r in before]
            skipped = i == poisoned
            for role in roles:
                assert equal(before[role], after[role]) == skipped
            assert equal(before["optimizers"][states.phases[i]], after["optimizers"][states.phases[i]]) == skipped
            if states.phases[i] == "student" and before["ema"]:
                assert equal(before["ema"], after["ema"]) == skipped
        assert all(bool(p.isfinite().all()) for p in module.parameters())


def test_a_bad_batch_is_skipped(tmp_path):
    case = next(c for c in CASES if c.name == "flow")
    module = case.build(tmp_path)
    batches = list(case.loader(module))[:5]
    batches[3].x0[1, 0] = float("nan")
    fit = trainer(5)
    fit.fit(module, Batches(batches))
    assert module.skipped_steps.tolist() == [1.0]
    assert all(bool(p.isfinite().all()) for p in module.parameters())
    for state in fit.optimizers[0].state.values():
        assert state["step"] == 4.0
        assert bool(state["exp_avg_sq"].isfinite().all())


class Norms(Callback):
    """Gradient norms of the last phase of every cycle."""

    def __init__(self):
        self.found: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.found.append(float(pl_module._grad_norm))


@pytest.mark.filterwarnings("ignore:.*autocast")
@pytest.mark.parametrize("optimizer", [adam, plain_adam], ids=["fused", "plain"])
def test_scaled_float16_losses_are_clipped_and_skipped_as_others_are(optimizer, tmp_path):
    case = next(c for c in CASES if c.name == "one_step")

    def fit(spoil=False, **settings):
        torch.manual_seed(0)
        module, norms = case.build(tmp_path, student_optimizer=optimizer, fake_score_optimizer=optimizer), Norms()
        module.configure_model()
        start = [p.detach().clone() for p in module.student.parameters()]
        if spoil:  # the gradients stay finite
            plain = module.student_loss
            module.student_loss = lambda batch: (
                (terms := plain(batch)).losses.update(odd=torch.tensor(torch.inf)) or terms
            )
        trainer(3, callbacks=[norms], **settings).fit(module, case.loader(module))
        return module, norms.found, all(map(torch.equal, start, module.student.parameters()))

    def half():
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}

    full, wanted, _ = fit()
    module, found, _ = fit(**half())
    assert found == pytest.approx(wanted, rel=0.1)
    assert module.skipped_steps.tolist() == [0.0, 0.0]
    for a, b in zip(full.parameters(), module.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=0.02)
    module, _, stood_still = fit(spoil=True, **half())
    assert module.skipped_steps.tolist() == [3.0, 0.0]
    assert stood_still


@pytest.mark.sparse(8)
def test_training_stops_when_steps_stay_bad_and_the_last_checkpoint_is_good(case, build, tmp_path):
    phase = list(case.method.phases)[-1]
    module = build(max_skipped_steps=3)
    for repeat in range(module.fake_score_steps if phase == "fake_score" else 1):
        poison(module, phase, range(2, 100), "loss", repeat)
    saving = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    fit = trainer(50, callbacks=[saving], enable_checkpointing=True, log_every_n_steps=1)
    with pytest.raises(
        RuntimeError, match=f"{phase} updates had a loss or gradient that is not finite.*training stops"
    ):
        fit.fit(module, case.loader(module))
    assert fit.global_step < 8
    saved = torch.load(max(tmp_path.glob("*.ckpt"), key=lambda p: p.stat().st_mtime), weights_only=True)
    assert all(bool(v.isfinite().all()) for v in saved["state_dict"].values())
    states = [s for o in saved["optimizer_states"] for s in o["state"].values()]
    assert all(bool(v.isfinite().all()) for state in states for v in state.values())


# ------------------------------------------------------------------------------------------------ no waiting
class Synchronisations(TorchDispatchMode):
    """Operations whose result the host has to wait for, with the line that caused them."""

    waiting = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select")

    def __init__(self):
        super().__init__()
        self.found: list[str] = []
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        if func.overloadpacket.__name__ in self.waiting:
            frames = [f for f in traceback.extract_stack() if "lightning_distill" in f.filename]
            # prior_std reads a tensor that it has made on the host, wherever the run is
            if not any(f.name == "prior_std" for f in frames):
                self.found.append(f"{func} at {frames[-1].filename}:{frames[-1].lineno}" if frames else str(func))
        return func(*args, **(kwargs or {}))


def test_a_cycle_that_does_not_log_never_waits_for_the_device(case, build):
    module = build(**without_warm_up(case))
    mode = Synchronisations()
    original = module.training_step

    def training_step(batch, batch_idx):
        if batch_idx < 2:  # the first batches are checked for their scaling
            return original(batch, batch_idx)
        with mode:
            return original(batch, batch_idx)

    module.training_step = training_step
    trainer(4).fit(module, case.loader(module))
    assert mode.calls > 100
    assert mode.found == []


def test_waiting_is_noticed():
    mode = Synchronisations()
    with mode:
        float(torch.ones(1))
        bool(torch.ones(1) > 0)
    assert len(mode.found) == 2
