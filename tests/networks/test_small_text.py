"""The small text-conditional UNet: its size, that it reads its text, its null condition, its stock pipeline."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from lightning_distill.commands.export import export_module
from lightning_distill.methods import DMD2
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.small import small_text_unet
from lightning_distill.networks.specs import NewDenoiser, seeded
from lightning_distill.processes import VariancePreserving

WIDTH = 8


def tiny():
    with seeded(0):
        network = small_text_unet(16, 3, WIDTH, (8, 8), 1, norm_num_groups=4, pooling_heads=2)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return network


def spec(**settings):
    process = VariancePreserving("squaredcos_cap_v2", zero_terminal_snr=True)
    return NewDenoiser(tiny, process, "v_prediction", sigma_data=0.6, **settings)


def test_size_and_shape():
    network = small_text_unet()
    assert 1.5e6 < sum(p.numel() for p in network.parameters()) < 2.5e6
    assert Denoiser(network, VariancePreserving(), "v_prediction").sample_shape == (3, 32, 32)
    types = [type(block).__name__ for block in network.down_blocks]
    assert types == ["DownBlock2D"] * 2 + ["CrossAttnDownBlock2D"] * 2
    with pytest.raises(ValueError, match=r"of 2 levels 1 to 2 can attend"):
        small_text_unet(block_out_channels=(8, 8), cross_attention_levels=3)
    with pytest.raises(ValueError, match=r"of 4 levels 1 to 4 can attend"):
        small_text_unet(cross_attention_levels=0)


def test_both_ways_of_the_text_matter():
    """Through attention, and through the pool that is added to the time embedding; with both cut nothing is left."""
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([500.0])
    a, b = torch.randn(2, 1, 5, WIDTH)

    def change(*cut):
        network = tiny()
        found = [p for name, p in network.named_parameters() if any(part in name for part in cut)]
        assert bool(found) == bool(cut)
        for parameter in found:
            torch.nn.init.zeros_(parameter)
        return (network(x, t, a).sample - network(x, t, b).sample).abs().max().item()

    assert change() > 1e-3
    assert change("attn2.to_v") > 1e-3
    assert change("add_embedding") > 1e-3
    assert change("attn2.to_v", "add_embedding") == 0.0


def test_null_condition_of_a_new_network(tmp_path):
    file, null = tmp_path / "null_cond.safetensors", torch.randn(1, 5, WIDTH)
    save_file({"encoder_hidden_states": null}, file)
    given = spec(null_cond=str(file))
    given.check()
    cond = {"encoder_hidden_states": torch.randn(3, 5, WIDTH)}
    assert torch.equal(given.build().null_cond(cond)["encoder_hidden_states"], null.expand(3, 5, WIDTH))
    assert spec().build().missing_null(cond) == ["encoder_hidden_states"]


def test_bad_files_are_refused_before_anything_is_built(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"NewDenoiser\(null_cond='nothing.safetensors'\): .*cache writes it"):
        spec(null_cond="nothing.safetensors").check()
    (tmp_path / "null.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="is damaged or incomplete"):
        spec(null_cond=str(tmp_path / "null.safetensors")).check()
    save_file({"encoder_hidden_states": torch.zeros(2, 5, WIDTH)}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match=r"give one row, \(1, ...\)"):
        spec(null_cond=str(tmp_path / "two.safetensors")).build()


@pytest.mark.parametrize("steps", [1, 4])
def test_stock_pipeline_samples_the_pixels(tmp_path, steps):
    """StableDiffusionPipeline without autoencoder, text encoder or tokenizer: its latents are our pictures."""
    module = DMD2(spec(), num_steps=steps)
    module.configure_model()
    folder, difference = export_module(module.eval(), tmp_path / "out", fresh=False)
    assert difference < 1e-5
    assert (folder / "model_index.json").read_text().count("StableDiffusionPipeline") == 1
