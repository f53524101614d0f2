"""Evaluation inside the run: is the student better than before, and how far is it from its teacher?"""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_distill.callbacks.isolation import as_distillation, run_folder, undisturbed
from lightning_distill.evaluation.conditions import RunConditions, conditions_of
from lightning_distill.evaluation.evaluator import DEFAULT_MEASURES, Evaluator, check_measures
from lightning_distill.evaluation.references import check_references, reference_samples, resolve_reference
from lightning_distill.evaluation.runner import EvaluationRunner, Ranks
from lightning_distill.evaluation.table import print_table
from lightning_distill.methods.base import DistillationModule
from lightning_distill.metrics.clip_score import CLIPScore
from lightning_distill.metrics.extractors import Extractor, ZooClassifier
from lightning_distill.metrics.lpips_diversity import PerceptualDistance
from lightning_distill.metrics.reference import Half
from lightning_distill.records import EvaluationLog, EvaluationRow, metric_name

__all__ = ["GenerativeEvaluation"]

_PREFIX = {"fit": "val", "validate": "val", "test": "test"}


class GenerativeEvaluation(Callback):
    """Samples the student, measures the samples, compares them with the teacher's.

    Runs every ``every_n_steps`` student updates, at the last update, and in ``validate`` and ``test``. Every figure is
    logged as ``val/<measure>/nfe<steps>/<weights>`` (``test/...`` in ``test``), for example ``val/fd_cnn/nfe1/ema`` or
    ``val/progress_cnn/nfe1/ema``; ``ModelCheckpoint(monitor=...)`` and ``EarlyStopping`` work with these names, the
    latter after each evaluation where ``check_on_train_epoch_end`` is false. All rows, the teacher's too, are kept in
    ``history`` and in ``metrics.json`` of the run folder. In a fit an update is measured once, whatever asks for it.
    Samples that are not finite make figures of NaN there, and an error elsewhere.

    The noise of a sample depends on its index only, is never that of the training, and no global generator is touched:
    a run with this callback has the same weights, bit for bit, as one without. Samples are shared over the processes.
    Classes come in turn; where a network has text or other conditions, sample i is made for row i of the run's data.

    Args:
        every_n_steps: student updates between evaluations; 0 evaluates at the end of the run only.
        num_samples: samples per row. Figures of different numbers cannot be compared; 10 per feature at least.
        steps: numbers of student steps; None is the student's own list.
        weights: ``ema`` (the first average), ``student`` (the raw weights) or names of further averages.
        extractors: feature extractors. None is the shipped classifier of a shipped teacher; samples that are no images
            need none.
        reference: what the features are compared with: a zoo entry, a folder with ``reference.safetensors``, an
            ``.npz`` with ``mu`` and ``sigma``, or ``data`` for the images of the data module (computed once, then
            cached); by extractor name where they differ. None is the zoo entry of a zoo classifier, else ``data``.
        measures: what is measured, see ``evaluation.MEASURES``. ``lpips_diversity`` compares samples of one condition:
            with it half as many rows of the data as samples are used at most, for all measures.
        teacher_steps: steps of the many-step teacher (Euler on the uniform grid, the guidance of the training); 0
            leaves the teacher out.
        seed: seed of the samples' noise in ``fit`` and ``validate``; ``test`` uses ``seed + 1`` and the other half of
            the reference.
        batch_size: samples per network call.
        max_reference: images of the data module that make a ``data`` reference.
        perceptual: perceptual distance for ``lpips_diversity``.
        clip: text-image score for ``clip_score``.
        prompts: prompt of each class, for ``clip_score``; of students of text the prompt of each row of the data, None
            for those that a store of prompts keeps.
        cache: folder for teacher rows and references; None is ``LIGHTNING_DISTILL_CACHE``, else
            ``~/.cache/lightning_distill``.
        table: print a table at the end.

    Raises:
        ValueError: settings that contradict each other; or, before training starts, an extractor that cannot read the
            samples, a reference of other features, or data without clean samples where they are the reference.
        FileNotFoundError: a weights or reference file is missing; raised before training starts.
    """

    def __init__(
        self,
        every_n_steps: int = 0,
        num_samples: int = 2560,
        steps: list[int] | None = None,
        weights: list[str] | None = None,
        extractors: list[Extractor] | None = None,
        reference: str | dict[str, str] | None = None,
        measures: list[str] | None = None,
        teacher_steps: int = 50,
        seed: int = 1000,
        batch_size: int = 500,
        max_reference: int = 50_000,
        perceptual: PerceptualDistance | None = None,
        clip: CLIPScore | None = None,
        prompts: list[str] | None = None,
        cache: str | None = None,
        table: bool = True,
    ) -> None:
        super().__init__()
        if every_n_steps < 0 or num_samples < 10 or teacher_steps < 0:
            raise ValueError(
                f"GenerativeEvaluation(every_n_steps={every_n_steps}, num_samples={num_samples}, teacher_steps="
                f"{teacher_steps}): the first and the last must not be negative, and 10 samples are the fewest."
            )
        if steps is not None and (not steps or min(steps) < 1):
            raise ValueError(f"GenerativeEvaluation(steps={steps}): give numbers of 1 or more.")
        self.every_n_steps = every_n_steps
        self.num_samples = num_samples
        self.steps = steps
        self.weights = list(weights or ["ema"])
        self.extractors = extractors
        self.reference = reference
        self.measures = check_measures(measures or DEFAULT_MEASURES)
        if "lpips_diversity" in self.measures and perceptual is None:
            raise ValueError("the measure lpips_diversity needs perceptual=PerceptualDistance(...).")
        if "clip_score" in self.measures and clip is None:
            raise ValueError("the measure clip_score needs clip=CLIPScore(...).")
        self.teacher_steps = teacher_steps
        self.seed = seed
        self.batch_size = batch_size
        self.max_reference = max_reference
        self.perceptual = perceptual
        self.clip = clip
        self.prompts = list(prompts or [])
        self.cache = cache
        self.table = table
        #: all rows so far
        self.history = EvaluationLog()
        #: seconds spent in evaluations of this process
        self.seconds = 0.0
        self._conditions = RunConditions()
        self._evaluators: dict[Half, Evaluator] = {}
        self._sources: dict[str, str] = {}
        self._fitting = True
        self._first = 0  # row of the history with which this fit begins
        self._began = 0  # update at which it began or went on
        self._saved = False  # whether the folder's rows are of this fit
        self._loaded: int | None = None  # update of the checkpoint that is validated or tested

    # ------------------------------------------------------------------------------------------------ when
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check every file, condition and number of steps that will be needed, before anything runs."""
        module = as_distillation(self, pl_module)
        module.configure_model()
        self._fitting, self._loaded = stage == "fit", None
        if self._fitting and not getattr(trainer, "global_step", 0):
            self._first = len(self.history.rows)
        for nfe in self.steps or (None,):
            module.evaluation_times(nfe)
        # two samples of every condition at least, where they are compared
        self._conditions = conditions_of(trainer, self.num_samples // 2 if "lpips_diversity" in self.measures else None)
        for name in self._weights(module):
            self._conditions(module.sampling_network(None if name == "ema" else name), 1)
        if module.teacher is not None and self.teacher_steps:
            self._conditions(module.teacher, 1)
        for part in (self.perceptual, self.clip):
            if part is not None:
                part.check(tuple(module.sample_shape))
        extractors = self._extractors(module)
        self._sources = check_references(self.reference, extractors, module.sample_shape)
        if not extractors or "data" in self._sources.values():
            with isolate_rng():
                reference_samples(getattr(trainer, "datamodule", None), 1, say=False)
        self._conditions.facts(module.student, self.measures, self.num_samples, self.prompts)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Of which update the weights are that are validated or tested."""
        if not self._fitting:
            self._loaded = checkpoint.get("global_step")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where this fit begins, or goes on."""
        self._began, self._saved = trainer.global_step, False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluate when it is time."""
        step = trainer.global_step
        due = self.every_n_steps and step % self.every_n_steps == 0
        if step and (due or step == trainer.max_steps or trainer.should_stop):
            self._evaluate(trainer, as_distillation(self, pl_module), "fit")
            rows = self._measured(step)
            names = {metric_name(_PREFIX[r.stage], k, r.nfe, r.weights) for r in rows for k in r.metrics}
            for callback in trainer.early_stopping_callbacks:  # does nothing in those that look at ends of epochs
                if callback.monitor in names:
                    callback.on_validation_end(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate, unless it is the sanity check."""
        if not trainer.sanity_checking:
            self._evaluate(trainer, as_distillation(self, pl_module), "validate")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate with other noise and the other half of the reference."""
        self._evaluate(trainer, as_distillation(self, pl_module), "test")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate what ended without a last update that was known to be one; print the table."""
        self._evaluate(trainer, as_distillation(self, pl_module), "fit", live=False)
        if self.table and trainer.is_global_zero and self.history.rows:
            print_table(self.history)

    # ------------------------------------------------------------------------------------------------ what
    def _evaluate(self, trainer: Trainer, module: DistillationModule, stage: str, live: bool = True) -> None:
        step = trainer.global_step if self._loaded is None else self._loaded
        steps = self.steps or [len(module.student_times)]
        wanted = [(name, nfe) for name in self._weights(module) for nfe in steps]
        known = {(row.weights, row.nfe): row for row in self._measured(step)}
        for row in (known[key] for key in wanted if key in known):
            self._publish(trainer, module, row, live, new=False)
        if missing := [key for key in wanted if key not in known]:
            start = time.perf_counter()
            with undisturbed(module):
                self._measure(trainer, module, missing, steps, step, stage, live)
            self._save(trainer)
            self.seconds += time.perf_counter() - start

    def _measured(self, step: int) -> list[EvaluationRow]:
        """What this fit has measured at an update; nothing elsewhere, where other weights may have come."""
        samples = (self.num_samples, self.seed, "selection")
        rows = self.history.rows[self._first :] if self._fitting else []
        return [row for row in rows if row.step == step and row.stage != "test" and row.samples == samples]

    def _measure(
        self,
        trainer: Trainer,
        module: DistillationModule,
        wanted: list[tuple[str, int]],
        steps: list[int],
        step: int,
        stage: str,
        live: bool,
    ) -> None:
        runner = self._runner(trainer, module, stage)
        teacher: list[EvaluationRow] = []
        if self.teacher_steps:
            cache = self._conditions.teacher_cache(module.teacher, self.cache)
            teacher = runner.teacher_rows(module, [*steps, self.teacher_steps], cache)
        facts = runner.evaluator.reference_facts()
        for name, nfe in wanted:
            row = runner.student_row(module, nfe, name, teacher, lenient=self._fitting, step=step, stage=stage)
            self.history.update(EvaluationLog([row], teacher, facts))
            self._publish(trainer, module, row, live)

    def _save(self, trainer: Trainer) -> None:
        """Write the rows beside those that the folder has from elsewhere: ``evaluate``, or a test of its own."""
        folder = run_folder(trainer)
        if folder is None or not trainer.is_global_zero:
            return
        try:
            kept = EvaluationLog.load(folder, missing_ok=True)
        except ValueError as error:
            rank_zero_warn(f"{error} It is written anew.")
            kept = EvaluationLog()
        if self._fitting and not self._saved:  # what came after the update that this fit goes on from is made anew
            kept.rows = [row for row in kept.rows if row.stage == "test" and (row.step or 0) <= self._began]
            kept = kept if self._began else EvaluationLog()
        kept.update(self.history)
        if self._fitting:
            kept.rows.sort(key=lambda row: row.step or 0)
        kept.save(folder)
        self._saved = True

    def _runner(self, trainer: Trainer, module: DistillationModule, stage: str) -> EvaluationRunner:
        def gather(part: Tensor) -> Tensor:
            if trainer.world_size == 1:
                return part[None]
            return trainer.strategy.all_gather(part.to(trainer.strategy.root_device).contiguous()).cpu()

        test = stage == "test"
        ranks = Ranks(trainer.global_rank, trainer.world_size, gather, trainer.strategy.broadcast)
        evaluator = self._evaluator(trainer, module, "held_out" if test else "selection")
        bf16 = str(trainer.precision).startswith("bf16")
        return EvaluationRunner(
            evaluator, self.num_samples, self.seed + test, self.batch_size, bf16, ranks, self._conditions
        )

    def _publish(
        self, trainer: Trainer, module: DistillationModule, row: EvaluationRow, live: bool, new: bool = True
    ) -> None:
        """To the logger at this very update if new, and to ``callback_metrics`` for checkpoints and early stopping."""
        named = {metric_name(_PREFIX[row.stage], k, row.nfe, row.weights): v for k, v in row.metrics.items()}
        if self._fitting:
            for logger in trainer.loggers if new else []:
                logger.log_metrics(named, step=trainer.global_step)
            if live:  # Lightning takes no values at the end of training, where nothing reads them any more
                module.log_dict(named, logger=False, batch_size=1, rank_zero_only=False)
        else:
            module.log_dict(named, batch_size=1)

    # ------------------------------------------------------------------------------------------------ with what
    def _weights(self, module: DistillationModule) -> list[str]:
        """The networks to sample; without averages ``ema`` is the student."""
        names = ["student" if name == "ema" and not module.student_ema else name for name in self.weights]
        return list(dict.fromkeys(names))

    def _extractors(self, module: DistillationModule) -> list[Extractor]:
        if self.extractors is not None:
            return self.extractors
        if len(module.sample_shape) != 3:
            return []
        entry = module.teacher.zoo_name if module.teacher is not None else None
        if entry is None:
            raise ValueError(
                "GenerativeEvaluation needs extractors=[...] for images of a teacher that is not from the zoo: for "
                "example Inception(weights=...), EfficientNetLite0(), DINOv2(folder), or ModuleExtractor(network)."
            )
        return [ZooClassifier(entry)]

    def _evaluator(self, trainer: Trainer, module: DistillationModule, half: Half) -> Evaluator:
        if half in self._evaluators:
            return self._evaluators[half]
        if other := next(iter(self._evaluators.values()), None):
            references: dict[str, Any] = dict(other.references)
            extractors = other.extractors
        else:
            extractors = self._extractors(module)
            data = getattr(trainer, "datamodule", None)
            references = {}
            chosen: list[Extractor | None] = [*extractors] or [None]
            for extractor in chosen:
                name = extractor.name if extractor is not None else ""
                references[name] = resolve_reference(
                    self._sources.get(name), extractor, data, self.max_reference, self.cache, device=module.device
                )
        evaluator = Evaluator(
            extractors,
            references,
            self.measures,
            half,
            perceptual=self.perceptual,
            clip=self.clip,
            **self._conditions.facts(module.student, self.measures, self.num_samples, self.prompts),
            device=module.device,
        )
        self._evaluators[half] = evaluator
        return evaluator

    # ------------------------------------------------------------------------------------------------ resume
    def state_dict(self) -> dict[str, Any]:
        """The rows so far, so that a resumed run goes on with them."""
        return self.history.as_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the rows of the run that is resumed; a checkpoint that is tested has no say."""
        if self._fitting:
            self.history, self._first = EvaluationLog.from_dict(state_dict), 0
