"""Tiny random pipelines with text encoders and tokenizers, made offline: folders that stock diffusers loads.

Every folder also holds a network's configuration, as real ones do, but no weights of it: reading it must not be needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from lightning_distill.networks.specs import seeded

WORDS = """
a the red blue green yellow small large old new cat dog house tree car boat bird sun moon star
on in under over of and with photo drawing . , user assistant system
""".split()  # noqa: SIM905  # as a list, one word a line
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]
WIDTH, LENGTH = 8, 12
VOCABULARY = len(WORDS) + len(SPECIAL)
CHAT = "{% for m in messages %}{{ m['role'] }} {% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}{{ c['text'] }} {% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %} assistant{% endif %}"  # noqa: E501


def tokenizer(side: str = "right", length: int = LENGTH) -> Any:
    """Words of ``WORDS`` in lower case, with marks at both ends."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])]
    )
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        model_max_length=length, padding_side=side,
    )  # fmt: skip
    made.chat_template = CHAT
    return made


def random_model(cls: str, config: Any) -> Any:
    with seeded(0):
        return getattr(transformers, cls)(config).eval()


def clip(projection: bool = True, length: int = LENGTH) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=length, projection_dim=WIDTH, bos_token_id=2, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    return random_model("CLIPTextModelWithProjection" if projection else "CLIPTextModel", config)


def t5(cls: str = "T5EncoderModel") -> Any:
    config = (transformers.UMT5Config if cls.startswith("UMT5") else transformers.T5Config)(
        vocab_size=VOCABULARY, d_model=WIDTH, d_kv=4, d_ff=16, num_layers=2, num_heads=2, pad_token_id=0, eos_token_id=3
    )
    return random_model(cls, config)


def decoder(name: str, layers: int = 3, **more: Any) -> Any:
    """Gemma2Model, LlamaModel, Qwen3Model, Qwen3ForCausalLM."""
    family = name.removesuffix("Model").removesuffix("ForCausalLM")
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, pad_token_id=0, bos_token_id=2, eos_token_id=3, **more,
    )  # fmt: skip
    return random_model(name, config)


def mistral() -> Any:
    text = {
        "model_type": "mistral", "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 16,
        "num_hidden_layers": 31, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "model_type": "pixtral", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 4,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = transformers.Mistral3Config(text_config=text, vision_config=vision)
    return random_model("Mistral3ForConditionalGeneration", config)


def qwen_vl() -> Any:
    text = {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e4},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": WIDTH, "patch_size": 14
    }  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return random_model("Qwen2_5_VLForConditionalGeneration", config)


def save(folder: Path, pipeline: str, parts: dict[str, Any], network: dict[str, Any] | None = None) -> Path:
    """A pipeline's folder with the given parts and the configuration of a network whose weights are not there."""
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": diffusers.__version__}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
        library = "diffusers" if type(part).__module__.startswith("diffusers") else "transformers"
        index[name] = [library, type(part).__name__]
    network = network or {"_class_name": "FluxTransformer2DModel"}
    where = "unet" if network["_class_name"].startswith("UNet") else "transformer"
    (folder / where).mkdir(parents=True)
    (folder / where / "config.json").write_text(json.dumps(network))
    index[where] = ["diffusers", network["_class_name"]]
    index["vae"] = ["diffusers", "AutoencoderKL"]
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    if pipeline in ("StableDiffusionPipeline", "LatentConsistencyModelPipeline"):
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def sd15(folder: Path) -> Path:
    parts = {"tokenizer": tokenizer(), "text_encoder": clip(projection=False)}
    return save(
        folder, "StableDiffusionPipeline", parts, {"_class_name": "UNet2DConditionModel", "sample_size": 8}
    )  # fmt: skip


def lcm(folder: Path) -> Path:
    parts = {"tokenizer": tokenizer(), "text_encoder": clip(projection=False)}
    return save(
        folder, "LatentConsistencyModelPipeline", parts, {"_class_name": "UNet2DConditionModel", "sample_size": 8}
    )  # fmt: skip


def sdxl(folder: Path) -> Path:
    parts = {
        "tokenizer": tokenizer(), "text_encoder": clip(projection=False),
        "tokenizer_2": tokenizer(), "text_encoder_2": clip(),
    }  # fmt: skip
    return save(folder, "StableDiffusionXLPipeline", parts, {"_class_name": "UNet2DConditionModel", "sample_size": 8})


def pixart_sigma(folder: Path) -> Path:
    return save(folder, "PixArtSigmaPipeline", {"tokenizer": tokenizer(), "text_encoder": t5()})


def pixart_alpha(folder: Path) -> Path:
    network = {"_class_name": "PixArtTransformer2DModel", "sample_size": 128}
    return save(folder, "PixArtAlphaPipeline", {"tokenizer": tokenizer(), "text_encoder": t5()}, network)


def sd3(folder: Path) -> Path:
    parts = {
        "tokenizer": tokenizer(), "text_encoder": clip(), "tokenizer_2": tokenizer(), "text_encoder_2": clip(),
        "tokenizer_3": tokenizer(), "text_encoder_3": t5(),
    }  # fmt: skip
    network = {"_class_name": "SD3Transformer2DModel", "joint_attention_dim": 16}
    return save(folder, "StableDiffusion3Pipeline", parts, network)


def sd3_without_t5(folder: Path) -> Path:
    sd3(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"tokenizer_3": [None, None], "text_encoder_3": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def flux(folder: Path) -> Path:
    parts = {
        "tokenizer": tokenizer(), "text_encoder": clip(projection=False),
        "tokenizer_2": tokenizer(), "text_encoder_2": t5(),
    }  # fmt: skip
    return save(folder, "FluxPipeline", parts)


def flux2(folder: Path) -> Path:
    parts = {"tokenizer": tokenizer(), "text_encoder": mistral()}
    return save(folder, "Flux2Pipeline", parts, {"_class_name": "Flux2Transformer2DModel"})


def flux2_klein(folder: Path) -> Path:
    parts = {"tokenizer": tokenizer(), "text_encoder": decoder("Qwen3ForCausalLM", layers=28)}
    return save(folder, "Flux2KleinPipeline", parts, {"_class_name": "Flux2Transformer2DModel"})


def sana(folder: Path) -> Path:
    parts = {"tokenizer": tokenizer(length=400), "text_encoder": decoder("Gemma2Model")}
    return save(folder, "SanaPipeline", parts, {"_class_name": "SanaTransformer2DModel"})


def sana_sprint(folder: Path) -> Path:
    parts = {"tokenizer": tokenizer(length=400), "text_encoder": decoder("Gemma2Model")}
    return save(folder, "SanaSprintPipeline", parts, {"_class_name": "SanaTransformer2DModel"})


def qwen_image(folder: Path) -> Path:
    parts = {"tokenizer": tokenizer(length=400), "text_encoder": qwen_vl()}
    return save(folder, "QwenImagePipeline", parts, {"_class_name": "QwenImageTransformer2DModel"})


def lumina2(folder: Path) -> Path:
    parts = {"tokenizer": tokenizer(), "text_encoder": decoder("Gemma2Model")}
    return save(folder, "Lumina2Pipeline", parts, {"_class_name": "Lumina2Transformer2DModel"})


def z_image(folder: Path) -> Path:
    parts = {"tokenizer": tokenizer(), "text_encoder": decoder("Qwen3Model")}
    return save(folder, "ZImagePipeline", parts, {"_class_name": "ZImageTransformer2DModel"})


def wan(folder: Path) -> Path:
    parts = {"tokenizer": tokenizer(), "text_encoder": t5("UMT5EncoderModel")}
    return save(folder, "WanPipeline", parts, {"_class_name": "WanTransformer3DModel"})


def anyflow(folder: Path) -> Path:
    parts = {"tokenizer": tokenizer(), "text_encoder": t5("UMT5EncoderModel")}
    return save(folder, "AnyFlowPipeline", parts, {"_class_name": "AnyFlowTransformer3DModel"})


def cogvideox(folder: Path) -> Path:
    parts = {"tokenizer": tokenizer(), "text_encoder": t5()}
    return save(folder, "CogVideoXPipeline", parts, {"_class_name": "CogVideoXTransformer3DModel"})


def ltx(folder: Path) -> Path:
    parts = {"tokenizer": tokenizer(), "text_encoder": t5()}
    return save(folder, "LTXPipeline", parts, {"_class_name": "LTXVideoTransformer3DModel"})


def hunyuan_video(folder: Path) -> Path:
    parts = {
        "tokenizer": tokenizer(length=400), "text_encoder": decoder("LlamaModel"),
        "tokenizer_2": tokenizer(), "text_encoder_2": clip(projection=False, length=77),
    }  # fmt: skip
    return save(folder, "HunyuanVideoPipeline", parts, {"_class_name": "HunyuanVideoTransformer3DModel"})


def bert(folder: Path) -> Path:
    """A plain text model in a folder of its own."""
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    random_model("BertModel", config).save_pretrained(folder)
    tokenizer(length=64).save_pretrained(folder)
    return folder


def vae(folder: Path) -> Path:
    """The autoencoder of a pipeline's folder: latents (4, H / 2, W / 2)."""
    with seeded(0):
        made = diffusers.AutoencoderKL(
            block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=2,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, scaling_factor=0.5, sample_size=16,
        )  # fmt: skip
    with torch.no_grad():
        made.quant_conv.bias.zero_()
    made.save_pretrained(folder / "vae")
    return folder


MAKERS: dict[str, Callable[[Path], Path]] = {
    maker.__name__: maker
    for maker in (
        sd15, lcm, sdxl, pixart_sigma, pixart_alpha, sd3, sd3_without_t5, flux, flux2, flux2_klein, sana, sana_sprint,
        qwen_image, lumina2, z_image, wan, anyflow, cogvideox, ltx, hunyuan_video,
    )
}  # fmt: skip
