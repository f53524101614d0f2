"""Further outputs of a finished network that describe a policy (``lightning_distill.policies``).

A second layer beside the network's last one reads the same features and is G times as wide: the last layer, widened.
It is installed by a hook, so that the code of the network stays as it is, and runs only where a call taps it; its
outputs are arranged as the network arranges those of its own last layer (patches into pictures, tokens into latents).
The head is a submodule ``policy_head`` of the network: it travels with copies, averages and checkpoints, and adapters
attach to it. The network's own output stays bit for bit what it is.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill.batch import slice_cond
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.extended_role import ExtendedRole
from lightning_distill.networks.families import example_cond
from lightning_distill.networks.roles import Role
from lightning_distill.networks.seeding import seeded
from lightning_distill.policies import Policy, PolicyKind, groups_of, initial_offsets, make_policy
from lightning_distill.prediction import Prediction
from lightning_distill.processes import expand

__all__ = ["PolicyHead", "WithPolicy", "add_policy_head", "policy_head_of", "policy_prediction"]

_NAME = "policy_head"
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class PolicyHead(nn.Module):
    """The widened last layer of one network; made by ``add_policy_head``.

    Args:
        kind: policy that the outputs describe.
        components: K of it.
        layer: what makes the extra outputs of the last layer's input.
        last: name of the network's last layer.

    Attributes:
        substeps: Euler steps of a whole segment when sampling.
        temperature: of a mixture's posterior in all sampling steps but the last, see ``Policy.sharpened``.
    """

    def __init__(self, kind: PolicyKind, components: int, layer: nn.Module, last: str) -> None:
        super().__init__()
        self.kind: PolicyKind = kind
        self.components = components
        self.layer = layer
        self.last = last
        self.substeps = 64
        self.temperature = 1.0
        self._order: dict[tuple[int, ...], tuple[Tensor, float]] = {}

    def forward(self, features: Tensor) -> Tensor:
        """The extra outputs as the last layer leaves its own: (B, ..., G out) or (B, G out, ...)."""
        return self.layer(features)

    def _beside(self, _last: nn.Module, args: Any, _out: Tensor) -> None:
        if self._forward_hooks:  # somebody taps
            self(args[0])

    # ------------------------------------------------------------------------------------------------ reading
    def extra(self, denoiser: Denoiser, out: Tensor, x: Tensor, t: Tensor, cond: Mapping[str, Any]) -> Tensor:
        """The outputs of one call in the shape of samples, (B, G, C, ...), float32 (float64 if ``x`` is)."""
        groups = groups_of(self.kind, self.components)
        channels_last = isinstance(self._plain_layer, nn.Linear)
        width = out.shape[-1 if channels_last else 1] // groups
        parts = out.split(width, dim=-1 if channels_last else 1)
        flat = torch.stack([part.flatten(1) for part in parts], dim=1)
        order, sign = self._arrangement(denoiser, width, x, t, cond)
        arranged = flat[:, :, order.to(flat.device)].reshape(len(x), groups, *x.shape[1:])
        return sign * arranged.to(torch.float64 if x.dtype == torch.float64 else torch.float32)

    @property
    def _plain_layer(self) -> nn.Module:
        return getattr(self.layer, "base_layer", self.layer)

    def _arrangement(
        self, denoiser: Denoiser, width: int, x: Tensor, t: Tensor, cond: Mapping[str, Any]
    ) -> tuple[Tensor, float]:
        """Which element of the last layer's output each element of a sample is, and its sign.

        The network is run once per shape with the numbers 1, 2, .. in the place of that output.
        """
        key = tuple(x.shape[1:])
        if key not in self._order:
            one = slice_cond(cond, slice(0, 1), len(x))
            found = _through_the_tail(denoiser, self.last, x[:1], t.expand(len(x))[:1], one).flatten()
            order = found.abs().round().long() - 1
            if len(order.unique()) != len(order) or not torch.equal(found.abs(), order + 1.0):
                raise ValueError(
                    f"{type(denoiser.network).__name__} does more than rearrange the outputs of its last layer "
                    f"{self.last!r}, so it cannot be given the outputs of a policy; use a network that ends in a "
                    "linear or convolution layer."
                )
            self._order[key] = (order, 1.0 if bool((found > 0).all()) else -1.0)
        return self._order[key]

    def policy(
        self,
        denoiser: Denoiser,
        x: Tensor,
        t: Tensor,
        end: Tensor,
        cond: Mapping[str, Any] | None = None,
        guidance: Tensor | None = None,
    ) -> tuple[Policy, Prediction]:
        """The policy of a segment, by one call of the network.

        Args:
            denoiser: the student whose network has this head.
            x: samples in the student's process, (B, C, ...).
            t: native times, (B,).
            end: native times at which the segment ends, (B,); may be 0.
            cond: conditions.
            guidance: scale for guidance-embedded networks.

        Returns:
            the policy, in flow-matching coordinates, and the network's own prediction.
        """
        prediction = denoiser(x, t, cond, guidance=guidance, taps=(_NAME,))
        assert isinstance(prediction, Prediction)
        extra = self.extra(denoiser, prediction.features[_NAME], x, t, cond or {})
        start, scale = _flow(denoiser, t)
        made = make_policy(
            self.kind,
            self.components,
            prediction.flow_prediction,
            extra,
            expand(scale, x) * x,
            start,
            _flow(denoiser, end)[0],
        )
        return made, prediction


def _flow(denoiser: Denoiser, t: Tensor) -> tuple[Tensor, Tensor]:
    """Flow-matching time of a native one, and the factor that takes samples there; finite at both ends."""
    alpha, sigma = denoiser.process.alpha(t), denoiser.process.sigma(t)
    return sigma / (alpha + sigma), 1.0 / (alpha + sigma)


def policy_head_of(network: nn.Module) -> PolicyHead | None:
    """The head installed on a network, None where there is none."""
    found = getattr(network, _NAME, None)
    return found if isinstance(found, PolicyHead) else None


def policy_prediction(
    denoiser: Denoiser,
    x: Tensor,
    t: Tensor,
    r: Tensor,
    cond: Mapping[str, Any] | None = None,
    guidance: Tensor | None = None,
) -> Prediction:
    """The prediction whose straight step from t to r ends where the student's policy does.

    Args:
        denoiser: student with a policy head.
        x: samples at t, (B, C, ...).
        t: native times, (B,) or ().
        r: native times at which the segment ends, (B,) or ().
        cond: conditions.
        guidance: scale for guidance-embedded networks.
    """
    head = policy_head_of(denoiser.network)
    assert head is not None
    t, r = (time.to(x.device).expand(len(x)) if time.ndim == 0 else time for time in (t, r))
    policy, _ = head.policy(denoiser, x, t, r, cond, guidance)
    if head.temperature != 1.0:
        policy = policy.sharpened(torch.where(r > 0, head.temperature, 1.0))
    start, scale = _flow(denoiser, t)
    average = policy.average(expand(scale, x) * x, start, _flow(denoiser, r)[0], head.substeps)
    return Prediction(average, x, t, denoiser.process, "flow_prediction")


# ------------------------------------------------------------------------------------------------ installing
def add_policy_head(
    denoiser: Denoiser,
    kind: PolicyKind,
    components: int,
    shape: Sequence[int] | None = None,
    *,
    spread: float = 0.2,
    seed: int = 0,
) -> PolicyHead:
    """Give a network the outputs of a policy; what it computed before stays as it is.

    Args:
        denoiser: around the network, whose own last layer is linear or a convolution.
        kind: policy.
        components: K of it.
        shape: of one sample; None to ask the network.
        spread: see ``policies.initial_offsets``.
        seed: of the offsets.

    Returns:
        the head, also at ``network.policy_head``.

    Raises:
        ValueError: a head is there already, the shape is not known, or the network does not end in such a layer.
    """
    network, name = denoiser.network, type(denoiser.network).__name__
    if policy_head_of(network) is not None:
        raise ValueError(f"this {name} has a policy head already; install one only.")
    groups = groups_of(kind, components)
    shape = denoiser.sample_shape if shape is None else tuple(shape)
    if shape is None:
        raise ValueError(f"{name} does not know the shape of its samples; give shape=[channels, height, width].")
    last = _last_layer(denoiser, shape)
    layer = network.get_submodule(last)
    offsets = initial_offsets(kind, components, torch.Generator().manual_seed(seed), spread)
    with seeded(seed), torch.no_grad():
        widened = _widened(layer, groups)
        widened.weight.zero_()  # type: ignore[operator]
        widened.bias.copy_(offsets.repeat_interleave(len(widened.bias) // groups))  # type: ignore[arg-type, operator]
    parameter = next(layer.parameters())
    widened.to(parameter.device, parameter.dtype).requires_grad_(parameter.requires_grad)
    head = PolicyHead(kind, components, widened, last)
    head.train(network.training)
    network.add_module(_NAME, head)
    layer.register_forward_hook(head._beside)
    return head


def _widened(layer: nn.Module, groups: int) -> nn.Module:
    """A layer of the same kind that reads the same features, ``groups`` times as wide."""
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, groups * layer.out_features)
    assert isinstance(layer, _CONVOLUTIONS)
    return type(layer)(
        layer.in_channels,
        groups * layer.out_channels,
        layer.kernel_size,  # type: ignore[arg-type]
        layer.stride,  # type: ignore[arg-type]
        layer.padding,  # type: ignore[arg-type]
        layer.dilation,  # type: ignore[arg-type]
        padding_mode=layer.padding_mode,
    )


def _probe(denoiser: Denoiser, shape: Sequence[int]) -> tuple[Tensor, Tensor, dict[str, Any]]:
    device = denoiser.device
    cond = {key: value.to(device) for key, value in example_cond(denoiser.network, 1).items()}
    if denoiser.num_classes is not None:
        cond["class_labels"] = torch.zeros(1, dtype=torch.long, device=device)
    t = torch.full((1,), 0.5 * denoiser.process.t_max, dtype=torch.float64, device=device)
    return torch.zeros(1, *shape, device=device), t, cond


def _last_layer(denoiser: Denoiser, shape: Sequence[int]) -> str:
    """Name of the linear or convolution layer that a call runs last."""
    ran: list[str] = []
    handles = [
        layer.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, layer in denoiser.network.named_modules()
        if isinstance(layer, (nn.Linear, *_CONVOLUTIONS))
    ]
    try:
        with torch.no_grad():
            denoiser(*_probe(denoiser, shape))
    finally:
        for handle in handles:
            handle.remove()
    if not ran:
        raise ValueError(
            f"{type(denoiser.network).__name__} has no linear or convolution layer that could be widened to the "
            "outputs of a policy; use a trained network."
        )
    return ran[-1]


@torch.no_grad()
def _through_the_tail(denoiser: Denoiser, last: str, x: Tensor, t: Tensor, cond: Mapping[str, Any]) -> Tensor:
    """The network's output, (1, C, ...), when its last layer puts out 1, 2, 3, ..."""

    def count(_layer: nn.Module, _args: Any, out: Tensor) -> Tensor:
        numbers = torch.arange(1, out[0].numel() + 1, device=out.device, dtype=torch.float64)
        return numbers.to(torch.promote_types(out.dtype, torch.float32)).reshape(out[0].shape).expand_as(out)

    plain = Denoiser(
        denoiser.network,
        denoiser.network_process or denoiser.process,
        denoiser.prediction_type,
        null_class=denoiser.null_class,
        family=denoiser.family,
    )
    training = denoiser.network.training
    handle = denoiser.network.get_submodule(last).register_forward_hook(count)
    try:
        return plain(x, 0.5 * plain.process.t_max * torch.ones_like(t), cond).raw
    finally:
        handle.remove()
        denoiser.network.train(training)


# ------------------------------------------------------------------------------------------------ role
class WithPolicy(ExtendedRole):
    """A role whose network also describes a policy.

    In the shared frozen network of ``Lora`` nobody reads the head but this role.

    Args:
        role: how the student is realised, None for ``Copy()``.
        kind: policy.
        components: K of it.
        shape: of one sample; None to ask the network.
    """

    marker = f"{_NAME}."

    def __init__(
        self,
        role: Role | None = None,
        kind: PolicyKind = "mixture",
        components: int = 8,
        shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__(role)
        self.kind: PolicyKind = kind
        self.components = components
        self.shape = shape
        groups_of(kind, components)

    def install(self, denoiser: Denoiser) -> None:
        """Add the head where there is none."""
        if policy_head_of(denoiser.network) is None:
            add_policy_head(denoiser, self.kind, self.components, self.shape)

    def layers(self, denoiser: Denoiser) -> list[str]:
        """The widened last layer."""
        return [f"{_NAME}.layer"]
