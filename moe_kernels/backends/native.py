"""The C++ CPU backend: every room and the fused layer in csrc/, fp32, bf16 and fp16, on torch's own threads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..plan import RoutingPlan
from ._views import TAGS, empty_plan, view
from .base import Backend, Case, MoEWeights

_POOLED_BYTES = 4 << 20  # from here on malloc maps fresh pages, and page faults cost up to 10 % of a backward
_FLOATS = torch.float32, torch.bfloat16, torch.float16


def _view(t: Tensor | None):
    from .. import _C

    return view(_C, t)


def _new(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An empty tensor; a large one on memory that the extension keeps between calls (see csrc/core/workspace.h)."""
    nbytes = math.prod(shape) * like.element_size()
    if nbytes < _POOLED_BYTES:
        return torch.empty(shape, dtype=like.dtype)
    from .. import _C

    return torch.frombuffer(_C.Block(nbytes), dtype=like.dtype).view(shape)


def _views(plan: RoutingPlan) -> list:
    return [_view(t) for t in plan.tensors()]


def _matrices(t: Tensor | None, part: int = 0, parts: int = 1):
    """The matrices of a stacked tensor (E, parts * rows, columns), or of one alone; of each its `part`-th rows."""
    if t is None:
        return None
    if not t.is_contiguous():
        raise ValueError(f"weights: got strides {t.stride()} of {tuple(t.shape)}, expected contiguous tensors")
    from .. import _C

    *experts, rows, columns = t.shape
    step = rows * columns * t.element_size()
    first = t.data_ptr() + step * part // parts
    addresses = [first + e * step for e in range(experts[0] if experts else 1)]
    return _C.Matrices(addresses, rows // parts, columns, columns, False, TAGS[t.dtype])


def _table(tensors: Sequence[Tensor | None], activation: str) -> list:
    """gate, up and down of the experts, then of the shared expert where there are four tensors (see MoEWeights)."""
    table = []
    for gate_up, down in zip(tensors[::2], tensors[1::2], strict=True):
        halves = (None, _matrices(gate_up)) if activation == "gelu" else (_matrices(gate_up, i, 2) for i in range(2))
        table += [*halves, _matrices(down)]
    return table


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


class _Packed:
    """Packed weights and what tells that the originals have changed."""

    def __init__(self, weights, owners: Sequence[Tensor]) -> None:
        self._weights = weights
        self._owners = [(t, _version(t)) for t in owners]

    def weights(self):
        if any(_version(t) != version for t, version in self._owners):
            raise ValueError("packed_weights: a parameter was changed inside the context: leave it before an update")
        return self._weights


class NativeBackend(Backend):
    """Kernels of csrc/cpu, loaded after torch so that both share one libgomp.

    The ISA level (avx512bf16, avx512, avx2, portable) is chosen at run time; MOE_KERNELS_ISA forces one. Results are
    the same bits at any number of threads.
    """

    name = "native"

    def __init__(self) -> None:
        from .. import _C

        self._c = _C
        self._packed: dict[int, _Packed] = {}  # by the address of gate_up_proj

    def supports(self, case: Case) -> str | None:
        if case.device != "cpu":
            return f"device {case.device}, expected cpu"
        if case.dtype not in _FLOATS:
            return f"dtype {case.dtype}, expected torch.float32, torch.bfloat16 or torch.float16"
        return None

    def gating(self, x: Tensor, gate_weight: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
        (T, _), E = x.shape, gate_weight.shape[0]
        probs = x.new_empty((T, E), dtype=torch.float32)
        topk_weights = x.new_empty((T, top_k), dtype=torch.float32)
        topk_ids = x.new_empty((T, top_k), dtype=torch.int32)
        weight = gate_weight.float()
        bad = self._c.gating_fwd(
            _view(x), _view(weight), _view(probs), _view(topk_weights), _view(topk_ids), torch.get_num_threads()
        )
        if bad >= 0:
            got = f"got router logits that are not finite (token {bad})"
            raise ValueError(f"x, gate_weight: {got}, expected finite ones")
        return topk_weights, topk_ids, probs

    def gating_bwd(self, dtopk_weights, dprobs, x, gate_weight, topk_ids, probs) -> tuple[Tensor, Tensor]:
        weight = gate_weight.float()
        dx, dweight = torch.empty_like(x), torch.empty_like(weight)
        self._c.gating_bwd(
            _view(dtopk_weights), _view(dprobs), _view(x), _view(weight), _view(topk_ids), _view(probs), _view(dx),
            _view(dweight), torch.get_num_threads(),
        )  # fmt: skip
        return dx, dweight.to(gate_weight.dtype)

    def dispatch(self, topk_ids: Tensor, topk_weights: Tensor, num_experts: int) -> RoutingPlan:
        T, K = topk_ids.shape
        plan = empty_plan(topk_ids.device, T, num_experts, T * K)
        self._c.dispatch(_view(topk_ids), _view(topk_weights), num_experts, _views(plan))
        return plan

    def dispatch_expert_choice(self, affinities: Tensor, capacity: int, tokens_per_group: int) -> RoutingPlan:
        T, E = affinities.shape
        plan = empty_plan(affinities.device, T, E, E * (T // tokens_per_group) * capacity)
        self._c.dispatch_expert_choice(
            _view(affinities), capacity, tokens_per_group, _views(plan), torch.get_num_threads()
        )
        return plan

    def experts(self, x, plan, gate_up_proj, down_proj, activation, save) -> tuple[Tensor, Tensor]:
        R = plan.num_rows
        y_rows = x.new_empty((R, x.shape[1]))
        gate_up = _new((R, gate_up_proj.shape[1]) if save else (0,), x)
        self._c.experts_fwd(
            _view(x), _views(plan), _table((gate_up_proj, down_proj), activation), activation, _view(y_rows),
            _view(gate_up) if save else None, torch.get_num_threads(),
        )  # fmt: skip
        return y_rows, gate_up

    def experts_bwd(self, dy_rows, x, plan, gate_up, gate_up_proj, down_proj, activation):
        dx, dgate_up_proj, ddown_proj = (_new(t.shape, t) for t in (x, gate_up_proj, down_proj))
        self._c.experts_bwd(
            _view(dy_rows), _view(x), _views(plan), _table((gate_up_proj, down_proj), activation), _view(gate_up),
            activation, _view(dx), _table((dgate_up_proj, ddown_proj), activation), torch.get_num_threads(),
        )  # fmt: skip
        return dx, dgate_up_proj, ddown_proj

    def combine(self, y_rows: Tensor, plan: RoutingPlan, shared: Tensor | None) -> Tensor:
        out = y_rows.new_empty((plan.num_tokens, y_rows.shape[1]))
        self._c.combine(_view(y_rows), _views(plan), _view(shared), _view(out), torch.get_num_threads())
        return out

    def combine_bwd(self, dout: Tensor, y_rows: Tensor, plan: RoutingPlan) -> tuple[Tensor, Tensor]:
        dy_rows, drow_weight = torch.empty_like(y_rows), torch.empty_like(plan.row_weight)
        self._c.combine_bwd(
            _view(dout), _view(y_rows), _views(plan), _view(dy_rows), _view(drow_weight), torch.get_num_threads()
        )
        return dy_rows, drow_weight

    def moe_mlp(self, x: Tensor, plan: RoutingPlan, w: MoEWeights, activation: str, save: bool):
        shared = w.shared_gate_up_proj is not None
        out = torch.empty_like(x)
        gate_up = _new((plan.num_rows, w.gate_up_proj.shape[1]) if save else (0,), x)
        shared_gate_up = _new((x.shape[0], w.shared_gate_up_proj.shape[0]) if save and shared else (0,), x)
        packed = self._packed.get(w.gate_up_proj.data_ptr())
        self._c.moe_mlp_fwd(
            _view(x), _views(plan), _table(w, activation), activation, packed and packed.weights(), _view(out),
            _view(gate_up) if save else None, _view(shared_gate_up) if save and shared else None,
            torch.get_num_threads(),
        )  # fmt: skip
        return out, gate_up, shared_gate_up

    def pack(self, w: MoEWeights, activation: str, owners: Sequence[Tensor]) -> Callable[[], None]:
        key = w.gate_up_proj.data_ptr()
        if key in self._packed:
            return lambda: None  # an enclosing context has it
        weights = self._c.PackedWeights(_table(w, activation), activation, torch.get_num_threads())
        self._packed[key] = _Packed(weights, owners)
        return lambda: self._packed.pop(key)

    def moe_mlp_bwd(self, dout, x, plan, w: MoEWeights, gate_up, shared_gate_up, activation):
        dx, drow_weight = torch.empty_like(x), torch.empty_like(plan.row_weight)
        grads = [None if t is None else _new(t.shape, t) for t in w]
        self._c.moe_mlp_bwd(
            _view(dout), _view(x), _views(plan), _table(w, activation),
            *(_view(t) if t.numel() else None for t in (gate_up, shared_gate_up)), activation, _view(dx),
            _view(drow_weight), _table(grads, activation), torch.get_num_threads(),
        )  # fmt: skip
        return dx, drow_weight, *grads
