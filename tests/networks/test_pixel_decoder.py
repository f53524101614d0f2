"""Pictures of latents with a gradient: known answers, files, and runs whose losses look at pixels."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import tiny_pipelines
import tiny_text
import torch
import torchvision
from lightning.pytorch import Trainer
from safetensors.torch import load_file, save_file
from small_problems import ready
from torch import nn

from lightning_distill.batch import Batch
from lightning_distill.checkpoints import read_checkpoint
from lightning_distill.data import InMemory, ResumableLoader
from lightning_distill.losses.audio import DecodedLoss
from lightning_distill.methods import DMD2, KnowledgeDistillation
from lightning_distill.methods.perceiving import check_perceptual, perceived
from lightning_distill.metrics import PerceptualDistance
from lightning_distill.networks.autoencoders import LatentCodec
from lightning_distill.networks.pixel_decoder import PixelDecoder
from lightning_distill.networks.roles import Lora
from lightning_distill.networks.specs import seeded

pytestmark = pytest.mark.filterwarnings("ignore:ConstantEMA", "ignore:.*eval mode", "ignore:You defined a")


def kl(folder, **settings):
    """A random AutoencoderKL of four latent channels, (4, h, w) to (3, 2h, 2w)."""
    with seeded(0):
        made = diffusers.AutoencoderKL(
            block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=2,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, sample_size=16, **settings,
        )  # fmt: skip
    made.save_pretrained(folder)
    return folder


def tiny(folder, **settings):
    """A random AutoencoderTiny of the same shapes."""
    with seeded(0):
        made = diffusers.AutoencoderTiny(
            encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4), num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1), latent_channels=4, **settings,
        )  # fmt: skip
    made.save_pretrained(folder)
    return folder


@pytest.fixture(params=["kl", "tiny"])
def folder(request, tmp_path):
    if request.param == "kl":
        return kl(tmp_path / "vae", scaling_factor=0.5, shift_factor=0.1)
    return tiny(tmp_path / "vae")


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    torch.manual_seed(4)
    file = tmp_path_factory.mktemp("alex") / "alexnet.safetensors"
    features = torchvision.models.alexnet(weights=None).features.state_dict()
    save_file({f"features.{k}": v for k, v in features.items()}, str(file))
    return str(file)


def latents(*shape, n=2, seed=0, dtype=torch.float32):
    return torch.randn(n, 4, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ------------------------------------------------------------------------------------------------ known answers
def test_the_gradient_is_that_of_finite_differences(folder):
    """Of a random projection of the pictures, in float64, along random directions and for the whole Jacobian."""
    decoder = PixelDecoder(str(folder), dtype="float64")
    x = latents(2, 3, n=1, dtype=torch.float64).requires_grad_()
    assert decoder(x).shape == (1, 3, 4, 6)
    assert torch.autograd.gradcheck(decoder, (x,), eps=1e-6, atol=1e-7)


@pytest.mark.parametrize(("scale", "shift"), [(0.18215, None), (1.5305, 0.0609)])
def test_scaling_and_shift_are_those_of_the_stock_pipelines(tmp_path, scale, shift):
    """decode( x / scaling_factor + shift_factor ): the map that takes samples back, and encode's inverse."""
    folder = kl(tmp_path / "vae", scaling_factor=scale, shift_factor=shift)
    stock, x = diffusers.AutoencoderKL.from_pretrained(folder).eval(), 0.1 * latents(4, 4)
    decoder, codec = PixelDecoder(str(tmp_path)), LatentCodec(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(decoder(x), stock.decode(x / scale + (shift or 0.0)).sample)
    pictures = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    encoded = codec.encode(pictures)
    with torch.no_grad():
        z = stock.encode(pictures).latent_dist.mode()
    torch.testing.assert_close(encoded, (z - (shift or 0.0)) * scale)
    torch.testing.assert_close(decoder(encoded).clamp(-1, 1), codec.decode(encoded))
    with torch.no_grad():
        torch.testing.assert_close(decoder(encoded), stock.decode(z).sample, atol=1e-5, rtol=1e-5)


def test_a_tiny_autoencoder_takes_samples_as_they_are(tmp_path):
    """Its scaling_factor is 1: the pipelines' division changes nothing, while a KL's latents differ by its factor."""
    stock = diffusers.AutoencoderTiny.from_pretrained(tiny(tmp_path / "vae")).eval()
    assert stock.config.scaling_factor == 1.0
    x = latents(4, 4)
    decoder = PixelDecoder(str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(decoder(x), stock.decode(x / stock.config.scaling_factor).sample)
        assert not torch.allclose(decoder(x), stock.decode(x / 0.18215).sample, atol=1e-3)


def test_nothing_is_clamped_so_that_gradients_survive(tmp_path):
    folder = tiny(tmp_path / "vae")
    decoder = PixelDecoder(str(folder))
    with torch.no_grad():
        decoder.build().decoder.layers[-1].bias.fill_(3.0)
    x = latents(4, 4).requires_grad_()
    made = decoder(x)
    assert float(made.detach().min()) > 1.0
    made.sum().backward()
    assert float(x.grad.abs().min()) > 0


def test_autocast_does_not_reach_the_decoder(folder):
    x = latents(4, 4)
    full = PixelDecoder(str(folder))
    with torch.autocast("cpu", torch.bfloat16):
        inside = full(x)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, full(x))
    half = PixelDecoder(str(folder), dtype="bfloat16")
    x.requires_grad_()
    rounded = half(x)
    rounded.square().mean().backward()
    assert rounded.dtype == x.grad.dtype == torch.float32
    assert {p.dtype for p in half.build().parameters()} == {torch.bfloat16}
    error = float((rounded - full(x)).detach().square().mean().sqrt() / full(x).detach().std())
    assert 1e-5 < error < 0.05
    assert float(x.grad.abs().max()) > 0


def kept_bytes(decoder, x):
    """Bytes that the graph of a decode holds, storages of weights excluded."""
    weights = {p.untyped_storage().data_ptr() for p in decoder.build().parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        made = decoder(x)
    return made, sum(kept.values())


def test_checkpointing_keeps_less_and_changes_nothing(folder):
    x, found = latents(8, 8), {}
    for on in (False, True):
        leaf = x.clone().requires_grad_()
        made, kept = kept_bytes(PixelDecoder(str(folder), checkpointing=on), leaf)
        made.square().mean().backward()
        found[on] = made.detach(), leaf.grad, kept
    torch.testing.assert_close(found[True][0], found[False][0])
    torch.testing.assert_close(found[True][1], found[False][1])
    assert found[True][2] < 0.5 * found[False][2]


# ------------------------------------------------------------------------------------------------ crops, videos
def test_a_crop_decodes_its_own_square(folder):
    decoder, whole = PixelDecoder(str(folder), crop=3), PixelDecoder(str(folder))
    x = latents(6, 8)
    offset = torch.tensor([[0, 5], [3, 1]])
    squares = torch.stack([x[0, :, 0:3, 5:8], x[1, :, 3:6, 1:4]])
    torch.testing.assert_close(decoder(x, offset), whole(squares))
    torch.testing.assert_close(decoder(x), whole(x[:, :, 1:4, 2:5]))  # the middle
    x.requires_grad_()
    decoder(x, offset).square().sum().backward()
    outside = torch.ones(2, 6, 8, dtype=torch.bool)
    outside[0, 0:3, 5:8] = outside[1, 3:6, 1:4] = False
    assert not x.grad.movedim(1, -1)[outside].any()
    assert x.grad.movedim(1, -1)[~outside].any(1).all()


def test_corners_are_uniform_over_all_places(tmp_path):
    decoder, x = PixelDecoder(str(tmp_path), crop=3), latents(6, 3, n=1)
    u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    corners = decoder.offsets(u, u, x)
    assert torch.equal(corners[:, 0].bincount(), torch.full((4,), 1000))
    assert not corners[:, 1].any()
    assert not PixelDecoder(str(tmp_path)).offsets(u, u, x).any()
    edges = decoder.offsets(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]), x)
    assert edges.tolist() == [[0, 0], [3, 0]]


@pytest.mark.sparse(2)
def test_videos_are_decoded_frame_by_frame(folder, trunk):
    video, other = latents(2, 4, 4), latents(2, 4, 4, seed=1)
    decoder = PixelDecoder(str(folder))
    frames = torch.stack([decoder(video[:, :, f]) for f in range(2)], 2)
    assert frames.shape == (2, 3, 2, 8, 8)
    torch.testing.assert_close(decoder(video), frames)
    offset = torch.tensor([[0, 1], [2, 0]])
    cropped = PixelDecoder(str(folder), crop=2)
    expected = torch.stack([cropped(video[:, :, f], offset) for f in range(2)], 2)
    torch.testing.assert_close(cropped(video, offset), expected)
    distance = PerceptualDistance(trunk_weights=trunk, decoder=decoder)
    each = torch.stack([distance(video[:, :, f], other[:, :, f]) for f in range(2)]).mean(0)
    torch.testing.assert_close(distance(video, other), each)
    distance.check((4, 2, 4, 4))
    PerceptualDistance(trunk_weights=trunk).check((3, 2, 16, 16))


def test_videos_whose_frames_are_made_together_are_refused(tmp_path):
    with seeded(0):
        wan = diffusers.AutoencoderKLWan(
            base_dim=3, z_dim=2, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
            latents_mean=[0.1, -0.2], latents_std=[2.0, 0.5],
        )  # fmt: skip
    wan.save_pretrained(tmp_path / "vae")
    decoder = PixelDecoder(str(tmp_path))
    with pytest.raises(ValueError, match=r"AutoencoderKLWan .* decodes videos frame by frame"):
        decoder.check((2, 2, 4, 4))
    with pytest.raises(ValueError, match="frame by frame, which AutoencoderKLWan cannot"):
        decoder(torch.zeros(1, 2, 2, 4, 4))
    decoder.check((2, 4, 4))
    x = torch.randn(1, 2, 4, 4)
    torch.testing.assert_close(decoder(x).clamp(-1, 1), LatentCodec(tmp_path).decode(x))


# ------------------------------------------------------------------------------------------------ files
def test_single_files(folder, tmp_path):
    file = tmp_path / "weights.safetensors"
    file.write_bytes((folder / "diffusion_pytorch_model.safetensors").read_bytes())
    x = latents(4, 4)
    expected = PixelDecoder(str(folder))(x)
    beside = PixelDecoder(str(folder / "diffusion_pytorch_model.safetensors"))
    given = PixelDecoder(str(file), config=str(folder))
    for decoder in (beside, given):
        decoder.check((4, 4, 4))
        torch.testing.assert_close(decoder(x), expected)


@pytest.mark.parametrize("channels", [4, 16])
def test_a_bare_file_of_a_taesd_under_both_names(tmp_path, channels):
    """Its authors' file counts the clamp as layer 0 and holds the decoder alone."""
    with seeded(0):
        stock = diffusers.AutoencoderTiny(latent_channels=channels).eval()
    state = {k: v.contiguous() for k, v in stock.state_dict().items()}
    save_file(state, str(tmp_path / "ours.safetensors"))
    own = {}
    for key, value in state.items():
        if key.startswith("decoder.layers."):
            number, rest = key.removeprefix("decoder.layers.").split(".", 1)
            own[f"{int(number) + 1}.{rest}"] = value
    save_file(own, str(tmp_path / "theirs.safetensors"))
    x = torch.randn(1, channels, 2, 2)
    before = torch.get_rng_state()
    for name in ("ours", "theirs"):
        decoder = PixelDecoder(str(tmp_path / f"{name}.safetensors"))
        decoder.check((channels, 2, 2))
        made = decoder(x)
        assert made.shape == (1, 3, 16, 16)
        with torch.no_grad():
            torch.testing.assert_close(made, stock.decode(x).sample)
    assert torch.equal(torch.get_rng_state(), before)
    stock.save_config(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(PixelDecoder(str(tmp_path / "theirs.safetensors"))(x), stock.decode(x).sample)


def test_what_cannot_be_read_is_told_in_a_sentence(tmp_path, folder):
    for path, kind, message in (
        (tmp_path / "nowhere", FileNotFoundError, r"nowhere does not exist; give PixelDecoder\(path\)"),
        (folder.parent / "vae" / "config.json", ValueError, "not a safetensors file"),
        (Path(__file__).parent, FileNotFoundError, "holds no autoencoder"),
    ):
        with pytest.raises(kind, match=message):
            PixelDecoder(str(path)).check()
    unet = tiny_pipelines.sd15().network
    unet.save_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match="UNet2DConditionModel, which decodes nothing"):
        PixelDecoder(str(tmp_path / "unet")).check()
    bare = tmp_path / "bare.safetensors"
    save_file({"weight": torch.zeros(2)}, str(bare))
    with pytest.raises(ValueError, match=r"bare\.safetensors holds no decoder of a TAESD; put .*config=FOLDER"):
        PixelDecoder(str(bare)).check()
    state = load_file(tiny(tmp_path / "other") / "diffusion_pytorch_model.safetensors")
    save_file(state, str(bare))
    with pytest.raises(ValueError, match="another layout than TAESD's"):
        PixelDecoder(str(bare)).build()
    bare.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="damaged or incomplete"):
        PixelDecoder(str(bare)).check()
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="is a pickle"):
        PixelDecoder(str(folder)).check()
    for settings in ({"crop": 0}, {"dtype": "float16"}):
        with pytest.raises(ValueError, match=r"PixelDecoder\("):
            PixelDecoder(str(folder), **settings)


def test_samples_that_do_not_fit_are_told_before_training(folder, trunk):
    distance = PerceptualDistance(trunk_weights=trunk, decoder=PixelDecoder(str(folder), crop=6))
    distance.check()
    distance.check((4, 8, 8))
    for shape, message in (
        ((16, 8, 8), r"decodes latents of 4 channels, .* \(16, 8, 8\)"),
        ((4, 4, 8), r"crop=6\) is larger than .* at most 4"),
        ((2,), r"have the shape \(2,\); leave the decoder out"),
    ):
        with pytest.raises(ValueError, match=message):
            distance.check(shape)
    with pytest.raises(ValueError, match="6 latents and more, got"):
        distance(latents(4, 8), latents(4, 8))
    plain = PerceptualDistance(trunk_weights=trunk)
    for shape in ((1, 8, 8), (3, 8, 8)):
        plain.check(shape)
    for shape in ((4, 8, 8), (16, 8, 8), (2,)):
        with pytest.raises(ValueError, match=r"1 or 3 channels, .* give decoder=PixelDecoder\(path\)"):
            plain.check(shape)


def test_yaml(folder, trunk, tmp_path):
    """By its short name inside of a distance, as in a configuration."""
    from jsonargparse import ArgumentParser

    from lightning_distill.methods.perceiving import Perceptual

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--distance", type=Perceptual | None)
    inner = {"class_path": "PixelDecoder", "init_args": {"path": str(folder), "crop": 4, "dtype": "bfloat16"}}
    entry = {"class_path": "PerceptualDistance", "init_args": {"trunk_weights": trunk, "decoder": inner}}
    made = parser.instantiate_classes(parser.parse_object({"distance": entry})).distance
    assert isinstance(made.decoder, PixelDecoder)
    assert (made.decoder.crop, made.decoder.dtype) == (4, torch.bfloat16)


# ------------------------------------------------------------------------------------------------ in methods
@pytest.mark.sparse(2)
def test_the_distance_is_lpips_of_the_pictures(folder, trunk):
    decoder = PixelDecoder(str(folder), crop=4)
    distance, plain = PerceptualDistance(trunk_weights=trunk, decoder=decoder), PerceptualDistance(trunk_weights=trunk)
    a, b = latents(8, 8).requires_grad_(), latents(8, 8, seed=1)
    offset = torch.tensor([[0, 4], [3, 1]])
    found = distance(a, b, offset)
    torch.testing.assert_close(found, plain(decoder(a, offset), decoder(b, offset)))
    assert not torch.allclose(found, distance(a, b))
    found.sum().backward()
    assert a.grad.abs().max() > 0
    assert not any(p.requires_grad or p.grad is not None for p in decoder.build().parameters())
    assert not any(module.training for module in decoder.build().modules())
    spoken = DecodedLoss(plain, PixelDecoder(str(folder)))  # as losses of decoded samples
    torch.testing.assert_close(spoken(a, b), PerceptualDistance(trunk_weights=trunk, decoder=spoken.decode)(a, b))


def test_what_a_validation_builds_can_train(folder, trunk):
    """Weights made in inference mode could not be kept for a backward pass."""
    distance = PerceptualDistance(trunk_weights=trunk, decoder=PixelDecoder(str(folder)))
    a, b = latents(4, 4), latents(4, 4, seed=1)
    with torch.inference_mode():
        distance(a, b)
    distance(a.requires_grad_(), b).sum().backward()
    assert a.grad.abs().max() > 0


def pair_file(folder, n=4):
    generator = torch.Generator().manual_seed(3)
    noise, x0 = (torch.randn(n, 4, 8, 8, generator=generator) for _ in range(2))
    save_file({"noise": noise, "x0": 0.5 * x0}, folder / "pairs.safetensors")
    return str(folder / "pairs.safetensors")


class Unconditioned(nn.Module):
    """A U-Net of Stable Diffusion that is told one prompt only."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.register_buffer("prompt", torch.zeros(1, tiny_pipelines.LENGTH, 8))

    def forward(self, x, t):
        prompt = self.prompt.expand(len(x), -1, -1)
        return self.network(x, t * 999, encoder_hidden_states=prompt).sample


@pytest.fixture
def own_pairs(tmp_path):
    """Pairs of a tiny Stable Diffusion and a spec-free teacher without conditions, as pair files have none."""
    from lightning_distill.networks.denoiser import Denoiser
    from lightning_distill.processes import VariancePreserving

    with torch.random.fork_rng():
        network = Unconditioned(tiny_pipelines.sd15().network)
    return Denoiser(network, VariancePreserving(zero_terminal_snr=True), "v_prediction").eval(), pair_file(tmp_path)


@pytest.mark.long
@pytest.mark.sparse(2)
@pytest.mark.parametrize("crop", [None, 6])
def test_a_run_with_a_loss_of_decoded_latents(own_pairs, trunk, tmp_path, crop):
    """The warm-up of DMD2 by LPIPS of decoded latents: the loss falls, and the decoder is nowhere to be found."""
    teacher, pairs = own_pairs
    folder = tiny_text.vae(tmp_path / "pipeline")
    decoder = PixelDecoder(str(folder), crop=crop)
    module = DMD2(
        teacher,
        shape=[4, 8, 8],
        regression_pairs=pairs,
        regression_distance=PerceptualDistance(trunk_weights=trunk, decoder=decoder),
        regression_steps=30,
        fake_score_steps=1,
        student_optimizer=lambda parameters: torch.optim.Adam(parameters, lr=3e-3),
        ema=[],
        check_data=False,
    )
    losses = []
    inner = module.student_loss
    module.student_loss = lambda batch: (
        terms := inner(batch),
        losses.append(float(terms.losses["regression"].detach())),
    )[0]
    trainer = Trainer(
        max_steps=30, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    )  # fmt: skip
    before = {k: v.clone() for k, v in decoder.build().state_dict().items()}
    trainer.fit(module, ResumableLoader(InMemory(Batch(x0=torch.zeros(8, 4, 8, 8), size=8)), batch_size=4))
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5]), losses
    # frozen and unseen
    after = decoder.build().state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    own = {p.data_ptr() for p in decoder.build().parameters()}
    assert own.isdisjoint(p.data_ptr() for p in module.parameters())
    for optimizer in trainer.optimizers:
        assert own.isdisjoint(p.data_ptr() for group in optimizer.param_groups for p in group["params"])
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    saved = read_checkpoint(tmp_path / "run.ckpt")["state_dict"]
    assert saved.keys() == module.state_dict().keys()
    values = {tuple(v.shape): v for v in decoder.build().state_dict().values() if v.numel() > 100}
    for key, tensor in saved.items():
        assert not any(word in key for word in ("decoder", "vae", "lpips", "regression"))
        twin = values.get(tuple(tensor.shape))
        assert twin is None or not torch.equal(twin, tensor)


def test_a_method_refuses_latents_without_a_decoder_before_training(own_pairs, trunk, tmp_path):
    teacher, pairs = own_pairs
    folder = tiny_text.vae(tmp_path / "pipeline")
    distance = PerceptualDistance(trunk_weights=trunk)
    module = DMD2(teacher, shape=[4, 8, 8], regression_pairs=pairs, regression_distance=distance, regression_steps=1)
    with pytest.raises(ValueError, match=r"\(4, 8, 8\); for latents give decoder=PixelDecoder"):
        module.configure_model()
    module = KnowledgeDistillation(teacher, shape=[4, 8, 8], perceptual=distance)
    with pytest.raises(ValueError, match=r"\(4, 8, 8\); for latents give decoder=PixelDecoder"):
        module.configure_model()
    wrong = PerceptualDistance(trunk_weights=trunk, decoder=PixelDecoder(str(folder), crop=9))
    with pytest.raises(ValueError, match=r"crop=9\) is larger"):
        KnowledgeDistillation(teacher, shape=[4, 8, 8], perceptual=wrong).configure_model()


def test_crops_follow_the_draws_of_the_method(own_pairs, trunk, tmp_path):
    """Same update, same corners, other corners for another sample or update; both pictures are cut alike."""
    teacher, _ = own_pairs
    folder = tiny_text.vae(tmp_path / "pipeline")
    decoder = PixelDecoder(str(folder), crop=3)
    distance = PerceptualDistance(trunk_weights=trunk, decoder=decoder)
    module = ready(KnowledgeDistillation(teacher, shape=[4, 8, 8], perceptual=distance, student=Lora(2), ema=[]))
    check_perceptual(distance, module)
    a, b = latents(8, 8, n=6), latents(8, 8, n=6, seed=1)
    found = perceived(distance, module, a, b, {})
    assert torch.equal(found, perceived(distance, module, a, b, {}))
    u, v = (module.draws.uniform(f"perceptual/{side}", 6) for side in ("top", "left"))
    corners = decoder.offsets(u, v, a)
    assert len({tuple(row) for row in corners.tolist()}) > 2
    torch.testing.assert_close(found, distance(a, b, corners))
    assert torch.equal(perceived(distance, module, a, a, {}), torch.zeros(6))
    ready(module, update=1)
    assert not torch.equal(found, perceived(distance, module, a, b, {}))


def test_checking_and_reading_leave_the_generator_alone(folder):
    state = torch.get_rng_state()
    decoder = PixelDecoder(str(folder))
    decoder.check((4, 4, 4))
    decoder.build()
    assert torch.equal(torch.get_rng_state(), state)
    assert decoder.build() is decoder.build()
    assert decoder.build().encoder is None  # half of the weights, of no use here
