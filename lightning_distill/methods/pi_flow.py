"""Pi-Flow: few-step students that put out policies, taught by imitation (arXiv:2510.14974)."""

from itertools import islice, pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.losses.policies import imitate, imitation_intervals, teacher_ratio
from lightning_distill.methods.base import Terms
from lightning_distill.methods.guards import check_schedule
from lightning_distill.methods.rollout import as_in_sampling
from lightning_distill.methods.trajectory import TwoTimeMethod
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.policy_head import PolicyHead, WithPolicy, policy_head_of, policy_prediction
from lightning_distill.networks.roles import Role
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.processes import FlowMatching, change_process, expand
from lightning_distill.samplers import transport
from lightning_distill.times import TimeDistribution

__all__ = ["PiFlow"]


class PiFlow(TwoTimeMethod):
    """One network call per segment puts out a policy, which is integrated in many substeps without further calls.

        policy = G(x_s, s),     dx/dt = policy(x, t) from s to the segment's end
        L = mean_m | policy(x_m, t_m) - v_teacher(x_m, t_m) |^2,     x_m on the policy's own trajectory

    The teacher is imitated where the policy goes, so that errors are corrected instead of piling up.

    Args:
        teacher: the pretrained model.
        student: how the network is realised, for example ``Lora(...)``; the outputs of the policy are added to it.
        num_steps: number of segments, the student's calls; None for those of ``student_times``, or 4.
        student_times: native times at which the segments begin; None for the trailing grid.
        policy: ``mixture`` (Gaussian mixture of clean samples, GMFlow), ``grid`` (DX: clean samples on a grid of
            times) or ``polynomial`` (DX: a polynomial through them).
        components: K of the mixture, or points N of the grid.
        points: M, points of imitation in a segment.
        window: time over which the policy's velocity is averaged, as a share of the segment; 0 for none.
        substeps: Euler steps of a whole segment, in training as in sampling.
        decay_updates: updates over which the teacher walks less and less of the segment; 0 for a policy that walks
            alone.
        dropout: share of a mixture's components that are left out of a rollout.
        temperature: of the mixture's posterior when sampling, in all steps but the last; 1 changes nothing.
        data_free: start segments from the student's own rollouts instead of noised data.
        training_times: distribution of the flow-matching times whose segment is taken, None for a uniform one; not with
            ``data_free``.
        sampler: ``flow_map``, the only one of this student.
        shape: shape of one sample without the batch dimension; None to ask the network.
        **kwargs: see ``TwoTimeMethod``.

    Notes:
        Losses are in flow-matching coordinates whatever the process is; the paper is about flow matching.
        Substeps are even in time, the paper's in time before its shift, and each interval between two points has
        ``substeps`` of them, in the released code as many as its share of a trajectory. The paper weighs half the loss
        by 30, which scale-free optimizers do not see. Final steps of another length are set by ``student_times``.
        Without data the segment of a batch is drawn like the step of a backward simulation, instead of training all
        segments of a rollout one after the other.
        The initial offsets between components are reconstructed, see ``policies.initial_offsets``.
    """

    paper = "2510.14974"
    learns_from = "teacher, data; teacher alone with data_free"
    samplers = ("flow_map",)

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        student: Role | None = None,
        num_steps: int | None = None,
        student_times: list[float] | None = None,
        policy: Literal["mixture", "grid", "polynomial", "momentum"] = "mixture",
        components: int = 8,
        points: int = 4,
        window: float = 0.0,
        substeps: int = 32,
        decay_updates: int = 2000,
        dropout: float = 0.0,
        temperature: float = 1.0,
        data_free: bool = False,
        sampler: Literal["flow_map"] = "flow_map",
        shape: list[int] | None = None,
        training_times: TimeDistribution | None = None,
        **kwargs: Any,
    ) -> None:
        role = WithPolicy(student, policy, components, shape)
        super().__init__(
            teacher,
            student=role,
            num_steps=num_steps or (4 if student_times is None else len(student_times)),
            student_times=student_times,
            sampler=sampler,
            shape=shape,
            training_times=training_times,
            tangent="jvp",
            tangent_step=None,
            **kwargs,
        )
        if data_free and training_times is not None:
            raise ValueError(
                "training_times choose the segment of noised data, and with data_free=True segments are drawn evenly "
                "from the student's own rollouts; leave one of them out."
            )
        if points < 1 or substeps < 1 or decay_updates < 0:
            raise ValueError(
                f"points={points} and substeps={substeps} must be 1 or more, decay_updates={decay_updates} at least 0."
            )
        if not 0.0 <= window < 1.0:
            raise ValueError(f"window={window}: give a share of the segment from 0 to below 1.")
        if not 0.0 <= dropout < 1.0 or (dropout and policy in ("grid", "polynomial")):
            raise ValueError(
                f"dropout={dropout} with policy={policy!r}: components of a mixture are left out with a probability "
                "from 0 to below 1, and a grid has none; set dropout=0."
            )
        if not 0.0 < temperature <= 1.0 or (temperature < 1.0 and policy != "mixture"):
            raise ValueError(
                f"temperature={temperature} with policy={policy!r}: a mixture's posterior is sharpened by a "
                "temperature in (0, 1], and no other policy has one; set temperature=1."
            )
        self.points, self.window, self.substeps = points, window, substeps
        self.decay_updates, self.dropout, self.temperature = decay_updates, dropout, temperature
        self.data_free = data_free

    def on_fit_start(self) -> None:
        """Say so where the run ends before the policy walks alone."""
        super().on_fit_start()
        needed = self.decay_updates and self.decay_updates + 1
        check_schedule(self, "decay_updates", needed, "the student has never walked a whole segment by itself")

    def build_roles(self) -> None:
        """The student with its head; its times are the edges of the segments."""
        super().build_roles()
        self.edges = self.student_times

    def check_configuration(self) -> None:
        """Averages are sampled like the student."""
        super().check_configuration()
        for network in (self.student, *self.student_ema.values()):
            head = self.head(network)  # type: ignore[arg-type]
            head.substeps, head.temperature = self.substeps, self.temperature

    def head(self, network: Denoiser) -> PolicyHead:
        """The policy head of a network."""
        found = policy_head_of(network.network)
        assert found is not None
        return found

    def times_in(self, num_steps: int) -> list[float]:
        """As ``StudentSampling.times_in``; a policy is sampled with the segments that it was trained for."""
        times = super().times_in(num_steps)
        if times != self.student_times:
            raise ValueError(
                f"num_steps={num_steps}: this student puts out policies for the {len(self.student_times)} segments "
                f"from {[round(t, 4) for t in self.student_times]}; leave num_steps out, or train with another."
            )
        return times

    # ------------------------------------------------------------------------------------------------ loss
    def segments(self, n: int) -> tuple[Tensor, Tensor]:
        """Native times at which the segments of n samples begin and end, (n,), float64."""
        times = torch.tensor([*self.student_times, 0.0], dtype=torch.float64, device=self.device)
        if self.data_free:
            return times[self.drawn_segment()].expand(n), times[self.drawn_segment() + 1].expand(n)
        flow = change_process(times[:-1], self.process, FlowMatching())[0]
        # the first edge that is no earlier than a training time
        u = self.flow_times("segment", n)
        index = (flow[:, None] >= u - 1e-9).sum(0).clamp_min(1) - 1
        return times[index], times[index + 1]

    def drawn_segment(self) -> int:
        """Index of the segment that is trained without data, the same for the batch and on all ranks."""
        return self.draws.of_slice().integer("stop", len(self.student_times))

    def starts(self, batch: Batch, t: Tensor, scale: Tensor | None) -> Tensor:
        """Where the segments begin: noised data, or where the student's own steps lead, (B, ...)."""
        if not self.data_free:
            x0 = self.data(batch)
            return self.process.add_noise(x0, self.draws.normal("noise", x0.shape), t)
        times = self.student_times
        x = self.process.prior(self.draws.normal("start", (batch.size, *self.sample_shape)), times[0])
        with as_in_sampling(self.student):
            for now, later in islice(pairwise(times), self.drawn_segment()):
                now_t, later_t = (torch.full_like(t, time) for time in (now, later))
                x = transport(policy_prediction(self.student, x, now_t, later_t, batch.cond, scale), later_t)
        return x

    def student_loss(self, batch: Batch) -> Terms:
        """Imitation along the policy of one segment."""
        n = batch.size
        start, end = self.segments(n)
        scale = self.told_scale(start)
        x = self.starts(batch, start, scale)
        policy, _ = self.head(self.student).policy(self.student, x, start, end, batch.cond, scale)
        (t, factor), (r, _) = (change_process(time, self.process, FlowMatching()) for time in (start, end))
        ratio, window = teacher_ratio(self.draws.update, self.decay_updates), self.window * (t - r)
        own = torch.stack([self.draws.uniform(f"own{i}", n) for i in range(self.points)], 1)
        theirs = [self.draws.uniform(f"theirs{i}", n) for i in range(self.points - 1)]
        steps = imitation_intervals(own, torch.stack(theirs, 1) if theirs else own[:, :0], t - r - window, ratio)
        rolled = policy.detach()
        if self.dropout:
            count = self.head(self.student).components
            gone = torch.stack([self.draws.uniform(f"dropout{k}", n) for k in range(count)], 1)
            rolled = rolled.dropout(gone, self.dropout)
        guided = self.guided_teacher(batch)
        found = imitate(
            policy,
            rolled,
            lambda x, t: guided(*self.native(x, t.clamp_min(self._flow_min))).flow_prediction,
            expand(factor, x) * x,
            t,
            steps,
            window,
            self.substeps,
            self.substeps if ratio or self.window else 1,
        )
        return Terms({"imitation": found.loss}, {"teacher_ratio": torch.full((), ratio, device=self.device)})

    def forward_counts(self) -> dict[str, dict[str, int]]:
        """Network calls of an update, beside those of a rollout."""
        return {"student": {"student": 1, "teacher": self.points}}
