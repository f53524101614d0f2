"""The denoiser contract on every small network: calling conventions, taps, conditions and errors."""

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn

from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.small import ResidualMLP, small_dit, small_unet
from lightning_distill.prediction import PREDICTION_TYPES
from lightning_distill.processes import EDM, FlowMatching, TrigFlow, VariancePreserving

F64 = torch.float64


def mlp(**kwargs):
    return ResidualMLP((2,), width=16, depth=3, **kwargs)


def unet(num_classes=0):
    return small_unet(8, num_classes=num_classes, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=8)


def dit(**kwargs):
    return small_dit(8, num_classes=3, num_layers=3, num_attention_heads=2, attention_head_dim=8, **kwargs)


def count_calls(module):
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


# ----------------------------------------------------------------------------------------------- calling
class Recorder(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, x, t, **cond):
        self.seen = {"x": x, "t": t, **cond}
        return self.weight * x


def test_a_plain_module_gets_native_times_and_its_conditions():
    network = Recorder()
    x, cond = torch.randn(3, 2), {"anything": torch.ones(3)}
    prediction = Denoiser(network, FlowMatching(), "flow_prediction")(x, torch.tensor(0.3, dtype=F64), cond)
    torch.testing.assert_close(network.seen["t"], torch.full((3,), 0.3))
    assert network.seen["t"].dtype == torch.float32
    assert network.seen["anything"] is cond["anything"]
    assert prediction.t.shape == (3,)
    torch.testing.assert_close(prediction.flow_prediction, 2 * x)
    torch.testing.assert_close(prediction.x0, x - 0.3 * 2 * x)


def test_unets_get_the_schedulers_timesteps():
    network, process, seen = unet(), VariancePreserving(), []
    network.time_proj.register_forward_hook(lambda _m, args, _out: seen.append(args[0]))
    Denoiser(network, process, "epsilon")(torch.randn(2, 1, 8, 8), torch.tensor([1.0, 0.25]))
    assert seen[0].tolist() == [999.0, 249.0]
    Denoiser(network, FlowMatching(), "flow_prediction")(torch.randn(2, 1, 8, 8), torch.tensor([1.0, 0.25]))
    assert seen[1].tolist() == [1000.0, 250.0]


def test_dits_get_integer_timesteps_and_lose_their_variance():
    network = dit(learned_variance=True)
    denoiser = Denoiser(network, VariancePreserving(), "epsilon")
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([1.0, 0.25])
    labels = torch.tensor([0, 2])
    raw = denoiser(x, t, {"class_labels": labels}).raw
    assert raw.shape == x.shape
    network.eval()
    full = network(x, timestep=torch.tensor([999, 249]), class_labels=labels).sample
    assert full.shape == (2, 2, 8, 8)
    torch.testing.assert_close(raw, full[:, :1], rtol=0, atol=0)


def test_dits_never_drop_labels_at_random():
    network = dit()
    denoiser = Denoiser(network, VariancePreserving(), "epsilon")
    denoiser.train()
    nn.ModuleList([denoiser]).train()
    assert not any(module.training for module in network.modules())
    x, labels = torch.randn(64, 1, 8, 8), torch.zeros(64, dtype=torch.int64)
    first = denoiser(x, torch.tensor(0.5), {"class_labels": labels}).raw
    torch.testing.assert_close(denoiser(x, torch.tensor(0.5), {"class_labels": labels}).raw, first, rtol=0, atol=0)
    null = denoiser(x, torch.tensor(0.5), denoiser.null_cond({"class_labels": labels})).raw
    assert not torch.allclose(null, first)
    # an ordinary network does follow train mode
    assert Denoiser(unet(), VariancePreserving(), "epsilon").train().network.training


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_a_change_of_process_gives_the_same_estimate(kind):
    """A flow network read through VP at the same noise level and scale returns the same x0 and eps."""
    flow, vp = FlowMatching(), VariancePreserving()
    network = ResidualMLP((2,), width=16).double()
    with torch.no_grad():
        network.output.weight.normal_()
    x_vp, t_vp = torch.randn(6, 2, dtype=F64), torch.linspace(0.1, 0.9, 6, dtype=F64)
    seen = Denoiser(network, vp, kind, network_process=flow) if kind != "epsilon" else None
    if seen is None:
        with pytest.raises(ValueError, match="alpha is 0"):
            Denoiser(network, vp, kind, network_process=flow)
        return
    alpha, sigma = vp.alpha(t_vp), vp.sigma(t_vp)
    inner = Denoiser(network, flow, kind)(x_vp / (alpha + sigma)[:, None], sigma / (alpha + sigma))
    outer = seen(x_vp, t_vp)
    torch.testing.assert_close(outer.x0, inner.x0, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(outer.eps, inner.eps, rtol=1e-10, atol=1e-10)
    assert outer.process is vp


def test_dtype_of_the_result_follows_the_samples():
    x, t = torch.randn(2, 2), torch.rand(2)
    half = Denoiser(mlp().bfloat16(), FlowMatching(), "flow_prediction")
    assert half(x, t).raw.dtype == torch.float32
    assert half(x, t, taps=("blocks.1",)).features["blocks.1"].dtype == torch.bfloat16
    assert Denoiser(mlp(), FlowMatching(), "flow_prediction")(x.double(), t).raw.dtype == F64


def test_networks_know_their_sample_shape_and_classes():
    make = lambda network: Denoiser(network, FlowMatching(), "flow_prediction")  # noqa: E731
    assert make(mlp()).sample_shape == (2,)
    assert make(unet()).sample_shape == (1, 8, 8)
    assert make(dit()).sample_shape == (1, 8, 8)
    assert make(nn.Identity()).sample_shape is None
    assert make(mlp(num_classes=4)).num_classes == 4
    assert make(mlp()).num_classes is None
    assert make(dit()).num_classes == 3


# ----------------------------------------------------------------------------------------------- taps
@pytest.mark.parametrize(
    ("network", "shape", "cond", "tap", "later"),
    [
        (mlp(), (2,), {}, "blocks.1", "blocks.2"),
        (unet(), (1, 8, 8), {}, "mid_block", "up_blocks.0"),
        (
            dit(),
            (1, 8, 8),
            {"class_labels": torch.tensor([0, 1])},
            "transformer_blocks.1",
            "transformer_blocks.2",
        ),
    ],
    ids=["mlp", "unet", "dit"],
)
def test_taps_return_features_and_stop_behind_the_last(network, shape, cond, tap, later):
    denoiser = Denoiser(network, VariancePreserving(), "v_prediction").eval()
    x, t = torch.randn(2, *shape), torch.tensor([0.2, 0.9])
    behind = count_calls(network.get_submodule(later))
    whole = count_calls(network)
    early = denoiser.feature_maps(x, t, cond, (tap,))
    assert list(early) == [tap]
    assert behind == []
    assert whole == []
    prediction = denoiser(x, t, cond, taps=(tap,))
    assert len(behind) == 1
    torch.testing.assert_close(prediction.features[tap], early[tap], rtol=0, atol=0)
    torch.testing.assert_close(prediction.raw, denoiser(x, t, cond).raw, rtol=0, atol=0)
    assert tap in denoiser.block_names()
    # nothing is left behind on the network
    assert not network.get_submodule(tap)._forward_hooks


def test_several_taps_run_to_the_last_of_them():
    network = mlp()
    denoiser = Denoiser(network, FlowMatching(), "flow_prediction")
    counts = [count_calls(block) for block in network.blocks]
    features = denoiser.feature_maps(torch.randn(4, 2), torch.rand(4), None, ("blocks.1", "blocks.0"))
    assert set(features) == {"blocks.0", "blocks.1"}
    assert [len(c) for c in counts] == [1, 1, 0]
    assert features["blocks.0"].shape == (4, 16)


def test_tapped_features_carry_gradients():
    network = mlp()
    denoiser = Denoiser(network, FlowMatching(), "flow_prediction")
    x = torch.randn(4, 2, requires_grad=True)
    denoiser.feature_maps(x, torch.rand(4), None, ("blocks.0",))["blocks.0"].sum().backward()
    assert x.grad is not None
    assert network.blocks[0].inner.weight.grad is not None
    assert network.blocks[1].inner.weight.grad is None


def test_hooks_are_removed_after_a_failed_call():
    network = mlp()
    denoiser = Denoiser(network, FlowMatching(), "flow_prediction")
    with pytest.raises(ValueError, match=r"samples of shape \(2,\)"):
        denoiser(torch.randn(4, 3), torch.rand(4), taps=("blocks.0",))
    assert not network.blocks[0]._forward_hooks


def test_unknown_taps_are_listed_against_the_known():
    denoiser = Denoiser(mlp(), FlowMatching(), "flow_prediction")
    with pytest.raises(ValueError, match=r"no block 'blocks.7'; blocks to tap: blocks.0, blocks.1, blocks.2"):
        denoiser(torch.randn(1, 2), torch.rand(1), taps=("blocks.7",))


def test_a_tap_that_never_runs_is_an_error():
    network = mlp()
    network.unused = nn.Linear(2, 2)
    denoiser = Denoiser(network, FlowMatching(), "flow_prediction")
    with pytest.raises(ValueError, match=r"\['unused'\] were not run by ResidualMLP"):
        denoiser(torch.randn(1, 2), torch.rand(1), taps=("unused",))


# ----------------------------------------------------------------------------------------------- conditions
def test_null_conditions_of_each_network():
    labels = torch.tensor([0, 1])
    cond = {"class_labels": labels}
    assert Denoiser(dit(), VariancePreserving(), "epsilon").null_cond(cond)["class_labels"].tolist() == [3, 3]
    trained = Denoiser(unet(num_classes=3), VariancePreserving(), "epsilon", null_class=3)
    assert trained.null_cond(cond)["class_labels"].tolist() == [3, 3]
    assert trained.num_classes == 3
    network = mlp(num_classes=5)
    denoiser = Denoiser(network, FlowMatching(), "flow_prediction")
    assert denoiser.null_cond(cond)["class_labels"].tolist() == [5, 5]
    # no labels at all mean the same as the null label
    x, t = torch.randn(2, 2), torch.rand(2)
    torch.testing.assert_close(denoiser(x, t).raw, denoiser(x, t, denoiser.null_cond(cond)).raw, rtol=0, atol=0)
    assert not torch.equal(denoiser(x, t).raw, denoiser(x, t, cond).raw)


def test_missing_null_values_are_explained():
    with pytest.raises(ValueError, match=r"'class_labels'.*UNet2DModel has none.*null_class"):
        Denoiser(unet(num_classes=3), VariancePreserving(), "epsilon").null_cond(
            {"class_labels": torch.zeros(1).long()}
        )
    with pytest.raises(ValueError, match="'text'"):
        Denoiser(mlp(), FlowMatching(), "flow_prediction", null_class=3).null_cond({"text": torch.zeros(1)})


@pytest.mark.parametrize("network", [mlp(num_classes=2), unet(num_classes=2), dit()], ids=["mlp", "unet", "dit"])
def test_unknown_conditions_are_refused(network):
    denoiser = Denoiser(network, VariancePreserving(), "v_prediction")
    x = torch.randn(1, *denoiser.sample_shape)
    with pytest.raises(ValueError, match=r"takes the conditions \['class_labels'\].*'text'"):
        denoiser(x, torch.rand(1), {"class_labels": torch.zeros(1).long(), "text": torch.zeros(1)})


def test_labels_for_an_unconditional_network_are_refused():
    with pytest.raises(ValueError, match="num_classes=0"):
        Denoiser(mlp(), FlowMatching(), "flow_prediction")(
            torch.randn(1, 2), torch.rand(1), {"class_labels": torch.zeros(1).long()}
        )


# ----------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize("process", [FlowMatching(), TrigFlow(), VariancePreserving(zero_terminal_snr=True)])
def test_epsilon_is_refused_where_alpha_is_zero(process):
    with pytest.raises(ValueError, match=r"says nothing about the clean sample.*v_prediction"):
        Denoiser(mlp(), process, "epsilon")


@pytest.mark.parametrize("process", [EDM(), VariancePreserving()])
def test_epsilon_is_accepted_where_alpha_is_not_zero(process):
    assert Denoiser(mlp(), process, "epsilon").prediction_type == "epsilon"


def test_unknown_prediction_types_are_refused():
    with pytest.raises(ValueError, match="'noise' is unknown; choose one of epsilon, sample"):
        Denoiser(mlp(), FlowMatching(), "noise")


def test_outputs_of_another_shape_are_refused():
    class Wrong(nn.Module):
        def forward(self, x, t):
            return x[:, :1]

    with pytest.raises(ValueError, match=r"Wrong returned shape \(4, 1\) for an input of shape \(4, 2\)"):
        Denoiser(Wrong(), FlowMatching(), "flow_prediction")(torch.randn(4, 2), torch.rand(4))


@pytest.mark.parametrize("arguments", [{"depth": 0}, {"width": 0}, {"num_classes": -1}, {"time_features": 7}])
def test_residual_mlp_refuses_nonsense(arguments):
    with pytest.raises(ValueError, match="needs width and depth"):
        ResidualMLP((2,), **arguments)


# ----------------------------------------------------------------------------------------------- networks
@pytest.mark.parametrize("shape", [(2,), (1, 8, 8)])
def test_residual_mlp_starts_small_and_depends_on_everything(shape):
    network = ResidualMLP(shape, num_classes=3)
    x, t, labels = torch.randn(5, *shape), torch.rand(5), torch.tensor([0, 1, 2, 3, 0])
    out = network(x, t, labels)
    assert out.shape == x.shape
    assert 0 < out.abs().max() < 0.1
    for other in ((x + 1, t, labels), (x, t + 0.1, labels), (x, t, labels.flip(0).roll(1))):
        assert not torch.allclose(network(*other), out, atol=1e-7)
    out.sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_residual_mlp_tells_native_times_apart():
    """Flow's [0, 1] and TrigFlow's [0, pi/2] are embedded without two times coinciding."""
    features = ResidualMLP((2,)).time_proj(torch.linspace(0, torch.pi / 2, 200))
    distance = torch.cdist(features, features) + 100 * torch.eye(200)
    nearest = distance.min(dim=1).indices
    assert bool(((nearest - torch.arange(200)).abs() == 1).all())


def test_small_networks_have_the_shipped_teachers_layout():
    network = small_unet(num_classes=10)
    assert network.config.block_out_channels == (16, 32, 64, 96)
    assert network.config.num_class_embeds == 11
    assert network.config.sample_size == 32
    assert 1e6 < sum(p.numel() for p in network.parameters()) < 3e6


@pytest.mark.parametrize(
    ("class_path", "arguments"),
    [
        ("lightning_distill.networks.small.ResidualMLP", {"shape": [1, 8, 8], "width": 32}),
        (
            "lightning_distill.networks.small.small_unet",
            {"sample_size": 8, "block_out_channels": [8, 16], "norm_num_groups": 4, "attention_head_dim": 8},
        ),
        ("lightning_distill.networks.small.small_dit", {"sample_size": 8, "num_layers": 1}),
    ],
)
def test_small_networks_can_be_written_in_yaml(class_path, arguments):
    parser = ArgumentParser()
    parser.add_argument("--network", type=nn.Module)
    config = parser.parse_object({"network": {"class_path": class_path, "init_args": arguments}})
    network = parser.instantiate_classes(config).network
    denoiser = Denoiser(network, FlowMatching(), "flow_prediction")
    x = torch.randn(2, 1, 8, 8)
    cond = {"class_labels": torch.tensor([0, 1])} if "dit" in class_path else {}
    assert denoiser(x, torch.rand(2), cond).x0.shape == x.shape
