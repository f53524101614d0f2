"""Sharding in one process, where a tensor is a shard of itself: every family by blocks, options, refusals."""

from __future__ import annotations

import copy
import errno
import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from own_methods import Shift, prior, teacher
from own_methods import trainer as own_trainer
from rank_runs import STEPS, build, named, train
from tiny_pipelines import MAKERS
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_distill.checkpoint_files import damage, remove_parts
from lightning_distill.networks import compiling
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.lora import add_adapter, enable_activation_checkpointing
from lightning_distill.networks.quantisation import QuantisedLinear
from lightning_distill.networks.small import small_dit
from lightning_distill.networks.weightless import weightless
from lightning_distill.optim import AdamW8bit
from lightning_distill.processes import FlowMatching, VariancePreserving
from lightning_distill.strategies import RoleDataParallel, RoleFSDP2, check_strategy
from lightning_distill.strategies.sharding import block_names, networks_of, reshard, role_modules, shard_network

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "file"
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def eight_bit(parameters):
    with weightless():  # needs no torchao
        return AdamW8bit(parameters)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# ------------------------------------------------------------------------------------------------ families
def tiny_denoiser(name):
    tiny = MAKERS[name]()
    process = FlowMatching() if tiny.kind == "flow_prediction" else VariancePreserving()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in tiny.network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return tiny, Denoiser(tiny.network, process, tiny.kind, null_cond=tiny.null(), guidance=tiny.guidance)


def outputs(denoiser, tiny, taps=(), features_only=False):
    """Input gradients and parameter gradients of a call."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, *tiny.shape, generator=generator).requires_grad_(True)
    t = torch.tensor([0.3, 0.8])
    out = denoiser(x, t, tiny.cond(2), taps=taps, features_only=features_only)
    used = list(out.values()) if features_only else [out.raw] if not taps else list(out.features.values())
    loss = sum(value.float().square().sum() for value in used)
    loss.backward()
    gradients = {n: whole(p.grad).clone() for n, p in denoiser.named_parameters() if p.grad is not None}
    denoiser.zero_grad()
    return loss.detach(), x.grad, gradients


@pytest.mark.sparse(4)
@pytest.mark.parametrize("name", MAKERS)
def test_families_are_sharded_by_blocks(mesh, name):
    tiny, denoiser = tiny_denoiser(name)
    calls = [((), False), ((tiny.block,), False), ((tiny.block,), True)]
    want = [outputs(denoiser, tiny, *call) for call in calls]
    blocks = block_names(denoiser)
    shard_network(denoiser.network, blocks, mesh)
    assert all(isinstance(p, DTensor) for p in denoiser.parameters())
    groups = [m for m in denoiser.modules() if isinstance(m, FSDPModule)]
    assert len(groups) == len(blocks) + 1
    assert blocks
    for call, (loss, gradient, gradients) in zip(calls, want):
        got = outputs(denoiser, tiny, *call)
        torch.testing.assert_close(got[0], loss)
        torch.testing.assert_close(got[1], gradient)
        assert got[2].keys() == gradients.keys()
        for key, value in gradients.items():
            torch.testing.assert_close(got[2][key], value, msg=lambda text, key=key: f"{key}: {text}")
        reshard(denoiser)
        assert all(isinstance(p, DTensor) for p in denoiser.parameters())


def test_blocks_that_are_read_from_outside_stay_with_the_root(mesh):
    """DiT's forward reads an embedding of its first block."""
    network = small_dit(8, 1, 3, patch_size=4, num_layers=3, num_attention_heads=1, attention_head_dim=8)
    denoiser = Denoiser(network, FlowMatching(), "flow_prediction")
    assert block_names(denoiser) == ["transformer_blocks.1", "transformer_blocks.2"]
    x, t, cond = torch.randn(2, 1, 8, 8), torch.tensor([0.2, 0.9]), {"class_labels": torch.tensor([0, 2])}
    want = denoiser(x, t, cond).raw
    other = copy.deepcopy(denoiser)
    shard_network(network, block_names(denoiser), mesh)
    torch.testing.assert_close(denoiser(x, t, cond).raw, want)
    shard_network(other.network, other.block_names(), mesh)
    with pytest.raises(RuntimeError, match="DTensor"):
        other(x, t, cond)


@pytest.mark.parametrize("adapter", [False, True])
def test_recomputed_blocks_are_gathered_again(mesh, adapter):
    tiny, denoiser = tiny_denoiser("sd3")
    role = add_adapter(denoiser, rank=2) if adapter else denoiser
    want = outputs(role, tiny)
    enable_activation_checkpointing(role)
    shard_network(denoiser.network, block_names(denoiser), mesh)
    got = outputs(role, tiny)
    torch.testing.assert_close(got[1], want[1])
    assert got[2].keys() == want[2].keys()
    for key, value in want[2].items():
        torch.testing.assert_close(got[2][key], value)


def test_forwards_that_end_at_a_tap_leave_nothing_gathered_for_the_next(mesh):
    tiny, denoiser = tiny_denoiser("sd15")
    want = outputs(denoiser, tiny)
    shard_network(denoiser.network, block_names(denoiser), mesh)
    with torch.no_grad():
        denoiser(torch.randn(2, *tiny.shape), torch.tensor([0.3, 0.8]), tiny.cond(2), taps=[tiny.block],
                 features_only=True)  # fmt: skip
    assert "tapped" not in str(denoiser.network.__dict__.keys())
    torch.testing.assert_close(outputs(denoiser, tiny)[1], want[1])


# ------------------------------------------------------------------------------------------------ the strategy
@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What runs without strategy end with."""
    return {name: train(named([name])[0], tmp_path_factory.mktemp(name)) for name in ("unet_gan", "dit_lora")}


def run(name, folder, **options):
    (case,) = named([name])
    strategy = RoleFSDP2(**options)
    module = build(case, folder)
    return module, strategy, train(case, folder, strategy, module=module)


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def far(got, want):
    return max(float((got[k] - v).abs().max()) for k, v in want.items())


@pytest.mark.sparse(3, test=3)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"offload": ["teacher", "student_ema"]},
        {"meta_device": True, "offload": ["student_ema"]},
        {"save_distributed_checkpoint": False, "shard_blocks": False, "compare_networks": False},
    ],
    ids=["default", "offload", "meta", "whole"],
)
@pytest.mark.parametrize("name", ["unet_gan", "dit_lora"])
def test_options_change_no_figure(mesh, alone, tmp_path, name, options):
    module, _, got = run(name, tmp_path, **options)
    assert far(got, alone[name]) < 1e-5
    for part in role_modules(module).values():
        for network in networks_of(part):
            assert isinstance(network, FSDPModule)
    assert all(isinstance(p, DTensor) for p in module.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unet_gan", "dit_lora"])
def test_compiled_blocks_change_no_figure(mesh, alone, tmp_path, monkeypatch, name):
    monkeypatch.setattr(compiling, "_BACKEND", "eager")
    monkeypatch.setattr(compiling, "_compiled", {})
    (case,) = named([name])
    module = build(case, tmp_path)
    compiling.compile_roles(module)
    torch._dynamo.reset()
    got = train(case, tmp_path, RoleFSDP2(), module=module)
    assert far(got, alone[name]) < 1e-5
    assert compiling._compiled


@pytest.mark.sparse(2)
@pytest.mark.parametrize("name", ["unet_gan", "dit_lora"])
def test_bfloat16_computes_with_float32_weights_and_times(mesh, alone, tmp_path, name):
    (case,) = named([name])
    module = build(case, tmp_path)
    seen = set()
    network = module.teacher.network  # the first argument is the sample, the second its time
    network.register_forward_pre_hook(lambda _m, args: seen.add((args[0].dtype, args[1].dtype)))
    dtypes = {"compute_dtype": "bfloat16", "teacher_dtype": "bfloat16"}
    got = train(case, tmp_path, RoleFSDP2(**dtypes, meta_device=name == "dit_lora"), module=module)
    assert {x for x, _ in seen} == {torch.bfloat16}
    assert torch.bfloat16 not in {t for _, t in seen}
    trained = [p for roles in module.phases.values() for role in roles for p in module.role_parameters(role)]
    assert {p.dtype for p in trained} == {torch.float32}
    assert {p.dtype for average in module.averages() for p in average} == {torch.float32}
    own = {p.dtype for n, p in module.teacher.named_parameters() if "lora_" not in n}
    assert own == {torch.bfloat16}
    assert 1e-6 < far(got, alone[name]) < 0.1


@pytest.mark.long
def test_checkpointed_blocks_train_alike(mesh, alone, tmp_path):
    module, _, got = run("unet_gan", tmp_path, activation_checkpointing=True)
    assert module.student.network.is_gradient_checkpointing
    assert far(got, alone["unet_gan"]) < 1e-5


def test_averages_are_local(mesh, tmp_path, monkeypatch):
    """The average's update neither gathers a tensor nor leaves the shards."""
    (case,) = named(["one_step"])
    module = build(case, tmp_path)
    original, calls = module._average, []

    def forbidden(*_args, **_kwargs):
        raise AssertionError("the update of an average communicates")

    def average(*args):
        with monkeypatch.context() as patch:
            patch.setattr(DTensor, "full_tensor", forbidden)
            patch.setattr(DTensor, "redistribute", forbidden)
            for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast"):
                patch.setattr(dist, name, forbidden)
            assert all(isinstance(p, DTensor) for p in module.student.parameters())
            original(*args)
        calls.append(args)

    module._average = average
    train(case, tmp_path, RoleFSDP2(), module=module)
    assert len(calls) == STEPS


def test_damaged_and_foreign_checkpoints_are_refused(mesh, tmp_path):
    (case,) = named(["one_step"])
    folder = tmp_path / "run.ckpt"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"no complete sharded checkpoint \(meta.pt is missing\)"):
        train(case, tmp_path, RoleFSDP2(), ckpt_path=folder)
    (other,) = named(["flow"])
    from lightning.pytorch.callbacks import ModelCheckpoint

    saving = ModelCheckpoint(dirpath=tmp_path / "other", every_n_train_steps=1, filename="x")
    train(other, tmp_path, RoleFSDP2(), callbacks=[saving], enable_checkpointing=True)
    with pytest.raises(ValueError, match="written by TeacherTraining"):
        train(case, tmp_path, RoleFSDP2(), ckpt_path=tmp_path / "other" / "x.ckpt")


@pytest.mark.parametrize("sharded", [True, False], ids=["folder", "file"])
def test_a_full_disk_leaves_the_earlier_checkpoint(mesh, tmp_path, monkeypatch, sharded):
    """Both forms are whole or not there, and a failure to write is one sentence."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    (case,) = named(["one_step"])
    original, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > limit:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(descriptor)

    def fit(folder):
        saving = ModelCheckpoint(dirpath=folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        strategy = RoleFSDP2(save_distributed_checkpoint=sharded)
        train(case, tmp_path, strategy, callbacks=[saving], enable_checkpointing=True)

    limit = 10**6
    monkeypatch.setattr(os, "fsync", full)
    fit(tmp_path / "whole")
    each = len(calls) // STEPS
    assert each == (5 if sharded else 2)  # shards, metadata, what is no tensor and its folder; the name
    calls.clear()
    limit = each
    with pytest.raises(OSError, match=r"step=2\.ckpt cannot be written.*: no space left on device.*checkpoint"):
        fit(tmp_path / "full")
    found = [file for file in (tmp_path / "full").iterdir() if not file.name.startswith(".")]
    assert [file.name for file in found] == ["step=1.ckpt"]
    assert damage(found[0]) is None
    remove_parts(tmp_path / "full")
    assert len(list((tmp_path / "full").iterdir())) == 1
    if not sharded:
        flip(found[0])
        with pytest.raises(ValueError, match="wrong checksum"):
            train(case, tmp_path, RoleFSDP2(), ckpt_path=found[0])


def test_a_flipped_bit_is_found_on_resume(mesh, tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    (case,) = named(["one_step"])
    saving = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, filename="x")
    train(case, tmp_path, RoleFSDP2(), callbacks=[saving], enable_checkpointing=True)
    file = next((tmp_path / "x.ckpt").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    entry = content.find(b"data/0")  # the values follow at the next multiple of 64 bytes
    content[entry + 70] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.ckpt cannot be read .*\.distcp, \S+: .*"):
        train(case, tmp_path, RoleFSDP2(), ckpt_path=tmp_path / "x.ckpt")


# ------------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offload": ["student"]}, "'student' is unknown"),
        ({"replicas": 0}, "number of copies, or nodes"),
        ({"compute_dtype": "float16"}, "choose float32 or bfloat16"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        RoleFSDP2(**options)


def test_bad_bucket_size():
    with pytest.raises(ValueError, match="positive number of MiB"):
        RoleDataParallel(bucket_size_mb=0)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_low_precision_weights_are_refused(mesh, precision, tmp_path):
    (case,) = named(["one_step"])
    with pytest.raises(ValueError, match=f"^precision={precision} keeps .* use bf16-mixed"):
        train(case, tmp_path, RoleFSDP2(), precision=precision)


def test_8_bit_optimizers_are_refused(mesh, tmp_path):
    (case,) = named(["one_step"])
    module = build(case, tmp_path)
    module.optimizer_factories["fake_score"] = eight_bit
    with pytest.raises(ValueError, match=r"cannot divide the 8-bit states of AdamW8bit; .* strategy=role_ddp"):
        train(case, tmp_path, RoleFSDP2(), module=module)


def test_weights_in_few_bits_are_refused(mesh, tmp_path):
    (case,) = named(["one_step"])
    module = build(case, tmp_path)
    module.teacher.network.output.__class__ = QuantisedLinear
    with pytest.raises(ValueError, match=r"cannot shard weights .*in few bits.* use strategy=role_ddp"):
        train(case, tmp_path, RoleFSDP2(), module=module)
    assert not any(isinstance(p, DTensor) for p in module.parameters())


def test_replicas_must_divide_the_processes(mesh, tmp_path):
    (case,) = named(["one_step"])
    with pytest.raises(ValueError, match="1 processes cannot be divided into 2"):
        train(case, tmp_path, RoleFSDP2(replicas=2))


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (DDPStrategy(), "use strategy=role_ddp"),
        (DDPStrategy(find_unused_parameters=True, static_graph=True), "use strategy=role_ddp"),
        (ModelParallelStrategy(), "use strategy=role_fsdp2"),
        (type("DeepSpeedStrategy", (SimpleNamespace,), {})(), "DeepSpeed has one engine.*use strategy=role_fsdp2"),
        (FSDPStrategy.__new__(FSDPStrategy), "FSDP wraps the module.*use strategy=role_fsdp2"),
    ],
)
def test_strategies_that_cannot_train_phases_are_refused(strategy, message):
    with pytest.raises(ValueError, match=message):
        check_strategy(strategy, 2)


def test_strategies_that_can_are_not():
    for strategy in (
        DDPStrategy(find_unused_parameters=True),
        RoleDataParallel(),
        RoleFSDP2(),
        SingleDeviceStrategy("cpu"),
    ):
        check_strategy(strategy, 2)
    check_strategy(DDPStrategy(), 1)


def test_refused_before_training(mesh, tmp_path):
    (case,) = named(["one_step"])
    with pytest.raises(ValueError, match="use strategy=role_ddp"):
        train(case, tmp_path, DDPStrategy())


@pytest.mark.parametrize("name", ["times_alone", "times_and_coefficients"])
def test_single_numbers_are_not_sharded(mesh, name, tmp_path):
    with pytest.raises(ValueError, match=r"one number per step.*strategy=role_ddp"):
        run(name, tmp_path)


class Head(torch.nn.Module):
    """A role with a parameter of its own beside a child's."""

    def __init__(self):
        super().__init__()
        self.inner, self.scale = torch.nn.Linear(2, 1), torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.scale * self.inner(x)


class OwnHead(Shift):
    kind = torch.nn.Linear

    def build_roles(self):
        super().build_roles()
        self.head = self.kind(2, 1) if self.kind is torch.nn.Linear else self.kind()


class OneNumber(OwnHead):
    kind = staticmethod(lambda: torch.nn.Parameter(torch.ones(())))


class WithHead(OwnHead):
    kind = Head


@pytest.mark.parametrize("method", [OwnHead, WithHead])
def test_roles_that_are_one_layer_are_sharded(mesh, method, tmp_path):
    module = method(teacher())
    own_trainer(tmp_path, strategy=RoleFSDP2()).fit(module, prior())
    assert all(isinstance(p, DTensor) for p in module.head.parameters())


def test_a_parameter_beside_the_networks_is_refused(mesh, tmp_path):
    with pytest.raises(ValueError, match=r"OneNumber.head, a parameter beside the networks; use strategy=role_ddp"):
        own_trainer(tmp_path, strategy=RoleFSDP2()).fit(OneNumber(teacher()), prior())


def test_other_modules_are_refused(mesh):
    from lightning.pytorch.demos.boring_classes import BoringModel

    strategy = RoleDataParallel()
    strategy._lightning_module = BoringModel()
    with pytest.raises(TypeError, match="BoringModel is none; use strategy=ddp"):
        strategy.configure_ddp()


def test_copies_before_sharding_are_unaffected():
    _, denoiser = tiny_denoiser("sd3")
    assert copy.deepcopy(denoiser).compute_dtype is None
