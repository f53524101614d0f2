"""A network together with the ControlNet that steers it (arXiv:2302.05543), as one network with a further condition.

    eps(x_t, t, text, control) = U(x_t, t, text; residuals C(x_t, t, text, control))

The control picture is the condition ``control``. It belongs to both branches of guidance, every role copies or adapts
both networks, and a derivative along the trajectory goes through both, with no tangent of the picture.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.families import FAMILIES
from lightning_distill.networks.families.base import SAME, Family, register
from lightning_distill.networks.folders import load_diffusers_network
from lightning_distill.networks.roles import with_network
from lightning_distill.networks.specs import DenoiserSpec, PretrainedDenoiser
from lightning_distill.networks.time_embeddings import EMBEDDINGS

__all__ = ["Controlled", "ControlledDenoiser", "ControlledSana", "ControlledUNet", "controlled"]


class Controlled(nn.Module):
    """A network and its ControlNet; attributes that it does not have itself are the network's.

    Args:
        network: the steered model.
        controlnet: diffusers' ControlNet for it.
        strength: factor on the residuals.
    """

    def __init__(self, network: nn.Module, controlnet: nn.Module, strength: float = 1.0) -> None:
        super().__init__()
        self.network = network
        self.controlnet = controlnet
        self.strength = float(strength)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "network":  # while the module is being made or unpickled
                raise
            return getattr(self.network, name)

    @property
    def called(self) -> nn.Module:
        """The network that says which further arguments a call takes."""
        return self.network

    def picture(self, control: Tensor) -> Tensor:
        """The control in the ControlNet's dtype."""
        return control.to(next(self.controlnet.parameters()).dtype)


class ControlledUNet(Controlled):
    """``UNet2DConditionModel`` with a ``ControlNetModel``: Stable Diffusion 1, 2 and XL."""

    def forward(self, sample: Tensor, timestep: Tensor, *, control: Tensor, **kwargs: Any) -> Any:
        """As the UNet, with its ControlNet's residuals.

        Args:
            sample: noisy latents, (B, C, H, W).
            timestep: (B,).
            control: pictures in [0, 1], (B, channels, 8 H, 8 W).
            **kwargs: the UNet's other arguments.
        """
        shared = {k: v for k, v in kwargs.items() if k != "encoder_attention_mask"}
        down, mid = self.controlnet(
            sample,
            timestep,
            controlnet_cond=self.picture(control),
            conditioning_scale=self.strength,
            return_dict=False,
            **shared,
        )
        return self.network(
            sample, timestep, down_block_additional_residuals=down, mid_block_additional_residual=mid, **kwargs
        )


class ControlledSana(Controlled):
    """``SanaTransformer2DModel`` with a ``SanaControlNetModel``: SANA and SANA-Sprint."""

    def forward(self, sample: Tensor, tokens: Tensor, *, control: Tensor, **kwargs: Any) -> Any:
        """As the transformer, with its ControlNet's residuals.

        Args:
            sample: noisy latents, (B, C, H, W).
            tokens: text, (B, L, D).
            control: latents of the control pictures, (B, C, H, W).
            **kwargs: the transformer's other arguments.
        """
        (residuals,) = self.controlnet(
            sample,
            encoder_hidden_states=tokens,
            controlnet_cond=self.picture(control),
            conditioning_scale=self.strength,
            return_dict=False,
            **{k: v for k, v in kwargs.items() if k in ("timestep", "encoder_attention_mask")},
        )
        return self.network(sample, tokens, controlnet_block_samples=residuals, **kwargs)


_KINDS = {"UNet2DConditionModel": ControlledUNet, "SanaTransformer2DModel": ControlledSana}


def _register(base: str, wrapper: type[Controlled], shape: Any) -> None:
    family = FAMILIES[base]
    inner = family.cond_shapes

    def shapes(network: nn.Module) -> dict[str, tuple[int | str, ...]]:
        own = inner(network) if callable(inner) else inner
        return {**own, "control": shape(network)}

    def arguments(network: nn.Module, x: Tensor, cond: dict[str, Any]) -> dict[str, Any]:
        return cond if family.arguments is None else family.arguments(network, x, cond)

    register(
        replace(
            family,
            model_class=wrapper.__name__,
            cond_keys=(*family.cond_keys, "control"),
            required=(*family.required, "control"),
            cond_shapes=shapes,
            arguments=arguments,
            null={**family.null, "control": SAME},
        )
    )


def _picture_shape(network: Any) -> tuple[int, ...]:
    size = network.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    scale = 2 ** (len(network.controlnet.config.conditioning_embedding_out_channels) - 1)
    return (network.controlnet.config.conditioning_channels, scale * height, scale * width)


def _latent_shape(network: Any) -> tuple[int, ...]:
    size = network.config.sample_size
    return (network.controlnet.config.in_channels, size, size)


_register("UNet2DConditionModel", ControlledUNet, _picture_shape)
_register("SanaTransformer2DModel", ControlledSana, _latent_shape)
# a target time and a guidance scale are told to the steered network, not to its ControlNet
EMBEDDINGS["ControlledUNet"] = EMBEDDINGS["UNet2DConditionModel"]
EMBEDDINGS["ControlledSana"] = EMBEDDINGS["SanaTransformer2DModel"]


def controlled(network: nn.Module, controlnet: nn.Module, strength: float = 1.0) -> Controlled:
    """A network steered by a ControlNet.

    Args:
        network: ``UNet2DConditionModel`` or ``SanaTransformer2DModel``.
        controlnet: diffusers' ControlNet for this class.
        strength: factor on the residuals.

    Raises:
        ValueError: another network, or a ControlNet of another class.
    """
    for cls in type(network).__mro__:
        if cls.__name__ in _KINDS:
            wanted = "ControlNetModel" if cls.__name__ == "UNet2DConditionModel" else "SanaControlNetModel"
            if type(controlnet).__name__ != wanted:
                raise ValueError(
                    f"a {cls.__name__} is steered by a {wanted}, not by a {type(controlnet).__name__}; give the "
                    "folder of one that was trained for this model."
                )
            return _KINDS[cls.__name__](network, controlnet, strength)
    raise ValueError(
        f"{type(network).__name__} with a ControlNet is not supported; ControlNets exist here for "
        f"{' and '.join(_KINDS)}. Wrap another pair as an nn.Module of your own with the condition it needs."
    )


class ControlledDenoiser(DenoiserSpec):
    """A pretrained model with its ControlNet; batches carry the pictures as the condition ``control``.

    No stock pipeline is written for the student; its two parts, ``student.network.network`` and
    ``student.network.controlnet``, are diffusers models of their own with ``save_pretrained``.

    Args:
        base: the model.
        controlnet: folder of the ControlNet, or its name below ``$LIGHTNING_DISTILL_WEIGHTS`` or in the local cache of
            the Hugging Face hub.
        strength: factor on its residuals.
    """

    def __init__(self, base: PretrainedDenoiser, controlnet: str, strength: float = 1.0) -> None:
        self.base = base
        self.controlnet = str(controlnet)
        self.strength = strength

    def check(self) -> None:  # noqa: D102
        self.base.check()
        self._folder()

    def _folder(self) -> Path:
        found = PretrainedDenoiser(self.controlnet).local_path()
        if found is None or not (found / "config.json").is_file():
            raise FileNotFoundError(
                f"ControlledDenoiser(controlnet={self.controlnet!r}) is no folder of a ControlNet (config.json and "
                "safetensors); download it beforehand and give its folder."
            )
        return found

    def build(self) -> Denoiser:  # noqa: D102
        denoiser = self.base.build()
        steering = load_diffusers_network(self._folder(), next(denoiser.network.parameters()).dtype)
        network = controlled(denoiser.network, steering, self.strength)
        family: Family = FAMILIES[type(network).__name__]
        bound = denoiser.family  # with the null embeddings of the folder
        family = replace(family, null={**bound.null, "control": SAME}, guidance_scale=bound.guidance_scale)
        return with_network(denoiser, network, family)
