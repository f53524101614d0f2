"""Adapters that let a frozen network be told a guidance scale (AGD, arXiv:2503.07274).

Beside each attention module of the network there is a ``GuidanceAdapter``. The network itself is not touched: hooks on
these modules exist for the length of one call, and again where a checkpoint recomputes a part of it.

    role                        network              adapters     trained
    GuidanceAdapters            the teacher's        new          adapters
    Copy of a guided teacher    a copy               copies       both
    Lora of a guided teacher    the teacher's        copies       both low-rank and guidance adapters
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, get_args

import torch
from torch import Tensor, nn

from lightning_distill.networks.adapter_bank import BANK, AdapterBank, adapter_bank
from lightning_distill.networks.denoiser import Denoiser, per_sample
from lightning_distill.networks.families import Family, example_cond
from lightning_distill.networks.guidance_adapter import AdapterKind, GuidanceAdapter, Told, arranged, positions
from lightning_distill.networks.lora import AdapterDenoiser, checkpoint_with
from lightning_distill.networks.merging import widen
from lightning_distill.networks.roles import Role
from lightning_distill.networks.seeding import seeded
from lightning_distill.networks.weightless import where
from lightning_distill.prediction import Prediction

__all__ = ["GuidanceAdapters", "GuidedAdapterDenoiser", "GuidedDenoiser"]

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


# ---------------------------------------------------------------------------------------- switching
class _Bank(AdapterBank):
    """A bank that also knows which guidance adapters are on, for blocks that are recomputed later."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[_Running] = []

    def reenter(self) -> AbstractContextManager[None]:
        before = super().reenter()
        return _Both(before, self.running[-1]) if self.running else before


class _Both(AbstractContextManager):
    """Two reusable contexts as one."""

    def __init__(self, *parts: AbstractContextManager[None]) -> None:
        self.parts = parts

    def __enter__(self) -> None:
        for part in self.parts:
            part.__enter__()

    def __exit__(self, *details: Any) -> None:
        for part in reversed(self.parts):
            part.__exit__(*details)


class _Running(AbstractContextManager):
    """The hooks of one call; entered again by the recomputation of a checkpointed block."""

    def __init__(self, denoiser: "GuidedDenoiser", told: Told) -> None:
        self.denoiser, self.told = denoiser, told
        self.stacks: list[ExitStack] = []

    def __enter__(self) -> None:
        stack, network = ExitStack(), self.denoiser.network
        for path, adapter in zip(self.denoiser.paths, self.denoiser.adapters, strict=True):

            def hook(_module: nn.Module, args: Any, kwargs: Any, out: Any, adapter: nn.Module = adapter) -> Any:
                x = args[0] if args else kwargs["hidden_states"]
                main = out[0] if isinstance(out, tuple) else out
                main = main + arranged(adapter(positions(x), self.told), main)
                return (main, *out[1:]) if isinstance(out, tuple) else main

            stack.callback(network.get_submodule(path).register_forward_hook(hook, with_kwargs=True).remove)
        self.stacks.append(stack)
        self.denoiser.guidance_bank.running.append(self)

    def __exit__(self, *_: object) -> None:
        self.denoiser.guidance_bank.running.pop()
        self.stacks.pop().close()


def _bank_of(network: nn.Module) -> _Bank:
    """The network's bank, made or extended to one that knows guidance adapters."""
    present = adapter_bank(network)
    if isinstance(present, _Bank):
        return present
    bank = _Bank()
    if present is not None:
        bank.layers, bank.configs, bank._state = present.layers, present.configs, present._state
    network.__dict__[BANK] = bank
    if getattr(network, "is_gradient_checkpointing", False):
        checkpoint_with(network, bank)
    return bank


class GuidedDenoiser(Denoiser):
    """A role that is a set of guidance adapters on a network: another denoiser's, frozen, or its own.

    On another's network its parameters, ``state_dict`` and mode are those of the adapters alone, as for a LoRA role,
    and the network is no submodule. The owner, and everyone else who calls the network, runs it without adapters.
    These depend on the call, so there are no merged weights.

    Args:
        source: denoiser with that network.
        paths: names of the modules that get an adapter.
        adapters: one for each.
        network: of its own instead, a submodule; None for the source's.
    """

    stands_alone = False

    def __init__(
        self,
        source: Denoiser,
        paths: Sequence[str],
        adapters: Iterable[nn.Module],
        network: nn.Module | None = None,
    ) -> None:
        super().__init__(
            source.network if network is None else network,
            source.process,
            source.prediction_type,
            network_process=source.network_process,
            sigma_data=source.sigma_data,
            data_scale=source.data_scale,
            null_class=source.null_class,
            family=source.family,
        )
        if network is None:
            self.__dict__["network"] = self._modules.pop("network")  # past nn.Module's registration
        self._add(source, paths, adapters)

    def _add(self, source: Denoiser, paths: Sequence[str], adapters: Iterable[nn.Module]) -> None:
        self.paths = list(paths)
        self.adapters = nn.ModuleList(adapters)
        self.guidance_bank = _bank_of(self.network)
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
        """As ``Denoiser.forward``; ``guidance`` goes to the adapters.

        Raises:
            ValueError: no guidance scale is given and there is no default.
        """
        w = self.family.guidance_scale if guidance is None else guidance
        if w is None:
            raise ValueError(
                "guidance adapters are told a guidance scale, and this call gives none; give guidance=w, or use the "
                "teacher, which is the network without them."
            )
        n = len(x_t)
        told = Told(per_sample(w, x_t), self._flow_time(t.expand(n) if t.ndim == 0 else t), cond or {})
        with _Running(self, told):
            return super().forward(x_t, t, cond, r=r, taps=taps, features_only=features_only)

    @property
    def embeds_guidance(self) -> bool:
        """Its adapters do."""
        return True

    def _guidance(self, guidance: Tensor | None, x: Tensor) -> dict[str, Any]:
        return {}  # the frozen network takes none

    @property
    def owns_network(self) -> bool:
        """Whether the network is its own, not another denoiser's."""
        return "network" in self._modules

    def averaged(self) -> "GuidedDenoiser":
        """A frozen second set of adapters with these values on the same network, for a student average."""
        made = GuidedDenoiser(self, self.paths, copy.deepcopy(self.adapters))
        return made.requires_grad_(False).eval()

    def around(self, network: nn.Module, family: Family | None = None) -> "GuidedDenoiser":
        """Copies of these adapters on another network of the same class, which becomes the denoiser's own.

        Args:
            network: with the modules that have adapters here.
            family: how it is called; None for as this one.
        """
        made = GuidedDenoiser(self, self.paths, copy.deepcopy(self.adapters), network)
        made.family = family or self.family
        return made

    def with_lora(self, adapter: AdapterDenoiser) -> "GuidedAdapterDenoiser":
        """Copies of these guidance adapters beside a low-rank adapter of the same network, trained where that is.

        Args:
            adapter: low-rank adapter on this denoiser's network.
        """
        beside = copy.deepcopy(self.adapters)
        widen(beside)
        trained = any(parameter.requires_grad for parameter in adapter.parameters())
        return GuidedAdapterDenoiser(adapter, self.paths, beside.requires_grad_(trained))


class GuidedAdapterDenoiser(GuidedDenoiser, AdapterDenoiser):
    """A low-rank adapter and guidance adapters on a frozen network owned by another denoiser.

    Args:
        adapter: the low-rank adapter.
        paths: names of the modules that get a guidance adapter.
        adapters: one for each.
    """

    def __init__(self, adapter: AdapterDenoiser, paths: Sequence[str], adapters: Iterable[nn.Module]) -> None:
        AdapterDenoiser.__init__(self, adapter, adapter.adapter_name)
        self._add(adapter, paths, adapters)


# ---------------------------------------------------------------------------------------- role
class GuidanceAdapters(Role):
    """The source's own frozen network with adapters that are told the guidance scale (AGD, arXiv:2503.07274).

    The student of ``AGD``. At initialisation it is the conditional source, bit for bit, at every scale.

    Args:
        kind: ``attention`` (tokens of scale, time and condition are attended to) or ``additive``.
        width: of the embeddings and hidden layers.
        heads: heads of ``attention``, dividing ``width``.
        target_modules: endings of the names of the modules that get an adapter; None for the cross-attention modules,
            all attention modules where there is no cross-attention, and the blocks of a network without any. UNets
            with little attention need their residual blocks too: ``[resnets.0, resnets.1, attentions.0]``.
        time: tell the adapters the time.
        condition: tell them label or text.
        seed: of their weights.

    Notes:
        The released cross-attention adapter reads its flag zero_init the wrong way round (true draws W_o at random);
        here W_o starts at zero in both kinds, as the paper means it.
        Sinusoids have fixed frequencies instead of random ones, scale and time are those of this library (w / 10,
        sigma / (alpha + sigma)), hidden layers are as wide as the embeddings, and tokens have no positional encoding.
    """

    shares_weights = True

    def __init__(
        self,
        kind: AdapterKind = "attention",
        width: int = 320,
        heads: int = 1,
        target_modules: Sequence[str] | None = None,
        time: bool = True,
        condition: bool = True,
        seed: int = 0,
    ) -> None:
        self.kind: AdapterKind = kind
        self.width = width
        self.heads = heads
        self.target_modules = None if target_modules is None else list(target_modules)
        self.time = time
        self.condition = condition
        self.seed = seed

    def check(self) -> None:  # noqa: D102
        if self.kind not in get_args(AdapterKind):
            raise ValueError(f"GuidanceAdapters(kind={self.kind!r}): choose {' or '.join(get_args(AdapterKind))}.")
        if self.width < 1 or self.heads < 1 or self.width % self.heads:
            raise ValueError(
                f"GuidanceAdapters(width={self.width}, heads={self.heads}): give a width of 1 or more that the number "
                "of heads divides."
            )

    def build(self, source: Denoiser, name: str | None = None) -> Denoiser:  # noqa: D102
        self.check()
        network, cls = source.network, type(source.network).__name__
        if isinstance(source, (AdapterDenoiser, GuidedDenoiser)):
            raise ValueError(
                "guidance adapters start from a frozen network, but the source is itself an adapter on one; give the "
                "denoiser that owns the network."
            )
        if source.embeds_guidance:
            raise ValueError(
                f"this {cls} is told a guidance scale already, so it needs no adapters for one; give the "
                f"{name or 'student'} Copy() or Lora()."
            )
        paths = self._paths(source)
        labels = 0 if source.num_classes is None else max(source.num_classes, source.null_class or 0) + 1
        text = 0
        if "encoder_hidden_states" in source.family.cond_keys:
            text = example_cond(network, 1)["encoder_hidden_states"].shape[-1]
        if not self.condition:
            labels = text = 0
        if adapter_bank(network) is None:
            network.requires_grad_(False)
        first = next(iter(network.parameters()), torch.zeros(()))
        with seeded(self.seed), where(network):
            made = [
                GuidanceAdapter(
                    self.kind, _channels(network, path), self.width, self.heads, labels, text, self.time
                ).to(first.device, torch.float64 if first.dtype == torch.float64 else torch.float32)
                for path in paths
            ]
        return GuidedDenoiser(source, paths, made)

    def _paths(self, source: Denoiser) -> list[str]:
        modules = dict(source.network.named_modules())
        if self.target_modules is not None:
            endings = tuple(f".{ending}" for ending in self.target_modules)
            found = [path for path in modules if f".{path}".endswith(endings)]
            what = f"target_modules={self.target_modules} match no module"
        else:
            attention = [p for p, m in modules.items() if hasattr(m, "to_q") and getattr(m, "to_out", None) is not None]
            cross = [path for path in attention if getattr(modules[path], "is_cross_attention", False)]
            found = cross or attention or source.block_names()
            what = "there is neither an attention module nor a known block"
        if not found:
            raise ValueError(
                f"GuidanceAdapters: {what} of {type(source.network).__name__}; give target_modules, endings of the "
                f"names of its submodules, such as {[path for path in modules if path][:8]}."
            )
        return found


def _channels(network: nn.Module, path: str) -> tuple[int, int]:
    """Channels of a module's input and output."""
    module: Any = network.get_submodule(path)
    last: Any = getattr(module, "to_out", None)
    if last is not None:
        last = last[0] if isinstance(last, (nn.ModuleList, nn.Sequential)) else last
        return module.to_q.in_features, last.out_features
    layers: list[Any] = [m for m in module.modules() if isinstance(m, _LAYERS)]
    if not layers:
        raise ValueError(
            f"GuidanceAdapters: {path!r} of {type(network).__name__} has no linear or convolution layer, so its "
            "channels are not known; give target_modules of modules that have one."
        )
    first, last = layers[0], layers[-1]
    read = first.in_features if isinstance(first, nn.Linear) else first.in_channels
    return read, last.out_features if isinstance(last, nn.Linear) else last.out_channels
