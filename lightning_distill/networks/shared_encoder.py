"""UNets whose encoder runs once for several decoders (TiUE, arXiv:2505.21960).

A UNet's encoder changes little with time. Here it sees the starting noise once, at the first time; its features are
copied, and the decoder runs at K times in parallel. The K outputs are then chained by the deterministic sampler:

    h = encoder(x, t_1);     eps_k = decoder(h, t_k) for all k at once
    x_1 = x,   x_{k+1} = transport(x_k, eps_k, t_k -> t_{k+1}),   t_{K+1} = 0

Hooks make it so: the network is called with K copies of the batch, of which the encoder's modules see the first and
multiply their outputs. Its code stays as it is.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.roles import Copy, Role, check_alone
from lightning_distill.prediction import Prediction
from lightning_distill.samplers import transport
from lightning_distill.times import few_step_times, validate_times

__all__ = ["NOISES", "SharedEncoder", "SharedEncoderDenoiser", "encoder_once"]

#: feature of a prediction that holds the noises that the K decoders predicted, (B, K, ...)
NOISES = "noises"
_CLASSES = ("UNet2DModel", "UNet2DConditionModel")


@contextmanager
def encoder_once(network: nn.Module, rows: int, copies: int, share_middle: bool = True) -> Iterator[None]:
    """Within it the encoder of a UNet runs on the first copy of its batch, and its outputs are copied.

    Args:
        network: ``UNet2DModel`` or ``UNet2DConditionModel``.
        rows: B.
        copies: K; the network is called with K B rows, copy after copy.
        share_middle: the middle block belongs to the encoder.
    """
    parts: Any = network
    encoder = [parts.conv_in, *parts.down_blocks]
    if share_middle and parts.mid_block is not None:
        encoder.append(parts.mid_block)

    def first(value: Any) -> Any:
        whole = isinstance(value, Tensor) and value.ndim > 0 and len(value) == rows * copies
        return value[:rows] if whole else value

    def repeated(value: Any) -> Any:
        return _copies(value, copies) if isinstance(value, Tensor) else value

    def before(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        return tree_map(first, args), tree_map(first, kwargs)

    def after(_module: nn.Module, _args: Any, out: Any) -> Any:
        return tree_map(repeated, out)

    with ExitStack() as stack:
        for module in encoder:
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after).remove)
        yield


def _copies(value: Tensor, copies: int) -> Tensor:
    return value.repeat(copies, *[1] * (value.ndim - 1))


class SharedEncoderDenoiser(Denoiser):
    """A UNet of which one call runs the encoder once and the decoder at K times: a one-step student.

    ``Prediction.x0`` is the end of the chain, and ``Prediction.features["noises"]`` the noises predicted on the way.

    Args:
        source: denoiser around the UNet.
        times: native times of the decoders, descending; the calls' own t is the first.
        share_middle: the middle block belongs to the encoder.
    """

    stands_alone = False

    def __init__(self, source: Denoiser, times: Sequence[float], share_middle: bool = True) -> None:
        super().__init__(
            source.network,
            source.process,
            source.prediction_type,
            network_process=source.network_process,
            sigma_data=source.sigma_data,
            data_scale=source.data_scale,
            null_class=source.null_class,
            family=source.family,
        )
        self.decoder_times = [float(t) for t in times]
        self.share_middle = share_middle
        self._outputs: list[Tensor] = []
        self._chaining = False
        self.train(source.training)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Mapping[str, Any] | None = None,
        *,
        r: Tensor | None = None,
        guidance: Tensor | None = None,
        taps: Sequence[str] = (),
        features_only: bool = False,
    ) -> Prediction | dict[str, Tensor]:
        """As ``Denoiser.forward`` at the first of ``decoder_times``; tapped features have K B rows, copy after copy."""
        n, count, cond = len(x_t), len(self.decoder_times), cond or {}
        grid = torch.tensor([*self.decoder_times, 0.0], dtype=torch.float64, device=x_t.device)
        many = {k: _copies(v, count) if isinstance(v, Tensor) and len(v) == n else v for k, v in cond.items()}
        told = (
            None if guidance is None else guidance.expand(n * count) if guidance.ndim == 0 else _copies(guidance, count)
        )
        with encoder_once(self.network, n, count, self.share_middle):
            whole = super().forward(
                _copies(x_t, count),
                grid[:-1].repeat_interleave(n),
                many,
                r=r,
                guidance=told,
                taps=taps,
                features_only=features_only,
            )
        if not isinstance(whole, Prediction):
            return whole
        self._chaining = True
        try:
            x, made = x_t, []
            for now, later in pairwise(grid):
                prediction = super().forward(x, now, cond, guidance=guidance)
                assert isinstance(prediction, Prediction)
                made.append(prediction)
                x = transport(prediction, later)
        finally:
            self._chaining = False
            self._outputs.clear()
        features = {**whole.features, NOISES: torch.stack([prediction.eps for prediction in made], dim=1)}
        t = t.expand(n) if t.ndim == 0 else t
        last = made[0] if count == 1 else Prediction.from_x0(made[-1].x0, x_t, t, self.process)
        return replace(last, features=features)

    def call_network(self, x: Any, time: Any, kwargs: dict[str, Any]) -> Any:
        """One call for all decoders; the steps of the chain then read their parts of its output."""
        if self._chaining:
            return self._outputs.pop(0)
        out = self.family.output(super().call_network(x, time, kwargs))
        self._outputs = list(out.chunk(len(self.decoder_times)))
        return out


class SharedEncoder(Role):
    """A UNet student whose encoder runs once for K decoders (TiUE, arXiv:2505.21960).

    With one decoder it is the plain UNet, bit for bit.

    Args:
        decoders: K.
        role: how the UNet is realised, None for ``Copy()``; one with weights of its own.
        times: native times of the decoders, descending from t_max; None for the trailing grid of K.
        share_middle: the middle block belongs to the encoder, as in the released code; else to the decoders.
    """

    def __init__(
        self,
        decoders: int = 4,
        role: Role | None = None,
        times: list[float] | None = None,
        share_middle: bool = True,
    ) -> None:
        self.decoders = decoders
        self.role = role or Copy()
        self.times = times
        self.share_middle = share_middle

    def check(self) -> None:  # noqa: D102
        if self.decoders < 1:
            raise ValueError(f"SharedEncoder(decoders={self.decoders}): give 1 decoder or more.")
        if self.times is not None and len(self.times) != self.decoders:
            raise ValueError(f"SharedEncoder(decoders={self.decoders}): give as many times, not {self.times}.")
        if self.role.shares_weights:
            raise ValueError(
                f"SharedEncoder(role={type(self.role).__name__}): the student is called in another way than the "
                "teacher, so it needs weights of its own; give Copy() or FromCheckpoint(path)."
            )
        self.role.check()

    def build(self, source: Denoiser, name: str | None = None) -> Denoiser:  # noqa: D102
        self.check()
        made = self.role.build(source, name)
        check_alone(made, "SharedEncoder")
        if not {cls.__name__ for cls in type(made.network).__mro__} & set(_CLASSES):
            raise ValueError(
                f"SharedEncoder splits a UNet into encoder and decoder, and {type(made.network).__name__} is none; "
                f"give a teacher that is a {' or '.join(_CLASSES)}."
            )
        times = few_step_times(made.process, self.decoders) if self.times is None else self.times
        validate_times(times, made.process)
        if times[0] != made.process.t_max:
            raise ValueError(
                f"SharedEncoder(times={list(times)}): the encoder reads the starting noise, so the first time is t_max "
                f"= {made.process.t_max:g}."
            )
        return SharedEncoderDenoiser(made, times, self.share_middle)
