"""Routers: which experts work on which tokens."""

from .call import RouterCall
from .expert_choice import ExpertChoice
from .router import AUX_LOSS_MODES, Router, Scores
from .token_choice import GroupLimitedChoice, TokenChoice

__all__ = ["AUX_LOSS_MODES", "ExpertChoice", "GroupLimitedChoice", "Router", "RouterCall", "Scores", "TokenChoice"]
