"""Pictures of latents with a gradient, for losses that look at pixels."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_distill.networks.autoencoders import autoencoder_folder, decoder_output, takes_videos
from lightning_distill.networks.folders import (
    check_diffusers_weights,
    check_safetensors,
    diffusers_class,
    load_diffusers_network,
    load_single_file,
)
from lightning_distill.networks.latents import LatentScale, latent_scale
from lightning_distill.networks.weightless import is_weightless, skeleton, weightless

__all__ = ["PixelDecoder"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class PixelDecoder:
    """The frozen decoder of an autoencoder as a differentiable map from samples of a latent model to pictures.

        pictures = D(std x + mean),      gradients reach x and no weight

    A part of losses rather than a network of the run: its weights are in no optimizer, checkpoint, average or gradient
    bucket. A tiny autoencoder (``AutoencoderTiny``: TAESD and its relatives) costs a small part of the time and memory
    of the pipeline's own.

    Args:
        path: folder of a pipeline or of an autoencoder, or one safetensors file of weights; without a ``config.json``
            beside it (or in ``config``) a file is taken for a TAESD, under diffusers' or its authors' names.
        crop: side, in pixels of the samples, of the square that is decoded; None for the whole.
        dtype: ``float32``, ``bfloat16`` or ``float64`` of weights and activations, whatever autocast says.
        checkpointing: recompute activations in the backward pass instead of keeping them.
        config: folder with the ``config.json`` of a single file.

    Raises:
        ValueError: a setting that cannot be.

    Notes:
        What a stock pipeline clamps to [-1, 1] is left as it is, for a clamped pixel has no gradient.
        A crop is decoded without what surrounds it: its border, and everything where the decoder has attention or
        group norms, differs a little from the same part of the whole picture. Two samples cut alike are compared
        fairly.
    """

    def __init__(
        self,
        path: str,
        crop: int | None = None,
        dtype: Literal["float32", "bfloat16", "float64"] = "float32",
        checkpointing: bool = False,
        config: str | None = None,
    ) -> None:
        if dtype not in _DTYPES:
            raise ValueError(f"PixelDecoder(dtype={dtype!r}): choose {', '.join(_DTYPES)}.")
        if crop is not None and crop < 1:
            raise ValueError(f"PixelDecoder(crop={crop}): give the side of a square of latents, 1 or more, or None.")
        self.path, self.config = path, config
        self.crop = crop
        self.dtype: torch.dtype = _DTYPES[dtype]
        self.checkpointing = checkpointing
        self._network: Any = None
        self._scale: LatentScale

    # ------------------------------------------------------------------------------------------------ files
    def check(self, shape: tuple[int, ...] | None = None) -> None:
        """Find what is wrong without reading a weight.

        Args:
            shape: of one sample that will be decoded, (C, h, w) or (C, F, h, w); None where it is not known yet.

        Raises:
            FileNotFoundError: there is no autoencoder.
            ValueError: it is none that can be read, or it does not decode samples of that shape.
        """
        with weightless():
            network = self._read()
        scale = latent_scale(network)  # states none: raises
        if not is_weightless():
            folder, file = self._place()
            if file is None:
                assert folder is not None
                check_diffusers_weights(folder)
        if shape is None:
            return
        if len(shape) not in (3, 4):
            raise ValueError(
                f"PixelDecoder decodes samples (C, h, w) or (C, F, h, w), but the method's have the shape {shape}; "
                "leave the decoder out."
            )
        channels = network.config.get("latent_channels") or network.config.get("z_dim")
        if channels and shape[0] != channels * scale.patch**2:
            raise ValueError(
                f"the autoencoder in {self.path} decodes latents of {channels * scale.patch**2} channels, but the "
                f"method's samples have the shape {shape}; give the autoencoder of the same pipeline."
            )
        if len(shape) == 4 and takes_videos(network):
            raise ValueError(
                f"{type(network).__name__} in {self.path} makes several frames of one, but PixelDecoder decodes videos "
                "frame by frame; give an autoencoder of pictures, or compare videos by TeacherFeatures."
            )
        if self.crop is not None and self.crop > min(shape[-2:]):
            raise ValueError(
                f"PixelDecoder(crop={self.crop}) is larger than the samples of shape {shape}; give at most "
                f"{min(shape[-2:])}, or None for the whole."
            )

    def build(self) -> nn.Module:
        """The autoencoder without its encoder, frozen, in eval mode; read once.

        Raises:
            FileNotFoundError: it is missing.
            ValueError: it cannot be read.
        """
        if self._network is None:
            # a validation may be the first to need it, and weights made in inference mode can never take part in
            # training; fresh weights that are overwritten must not move the generator of the run
            with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
                network = self._read()
                self._scale = latent_scale(network)
                for part in ("encoder", "quant_conv"):
                    if getattr(network, part, None) is not None:
                        setattr(network, part, None)
                network.eval().requires_grad_(False)
                if self.checkpointing and network._supports_gradient_checkpointing:
                    network.enable_gradient_checkpointing()
            self._network = network
        return self._network

    def _place(self) -> tuple[Path | None, Path | None]:
        """Folder of the configuration (None for a bare TAESD) and the single file of weights (None for a folder's)."""
        path = Path(self.path).expanduser()
        if path.is_dir():
            return autoencoder_folder(path), None
        if not path.exists():
            raise FileNotFoundError(
                f"{path} does not exist; give PixelDecoder(path) the folder of a latent pipeline or of an autoencoder, "
                "or one safetensors file."
            )
        check_safetensors(path)
        if self.config is not None:
            return autoencoder_folder(self.config), path
        return (path.parent if (path.parent / "config.json").is_file() else None), path

    def _read(self) -> Any:
        folder, file = self._place()
        if folder is None:
            assert file is not None
            return _tiny(file, None, self.dtype)
        cls = diffusers_class(folder)
        if not hasattr(cls, "decode"):
            raise ValueError(
                f"{folder / 'config.json'} describes {cls.__name__}, which decodes nothing; give PixelDecoder(path) "
                "the folder of an autoencoder."
            )
        if file is None:
            return load_diffusers_network(folder, self.dtype)
        if cls.__name__ == "AutoencoderTiny":
            return _tiny(file, folder, self.dtype)
        return load_single_file(file, folder, self.dtype)

    # ------------------------------------------------------------------------------------------------ decoding
    def offsets(self, u: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """Corners of the squares to decode, uniform over all there are.

        Args:
            u: uniform numbers in (0, 1), (B,), for the row.
            v: likewise for the column.
            x: samples, (B, ..., h, w).

        Returns:
            top and left, (B, 2), int64; zeros without ``crop``.
        """
        pairs = []
        for number, side in zip((u, v), x.shape[-2:]):
            places = side - (side if self.crop is None else self.crop) + 1
            pairs.append((number * places).long().clamp(0, places - 1))
        return torch.stack(pairs, 1)

    def __call__(self, x: Tensor, offset: Tensor | None = None) -> Tensor:
        """Pictures of samples.

        Args:
            x: samples of the diffusion model, (B, C, h, w), or videos (B, C, F, h, w), which are decoded frame by
                frame; on the device to compute on.
            offset: corners from ``offsets``, (B, 2); None decodes the square in the middle. Without ``crop`` nothing
                is cut.

        Returns:
            (B, 3, H, W) or (B, 3, F, H, W), about [-1, 1], float32 (float64 where that is the decoder's).

        Raises:
            ValueError: neither pictures nor videos, smaller than ``crop``, or of another number of channels.
        """
        network: Any = self.build()
        if network.device != x.device:
            with torch.inference_mode(False):
                network.to(x.device)
        if x.ndim not in (4, 5) or (self.crop is not None and self.crop > min(x.shape[-2:])):
            crop = "" if self.crop is None else f" of {self.crop} latents and more"
            raise ValueError(f"PixelDecoder decodes (B, C, h, w) or (B, C, F, h, w){crop}, got {tuple(x.shape)}.")
        if x.ndim == 5 and takes_videos(network):
            raise ValueError(
                f"PixelDecoder decodes videos frame by frame, which {type(network).__name__} cannot; give an "
                "autoencoder of pictures."
            )
        x, frames = self._cut(x, offset), x.shape[2] if x.ndim == 5 else 0
        if frames:
            x = x.transpose(1, 2).flatten(0, 1)
        wide = torch.promote_types(self.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            z = self._scale.to_latent(x.to(wide)).to(self.dtype)
            whole = self.checkpointing and not network._supports_gradient_checkpointing
            made = checkpoint(decoder_output, network, z, use_reentrant=False) if whole else decoder_output(network, z)
        return made.unflatten(0, (-1, frames)).transpose(1, 2) if frames else made

    def _cut(self, x: Tensor, offset: Tensor | None) -> Tensor:
        side = self.crop
        if side is None:
            return x
        if offset is None:
            top, left = ((full - side) // 2 for full in x.shape[-2:])
            return x[..., top : top + side, left : left + side]
        # by index rather than by slice: corners stay on the device
        flat, steps = x.flatten(1, -3), torch.arange(side, device=x.device)
        sample, plane = (torch.arange(n, device=x.device) for n in flat.shape[:2])
        rows, columns = (corner.to(x.device)[:, None] + steps for corner in offset.unbind(1))
        cut = flat[sample[:, None, None, None], plane[:, None, None], rows[:, None, :, None], columns[:, None, None, :]]
        return cut.reshape(*x.shape[:-2], side, side)


def _tiny(file: Path, folder: Path | None, dtype: torch.dtype) -> nn.Module:
    """``AutoencoderTiny`` with the decoder of a file, under diffusers' names or its authors'.

    Those number the layers from a clamp on, which diffusers does not count.

    Args:
        file: weights of the decoder, others are not read.
        folder: of its configuration; None for TAESD's layout.
        dtype: of the weights.

    Raises:
        ValueError: the file holds something else.
    """
    from diffusers import AutoencoderTiny
    from safetensors.torch import load_file

    state = load_file(file)
    if "decoder.layers.0.weight" in state:
        state = {k.removeprefix("decoder."): v for k, v in state.items() if k.startswith("decoder.")}
    elif "1.weight" in state:
        split = ((key.split(".", 1), value) for key, value in state.items())
        state = {f"layers.{int(k[0]) - 1}.{k[1]}": v for k, v in split if k[0].isdecimal()}
    remedy = "put the autoencoder's config.json beside it, or give its folder as PixelDecoder(config=FOLDER)"
    first = state.get("layers.0.weight")
    if first is None or first.ndim != 4:
        raise ValueError(f"{file} holds no decoder of a TAESD; {remedy}.")
    with skeleton():
        config: Any = {"latent_channels": first.shape[1]}
        if folder is not None:
            config = AutoencoderTiny.load_config(str(folder), local_files_only=True)
        network: Any = AutoencoderTiny.from_config(config)
    if not is_weightless():
        try:
            network.get_submodule("decoder").load_state_dict(state)
        except RuntimeError:
            layout = "TAESD's" if folder is None else f"that of {folder / 'config.json'}"
            raise ValueError(f"{file} holds a decoder of another layout than {layout}; {remedy}.") from None
    made: nn.Module = network.to(dtype).eval()
    return made
