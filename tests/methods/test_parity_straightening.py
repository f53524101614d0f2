"""The losses of released code, reproduced: step sizes and straightened trajectories; see ``test_parity``."""

from __future__ import annotations

import torch
from parity_networks import STUDENT, TEACHER, Formula, Given, check, fixture, learner

from lightning_distill.batch import Batch
from lightning_distill.losses.rectified import jump_costs
from lightning_distill.methods import BOSS
from lightning_distill.processes import FlowMatching, expand


class Bent(Formula):
    """The formula, which slows down towards the data."""

    def forward(self, x, t):
        return expand(1 + 5 * t**3, x) * super().forward(x, t)


def test_boss():
    """Jumps backwards and of no length, which have no cost here, have the cost 0 there and are never taken."""
    given, expected = fixture("BOSS")
    intervals = int(given.solver_steps)
    module = learner(
        BOSS,
        FlowMatching(),
        Formula(STUDENT),
        Bent(TEACHER),
        kind="flow_prediction",
        num_steps=int(given.steps),
        solver_steps=intervals,
    )
    module.draws = Given(noise=given.noise)
    loss = module.student_loss(Batch(size=3)).losses["velocity"]
    knots = [round((1.0 - t) * intervals) for t in module.student_times]
    assert [*knots, intervals] == expected["knots"]
    check(loss, module.student.network, expected["velocity"])
    states, times = module.trajectory(Batch(size=3))
    costs = jump_costs(states, states.diff(dim=0) / expand(times.diff(), states[1:]), times)
    for i, row in zip(given.cost_rows.int().tolist(), expected["costs"]):
        torch.testing.assert_close(costs[i, i + 1 :], torch.tensor(row, dtype=torch.float64)[i + 1 :])
