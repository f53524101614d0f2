"""``lightning-distill plan -c CONFIG.yaml``: what a run needs in memory, before anything is allocated."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jsonargparse
import yaml
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI
from rich.console import Console
from rich.table import Table

from lightning_distill.commands.errors import CommandError, CommandParser
from lightning_distill.commands.instantiation import maker
from lightning_distill.configs import with_shipped
from lightning_distill.methods.base import DistillationModule
from lightning_distill.methods.guards import check_precision
from lightning_distill.plan_parts import GIB, RESERVE, Plan
from lightning_distill.plan_shards import processes_of
from lightning_distill.planning import plan

__all__ = ["main", "plan_config", "suggestions"]

_PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}
#: what the batches of data modules have, where it is not samples
_DATA: dict[str, Literal["samples", "noise", "trajectories"]] = {"Prior": "noise", "Trajectories": "trajectories"}
_LORA = {"class_path": "lightning_distill.networks.roles.Lora", "init_args": {"rank": 64}}


def main(words: Sequence[str]) -> None:
    """Plan, print the table, and say what would fit."""
    args, rest = _parser().parse_known_args(list(words))
    for name in ("gpu_memory", "batch_size", "text_tokens"):
        if (value := getattr(args, name)) is not None and not value > 0:
            raise CommandError(f"--{name.replace('_', '-')} {value:g}: give a number above 0.")
    config = parse_config([*(w for file in args.config for w in ("--config", file)), *rest])
    options = {"text_tokens": args.text_tokens, "batch_size": args.batch_size}
    planned = plan_config(config, **options)
    console = Console()
    console.print(roles_table(planned))
    console.print(phases_table(planned))
    print(f"needed: {planned.need / GIB:.1f} GiB, {RESERVE / GIB:.1f} of them reserve ({_described(planned)})")
    if args.gpu_memory is None:
        return
    memory = args.gpu_memory * GIB
    if planned.need <= memory:
        print(f"fits into {args.gpu_memory:g} GiB")
        return
    print(f"does not fit into {args.gpu_memory:g} GiB; one change after the other:")
    for change, changed in suggestions(config, planned, **options):
        fits = changed.need <= memory
        print(f"  {changed.need / GIB:7.1f} GiB  {'fits' if fits else '    '}  {change}")
        if fits:
            return
    more = "shard over more processes" if planned.shards > 1 else "split the networks over several devices"
    print(f"  no setting fits; {more} (-c configs/strategy/role_fsdp2.yaml --trainer.devices=N)")


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="lightning-distill plan",
        description="Memory of a run per GPU, from its configuration. Of a model, config.json is enough. Further "
        "options are those of fit, for example --model.init_args.student.init_args.rank=32 or --trainer.devices=8.",
    )
    parser.add_argument("-c", "--config", action="append", required=True, help="YAML file; may be given several times")
    parser.add_argument("--gpu-memory", type=float, help="GiB of the GPU: say what fits, or what would have to change")
    parser.add_argument(
        "--batch-size", type=int, help="samples of one forward (default: the data's, over accumulate_grad_batches)"
    )
    parser.add_argument(
        "--text-tokens",
        type=int,
        help="length of prompts (default: the unconditional embedding's, or the stock pipeline's)",
    )
    return parser


# ------------------------------------------------------------------------------------------------ configurations
class _Reader(LightningCLI):
    """The parser of ``fit``, which makes nothing of what it has read."""

    def instantiate_classes(self) -> None:
        """Nothing: a trainer would ask for its devices, a data module for its files."""

    def _set_seed(self) -> None:
        """Nothing: no number is drawn."""


def parse_config(words: Sequence[str]) -> dict[str, Any]:
    """Configuration files and options of ``fit`` as plain data.

    Args:
        words: command line without the subcommand; configurations may be named as ``configs.with_shipped`` knows.
    """
    from lightning_distill.cli import import_everything

    words = with_shipped(words)
    import_everything()
    with contextlib.suppress(TypeError, ValueError):  # as for fit
        jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
    reader = _Reader(
        DistillationModule,
        LightningDataModule,
        run=False,
        save_config_callback=None,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=False,
        parser_kwargs={"parser_mode": "omegaconf+", "exit_on_error": False, "prog": "lightning-distill plan"},
        args=list(words),
    )
    return yaml.safe_load(reader.parser.dump(reader.config, skip_none=False, skip_validation=True))


def plan_config(
    config: dict[str, Any],
    *,
    batch_size: int | None = None,
    text_tokens: int | None = None,
    checkpointing: bool | None = None,
    count: bool = False,
) -> Plan:
    """Plan what a configuration describes; of a run that begins with a warm-up by regression, what follows it.

    Args:
        config: ``model``, ``data`` and ``trainer`` as plain data.
        batch_size: samples of one forward, None for what the configuration says.
        text_tokens: length of prompts, as for ``planning.plan``.
        checkpointing: activation checkpointing, None for what the configuration says.
        count: as for ``planning.plan``.
    """
    make = maker(DistillationModule, "model")
    model = copy.deepcopy(config["model"])
    if (settings := model.get("init_args") or {}).get("regression_steps"):
        settings |= {"regression_steps": 0, "regression_pairs": None}  # its pairs are not there yet
    _leave_weights(model)

    def build() -> DistillationModule:
        return make(copy.deepcopy(model))

    trainer = config.get("trainer") or {}
    precision = str(trainer.get("precision") or "32-true")
    precision = _PRECISIONS.get(precision, precision)
    check_precision(precision)
    return plan(
        build,
        _micro_batch(config) if batch_size is None else batch_size,
        precision,
        text_tokens=text_tokens,
        checkpointing=checkpointing,
        count=count,
        processes=processes_of(trainer),
        updates=max(1, trainer.get("max_steps") or 1),
        data=_DATA.get(str((config.get("data") or {}).get("class_path")).rpartition(".")[2], "samples"),
    )


def _leave_weights(part: Any) -> None:
    """Let networks whose values play no part begin without the files of their weights."""
    for value in part if isinstance(part, list) else part.values() if isinstance(part, dict) else ():
        _leave_weights(value)
    if isinstance(part, dict) and str(part.get("class_path")).endswith(".FrozenFeatures"):
        part["init_args"]["weights"] = None


def _micro_batch(config: dict[str, Any]) -> int:
    data = (config.get("data") or {}).get("init_args") or {}
    parts = (config["model"].get("init_args") or {}).get("accumulate_grad_batches", 1)
    samples = data.get("batch_size", 1)
    if samples is None or parts is None:
        return 1
    if samples < 1 or parts < 1 or samples % parts:
        raise ValueError(
            f"data.batch_size={samples} cannot be cut into accumulate_grad_batches={parts} micro-batches of equal "
            "size; give a multiple."
        )
    return samples // parts


def suggestions(
    config: dict[str, Any], planned: Plan, *, batch_size: int | None = None, text_tokens: int | None = None
) -> Iterator[tuple[str, Plan]]:
    """Changes that save memory, each on top of those before, the cheapest in quality and time first.

    Args:
        config: as for ``plan_config``.
        planned: its plan.
        batch_size: as for ``plan_config``.
        text_tokens: as for ``plan_config``.

    Yields:
        what to change, and the plan with it.
    """
    samples = _micro_batch(config) if batch_size is None else batch_size
    options: dict[str, Any] = {"batch_size": samples, "text_tokens": text_tokens}
    eight = False
    sharded = planned.processes is not None and planned.processes.shards > 1  # which refuses 8-bit states

    def again() -> Plan:
        made = plan_config(config, **options)
        return made.with_8bit_optimizers() if eight else made

    if not planned.checkpointing:
        options["checkpointing"] = True
        try:
            planned = again()
        except ValueError:  # a class of networks that cannot
            options["checkpointing"] = None
        else:
            yield "activation_checkpointing: true", planned
    if options["batch_size"] > 1:
        options["batch_size"] = 1
        config = copy.deepcopy(config)  # whose gradients stay for the next sample
        config["model"].setdefault("init_args", {})["accumulate_grad_batches"] = samples
        yield "batch of one sample, accumulate_grad_batches for the rest", (planned := again())
    if planned.optimizers != ("AdamW8bit",) and not sharded:
        eight = True
        yield "AdamW8bit for all optimizers", (planned := planned.with_8bit_optimizers())
    roles = [role for role in planned.roles if role.name in ("student", "fake_score")]
    if full := [role.name for role in roles if role.trained and not role.shared]:
        before, config = config, copy.deepcopy(config)
        config["model"].setdefault("init_args", {}).update(dict.fromkeys(full, _LORA))
        try:
            planned = again()
        except ValueError:  # a teacher without layers that adapters know
            config = before
        else:
            yield f"Lora(rank=64) for {' and '.join(full)}", planned
    if any(role.quantisable[0] for role in planned.roles):
        yield "quantize: int8 for the teacher", planned.with_8bit_weights()


# ------------------------------------------------------------------------------------------------ tables
def _described(planned: Plan) -> str:
    checkpointing = "with" if planned.checkpointing else "without"
    return (
        f"{planned.processes}: batch of {planned.batch_size}, {planned.precision}, {checkpointing} activation "
        f"checkpointing, {' and '.join(planned.optimizers)}"
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f}" if size >= 10 * 2**20 or size == 0 else f"{size / 2**20:.2f}"


def roles_table(planned: Plan) -> Table:
    """What stays: weights, averages, optimizer states."""
    table = Table(title="stays, MiB", title_justify="left")
    for name in ("network", "parameters", "trained", "weights", "dtype", "optimizer"):
        table.add_column(name, justify="left" if name in ("network", "dtype") else "right")
    for role in planned.roles:
        name = f"{role.name} (adapter)" if role.shared else role.name
        kinds = ", ".join(kind for kind, size in role.weights.items() if size * 50 > sum(role.weights.values()))
        size = _mib(sum(role.weights.values()))
        table.add_row(name, f"{role.parameters:,}", f"{role.trained:,}", size, kinds, _mib(role.optimizer))
    weights = sum(sum(role.weights.values()) for role in planned.roles)
    table.add_row("all", "", "", _mib(weights), "", _mib(sum(role.optimizer for role in planned.roles)))
    return table


def phases_table(planned: Plan) -> Table:
    """What comes and goes: activations and gradients of each phase."""
    table = Table(title="comes and goes, MiB", title_justify="left")
    for name in ("phase", "kept for backward", "gradients", "peak"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    for phase in planned.phases:
        table.add_row(phase.name, _mib(phase.kept), _mib(phase.gradients), _mib(phase.peak))
    return table
