"""How a few-step student may be sampled: what it was trained for, see ``parameterisations``."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_distill.processes import NoiseProcess

__all__ = ["SAMPLERS_OF", "TRAINED_FOR", "check_capability"]

#: by capability: what a student was trained for, and how it is sampled
TRAINED_FOR = {
    "one_step_only": ("one step from t_max", "sampler 'renoise' or 'ode' with the one time t_max"),
    "any_step": ("jumps to clean data", "sampler 'renoise'"),
    "two_time": ("jumps between two times", "sampler 'flow_map', 'gamma', 'renoise', 'ode' or 'heun'"),
    "segments": ("jumps to the end of a segment", "sampler 'ode' with the edges as times"),
    "own_times": ("its own times alone", "sampler {sampler!r} with {own}, or train with other num_steps"),
}
#: samplers of students that take other times than t_max
SAMPLERS_OF = {
    "any_step": ("renoise",),
    "two_time": ("flow_map", "gamma", "renoise", "ode", "heun"),
    "segments": ("ode",),
    "own_times": ("ode", "renoise"),
}


def check_capability(denoise: object, sampler: str, times: Sequence[float], process: NoiseProcess) -> None:
    """Refuse to sample a student in a way it was not trained for; functions without ``capability`` pass.

    Args:
        denoise: what the sampler calls; see ``parameterisations`` for the capabilities.
        sampler: name of the sampler.
        times: its times.
        process: process of the times.

    Raises:
        ValueError: the student's capability does not cover this sampler or these times.
    """
    capability = getattr(denoise, "capability", None)
    if capability is None:
        return
    edges, own = getattr(denoise, "edges", None), getattr(denoise, "student_times", None)
    whole = edges is None or list(edges) == list(times)
    if capability == "own_times":
        known = own is None or all(any(math.isclose(t, o, rel_tol=1e-9) for o in own) for t in times)
        if whole and known and sampler in SAMPLERS_OF[capability]:
            return
    elif len(times) == 1 and times[0] == process.t_max:
        # one step from t_max is what all others can do; a flow map needs the second time all the same
        if capability == "two_time" and whole:
            return
        if capability != "two_time" and (
            sampler not in ("flow_map", "gamma") or getattr(denoise, "takes_target", False)
        ):
            return
    elif capability != "one_step_only" and sampler in SAMPLERS_OF[capability] and whole:
        return
    trained, remedy = TRAINED_FOR[capability]
    if capability == "own_times":
        remedy = remedy.format(sampler=getattr(denoise, "sampler", sampler), own=_rounded(own or times))
    elif not whole:
        remedy += f"{' with these' if capability == 'two_time' else ''}: {_rounded(edges or ())}"
    raise ValueError(
        f"this student was trained for {trained} ({capability}), so sampler {sampler!r} with times {_rounded(times)} "
        f"would not give its samples; use {remedy}."
    )


def _rounded(times: Sequence[float]) -> list[float]:
    return [round(float(t), 4) for t in times]
