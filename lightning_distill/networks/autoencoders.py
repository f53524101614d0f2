"""Pictures and videos to the samples of a latent diffusion model, and back, by the pipeline's own autoencoder."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill.networks.folders import diffusers_class, load_diffusers_network
from lightning_distill.networks.json_files import read_json
from lightning_distill.networks.latents import NORMALISATION, latent_scale

__all__ = ["LatentCodec", "autoencoder_folder", "autoencoder_identity", "decoder_output", "takes_videos"]

#: autoencoders of videos whose diffusion models take pictures without a frame
_OF_PICTURES = ("AutoencoderKLQwenImage",)
#: sides and frames of a black video by which the factors of an autoencoder are measured: 24 has many divisors
_SIDE, _FRAMES = 128, 25


class LatentCodec:
    """An autoencoder with the normalisation that belongs to it.

    Args:
        folder: of a diffusers pipeline, or of an autoencoder alone (``AutoencoderTiny`` too, for fast decoding).
        dtype: of the network. float16 becomes float32 where the autoencoder says that it overflows.
        device: where it runs.

    Attributes:
        network: the autoencoder, in eval mode, without gradients.
        video: whether it takes videos; pictures are then videos of one frame.
        keeps_frame: whether the samples of pictures have that frame too, as models of videos want them.

    Raises:
        FileNotFoundError: there is no autoencoder.
    """

    def __init__(
        self, folder: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        self.folder = autoencoder_folder(folder)
        config = read_json(self.folder / "config.json")
        if dtype == torch.float16 and config.get("force_upcast"):
            dtype = torch.float32
        self.dtype, self.device = dtype, torch.device(device)
        self.network: Any = load_diffusers_network(self.folder, dtype).requires_grad_(False).to(self.device)
        self.scale = latent_scale(self.network)
        self.video = takes_videos(self.network)
        self.keeps_frame = self.video and not config["_class_name"].startswith(_OF_PICTURES)

    def identity(self) -> dict[str, Any]:
        """Digest of the weights, class and normalisation, as plain values."""
        return autoencoder_identity(self.folder)

    @torch.no_grad()
    def encode(self, x: Tensor, noise: Callable[[tuple[int, ...]], Tensor] | None = None) -> Tensor:
        """Samples x0 of the diffusion model.

        Args:
            x: pictures (B, 3, H, W) or videos (B, 3, F, H, W) in [-1, 1].
            noise: makes unit noise (B, C, ...) of a shape for a draw from the autoencoder's posterior, which is what
                the diffusion model was trained on; None takes the posterior's mode.

        Returns:
            (B, C, h, w), or (B, C, f, h, w) for videos, float32, on the CPU. Pictures of the autoencoder of a video
            model are (B, C, 1, h, w).

        Raises:
            ValueError: a video for an autoencoder of pictures, or a size or number of frames of which it would cut
                something off.
        """
        frames = x.ndim == 5
        if frames and not self.video:
            raise ValueError(
                f"{type(self.network).__name__} encodes pictures (B, 3, H, W), but was given videos of shape "
                f"{tuple(x.shape[1:])}; use the autoencoder of a video pipeline."
            )
        self.check_size(x.shape[2] if frames else 1, x.shape[-2], x.shape[-1])
        x = x.to(self.device, self.dtype)
        out = self.network.encode(x if frames or not self.video else x.unsqueeze(2))
        z = self._latent(out, noise)
        samples = self.scale.to_sample(z.float())
        if self.video and not frames and not self.keeps_frame:
            samples = samples.squeeze(2)
        return samples.cpu()

    @cached_property
    def factors(self) -> tuple[int, int]:
        """Frames, after the first, and pixels along a side that one position of the samples stands for.

        Class by class the configurations say it in other words, so that it is measured.
        """
        side = _SIDE // self._positions(1, _SIDE)[1]
        frames = self._positions(_FRAMES, 2 * side)[0] - 1 if self.video else 0
        known = frames > 0 and (_FRAMES - 1) % frames == 0  # else the first frame is none of its own
        return ((_FRAMES - 1) // frames if known else 1, side * self.scale.patch)

    @torch.no_grad()
    def _positions(self, frames: int, side: int) -> tuple[int, int]:
        """Frames and width of the latent of a black video."""
        shape = (1, 3, frames, side, side) if self.video else (1, 3, side, side)
        z = self._latent(self.network.encode(torch.zeros(shape, device=self.device, dtype=self.dtype)), None)
        return (z.shape[2] if self.video else 1), z.shape[-1]

    def check_size(self, frames: int, height: int, width: int) -> None:
        """Refuse what the autoencoder would cut off.

        Args:
            frames: of a video, 1 for pictures.
            height: in pixels.
            width: in pixels.

        Raises:
            ValueError: a side or the number of frames is none that it divides evenly.
        """
        step, side = self.factors
        name = type(self.network).__name__
        if height % side or width % side:
            below = [pixels // side * side for pixels in (height, width)]
            above = [-(-pixels // side) * side for pixels in (height, width)]
            near = " or ".join(f"{h} x {w}" for h, w in (below, above) if h and w)
            raise ValueError(
                f"{name} makes one latent of {side} x {side} pixels and would cut off the rest of {height} x {width}; "
                f"give multiples of {side}, such as {near}."
            )
        if (frames - 1) % step:
            below_frames = (frames - 1) // step * step + 1
            raise ValueError(
                f"{name} makes one latent of the first frame and one of every {step} that follow, and would cut off "
                f"the rest of {frames} frames; give {below_frames} or {below_frames + step}."
            )

    def _latent(self, out: Any, noise: Callable[[tuple[int, ...]], Tensor] | None) -> Tensor:
        if not hasattr(out, "latent_dist"):
            # deterministic autoencoders: AutoencoderDC, AutoencoderTiny
            found: Tensor = out.latent if hasattr(out, "latent") else out.latents
            return found
        posterior = out.latent_dist
        mean: Tensor = posterior.mode()
        if noise is None:
            return mean
        return mean + posterior.std * noise(tuple(mean.shape)).to(mean)

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        """Pictures or videos of samples.

        Args:
            x0: (B, C, h, w) or (B, C, f, h, w).

        Returns:
            (B, 3, H, W) or (B, 3, F, H, W), float32 in [-1, 1], on the CPU.
        """
        z = self.scale.to_latent(x0.to(self.device, torch.float32)).to(self.dtype)
        return decoder_output(self.network, z).clamp(-1.0, 1.0).cpu()


def takes_videos(network: nn.Module) -> bool:
    """Whether an autoencoder takes videos; pictures are then videos of one frame."""
    return any(isinstance(module, nn.Conv3d) for module in network.modules())


def decoder_output(network: Any, z: Tensor) -> Tensor:
    """What an autoencoder makes of latents, with a gradient to them and as far from [-1, 1] as it comes.

    Args:
        network: the autoencoder.
        z: its own latents, (B, C, h, w) or (B, C, f, h, w).

    Returns:
        (B, 3, H, W) or (B, 3, F, H, W), float32, or float64 for such latents.
    """
    as_video = z.ndim == 4 and takes_videos(network)
    settings = {}
    if network.config.get("timestep_conditioning"):
        settings["temb"] = torch.zeros(len(z), device=z.device, dtype=z.dtype)  # no noise is left to remove
    out: Tensor = network.decode(z.unsqueeze(2) if as_video else z, **settings).sample
    out = out.to(torch.promote_types(out.dtype, torch.float32))
    return out.squeeze(2) if as_video else out


def autoencoder_folder(folder: str | Path) -> Path:
    """The autoencoder in a pipeline's folder, or the folder itself.

    Raises:
        FileNotFoundError: there is none.
    """
    folder = Path(folder).expanduser()
    for candidate in (folder / "vae", folder):
        if (candidate / "config.json").is_file():
            diffusers_class(candidate)
            return candidate
    raise FileNotFoundError(f"{folder} holds no autoencoder (vae/config.json); give the folder of a latent pipeline.")


def autoencoder_identity(folder: str | Path) -> dict[str, Any]:
    """Digest of an autoencoder's files, its class and its normalisation, as plain values; nothing is loaded."""
    from lightning_distill.metrics.extractors import file_sha256  # metrics use autoencoders themselves

    found = autoencoder_folder(folder)
    weights = {file.name: file_sha256(file) for file in sorted(found.glob("*.safetensors"))}
    config = read_json(found / "config.json")
    return {
        "autoencoder": config["_class_name"],
        "autoencoder_sha256": weights,
        "autoencoder_scale": {key: config[key] for key in NORMALISATION if config.get(key) is not None},
    }
