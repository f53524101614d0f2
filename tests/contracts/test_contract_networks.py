"""Which networks a phase changes, runs and saves; what the averages are."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from method_cases import CASES, DMD2, concrete_methods, methods_without_case, trainer, without_warm_up
from sampling_of_cases import CONTRACTS, METHODS, sampled

from lightning_distill.generation import default_cond
from lightning_distill.methods import DistillationModule, TeacherTraining
from lightning_distill.methods.teacher_paths import TeacherPaths
from lightning_distill.networks.lora import AdapterDenoiser
from lightning_distill.networks.merging import base_state_dict
from lightning_distill.networks.teacher_features import TeacherFeatures
from lightning_distill.prediction import Prediction

pytestmark = pytest.mark.filterwarnings(
    "ignore:ConstantEMA",
    "ignore:.*eval mode",
    "ignore:Using ModelCheckpoint with manual",
    "ignore:Checkpoint directory",
    "ignore:Be aware",
)


def test_every_method_has_a_case():
    missing = methods_without_case(concrete_methods())
    assert not missing, (
        f"no contract test runs {missing}: add a Case with a tiny network to CASES in tests/contracts/method_cases.py."
    )


def test_a_method_without_a_case_is_noticed():
    class Unknown(TeacherTraining):
        pass

    assert {DMD2, TeacherTraining} <= concrete_methods()
    assert methods_without_case([DMD2, Unknown]) == ["Unknown"]


def test_case_names_are_unique():
    assert len({case.name for case in CASES}) == len(CASES)


def test_by_default_every_method_meets_several_contracts_and_every_case_some():
    by_turn = [sampled(CASES, turn) for turn in range(CONTRACTS)]
    assert set().union(*by_turn) == {case.name for case in CASES}
    met = Counter(method for chosen in by_turn for method in {case.method for case in CASES if case.name in chosen})
    assert met == dict.fromkeys((case.method for case in CASES), CONTRACTS // METHODS)
    eighths = [{case.method for case in CASES if case.name in sampled(CASES, turn, 8)} for turn in range(8)]
    assert set().union(*eighths) == set(met)
    assert not any(a & b for a, b in zip(eighths, [*eighths[1:], eighths[0]]))


# ------------------------------------------------------------------------------------------------ helpers
def roles_of(module: DistillationModule) -> dict[str, list[torch.Tensor]]:
    """Tensors of every trained role, average and the teacher, by name."""
    names = {role for roles in module.phases.values() for role in roles}
    found = {name: list(part.parameters()) for name in names if (part := getattr(module, name, None)) is not None}
    found |= {f"ema/{name}": list(average.parameters()) for name, average in module.student_ema.items()}
    if module.teacher is not None:
        found["teacher"] = list(base_state_dict(module.teacher.network).values())
    return found


def copies(module: DistillationModule) -> dict[str, list[torch.Tensor]]:
    return {name: [t.detach().clone() for t in tensors] for name, tensors in roles_of(module).items()}


class Snapshots(Callback):
    """Weights, network calls and gradients at every optimizer step (the boundaries of the phases)."""

    def __init__(self):
        self.weights, self.phases, self.calls, self.with_grad = [], [], [], []
        self.teacher_graphs: list[bool] = []
        self._counter: Counter[str] = Counter()

    def on_fit_start(self, trainer, pl_module):
        for name in ("student", "fake_score", "teacher"):
            network = getattr(pl_module, name, None)
            if network is not None:
                network.register_forward_pre_hook(lambda *_, name=name: self._counter.update([name]))
        if pl_module.teacher is not None:
            pl_module.teacher.register_forward_hook(self._record_graph)

    def _record_graph(self, _module, _args, out):
        tensors = [out.raw, *out.features.values()] if isinstance(out, Prediction) else list(out.values())
        self.teacher_graphs.append(any(t.requires_grad for t in tensors))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.weights.append(copies(pl_module))
        self.phases.append(list(pl_module.phases)[trainer.optimizers.index(optimizer)])
        self.calls.append(self._counter)
        self._counter = Counter()
        found = roles_of(pl_module)
        self.with_grad.append({n for n, tensors in found.items() if any(t.grad is not None for t in tensors)})

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.last = copies(pl_module)


def run(case, module, steps=1):
    seen = Snapshots()
    trainer(steps, callbacks=[seen]).fit(module, case.loader(module))
    return seen


def without_game(module, phases) -> list[bool]:
    """Which of some optimizer steps are critic updates that a lazy game leaves out."""
    every, critics = getattr(module, "gan_every", 1), -1
    idle = []
    for phase in phases:
        critics += phase == "fake_score"
        idle.append(phase == "fake_score" and critics % every != 0)
    return idle


def changed(before, after) -> set[str]:
    return {name for name in before if any(not torch.equal(a, b) for a, b in zip(before[name], after[name]))}


# ------------------------------------------------------------------------------------------------ phases
def test_a_phase_changes_its_own_networks_and_no_other(case, build):
    module = build(**without_warm_up(case))
    seen = run(case, module, steps=2)
    plan = [phase for phase, _ in module.phase_plan()]
    assert seen.phases == plan * 2
    present = set(roles_of(module))
    idle = without_game(module, seen.phases)
    for phase, before, after, rests in zip(seen.phases, seen.weights, [*seen.weights[1:], seen.last], idle):
        expected = set(module.phases[phase]) & present
        if phase == "student":
            expected |= {f"ema/{name}" for name in module.student_ema}
        if rests:
            expected -= {"discriminator"}  # zero gradients, and no momentum in the cases' optimizer
        assert changed(before, after) == expected


def test_only_the_networks_of_a_phase_collect_gradients(case, build):
    module = build()
    seen = run(case, module)
    for phase, with_grad in zip(seen.phases, seen.with_grad):
        assert with_grad == set(module.phases[phase]) & set(roles_of(module))
    assert all(p.grad is None for p in module.parameters())
    trained = {id(p) for roles in module.phases.values() for role in roles for p in module.role_parameters(role)}
    assert all(p.requires_grad == (id(p) in trained) for p in module.parameters())


def test_the_teacher_never_changes_and_has_no_gradient(case, build):
    module = build()
    if module.teacher is None:
        pytest.skip("the method has no teacher")
    want = copies(module)["teacher"]
    fingerprint = module.teacher_fingerprint()
    seen = run(case, module, steps=3)
    assert all(torch.equal(a, b) for a, b in zip(want, copies(module)["teacher"], strict=True))
    module._teacher_fingerprint = None
    assert module.teacher_fingerprint() == fingerprint
    assert not any("teacher" in names for names in seen.with_grad)
    assert not any(p.requires_grad for n, p in module.teacher.named_parameters() if "lora_" not in n)
    assert not module.teacher.training


def test_forwards_are_those_declared(case, build):
    module = build(**without_warm_up(case))
    rollouts = []
    simulate = module.simulate_student
    module.simulate_student = lambda *args: (rollouts.append(1), simulate(*args))[1]
    seen = run(case, module, steps=2)
    declared, steps = module.forward_counts(), len(module.student_times) if rollouts else 1
    stored = isinstance(module, TeacherPaths) and case.data().noise is not None
    sampled: set[tuple[int, int]] = set()
    cycle, idle = module.phase_plan(), without_game(module, seen.phases)
    for i, (phase, calls) in enumerate(zip(seen.phases, seen.calls)):
        update, (_, part) = i // len(cycle), cycle[i % len(cycle)]
        expected = Counter(declared[phase])
        if stored:  # nothing is left to solve
            expected.subtract({"teacher": module.solver_calls})
        if idle[i]:
            expected.subtract({module.gan.features: 1 if module.shares_forward else 2})
        if case.method is not TeacherTraining:
            # a rollout makes the samples of a slice once, in 1 + stop calls
            stop = module.streams.integer(f"slice{part}/stop", update, steps)
            again = getattr(module, "fresh_samples", False) and phase == "fake_score"  # after the student's update
            fresh = (update, part) not in sampled or (again and seen.phases[i - 1] == "student")
            sampled.add((update, part))
            own = declared[phase]["student"] - (phase == "student" or again)  # calls beside the rollout's
            assert own >= 0
            expected["student"] = own + (1 + stop if fresh else 0)
        per_pass = {name: n * module.accumulate_grad_batches for name, n in expected.items() if n}
        assert dict(calls) == per_pass, (phase, i)


def test_the_teacher_runs_without_graph_unless_its_features_are_needed(case, build):
    module = build()
    if module.teacher is None:
        pytest.skip("the method has no teacher")
    seen = run(case, module)
    gan = getattr(module, "gan", None)
    needed = getattr(module, "differentiates_scores", False) or (
        gan is not None and gan.features == "teacher" and bool(gan.network_taps)
    )
    regression = getattr(getattr(module, "regression", None), "distance", None)
    needed |= isinstance(getattr(module, "perceptual", regression), TeacherFeatures)
    assert any(seen.teacher_graphs) == needed


# ------------------------------------------------------------------------------------------------ counters
def test_a_cycle_is_one_student_update_and_the_declared_others(case, build):
    module = build(**without_warm_up(case))
    fit = trainer(3, callbacks=[seen := Snapshots()])
    fit.fit(module, case.loader(module))
    counts = Counter(seen.phases)
    assert fit.global_step == counts["student"] == 3
    if "fake_score" in module.phases:
        assert counts["fake_score"] == 3 * module.fake_score_steps
    for phase, optimizer in zip(module.phases, fit.optimizers):
        steps = {float(state["step"]) for state in optimizer.state.values()}
        assert steps == {float(counts[phase])}
    for config in fit.lr_scheduler_configs:
        assert config.scheduler.last_epoch == 3
    assert len(fit.lr_scheduler_configs) == len(module.phases)


def test_every_term_is_logged_by_phase(case, build):
    module = build(**without_warm_up(case))
    fit = trainer(1, log_every_n_steps=1)
    terms = {}
    for phase in module.phases:
        original = getattr(module, f"{phase}_loss")

        def loss(batch, phase=phase, original=original):
            found = original(batch)
            terms.setdefault(phase, set()).update(found.losses, found.diagnostics)
            return found

        setattr(module, f"{phase}_loss", loss)
    fit.fit(module, case.loader(module))
    for phase in module.phases:
        for name in {*terms[phase], "total", "grad_norm", "skipped_steps"}:
            assert bool(torch.isfinite(fit.callback_metrics[f"train/{phase}/{name}"]))
        assert fit.callback_metrics[f"train/{phase}/grad_norm"] > 0


# ------------------------------------------------------------------------------------------------ checkpoints
def expected_keys(module: DistillationModule) -> set[str]:
    skipped = {"skipped_steps", "skipped_in_a_row"}
    own = {key for key in torch.nn.Module.state_dict(module) if "." not in key}
    assert skipped <= own
    keys = set(own)
    for name in {*module.targets, *(role for roles in module.phases.values() for role in roles)}:
        if (part := getattr(module, name, None)) is not None:
            keys |= {f"{name}.{key}" for key in part.state_dict()}
    for name, average in module.student_ema.items():
        keys |= {f"student_ema.{name}.{key}" for key in average.state_dict()}
    return keys


def test_checkpoints_hold_what_is_trained_and_nothing_else(case, build, tmp_path):
    module = build()
    fit = trainer(1)
    fit.fit(module, case.loader(module))
    fit.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == set(module.state_dict()) == expected_keys(module)
    assert not any(key.startswith("teacher") for key in saved["state_dict"])
    owned = {id(p) for optimizer in fit.optimizers for group in optimizer.param_groups for p in group["params"]}
    assert owned == {id(p) for roles in module.phases.values() for role in roles for p in module.role_parameters(role)}
    if isinstance(module.student, AdapterDenoiser):
        critics = [module.fake_score] if hasattr(module, "fake_score") else []
        ranks = module.student.config.r * (1 + len(module.student_ema)) + sum(c.config.r for c in critics)
        numbers = sum(t.numel() for t in saved["state_dict"].values())
        one = sum(p.numel() for p in module.student.parameters()) // module.student.config.r
        views = 1 + len(critics) + len(module.student_ema)  # each holds its alpha
        assert numbers == one * ranks + views + 2 * len(module.phases)
        assert not any("base_layer" in key for key in saved["state_dict"])
    if module.teacher is not None:
        assert saved["lightning_distill"]["teacher"] == module.teacher_fingerprint()


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("one_step", "lora", "flow")], ids=lambda c: c.name)
def test_foreign_checkpoints_are_refused(case, build, tmp_path):
    module = build()
    fit = trainer(1)
    fit.fit(module, case.loader(module))
    fit.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    key = next(k for k in saved["state_dict"] if k.startswith("student."))

    def refused(message, **changes):
        torch.save({**saved, **changes}, tmp_path / "changed.ckpt")
        with pytest.raises(ValueError, match=message):
            trainer(2).fit(build(), case.loader(module), ckpt_path=tmp_path / "changed.ckpt")

    fewer = {k: v for k, v in saved["state_dict"].items() if k != key}
    refused("1 tensors are missing", state_dict=fewer)
    refused("1 are unknown", state_dict={**saved["state_dict"], "student.network.none": torch.zeros(1)})
    header = saved["lightning_distill"]
    refused("was written by Other", lightning_distill={**header, "method": "Other"})
    if module.teacher is not None:
        refused("the teacher of this configuration", lightning_distill={**header, "teacher": "0" * 64})
    del saved["lightning_distill"]
    refused("was not written by lightning_distill")


# ------------------------------------------------------------------------------------------------ averages
@pytest.mark.sparse(8)
def test_averages_are_float32_follow_the_student_and_never_the_teacher(case, build):
    module = build()
    teacher = set() if module.teacher is None else {p.data_ptr() for p in module.teacher.parameters()}
    trained = {p.data_ptr() for p in module.student.parameters()}
    start = copies(module)
    seen = run(case, module, steps=2)
    for name, profile in zip(module.student_ema, module.ema_profiles, strict=True):
        average = module.student_ema[name]
        assert not average.training
        own = list(average.parameters())
        assert all(p.dtype == torch.float32 and not p.requires_grad for p in own)
        assert not trained & {p.data_ptr() for p in own}
        if isinstance(average, AdapterDenoiser):  # adapters live in the teacher's backbone, its weights do not
            base = {t.data_ptr() for t in base_state_dict(module.teacher.network).values()}
            assert not base & {p.data_ptr() for p in own}
        else:
            assert not teacher & {p.data_ptr() for p in own}
        # after each student update: beta average + (1 - beta) student
        after_first = [w["student"] for w, p in zip([*seen.weights[1:], seen.last], seen.phases) if p == "student"]
        for index, (begin, first, second, p) in enumerate(zip(start[f"ema/{name}"], *after_first, own)):
            b1, b2 = profile.beta(1, 8), profile.beta(2, 8)
            want = b2 * (b1 * begin + (1 - b1) * first) + (1 - b2) * second
            torch.testing.assert_close(p, want, msg=lambda m, index=index: f"parameter {index}: {m}")


@pytest.mark.sparse(8)
def test_sampling_uses_the_network_asked_for(case, build):
    module = build()
    run(case, module, steps=2)
    noise = torch.randn(3, *module.sample_shape)
    steps = None if module.capability == "own_times" or len(module.student_times) == 1 else 1
    count = len(module.student_times) if steps is None else 1

    cond = default_cond(module.student, 3)

    def sample(**kwargs):
        generator = torch.Generator().manual_seed(0)
        return module.sample(3, cond, noise=noise, num_steps=steps, generator=generator, **kwargs)

    networks = {"student": module.student, **module.student_ema}
    for name, network in networks.items():
        calls = []
        handle = network.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        out = sample(weights=name)
        handle.remove()
        assert calls == [1] * count
        assert out.shape == noise.shape
        assert out.dtype == torch.float32
    default = next(iter(module.student_ema), "student")
    assert torch.equal(sample(), sample(weights=default))
    if len(module.ema_profiles) == 1 and module.ema_profiles[0].name.startswith("constant"):
        assert not torch.equal(sample(), sample(weights="student"))
    with pytest.raises(ValueError, match="'teacher' is unknown; choose student"):
        sample(weights="teacher")
