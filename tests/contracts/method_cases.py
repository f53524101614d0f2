"""Every method in several small configurations; the contract tests run on all of them.

A new method needs at least one entry in ``CASES``: how to build it (``build(**overrides)`` passes keyword arguments on
to the method) and the samples it trains on. Keep a cycle within a few milliseconds.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from safetensors.torch import save_file
from torch import nn

from lightning_distill import methods
from lightning_distill.batch import Batch, as_batch
from lightning_distill.data import InMemory, ResumableLoader
from lightning_distill.data.loader import epoch_generator
from lightning_distill.ema import ConstantEMA, PowerEMA
from lightning_distill.guidance import Guidance, RandomGuidance
from lightning_distill.losses.audio import SISDR
from lightning_distill.losses.reward_weights import MeanValue
from lightning_distill.methods import (
    ACDMD,
    ADD,
    ADM,
    AGD,
    APEX,
    ASD,
    BOOT,
    BOSS,
    CDM,
    CMT,
    CTM,
    CTMSR,
    DCM,
    DMD,
    DMD2,
    ECT,
    GDD,
    GDDI,
    GNDM,
    ICT,
    LADD,
    LCM,
    MLCM,
    MSD,
    NCT,
    OFTSR,
    PCM,
    RCM,
    ROSECD,
    SCDMD,
    SCM,
    SPLAM,
    TADSR,
    TBCM,
    TCM,
    TDM,
    TSCD,
    VDOT,
    VSD,
    YONOS,
    AccVideo,
    AnyFlow,
    AnyFlowOnPolicy,
    ArcFlow,
    ConsistencyDistillation,
    ConsistencyTraining,
    CorrectedFreeFlow,
    DecoupledDMD,
    DiffInstruct,
    DisBack,
    DistillationModule,
    FDistill,
    FlashDMD,
    FlashVDM,
    FlashWAM,
    FlowMapDistillation,
    FreeFlow,
    GuidanceDistillation,
    HiPA,
    InstaFlow,
    KnowledgeDistillation,
    LearnedSolver,
    MDTDist,
    MeanFlow,
    PhasedDMD,
    PiFlow,
    ProgressiveDistillation,
    Reflow,
    RewardedDMD,
    RFPlusPlus,
    SANASprint,
    SCott,
    Shortcut,
    SiD,
    SlimFlow,
    SlimFlowDistillation,
    SnapFlow,
    Straightening,
    SwiftBrush,
    TeacherTraining,
    TiUE,
    TwinFlow,
    UniInstruct,
    UpdateSchedule,
    VideoScene,
)
from lightning_distill.methods.solved_pairs import SolvedPairs
from lightning_distill.networks.adversary import Adversary
from lightning_distill.networks.analytic import ring4
from lightning_distill.networks.beside import Beside
from lightning_distill.networks.concatenated import concatenated
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.experts import Experts
from lightning_distill.networks.frozen_features import FrozenFeatures
from lightning_distill.networks.guidance_adapters import GuidanceAdapters
from lightning_distill.networks.roles import Lora
from lightning_distill.networks.shared_encoder import SharedEncoder
from lightning_distill.networks.small import ResidualMLP, small_dit, small_text_unet, small_unet
from lightning_distill.networks.specs import seeded
from lightning_distill.networks.stream_mixture import ring_action
from lightning_distill.networks.streams import StreamDenoiser, StreamMLP, StreamsNetwork
from lightning_distill.networks.teacher_features import TeacherFeatures
from lightning_distill.networks.two_time import TwoTime
from lightning_distill.processes import EDM, FlowMatching, ResidualShift, TrigFlow, VariancePreserving
from lightning_distill.schedules import WarmupDecay
from lightning_distill.streams import Stream, StreamProcess
from lightning_distill.times import Karras, LogNormal, Uniform

#: samples per phase and update
BATCH = 8
#: updates of an epoch of every case
EPOCH = 5
#: of the order of samples
LOADER_SEED = 3


# ------------------------------------------------------------------------------------------------ networks and data
def random_weights(network: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that make every layer count: fresh output layers and gates are near zero."""
    with seeded(seed):
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.25)
    return network


def flow_mlp(num_classes: int = 0) -> Denoiser:
    network = random_weights(ResidualMLP((2,), width=8, depth=2, num_classes=num_classes))
    return Denoiser(network, FlowMatching(), "flow_prediction", sigma_data=1.12)


def edm_mlp() -> Denoiser:
    network = random_weights(ResidualMLP((2,), width=8, depth=2))
    return Denoiser(network, EDM(0.02, 10.0), "v_prediction", network_process=TrigFlow(), sigma_data=1.12)


def vp_mlp() -> Denoiser:
    network = random_weights(ResidualMLP((2,), width=8, depth=2, num_classes=4))
    process = VariancePreserving(zero_terminal_snr=True)
    return Denoiser(network, process, "v_prediction", sigma_data=1.12)


def vp_epsilon_mlp() -> Denoiser:
    network = random_weights(ResidualMLP((2,), width=8, depth=2, num_classes=4))
    return Denoiser(network, VariancePreserving(), "epsilon", sigma_data=1.12)


def vp_unet() -> Denoiser:
    network = small_unet(8, 1, 0, (8, 16), norm_num_groups=4, attention_head_dim=8)
    return Denoiser(random_weights(network), VariancePreserving(), "epsilon", sigma_data=0.5)


def flow_unet() -> Denoiser:
    network = small_unet(8, 1, 0, (8, 16), norm_num_groups=4, attention_head_dim=8)
    return Denoiser(random_weights(network), FlowMatching(), "flow_prediction", sigma_data=0.5)


def flow_dit() -> Denoiser:
    network = small_dit(
        8, 1, 3, patch_size=4, num_layers=1, num_attention_heads=1, attention_head_dim=8, learned_variance=True
    )
    return Denoiser(random_weights(network), FlowMatching(shift=2.0), "flow_prediction", sigma_data=0.5)


def text_unet() -> Denoiser:
    network = small_text_unet(8, 1, 4, (8,), 1, norm_num_groups=4, num_heads=1, pooling_heads=1)
    null = {"encoder_hidden_states": torch.full((1, 3, 4), 0.5)}
    process = VariancePreserving(zero_terminal_snr=True)
    return Denoiser(random_weights(network), process, "v_prediction", sigma_data=0.5, null_cond=null)


def restoring_mlp(residual_shift: bool = False) -> Denoiser:
    network = random_weights(ResidualMLP((4,), width=8, depth=2))
    process = ResidualShift(0.5) if residual_shift else FlowMatching()
    return Denoiser(concatenated(network, 2, residual_shift), process, "flow_prediction", sigma_data=1.12)


def streams_mlp() -> Denoiser:
    process = StreamProcess({"video": Stream([2], 5.0), "action": Stream([1])})
    module = random_weights(StreamMLP({"video": [2], "action": [1]}, width=8, depth=2, num_classes=8))
    return StreamDenoiser(StreamsNetwork(module, process), process, "flow_prediction", sigma_data=1.25)


def streams() -> Batch:
    """Points of a ring with actions, as dictionaries."""
    x0, labels = ring_action(labelled=True).sample(2 * EPOCH * BATCH, torch.Generator().manual_seed(0))
    return as_batch({"x0": {"action": x0[:, :1], "video": x0[:, 1:]}, "cond": {"class_labels": labels}})


class Rounded:
    """A control of points."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x.round()


def degraded_points(**finer: int) -> Batch:
    """Points with their rounded positions, and with finer ones by name."""
    batch = points()
    assert batch.x0 is not None
    return Batch(x0=batch.x0, cond={k: (n * batch.x0).round() / n for k, n in {"low": 1, **finer}.items()})


def points(labelled: bool = False) -> Batch:
    """Points of ring4, enough for ``EPOCH`` updates of two slices."""
    x0, labels = ring4(labelled=True).sample(2 * EPOCH * BATCH, torch.Generator().manual_seed(0))
    return Batch(x0=x0, cond={"class_labels": labels} if labelled else {})


def rarely_labelled() -> Batch:
    """Conditions alone: class 2 in the first place of each of the loader's batches in its first epoch, else 0 and 1."""
    n = 2 * EPOCH * BATCH
    labels = torch.arange(n) % 2
    labels[torch.randperm(n, generator=epoch_generator(LOADER_SEED, 0))[::BATCH]] = 2
    return Batch(cond={"class_labels": labels}, size=n)


def images(num_classes: int = 0) -> Batch:
    n = 2 * EPOCH * BATCH
    x0 = 0.5 * torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return Batch(x0=x0, cond={"class_labels": torch.arange(n) % num_classes} if num_classes else {})


def captioned() -> Batch:
    batch = images()
    tokens = torch.randn(batch.size, 3, 4, generator=torch.Generator().manual_seed(1))
    return Batch(x0=batch.x0, cond={"encoder_hidden_states": tokens})


def without_data(batch: Batch) -> Batch:
    return Batch(cond=batch.cond, size=batch.size)


# ------------------------------------------------------------------------------------------------ cases
@dataclass
class Case:
    """One configuration of one method.

    Attributes:
        name: identifier of the test.
        method: class under test.
        network: makes the teacher, or the network that ``TeacherTraining`` trains.
        data: training samples.
        settings: makes the method's keyword arguments; a directory for files is passed in.
    """

    name: str
    method: type[DistillationModule]
    network: Callable[[], Denoiser]
    data: Callable[[], Batch]
    settings: Callable[[Path], dict[str, Any]]

    def build(self, folder: Path, **overrides: Any) -> DistillationModule:
        """The method with its networks; equal weights at every call.

        All trained networks are moved away from the teacher, where the score difference is exactly zero.
        """
        module = self.method(self.network(), **{**self.settings(folder), **overrides})
        module.configure_model()
        with seeded(7), torch.no_grad():
            for role in {role: None for roles in module.phases.values() for role in roles}:
                for parameter in module.role_parameters(role):
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return module

    def loader(self, module: DistillationModule, batch_size: int = BATCH) -> ResumableLoader:
        return ResumableLoader(InMemory(self.data()), batch_size, slices=module.slices_per_cycle, seed=LOADER_SEED)


def decaying(optimizer: torch.optim.Optimizer) -> WarmupDecay:
    return WarmupDecay(optimizer, warmup_steps=2, total_steps=20, decay="cosine")


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2, betas=(0.0, 0.99), fused=True)


def dmd2(**settings: Any) -> Callable[[Path], dict[str, Any]]:
    common: dict[str, Any] = {
        "fake_score_steps": 2,
        "student_optimizer": adam,
        "fake_score_optimizer": adam,
        "student_scheduler": decaying,
        "fake_score_scheduler": decaying,
    }
    return lambda folder: {**common, **{k: v() if inspect.isfunction(v) else v for k, v in settings.items()}}


def small_features() -> FrozenFeatures:
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 8, 3, 2, padding=1), nn.SiLU())
    return FrozenFeatures(random_weights(network), ["1", "3"])


def ladd(**settings: Any) -> Callable[[Path], dict[str, Any]]:
    common: dict[str, Any] = {
        "student_optimizer": adam,
        "discriminator_optimizer": adam,
        "student_scheduler": decaying,
        "discriminator_scheduler": decaying,
    }
    return lambda folder: {**common, **{k: v() if inspect.isfunction(v) else v for k, v in settings.items()}}


def training(**settings: Any) -> Callable[[Path], dict[str, Any]]:
    common: dict[str, Any] = {"student_optimizer": adam, "student_scheduler": decaying, "label_dropout": 0.0}
    return lambda folder: {**common, **settings}


def mapping(**settings: Any) -> Callable[[Path], dict[str, Any]]:
    common: dict[str, Any] = {"student_optimizer": adam, "student_scheduler": decaying}
    return lambda folder: {**common, **{k: v() if inspect.isfunction(v) else v for k, v in settings.items()}}


def with_pairs(folder: Path) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    noise, x0 = (torch.randn(12, 2, generator=generator) for _ in range(2))
    save_file({"noise": noise, "x0": x0}, folder / "pairs.safetensors")
    return {**dmd2()(folder), "regression_pairs": str(folder / "pairs.safetensors")}


def heads(**settings: Any) -> Callable[[], Adversary]:
    return lambda: Adversary(**{"taps": ("blocks.0",), "width": 4, **settings})


def without_warm_up(case: Case) -> dict[str, Any]:
    """Settings with which the first cycle of a case is like the others."""
    return {"regression_steps": 0, "regression_pairs": None} if case.name.startswith("regression") else {}


def coupled(batch: Batch) -> Batch:
    """Samples with noise that belongs to them."""
    assert batch.x0 is not None
    noise = torch.randn(batch.x0.shape, generator=torch.Generator().manual_seed(6))
    return Batch(cond=batch.cond, x0=batch.x0, noise=noise)


CASES: list[Case] = [
    Case("one_step", DMD2, flow_mlp, lambda: without_data(points()), dmd2(ema=lambda: [ConstantEMA(0.5)])),
    Case("fresh_samples", DMD2, flow_mlp, lambda: without_data(points()), dmd2(fresh_samples=True)),
    Case("edm", DMD2, edm_mlp, lambda: without_data(points()), dmd2(
        student_times=[2.5], matching_times=Karras(0.02, 10.0), critic_times=Karras(0.02, 10.0)
    )),
    Case("two_step_renoise", DMD2, flow_mlp, lambda: without_data(points()), dmd2(num_steps=2)),
    Case("two_step_ode", DMD2, flow_mlp, lambda: without_data(points()), dmd2(num_steps=2, sampler="ode")),
    Case("two_step_vp", DMD2, vp_mlp, lambda: without_data(points(labelled=True)), dmd2(num_steps=2)),
    Case("gan_fake_score", DMD2, flow_mlp, points, dmd2(gan=heads())),
    Case("gan_teacher", DMD2, flow_mlp, points, dmd2(gan=heads(features="teacher", times=Uniform(0.1, 0.9)))),
    Case("gan_input", DMD2, flow_mlp, points, dmd2(gan=heads(taps=("input",)))),
    Case("lora", DMD2, flow_mlp, lambda: without_data(points()), dmd2(
        student=lambda: Lora(rank=2), fake_score=lambda: Lora(rank=3), ema=lambda: [PowerEMA(0.05), PowerEMA(0.1)]
    )),
    Case("guidance", DMD2, lambda: flow_mlp(4), lambda: without_data(points(labelled=True)), dmd2(
        guidance=Guidance(2.0)
    )),
    Case("shared_3", DMD2, flow_mlp, lambda: without_data(points()), dmd2(
        fake_score_steps=3, updates_per_sample=2
    )),
    Case("shared_4", DMD2, vp_mlp, lambda: without_data(points(labelled=True)), dmd2(
        fake_score_steps=4, updates_per_sample=2, weight="vsd"
    )),
    Case("by_the_lag", DMD2, lambda: flow_mlp(4), lambda: without_data(points(labelled=True)), dmd2(
        # measured and decided within three updates; the number may change in the fourth
        critic_schedule=UpdateSchedule(1, 2, every=2), guidance=Guidance(2.0)
    )),
    Case("accumulate", DMD2, flow_mlp, points, dmd2(gan=heads(), accumulate_grad_batches=2, num_steps=2)),
    Case("rare_expert", DMD2, lambda: flow_mlp(4), rarely_labelled, dmd2(
        student=lambda: Experts(classes=[[0, 1], [2, 3]]), accumulate_grad_batches=2, fake_score_steps=1
    )),
    Case("regression", DMD2, flow_mlp, lambda: without_data(points()), lambda folder: {
        **with_pairs(folder), "regression_steps": 3
    }),
    Case("regression_solved", DMD2, flow_mlp, lambda: without_data(points()), dmd2(
        regression_pairs=lambda: SolvedPairs(num=7, steps=2, batch_size=4),
        regression_distance=lambda: TeacherFeatures(["blocks.0"]),
        regression_steps=2,
    )),
    Case("unet_gan", DMD2, vp_unet, images, dmd2(
        gan=heads(taps=("mid_block",)), matching_times=Uniform(0.02, 0.9), student_times=[0.5]
    )),
    Case("dit_lora", DMD2, flow_dit, lambda: without_data(images(3)), dmd2(
        student=lambda: Lora(rank=2), fake_score=lambda: Lora(rank=2), guidance=Guidance(1.5)
    )),
    Case("gan_relativistic", DMD2, flow_mlp, points, dmd2(gan=heads(kind="relativistic"))),
    Case("gan_at_scores", DMD2, flow_mlp, points, dmd2(gan=heads(features="teacher"), gan_at_scores=True)),
    Case("gan_lazy", DMD2, flow_mlp, points, dmd2(gan=heads(), gan_at_scores=True, gan_every=2, fake_score_steps=2)),
    Case("pairs", DMD, flow_mlp, lambda: without_data(points()), with_pairs),
    Case("lognormal", DiffInstruct, edm_mlp, lambda: without_data(points()), dmd2(student_times=[2.5])),
    Case("lora_critic", VSD, lambda: flow_mlp(4), lambda: without_data(points(labelled=True)), dmd2(
        guidance=Guidance(2.0), fake_score=lambda: Lora(rank=2)
    )),
    Case("guided_critic", SwiftBrush, vp_epsilon_mlp, lambda: without_data(points(labelled=True)), dmd2(
        guidance=RandomGuidance(1.5, 3.0), student=lambda: Lora(rank=2), critic_dropout=0.3, student_times=[0.5],
        matching_times=Uniform(0.02, 0.9)
    )),
    Case("shared_encoder", TiUE, flow_unet, lambda: without_data(images()), dmd2(
        student=lambda: SharedEncoder(decoders=2), fake_score=lambda: Lora(rank=2), guidance=Guidance(1.0)
    )),
    Case("fisher", SiD, edm_mlp, lambda: without_data(points()), dmd2(student_times=[2.5])),
    Case("fisher_two_step_gan", SiD, flow_mlp, points, dmd2(num_steps=2, gan=heads(), alpha=1.0)),
    Case("zero_cfg", SiD, lambda: flow_mlp(4), lambda: without_data(points(labelled=True)), dmd2(
        fake_guidance=Guidance(0.0), critic_guidance=Guidance(0.0)
    )),
    Case("anti_cfg_gan", SiD, lambda: flow_mlp(4), lambda: points(labelled=True), dmd2(
        fake_guidance=Guidance(-1.0), critic_dropout=0.3, gan=heads()
    )),
    Case("fisher_lora", SiD, flow_mlp, lambda: without_data(points()), dmd2(
        student=lambda: Lora(rank=2), fake_score=lambda: Lora(rank=3)
    )),
    Case("js", FDistill, flow_mlp, points, dmd2(gan=heads(), ratio_bins=3)),
    Case("kl_teacher_features", FDistill, flow_mlp, points, dmd2(gan=heads(features="teacher"), divergence="kl")),
    Case("expanded_kl", UniInstruct, flow_mlp, points, dmd2(gan=heads())),
    Case("expanded_js_teacher_features", UniInstruct, edm_mlp, points, dmd2(
        gan=heads(features="teacher"), divergence="js", student_times=[2.5]
    )),
    Case("told_step", DMD2, flow_mlp, points, dmd2(num_steps=2, critic_condition_on="step", gan=heads())),
    Case("told_interval_lora", DMD2, flow_mlp, lambda: without_data(points()), dmd2(
        num_steps=2, critic_condition_on="interval", fake_score=lambda: Lora(rank=3)
    )),
    Case("trajectory", TDM, flow_mlp, lambda: without_data(points()), dmd2(num_steps=2, rollout_step="batch")),
    Case("trajectory_x0", TDM, vp_mlp, lambda: without_data(points(labelled=True)), dmd2(
        critic_target="x0", guidance=Guidance(2.0), num_steps=2, rollout_step="batch", times_within="all"
    )),
    Case("subintervals", PhasedDMD, flow_mlp, lambda: without_data(points()), dmd2(num_steps=2)),
    Case("subintervals_experts", PhasedDMD, flow_mlp, lambda: without_data(points()), dmd2(
        num_steps=2, fake_score=lambda: Experts(boundaries=[0.75])
    )),
    Case("two_schedules", DecoupledDMD, lambda: flow_mlp(4), lambda: points(labelled=True), dmd2(
        guidance=Guidance(2.0), gan=heads(), num_steps=2
    )),
    Case("beside_the_trajectory", CDM, lambda: flow_mlp(4), lambda: without_data(points(labelled=True)), dmd2(
        guidance=Guidance(2.0), random_steps=0, num_steps=2, critic_pull=0.01
    )),
    Case("teacher_heads", LADD, flow_mlp, points, ladd(gan=heads(features="teacher"), r1="approximate")),
    Case("told_heads", LADD, lambda: flow_mlp(4), lambda: points(labelled=True), ladd(
        gan=heads(taps=("input",), features="teacher", classes=True)
    )),
    Case("distance_and_r1", ADD, flow_mlp, points, ladd(gan=heads(features="teacher", kind="hinge"), r1="exact")),
    Case("back_to_the_step", ACDMD, flow_mlp, lambda: without_data(points()), dmd2(num_steps=2)),
    Case("next_points", ADM, lambda: flow_mlp(4), lambda: without_data(points(labelled=True)), dmd2(
        gan=heads(features="teacher", kind="hinge"), guidance=Guidance(2.0), step_share=0.3
    )),
    Case("one_against_two", ASD, flow_mlp, lambda: without_data(points()), dmd2(gan=heads(), most_steps=2)),
    Case("groups", GNDM, lambda: flow_mlp(4), lambda: without_data(points(labelled=True)), dmd2(
        guidance=Guidance(2.0), group_size=2
    )),
    Case("groups_with_rewards", GNDM, flow_mlp, lambda: without_data(points()), dmd2(
        group_size=2, reward=lambda: MeanValue(channel=0)
    )),
    Case("one_student", MSD, lambda: flow_mlp(4), lambda: without_data(points(labelled=True)), dmd2(
        classes=[[0, 1, 2, 3]]
    )),
    Case("weighted", RewardedDMD, flow_mlp, points, dmd2(
        reward=lambda: MeanValue(), saliency=0.5, gan=heads(), loss_weights={"student/gan": 0.1}
    )),
    Case("told_heads_of_the_critic", DMD2, lambda: flow_mlp(4), lambda: points(labelled=True), dmd2(
        gan=heads(taps=("blocks.0", "input"), classes=True)
    )),
    Case("halves", FlashDMD, flow_mlp, points, dmd2(gan=heads(taps=("input",)), student_times=[0.5], switch=0.6)),
    Case("endpoints", SCDMD, flow_mlp, lambda: without_data(points()), dmd2(num_steps=2)),
    Case("transport", VDOT, flow_mlp, lambda: without_data(points()), dmd2(group_size=2)),
    Case("clean_images", GDD, vp_unet, images, ladd(features=small_features, student_times=[0.5])),
    Case("clean_images_frozen", GDDI, vp_unet, images, ladd(
        features=small_features, student_times=[0.5], kind="hinge", r1="exact"
    )),
    Case("blended_target", DisBack, flow_mlp, lambda: without_data(points()), dmd2(blend=0.5, blend_updates=5)),
    Case("pairs_heun", ConsistencyDistillation, flow_mlp, points, mapping(
        intervals=4, target_ema=lambda: ConstantEMA(0.5)
    )),
    Case("pairs_edm", ConsistencyDistillation, edm_mlp, points, mapping(intervals=4, solver="euler")),
    Case("pairs_of_data", ConsistencyTraining, flow_mlp, points, mapping(total_updates=5, last_intervals=8)),
    Case("doubling", ICT, edm_mlp, points, mapping(total_updates=5, first_intervals=2, last_intervals=8)),
    Case("tuning", ECT, edm_mlp, points, mapping(stage_updates=2)),
    Case("truncated", TCM, edm_mlp, points, mapping(first_stage=2)),
    Case("told_scales", LCM, vp_epsilon_mlp, lambda: points(labelled=True), mapping(
        guidance=RandomGuidance(1.5, 3.0), intervals=5
    )),
    Case("phases", PCM, flow_mlp, points, mapping(num_steps=1, intervals=4)),
    Case("merging", TSCD, flow_mlp, points, ladd(
        segments=[2, 1], segment_updates=1, intervals=4, gan=heads(features="teacher")
    )),
    Case("merging_solved", MLCM, lambda: flow_mlp(4), lambda: without_data(points(labelled=True)), mapping(
        segments=[2, 1], segment_updates=1, intervals=4, trajectory_pairs=3, guidance=Guidance(2.0)
    )),
    Case("phases_gan", PCM, flow_mlp, points, ladd(
        num_steps=1, intervals=4, gan=heads(features="teacher", kind="relativistic"), gan_real="data"
    )),
    Case("sub_paths", SPLAM, flow_mlp, points, mapping(
        intervals=4, student=lambda: TwoTime(kind=None, guidance=True)
    )),
    Case("halving", ProgressiveDistillation, flow_mlp, points, mapping(stages=1)),
    Case("continuous", SCM, flow_mlp, points, mapping(warmup_updates=2)),
    Case("continuous_data", SCM, edm_mlp, points, mapping(
        from_data=True, tangent="central", tangent_step=0.01, adaptive=False
    )),
    Case("solver_points", TBCM, lambda: flow_mlp(4), lambda: without_data(points(labelled=True)), mapping(
        warmup_updates=2, solver_steps=3, guidance=Guidance(2.0)
    )),
    Case("gaps", AnyFlow, flow_mlp, points, mapping(tangent_step=0.01)),
    Case("simulated_map", AnyFlowOnPolicy, lambda: flow_mlp(4), lambda: points(labelled=True), dmd2(
        rollout_steps=[2], fake_score_steps=1, guidance=Guidance(2.0), from_data=False, tangent_step=0.01
    )),
    Case("twins", TwinFlow, flow_mlp, points, mapping()),
    Case("twins_lora", TwinFlow, flow_dit, lambda: images(3), mapping(
        student=lambda: TwoTime(role=Lora(rank=2), kind="scaled_difference"), from_data=False
    )),
    Case("shifted_twin", APEX, lambda: flow_mlp(4), lambda: points(labelled=True), mapping()),
    Case("own_critic", MDTDist, lambda: flow_mlp(4), lambda: points(labelled=True), mapping(
        guidance=Guidance(2.0), distillation_guidance=Guidance(3.0)
    )),
    Case("average_velocity", MeanFlow, flow_mlp, points, mapping()),
    Case("average_velocity_data", MeanFlow, lambda: flow_mlp(4), lambda: points(labelled=True), mapping(
        from_data=True, tangent="one_sided", tangent_step=0.01, equal_share=0.25
    )),
    Case("lagrangian", FlowMapDistillation, flow_mlp, points, mapping()),
    Case("eulerian", FlowMapDistillation, flow_mlp, points, mapping(
        objective="eulerian", tangent="central", tangent_step=0.01
    )),
    Case("semigroup", FlowMapDistillation, edm_mlp, points, mapping(objective="progressive")),
    Case("step_sizes", Shortcut, flow_mlp, points, mapping(equal_share=0.5)),
    Case("generating_velocity", FreeFlow, flow_mlp, lambda: without_data(points()), mapping()),
    Case("generating_corrected", CorrectedFreeFlow, lambda: flow_mlp(4), lambda: without_data(points(labelled=True)),
         dmd2(fake_score_steps=1, guidance=Guidance(2.0))),
    Case("signal", BOOT, flow_mlp, lambda: without_data(points()), mapping()),
    Case("pairs_made", Reflow, flow_mlp, lambda: without_data(points()), mapping(solver_steps=2)),
    Case("pairs_stored", Reflow, vp_mlp, lambda: coupled(points(labelled=True)), mapping(
        sampler="heun", num_steps=2
    )),
    Case("pairs_both_ends", RFPlusPlus, edm_mlp, lambda: coupled(points()), mapping()),
    Case("pairs_annealed", SlimFlow, flow_mlp, lambda: coupled(points()), mapping(annealing_updates=2)),
    Case("pairs_guided", SlimFlowDistillation, lambda: flow_mlp(4), lambda: coupled(points(labelled=True)), mapping(
        guidance=Guidance(2.0)
    )),
    Case("pairs_one_step", InstaFlow, vp_mlp, lambda: coupled(points(labelled=True)), mapping()),
    Case("pairs_perceived", InstaFlow, vp_unet, lambda: coupled(images()), mapping(
        perceptual=TeacherFeatures(["mid_block"])
    )),
    Case("pairs_on_the_way", KnowledgeDistillation, flow_mlp, lambda: without_data(points()), mapping(
        num_steps=2, solver_steps=3, metric="mse"
    )),
    Case("key_chords", Straightening, flow_mlp, lambda: without_data(points()), mapping(num_steps=2, solver_steps=3)),
    Case("knots", BOSS, lambda: flow_mlp(4), lambda: without_data(points(labelled=True)), mapping(
        num_steps=2, solver_steps=5, guidance=Guidance(2.0)
    )),
    Case("times_alone", LearnedSolver, lambda: flow_mlp(4), lambda: without_data(points(labelled=True)), mapping(
        num_steps=3, solver_steps=5, guidance=Guidance(2.0)
    )),
    Case("times_and_coefficients", LearnedSolver, flow_mlp, lambda: without_data(points()), mapping(
        num_steps=2, solver_steps=3, coefficients="all"
    )),
    Case("fine_detail", HiPA, vp_unet, lambda: coupled(images()), mapping(student=lambda: Lora(rank=2))),
    Case("key_points", AccVideo, flow_mlp, lambda: without_data(points()), ladd(
        gan=heads(features="teacher"), num_steps=2, solver_steps=2
    )),
    Case("one_scale", GuidanceDistillation, lambda: flow_mlp(4), lambda: points(labelled=True), mapping(
        guidance=Guidance(3.0), student=lambda: Lora(rank=2)
    )),
    Case("any_scale", GuidanceDistillation, lambda: flow_mlp(4), lambda: points(labelled=True), mapping(
        guidance=RandomGuidance(1.0, 3.0), student=lambda: TwoTime(kind=None, guidance=True)
    )),
    Case("guided_states", AGD, lambda: flow_mlp(4), lambda: without_data(points(labelled=True)), mapping(
        student=lambda: GuidanceAdapters(width=8, heads=2), solver_steps=2, ema=lambda: [ConstantEMA(0.5)]
    )),
    Case("solver_states", CMT, flow_mlp, lambda: without_data(points()), mapping(solver_steps=3)),
    Case("solver_chords", CMT, flow_mlp, lambda: without_data(points()), mapping(
        solver_steps=3, form="flow_map", sampler="flow_map", student=lambda: TwoTime()
    )),
    Case("score_regularised", RCM, flow_mlp, points, dmd2(matching_from=0, warmup_updates=2)),
    Case("sprint", SANASprint, flow_mlp, points, ladd(gan=heads(features="teacher", kind="hinge"), warmup_updates=2)),
    Case("policies", PiFlow, flow_mlp, points, mapping(
        num_steps=1, components=2, points=2, substeps=2, decay_updates=4, dropout=0.2, window=0.1
    )),
    Case("modes", ArcFlow, flow_mlp, lambda: without_data(points()), mapping(
        num_steps=1, components=2, points=1, decay_updates=2, data_free=True
    )),
    Case("own_steps", SnapFlow, flow_mlp, points, mapping()),
    Case("soft_consistency", CTM, flow_mlp, points, ladd(
        intervals=4, solver_steps=2, target_ema=lambda: ConstantEMA(0.5), gan=heads(features="teacher", kind="hinge")
    )),
    Case("stochastic", SCott, edm_mlp, points, ladd(
        intervals=4, sub_steps=2, gan=heads(features="teacher", kind="hinge"), target_ema="none"
    )),
    Case("detail_expert", DCM, flow_mlp, points, ladd(
        # a seed that gives the first updates to the detail expert, and whose rollouts, of which none is made, have no
        # earlier steps to count
        intervals=6, semantic_intervals=3, frame_lag=None, gan=heads(features="teacher", kind="hinge"), seed=3183
    )),
    Case("expert_after_expert", DCM, flow_mlp, points, mapping(
        intervals=6, semantic_intervals=3, frame_lag=None, semantic_updates=4, seed=9
    )),
    Case("from_a_source", OFTSR, flow_mlp, lambda: Batch(noise=points().x0), mapping(
        perturbation=0.1
    )),
    Case("moved_grid", ROSECD, flow_mlp, points, mapping(intervals=4, auxiliary=lambda: {"si_sdr": SISDR()})),
    Case("from_a_rendering", VideoScene, flow_mlp, lambda: replace(points(), noise=points().x0), mapping(
        intervals=6
    )),
    Case("streams", FlashWAM, streams_mlp, streams, mapping(
        intervals=4, guidance=Guidance(2.0), guided=["video"]
    )),
    Case("streams_heun", FlashWAM, streams_mlp, streams, mapping(solver="heun", target_ema="none", num_steps=2)),
    Case("stages", FlashVDM, flow_mlp, points, ladd(
        num_steps=1, intervals=4, guidance_updates=0, gan_from=0, skips=lambda: [1, 2], gan=heads(features="teacher")
    )),
    Case("easier_condition", YONOS, restoring_mlp, lambda: degraded_points(low_2=2, low_4=4), mapping(
        easier=lambda: [{"low": "low_4"}, {"low": "low_2"}], stage_updates=3
    )),
    Case("rounded_position", NCT, flow_mlp, lambda: without_data(points()), mapping(
        student=lambda: Beside(restoring_mlp(), "low"), condition="low", control=lambda: Rounded(), intervals=2
    )),
    Case("little_noise", TADSR, restoring_mlp, degraded_points, ladd(
        gan=heads(features="teacher"), solver_steps=2
    )),
    Case("shifted_residual", CTMSR, lambda: restoring_mlp(True), degraded_points, mapping(
        last_intervals=3, trajectory_from=0, proxy_updates=2
    )),
    Case("flow", TeacherTraining, flow_mlp, points, training(ema=[])),
    Case("edm_preconditioned", TeacherTraining, edm_mlp, points, training(training_times=LogNormal())),
    Case("vp_dropout", TeacherTraining, vp_mlp, lambda: points(labelled=True), training(label_dropout=0.3)),
    Case("text_dropout", TeacherTraining, text_unet, captioned, training(label_dropout=0.3)),
]  # fmt: skip


# ------------------------------------------------------------------------------------------------ coverage
def concrete_methods() -> set[type[DistillationModule]]:
    """Methods of the package that can be trained: subclasses that have the loss of each of their phases."""
    for module in pkgutil.iter_modules(methods.__path__, f"{methods.__name__}."):
        importlib.import_module(module.name)
    found, waiting = set(), [DistillationModule]
    while waiting:
        children = waiting.pop().__subclasses__()
        found |= {c for c in children if c.__module__.startswith(f"{methods.__name__}.")}
        waiting += children
    return {c for c in found if all(hasattr(c, f"{phase}_loss") for phase in c.phases)}


def methods_without_case(found: Iterable[type[DistillationModule]]) -> list[str]:
    covered = {case.method for case in CASES}
    return sorted(method.__name__ for method in found if method not in covered)


# ------------------------------------------------------------------------------------------------ runs
class Batches:
    """A loader of given batches."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def trainer(steps: int, **settings: Any) -> Trainer:
    """A quiet Trainer on the CPU."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "max_steps": steps,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1000,
    }
    return Trainer(**{**quiet, **settings})
