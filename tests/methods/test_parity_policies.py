"""The losses of released code, reproduced: policies of momentum modes; see ``test_parity``."""

from __future__ import annotations

import pytest
from parity_networks import STUDENT, TEACHER, Formula, Given, check, fixture, learner
from test_parity_trajectories import Ended

from lightning_distill.batch import Batch
from lightning_distill.methods import ArcFlow
from lightning_distill.processes import FlowMatching
from lightning_distill.times import Uniform


@pytest.mark.parametrize(
    ("case", "points", "settings", "update"),
    [
        ("plain", 3, {}, 2000),
        ("mixed", 2, {}, 500),
        ("window", 3, {"window": 0.25}, 2000),
        ("dropout", 3, {"dropout": 0.3}, 2000),
    ],
)
def test_arc_flow(case, points, settings, update):
    """Twice as large, without the factor 1/2; the released integral takes 1e-4 for smaller exponents."""
    given, expected = fixture("ArcFlow")
    module = learner(
        ArcFlow,
        FlowMatching(),
        Ended(STUDENT),
        Formula(TEACHER),
        kind="flow_prediction",
        num_steps=2,
        components=int(given.components),
        points=points,
        decay_updates=int(given.decay),
        training_times=Uniform(0.0, 1.0),
        **settings,
    )
    network = module.student.network
    network.fill(network.policy_head.layer, STUDENT + 6, 0.4, 0.3)
    draws = {f"own{i}": column for i, column in enumerate(vars(given)[f"own_{points}"].unbind(1))}
    draws |= {f"theirs{i}": column for i, column in enumerate(vars(given)[f"theirs_{points}"].unbind(1))}
    draws |= {f"dropout{i}": column for i, column in enumerate(given.dropped.unbind(1))}
    module.draws = Given(update, segment=given.raw_time, noise=given.noise, **draws)
    loss = module.student_loss(Batch(x0=given.x0)).losses["imitation"]
    check(loss, network, expected[case], factor=0.5, rel=1e-6)
