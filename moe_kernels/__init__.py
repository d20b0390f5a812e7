"""Mixture-of-experts layers for diffusion transformers: four rooms, one plan, several backends."""

from . import _installation  # first: says what to do where torch is missing
from ._checks import set_nonfinite
from .activation import ClampedSwiGLU
from .adapters import replace_moe, restore_moe
from .backends import BackendInfo, backends
from .layer import MoELayer
from .ops import (
    aux_loss,
    combine,
    dispatch,
    dispatch_expert_choice,
    dispatch_mask,
    dispatch_rows,
    experts,
    gating,
    modulated_gating,
    moe_mlp,
    select_experts,
    select_top,
)
from .packing import packed_weights
from .plan import RoutingPlan
from .routing import (
    DiffMoE,
    ExpertChoice,
    ExpertRace,
    GroupLimitedChoice,
    ProMoE,
    Router,
    RouterCall,
    Scores,
    TokenChoice,
)
from .weights import Biases

_installation.warn_of_namesake()

__version__ = "0.1.0"
__all__ = [
    "BackendInfo",
    "Biases",
    "ClampedSwiGLU",
    "DiffMoE",
    "ExpertChoice",
    "ExpertRace",
    "GroupLimitedChoice",
    "MoELayer",
    "ProMoE",
    "Router",
    "RouterCall",
    "RoutingPlan",
    "Scores",
    "TokenChoice",
    "__version__",
    "aux_loss",
    "backends",
    "combine",
    "dispatch",
    "dispatch_expert_choice",
    "dispatch_mask",
    "dispatch_rows",
    "experts",
    "gating",
    "modulated_gating",
    "moe_mlp",
    "packed_weights",
    "replace_moe",
    "restore_moe",
    "select_experts",
    "select_top",
    "set_nonfinite",
]
