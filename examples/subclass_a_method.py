"""A new objective in one loss: reverse KL with its exact weight and a pull towards the teacher's mean brightness.

    python examples/subclass_a_method.py

Everything else (roles, two time-scale updates, averages, checkpoints, sampling) comes from the base class.
"""

import lightning as L
import torch

from lightning_distill.batch import Batch
from lightning_distill.data.prior import Prior
from lightning_distill.losses.score_matching import matching_weight, score_difference
from lightning_distill.methods import FakeScoreMethod, Terms
from lightning_distill.networks.specs import ZooDenoiser


class BrightnessKeepingKL(FakeScoreMethod):
    """Distribution matching with lambda = SNR, plus a term on the mean of each sample."""

    default_loss_weights = {"student/brightness": 0.1}

    def student_loss(self, batch: Batch) -> Terms:
        """The two terms; the base class weights, logs and sums them."""
        x = self.rollout(batch).x0
        x_t, t, _ = self.renoise(x, self.matching_times)
        with torch.no_grad():
            real = self.teacher(x_t, t, batch.cond).x0
            fake = self.fake_score(x_t, t, batch.cond).x0
            weight = matching_weight("kl", x, real, t, self.process).clamp_max(100.0)
        return Terms(
            {
                "matching": score_difference(x, real, fake, weight),
                "brightness": (x.mean((1, 2, 3)) - real.mean((1, 2, 3))).square().mean(),
            }
        )


def main() -> None:
    """A few updates on the shipped digits teacher, then sixteen samples."""
    L.seed_everything(0)
    method = BrightnessKeepingKL(ZooDenoiser("digits"), fake_score_steps=1)
    trainer = L.Trainer(max_steps=200, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(method, Prior(num_classes=10, batch_size=64))
    print("samples:", tuple(method.sample(16).shape), "student updates:", trainer.global_step)


if __name__ == "__main__":
    main()
