"""Discriminators: small heads on the features of blocks that a teacher or a fake score computes anyway.

For maps (B, C, H, W) the stack of DMD2 (arXiv:2405.14867): strided 4x4 convolutions, GroupNorm and SiLU
until the map is 4x4, one convolution over what is left, a linear logit. For tokens (B, L, D) an MLP per
token, averaged over tokens, and for vectors (B, D) the same MLP. Heads can be told the class, as projection
discriminators are (arXiv:1802.05637), where the features do not know it.

The pseudo-tap ``input`` stands for x_t itself, which turns a head into an ordinary pixel or latent
discriminator.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import seeded

__all__ = ["CLASS_WIDTH", "INPUT_TAP", "DiscriminatorHeads", "tap_shapes", "tapped_features"]

#: tap name of the noisy sample itself
INPUT_TAP = "input"
#: numbers by which a head that is told the class knows it
CLASS_WIDTH = 64


class DiscriminatorHeads(nn.Module):
    """One head per tapped block.

    Args:
        shapes: feature shape without the batch dimension by tap name: (C, H, W), (L, D) or (D,); see
            ``tap_shapes``.
        width: channels inside the heads, None for those of the feature but at least 64.
        num_logits: logits per head.
        num_classes: heads are told the class: a logit is the inner product of what the head makes of the feature and a
            vector of the class, of ``CLASS_WIDTH`` numbers and divided by the root of that; the label ``num_classes``
            means "no class". None for heads that see features alone.
        seed: of the initial weights, equal on every rank.

    Raises:
        ValueError: no taps, or a feature of another rank.
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        *,
        width: int | None = None,
        num_logits: int = 1,
        num_classes: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not shapes:
            raise ValueError("a discriminator needs at least one tap; name blocks such as taps=['mid_block'].")
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.num_classes = num_classes
        outputs = num_logits if num_classes is None else num_logits * CLASS_WIDTH
        with seeded(seed):
            self.heads = nn.ModuleDict(
                {_key(name): _head(name, shape, width, outputs) for name, shape in self.shapes.items()}
            )
            told = () if num_classes is None else self.heads
            self.classes = nn.ModuleDict({key: nn.Embedding((num_classes or 0) + 1, CLASS_WIDTH) for key in told})

    @property
    def taps(self) -> tuple[str, ...]:
        """Blocks whose features the heads read, in order."""
        return tuple(self.shapes)

    def forward(self, features: Mapping[str, Tensor], labels: Tensor | None = None) -> Tensor:
        """Logits of all heads, high for real samples.

        Args:
            features: activations by tap name, each (B, ...), any floating dtype.
            labels: classes, (B,) of whole numbers, for heads that are told them.

        Returns:
            (B, num_heads * num_logits), in the dtype of the heads.

        Raises:
            ValueError: a feature is missing or its shape is not the one the head was built for; labels are missing.
        """
        if self.num_classes is not None and labels is None:
            raise ValueError("the discriminator is told the class; give class_labels with every batch.")
        logits = []
        for name, shape in self.shapes.items():
            if name not in features:
                raise ValueError(f"the discriminator reads {name!r}, but the features are {sorted(features)}.")
            feature, head = features[name], self.heads[_key(name)]
            # the number of tokens may vary, the size of a map may not: its last convolution spans the map
            expected = shape[-1:] if len(shape) == 2 else shape
            if feature.ndim != len(shape) + 1 or tuple(feature.shape[-len(expected) :]) != expected:
                raise ValueError(
                    f"the discriminator head on {name!r} was built for features of shape {shape} and got "
                    f"{tuple(feature.shape[1:])}; build it from tap_shapes at the resolution of training."
                )
            logit = head(feature.to(next(head.parameters()).dtype))
            logit = logit.mean(1) if logit.ndim == 3 else logit
            if labels is not None and self.num_classes is not None:
                vectors = self.classes[_key(name)](labels.long())[:, None]
                logit = (logit.unflatten(1, (-1, CLASS_WIDTH)) * vectors).sum(2) * CLASS_WIDTH**-0.5
            logits.append(logit)
        return torch.cat(logits, dim=1)


def tapped_features(
    denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Mapping[str, Any] | None, taps: Sequence[str]
) -> dict[str, Tensor]:
    """Features for the heads: outputs of the named blocks, and x_t itself for the tap ``input``.

    The network runs up to the last tapped block, and not at all when ``input`` is the only tap. Gradients
    reach x_t.

    Args:
        denoiser: teacher or fake score.
        x_t: noisy samples, (B, ...).
        t: native times, (B,) or ().
        cond: conditioning by keyword.
        taps: names of blocks, or ``input``.
    """
    blocks = [name for name in taps if name != INPUT_TAP]
    features = denoiser.feature_maps(x_t, t, cond, blocks) if blocks else {}
    return {name: x_t if name == INPUT_TAP else features[name] for name in taps}


@torch.no_grad()
def tap_shapes(
    denoiser: Denoiser, shape: Sequence[int], taps: Sequence[str], cond: Mapping[str, Any] | None = None
) -> dict[str, tuple[int, ...]]:
    """Shapes of the tapped features, from one early-exit run that draws no random numbers.

    Args:
        denoiser: teacher or fake score.
        shape: of one sample, without the batch dimension.
        taps: names of blocks, or ``input``.
        cond: conditioning of one sample, tensors with a batch dimension of 1.

    Returns:
        shape without the batch dimension by tap name, in the order of ``taps``.
    """
    x_t = torch.zeros(1, *shape, device=denoiser.device)
    t = torch.tensor(denoiser.process.t_max / 2, dtype=torch.float64, device=denoiser.device)
    features = tapped_features(denoiser, x_t, t, cond, taps)
    return {name: tuple(features[name].shape[1:]) for name in taps}


def _key(name: str) -> str:
    return name.replace(".", "/")  # module names hold no dots


def _groups(channels: int) -> int:
    """GroupNorm groups: at most 32, and at least 4 channels each.

    On the last 1x1 map a group of one channel is a group of one number, which normalises to zero.
    """
    return next(g for g in range(min(32, max(channels // 4, 1)), 0, -1) if channels % g == 0)


def _head(name: str, shape: tuple[int, ...], width: int | None, num_logits: int) -> nn.Sequential:
    if len(shape) == 3:
        return _map_head(shape, width or max(shape[0], 64), num_logits)
    if len(shape) in (1, 2):
        return _vector_head(shape[-1], width or max(shape[-1], 64), num_logits)
    raise ValueError(
        f"the feature {name!r} has shape {shape}; discriminator heads read maps (C, H, W), tokens (L, D) and "
        "vectors (D,)."
    )


def _map_head(shape: tuple[int, ...], width: int, num_logits: int) -> nn.Sequential:
    channels, size = shape[0], list(shape[1:])
    layers: list[nn.Module] = []
    while max(size) > 4:
        # each side halves on its own until it is at most 4
        kernel = _pair(4 if n > 4 else 3 for n in size)
        stride = _pair(2 if n > 4 else 1 for n in size)
        layers += [
            nn.Conv2d(channels, width, kernel, stride, padding=1),
            nn.GroupNorm(_groups(width), width),
            nn.SiLU(),
        ]
        size = [n // 2 if n > 4 else n for n in size]
        channels = width
    layers += [nn.Conv2d(channels, width, _pair(size)), nn.GroupNorm(_groups(width), width), nn.SiLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, num_logits))


def _vector_head(dim: int, width: int, num_logits: int) -> nn.Sequential:
    # no normalisation of the input: for two numbers it would leave only which is larger
    return nn.Sequential(
        nn.Linear(dim, width),
        nn.LayerNorm(width),
        nn.SiLU(),
        nn.Linear(width, width),
        nn.LayerNorm(width),
        nn.SiLU(),
        nn.Linear(width, num_logits),
    )


def _pair(sides: Iterable[int]) -> tuple[int, int]:
    height, width = sides
    return height, width
