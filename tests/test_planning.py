"""Plans of memory against what real updates on the CPU keep and allocate."""

import json
import weakref
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DDPMScheduler
from sampling_of_cases import long, slow
from tiny_pipelines import MAKERS
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lightning_distill import attention, planning
from lightning_distill.batch import Batch
from lightning_distill.cli import main
from lightning_distill.commands.plan import parse_config, plan_config, suggestions
from lightning_distill.generation import default_cond
from lightning_distill.guidance import Guidance
from lightning_distill.live_memory import LiveMemory, mixed_precision
from lightning_distill.methods import DMD2, MSD, RCM, SCM, PhasedDMD, TeacherTraining
from lightning_distill.networks.adversary import Adversary
from lightning_distill.networks.experts import Experts
from lightning_distill.networks.quantisation import quantisable, quantised_bytes
from lightning_distill.networks.roles import Lora
from lightning_distill.networks.small import ResidualMLP, small_dit, small_unet
from lightning_distill.networks.specs import NewDenoiser, PretrainedDenoiser, ZooDenoiser
from lightning_distill.optim import AdamW8bit
from lightning_distill.plan_parts import RESERVE
from lightning_distill.planning import plan
from lightning_distill.processes import FlowMatching
from lightning_distill.randomness import Draws

FLOW = FlowMatching()


def spec(network, **settings):
    return NewDenoiser(network, FLOW, "flow_prediction", **settings)


def unet():
    return small_unet(16, 2, 3, (16, 32), norm_num_groups=4, attention_head_dim=8)


def dit():
    return small_dit(16, 2, 3, patch_size=2, num_layers=2, num_attention_heads=2, attention_head_dim=16)


def mlp():
    return ResidualMLP((2,), width=64, depth=3)


def adapters():
    return {"student": Lora(rank=4), "fake_score": Lora(rank=2)}


#: network, batch size, settings of the method
CASES = {
    "unet": (unet, 4, dict),
    "unet_lora": (unet, 4, adapters),
    "dit": (dit, 4, dict),
    "mlp": (mlp, 512, dict),
    "unet_gan": (unet, 4, lambda: {"gan": Adversary(taps=["mid_block"], width=16)}),
    "dit_gan": (dit, 4, lambda: {"gan": Adversary(taps=["transformer_blocks.0"], width=16)}),
    "dit_dora": (dit, 4, lambda: {"student": Lora(rank=4, dora=True), "num_steps": 2}),
}


def mostly_slow(*fast, later=()):
    """All cases; of those not named only ``make matrix`` has the time, of ``later`` CI."""
    return [case if case in fast else long(case) if case in later else slow(case) for case in CASES]


def make(case, **more):
    network, _, settings = CASES[case]
    return DMD2(spec(network, null_class=None if network is mlp else 3), **{**settings(), **more})


def real_phases(module, size, precision=None):
    """Bytes saved for the backward pass (by autograd's own hooks) and the largest sum of live storages, by phase."""
    module.configure_model()
    module.train()
    batch = Batch(cond=default_cond(module.student, size), x0=torch.randn(size, *module.sample_shape))
    fixed = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    found = {}
    for phase in module.phases:
        module.draws = Draws(module.streams, 0, 0, f"{phase}0")
        saved = {}

        def pack(tensor, saved=saved):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in fixed:
                saved[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        live = LiveMemory()
        live.ignore([*module.parameters(), *module.buffers()])
        with module._only(phase), mixed_precision(precision, "cpu"), live:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = module.weighted_sum(phase, getattr(module, f"{phase}_loss")(batch))
            size_saved = sum(n for n, _ in saved.values())
            saved.clear()
            loss.backward()
        found[phase] = size_saved, live.peak
        module.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("case", mostly_slow("mlp"))
def test_activations_are_those_of_a_real_update(case):
    compare_activations(case, "32-true")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["unet_lora", "dit"])
def test_activations_in_mixed_precision(case):
    compare_activations(case, "bf16-mixed")


def compare_activations(case, precision):
    size = CASES[case][1]
    planned = plan(lambda: make(case), size, precision, device="cpu")
    autocast = torch.bfloat16 if precision == "bf16-mixed" else None
    found = real_phases(make(case), size, autocast)
    assert [phase.name for phase in planned.phases] == list(found)
    for phase in planned.phases:
        saved, peak = found[phase.name]
        assert phase.kept == pytest.approx(saved, rel=0.1), phase.name
        assert phase.peak == pytest.approx(peak, rel=0.1), phase.name
        assert phase.peak > phase.kept > 10_000


@pytest.mark.parametrize("case", mostly_slow("mlp", "dit_dora", later=["dit_gan"]))
def test_weights_gradients_and_states_are_exact(case):
    planned = plan(lambda: make(case), CASES[case][1], "32-true", device="cpu")
    module = make(case)
    module.configure_model()
    assert [role.name for role in planned.roles][:2] == ["teacher", "student"]
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    counters = sum(t.nbytes for t in module.buffers(recurse=False))
    assert (
        sum(sum(role.weights.values()) for role in planned.roles) == sum(t.nbytes for t in tensors.values()) - counters
    )
    assert sum(role.parameters for role in planned.roles) == sum(p.numel() for p in module.parameters())
    for role in planned.roles:
        if role.name in ("student", "fake_score", "discriminator"):
            own = module.role_parameters(role.name)
            assert role.trained == sum(p.numel() for p in own)
            assert role.gradients == sum(p.nbytes for p in own)
    for entry, roles in zip(module.configure_optimizers(), module.phases.values()):
        optimizer = entry["optimizer"]
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        optimizer.step()
        states = [t for state in optimizer.state.values() for t in tree_leaves(dict(state))]
        assert sum(r.optimizer for r in planned.roles if r.name in roles) == sum(t.nbytes for t in states)
    shared = {role.name for role in planned.roles if role.shared}
    assert ("student" in shared) == (case in ("unet_lora", "dit_dora"))
    assert planned.resident == sum(role.total for role in planned.roles)
    gradients = [sum(r.gradients for r in planned.roles if r.name in roles) for roles in module.phases.values()]
    assert [phase.gradients for phase in planned.phases] == gradients
    assert planned.need == planned.resident + max(p.peak for p in planned.phases) + RESERVE


@pytest.mark.slow
def test_checkpointing_and_batch_size():
    plain, less, double = (
        plan(lambda: make("unet"), n, "32-true", checkpointing=on, device="cpu")
        for n, on in ((4, False), (4, True), (8, False))
    )
    assert (plain.checkpointing, less.checkpointing) == (False, True)
    for a, b, c in zip(plain.phases, less.phases, double.phases):
        assert b.kept < 0.5 * a.kept
        assert b.peak < a.peak
        assert c.kept == pytest.approx(2 * a.kept, rel=0.05)
    assert plain.roles == less.roles == double.roles
    module = make("unet", activation_checkpointing=True)
    for phase in less.phases:
        assert phase.peak == pytest.approx(real_phases(module, 4)[phase.name][1], rel=0.1)
    with pytest.raises(ValueError, match="ResidualMLP has no activation checkpointing"):
        plan(lambda: make("mlp"), checkpointing=True)


@pytest.mark.slow
def test_mixed_precision_follows_the_rules_of_the_device():
    on = {d: plan(lambda: make("unet"), 4, "bf16-mixed", device=d) for d in ("cpu", "cuda")}
    assert on["cuda"].phases[0].kept > 1.15 * on["cpu"].phases[0].kept
    x = torch.randn(2, 8, 4, 4)
    for device, dtype in (("cuda", torch.float32), ("cpu", torch.bfloat16)):
        with mixed_precision(torch.bfloat16, device):
            h = nn.Conv2d(8, 8, 1)(x)
            assert h.dtype == torch.bfloat16
            assert nn.GroupNorm(2, 8)(h).dtype == dtype
            assert nn.LayerNorm(4)(h).dtype == dtype
    assert nn.GroupNorm(2, 8, dtype=torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    halves = plan(lambda: make("mlp"), 4, "bf16-true", device="cpu")
    whole = plan(lambda: make("mlp"), 4, "32-true", device="cpu")
    assert halves.roles[0].weights == {"bfloat16": whole.roles[0].weights["float32"] // 2}


def test_nothing_is_allocated():
    """Weights of 64 GB."""

    class Huge(nn.Module):
        shape = (4,)

        def __init__(self):
            super().__init__()
            self.into, self.out = nn.Linear(4, 20_000), nn.Linear(20_000, 4)
            self.blocks = nn.ModuleList(nn.Linear(20_000, 20_000, bias=False) for _ in range(40))

        def forward(self, x, t):
            h = self.into(x)
            for block in self.blocks:
                h = block(h).relu()
            return self.out(h)

    planned = plan(lambda: DMD2(spec(Huge), student=Lora(rank=1), fake_score=Lora(rank=1), ema=[]), 512, "32-true")
    assert planned.roles[0].weights["float32"] == 4 * (40 * 20_000**2 + 8 * 20_000 + 20_000 + 4)
    # of every block at least its output, for the relu and the next adapter
    assert planned.phases[0].kept > 40 * 512 * 20_000 * 4
    assert planned.need > 64e9


def test_live_memory_in_closed_form():
    live = LiveMemory()
    given = torch.zeros(1000)
    live.ignore([given])
    with live:
        a = given + 1.0  # 4000
        view = a[:10]
        b = torch.cat([a, a])  # 12000
        assert live.now == live.peak == 12_000
        del a
        assert live.now == 12_000, "a view holds its storage"
        del view
        assert live.now == 8_000
        b.add_(1.0)
        assert (live.now, live.peak) == (8_000, 12_000)
        alive = weakref.ref(b.untyped_storage())
        del b
    assert live.now == 0
    assert alive() is None


# ------------------------------------------------------------------------------------------------ folders and headers
@pytest.fixture
def pipeline(tmp_path):
    network = small_dit(8, 2, 5, patch_size=2, num_layers=1, num_attention_heads=2, attention_head_dim=64)
    network.save_pretrained(tmp_path / "transformer")
    DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline"}))
    for file in (tmp_path / "transformer").glob("*.safetensors"):
        file.unlink()
    return str(tmp_path), network


def test_a_config_without_weights_is_enough(pipeline):
    folder, network = pipeline
    with pytest.raises(FileNotFoundError, match="does not exist; complete the download"):
        PretrainedDenoiser(folder).check()
    numel = sum(p.numel() for p in network.parameters())
    planned = plan(lambda: DMD2(PretrainedDenoiser(folder, dtype="bfloat16"), **adapters()))
    assert planned.roles[0].parameters == numel
    assert planned.roles[0].weights["bfloat16"] >= 2 * numel
    zoo = plan(lambda: DMD2(ZooDenoiser("digits"), **adapters()), 4)
    assert zoo.roles[0].parameters == sum(p.numel() for p in ZooDenoiser("digits").build().parameters())


@pytest.mark.slow
def test_eight_bits(pipeline):
    folder, network = pipeline
    method = lambda **s: DMD2(PretrainedDenoiser(folder, dtype="bfloat16", **s), **adapters())  # noqa: E731
    full, small = plan(method), plan(lambda: method(quantize="int8"))
    layers = quantisable(network, "int8", ["transformer_blocks"]).values()
    size = sum(quantised_bytes("int8", *m.weight.shape) for m in layers)
    assert small.roles[0].weights["int8"] == size
    assert small.roles[0].parameters == full.roles[0].parameters
    saved = sum(2 * m.weight.numel() for m in layers) - size
    assert full.resident - small.resident == saved > 0
    assert full.with_8bit_weights().need == small.need == small.with_8bit_weights().need
    # the student EMA and trained networks stay in full
    copies = plan(lambda: DMD2(PretrainedDenoiser(folder, dtype="bfloat16")))
    assert copies.resident - copies.with_8bit_weights().resident == saved

    def factory(parameters):
        return AdamW8bit(parameters, lr=1e-4)

    eight = plan(lambda: DMD2(PretrainedDenoiser(folder), student_optimizer=factory, fake_score_optimizer=factory))
    states = {role.name: role.optimizer for role in eight.roles}
    assert states["student"] == states["fake_score"] == AdamW8bit.state_bytes(network.parameters())
    assert eight.optimizers == ("AdamW8bit",)
    adam = plan(lambda: DMD2(PretrainedDenoiser(folder)))
    assert adam.with_8bit_optimizers().resident == eight.resident < adam.resident


def test_other_methods_and_refusals():
    planned = plan(lambda: TeacherTraining(spec(mlp), label_dropout=0.0), 8, "32-true")
    assert [phase.name for phase in planned.phases] == ["student"]
    with pytest.raises(ValueError, match="precision='8-bit' cannot be planned; choose one of 32-true"):
        plan(lambda: make("mlp"), 1, "8-bit")
    with pytest.raises(ValueError, match="batch_size=0"):
        plan(lambda: make("mlp"), 0)

    class Deciding(nn.Module):
        shape = (2,)

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x, t):
            return x * self.weight if bool(x.sum() > 0) else -x

    with pytest.raises(ValueError, match="DMD2 decides something by the values of its tensors in the student phase"):
        plan(lambda: DMD2(spec(Deciding)))


def guided(tokens, family="sd15"):
    """A run with a guided text teacher whose embedding of the empty prompt has so many tokens."""
    tiny = MAKERS[family]()
    width = tiny.cond_shapes["encoder_hidden_states"][-1]
    null = {"encoder_hidden_states": torch.randn(1, tokens, width)}
    if "encoder_attention_mask" in tiny.cond_shapes:
        null["encoder_attention_mask"] = torch.ones(1, tokens, dtype=torch.int64)
    teacher = tiny.denoiser(null_cond=null)
    return DMD2(teacher, student=Lora(rank=2), fake_score=Lora(rank=2), guidance=Guidance(2.0))


def planned_prompts(tokens, family="sd15", **settings):
    return plan(lambda: guided(tokens, family), 2, "32-true", device="cpu", **settings).phases


@pytest.mark.slow
def test_prompts_are_as_long_as_the_unconditional_embedding():
    short, long = planned_prompts(6), planned_prompts(24)
    assert all(a.kept < b.kept for a, b in zip(short, long))
    assert planned_prompts(6, text_tokens=6) == short
    # a mask hides what pads a short unconditional embedding: prompts may be longer
    stock, longer = planned_prompts(6, "pixart_sigma", text_tokens=300), planned_prompts(400, "pixart_sigma")
    assert planned_prompts(6, "pixart_sigma") == stock
    assert all(a.kept < b.kept for a, b in zip(stock, longer))


def test_prompts_of_another_length_name_the_option():
    with pytest.raises(ValueError, match=r"prompts of 77 tokens, .* in the student phase .*give .*--text-tokens N"):
        planned_prompts(6, text_tokens=77)


def test_work_is_that_of_a_real_update():
    planned = plan(lambda: make("dit"), 4, "32-true", count=True, device="cpu")
    module = make("dit")
    module.configure_model()
    module.train()
    batch = Batch(cond=default_cond(module.student, 4), x0=torch.randn(4, *module.sample_shape))
    for phase in planned.phases:
        module.draws = Draws(module.streams, 0, 0, f"{phase.name}0")
        module._rollouts.clear()  # a plan of the critic makes its own samples
        with module._only(phase.name), FlopCounterMode(display=False) as counted:
            module.weighted_sum(phase.name, getattr(module, f"{phase.name}_loss")(batch)).backward()
        assert phase.flop == counted.get_total_flops() > 0
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        module.student(batch.x0, torch.ones(4, dtype=torch.float64), batch.cond)
    assert planned.forward_flop == counted.get_total_flops() > 0
    again = plan(lambda: make("dit"), 4, "32-true", device="cpu")
    assert [replace(phase, flop=0) for phase in planned.phases] == list(again.phases), "counting keeps nothing"
    assert again.forward_flop == 0


# ------------------------------------------------------------------------------------------------ command
@pytest.fixture
def config(tmp_path):
    network = {
        "class_path": "diffusers.DiTTransformer2DModel",
        "init_args": {
            "sample_size": 8,
            "in_channels": 2,
            "out_channels": 2,
            "num_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "num_embeds_ada_norm": 3,
        },
    }
    teacher = {"network": network, "process": "FlowMatching", "prediction_type": "flow_prediction"}
    model = {
        "class_path": "DMD2",
        "init_args": {
            "teacher": {"class_path": "NewDenoiser", "init_args": teacher},
            "accumulate_grad_batches": 4,
            "fake_score_steps": 1,
        },
    }
    data = {"class_path": "Prior", "init_args": {"num_classes": 3, "batch_size": 32}}
    content = {"trainer": {"precision": "bf16-mixed", "accelerator": "gpu"}, "model": model, "data": data}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(content))
    return file, content


def test_command(config, capsys):
    file, _ = config
    assert main(["plan", "-c", str(file), "--gpu-memory", "8"]) == 0
    out = capsys.readouterr().out
    assert "fits into 8 GiB" in out
    assert "batch of 8, bf16-mixed, without activation checkpointing, AdamW" in out
    assert all(name in out for name in ("teacher", "student", "fake_score", "student_ema.power_0_1", "peak"))
    assert main(["plan", "-c", str(file), "--batch-size", "2", "--model.init_args.num_steps=2"]) == 0
    assert "batch of 2" in capsys.readouterr().out
    assert main(["plan", "-c", str(file), "--trainer.precision=64-true"]) == 2
    assert "precision='64-true' cannot be planned" in capsys.readouterr().err
    for option, value in (("batch-size", "0"), ("text-tokens", "-3"), ("gpu-memory", "-8"), ("gpu-memory", "nan")):
        assert main(["plan", "-c", str(file), f"--{option}={value}"]) == 2
        assert f"--{option} {value}: give a number above 0" in capsys.readouterr().err
    for words in ("--model.init_args.accumulate_grad_batches=5", "--data.init_args.batch_size=0"):
        assert main(["plan", "-c", str(file), words]) == 2
        assert "micro-batches of equal size" in capsys.readouterr().err
    assert main(["plan"]) == 2
    assert "-c/--config" in capsys.readouterr().err


@pytest.mark.slow
def test_processes_share_what_the_strategy_shards(config):
    import lightning_distill.cli

    lightning_distill.cli.import_everything()
    _, content = config

    def planned(strategy="auto", devices=4, nodes=1, **options):
        made = {"class_path": "lightning_distill.strategies.RoleFSDP2", "init_args": options} if options else strategy
        content["trainer"] |= {"strategy": made, "devices": devices, "num_nodes": nodes, "precision": "32-true"}
        return plan_config(content)

    one, copies, four = planned(devices=1), planned("role_ddp"), planned("role_fsdp2")
    assert copies.need == one.need
    assert (copies.processes.number, copies.shards, four.shards) == (4, 1, 4)
    assert four.resident == -(-one.resident // 4)
    network = one.roles[0].parameters
    assert 0 < four.gathered <= 4 * network
    assert planned(devices=[0, 1], nodes=4, replicas="nodes").shards == 2
    assert planned(devices="0,1", shard_blocks=False).gathered == 4 * network
    less = planned(activation_checkpointing=True)
    assert less.checkpointing
    assert all(a.kept < b.kept for a, b in zip(less.phases, four.phases))
    half = planned(teacher_dtype="bfloat16", compute_dtype="bfloat16")
    narrow, buffers = half.roles[0].weights["bfloat16"], half.roles[0].weights["float32"]
    assert 2 * narrow + buffers == four.roles[0].weights["float32"]
    assert narrow == 2 * network
    assert half.roles[1].weights == four.roles[1].weights
    assert all(a.kept < 0.7 * b.kept for a, b in zip(half.phases, four.phases))
    away = planned(offload=["teacher", "student_ema"])
    held = [role.total for role in one.roles if role.name in ("student", "fake_score")]
    assert away.resident == pytest.approx(sum(held) / 4, rel=0.01)
    with pytest.raises(ValueError, match=r"replicas=3.*4 processes"):
        planned(replicas=3)


@pytest.mark.long
def test_terms_that_begin_late_are_planned():
    def build(matching_from=10):
        return RCM(spec(mlp), matching_from=matching_from)

    early, late = (plan(build, 8, "32-true", updates=updates).phases[0] for updates in (10, 11))
    assert early.name == late.name == "student"
    assert early.peak < late.peak
    assert late.peak == plan(partial(build, 0), 8, "32-true").phases[0].peak


def test_what_follows_a_warm_up_is_planned(config):
    import lightning_distill.cli

    lightning_distill.cli.import_everything()
    _, content = config
    plain = plan_config(content)
    content["model"]["init_args"] |= {"regression_steps": 5, "regression_pairs": "stores/not_made_yet"}
    assert plan_config(content).need == plain.need
    assert content["model"]["init_args"]["regression_steps"] == 5


def test_a_teacher_that_no_adapter_fits_is_given_none():
    planned_from = parse_config(["--config", "configs/method/dmd2_ring4.yaml"])
    names = [name for name, _ in suggestions(planned_from, plan_config(planned_from))]
    assert names
    assert not any(name.startswith("Lora") for name in names)


@pytest.mark.slow
def test_suggestions_save_memory_one_after_the_other(config):
    import lightning_distill.cli

    lightning_distill.cli.import_everything()
    _, content = config
    planned = plan_config(content)
    assert planned.batch_size == 8
    changes = list(suggestions(content, planned))
    names = [name.split()[0].rstrip(":") for name, _ in changes]
    assert names == ["activation_checkpointing", "batch", "AdamW8bit", "Lora(rank=64)", "quantize"]
    needs = [planned.need, *(changed.need for _, changed in changes)]
    assert all(later < earlier for earlier, later in pairwise(needs[:4]))
    last = changes[-1][1]
    assert last.batch_size == 1
    assert last.checkpointing
    assert all(role.shared for role in last.roles if role.name in ("student", "fake_score"))


# ------------------------------------------------------------------------------------------------ what a cycle adds
@pytest.mark.parametrize("checkpointing", [False, long(True)])
def test_gradients_of_earlier_micro_batches_are_alive_in_later_ones(checkpointing):
    def make(parts):
        module = DMD2(spec(unet), ema=[], fake_score_steps=1, accumulate_grad_batches=parts)
        module.activation_checkpointing = checkpointing
        return module

    once, several = (plan(partial(make, parts), 2, "32-true", device="cpu") for parts in (1, 4))
    module = make(4)
    module.configure_model()
    module.train()
    batch = Batch(cond=default_cond(module.student, 2), x0=torch.randn(2, *module.sample_shape))
    for phase, alone, after in zip(module.phases, once.phases, several.phases):
        live = LiveMemory()
        live.ignore([*module.parameters(), *module.buffers()])
        with module._only(phase), live:
            for micro in range(3):
                module.draws = Draws(module.streams, 0, 2 * micro, f"{phase}0")
                module._rollouts.clear()
                module.weighted_sum(phase, getattr(module, f"{phase}_loss")(batch)).backward()
        module.zero_grad(set_to_none=True)
        assert after.peak == pytest.approx(live.peak, rel=0.02)
        assert after.peak > alone.peak + 0.3 * alone.gradients
        assert after.kept == alone.kept


def test_a_game_that_is_played_now_and_then_is_planned():
    gan = Adversary(["input"])
    planned = [
        plan(lambda n=n: DMD2(spec(mlp), gan=gan, gan_every=n, shape=[2]), 4, "32-true", updates=8) for n in (1, 4)
    ]
    assert planned[0].phases == planned[1].phases


@pytest.mark.parametrize(
    ("config", "roles"),
    [
        long("accvideo_ring", {"discriminator"}),
        long("reflow_ring", {"student"}),
        long("slim_flow_ring", {"student"}),
        ("video_scene_ring", {"student"}),
        long("dcm_ring", {"discriminator"}),
        long("boss_fashion", {"student"}),
    ],
)
def test_configurations_of_stored_trajectories_and_experts_are_planned(config, roles):
    file = Path(__file__).parents[1] / "configs" / "method" / f"{config}.yaml"
    planned = plan_config(parse_config(["--config", str(file)]))
    assert all(phase.peak > phase.gradients for phase in planned.phases if phase.name in roles)
    assert {phase.name for phase in planned.phases} >= roles


@pytest.mark.long
def test_frozen_features_are_planned_without_their_weights(tmp_path):
    features = {
        "class_path": "lightning_distill.networks.frozen_features.FrozenFeatures",
        "init_args": {
            "network": {"class_path": "torchvision.models.squeezenet1_1"},
            "taps": ["features.2"],
            "size": 32,
            "weights": "nowhere.pth",
        },
    }
    teacher = {"class_path": "ZooDenoiser", "init_args": {"name": "digits"}}
    model = {"class_path": "GDD", "init_args": {"teacher": teacher, "features": features}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": model, "data": {"class_path": "Digits"}}))
    planned = plan_config(parse_config(["--config", str(tmp_path / "run.yaml")]), batch_size=4)
    assert {phase.name for phase in planned.phases} == {"student", "discriminator"}


@pytest.mark.parametrize("split", ["times", "steps", "classes"])
def test_experts_are_planned(split):
    """By times that a plan knows; samples of other groups are shared out evenly."""

    def make():
        common = {"fake_score_steps": 1, "rollout_step": "sample" if split == "steps" else "batch"}
        if split == "classes":
            return MSD(spec(unet, null_class=3), classes=2, **common)
        experts = Experts(boundaries=[0.6])
        if split == "steps":
            return DMD2(spec(unet, null_class=3), student=experts, num_steps=2, **common)
        parts = {"num_steps": 4, "subintervals": [2, 2], "subinterval_updates": [4]}
        return PhasedDMD(spec(unet, null_class=3), student=experts, **parts, **common)

    planned = plan(make, 4, "32-true", device="cpu")
    found = real_phases(make(), 4)
    for phase in planned.phases:
        assert phase.kept == pytest.approx(found[phase.name][0], rel=0.1), phase.name
        assert phase.peak == pytest.approx(found[phase.name][1], rel=0.1), phase.name
    student = next(role for role in planned.roles if role.name == "student")
    module = make()
    module.configure_model()
    assert student.trained == sum(p.numel() for p in module.student.parameters())


def test_a_network_that_is_trained_itself_has_its_optimizer():
    def make():
        return TeacherTraining(NewDenoiser(mlp, FLOW, "flow_prediction", sigma_data=1.0).build(), shape=[2])

    roles = {role.name: role for role in plan(make, 4, "32-true").roles}
    assert roles["student"].optimizer > roles["student"].gradients > 0
    assert sum(role.trained > 0 for role in roles.values()) == 1


def test_settings_that_are_switched_off_stay_off(config):
    file, content = config
    content["model"]["init_args"]["gradient_clip_val"] = None
    file.write_text(yaml.safe_dump(content))
    read = parse_config(["--config", str(file)])
    assert read["model"]["init_args"]["gradient_clip_val"] is None


@pytest.mark.long
def test_a_step_on_cuda_updates_all_tensors_at_once():
    def make(**settings):
        return DMD2(spec(unet), ema=[], student_optimizer=partial(torch.optim.AdamW, lr=1e-4, **settings))

    given = {"plain": {}, "loop": {"foreach": False}, "fused": {"fused": True}}
    steps = {key: plan(partial(make, **value), 1, "32-true", device="cuda").step for key, value in given.items()}
    weights = plan(make, 1, "32-true").roles[1].gradients
    assert steps["plain"] >= weights > steps["loop"] > steps["fused"]


def test_copies_of_a_quantised_teacher_are_planned_in_full(pipeline):
    def role(name, **settings):
        made = plan(lambda: DMD2(PretrainedDenoiser(pipeline[0], **settings)), 1, "32-true")
        return next(role for role in made.roles if role.name == name)

    assert "int8" in role("teacher", quantize="int8").weights
    assert role("fake_score", quantize="int8").weights == role("fake_score").weights


@pytest.mark.long
def test_a_plan_of_derivatives_follows_few_chunks_of_attention(monkeypatch):
    """The others would need the same memory one after the other."""
    monkeypatch.setattr(attention, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(attention, "_MIN_ROWS", 60)
    products, softmax = [], attention._softmax
    monkeypatch.setattr(attention, "_softmax", lambda *given: products.append(given) or softmax(*given))

    def planned():
        network = NewDenoiser(lambda: MAKERS["sd3"]().network, FlowMatching(), "flow_prediction")
        found = plan(lambda: SCM(network), 4, device="cpu")
        return [(phase.peak, phase.kept) for phase in found.phases]

    few, count = planned(), len(products)
    monkeypatch.setattr(planning, "few_chunks", nullcontext)
    products.clear()
    assert planned() == few
    assert len(products) == 2 * count > 0
