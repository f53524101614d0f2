"""Pi-Flow and ArcFlow: heads on real networks, the first step, segments, samplers, what they learn, messages."""

from __future__ import annotations

import copy

import pytest
import torch
from sampling_of_cases import long
from small_problems import mlp, ready, shift
from test_trajectory_learning import distilled, error, ring_problem  # noqa: F401  (a fixture)
from torch import nn

from lightning_distill.batch import Batch
from lightning_distill.ema import ConstantEMA
from lightning_distill.export.pipeline import export_denoiser
from lightning_distill.generation import generate
from lightning_distill.methods import ArcFlow, PiFlow, SnapFlow
from lightning_distill.networks.analytic import analytic_denoiser, ring
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.policy_head import add_policy_head, policy_head_of, policy_prediction
from lightning_distill.networks.roles import Copy, Lora, averaged_copy
from lightning_distill.networks.small import ResidualMLP, small_dit, small_unet
from lightning_distill.policies import groups_of
from lightning_distill.processes import EDM, FlowMatching, TrigFlow, VariancePreserving
from lightning_distill.samplers import transport
from lightning_distill.times import Uniform, t_min

FLOW = FlowMatching()


def randomised(network, seed=0):
    torch.manual_seed(seed)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network


def teachers():
    unet = small_unet(8, 2, 0, (8, 16), norm_num_groups=4, attention_head_dim=8)
    dit = small_dit(8, 2, 3, patch_size=2, num_layers=1, num_attention_heads=2, attention_head_dim=8,
                    learned_variance=True)  # fmt: skip
    return {
        "mlp": mlp(),
        "unet": Denoiser(randomised(unet), VariancePreserving(zero_terminal_snr=True), "v_prediction"),
        "dit": Denoiser(randomised(dit), FlowMatching(shift=2.0), "flow_prediction"),
        "edm": Denoiser(
            randomised(ResidualMLP((2,), 8, 2)), EDM(0.02, 10.0), "v_prediction", network_process=TrigFlow()
        ),
    }


def conditions(teacher, n):
    return {} if teacher.num_classes is None else {"class_labels": torch.arange(n) % teacher.num_classes}


# ------------------------------------------------------------------------------------------------ the head
@pytest.mark.parametrize("name", ["mlp", "unet", "dit", "edm"])
def test_extra_outputs_lie_where_the_networks_own_do(name):
    """A head whose every group is the last layer itself puts out the network's own output, G times."""
    teacher = teachers()[name]
    n, shape = 3, teacher.sample_shape
    torch.manual_seed(1)
    x, cond = torch.randn(n, *shape), conditions(teacher, n)
    t = torch.full((n,), 0.7 * teacher.process.t_max, dtype=torch.float64)
    before = teacher(x, t, cond).raw
    head = add_policy_head(teacher, "grid", 3)
    last = teacher.network.get_submodule(head.last)
    with torch.no_grad():
        for group in range(3):
            rows = slice(group * len(last.weight), (group + 1) * len(last.weight))
            head.layer.weight[rows] = (group + 1) * last.weight
            head.layer.bias[rows] = (group + 1) * (last.bias if last.bias is not None else 0.0)
    seen = teacher(x, t, cond, taps=("policy_head",))
    assert torch.equal(seen.raw, before)
    extra = head.extra(teacher, seen.features["policy_head"], x, t, cond)
    assert extra.shape == (n, 3, *shape)
    own = Denoiser(teacher.network, teacher.network_process or teacher.process, teacher.prediction_type,
                   family=teacher.family)  # fmt: skip
    scale = teacher._network_input(x, t)[2]
    raw = before if scale is None else own(x * scale, teacher._inner_time(t), cond).raw
    for group in range(3):
        torch.testing.assert_close(extra[:, group], (group + 1) * raw, rtol=1e-4, atol=1e-5)
    assert torch.equal(teacher(x, t, cond).raw, before)


@pytest.mark.parametrize("name", ["mlp", "unet", "dit", "edm"])
@pytest.mark.parametrize("kind", ["grid", "momentum"])
def test_the_first_step_is_the_teachers(name, kind):
    teacher = teachers()[name]
    settings = {"num_steps": 2, "components": 3, "shape": list(teacher.sample_shape), "ema": [ConstantEMA(0.5)]}
    module = ready((ArcFlow if kind == "momentum" else PiFlow)(
        teacher, **settings, **({} if kind == "momentum" else {"policy": kind})
    ))  # fmt: skip
    noise, cond = torch.randn(3, *teacher.sample_shape), conditions(teacher, 3)
    want = generate(teacher, noise, cond, module.student_times, "ode")
    found = module.sample(3, cond, noise=noise)
    torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-4)
    assert torch.equal(found, module.sample(3, cond, noise=noise, weights="student"))
    shift(module.student)
    assert not torch.allclose(module.sample(3, cond, noise=noise, weights="student"), want, atol=1e-3)
    torch.testing.assert_close(module.sample(3, cond, noise=noise), want, rtol=1e-3, atol=1e-4)


def test_a_mixture_starts_along_the_teacher():
    teacher = mlp()
    module = ready(PiFlow(teacher, num_steps=1, components=4))
    x, t = torch.randn(5, 2), torch.ones(5, dtype=torch.float64)
    policy, prediction = module.head(module.student).policy(module.student, x, t, 0 * t)
    torch.testing.assert_close(policy.velocity(x, t), teacher(x, t).flow_prediction)
    assert torch.equal(prediction.raw, teacher(x, t).raw)
    assert float(policy.means.detach().std(1).min()) > 0.0


def test_heads_travel_with_copies_and_adapters():
    teacher = mlp()
    noise = torch.randn(4, 2)
    before = generate(teacher, noise, {}, [1.0, 0.5], "ode")
    module = ready(ArcFlow(teacher, student=Lora(rank=2), num_steps=2, components=2, ema=[ConstantEMA(0.5)]))
    assert torch.equal(generate(teacher, noise, {}, [1.0, 0.5], "ode"), before)
    first = module.sample(4, noise=noise, weights="student")
    torch.testing.assert_close(first, before, rtol=1e-4, atol=1e-5)
    assert any("policy_head.layer" in name for name, _ in module.student.named_parameters())
    shift(module.student)
    made = module.sample(4, noise=noise, weights="student")
    assert not torch.allclose(made, first, atol=1e-3)
    torch.testing.assert_close(module.sample(4, noise=noise), first)
    assert torch.equal(generate(teacher, noise, {}, [1.0, 0.5], "ode"), before)
    # merged into a plain network, with its head
    kept = averaged_copy(module.student, "kept")
    plain = ready(ArcFlow(mlp(), student=Copy(), num_steps=2, components=2, ema=[]))
    again = copy.deepcopy(plain.student)
    shift(again)
    assert policy_head_of(again.network) is not policy_head_of(plain.student.network)
    torch.testing.assert_close(generate(kept, noise, {}, module.student_times, "flow_map"), made, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ the loss
def test_segments_hold_the_drawn_times():
    module = ready(PiFlow(mlp(), student_times=[1.0, 0.7, 0.2]))
    start, end = module.segments(4000)
    t = module.flow_times("segment", 4000)
    assert set(zip(start.tolist(), end.tolist())) == {(1.0, 0.7), (0.7, 0.2), (0.2, 0.0)}
    assert bool(((t <= start) & (t > end)).all())
    assert float((start == 0.7).double().mean()) == pytest.approx(0.5, abs=0.03)


def test_without_data_segments_start_where_the_student_leads():
    module = ready(ArcFlow(mlp(), num_steps=3, components=2, data_free=True, ema=[]))
    shift(module.student)
    seen = []
    for update in range(12):
        ready(module, update=update)
        start, end = module.segments(6)
        assert len(set(start.tolist())) == 1
        x = module.starts(Batch(size=6), start, None)
        noise = module.draws.normal("start", (6, 2))
        stop = module.student_times.index(start[0].item())
        for t, r in zip(module.student_times[:stop], module.student_times[1:]):
            policy, _ = module.head(module.student).policy(
                module.student, noise, torch.full((6,), t).double(), torch.full((6,), r).double()
            )
            noise = policy.step(noise, torch.full((6,), t).double(), torch.full((6,), r).double(), 1)
        torch.testing.assert_close(x, noise)
        seen.append(stop)
        assert end[0] == [*module.student_times, 0.0][stop + 1]
    assert set(seen) == {0, 1, 2}


@pytest.mark.parametrize("process", [VariancePreserving(zero_terminal_snr=True), TrigFlow()])
def test_other_processes_have_the_losses_of_flow_matching(process):
    """The same network seen through another process: equal losses at equal draws."""
    losses = []
    for inner in (None, FLOW):
        torch.manual_seed(0)
        teacher = analytic_denoiser(ring(), FLOW if inner is None else process)
        network = randomised(ResidualMLP((2,), 8, 2))
        own = FLOW if inner is None else process
        student = Denoiser(network, own, "flow_prediction", network_process=inner, data_scale=1.0 if inner else None)
        module = ready(PiFlow(teacher, student=Given(student), num_steps=1, components=3, shape=[2], ema=[],
                              decay_updates=0))  # fmt: skip
        shift(module.student)
        losses.append(float(module.student_loss(Batch(x0=torch.randn(16, 2).sign())).losses["imitation"]))
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


@pytest.mark.parametrize("method", [PiFlow, ArcFlow, SnapFlow])
def test_no_network_is_asked_below_its_least_time(method):
    process = VariancePreserving()
    teacher, least = Denoiser(randomised(ResidualMLP((2,), 8, 2)), process, "epsilon"), t_min(process)
    module, asked = ready(method(teacher, shape=[2])), []
    for network in (module.teacher, module.student):
        network.register_forward_pre_hook(lambda _m, args: asked.append(float(args[1].min())))
    module.student_loss(Batch(x0=torch.randn(2048, 2)))
    assert len(asked) > 1
    assert min(asked) >= least * (1 - 1e-6)


class Given(Copy):
    def __init__(self, denoiser):
        self.denoiser = denoiser

    def build(self, source, name=None):
        return self.denoiser


def test_dropout_and_curriculum_enter_the_rollout_alone():
    batch = Batch(x0=torch.randn(32, 2))

    def loss(update=0, **settings):
        module = ready(PiFlow(mlp(), num_steps=1, components=3, **settings))
        shift(module.student)
        ready(module, update=update)
        terms = module.student_loss(batch)
        return float(terms.losses["imitation"]), float(terms.diagnostics["teacher_ratio"])

    assert loss(update=1, decay_updates=4)[1] == 0.75
    assert loss(update=9, decay_updates=4)[1] == 0.0
    plain = loss(decay_updates=0)[0]
    assert loss(decay_updates=0, dropout=0.5)[0] != plain
    assert loss(update=3, decay_updates=3)[0] == loss(update=3, decay_updates=0)[0]


# ------------------------------------------------------------------------------------------------ samplers, messages
def test_students_are_sampled_with_their_own_segments():
    module = ready(ArcFlow(mlp(), num_steps=2, components=2))
    with pytest.raises(ValueError, match=r"num_steps=1: this student puts out policies for the 2 segments"):
        module.sample(2, num_steps=1)
    assert module.sample(2, num_steps=2, generator=torch.Generator().manual_seed(0)).shape == (2, 2)
    cold = ready(PiFlow(mlp(), num_steps=2, components=3, temperature=0.3))
    warm = ready(PiFlow(mlp(), num_steps=2, components=3))
    noise = torch.randn(4, 2)
    for module in (cold, warm):
        shift(module.sampling_network())
    assert not torch.allclose(cold.sample(4, noise=noise), warm.sample(4, noise=noise))
    # not in the last step
    policy = {"t": torch.tensor(0.5, dtype=torch.float64), "r": torch.tensor(0.0, dtype=torch.float64)}
    last = [transport(policy_prediction(m.sampling_network(), noise, **policy), 0.0) for m in (cold, warm)]
    assert torch.equal(*last)


def test_no_stock_pipeline_is_promised(tmp_path):
    teacher = teachers()["unet"]
    module = ready(ArcFlow(teacher, num_steps=2, components=2))
    with pytest.raises(ValueError, match=r"puts out a policy for each of its steps.*no stock pipeline can sample it"):
        export_denoiser(module.sampling_network(), module.student_times, module.sampler, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (PiFlow, {"policy": "tree"}, "choose one of mixture, grid"),
        (PiFlow, {"points": 0}, "must be 1 or more"),
        (PiFlow, {"window": 1.0}, "share of the segment"),
        (PiFlow, {"policy": "grid", "dropout": 0.1}, "a grid has none; set dropout=0"),
        (PiFlow, {"policy": "grid", "temperature": 0.5}, "no other policy has one; set temperature=1"),
        (ArcFlow, {"temperature": 0.5}, "no other policy has one; set temperature=1"),
        (ArcFlow, {"components": 1}, "at least 2"),
        (PiFlow, {"sampler": "ode"}, "choose flow_map"),
        (PiFlow, {"data_free": True, "training_times": Uniform(0.5, 0.6)}, "leave one of them out"),
        (ArcFlow, {"data_free": True, "training_times": Uniform(0.5, 0.6)}, "leave one of them out"),
    ],
)
def test_bad_settings_are_named(method, settings, message):
    with pytest.raises(ValueError, match=message):
        method(mlp(), **settings)


def test_networks_that_do_not_end_in_a_layer_are_named():
    class Bent(ResidualMLP):
        def forward(self, x, t, class_labels=None):
            return super().forward(x, t).tanh()

    module = ready(PiFlow(Denoiser(Bent((2,), 8, 1), FLOW, "flow_prediction"), num_steps=1))
    with pytest.raises(ValueError, match="does more than rearrange the outputs of its last layer 'output'"):
        module.sample(2)
    teacher = mlp()
    add_policy_head(teacher, "grid", 2)
    with pytest.raises(ValueError, match="has a policy head already"):
        add_policy_head(teacher, "grid", 2)
    with pytest.raises(ValueError, match="no linear or convolution layer"):
        add_policy_head(analytic_denoiser(ring(), FLOW), "grid", 2)
    assert groups_of("mixture", 4) == 9


# ------------------------------------------------------------------------------------------------ learning
#: class, settings, largest error of its two steps (the teacher's own two steps: .715)
LEARNED = {
    "mixture": (PiFlow, {"num_steps": 2, "components": 8, "substeps": 4, "decay_updates": 0}, 0.48),
    "arc": (ArcFlow, {"num_steps": 2, "components": 8}, 0.36),
}


@pytest.mark.learn
@pytest.mark.filterwarnings("ignore:ConstantEMA", "ignore:.*eval mode")
@pytest.mark.parametrize("name", [long(n) if n == "mixture" else n for n in LEARNED])
def test_two_calls_are_near_the_end_of_the_trajectory(name, ring_problem):  # noqa: F811
    method, settings, limit = LEARNED[name]
    mixture, _, noise, ends = ring_problem
    settings = {"decay_updates": 100, "points": 2, **settings}
    module = distilled(ring_problem, method, settings, 2e-3, updates=300, batch_size=64)
    found = error(module.sample(len(noise), noise=noise), ends)
    teacher = analytic_denoiser(mixture, FLOW)
    two = error(generate(teacher, noise, {}, [1.0, 0.5], "ode"), ends)
    print(f"{name}: {found:.3f}, the teacher in two steps {two:.3f}")
    assert found < limit < two
