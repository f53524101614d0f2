"""Averages the gradients of one set of parameters over processes while the backward pass still runs.

``DistributedDataParallel`` wraps one module with one backward pass and reduces everything that requires a gradient in
it. A cycle of a distillation method has a backward pass per phase, each for other networks; with a reducer per phase a
step moves the bytes of the networks that step, and nothing has to be searched for parameters without a gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_distill.memory_format import is_dense

__all__ = ["GradientReducer", "buckets_of", "same_everywhere", "share_tensors"]


def buckets_of(parameters: Sequence[Tensor], order: Iterable[int], bucket_bytes: int) -> list[list[int]]:
    """Indices of parameters cut into buckets of one dtype and device, in the order given.

    Args:
        parameters: all of them.
        order: indices, first ready first.
        bucket_bytes: a bucket is closed when it has reached this size.
    """
    buckets: list[list[int]] = []
    open_: dict[tuple[torch.dtype, torch.device], tuple[list[int], int]] = {}
    for index in order:
        parameter = parameters[index]
        key = (parameter.dtype, parameter.device)
        members, size = open_.get(key, ([], 0))
        if not members:
            buckets.append(members)
        members.append(index)
        size += parameter.numel() * parameter.element_size()
        open_[key] = ([], 0) if size >= bucket_bytes else (members, size)
    return buckets


@dataclass
class _Bucket:
    members: list[int]
    waiting: set[int] = field(default_factory=set)
    flat: Tensor | None = None
    work: dist.Work | None = None


class GradientReducer:
    """Gradients of some parameters, averaged over the processes of a group in overlapping buckets.

    ``begin`` before a backward pass, ``finish`` after it; in between a bucket's all-reduce starts as soon as its last
    gradient is there. A backward pass outside of the two accumulates into ``.grad`` without communication. Afterwards
    every ``.grad`` is a view of its bucket.

    The first ``finish`` agrees on two things among the processes: which parameters take part at all (the others keep no
    gradient, so that optimizers leave them alone as in a single process), and in which order they become ready.
    A parameter that gets its first gradient later joins then, in whichever backward pass since the last optimizer step
    and on whichever process that was; one that later gets none has a zero gradient, unless it is ``rare``: then the
    processes ask each other in every step, and it has none where nobody had one.

    Args:
        parameters: leaves that require gradients; all processes give the same, in the same order.
        bucket_bytes: size of a bucket. The first is sent while the rest of the backward pass runs, so smaller ones
            overlap more and cost more calls.
        group: processes, None for all.
        rare: those of the parameters that some steps leave out, such as experts'; all processes give the same.

    Attributes:
        bytes_reduced: bytes of gradients sent into all-reduces so far.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        bucket_bytes: int = 25 * 2**20,
        group: dist.ProcessGroup | None = None,
        rare: Iterable[nn.Parameter] = (),
    ) -> None:
        self.parameters = list(parameters)
        self.rare = list(rare)
        self.bucket_bytes = bucket_bytes
        self.group = group
        self.bytes_reduced = 0
        self._factor = 1.0 / dist.get_world_size(group)
        self._buckets: list[_Bucket] = []
        self._bucket: dict[int, _Bucket] = {}
        self._known = False
        self._active = False
        self._ready: list[int] = []
        self._next = 0
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._hook(index))
            for index, parameter in enumerate(self.parameters)
        ]

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # ------------------------------------------------------------------------------------------------ a backward pass
    def begin(self) -> None:
        """The backward pass that starts now is the last before an optimizer step."""
        self._active = True
        self._ready.clear()
        self._next = 0
        for bucket in self._buckets:
            bucket.waiting = set(bucket.members)
            bucket.flat = bucket.work = None

    def finish(self) -> None:
        """Wait until every gradient is the average over the processes.

        Queued on the device, as with any collective: the host waits for an accelerator only as long as some parameter
        has never had a gradient, or is ``rare``, which the processes then ask each other about.
        """
        self._active = False
        known = len(self._buckets)
        used = [parameter.grad is not None for parameter in self.rare]
        # those that another process has sent within its backward pass go before the question
        for bucket in self._buckets[self._next :]:
            self._launch(bucket)
        self._agree()
        for bucket in self._buckets[known:]:
            self._launch(bucket)
        for bucket in self._buckets:
            assert bucket.work is not None
            bucket.work.wait()
            bucket.flat = bucket.work = None
        if self.rare:
            anywhere = torch.tensor(used, dtype=torch.int32, device=self.rare[0].device)
            dist.all_reduce(anywhere, op=dist.ReduceOp.MAX, group=self.group)
            for parameter, kept in zip(self.rare, anywhere.tolist()):
                parameter.grad = parameter.grad if kept else None

    def _hook(self, index: int):
        def ready(_parameter: Tensor) -> None:
            if self._active:
                self._arrived(index)

        return ready

    def _arrived(self, index: int) -> None:
        bucket = self._bucket.get(index)
        if bucket is None:  # not known yet, or without a gradient so far
            self._ready.append(index)
            return
        if index not in bucket.waiting:
            raise RuntimeError(
                "a parameter got two gradients in one backward pass after its average had been asked for; use "
                "activation checkpointing with use_reentrant=False."
            )
        bucket.waiting.remove(index)
        # all processes must start their collectives in one order
        while self._next < len(self._buckets) and not self._buckets[self._next].waiting:
            self._launch(self._buckets[self._next])
            self._next += 1

    def _launch(self, bucket: _Bucket) -> None:
        members = [self.parameters[i] for i in bucket.members]
        flat = torch.empty(sum(p.numel() for p in members), dtype=members[0].dtype, device=members[0].device)
        views = list(_views(flat, members))
        with torch.no_grad():
            have = [(view, p.grad) for view, p in zip(views, members) if p.grad is not None]
            if have:
                torch._foreach_copy_([view for view, _ in have], [grad for _, grad in have])
            for view, parameter in zip(views, members):
                if parameter.grad is None:
                    view.zero_()
            flat.mul_(self._factor)
        bucket.work = dist.all_reduce(flat, group=self.group, async_op=True)
        bucket.flat = flat
        for view, parameter in zip(views, members):
            parameter.grad = view
        self.bytes_reduced += flat.numel() * flat.element_size()

    # ------------------------------------------------------------------------------------------------ agreement
    def _agree(self) -> None:
        """Give a bucket to parameters that have a gradient, on any process, for the first time."""
        if self._known and len(self._bucket) == len(self.parameters):
            return  # the usual case: nothing to ask
        device = self.parameters[0].device if self.parameters else torch.device("cpu")
        # when a parameter became ready, counted from 1 by the first process; 0 for never
        place = torch.zeros(len(self.parameters), dtype=torch.int64, device=device)
        if self._ready:
            where = torch.tensor(self._ready, device=device)
            place[where] = torch.arange(1, len(self._ready) + 1, device=device)
        # not by the order: the gradient may be of an earlier backward pass, which was not reduced
        used = torch.tensor([p.grad is not None for p in self.parameters], dtype=torch.int64, device=device)
        dist.all_reduce(used, op=dist.ReduceOp.MAX, group=self.group)
        dist.broadcast(place, src=dist.get_global_rank(self.group, 0) if self.group else 0, group=self.group)
        self._known = True
        places, useds = place.tolist(), used.tolist()
        late = len(places) + 1  # ready on other processes, or in earlier backward passes, only
        new = [i for i, u in enumerate(useds) if u and i not in self._bucket]
        order = sorted(new, key=lambda i: (places[i] or late, i))
        for members in buckets_of(self.parameters, order, self.bucket_bytes):
            bucket = _Bucket(members)
            self._buckets.append(bucket)
            self._bucket |= dict.fromkeys(members, bucket)


def _views(flat: Tensor, like: Sequence[Tensor]) -> Iterator[Tensor]:
    """Pieces of a flat tensor with the shapes of others, and their strides where they are dense."""
    ends = accumulate(t.numel() for t in like)
    for end, tensor in zip(ends, like):
        piece = flat[end - tensor.numel() : end]
        yield piece.as_strided(tensor.shape, tensor.stride()) if is_dense(tensor) else piece.view(tensor.shape)


# ---------------------------------------------------------------------------------------------------- initial state
@torch.no_grad()
def share_tensors(tensors: Iterable[Tensor], group: dist.ProcessGroup | None = None, chunk_bytes: int = 2**28) -> None:
    """Copy the values of tensors from the first process to all others, a few large messages at a time.

    Args:
        tensors: the same on all processes in number, order, shape and dtype; each only once.
        group: processes, None for all.
        chunk_bytes: size of a message.
    """
    source = dist.get_global_rank(group, 0) if group else 0
    known = [t for t in tensors if t.numel()]
    for members in buckets_of(known, range(len(known)), chunk_bytes):
        part = [known[i] for i in members]
        flat = torch.empty(sum(t.numel() for t in part), dtype=part[0].dtype, device=part[0].device)
        pieces = list(_views(flat, part))
        for tensor, piece in zip(part, pieces):
            piece.copy_(tensor)
        dist.broadcast(flat, src=source, group=group)
        for tensor, piece in zip(part, pieces):
            tensor.copy_(piece)


def same_everywhere(text: str, group: dist.ProcessGroup | None = None) -> bool:
    """Whether all processes have the same text."""
    texts: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(texts, text, group=group)
    return len(set(texts)) == 1
