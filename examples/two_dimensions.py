"""Distil a 2-D flow-matching model into one step and draw the result; about a minute of one CPU thread.

python examples/two_dimensions.py            # writes two_dimensions.png
"""

import lightning as L
import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from lightning_distill.data.prior import Prior
from lightning_distill.data.toy import Toy2D, sample_toy
from lightning_distill.generation import generate
from lightning_distill.methods import DMD2, TeacherTraining
from lightning_distill.metrics.sliced_wasserstein import sliced_wasserstein
from lightning_distill.networks.small import ResidualMLP
from lightning_distill.networks.specs import NewDenoiser
from lightning_distill.optim import default_optimizer
from lightning_distill.processes import FlowMatching
from lightning_distill.schedules import WarmupDecay
from lightning_distill.times import few_step_times


def fit(module: L.LightningModule, data: L.LightningDataModule, updates: int) -> None:
    """Train without logs and checkpoints."""
    trainer = L.Trainer(max_steps=updates, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(module, data)


def main() -> None:
    """Teacher, student, picture."""
    L.seed_everything(0)
    torch.set_num_threads(1)

    teaching = TeacherTraining(
        NewDenoiser(
            lambda: ResidualMLP((2,), width=128, depth=3), FlowMatching(), "flow_prediction", sigma_data=4 / 12**0.5
        ),
        label_dropout=0.0,
        student_optimizer=default_optimizer(4e-3, betas=(0.9, 0.99), weight_decay=0.0),
        student_scheduler=lambda optimizer: WarmupDecay(optimizer, 50, 4000, "linear", decay_start=1300),
    )
    fit(teaching, Toy2D("checkerboard", batch_size=256), 4000)
    teacher = teaching.sampling_network()

    def schedule(optimizer: torch.optim.Optimizer) -> WarmupDecay:
        return WarmupDecay(optimizer, 20, 370, "linear", decay_start=185)

    method = DMD2(
        teacher,
        fake_score_steps=5,
        updates_per_sample=5,
        student_optimizer=default_optimizer(4e-4, betas=(0.0, 0.99), weight_decay=0.0),
        fake_score_optimizer=default_optimizer(2e-3, betas=(0.0, 0.99), weight_decay=0.0),
        student_scheduler=schedule,
        fake_score_scheduler=schedule,
    )
    fit(method, Prior(batch_size=256), 370)

    n = 5000
    data, _ = sample_toy("checkerboard", n, torch.Generator().manual_seed(1))
    noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(2))
    panels = {"data": data}
    for steps in (100, 1):
        panels[f"teacher, {steps} steps"] = generate(teacher, noise, {}, few_step_times(FlowMatching(), steps), "ode")
    panels["student, 1 step"] = method.sample(n, noise=noise)

    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 4.2))
    for axis, (title, points) in zip(axes, panels.items()):
        axis.scatter(*points.T, s=1, alpha=0.4)
        axis.set(
            title=f"{title}\nSW2 {sliced_wasserstein(points, data):.3f}",
            xlim=(-2.6, 2.6),
            ylim=(-2.6, 2.6),
            aspect="equal",
        )
    figure.tight_layout()
    figure.savefig("two_dimensions.png", dpi=80)
    print("wrote two_dimensions.png")


if __name__ == "__main__":
    main()
