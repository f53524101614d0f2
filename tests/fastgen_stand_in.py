"""A package with the names of FastGen that benchmarks/fastgen.py uses, small enough for tests; written for them."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

FILES = {
    "utils/__init__.py": """
        import boto3, ftfy
        from loguru import logger
        from functools import partial
        logger.opt(depth=2).info("loaded")
        def LazyCall(target):
            return lambda **settings: partial(target, **settings)
    """,
    "networks/network.py": """
        import torch
        from torch import nn
        class Schedule:
            _min_step, _max_step, max_t = 1, 8, 80.0
            sigmas = torch.linspace(0.1, 80.0, 10, dtype=torch.float64)
            def latents(self, noise):
                return 80.0 * noise
        class FastGenNetwork(nn.Module):
            def __init__(self, prediction="x0", schedule="edm"):
                super().__init__()
                self.noise_scheduler = Schedule()
    """,
    "networks/EDM/network.py": """
        from fastgen.networks.network import FastGenNetwork
        from torch import nn
        class EDMPrecond(FastGenNetwork):
            def __init__(self, r_timestep=False, **sizes):
                super().__init__()
                self.second_time = r_timestep
                self.model = nn.Module()
                self.model.enc = nn.ModuleDict()
                for i, side in enumerate((32, 16, 8)):
                    self.model.enc[f"{side}x{side}_block3"] = nn.Conv2d(4 if i else 3, 4, 3, 2 if i else 1, 1)
                self.label = nn.Linear(10, 3)
                self.out = nn.Conv2d(4, 3 * 16, 3, padding=1)
                self.shuffle = nn.PixelShuffle(4)
            def forward(self, x_t, t, condition=None, r=None, features=False):
                scale = (1 / (1 + t**2).sqrt()).to(x_t.dtype)[:, None, None, None]
                h, taps = scale * x_t, []
                for block in self.model.enc.values():
                    h = block(h)
                    taps.append(h)
                    h = h.tanh()
                label = 0 if condition is None else self.label(condition)[:, :, None, None]
                x0 = self.shuffle(self.out(h)) + scale * x_t + label
                if self.second_time:
                    x0 = x0 + r.to(x_t.dtype)[:, None, None, None] * h.mean()
                return (x0, taps) if features else x0
    """,
    "networks/discriminators.py": """
        import torch
        from torch import nn
        class Discriminator_EDM(nn.Module):
            def __init__(self, feature_indices, all_res, in_channels):
                super().__init__()
                self.heads = nn.ModuleList(nn.Conv2d(4, 1, side) for side in all_res)
            def forward(self, features):
                return torch.cat([head(f).flatten(1) for head, f in zip(self.heads, features)], 1)
    """,
    "configs/methods/config_dmd2.py": """
        from types import SimpleNamespace
        from fastgen.configs.net import Everything
        def create_config():
            rates = {f"{name}_optimizer": SimpleNamespace() for name in ("net", "fake_score", "discriminator")}
            return SimpleNamespace(model=SimpleNamespace(student_update_freq=5, gan_use_same_t_noise=False, **rates))
    """,
    "methods/distribution_matching/dmd2.py": """
        from contextlib import nullcontext
        import torch
        import torch.nn.functional as F
        SLOPE = 0.5
        class DMD2Model(torch.nn.Module):
            def __init__(self, config):
                super().__init__()
                self.config = config
                self.teacher, self.net, self.fake_score, self.ema = (config.net() for _ in range(4))
                self.gan = config.gan_loss_weight_gen > 0
                if self.gan:
                    self.discriminator = config.discriminator()
                self.teacher.requires_grad_(False)
                self.ema.requires_grad_(False)
            def on_train_begin(self):
                self.to(getattr(torch, self.config.precision))
            def init_optimizers(self):
                names = ("net", "fake_score", *("discriminator",) * self.gan)
                rates = {name: getattr(self.config, f"{name}_optimizer").lr for name in names}
                self.optimizer_dict = {name: torch.optim.AdamW(getattr(self, name).parameters(), lr=rate)
                                       for name, rate in rates.items()}
                self.scheduler_dict = {}
                self.model_dict = torch.nn.ModuleDict({name: getattr(self, name) for name in (*names, "ema")})
                self.grad_scaler = torch.amp.GradScaler("cpu", enabled=False)
            def autocast(self):
                return nullcontext()
            def _setup_grad_requirements(self, iteration):
                critic = bool(iteration % self.config.student_update_freq)
                self.fake_score.requires_grad_(critic)
                if self.gan:
                    self.discriminator.requires_grad_(critic)
            def guided(self, x, t, condition, null):
                taps = None
                x0 = self.teacher(x, t, condition, **{"features": True} if self.gan else {})
                if self.gan:
                    x0, taps = x0
                if self.config.guidance_scale is not None:
                    without = self.teacher(x, t, null)
                    x0 = without + self.config.guidance_scale * (x0 - without)
                return x0.detach(), taps
            def _student_update_step(self, start, t_max, t, eps, data, condition, null):
                x = self.net(start, t_max, condition)
                x_t = (x + t[:, None, None, None] * eps).to(x.dtype)
                real, taps = self.guided(x_t, t, condition, null)
                with torch.no_grad():
                    fake = self.fake_score(x_t, t, condition)
                    weight = 1 / ((x - real).abs().mean((1, 2, 3), keepdim=True) + 1e-6)
                loss = SLOPE * F.mse_loss(x, (x - weight * (fake - real)).detach())
                if self.gan:
                    loss = loss + self.config.gan_loss_weight_gen * F.softplus(-self.discriminator(taps)).mean()
                return {"total_loss": loss}, {}
            def _fake_score_discriminator_update_step(self, start, t_max, t, eps, real, condition):
                with torch.no_grad():
                    x = self.net(start, t_max, condition)
                    noise = t[:, None, None, None] * eps
                    x_t, real_t = (x + noise).to(x.dtype), (real + noise).to(x.dtype)
                loss = F.mse_loss(self.fake_score(x_t, t, condition), x)
                if self.gan:
                    with torch.no_grad():
                        taps, real_taps = (self.teacher(y, t, condition, features=True)[1] for y in (x_t, real_t))
                    loss = loss + F.softplus(self.discriminator(taps)).mean()
                    loss = loss + F.softplus(-self.discriminator(real_taps)).mean()
                return {"total_loss": loss}, {}
            def single_train_step(self, data, iteration):
                self._setup_grad_requirements(iteration)
                real = data["real"]
                eps, t = torch.randn_like(real), self.net.noise_scheduler.sigmas[torch.randint(1, 9, (len(real),))]
                t_max = torch.full_like(t, 80.0)
                start = 80.0 * torch.randn_like(real)
                if iteration % self.config.student_update_freq:
                    return self._fake_score_discriminator_update_step(start, t_max, t, eps, real, data["condition"])
                return self._student_update_step(
                    start, t_max, t, eps, data, data["condition"], data["neg_condition"])
            def active(self, iteration):
                critic = bool(iteration % self.config.student_update_freq)
                names = [name for name in self.optimizer_dict if (name == "net") != critic]
                return [self.optimizer_dict[name] for name in names]
            def optimizers_schedulers_step(self, iteration):
                for optimizer in self.active(iteration):
                    optimizer.step()
            def optimizers_zero_grad(self, iteration):
                for optimizer in self.active(iteration):
                    optimizer.zero_grad()
    """,
    "configs/methods/config_scm.py": """
        from types import SimpleNamespace
        class ModelConfig:
            def __init__(self):
                self.loss_config, self.sample_t_cfg = SimpleNamespace(), SimpleNamespace()
                self.net_optimizer = SimpleNamespace()
    """,
    "configs/methods/config_mean_flow.py": """
        from fastgen.configs.methods.config_scm import ModelConfig
    """,
    "methods/consistency_model/sCM.py": """
        import math
        import torch
        from fastgen.methods.distribution_matching.dmd2 import DMD2Model
        CONSTANT = 0.1
        def expand(value, x):
            return value.to(x.dtype)[:, None, None, None]
        class Student(DMD2Model):
            def __init__(self, config):
                torch.nn.Module.__init__(self)
                self.config, self.distils = config, config.loss_config.use_cd
                for name in ("net", "ema", *("teacher",) * self.distils):
                    setattr(self, name, config.net())
                for name in ("ema", *("teacher",) * self.distils):
                    getattr(self, name).requires_grad_(False)
            def init_optimizers(self):
                rate = self.config.net_optimizer.lr
                self.optimizer_dict = {"net": torch.optim.RAdam(self.net.parameters(), lr=rate)}
                self.grad_scaler = torch.amp.GradScaler("cpu", enabled=False)
            def active(self, iteration):
                return [self.optimizer_dict["net"]]
        class SCMModel(Student):
            def velocity(self, net, x, tau, condition):
                cos, sin = expand(tau.cos(), x), expand(tau.sin(), x)
                return (cos * x - net(x / cos, 0.5 * tau.tan(), condition)) / (0.5 * sin)
            def _compute_scm_loss(self, real, t, condition=None, iteration=0):
                tau, z = torch.atan2(t, torch.full_like(t, 0.5)), 0.5 * torch.randn_like(real)
                cos, sin = expand(tau.cos(), real), expand(tau.sin(), real)
                x = cos * real + sin * z
                with torch.no_grad():
                    along = cos * z - sin * real
                    if self.distils:
                        along = 0.5 * self.velocity(self.teacher, x, tau, condition)
                    change = torch.func.jvp(lambda x, tau: self.velocity(self.net, x, tau, condition), (x, tau),
                                            (cos * sin * along, tau.cos() * tau.sin()))[1]
                made = self.velocity(self.net, x, tau, condition)
                share = min(1.0, iteration / 10000)
                g = -cos**2 * (0.5 * made.detach() - along) - share * (cos * sin * x + 0.5 * change)
                g = g / (g.square().mean((1, 2, 3), keepdim=True).sqrt() + CONSTANT)
                return ((made - made.detach() - g).square().mean((1, 2, 3)) / t,)
            def single_train_step(self, data, iteration):
                t = (torch.randn(len(data["real"]), dtype=torch.float64) * 1.4 - 1.0).exp()
                loss = self._compute_scm_loss(data["real"], t, data["condition"], iteration)[0].mean()
                return {"total_loss": loss}, {}
    """,
    "methods/consistency_model/mean_flow.py": """
        import torch
        from fastgen.methods.consistency_model.sCM import Student, expand
        class MeanFlowModel(Student):
            def _compute_mf_loss(self, real, t, r, iteration, condition=None):
                z = torch.randn_like(real)
                x, along = (real + expand(t, real) * (z - real)).to(real.dtype), z - real
                with torch.no_grad():
                    f = lambda x, t: self.net(x, t, condition, r)
                    change = torch.func.jvp(f, (x, t), (along, torch.ones_like(t)))[1]
                error = (self.net(x, t, condition, r) - along + expand(t - r, x) * change).square().sum((1, 2, 3))
                return (error / (error.detach() + self.config.loss_config.norm_const),)
            def single_train_step(self, data, iteration):
                t, r = torch.rand(2, len(data["real"]), dtype=torch.float64).sort(0, descending=True).values
                loss = self._compute_mf_loss(data["real"], t, r, iteration, data["condition"])[0].mean()
                return {"total_loss": loss}, {}
    """,
    "callbacks/grad_clip.py": """
        import wandb
        class GradClipCallback:
            def __init__(self, grad_norm, model_key):
                self.norm, self.key = grad_norm, model_key
            def on_optimizer_step_begin(self, model, iteration):
                found = [p.grad for p in getattr(model, self.key).parameters() if p.grad is not None]
                sum(float(g.abs().max()) for g in found)
    """,
    "callbacks/ema.py": """
        import wandb
        class EMACallback:
            def __init__(self, type="constant", beta=0.9999, gamma=16.97):
                self.type, self.beta, self.gamma = type, beta, gamma
            def on_model_init_end(self, model):
                assert not any(p.requires_grad for p in model.ema.parameters())
            def on_training_step_end(self, model, data, outputs, losses, iteration):
                beta = self.beta if self.type == "constant" else (1 - 1 / iteration) ** (self.gamma + 1)
                for average, p in zip(model.ema.parameters(), model.net.parameters()):
                    average.data.lerp_(p.data, 1 - beta)
    """,
}


def write(folder: Path, **changes: str) -> Path:
    """A checkout of the stand-in.

    Args:
        folder: where to.
        changes: other content by path without its ending, with ``__`` for the slashes.
    """
    for name, text in FILES.items():
        path = folder / "fastgen" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(changes.get(name.removesuffix(".py").replace("/", "__"), dedent(text)))
        for parent in path.parents:
            if folder not in parent.parents:
                break
            (parent / "__init__.py").touch()
    return folder
