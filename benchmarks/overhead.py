"""What the library adds to a training cycle: the same networks and mathematics through the Trainer and in a bare loop.

    python benchmarks/overhead.py --teacher fashion --batch 48 --cycles 6 --repeats 5

One cycle is one student update and one fake-score update of data-free DMD2. Blocks of cycles alternate between the two
sides in one process; CPU seconds of one thread are compared, and the median of the ratios is reported.
"""

import argparse
import logging
import statistics
import time
import warnings

import torch
from bare import bare_trainer
from lightning.pytorch import Callback, Trainer
from results import write_result

from lightning_distill.batch import Batch
from lightning_distill.data.prior import Prior
from lightning_distill.methods import DMD2
from lightning_distill.networks.specs import ZooDenoiser
from lightning_distill.optim import default_optimizer


class BareLoop:
    """Data-free DMD2 with nothing but torch: what a script of sixty lines does."""

    def __init__(self, method: DMD2, batch: int) -> None:
        self.teacher, self.student, self.fake = method.teacher, method.student, method.fake_score
        self.process, self.batch, self.shape = method.process, batch, method.sample_shape
        self.student_optimizer = default_optimizer(1e-4)(list(self.student.parameters()))
        self.fake_optimizer = default_optimizer(1e-4)(list(self.fake.parameters()))
        self.average = [p.detach().clone() for p in self.student.parameters()]

    def _times(self, low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(self.batch, dtype=torch.float64)

    def cycle(self) -> None:
        """One student update, then one fake-score update on the same samples."""
        cond = {"class_labels": torch.randint(0, 10, (self.batch,))}
        z = torch.randn(self.batch, *self.shape)
        x = self.student(z, torch.ones(self.batch, dtype=torch.float64), cond).x0
        t = self._times(0.02, 0.98)
        x_t = self.process.add_noise(x, torch.randn_like(x), t)
        with torch.no_grad():
            real = self.teacher(x_t, t, cond).x0
            fake = self.fake(x_t, t, cond).x0
            scale = (x - real).abs().flatten(1).mean(1).clamp_min(1e-6).view(-1, 1, 1, 1)
            target = x - (fake - real) / scale
        (0.5 * (x - target).square().mean()).backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 10.0)
        self.student_optimizer.step()
        self.student_optimizer.zero_grad()
        torch._foreach_lerp_(self.average, [p.detach() for p in self.student.parameters()], 0.01)
        t = self._times(0.001, 1.0)
        x0, eps = x.detach(), torch.randn_like(x)
        prediction = self.fake(self.process.add_noise(x0, eps, t), t, cond)
        alpha, sigma = (c.float().view(-1, 1, 1, 1) for c in (self.process.alpha(t), self.process.sigma(t)))
        (prediction.raw - (alpha * eps - sigma * x0)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(self.fake.parameters(), 10.0)
        self.fake_optimizer.step()
        self.fake_optimizer.zero_grad()


def main() -> None:
    """Measure and write ``overhead_cpu``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--teacher", default="fashion")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--cycles", type=int, default=6, help="cycles per block")
    parser.add_argument("--repeats", type=int, default=5, help="blocks per side")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    method = DMD2(ZooDenoiser(args.teacher), fake_score_steps=1)
    method.configure_model()
    bare = BareLoop(method, args.batch)
    data = Prior(num_classes=10, batch_size=args.batch)
    seconds: dict[str, list[float]] = {"trainer": [], "bare": []}

    class Clock(Callback):
        """Times blocks of the Trainer's cycles, with a block of the bare loop between two of them."""

        started = 0.0

        def on_train_batch_start(self, trainer: Trainer, module: DMD2, batch: Batch, batch_idx: int) -> None:
            if batch_idx % args.cycles == 1:  # the first cycle of all warms up
                self.started = time.process_time()

        def on_train_batch_end(
            self, trainer: Trainer, module: DMD2, outputs: object, batch: Batch, batch_idx: int
        ) -> None:
            if batch_idx == 0:
                bare.cycle()
            elif batch_idx % args.cycles == 0:
                # the span covers the loop's own work between the cycles of a block
                seconds["trainer"].append((time.process_time() - self.started) / args.cycles)
                with torch.enable_grad(), module.trainer.precision_plugin.forward_context():
                    start = time.process_time()
                    for _ in range(args.cycles):
                        bare.cycle()
                    seconds["bare"].append((time.process_time() - start) / args.cycles)

    trainer = bare_trainer(
        max_steps=args.cycles * args.repeats + 1,
        precision="bf16-mixed",
        callbacks=[Clock()],
    )
    trainer.fit(method, data)
    ratios = [a / b for a, b in zip(seconds["trainer"], seconds["bare"])]
    figures = {
        "rows": [
            {
                "what": "cycle through the Trainer / bare loop",
                "network": args.teacher,
                "batch": args.batch,
                "dtype": "bf16-mixed",
                "cpu_seconds_trainer": statistics.median(seconds["trainer"]),
                "cpu_seconds_bare": statistics.median(seconds["bare"]),
                "ratio_median": statistics.median(ratios),
                "ratios": ratios,
            }
        ]
    }
    print(figures)
    write_result("overhead_cpu", figures)


if __name__ == "__main__":
    main()
