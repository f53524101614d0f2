"""Stop a distillation that goes wrong, or take it back to where it was right."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_distill.callbacks.good_state import good_path, kept_step, restore
from lightning_distill.callbacks.health import TrainingHealth
from lightning_distill.callbacks.isolation import as_distillation
from lightning_distill.callbacks.judged_rows import evaluation_log, kind_of, telling_rows
from lightning_distill.losses.diagnostics import oscillation
from lightning_distill.methods.base import DistillationModule
from lightning_distill.records import EvaluationLog

__all__ = ["CollapseAlarm"]

#: health figures that are judged
_HEALTH = ("fake_score_lag", "score_gap", "spread_ratio")
#: a figure that was never good counts as bad when it has not improved for so many evaluations or health figures
_STUCK = {"evaluation": 3, "health": 10}
#: lags looked at for oscillation, its size in ln(lag) and its crossings of the mean
_WINDOW, _AMPLITUDE, _CROSSINGS = 8, 0.25, 4
#: share of skipped updates that is too many
_SKIPPED = 0.1
#: without evaluations, updates between two good checkpoints
_GOOD_EVERY = 500

_ADVICE = {
    "recall": "The student covers less of the data than it should: lower its learning rate or the guidance, give "
    "the fake score more steps (fake_score_steps), or add gan.",
    "diversity": "The student's samples become alike: lower its learning rate or the guidance, give the fake score "
    "more steps (fake_score_steps), or add gan.",
    "collapse": "The samples are becoming one and the same: lower the student's learning rate or the guidance, or give "
    "the fake score more steps (fake_score_steps).",
    "lagging_critic": "The fake score does not know the student's present samples, so the direction is wrong: raise "
    "fake_score_steps, lower the student's learning rate, and check that the fake score's own learning rate is neither "
    "too low nor so high that it diverges.",
    "frozen_critic": "Without it nothing moves the student: check fake_score_optimizer (lr > 0), its schedule and the "
    "role's trained parameters.",
    "oscillating_critic": "Student and fake score chase each other: lower both learning rates, use Adam betas (0, "
    ".99), or raise fake_score_steps.",
    "non_finite": "Such updates are skipped: lower the learning rate, check the data, or use precision=bf16-mixed "
    "instead of 16-mixed.",
}


class CollapseAlarm(Callback):
    """Watches evaluations, health figures and losses; warns, stops or rolls back.

    ===================  ===========================================================================================
    kind                 raised when
    ===================  ===========================================================================================
    recall, diversity    a recall or coverage (a Vendi score or diversity) of ``GenerativeEvaluation`` is below its
                         fraction of the many-step teacher's, after it was above or without a new best in 3 evaluations
    collapse             ``health/spread_ratio`` is below ``spread_fraction``, after it was above or without a new best
                         in 10 measurements
    lagging_critic       ``health/fake_score_lag`` exceeds ``lag_threshold``
    frozen_critic        ``health/score_gap`` is exactly 0: fake score and teacher are the same function
    oscillating_critic   the last 8 ``health/fake_score_lag`` cross their mean 4 times or more, with a standard
                         deviation of their logarithms above .25
    non_finite           a logged total loss is not finite, or a phase skipped more than a tenth of its updates since
                         the last logging
    ===================  ===========================================================================================

    A student starts with blurred samples of little diversity, so a low figure alone is no collapse. Rows at the
    student's own number of steps count, of the average if there is one. Health figures come from ``TrainingHealth``.
    Every kind is warned of once per run, and each alarm is a line of ``warnings.jsonl`` in the run folder.

    ``rollback`` keeps ``good.ckpt`` beside the other checkpoints: the state at the start, then after every evaluation
    without a finding (without evaluations: after health figures without one, every 500 updates). A run that resumes
    from before the state of that file replaces it by the state it begins with. An alarm then restores student,
    averages, critics, declared targets, buffers, the method's own state and the optimizers' moments. Not moved back are
    ``global_step``, the loader, the position of the learning-rate schedules, the random streams and the scale of
    float16 losses: the run keeps its budget and its file names, and meets other data and noise than those that it
    failed on. All learning rates, and the base rates of their schedules, are multiplied by ``lr_factor``. After
    ``max_rollbacks`` the next alarm stops the run.

    Args:
        recall_fraction: of the teacher's recall and coverage.
        diversity_fraction: of the teacher's diversity.
        lag_threshold: largest ratio of the fake score's denoising error to the teacher's.
        spread_fraction: of the reference's spread between samples.
        patience: findings in a row that raise an alarm.
        action: ``warn``, ``stop`` or ``rollback``.
        lr_factor: factor on every learning rate at a rollback, in (0, 1].
        max_rollbacks: number of rollbacks.

    Raises:
        ValueError: numbers out of range, or an unknown action.
    """

    def __init__(
        self,
        recall_fraction: float = 0.5,
        diversity_fraction: float = 0.5,
        lag_threshold: float = 1.2,
        spread_fraction: float = 0.5,
        patience: int = 1,
        action: Literal["warn", "stop", "rollback"] = "warn",
        lr_factor: float = 0.5,
        max_rollbacks: int = 3,
    ) -> None:
        super().__init__()
        if action not in ("warn", "stop", "rollback"):
            raise ValueError(f"CollapseAlarm(action={action!r}): choose warn, stop or rollback.")
        fractions = (recall_fraction, diversity_fraction, spread_fraction)
        if not all(0.0 <= f < 1.0 for f in fractions) or lag_threshold <= 1.0:
            raise ValueError(
                f"CollapseAlarm(recall_fraction={recall_fraction}, diversity_fraction={diversity_fraction}, "
                f"spread_fraction={spread_fraction}, lag_threshold={lag_threshold}): fractions lie in [0, 1), and the "
                "lag of a healthy critic is at most about 1."
            )
        if patience < 1 or not 0.0 < lr_factor <= 1.0 or max_rollbacks < 0:
            raise ValueError(
                f"CollapseAlarm(patience={patience}, lr_factor={lr_factor}, max_rollbacks={max_rollbacks}): needs "
                "patience >= 1, a factor in (0, 1] and no negative number of rollbacks."
            )
        self.recall_fraction = recall_fraction
        self.diversity_fraction = diversity_fraction
        self.lag_threshold = lag_threshold
        self.spread_fraction = spread_fraction
        self.patience = patience
        self.action = action
        self.lr_factor = lr_factor
        self.max_rollbacks = max_rollbacks
        #: alarms so far: step, kind, message
        self.alarms: list[dict[str, Any]] = []
        self.rollbacks = 0
        #: update of the last good checkpoint, None without one
        self.good_step: int | None = None
        self._best: dict[str, float] = {}
        self._stuck: dict[str, int] = {}
        self._found: dict[str, int] = {}
        self._lags: list[float] = []
        self._skipped: dict[str, float] = {}
        self._judged_rows = 0
        self._judged_health = 0
        self._folder: Path | None = None
        self._good = Path("good.ckpt")
        self._active = False

    # ------------------------------------------------------------------------------------------------ when
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse modules that are no distillation."""
        as_distillation(self, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the folders; keep the first good state."""
        self._active = not getattr(trainer, "fast_dev_run", False)
        if not self._active:
            return
        if not self._skipped:
            self._skipped = _skipped_steps(as_distillation(self, pl_module))
        folder = trainer.log_dir  # on every rank: it is broadcast
        writes = trainer.logger is not None or bool(trainer.checkpoint_callbacks)
        self._folder = Path(folder) if folder and writes else None
        if self.action == "rollback":
            self._good = good_path(trainer)
            kept = kept_step(trainer, self._good)
            if kept is None or kept != self.good_step:
                self._keep(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Judge what is new."""
        if self._active:
            self._look(trainer, as_distillation(self, pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the last evaluation, which may have come after the last update."""
        if self._active and (log := evaluation_log(trainer)):
            for kind, message in self._judge_rows(trainer, as_distillation(self, pl_module), log)[0].items():
                self._warn(trainer, kind, message)

    def _look(self, trainer: Trainer, module: DistillationModule) -> None:
        findings: dict[str, str] = {}
        log = evaluation_log(trainer)
        evaluated = measured = False
        if log is not None:
            found, evaluated = self._judge_rows(trainer, module, log)
            findings |= found
        logged = (
            trainer.global_step > 0 and trainer.global_step % max(1, getattr(trainer, "log_every_n_steps", 50)) == 0
        )
        if health := self._new_health(trainer, logged):
            measured = True
            findings |= self._judge_health(health)
        if logged:
            found = self._judge_losses(trainer, module)
            findings |= found
        if findings:
            self._act(trainer, module, findings)
        elif self.action == "rollback" and not any(self._found.values()):
            due = measured and trainer.global_step - (self.good_step or 0) >= _GOOD_EVERY
            if evaluated or (log is None and due):
                self._keep(trainer)

    # ------------------------------------------------------------------------------------------------ judging
    def _judge_rows(
        self, trainer: Trainer, module: DistillationModule, log: EvaluationLog
    ) -> tuple[dict[str, str], bool]:
        """Alarms raised by the rows that came since the last look, and whether there were any."""
        start = min(self._judged_rows, len(log.rows))
        self._judged_rows = len(log.rows)
        new = [r for r in log.rows[start:] if r.stage != "test" and (r.step or 0) <= trainer.global_step]
        if not new or log.baseline() is None:
            return {}, bool(new)
        findings: dict[str, str] = {}
        bad: dict[str, bool] = {}
        for row in telling_rows(new, len(module.student_times)):
            teacher = log.baseline(row=row)
            for name, value in row.metrics.items():
                kind = kind_of(name)
                if kind is None or teacher is None or name not in teacher.metrics:
                    continue
                fraction = self.recall_fraction if kind == "recall" else self.diversity_fraction
                floor = fraction * teacher.metrics[name]
                key = f"{name}/nfe{row.nfe}/{row.weights}"
                fallen = self._fallen(key, value, floor, "evaluation")
                bad[kind] = bad.get(kind, False) or fallen
                if fallen:
                    findings[kind] = (
                        f"{name} of {row.weights} at nfe {row.nfe} is {value:.3g}, below {fraction:g} of the teacher's "
                        f"{teacher.metrics[name]:.3g} (best so far {self._best[key]:.3g})."
                    )
        return {kind: findings[kind] for kind, found in bad.items() if self._persistent(kind, found)}, True

    def _judge_health(self, health: Mapping[str, float]) -> dict[str, str]:
        """Alarms raised by new health figures (names without ``health/``)."""
        findings: dict[str, str] = {}
        lag, gap, spread = (health.get(name) for name in _HEALTH)
        if lag is not None:
            if self._persistent("lagging_critic", not lag <= self.lag_threshold):
                findings["lagging_critic"] = (
                    f"the fake score's denoising error on student samples is {lag:.3g} times the teacher's (limit "
                    f"{self.lag_threshold:g})."
                )
            self._lags = [*self._lags, lag][-_WINDOW:]
            size, crossings = oscillation(self._lags)
            restless = len(self._lags) == _WINDOW and size > _AMPLITUDE and crossings >= _CROSSINGS
            if self._persistent("oscillating_critic", restless):
                findings["oscillating_critic"] = (
                    f"the fake score's lag swings between {min(self._lags):.3g} and {max(self._lags):.3g}."
                )
        if gap is not None and self._persistent("frozen_critic", gap == 0.0):
            findings["frozen_critic"] = "fake score and teacher predict exactly the same on student samples."
        if spread is not None:
            fallen = self._fallen("spread_ratio", spread, self.spread_fraction, "health")
            if self._persistent("collapse", fallen):
                findings["collapse"] = (
                    f"the spread between samples is {spread:.3g} of the reference's (limit {self.spread_fraction:g}, "
                    f"best so far {self._best['spread_ratio']:.3g})."
                )
        return findings

    def _judge_losses(self, trainer: Trainer, module: DistillationModule) -> dict[str, str]:
        """Alarms raised by the losses just logged; one small decision is shared by the ranks."""
        metrics = trainer.callback_metrics
        interval = max(1, getattr(trainer, "log_every_n_steps", 50))
        plan = [phase for phase, _ in module.phase_plan()]
        message = ""
        for phase in module.phases:
            total, skipped = metrics.get(f"train/{phase}/total"), metrics.get(f"train/{phase}/skipped_steps")
            if total is not None and not math.isfinite(float(total)):
                message = f"the loss of phase {phase} is {float(total)}."
            if skipped is not None:
                new = float(skipped) - self._skipped.get(phase, 0.0)
                self._skipped[phase] = float(skipped)
                if not message and new > _SKIPPED * interval * max(1, plan.count(phase)):
                    message = (
                        f"{new:.0f} of the last updates of phase {phase} had a loss or gradient that is not finite."
                    )
        bad = trainer.strategy.reduce_boolean_decision(bool(message), all=False)
        if self._persistent("non_finite", bad):
            return {"non_finite": message or "a loss is not finite on another process."}
        return {}

    def _new_health(self, trainer: Trainer, logged: bool) -> dict[str, float]:
        """Health figures that have not been judged yet."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, TrainingHealth):
                if callback.measured_at in (0, self._judged_health):
                    return {}
                self._judged_health = callback.measured_at
                return callback.latest
        if not logged:
            return {}
        metrics = trainer.callback_metrics
        return {name: float(metrics[f"health/{name}"]) for name in _HEALTH if f"health/{name}" in metrics}

    def _fallen(self, key: str, value: float, floor: float, source: str) -> bool:
        """Whether a figure that should be high is low without having just been on its way up."""
        value = value if math.isfinite(value) else 0.0
        best = self._best.get(key)
        self._best[key] = value if best is None else max(best, value)
        if best is None or value >= floor or value > 1.02 * best:
            self._stuck[key] = 0
            return False
        self._stuck[key] = self._stuck.get(key, 0) + 1
        return best >= floor or self._stuck[key] >= _STUCK[source]

    def _persistent(self, kind: str, bad: bool) -> bool:
        """Count a finding; whether there have been ``patience`` in a row."""
        self._found[kind] = self._found.get(kind, 0) + 1 if bad else 0
        return self._found[kind] >= self.patience

    # ------------------------------------------------------------------------------------------------ acting
    def _act(self, trainer: Trainer, module: DistillationModule, findings: Mapping[str, str]) -> None:
        for kind, message in findings.items():
            self._warn(trainer, kind, message)
        what = ", ".join(findings)
        if self.action == "stop":
            self._warn(trainer, "stop", f"training stops at update {trainer.global_step} ({what}).")
            trainer.should_stop = True
        elif self.action == "rollback" and self.rollbacks >= self.max_rollbacks:
            self._warn(trainer, "stop", f"training stops after {self.rollbacks} rollbacks ({what}).")
            trainer.should_stop = True
        elif self.action == "rollback":
            self.rollback(trainer, module)
            self._warn(
                trainer,
                "rollback",
                f"back to the weights of update {self.good_step} ({what}), learning rates times {self.lr_factor:g}; "
                f"rollback {self.rollbacks} of {self.max_rollbacks}.",
                repeat=True,
            )

    def _warn(self, trainer: Trainer, kind: str, message: str, repeat: bool = False) -> None:
        """Warn of a kind once, and add a line to ``warnings.jsonl``."""
        if not repeat and any(alarm["kind"] == kind for alarm in self.alarms):
            return
        message = f"{message} {_ADVICE[kind]}" if kind in _ADVICE else message
        alarm = {"step": trainer.global_step, "kind": kind, "message": message}
        self.alarms.append(alarm)
        rank_zero_warn(f"CollapseAlarm at update {trainer.global_step}, {kind}: {message}")
        if self._folder is not None and trainer.is_global_zero:
            self._folder.mkdir(parents=True, exist_ok=True)
            with open(self._folder / "warnings.jsonl", "a") as file:
                file.write(json.dumps(alarm) + "\n")

    def _keep(self, trainer: Trainer) -> None:
        """Save the present state as the good one."""
        self.good_step = trainer.global_step
        trainer.save_checkpoint(self._good, weights_only=False)

    def rollback(self, trainer: Trainer, module: DistillationModule) -> None:
        """Restore the last good state in place and cut every learning rate; see the class for what is not restored.

        Args:
            trainer: of the running fit.
            module: its module.
        """
        restore(trainer, module, self._good, self.lr_factor)
        self.rollbacks += 1
        self._found.clear()
        self._stuck.clear()
        self._lags.clear()
        self._skipped = _skipped_steps(module)

    # ------------------------------------------------------------------------------------------------ resume
    def state_dict(self) -> dict[str, Any]:
        """What has been seen and done."""
        return {
            "alarms": [dict(alarm) for alarm in self.alarms],
            "rollbacks": self.rollbacks,
            "good_step": self.good_step,
            "best": dict(self._best),
            "stuck": dict(self._stuck),
            "found": dict(self._found),
            "lags": list(self._lags),
            "skipped": dict(self._skipped),
            "judged_rows": self._judged_rows,
            "judged_health": self._judged_health,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the run was interrupted."""
        for name, value in state_dict.items():
            setattr(self, name if hasattr(self, name) else f"_{name}", value)


# ---------------------------------------------------------------------------------------------------- inner parts
def _skipped_steps(module: DistillationModule) -> dict[str, float]:
    return dict(zip(module.phases, module.skipped_steps.tolist()))
