"""APEX: self-adversarial one-step generation by a shifted condition (arXiv:2604.12322)."""

from lightning_distill.methods.fake_branch import FakeBranch, ShiftedCondition
from lightning_distill.methods.twin_flow import TwinFlow

__all__ = ["APEX"]


class APEX(TwinFlow):
    """TwinFlow whose fake branch is told another condition instead of another time.

        c_fake = a c + b,     u(x'_s, s | c_fake) <- eps' - x'                                            (Eq. 9, 12)

    Times, their embedding and the network stay what they are, so that any conditional model and any adapter fit.

    Args:
        teacher: the pretrained conditional model.
        fake_branch: None for ``ShiftedCondition()``.
        **kwargs: see ``TwinFlow``.

    Notes:
        Reconstructed from the paper's branch and TwinFlow's objective, whose code the public repository contains. The
        paper's Eq. 23 regresses the velocity on a mixture of eps - x0 and the fake branch's velocity. At pure noise
        both are eps minus a mean, so that this alone has no one-step generator as its solution; the recursive target
        makes it here, and the branch enters by the difference of velocities (Eq. 17).
        x' is a one-step sample from pure noise without gradient, instead of the estimate at a noised x0.
        a and b are fixed; the paper allows to learn them.
    """

    paper = "2604.12322"

    def default_branch(self) -> FakeBranch:  # noqa: D102
        return ShiftedCondition()
