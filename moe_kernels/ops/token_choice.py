"""Token choice and the experts behind it as one step of autograd, where nobody looks at the steps in between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from ..plan import RoutingPlan
from ..weights import Biases
from ._expert_weights import Weights, any_needed, by_kind, check, check_biases, check_shared
from ._library import flat, nested, seen
from .dispatch import dispatch_op, dispatch_op_bwd
from .gating import aux_loss_gradient, gating_op, gating_op_bwd
from .moe_mlp import mlp_op, mlp_op_bwd


class How(NamedTuple):
    """What a call of `token_choice_mlp` says beside its tensors."""

    top_k: int
    aux_loss_alpha: float | None  # of the loss whose gradient the weights of the rows carry; None: they carry none
    activation: str
    layout: str
    backend: str
    recompute: bool


def token_choice_mlp(
    x: Tensor, gate_weight: Tensor, weights: Sequence[Weights | None], biases: Biases | None, how: How
) -> Tensor | None:
    """Do what `gating`, `dispatch`, `inject_aux_loss` and `moe_mlp` do one after the other: the same kernels and bits.

    One node of autograd takes a fourth of the time of four on the CPU, which is what small layers on a GPU wait for.

    Args:
        x: (T, H) tokens, as in `moe_mlp`.
        gate_weight: (E, H), as in `gating`.
        weights, biases: those of `moe_mlp`; `how.activation` is spelled.
    Returns: (T, H), or None where the steps have to be taken one by one: under autocast, torch.compile, and whatever
        else sees the ops (see _library.seen).
    Raises: TypeError, ValueError naming the argument, as the ops do.
    """
    if torch.compiler.is_compiling() or not isinstance(x, Tensor) or _checks.compute_dtype(x) != x.dtype:
        return None
    _checks.tensor("x", x, "T,H")
    _checks.router(gate_weight, x, x.shape[1], how.top_k)
    E, ways = gate_weight.shape[0], (how.activation, how.layout)
    (gate_up, down), shared = check(x, E, *weights[:2], *ways), check_shared(x, E, *weights[2:], *ways)
    lists = [gate_up, down, *shared, *check_biases(x, E, biases, *ways, down, shared[1])]
    tensors = flat(lists)
    if seen((x, gate_weight, *tensors)):
        return None
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, gate_weight, *tensors)):
        return _Step.apply(how, [len(kind) for kind in lists], x, gate_weight, *tensors)
    return _forward(x, gate_weight, lists, how, save=False)[0]


def _forward(
    x: Tensor, gate_weight: Tensor, lists: Sequence[list[Tensor]], how: How, save: bool
) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
    """Return the output, what gating kept and what the experts kept for backward."""
    topk_weights, topk_ids, probs = gating_op.kernel(x, gate_weight, how.top_k, how.backend)
    plan = dispatch_op.kernel(topk_weights, topk_ids, gate_weight.shape[0], how.backend)
    ways = how.activation, how.layout, save, how.recompute, how.backend
    out, gate_up, shared_gate_up, _ = mlp_op.kernel(x, plan, *lists, [], *ways)
    return out, (topk_ids, probs), (gate_up, shared_gate_up, *plan)


class _Step(torch.autograd.Function):
    """The steps' kernels, and in backward theirs; the ops themselves there where somebody sees them."""

    @staticmethod
    def forward(
        ctx: Any, how: How, lengths: list[int | None], x: Tensor, gate_weight: Tensor, *tensors: Tensor
    ) -> Tensor:
        out, picked, kept = _forward(x, gate_weight, nested(tensors, lengths), how, save=True)
        ctx.how, ctx.lengths = how, lengths
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, gate_weight, *picked, *kept, *tensors)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None) -> tuple[Any, ...]:
        if dout is None:
            return (None,) * (4 + sum(ctx.lengths))
        how, saved = ctx.how, ctx.saved_tensors
        x, gate_weight, topk_ids, probs, gate_up, shared_gate_up, *rest = saved
        plan, lists = RoutingPlan(*rest[:7]), nested(rest[7:], ctx.lengths)
        needed = any_needed(nested(ctx.needs_input_grad[4:], ctx.lengths))
        differentiable = torch.is_grad_enabled()  # create_graph=True: the ops refuse what comes of it
        through_ops = differentiable or seen((dout, *saved))
        mlp_bwd, dispatch_bwd, gating_bwd = (op if through_ops else op.kernel for op in _BACKWARD)
        ways = how.activation, how.layout, needed, how.backend
        dx, drow_weight, dweights = mlp_bwd(dout, x, plan.tensors(), *lists, gate_up, shared_gate_up, *ways)
        dgate_weight = None
        if any(ctx.needs_input_grad[2:4]):
            dpicks = dispatch_bwd(drow_weight, plan.row_pick, topk_ids.numel(), how.backend)
            dprobs = None
            if how.aux_loss_alpha is not None:
                of_all = aux_loss_gradient(plan.expert_counts, probs, how.top_k, how.aux_loss_alpha)
                dprobs = of_all.unsqueeze(0)
            picked = dpicks.view_as(topk_ids), dprobs, x, gate_weight, topk_ids, probs
            through, dgate_weight = gating_bwd(*picked, how.backend)
            dx = dx + through if differentiable else dx.add_(through)
        return None, None, dx, dgate_weight, *flat(by_kind(iter(dweights), lists, needed))


_BACKWARD = mlp_op_bwd, dispatch_op_bwd, gating_op_bwd
