"""Tiny random offline networks of every diffusers family, with what belongs to them.

One function per family makes a ``Tiny``: network, scheduler, sample shape, random conditions and their null, and how
the stock pipeline is called. Nothing is read or downloaded; every network is made in some milliseconds.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import seeded
from lightning_distill.processes import FlowMatching, NoiseProcess, VariancePreserving

#: tokens of every prompt
LENGTH = 5


@dataclass
class Tiny:
    """One family.

    Attributes:
        name: identifier of the test.
        pipeline: stock pipeline class.
        network: random network in eval mode.
        scheduler: of the pipeline.
        shape: of one sample, without the batch dimension.
        kind: prediction type.
        cond: name -> shape of a random embedding, without the batch dimension, or a fixed row.
        call: pipeline arguments from the conditions.
        settings: further arguments of the pipeline's class.
        to_sample: the pipeline's latents (or model outputs) -> samples (B, ...) of ours.
        block: a middle block to tap.
        late: a later block, which an early exit does not run.
        guidance: scale of networks that embed it.
        zeros: conditions whose null is zeros by the family itself.
    """

    name: str
    pipeline: str
    network: nn.Module
    scheduler: Any
    shape: tuple[int, ...]
    block: str
    late: str
    cond_shapes: dict[str, tuple[int, ...] | Tensor]
    call: Callable[[dict[str, Tensor]], dict[str, Any]]
    kind: str = "flow_prediction"
    settings: dict[str, Any] = field(default_factory=dict)
    to_sample: Callable[[Tensor], Tensor] = lambda latents: latents
    component: str = "transformer"
    guidance: float | None = None
    zeros: bool = False

    def cond(self, n: int, seed: int = 0) -> dict[str, Tensor]:
        """Random conditions of n samples."""
        generator = torch.Generator().manual_seed(seed)
        made = {}
        for key, shape in self.cond_shapes.items():
            fixed = isinstance(shape, Tensor)
            made[key] = shape.expand(n, *shape.shape) if fixed else torch.randn(n, *shape, generator=generator)
        return made

    def null(self) -> dict[str, Tensor]:
        """The stored embedding of an empty prompt; masks hide all tokens but the first."""
        row = self.cond(1, seed=99)
        mask = row.get("encoder_attention_mask")
        if mask is not None:
            row["encoder_attention_mask"] = (torch.arange(mask.shape[1]) < 1).to(mask.dtype)[None]
        return {k: v for k, v in row.items() if k not in ("time_ids", "resolution", "aspect_ratio", "class_labels")}

    def denoiser(self, process: NoiseProcess | None = None, **settings: Any) -> Denoiser:
        """The network as a denoiser, in a process like that of its scheduler."""
        if not self.zeros:
            settings.setdefault("null_cond", self.null())
        own = FlowMatching() if self.kind == "flow_prediction" else VariancePreserving()
        return Denoiser(self.network, process or own, self.kind, **settings).eval()

    def stock(self) -> Any:
        """The stock pipeline; all other components are left out."""
        cls = getattr(diffusers, self.pipeline)
        given = {self.component: self.network, "scheduler": self.scheduler, **self.settings}
        needed = {k for k, p in inspect.signature(cls.__init__).parameters.items() if p.default is p.empty}
        pipe = cls(**dict.fromkeys(needed - {"self"}) | given)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def save(self, folder: Path, part: str | None = None) -> Path:
        """Network and scheduler as a pipeline folder."""
        part = part or self.component
        self.network.save_pretrained(folder / part)  # type: ignore[operator]
        self.scheduler.save_pretrained(folder / "scheduler")
        index = {"_class_name": self.pipeline, part: ["diffusers", type(self.network).__name__]}
        (folder / "model_index.json").write_text(json.dumps(index))
        return folder


def random_network(cls: str, **config: Any) -> nn.Module:
    """A network whose every layer counts: fresh output layers are zero, and a few tokens uninitialised."""
    with seeded(0):
        network = getattr(diffusers, cls)(**config).eval()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.nan_to_num_(0.0).clamp_(-1.0, 1.0).add_(0.05 * torch.randn_like(parameter))
    return network


def tokens(key: str = "prompt_embeds", mask: str | None = None, pooled: str | None = None) -> Callable[..., Any]:
    """The pipeline's names of text tokens, mask and pooled embedding."""
    names = {"encoder_hidden_states": key, "encoder_attention_mask": mask, "pooled_projections": pooled}
    return lambda cond: {name: cond[k] for k, name in names.items() if name and k in cond}


#: the last two of five tokens are padding
MASK = torch.tensor([1, 1, 1, 0, 0])


# ------------------------------------------------------------------------------------------------ Stable Diffusion
def _unet(**config: Any) -> nn.Module:
    return random_network(
        "UNet2DConditionModel",
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
        **config,
    )


SD_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}


def sd15() -> Tiny:
    scheduler = diffusers.DDIMScheduler(set_alpha_to_one=False, steps_offset=1, **SD_BETAS)
    return Tiny(
        "sd15", "StableDiffusionPipeline", _unet(), scheduler, (4, 8, 8), "mid_block", "up_blocks.0",
        {"encoder_hidden_states": (LENGTH, 8)},
        lambda cond: {**tokens()(cond), "height": 64, "width": 64, "guidance_scale": 1.0},
        kind="epsilon", settings={"requires_safety_checker": False}, component="unet",
    )  # fmt: skip


def sd21() -> Tiny:
    scheduler = diffusers.DDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,
        **SD_BETAS,
    )
    tiny = sd15()
    tiny.name, tiny.scheduler, tiny.kind = "sd21_v", scheduler, "v_prediction"
    return tiny


def lcm() -> Tiny:
    """SD1.5 with a guidance embedding, as latent consistency models have."""
    tiny = sd15()
    tiny.name, tiny.network, tiny.guidance = "lcm", _unet(time_cond_proj_dim=16), 7.5
    call = tiny.call
    tiny.call = lambda cond: {**call(cond), "guidance_scale": 7.5}
    return tiny


def sdxl() -> Tiny:
    network = _unet(
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + 6
    )
    scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1, **{
        k: v for k, v in SD_BETAS.items() if k != "clip_sample"
    })  # fmt: skip
    time_ids = torch.tensor([64.0, 64.0, 0.0, 0.0, 64.0, 64.0])
    return Tiny(
        "sdxl", "StableDiffusionXLPipeline", network, scheduler, (4, 8, 8), "mid_block", "up_blocks.0",
        {"encoder_hidden_states": (LENGTH, 8), "text_embeds": (6,), "time_ids": time_ids},
        lambda cond: {
            **tokens()(cond), "pooled_prompt_embeds": cond["text_embeds"], "height": 64, "width": 64,
            "guidance_scale": 1.0,
        },
        kind="epsilon", component="unet", zeros=True,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ image transformers
def _pixart(sample_size: int, **config: Any) -> nn.Module:
    return random_network(
        "PixArtTransformer2DModel", num_attention_heads=3, attention_head_dim=4, in_channels=4, out_channels=8,
        num_layers=2, cross_attention_dim=12, sample_size=sample_size, patch_size=2, caption_channels=6, **config,
    )  # fmt: skip


def _pixart_call(size: int) -> Callable[..., dict[str, Any]]:
    return lambda cond: {
        **tokens(mask="prompt_attention_mask")(cond), "negative_prompt": None, "height": size, "width": size,
        "guidance_scale": 1.0, "use_resolution_binning": False,
    }  # fmt: skip


def pixart_sigma() -> Tiny:
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    return Tiny(
        "pixart_sigma", "PixArtSigmaPipeline", _pixart(8), scheduler, (4, 8, 8),
        "transformer_blocks.0", "transformer_blocks.1",
        {"encoder_hidden_states": (LENGTH, 6), "encoder_attention_mask": MASK}, _pixart_call(64), kind="epsilon",
    )  # fmt: skip


def pixart_alpha() -> Tiny:
    """The 1024-pixel model, which is told resolution and aspect ratio (its pipeline asks for sample_size 128)."""
    tiny = pixart_sigma()
    tiny.name, tiny.pipeline, tiny.network = "pixart_alpha", "PixArtAlphaPipeline", _pixart(128)
    size = {"resolution": torch.tensor([64.0, 64.0]), "aspect_ratio": torch.tensor([1.0])}
    tiny.cond_shapes = {**tiny.cond_shapes, **size}
    return tiny


def _sd3(name: str, **config: Any) -> Tiny:
    network = random_network(
        "SD3Transformer2DModel", sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=6, caption_projection_dim=16, pooled_projection_dim=7,
        out_channels=4, pos_embed_max_size=8, **config,
    )  # fmt: skip
    return Tiny(
        name, "StableDiffusion3Pipeline", network, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), (4, 8, 8),
        "transformer_blocks.0", "transformer_blocks.1",
        {"encoder_hidden_states": (LENGTH, 6), "pooled_projections": (7,)},
        lambda cond: {
            **tokens(pooled="pooled_prompt_embeds")(cond), "height": 64, "width": 64, "guidance_scale": 1.0
        },
    )  # fmt: skip


def sd3() -> Tiny:
    return _sd3("sd3")


def sd35() -> Tiny:
    return _sd3("sd35", dual_attention_layers=(0,), qk_norm="rms_norm")


def _sana(**config: Any) -> nn.Module:
    return random_network(
        "SanaTransformer2DModel", in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2,
        attention_head_dim=4, num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8,
        caption_channels=6, sample_size=8, **config,
    )  # fmt: skip


def _sana_call(cond: dict[str, Tensor]) -> dict[str, Any]:
    named = tokens(mask="prompt_attention_mask")(cond)
    return {**named, "height": 256, "width": 256, "use_resolution_binning": False}


def sana() -> Tiny:
    scheduler = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    return Tiny(
        "sana", "SanaPipeline", _sana(timestep_scale=0.5), scheduler, (4, 8, 8),
        "transformer_blocks.0", "transformer_blocks.1",
        {"encoder_hidden_states": (LENGTH, 6), "encoder_attention_mask": MASK},
        lambda cond: {**_sana_call(cond), "negative_prompt": None, "guidance_scale": 1.0},
    )  # fmt: skip


def sana_sprint() -> Tiny:
    network = _sana(guidance_embeds=True, qk_norm="rms_norm_across_heads", timestep_scale=1000.0)
    return Tiny(
        "sana_sprint", "SanaSprintPipeline", network, diffusers.SCMScheduler(sigma_data=0.5), (4, 8, 8),
        "transformer_blocks.0", "transformer_blocks.1",
        {"encoder_hidden_states": (LENGTH, 6), "encoder_attention_mask": MASK},
        lambda cond: {**_sana_call(cond), "guidance_scale": 3.0}, guidance=3.0,
    )  # fmt: skip


def lumina2() -> Tiny:
    network = random_network(
        "Lumina2Transformer2DModel", sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=2,
        num_refiner_layers=1, num_attention_heads=3, num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 2, 2),
        axes_lens=(16, 16, 16), cap_feat_dim=6,
    )  # fmt: skip
    return Tiny(
        "lumina2", "Lumina2Pipeline", network, diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0), (4, 8, 8),
        "layers.0", "layers.1", {"encoder_hidden_states": (LENGTH, 6), "encoder_attention_mask": MASK},
        lambda cond: {
            **tokens(mask="prompt_attention_mask")(cond), "height": 64, "width": 64, "guidance_scale": 1.0
        },
    )  # fmt: skip


def z_image() -> Tiny:
    network = random_network(
        "ZImageTransformer2DModel", in_channels=4, dim=16, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=6, axes_dims=[4, 2, 2], axes_lens=[64, 16, 16],
    )  # fmt: skip

    def call(cond: dict[str, Tensor]) -> dict[str, Any]:
        rows = zip(cond["encoder_hidden_states"], cond["encoder_attention_mask"])
        embeds = [row[keep.bool()] for row, keep in rows]
        return {"prompt_embeds": embeds, "height": 64, "width": 64, "guidance_scale": 0.0}

    return Tiny(
        "z_image", "ZImagePipeline", network, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), (4, 8, 8),
        "layers.0", "layers.1", {"encoder_hidden_states": (LENGTH, 6), "encoder_attention_mask": MASK}, call,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ packed images
def unpacked(latents: Tensor) -> Tensor:
    """(B, 16, 4 C) tokens of an 8 x 8 latent -> (B, C, 8, 8), written with einops-like steps of its own."""
    batch, _, channels = latents.shape
    image = torch.empty(batch, channels // 4, 8, 8)
    for index in range(16):
        row, column = divmod(index, 4)
        patch = latents[:, index].reshape(batch, channels // 4, 2, 2)
        image[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = patch
    return image


def flux() -> Tiny:
    network = random_network(
        "FluxTransformer2DModel", in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=6, pooled_projection_dim=7, guidance_embeds=True,
        axes_dims_rope=(4, 2, 2),
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    return Tiny(
        "flux", "FluxPipeline", network, scheduler, (4, 8, 8), "transformer_blocks.0", "single_transformer_blocks.0",
        {"encoder_hidden_states": (LENGTH, 6), "pooled_projections": (7,)},
        lambda cond: {
            **tokens(pooled="pooled_prompt_embeds")(cond), "height": 64, "width": 64, "guidance_scale": 2.5
        },
        to_sample=unpacked, guidance=2.5,
    )  # fmt: skip


def flux2() -> Tiny:
    network = random_network(
        "Flux2Transformer2DModel", in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=6, timestep_guidance_channels=16, axes_dims_rope=(2, 2, 2, 2),
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    return Tiny(
        "flux2", "Flux2Pipeline", network, scheduler, (16, 4, 4), "transformer_blocks.0", "single_transformer_blocks.0",
        {"encoder_hidden_states": (LENGTH, 6)},
        lambda cond: {**tokens()(cond), "height": 64, "width": 64, "guidance_scale": 2.5},
        to_sample=lambda latents: latents.transpose(1, 2).reshape(-1, 16, 4, 4), guidance=2.5,
    )  # fmt: skip


def qwen_image() -> Tiny:
    network = random_network(
        "QwenImageTransformer2DModel", in_channels=16, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=6, axes_dims_rope=(4, 2, 2),
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192
    )
    return Tiny(
        "qwen_image", "QwenImagePipeline", network, scheduler, (4, 8, 8),
        "transformer_blocks.0", "transformer_blocks.1",
        {"encoder_hidden_states": (LENGTH, 6), "encoder_attention_mask": MASK},
        lambda cond: {**tokens(mask="prompt_embeds_mask")(cond), "height": 64, "width": 64, "true_cfg_scale": 1.0},
        to_sample=unpacked,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ videos
def _wan_config() -> dict[str, Any]:
    return {
        "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 6,
        "freq_dim": 8, "ffn_dim": 16, "num_layers": 2, "rope_max_seq_len": 16,
    }  # fmt: skip


def _video_call(cond: dict[str, Tensor]) -> dict[str, Any]:
    return {**tokens()(cond), "height": 64, "width": 64, "num_frames": 5, "guidance_scale": 1.0}


def wan() -> Tiny:
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return Tiny(
        "wan", "WanPipeline", random_network("WanTransformer3DModel", **_wan_config()), scheduler, (4, 2, 8, 8),
        "blocks.0", "blocks.1", {"encoder_hidden_states": (LENGTH, 6)}, _video_call,
    )  # fmt: skip


def anyflow() -> Tiny:
    return Tiny(
        "anyflow", "AnyFlowPipeline", random_network("AnyFlowTransformer3DModel", **_wan_config()),
        diffusers.FlowMapEulerDiscreteScheduler(shift=5.0), (4, 2, 8, 8),
        "blocks.0", "blocks.1", {"encoder_hidden_states": (LENGTH, 6)}, _video_call,
        to_sample=lambda latents: latents.transpose(1, 2),
    )  # fmt: skip


def _cog(**config: Any) -> nn.Module:
    return random_network(
        "CogVideoXTransformer3DModel", num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
        time_embed_dim=8, text_embed_dim=6, num_layers=2, sample_width=8, sample_height=8, sample_frames=5,
        patch_size=2, max_text_seq_length=LENGTH, **config,
    )  # fmt: skip


def cogvideox() -> Tiny:
    """The 5B layout: rotary embedding, shifted zero-SNR schedule."""
    scheduler = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=1.0, timestep_spacing="trailing"
    )
    return Tiny(
        "cogvideox", "CogVideoXPipeline", _cog(use_rotary_positional_embeddings=True), scheduler, (4, 2, 8, 8),
        "transformer_blocks.0", "transformer_blocks.1", {"encoder_hidden_states": (LENGTH, 6)}, _video_call,
        kind="v_prediction", to_sample=lambda latents: latents.transpose(1, 2),
    )  # fmt: skip


def cogvideox_wide() -> Tiny:
    """The same on a latent of another aspect ratio, and with the 2B's shift of the schedule."""
    tiny = cogvideox()
    tiny.name, tiny.shape = "cogvideox_wide", (4, 2, 4, 8)
    tiny.scheduler = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=3.0, timestep_spacing="trailing"
    )
    tiny.call = lambda cond: {**_video_call(cond), "height": 32}
    return tiny


def cogvideox_patches() -> Tiny:
    """The layout of version 1.5: patches over two frames."""
    tiny = cogvideox()
    tiny.name = "cogvideox_1_5"
    tiny.network = _cog(use_rotary_positional_embeddings=True, patch_size_t=2, patch_bias=False)
    return tiny


def ltx() -> Tiny:
    network = random_network(
        "LTXVideoTransformer3DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16, num_layers=2, caption_channels=6,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, max_image_seq_len=4096
    )

    def call(cond: dict[str, Tensor]) -> dict[str, Any]:
        named = tokens(mask="prompt_attention_mask")(cond)
        return {**named, "height": 64, "width": 96, "num_frames": 9, "guidance_scale": 1.0}

    return Tiny(
        "ltx", "LTXPipeline", network, scheduler, (4, 2, 2, 3), "transformer_blocks.0", "transformer_blocks.1",
        {"encoder_hidden_states": (LENGTH, 6), "encoder_attention_mask": MASK}, call,
        to_sample=lambda latents: latents.transpose(1, 2).reshape(-1, 4, 2, 2, 3),
    )  # fmt: skip


def hunyuan_video() -> Tiny:
    network = random_network(
        "HunyuanVideoTransformer3DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8,
        num_layers=1, num_single_layers=1, num_refiner_layers=1, patch_size=2, text_embed_dim=6,
        pooled_projection_dim=7, rope_axes_dim=(4, 2, 2),
    )  # fmt: skip

    def call(cond: dict[str, Tensor]) -> dict[str, Any]:
        named = tokens(mask="prompt_attention_mask", pooled="pooled_prompt_embeds")(cond)
        return {**named, "height": 64, "width": 64, "num_frames": 5, "guidance_scale": 4.0}

    return Tiny(
        "hunyuan_video", "HunyuanVideoPipeline", network, diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        (4, 2, 8, 8), "transformer_blocks.0", "single_transformer_blocks.0",
        {"encoder_hidden_states": (LENGTH, 6), "encoder_attention_mask": MASK, "pooled_projections": (7,)}, call,
        guidance=4.0,
    )  # fmt: skip


MAKERS: dict[str, Callable[[], Tiny]] = {
    maker.__name__: maker
    for maker in (
        sd15, sd21, lcm, sdxl, pixart_sigma, pixart_alpha, sd3, sd35, sana, sana_sprint, lumina2, z_image, flux, flux2,
        qwen_image, wan, anyflow, cogvideox, cogvideox_wide, cogvideox_patches, ltx, hunyuan_video,
    )
}  # fmt: skip

__all__ = ["LENGTH", "MAKERS", "Tiny", "random_network"]
