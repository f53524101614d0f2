"""Target times folded into the weights: students of two times leave as stock networks of one.

A student with a branch of ``networks.second_time`` adds to its time embedding E a vector that depends on the two times
of a step alone. A few-step student has K steps, hence K pairs of times and K vectors a_k, and the embedding ends in a
linear layer, E(t_k) = W h_k + b. So a change of that layer with

    dW h_k + db = a_k,     k = 1 .. K

makes the network of one time put out, at these K times, what the student does. The K vectors h_k are sinusoids of
different times behind a layer, hence independent, and the smallest solution has rank K: it is written into the weights
(with the bias; one step changes the bias alone) or, without the bias, into a LoRA file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill.export.schedules import OTHERWISE
from lightning_distill.generation import default_cond, generate
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.merging import widest
from lightning_distill.networks.second_time import remove_second_time, second_time_of, time_embedders

#: amplification of float32's rounding up to which samples stay equal to 1e-5
_LARGEST = 300.0

__all__ = ["Steps", "fold_into", "low_rank", "record_steps", "stock_sampler"]


@dataclass(frozen=True)
class Steps:
    """What one linear layer sees in the steps of a student, and what is added behind it, float64.

    Attributes:
        inputs: h, (K, in).
        added: a, (K, out).
    """

    inputs: Tensor
    added: Tensor

    def solution(self) -> tuple[Tensor, Tensor]:
        """The smallest change of weight (in, out) and bias (out,) that adds ``added``; in one step the bias alone."""
        h = self.inputs
        if len(h) == 1:
            return torch.zeros(h.shape[1], self.added.shape[1], dtype=h.dtype), self.added[0]
        one = h.norm(dim=1).mean()  # as large as the layer's input
        found = torch.linalg.pinv(torch.cat([h, one.expand(len(h), 1)], dim=1)) @ self.added
        return found[:-1], one * found[-1]

    def amplification(self) -> float:
        """How many times larger than what is added the terms are that cancel in it: large for inputs that are alike."""
        weight, _ = self.solution()
        largest = self.added.norm(dim=1).max()
        if not largest > 0:
            return 0.0
        return float(torch.linalg.matrix_norm(weight, 2) * self.inputs.norm(dim=1).max() / largest)


def stock_sampler(denoiser: Denoiser, sampler: str, times: Sequence[float]) -> str:
    """The sampler as stock pipelines have it: jumps by an installed branch are steps of an ODE solver.

    Args:
        denoiser: the student.
        sampler: of the student.
        times: descending native times.

    Raises:
        ValueError: several jumps to clean data of a network whose pipeline jumps from each time to the next.
    """
    if sampler == "flow_map" and second_time_of(denoiser.network) is not None:
        return "ode"
    if sampler == "renoise" and denoiser.jumps and denoiser.family.needs_target:
        if len(times) > 1:
            raise ValueError(
                f"this {type(denoiser.network).__name__} student jumps to clean data in each of {len(times)} steps, "
                "and its stock pipeline from each time to the next; train with sampler='flow_map', or export one step."
            )
        return "flow_map"  # one jump to clean data is the same
    return sampler


def record_steps(
    denoiser: Denoiser,
    times: Sequence[float],
    sampler: str,
    shape: Sequence[int] | None,
    guidance: float | None = None,
) -> dict[str, Steps]:
    """Sample once and note what the branch adds.

    Args:
        denoiser: the student, with its adapter if it has one.
        times: descending native times.
        sampler: of the student.
        shape: of one sample; None for the network's own.
        guidance: scale that the network is told, where it is told one; None for its family's.

    Returns:
        by path of the layer, in the network without adapters, that the embedding ends in; empty for a student of one
        time.

    Raises:
        ValueError: the embedding does not end in a linear layer or does not tell the times well apart, or the shape is
            not known.
    """
    network = denoiser.network
    branch = second_time_of(network)
    if branch is None:
        return {}
    shape = denoiser.sample_shape if shape is None else shape
    if shape is None:
        raise ValueError(f"{type(network).__name__} does not know the shape of its samples; give shape=... .")
    layers = [_Layer(network, embedder) for embedder, _ in time_embedders(network)]
    family = denoiser.family
    try:
        if guidance is not None:
            denoiser.family = replace(family, guidance_scale=guidance)
        noise = torch.zeros(1, *shape, device=denoiser.device)
        cond = {k: v.to(denoiser.device) for k, v in default_cond(denoiser, 1).items()}
        with widest(network):  # as the weights are that the steps are written into
            generate(denoiser, noise, cond, times, sampler)
    finally:
        denoiser.family = family
        for layer in layers:
            layer.release()
    found = {layer.path: layer.steps() for layer in layers}
    for steps in found.values():
        if (alike := steps.amplification()) > _LARGEST:
            raise ValueError(
                f"{type(network).__name__} embeds the times of these {len(times)} steps so much alike that its weights "
                f"cannot tell their target times apart (errors of rounding grow {alike:.0f} times); train a student "
                f"of fewer steps, or one of one time. {OTHERWISE}"
            )
    return found


def fold_into(network: nn.Module, steps: Mapping[str, Steps]) -> None:
    """Write target times into a network's weights and remove its branch, in place.

    Args:
        network: the student's, with its adapter merged.
        steps: of ``record_steps``.
    """
    if not steps:
        return
    remove_second_time(network)
    with torch.no_grad():
        for path, seen in steps.items():
            linear: Any = network.get_submodule(path)
            if linear.bias is None:
                change = torch.linalg.pinv(seen.inputs) @ seen.added
            else:
                change, bias = seen.solution()
                linear.bias += bias.to(linear.bias)
            linear.weight += change.T.to(linear.weight)


def low_rank(steps: Steps) -> tuple[Tensor, Tensor]:
    """The change of a layer without its bias as two factors, float32.

    Args:
        steps: K steps of the layer.

    Returns:
        A (K, in) and B (out, K): the layer's weight changes by B A.
    """
    basis, triangle = torch.linalg.qr(steps.inputs.T)  # h = triangle^T basis^T
    return basis.T.float(), torch.linalg.solve(triangle.T, steps.added).T.float()


class _Layer:
    """The linear layer in which an embedder ends, and what passes through it.

    Args:
        network: with its branch.
        embedder: of the time.
    """

    def __init__(self, network: nn.Module, embedder: nn.Module) -> None:
        names = {module: name for name, module in network.named_modules()}
        self._embedder = names[embedder]
        self._calls: list[tuple[str, Tensor, Tensor]] = []
        self._inputs: list[Tensor] = []
        self._added: list[Tensor] = []
        self.path = ""
        self._handles = [embedder.register_forward_hook(self._before, prepend=True)]
        self._handles.append(embedder.register_forward_hook(self._after))
        for name, module in embedder.named_modules():
            plain = getattr(module, "base_layer", module)  # an adapter's layer is seen as a whole
            if isinstance(plain, nn.Linear) and ".base_layer" not in name and ".lora_" not in name:
                self._handles.append(module.register_forward_hook(self._seen(names[module])))

    def _seen(self, path: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            self._calls.append((path, args[0], out))

        return hook

    def _before(self, _embedder: nn.Module, _args: Any, out: Tensor) -> None:
        ends = [call for call in self._calls if torch.equal(call[2], out)]
        if not ends:
            raise ValueError(
                f"the time embedding {self._embedder} does not end in a linear layer, into which target times could be "
                f"folded; {OTHERWISE}"
            )
        self.path, seen, self._plain = ends[-1]
        self._inputs.append(seen[0].double().cpu())
        self._calls.clear()

    def _after(self, _embedder: nn.Module, _args: Any, out: Tensor) -> None:
        self._added.append((out[0].double() - self._plain[0].double()).cpu())

    def steps(self) -> Steps:
        return Steps(torch.stack(self._inputs), torch.stack(self._added))

    def release(self) -> None:
        for handle in self._handles:
            handle.remove()
