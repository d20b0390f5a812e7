"""Token choice and the experts behind it as one step of autograd, where nobody looks at the steps in between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _checks
from ..backends.base import Backend, Request
from ..backends.kept import Kept
from ..backends.registry import choose
from ..plan import RoutingPlan
from ..weights import Biases, LayerWeights, MoEWeights
from ._expert_weights import (
    Lists,
    Weights,
    any_needed,
    by_kind,
    check,
    check_biases,
    check_shared,
    for_backend,
    gradients_of,
)
from ._library import annotate, flat, nested, seen
from .dispatch import dispatch_op, dispatch_op_bwd
from .gating import aux_loss_gradient, aux_loss_scale, gating_op, gating_op_bwd
from .moe_mlp import mlp_op, mlp_op_bwd

_MOST_KINDS = 1024
_kinds: dict[tuple, _Kind] = {}
_ALONE = {Tensor, nn.Parameter, type(None)}  # what weights are that come stacked


class How(NamedTuple):
    """What a call of `token_choice_mlp` says beside its tensors."""

    top_k: int
    aux_loss_alpha: float | None  # of the loss whose gradient the weights of the rows carry; None: they carry none
    activation: str
    layout: str
    backend: str
    recompute: bool


class _Kind(NamedTuple):
    """What was found of arguments: it holds for all of the same shapes, strides, dtypes and devices."""

    lengths: list[int]  # of the lists of weights and biases
    requests: tuple[Request, Request, Request]  # of gating, dispatch and moe_mlp
    as_kernels_read: bool  # weights need no other form
    chosen: Backend | None  # of moe_mlp, where the call names it; what "auto" means may change


def token_choice_mlp(
    x: Tensor, gate_weight: Tensor, weights: Sequence[Weights | None], biases: Biases | None, how: How
) -> Tensor | None:
    """Do what `gating`, `dispatch`, `inject_aux_loss` and `moe_mlp` do one after the other: the same kernels and bits.

    One node of autograd takes a fourth of the time of four on the CPU, which is what small layers on a GPU wait for;
    where one backend computes all of it and can in one call (`cuda`), that is what it gets.

    Args:
        x: (T, H) tokens, as in `moe_mlp`.
        gate_weight: (E, H), as in `gating`.
        weights, biases: those of `moe_mlp`; `how.activation` is spelled.
    Returns: (T, H), or None where the steps have to be taken one by one: under autocast, torch.compile, and whatever
        else sees the ops (see _library.seen).
    Raises: TypeError, ValueError naming the argument, as the ops do.
    """
    if torch.compiler.is_compiling() or not isinstance(x, Tensor):
        return None
    autocast = _checks.autocast_enabled(x)
    if autocast and _checks.compute_dtype(x) != x.dtype:
        return None
    form = [*map(type, weights)]
    if biases is None and _ALONE.issuperset(form):
        tensors = [w for w in weights if w is not None]
    else:
        tensors, form = _laid_out(weights if biases is None else (*weights, biases))
    everything = x, gate_weight, *tensors
    if seen(everything):
        return None
    kind = _kind_of(x, gate_weight, tensors, form, weights, biases, how, autocast)
    fused = _one_backend(how.backend, kind)
    step = _Step if fused is None else _Fused
    if torch.is_grad_enabled() and any([t.requires_grad for t in everything]):
        return step.apply(how, kind, fused, *everything)
    if fused is None:
        return _by_rooms(x, gate_weight, nested(tensors, kind.lengths), how, save=False)[0]
    return _at_once(fused, x, gate_weight, tensors, kind, how, keep=False)[0]


def _laid_out(kinds: Sequence[Any]) -> tuple[list[Tensor], list[Any]]:
    """Return all tensors in a row, and the form in which they came."""
    tensors, form = [], []
    for kind in kinds:
        if isinstance(kind, Tensor):
            tensors.append(kind)
            form.append(Tensor)
        elif isinstance(kind, (list, tuple)):
            inside, inner = _laid_out(kind)
            tensors += inside
            form.append((type(kind), *inner))
        else:
            form.append(type(kind))
    return tensors, form


def _kind_of(
    x: Tensor,
    gate_weight: Tensor,
    tensors: Sequence[Tensor],
    form: Sequence[Any],
    weights: Sequence[Any],
    biases: Any,
    how: How,
    autocast: bool,
) -> _Kind:
    """Check the arguments, once for all that are alike: in small calls that took as long as the rest."""
    facts = [(t.shape, t.stride(), t.dtype, t.device) for t in (gate_weight, *tensors)]
    key = how, autocast, x.dim(), x.shape[-1], x.dtype, x.device, *form, *facts
    found = _kinds.get(key)
    if found is None:
        if len(_kinds) >= _MOST_KINDS:
            _kinds.clear()
        found = _kinds[key] = _checked(x, gate_weight, weights, biases, how)
    return found


def _checked(x: Tensor, gate_weight: Any, weights: Sequence[Any], biases: Any, how: How) -> _Kind:
    _checks.tensor("x", x, "T,H")
    _checks.router(gate_weight, x, x.shape[1], how.top_k)
    E, ways = gate_weight.shape[0], (how.activation, how.layout)
    (gate_up, down), shared = check(x, E, *weights[:2], *ways), check_shared(x, E, *weights[2:], *ways)
    lists = [gate_up, down, *shared, *check_biases(x, E, biases, *ways, down, shared[1])]
    w = LayerWeights(*lists[:4], how.layout, lists[4:])
    sizes = w.num_experts, w.hidden_size, w.intermediate_size, w.shared_intermediate_size
    where = x.dtype, x.device.type
    requests = (
        Request("gating", *where, num_experts=E, hidden_size=w.hidden_size),
        Request("dispatch", _checks.accumulator(x.dtype), x.device.type, num_experts=E),
        Request("moe_mlp", *where, *sizes, how.activation, any(w.biases)),
    )
    as_kernels_read = w.as_kernels_read() and w.to(x.dtype) is w
    chosen = None if how.backend == "auto" else choose(how.backend, requests[2])
    return _Kind([len(kind) for kind in lists], requests, as_kernels_read, chosen)


def _one_backend(name: str, kind: _Kind) -> Backend | None:
    """Return the backend of all three rooms if it computes them in one call, else None."""
    if kind.chosen is not None:  # what computes the experts computes the picks
        return kind.chosen if kind.chosen.fuses_token_choice else None
    first, *others = (choose(name, request) for request in kind.requests)
    return first if first.fuses_token_choice and all(other is first for other in others) else None


def _by_rooms(
    x: Tensor, gate_weight: Tensor, lists: Lists, how: How, save: bool
) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
    """Return the output, what gating kept and what the experts kept for backward."""
    topk_weights, topk_ids, probs = gating_op.kernel(x, gate_weight, how.top_k, how.backend)
    plan = dispatch_op.kernel(topk_weights, topk_ids, gate_weight.shape[0], how.backend)
    ways = how.activation, how.layout, save, how.recompute, how.backend
    out, gate_up, shared_gate_up, _ = mlp_op.kernel(x, plan, *lists, [], *ways)
    return out, (topk_ids, probs), (gate_up, shared_gate_up, *plan)


class _Node(torch.autograd.Function):
    """Skips what Function.apply does for function transforms, a third of its time: `seen` leaves them to the ops."""

    apply = torch._C._FunctionBase.__dict__["apply"]


class _Step(_Node):
    """The steps' kernels, and in backward theirs; the ops themselves there where somebody sees them."""

    @staticmethod
    def forward(
        ctx: Any, how: How, kind: _Kind, fused: None, x: Tensor, gate_weight: Tensor, *tensors: Tensor
    ) -> Tensor:
        out, picked, kept = _by_rooms(x, gate_weight, nested(tensors, kind.lengths), how, save=True)
        ctx.how, ctx.lengths = how, kind.lengths
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, gate_weight, *picked, *kept, *tensors)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None) -> tuple[Any, ...]:
        if dout is None:
            return (None,) * (5 + sum(ctx.lengths))
        saved = ctx.saved_tensors
        x, gate_weight, topk_ids, probs, gate_up, shared_gate_up, *rest = saved
        kept = topk_ids, probs, gate_up, shared_gate_up, RoutingPlan(*rest[:7])
        through_ops = torch.is_grad_enabled() or seen((dout, *saved))
        return _backward_by_rooms(ctx, dout, x, gate_weight, nested(rest[7:], ctx.lengths), kept, through_ops)


def _backward_by_rooms(
    ctx: Any, dout: Tensor, x: Tensor, gate_weight: Tensor, lists: Lists, kept: tuple, through_ops: bool
) -> tuple[Any, ...]:
    topk_ids, probs, gate_up, shared_gate_up, plan = kept
    how, needed = ctx.how, any_needed(nested(ctx.needs_input_grad[5:], ctx.lengths))
    mlp_bwd, dispatch_bwd, gating_bwd = (op if through_ops else op.kernel for op in _BACKWARD)
    ways = how.activation, how.layout, needed, how.backend
    dx, drow_weight, dweights = mlp_bwd(dout, x, plan.tensors(), *lists, gate_up, shared_gate_up, *ways)
    dgate_weight = None
    if any(ctx.needs_input_grad[3:5]):
        dpicks = dispatch_bwd(drow_weight, plan.row_pick, topk_ids.numel(), how.backend)
        dprobs = None
        if how.aux_loss_alpha is not None:
            dprobs = aux_loss_gradient(plan.expert_counts, probs, how.top_k, how.aux_loss_alpha).unsqueeze(0)
        picked = dpicks.view_as(topk_ids), dprobs, x, gate_weight, topk_ids, probs
        through, dgate_weight = gating_bwd(*picked, how.backend)
        # create_graph=True: the ops refuse what comes of it
        dx = dx + through if torch.is_grad_enabled() else dx.add_(through)
    return None, None, None, dx, dgate_weight, *flat(by_kind(iter(dweights), lists, needed))


_BACKWARD = mlp_op_bwd, dispatch_op_bwd, gating_op_bwd


def _read(
    fused: Backend, x: Tensor, tensors: Sequence[Tensor], kind: _Kind, layout: str
) -> tuple[LayerWeights | None, MoEWeights | LayerWeights]:
    """Return the weights as they are, None where that does not matter, and as the backend reads them."""
    if kind.as_kernels_read:
        return None, MoEWeights(*tensors)
    w = LayerWeights(*nested(tensors, kind.lengths)[:4], layout).to(x.dtype)
    return w, for_backend(fused, w)


@annotate("token_choice", domain="moe_kernels")
def _at_once(
    fused: Backend, x: Tensor, gate_weight: Tensor, tensors: Sequence[Tensor], kind: _Kind, how: How, keep: bool
) -> tuple[Tensor, Kept]:
    _, w = _read(fused, x, tensors, kind, how.layout)
    picks = x.contiguous(), gate_weight.contiguous(), w, how.top_k
    return fused.token_choice(*picks, how.activation, keep, keep and not how.recompute)


class _Fused(_Node):
    """As _Step, with one call of a backend a direction."""

    @staticmethod
    def forward(
        ctx: Any, how: How, kind: _Kind, fused: Backend, x: Tensor, gate_weight: Tensor, *tensors: Tensor
    ) -> Tensor:
        out, kept = _at_once(fused, x, gate_weight, tensors, kind, how, keep=True)
        ctx.how, ctx.of, ctx.lengths = how, (kind, fused, len(kept.tensors), kept.offsets), kind.lengths
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, gate_weight, *kept.tensors, *tensors)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None) -> tuple[Any, ...]:
        if dout is None:
            return (None,) * (5 + sum(ctx.lengths))
        saved, (kind, fused, count, offsets) = ctx.saved_tensors, ctx.of
        (x, gate_weight), kept, tensors = saved[:2], Kept(saved[2 : 2 + count], offsets), saved[2 + count :]
        if torch.is_grad_enabled() or seen((dout, *saved)):
            apart = _apart(kept, x, gate_weight, tensors, ctx)
            return _backward_by_rooms(ctx, dout, x, gate_weight, nested(tensors, ctx.lengths), apart, True)
        return None, None, None, *_backward_at_once(ctx, kind, fused, dout, x, gate_weight, tensors, kept)


def _apart(kept: Kept, x: Tensor, gate_weight: Tensor, tensors: Sequence[Tensor], ctx: Any) -> tuple:
    """Return what was kept as the rooms take it."""
    widths = None
    if not ctx.how.recompute:
        w = LayerWeights(*nested(tensors, ctx.lengths)[:4], ctx.how.layout)
        widths = w.halves * w.intermediate_size, w.halves * w.shared_intermediate_size
    return kept.apart(x.shape[0], gate_weight.shape[0], ctx.how.top_k, widths, x.dtype)


@annotate("token_choice_bwd", domain="moe_kernels")
def _backward_at_once(
    ctx: Any,
    kind: _Kind,
    fused: Backend,
    dout: Tensor,
    x: Tensor,
    gate_weight: Tensor,
    tensors: Sequence[Tensor],
    kept: Kept,
) -> tuple[Any, ...]:
    """Return the gradients of x, gate_weight and the tensors."""
    how, (T, _), E = ctx.how, x.shape, gate_weight.shape[0]
    w, read = _read(fused, x, tensors, kind, how.layout)
    aux_scale = 0.0 if how.aux_loss_alpha is None else aux_loss_scale(T, E, how.top_k, how.aux_loss_alpha)
    dx, dgate_weight, *gradients = fused.token_choice_bwd(
        dout.contiguous(), aux_scale, x.contiguous(), gate_weight.contiguous(), read, kept, how.top_k, how.activation,
        not how.recompute, any(ctx.needs_input_grad[3:5]),
    )  # fmt: skip
    if w is None:
        return dx, dgate_weight, *gradients[: len(tensors)]  # of a shared expert that is not there: None, at the end
    lists = nested(tensors, ctx.lengths)
    needed = any_needed(nested(ctx.needs_input_grad[5:], ctx.lengths))
    returned = gradients_of(fused, w, gradients, lists, needed)
    return dx, dgate_weight, *flat(by_kind(iter(returned), lists, needed))
