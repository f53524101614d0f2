"""The losses of released code, reproduced: methods that restore pictures; see ``test_parity``."""

from __future__ import annotations

import pytest
from parity_networks import FAKE, STUDENT, TEACHER, Formula, Given, built, check, copied, denoiser, fixture

from lightning_distill.batch import Batch
from lightning_distill.methods import CTMSR
from lightning_distill.parameterisations import edm_boundary
from lightning_distill.processes import ResidualShift, expand
from lightning_distill.times import Uniform


class Restoring(Formula):
    """A consistency function of the point shifted towards the picture, which it is told as well."""

    def forward(self, x, t, low):
        z = x + expand(t, x) * low
        skip, out = (expand(c, x) for c in edm_boundary(t, 0.5, 0.0))
        return skip * z + out * super().forward(z + 0.5 * low, t)


@pytest.mark.parametrize("case", ["last", "first", "trajectory"])
def test_ctmsr(case):
    """Charbonnier's distance without its value at 0; the direction there is weighted as a part of the distance."""
    given, expected = fixture("CTMSR")
    networks = [denoiser(phase, ResidualShift(1.0, "linear"), network=Restoring(phase)) for phase in (TEACHER, STUDENT)]
    module = built(
        CTMSR,
        *networks,
        last_intervals=int(given.intervals),
        huber=given.charbonnier,
        trajectory_from=0 if case == "trajectory" else None,
        trajectory_times=Uniform(0.0, 1.0),
    )
    position = given.intervals - 1 - vars(given)[case]
    interval = (given.trajectory_time * 0 + position + 0.5) / given.intervals
    module.draws = Given(
        interval=interval,
        noise=given.noise,
        trajectory__time=given.trajectory_time,
        trajectory__noise=given.trajectory_noise,
    )
    if module.proxy is not None:
        copied(Formula(FAKE), module.proxy)
    losses = module.student_loss(Batch(x0=given.x0, cond={"low": given.low})).losses
    student = module.student.network
    if case == "trajectory":
        check(losses["trajectory"], student, expected[case], factor=given.weight, value=False)
    else:
        check(losses["consistency"], student, expected[case], offset=given.charbonnier)
