"""Perceptual distance between samples of one condition: does the noise still change the picture?"""

import os
import warnings
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lightning_distill.metrics.extractors import check_file
from lightning_distill.networks.pixel_decoder import PixelDecoder

__all__ = ["PerceptualDistance", "lpips_diversity"]

VARIABLE = "LIGHTNING_DISTILL_LPIPS_TRUNK"
_SMALLEST = 64


class PerceptualDistance:
    """LPIPS (arXiv:1801.03924) with a trunk from a local file.

    The linear layers come with the ``lpips`` package; the trunk is torchvision's ImageNet classifier, whose state dict
    the file holds.

    Args:
        net: trunk: ``alex``, ``vgg`` or ``squeeze``.
        trunk_weights: torchvision's state dict of that network (.pth or .safetensors); None reads
            ``LIGHTNING_DISTILL_LPIPS_TRUNK``.
        allow_download: let torchvision fetch the trunk when no file is given.
        decoder: makes pictures of latents first, for models of latents; None compares the samples themselves.
    """

    def __init__(
        self,
        net: Literal["alex", "vgg", "squeeze"] = "alex",
        trunk_weights: str | None = None,
        allow_download: bool = False,
        decoder: PixelDecoder | None = None,
    ) -> None:
        if net not in ("alex", "vgg", "squeeze"):
            raise ValueError(f"PerceptualDistance(net={net!r}): choose alex, vgg or squeeze.")
        self.net = net
        self.trunk_weights = trunk_weights or os.environ.get(VARIABLE)
        self.allow_download = allow_download
        self.decoder = decoder
        self._network: torch.nn.Module | None = None

    def check(self, shape: tuple[int, ...] | None = None) -> None:
        """Raise if weights are missing or samples cannot be compared; reads no weights.

        Args:
            shape: of one sample, (C, H, W) or (C, F, H, W); None where it is not known yet.

        Raises:
            FileNotFoundError: there is no such file, or none was given.
            ValueError: the decoder cannot be read or does not fit, or there is none and samples are no pictures.
        """
        self._check_trunk()
        if self.decoder is not None:
            self.decoder.check(shape)
        elif shape is not None and (len(shape) not in (3, 4) or shape[0] not in (1, 3)):
            raise ValueError(
                f"PerceptualDistance compares pictures of 1 or 3 channels, but the method's samples have the shape "
                f"{tuple(shape)}; for latents give decoder=PixelDecoder(path) with their autoencoder, or use "
                "TeacherFeatures, which needs none."
            )

    def _check_trunk(self) -> None:
        if self.trunk_weights is None:
            if not self.allow_download:
                raise FileNotFoundError(
                    f"LPIPS needs the weights of torchvision's {self.net}; give the file with "
                    f"PerceptualDistance(trunk_weights=FILE) or {VARIABLE}=FILE, or set allow_download=True."
                )
            return
        check_file(self.trunk_weights, "PerceptualDistance(trunk_weights)", VARIABLE)

    def build(self) -> torch.nn.Module:
        """The network of the ``lpips`` package, frozen; built once.

        Raises:
            FileNotFoundError: the trunk is missing.
            ValueError: the file holds other weights.
        """
        if self._network is None:
            self._check_trunk()
            import lpips

            local = self.trunk_weights is not None
            # lpips names torchvision's weights in an old way; its random trunk is overwritten below and must not move
            # the generator of the run
            # a validation may build it first, and weights made in inference mode can take no part in training
            with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.inference_mode(False):
                warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
                network = lpips.LPIPS(net=self.net, pnet_rand=local, verbose=False)
            if self.trunk_weights is not None:
                _load_trunk(network, Path(self.trunk_weights).expanduser())
            self._network = network.eval().requires_grad_(False)
        return self._network

    def __call__(self, a: Tensor, b: Tensor, offset: Tensor | None = None) -> Tensor:
        """Distances of pairs of images; gradients reach the images, where they need them.

        Args:
            a: (N, C, H, W) in [-1, 1], one or three channels, on the device to compute on; images below 64 pixels are
                enlarged. Latents (N, C, h, w) with a decoder. Videos (N, C, F, H, W) are compared frame by frame.
            b: same shape and device.
            offset: corners of the decoder's crop, (N, 2), the same for both, see ``PixelDecoder.offsets``; None for
                the middle.

        Returns:
            (N,), float32, on the device of the images; the mean over the frames of videos.

        Raises:
            ValueError: different shapes, or neither one nor three channels.
        """
        comparable = a.shape == b.shape and a.ndim in (4, 5)
        if not comparable or (self.decoder is None and a.shape[1] not in (1, 3)):
            raise ValueError(
                f"LPIPS compares images (N, 1 or 3, H, W) of one shape, got {tuple(a.shape)} and {tuple(b.shape)}; "
                "latents need decoder=PixelDecoder(path)."
            )
        if self.decoder is not None:
            a, b = self.decoder(a, offset), self.decoder(b, offset)
        n = len(a)
        if a.ndim == 5:
            a, b = (x.transpose(1, 2).flatten(0, 1) for x in (a, b))
        network = self.build()
        with torch.inference_mode(False):
            network.to(a.device)
        return network(_rgb(a), _rgb(b)).reshape(n, -1).mean(1)


@torch.no_grad()
def lpips_diversity(
    distance: PerceptualDistance,
    images: Tensor,
    groups: Tensor,
    batch_size: int = 64,
    device: torch.device | str | None = None,
) -> float:
    """Mean distance between samples of the same condition and different noise.

    Every sample is compared with the next one of its group: n pairs instead of n^2, with the same expected value.

    Args:
        distance: perceptual distance.
        images: (N, C, H, W) in [-1, 1].
        groups: condition of each sample, (N,), integers.
        batch_size: pairs per network call.
        device: where they are compared; None is where the images are.

    Returns:
        0 for a network that ignores its noise; compare with the teacher's figure.

    Raises:
        ValueError: no condition has two samples, or not every sample has one.
    """
    if groups.shape != images.shape[:1]:
        raise ValueError(
            f"there are {len(images)} images and groups of shape {tuple(groups.shape)}; give one for each."
        )
    groups = groups.cpu()
    order = groups.argsort(stable=True)
    same = groups[order][1:] == groups[order][:-1]
    first, second = order[:-1][same], order[1:][same]
    if len(first) == 0:
        raise ValueError("LPIPS diversity needs two samples of one condition; give more samples.")
    where = images.device if device is None else device
    pairs = zip(first.split(batch_size), second.split(batch_size), strict=True)
    parts = [distance(images[i].to(where), images[j].to(where)) for i, j in pairs]
    return torch.cat(parts).double().mean().item()


def _load_trunk(network: torch.nn.Module, path: Path) -> None:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each reader has its own errors
        raise ValueError(f"{path} cannot be read as a state dict; give torchvision's file of this trunk.") from error
    own = network.state_dict()
    for key in own:
        if key.startswith("net."):
            name = "features." + key.split(".", 2)[2]  # net.slice3.6.weight is features.6.weight
            if name not in state or state[name].shape != own[key].shape:
                raise ValueError(f"{path} does not hold torchvision's weights of this trunk: {name} does not fit.")
            own[key] = state[name]
    network.load_state_dict(own)


def _rgb(images: Tensor) -> Tensor:
    images = images.float().expand(-1, 3, -1, -1)
    if min(images.shape[-2:]) < _SMALLEST:
        scale = -(-_SMALLEST // min(images.shape[-2:]))
        images = torch.nn.functional.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False)
    return images
