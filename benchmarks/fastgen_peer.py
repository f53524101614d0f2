"""FastGen's own code, read from the user's checkout, and its DMD2 run in the order of its trainer."""

import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import diffusers  # noqa: F401  asks for wandb by itself, so it must come before the stand-ins
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from lightning_distill.networks.adversary import Adversary
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import seeded

#: imported by FastGen for object stores, captions, videos and loggers; nothing that is measured calls them
PACKAGES = ("boto3", "botocore", "einops", "ftfy", "imageio", "loguru", "wandb")
#: parts of FastGen that import all of its networks, data loaders and callbacks, with the versions these are pinned to;
#: of DMD2's own configuration they are defaults that are replaced here
PARTS = ("fastgen.configs.net", "fastgen.configs.data", "fastgen.configs.callbacks")
#: what is measured
MODULES = {
    "base": "fastgen.networks.network",
    "network": "fastgen.networks.EDM.network",
    "discriminators": "fastgen.networks.discriminators",
    "config": "fastgen.configs.methods.config_dmd2",
    "dmd2": "fastgen.methods.distribution_matching.dmd2",
    "clipping": "fastgen.callbacks.grad_clip",
    "averaging": "fastgen.callbacks.ema",
    "utils": "fastgen.utils",
}
#: EDM's SongUNet in the size of these benchmarks
SIZES: dict[str, Any] = {
    "img_resolution": 32,
    "img_channels": 3,
    "label_dim": 10,
    "sigma_data": 0.5,
    "sigma_shift": 0.0,
    "model_type": "SongUNet",
    "model_channels": 32,
    "channel_mult": [2, 2, 2],
    "num_blocks": 4,
    "attn_resolutions": [16],
    "dropout": 0.0,
}
#: blocks whose outputs FastGen's discriminator reads, by index
BLOCKS = tuple(f"model.enc.{side}x{side}_block3" for side in (32, 16, 8))


class _StandIn(ModuleType):
    """A module that can be imported from and not used; parts of FastGen's configuration are empty instead."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        full = f"{self.__name__}.{name}"
        if full == "loguru.logger":
            return _Silent()
        if self.__name__ in PARTS:
            return DictConfig({}, flags={"allow_objects": True})

        def refuse(*_: Any, **__: Any) -> None:
            raise NotImplementedError(f"FastGen called {full}, which is not installed.")

        return type(name, (Exception,), {"__init__": refuse})


class _Silent:
    def __getattr__(self, _name: str) -> Any:
        return lambda *_, **__: self


class _Finder:
    """Finds stand-ins for what is missing, submodules included."""

    def __init__(self) -> None:
        self.missing = tuple(name for name in PACKAGES if importlib.util.find_spec(name) is None)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name in PARTS or name.split(".")[0] in self.missing:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Within it missing packages can be imported; afterwards they are missing again for everyone else."""
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, _StandIn)]:
            del sys.modules[name]


def load(folder: str | Path, more: Mapping[str, str] = {}) -> SimpleNamespace:
    """The modules of a checkout of FastGen that are measured, by the names of ``MODULES``.

    Args:
        folder: where FastGen was cloned to.
        more: further modules by the name they are to have.

    Raises:
        SystemExit: there is no FastGen, another version than is understood, or a package that it needs is missing.
    """
    root = Path(folder)
    paths = [root.joinpath(*name.split(".")) for name in (MODULES | dict(more)).values()]
    if missing := [path for path in paths if not path.is_dir() and not path.with_suffix(".py").is_file()]:
        raise SystemExit(
            f"--fastgen {folder} is not a checkout of FastGen: {missing[0].relative_to(root)} is missing; clone "
            "https://github.com/NVlabs/FastGen and give that folder."
        )
    package = root / "fastgen" / "__init__.py"
    # as a package of its own rather than by sys.path: beside this file lies another fastgen.py
    spec = importlib.util.spec_from_file_location("fastgen", package, submodule_search_locations=[str(package.parent)])
    assert spec is not None
    assert spec.loader is not None
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "fastgen"}
    sys.modules["fastgen"] = module = importlib.util.module_from_spec(spec)
    try:
        with _stand_ins():
            spec.loader.exec_module(module)
            return SimpleNamespace(
                **{key: importlib.import_module(name) for key, name in (MODULES | dict(more)).items()}
            )
    except ModuleNotFoundError as error:
        sys.modules.update(before)
        remedy = f"install it with: pip install {error.name}"
        if (error.name or "").startswith("fastgen"):
            remedy = "this script knows FastGen's version of February 2026 (commit 34f30e8)"
        raise SystemExit(f"--fastgen {folder}: FastGen imports {error.name}, which is missing; {remedy}.") from error


def network(library: SimpleNamespace, seed: int = 0) -> nn.Module:
    """The SongUNet with random weights."""
    with seeded(seed):
        return library.network.EDMPrecond(**SIZES)


class Peer:
    """FastGen's DMD2 and the steps of its trainer: loss, backward, clipping, optimizers and schedules, averaging.

    Args:
        library: what ``load`` returned.
        weights: state of teacher, student and fake score by name.
        gan: whether there is an adversarial term.
        guidance: scale of classifier-free guidance, None for none.
        data: ``real``, ``condition`` and ``neg_condition`` of a batch.
        precision: of weights and samples.
        network: makes a network, None for the SongUNet.
        rate: learning rate of all optimizers.
        power: gamma of the average's power profile, None for FastGen's constant decay.
        **settings: of FastGen's configuration of DMD2.
    """

    def __init__(
        self,
        library: SimpleNamespace,
        weights: Mapping[str, Mapping[str, Tensor]],
        gan: bool,
        guidance: float | None,
        data: dict[str, Tensor],
        precision: str = "float32",
        network: Callable[[], nn.Module] | None = None,
        rate: float = 1e-4,
        power: float | None = None,
        **settings: Any,
    ) -> None:
        config = library.config.create_config().model
        make, sizes = (library.network.EDMPrecond, SIZES) if network is None else (network, {})
        config.net = library.utils.LazyCall(make)(**sizes)
        for optimizer in (config.net_optimizer, config.fake_score_optimizer, config.discriminator_optimizer):
            optimizer.lr = rate
        config.discriminator = library.utils.LazyCall(library.discriminators.Discriminator_EDM)(
            feature_indices={0, 1, 2}, all_res=[32, 16, 8], in_channels=64
        )
        config.device, config.precision, config.use_ema = "cpu", precision, True
        config.gan_loss_weight_gen = 1e-3 if gan else 0.0
        config.guidance_scale = guidance
        for name, value in settings.items():
            setattr(config, name, value)
        self.model = library.dmd2.DMD2Model(config)
        for name, state in weights.items():
            getattr(self.model, name).load_state_dict(state)
        if config.use_ema:
            self.model.ema.load_state_dict(weights["net"])
        self.model.on_train_begin()
        self.model.init_optimizers()
        self.clipping = library.clipping.GradClipCallback(grad_norm=10.0, model_key="net")
        # its default of .9999 forgets the teacher after ten thousand iterations; its power profile at any time
        profile = {"beta": 0.9999} if power is None else {"type": "power", "gamma": power}
        self.averaging = library.averaging.EMACallback(**profile)
        self.averaging.on_model_init_end(self.model)
        self.data, self.iteration = data, 0

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Teacher, student and fake score."""
        return {"teacher": self.model.teacher, "student": self.model.net, "fake_score": self.model.fake_score}

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """All optimizers."""
        return list(self.model.optimizer_dict.values())

    def state_dict(self) -> dict[str, Any]:
        """Networks that train, their optimizers and schedules, and the position."""
        model = self.model
        parts = {"model": model.model_dict, **model.optimizer_dict}
        parts |= {f"{name}/schedule": schedule for name, schedule in model.scheduler_dict.items()}
        return {"iteration": self.iteration, **{name: part.state_dict() for name, part in parts.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What ``state_dict`` returned."""
        self.iteration = state["iteration"]
        self.model.model_dict.load_state_dict(state["model"])
        for name, optimizer in self.model.optimizer_dict.items():
            optimizer.load_state_dict(state[name])
        for name, schedule in self.model.scheduler_dict.items():
            schedule.load_state_dict(state[f"{name}/schedule"])

    def step(self) -> None:
        """One iteration of the trainer: every fifth updates the student, the others the critic."""
        self.iteration += 1
        model, iteration = self.model, self.iteration
        with model.autocast():
            losses, outputs = model.single_train_step(self.data, iteration)
        model.grad_scaler.scale(losses["total_loss"]).backward()
        self.clipping.on_optimizer_step_begin(model, iteration)
        model.optimizers_schedulers_step(iteration)
        model.optimizers_zero_grad(iteration)
        self.averaging.on_training_step_end(model, self.data, outputs, losses, iteration)

    def cycle(self) -> None:
        """Four critic updates and one student update."""
        for _ in range(self.model.config.student_update_freq):
            self.step()


class _Heads(nn.Module):
    """FastGen's discriminator behind the interface of ``DiscriminatorHeads``."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Logits of all heads, (B, n)."""
        return self.inner([features[block] for block in BLOCKS])


class PeerHeads(Adversary):
    """An adversary on features of the teacher with FastGen's discriminator as its heads."""

    def __init__(self, library: SimpleNamespace) -> None:
        super().__init__(taps=BLOCKS, features="teacher")
        self.library = library

    def build(self, network: Denoiser, shape: Any) -> Any:
        """Fresh heads."""
        with seeded(self.seed):
            inner = self.library.discriminators.Discriminator_EDM({0, 1, 2}, all_res=[32, 16, 8], in_channels=64)
        return _Heads(inner)
