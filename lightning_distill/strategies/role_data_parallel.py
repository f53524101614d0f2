"""Data parallelism with one gradient reducer per phase; ``strategy: role_ddp``."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_distill import checkpoints
from lightning_distill.methods.base import DistillationModule
from lightning_distill.networks.experts import ExpertNetwork
from lightning_distill.strategies.reducer import GradientReducer, same_everywhere, share_tensors

__all__ = ["RoleDataParallel", "check_teacher", "distillation_module", "tell_of_statistics"]


def distillation_module(module: Any, strategy: str) -> DistillationModule:
    """The module as one of ours, or one clear sentence."""
    if not isinstance(module, DistillationModule):
        raise TypeError(
            f"{strategy} trains the roles of a DistillationModule, and {type(module).__name__} is none; use "
            "strategy=ddp for other modules."
        )
    return module


def check_teacher(module: DistillationModule) -> None:
    """Raise when processes have loaded different teachers."""
    if module.teacher is not None and not same_everywhere(module.teacher_fingerprint()):
        raise ValueError(
            "the processes have loaded different teachers (their sha256 differ); give every node the same files."
        )


def tell_of_statistics(module: DistillationModule) -> None:
    """Warn of trained networks with batch normalisation, whose statistics would differ between processes."""
    for role in dict.fromkeys(role for roles in module.phases.values() for role in roles):
        network = getattr(module, role, None)
        for layer in network.modules() if isinstance(network, nn.Module) else ():
            own = isinstance(layer, _BatchNorm) and not isinstance(layer, nn.SyncBatchNorm)
            if own and layer.training and layer.track_running_stats:
                rank_zero_warn(
                    f"the {role} has batch normalisation: every process keeps the statistics of its own samples, and "
                    "checkpoints hold those of the first; use group normalisation, or "
                    "torch.nn.SyncBatchNorm.convert_sync_batchnorm(network) on GPUs."
                )
                break


class RoleDataParallel(DDPStrategy):
    """Every process holds all networks; an optimizer step moves the gradients of the networks that step.

    Where plain DDP reduces all trained networks in every backward pass and searches each graph for parameters without
    gradient, this strategy has one reducer per phase. What is trained or averaged is copied from the first process at
    the start; frozen networks are not moved: each process loads the teacher itself and their fingerprints are compared.

    Args:
        bucket_size_mb: gradients that are sent together while the backward pass goes on, MiB.
        compare_teachers: compare the teacher's sha256 over processes before training.
        process_group_backend: None for nccl on GPUs and gloo on CPUs.
        timeout_minutes: longest wait for another process.
        start_method: how processes start: ``popen``, or ``fork``, ``spawn`` in notebooks. Under torchrun and SLURM
            they exist already.
        **kwargs: of ``DDPStrategy`` (``accelerator``, ``checkpoint_io``, ...), usually left to the Trainer.
    """

    def __init__(
        self,
        bucket_size_mb: float = 25.0,
        compare_teachers: bool = True,
        process_group_backend: str | None = None,
        timeout_minutes: float = 30.0,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        **kwargs: Any,
    ) -> None:
        if bucket_size_mb <= 0:
            raise ValueError(f"RoleDataParallel(bucket_size_mb={bucket_size_mb}): give a positive number of MiB.")
        super().__init__(
            process_group_backend=process_group_backend,
            timeout=timedelta(minutes=timeout_minutes),
            start_method=start_method,
            **kwargs,
        )
        self.bucket_bytes = int(bucket_size_mb * 2**20)
        self.compare_teachers = compare_teachers
        self.reducers: dict[str, GradientReducer] = {}
        self._synchronised = True
        self._reducing: GradientReducer | None = None

    def configure_ddp(self) -> None:
        """Give every process the same start, and every phase its reducer; nothing is wrapped."""
        module = distillation_module(self.lightning_module, type(self).__name__)
        if not dist.is_initialized() or self.world_size == 1:
            return
        if self.compare_teachers:
            check_teacher(module)
        tell_of_statistics(module)
        share_tensors(checkpoints.checkpointed_tensors(module))
        experts = [part for part in module.modules() if isinstance(part, ExpertNetwork)]
        of_experts = {id(p) for part in experts for p in part.parameters()}
        for phase, roles in module.phases.items():
            parameters = [p for role in roles for p in module.role_parameters(role)]
            rare = [p for p in parameters if id(p) in of_experts]
            self.reducers[phase] = GradientReducer(parameters, self.bucket_bytes, rare=rare)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Backward passes within it accumulate gradients without communication."""
        before, self._synchronised = self._synchronised, False
        try:
            yield
        finally:
            self._synchronised = before

    def pre_backward(self, closure_loss: Tensor) -> None:
        """Start the reducer of the running phase."""
        self._reducing = None
        if not self.reducers or not self._synchronised:
            return
        phase = distillation_module(self.lightning_module, type(self).__name__).running_phase
        if phase is None:
            raise RuntimeError(
                "manual_backward was called outside of a phase, so its gradients would differ between processes; "
                "return the loss from <phase>_loss instead."
            )
        self._reducing = self.reducers[phase]
        self._reducing.begin()

    def post_backward(self, closure_loss: Tensor) -> None:
        """Wait for the averages."""
        if self._reducing is not None:
            self._reducing.finish()
            self._reducing = None

    def bytes_reduced(self) -> dict[str, int]:
        """Bytes of gradients that this process has sent into all-reduces, by phase."""
        return {phase: reducer.bytes_reduced for phase, reducer in self.reducers.items()}

    def teardown(self) -> None:
        """Remove the hooks from the networks."""
        for reducer in self.reducers.values():
            reducer.close()
        self.reducers.clear()
        super().teardown()

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Make ``strategy: role_ddp`` work."""
        strategy_registry.register("role_ddp", cls, description="data parallel with one gradient reducer per phase")
