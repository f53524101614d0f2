"""ADM's weights in diffusers' UNet, against ADM's forward written out with the names of its own state dict."""

import math

import pytest
import torch
from torch.nn import functional as F

from lightning_distill.networks.adm_weights import unet_from_adm

LAYERS, HEAD, WIDTHS = 1, 4, (8, 8, 16)
ATTENDS = (False, True, True)


def weights(seed=0, classes=5):
    """Random weights under ADM's names."""
    generator = torch.Generator().manual_seed(seed)
    made = {}

    def add(name, *shape, bias=True, centre=0.0):
        made[f"{name}.weight"] = centre + 0.2 * torch.randn(shape, generator=generator)
        if bias:
            made[f"{name}.bias"] = 0.2 * torch.randn(shape[0], generator=generator)

    def block(name, inner, outer):
        add(f"{name}.in_layers.0", inner, centre=1.0)
        add(f"{name}.in_layers.2", outer, inner, 3, 3)
        add(f"{name}.emb_layers.1", 2 * outer, 4 * WIDTHS[0])
        add(f"{name}.out_layers.0", outer, centre=1.0)
        add(f"{name}.out_layers.3", outer, outer, 3, 3)
        if inner != outer:
            add(f"{name}.skip_connection", outer, inner, 1, 1)

    def attention(name, width):
        add(f"{name}.norm", width, centre=1.0)
        add(f"{name}.qkv", 3 * width, width, 1, 1)
        add(f"{name}.proj_out", width, width, 1, 1)

    add("time_embed.0", 4 * WIDTHS[0], WIDTHS[0])
    add("time_embed.2", 4 * WIDTHS[0], 4 * WIDTHS[0])
    if classes:
        add("label_emb", classes, 4 * WIDTHS[0], bias=False)
    add("input_blocks.0.0", WIDTHS[0], 3, 3, 3)
    width, kept, index = WIDTHS[0], [WIDTHS[0]], 1
    for level, outer in enumerate(WIDTHS):
        block(f"input_blocks.{index}.0", width, outer)
        if ATTENDS[level]:
            attention(f"input_blocks.{index}.1", outer)
        kept, width, index = [*kept, outer], outer, index + 1
        if level < len(WIDTHS) - 1:
            block(f"input_blocks.{index}.0", width, width)
            kept, index = [*kept, width], index + 1
    for number in (0, 2):
        block(f"middle_block.{number}", width, width)
    attention("middle_block.1", width)
    index = 0
    for level in reversed(range(len(WIDTHS))):
        for layer in range(LAYERS + 1):
            block(f"output_blocks.{index}.0", width + kept.pop(), WIDTHS[level])
            width = WIDTHS[level]
            if ATTENDS[level]:
                attention(f"output_blocks.{index}.1", width)
            if level and layer == LAYERS:
                block(f"output_blocks.{index}.{1 + ATTENDS[level]}", width, width)
            index += 1
    add("out.0", width, centre=1.0)
    add("out.2", 3, width, 3, 3)
    return made


def adm(w, x, t, labels):
    """ADM's forward pass."""

    def norm(name, h):
        return F.group_norm(h, 8, w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def conv(name, h):
        return F.conv2d(h, w[f"{name}.weight"], w[f"{name}.bias"], padding=w[f"{name}.weight"].shape[-1] // 2)

    def block(name, h, resample=lambda h: h):
        inner = conv(f"{name}.in_layers.2", resample(F.silu(norm(f"{name}.in_layers.0", h))))
        told = F.linear(F.silu(emb), w[f"{name}.emb_layers.1.weight"], w[f"{name}.emb_layers.1.bias"])
        scale, shift = told[..., None, None].chunk(2, dim=1)
        inner = norm(f"{name}.out_layers.0", inner) * (1 + scale) + shift
        skip = f"{name}.skip_connection"
        h = resample(h)
        return (conv(skip, h) if f"{skip}.weight" in w else h) + conv(f"{name}.out_layers.3", F.silu(inner))

    def attention(name, h):
        n, c, height, width = h.shape
        parts = conv(f"{name}.qkv", norm(f"{name}.norm", h)).reshape(n, 3, c // HEAD, HEAD, -1)
        q, k, v = parts.unbind(1)
        scores = torch.einsum("nhdi,nhdj->nhij", q, k) / math.sqrt(HEAD)
        mixed = torch.einsum("nhij,nhdj->nhdi", scores.softmax(-1), v).reshape(n, c, height, width)
        return h + conv(f"{name}.proj_out", mixed)

    half = WIDTHS[0] // 2
    angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / half)
    emb = F.linear(torch.cat([angles.cos(), angles.sin()], 1), w["time_embed.0.weight"], w["time_embed.0.bias"])
    emb = F.linear(F.silu(emb), w["time_embed.2.weight"], w["time_embed.2.bias"])
    if labels is not None:
        emb = emb + w["label_emb.weight"][labels]
    h, kept, index = conv("input_blocks.0.0", x), [], 1
    kept.append(h)
    for level in range(len(WIDTHS)):
        h = block(f"input_blocks.{index}.0", h)
        if ATTENDS[level]:
            h = attention(f"input_blocks.{index}.1", h)
        kept.append(h)
        index += 1
        if level < len(WIDTHS) - 1:
            h = block(f"input_blocks.{index}.0", h, lambda h: F.avg_pool2d(h, 2))
            kept.append(h)
            index += 1
    h = block("middle_block.2", attention("middle_block.1", block("middle_block.0", h)))
    index = 0
    for level in reversed(range(len(WIDTHS))):
        for layer in range(LAYERS + 1):
            h = block(f"output_blocks.{index}.0", torch.cat([h, kept.pop()], 1))
            if ATTENDS[level]:
                h = attention(f"output_blocks.{index}.1", h)
            if level and layer == LAYERS:
                name = f"output_blocks.{index}.{1 + ATTENDS[level]}"
                h = block(name, h, lambda h: F.interpolate(h, scale_factor=2.0))
            index += 1
    return conv("out.2", F.silu(norm("out.0", h)))


@pytest.mark.parametrize("classes", [5, 0])
@torch.no_grad()
def test_converted_weights_compute_what_adm_computes(classes):
    made = weights(classes=classes)
    network = unet_from_adm(made, sample_size=16, layers=LAYERS, head=HEAD)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([1095.5, -1553.7])  # 250 ln 80 and 250 ln .002
    labels = torch.tensor([4, 1]) if classes else None
    expected = adm(made, x, t, labels)
    torch.testing.assert_close(network(x, t, class_labels=labels).sample, expected, atol=2e-4, rtol=1e-4)
    assert (network.config.num_class_embeds, network.config.sample_size) == (classes or None, 16)
    assert sum(p.numel() for p in network.parameters()) == sum(v.numel() for v in made.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda made: made.update({"input_blocks.6.0.weight": torch.zeros(1)}), "it has 7 input blocks"),
        (lambda made: made.update({"label_emb.scale.weight": torch.zeros(1)}), "nothing takes label_emb.scale.weight"),
        (lambda made: made.pop("input_blocks.5.0.out_layers.3.bias"), "no input_blocks.5.0.out_layers.3.bias"),
        (lambda made: made.pop("middle_block.0.in_layers.2.bias"), "mid_block.resnets.0.conv1.bias"),
    ],
)
def test_other_weights_are_refused(change, message):
    made = weights()
    change(made)
    with pytest.raises(ValueError, match=f"not the weights of an ADM network.* 1 of them a level: .*{message}"):
        unet_from_adm(made, sample_size=16, layers=LAYERS, head=HEAD)
