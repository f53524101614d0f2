"""CTM: consistency trajectory models (arXiv:2310.02279)."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.collectives import mean_over_processes
from lightning_distill.ema import ConstantEMA, EMAProfile
from lightning_distill.losses.consistency import consistency_loss, pair_weight, solver_step
from lightning_distill.losses.score_matching import denoising_loss
from lightning_distill.losses.segments import gradient_ratio, soft_consistency
from lightning_distill.methods.base import Terms
from lightning_distill.methods.consistency_distillation import ConsistencyDistillation, Metric, target_profile
from lightning_distill.methods.end_game import EndGame, Ends
from lightning_distill.methods.guards import check_schedule
from lightning_distill.methods.trajectory import TwoTimeMethod
from lightning_distill.networks.adversary import Adversary
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.parameterisations import TrajectoryMap
from lightning_distill.processes import expand
from lightning_distill.times import t_min

__all__ = ["CTM"]


class CTM(EndGame, ConsistencyDistillation, TwoTimeMethod):
    """Jumps between any two times of the teacher's trajectories, compared where they end in clean data.

        G(x, t, s) = transport of g(x, t, s) to s;   in EDM (s/t) x + (1 - s/t) g(x, t, s)
        L_CTM = d( G'(G(x_t, t, s), s, 0), sg G'(G'(x_u, u, s), s, 0) ),     x_u = solver(x_t, t -> u),   s <= u < t
        L = L_CTM + lambda_d E| x0 - g(x_t, t, t) |^2 + lambda_g L_GAN( G'(G(x_t, t, s), s, 0), x0 )

    G' is an average of the student.

    Args:
        teacher: the pretrained model.
        intervals: N, steps of the solver's grid, from which t, s and u are drawn.
        solver: ``heun`` or ``euler`` (DDIM).
        solver_steps: most steps of the grid between t and u.
        metric: distance d.
        target_ema: profile of G', None for ``ConstantEMA(.999)``.
        gan: the game on clean samples; None for none.
        gan_real: what is real, the ``data`` or the ``target``.
        gan_from: student update from which the student plays.
        sampler: how steps are chained; ``flow_map``, ``gamma`` (fresh noise after each jump), ``renoise`` or ``ode``.
        noise_share: gamma of ``sampler="gamma"``, in [0, 1]: the share of noise that is fresh after each jump.
        adaptive: lambda_d and lambda_g are such that each term has the gradient of L_CTM (times ``loss_weights``).
        **kwargs: see ``ConsistencyDistillation``, ``TwoTimeMethod`` (``training_times`` are those of the denoising
            term) and ``EndGame``.

    Notes:
        The paper's adaptive weights compare gradients of the last layer within an update. Here they are those of the
        network's outputs, over all micro-batches and processes, and of the update before, so that a batch may be split
        in any way; in the first update of a term its weight is 1.
        Trajectories end at 0, in the paper at its smallest noise level; Heun's method is that of ``solver_step``.
        The denoising term has no weight over time, in the released code that of EDM. Both jumps of the target are those
        of the average; the released code takes the first from the student, without gradient.
        The paper's d is LPIPS and its discriminator StyleGAN-XL's, on clean pictures; here the game sees the teacher's
        features of noised samples.
    """

    paper = "2310.02279"
    learns_from = "teacher, data"
    samplers: ClassVar[tuple[str, ...]] = ("flow_map", "gamma", "renoise", "ode")

    balance: Tensor
    gradient_squares: Tensor

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        sampler: Literal["flow_map", "gamma", "renoise", "ode"] = "flow_map",
        intervals: int = 18,
        solver: Literal["euler", "heun"] = "heun",
        solver_steps: int = 4,
        metric: Metric = "pseudo_huber",
        target_ema: EMAProfile | None = None,
        gan: Adversary | None = None,
        gan_real: Literal["target", "data"] = "data",
        gan_from: int = 0,
        noise_share: float = 0.2,
        adaptive: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            teacher,
            sampler=sampler,
            intervals=intervals,
            solver=solver,
            metric=metric,
            target_ema=target_profile(target_ema, ConstantEMA(0.999), needed=True),
            gan=gan,
            gan_real=gan_real,
            boundary="plain",
            **kwargs,
        )
        if not 1 <= solver_steps <= intervals:
            raise ValueError(f"solver_steps={solver_steps}: give 1 to the {intervals} intervals of the grid.")
        if gan_from < 0:
            raise ValueError(f"gan_from={gan_from}: give the student update from which the game counts, 0 or later.")
        if not 0.0 <= noise_share <= 1.0:
            raise ValueError(f"noise_share={noise_share}: the share of fresh noise lies in [0, 1].")
        if noise_share != 0.2 and self.sampler != "gamma":
            raise ValueError(
                f"noise_share={noise_share:g} needs sampler='gamma'; {self.sampler!r} has no share of fresh noise."
            )
        self.solver_steps, self.gan_from, self.adaptive = solver_steps, gan_from, adaptive
        self.noise_share = noise_share
        #: lambda of the denoising term and of the game, 1 until their gradient has been seen
        self.register_buffer("balance", torch.ones(2))
        #: squared gradients so far in this update, of consistency, denoising and game
        self.register_buffer("gradient_squares", torch.zeros(3))

    def on_fit_start(self) -> None:
        """Say so where the run ends before the student plays."""
        super().on_fit_start()
        if self.gan is not None:
            check_schedule(self, "gan_from", self.gan_from + 1, "the student has never played")

    # ------------------------------------------------------------------------------------------------ parts
    def trajectory_times(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Indices of t, u and s on the grid, (n,) each: t < u <= s, u at most ``solver_steps`` after t."""

        def below(name: str, most: Tensor) -> Tensor:
            return torch.minimum((self.draws.uniform(name, n) * most).long(), most - 1)

        last = torch.full((n,), self.intervals, device=self.device)
        late = below("t", last)
        end = late + 1 + below("s", last - late)
        middle = late + 1 + below("u", torch.clamp_max(end - late, self.solver_steps))
        return late, middle, end

    def solved(self, x: Tensor, late: Tensor, middle: Tensor, grid: Tensor, batch: Batch) -> Tensor:
        """The teacher's solution from ``grid[late]`` to ``grid[middle]``, (B, ...)."""
        teacher = self.guided_teacher(batch)
        for step in range(self.solver_steps):
            start = (late + step).clamp_max(self.intervals - 1)
            moved = solver_step(teacher, x, grid[start], grid[start + 1], self.solver, self.process)
            x = torch.where(expand(late + step < middle, x).bool(), moved, x)
        return x

    def student_loss(self, batch: Batch) -> Terms:
        """Soft consistency, denoising and the game."""
        x0, n = self.data(batch), batch.size
        grid = torch.tensor(self.grid(), dtype=torch.float64, device=x0.device)
        late, middle, end = self.trajectory_times(n)
        t, u = grid[late], grid[middle]
        s = torch.where(end == self.intervals, 0.0, grid[end])
        x_t = self.process.add_noise(x0, self.draws.normal("noise", x0.shape), t)
        scale = self.told_scale(t)
        student = TrajectoryMap(self.student, batch.cond, scale)
        average = TrajectoryMap(self.sampling_network(self.target_name), batch.cond, scale)
        outputs = []

        def online(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
            prediction = student(x, t, s)
            outputs.append(prediction.raw)
            return self.process.add_noise(prediction.x0, prediction.eps, s)

        def frozen(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
            moved = average.jump(x, t.clamp_min(t_min(self.process)), s)
            return torch.where(expand(t > 0, x).bool(), moved, x)

        x_u = self.solved(x_t, late, middle, grid, batch)
        estimate, target = soft_consistency(online, frozen, x_t, t, x_u, u, s)
        weight = pair_weight(self.weight, t, u, self.process, self.student.sigma_data)
        losses = {"consistency": consistency_loss(estimate, target, weight, self.metric, self.huber)}
        losses["denoising"], output = self.denoising(x0, batch, scale)
        clean, top = torch.zeros_like(t), torch.full_like(t, self.process.t_max)
        if self.gan is not None:
            losses |= self.play(Ends(estimate, self.real_ends(batch, target, clean), clean, top, batch))
        diagnostics = {"mse": (estimate.detach() - target).square().mean()}
        if self.adaptive:
            self.measure(losses, {"consistency": outputs[0], "denoising": output, "gan": outputs[0]})
            for name, factor in zip(("denoising", "gan"), self.balance.clone()):
                if name in losses:
                    losses[name] = factor * losses[name]
                    diagnostics[f"balance_{name}"] = factor
        return Terms(losses, diagnostics)

    def denoising(self, x0: Tensor, batch: Batch, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """E |x0 - g(x_t, t, t)|^2 and the network's outputs."""
        eps = self.draws.normal("denoising/noise", x0.shape)
        t = self.native(x0, self.flow_times("denoising/time", batch.size))[1].clamp_min(t_min(self.process))
        prediction = self.student(self.process.add_noise(x0, eps, t), t, batch.cond, r=t, guidance=scale)
        assert not isinstance(prediction, dict)
        return denoising_loss(prediction, x0, eps, "sample"), prediction.raw

    def student_game(self, ends: Ends) -> dict[str, Tensor]:
        """The generator's side, from update ``gan_from`` on."""
        return super().student_game(ends) if self.draws.update >= self.gan_from else {}

    # ------------------------------------------------------------------------------------------------ adaptive weights
    def measure(self, losses: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
        """Add the squared gradient of each term with respect to the network's outputs to those of this update."""
        for index, name in enumerate(("consistency", "denoising", "gan")):
            if name in losses and losses[name].requires_grad:
                gradient = torch.autograd.grad(losses[name], outputs[name], retain_graph=True)[0]
                self.gradient_squares[index] += gradient.detach().float().square().sum()

    def after_phase(self, phase: str) -> None:
        """The weights of the next update, of those terms that have had a gradient in this one."""
        super().after_phase(phase)
        if phase != "student" or not self.adaptive:
            return
        squares = mean_over_processes(self.gradient_squares)
        consistency, others = squares[:1], squares[1:]
        self.balance.copy_(torch.where(others > 0.0, gradient_ratio(consistency, others), self.balance))
        self.gradient_squares.zero_()

    def forward_counts(self) -> dict[str, dict[str, int]]:  # noqa: D102
        counts = super().forward_counts()
        counts["student"]["student"] = 2
        counts["student"]["teacher"] += (self.solver_steps - 1) * (2 if self.solver == "heun" else 1)
        return counts
