"""Latents are those that stock pipelines encode and decode."""

import json

import diffusers
import pytest
import tiny_text
import torch
from torch import nn

from lightning_distill.networks.autoencoders import LatentCodec, autoencoder_folder, autoencoder_identity
from lightning_distill.networks.specs import seeded


@pytest.fixture
def folder(tmp_path):
    return tiny_text.vae(tmp_path / "pipeline")


def pictures(*shape):
    return torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_pictures_are_encoded_and_decoded_as_by_the_pipeline(folder):
    codec = LatentCodec(folder)
    stock = diffusers.AutoencoderKL.from_pretrained(folder / "vae").eval()
    x = pictures(16, 24)
    with torch.no_grad():
        posterior = stock.encode(x).latent_dist
        torch.testing.assert_close(codec.encode(x), posterior.mean * 0.5)
        noise = torch.randn(2, 4, 8, 12)
        drawn = (posterior.mean + posterior.std * noise) * 0.5
        torch.testing.assert_close(codec.encode(x, lambda shape: noise), drawn)
        x0 = torch.randn(2, 4, 8, 12)
        torch.testing.assert_close(codec.decode(x0), stock.decode(x0 / 0.5).sample.clamp(-1, 1))
    assert codec.encode(x).shape == (2, 4, 8, 12)
    assert not codec.video
    with pytest.raises(ValueError, match="AutoencoderKL encodes pictures"):
        codec.encode(pictures(3, 16, 16))


def test_a_tiny_autoencoder_decodes_samples_directly(tmp_path):
    with seeded(0):
        tiny = diffusers.AutoencoderTiny(
            encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4), num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1), latent_channels=4,
        ).eval()  # fmt: skip
    tiny.save_pretrained(tmp_path / "tiny")
    codec = LatentCodec(tmp_path / "tiny")
    x0 = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(codec.decode(x0), tiny.decode(x0).sample.clamp(-1, 1))
        torch.testing.assert_close(codec.encode(pictures(16, 16)), tiny.encode(pictures(16, 16)).latents)


def test_videos_and_pictures_of_a_video_autoencoder(tmp_path):
    mean, std = [0.1, -0.2], [2.0, 0.5]
    with seeded(0):
        wan = diffusers.AutoencoderKLWan(
            base_dim=3, z_dim=2, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
            latents_mean=mean, latents_std=std,
        ).eval()  # fmt: skip
    wan.save_pretrained(tmp_path / "vae")
    codec = LatentCodec(tmp_path)
    assert codec.video
    video = pictures(5, 16, 16)
    m, s = (torch.tensor(v).view(1, 2, 1, 1, 1) for v in (mean, std))
    with torch.no_grad():
        expected = (wan.encode(video).latent_dist.mean - m) / s
    x0 = codec.encode(video)
    torch.testing.assert_close(x0, expected)
    assert x0.shape == (2, 2, 2, 2, 2)
    assert codec.decode(x0).shape == (2, 3, 5, 16, 16)
    image = video[:, :, 0]
    with torch.no_grad():
        expected = (wan.encode(image[:, :, None]).latent_dist.mean - m) / s
    torch.testing.assert_close(codec.encode(image), expected)  # (B, C, 1, h, w), as the network of videos takes it
    assert codec.decode(codec.encode(image)).shape == (2, 3, 1, 16, 16)
    assert any(isinstance(layer, nn.Conv3d) for layer in wan.modules())


def test_pictures_of_qwen_image_have_no_frame(tmp_path):
    with seeded(0):
        qwen = diffusers.AutoencoderKLQwenImage(
            base_dim=3, z_dim=2, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1, -0.2],
            latents_std=[2.0, 0.5],
        ).eval()  # fmt: skip
    qwen.save_pretrained(tmp_path / "vae")
    codec, image = LatentCodec(tmp_path), pictures(16, 16)
    m, s = (torch.tensor(v).view(1, 2, 1, 1) for v in ([0.1, -0.2], [2.0, 0.5]))
    with torch.no_grad():
        expected = (qwen.encode(image[:, :, None]).latent_dist.mean[:, :, 0] - m) / s
    torch.testing.assert_close(codec.encode(image), expected)
    assert codec.decode(codec.encode(image)).shape == (2, 3, 16, 16)


def tiny_autoencoder(name):
    """Autoencoder, pixels along a side and frames of one latent."""
    four = {"block_out_channels": (4, 4, 4, 4), "norm_num_groups": 2, "latent_channels": 2, "layers_per_block": 1}
    if name == "flux2":  # folds 2 x 2
        down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
        two = {**four, "block_out_channels": (4, 4)}
        return diffusers.AutoencoderKLFlux2(**two, down_block_types=down, up_block_types=up), 4, 1
    if name == "dc":
        three = {"block_out_channels": (4, 4, 4), "layers_per_block": (1, 1, 1), "qkv_multiscales": ((), (), ())}
        parts = {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in three.items()}
        types = {"encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock"}
        return (
            diffusers.AutoencoderDC(latent_channels=2, attention_head_dim=2, scaling_factor=0.4, **parts, **types),
            4,
            1,
        )
    if name == "cogvideox":
        down, up = ("CogVideoXDownBlock3D",) * 4, ("CogVideoXUpBlock3D",) * 4
        return diffusers.AutoencoderKLCogVideoX(**four, down_block_types=down, up_block_types=up), 8, 4
    if name == "hunyuan":
        return diffusers.AutoencoderKLHunyuanVideo(**four, mid_block_add_attention=False), 8, 4
    assert name == "ltx"
    return diffusers.AutoencoderKLLTXVideo(
        latent_channels=2, block_out_channels=(4, 4, 4, 4), decoder_block_out_channels=(4, 4, 4, 4),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, True, False), decoder_spatio_temporal_scaling=(True, True, True, False),
        decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4, upsample_factor=(1,) * 4,
    ), 32, 8  # fmt: skip


@pytest.mark.parametrize("name", ["flux2", "dc", "cogvideox", "hunyuan", "ltx"])
def test_factors_are_those_by_which_latents_are_smaller(name, tmp_path):
    with seeded(0):
        made, side, step = tiny_autoencoder(name)
    made.eval().save_pretrained(tmp_path / "vae")
    codec = LatentCodec(tmp_path)
    assert codec.factors == (step, side)
    assert codec.encode(pictures(2 * side, side)).shape[-2:] == (2, 1)
    if codec.video:
        assert codec.encode(pictures(1 + 2 * step, side, side)).shape[2:] == (3, 1, 1)


def test_what_would_be_cut_off_is_refused(folder, tmp_path):
    codec = LatentCodec(folder)
    with pytest.raises(ValueError, match=r"rest of 17 x 24; give multiples of 2, such as 16 x 24 or 18 x 24\.$"):
        codec.encode(pictures(17, 24))
    with pytest.raises(ValueError, match=r"rest of 1 x 16; give multiples of 2, such as 2 x 16\.$"):
        codec.encode(pictures(1, 16))
    with seeded(0):
        made, _, _ = tiny_autoencoder("cogvideox")
    made.save_pretrained(tmp_path / "video")
    codec = LatentCodec(tmp_path / "video")
    assert codec.encode(pictures(5, 16, 16)).shape == (2, 2, 2, 2, 2)
    for frames in (4, 6, 8):
        near = "1 or 5" if frames < 5 else "5 or 9"
        with pytest.raises(ValueError, match=rf"one of every 4 .* rest of {frames} frames; give {near}\.$"):
            codec.encode(pictures(frames, 16, 16))
    with pytest.raises(ValueError, match="multiples of 8, such as 24 x 24 or 32 x 32"):
        codec.encode(pictures(30, 30))


def test_half_precision_is_avoided_where_it_overflows(folder):
    assert LatentCodec(folder, torch.float16).dtype == torch.float32  # AutoencoderKL says force_upcast
    assert LatentCodec(folder, torch.bfloat16).dtype == torch.bfloat16


def test_folders(folder, tmp_path):
    assert autoencoder_folder(folder) == autoencoder_folder(folder / "vae") == folder / "vae"
    identity = autoencoder_identity(folder)
    assert identity["autoencoder"] == "AutoencoderKL"
    assert list(identity["autoencoder_sha256"]) == ["diffusion_pytorch_model.safetensors"]
    assert identity["autoencoder_scale"] == {"scaling_factor": 0.5}
    file = folder / "vae" / "config.json"
    config = json.loads(file.read_text())
    for changed in ({"scaling_factor": 5.0}, {"shift_factor": 0.1}, {"latents_mean": [0.0] * 4}):
        file.write_text(json.dumps(config | changed))
        assert autoencoder_identity(folder) != identity
    file.write_text(json.dumps(config | {"sample_size": 99, "_diffusers_version": "0"}))
    assert autoencoder_identity(folder) == LatentCodec(folder).identity() == identity
    with pytest.raises(FileNotFoundError, match="holds no autoencoder"):
        autoencoder_folder(tmp_path)
