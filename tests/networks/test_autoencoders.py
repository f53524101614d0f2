"""Latents are those that stock pipelines encode and decode."""

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
    torch.testing.assert_close(codec.encode(image), expected[:, :, 0])
    assert codec.decode(codec.encode(image)).shape == (2, 3, 16, 16)
    assert any(isinstance(layer, nn.Conv3d) for layer in wan.modules())


def test_half_precision_is_avoided_where_it_overflows(folder):
    assert LatentCodec(folder, torch.float16).dtype == torch.float32  # AutoencoderKL says force_upcast
    assert LatentCodec(folder, torch.bfloat16).dtype == torch.bfloat16


def test_folders(folder, tmp_path):
    assert autoencoder_folder(folder) == autoencoder_folder(folder / "vae") == folder / "vae"
    identity = autoencoder_identity(folder)
    assert identity["autoencoder"] == "AutoencoderKL"
    assert list(identity["autoencoder_sha256"]) == ["diffusion_pytorch_model.safetensors"]
    with pytest.raises(FileNotFoundError, match="holds no autoencoder"):
        autoencoder_folder(tmp_path)
