"""LPIPS from local weights, and the diversity of samples of one condition."""

from __future__ import annotations

import time
import warnings

import lpips
import pytest
import torch
import torchvision
from safetensors.torch import save_file

from lightning_distill.metrics import PerceptualDistance, lpips_diversity

TRUNKS = {
    "alex": lambda: torchvision.models.alexnet(weights=None),
    "squeeze": lambda: torchvision.models.squeezenet1_1(weights=None),
    "vgg": lambda: torchvision.models.vgg16(weights=None),
}


@pytest.fixture(scope="module", params=["alex", "squeeze", "vgg"])
def trunk(request, tmp_path_factory):
    """Name, network and file of a trunk with random weights; only ``features`` is kept, as no other part is read."""
    torch.manual_seed(3)
    with torch.device("meta"):  # classifiers are large and not wanted
        whole = TRUNKS[request.param]()
    features = whole.features.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in features.parameters():
            parameter.normal_(std=0.3 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.1)
    file = tmp_path_factory.mktemp("trunk") / f"{request.param}.pth"
    torch.save({f"features.{k}": v for k, v in features.state_dict().items()}, file)
    return request.param, features.eval(), file


@pytest.fixture(scope="module")
def alex(tmp_path_factory):
    torch.manual_seed(4)
    file = tmp_path_factory.mktemp("alex") / "alexnet.safetensors"
    save_file({f"features.{k}": v for k, v in TRUNKS["alex"]().features.state_dict().items()}, str(file))
    return PerceptualDistance("alex", trunk_weights=str(file))


#: where each trunk is tapped: indices of torchvision's layers
TAPS = {"alex": (1, 4, 7, 9, 11), "squeeze": (1, 4, 7, 9, 10, 11, 12), "vgg": (3, 8, 15, 22, 29)}


@pytest.mark.sparse(3)
def test_the_distance_is_its_definition_on_the_given_weights(trunk):
    """Unit-length channels of the tapped layers, squared differences, linear weights of the package, mean of pixels."""
    name, features, file = trunk
    distance = PerceptualDistance(name, trunk_weights=str(file))
    a, b = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    shipped = torch.load(f"{lpips.__path__[0]}/weights/v0.1/{name}.pth", map_location="cpu", weights_only=True)

    def taps(x):
        x, found = (x - shift[:, None, None]) / scale[:, None, None], []
        for i, layer in enumerate(features):
            x = layer(x)
            if i in TAPS[name]:
                found.append((x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)).clone())
        return found

    with torch.no_grad():
        expected = sum(
            ((x - y).square() * shipped[f"lin{i}.model.1.weight"]).sum(1).mean((1, 2))
            for i, (x, y) in enumerate(zip(taps(a), taps(b)))
        )
    torch.testing.assert_close(distance(a, b), expected, rtol=1e-4, atol=1e-7)
    assert (expected > 1e-4).all()
    assert torch.equal(distance(a, a), torch.zeros(2))


@pytest.mark.sparse(3)
def test_building_is_quiet_and_leaves_the_generator_alone(trunk):
    name, _, file = trunk
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network = PerceptualDistance(name, trunk_weights=str(file)).build()
    assert torch.equal(torch.get_rng_state(), state)
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())


def test_images_of_any_size_and_of_one_channel(alex):
    a, b = torch.rand(2, 3, 1, 8, 12) * 2 - 1
    grey = alex(a, b)
    assert grey.shape == (3,)
    torch.testing.assert_close(grey, alex(a.expand(-1, 3, -1, -1), b.expand(-1, 3, -1, -1)))
    torch.testing.assert_close(alex(a.double(), b.double()), grey)
    with pytest.raises(ValueError, match=r"of one shape, got \(3, 1, 8, 12\) and \(3, 1, 8, 8\)"):
        alex(a, b[..., :8])
    with pytest.raises(ValueError, match=r"1 or 3, H, W"):
        alex(a.expand(-1, 2, -1, -1), b.expand(-1, 2, -1, -1))


# ------------------------------------------------------------------------------------------------ diversity
def test_diversity_is_the_mean_within_conditions(alex):
    images = torch.rand(5, 3, 64, 64) * 2 - 1
    groups = torch.tensor([7, 2, 7, 2, 7])
    pairs = [(0, 2), (2, 4), (1, 3)]
    expected = sum(alex(images[i : i + 1], images[j : j + 1]).item() for i, j in pairs) / 3
    for batch_size in (1, 64):
        assert lpips_diversity(alex, images, groups, batch_size) == pytest.approx(expected, rel=1e-5)


def test_a_network_that_ignores_its_noise_has_no_diversity(alex):
    modes = torch.rand(4, 3, 64, 64) * 2 - 1
    groups = torch.arange(12) % 4
    assert lpips_diversity(alex, modes[groups], groups) == 0.0
    noise = 0.5 * torch.randn(12, 3, 64, 64)
    some, more = (lpips_diversity(alex, modes[groups] + s * noise, groups) for s in (0.2, 1.0))
    assert 0 < some < more


def test_diversity_needs_pairs(alex):
    with pytest.raises(ValueError, match="two samples of one condition"):
        lpips_diversity(alex, torch.zeros(3, 3, 64, 64), torch.arange(3))
    with pytest.raises(ValueError, match=r"3 images and groups of shape \(2,\)"):
        lpips_diversity(alex, torch.zeros(3, 3, 64, 64), torch.zeros(2))


# ------------------------------------------------------------------------------------------------ files
def test_a_missing_file_is_told_at_once(tmp_path, monkeypatch):
    monkeypatch.delenv("LIGHTNING_DISTILL_LPIPS_TRUNK", raising=False)
    missing = PerceptualDistance(trunk_weights=str(tmp_path / "no.pth"))
    message = r"no\.pth does not exist.*trunk_weights.*LIGHTNING_DISTILL_LPIPS_TRUNK"
    for call in (missing.check, missing.build, lambda: missing(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))):
        start = time.perf_counter()
        with pytest.raises(FileNotFoundError, match=message):
            call()
        assert time.perf_counter() - start < 1.0
    none = PerceptualDistance("vgg")
    for call in (none.check, none.build):
        with pytest.raises(FileNotFoundError, match=r"vgg.*trunk_weights=FILE.*LIGHTNING_DISTILL_LPIPS_TRUNK=FILE"):
            call()
    PerceptualDistance(allow_download=True).check()  # asks for nothing before it is used
    with pytest.raises(ValueError, match="choose alex, vgg or squeeze"):
        PerceptualDistance("resnet")


def test_the_variable_names_the_file(tmp_path, monkeypatch, alex):
    monkeypatch.setenv("LIGHTNING_DISTILL_LPIPS_TRUNK", str(alex.trunk_weights))
    PerceptualDistance().check()
    monkeypatch.setenv("LIGHTNING_DISTILL_LPIPS_TRUNK", str(tmp_path / "other.pth"))
    with pytest.raises(FileNotFoundError, match=r"other\.pth does not exist"):
        PerceptualDistance().check()
    assert PerceptualDistance(trunk_weights=alex.trunk_weights).trunk_weights == alex.trunk_weights


def test_other_files_are_refused(tmp_path, alex):
    with pytest.raises(ValueError, match=r"alexnet\.safetensors does not hold torchvision's weights of this trunk"):
        PerceptualDistance("squeeze", trunk_weights=alex.trunk_weights).build()
    for name in ("nonsense.pth", "nonsense.safetensors"):
        (tmp_path / name).write_bytes(b"nonsense")
        with pytest.raises(ValueError, match=r"nonsense\.\w+ cannot be read as a state dict"):
            PerceptualDistance(trunk_weights=str(tmp_path / name)).build()
