"""Fully sharded data parallelism, network by network; ``strategy: role_fsdp2``."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_distill import checkpoints
from lightning_distill.checkpoint_files import require_whole, write_checkpoint
from lightning_distill.memory_format import lay_out_convolutions
from lightning_distill.methods.base import DistillationModule
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.lora import AdapterDenoiser, enable_activation_checkpointing
from lightning_distill.networks.quantisation import QuantisedLinear
from lightning_distill.networks.weightless import Shapes, weightless
from lightning_distill.optim import AdamW8bit
from lightning_distill.strategies import sharded_files
from lightning_distill.strategies.handed_out import give_room, hand_out, structure, take_off
from lightning_distill.strategies.reducer import same_everywhere
from lightning_distill.strategies.role_data_parallel import check_teacher, distillation_module, tell_of_statistics
from lightning_distill.strategies.sharding import (
    block_names,
    distribute_like,
    networks_of,
    reshard,
    role_modules,
    settle_flags,
    shard_network,
    unsharded,
)

__all__ = ["RoleFSDP2"]

_OFFLOADABLE = ("teacher", "student_ema")
_DIFFERENT = "the processes have built different networks (their {} differ); give every node the same files and seeds."


class RoleFSDP2(ModelParallelStrategy):
    """Parameters, gradients, optimizer states and averages are divided over all processes (FSDP2, ``fully_shard``).

    Each network of the module is sharded for itself, block by block where its family names the blocks. Averages of the
    student are sharded like the student and updated shard by shard, without communication. LoRA roles are sharded with
    the backbone they share.

    Every process first builds all networks in host memory, and keeps its share; with ``meta_device`` only the first
    process does, and sends the others theirs.

    Args:
        replicas: hybrid sharding: copies of the sharded networks, each over ``world_size / replicas`` neighbouring
            processes; ``nodes`` is one copy per node, which keeps gathering inside of nodes.
        shard_blocks: gather one block at a time; False gathers whole networks, faster for small ones.
        compute_dtype: ``bfloat16`` gathers and multiplies in bfloat16, with float32 weights in the optimizers; times
            stay float32. None computes in the weights' dtype.
        reduce_dtype: dtype in which gradients are averaged.
        teacher_dtype: dtype in which the frozen teacher is held; None for that of its files.
        activation_checkpointing: recompute the blocks' activations of trained networks in the backward pass.
        offload: networks whose shards live in host memory, of ``teacher`` and ``student_ema``.
        meta_device: read weights on the first process only. All others build networks that specs describe
            (``PretrainedDenoiser``, ``NewDenoiser``, ``ZooDenoiser``, roles made from them) on the meta device, and get
            their share of each tensor from the first. A node then has room for its shards, the first one for all
            networks once.
        compare_networks: compare the sha256 of all networks over processes before training; with ``meta_device`` only
            names, shapes and dtypes, since all weights are the first process'.
        save_distributed_checkpoint: write a folder to which every process contributes, instead of one file; both can
            be resumed by any number of processes, and converted into the other by ``lightning-distill convert``.
        process_group_backend: None for nccl on GPUs and gloo on CPUs.
        timeout_minutes: longest wait for another process.

    Raises:
        ValueError: a setting that is unknown, or does not fit the number of processes; 8-bit optimizers.
    """

    def __init__(
        self,
        replicas: int | Literal["nodes"] = 1,
        shard_blocks: bool = True,
        compute_dtype: Literal["float32", "bfloat16"] | None = None,
        reduce_dtype: Literal["float32", "bfloat16"] = "float32",
        teacher_dtype: Literal["float32", "bfloat16"] | None = None,
        activation_checkpointing: bool = False,
        offload: list[str] | None = None,
        meta_device: bool = False,
        compare_networks: bool = True,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout_minutes: float = 30.0,
    ) -> None:
        super().__init__(
            data_parallel_size=1,
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timedelta(minutes=timeout_minutes),
        )
        if unknown := sorted(set(offload or ()) - set(_OFFLOADABLE)):
            raise ValueError(f"RoleFSDP2(offload={offload}): {unknown[0]!r} is unknown; choose of {_OFFLOADABLE}.")
        if replicas != "nodes" and (not isinstance(replicas, int) or replicas < 1):
            raise ValueError(f"RoleFSDP2(replicas={replicas!r}): give a number of copies, or nodes.")
        self.replicas = replicas
        self.shard_blocks = shard_blocks
        self.compute_dtype = _dtype("compute_dtype", compute_dtype)
        self.reduce_dtype = _dtype("reduce_dtype", reduce_dtype)
        self.teacher_dtype = _dtype("teacher_dtype", teacher_dtype)
        self.activation_checkpointing = activation_checkpointing
        self.offload = tuple(offload or ())
        self.meta_device = meta_device
        self.compare_networks = compare_networks
        self.mesh: Any = None

    # ------------------------------------------------------------------------------------------------ processes
    def setup_environment(self) -> None:
        """Start the processes as one data-parallel dimension, cut into replicas where asked for.

        Raises:
            ValueError: replicas that do not divide the processes, or a torch that shards on a GPU only.
        """
        if self.root_device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
            raise ValueError(
                f"torch {torch.__version__} shards on a GPU only; use strategy=role_ddp, a GPU, or a newer torch."
            )
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
        replicas = self.num_nodes if self.replicas == "nodes" else int(self.replicas)
        if self.world_size % replicas:
            raise ValueError(
                f"RoleFSDP2(replicas={self.replicas!r}): {self.world_size} processes cannot be divided into {replicas} "
                "equal groups; give a divisor."
            )
        self.mesh = self.device_mesh["data_parallel"]
        if replicas > 1:
            shape = (replicas, self.world_size // replicas)
            self.mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=("replicate", "shard"))

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Where networks are built: with ``meta_device`` without weights, but on the first process."""
        others = self.meta_device and not self.is_global_zero
        with super().tensor_init_context(empty_init), weightless(others), Shapes() if others else nullcontext():
            yield

    def setup(self, trainer: Any) -> None:
        """Shard every network, then create the optimizers on the shards."""
        module = distillation_module(self.lightning_module, type(self).__name__)
        self._refuse(module)
        self._compare(module)
        # networks end in views (chunks, transpositions), and nothing here changes an output in place
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        self._shard(module)
        super().setup(trainer)
        if any(isinstance(getattr(optimizer, "optimizer", optimizer), AdamW8bit) for optimizer in self.optimizers):
            raise ValueError(
                "role_fsdp2 cannot divide the 8-bit states of AdamW8bit; leave the optimizer out for AdamW, whose "
                "states are divided over the processes, or use strategy=role_ddp."
            )

    def _compare(self, module: DistillationModule) -> None:
        """Raise unless all processes have the same networks."""
        if self.meta_device:
            if not same_everywhere(structure(module)):
                raise ValueError(_DIFFERENT.format("names, shapes or dtypes"))
            if module.teacher is not None:
                module._teacher_fingerprint = self.broadcast(
                    module.teacher_fingerprint() if self.is_global_zero else None
                )
        elif self.compare_networks:
            check_teacher(module)
            if not same_everywhere(checkpoints.fingerprint(map(unsharded, checkpoints.checkpointed_tensors(module)))):
                raise ValueError(_DIFFERENT.format("sha256"))
        elif module.teacher is not None:
            module.teacher_fingerprint()  # while it is whole

    def _refuse(self, module: DistillationModule) -> None:
        tell_of_statistics(module)
        if module.channels_last:
            raise ValueError("role_fsdp2 cannot shard weights with channels_last: true; leave it out.")
        if any(isinstance(part, QuantisedLinear) or "planned_kind" in part.__dict__ for part in module.modules()):
            raise ValueError(
                "role_fsdp2 cannot shard weights that are stored in few bits (PretrainedDenoiser quantize=...); leave "
                "quantize out, or use strategy=role_ddp, which keeps them whole on every GPU."
            )

    # ------------------------------------------------------------------------------------------------ sharding
    def _shard(self, module: DistillationModule) -> None:
        parts = role_modules(module)
        lay_out_convolutions(module, channels_last=False)  # of a module that was built before it met the trainer
        sent = self.meta_device and not any(isinstance(p, DTensor) for p in module.parameters())
        weights = take_off(module, keep=self.is_global_zero) if sent else {}
        if self.teacher_dtype is not None and module.teacher is not None:
            _cast_frozen(module.teacher, self.teacher_dtype)
        if self.activation_checkpointing:
            for role in dict.fromkeys(role for roles in module.phases.values() for role in roles):
                if isinstance(parts.get(role), Denoiser):
                    enable_activation_checkpointing(parts[role])  # type: ignore[arg-type]
        for name, part in parts.items():
            offloaded = name.split(".")[0] in self.offload
            for network in networks_of(part):
                blocks, precision = [], MixedPrecisionPolicy()
                if isinstance(part, Denoiser) and network is part.network:
                    blocks = block_names(part) if self.shard_blocks else []
                    # times stay float32: the denoiser casts the rest itself
                    precision = MixedPrecisionPolicy(self.compute_dtype, self.reduce_dtype, cast_forward_inputs=False)
                policy = self._offload_policy(offloaded)
                shard_network(network, blocks, self.mesh, mp_policy=precision, offload_policy=policy)
                if sent:
                    give_room(network, torch.device("cpu") if offloaded else self.root_device)
        if sent:
            hand_out(module, weights, self.root_device)
        _check_shards(module)
        if getattr(module, "r1", "none") == "exact":  # its gradient is differentiated again, which needs the weights
            for part in module.modules():
                if isinstance(part, FSDPModule):
                    part.set_reshard_after_backward(False, recurse=False)
        if self.compute_dtype is not None:
            for part in parts.values():
                if isinstance(part, Denoiser):
                    part.compute_dtype = self.compute_dtype
        module.forget_parameters()

    def _offload_policy(self, offloaded: bool) -> OffloadPolicy:
        return CPUOffloadPolicy(pin_memory=self.root_device.type == "cuda") if offloaded else OffloadPolicy()

    def model_to_device(self) -> None:
        """Move what is not sharded; shards are where they belong."""
        assert self.model is not None
        for part in self.model.modules():
            for parameter in part.parameters(recurse=False):
                if not hasattr(parameter, "device_mesh"):
                    parameter.data = parameter.data.to(self.root_device)
            for name, buffer in part.named_buffers(recurse=False):
                part._buffers[name] = buffer.to(self.root_device)

    def settle_flags(self) -> None:
        """Called when other networks collect gradients than before, see ``sharding.settle_flags``."""
        settle_flags(distillation_module(self.lightning_module, type(self).__name__))

    def optimizer_step(self, optimizer: Optimizer, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        """Step on shards."""
        assert self.model is not None
        reshard(self.model)
        return super().optimizer_step(optimizer, closure, model, **kwargs)

    # ------------------------------------------------------------------------------------------------ checkpoints
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Tensors of a checkpoint: shards, or for a single file the whole tensors, on the first process."""
        assert self.lightning_module is not None
        reshard(self.lightning_module)
        return self._collected(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """State of one optimizer, as torch numbers it."""
        inner = getattr(optimizer, "optimizer", optimizer)
        state = inner.state_dict()
        return {
            "state": {number: self._collected(values) for number, values in state["state"].items()},
            "param_groups": state["param_groups"],
        }

    def _collected(self, values: dict[str, Any]) -> dict[str, Any]:
        if self._save_distributed_checkpoint:
            return dict(values)
        kept = {}
        for key, value in values.items():
            whole = unsharded(value) if isinstance(value, Tensor) else value
            if self.is_global_zero:
                kept[key] = whole
        return kept

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write a folder of shards or a single file; a file or folder under the final name is complete.

        Raises:
            OSError: on every process, when one of them cannot write.
        """
        path = Path(self.broadcast(filepath))
        if not self._save_distributed_checkpoint:
            self._first(lambda: write_checkpoint(checkpoint, path))
            return
        tensors, meta = sharded_files.split(checkpoint)
        self._first(lambda: sharded_files.begin(path))
        sharded_files.write_shards(tensors, path)
        self._first(lambda: sharded_files.finish(meta, path))

    def _first(self, deed: Callable[[], None]) -> None:
        """Let the first process do something, and all wait for it; if it fails, it fails on all."""
        failure: Exception | None = None
        if self.is_global_zero:
            try:
                deed()
            except Exception as error:  # the others wait for it, whatever it is
                failure = error
        told = self.broadcast(None if failure is None else _passed_on(failure))
        if told is not None:
            kind, text = told
            raise kind(text) from failure

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a folder of shards or a single file, written by any number of processes."""
        path = Path(self.broadcast(checkpoint_path))
        module = distillation_module(self.lightning_module, type(self).__name__)
        if not path.is_dir():
            checkpoint = checkpoints.read_checkpoint(path)
            checkpoints.check_header(module, checkpoint.get("lightning_distill"))
            checkpoints.strict_load(module, checkpoint["state_dict"])
            return self._restore(module, checkpoint)
        if sharded_files.is_sharded(path):
            self._first(lambda: require_whole(path))
        meta = sharded_files.read_meta(path)
        checkpoints.check_header(module, meta.get("lightning_distill"))
        stored = sharded_files.stored_tensors(path)
        weights = {name.removeprefix("state_dict."): t for name, t in stored.items() if name.startswith("state_dict.")}
        checkpoints.strict_load(module, weights)
        like: dict[str, Tensor] = {f"state_dict.{name}": value for name, value in module.state_dict().items()}
        for index, optimizer in enumerate(self.optimizers):
            names, parameters = meta["lightning_distill"]["parameters"][index], _parameters(optimizer)
            like |= {
                name: parameter
                for parameter_name, parameter in zip(names, parameters)
                for name, entry in stored.items()
                if name.startswith(f"optimizer_{index}.{parameter_name}.") and entry.shape == parameter.shape
            }
            like |= {n: torch.empty(()) for n in stored if n.startswith(f"optimizer_{index}.") and n not in like}
        wanted = {name: _empty_like(like[name], entry) for name, entry in stored.items() if name in like}
        dcp.load(wanted, checkpoint_id=path)
        return self._restore(module, sharded_files.assemble(wanted, meta))

    @torch.no_grad()
    def _restore(self, module: DistillationModule, checkpoint: dict[str, Any]) -> dict[str, Any]:
        reshard(module)
        for name, own in module.state_dict().items():
            own.copy_(_placed(checkpoint["state_dict"][name], own))
        module.after_weights_loaded()
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"]):
            parameters = _parameters(optimizer)
            for number, values in state["state"].items():
                own = parameters[number]
                for key, value in values.items():
                    if isinstance(value, Tensor) and value.shape == own.shape:
                        values[key] = _placed(value, own)
            optimizer.load_state_dict(state)
        return {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Make ``strategy: role_fsdp2`` work."""
        strategy_registry.register("role_fsdp2", cls, description="every network sharded for itself (FSDP2)")


def _passed_on(error: Exception) -> tuple[type[Exception], str]:
    """An error in a form that every process can raise."""
    for kind in (OSError, ValueError):
        if isinstance(error, kind):
            return kind, str(error)
    return RuntimeError, f"the first process failed with {type(error).__name__}: {error}"


def _check_shards(module: DistillationModule) -> None:
    """Raise for trained parameters that belong to no network: their gradients would differ between processes."""
    for role in dict.fromkeys(role for roles in module.phases.values() for role in roles):
        part = getattr(module, role, None)
        own = part.named_parameters() if isinstance(part, nn.Module) else [("", part)]
        for name, parameter in own:
            if isinstance(parameter, nn.Parameter) and parameter.requires_grad and not isinstance(parameter, DTensor):
                full = f"{role}.{name}".rstrip(".")
                raise ValueError(
                    f"role_fsdp2 cannot shard {type(module).__name__}.{full}, a parameter beside the networks; use "
                    "strategy=role_ddp."
                )


def _dtype(argument: str, name: str | None) -> torch.dtype | None:
    known = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16}
    if name not in known:
        raise ValueError(f"RoleFSDP2({argument}={name!r}): choose float32 or bfloat16.")
    return known[name]


def _cast_frozen(teacher: Denoiser, dtype: torch.dtype) -> None:
    """Cast the teacher's own weights; adapters on its backbone, which are trained or averaged, keep theirs."""
    if isinstance(teacher, AdapterDenoiser):
        return
    for name, parameter in teacher.network.named_parameters():
        if parameter.is_floating_point() and ".lora_" not in f".{name}":
            parameter.data = parameter.data.to(dtype)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _placed(value: Tensor, own: Tensor) -> Tensor:
    return value if hasattr(value, "device_mesh") else distribute_like(value, own)


def _empty_like(like: Tensor, entry: Tensor) -> Tensor:
    """Memory for a stored tensor: sharded as ``like`` where that is its shape."""
    if like.shape == entry.shape:
        return torch.empty_like(like, dtype=entry.dtype)
    return torch.empty(entry.shape, dtype=entry.dtype)
