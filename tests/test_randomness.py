"""Draws are functions of (seed, stream, update, sample), and good random numbers."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from lightning_distill.randomness import BLOCK, Draws, RandomStreams, derive_seed, replayed


@pytest.mark.parametrize("kind", ["normal", "uniform"])
@pytest.mark.parametrize(("first", "count"), [(0, 1), (0, 40), (3, 5), (15, 2), (16, 16), (31, 33), (1000, 7)])
def test_a_sample_has_the_same_draw_in_every_batch(kind, first, count):
    draw = getattr(RandomStreams(3), kind)
    whole = draw("a/noise", 7, 0, (first + count, 2, 3))
    part = draw("a/noise", 7, first, (count, 2, 3))
    assert part.shape == (count, 2, 3)
    assert torch.equal(part, whole[first:])


def test_ranks_and_micro_batches_partition_the_draws_of_one_process():
    streams = RandomStreams(0)
    whole = Draws(streams, 4, 0, "student0").normal("noise", (24, 2))
    ranks = [Draws(streams, 4, 12 * rank, "student0").normal("noise", (12, 2)) for rank in range(2)]
    micro = [Draws(streams, 4, 6 * part, "student0").uniform("time", 6) for part in range(4)]
    assert torch.equal(torch.cat(ranks), whole)
    assert torch.equal(torch.cat(micro), Draws(streams, 4, 0, "student0").uniform("time", 24))


def test_seed_stream_update_and_sample_all_matter():
    base = RandomStreams(0).normal("a", 0, 0, (BLOCK, 8))
    others = [
        RandomStreams(1).normal("a", 0, 0, (BLOCK, 8)),
        RandomStreams(0).normal("b", 0, 0, (BLOCK, 8)),
        RandomStreams(0).normal("a", 1, 0, (BLOCK, 8)),
        RandomStreams(0).normal("a", 0, BLOCK, (BLOCK, 8)),
        RandomStreams(0).normal("a", 0, 1, (BLOCK, 8)),
    ]
    for other in others:
        assert not torch.equal(base, other)
        assert abs(float((base * other).mean())) < 0.4 or other is others[-1]
    assert torch.equal(others[-1][:-1], base[1:])


def test_phases_differ_and_slices_are_shared():
    streams = RandomStreams(0)
    student = Draws(streams, 2, 0, "student0", slice_index=0)
    critic = Draws(streams, 2, 0, "fake_score0", slice_index=0)
    later = Draws(streams, 2, 0, "fake_score1", slice_index=1)
    assert not torch.equal(student.normal("noise", (4, 2)), critic.normal("noise", (4, 2)))
    assert torch.equal(student.of_slice().normal("start", (4, 2)), critic.of_slice().normal("start", (4, 2)))
    assert not torch.equal(student.of_slice().normal("start", (4, 2)), later.of_slice().normal("start", (4, 2)))


def test_integers_are_uniform_and_equal_for_every_sample():
    streams = RandomStreams(5)
    values = torch.tensor([streams.integer("slice0/stop", update, 4) for update in range(4000)])
    counts = values.bincount(minlength=4)
    assert len(counts) == 4
    # chi-squared with 3 degrees of freedom: 16.3 is the 99.9 % quantile
    assert float(((counts - 1000.0) ** 2 / 1000.0).sum()) < 16.3
    assert len({Draws(streams, 9, first, "student0").integer("stop", 1000) for first in range(64)}) == 1
    pairs = values[:-1] * 4 + values[1:]
    assert float(((pairs.bincount(minlength=16) - 250.0) ** 2 / 250.0).sum()) < 37.7  # 15 degrees of freedom


def test_numbers_have_their_distribution():
    streams = RandomStreams(1)
    normal = torch.cat([streams.normal("n", update, 0, (64, 32), dtype=torch.float64) for update in range(20)])
    n = normal.numel()
    assert abs(float(normal.mean())) < 4 / n**0.5
    assert float(normal.var()) == pytest.approx(1.0, abs=4 * (2 / n) ** 0.5)
    assert float(normal.pow(4).mean()) == pytest.approx(3.0, abs=4 * (96 / n) ** 0.5)
    uniform = torch.cat([streams.uniform("u", update, 0, (2000,)) for update in range(5)])
    assert uniform.dtype == torch.float64
    assert float(uniform.min()) > 0.0
    assert float(uniform.max()) < 1.0
    levels = (torch.arange(len(uniform)) + 0.5) / len(uniform)
    assert float((uniform.sort().values - levels).abs().max()) < 1.95 / len(uniform) ** 0.5  # Kolmogorov, 99.9 %


def test_global_generators_are_left_alone():
    before = torch.get_rng_state()
    RandomStreams(0).normal("a", 0, 0, (100, 2))
    RandomStreams(0).uniform("a", 0, 0, (100,))
    RandomStreams(0).integer("a", 0, 10)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.long
def test_seeds_do_not_depend_on_the_process():
    code = "from lightning_distill.randomness import derive_seed; print(derive_seed(3, 'student0/noise', 17, 2))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=".")
    assert int(out.stdout) == derive_seed(3, "student0/noise", 17, 2)
    assert 0 <= derive_seed("x") < 2**63
    assert derive_seed(1, 23) != derive_seed(12, 3)


def test_what_is_replayed_is_drawn_again():
    drop, x = torch.nn.Dropout(0.5), torch.ones(64)
    with replayed([x]):
        first = drop(x)
    assert torch.equal(drop(x), first)
    assert not torch.equal(drop(x), first)
