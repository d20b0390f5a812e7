"""What `balance_over_ranks` changes and refuses; its losses on several ranks: tests/bench/test_training_job.py."""

from __future__ import annotations

import pytest
from torch import nn

from moe_kernels import MoELayer, TokenChoice
from moe_kernels.distributed import TokenChoiceOverRanks, balance_over_ranks


class Own(TokenChoice):
    """Routes another way, for all that a caller knows."""


def layer(router: TokenChoice) -> MoELayer:
    return MoELayer(8, 8, 4, 2, router=router)


def test_routers_become_those_of_all_ranks_once():
    model = nn.Sequential(layer(TokenChoice(2, aux_loss_alpha=0.5)), nn.Linear(8, 8), layer(TokenChoice(2)))
    for _ in range(2):
        assert balance_over_ranks(model) == 2
        assert model[0].router == TokenChoiceOverRanks(2, 0.5) and model[2].router == TokenChoiceOverRanks(2)


def test_other_routers_are_refused_and_none_is_changed():
    model = nn.Sequential(layer(TokenChoice(2)), layer(Own(2)))
    with pytest.raises(TypeError, match="got router Own in 1, expected TokenChoice"):
        balance_over_ranks(model)
    assert type(model[0].router) is TokenChoice
    with pytest.raises(ValueError, match="without a MoELayer"):
        balance_over_ranks(nn.Linear(8, 8))
