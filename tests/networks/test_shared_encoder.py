"""One encoder pass for several decoders: counted, derived by hand, and the plain UNet where there is one decoder."""

from __future__ import annotations

import pytest
import torch
from tiny_pipelines import sd15, sdxl
from torch import nn

from lightning_distill.export import export_denoiser
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.roles import Copy, Lora, averaged_copy
from lightning_distill.networks.shared_encoder import NOISES, SharedEncoder, SharedEncoderDenoiser
from lightning_distill.networks.small import small_dit, small_unet
from lightning_distill.processes import EDM, FlowMatching, TrigFlow, VariancePreserving
from lightning_distill.samplers import ode

N = 2


def randomised(network, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def unet(kind="epsilon", process=None, **settings):
    network = small_unet(8, 1, 3, (8, 16), norm_num_groups=4, attention_head_dim=8)
    return Denoiser(randomised(network), process or VariancePreserving(), kind, null_class=3, **settings).eval()


def inputs(make):
    if make in (sd15, sdxl):
        tiny = make()
        source, shape, cond = tiny.denoiser(), tiny.shape, tiny.cond(N)
    else:
        source, shape, cond = make(), (1, 8, 8), {"class_labels": torch.tensor([0, 2])}
    x = torch.randn(N, *shape, generator=torch.Generator().manual_seed(3))
    return source, (x, torch.full((N,), source.process.t_max, dtype=torch.float64), cond)


def preconditioned():
    return unet("v_prediction", EDM(0.02, 10.0), network_process=TrigFlow(), sigma_data=0.5)


@pytest.mark.parametrize("share_middle", [True, False])
@pytest.mark.parametrize("make", [unet, preconditioned, sd15, sdxl])
def test_one_decoder_is_the_plain_unet(make, share_middle):
    source, at = inputs(make)
    student = SharedEncoder(decoders=1, share_middle=share_middle).build(source)
    plain, made = source(*at), student(*at)
    assert torch.equal(made.raw, plain.raw)
    assert torch.equal(made.x0, plain.x0)
    assert torch.equal(made.features[NOISES][:, 0], plain.eps)


def seen_rows(network, call):
    rows, handles = {}, []
    blocks = [f"{part}.{i}" for part in ("down_blocks", "up_blocks") for i in (0, 1)]
    for name in ("conv_in", "mid_block", "conv_out", *blocks):
        part = network.get_submodule(name)
        inner = next(m for m in part.modules() if isinstance(m, nn.Conv2d))
        rows[name] = []
        handles.append(inner.register_forward_hook(lambda _m, _a, out, name=name: rows[name].append(len(out))))
    call()
    for handle in handles:
        handle.remove()
    return rows


@pytest.mark.parametrize("share_middle", [True, False])
@pytest.mark.parametrize("make", [unet, sd15])
def test_the_encoder_runs_once_on_the_batch_and_the_decoder_once_on_all_copies(make, share_middle):
    source, at = inputs(make)
    student = SharedEncoder(decoders=4, share_middle=share_middle).build(source)
    rows = seen_rows(student.network, lambda: student(*at))
    for name, found in rows.items():
        encoder = name.startswith(("conv_in", "down")) or (share_middle and name == "mid_block")
        assert found == [N if encoder else 4 * N], name
    # and no hook is left
    assert not student.network.conv_in._forward_hooks
    assert not student.network.down_blocks[0]._forward_pre_hooks


def by_hand(network, x, times, labels, process, share_middle):
    """UNet2DModel written out: the encoder at the first time, a decoder at each, DDIM between them."""

    def embedding(t):
        index = torch.full((N,), 1000.0 * t - 1.0)
        time = network.time_embedding(network.time_proj(index))
        return time + network.class_embedding(labels)

    first = embedding(times[0])
    h = network.conv_in(x)
    skips = [h]
    for block in network.down_blocks:
        h, more = block(h, first)
        skips += more
    x_t, noises = x, []
    for k, t in enumerate(times):
        emb, left = embedding(t), list(skips)
        g = network.mid_block(h, first if share_middle else emb)
        for block in network.up_blocks:
            own = tuple(left[-len(block.resnets) :])
            del left[-len(block.resnets) :]
            g = block(g, own, emb)
        eps = network.conv_out(network.conv_act(network.conv_norm_out(g)))
        noises.append(eps)
        alpha, sigma = (f(torch.tensor(t, dtype=torch.float64)).float() for f in (process.alpha, process.sigma))
        x0 = (x_t - sigma * eps) / alpha
        if k + 1 < len(times):
            later = torch.tensor(times[k + 1], dtype=torch.float64)
            x_t = process.alpha(later).float() * x0 + process.sigma(later).float() * eps
    return x0, torch.stack(noises, 1)


@pytest.mark.parametrize("share_middle", [True, False])
def test_it_is_the_unet_written_out_and_so_are_its_gradients(share_middle):
    source, at = inputs(unet)
    student = SharedEncoder(decoders=3, share_middle=share_middle).build(source)
    x, _, cond = at
    made = student(*at)
    x0, noises = by_hand(student.network, x, student.decoder_times, cond["class_labels"], student.process, share_middle)
    torch.testing.assert_close(made.features[NOISES], noises, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made.x0, x0, rtol=1e-3, atol=1e-3)
    network = student.network
    weights = [network.conv_in.weight, network.conv_out.weight, network.time_embedding.linear_1.weight]
    ours, theirs = (torch.autograd.grad(value.square().mean(), weights) for value in (made.x0, x0))
    for one, other in zip(ours, theirs):
        assert one.any()
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))
    # and not four separate calls: the encoder would see other samples and times
    separate = ode(lambda y, t: Denoiser.forward(source, y, t, cond), x, student.decoder_times, student.process)
    assert not torch.allclose(made.x0, separate, atol=1e-2)


class Replay(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, x, t, class_labels=None):
        return self.outputs.pop(0)


@pytest.mark.parametrize("make", [preconditioned, lambda: unet("flow_prediction", FlowMatching())])
def test_outputs_are_chained_by_the_deterministic_sampler(make):
    source, at = inputs(make)
    student = SharedEncoder(decoders=3).build(source)
    outputs = []
    handle = student.network.register_forward_hook(lambda _m, _a, out: outputs.extend(out.sample.chunk(3)))
    made = student(*at).x0
    handle.remove()
    replay = Denoiser(
        Replay(outputs),
        source.process,
        source.prediction_type,
        network_process=source.network_process,
        sigma_data=source.sigma_data,
    )
    expected = ode(lambda y, t: replay(y, t, at[2]), at[0], student.decoder_times, source.process)
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)


def test_an_average_shares_its_encoder_too():
    source, at = inputs(unet)
    student = SharedEncoder(decoders=2, share_middle=False).build(source)
    average = averaged_copy(student, "power")
    assert isinstance(average, SharedEncoderDenoiser)
    assert (average.decoder_times, average.share_middle) == (student.decoder_times, False)
    assert average.network is not student.network
    assert torch.equal(average(*at).x0, student(*at).x0)
    assert not any(p.requires_grad for p in average.parameters())
    assert all(p.requires_grad for p in student.parameters())


def test_what_does_not_fit_is_refused():
    source, _ = inputs(unet)
    dit = Denoiser(small_dit(8, 1, 3, 4, 1, 1, 8), FlowMatching(), "flow_prediction")
    cases = [
        (SharedEncoder(decoders=0), source, "1 decoder or more"),
        (SharedEncoder(decoders=2, times=[1.0]), source, "as many times"),
        (SharedEncoder(decoders=2, times=[0.9, 0.4]), source, "first time is t_max"),
        (SharedEncoder(decoders=2, times=[1.0, 1.0]), source, "must fall strictly"),
        (SharedEncoder(role=Lora(rank=2)), source, "weights of its own"),
        (SharedEncoder(role=Copy()), dit, "DiTTransformer2DModel is none"),
    ]
    for role, teacher, message in cases:
        with pytest.raises(ValueError, match=message):
            role.build(teacher)


def test_no_stock_pipeline_is_written_for_more_than_a_network(tmp_path):
    with pytest.raises(ValueError, match="need more than its network"):
        export_denoiser(SharedEncoder(decoders=2).build(unet()), [1.0], "ode", tmp_path / "out")
    assert not (tmp_path / "out").exists()
