"""Convolutions with channels innermost: the same numbers, optimizer states that fit, messages that keep the order."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from diffusers import UNet2DModel
from own_methods import prior, trainer
from torch import nn
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import functional as F

from lightning_distill.export import export_pipeline
from lightning_distill.forward_rules import forward_rules
from lightning_distill.memory_format import is_dense, lay_out_convolutions, match_states, suits_channels_last
from lightning_distill.methods import DMD2
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.roles import Lora
from lightning_distill.processes import FlowMatching
from lightning_distill.strategies import RoleFSDP2
from lightning_distill.strategies.reducer import _views, share_tensors
from lightning_distill.strategies.sharding import distribute_like

INNERMOST = torch.channels_last
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*eval mode", "ignore:.*logging interval", "ignore:Checkpoint directory"
)


def unet() -> UNet2DModel:
    blocks = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    kinds = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DModel(sample_size=8, in_channels=2, out_channels=2, **blocks, **kinds)


def method(**settings) -> DMD2:
    teacher = Denoiser(unet(), FlowMatching(), "flow_prediction", sigma_data=1.0)
    adam = partial(torch.optim.AdamW, lr=1e-3, eps=1e-2, fused=True)
    return DMD2(
        teacher, shape=[2, 8, 8], student_optimizer=adam, fake_score_optimizer=adam, check_data=False, **settings
    )


def convolutions(module: nn.Module) -> list[torch.Tensor]:
    return [part.weight for part in module.modules() if isinstance(part, nn.Conv2d) and part.weight[0, 0].numel() > 1]


# ------------------------------------------------------------------------------------------------ which, and the same
@pytest.mark.parametrize("channels_last", [None, True, False])
def test_all_networks_are_laid_out_alike(channels_last):
    module = method(channels_last=channels_last)
    module.configure_model()
    for network in (module.teacher, module.student, module.fake_score, module.student_ema):
        weights = convolutions(network)
        assert weights
        assert all(w.is_contiguous(memory_format=INNERMOST) != (channels_last is False) for w in weights)


def test_plain_networks_keep_their_own():
    network = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1))
    network.forward = lambda x, t: nn.Sequential.forward(network, x)
    teacher = Denoiser(network, FlowMatching(), "flow_prediction", sigma_data=1.0)
    for channels_last in (None, True):
        module = DMD2(teacher, shape=[2, 8, 8], channels_last=channels_last)
        module.configure_model()
        innermost = [w.is_contiguous(memory_format=INNERMOST) for w in convolutions(module.student)]
        assert innermost == [channels_last is True] * 2


def test_blocks_of_other_networks_that_are_called_like_a_unet_count_for_nothing():
    assert suits_channels_last(unet())
    block = type("UNetBlock", (nn.Conv2d,), {})(2, 2, 3)
    assert not suits_channels_last(nn.Sequential(block))


@pytest.mark.parametrize(("precision", "innermost"), [("32-true", True), ("bf16-mixed", False)])
def test_bfloat16_on_the_cpu_keeps_the_usual_order(tmp_path, precision, innermost):
    early = method()
    early.configure_model()  # before anybody knows the precision
    for module in (method(), early):
        trainer(tmp_path, 1, precision=precision).fit(module, prior())
        assert all(w.is_contiguous(memory_format=INNERMOST) == innermost for w in convolutions(module.student))


def test_a_run_is_the_same_run(tmp_path):
    ends, start = [], torch.cat([p.flatten() for p in unet().parameters()]).detach()
    for channels_last in (True, False):
        module = method(channels_last=channels_last)
        trainer(tmp_path, 3).fit(module, prior())
        assert all(w.is_contiguous(memory_format=INNERMOST) == channels_last for w in convolutions(module.student))
        ends.append(torch.cat([p.detach().flatten() for p in module.student.parameters()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=2e-6)
    assert (ends[0] - start).abs().max() > 1e-4


@pytest.mark.long
@pytest.mark.parametrize("channels_last", [None, True])
def test_dora_of_convolutions_is_trained(tmp_path, channels_last):
    module = method(student=Lora(rank=2, target_modules=["conv1"], dora=True), channels_last=channels_last)
    trainer(tmp_path, 2).fit(module, prior())
    assert module.teacher.network.conv_in.weight.is_contiguous(memory_format=INNERMOST)
    assert module.sample(2).isfinite().all()


def test_a_checkpoint_goes_on_in_the_other_format(tmp_path):
    straight = method(channels_last=False)
    trainer(tmp_path, 6).fit(straight, prior())
    first = trainer(tmp_path, 3)
    first.fit(method(channels_last=True), prior())
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = method(channels_last=False)
    trainer(tmp_path, 6).fit(resumed, prior(), ckpt_path=tmp_path / "half.ckpt")
    for one, two in zip(straight.parameters(), resumed.parameters()):
        torch.testing.assert_close(one, two, rtol=0, atol=2e-6)


def test_fused_steps_with_states_of_the_other_format():
    start, generator = torch.randn(4, 3, 2, 2), torch.Generator().manual_seed(1)
    gradients = [torch.randn(start.shape, generator=generator) for _ in range(3)]

    def steps(first: torch.memory_format, then: torch.memory_format) -> torch.Tensor:
        weight = nn.Parameter(start.clone(memory_format=first))
        optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
        for i, gradient in enumerate(gradients):
            if i == 1:
                state = optimizer.state_dict()
                weight = nn.Parameter(weight.detach().clone(memory_format=then))
                optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
                optimizer.register_load_state_dict_post_hook(match_states)
                optimizer.load_state_dict(state)
            weight.grad = gradient.clone(memory_format=first if i == 0 else then)
            optimizer.step()
        return weight.detach().contiguous()

    kept = steps(torch.contiguous_format, torch.contiguous_format)
    assert torch.equal(steps(INNERMOST, torch.contiguous_format), kept)
    assert torch.equal(steps(torch.contiguous_format, INNERMOST), kept)


def test_an_export_is_stock_and_the_same(tmp_path):
    module = method()
    module.configure_model()
    export_pipeline(
        module.student.network, module.process, "flow_prediction", module.student_times, "renoise", tmp_path / "out"
    )
    stored = UNet2DModel.from_pretrained(tmp_path / "out" / "unet")
    assert all(p.is_contiguous() for p in stored.parameters())
    assert all(torch.equal(a, b) for a, b in zip(stored.parameters(), module.student.network.parameters()))


# ------------------------------------------------------------------------------------------------ several processes
@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_messages_keep_the_order_of_elements(one_process):
    tensors = [torch.randn(2, 3, 4, 4).to(memory_format=INNERMOST), torch.randn(3, 2).t(), torch.randn(5)]
    before = [t.clone() for t in tensors]
    share_tensors(tensors)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before))
    views = list(_views(torch.empty(sum(t.numel() for t in tensors)), tensors))
    assert [v.stride() for v in views] == [t.stride() for t in tensors]


@pytest.mark.long
def test_sharding_wants_the_usual_order(one_process, tmp_path):
    with pytest.raises(ValueError, match="cannot shard weights with channels_last: true"):
        trainer(tmp_path, strategy=RoleFSDP2()).fit(method(channels_last=True), prior())
    module = method()
    module.configure_model()  # before the trainer is known
    trainer(tmp_path, strategy=RoleFSDP2()).fit(module, prior())
    assert all(p.to_local().is_contiguous() for p in module.student.parameters())


def test_parts_of_a_moment_lie_as_those_of_its_parameter(one_process):
    """As the single-file checkpoint of a run with channels innermost has it, which ``role_fsdp2`` goes on from."""
    like = distribute_tensor(torch.zeros(4, 3, 2, 2), init_device_mesh("cpu", (1,)), [Shard(0)])
    moment = torch.randn(4, 3, 2, 2).contiguous(memory_format=INNERMOST)
    part = distribute_like(moment, like).to_local()
    assert torch.equal(part, moment)
    assert part.stride() == like.to_local().stride() != moment.stride()


def test_what_is_dense():
    x = torch.zeros(2, 3, 4, 5)
    assert all(map(is_dense, (x, x.to(memory_format=INNERMOST), x.transpose(0, 3), x[:1], torch.zeros(()))))
    assert not any(map(is_dense, (x[:, :2], x[..., ::2], x[:1].expand(2, 3, 4, 5))))


def test_layers_are_changed_in_place_and_back():
    layer = nn.ConvTranspose2d(3, 5, 3)
    weight, before = layer.weight, layer.weight.detach().clone()
    lay_out_convolutions(layer)
    assert layer.weight is weight
    assert weight.is_contiguous(memory_format=INNERMOST)
    assert torch.equal(weight, before)
    lay_out_convolutions(layer, channels_last=False)
    assert weight.is_contiguous()


@pytest.mark.parametrize("graph", [False, True])
def test_derivatives_of_norms_and_sums_in_this_format(graph):
    x, dx, y = (torch.randn(2, 6, 4, 4, dtype=torch.float64).to(memory_format=INNERMOST) for _ in range(3))
    weight, bias = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)

    def layer(x):
        out = F.group_norm(x, 3, weight, bias)
        out += y * out
        return out

    want = torch.func.jvp(layer, (x.contiguous(),), (dx.contiguous(),))[1]
    with torch.set_grad_enabled(graph), forward_ad.dual_level(), forward_rules(beside_graph=graph):
        found = forward_ad.unpack_dual(layer(forward_ad.make_dual(x.clone(), dx))).tangent
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)
