"""The contract between a network and everything above it: ``denoiser(x_t, t, cond) -> Prediction``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from lightning_distill.networks.adapter_bank import added_parts
from lightning_distill.networks.families import Family, family_of
from lightning_distill.networks.null_conditions import NullConditions, with_null
from lightning_distill.networks.second_time import Times, guidance_parts, second_time_of
from lightning_distill.networks.signatures import call_parameters
from lightning_distill.networks.tapping import AllTapsSeen, tap
from lightning_distill.prediction import PREDICTION_TYPES, Prediction
from lightning_distill.processes import EDM, NoiseProcess, change_process, expand

if TYPE_CHECKING:
    from lightning_distill.guidance import Guidance

__all__ = ["Denoiser", "per_sample"]

#: conditions that enter the network's own layers, hence in its dtype; sizes and masks keep theirs
_EMBEDDINGS = ("encoder_hidden_states", "pooled_projections", "text_embeds")


class Denoiser(NullConditions, nn.Module):
    """A network together with its noise process, prediction type and calling convention.

    Everything above this class speaks only ``x_t``, ``t`` and ``Prediction``; everything below is the network's own.

    With ``network_process`` the network lives in another process than the one the method uses, and the exact change of
    process is applied at its edge: ``Denoiser(net, EDM(), "v_prediction", network_process=TrigFlow(), sigma_data=0.5)``
    is EDM's preconditioning (arXiv:2206.00364, Table 1, up to the sign of F).

    Args:
        network: the module called; found in ``families.FAMILIES`` by class name, else called ``network(x, t, **cond)``.
        process: noise process of the ``x_t`` and ``t`` given to ``forward``.
        prediction_type: what the network outputs: ``epsilon``, ``sample``, ``v_prediction`` or ``flow_prediction``.
        network_process: native process of the network, None when it is ``process``.
        sigma_data: standard deviation of the data, per element; checked against the first batches of a run.
        data_scale: with ``network_process``, the network works on data divided by this; None is ``sigma_data``, 1 a
            network trained on the data as they are.
        null_class: label that means "no class"; None when the network was trained without one.
        family: calling convention, None to look it up.
        null_cond: what stands for "no condition", by key: a tensor (1, ...) such as the embedding of the empty or
            negative prompt, or a number to fill in (0 where a model was trained with zeros); keys that are left out
            have the family's value.
        guidance: scale that guidance-embedded networks (FLUX.1-dev, HunyuanVideo, Sana-Sprint, latent consistency
            models) are told when a call gives none; None for the family's.

    Raises:
        ValueError: unknown prediction type, a type that cannot be read at the process' noisiest time, or a null
            condition without a batch dimension of 1.
    """

    #: whether the network alone gives the predictions, so that stock pipelines can
    stands_alone: bool = True
    #: whether the network, which takes a target time by itself, was trained to jump to one
    jumps: bool = False
    #: coefficients of a solver that was learned for this network, by native times, see ``samplers.adams``
    coefficients: Callable[[Sequence[float]], Tensor | None] | None = None
    #: guidance without which the network is not sampled
    sampling_guidance: Guidance | None = None

    def __init__(
        self,
        network: nn.Module,
        process: NoiseProcess,
        prediction_type: str,
        *,
        network_process: NoiseProcess | None = None,
        sigma_data: float = 1.0,
        data_scale: float | None = None,
        null_class: int | None = None,
        family: Family | None = None,
        null_cond: Mapping[str, Tensor | float] | None = None,
        guidance: float | None = None,
    ) -> None:
        super().__init__()
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"prediction_type={prediction_type!r} is unknown; choose one of {', '.join(PREDICTION_TYPES)}."
            )
        inner = network_process or process
        t_max = torch.tensor(inner.t_max, dtype=torch.float64)
        if prediction_type == "epsilon" and inner.alpha(t_max) == 0:
            raise ValueError(
                f"prediction_type='epsilon' says nothing about the clean sample at t={inner.t_max:g} of {inner!r}, "
                "where alpha is 0; use a network trained with v_prediction, sample or flow_prediction, or a process "
                "without zero terminal SNR."
            )
        self.network = network
        self.process = process
        self.prediction_type = prediction_type
        self.network_process = network_process
        self.sigma_data = float(sigma_data)
        self.data_scale = self.sigma_data if data_scale is None else float(data_scale)
        self.null_class = null_class
        #: entry of the zoo that these weights are, unchanged; None for any other network
        self.zoo_name: str | None = None
        #: dtype the network computes in, where a strategy gives it weights of another; None for that of its weights
        self.compute_dtype: torch.dtype | None = None
        #: the entry with what the caller said about null conditions and guidance; shared by all roles of a network
        self.family = with_null(family or family_of(network), null_cond or {}, guidance)
        if self.family.eval_only:
            self.eval()

    # ------------------------------------------------------------------------------------------------ calling
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
        """Run the network once.

        Args:
            x_t: noisy samples, (B, ...), float32 or float64.
            t: native times of ``process``, (B,) or ().
            cond: conditioning by keyword; keys the family does not know are an error.
            r: target times for two-time networks, (B,) or ().
            guidance: guidance scale for guidance-embedded networks, (B,) or (); None for the default.
            taps: names of submodules whose outputs are wanted in ``Prediction.features``.
            features_only: stop as soon as every tapped block has run and return the features alone.

        Returns:
            a ``Prediction`` in ``process``; the features by name with ``features_only``.

        Raises:
            ValueError: a condition the family does not take or lacks, r or guidance for a network that takes none, an
                unknown tap, or taps that never ran.
        """
        t = t.expand(x_t.shape[0]) if t.ndim == 0 else t
        x_in, time, scale = self._network_input(x_t, t)
        kwargs = self._conditions(cond or {}, x_in)
        kwargs |= self._target_time(t, r, x_in) | self._guidance(guidance, x_in)
        second = time
        if self.family.time_keyword is not None:
            kwargs[self.family.time_keyword] = time
            second = kwargs.pop("encoder_hidden_states")
        packed = x_in if self.family.pack is None else self.family.pack(x_in)
        features: dict[str, Tensor] = {}
        with ExitStack() as stack:
            tap(self, taps, features, features_only, stack)
            try:
                out = self.call_network(packed, second, kwargs)
            except AllTapsSeen:
                return features
        if missing := [name for name in taps if name not in features]:
            raise ValueError(f"the tapped blocks {missing} were not run by {type(self.network).__name__}.forward.")
        if features_only:
            return features
        raw = self.family.output(out)
        if self.family.unpack is not None:
            raw = self.family.unpack(raw, x_in.shape)
        raw = self._raw(raw, x_in, x_t.dtype)
        if scale is None:
            return Prediction(raw, x_t, t, self.process, self.prediction_type, features)
        inner = Prediction(raw, x_t * scale, self._inner_time(t), self._inner, self.prediction_type)
        return Prediction(inner.x0 * self.data_scale, x_t, t, self.process, "sample", features)

    def call_network(self, x: Any, time: Any, kwargs: dict[str, Any]) -> Any:
        """The network's own call; adapter roles override it to choose their adapter.

        Args:
            x: packed samples.
            time: second positional argument: time, or the text tokens where the family names ``time_keyword``.
            kwargs: everything else.
        """
        return self.network(x, time, **kwargs)

    def feature_maps(
        self, x_t: Tensor, t: Tensor, cond: Mapping[str, Any] | None, taps: Sequence[str]
    ) -> dict[str, Tensor]:
        """Outputs of the named blocks; blocks behind the last of them are not run.

        Args:
            x_t: noisy samples, (B, ...).
            t: native times, (B,) or ().
            cond: conditioning by keyword.
            taps: submodule names, for example ``("mid_block",)``.
        """
        out = self(x_t, t, cond, taps=taps, features_only=True)
        assert isinstance(out, dict)
        return out

    @property
    def sample_shape(self) -> tuple[int, ...] | None:
        """Shape of one sample without the batch dimension, where the network knows it."""
        shape = self.family.sample_shape(self.network)
        return None if shape is None else tuple(shape)

    @property
    def device(self) -> torch.device:
        """Device of the first parameter or buffer (CPU for networks without any)."""
        for tensor in (*self.network.parameters(), *self.network.buffers()):
            return tensor.device
        return torch.device("cpu")

    def train(self, mode: bool = True) -> Denoiser:
        """As ``nn.Module.train``, except that families with random train-mode behaviour stay in eval mode."""
        return super().train(mode and not self.family.eval_only)

    # ------------------------------------------------------------------------------------------------ inner parts
    @property
    def _inner(self) -> NoiseProcess:
        return self.network_process or self.process

    def _inner_time(self, t: Tensor) -> Tensor:
        if self.network_process is None:
            return t
        return change_process(t, self.process, self.network_process, self.data_scale)[0]

    def _time(self, t: Tensor) -> Tensor:
        if self.family.integer_time and unpack_dual(t).tangent is not None:
            raise ValueError(
                f"{type(self.network).__name__} is told integer times, so its output has no derivative in time; give "
                "the Denoiser family=dataclasses.replace(family, integer_time=False), which its embedding can read too."
            )
        inner_t = self._inner_time(t)
        time = self._inner.network_time(inner_t) if self.family.time == "network" else inner_t
        return self.family.network_time(time, self.network)

    def _network_input(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        dtype = self.computes_in(x_t.dtype)
        time = self._cast_time(t, x_t, dtype)
        if self.network_process is None:
            return x_t.to(dtype), time, None
        _, factor = change_process(t, self.process, self.network_process, self.data_scale)
        scale = expand(factor, x_t)
        return (x_t * scale).to(dtype), time, scale

    def _cast_time(self, t: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        time = self._time(t)
        if time.is_floating_point():
            time = time.to(dtype if dtype == torch.float64 else torch.float32)
        return time[:, None].expand(-1, x.shape[2]) if self.family.time_per_frame else time

    def _target_time(self, t: Tensor, r: Tensor | None, x: Tensor) -> dict[str, Any]:
        name, installed = self.family.target_time, second_time_of(self.network)
        two_times = installed is not None and installed.kind is not None
        if r is None:
            if not two_times and (name is None or not self.family.needs_target):
                return {}
            r = t
        r = r.expand(x.shape[0]) if r.ndim == 0 else r
        if two_times:
            return self._installed_times(t, r, x)
        if name is None:
            raise ValueError(
                f"{type(self.network).__name__} takes one time, so r=... has no place to go; use a two-time network "
                "(AnyFlowTransformer3DModel, or a module of your own with an argument r), or install "
                "a target time with networks.second_time.add_second_time(network)."
            )
        return {name: self._cast_time(r, x, self.computes_in(x.dtype))}

    def _installed_times(self, t: Tensor, r: Tensor, x: Tensor) -> dict[str, Any]:
        installed = second_time_of(self.network)
        assert installed is not None
        network_r = None
        if installed.kind == "gated_copy":
            if isinstance(self._inner, EDM) and self.family.time == "network":
                raise ValueError(
                    f"{type(self.network).__name__} is told ln sigma, which has no value at r = 0; install the target "
                    "time with kind='zero_init' or 'scaled_difference'."
                )
            network_r = self._cast_time(r, x, self.computes_in(x.dtype))
        return installed.arguments(Times(self._flow_time(t), self._flow_time(r), network_r), None)

    def _flow_time(self, t: Tensor) -> Tensor:
        """Sigma / (alpha + sigma) of the data that the network sees; smooth to both ends."""
        scale = 1.0 if self.network_process is None else self.data_scale
        alpha, sigma = scale * self.process.alpha(t), self.process.sigma(t)
        return sigma / (alpha + sigma)

    @property
    def embeds_guidance(self) -> bool:
        """Whether the network can be told a guidance scale, by itself or by a branch that is this role's own."""
        if self.deaf:
            return False
        installed = second_time_of(self.network)
        if installed is not None and installed.guidance is not None:
            return True
        make = self.family.guidance
        arguments = None if make is None else make(self.network, torch.ones(1))
        known = call_parameters(self.network)
        return bool(arguments) and set(arguments or ()) <= set(known)

    @property
    def deaf(self) -> bool:
        """Whether the network's branch for a guidance scale is that of other roles, and a constant to this one."""
        parts = guidance_parts(self.network)
        return bool(parts) and any(key.startswith(tuple(parts)) for key in added_parts(self.network))

    def _guidance(self, guidance: Tensor | None, x: Tensor) -> dict[str, Any]:
        if guidance is None and self.deaf:
            return {}
        make, default = self.family.guidance, self.family.guidance_scale
        installed = second_time_of(self.network)
        if installed is not None and installed.guidance is not None:
            w = default if guidance is None else guidance
            if w is None:
                return {}
            return installed.arguments(None, per_sample(w, x))
        arguments = None
        if make is not None and (guidance is not None or default is not None):
            arguments = make(self.network, per_sample(default if guidance is None else guidance, x))
        if guidance is not None and arguments is None:
            raise ValueError(
                f"this {type(self.network).__name__} does not embed a guidance scale; leave out guidance=..., or use "
                "classifier-free guidance (guidance_scale of the method)."
            )
        return arguments or {}

    def computes_in(self, otherwise: torch.dtype) -> torch.dtype:
        """The network's computing dtype; a few small layers of some classes stay float32 whatever it is.

        Args:
            otherwise: of a network without weights.
        """
        if (computing := getattr(self, "compute_dtype", None)) is not None:
            return computing
        wide = getattr(self.network, "_keep_in_fp32_modules", None) or ()
        for name, parameter in self.network.named_parameters():
            if parameter.is_floating_point() and not any(part in name for part in wide):
                return parameter.dtype
        return otherwise

    def _raw(self, out: Tensor, x_in: Tensor, dtype: torch.dtype) -> Tensor:
        if self.family.channel_split and out.shape[1] == 2 * x_in.shape[1]:
            out = out[:, : x_in.shape[1]]
        if out.shape != x_in.shape:
            raise ValueError(
                f"{type(self.network).__name__} returned shape {tuple(out.shape)} for an input of shape "
                f"{tuple(x_in.shape)}; a denoiser's output has the shape of its input."
            )
        out = out.to(torch.float64 if dtype == torch.float64 else torch.float32)
        return out if self.family.sign == 1.0 else self.family.sign * out

    def _conditions(self, cond: Mapping[str, Any], x: Tensor) -> dict[str, Any]:
        family, name = self.family, type(self.network).__name__
        if family.cond_keys and (unknown := set(cond) - set(family.cond_keys)):
            raise ValueError(
                f"{name} takes the conditions {list(family.cond_keys)}, but the batch also has {sorted(unknown)}."
            )
        if missing := [key for key in family.required if key not in cond]:
            raise ValueError(
                f"{name} needs the conditions {list(family.required)}, but the batch lacks {missing}; use a data "
                "module that yields them (cached prompt embeddings, for example)."
            )
        dtype = self.computes_in(x.dtype)
        given = dict(cond)
        if family.cond_keys:
            given |= {k: v.to(dtype) for k, v in cond.items() if k in _EMBEDDINGS}
            given |= {k: v.long() for k, v in cond.items() if k == "encoder_attention_mask"}
        return given if family.arguments is None else family.arguments(self.network, x, given)

    def accepted(self, cond: Mapping[str, Any]) -> dict[str, Any]:
        """The conditions that the network takes, where a batch has those of several networks."""
        keys = self.family.cond_keys
        return {key: value for key, value in cond.items() if not keys or key in keys}

    def block_names(self) -> list[str]:
        """Names of the network's blocks in execution order (see ``Family.blocks``); of experts, one after another."""
        names = []
        for prefix, network in getattr(self.network, "singles", {"": self.network}).items():
            for path in self.family.blocks:
                block = getattr(network, path, None)
                if isinstance(block, nn.ModuleList):
                    names += [f"{prefix}{path}.{i}" for i in range(len(block))]
                elif block is not None:
                    names.append(f"{prefix}{path}")
        return names


def per_sample(value: float | Tensor | None, x: Tensor) -> Tensor:
    """A guidance scale for each sample of x, (B,), float32.

    Args:
        value: (), (B,), or a number, which is filled in without waiting for the device.
        x: samples, (B, ...).
    """
    if isinstance(value, Tensor):
        return value.to(x.device, torch.float32).expand(x.shape[0])
    assert value is not None
    return torch.full((x.shape[0],), value, dtype=torch.float32, device=x.device)
