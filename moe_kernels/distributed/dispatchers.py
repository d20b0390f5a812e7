"""How routed rows travel to the ranks of their experts, and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from .. import _checks
from ..plan import RoutingPlan
from .exchange import exchange, exchange_counts

OVERFLOWS = ("error", "drop")


@dataclass(frozen=True)
class Arrived:
    """What a rank receives; until `rows` is called, once, they may be on their way."""

    rows: Callable[[], Tensor]  # () -> (R', H): for the experts of this rank, from all ranks
    expert_ids: Tensor  # (R',) int32: which of this rank's experts
    back: Callable[[Tensor], Tensor]  # (R', H) -> (R, H): results to the senders, in the order of the rows taken
    dropped: Tensor | None = None  # (): how many rows of this rank did not travel


class Dispatcher(Protocol):
    """What an expert-parallel layer asks for. Rank r of n owns the experts r E/n to (r+1) E/n."""

    def send(self, take: Callable[[RoutingPlan], Tensor], plan: RoutingPlan, mesh: DeviceMesh) -> Arrived:
        """Send the rows (R, H) that `take` makes of a plan over a mesh of one dimension; differentiable.

        take: called once, with the plan or with its first rows, of which those that there are may not be left out.
        """


@dataclass(frozen=True)
class ExactDispatcher:
    """All-to-all with exchanged counts: every row travels, none is padded.

    Two exchanges before the experts, E int32 and then the rows, one behind them. The sizes of the second are read on
    the host: one sync per layer, in forward. They say how many rows there are, too: what a plan holds behind those
    (thresholds) is not taken.
    """

    def send(self, take: Callable[[RoutingPlan], Tensor], plan: RoutingPlan, mesh: DeviceMesh) -> Arrived:
        """See Dispatcher."""
        ranks = mesh.size()
        counts = plan.expert_counts
        theirs = exchange_counts(counts, mesh)  # (ranks E/ranks,): by sender, by own expert
        splits = torch.stack([counts.view(ranks, -1).sum(1), theirs.view(ranks, -1).sum(1)])
        sent, received = splits.tolist()  # the host sync
        own = torch.arange(counts.shape[0] // ranks, dtype=torch.int32, device=counts.device).repeat(ranks)
        return Arrived(
            exchange(take(plan.first(sum(sent))), received, sent, mesh),
            own.repeat_interleave(theirs, output_size=sum(received)),
            lambda y: exchange(y, sent, received, mesh)(),
        )


@dataclass(frozen=True)
class BoundedDispatcher:
    """All-to-all of buffers whose size is known: `rows_per_expert` rows from each rank to each expert.

    No counts, no host sync, the same shapes in every call: it compiles as one graph and can be captured. What is not
    filled travels as zeros and is computed. With expert choice, capacity times images is the exact bound.

    rows_per_expert: the bound; the same on all ranks.
    overflow: "error": more rows for an expert on any rank raise RuntimeError on all ranks (on a GPU a device-side
        assertion). "drop": rows behind the bound, those of the later tokens, do not travel: their expert adds nothing
        to the token and gets no gradient from it; the layer counts them in `dropped_rows`.
    """

    rows_per_expert: int
    overflow: str = "error"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows_per_expert", _checks.positive("rows_per_expert", self.rows_per_expert))
        if self.overflow not in OVERFLOWS:
            raise ValueError(f"overflow: got {self.overflow!r}, expected one of {', '.join(map(repr, OVERFLOWS))}")

    def send(self, take: Callable[[RoutingPlan], Tensor], plan: RoutingPlan, mesh: DeviceMesh) -> Arrived:
        """See Dispatcher."""
        E, C, R, ranks = plan.num_experts, self.rows_per_expert, plan.num_rows, mesh.size()
        starts, counts = plan.expert_offsets[:-1], plan.expert_counts
        over = (counts - C).clamp(min=0).sum()
        if self.overflow == "error":
            worst = collectives.all_reduce(over, "max", mesh)
            torch._assert_async(worst == 0, f"rows_per_expert: got more rows for an expert on a rank, expected {C}")
        rows = take(plan)
        place = torch.arange(C, dtype=torch.int32, device=rows.device)
        filled = torch.where(place < counts[:, None], starts[:, None] + place, R).flatten()  # R: the row of zeros
        arrived = exchange(_take(rows, filled), None, None, mesh)
        own = torch.arange(E // ranks, dtype=torch.int32, device=rows.device).repeat_interleave(C).repeat(ranks)

        row = torch.arange(R, dtype=torch.int32, device=rows.device)
        expert = torch.searchsorted(plan.expert_offsets[1:], row, right=True, out_int32=True)  # E: behind all of them
        behind = row - plan.expert_offsets[expert]
        slot = torch.where((behind < C) & (expert < E), expert * C + behind, E * C)
        return Arrived(arrived, own, lambda y: _take(exchange(y, None, None, mesh)(), slot), over)


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """Take rows; an index behind the last one takes zeros."""
    return F.pad(rows, (0, 0, 0, 1)).index_select(0, index)
