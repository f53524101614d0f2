"""Hybrid sampling, negative prompts and adapter transfer: what needs no training."""

import pytest
import torch
from diffusers.models.attention_processor import Attention
from safetensors.torch import save_file
from tiny_pipelines import pixart_sigma, random_network, sd3, sd15, wan
from torch import nn

from lightning_distill.generation import generate
from lightning_distill.hybrid import hybrid, hybrid_times
from lightning_distill.methods import DMD2
from lightning_distill.networks.adapter_transfer import adapter_changes, transfer_adapter
from lightning_distill.networks.analytic import GaussianMixture, analytic_denoiser
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.lora import add_adapter
from lightning_distill.networks.merging import merged_network
from lightning_distill.networks.negative_prompts import negative_prompts
from lightning_distill.networks.small import ResidualMLP
from lightning_distill.processes import EDM, FlowMatching
from lightning_distill.times import few_step_times

TIMES = [1.0, 0.75, 0.5, 0.25]


class Collapsed(nn.Module):
    """From pure noise it always predicts the right-hand mode; from then on it is the exact denoiser."""

    def __init__(self, exact):
        super().__init__()
        self.exact = exact

    def forward(self, x, t):
        exact = self.exact(x, t).x0
        return torch.where(t.to(x)[:, None] > 0.99, torch.full_like(exact, 1.0), exact)


@pytest.fixture
def models():
    mixture = GaussianMixture(torch.tensor([[-1.0], [1.0]]), torch.tensor([0.05, 0.05]).square())
    teacher = analytic_denoiser(mixture, FlowMatching())
    return teacher, Denoiser(Collapsed(teacher), FlowMatching(), "sample")


def noise(n=400):
    return torch.randn(n, 1, generator=torch.Generator().manual_seed(0))


def test_no_step_and_all_steps_are_the_two_models_alone(models):
    teacher, student = models
    for sampler in ("ode", "renoise"):
        draws = [torch.Generator().manual_seed(1) for _ in range(2)]
        alone = generate(student, noise(), {}, TIMES, sampler, generator=draws[0])
        assert torch.equal(
            hybrid(teacher, student, noise(), {}, TIMES, first=0, sampler=sampler, generator=draws[1]), alone
        )
    many = generate(teacher, noise(), {}, few_step_times(teacher.process, 20), "ode")
    assert torch.equal(hybrid(teacher, student, noise(), {}, TIMES, first=4), many)


def test_the_teachers_first_step_restores_a_lost_mode(models):
    teacher, student = models
    alone = generate(student, noise(), {}, [1.0, 0.2], "ode")
    assert (alone > 0).all()
    both = hybrid(teacher, student, noise(), {}, [1.0, 0.2], first=1, sampler="ode")
    assert 0.4 < (both > 0).float().mean() < 0.6
    assert (both.abs() - 1.0).abs().mean() < 0.1


def test_the_teacher_stops_where_the_student_goes_on(models):
    teacher, _ = models
    assert hybrid_times(teacher, TIMES, 1, 8) == [1.0, 0.875, 0.75]
    assert hybrid_times(teacher, TIMES, 2, 3) == pytest.approx([1.0, 2 / 3, 0.5])
    # two halves of an ODE are the whole of it
    x = generate(teacher, noise(), {}, [1.0, 0.8], "ode", until=0.6)
    whole = generate(teacher, noise(), {}, [1.0, 0.8, 0.6, 0.3], "ode")
    torch.testing.assert_close(generate(teacher, x, {}, [0.6, 0.3], "ode", noisy=True), whole, rtol=0, atol=0)


def test_batches_do_not_matter(models):
    teacher, student = models
    whole = hybrid(teacher, student, noise(50), {}, TIMES, sampler="ode")
    torch.testing.assert_close(hybrid(teacher, student, noise(50), {}, TIMES, sampler="ode", batch_size=7), whole)


def test_a_module_samples_with_its_teacher():
    teacher = Denoiser(ResidualMLP((2,), 8, 1, num_classes=3), FlowMatching(), "flow_prediction")
    module = DMD2(teacher, num_steps=4, ema=[])
    module.configure_model()
    z = torch.randn(6, 2)
    draws = [torch.Generator().manual_seed(1) for _ in range(2)]
    expected = hybrid(
        teacher, module.student, z, {"class_labels": torch.arange(6) % 3}, module.student_times, generator=draws[0]
    )
    assert torch.equal(module.sample_hybrid(6, noise=z, generator=draws[1]), expected)


def test_wrong_requests_are_refused(models):
    teacher, student = models
    with pytest.raises(ValueError, match="first=5: the student has 4 steps"):
        hybrid(teacher, student, noise(), {}, TIMES, first=5)
    other = Denoiser(ResidualMLP((1,), 8, 1), EDM(), "sample")
    with pytest.raises(ValueError, match="method_process"):
        hybrid(teacher, other, noise(), {}, TIMES)
    with pytest.raises(ValueError, match="heun' cannot stop"):
        generate(teacher, noise(), {}, [1.0], "heun", until=0.5)


# ------------------------------------------------------------------------------------------------ negative prompts
@pytest.mark.parametrize("make", [sd15, pixart_sigma, wan])
def test_steering_is_linear_and_nothing_at_zero(make):
    tiny = make()
    denoiser = tiny.denoiser()
    cond, negative = tiny.cond(2, seed=1), tiny.cond(2, seed=2)
    x, t = torch.randn(2, *tiny.shape), torch.tensor(0.6)

    def attention(scale, away=negative):
        seen = []
        with torch.no_grad(), negative_prompts(denoiser, cond, away, scale) as both:
            layer = next(m for m in denoiser.network.modules() if getattr(m, "is_cross_attention", False))
            handle = layer.register_forward_hook(lambda _m, _a, out: seen.append(out))
            out = denoiser(x, t, both).raw
            handle.remove()
        return out, seen[-1]

    with torch.no_grad():
        plain = denoiser(x, t, cond).raw
    torch.testing.assert_close(attention(0.0)[0], plain, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(attention(1.0)[0], plain, atol=1e-3)
    zero, half, one = (attention(scale)[1] for scale in (0.0, 0.5, 1.0))
    torch.testing.assert_close(half, 0.5 * (zero + one), rtol=1e-4, atol=1e-6)  # the first layer has the same queries
    # the same prompt on both sides at full scale leaves the bias of the projection alone
    layer = next(m for m in denoiser.network.modules() if getattr(m, "is_cross_attention", False))
    nothing = attention(1.0, cond)[1]
    torch.testing.assert_close(nothing, layer.to_out[0].bias.expand_as(nothing), rtol=0, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(denoiser(x, t, cond).raw, plain), "the hooks are gone"


def test_negative_prompts_of_another_length_equal_masked_ones():
    tiny = sd15()
    denoiser = tiny.denoiser()
    cond, x, t = tiny.cond(2, seed=1), torch.randn(2, *tiny.shape), torch.tensor(0.6)
    short = {"encoder_hidden_states": torch.randn(1, 3, 8)}
    padded = {
        "encoder_hidden_states": torch.cat([short["encoder_hidden_states"], torch.randn(1, 2, 8)], dim=1),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0]]),
    }
    with torch.no_grad():
        with negative_prompts(denoiser, cond, short, 0.7) as both:
            a = denoiser(x, t, both).raw
        with negative_prompts(denoiser, cond, padded, 0.7) as both:
            b = denoiser(x, t, both).raw
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_module_samples_with_negative_prompts():
    tiny = sd15()
    module = DMD2(tiny.denoiser(), num_steps=2, ema=[], shape=list(tiny.shape))
    module.configure_model()
    z, cond, negative = torch.randn(2, *tiny.shape), tiny.cond(2), tiny.cond(2, seed=5)
    draw = lambda **options: module.sample(  # noqa: E731
        2, cond, noise=z, generator=torch.Generator().manual_seed(3), **options
    )
    torch.testing.assert_close(draw(negative=negative, negative_scale=0.0), draw(), rtol=1e-4, atol=1e-4)
    assert (draw(negative=negative) - draw()).abs().max() > 1e-3


def test_negative_prompts_do_not_go_with_a_second_branch():
    tiny = sd15()
    module = DMD2(tiny.denoiser(), num_steps=2, ema=[], shape=list(tiny.shape))
    module.configure_model()
    z, cond, negative = torch.randn(2, *tiny.shape), tiny.cond(2), tiny.cond(2, seed=5)
    with pytest.raises(ValueError, match="does not go with guidance that runs the student twice; leave out guidance_s"):
        module.sample(2, cond, noise=z, negative=negative, guidance_scale=3.0)
    once = module.sample(2, cond, noise=z, negative=negative, guidance_scale=1.0, num_steps=1)
    torch.testing.assert_close(once, module.sample(2, cond, noise=z, negative=negative, num_steps=1))


class OneLayer(nn.Module):
    """Attends, if at all, to tokens of its own."""

    def __init__(self, name):
        super().__init__()
        self.attention = Attention(2, cross_attention_dim=8, heads=1, dim_head=2)
        self.name = name

    def forward(self, x, t, encoder_hidden_states):
        shown = {} if self.name is None else {self.name: encoder_hidden_states}
        return self.attention(x[:, None].expand(-1, 3, -1), **shown)[:, 0] if shown else x


def test_negative_prompts_that_no_layer_is_shown_are_refused():
    cond, negative = ({"encoder_hidden_states": torch.randn(2, 5, 8)} for _ in range(2))
    x, t = torch.randn(2, 2), torch.tensor(0.6)
    steered, deaf = (
        Denoiser(OneLayer(name), FlowMatching(), "flow_prediction") for name in ("encoder_hidden_states", None)
    )
    with torch.no_grad(), negative_prompts(steered, cond, negative, 0.5) as both:
        steered(x, t, both)
        with pytest.raises(ValueError, match=r"is shown 5 tokens, but .* have 10 together; call the network with the"):
            steered(x, t, cond)
    with (
        negative_prompts(deaf, cond, negative, 0.5) as both,
        pytest.raises(ValueError, match="no cross-attention layer of OneLayer was shown the tokens"),
    ):
        deaf(x, t, both)


def test_layers_that_attend_to_pictures_as_well_are_refused():
    tiny = wan()
    config = {k: v for k, v in tiny.network.config.items() if not k.startswith("_")}
    config |= {"image_dim": 6, "added_kv_proj_dim": 24}
    denoiser = Denoiser(random_network("WanTransformer3DModel", **config), FlowMatching(), "flow_prediction")
    with (
        pytest.raises(ValueError, match="WanTransformer3DModel attends to text and to a picture in the same layers"),
        negative_prompts(denoiser, tiny.cond(1), tiny.cond(1)),
    ):
        pass


@pytest.mark.parametrize("scale", [-0.5, float("nan")])
def test_steering_towards_negative_prompts_is_refused(scale):
    tiny = sd15()
    with (
        pytest.raises(ValueError, match="would steer towards the negative prompts; give 0 or more"),
        negative_prompts(tiny.denoiser(), tiny.cond(1), tiny.cond(1), scale),
    ):
        pass


def test_models_without_cross_attention_are_refused():
    tiny = sd3()
    with (
        pytest.raises(ValueError, match="SD3Transformer2DModel has no cross-attention"),
        negative_prompts(tiny.denoiser(), tiny.cond(1), tiny.cond(1)),
    ):
        pass


# ------------------------------------------------------------------------------------------------ adapters
def adapted():
    """A teacher, an adapter on it whose weights count, and a student that began as the teacher."""
    teacher = sd15().denoiser()
    student = Denoiser(merged_network(teacher), teacher.process, "epsilon", family=teacher.family)
    adapter = add_adapter(teacher, rank=3, alpha=6.0)
    with torch.no_grad():
        for _, parameter in adapter.adapter_parameters():
            parameter.normal_(std=0.2)
    return teacher, adapter, student


def outputs(denoiser):
    tiny = sd15()
    x = torch.randn(2, *tiny.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return denoiser(x, torch.tensor(0.5), tiny.cond(2)).raw


def test_an_adapter_means_the_same_on_equal_weights(tmp_path):
    _, adapter, student = adapted()
    before, wanted = outputs(student), outputs(adapter)
    assert (before - wanted).abs().max() > 1e-2
    names = transfer_adapter(adapter, student)
    torch.testing.assert_close(outputs(student), wanted, rtol=1e-4, atol=1e-4)
    transfer_adapter(adapter, student, -1.0)
    torch.testing.assert_close(outputs(student), before, rtol=1e-4, atol=1e-4)
    # and through a file of diffusers, which states alpha by layer
    state = {f"unet.{k}": v.contiguous() for k, v in adapter.adapter_state_dict().items()}
    state |= {f"unet.{name}.alpha": torch.tensor(6.0) for name in names}
    save_file(state, tmp_path / "style.safetensors")
    transfer_adapter(tmp_path / "style.safetensors", student)
    torch.testing.assert_close(outputs(student), wanted, rtol=1e-4, atol=1e-4)


def test_transfers_that_do_not_fit_change_nothing(tmp_path):
    teacher, adapter, student = adapted()
    with pytest.raises(ValueError, match="shares its weights"):
        transfer_adapter(adapter, teacher)
    other = Denoiser(ResidualMLP((2,), 8, 1), FlowMatching(), "flow_prediction")
    with pytest.raises(ValueError, match="ResidualMLP does not have"):
        transfer_adapter(adapter, other)
    changes = adapter_changes(adapter)
    last = list(changes)[-1]
    wrong = {f"{p}.lora_A.weight": torch.ones(1, 2) for p in [last]} | {f"{last}.lora_B.weight": torch.ones(3, 1)}
    before = outputs(student)
    with pytest.raises(ValueError, match="same architecture and size"):
        transfer_adapter(wrong, student)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        transfer_adapter(tmp_path / "nothing.safetensors", student)
    with pytest.raises(ValueError, match="lora_B"):
        transfer_adapter({"a.lora_A.weight": torch.ones(1, 2)}, student)
    assert torch.equal(outputs(student), before)


def test_the_students_own_noise_scale_is_kept(models):
    teacher, student = models
    draws = [torch.Generator().manual_seed(1) for _ in range(2)]
    alone = generate(student, noise(), {}, TIMES, "renoise", generator=draws[0], noise_scale=0.5)
    both = hybrid(teacher, student, noise(), {}, TIMES, first=0, generator=draws[1], noise_scale=0.5)
    assert torch.equal(both, alone)
    draws = [torch.Generator().manual_seed(1) for _ in range(2)]
    calm, wild = (
        hybrid(teacher, student, noise(), {}, TIMES, first=1, generator=g, noise_scale=w)
        for g, w in zip(draws, (0.5, 1.0))
    )
    assert (calm - wild).abs().mean() > 1e-3


def test_a_sampler_that_needs_the_start_is_refused(models):
    teacher, student = models
    with pytest.raises(ValueError, match="cannot go on where the teacher stopped; use a student with sampler='ode'"):
        hybrid(teacher, student, noise(), {}, TIMES, first=1, sampler="start_noise")
    with pytest.raises(ValueError, match="needs the starting noise itself"):
        generate(student, noise(), {}, TIMES, "start_noise", noisy=True)
    alone = generate(student, noise(), {}, TIMES, "start_noise")
    assert torch.equal(hybrid(teacher, student, noise(), {}, TIMES, first=0, sampler="start_noise"), alone)
