"""The rooms as public functions, registered with torch.library under the namespace `moe_kernels`."""

from .adaln import modulated_gating
from .combine import combine
from .dispatch import dispatch, dispatch_expert_choice
from .dispatch_rows import dispatch_mask, dispatch_rows
from .experts import experts
from .gating import aux_loss, gating, inject_aux_loss
from .moe_mlp import moe_mlp
from .selection import select_experts, select_top

from . import _flops  # noqa: F401  # isort: skip  # counts what the modules above have registered

__all__ = [
    "aux_loss",
    "combine",
    "dispatch",
    "dispatch_expert_choice",
    "dispatch_mask",
    "dispatch_rows",
    "experts",
    "gating",
    "inject_aux_loss",
    "modulated_gating",
    "moe_mlp",
    "select_experts",
    "select_top",
]
