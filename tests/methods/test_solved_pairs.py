"""Pairs that a run's own teacher solves."""

import pytest
import torch
from conftest import fit
from small_problems import Affine, Exact, Given, mlp, ready

from lightning_distill.batch import Batch
from lightning_distill.data.store import StoreWriter
from lightning_distill.ema import ConstantEMA
from lightning_distill.generation import generate
from lightning_distill.guidance import Guidance, IntervalGuidance
from lightning_distill.methods import DMD, DMD2
from lightning_distill.methods.solved_pairs import SolvedPairs
from lightning_distill.networks.analytic import analytic_denoiser, ring
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.small import small_text_unet
from lightning_distill.networks.text_entries import TOKENS
from lightning_distill.processes import FlowMatching
from lightning_distill.times import few_step_times

FLOW = FlowMatching()


def method(teacher, pairs, cls=DMD2, **settings):
    extra = {"regression_steps": 2} if cls is DMD2 else {}
    own = {"student": Given(Affine(1.0, 0.0)), "fake_score": Exact(), "shape": [2], "ema": []}
    return cls(teacher, regression_pairs=pairs, **own, **extra, **settings)


def all_of(module):
    ready(module)
    source = module.regression.pairs(module)
    return source.gather(torch.arange(len(source)), 0)


def test_they_are_the_solver_s_steps_from_their_noise():
    teacher = analytic_denoiser(ring(4, 1.5, 0.35), FLOW)
    pairs = all_of(method(teacher, SolvedPairs(num=7, steps=5, batch_size=3)))
    assert pairs.noise.shape == pairs.x0.shape == (7, 2)
    assert pairs.x0.dtype == torch.float32
    x = pairs.noise.double()
    for t, s in zip([1.0, 0.8, 0.6, 0.4, 0.2], [0.8, 0.6, 0.4, 0.2, 0.0]):
        clean = teacher(x, torch.full((7,), t, dtype=torch.float64), {}).x0
        x = x + (s - t) * (x - clean) / t
    torch.testing.assert_close(pairs.x0, x.float(), atol=2e-3, rtol=2e-3)  # kept in half precision
    assert len(set(pairs.noise[:, 0].tolist())) == 7
    again = all_of(method(teacher, SolvedPairs(num=7, steps=5, batch_size=7)))
    torch.testing.assert_close(again.x0, pairs.x0)
    assert torch.equal(again.noise, pairs.noise)
    other = all_of(method(teacher, SolvedPairs(num=7, steps=5, seed=1)))
    assert not torch.equal(other.noise, pairs.noise)


def test_classes_in_turn_with_the_guidance_of_the_method():
    teacher = analytic_denoiser(ring(4, 1.5, 0.35, labelled=True), FLOW)
    plain = all_of(method(teacher, SolvedPairs(num=6, steps=4)))
    assert plain.cond["class_labels"].tolist() == [0, 1, 2, 3, 0, 1]
    of_method = all_of(method(teacher, SolvedPairs(num=6, steps=4), guidance=Guidance(2.0)))
    given = all_of(method(teacher, SolvedPairs(num=6, steps=4, guidance_scale=2.0)))
    assert torch.equal(of_method.x0, given.x0)
    assert (of_method.x0 - plain.x0).abs().max() > 0.05


def test_what_cannot_be_solved_is_refused():
    for settings in ({"num": 0}, {"steps": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="give 1 or more of each"):
            SolvedPairs(**settings)
    with pytest.raises(ValueError, match="SolvedPairs\\(solver='rk45'\\): choose one of ode"):
        SolvedPairs(solver="rk45")
    labelled = analytic_denoiser(ring(4, 1.5, 0.35, labelled=True), FLOW)
    with pytest.raises(ValueError, match="IntervalGuidance has no fixed scale"):
        method(labelled, SolvedPairs(), guidance=IntervalGuidance(2.0, 0.1, 0.9)).configure_model()
    unlabelled = analytic_denoiser(ring(4, 1.5, 0.35), FLOW)
    with pytest.raises(ValueError, match="guid"):
        method(unlabelled, SolvedPairs(guidance_scale=2.0)).configure_model()
    of_texts = Denoiser(small_text_unet(), FLOW, "flow_prediction")
    with pytest.raises(ValueError, match=r"needs encoder_hidden_states; give SolvedPairs\(conditions="):
        DMD2(of_texts, regression_pairs=SolvedPairs(), regression_steps=1, ema=[]).configure_model()


def test_conditions_of_a_store_are_taken_in_turn(tmp_path):
    torch.manual_seed(0)
    network = small_text_unet(sample_size=8, block_out_channels=[8, 8, 8, 8])
    teacher = Denoiser(network, FLOW, "flow_prediction", null_cond={TOKENS: torch.zeros(1, 3, 384)}).eval()
    tokens = torch.randn(3, 3, 384)
    StoreWriter(tmp_path, {"kind": "cache"}, 3).write(0, {TOKENS: tokens, "encoder_attention_mask": torch.zeros(3, 3)})
    pairs = SolvedPairs(num=5, steps=2, batch_size=2, conditions=str(tmp_path), cond_keys=[TOKENS])
    module = DMD2(teacher, regression_pairs=pairs, regression_steps=1, ema=[], guidance=Guidance(2.0))
    made = all_of(module)
    assert list(made.cond) == [TOKENS]
    assert torch.equal(made.cond[TOKENS], tokens[[0, 1, 2, 0, 1]])
    want = generate(teacher, made.noise, made.cond, few_step_times(FLOW, 2), "ode", guidance_scale=2.0)
    torch.testing.assert_close(made.x0, want.float(), atol=2e-3, rtol=2e-3)
    typo = SolvedPairs(conditions=str(tmp_path), cond_keys=[TOKENS, "pooled"])
    with pytest.raises(ValueError, match="has no 'pooled', but encoder_attention_mask, encoder_hidden_states"):
        DMD2(teacher, regression_pairs=typo, regression_steps=1, ema=[]).configure_model()
    wrong = SolvedPairs(conditions=str(tmp_path), cond_keys=["encoder_attention_mask"])
    with pytest.raises(ValueError, match="knows encoder_attention_mask, and the teacher needs encoder_hidden_states"):
        DMD2(teacher, regression_pairs=wrong, regression_steps=1, ema=[]).configure_model()


@pytest.mark.filterwarnings("ignore:ConstantEMA", "ignore:.*eval mode")
def test_a_warm_up_on_them_ends_at_the_teachers_samples():
    teacher = mlp()
    settings = {"regression_pairs": SolvedPairs(num=64, steps=8), "fake_score_steps": 1, "ema": [ConstantEMA(0.9)]}
    module = DMD2(teacher, regression_steps=150, student_optimizer=fast, **settings)
    fit(module, 1, Batch(size=64), 64)
    source = module.regression.pairs(module)
    pairs = source.gather(torch.arange(64), 0)
    before = error(module, pairs)
    module = DMD2(teacher, regression_steps=150, student_optimizer=fast, **settings)
    fit(module, 150, Batch(size=64), 64)
    assert error(module, pairs) < 0.3 * before


def fast(parameters):
    return torch.optim.Adam(parameters, lr=1e-2)


@torch.no_grad()
def error(module, pairs):
    made = module.student(pairs.noise, torch.ones(len(pairs.noise)), {}).x0
    return float((made - pairs.x0).square().mean())


def test_dmd_takes_them_too():
    teacher = analytic_denoiser(ring(4, 1.5, 0.35), FLOW)
    module = ready(method(teacher, SolvedPairs(num=5, steps=2), cls=DMD))
    rows = (module.draws.uniform("pairs", 3) * 5).long()
    pairs = module.regression.pairs(module).gather(rows, 0)
    want = (pairs.noise - pairs.x0).square().mean()  # the student of this test puts out its input
    torch.testing.assert_close(module.regression.loss(module, 3).detach(), want)
