"""Small networks built from plain numbers: a residual MLP, and tiny diffusers UNets and transformers."""

import math
from collections.abc import Sequence

import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_distill.networks.families import Family, register

__all__ = ["ConditionedMLP", "ResidualBlock", "ResidualMLP", "null_class", "small_dit", "small_text_unet", "small_unet"]


class _TimeFeatures(nn.Module):
    """cos and sin of a native time at geometric frequencies, period 4 to 1/4.

    The slowest wave is one-to-one on flow's [0, 1] and on TrigFlow's [0, pi/2]; the fastest keeps the time
    derivative of the network, which continuous-time methods need, of order 10.
    """

    frequencies: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        octaves = torch.linspace(-1.0, 3.0, features // 2)
        self.register_buffer("frequencies", math.pi * 2.0**octaves, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None] * self.frequencies.to(t.dtype)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ResidualBlock(nn.Module):
    """h + outer(silu(inner(h + embedding))); no normalisation, which loses the position of a 2-D point.

    Args:
        width: features of h and of the embedding.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:  # noqa: D102
        return h + self.outer(F.silu(self.inner(h + embedding)))


class ConditionedMLP(nn.Module):
    """What small residual MLPs are told: times and a class, as one embedding that every block adds.

    Args:
        width: features of the hidden layers.
        depth: number of residual blocks, at least 1.
        num_classes: number of classes, 0 for none; the label ``num_classes`` means "no class".
        time_features: number of features of each time, even.
        times: number of times.

    Raises:
        ValueError: sizes below their minimum.
    """

    def __init__(self, width: int, depth: int, num_classes: int, time_features: int, times: int = 1) -> None:
        super().__init__()
        if min(width, depth) < 1 or num_classes < 0 or time_features < 2 or time_features % 2:
            raise ValueError(
                f"{type(self).__name__}(width={width}, depth={depth}, num_classes={num_classes}, "
                f"time_features={time_features}): needs width and depth >= 1, num_classes >= 0 and an even "
                "time_features >= 2."
            )
        self.num_classes = num_classes
        self.time_proj = _TimeFeatures(time_features)
        features = time_features * times
        self.time_embedding = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))
        self.class_embedding = nn.Embedding(num_classes + 1, width) if num_classes else None

    def embed(self, times: Sequence[Tensor], class_labels: Tensor | None) -> Tensor:
        """The embedding, (B, width).

        Args:
            times: as many as the network has, (B,) each.
            class_labels: classes, (B,) integers; None means "no class".

        Raises:
            ValueError: labels for a network without classes.
        """
        embedding: Tensor = self.time_embedding(torch.cat([self.time_proj(t) for t in times], dim=1))
        if self.class_embedding is not None:
            if class_labels is None:
                class_labels = torch.full((len(embedding),), self.num_classes, device=embedding.device)
            return embedding + self.class_embedding(class_labels)
        if class_labels is not None:
            raise ValueError(f"this {type(self).__name__} has num_classes=0, but the batch has class_labels.")
        return embedding


class ResidualMLP(ConditionedMLP):
    """A residual MLP on flattened samples, for 2-D points and 8x8 digits.

    Times are native: give it flow-matching or TrigFlow times (other processes reach it through the
    ``network_process`` of a ``Denoiser``). The output layer starts near zero.

    Args:
        shape: shape of one sample, for example (2,) or (1, 8, 8).
        width: features of the hidden layers.
        depth: number of residual blocks, at least 1; ``blocks.i`` can be tapped, (B, width).
        num_classes: number of classes, 0 for none; the label ``num_classes`` means "no class".
        time_features: number of time features, even.

    Raises:
        ValueError: sizes below their minimum.
    """

    def __init__(
        self,
        shape: Sequence[int],
        width: int = 128,
        depth: int = 3,
        num_classes: int = 0,
        time_features: int = 64,
    ) -> None:
        super().__init__(width, depth, num_classes, time_features)
        self.shape = tuple(shape)
        elements = math.prod(self.shape)
        self.input = nn.Linear(elements, width)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        self.output = nn.Linear(width, elements)
        with torch.no_grad():
            self.output.weight.mul_(0.01)
            self.output.bias.zero_()

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Run the network.

        Args:
            x: noisy samples, (B, *shape).
            t: native times, (B,).
            class_labels: classes, (B,) integers; None means "no class".

        Returns:
            output in the parameterisation it was trained for, (B, *shape).

        Raises:
            ValueError: samples of another shape, or labels for a network without classes.
        """
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"this ResidualMLP takes samples of shape {self.shape}, got a batch {tuple(x.shape)}.")
        embedding = self.embed([t.to(x.dtype)], class_labels)
        h = self.input(x.flatten(1))
        for block in self.blocks:
            h = block(h, embedding)
        return self.output(h).reshape(x.shape)


def null_class(network: nn.Module) -> int | None:
    """The label that means "no class", of networks that state ``num_classes``; None without classes."""
    classes = network.num_classes
    return classes if isinstance(classes, int) and classes > 0 else None


register(
    Family(
        "ResidualMLP",
        time="native",
        cond_keys=("class_labels",),
        null={"class_labels": null_class},
        blocks=("blocks",),
        lora_targets=(
            "input",
            "inner",
            "outer",
            "output",
            "time_embedding.0",
            "time_embedding.2",
        ),
    )
)


def small_unet(
    sample_size: int = 32,
    in_channels: int = 1,
    num_classes: int = 0,
    block_out_channels: Sequence[int] = (16, 32, 64, 96),
    layers_per_block: int = 1,
    norm_num_groups: int = 8,
    attention_head_dim: int = 32,
) -> UNet2DModel:
    """A UNet with self-attention in its middle block; the defaults are the shipped 32x32 teacher's.

    Args:
        sample_size: height and width, divisible by 2^(levels - 1).
        in_channels: channels of the samples, in and out.
        num_classes: number of classes, 0 for none; the label ``num_classes`` means "no class"
            (pass it as ``null_class`` of the ``Denoiser``).
        block_out_channels: channels of each level, finest first, divisible by ``norm_num_groups``.
        layers_per_block: residual blocks per level.
        norm_num_groups: groups of the group norms.
        attention_head_dim: channels per attention head.
    """
    channels = tuple(block_out_channels)
    return UNet2DModel(
        sample_size=sample_size,
        in_channels=in_channels,
        out_channels=in_channels,
        block_out_channels=channels,
        layers_per_block=layers_per_block,
        down_block_types=("DownBlock2D",) * len(channels),
        up_block_types=("UpBlock2D",) * len(channels),
        num_class_embeds=num_classes + 1 if num_classes else None,
        norm_num_groups=norm_num_groups,
        attention_head_dim=attention_head_dim,
    )


def small_text_unet(
    sample_size: int = 32,
    in_channels: int = 3,
    cross_attention_dim: int = 384,
    block_out_channels: Sequence[int] = (16, 32, 64, 64),
    cross_attention_levels: int = 2,
    layers_per_block: int = 1,
    norm_num_groups: int = 8,
    num_heads: int = 2,
    pooling_heads: int = 4,
) -> UNet2DConditionModel:
    """A text-conditional UNet of 2.4 M parameters for small pictures, in pixel space.

    The coarsest levels attend to the tokens, and an attention pool of the tokens is added to the time embedding: every
    residual block is told the subject. Nothing but ``encoder_hidden_states`` is needed at a call, hence stock Stable
    Diffusion pipelines sample it (``prompt_embeds=..., output_type="latent"``; the latents are the pixels). They pass
    no mask: train it without one, on embeddings that are zero where they are padded.

    Args:
        sample_size: height and width, divisible by 2^(levels - 1).
        in_channels: channels of the samples, in and out.
        cross_attention_dim: width of the text embeddings.
        block_out_channels: channels of each level, finest first, divisible by ``norm_num_groups`` and ``num_heads``.
        cross_attention_levels: how many levels attend to the text, counted from the coarsest.
        layers_per_block: residual blocks per level.
        norm_num_groups: groups of the group norms.
        num_heads: attention heads.
        pooling_heads: heads of the pool over the tokens; ``cross_attention_dim`` is divisible by it.

    Raises:
        ValueError: more levels are to attend than there are.
    """
    channels = tuple(block_out_channels)
    plain = len(channels) - cross_attention_levels
    if not 0 <= plain < len(channels):
        raise ValueError(
            f"small_text_unet(cross_attention_levels={cross_attention_levels}): of {len(channels)} levels 1 to "
            f"{len(channels)} can attend to the text."
        )
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=in_channels,
        out_channels=in_channels,
        block_out_channels=channels,
        layers_per_block=layers_per_block,
        down_block_types=("DownBlock2D",) * plain + ("CrossAttnDownBlock2D",) * cross_attention_levels,
        up_block_types=("CrossAttnUpBlock2D",) * cross_attention_levels + ("UpBlock2D",) * plain,
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=num_heads,  # the number of heads: diffusers keeps the name of an old mistake
        norm_num_groups=norm_num_groups,
        addition_embed_type="text",
        addition_embed_type_num_heads=pooling_heads,
    )


def small_dit(
    sample_size: int = 32,
    in_channels: int = 1,
    num_classes: int = 10,
    patch_size: int = 4,
    num_layers: int = 4,
    num_attention_heads: int = 4,
    attention_head_dim: int = 32,
    learned_variance: bool = False,
) -> DiTTransformer2DModel:
    """A class-conditional diffusion transformer (arXiv:2212.09748).

    Args:
        sample_size: height and width, divisible by ``patch_size``.
        in_channels: channels of the samples.
        num_classes: number of classes; the label ``num_classes`` means "no class".
        patch_size: side of a patch.
        num_layers: number of transformer blocks.
        num_attention_heads: attention heads.
        attention_head_dim: channels per attention head.
        learned_variance: twice as many output channels, the second half a variance that ``Denoiser`` drops.
    """
    return DiTTransformer2DModel(
        sample_size=sample_size,
        in_channels=in_channels,
        out_channels=2 * in_channels if learned_variance else in_channels,
        num_embeds_ada_norm=num_classes,
        patch_size=patch_size,
        num_layers=num_layers,
        num_attention_heads=num_attention_heads,
        attention_head_dim=attention_head_dim,
        norm_type="ada_norm_zero",
    )
