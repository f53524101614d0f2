"""Training from stores: what batches hold, how weights draw, one size per batch, and whose encoder it was."""

import json
import shutil
from types import SimpleNamespace

import pytest
import tiny_text
import torch

from lightning_distill.data import CachedConditions, CachedLatents, StoreWriter
from lightning_distill.data.buckets import BucketLoader
from lightning_distill.data.cached import StoreSource, open_stores
from lightning_distill.networks.autoencoders import autoencoder_identity
from lightning_distill.networks.specs import PretrainedDenoiser
from lightning_distill.networks.text import text_digest


def store(folder, n=40, weights=None, latent=(4, 6, 6), scale=1.0, key=None, latents=True):
    """Record i has the tokens i, so that every batch tells which records it is made of."""
    writer = StoreWriter(folder, key or {"what": "test"}, n, shard_size=7)
    x0 = scale * torch.randn(n, *latent, generator=torch.Generator().manual_seed(0))
    for shard in writer.missing():
        rows = writer.rows(shard)
        index = torch.arange(rows.start, rows.stop)
        tensors = {
            "encoder_hidden_states": index[:, None, None].expand(-1, 3, 2).to(torch.bfloat16),
            "text_embeds": index[:, None].float(),
        }
        if latents:
            tensors["x0"] = x0[index].half()
        facts = [{"prompt": f"prompt {i}", "weight": 1.0 if weights is None else weights[i]} for i in rows]
        writer.write(shard, tensors, facts)
    return folder


def test_prompts_alone(tmp_path):
    data = CachedConditions(str(store(tmp_path / "s")), batch_size=8, seed=3)
    data.setup("fit")
    seen = []
    for batch in data.train_dataloader():
        assert batch.x0 is None
        assert batch.size == 8
        assert batch.cond["encoder_hidden_states"].dtype == torch.bfloat16
        assert torch.equal(batch.cond["encoder_hidden_states"][:, 0, 0].float(), batch.cond["text_embeds"][:, 0])
        seen += batch.cond["text_embeds"][:, 0].int().tolist()
    assert sorted(seen) == list(range(40))
    assert seen != sorted(seen)
    assert data.prompts[39] == "prompt 39"


def test_chosen_conditions(tmp_path):
    store(tmp_path / "s")
    data = CachedConditions(str(tmp_path / "s"), cond_keys=["text_embeds"], batch_size=8)
    assert set(next(iter(data.train_dataloader())).cond) == {"text_embeds"}
    with pytest.raises(ValueError, match=r"has no 'pooled_projections'; it has the conditions encoder_hidden_states, "):
        CachedConditions(str(tmp_path / "s"), cond_keys=["pooled_projections"])


def test_latents_and_their_scaling(tmp_path):
    data = CachedLatents(str(store(tmp_path / "s")), batch_size=8)
    data.setup("fit")
    assert data.shape == (4, 6, 6)
    batch = next(iter(data.train_dataloader()))
    assert batch.x0.dtype == torch.float32
    expected = torch.randn(40, 4, 6, 6, generator=torch.Generator().manual_seed(0)).half().float()
    assert torch.equal(batch.x0, expected[batch.cond["text_embeds"][:, 0].long()])
    with pytest.raises(ValueError, match=r"CachedLatents has a standard deviation of 5\.\d+, but sigma_data=1 is"):
        CachedLatents(str(store(tmp_path / "raw", scale=5.5))).setup("fit")
    CachedLatents(str(tmp_path / "raw"), sigma_data=5.5).setup("fit")
    with pytest.raises(ValueError, match="holds no latents; write one with lightning-distill cache --images"):
        CachedLatents(str(store(tmp_path / "text", latents=False)))


@pytest.mark.parametrize("seed", [0, 1])
def test_records_are_drawn_by_their_weights(tmp_path, seed):
    weights = [0.0, 1.0, 2.5, 0.0, 0.3] * 8
    source = StoreSource(open_stores(store(tmp_path / "s", weights=weights)), ["text_embeds"], False, seed)
    expected = torch.tensor(weights) / sum(weights) * 40
    total = torch.zeros(40)
    for epoch in range(60):
        counts = torch.bincount(source.records(torch.arange(40), epoch), minlength=40)
        assert ((counts - expected).abs() < 1).all()  # systematic: rounded up or down, in every epoch
        assert counts[expected == 0].sum() == 0
        total += counts
    assert (total / 60 - expected).abs().max() < 0.25
    some = torch.tensor([5, 39, 0])
    assert torch.equal(source.records(some, 3), source.records(torch.arange(40), 3)[some])


def test_nothing_to_draw(tmp_path):
    data = CachedConditions(str(store(tmp_path / "s", weights=[0.0] * 40)))
    with pytest.raises(ValueError, match=r"every record of .* has the weight 0"):
        data.setup("fit")


@pytest.mark.parametrize("weights", [(1.0, 9.0), (2.0, 0.5)], ids=["rare-frequent", "frequent-rare"])
def test_sizes_are_drawn_by_their_weights(tmp_path, weights):
    """Also where all records of one size weigh the same."""
    for name, weight, latent in (("a", weights[0], (4, 6, 6)), ("b", weights[1], (4, 4, 9))):
        store(tmp_path / name, n=64, weights=[weight] * 64, latent=latent)
    data = CachedLatents(str(tmp_path), batch_size=4)
    data.setup("fit")
    share = weights[0] / sum(weights)
    drawn = torch.zeros(2)
    for batch in data.train_dataloader():
        drawn[int(batch.x0.shape[1:] == (4, 4, 9))] += batch.size
    assert drawn.sum() >= 128 - 2 * 4
    assert (drawn - 128 * torch.tensor([share, 1 - share])).abs().max() < 5  # the tail of a size is left out
    total = torch.zeros(128)
    for epoch in range(40):
        total += torch.bincount(data.source.records(torch.arange(128), epoch), minlength=128)
    expected = 2 * torch.tensor([share, 1 - share]).repeat_interleave(64)
    assert (total / 40 - expected).abs().max() < 0.3
    assert (total.reshape(2, 64).sum(1) / 40 - 128 * torch.tensor([share, 1 - share])).abs().max() < 1


def test_sizes_of_the_same_mean_weight_keep_their_places(tmp_path):
    for name, n in (("a", 30), ("b", 21), ("c", 3)):
        store(tmp_path / name, n=n, weights=[0.3] * n)
    source = StoreSource(open_stores(tmp_path), ["text_embeds"], False)
    assert source.sizes == [30, 21, 3]
    assert torch.equal(source.records(torch.arange(54), 2), torch.arange(54))


def test_a_size_of_broken_pictures_is_left_out(tmp_path):
    store(tmp_path / "a", n=1, weights=[0.0], latent=(4, 9, 4))
    for name, latent in (("b", (4, 6, 6)), ("c", (4, 4, 9))):
        store(tmp_path / name, n=20, latent=latent)
    for several in (True, False):
        data = CachedLatents(str(tmp_path), batch_size=4)
        data.setup("fit")
        shapes = {tuple(batch.x0.shape[1:]) for batch in data.train_dataloader()}
        assert shapes == ({(4, 6, 6), (4, 4, 9)} if several else {(4, 6, 6)})
        assert data.shape == (4, 6, 6)
        assert next(iter(data.val_dataloader())).x0.shape == (4, 4, 6, 6)
        shutil.rmtree(tmp_path / "c", ignore_errors=True)


def test_stores_of_other_encoders_are_not_mixed(tmp_path):
    store(tmp_path / "a", key={"text_encoder": "ab" * 32, "size": [8, 8], "records": "x"})
    store(tmp_path / "b", key={"text_encoder": "ab" * 32, "size": [8, 16], "records": "y"})
    assert len(open_stores(tmp_path)) == 2
    store(tmp_path / "c", key={"text_encoder": "cd" * 32, "size": [16, 8], "records": "z"})
    with pytest.raises(ValueError, match=r"c holds a store with text_encoder=sha256 cdcdcdcdcdcd, not sha256 abab"):
        CachedLatents(str(tmp_path))


def test_several_sizes(tmp_path):
    for name, n, latent in (("a", 30, (4, 6, 6)), ("b", 21, (4, 4, 9)), ("c", 3, (4, 9, 4))):
        store(tmp_path / "sizes" / name, n=n, latent=latent)
    data = CachedLatents(str(tmp_path / "sizes"), batch_size=4)
    data.setup("fit")
    with pytest.warns(UserWarning, match=r"1 of the 3 sizes have fewer samples \(3\)"):
        loader = data.train_dataloader()
    assert isinstance(loader, BucketLoader)
    shapes = [tuple(batch.x0.shape[1:]) for batch in loader]
    assert len(shapes) == 7 + 5
    assert set(shapes) == {(4, 6, 6), (4, 4, 9)}
    assert next(iter(data.val_dataloader())).x0.shape == (4, 4, 6, 6)
    with pytest.raises(ValueError, match="a batch of several sizes was asked for"):
        data.source.gather(torch.tensor([0, 40]), 0)
    store(tmp_path / "other" / "a", n=20)
    store(tmp_path / "other" / "b", n=20, scale=3.0)
    with pytest.raises(ValueError, match="other/b has a standard deviation of 3"):
        CachedLatents(str(tmp_path / "other")).setup("fit")
    store(tmp_path / "mixed" / "a")
    store(tmp_path / "mixed" / "b", latents=False)
    with pytest.raises(ValueError, match="hold different tensors"):
        CachedLatents(str(tmp_path / "mixed"))


def test_the_position_survives(tmp_path):
    for name, latent in (("a", (4, 6, 6)), ("b", (4, 4, 9))):
        store(tmp_path / "sizes" / name, latent=latent)
    data = CachedLatents(str(tmp_path / "sizes"), batch_size=4, seed=5)
    whole = [batch.cond["text_embeds"] for batch in data.train_dataloader()]
    loader = data.train_dataloader()
    batches = iter(loader)
    for _ in range(6):
        next(batches)
    again = data.train_dataloader()
    again.load_state_dict(loader.state_dict())
    rest = [batch.cond["text_embeds"] for batch in again]
    assert len(rest) == len(whole) - 6
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[6:]))


def test_no_store(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no store; write one with lightning-distill cache"):
        CachedConditions(str(tmp_path))
    store(tmp_path / "s")
    (tmp_path / "s" / "shard_000002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"is not complete: 1 of 6 shards are missing or damaged"):
        CachedConditions(str(tmp_path / "s"))


def test_another_text_encoder_or_autoencoder_is_refused(tmp_path):
    mine = tiny_text.vae(tiny_text.sdxl(tmp_path / "mine"))
    other = tiny_text.vae(tiny_text.sd15(tmp_path / "other"))
    key = {"text_encoder": text_digest(mine), **autoencoder_identity(mine)}
    path = str(store(tmp_path / "s", key=key))

    def of_teacher(folder, kind=CachedLatents):
        data = kind(path)
        teacher = PretrainedDenoiser(str(folder))
        module = SimpleNamespace(teacher_source=teacher)
        data.trainer = SimpleNamespace(lightning_module=module)
        return data

    of_teacher(mine).setup("fit")
    with pytest.raises(ValueError, match=r"was made with another text encoder .* than that of .*other"):
        of_teacher(other, CachedConditions).setup("fit")
    with pytest.raises(ValueError, match="another text encoder"):
        CachedConditions(path, pipeline=str(other)).setup("fit")
    # the same text encoder, another autoencoder: only latents care
    weights = mine / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    CachedConditions(path, pipeline=str(mine)).setup("fit")
    with pytest.raises(ValueError, match="was made with another autoencoder"):
        CachedLatents(path, pipeline=str(mine)).setup("fit")
    content[-1] ^= 1  # the same weights, another normalisation
    weights.write_bytes(bytes(content))
    CachedLatents(path, pipeline=str(mine)).setup("fit")
    settings = json.loads((mine / "vae" / "config.json").read_text())
    (mine / "vae" / "config.json").write_text(json.dumps({**settings, "scaling_factor": 0.25}))
    CachedConditions(path, pipeline=str(mine)).setup("fit")
    with pytest.raises(ValueError, match=r"were scaled by .* says \{'scaling_factor.: 0.25"):
        CachedLatents(path, pipeline=str(mine)).setup("fit")
    of_teacher(tmp_path / "nowhere").setup("fit")  # not known: nothing to compare
