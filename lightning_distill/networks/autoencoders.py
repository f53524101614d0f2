"""Pictures and videos to the samples of a latent diffusion model, and back, by the pipeline's own autoencoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill.networks.folders import diffusers_class, load_diffusers_network
from lightning_distill.networks.json_files import read_json
from lightning_distill.networks.latents import latent_scale

__all__ = ["LatentCodec", "autoencoder_folder", "autoencoder_identity", "decoder_output", "takes_videos"]


class LatentCodec:
    """An autoencoder with the normalisation that belongs to it.

    Args:
        folder: of a diffusers pipeline, or of an autoencoder alone (``AutoencoderTiny`` too, for fast decoding).
        dtype: of the network. float16 becomes float32 where the autoencoder says that it overflows.
        device: where it runs.

    Attributes:
        network: the autoencoder, in eval mode, without gradients.
        video: whether it takes videos; pictures are then videos of one frame.

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

    def identity(self) -> dict[str, Any]:
        """Digest of the weights and class, as plain values."""
        return autoencoder_identity(self.folder)

    @torch.no_grad()
    def encode(self, x: Tensor, noise: Callable[[tuple[int, ...]], Tensor] | None = None) -> Tensor:
        """Samples x0 of the diffusion model.

        Args:
            x: pictures (B, 3, H, W) or videos (B, 3, F, H, W) in [-1, 1].
            noise: makes unit noise (B, C, ...) of a shape for a draw from the autoencoder's posterior, which is what
                the diffusion model was trained on; None takes the posterior's mode.

        Returns:
            (B, C, h, w), or (B, C, f, h, w) for videos, float32, on the CPU.

        Raises:
            ValueError: a video for an autoencoder of pictures, or a size that it cannot halve often enough.
        """
        frames = x.ndim == 5
        if frames and not self.video:
            raise ValueError(
                f"{type(self.network).__name__} encodes pictures (B, 3, H, W), but was given videos of shape "
                f"{tuple(x.shape[1:])}; use the autoencoder of a video pipeline."
            )
        x = x.to(self.device, self.dtype)
        out = self.network.encode(x if frames or not self.video else x.unsqueeze(2))
        z = self._latent(out, noise)
        samples = self.scale.to_sample(z.float())
        if self.video and not frames:
            samples = samples.squeeze(2)
        return samples.cpu()

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
    """Digest of an autoencoder's files and its class, as plain values; nothing is loaded."""
    from lightning_distill.metrics.extractors import file_sha256  # metrics use autoencoders themselves

    found = autoencoder_folder(folder)
    weights = {file.name: file_sha256(file) for file in sorted(found.glob("*.safetensors"))}
    return {"autoencoder": read_json(found / "config.json")["_class_name"], "autoencoder_sha256": weights}
