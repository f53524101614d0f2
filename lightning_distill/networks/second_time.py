"""A target time, and a guidance scale, for networks that were made for one time.

A branch is installed on a finished network by hooks on its time embedding E; the code of the network stays as it is:

    kind               the embedding becomes                      equal to the original
    zero_init          E(t) + B(r)  or  E(t) + B(t - r)           at initialisation, for every r   (last layer zero)
    scaled_difference  E(t) + (t - r) B(r)                        at r = t, always                 (TwinFlow)
    gated_copy         E(t) + g (E'(r) - E(t)), E' a copy of E    at r = t, until E' is trained    (AnyFlow)
    guidance           E(t) + B(w)                                at initialisation, for every w   (last layer zero)

"Equal" means bit for bit. B is a two-layer network of sinusoids; its times are sigma / (alpha + sigma) in [0, 1], so
that every process has the same scale, r = 0 is finite and the derivative in time, which continuous-time methods
need, is of order one.

The branch is a submodule ``second_time`` of the network: it travels with copies, averages, checkpoints and exported
weights, and adapters attach to its layers like to any other. ``Denoiser`` finds it there, and r = t where a call
names none, so that on a backbone shared with a teacher the teacher's output is unchanged.
"""

from __future__ import annotations

import copy
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor, nn

from lightning_distill.networks.seeding import seeded
from lightning_distill.networks.time_embeddings import SinusoidBranch, TimeEmbedding, embedders_of, known_embedding

__all__ = [
    "SECOND_TIME",
    "SecondTime",
    "SecondTimeKind",
    "Times",
    "add_guidance",
    "add_second_time",
    "guidance_parts",
    "remove_second_time",
    "second_time_of",
    "time_embedders",
]

SecondTimeKind = Literal["zero_init", "scaled_difference", "gated_copy"]
#: name of the branches in their network
SECOND_TIME = "second_time"
#: keyword arguments that the hook takes off a call of the network
_TARGET, _GUIDANCE = "second_time_target", "second_time_guidance"
#: guidance scales are divided by this before their sinusoids
_GUIDANCE_UNIT = 10.0


class Times(NamedTuple):
    """The two times of a call.

    Attributes:
        t: sigma / (alpha + sigma) of the input's time, in [0, 1], (B,).
        r: the same of the target time.
        network_r: the target time as the network would be told it; None where no branch asks for it.
    """

    t: Tensor
    r: Tensor
    network_r: Tensor | None


class _Call(NamedTuple):
    """What the running call of the network adds to its time embedding."""

    added: Tensor | None
    features: Tensor | None


class SecondTime(nn.Module):
    """The branches of one network and the hooks that connect them; made by ``add_second_time`` and ``add_guidance``.

    Args:
        embedding: the network's own embedding of its time.
        width: features of that embedding.

    Attributes:
        kind: how the target time enters, None where it does not.
        settings: arguments of ``add_second_time`` and ``add_guidance`` that make the same branches again, by function.
    """

    def __init__(self, embedding: TimeEmbedding, width: int) -> None:
        super().__init__()
        self.embedding = embedding
        self.width = width
        self.kind: SecondTimeKind | None = None
        self.input: Literal["r", "difference"] = "r"
        self.gate = 0.0
        self.time: nn.Module | None = None
        self.guidance: nn.Module | None = None
        self.settings: dict[str, dict[str, Any]] = {}
        self._call: _Call | None = None

    @property
    def layers(self) -> list[str]:
        """Names of the linear layers as the network sees them: what adapters have to target."""
        names = {name.removesuffix(".base_layer") for name, m in self.named_modules() if isinstance(m, nn.Linear)}
        # adapters of other roles may be there already
        return sorted(f"{SECOND_TIME}.{name}" for name in names if ".lora_" not in name)

    def arguments(self, times: Times | None, guidance: Tensor | None) -> dict[str, Any]:
        """Keyword arguments for a call of the network.

        Args:
            times: the two times, None for no addition.
            guidance: guidance scales (B,), None for no addition.
        """
        given = {_TARGET: times if self.time is not None else None, _GUIDANCE: guidance}
        return {name: value for name, value in given.items() if value is not None}

    def _receive(self, network: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        kwargs = dict(kwargs)
        times: Times | None = kwargs.pop(_TARGET, None)
        guidance: Tensor | None = kwargs.pop(_GUIDANCE, None)
        added = features = None
        if times is not None and self.time is not None:
            if self.kind == "gated_copy":
                features = self._network_features(network, times)
            else:
                added = self.time(times.t - times.r if self.input == "difference" else times.r)
                if self.kind == "scaled_difference":
                    added = (times.t - times.r).to(added.dtype)[:, None] * added
        if guidance is not None and self.guidance is not None:
            by_scale = self.guidance(guidance / _GUIDANCE_UNIT)
            added = by_scale if added is None else added + by_scale
        self._call = _Call(added, features)
        return args, kwargs

    def _network_features(self, network: nn.Module, times: Times) -> Tensor:
        assert times.network_r is not None
        time = self.embedding.scale * times.network_r
        if self.embedding.projection is None:
            return time
        features = network.get_submodule(self.embedding.projection)(time)
        return features.to(next(self.time.parameters()).dtype)  # type: ignore[union-attr]

    def _add(self, _embedder: nn.Module, args: Any, kwargs: dict[str, Any], out: Tensor) -> Tensor:
        if self._call is None:
            raise RuntimeError(
                "the time embedding was recomputed after the call of its network, so the target time is gone; switch "
                "activation checkpointing off for this model class, whose blocks embed the time themselves."
            )
        if self._call.features is not None:
            assert self.time is not None
            # with what else the original is told, such as a guidance embedding
            copied = self.time(self._call.features, *args[1:], **kwargs)
            out = out + self.gate * (self._rows(copied, out) - out)
        return out if self._call.added is None else out + self._rows(self._call.added, out)

    @staticmethod
    def _rows(value: Tensor, out: Tensor) -> Tensor:
        """One row per row of the embedding, which may have several per sample (frames)."""
        value = value.to(out.dtype)
        return value if len(value) == len(out) else value.repeat_interleave(len(out) // len(value), dim=0)

    def _release(self, _network: nn.Module, _args: Any, _out: Any) -> None:
        self._call = None


def second_time_of(network: nn.Module) -> SecondTime | None:
    """The branches installed on a network, None where there are none."""
    found = getattr(network, SECOND_TIME, None)
    return found if isinstance(found, SecondTime) else None


def add_second_time(
    network: nn.Module,
    kind: SecondTimeKind = "zero_init",
    *,
    input: Literal["r", "difference"] = "r",
    gate: float = 0.25,
    features: int = 64,
    embedding: TimeEmbedding | None = None,
    seed: int = 0,
) -> SecondTime:
    """Give a network a target time r; its output stays what it is (see the table of this module).

    Args:
        network: of a class in ``time_embeddings.EMBEDDINGS``, or any other with ``embedding``; without adapters.
        kind: how r enters.
        input: what ``zero_init`` sees: ``r``, or the ``difference`` t - r (a step size, for shortcut models).
        gate: g of ``gated_copy``, in (0, 1].
        features: number of sinusoids, even.
        embedding: where the network embeds its time, None to look the class up.
        seed: of the branch's random layers.

    Returns:
        the branches, also at ``network.second_time``.

    Raises:
        ValueError: a bad argument, a class without known embedding, or a network with a target time already.
    """
    if kind not in get_args(SecondTimeKind):
        raise ValueError(f"second time kind={kind!r} is unknown; choose one of {', '.join(get_args(SecondTimeKind))}.")
    if input not in ("r", "difference") or (input == "difference" and kind != "zero_init"):
        raise ValueError(f"input={input!r} does not go with kind={kind!r}; use 'r', or 'difference' with zero_init.")
    if not 0.0 < gate <= 1.0:
        raise ValueError(f"gate={gate}: the share of the target time's embedding lies in (0, 1].")
    if features < 2 or features % 2:
        raise ValueError(f"features={features}: give an even number of sinusoids, at least 2.")
    present = second_time_of(network)
    if present is not None and present.kind is not None:
        raise ValueError(f"this {type(network).__name__} has a target time already ({present.kind}); install one only.")
    embedders = embedders_of(network, embedding)
    if kind == "gated_copy" and "*" in (embedding or known_embedding(network)).embedder:
        raise ValueError(
            f"{type(network).__name__} embeds its time in every block, and gated_copy copies one embedding; "
            "use kind='zero_init' or 'scaled_difference'."
        )
    installed = _installed(network, embedders, embedding)
    if kind == "gated_copy":
        branch = copy.deepcopy(embedders[0])
        branch._forward_hooks.clear()
        branch._forward_hooks_with_kwargs.clear()
    else:
        with seeded(seed):
            branch = SinusoidBranch(features, installed.width, zero=kind == "zero_init")
        _placed(branch, embedders[0])
    installed.time, installed.kind, installed.input, installed.gate = branch, kind, input, float(gate)
    installed.train(network.training)
    installed.settings["add_second_time"] = {
        "kind": kind, "input": input, "gate": gate, "features": features, "seed": seed,
    }  # fmt: skip
    return installed


def add_guidance(
    network: nn.Module, *, features: int = 64, embedding: TimeEmbedding | None = None, seed: int = 0
) -> SecondTime | None:
    """Give a network a guidance scale w; its output stays what it is until training.

    A ``UNet2DConditionModel`` gets the embedding of latent consistency models (arXiv:2310.04378), which
    diffusers saves and loads; networks that embed a scale already are left alone; all others get a branch.

    Args:
        network: of a class in ``time_embeddings.EMBEDDINGS``, or any other with ``embedding``; without adapters.
        features: number of sinusoids of the branch, even.
        embedding: where the network embeds its time, None to look the class up.
        seed: of the branch's random layer.

    Returns:
        the branches; None where the network embeds the scale itself.

    Raises:
        ValueError: a class without known embedding, or a second branch for guidance.
    """
    config: Any = getattr(network, "config", {})
    if config.get("guidance_embeds") or config.get("time_cond_proj_dim"):
        return None
    present = second_time_of(network)
    if type(network).__name__ == "UNet2DConditionModel" and embedding is None:
        if present is not None and present.kind == "gated_copy":
            raise ValueError("the gated copy of the time embedding would lack the guidance; call add_guidance first.")
        first = network.time_embedding.linear_1  # type: ignore[union-attr]
        size = 256
        projection = _placed(nn.Linear(size, first.in_features, bias=False), network.time_embedding)  # type: ignore[arg-type, union-attr]
        nn.init.zeros_(projection.weight)  # type: ignore[arg-type]
        network.time_embedding.cond_proj = projection  # type: ignore[union-attr]
        network.register_to_config(time_cond_proj_dim=size)  # type: ignore[operator]
        return None
    if present is not None and present.guidance is not None:
        raise ValueError(f"this {type(network).__name__} has a guidance branch already; install one only.")
    embedders = embedders_of(network, embedding)
    installed = _installed(network, embedders, embedding)
    with seeded(seed):
        branch = SinusoidBranch(features, installed.width, zero=True)
    installed.guidance = _placed(branch, embedders[0])
    installed.train(network.training)
    installed.settings["add_guidance"] = {"features": features, "seed": seed}
    return installed


def guidance_parts(network: nn.Module) -> list[str]:
    """Paths of the parts that ``add_guidance`` installs, in a network that has them."""
    installed = second_time_of(network)
    parts = [] if installed is None or installed.guidance is None else [f"{SECOND_TIME}.guidance"]
    native = getattr(getattr(network, "time_embedding", None), "cond_proj", None)
    return [*parts, *([] if native is None else ["time_embedding.cond_proj"])]


def remove_second_time(network: nn.Module) -> None:
    """Take the branches and their hooks off a network, in place; networks without any are left alone."""
    branch = second_time_of(network)
    if branch is None:
        return
    for module in (network, *embedders_of(network, branch.embedding)):
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is branch]:
                del hooks[key]
                for kept in (
                    module._forward_pre_hooks_with_kwargs,
                    module._forward_hooks_with_kwargs,
                    module._forward_hooks_always_called,
                ):
                    kept.pop(key, None)
    delattr(network, SECOND_TIME)


def time_embedders(network: nn.Module) -> list[tuple[nn.Module, nn.Module | None]]:
    """The modules that embed the time, each with the one that makes its input (None: its input is the time).

    Raises:
        ValueError: a class without known embedding.
    """
    present = second_time_of(network)
    where = None if present is None else present.embedding
    path = (where or known_embedding(network)).projection
    found = []
    for embedder in embedders_of(network, where):
        projection = None if path is None else network.get_submodule(path)
        if path is None:
            parents = [m for m in network.modules() if getattr(m, "timestep_embedder", None) is embedder]
            projection = getattr(parents[0], "time_proj", None) if parents else None
        found.append((embedder, projection))
    return found


# ------------------------------------------------------------------------------------------------ installing
def _installed(network: nn.Module, embedders: list[nn.Module], embedding: TimeEmbedding | None) -> SecondTime:
    present = second_time_of(network)
    if present is not None:
        return present
    # a guidance projection of diffusers feeds the embedder's input
    linears = [(n, m) for n, m in embedders[0].named_modules() if isinstance(m, nn.Linear)]
    widths = [m.out_features for n, m in linears if n != "cond_proj"]
    if not widths:
        raise ValueError(
            f"the time embedding {type(embedders[0]).__name__} of {type(network).__name__} has no linear layer, so its "
            "width is not known; name a module that ends in one."
        )
    installed = SecondTime(embedding or known_embedding(network), widths[-1])
    network.add_module(SECOND_TIME, installed)
    network.register_forward_pre_hook(installed._receive, with_kwargs=True)
    network.register_forward_hook(installed._release, always_call=True)
    for embedder in embedders:
        embedder.register_forward_hook(installed._add, with_kwargs=True)
    return installed


def _placed(module: nn.Module, like: nn.Module) -> nn.Module:
    """The module on the device, in the dtype and with the gradients of another; frequencies keep their precision."""
    first = next(like.parameters())
    for parameter in module.to(first.device).parameters():
        parameter.data = parameter.data.to(first.dtype)
    return module.requires_grad_(first.requires_grad)
