"""Export folders: what is copied from the teacher, cards, LoRA files, and samples made from them by the command."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipelines import MAKERS, Tiny

from lightning_distill.commands.export import main as export_main
from lightning_distill.commands.sample import main as sample_main
from lightning_distill.export import export_denoiser, export_lora, export_pipeline, probe_cond, verify_export
from lightning_distill.export.folders import read_source, source_of
from lightning_distill.generation import draw_noise, generate
from lightning_distill.networks.lora import add_adapter
from lightning_distill.networks.specs import PretrainedDenoiser
from lightning_distill.processes import FlowMatching, VariancePreserving
from lightning_distill.times import few_step_times
from lightning_distill.zoo import zoo_path

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*eval mode", "ignore:Trying to infer", "ignore:Found .* module"
)


# ------------------------------------------------------------------------------------------------ folders and cards
def whole_pipeline(folder: Path) -> Tiny:
    """A pipeline with a text tower, a tokenizer and a decoder, all tiny and random."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    tiny = MAKERS["sd15"]()
    folder.mkdir()
    letters = list("abcdefghijklmnopqrstuvwxyz")
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)
    config = CLIPTextConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=len(vocabulary), max_position_embeddings=8, bos_token_id=52, eos_token_id=53, pad_token_id=53,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 4, 4, 4), norm_num_groups=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(config), tokenizer=tokenizer, unet=tiny.network, scheduler=tiny.scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    (folder / "README.md").write_text("---\nlicense: openrail++\nlicense_link: LICENSE.md\n---\n\n# a tiny model\n")
    return tiny


@pytest.fixture(scope="module")
def prompted(tmp_path_factory):
    """A full export and a LoRA export of one student of a whole pipeline."""
    root = tmp_path_factory.mktemp("prompted")
    whole_pipeline(root / "teacher-1")
    teacher = PretrainedDenoiser(str(root / "teacher-1")).build()
    student = add_adapter(teacher, "student", rank=2, alpha=3.0)
    with torch.no_grad():
        for key, parameter in student.adapter_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.1)
    times = few_step_times(teacher.process, 2)
    full = export_denoiser(student, times, "renoise", root / "full")
    return root, student, times, full, export_lora(student, times, "renoise", root / "lora")


def test_the_other_components_are_the_teachers(prompted):
    root, _, _, full, _ = prompted
    for part in ("text_encoder", "tokenizer", "vae"):
        theirs = {p.relative_to(root / "teacher-1"): p for p in (root / "teacher-1" / part).rglob("*") if p.is_file()}
        assert theirs
        assert all((full / name).read_bytes() == path.read_bytes() for name, path in theirs.items())
    pipe = diffusers.DiffusionPipeline.from_pretrained(full)
    assert type(pipe.scheduler).__name__ == "LCMScheduler"
    images = pipe("abc", num_inference_steps=2, guidance_scale=1.0, height=64, width=64, output_type="pt").images
    assert images.shape == (1, 3, 64, 64)
    for path in full.rglob("*"):
        assert path.is_dir() or str(root).encode() not in path.read_bytes()


def test_cards_state_call_licence_and_base(prompted):
    root, _, _, full, lora = prompted
    assert read_source(root / "teacher-1").license == "openrail++"
    assert read_source(zoo_path("fashion")).license == "apache-2.0"
    for folder, relation in ((full, "finetune"), (lora, "adapter")):
        text = (folder / "README.md").read_text()
        for part in (
            "license: openrail++", "license_link: LICENSE.md", "base_model: teacher-1", f"relation: {relation}",
            "num_inference_steps=2", "guidance_scale=1.0", "height=64", "keep guidance_scale=1.0",
            "The licence (openrail++) is that of teacher-1", "sha256 of",
        ):  # fmt: skip
            assert part in text, part
    text = (lora / "README.md").read_text()
    assert 'load_lora_weights(".", weight_name="pytorch_lora_weights.safetensors")  # lora_scale 1.0' in text
    assert (lora / "scheduler" / "scheduler_config.json").is_file()


def test_lora_tensors(prompted, tmp_path):
    """Names, and B A with its scale, in both styles; half precision as asked."""
    root, student, times, _, lora = prompted
    tensors = load_file(lora / "pytorch_lora_weights.safetensors")
    kohya = load_file(export_lora(student, times, "renoise", tmp_path / "k", style="kohya") / "lora.safetensors")
    layers = {key.removesuffix(".lora_A.weight") for key in tensors if ".lora_A." in key}
    assert len(tensors) == 2 * len(layers)
    assert len(kohya) == 3 * len(layers)
    for layer in layers:
        module = student.bank.layers[layer.removeprefix("unet.")]
        expected = module.get_delta_weight("student")
        up, down = tensors[f"{layer}.lora_B.weight"].flatten(1), tensors[f"{layer}.lora_A.weight"].flatten(1)
        if module.get_base_layer().weight.ndim == 2 or up.shape[1] == down.shape[0] == 2:
            torch.testing.assert_close((up @ down).reshape(expected.shape), expected)
        flat = "lora_unet_" + layer.removeprefix("unet.").replace(".", "_")
        up, down = kohya[f"{flat}.lora_up.weight"].flatten(1), kohya[f"{flat}.lora_down.weight"].flatten(1)
        scaled = up @ down * float(kohya[f"{flat}.alpha"]) / down.shape[0]
        torch.testing.assert_close(scaled.reshape(expected.shape), expected)
    half = export_lora(student, times, "renoise", tmp_path / "h", dtype=torch.bfloat16)
    assert {v.dtype for v in load_file(half / "pytorch_lora_weights.safetensors").values()} == {torch.bfloat16}
    # the check notices a missing adapter
    config = json.loads((lora / "distill_config.json").read_text())
    cond = probe_cond(student, 2, config["size"])
    generator = torch.Generator().manual_seed(0)
    noise = draw_noise((2, 4, 8, 8), generator)
    x0 = generate(student, noise, cond, times, generator=generator)
    assert verify_export(lora, x0, cond=cond, base=root / "teacher-1") <= 1e-5
    save_file({k: torch.zeros_like(v) for k, v in tensors.items()}, lora.parent / "zeros.safetensors")
    original = (lora / "pytorch_lora_weights.safetensors").read_bytes()
    (lora / "pytorch_lora_weights.safetensors").write_bytes((lora.parent / "zeros.safetensors").read_bytes())
    with pytest.raises(ValueError, match="makes other images"):
        verify_export(lora, x0, cond=cond, base=root / "teacher-1")
    (lora / "pytorch_lora_weights.safetensors").write_bytes(original)


def test_sampling_exported_folders(prompted, tmp_path, capsys):
    import numpy as np

    root, _, _, full, lora = prompted
    sample_main([str(full), "--prompt", "ab", "--prompt", "cd", "--out", str(tmp_path), "--seed", "3"])
    assert "samples.png" in capsys.readouterr().out
    arrays = np.load(tmp_path / "samples.npz")
    assert arrays["images"].shape == (2, 3, 64, 64)
    assert arrays["prompt"].tolist() == ["ab", "cd"]
    pipe = diffusers.DiffusionPipeline.from_pretrained(full)
    made = pipe(
        ["ab", "cd"], num_inference_steps=2, guidance_scale=1.0, height=64, width=64, output_type="pt",
        generator=torch.Generator().manual_seed(3),
    ).images  # fmt: skip
    np.testing.assert_allclose(arrays["x0"], made.numpy() * 2 - 1, atol=1e-5)
    sample_main([str(lora), "--base", str(root / "teacher-1"), "--prompt", "ab", "--prompt", "cd", "--out",
                 str(tmp_path / "l"), "--seed", "3"])  # fmt: skip
    np.testing.assert_allclose(np.load(tmp_path / "l" / "samples.npz")["x0"], arrays["x0"], atol=1e-4)
    save_file({"encoder_hidden_states": torch.randn(3, 5, 8)}, tmp_path / "e.safetensors")
    sample_main([str(full), "--embeddings", str(tmp_path / "e.safetensors"), "--out", str(tmp_path / "e")])
    assert np.load(tmp_path / "e" / "samples.npz")["images"].shape == (3, 3, 64, 64)
    for words, message in (
        ([str(full)], "is conditioned on text; give --prompt"),
        ([str(full), "--steps", "3"], "is an exported folder, and --steps is for a run"),
        ([str(full), "--guidance", "0"], "is an exported folder, and --guidance is for a run"),
        ([str(lora), "--prompt", "a"], "is a LoRA file; give the pipeline folder of its base model as --base"),
        ([str(full), "--embeddings", "nowhere"], "there is no such file"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            sample_main([*words, "--out", str(tmp_path / "x")])


def test_sampling_folders_without_encoders(tmp_path):
    import numpy as np

    tiny = MAKERS["flux"]()
    student = tiny.denoiser()
    out = export_denoiser(student, [1.0], "ode", tmp_path / "out", shape=tiny.shape)
    text = (out / "README.md").read_text()
    assert 'from_pretrained(\n    "BASE_MODEL"' in text
    assert "license: " not in text
    assert "The licence is that of the base model" in text
    with pytest.raises(ValueError, match="has no text encoder, so it cannot read a prompt"):
        sample_main([str(out), "--prompt", "a"])
    cond = tiny.cond(2)
    save_file(cond, tmp_path / "e.safetensors")
    sample_main([str(out), "--embeddings", str(tmp_path / "e.safetensors"), "--seed", "4"])
    x0 = generate(student, draw_noise((2, *tiny.shape), torch.Generator().manual_seed(4)), cond, [1.0], "ode")
    np.testing.assert_allclose(np.load(out / "samples.npz")["x0"], x0.numpy(), atol=1e-4)


def test_sampling_class_folders(tmp_path):
    import numpy as np

    from lightning_distill.networks.small import small_unet

    network = small_unet(8, 1, 3, (8, 16), norm_num_groups=4, attention_head_dim=8)
    process = VariancePreserving(zero_terminal_snr=True)
    out = export_pipeline(network, process, "v_prediction", [1.0], "renoise", tmp_path / "out", null_class=3)
    sample_main([str(out), "--n", "4", "--classes", "2", "0"])
    arrays = np.load(out / "samples.npz")
    assert arrays["class_labels"].tolist() == [2, 0, 2, 0]
    assert arrays["images"].shape == (4, 1, 8, 8)
    with pytest.raises(ValueError, match=r"--classes \[3\]: the student knows the classes 0 to 2"):
        sample_main([str(out), "--classes", "3"])


def test_half_precision_components_are_copied_under_plain_names(tmp_path):
    tiny = MAKERS["sd3"]()
    source = tiny.save(tmp_path / "base")
    index = json.loads((source / "model_index.json").read_text())
    index |= {"text_encoder": ["transformers", "CLIPTextModel"], "vae": ["diffusers", "AutoencoderKL"]}
    index |= {"text_encoder_2": [None, None]}
    (source / "model_index.json").write_text(json.dumps(index))
    for part, names in {
        "text_encoder": ("config.json", "model.fp16.safetensors", "pytorch_model.bin"),
        "vae": ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors"),
    }.items():
        (source / part).mkdir()
        for name in names:
            (source / part / name).write_text(name)
    split = {"weight_map": {"a": "model.fp16-00001-of-00002.safetensors"}}
    (source / "text_encoder" / "model.safetensors.index.fp16.json").write_text(json.dumps(split))
    out = export_pipeline(
        tiny.network, FlowMatching(), "flow_prediction", [1.0], "ode", tmp_path / "out", source=source
    )
    have = {
        p.relative_to(out).as_posix(): p.read_text() for p in out.rglob("*") if p.parent.name in ("text_encoder", "vae")
    }
    assert have["text_encoder/model.safetensors"] == "model.fp16.safetensors"
    assert have["vae/diffusion_pytorch_model.safetensors"] == "diffusion_pytorch_model.safetensors"
    assert "model-00001-of-00002.safetensors" in have["text_encoder/model.safetensors.index.json"]
    assert len(have) == 4
    assert "states no licence in its folder" in (out / "README.md").read_text()
    assert json.loads((out / "model_index.json").read_text())["scheduler"][1] == "FlowMatchEulerDiscreteScheduler"
    with pytest.raises(ValueError, match="is no pipeline folder"):
        export_pipeline(
            tiny.network, FlowMatching(), "flow_prediction", [1.0], "ode", tmp_path / "n", source=tmp_path / "nowhere"
        )


def test_networks_remember_their_folder(tmp_path):
    tiny = MAKERS["sd3"]()
    folder = tiny.save(tmp_path / "base")
    teacher = PretrainedDenoiser(str(folder)).build()
    assert source_of(teacher.network) == folder
    assert source_of(add_adapter(teacher, "student", rank=2).network) == folder
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    single = PretrainedDenoiser(str(file), config_path=str(folder)).build()
    assert source_of(single.network) == folder
    assert source_of(MAKERS["sd3"]().network) is None


def test_export_command_refuses_before_reading(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="give another folder, or --overwrite"):
        export_main([str(tmp_path / "run"), str(tmp_path / "out"), "--lora", "kohya"])
