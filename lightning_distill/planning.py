"""What a run needs in memory, before anything is allocated.

Every network is built without weights from its configuration, and every phase of the method, forward and backward, is
run on tensors that have a shape, a dtype and no memory, while the sizes of all storages that are alive are added up. So
the plan holds for any method, role and model class, and counts what formulas forget: who keeps a graph, what a
checkpoint recomputes, low-precision copies of weights under mixed precision, gradients.

    need = weights + averages + optimizer states + max over phases (gradients and activations) + reserve

Gradients are freed at the end of each phase, so only one phase's are alive at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from lightning_distill.attention import few_chunks
from lightning_distill.batch import Batch
from lightning_distill.generation import default_cond
from lightning_distill.live_memory import EmptyStreams, EmptyTensors, LiveMemory, Work, forget_values, mixed_precision
from lightning_distill.methods.base import DistillationModule
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.lora import AdapterDenoiser
from lightning_distill.networks.quantisation import quantisable, quantised_bytes
from lightning_distill.networks.weightless import Shapes, weightless
from lightning_distill.optim import AdamW8bit
from lightning_distill.plan_parts import PhasePlan, Plan, RolePlan, larger
from lightning_distill.plan_shards import Processes, gathered_bytes

__all__ = ["PRECISIONS", "plan"]

#: Trainer precision -> dtype of autocast, dtype of all weights
PRECISIONS: dict[str, tuple[torch.dtype | None, torch.dtype | None]] = {
    "32-true": (None, None),
    "bf16-mixed": (torch.bfloat16, None),
    "16-mixed": (torch.float16, None),
    "bf16-true": (None, torch.bfloat16),
    "16-true": (None, torch.float16),
}

#: tokens of a prompt as the stock pipelines encode it, by model class
_TEXT_TOKENS = {
    "UNet2DConditionModel": 77,
    "PixArtTransformer2DModel": 300,
    "SD3Transformer2DModel": 333,
    "SanaTransformer2DModel": 300,
    "LTXVideoTransformer3DModel": 128,
}
#: of all other classes
_MANY_TOKENS = 512


# ------------------------------------------------------------------------------------------------ the plan
def plan(
    build: Callable[[], DistillationModule],
    batch_size: int = 1,
    precision: str = "bf16-mixed",
    *,
    text_tokens: int | None = None,
    checkpointing: bool | None = None,
    device: str = "cuda",
    count: bool = False,
    processes: Processes | None = None,
    updates: int = 1,
    data: Literal["samples", "noise", "trajectories"] = "samples",
) -> Plan:
    """Plan a run of a method.

    Args:
        build: makes the method; its teacher must be a spec, of which no weights are read.
        batch_size: samples of one forward: those per update divided by ``accumulate_grad_batches``.
        precision: of the Trainer, one of ``PRECISIONS``.
        text_tokens: length of prompts, None for that of the network's own unconditional embedding, or of the stock
            pipeline where there is none.
        checkpointing: switch activation checkpointing on or off, None for what the method says.
        device: ``cuda`` or ``cpu``, which differ in what they compute in float32 under mixed precision.
        count: count floating-point operations too, of rollouts that stop at the first step.
        processes: that train together, None for one.
        updates: student updates of the run. A phase has the larger figures of the first and the last: terms may begin
            late, and warm-ups end.
        data: what the batches have: clean samples, conditions alone, or the teacher's trajectories at the student's
            times with what it predicted.

    Raises:
        ValueError: unknown precision, prompts of a length that does not fit, or a method that decides something by the
            values of its tensors.
    """
    from lightning_distill.strategies.role_fsdp2 import _cast_frozen as cast_frozen  # strategies import methods

    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} cannot be planned; choose one of {', '.join(PRECISIONS)}.")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: give at least 1 sample.")
    if text_tokens is not None and text_tokens < 1:
        raise ValueError(f"text_tokens={text_tokens}: give at least 1, or leave it out.")
    processes = processes or Processes()
    if checkpointing is None and processes.checkpointing:
        checkpointing = True
    with weightless():
        module = build()
        if checkpointing is not None:
            module.activation_checkpointing = checkpointing
        module.compile_blocks = False  # shapes alone are followed here
        with Shapes():  # a discriminator asks the network for the shapes of its features
            module.configure_model()
            if processes.teacher_dtype is not None and module.teacher is not None:
                cast_frozen(module.teacher, processes.teacher_dtype)
    autocast, narrow = PRECISIONS[precision]
    if narrow is not None:
        nn.Module.to(module, narrow)
    fakes = EmptyTensors()
    forget_values(module, fakes)
    module.forget_parameters()
    roles = _roles(module)
    with weightless():
        optimizers = [entry["optimizer"] for entry in module.configure_optimizers()]
    roles, step = _with_optimizers(module, roles, optimizers, fakes, device)
    gathered = gathered_bytes(module, processes)
    batch = _batch(module, fakes, batch_size, text_tokens, data)
    if processes.bfloat16 and narrow is None:  # shards are gathered, and multiplied, in bfloat16
        options = {
            "text_tokens": text_tokens,
            "checkpointing": checkpointing,
            "device": device,
            "count": count,
            "data": data,
        }
        phases = plan(build, batch_size, "bf16-true", updates=updates, **options).phases  # type: ignore[arg-type]
    else:
        module.streams = EmptyStreams(module.streams, fakes)
        module.train()
        looked_at = dict.fromkeys((0, max(0, updates - 1)))
        of_updates = [list(_phases(module, batch, autocast, device, count, update)) for update in looked_at]
        phases = tuple(larger(same) for same in zip(*of_updates, strict=True))
    names = tuple(dict.fromkeys(type(optimizer).__name__ for optimizer in optimizers))
    on = module.activation_checkpointing
    forward = _forward_flop(module, batch, autocast, device) if count else 0
    return Plan(tuple(roles), phases, batch_size, precision, on, step, names, forward, processes, gathered)


def _networks(module: DistillationModule) -> Iterator[tuple[str, nn.Module]]:
    """Every network of the method by role: teacher, trained ones, targets, averages, and what else it holds."""
    names = ["teacher", *dict.fromkeys(role for roles in module.phases.values() for role in roles), *module.targets]
    met: set[int] = set()
    for name in dict.fromkeys([*names, *module._modules]):
        part = module._modules.get(name)
        if id(part) in met:
            continue
        met.add(id(part))
        if isinstance(part, nn.ModuleDict):
            yield from ((f"{name}.{key}", inner) for key, inner in part.items())
        elif part is not None:
            yield name, part


def _roles(module: DistillationModule) -> list[RolePlan]:
    trained = {id(p) for roles in module.phases.values() for role in roles for p in module.role_parameters(role)}
    # adapters and averages live in the teacher's backbone, but belong to their roles
    owners: dict[int, str] = {}
    networks = list(_networks(module))
    for name, network in sorted(networks, key=lambda item: not isinstance(item[1], AdapterDenoiser)):
        for tensor in (*network.parameters(), *network.buffers()):
            owners.setdefault(id(tensor), name)
    counted: set[int] = set()
    roles = []
    for name, network in networks:
        own = [t for t in (*network.parameters(), *network.buffers()) if owners[id(t)] == name]
        own = [t for t in own if not (id(t) in counted or counted.add(id(t)))]  # type: ignore[func-returns-value]
        kinds, planned = _stored(network), {}
        weights: dict[str, int] = {}
        for tensor in own:
            kind, size = kinds.get(id(tensor), (str(tensor.dtype).removeprefix("torch."), tensor.nbytes))
            weights[kind] = weights.get(kind, 0) + size
        if isinstance(network, Denoiser) and network is module.teacher:
            planned = {
                id(m.weight): m.weight for m in quantisable(network.network, "int8", network.family.blocks).values()
            }
        full = [t for i, t in planned.items() if i not in kinds and owners.get(i) == name]
        roles.append(
            RolePlan(
                name,
                sum(t.numel() for t in own if isinstance(t, nn.Parameter)),
                sum(t.numel() for t in own if id(t) in trained),
                weights,
                sum(t.nbytes for t in own if id(t) in trained),
                shared=isinstance(network, AdapterDenoiser),
                quantisable=(sum(t.nbytes for t in full), sum(quantised_bytes("int8", *t.shape) for t in full)),
            )
        )
    return roles


def _stored(network: nn.Module) -> dict[int, tuple[str, int]]:
    """Kind and bytes of the weights that are to be quantised."""
    found = {}
    for part in network.modules():
        if (kind := part.__dict__.get("planned_kind")) is not None:
            weight = part.weight
            assert isinstance(weight, Tensor)
            found[id(weight)] = (kind, quantised_bytes(kind, len(weight), weight.shape[1], weight.element_size()))
    return found


def _with_optimizers(
    module: DistillationModule,
    roles: list[RolePlan],
    optimizers: Sequence[Optimizer],
    fakes: EmptyTensors,
    device: str,
) -> tuple[list[RolePlan], int]:
    """The roles with their optimizers' states, and the largest temporary memory of a step."""
    largest = 0
    states: dict[str, tuple[int, int]] = {}
    for optimizer, names in zip(optimizers, module.phases.values(), strict=True):
        size, temporary = _state_bytes(optimizer, fakes, device)
        largest = max(largest, temporary)
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        states[names[0]] = size, AdamW8bit.state_bytes(parameters)
    found = {role.name: states.get(role.name, (0, 0)) for role in roles}
    return [replace(r, optimizer=found[r.name][0], optimizer_8bit=found[r.name][1]) for r in roles], largest


def _state_bytes(optimizer: Optimizer, fakes: EmptyTensors, device: str) -> tuple[int, int]:
    """Bytes of the state, from one step without memory, and of what that step needs for itself."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if isinstance(optimizer, AdamW8bit):
        widest = max((p.numel() for p in parameters), default=0)
        return optimizer.state_bytes(parameters), 16 * widest  # one parameter at a time, in float32
    for parameter in parameters:
        with fakes:
            parameter.grad = torch.empty_like(parameter)
    for group in optimizer.param_groups:
        if device == "cuda" and group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True  # torch's choice there
    live = LiveMemory()
    live.ignore(t for p in parameters for t in (p, p.grad) if t is not None)
    with live, fakes:
        optimizer.step()
    tensors = [t for state in optimizer.state.values() for t in tree_leaves(dict(state)) if isinstance(t, Tensor)]
    size = sum(t.nbytes for t in tensors)
    optimizer.state.clear()
    for parameter in parameters:
        parameter.grad = None
    return size, max(0, live.peak - size)


# ------------------------------------------------------------------------------------------------ phases
def _phases(
    module: DistillationModule, batch: Batch, autocast: torch.dtype | None, device: str, count: bool, update: int
) -> Iterator[PhasePlan]:
    for phase in module.phases:
        parameters = [p for role in module.phases[phase] for p in module.role_parameters(role)]
        live = LiveMemory()
        live.ignore([*module.parameters(), *module.buffers()])
        work = Work() if count else None
        gradients = sum(p.nbytes for p in parameters)
        earlier = module.accumulate_grad_batches > 1  # later micro-batches begin with the gradients of the first
        try:
            with (
                module.probing("plan", update=update),
                module._only(phase),
                mixed_precision(autocast, device),
                live,
                work or few_chunks(),  # operations are counted in all chunks
            ):
                for parameter in parameters if earlier else ():
                    parameter.grad = torch.empty_like(parameter)
                loss = module.weighted_sum(phase, getattr(module, f"{phase}_loss")(batch))
                kept = live.now - gradients * earlier
                loss.backward()
        except Exception as error:
            if (tokens := _tokens(batch)) and re.search(rf"\b{tokens}\b", str(error)):
                raise ValueError(
                    f"the plan took prompts of {tokens} tokens, which does not fit in the {phase} phase "
                    f"({str(error).splitlines()[0]}); give the length of your embeddings: --text-tokens N of "
                    "lightning-distill plan, text_tokens=N in Python."
                ) from error
            if "DataDependent" not in type(error).__name__ and "DynamicOutputShape" not in type(error).__name__:
                raise
            raise ValueError(
                f"{type(module).__name__} decides something by the values of its tensors in the {phase} phase "
                f"({str(error).splitlines()[0]}), so its memory can only be measured, not planned."
            ) from error
        finally:
            for parameter in parameters:
                parameter.grad = None
        yield PhasePlan(phase, kept, live.peak, gradients, work.flop if work else 0)


def _forward_flop(module: DistillationModule, batch: Batch, autocast: torch.dtype | None, device: str) -> int:
    t = torch.full((batch.size,), module.process.t_max, dtype=torch.float64)
    x = module.draws.normal("plan", (batch.size, *module.sample_shape)) if batch.x0 is None else batch.x0
    with torch.no_grad(), mixed_precision(autocast, device), Work() as work:
        module.student(x, t, batch.cond)
    return work.flop


def _batch(module: DistillationModule, fakes: EmptyTensors, size: int, text_tokens: int | None, data: str) -> Batch:
    """Conditions, with prompts of the right length, and data of the right shape."""
    network = module.student
    cond = default_cond(network, size)
    if getattr(getattr(network.network, "config", None), "num_class_embeds", None):
        cond.setdefault("class_labels", torch.zeros(size, dtype=torch.long))
    tokens = text_tokens or _text_tokens(network, "encoder_attention_mask" in cond)
    made: dict[str, Any] = {}
    for key, value in cond.items():
        shape = list(value.shape)
        if key in ("encoder_hidden_states", "encoder_attention_mask"):
            shape[1] = tokens
        made[key] = value if shape == list(value.shape) and not _is_fake(value) else value.new_ones(shape)
    if data == "noise":
        return Batch(cond=made, size=size)
    times = torch.tensor([*module.student_times, 0.0], dtype=torch.float64)
    with fakes:
        x0 = torch.empty(size, *module.sample_shape)
        if data == "samples":
            return Batch(cond=made, x0=x0)
        states = torch.empty(size, len(times), *module.sample_shape)
        predictions = {"guided": states, "unguided": states.clone(), "scale": torch.empty(size)}
        return Batch(cond=made, x0=x0, noise=x0.clone(), states=states, times=times, predictions=predictions)


def _text_tokens(network: Denoiser, masked: bool) -> int:
    """Tokens of a prompt: the stock pipeline's, unless the network's unconditional embedding has another length.

    Guidance wants both of one length, except where a mask lets it pad a short unconditional embedding.
    """
    stock = _TEXT_TOKENS.get(network.family.model_class, _MANY_TOKENS)
    null = network.family.null.get("encoder_hidden_states")
    if not isinstance(null, Tensor):
        return stock
    return max(null.shape[1], stock) if masked else null.shape[1]


def _tokens(batch: Batch) -> int | None:
    """Tokens of the batch's prompts, None where it has none."""
    prompts = batch.cond.get("encoder_hidden_states")
    return None if prompts is None else prompts.shape[1]


def _is_fake(tensor: Tensor) -> bool:
    return hasattr(tensor, "fake_mode")
