"""EDM's and consistency models' networks in diffusers' format, against coefficients written out."""

import json
import math

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDPMPipeline,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    UNet2DModel,
)

from lightning_distill.generation import default_cond
from lightning_distill.guidance import Guidance, check_guidance
from lightning_distill.networks.preconditioning import PreconditionedEDM
from lightning_distill.networks.specs import PretrainedDenoiser, seeded
from lightning_distill.parameterisations import ConsistencyFunction
from lightning_distill.processes import EDM, FlowMatching, VariancePreserving, change_process

#: of CosXL and Stable Video Diffusion: EDM's noise levels, named by a scheduler of Stable Diffusion
CONTINUOUS = {"timestep_type": "continuous", "prediction_type": "v_prediction", "use_karras_sigmas": True}
SIGMAS = (80.0, 2.5, 0.5, 0.002)
LABELS = torch.tensor([3, 0, 7, 7])


def adm(classes=8):
    """ImageNet-64's architecture, of another size: ADM's blocks, scale-shift and a table of classes."""
    with seeded(0):
        network = UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            num_class_embeds=classes,
            block_out_channels=(8, 16),
            attention_head_dim=8,
            norm_num_groups=4,
            attn_norm_num_groups=4,
            down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
            downsample_type="resnet",
            upsample_type="resnet",
            resnet_time_scale_shift="scale_shift",
        )
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return network.eval()


@pytest.fixture(scope="module")
def network():
    return adm()


def written(folder, network, scheduler):
    pipeline = ConsistencyModelPipeline if isinstance(scheduler, CMStochasticIterativeScheduler) else DDPMPipeline
    pipeline(network, scheduler).save_pretrained(folder)
    return str(folder)


def denoised(network, x, sigma, factor, sign=1.0, sd=0.5, sigma_min=0.0):
    """c_skip x + c_out F(c_in x, k ln sigma), sample by sample."""
    rows = []
    for one, label, s in zip(x, LABELS, sigma):
        length = math.sqrt(s * s + sd * sd)
        f = network(one[None] / length, torch.tensor([factor * math.log(s)]), class_labels=label[None]).sample[0]
        rows.append(sd**2 / ((s - sigma_min) ** 2 + sd**2) * one + sign * (s - sigma_min) * sd / length * f)
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("scheduler", "factor", "sign", "sd"),
    [
        (CMStochasticIterativeScheduler(), 250.0, 1.0, 0.5),
        (CMStochasticIterativeScheduler(sigma_data=0.4, num_train_timesteps=201), 250.0, 1.0, 0.4),
        (EDMEulerScheduler(), 0.25, 1.0, 0.5),
        (EDMDPMSolverMultistepScheduler(prediction_type="v_prediction", sigma_data=1.0), 0.25, -1.0, 1.0),
        (EulerDiscreteScheduler(**CONTINUOUS, sigma_min=0.002, sigma_max=80.0), 0.25, -1.0, 1.0),
    ],
    ids=["cm", "cm-0.4", "edm-euler", "edm-dpm-v", "euler-continuous"],
)
@torch.no_grad()
def test_schedulers_tell_preconditioning(tmp_path, network, scheduler, factor, sign, sd):
    denoiser = PretrainedDenoiser(written(tmp_path, network, scheduler)).build()
    sigma = torch.tensor(SIGMAS, dtype=torch.float64)
    x = torch.randn(4, 3, 8, 8) * sigma.float()[:, None, None, None].clamp_min(0.5)
    found = denoiser(x, sigma, {"class_labels": LABELS})
    expected = denoised(network, x, SIGMAS, factor, sign, sd)
    assert torch.allclose(found.x0, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert (type(denoiser.process), denoiser.process.sigma_max, denoiser.process.sigma_min) == (EDM, 80.0, 0.002)
    assert (denoiser.sigma_data, denoiser.data_scale) == (sd, sd)
    # diffusers' own arithmetic of its schedulers, where it has EDM's
    if isinstance(scheduler, EDMEulerScheduler):
        assert torch.allclose(scheduler.precondition_noise(sigma), denoiser._time(sigma), rtol=1e-6)


@torch.no_grad()
def test_consistency_functions_have_the_pipelines_coefficients(tmp_path, network):
    """The method's boundary on top of the same reading is what the stock scheduler makes of the same network."""
    scheduler = CMStochasticIterativeScheduler(clip_denoised=False)
    denoiser = PretrainedDenoiser(written(tmp_path, network, scheduler)).build()
    scheduler.set_timesteps(4)
    function = ConsistencyFunction(denoiser, {"class_labels": LABELS[:2]}, boundary="edm")
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas.double()):
        x = torch.randn(2, 3, 8, 8) * sigma.float()
        out = network(scheduler.scale_model_input(x, t), t, class_labels=LABELS[:2]).sample
        skip, factor = scheduler.get_scalings_for_boundary_condition(sigma)
        expected = skip.float() * x + factor.float() * out
        assert torch.allclose(function(x, sigma.expand(2)).x0, expected, atol=2e-4)
        scheduler.step(out, t, x)


def test_eulers_continuous_times_need_no_range_and_count_steps_for_noise(tmp_path, network):
    stock = EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction")
    process = PretrainedDenoiser(written(tmp_path / "v", network, stock)).build().process
    levels = stock.sigmas[:-1]
    assert (process.sigma_max, process.sigma_min) == pytest.approx((float(levels[0]), float(levels[-1])))
    # of noise predictions the stock scheduler tells the steps' numbers, whatever its times are called
    stock = EulerDiscreteScheduler(timestep_type="continuous")
    stock.set_timesteps(5)
    denoiser = PretrainedDenoiser(written(tmp_path / "eps", network, stock)).build()
    assert isinstance(denoiser.process, VariancePreserving)
    t = denoiser.process.t_from_log_snr(-2.0 * stock.sigmas[:-1].double().log())
    torch.testing.assert_close(denoiser._time(t), stock.timesteps, rtol=1e-4, atol=1e-2, check_dtype=False)


def test_the_networks_process_is_that_of_its_input():
    inner, outer = PreconditionedEDM(0.5), EDM()
    t = torch.logspace(-3, 2, 31, dtype=torch.float64)
    assert torch.allclose(inner.alpha(t).square() + inner.sigma(t).square(), torch.ones_like(t))
    assert torch.allclose(inner.t_from_log_snr(inner.log_snr(t)), t)
    moved, factor = change_process(t, outer, inner, 0.5)
    assert torch.allclose(moved, t)
    assert torch.allclose(factor, (t.square() + 0.25).rsqrt())
    shifted = t.clone().requires_grad_(True)
    for of, slope in ((inner.alpha, inner.d_alpha), (inner.sigma, inner.d_sigma)):
        (derivative,) = torch.autograd.grad(of(shifted).sum(), shifted)
        assert torch.allclose(derivative, slope(t))
    with pytest.raises(ValueError, match="standard deviation is positive"):
        PreconditionedEDM(0.0)


def test_classes_without_one_for_none(tmp_path, network):
    denoiser = PretrainedDenoiser(written(tmp_path, network, CMStochasticIterativeScheduler())).build()
    assert (denoiser.num_classes, denoiser.null_class) == (8, None)
    assert torch.equal(default_cond(denoiser, 3, first=7)["class_labels"], torch.tensor([7, 0, 1]))
    with pytest.raises(ValueError, match=r"UNet2DModel.* has no null class"):
        check_guidance(denoiser, Guidance(2.0))
    with pytest.raises(ValueError, match="unconditional value for 'class_labels'"):
        denoiser.null_cond({"class_labels": LABELS})


def test_contradictions_and_other_processes_are_refused(tmp_path, network):
    folder = written(tmp_path, network, CMStochasticIterativeScheduler())
    with pytest.raises(ValueError, match=r"sigma_data of .* is 1.0 by argument sigma_data but 0.5 by .*scheduler"):
        PretrainedDenoiser(folder, sigma_data=1.0).check()
    with pytest.raises(ValueError, match=r"VariancePreserving.* by argument process but EDM"):
        PretrainedDenoiser(folder, process=VariancePreserving()).check()
    with pytest.raises(ValueError, match=r"noise up to sigma = 80.*leave out method_process"):
        PretrainedDenoiser(folder, method_process=FlowMatching()).build()
    assert PretrainedDenoiser(folder, process=EDM(), sigma_data=0.5).build().sigma_data == 0.5
    # a card may describe the same network in its own way, without the scheduler
    card = {
        "process": {"class_path": "lightning_distill.processes.EDM"},
        "network_process": {"class_path": "lightning_distill.processes.TrigFlow"},
        "prediction_type": "sample",
        "sigma_data": 0.7,
    }
    (tmp_path / "card.json").write_text(json.dumps(card))
    own = PretrainedDenoiser(folder).build()
    assert (own.prediction_type, own.sigma_data, own.family.sign) == ("sample", 0.7, 1.0)
