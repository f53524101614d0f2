"""Tables of quality beside cheaper settings, and of plans beside measured memory."""

import cost_tables
import pytest

ROW = {"config": cost_tables.CONFIG, "recall": 0.5, "student_updates": 200}


def row(seed, progress, cpu, **more):
    return {**ROW, "seed": seed, "progress": progress, "cpu_seconds": cpu, **more}


def test_seeds_are_paired():
    """Gains of .01 and .03: mean .02, standard error .01, and t of one degree of freedom is 12.706."""
    cheap = {"settings": {"gan_every": "4"}}
    rows = [row(0, 0.9, 100.0), row(1, 0.8, 100.0), row(1, 0.83, 80.0, **cheap), row(0, 0.91, 70.0, **cheap)]
    table = cost_tables.cheaper({"rows": [*rows, row(2, 0.1, 1.0), row(0, 0.0, 9.0, seconds=120.0)]})
    assert "progress +0.020, 95 % between -0.107 and +0.147, for 0.75 of the CPU seconds (2 seeds)" in table
    assert "| none | 0.600 (0.100 to 0.900)" in table
    assert "| `gan_every: 4` | 0.870 (0.830 to 0.910)" in table


@pytest.mark.parametrize("rows", [[], [row(0, 0.9, 100.0)], [row(0, 0.9, 1.0, settings={"gan_every": "4"})]])
def test_without_both_sides_the_command_is_shown(rows):
    assert cost_tables.cheaper({"rows": rows}).startswith("(run")
    assert cost_tables.cheaper(None).startswith("(run")


def test_plans_stand_beside_what_was_measured():
    found = cost_tables.peaks({"rows": [{"what": "a", "batch": 8, "planned": 110 * 2**20, "measured": 100 * 2**20}]})
    assert "| a | 8 | 110 | 100 | 1.10 |" in found
    assert cost_tables.peaks(None).startswith("(run")
