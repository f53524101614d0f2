"""``lightning-distill evaluate RUN_DIR``: measure a finished run, and decide whether its result passes."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from difflib import get_close_matches
from inspect import isabstract
from pathlib import Path
from typing import Any

import yaml

from lightning_distill.commands.errors import CommandParser
from lightning_distill.commands.instantiation import maker
from lightning_distill.commands.run_folder import find_run, load_run, read_config, read_data, weights_name
from lightning_distill.evaluation.conditions import RunConditions
from lightning_distill.evaluation.evaluator import DEFAULT_MEASURES, Evaluator, check_measures
from lightning_distill.evaluation.passing import MINIMUM_SAMPLES, verdict
from lightning_distill.evaluation.references import check_references, resolve_reference
from lightning_distill.evaluation.runner import EvaluationRunner
from lightning_distill.evaluation.table import print_table
from lightning_distill.generation import needed_conditions
from lightning_distill.methods.base import DistillationModule
from lightning_distill.metrics.clip_score import VARIABLE as CLIP_VARIABLE
from lightning_distill.metrics.clip_score import CLIPScore
from lightning_distill.metrics.extractors import Extractor, ZooClassifier
from lightning_distill.metrics.lpips_diversity import VARIABLE as TRUNK_VARIABLE
from lightning_distill.metrics.lpips_diversity import PerceptualDistance
from lightning_distill.records import EvaluationLog

__all__ = ["main"]


def main(words: Sequence[str]) -> None:
    """Evaluate a run and add the rows to its ``metrics.json``, where the earlier ones stay, the teacher's too."""
    parser = CommandParser(
        prog="lightning-distill evaluate", description="Measure the student of a run against its teacher and the data."
    )
    parser.add_argument("run_dir", help="run folder, for example runs/quickstart")
    parser.add_argument("--n", type=int, default=5000, help="number of samples (default: %(default)s)")
    parser.add_argument("--steps", type=int, nargs="+", help="numbers of student steps (default: its own)")
    parser.add_argument(
        "--weights",
        nargs="+",
        help="ema, student, or names of averages (default: ema, of runs without one the student)",
    )
    parser.add_argument("--seed", type=int, default=20_000, help="seed of the samples' noise (default: %(default)s)")
    parser.add_argument(
        "--half",
        choices=["held_out", "selection"],
        default="held_out",
        help="half of the reference (default: %(default)s)",
    )
    parser.add_argument(
        "--teacher-steps", type=int, default=50, help="steps of the many-step teacher (default: %(default)s)"
    )
    parser.add_argument(
        "--measures",
        nargs="+",
        default=list(DEFAULT_MEASURES),
        help=f"what is measured (default: {' '.join(DEFAULT_MEASURES)})",
    )
    parser.add_argument(
        "--extractors",
        help="YAML list of class_path/init_args, or its file (default: those of the shipped teacher)",
    )
    parser.add_argument(
        "--reference",
        action="append",
        metavar="[NAME=]REFERENCE",
        help="zoo entry, folder, .npz, or data (see GenerativeEvaluation); of several extractors NAME=REFERENCE, "
        "the option once for each",
    )
    parser.add_argument("--clip", help="folder of a CLIP model, for the measure clip_score")
    parser.add_argument(
        "--prompts", help="text file for clip_score, a prompt a line: of each class, or row of the data"
    )
    parser.add_argument("--perceptual", help="torchvision weights of the LPIPS trunk, for the measure lpips_diversity")
    parser.add_argument(
        "--perceptual-net", choices=["alex", "vgg", "squeeze"], default="alex", help="that trunk (default: alex)"
    )
    parser.add_argument("--cache", help="folder for teacher rows and references")
    parser.add_argument("--checkpoint", help="checkpoint file (default: the run's last)")
    parser.add_argument("--bf16", action="store_true", help="sample under bfloat16 autocast")
    parser.add_argument(
        "--pass-rule",
        action="store_true",
        help="apply the rule for results: two extractors, new noise, the held-out half; exit status 1 if it fails",
    )
    args = parser.parse_args(list(words))
    check_measures(args.measures)
    if args.n < 10:
        raise ValueError(f"--n {args.n}: give 10 samples or more.")
    if args.teacher_steps < 0:
        raise ValueError(f"--teacher-steps {args.teacher_steps}: give 1 or more, or 0 to leave the teacher out.")
    if args.steps and min(args.steps) < 1:
        raise ValueError(f"--steps {min(args.steps)}: give numbers of 1 or more.")
    if args.pass_rule and (args.n < MINIMUM_SAMPLES or args.half != "held_out"):
        raise ValueError(
            f"--pass-rule needs --n {MINIMUM_SAMPLES} or more and --half held_out, not --n {args.n} --half {args.half}."
        )
    run = find_run(args.run_dir, args.checkpoint)
    earlier = EvaluationLog.load(run, missing_ok=True)
    if args.pass_rule and any(row.seed == args.seed and row.half == "selection" for row in earlier.rows):
        raise ValueError(f"--seed {args.seed} was used while training; the pass rule needs noise that was not.")
    config = read_config(run)
    module = load_run(run, args.checkpoint)
    steps = args.steps or [len(module.student_times)]
    for nfe in steps:
        module.evaluation_times(nfe)  # raises where the student is not sampled so
    weights = args.weights or ["ema" if module.student_ema else "student"]
    for name in weights:
        weights_name(module, name)
    extractors = _extractors(args.extractors, module, judge=args.pass_rule)
    sources = check_references(_references(args.reference or []), extractors, module.sample_shape)
    models = _models(args, module, images=bool(extractors))
    data = read_data(config) if not extractors or "data" in sources.values() else None
    chosen: dict[str, Extractor | None] = {e.name: e for e in extractors} or {"": None}
    references = {n: resolve_reference(sources.get(n), e, data, cache=args.cache) for n, e in chosen.items()}
    # classes are known without the data
    needed = needed_conditions(module.student)
    most = max(1, args.n // 2) if "lpips_diversity" in args.measures else None
    conditions = RunConditions((data or read_data(config)) if needed else None, most)
    if needed:
        conditions(module.student, 1)  # raises where the data do not give them
    models |= conditions.facts(module.student, args.measures, args.n, models.get("prompts", ()))
    evaluator = Evaluator(extractors, references, args.measures, args.half, **models)
    runner = EvaluationRunner(evaluator, args.n, args.seed, bf16=args.bf16, conditions=conditions)
    wanted = [*steps, args.teacher_steps] if args.teacher_steps else []
    updates = _updates(run, args.checkpoint)
    teacher = (
        runner.teacher_rows(module, wanted, conditions.teacher_cache(module.teacher, args.cache)) if wanted else []
    )
    rows = [
        runner.student_row(module, nfe, name, teacher, step=updates, stage="test") for name in weights for nfe in steps
    ]
    log = EvaluationLog.load(run, missing_ok=True)  # the run may have gone on
    log.update(EvaluationLog(rows, teacher, evaluator.reference_facts()))
    print_table(EvaluationLog(rows, teacher))
    print(log.save(run))
    if args.pass_rule:
        passed = True
        for row in rows:
            problems = verdict(row, teacher, evaluator.distances)
            passed = passed and not problems
            print(f"student ({row.weights}), {row.nfe} steps: {'passes' if not problems else 'does not pass'}")
            for problem in problems:
                print(f"  {problem}")
        if not passed:
            sys.exit(1)


def _references(words: Sequence[str]) -> str | dict[str, str] | None:
    """One reference for all extractors, or one by name for each."""
    pairs = [word.partition("=") for word in words]
    if len(pairs) == 1 and (not pairs[0][1] or Path(words[0]).expanduser().exists()):  # a path may hold a =
        return words[0]
    if wrong := next((name for name, equals, _ in pairs if not equals), None):
        raise ValueError(f"--reference {wrong}: of several references give NAME=REFERENCE, by the extractors' names.")
    return {name: source for name, _, source in pairs} or None


def _updates(run: Path, checkpoint: str | None) -> int:
    from lightning_distill.checkpoints import read_checkpoint
    from lightning_distill.commands.run_folder import find_checkpoint

    return int(read_checkpoint(find_checkpoint(run, checkpoint)).get("global_step", 0))


def _extractors(text: str | None, module: DistillationModule, judge: bool) -> list[Extractor]:
    """The given extractors, or those shipped with the teacher; for the pass rule the second one too."""
    if text is None:
        if len(module.sample_shape) != 3:
            return []
        entry = module.teacher.zoo_name if module.teacher is not None else None
        if entry is None:
            raise ValueError("--extractors must be given: the teacher of this run is not a shipped one.")
        return [ZooClassifier(entry), *([ZooClassifier(f"{entry}/judge", "judge")] if judge else [])]
    if text.endswith((".yaml", ".yml")) and not Path(text).is_file():
        raise ValueError(f"--extractors {text}: there is no such file.")
    content = yaml.safe_load(Path(text).read_text() if Path(text).is_file() else text)
    _check_names(content)
    make = maker(Extractor, "extractors")  # type: ignore[type-abstract]
    extractors = [make(entry) for entry in (content if isinstance(content, list) else [content])]
    if judge and len(extractors) < 2:
        raise ValueError("--pass-rule needs a second extractor that was not used for tuning; give two in --extractors.")
    return extractors


def _check_names(content: Any) -> None:
    """Raise for a class that is no extractor, with the names of those that are; the parser names none of a list."""
    known: set[str] = set()
    waiting = Extractor.__subclasses__()
    while waiting:
        cls = waiting.pop()
        waiting += cls.__subclasses__()
        if not isabstract(cls) and not cls.__name__.startswith("_"):
            known.add(cls.__name__)
    for entry in content if isinstance(content, list) else [content]:
        name = entry.get("class_path") if isinstance(entry, dict) else entry
        if not isinstance(name, str):
            raise ValueError(
                f"--extractors {entry}: give class_path, one of {', '.join(sorted(known))}, and init_args."
            )
        if "." not in name and name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}? There are" if close else "choose one of"
            raise ValueError(f"--extractors: there is no extractor {name!r}; {hint} {', '.join(sorted(known))}.")


def _models(args: Namespace, module: DistillationModule, images: bool) -> dict[str, Any]:
    """What ``clip_score`` and ``lpips_diversity`` look with, checked; arguments of ``Evaluator``."""
    models: dict[str, Any] = {}
    classes = module.student.num_classes
    needed = {
        "clip_score": (
            {"clip": "FOLDER (a CLIP model)", "prompts": "FILE (a line for each class)"},
            CLIP_VARIABLE,
        ),
        "lpips_diversity": ({"perceptual": "FILE (torchvision's weights of its trunk)"}, TRUNK_VARIABLE),
    }
    for measure, (options, variable) in needed.items():
        given = [f"--{option}" for option in options if getattr(args, option)]
        missing = [f"--{o} {what}" for o, what in options.items() if not getattr(args, o)]
        if classes is None:  # the data may have the prompts of their rows
            missing = [text for text in missing if not text.startswith("--prompts")]
        if variable in os.environ:
            missing = [text for text in missing if text.startswith("--prompts")]
        if measure not in args.measures and given:
            raise ValueError(f"{given[0]} is for the measure {measure}; add it to --measures.")
        if measure in args.measures and not images:
            raise ValueError(f"--measures {measure} needs images; the samples of this run are none.")
        if measure in args.measures and missing:
            raise ValueError(f"--measures {measure} needs {' and '.join(missing)}.")
    if "lpips_diversity" in args.measures:
        models["perceptual"] = PerceptualDistance(args.perceptual_net, args.perceptual)
        models["perceptual"].check(tuple(module.sample_shape))
    if "clip_score" in args.measures:
        models["clip"] = CLIPScore(args.clip)
        models["clip"].check(tuple(module.sample_shape))
        if args.prompts:
            models["prompts"] = _lines(args.prompts)
    return models


def _lines(file: str) -> list[str]:
    try:
        return Path(file).expanduser().read_text().splitlines()
    except OSError as error:
        raise ValueError(f"--prompts {file} cannot be read ({error.strerror}).") from None
