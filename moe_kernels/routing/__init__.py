"""Routers: which experts work on which tokens."""

from .call import RouterCall
from .diffmoe import DiffMoE
from .expert_choice import ExpertChoice
from .losses import router_similarity_loss, routing_contrastive_loss
from .promoe import ProMoE
from .race import ExpertRace
from .router import AUX_LOSS_MODES, Router, Scores
from .token_choice import GroupLimitedChoice, TokenChoice

__all__ = [
    "AUX_LOSS_MODES",
    "DiffMoE",
    "ExpertChoice",
    "ExpertRace",
    "GroupLimitedChoice",
    "ProMoE",
    "Router",
    "RouterCall",
    "Scores",
    "TokenChoice",
    "router_similarity_loss",
    "routing_contrastive_loss",
]
