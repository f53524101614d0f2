"""Networks of published size with random weights, from the facts of their configuration files; nothing is read.

sdxl    2.57 billion parameters, latents 4 x 128 x 128   1024 x 1024 pixels
sd3     2.03                     16 x 128 x 128          1024 x 1024
wan13   1.42                     16 x 21 x 60 x 104      81 frames of 480 x 832
flux    11.9                     16 x 128 x 128          1024 x 1024
dit     .75                      4 x 64 x 64             512 x 512, class labels
"""

from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import nn

from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.families import example_cond
from lightning_distill.networks.quantisation import quantise
from lightning_distill.processes import FlowMatching, NoiseProcess, VariancePreserving

_SDXL = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_SD3 = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
_WAN = {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}
_SMALL = {
    "sample_size": 32,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (16, 64, 96, 128),
    "down_block_types": ("DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 32,
    "num_class_embeds": 11,
}
_DIT = {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72, "sample_size": 64, "out_channels": 8}


@dataclass(frozen=True)
class Size:
    """A network by its published facts.

    Attributes:
        name: class in diffusers.
        config: its configuration.
        shape: of one sample.
        process: noise process.
        prediction_type: what it outputs.
    """

    name: str
    config: dict[str, Any]
    shape: tuple[int, ...]
    process: NoiseProcess
    prediction_type: str

    def make(self, **changes: Any) -> nn.Module:
        """The network, freshly initialised on the current default device."""
        return getattr(diffusers, self.name)(**{**self.config, **changes})


_SD_VP = VariancePreserving("scaled_linear", 0.00085, 0.012)
_SHIFTED = FlowMatching(3.0)
SIZES = {
    "sdxl": Size("UNet2DConditionModel", _SDXL, (4, 128, 128), _SD_VP, "epsilon"),
    "sd3": Size("SD3Transformer2DModel", _SD3, (16, 128, 128), _SHIFTED, "flow_prediction"),
    "wan13": Size("WanTransformer3DModel", _WAN, (16, 21, 60, 104), _SHIFTED, "flow_prediction"),
    "flux": Size("FluxTransformer2DModel", {"guidance_embeds": True}, (16, 128, 128), _SHIFTED, "flow_prediction"),
    "dit": Size("DiTTransformer2DModel", _DIT, (4, 64, 64), VariancePreserving(), "epsilon"),
    "small_unet": Size("UNet2DModel", _SMALL, (1, 32, 32), VariancePreserving(zero_terminal_snr=True), "v_prediction"),
}


def build(size: Size, device: str = "cpu", dtype: torch.dtype = torch.float32, quantize: str | None = None) -> Denoiser:
    """The denoiser with random weights, created on the device in its dtype without a float32 copy on the way.

    Conditions that the family itself has no unconditional value for have zeros, so that every size can be guided.

    Args:
        size: the network.
        device: where it is made.
        dtype: of its weights.
        quantize: store the blocks' linear layers as ``int8``, ``fp8`` or ``nf4``.
    """
    with torch.device("meta"):
        network = size.make()
    network = nn.Module.to(network, dtype).to_empty(device=device).eval()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.02, generator=generator)
    if buffers := dict(network.named_buffers()):  # position tables, which no file holds: a single block has them too
        known = dict(size.make(num_layers=1).named_buffers())
        for name, buffer in buffers.items():
            buffer.copy_(known[name])
    labels = size.config.get("num_class_embeds")
    denoiser = Denoiser(network, size.process, size.prediction_type, null_class=labels and labels - 1)
    if missing := set(denoiser.missing_null(example_cond(network, 1))) - {"class_labels"}:
        null = dict.fromkeys(missing, 0.0)
        denoiser = Denoiser(network, size.process, size.prediction_type, null_cond=null)
    if quantize is not None:
        quantise(network, quantize, denoiser.family.blocks)
    return denoiser


def parameters(name: str) -> int:
    """Number of parameters of a size, counted without memory."""
    with torch.device("meta"):
        return sum(p.numel() for p in SIZES[name].make().parameters())


if __name__ == "__main__":
    for name in SIZES:
        print(f"{name:12} {parameters(name) / 1e9:.3f} billion parameters")
