"""A frozen network with a trained one beside it, which takes a further condition.

out = f(x_t, t, ...) + g a(x_t, t, control),     f frozen and shared, g = 0 at initialisation
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_distill.networks import small  # noqa: F401  (registers ResidualMLP)
from lightning_distill.networks.control import ControlledUNet
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.families import FAMILIES, PLAIN, Family, example_cond, family_of, register
from lightning_distill.networks.families.base import SAME
from lightning_distill.networks.lora import AdapterDenoiser
from lightning_distill.networks.merging import widen
from lightning_distill.networks.roles import Role, check_alone, with_network
from lightning_distill.networks.seeding import seeded
from lightning_distill.networks.specs import DenoiserSpec, as_denoiser

__all__ = ["Beside", "WithAdapter"]


class _OnShared(nn.Module):
    """A module around a network that it uses and does not own: neither its parameters nor its copies include it."""

    def _share(self, network: nn.Module) -> None:
        self._modules.pop("network", None)
        self.__dict__["network"] = network

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        for key, value in self.__dict__.items():
            made.__dict__[key] = value if key == "network" else copy.deepcopy(value, memo)
        return made


class _SharedControlledUNet(_OnShared, ControlledUNet):
    """A UNet with a ControlNet of its own."""

    def __init__(self, network: nn.Module, controlnet: nn.Module) -> None:
        super().__init__(network, controlnet)
        self._share(network)


class WithAdapter(_OnShared):
    """Output of a network + g times that of an adapter; g = 0 at initialisation.

    Args:
        network: stays where it is, and is not a part of this module.
        adapter: of (x, t) and the condition, trained with g.
        condition: argument that goes to the adapter alone.
        output: the tensor of what either of them returns.
    """

    def __init__(self, network: nn.Module, adapter: nn.Module, condition: str, output: Callable[[Any], Any]) -> None:
        super().__init__()
        self._share(network)
        self.adapter = adapter
        self.gain = nn.Parameter(torch.zeros(1))  # no scalar: FSDP shards none
        self.condition, self.output = condition, output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "network" not in self.__dict__:  # while the module is being made
                raise
            return getattr(self.__dict__["network"], name)

    def forward(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        """As the network, whose arguments ``kwargs`` are, with the condition."""
        control = {self.condition: kwargs.pop(self.condition)}
        out: Tensor = self.output(self.network(x, t, **kwargs))
        return out + self.gain * self.output(self.adapter(x, t, **control))


def _cond_shapes(network: Any) -> dict[str, tuple[int | str, ...]]:
    """Shapes of the network's own conditions, and of the adapter's."""
    own = family_of(network.network).cond_shapes
    own = own(network.network) if callable(own) else own
    adapters = {key: tuple(value.shape[1:]) for key, value in example_cond(network.adapter, 1).items()}
    return {**own, **adapters}


register(replace(PLAIN, model_class="WithAdapter", cond_shapes=_cond_shapes))


class Beside(Role):
    """The source's own frozen network with a trained one beside it that takes a further condition.

        out = f(x, t, ...) + g a(x, t, control)       g = 0 at initialisation, learned

    The source is shared, not copied; copies for averages are those of the adapter.

    Args:
        adapter: the network a, of the samples' shape, with the condition (``ConcatenatedDenoiser``: a picture of that
            shape); None for a new ControlNet of a ``UNet2DConditionModel``, whose condition is ``control``.
        condition: name of the condition.
        seed: of a new ControlNet.
    """

    shares_weights: ClassVar[bool] = True

    def __init__(
        self, adapter: DenoiserSpec | Denoiser | None = None, condition: str = "control", seed: int = 0
    ) -> None:
        self.adapter = adapter
        self.condition = condition
        self.seed = seed

    def check(self) -> None:  # noqa: D102
        if isinstance(self.adapter, DenoiserSpec):
            self.adapter.check()

    def build(self, source: Denoiser, name: str | None = None) -> Denoiser:  # noqa: D102
        from diffusers import ControlNetModel, UNet2DConditionModel

        check_alone(source, "Beside")
        base, family, kind = source.network, source.family, type(source.network).__name__
        if isinstance(source, AdapterDenoiser) or {p.dtype for p in base.parameters()} - {torch.float32, torch.float64}:
            raise ValueError(
                f"the adapter runs beside the plain {kind} in its precision, which has to be float32; load it so, and "
                "train with precision=bf16-mixed."
            )
        network: nn.Module
        if self.adapter is None:
            if not isinstance(base, UNet2DConditionModel) or self.condition != "control":
                raise ValueError(
                    f"a new ControlNet is made for a UNet2DConditionModel and takes the condition control, and this is "
                    f"a {kind} with {self.condition!r}; give Beside(adapter=...)."
                )
            with seeded(self.seed):
                network = _SharedControlledUNet(base, ControlNetModel.from_unet(base))
            wanted = FAMILIES["ControlledUNet"]
            family = replace(wanted, null={**family.null, "control": SAME}, guidance_scale=family.guidance_scale)
        else:
            adapter = as_denoiser(self.adapter)
            if family.pack or family.time_keyword or family.channel_split or adapter.family.time != family.time:
                raise ValueError(
                    f"{type(adapter.network).__name__} cannot stand beside a {kind}: both are called with the same "
                    "samples and times; use two networks of one kind."
                )
            network = WithAdapter(base, copy.deepcopy(adapter.network), self.condition, family.output)
            family = self._family(source)
        made = with_network(source, network, family).eval()
        widen(made)
        return made.requires_grad_(True)

    def _family(self, source: Denoiser) -> Family:
        """The source's calling convention with the condition."""
        family, condition = source.family, self.condition

        def arguments(network: nn.Module, x: Tensor, cond: dict[str, Any]) -> dict[str, Any]:
            own = {key: value for key, value in cond.items() if key != condition}
            taken = own if family.arguments is None else family.arguments(source.network, x, own)
            return {**taken, condition: cond[condition]}

        return replace(
            family,
            cond_keys=(*family.cond_keys, condition) if family.cond_keys else (),
            required=(*family.required, condition),
            arguments=arguments,
            output=lambda out: out,
            null={**family.null, condition: SAME},
        )
