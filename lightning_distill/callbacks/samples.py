"""Pictures during training: the same noise at every update, beside the teacher."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from PIL import Image
from torch import Tensor

from lightning_distill.callbacks.isolation import as_distillation, run_folder, undisturbed
from lightning_distill.evaluation.conditions import Conditions, RunConditions, conditions_of
from lightning_distill.evaluation.sampling import makes_pixels, sample_many
from lightning_distill.generation import beginning, bound, index_noise
from lightning_distill.methods.base import DistillationModule
from lightning_distill.networks.pixel_decoder import PixelDecoder
from lightning_distill.plots import save_comparison, save_strips
from lightning_distill.samplers import to_clean, transport
from lightning_distill.times import few_step_times

__all__ = ["SampleGrid", "trajectory_strips"]

#: latents decoded at a time
_DECODED = 4


class SampleGrid(Callback):
    """Draws fixed samples of the student beside its teacher, every row one class.

    Networks with text or other conditions make their samples for the first rows of the run's data, always the same.

    Writes ``samples/step_000100.png`` into the run folder and the picture ``samples`` to TensorBoard. With ``strip``
    also ``samples/strip_000100.png``: what teacher and student predict as the clean sample at every time along the
    teacher's trajectory (arXiv:2503.10637, Diffusion Target visualisation); a student that has lost its diversity
    predicts the same clean sample early on for every noise.

    Global generators are not touched, and the weights of a run do not depend on this callback.

    Args:
        every_n_steps: student updates between pictures; 0 draws at the end of the run only.
        num_samples: samples of each panel.
        steps: numbers of student steps, a panel each; None is the student's own list.
        weights: ``ema`` (the first average), ``student`` or the name of an average.
        teacher_steps: steps of the teacher's panels (Euler, the guidance of the training); 0 leaves the teacher out.
        strip: number of times of the trajectory strips, 0 for none.
        strip_samples: trajectories shown.
        seed: seed of the noise.
        decoder: makes pictures of latents; None draws their first channels as colours, with a warning.
    """

    def __init__(
        self,
        every_n_steps: int = 0,
        num_samples: int = 60,
        steps: list[int] | None = None,
        weights: str = "ema",
        teacher_steps: int = 50,
        strip: int = 8,
        strip_samples: int = 4,
        seed: int = 2000,
        decoder: PixelDecoder | None = None,
    ) -> None:
        super().__init__()
        if every_n_steps < 0 or num_samples < 1 or teacher_steps < 0 or strip < 0 or strip_samples < 1:
            raise ValueError(
                f"SampleGrid(every_n_steps={every_n_steps}, num_samples={num_samples}, teacher_steps={teacher_steps}, "
                f"strip={strip}, strip_samples={strip_samples}): give at least one sample, and nothing negative."
            )
        self.every_n_steps = every_n_steps
        self.num_samples = num_samples
        self.steps = steps
        self.weights = weights
        self.teacher_steps = teacher_steps
        self.strip = strip
        self.strip_samples = strip_samples
        self.seed = seed
        self.decoder = decoder
        self._conditions: Conditions = RunConditions()
        self._teacher: dict[str, Tensor] = {}
        self._drawn = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse weights and numbers of steps that the module does not have, and conditions that the data do not give.

        Raises:
            ValueError: of these, or a decoder that does not fit the samples.
        """
        module = as_distillation(self, pl_module)
        module.configure_model()
        for nfe in self.steps or (None,):
            module.evaluation_times(nfe)
        network = module.sampling_network(self._weights(module))
        self._conditions = conditions_of(trainer)
        self._conditions(network, 1)
        if module.teacher is not None and (self.teacher_steps or self.strip):
            self._conditions(module.teacher, 1)
        shape = module.sample_shape
        if self.decoder is not None:
            self.decoder.check(shape)
        elif len(shape) in (3, 4) and not makes_pixels(network, shape):
            rank_zero_warn(
                f"SampleGrid draws the first channels of latents of shape {shape} as colours; give it "
                "decoder=PixelDecoder(path) with the pipeline's folder to see pictures."
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw when it is time."""
        step = trainer.global_step
        due = self.every_n_steps and step % self.every_n_steps == 0
        if step and (due or step == trainer.max_steps):
            self._draw(trainer, as_distillation(self, pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the last weights."""
        self._draw(trainer, as_distillation(self, pl_module))

    def _draw(self, trainer: Trainer, module: DistillationModule) -> None:
        step = trainer.global_step
        if self._drawn == step:
            return
        self._drawn, run = step, run_folder(trainer)
        if run is None:
            return
        # sharded networks must be called on every rank; only the first one writes
        with undisturbed(module):
            panels = self.panels(module, bf16=str(trainer.precision).startswith("bf16"))
            strips = None
            if self.strip and module.teacher is not None and len(module.sample_shape) == 3:
                strips = trajectory_strips(
                    module, self.strip, self.strip_samples, self.seed, self._weights(module), self._conditions
                )
            if not trainer.is_global_zero:
                return
            panels = {title: self._shown(samples, module) for title, samples in panels.items()}
            if strips is not None:
                strips = {
                    name: self._shown(part.flatten(0, 1), module).unflatten(0, part.shape[:2])
                    for name, part in strips.items()
                }
        folder = run / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        files = {"samples": folder / f"step_{step:06d}.png"}
        columns = max(1, self.num_samples // (module.student.num_classes or max(1, self.num_samples // 10)))
        save_comparison(panels, files["samples"], columns=columns)
        if strips is not None:
            files["strips"] = folder / f"strip_{step:06d}.png"
            save_strips(strips, files["strips"])
        for logger in trainer.loggers:
            writer = getattr(logger, "experiment", None)
            if writer is not None and hasattr(writer, "add_image"):
                for name, file in files.items():
                    with Image.open(file) as picture:
                        pixels = np.asarray(picture.convert("RGB"))
                    writer.add_image(name, pixels, step, dataformats="HWC")

    def panels(self, module: DistillationModule, bf16: bool = False) -> dict[str, Tensor]:
        """Samples by title: the student at each number of steps, then the teacher.

        Args:
            module: in evaluation mode.
            bf16: sample under bfloat16 autocast.

        Raises:
            ValueError: the student is not sampled in so many steps, or not from noise and conditions alone.
        """
        shape, weights = module.sample_shape, self._weights(module)
        network = module.sampling_network(weights)
        panels: dict[str, Tensor] = {}
        own = len(module.student_times)
        for nfe in self.steps or [own]:
            times = module.evaluation_times(nfe)
            samples, labels = sample_many(
                network,
                self.num_samples,
                times,
                module.sampler,
                self.seed,
                bf16=bf16,
                shape=shape,
                noise_scale=module.noise_scale,
                noise_share=module.noise_share,
                conditions=self._conditions,
            )
            panels[f"student, {_steps(nfe)}"] = _by_class(samples, labels)
        if module.teacher is not None and self.teacher_steps:
            if not self._teacher:
                scale = module.teacher_guidance
                for nfe in sorted({self.teacher_steps, *(self.steps or [own])}, reverse=True):
                    samples, labels = sample_many(
                        module.teacher,
                        self.num_samples,
                        few_step_times(module.teacher.process, nfe),
                        "ode",
                        self.seed,
                        guidance_scale=scale,
                        bf16=bf16,
                        shape=shape,
                        conditions=self._conditions,
                    )
                    self._teacher[f"teacher, {_steps(nfe)}"] = _by_class(samples, labels)
            panels |= self._teacher
        return panels

    def _shown(self, samples: Tensor, module: DistillationModule) -> Tensor:
        """What is drawn of samples, (N, 1 or 3, H, W) for pictures, videos (by their first frame) and latents."""
        if samples.ndim == 5:
            samples = samples[:, :, 0]
        if samples.ndim != 4:
            return samples
        if self.decoder is not None:
            return torch.cat([self.decoder(part.to(module.device)).cpu() for part in samples.split(_DECODED)])
        if samples.shape[1] == 2:  # no colour has two channels
            return samples[:, :1]
        return samples[:, :3]

    def _weights(self, module: DistillationModule) -> str | None:
        """The name for ``sampling_network``: without averages ``ema`` is the student."""
        return None if self.weights == "ema" else self.weights


@torch.no_grad()
def trajectory_strips(
    module: DistillationModule,
    times: int,
    samples: int,
    seed: int,
    weights: str | None = None,
    conditions: Conditions | None = None,
) -> Mapping[str, Tensor]:
    """Clean-sample predictions of teacher and student along the teacher's ODE trajectory.

    Args:
        module: with a teacher, in evaluation mode.
        times: number of times, from pure noise to data.
        samples: number of trajectories.
        seed: seed of the noise.
        weights: student network, see ``module.sampling_network``.
        conditions: of the samples; None for the classes in turn.

    Returns:
        ``teacher`` and ``student``, each (samples, times, C, H, W), pictures in [-1, 1], on the CPU.
    """
    teacher, student = module.require_teacher(), module.sampling_network(weights)
    process = teacher.process
    given = conditions or RunConditions()
    cond, own = (
        {k: v.to(role.device) if isinstance(v, Tensor) else v for k, v in given(role, samples).items()}
        for role in (teacher, student)
    )
    grid = few_step_times(process, times)
    noise = index_noise(samples, module.sample_shape, seed).to(teacher.device)
    x = process.prior(beginning(student, noise, own), grid[0])
    directions = bound(teacher, cond, "ode", module.teacher_guidance)
    ends = to_clean(bound(student, own, "flow_map" if module.capability == "two_time" else "renoise"))
    seen: dict[str, list[Tensor]] = {"teacher": [], "student": []}
    for t, r in pairwise([*grid, 0.0]):
        now = torch.full((samples,), t, dtype=torch.float64, device=x.device)
        prediction = directions(x, now)
        seen["teacher"].append(prediction.x0)
        seen["student"].append(ends(x, now).x0)
        x = transport(prediction, r)
    strips = {name: torch.stack(parts, dim=1).float().cpu() for name, parts in seen.items()}
    pixels = makes_pixels(student, module.sample_shape)
    return {name: strip.clamp(-1, 1) if pixels else strip for name, strip in strips.items()}


def _by_class(samples: Tensor, labels: Tensor | None) -> Tensor:
    return samples if labels is None or samples.ndim != 4 else samples[labels.argsort(stable=True)]


def _steps(n: int) -> str:
    return f"{n} step" + ("s" if n > 1 else "")
