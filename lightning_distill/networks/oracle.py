"""A fake score without a network: the posterior mean over a bank of the student's recent samples."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.families import Family, register
from lightning_distill.networks.roles import Role
from lightning_distill.processes import NoiseProcess

__all__ = ["OracleNetwork", "OracleScore", "bank_posterior_mean"]


def bank_posterior_mean(
    x_t: Tensor,
    t: Tensor,
    bank: Tensor,
    process: NoiseProcess,
    width: Tensor | float = 0.0,
    allowed: Tensor | None = None,
) -> Tensor:
    """E[x0 | x_t] when x0 is one of the bank's samples, blurred by a Gaussian.

        y = sum_j p_j (b_j + alpha h^2 / S (x_t - alpha b_j)),     p_j ~ exp(-|x_t - alpha b_j|^2 / 2 S)
        S = alpha^2 h^2 + sigma^2

    Args:
        x_t: noisy samples, (B, ...).
        t: native times, (B,).
        bank: samples, (N, ...).
        process: noise process.
        width: h, standard deviation of the blur; 0 for the samples themselves.
        allowed: which samples of the bank count for each x_t, (B, N); None for all.

    Returns:
        (B, ...), dtype of ``x_t``; computed in float64.
    """
    x, b = x_t.double().flatten(1), bank.double().flatten(1)
    alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
    blur = torch.as_tensor(width, device=x.device).double().square()
    variance = alpha.square() * blur + sigma.square()
    # |x - alpha b|^2 without a (B, N, D) tensor
    square = x.square().sum(1, keepdim=True) - 2.0 * alpha * (x @ b.T) + alpha.square() * b.square().sum(1)
    logits = -0.5 * square / variance
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    mean = logits.softmax(1) @ b
    return (mean + alpha * blur / variance * (x - alpha * mean)).reshape(x_t.shape).to(x_t.dtype)


class OracleNetwork(nn.Module):
    """The posterior mean over a bank of samples as a network of type ``sample``; its one parameter is the blur.

    The bank holds the newest samples; ``observe`` adds to it. With class labels only samples of the same class count.

    Args:
        shape: of one sample.
        size: number of samples kept.
        process: noise process, in native times.
        num_classes: number of classes, 0 for none; this number is also the label that means "no class".
        width: blur at first.
    """

    bank: Tensor
    labels: Tensor
    filled: Tensor

    def __init__(
        self, shape: tuple[int, ...], size: int, process: NoiseProcess, num_classes: int = 0, width: float = 0.1
    ) -> None:
        super().__init__()
        self.shape, self.process, self.num_classes = shape, process, num_classes
        self.log_width = nn.Parameter(torch.tensor(width).log())
        self.register_buffer("bank", torch.zeros(size, *shape))
        self.register_buffer("labels", torch.zeros(size, dtype=torch.long))
        self.register_buffer("filled", torch.zeros(size, dtype=torch.bool))

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """E[x0 | x_t]; an empty bank is the Gaussian prior's mean, 0.

        Args:
            x: noisy samples, (B, ...).
            t: native times, (B,).
            class_labels: classes, (B,).
        """
        allowed = self.filled.expand(len(x), -1)
        if class_labels is not None:
            own = self.labels == class_labels[:, None]
            allowed = allowed & (own | (class_labels == self.num_classes)[:, None])
        # where nothing counts, everything does: zeros of a fresh bank
        allowed = allowed | ~allowed.any(1, keepdim=True)
        return bank_posterior_mean(x, t, self.bank, self.process, self.log_width.exp(), allowed)

    @torch.no_grad()
    def observe(self, x: Tensor, cond: Mapping[str, Any]) -> None:
        """Put new samples in the place of the oldest.

        Args:
            x: samples, (B, ...).
            cond: their conditions.
        """
        x = x.detach()[-len(self.bank) :].to(self.bank)
        labels = cond.get("class_labels", torch.zeros(len(x), dtype=torch.long, device=x.device))[-len(x) :]
        keep = len(self.bank) - len(x)
        self.bank.copy_(torch.cat([x, self.bank[:keep]]))
        self.labels.copy_(torch.cat([labels, self.labels[:keep]]))
        self.filled.copy_(torch.cat([torch.ones_like(labels, dtype=torch.bool), self.filled[:keep]]))


def _null_class(network: nn.Module) -> int | None:
    classes = network.num_classes
    return classes if isinstance(classes, int) and classes > 0 else None


register(
    Family(
        "OracleNetwork",
        time="native",
        cond_keys=("class_labels",),
        null={"class_labels": _null_class},
        lora_targets=(),
    )
)


class OracleScore(Role):
    """A fake score that knows the student's distribution from its last samples, for few dimensions and for tests.

    It has no lag but that of its bank, and shows what a method does with a good critic. Its blur is trained like any
    critic, on samples that are not in the bank yet.

    Args:
        bank: number of samples kept.
        width: blur at first, in units of the data.
        shape: of one sample; None for the teacher's.
    """

    def __init__(self, bank: int = 4096, width: float = 0.1, shape: list[int] | None = None) -> None:
        self.bank = bank
        self.width = width
        self.shape = shape

    def check(self) -> None:  # noqa: D102
        if self.bank < 1 or not self.width > 0:
            raise ValueError(f"OracleScore(bank={self.bank}, width={self.width}): both must be positive.")

    def build(self, source: Denoiser, name: str | None = None) -> Denoiser:  # noqa: D102
        shape = self.shape or source.sample_shape
        if shape is None:
            raise ValueError("OracleScore: the teacher does not know the shape of its samples; give shape=[...].")
        network = OracleNetwork(tuple(shape), self.bank, source.process, source.num_classes or 0, self.width)
        return Denoiser(network, source.process, "sample", sigma_data=source.sigma_data)
