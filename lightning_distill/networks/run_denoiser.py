"""The network of an earlier run as a teacher."""

from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.guidance_adapters import GuidedDenoiser
from lightning_distill.networks.lora import AdapterDenoiser
from lightning_distill.networks.merging import merged_network
from lightning_distill.networks.roles import with_network
from lightning_distill.networks.specs import DenoiserSpec

__all__ = ["RunDenoiser"]


class RunDenoiser(DenoiserSpec):
    """The network that an earlier run samples from.

    A teacher trained with ``TeacherTraining``, or a student to be distilled further. Adapters of ``Lora`` are merged
    into their weights (of half precision, where they are: it is told if much of the adapter is rounded away), quantised
    ones restored, so that any role can start from it; ``GuidanceAdapters``, which depend
    on the call, stay beside the network, which becomes the denoiser's own.

    Args:
        path: run folder, or the folder of its versions (the newest is taken).
        weights: ``student``, or the name of an average; None is the first average.
        checkpoint: checkpoint file, None for the run's last.
    """

    def __init__(self, path: str, weights: str | None = None, checkpoint: str | None = None) -> None:
        self.path = path
        self.weights = weights
        self.checkpoint = checkpoint

    def check(self) -> None:  # noqa: D102
        from lightning_distill.commands.run_folder import find_checkpoint, find_run

        find_checkpoint(find_run(self.path, self.checkpoint), self.checkpoint)

    def build(self) -> Denoiser:  # noqa: D102
        from lightning_distill.commands.run_folder import load_run

        found = load_run(self.path, self.checkpoint).sampling_network(self.weights)
        if isinstance(found, (AdapterDenoiser, GuidedDenoiser)):
            return with_network(found, merged_network(found))
        return found
