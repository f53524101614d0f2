"""Teachers: ordinary diffusion or flow-matching training of a fresh network."""

from dataclasses import replace
from typing import Any, Literal

from lightning_distill.batch import Batch
from lightning_distill.generation import beginning
from lightning_distill.losses.score_matching import denoising_loss
from lightning_distill.methods.base import DistillationModule, Terms
from lightning_distill.methods.dropping import drop_conditions
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec, as_denoiser
from lightning_distill.processes import EDM, FlowMatching
from lightning_distill.times import LogNormal, TimeDistribution, Uniform

__all__ = ["TeacherTraining"]


class TeacherTraining(DistillationModule):
    """Denoising training of a network, so that the library can make its own teachers.

        E_{x0, eps, t} || target - network(alpha_t x0 + sigma_t eps, t, c) ||^2

    One class serves flow matching (arXiv:2210.02747), EDM (arXiv:2206.00364) and VP diffusion (arXiv:2006.11239,
    arXiv:2202.00512): the spec's noise process and prediction type decide the target. Conditions (class labels, text)
    are dropped at random so that the network can be guided (arXiv:2207.12598).

    Args:
        network: the network to train.
        label_dropout: share of samples whose conditions become what stands for none: the null class, the embedding of
            the empty prompt. Nothing is dropped where a condition has no such value (give ``null_class`` or
            ``null_cond`` of the network where its class does not know it).
        training_times: distribution of t; None is uniform, for EDM ``LogNormal(-1.2, 1.2)``.
        loss_space: space of the squared error (see ``denoising_loss``); None is the network's own prediction type, or
            ``edm`` for a network with a process of its own.
        source: condition that takes the place of the noise: a flow between data and, for example, their enlarged
            low-resolution pictures (arXiv:2412.09465), which ``sample()`` begins at. Flow matching only.
        perturbation: share p of noise in the source, sqrt(1 - p^2) source + p eps; without, one source has one sample.
        num_steps: solver steps of ``sample()``.
        sampler: solver of ``sample()``.
        **kwargs: see ``DistillationModule``.
    """

    paper = "2006.11239"
    learns_from = "data"
    default_lr = 1e-3

    def __init__(
        self,
        network: DenoiserSpec | Denoiser,
        *,
        label_dropout: float = 0.1,
        training_times: TimeDistribution | None = None,
        loss_space: str | None = None,
        source: str | None = None,
        perturbation: float = 0.0,
        num_steps: int = 50,
        sampler: Literal["renoise", "ode"] = "ode",
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher=None, num_steps=num_steps, sampler=sampler, **kwargs)
        if not 0.0 <= label_dropout < 1.0:
            raise ValueError(f"label_dropout={label_dropout}: give a share between 0 and 1.")
        if isinstance(network, DenoiserSpec):
            network.check()
        if not 0.0 <= perturbation <= 1.0:
            raise ValueError(f"perturbation={perturbation}: give the share of noise in the source, from 0 to 1.")
        self.source, self.perturbation = source, perturbation
        self._network_source = network
        self.label_dropout = label_dropout
        self._given_training_times = training_times
        self.training_times: TimeDistribution
        self.loss_space = loss_space

    def build_roles(self) -> None:
        """The network itself is the student role."""
        self.student = as_denoiser(self._network_source).requires_grad_(True).train()
        if self.source is not None:
            if not isinstance(self.process, FlowMatching):
                raise ValueError(
                    f"source={self.source!r}: a flow between data and their sources is straight, and this network "
                    f"works with {self.process!r}; use process: FlowMatching."
                )
            self.student.family = replace(self.student.family, start=(self.source, self.perturbation))
        default = LogNormal() if isinstance(self.process, EDM) else Uniform(0.0, 1.0)
        self.training_times = self._given_training_times or default

    def student_loss(self, batch: Batch) -> Terms:
        """Denoising error on a batch of data."""
        if batch.x0 is None:
            raise ValueError(
                "TeacherTraining needs data, but the loader yields batches without x0; use a data module with images "
                "(for example FashionMNIST) instead of a prior-only one."
            )
        t = self.times("renoise/time", self.training_times, batch.size)
        eps = beginning(self.student, self.draws.normal("renoise/noise", batch.x0.shape), batch.cond)
        x_t = self.process.add_noise(batch.x0, eps, t)
        prediction = self.student(x_t, t, self._drop_labels(batch))
        space = self.loss_space or ("edm" if self.student.network_process is not None else None)
        return Terms({"denoising": denoising_loss(prediction, batch.x0, eps, space, self.student.data_scale)})

    def _drop_labels(self, batch: Batch) -> dict[str, Any]:
        if self.student.missing_null(batch.cond):
            return batch.cond
        u = self.draws.uniform("label_dropout", batch.size)
        return drop_conditions(self.student, batch.cond, u, self.label_dropout)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Denoising error of the validation loader's data."""
        from lightning_distill.batch import as_batch
        from lightning_distill.randomness import Draws

        batch = as_batch(batch)
        self.draws = Draws(self.streams, batch_idx, self.global_rank * batch.size, "validation", device=self.device)
        loss = self.weighted_sum("student", self.student_loss(batch))
        self.log("val/denoising", loss, prog_bar=True, batch_size=batch.size, sync_dist=True)

    def forward_counts(self) -> dict[str, dict[str, int]]:  # noqa: D102
        return {"student": {"student": 1}}
