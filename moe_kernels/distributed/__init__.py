"""Several processes: expert parallelism, beside FSDP2 and DDP, on torch.distributed."""

from . import checkpoints
from .balance import TokenChoiceOverRanks, balance_over_ranks
from .dispatchers import Arrived, BoundedDispatcher, Dispatcher, ExactDispatcher
from .expert_parallel import ExpertParallelLayer, expert_parallel
from .grouped import experts_on_rows
from .in_sync import check_in_sync
from .optimizer import AdamW, clip_grad_norm
from .parallel import data_parallel, fully_shard
from .stacking import stack_experts

__all__ = [
    "AdamW",
    "Arrived",
    "BoundedDispatcher",
    "Dispatcher",
    "ExactDispatcher",
    "ExpertParallelLayer",
    "TokenChoiceOverRanks",
    "balance_over_ranks",
    "check_in_sync",
    "checkpoints",
    "clip_grad_norm",
    "data_parallel",
    "expert_parallel",
    "experts_on_rows",
    "fully_shard",
    "stack_experts",
]
