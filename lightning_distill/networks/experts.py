"""A network of several experts, each for its own noise levels or its own conditions."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import tree_map

from lightning_distill.collectives import max_over_processes
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.families import family_of
from lightning_distill.networks.lora import AdapterDenoiser
from lightning_distill.networks.prompt_groups import centres, group_of, prompt_features, read_centres
from lightning_distill.networks.roles import Copy, Role, check_alone, with_network

__all__ = [
    "ConditionExperts",
    "ExpertNetwork",
    "Experts",
    "PromptExperts",
    "TimeExperts",
    "experts_at",
    "single_experts",
]


class ExpertNetwork(nn.Module):
    """Sends each sample to one of K networks of one class.

    Attributes of the network (configuration, shape, number of classes) are those of the first expert.

    Args:
        experts: networks with the same calling convention.
        name: of the buffer by which samples are sent; None for none.
        value: of the buffer.
        persistent: whether checkpoints hold it.
    """

    #: while an expert runs on some of a call's samples: which (n,), and how many the call has; None if it has all
    part: tuple[Tensor, int] | None = None
    #: whether the processes hold the weights together, and so have to gather and reduce those of the same experts
    sharded: bool = False

    def __init__(
        self,
        experts: Sequence[nn.Module],
        name: str | None = None,
        value: Tensor | None = None,
        persistent: bool = False,
    ) -> None:
        super().__init__()
        if name is not None:  # first, as an expert may have an attribute of this name
            self.register_buffer(name, value, persistent)
        self.experts = nn.ModuleList(experts)
        #: names of arguments that all samples of a call share, see ``Family``
        self.shared = family_of(self.experts[0]).shared

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "experts":  # while the module is being made or unpickled
                raise
            return getattr(self.experts[0], name)

    @property
    def called(self) -> nn.Module:
        """The network that says which arguments a call takes."""
        return self.experts[0]

    @property
    def singles(self) -> dict[str, nn.Module]:
        """The experts by the prefix of their parts' names."""
        return {f"experts.{k}.": expert for k, expert in enumerate(self.experts)}

    def route(self, x: Tensor, time: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Number of the expert of each sample, (B,).

        Args:
            x: packed samples.
            time: second positional argument of the networks: the time, or the embeddings of prompts where the time is
                the keyword ``timestep``.
            kwargs: everything else.
        """
        raise NotImplementedError

    def forward(self, x: Tensor, time: Tensor, **kwargs: Any) -> Any:
        """Run every expert on its own samples, and only those experts that have some.

        Where the network is sharded, those run that have samples in any process. One without samples here runs on a
        row of another's, and adds 0 to the result, with gradients of 0.

        Args:
            x: packed samples, (B, ...), or a list of B.
            time: the networks' second argument, see ``route``.
            **kwargs: conditions; tensors of B rows and lists of B are divided like the samples, except for those that
                the family names as ``shared``.
        """
        index = self.route(x, time, kwargs)
        numbers = torch.arange(len(self.experts), device=index.device)
        counts, running = self._counted((index[:, None] == numbers).sum(0), len(index))
        if len(running) == 1:
            return self.experts[running[0]](x, time, **kwargs)
        chosen = index.argsort(stable=True)
        shares, order = chosen.split(counts), chosen.argsort()
        parts: list[Any] = []
        unused: list[Any] = []
        for k in running:
            rows = shares[k] if counts[k] else index.new_zeros(1)
            own = self._rows(kwargs, rows, len(x))
            with self._at_work_on(rows, len(x)):
                part = self.experts[k](_taken(x, rows), time[rows], **own)
            part = part[0] if isinstance(part, tuple) else getattr(part, "sample", part)
            (parts if counts[k] else unused).append(part)
        nothing = _zero(unused)
        if isinstance(parts[0], list):
            samples = _taken([sample for part in parts for sample in part], order)
            return [sample + nothing for sample in samples] if unused else samples
        result = torch.cat(parts)[order]
        return result + nothing if unused else result

    def _counted(self, counts: Tensor, total: int) -> tuple[list[int], list[int]]:
        """Samples of each expert, and the numbers of the experts that run; waits for the device once.

        Where a run is planned and nobody knows, all have as many.
        """
        if isinstance(counts, FakeTensor):
            bounds = [total * k // len(counts) for k in range(len(counts) + 1)]
            planned = [end - first for first, end in pairwise(bounds)]
            return planned, [k for k, count in enumerate(planned) if count]
        if not self.sharded:
            own: list[int] = counts.tolist()
            return own, [k for k, count in enumerate(own) if count]
        own, largest = torch.stack([counts, max_over_processes(counts.clone())]).tolist()
        return own, [k for k, count in enumerate(largest) if count]

    def _rows(self, kwargs: dict[str, Any], rows: Tensor, total: int) -> dict[str, Any]:
        """Conditions of some of the samples; nested ones too."""

        def divided(value: Any) -> Any:
            if isinstance(value, list) or (isinstance(value, Tensor) and value.ndim):
                return _taken(value, rows) if len(value) == total else value
            return value

        own = {key: value for key, value in kwargs.items() if key not in self.shared}
        return kwargs | tree_map(divided, own, is_leaf=lambda value: isinstance(value, list))

    @contextmanager
    def _at_work_on(self, rows: Tensor, calls: int) -> Iterator[None]:
        self.part = (rows, calls)
        try:
            yield
        finally:
            self.part = None


def _taken(samples: Any, rows: Tensor) -> Any:
    """Some of the samples, which are a tensor or a list."""
    return [samples[row] for row in rows.tolist()] if isinstance(samples, list) else samples[rows]


def _zero(results: list[Any]) -> Tensor | float:
    """0 with the graph of results; unlike 0 times a result, also where one is infinite."""
    samples = [sample for part in results for sample in (part if isinstance(part, list) else [part])]
    zeros = [torch.where(torch.zeros_like(sample, dtype=torch.bool), sample, 0.0).sum() for sample in samples]
    return torch.stack(zeros).sum() if zeros else 0.0


class TimeExperts(ExpertNetwork):
    """Experts for intervals of noise levels.

    Args:
        experts: networks, noise first.
        boundaries: times between them as the networks are told them, K - 1, from noise to data.
        rising: whether the networks' time grows with noise.
    """

    boundaries: Tensor
    values_decide = True  # also in a plan, of times that are known

    def __init__(self, experts: Sequence[nn.Module], boundaries: Tensor, rising: bool) -> None:
        super().__init__(experts, "boundaries", boundaries.double())
        self.rising = rising

    def route(self, x: Tensor, time: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """A boundary belongs to the noisier side."""
        time = kwargs.get("timestep", time)
        t = time.double().reshape(len(time), -1)[:, :1]
        slack = 1e-6 * self.boundaries.abs().clamp_min(1.0)  # times are told in float32
        passed = t < self.boundaries - slack if self.rising else t > self.boundaries + slack
        return passed.sum(1)


class ConditionExperts(ExpertNetwork):
    """Experts for groups of classes.

    Args:
        experts: networks.
        groups: number of the expert of each class, and of the null class last, (C + 1,).
    """

    groups: Tensor

    def __init__(self, experts: Sequence[nn.Module], groups: Tensor) -> None:
        super().__init__(experts, "groups", groups.long())

    def route(self, x: Tensor, time: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """By class label."""
        return self.groups[kwargs["class_labels"]]


class PromptExperts(ExpertNetwork):
    """Experts for groups of prompts; the unconditional embedding goes where it lies, too.

    Args:
        experts: networks.
        centres: of the groups, (K, D), see ``prompt_groups``.
    """

    centres: Tensor

    def __init__(self, experts: Sequence[nn.Module], centres: Tensor) -> None:
        super().__init__(experts, "centres", centres.float(), persistent=True)

    def route(self, x: Tensor, time: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """By the nearest centre."""
        given = {"encoder_hidden_states": time, **kwargs} if "timestep" in kwargs else dict(kwargs)
        # as some classes name the mask of the tokens, or take rows without padding
        if isinstance(mask := kwargs.get("encoder_hidden_states_mask"), Tensor):
            given["encoder_attention_mask"] = mask
        if isinstance(rows := kwargs.get("cap_feats"), list):
            given["encoder_hidden_states"] = pad_sequence(rows, batch_first=True)
            given["encoder_attention_mask"] = pad_sequence(
                [torch.ones_like(row[:, 0]) for row in rows], batch_first=True
            )
        return group_of(prompt_features(given), self.centres)


def experts_at(denoiser: Denoiser, times: Sequence[float]) -> list[int]:
    """Number of the expert in charge at each of some native times.

    Args:
        denoiser: one whose network is a ``TimeExperts``.
        times: native times, not 0.
    """
    network = denoiser.network
    assert isinstance(network, TimeExperts)
    t = denoiser._time(torch.tensor(times, dtype=torch.float64, device=network.boundaries.device))
    found: list[int] = network.route(t, t, {}).tolist()
    return found


def single_experts(denoiser: Denoiser) -> list[Denoiser]:
    """The experts as denoisers of their own, which share the weights.

    Args:
        denoiser: one whose network is an ``ExpertNetwork``.
    """
    network = denoiser.network
    assert isinstance(network, ExpertNetwork)
    return [with_network(denoiser, expert) for expert in network.experts]


class Experts(Role):
    """A student, or fake score, of several networks that all begin as the source.

    ``boundaries`` (Phased DMD, arXiv:2510.27684), ``classes`` or ``prompts`` (multi-student distillation,
    arXiv:2410.23274) say who is responsible.

    Args:
        boundaries: times between the experts as shares of t_max, falling; K - 1 for K experts.
        classes: the classes of each expert, together all of them; or a number of experts, each for as many of the
            classes in a row as the others, or one less.
        prompts: store of ``lightning-distill cache`` whose embeddings are divided into ``count`` groups by k-means, or
            a safetensors file with their ``centres``.
        count: number of groups of prompts; with a file it is the file's.
        role: how each expert is made; None for a copy.

    Notes:
        A call whose samples belong to several experts, or whose times are on the device, waits for the device once.
        Sharded over several processes (``role_fsdp2``), an expert with samples in one of them runs in all, which each
        call asks the others about: a maximum of a few numbers, and one further row.
        Blocks are tapped, and adapters attached, in single networks only.
        The null class belongs to the first expert and a null prompt to the nearest, which then is the unconditional
        branch of all.
    """

    def __init__(
        self,
        boundaries: Sequence[float] | None = None,
        classes: Sequence[Sequence[int]] | int | None = None,
        prompts: str | None = None,
        count: int = 2,
        role: Role | None = None,
    ) -> None:
        self.prompts, self.count = prompts, count
        self.boundaries = None if boundaries is None else [float(b) for b in boundaries]
        self.classes = classes if classes is None or isinstance(classes, int) else [list(group) for group in classes]
        self.role = role or Copy()

    def check(self) -> None:  # noqa: D102
        self.role.check()
        if sum(given is not None for given in (self.boundaries, self.classes, self.prompts)) != 1:
            raise ValueError(
                "Experts needs one of boundaries (times between experts), classes (of each expert) and prompts (store "
                "of their embeddings)."
            )
        if self.boundaries is not None:
            b = self.boundaries
            if any(y >= x for x, y in zip([1.0, *b], [*b, 0.0])):
                raise ValueError(f"Experts(boundaries={b}): give shares of t_max that fall strictly between 1 and 0.")
        if isinstance(self.classes, int) and self.classes < 1:
            raise ValueError(f"Experts(classes={self.classes}): give a number of experts, 1 or more.")
        if isinstance(self.classes, list):
            listed = sorted(c for group in self.classes for c in group)
            if listed != list(range(len(listed))) or not all(self.classes):
                raise ValueError(
                    f"Experts(classes={self.classes}): each class 0, 1, ... belongs to exactly one expert, and each "
                    "expert has one."
                )

    def learned_steps(self) -> dict[str, Tensor]:  # noqa: D102
        return self.role.learned_steps()

    def build(self, source: Denoiser, name: str | None = None) -> Denoiser:  # noqa: D102
        self.check()
        middle = None if self.prompts is None else self._centres(self.prompts)
        groups = None if self.classes is None else self._groups(source)
        if groups is not None:
            count = len(groups)
        else:
            count = len(self.boundaries or ()) + 1 if middle is None else len(middle)
        made = [self.role.build(source, f"{name}_{k}") for k in range(count)]
        check_alone(made[0], "Experts")
        if any(isinstance(part, AdapterDenoiser) for part in made):
            raise ValueError("experts are networks of their own; give Experts(role=Copy()) or another one than Lora.")
        first = made[0]
        networks = [part.network for part in made]
        router: ExpertNetwork
        if self.boundaries is not None:
            shares = torch.tensor([1.0, *self.boundaries], dtype=torch.float64)
            # where Denoiser would send them
            times = first._time(shares * first.process.t_max).double()
            router = TimeExperts(networks, times[1:], bool(times[0] > times[1]))
        elif middle is not None:
            router = PromptExperts(networks, middle)
        else:
            router = ConditionExperts(networks, _owners(groups or []))
        router.shared = first.family.shared
        first.network = router if first.device.type == "meta" else router.to(first.device)
        return first

    def _centres(self, path: str) -> Tensor:
        return read_centres(path) if path.endswith(".safetensors") else centres(path, self.count)

    def _groups(self, denoiser: Denoiser) -> list[list[int]]:
        known, name = denoiser.num_classes or 0, type(denoiser.network).__name__
        if isinstance(self.classes, int):
            if self.classes > known:
                raise ValueError(f"Experts(classes={self.classes}): {name} has {known} classes, fewer than experts.")
            bounds = [known * k // self.classes for k in range(self.classes + 1)]
            return [list(range(first, end)) for first, end in pairwise(bounds)]
        groups = self.classes or []
        if known != (listed := sum(map(len, groups))):
            raise ValueError(f"Experts(classes=...) names {listed} classes, but {name} has {known}.")
        return groups


def _owners(groups: Sequence[Sequence[int]]) -> Tensor:
    """The expert of each class, and the first for the null class behind them."""
    owner = {c: k for k, group in enumerate(groups) for c in group}
    return torch.tensor([*(owner[c] for c in range(len(owner))), 0])
