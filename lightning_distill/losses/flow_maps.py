"""Two-time flow maps: targets and residuals of the average velocity u(x, t, r) of flow matching.

    X_{t->r}(x) = x - (t - r) u(x, t, r),     u(x, t, t) = v(x, t),     dx/dt = v

    identity            says                                                     used by
    Eulerian            u = v - (t - r) (d_t + v . grad) u                       MeanFlow, ESD, Align your flow
    Lagrangian          d_r X_{t->r}(x) = v(X_{t->r}(x), r)                      LSD
    semigroup           X_{s->r}(X_{t->s}(x)) = X_{t->r}(x)                      PSD, shortcut models
    generating          u = v(X, r) - d du/dd, from pure noise over d = 1 - r    FreeFlow
    bootstrapping       y = signal of X_{1->t}(eps): dy/dt = (y - x0_hat) / (t (1 - t))    BOOT

Targets are returned without graph; residuals with the graph of what they are given. Times are flow-matching times in
[0, 1]; a student in another process reaches them by ``change_process``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from lightning_distill.processes import expand
from lightning_distill.randomness import replayed

__all__ = [
    "adaptive_weight",
    "balance_weight",
    "boot_boundary",
    "boot_target",
    "euler_slope",
    "eulerian_residual",
    "flow_jump",
    "free_flow_target",
    "lagrangian_residual",
    "mean_flow_directions",
    "mean_flow_loss",
    "mean_flow_target",
    "rcgm_target",
    "semigroup_residual",
    "semigroup_target",
    "shortcut_target",
]

#: u(x, t, r), times (B,)
AverageVelocity = Callable[[Tensor, Tensor, Tensor], Tensor]


def flow_jump(x: Tensor, u: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """X_{t->r}(x) = x - (t - r) u (MeanFlow, arXiv:2505.13447, Eq. 12).

    Args:
        x: samples at t, (B, ...).
        u: average velocity between t and r, same shape.
        t: flow-matching times, (B,) or ().
        r: target times.
    """
    return x - expand(t - r, x) * u


# ------------------------------------------------------------------------------------------------ Eulerian
def mean_flow_directions(
    velocity: Tensor, time_input: Literal["r", "difference"] = "r"
) -> tuple[Tensor, float, float | None]:
    """Directions of (x, t, second argument) along the trajectory at fixed r (arXiv:2505.13447, Section 4.1).

    Args:
        velocity: v, (B, ...).
        time_input: what the network's second time is, r (which stays) or t - r (which grows with t).
    """
    if time_input not in ("r", "difference"):
        raise ValueError(f"time_input={time_input!r} is unknown; choose r or difference.")
    return velocity, 1.0, 1.0 if time_input == "difference" else None


def mean_flow_target(velocity: Tensor, du_dt: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """u_target = v - (t - r) du/dt (MeanFlow, arXiv:2505.13447, Eq. 10-11).

    With the velocity of one pair (eps - x0) in the place of v the target is right in the mean only.

    Args:
        velocity: v at (x, t): the (guided) teacher's, or eps - x0, (B, ...).
        du_dt: derivative of u along ``mean_flow_directions``, same shape.
        t: flow-matching times, (B,).
        r: target times, (B,), at most t.

    Returns:
        (B, ...), without graph.
    """
    return (velocity - expand(t - r, velocity) * du_dt).detach()


def eulerian_residual(velocity: Tensor, u: Tensor, du_dt: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """(d_t + v . grad) X_{t->r}(x) = v - u - (t - r) du/dt: zero for the exact map (arXiv:2406.07507, Section 3).

    Args:
        velocity: v at (x, t), (B, ...).
        u: average velocity, same shape.
        du_dt: its derivative along (v, 1, 0).
        t: flow-matching times, (B,).
        r: target times, (B,).
    """
    return velocity - u - expand(t - r, u) * du_dt


def adaptive_weight(error: Tensor, p: float = 1.0, eps: float = 1e-2) -> Tensor:
    """1 / (e + eps)^p without graph (arXiv:2505.13447, Eq. 22); p = 1 makes every sample count the same.

    Args:
        error: squared error of each sample, summed over elements, (B,).
        p: power; 0 is the plain loss. Where targets are free of noise, p = 1 slows training down.
        eps: keeps the weight finite.
    """
    return (error.detach() + eps).pow(-p)


def mean_flow_loss(u: Tensor, target: Tensor, p: float = 1.0, eps: float = 1e-2) -> Tensor:
    """Mean over the batch of e / sg(e + eps)^p, e = |u - sg target|^2 (arXiv:2505.13447, Eq. 9 and 22).

    Args:
        u: student's average velocity with graph, (B, ...).
        target: see ``mean_flow_target``; no gradient flows into it.
        p: power of the adaptive weight.
        eps: its constant.

    Returns:
        scalar, near 1 for p = 1 whatever the error is: log the error itself.
    """
    error = (u - target.detach()).square().flatten(1).sum(1)
    return (adaptive_weight(error, p, eps) * error).mean()


def balance_weight(error: Tensor, reference: Tensor, equal: Tensor, eps: float = 1e-5) -> Tensor:
    """Weights with which every sample with r < t counts as much as one with r = t does on average (AnyFlow).

        1 where r = t,     reference / (e + eps) elsewhere

    Args:
        error: squared error of each sample, (B,).
        reference: mean error of samples with r = t, ().
        equal: whether r = t, (B,).
        eps: keeps the weight finite.

    Returns:
        (B,), without graph.
    """
    return torch.where(equal, torch.ones_like(error), reference / (error + eps)).detach()


def rcgm_target(
    average: AverageVelocity,
    online: Tensor,
    x: Tensor,
    velocity: Tensor,
    t: Tensor,
    r: Tensor,
    step: float = 0.01,
    order: int = 1,
    clamp: float | None = 1.0,
    spacing: Literal["near", "even"] = "near",
) -> Tensor:
    """Target of recursive consistent generation, a difference form of the Eulerian identity (TwinFlow's objective).

        u_target = u - clamp( [ (t - r) u - h v - sum of the jumps that lead on to r ] / h )

    The first h follows v and N jumps of the student the rest: ``near`` N - 1 of h and one to r, ``even`` N equal ones
    (the released code). For N = 1 they are the same. ``even`` divides the whole mismatch between u and its parts by h,
    which takes the limit to be stable, ``near`` only what of it changes over h.

    All jumps have the same random numbers (dropout), whose differences would be divided by h; ``online`` has them, too,
    where it was made within ``randomness.replayed``.

    Args:
        average: student without graph.
        online: u(x, t, r), (B, ...).
        x: samples at t, (B, ...).
        velocity: v at (x, t).
        t: flow-matching times, (B,).
        r: target times, (B,).
        step: h; samples without room for the steps, of N h in all for ``near`` and of h for ``even``, get their u as
            target, no gradient.
        order: N >= 1.
        clamp: largest absolute value of the bracket, None for no limit. A limit keeps the zero of the loss.
        spacing: of the jumps, ``near`` or ``even``.

    Returns:
        (B, ...), without graph.
    """
    if order < 1:
        raise ValueError(f"order={order}: the recursion has at least one step.")
    if spacing not in ("near", "even"):
        raise ValueError(f"spacing={spacing!r} is unknown; choose near or even.")
    room = step * (order if spacing == "near" else 1)
    with torch.no_grad():
        y, moved = x - step * velocity, step * velocity
        start = torch.maximum(t - step, r)
        ends = [start - k * step if spacing == "near" else torch.lerp(start, r, k / order) for k in range(1, order)]
        jumps = list(pairwise([start, *(torch.maximum(end, r) for end in ends), r]))
        for k, (s, end) in enumerate(jumps, 1):
            with replayed([y]) if k < len(jumps) else nullcontext():
                u = average(y, s, end)
            y, moved = flow_jump(y, u, s, end), moved + expand(s - end, x) * u
        change = (expand(t - r, x) * online - moved) / step
        if clamp is not None:
            change = change.clamp(-clamp, clamp)
        inside = expand((t - r >= room - 1e-9).double(), x)
        return online - inside * change


# ------------------------------------------------------------------------------------------------ Lagrangian
def lagrangian_residual(dx_dr: Tensor, velocity: Tensor) -> Tensor:
    """d_r X_{t->r}(x) - v(X_{t->r}(x), r): zero for the exact map (arXiv:2406.07507, Section 3).

    The derivative is ``tangents.tangent`` of (r -> X_{t->r}(x)) with graph; v is the teacher's, or the student's own
    u(X, r, r), at X without graph.

    Args:
        dx_dr: derivative of the map in its target time, (B, ...).
        velocity: v at the map's end; no gradient flows into it.
    """
    return dx_dr - velocity.detach()


# ------------------------------------------------------------------------------------------------ semigroup
def semigroup_residual(
    average: AverageVelocity, target: AverageVelocity, x: Tensor, t: Tensor, middle: Tensor, r: Tensor
) -> Tensor:
    """u(x, t, r) minus the average of two jumps by way of ``middle``: zero for the exact map (arXiv:2505.18825).

        u(x, t, r) - sg [ (t - s) u'(x, t, s) + (s - r) u'(X'_{t->s}, s, r) ] / (t - r)

    Args:
        average: student with graph.
        target: student or its average, run without graph.
        x: samples at t, (B, ...).
        t: flow-matching times, (B,).
        middle: s, (B,), between r and t.
        r: target times, (B,), below t.
    """
    return average(x, t, r) - semigroup_target(target, x, t, middle, r)


@torch.no_grad()
def semigroup_target(average: AverageVelocity, x: Tensor, t: Tensor, middle: Tensor, r: Tensor) -> Tensor:
    """Average velocity of two jumps by way of ``middle``, without graph; see ``semigroup_residual``.

    Where t = r it is the first of the two, u(x, t, middle).
    """
    first = average(x, t, middle)
    second = average(flow_jump(x, first, t, middle), middle, r)
    apart = t > r
    share = expand(torch.where(apart, (t - middle) / torch.where(apart, t - r, 1.0), 1.0), x)
    return share * first + (1.0 - share) * second


def shortcut_target(average: AverageVelocity, x: Tensor, t: Tensor, step: Tensor, clamp: float | None = 4.0) -> Tensor:
    """Two steps of size d as the target of one of size 2d (shortcut models, arXiv:2410.12557, Eq. 5).

        [ u(x, t, t - d) + u(x - d u, t - d, t - 2d) ] / 2

    Args:
        average: student or its average, run without graph.
        x: samples at t, (B, ...).
        t: flow-matching times, (B,), at least 2d.
        step: d, (B,).
        clamp: largest absolute value of the target, 4 in the released code; None for no limit.

    Returns:
        (B, ...), without graph.
    """
    with torch.no_grad():
        first = average(x, t, t - step)
        second = average(flow_jump(x, first, t, t - step), t - step, t - 2.0 * step)
        target = 0.5 * (first + second)
        return target if clamp is None else target.clamp(-clamp, clamp)


def euler_slope(velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, steps: int = 2) -> Tensor:
    """Average velocity of N Euler steps from t to 0 (SnapFlow, arXiv:2604.05656; N = 2 there).

        [ v(x, t) + v(x - t/N v, t - t/N) + .. ] / N

    For exact marginal velocities it is u(x, t, 0) up to O(1/N); velocities of single pairs would be wrong at the second
    point, which lies on no pair's line.

    Args:
        velocity: v(x, t), run without graph.
        x: samples at t, (B, ...).
        t: flow-matching times, (B,).
        steps: N.

    Returns:
        (B, ...), without graph.
    """
    with torch.no_grad():
        h, total = t / steps, torch.zeros_like(x)
        for i in range(steps):
            v = velocity(x, t - i * h)
            x, total = flow_jump(x, v, t, t - h), total + v
        return total / steps


# ------------------------------------------------------------------------------------------------ from noise alone
def free_flow_target(velocity: Tensor, du_dd: Tensor, duration: Tensor) -> Tensor:
    """Target of the average velocity from pure noise, without data (FreeFlow).

        u_target = v(X, 1 - d) - d du/dd,     X = eps - d u(eps, 1, 1 - d)

    The derivative is in the scalar d alone (direction (0, 0, -1) of (x, t, r)).

    Args:
        velocity: (guided) teacher's velocity at X and 1 - d, (B, ...).
        du_dd: derivative of u in d, same shape.
        duration: d = 1 - r in [0, 1], (B,).

    Returns:
        (B, ...), without graph.
    """
    return (velocity - expand(duration, velocity) * du_dd).detach()


def boot_target(signal: Tensor, clean: Tensor, t: Tensor, step: Tensor | float) -> Tensor:
    """Signal of the trajectory a little earlier: one Euler step of the signal ODE (BOOT, arXiv:2306.05544).

        y = (x_t - t eps) / (1 - t),     dy/dt = (y - x0_hat(x_t, t)) / (t (1 - t)),     target = y - h dy/dt

    Args:
        signal: y(eps, t), the student's output, (B, ...).
        clean: teacher's x0_hat at x_t = (1 - t) y + t eps, same shape.
        t: flow-matching times in (0, 1), (B,).
        step: h, () or (B,), smaller than t.

    Returns:
        what y(eps, t - h) should be, (B, ...), without graph.

    Notes:
        The paper writes it for variance-preserving coefficients; this is the flow-matching form of the same ODE. At
        t = 1 it is singular, and y(eps, 1) = x0_hat(eps, 1) is trained by itself (``boot_boundary``).
    """
    rate = torch.as_tensor(step, dtype=torch.float64, device=t.device) / (t.double() * (1.0 - t.double()))
    return (signal - expand(rate, signal) * (signal - clean)).detach()


def boot_boundary(signal: Tensor, clean: Tensor) -> Tensor:
    """Mean squared error of the signal at t = 1, where it is the teacher's x0_hat of pure noise (arXiv:2306.05544).

    Args:
        signal: y(eps, 1) with graph, (B, ...).
        clean: teacher's x0_hat(eps, 1); no gradient flows into it.
    """
    return (signal - clean.detach()).square().mean()
