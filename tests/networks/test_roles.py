import copy

import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from jsonargparse import ArgumentParser
from torch import nn

from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.lora import AdapterDenoiser, adapter_bank
from lightning_distill.networks.merging import merged_network
from lightning_distill.networks.roles import (
    Copy,
    Explicit,
    FromCheckpoint,
    Lora,
    Role,
    averaged_copy,
    role_state,
    trainable_parameters,
)
from lightning_distill.networks.specs import AnalyticTeacher, NewDenoiser, as_denoiser
from lightning_distill.processes import EDM, FlowMatching, TrigFlow, VariancePreserving


def unet(**changes):
    config = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 8),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "num_class_embeds": 4,
    }
    return UNet2DModel(**{**config, **changes})


def teacher_of(seed=0, **changes):
    torch.manual_seed(seed)
    teacher = Denoiser(unet(**changes), FlowMatching(3.0), "flow_prediction", sigma_data=0.4, null_class=3)
    return teacher.requires_grad_(False).eval()


def run(denoiser):
    g = torch.Generator().manual_seed(5)
    x = torch.randn(2, 1, 8, 8, generator=g)
    return denoiser(x, torch.tensor([0.2, 0.9]), {"class_labels": torch.tensor([0, 3])}).raw


def frozen_equal(denoiser, want):
    """Bit equality with a frozen network's output; torch orders products with trained weights differently."""
    assert torch.allclose(run(denoiser), want, atol=2e-6)
    flags = [(p, p.requires_grad) for p in denoiser.parameters()]
    denoiser.requires_grad_(False)
    equal = torch.equal(run(denoiser), want)
    for p, flag in flags:
        p.requires_grad_(flag)
    return equal


def perturb(denoiser, seed=9):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in trainable_parameters(denoiser):
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    return denoiser


def test_copy_equals_the_teacher_bit_for_bit_and_is_independent():
    teacher = teacher_of()
    before = run(teacher)
    student = Copy().build(teacher, "student")
    assert frozen_equal(student, before)
    assert {n for n, _ in trainable_parameters(student)} == {n for n, _ in teacher.named_parameters()}
    assert trainable_parameters(teacher) == []
    assert not set(map(id, student.parameters())) & set(map(id, teacher.parameters()))
    assert student.process is teacher.process
    assert (student.sigma_data, student.null_class, student.training) == (0.4, 3, False)
    perturb(student)
    assert torch.equal(run(teacher), before)
    assert not torch.equal(run(student), before)


def test_copy_of_a_bfloat16_teacher_has_float32_weights():
    teacher = teacher_of()
    for p in teacher.parameters():
        p.data = p.data.to(torch.bfloat16)
    student = Copy().build(teacher)
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
    assert all(torch.equal(a, b.float()) for a, b in zip(student.parameters(), teacher.parameters()))


def test_copies_of_a_shared_backbone_leave_the_adapters_behind():
    teacher = teacher_of()
    before = run(teacher)
    student = perturb(Lora(rank=2).build(teacher, "student"))
    fake = Copy().build(teacher, "fake_score")
    assert adapter_bank(fake.network) is None
    assert {n for n, _ in fake.named_parameters()} == {n for n, _ in teacher_of().named_parameters()}
    assert frozen_equal(fake, before)
    assert all(p.requires_grad for p in fake.parameters())
    merged = Copy().build(student)
    assert torch.allclose(run(merged), run(student), atol=1e-5)
    assert type(merged) is Denoiser


class Wrapped(Denoiser):
    """A denoiser with a parameter outside its network."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.tensor(2.0))

    def _raw(self, out, x_in, dtype):
        return self.gain * super()._raw(out, x_in, dtype)


def test_copies_keep_the_class_of_the_source():
    torch.manual_seed(0)
    teacher = Wrapped(unet(), FlowMatching(), "flow_prediction").eval()
    student = Copy().build(teacher)
    assert type(student) is Wrapped
    assert student.gain is not teacher.gain
    assert torch.equal(run(student), run(teacher))
    assert "gain" in role_state(student)


def test_lora_shares_the_backbone():
    teacher = teacher_of()
    before = run(teacher)
    student = Lora(rank=2, alpha=4, target_modules=["conv1"], seed=3).build(teacher, "student")
    assert isinstance(student, AdapterDenoiser)
    assert student.network is teacher.network
    assert (student.config.r, student.config.lora_alpha) == (2, 4)
    assert torch.equal(run(student), before)
    assert Lora.shares_weights
    assert not Copy.shares_weights
    with pytest.raises(ValueError, match=r"Lora\(rank=0, dropout=0.0\): rank must be >= 1"):
        Lora(rank=0).check()
    with pytest.raises(ValueError, match="dropout in"):
        Lora(dropout=1.0).check()


@pytest.mark.parametrize("role", [Copy(), Lora(rank=2)], ids=["copy", "lora"])
def test_averages_are_frozen_float32_and_independent(role):
    teacher = teacher_of()
    student = perturb(role.build(teacher, "student"))
    averages = [averaged_copy(student, name) for name in ("power_0_05", "power_0_1")]
    want = run(student)
    for average in averages:
        assert torch.allclose(run(average), want, atol=1e-5)
        assert trainable_parameters(average) == []
        assert not average.training
        # what an update walks over: the same tensors in the same order
        pairs = list(zip(average.parameters(), [p for _, p in trainable_parameters(student)], strict=True))
        assert all(torch.equal(a, b) and a is not b for a, b in pairs)
    perturb(student)
    assert torch.allclose(run(averages[0]), want, atol=1e-5)
    assert not torch.allclose(run(student), want, atol=1e-3)
    with torch.no_grad():
        for p in averages[0].parameters():
            p.zero_()
    assert torch.allclose(run(averages[1]), want, atol=1e-5)


def test_networks_without_parameters_cannot_be_copied():
    teacher = as_denoiser(AnalyticTeacher("ring", FlowMatching()))
    with pytest.raises(ValueError, match=r"AnalyticNetwork has no parameters.*give the fake_score .*Explicit\(spec\)"):
        Copy().build(teacher, "fake_score")
    with pytest.raises(ValueError, match="match no layer of AnalyticNetwork"):
        Lora().build(teacher)


# ---------------------------------------------------------------------------------------- explicit modules
def new(process=None, **changes):
    return NewDenoiser(lambda: unet(**changes), process or FlowMatching(), "sample")


def test_explicit_networks():
    student = Explicit(new(block_out_channels=(4, 4))).build(teacher_of(), "student")
    assert sum(p.numel() for p in student.parameters()) < sum(p.numel() for p in teacher_of().parameters())
    assert len(trainable_parameters(student)) == len(list(student.parameters()))
    with pytest.raises(ValueError, match="prediction_type='x' is unknown"):
        Explicit(NewDenoiser(unet, FlowMatching(), "x")).check()


@pytest.mark.parametrize("process", [VariancePreserving(), TrigFlow(), EDM()])
def test_explicit_networks_of_another_process(process):
    message = f"the student works with {type(process).__name__}.* and the teacher with FlowMatching"
    with pytest.raises(ValueError, match=message):
        Explicit(new(process)).build(teacher_of(), "student")


@pytest.mark.parametrize("changes", [{"in_channels": 2, "out_channels": 2}, {"sample_size": 16}], ids=str)
def test_explicit_networks_of_another_shape(changes):
    with pytest.raises(ValueError, match=r"makes samples of shape \(.*\) and the teacher .* of shape \(1, 8, 8\)"):
        Explicit(new(**changes)).build(teacher_of(), "student")


# ---------------------------------------------------------------------------------------- warm starts
def save(path, **roles):
    state = {f"{role}.{k}": v.clone() for role, network in roles.items() for k, v in role_state(network).items()}
    torch.save({"state_dict": {**state, "skipped_steps": torch.zeros(2)}, "epoch": 1, "lightning_distill": {}}, path)


def test_warm_start_from_full_weights(tmp_path):
    student = perturb(Copy().build(teacher_of()), 1)
    average = perturb(copy.deepcopy(student), 2)
    path = tmp_path / "last.ckpt"
    ema = nn.ModuleDict({"power_0_1": average})
    save(path, student=student, student_ema=ema, fake_score=Copy().build(teacher_of()))
    for role, want in (("student", student), ("student_ema", average), ("student_ema.power_0_1", average)):
        warm = FromCheckpoint(str(path), role)
        warm.check()
        built = warm.build(teacher_of(), "student")
        assert torch.equal(run(built), run(want))
        assert len(trainable_parameters(built)) == len(list(built.parameters()))
    assert torch.equal(run(FromCheckpoint(str(path)).build(teacher_of())), run(average))
    with pytest.raises(
        ValueError, match=r"last.ckpt holds no role 'critic'; .*'fake_score', 'student', 'student_ema.p"
    ):
        FromCheckpoint(str(path), "critic").build(teacher_of())
    save(path, student=student, student_ema=nn.ModuleDict({"a": average, "b": average}))
    with pytest.raises(ValueError, match=r"holds several role 'student_ema'; set role to one of .*'student_ema.a'"):
        FromCheckpoint(str(path)).build(teacher_of())
    with pytest.raises(ValueError, match=r"role 'student' of .*last.ckpt does not fit UNet2DModel: .* has shape"):
        FromCheckpoint(str(path), "student").build(teacher_of(block_out_channels=(4, 4)))


def test_warm_start_from_adapters(tmp_path):
    first = teacher_of()
    student = perturb(Lora(rank=3, alpha=6, target_modules=["conv1", "mid_block.resnets.0.conv2"]).build(first, "s"))
    path = tmp_path / "lora.ckpt"
    ema = nn.ModuleDict({"p": averaged_copy(student, "p")})
    save(path, student=student, student_ema=ema)
    assert path.stat().st_size < sum(p.numel() * 4 for p in first.parameters())
    teacher = teacher_of()
    before = run(teacher)
    for role in ("student", "student_ema"):
        built = FromCheckpoint(str(path), role).build(teacher, role)
        assert isinstance(built, AdapterDenoiser)
        assert built.network is teacher.network
        assert {n for n, _ in built.adapter_parameters()} == {n for n, _ in student.adapter_parameters()}
        assert torch.allclose(run(built), run(student), atol=1e-5)
        assert all(p.requires_grad for p in built.parameters())
    assert torch.equal(run(teacher), before)
    clean = teacher_of()
    merged = FromCheckpoint(str(path), "student", merge=True).build(clean)
    assert type(merged) is Denoiser
    assert adapter_bank(merged.network) is adapter_bank(clean.network) is None
    assert torch.allclose(run(merged), run(student), atol=1e-5)
    assert len(trainable_parameters(merged)) == len(list(merged.parameters()))
    with pytest.raises(ValueError, match=r"does not fit UNet2DModel: .* has shape"):
        FromCheckpoint(str(path), "student").build(teacher_of(block_out_channels=(4, 4)))


def test_a_small_adapter_of_half_precision_weights_is_merged_whole(tmp_path):
    """Its change is far below the resolution of bfloat16."""

    def half():
        teacher = teacher_of()
        teacher.network.to(torch.bfloat16)
        return teacher

    first = half()
    student = Lora(rank=2, target_modules=["conv1"]).build(first, "s")
    with torch.no_grad():
        for name, parameter in student.adapter_parameters():
            parameter.fill_(1e-2 if "lora_B" in name else 1e-3)
    save(tmp_path / "lora.ckpt", student=student)
    clean = half()
    weights = dict(clean.network.named_parameters())
    merged = dict(FromCheckpoint(str(tmp_path / "lora.ckpt"), "student", merge=True).build(clean).named_parameters())
    averaged = dict(Copy().build(student).named_parameters())
    for path, layer in student.bank.layers.items():
        key, change = f"{path}.weight", layer.get_delta_weight("s")
        for found in (merged, averaged):
            torch.testing.assert_close(found[f"network.{key}"] - weights[key].float(), change, rtol=0, atol=1e-7)
    with pytest.warns(
        UserWarning, match=r"which rounds \d+% of its change away; give PretrainedDenoiser dtype: float32"
    ):
        merged_network(student)


def test_checkpoints_that_cannot_be_read(tmp_path):
    teacher = teacher_of()
    path = tmp_path / "run.ckpt"
    with pytest.raises(FileNotFoundError, match=r"FromCheckpoint\(path='.*run.ckpt'\) does not exist"):
        FromCheckpoint(str(path)).check()
    save(path, student=Copy().build(teacher))
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"no checkpoint at all"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"run.ckpt cannot be read as a checkpoint"):
            FromCheckpoint(str(path), "student").build(teacher)
    torch.save({"state_dict": {}, "hook": Trap()}, path)
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        FromCheckpoint(str(path), "student").build(teacher)
    assert Trap.sprung == []
    torch.save({"model": {}, "step": 1}, path)
    with pytest.raises(
        ValueError, match=r"is no Lightning checkpoint: it has no state_dict but the keys \['model', 'step"
    ):
        FromCheckpoint(str(path), "student").build(teacher)
    torch.save({"state_dict": {"encoder.weight": torch.zeros(1)}}, path)
    with pytest.raises(ValueError, match=r"holds no role 'student'; .*\(it holds no networks\)"):
        FromCheckpoint(str(path), "student").build(teacher)
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    (sharded / ".metadata").touch()
    with pytest.raises(ValueError, match="is a sharded checkpoint; make it one file with lightning-distill convert"):
        FromCheckpoint(str(sharded)).check()


class Trap:
    """Something whose unpickling would run code."""

    sprung: list = []

    def __reduce__(self):
        return (Trap.sprung.append, (1,))


def test_warm_start_from_an_exported_folder(tmp_path):
    exported = perturb(Copy().build(teacher_of()))
    DDPMPipeline(exported.network, FlowMatchEulerDiscreteScheduler(shift=3.0)).save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "unet"):
        warm = FromCheckpoint(str(folder))
        warm.check()
        built = warm.build(teacher_of())
        assert torch.equal(run(built), run(exported))
        assert len(trainable_parameters(built)) == len(list(built.parameters()))
    DDPMPipeline(exported.network, DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"describes VariancePreserving.*and the teacher works with FlowMatching"):
        FromCheckpoint(str(tmp_path)).build(teacher_of())
    other = Denoiser(unet(), VariancePreserving("linear", 1e-4, 0.02), "v_prediction")
    with pytest.raises(
        ValueError, match=r"holds a UNet2DModel with epsilon, and the teacher is a UNet2DModel with v_pred"
    ):
        FromCheckpoint(str(tmp_path)).build(other)
    dit = DiTTransformer2DModel(
        num_attention_heads=1,
        attention_head_dim=4,
        in_channels=1,
        num_layers=1,
        sample_size=8,
        norm_num_groups=1,
    )
    with pytest.raises(ValueError, match=r"holds a UNet2DModel .*Explicit\(PretrainedDenoiser\(path\)\)"):
        FromCheckpoint(str(tmp_path)).build(Denoiser(dit, VariancePreserving("linear", 1e-4, 0.02), "epsilon"))
    with pytest.raises(FileNotFoundError, match="holds no model"):
        FromCheckpoint(str(tmp_path / "scheduler")).check()


def test_roles_come_from_yaml():
    parser = ArgumentParser()
    parser.add_subclass_arguments(Role, "student")
    args = ["--student=Lora", "--student.rank=4", "--student.target_modules=[conv1]"]
    role = parser.instantiate_classes(parser.parse_args(args)).student
    assert (type(role), role.rank, role.target_modules) == (Lora, 4, ["conv1"])
    text = """
student:
  class_path: Explicit
  init_args:
    spec:
      class_path: lightning_distill.networks.specs.AnalyticTeacher
      init_args: {problem: ring, process: FlowMatching}
"""
    assert isinstance(parser.instantiate_classes(parser.parse_string(text)).student, Explicit)
