"""Scales that students are told, copies that methods keep, and times at which teachers are asked."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from own_methods import Normed, prior, teacher, trainer
from small_problems import mlp, ready

from lightning_distill.batch import Batch
from lightning_distill.data.toy import Toy2D
from lightning_distill.ema import renew_copy
from lightning_distill.guidance import Guidance, RandomGuidance
from lightning_distill.methods import DMD, OFTSR, FlashVDM, LearnedSolver, SlimFlowDistillation, VideoScene
from lightning_distill.methods.solved_pairs import SolvedPairs
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.roles import averaged_copy
from lightning_distill.networks.two_time import TwoTime
from lightning_distill.processes import FlowMatching

pytestmark = pytest.mark.filterwarnings("ignore:.*eval mode", "ignore:.*logging interval", "ignore:.*start from")


def guided_mlp():
    denoiser = mlp(classes=3)
    denoiser.null_class = 3
    return denoiser


def telling_mlp(scale=3.5):
    """A teacher that embeds a guidance scale and has a default."""
    denoiser = TwoTime(kind=None, guidance=True).build(guided_mlp(), "student")
    denoiser.family = replace(denoiser.family, guidance_scale=scale)
    return denoiser.requires_grad_(False).eval()


def told_scales(network, monkeypatch):
    """Guidance with which a network is called, a list that grows."""
    told, forward = [], type(network).forward

    def heard(self, *args, **kwargs):
        if self is network:
            told.append(kwargs.get("guidance"))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(network), "forward", heard)
    return told


def test_a_copy_is_renewed_with_its_statistics():
    student = teacher(Normed())
    kept = averaged_copy(student, "source")
    with torch.no_grad():
        student.network.norm.running_var.fill_(3.0)
        student.network.out.weight.add_(1.0)
    renew_copy(kept, student)
    assert all(torch.equal(kept.state_dict()[k], v) for k, v in student.state_dict().items())


@pytest.mark.parametrize("kind", ["flow_prediction", "sample"])
def test_the_last_step_of_a_teacher_is_asked_above_zero(kind, tmp_path):
    """At 0 the noise of a clean sample is 0 / 0."""
    source = Denoiser(guided_mlp().network, FlowMatching(), kind, sigma_data=1.0, null_class=3)
    module = OFTSR(source, source="gaussian", ratio=1.0, margin=0.01, guidance=Guidance(3.0), ema=[])
    trainer(tmp_path, 3).fit(module, prior(num_classes=3))
    assert float(module.skipped_steps.sum()) == 0.0


def test_no_guidance_can_be_asked_for():
    module = ready(LearnedSolver(guided_mlp(), num_steps=2, solver_steps=4, guidance=Guidance(4.0)))
    noise = torch.randn(6, 2)
    own, plain, same = (module.sample(6, noise=noise, guidance_scale=w) for w in (None, 1.0, 4.0))
    torch.testing.assert_close(own, same)
    assert (own - plain).abs().max() > 1e-2
    module.sampling_network().sampling_guidance = None
    torch.testing.assert_close(module.sample(6, noise=noise), plain)


def test_as_many_steps_as_were_learned_are_those_that_were_learned():
    module = ready(LearnedSolver(guided_mlp(), num_steps=3, solver_steps=6))
    with torch.no_grad():
        module.schedule.logits.add_(torch.tensor([1.0, 0.0, -1.0]))
    noise = torch.randn(6, 2)
    assert torch.equal(module.sample(6, noise=noise, num_steps=3), module.sample(6, noise=noise))
    assert not torch.equal(module.sample(6, noise=noise, num_steps=4), module.sample(6, noise=noise))


def test_a_first_stage_without_a_scale_to_teach_is_told_of(tmp_path):
    module = FlashVDM(guided_mlp(), guidance_updates=2, gan_from=8, check_data=False, ema=[])
    with pytest.warns(UserWarning, match="teach a guidance scale") as told:
        trainer(tmp_path, 1).fit(module, Toy2D("ring", batch_size=8))
    texts = " ".join(str(warning.message) for warning in told)
    assert "teach a guidance scale, and guidance is 1" in texts
    assert "guidance_updates asks for 3 student updates" in texts


def test_the_correction_is_of_the_scale_that_the_student_is_told(monkeypatch):
    settings = {"student": TwoTime(kind=None, guidance=True), "guidance": RandomGuidance(1.0, 6.0)}
    module = ready(SlimFlowDistillation(guided_mlp(), solver_steps=4, **settings))
    told, corrected = told_scales(module.student, monkeypatch), []
    policy = module.guided_teacher

    def guided_teacher(batch):
        corrected.append(module.told_scale(torch.zeros(batch.size, dtype=torch.float64)))
        return policy(batch)

    monkeypatch.setattr(module, "guided_teacher", guided_teacher)
    stored = torch.linspace(1.0, 6.0, 6)
    batch = Batch(cond={"class_labels": torch.arange(6) % 3}, x0=torch.randn(6, 2), noise=torch.randn(6, 2))
    module.student_loss(replace(batch, predictions={"scale": stored}))
    assert torch.equal(told[0].float(), stored)
    assert torch.equal(told[1], corrected[-1])
    assert not torch.equal(told[1], told[0])


@pytest.mark.parametrize("scale", [None, 5.0])
def test_pairs_tell_what_rollouts_tell(scale, monkeypatch):
    """A copy of a teacher with a default is told that one, wherever it is called."""
    module = DMD(telling_mlp(), guidance=scale and Guidance(scale), regression_pairs=SolvedPairs(num=8, steps=2))
    told = told_scales(ready(module).student, monkeypatch)
    module.student_loss(Batch(cond={"class_labels": torch.arange(4) % 3}, size=4))
    assert len(told) == 2
    assert told == [None, None]


def test_predictions_begin_at_the_renderings_of_a_batch():
    module = ready(VideoScene(mlp(), rendering=None))
    batch = Batch(noise=torch.full((64, 2), 5.0), size=64)
    torch.manual_seed(1)
    found = module.predict_step(batch, 0)
    torch.manual_seed(1)
    torch.testing.assert_close(found, module.leap_from(batch.noise))
