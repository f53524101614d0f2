"""LoRA roles on one shared frozen backbone.

peft puts the low-rank layers into the teacher's own network; each role is a *view* of that network that
switches its adapter on for the length of one call:

    y = W x + (alpha / rank) B A x,        B = 0 at initialisation        (arXiv:2106.09685, Eq. 3)
    y = m (W + s B A) x / |W + s B A|,     m = |W| at initialisation      (DoRA, arXiv:2402.09353, Eq. 5; norms by row)

At rest every adapter is off, so the teacher, and anything else that calls the network, runs the original
weights. Switching sets two plain attributes on the low-rank layers and puts them back; ``requires_grad`` is
never touched, which peft's ``set_adapter`` would do (``networks.adapter_bank``).
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lightning_distill.networks.adapter_bank import BANK, AdapterBank, AdapterCheckpoint, adapter_bank
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.quantisation import QuantisedLinear
from lightning_distill.networks.second_time import guidance_parts
from lightning_distill.networks.seeding import seeded
from lightning_distill.networks.weightless import where

__all__ = [
    "AdapterBank",
    "AdapterCheckpoint",
    "AdapterDenoiser",
    "adapter_bank",
    "add_adapter",
    "add_adapter_copy",
    "check_adapter",
    "enable_activation_checkpointing",
    "load_role_state",
    "role_state",
    "trainable_parameters",
]

_ADAPTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: what an adapter consists of in each layer; magnitudes with DoRA only
_PARTS = ("lora_A", "lora_B", "lora_magnitude_vector")


class AdapterDenoiser(Denoiser):
    """A role that is an adapter on a backbone owned by another denoiser.

    Its parameters, ``state_dict`` and ``train`` mode are those of the adapter alone: the backbone is reached
    through ``network`` but is not a submodule, so no optimizer, checkpoint or strategy meets it twice. State
    keys are ``adapter.<layer>.lora_A.weight``, the format of diffusers' LoRA files behind the prefix.

    Args:
        source: denoiser that owns the backbone.
        name: adapter of the backbone.
    """

    lora_alpha: Tensor

    def __init__(self, source: Denoiser, name: str) -> None:
        bank = adapter_bank(source.network)
        if bank is None or name not in bank.configs:
            raise ValueError(f"{type(source.network).__name__} has no adapter {name!r}; add it with add_adapter.")
        nn.Module.__init__(self)
        self.__dict__["network"] = source.network  # past nn.Module's registration
        self.process = source.process
        self.prediction_type = source.prediction_type
        self.network_process = source.network_process
        self.sigma_data = source.sigma_data
        self.data_scale = source.data_scale
        self.null_class = source.null_class
        self.family = source.family
        self.jumps = source.jumps
        self.adapter_name = name
        self.adapter = nn.Module()
        for path, layer in bank.layers.items():
            if name in layer.lora_A:
                leaf = _descend(self.adapter, path)
                leaf._modules |= {part: getattr(layer, part)[name] for part in _PARTS if name in getattr(layer, part)}
        # travels with the weights: the same tensors with another alpha are another network
        self.register_buffer("lora_alpha", torch.tensor(float(self.config.lora_alpha)))
        self.train(source.training)

    @property
    def bank(self) -> AdapterBank:
        """All adapters of the backbone."""
        bank = adapter_bank(self.network)
        assert bank is not None
        return bank

    @property
    def config(self) -> LoraConfig:
        """The adapter's rank, alpha and target modules as peft's configuration, for LoRA files."""
        return self.bank.configs[self.adapter_name]

    @property
    def deaf(self) -> bool:
        """As for every network, unless the adapter has layers in that branch."""
        if not super().deaf:
            return False
        own = [path for path, layer in self.bank.layers.items() if self.adapter_name in layer.lora_A]
        return not any(path.startswith(tuple(guidance_parts(self.network))) for path in own)

    def call_network(self, x: Tensor, time: Tensor, kwargs: dict[str, Any]) -> Any:  # noqa: D102
        with self.bank.using(self.adapter_name, self.training):
            return self.network(x, time, **kwargs)

    def train(self, mode: bool = True) -> AdapterDenoiser:
        """Mode of the adapter's dropout; the backbone stays in the mode of its owner."""
        nn.Module.train(self, mode)
        return self

    def adapter_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Name and tensor of every parameter of the adapter, trainable or not."""
        return list(self.adapter.named_parameters())

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """Adapter tensors by ``<layer>.lora_A.weight``, what diffusers' ``save_lora_weights`` takes."""
        state = self.adapter.state_dict()
        # peft's files name magnitudes without the ending
        return {key.replace("_magnitude_vector.weight", "_magnitude_vector"): value for key, value in state.items()}


def _descend(root: nn.Module, path: str) -> nn.Module:
    """The container at ``path``, made on the way; past ``add_module``, since a part may be called ``to``."""
    for part in path.split("."):
        root = root._modules.setdefault(part, nn.Module())  # type: ignore[assignment]
    return root


# ---------------------------------------------------------------------------------------- building
def add_adapter(
    source: Denoiser,
    name: str | None = None,
    *,
    rank: int = 16,
    alpha: float | None = None,
    target_modules: Sequence[str] | None = None,
    dropout: float = 0.0,
    dora: bool = False,
    exact_names: bool = False,
    trainable: bool = True,
    seed: int = 0,
) -> AdapterDenoiser:
    """Put a new adapter into the network of ``source`` and return the role that uses it.

    ``source`` itself keeps running the original weights. Its parameters are frozen.

    Args:
        source: denoiser that owns the backbone.
        name: adapter name without dots, None for the first free of ``adapter``, ``adapter_2``, ...
        rank: inner dimension of the low-rank product, >= 1.
        alpha: scale numerator, None for ``rank`` (scale 1).
        target_modules: endings of layer names, None for the defaults of the model class (every
            linear and convolution layer for a class without defaults).
        dropout: dropout on the adapter's input, [0, 1).
        dora: learn the norm of every row of the weights beside their direction (DoRA).
        exact_names: ``target_modules`` are full names of layers.
        trainable: whether its parameters require gradients.
        seed: of the random A; ranks of a distributed run get equal weights.

    Returns:
        the role; its parameters are float32 (float64 on a float64 backbone) whatever the backbone's dtype is.

    Raises:
        ValueError: a bad argument, a name in use, or targets that match no layer that can be adapted.
    """
    if isinstance(source, AdapterDenoiser):
        raise ValueError(
            "an adapter starts from the frozen backbone, but the source is the adapter "
            f"{source.adapter_name!r}; give the denoiser that owns the backbone, or use add_adapter_copy."
        )
    check_adapter(rank, dropout, dora)
    network = source.network
    bank = adapter_bank(network) or AdapterBank()
    name = _free_name(bank) if name is None else name.replace(".", "_")
    if name in bank.configs:
        raise _taken(name, bank)
    paths = _target_paths(network, target_modules or source.family.lora_targets, exact_names)
    if dora and (grouped := [p for p in paths if getattr(_layer(network, p), "groups", 1) > 1]):
        raise ValueError(
            f"Lora(dora=True) cannot adapt {grouped[0]!r} of {type(network).__name__}, a convolution in groups; leave "
            "it out with target_modules, or set dora=False."
        )
    if dora and (empty := [p for p in paths if _has_zero_rows(_layer(network, p))]):
        raise ValueError(
            f"Lora(dora=True) cannot adapt {empty[0]!r} of {type(network).__name__}, of which rows are zero and have "
            "no direction, as in branches that are added; leave it out with target_modules, or set dora=False."
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,  # type: ignore[arg-type]
        target_modules=paths,
        lora_dropout=dropout,
        use_dora=dora,
    )
    _inject(network, bank, name, config, trainable, seed)
    return AdapterDenoiser(source, name)


def add_adapter_copy(source: AdapterDenoiser, name: str, *, trainable: bool = False) -> AdapterDenoiser:
    """A second adapter with the tensors of ``source`` on the same backbone, for the student EMA.

    Args:
        source: role whose adapter is copied.
        name: name of the copy; dots become underscores.
        trainable: whether the copy requires gradients.

    Returns:
        the new role, float32, in eval mode when frozen.

    Raises:
        ValueError: ``name`` is in use.
    """
    bank, name = source.bank, name.replace(".", "_")
    if name in bank.configs:
        raise _taken(name, bank)
    _inject(source.network, bank, name, copy.deepcopy(source.config), trainable, seed=0)
    view = AdapterDenoiser(source, name)
    view.load_state_dict(source.state_dict())
    return view.train(trainable and source.training)


def check_adapter(rank: int, dropout: float, dora: bool) -> None:
    """Raise for settings that no adapter can have."""
    if rank < 1 or not 0.0 <= dropout < 1.0:
        raise ValueError(f"Lora(rank={rank}, dropout={dropout}): rank must be >= 1 and dropout in [0, 1).")
    if dora and dropout:
        raise ValueError(
            f"Lora(dora=True, dropout={dropout}): a row is scaled as a whole, also what dropout would leave out; set "
            "dropout=0 or dora=False."
        )


def _has_zero_rows(layer: nn.Module) -> bool:
    weight = layer.weight
    if not isinstance(weight, Tensor) or weight.is_meta or type(layer) is QuantisedLinear:
        return False
    return bool((weight.detach().flatten(1) == 0).all(dim=1).any())


def _layer(network: nn.Module, path: str) -> nn.Module:
    module = network.get_submodule(path)
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


def _free_name(bank: AdapterBank) -> str:
    number = 1
    while (name := "adapter" if number == 1 else f"adapter_{number}") in bank.configs:
        number += 1
    return name


def _target_paths(network: nn.Module, endings: Sequence[str], exact: bool) -> list[str]:
    """Full names of the layers to adapt; layers that already carry adapters count as what they replaced."""
    layers: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for path, module in network.named_modules():
        if not path or path.startswith(inside or ("\0",)):
            continue
        if isinstance(module, LoraLayer):
            inside += (f"{path}.",)
            module = module.get_base_layer()
        layers[path] = module
    suffixes = tuple(f".{e}" for e in endings)
    if not endings:
        unheard = {p for p in layers if isinstance(network.get_submodule(p.rpartition(".")[0]), nn.MultiheadAttention)}
        paths = [p for p, m in layers.items() if isinstance(m, _ADAPTABLE) and p not in unheard]
    else:
        paths = [p for p in layers if p in endings or (not exact and f".{p}".endswith(suffixes))]
    if not paths:
        known = sorted({p.rsplit(".", 1)[-1] for p, m in layers.items() if isinstance(m, _ADAPTABLE)})
        raise ValueError(
            f"target_modules={list(endings)} match no layer of {type(network).__name__}; endings of its "
            f"linear and convolution layers: {known[:20]}."
        )
    if wrong := [p for p in paths if not isinstance(layers[p], _ADAPTABLE)]:
        raise ValueError(
            f"target_modules={list(endings)} match {wrong[0]!r} of {type(network).__name__}, a "
            f"{type(layers[wrong[0]]).__name__}; adapters attach to linear and convolution layers only."
        )
    owners = {p: network.get_submodule(p.rpartition(".")[0]) for p in paths}
    if uncalled := [p for p in paths if isinstance(owners[p], nn.MultiheadAttention)]:
        raise ValueError(
            f"target_modules={list(endings)} match {uncalled[0]!r} of {type(network).__name__}, a layer that "
            "torch.nn.MultiheadAttention does not call, so that an adapter has no effect; leave it out."
        )
    return paths


def _taken(name: str, bank: AdapterBank) -> ValueError:
    known = f"the backbone already has an adapter {name!r}; adapter names are {list(bank.configs)}."
    return ValueError(f"{known} Give each method a Denoiser of its own, or a spec.")


def _inject(network: nn.Module, bank: AdapterBank, name: str, config: LoraConfig, trainable: bool, seed: int) -> None:
    flags = {id(p): p.requires_grad for layer in bank.layers.values() for p in layer.parameters()}
    checkpointing = getattr(network, "is_gradient_checkpointing", False)
    # peft reads a list as endings, a pattern as full names
    exact = copy.copy(config)
    exact.target_modules = "|".join(re.escape(path) for path in config.target_modules or ())
    with seeded(seed), where(network), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are the point
        warnings.filterwarnings("ignore", message=".*without `get_apply_tensor_subclass`")  # nothing merges in place
        inject_adapter_in_model(exact, network, name)
    bank.configs[name] = config
    bank.collect(network)
    network.__dict__[BANK] = bank
    # peft has flipped flags while injecting: the base is frozen, earlier adapters are as they were
    for parameter in network.parameters():
        parameter.requires_grad_(flags.get(id(parameter), False))
    for layer in bank.layers.values():
        dtype = torch.float64 if layer.get_base_layer().weight.dtype == torch.float64 else torch.float32
        for part in _PARTS:
            if name in getattr(layer, part):
                getattr(layer, part)[name].to(dtype).requires_grad_(trainable)
        if name in layer.lora_magnitude_vector:
            _measure_rows(layer, name, dtype)
    if checkpointing:
        checkpoint_with(network, bank)


def _measure_rows(layer: Any, name: str, dtype: torch.dtype) -> None:
    """Magnitudes of the weight as the adapter's forward computes its norms: their ratio is exactly 1."""
    base, part = layer.get_base_layer(), layer.lora_magnitude_vector[name]
    weight = base.dequantize() if isinstance(base, QuantisedLinear) else base.weight
    with torch.no_grad():
        weight = weight.detach().to(dtype)
        part.weight.copy_(part.get_weight_norm(weight, torch.zeros_like(weight), 1.0))


# ---------------------------------------------------------------------------------------- checkpointing
def enable_activation_checkpointing(denoiser: Denoiser) -> None:
    """Recompute the network's blocks in the backward pass instead of keeping their activations.

    Valid for every role on the same backbone, and for denoisers without adapters.

    Raises:
        ValueError: the model class has no activation checkpointing.
    """
    for network in getattr(denoiser.network, "singles", {"": denoiser.network}).values():  # of experts, each
        if not getattr(network, "_supports_gradient_checkpointing", False):
            raise ValueError(
                f"{type(network).__name__} has no activation checkpointing; switch it off, or call "
                "AdapterCheckpoint around its blocks."
            )
        checkpoint_with(network, adapter_bank(network))


def checkpoint_with(network: Any, bank: AdapterBank | None) -> None:
    network.enable_gradient_checkpointing(gradient_checkpointing_func=AdapterCheckpoint(bank))


# ---------------------------------------------------------------------------------------- one door
def trainable_parameters(denoiser: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """What an optimizer of this role owns: all of a copy, the adapter of a LoRA role, nothing frozen.

    Args:
        denoiser: any role (or discriminator).

    Returns:
        (name, parameter) pairs in a fixed order; names are those of ``role_state``.
    """
    bank = adapter_bank(denoiser.network) if isinstance(denoiser, Denoiser) else None
    others: set[int] = set()
    if bank is not None and not isinstance(denoiser, AdapterDenoiser):
        # the owner of a backbone has other roles' adapters in its module tree
        others = {id(p) for layer in bank.layers.values() for p in layer.parameters()}
    return [(name, p) for name, p in denoiser.named_parameters() if p.requires_grad and id(p) not in others]


def role_state(denoiser: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint must hold for this role: every tensor of a copy, only the adapter of a LoRA role."""
    return dict(denoiser.state_dict())


def load_role_state(denoiser: nn.Module, state: Mapping[str, Tensor], origin: str = "the given state") -> None:
    """Load what ``role_state`` returned, strictly.

    Args:
        denoiser: a role of the same kind.
        state: tensors by name.
        origin: where they come from, for the message.

    Raises:
        ValueError: names, shapes or the LoRA scale do not fit.
    """
    own = denoiser.state_dict()
    problems = [f"{key} is missing" for key in own if key not in state]
    problems += [f"{key} is unknown to the network" for key in state if key not in own]
    problems += [
        f"{key} has shape {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and own[key].shape != state[key].shape
    ]
    if "lora_alpha" in own and "lora_alpha" in state and own["lora_alpha"] != state["lora_alpha"]:
        problems.append(
            f"its LoRA alpha is {state['lora_alpha'].item():g} and the role's is {own['lora_alpha'].item():g}"
        )
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(
            f"{origin} does not fit {type(getattr(denoiser, 'network', denoiser)).__name__}: "
            f"{problems[0]}{more}; use the network and the role (copy or LoRA with its rank, alpha and "
            "targets) that it was saved from."
        )
    denoiser.load_state_dict(state)
