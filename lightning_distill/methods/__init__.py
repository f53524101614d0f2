"""Distillation methods; every module of this package is imported by the command line, so a new file is enough."""

from lightning_distill.methods.ac_dmd import ACDMD
from lightning_distill.methods.accvideo import AccVideo
from lightning_distill.methods.adm import ADM
from lightning_distill.methods.adversarial import AdversarialMethod, RatioMethod
from lightning_distill.methods.agd import AGD
from lightning_distill.methods.any_flow import AnyFlow, AnyFlowOnPolicy
from lightning_distill.methods.apex import APEX
from lightning_distill.methods.arc_flow import ArcFlow
from lightning_distill.methods.asd import ASD
from lightning_distill.methods.base import DistillationModule, Rollout, Terms
from lightning_distill.methods.boot import BOOT
from lightning_distill.methods.boss import BOSS, Straightening
from lightning_distill.methods.cdm import CDM
from lightning_distill.methods.cmt import CMT
from lightning_distill.methods.consistency_distillation import ConsistencyDistillation
from lightning_distill.methods.consistency_training import ECT, ICT, ConsistencyTraining
from lightning_distill.methods.critic_schedule import UpdateSchedule
from lightning_distill.methods.ctm import CTM
from lightning_distill.methods.ctmsr import CTMSR
from lightning_distill.methods.dcm import DCM
from lightning_distill.methods.decoupled_dmd import DecoupledDMD
from lightning_distill.methods.diff_instruct import DiffInstruct
from lightning_distill.methods.disback import DisBack
from lightning_distill.methods.dmd import DMD
from lightning_distill.methods.dmd2 import DMD2
from lightning_distill.methods.f_distill import FDistill
from lightning_distill.methods.fake_branch import FakeBranch, NegativeTime, ShiftedCondition
from lightning_distill.methods.fake_score import FakeScoreMethod, Scores
from lightning_distill.methods.flash_dmd import FlashDMD
from lightning_distill.methods.flash_vdm import FlashVDM
from lightning_distill.methods.flash_wam import FlashWAM
from lightning_distill.methods.flow_map_distillation import FlowMapDistillation
from lightning_distill.methods.free_flow import CorrectedFreeFlow, FreeFlow
from lightning_distill.methods.gdd import GDD, GDDI
from lightning_distill.methods.gndm import GNDM
from lightning_distill.methods.guidance_distillation import GuidanceDistillation
from lightning_distill.methods.hipa import HiPA
from lightning_distill.methods.knowledge_distillation import InstaFlow, KnowledgeDistillation
from lightning_distill.methods.ladd import ADD, LADD
from lightning_distill.methods.lcm import LCM
from lightning_distill.methods.learned_solver import LearnedSolver
from lightning_distill.methods.mdt_dist import MDTDist
from lightning_distill.methods.mean_flow import MeanFlow
from lightning_distill.methods.mlcm import MLCM
from lightning_distill.methods.msd import MSD
from lightning_distill.methods.nct import NCT
from lightning_distill.methods.oftsr import OFTSR
from lightning_distill.methods.pcm import PCM
from lightning_distill.methods.phased_dmd import PhasedDMD
from lightning_distill.methods.pi_flow import PiFlow
from lightning_distill.methods.progressive import ProgressiveDistillation
from lightning_distill.methods.rcm import RCM
from lightning_distill.methods.reflow import Reflow
from lightning_distill.methods.regression import PairRegression
from lightning_distill.methods.rewarded_dmd import RewardedDMD
from lightning_distill.methods.rf_plus_plus import RFPlusPlus
from lightning_distill.methods.rose_cd import ROSECD
from lightning_distill.methods.sana_sprint import SANASprint
from lightning_distill.methods.sc_dmd import SCDMD
from lightning_distill.methods.scm import SCM
from lightning_distill.methods.scott import SCott
from lightning_distill.methods.shortcut import Shortcut
from lightning_distill.methods.sid import SiD
from lightning_distill.methods.slim_flow import SlimFlow, SlimFlowDistillation
from lightning_distill.methods.snap_flow import SnapFlow
from lightning_distill.methods.splam import SPLAM
from lightning_distill.methods.swiftbrush import SwiftBrush
from lightning_distill.methods.tad_sr import TADSR
from lightning_distill.methods.tbcm import TBCM
from lightning_distill.methods.tcm import TCM
from lightning_distill.methods.tdm import TDM
from lightning_distill.methods.teacher_training import TeacherTraining
from lightning_distill.methods.tiue import TiUE
from lightning_distill.methods.tscd import TSCD
from lightning_distill.methods.twin_flow import TwinFlow
from lightning_distill.methods.uni_instruct import UniInstruct
from lightning_distill.methods.vdot import VDOT
from lightning_distill.methods.video_scene import VideoScene
from lightning_distill.methods.vsd import VSD
from lightning_distill.methods.yonos import YONOS

__all__ = [
    "ACDMD",
    "ADD",
    "ADM",
    "AGD",
    "APEX",
    "ASD",
    "BOOT",
    "BOSS",
    "CDM",
    "CMT",
    "CTM",
    "CTMSR",
    "DCM",
    "DMD",
    "DMD2",
    "ECT",
    "GDD",
    "GDDI",
    "GNDM",
    "ICT",
    "LADD",
    "LCM",
    "MLCM",
    "MSD",
    "NCT",
    "OFTSR",
    "PCM",
    "RCM",
    "ROSECD",
    "SCDMD",
    "SCM",
    "SPLAM",
    "TADSR",
    "TBCM",
    "TCM",
    "TDM",
    "TSCD",
    "VDOT",
    "VSD",
    "YONOS",
    "AccVideo",
    "AdversarialMethod",
    "AnyFlow",
    "AnyFlowOnPolicy",
    "ArcFlow",
    "ConsistencyDistillation",
    "ConsistencyTraining",
    "CorrectedFreeFlow",
    "DecoupledDMD",
    "DiffInstruct",
    "DisBack",
    "DistillationModule",
    "FDistill",
    "FakeBranch",
    "FakeScoreMethod",
    "FlashDMD",
    "FlashVDM",
    "FlashWAM",
    "FlowMapDistillation",
    "FreeFlow",
    "GuidanceDistillation",
    "HiPA",
    "InstaFlow",
    "KnowledgeDistillation",
    "LearnedSolver",
    "MDTDist",
    "MeanFlow",
    "NegativeTime",
    "PairRegression",
    "PhasedDMD",
    "PiFlow",
    "ProgressiveDistillation",
    "RFPlusPlus",
    "RatioMethod",
    "Reflow",
    "RewardedDMD",
    "Rollout",
    "SANASprint",
    "SCott",
    "Scores",
    "ShiftedCondition",
    "Shortcut",
    "SiD",
    "SlimFlow",
    "SlimFlowDistillation",
    "SnapFlow",
    "Straightening",
    "SwiftBrush",
    "TeacherTraining",
    "Terms",
    "TiUE",
    "TwinFlow",
    "UniInstruct",
    "UpdateSchedule",
    "VideoScene",
]
