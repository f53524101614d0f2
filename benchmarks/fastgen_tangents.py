"""sCM and MeanFlow here and in FastGen: one update of the student, its exact derivative included.

Run by ``fastgen.py --tangents``, which has the options. Networks are FastGen's SongUNet as its own configurations have
it: EDM's preconditioning for sCM, and for MeanFlow none, with a second time. Both sides differentiate forwards
exactly; rows with ``one-sided differences`` do not.
"""

import argparse
from types import SimpleNamespace
from typing import Any

import torch
from bare import bare_trainer
from counting import floor_bytes
from fastgen_parts import OURS, PEER, SHAPE, Alternate, Repeated, compare, examples, line, peer_data, row
from fastgen_peer import SIZES, Peer
from results import write_result
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_distill.batch import Batch
from lightning_distill.ema import ConstantEMA
from lightning_distill.methods import SCM, MeanFlow
from lightning_distill.methods.trajectory import TrajectoryMethod
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import seeded
from lightning_distill.processes import EDM, FlowMatching
from lightning_distill.randomness import Draws
from lightning_distill.times import LogNormal

#: modules of FastGen beyond those of DMD2
MODULES = {
    "scm": "fastgen.methods.consistency_model.sCM",
    "scm_config": "fastgen.configs.methods.config_scm",
    "mean_flow": "fastgen.methods.consistency_model.mean_flow",
    "mean_flow_config": "fastgen.configs.methods.config_mean_flow",
}
#: sizes of the network of FastGen's MeanFlow
TWO_TIMES = {**SIZES, "r_timestep": True, "drop_precond": "both", "net_pred_type": "flow", "schedule_type": "rf"}
#: method, distilled from a teacher; FastGen calls its teacher without the second time that its network then asks for,
#: so that MeanFlow is compared as its own configuration has it
VARIANTS = {"sCM": True, "sCM from data": False, "MeanFlow from data": False}
#: settings of this library by implementation
SIDES: dict[str, dict[str, Any]] = {
    OURS: {"one_pass": True},
    f"{OURS}, two passes": {},
    f"{OURS}, one-sided differences": {"tangent": "one_sided"},
}
SD = 0.5


def network(library: SimpleNamespace, variant: str, seed: int = 0) -> nn.Module:
    """The SongUNet as FastGen's configuration of the method has it, random weights."""
    with seeded(seed):
        return library.network.EDMPrecond(**(SIZES if variant.startswith("sCM") else TWO_TIMES))


class TangentPeer(Peer):
    """FastGen's sCM or MeanFlow, and the steps of its trainer.

    Args:
        library: what ``load`` returned, with ``MODULES``.
        variant: of ``VARIANTS``.
        state: weights of teacher and student.
        data: see ``Peer``.
        precision: of weights and samples.
    """

    def __init__(
        self,
        library: SimpleNamespace,
        variant: str,
        state: dict[str, dict[str, Tensor]],
        data: dict[str, Tensor],
        precision: str = "float32",
    ) -> None:
        scm = variant.startswith("sCM")
        # without create_config, which sets callbacks of loggers too
        config = (library.scm_config if scm else library.mean_flow_config).ModelConfig()
        config.net = library.utils.LazyCall(library.network.EDMPrecond)(**(SIZES if scm else TWO_TIMES))
        config.device, config.precision, config.use_ema = "cpu", precision, True
        config.loss_config.use_cd = VARIANTS[variant]
        if scm:  # the mean over elements once
            config.loss_config.divide_x_0_spatial_dim = False
        else:  # the paper's times, share of r = t and loss; the configuration's own defaults leave no r < t
            config.sample_t_cfg.time_dist_type, config.sample_t_cfg.r_sample_ratio = "logitnormal", 0.25
            config.sample_t_cfg.train_p_mean, config.sample_t_cfg.train_p_std = -0.4, 1.0
            config.sample_t_cfg.min_t, config.sample_t_cfg.max_t = 0.001, 0.999
            config.loss_config.loss_type, config.loss_config.norm_const = "l2", 1e-2
        config.net_optimizer.lr = 1e-4
        self.model = library.scm.SCMModel(config) if scm else library.mean_flow.MeanFlowModel(config)
        self.model.net.load_state_dict(state["student"])
        self.model.ema.load_state_dict(state["student"])
        if VARIANTS[variant]:
            self.model.teacher.load_state_dict(state["teacher"])
        self.model.on_train_begin()
        self.model.init_optimizers()
        self.clipping = library.clipping.GradClipCallback(grad_norm=10.0, model_key="net")
        self.averaging = library.averaging.EMACallback(beta=0.9999)
        self.averaging.on_model_init_end(self.model)
        self.data, self.iteration = data, 0

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Student and teacher."""
        teacher = getattr(self.model, "teacher", None)
        return {"student": self.model.net, **({} if teacher is None else {"teacher": teacher})}

    def cycle(self) -> None:
        """One student update."""
        self.step()


def method(
    library: SimpleNamespace, variant: str, state: dict[str, dict[str, Tensor]], **settings: Any
) -> TrajectoryMethod:
    """This library's method on FastGen's network, with FastGen's mathematics."""
    teacher = network(library, variant)
    teacher.load_state_dict(state["teacher"])
    settings = {"from_data": not VARIANTS[variant], "check_data": False, "ema": [ConstantEMA(0.9999)], **settings}
    module: TrajectoryMethod
    if variant.startswith("sCM"):
        denoiser = Denoiser(teacher, EDM(), "sample", sigma_data=SD)
        # c and the median noise level belong to data of unit standard deviation here, to those of SD there
        times = LogNormal(-1.0 - torch.tensor(SD).log().item(), 1.4)
        module = SCM(denoiser, shape=SHAPE, times=times, constant=0.1 / SD, norm="rms", weight="trig", **settings)
    else:
        module = MeanFlow(Denoiser(teacher, FlowMatching(), "flow_prediction"), shape=SHAPE, **settings)
    module.configure_model()
    module.student.network.load_state_dict(state["student"])
    return module


# ---------------------------------------------------------------------------------------------------- equal mathematics
class _Given(Draws):
    """Draws that are given: noise, one uniform number for guidance, and an update behind every warm-up."""

    update = 10**9

    def __init__(self, noise: Tensor) -> None:
        self.noise = noise

    def normal(self, name: str, shape: Any) -> Tensor:
        return self.noise

    def uniform(self, name: str, n: int) -> Tensor:
        return torch.full((n,), 0.5, dtype=torch.float64)


def check(library: SimpleNamespace, variant: str, batch: int = 2, **settings: Any) -> dict[str, float]:
    """Loss and gradient of both sides on the same weights, samples, noise and times, in float64.

    The loss of sCM is divided by the standard deviation of the data there, which its learned weight takes up here.

    Returns:
        relative differences of the loss and of the student's gradient.
    """
    torch.manual_seed(5)
    state = {}
    for seed, name in enumerate(("teacher", "student")):
        weights = network(library, variant, seed).state_dict()
        state[name] = {key: value + 0.02 * torch.randn_like(value) for key, value in weights.items()}
        for key in [key for key in weights if "logvar" in key]:  # the learned weight of times is 0 at first
            state[name][key] = torch.zeros_like(weights[key])
    data = examples(batch)
    data = Batch(x0=data.x0.double(), cond={k: v.double() for k, v in data.cond.items()}, size=batch)
    peer = TangentPeer(library, variant, state, peer_data(data), "float64").model
    module: Any = method(library, variant, state, **settings)
    for denoiser in (module.student, module.require_teacher()):
        denoiser.double()
    torch.manual_seed(9)
    noise = torch.randn_like(data.x0)
    torch.manual_seed(9)  # for the same noise there
    module.draws = _Given(noise)
    condition, factor = data.cond["condition"], 1.0
    if isinstance(module, SCM):
        sigma, factor = torch.linspace(0.3, 2.0, batch, dtype=torch.float64), 1.0 / SD
        module.consistency.draw = lambda *_: torch.atan2(sigma, torch.full_like(sigma, SD))
        theirs = peer._compute_scm_loss(data.x0, sigma, condition, iteration=10**9)[0].mean()
    else:
        t = torch.linspace(0.4, 0.8, batch, dtype=torch.float64)
        r = 0.5 * t
        module.pair_times = lambda _: (t, r)
        theirs = peer._compute_mf_loss(data.x0, t, r, iteration=10**9, condition=condition)[0].mean()
    ours = factor * module.weighted_sum("student", module.student_loss(data))
    theirs.backward()
    ours.backward()
    named = {name: p.grad for name, p in peer.net.named_parameters() if p.grad is not None and "logvar" not in name}
    mine = dict(module.student.network.named_parameters())
    a, b = (torch.cat([g.flatten() for g in grads]) for grads in (named.values(), [mine[n].grad for n in named]))
    loss = float((theirs - ours).detach().abs() / theirs.detach().abs())
    return {f"{variant}/loss": loss, f"{variant}/student": float((a - b).norm() / a.norm())}


# ---------------------------------------------------------------------------------------------------- measuring
def measure(library: SimpleNamespace, variant: str, side: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Both sides of one comparison."""
    state = dict.fromkeys(("teacher", "student"), network(library, variant).state_dict())
    batch = examples(args.batch)
    peer = TangentPeer(library, variant, state, peer_data(batch))
    module = method(library, variant, state, **SIDES[side])
    probe = Alternate(peer, args.batch, args.block)
    trainer = bare_trainer(max_steps=2 + args.block * args.repeats, callbacks=[probe])
    trainer.fit(module, DataLoader(Repeated(batch), batch_size=None))
    sides = {"peer": (PEER, peer.model, peer.optimizers), "ours": (side, module, trainer.optimizers)}
    rows: list[dict[str, Any]] = []
    for key, (name, model, optimizers) in sides.items():
        floor = floor_bytes((*model.parameters(), *model.buffers()), optimizers)
        kind = variant.split()[0]
        rows.append(row(variant, name, probe.seconds[key], probe.counted[key], floor, args.batch, kind))
    compare(*rows)
    return rows


def tangents(library: SimpleNamespace, args: argparse.Namespace) -> dict[str, Any]:
    """Check, measure, print a table and write ``tangents_fastgen``."""
    rows, differences = [], {}
    for variant in args.variants:
        for settings in SIDES.values():
            if settings.get("tangent", "jvp") == "jvp":
                found = check(library, variant, **settings)
                differences |= {key: max(value, differences.get(key, 0.0)) for key, value in found.items()}
    print("relative differences on equal draws:", {k: f"{v:.1e}" for k, v in differences.items()}, flush=True)
    if (worst := max(differences.values())) > 1e-4:
        raise SystemExit(f"the two sides differ by {worst:.1e} on equal draws, so their speeds cannot be compared.")
    for variant in args.variants:
        for side in SIDES:
            rows += measure(library, variant, side, args)
            for entry in rows[-2:]:
                print(line(entry), flush=True)
    figures = {"rows": rows, "equality": differences, "repeats": args.repeats}
    write_result("tangents_fastgen", figures, seeds=[0])
    return figures
