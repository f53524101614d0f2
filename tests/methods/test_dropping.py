"""Dropped conditions: what replaces them, whose, and that training a teacher on text does it."""

from __future__ import annotations

import pytest
import torch

from lightning_distill.batch import Batch
from lightning_distill.guidance import Guidance, check_guidance
from lightning_distill.methods import TeacherTraining
from lightning_distill.methods.dropping import drop_conditions
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.small import ResidualMLP, small_text_unet
from lightning_distill.processes import FlowMatching, VariancePreserving
from lightning_distill.randomness import Draws, RandomStreams

WIDTH = 8


def text_denoiser(**null):
    network = small_text_unet(8, 1, WIDTH, (8, 16), 1, norm_num_groups=4, pooling_heads=2)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    process = VariancePreserving(zero_terminal_snr=True)
    return Denoiser(network, process, "v_prediction", null_cond=null or None, sigma_data=0.5)


def test_rows_below_the_share_have_the_null_and_the_others_are_untouched():
    null = torch.randn(1, 5, WIDTH)
    denoiser = text_denoiser(encoder_hidden_states=null, time_ids=0.0)
    cond = {"encoder_hidden_states": torch.randn(6, 5, WIDTH), "time_ids": torch.ones(6, 3), "note": "kept"}
    u = torch.tensor([0.1, 0.9, 0.299, 0.3, 0.5, 0.0])
    got = drop_conditions(denoiser, cond, u, 0.3)
    for row, dropped in enumerate([True, False, True, False, False, True]):
        wanted = null[0] if dropped else cond["encoder_hidden_states"][row]
        assert torch.equal(got["encoder_hidden_states"][row], wanted)
        assert torch.equal(got["time_ids"][row], torch.full((3,), 0.0 if dropped else 1.0))  # all of a sample's at once
    assert got["note"] == "kept"
    assert list(got) == list(cond)


def test_what_both_branches_share_stays_and_masks_follow_their_tokens():
    null = {"encoder_hidden_states": torch.randn(1, 2, WIDTH), "encoder_attention_mask": torch.ones(1, 2)}
    denoiser = text_denoiser(**null)
    cond = {
        "encoder_hidden_states": torch.randn(2, 4, WIDTH),
        "encoder_attention_mask": torch.ones(2, 4, dtype=torch.uint8),
        "time_ids": torch.tensor([[1.0], [2.0]]),
    }
    got = drop_conditions(denoiser, cond, torch.tensor([0.2, 0.8]), 0.5)
    assert got["encoder_attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert got["encoder_attention_mask"].dtype == torch.uint8
    assert torch.equal(got["encoder_hidden_states"][0, :2], null["encoder_hidden_states"][0])
    assert torch.equal(got["time_ids"], cond["time_ids"])


def test_labels_become_the_null_class():
    denoiser = Denoiser(ResidualMLP((2,), 8, 1, num_classes=3), FlowMatching(), "flow_prediction")
    got = drop_conditions(denoiser, {"class_labels": torch.arange(3)}, torch.tensor([0.9, 0.1, 0.9]), 0.5)
    assert got["class_labels"].tolist() == [0, 3, 2]


def test_a_share_of_zero_asks_for_no_null():
    cond = {"encoder_hidden_states": torch.randn(2, 4, WIDTH)}
    assert (
        drop_conditions(text_denoiser(), cond, torch.zeros(2), 0.0)["encoder_hidden_states"]
        is cond["encoder_hidden_states"]
    )
    with pytest.raises(ValueError, match="unconditional value for 'encoder_hidden_states'"):
        drop_conditions(text_denoiser(), cond, torch.zeros(2), 0.1)


def seen_by_network(denoiser, tokens, share):
    """Tokens that the network is given in one training step."""
    module = TeacherTraining(denoiser, label_dropout=share, seed=4)
    module.configure_model()
    module.draws = Draws(module.streams, 0, 0, "student0")
    seen = []
    forward = denoiser.call_network
    denoiser.call_network = lambda x, time, kwargs: (
        seen.append(kwargs["encoder_hidden_states"]),
        forward(x, time, kwargs),
    )[1]
    module.student_loss(Batch(x0=torch.randn(len(tokens), 1, 8, 8), cond={"encoder_hidden_states": tokens}))
    return seen[0]


def test_training_drops_text_at_the_declared_rate():
    tokens, null = torch.randn(64, 5, WIDTH), torch.randn(1, 5, WIDTH)
    got = seen_by_network(text_denoiser(encoder_hidden_states=null), tokens, 0.4)
    drop = RandomStreams(4).uniform("student0/label_dropout", 0, 0, (64,)) < 0.4
    assert 16 < drop.sum() < 36
    assert torch.equal(got, torch.where(drop[:, None, None], null, tokens))


def test_without_a_null_nothing_is_dropped_and_guidance_is_refused():
    tokens, denoiser = torch.randn(32, 5, WIDTH), text_denoiser()
    assert torch.equal(seen_by_network(denoiser, tokens, 0.4), tokens)
    with pytest.raises(ValueError, match="needs an unconditional branch"):
        check_guidance(denoiser, Guidance(2.0))
    check_guidance(text_denoiser(encoder_hidden_states=torch.zeros(1, 5, WIDTH)), Guidance(2.0))
