"""Losses of waveforms, for students whose samples are decoded to sound."""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["SISDR", "DecodedLoss", "si_sdr"]


def si_sdr(estimate: Tensor, target: Tensor, eps: float = 1e-8) -> Tensor:
    """Scale-invariant signal-to-distortion ratio in dB (arXiv:1811.02508), of signals with their mean removed.

        10 log10 |a s|^2 / |a s - e|^2,     a = <e, s> / |s|^2

    Args:
        estimate: e, (B, ...), compared as one vector per sample.
        target: s, same shape.
        eps: added to both powers, relative to that of the target, so that silence and equality stay finite.

    Returns:
        (B,); -10 log10(eps) at most.
    """
    e, s = (x.flatten(1) - x.flatten(1).mean(1, keepdim=True) for x in (estimate, target))
    power = s.square().sum(1, keepdim=True)
    tiny = torch.finfo(s.dtype).tiny
    scaled = (e * s).sum(1, keepdim=True) / (power + tiny) * s
    signal, distortion = scaled.square().sum(1), (scaled - e).square().sum(1)
    floor = eps * power.squeeze(1) + tiny
    return 10.0 * ((signal + floor).log10() - (distortion + floor).log10())


class DecodedLoss:
    """A loss of decoded samples: ``loss(decode(sample), decode(clean))``, one number per sample.

    Args:
        loss: function of two decoded batches that returns (B,).
        decode: from samples to signals, differentiable (an inverse STFT, a vocoder); None for the samples themselves.
    """

    def __init__(
        self, loss: Callable[[Tensor, Tensor], Tensor], decode: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.loss, self.decode = loss, decode

    def __call__(self, made: Tensor, clean: Tensor) -> Tensor:
        """Losses of samples (B, ...) beside clean ones, (B,).

        Raises:
            ValueError: the loss does not return one number per sample.
        """
        if self.decode is not None:
            made = self.decode(made)
            with torch.no_grad():
                clean = self.decode(clean)
        value = self.loss(made, clean)
        if value.shape != (len(made),):
            raise ValueError(
                f"the decoded loss returned shape {tuple(value.shape)} for {len(made)} samples; return one number per "
                f"sample, ({len(made)},)."
            )
        return value


class SISDR(DecodedLoss):
    """Minus the scale-invariant signal-to-distortion ratio, in dB.

    Args:
        decode: see ``DecodedLoss``.
    """

    def __init__(self, decode: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__(lambda made, clean: -si_sdr(made, clean), decode)
