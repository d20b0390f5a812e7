"""The C++ CPU backend: every room and the fused layer in csrc/, fp32, bf16 and fp16, on torch's own threads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from .. import _checks
from ..plan import RoutingPlan
from ..weights import LayerWeights
from ._views import TAGS, empty_plan, view
from .base import Backend, Request

_POOLED_BYTES = 4 << 20  # from here on malloc maps fresh pages, and page faults cost up to 10 % of a backward
_MOST_TABLES = 1024  # a few kilobytes each
_tables: dict[tuple, list] = {}
_FLOATS = torch.float32, torch.bfloat16, torch.float16


def _view(t: Tensor | None):
    return view(_extension(), t)


@cache
def _extension() -> ModuleType:
    """Return the extension, loaded after torch: both share one libgomp then."""
    from .. import _C

    return _C


def _new(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An empty tensor; a large one on memory that the extension keeps between calls (see csrc/core/workspace.h)."""
    nbytes = math.prod(shape) * like.element_size()
    if nbytes < _POOLED_BYTES:
        return torch.empty(shape, dtype=like.dtype)
    return torch.frombuffer(_extension().Block(nbytes), dtype=like.dtype).view(shape)


def _new_alike(kind: Sequence[Tensor]) -> list[Tensor]:
    """Empty tensors of the shapes of a kind, each on a storage of its own; together on one piece of that memory."""
    first = kind[0]
    count, size = first.numel(), first.element_size()
    if len(kind) == 1 or len(kind) * count * size < _POOLED_BYTES:
        return [_new(t.shape, t) for t in kind]
    block = _extension().Block(len(kind) * count * size)
    parts = range(0, len(kind) * count * size, count * size)
    return [torch.frombuffer(block, dtype=first.dtype, count=count, offset=at).view(first.shape) for at in parts]


def _matrices(w: LayerWeights) -> list:
    """Return the tables of gate, up, down and those of the shared expert, as the extension takes them.

    They say where matrices lie and nothing of what is there, so those of the last calls serve again: making them takes
    a tenth of a small call.
    """
    key = w.name, *map(len, w.kinds), *((t.data_ptr(), t.shape, t.stride(), t.dtype) for kind in w.kinds for t in kind)
    found = _tables.get(key)
    if found is None:
        if len(_tables) >= _MOST_TABLES:
            _tables.clear()
        table = _extension().Matrices
        found = _tables[key] = [m and table(*m[:-1], TAGS[m.dtype]) for m in w.matrices()]
    return list(found)


def _views(plan: RoutingPlan) -> list:
    return [_view(t) for t in plan.tensors()]


def _rows(t: Tensor, plan: RoutingPlan) -> Tensor:
    """Return the rows of t that belong to a plan which is `owned`."""
    return t if t.shape[0] == plan.num_rows else t[: plan.num_rows]


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
    reads = "addresses"

    def __init__(self) -> None:
        self._c = _extension()
        self._packed: dict[int, _Packed] = {}  # by the address of the first down_proj

    def supports(self, request: Request) -> str | None:
        if request.device != "cpu":
            return f"device {request.device}, expected cpu"
        if request.dtype not in _FLOATS:
            return f"dtype {request.dtype}, expected torch.float32, torch.bfloat16 or torch.float16"
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
            _checks.refuse_nonfinite(bad)
            return self._gating_with_nan(x, gate_weight, top_k, bad)
        return topk_weights, topk_ids, probs

    def _gating_with_nan(self, x: Tensor, gate_weight: Tensor, top_k: int, first: int) -> tuple[Tensor, Tensor, Tensor]:
        """Gating where some logits are not finite: NaN for their tokens alone, whose picks are valid ids."""
        lost = ~(x.float() @ gate_weight.float().T).isfinite().all(1)
        lost[first] = True
        topk_weights, topk_ids, probs = self.gating(x.masked_fill(lost[:, None], 0), gate_weight, top_k)
        topk_weights[lost], probs[lost] = torch.nan, torch.nan
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

    def dispatch_mask(self, weights: Tensor, picks: Tensor, max_rows: int) -> RoutingPlan:
        plan = empty_plan(weights.device, *weights.shape, max_rows)
        self._c.dispatch_mask(_view(weights), _view(picks), _views(plan))
        return plan

    def select_top(self, scores: Tensor, counts: Tensor | int) -> tuple[Tensor, Tensor]:
        picks, least = torch.empty_like(scores, dtype=torch.bool), scores.new_empty(scores.shape[::2])
        each, all_of_them = (counts, 0) if isinstance(counts, Tensor) else (None, counts)
        self._c.select_top(_view(scores), _view(each), all_of_them, _view(picks), _view(least), torch.get_num_threads())
        return picks, least

    def select_experts(self, scores: Tensor, top_k: int, groups: int, groups_taken: int) -> Tensor:
        topk_ids = scores.new_empty((scores.shape[0], top_k), dtype=torch.int32)
        self._c.select_experts(_view(scores), groups, groups_taken, _view(topk_ids), torch.get_num_threads())
        return topk_ids

    def experts(self, x, plan, w: LayerWeights, activation, save) -> tuple[Tensor, Tensor]:
        R, plan = plan.num_rows, plan.owned()
        y_rows = x.new_empty((R, x.shape[1]))
        gate_up = _new((R, w.halves * w.intermediate_size) if save else (0,), x)
        biases = _biases(w)[:2]
        self._c.experts_fwd(
            _view(x), _views(plan), _matrices(w)[:3], activation, _all_views(biases),
            _view(_rows(y_rows, plan)), _view(_rows(gate_up, plan)) if save else None, torch.get_num_threads(),
        )  # fmt: skip
        return y_rows, gate_up

    def experts_bwd(self, dy_rows, x, plan, gate_up, w: LayerWeights, activation, needed):
        plan, dx = plan.owned(), _new(x.shape, x)
        dy_rows, gate_up = _rows(dy_rows, plan), _rows(gate_up, plan)
        grads, tables = _gradients(w, needed)
        biases = _biases(w)[:2]
        dbiases = _bias_gradients(biases, needed[2:])
        self._c.experts_bwd(
            _view(dy_rows), _view(x), _views(plan), _matrices(w)[:3], _view(gate_up), activation, _all_views(biases),
            _view(dx), tables[:3], _all_views(dbiases), torch.get_num_threads(),
        )  # fmt: skip
        return dx, *grads[:2], *dbiases

    def combine(self, y_rows: Tensor, plan: RoutingPlan, shared: Tensor | None) -> Tensor:
        plan, out = plan.owned(), y_rows.new_empty((plan.num_tokens, y_rows.shape[1]))
        self._c.combine(_view(_rows(y_rows, plan)), _views(plan), _view(shared), _view(out), torch.get_num_threads())
        return out

    def combine_bwd(self, dout: Tensor, y_rows: Tensor, plan: RoutingPlan) -> tuple[Tensor, Tensor]:
        dy_rows, drow_weight, plan = torch.empty_like(y_rows), torch.empty_like(plan.row_weight), plan.owned()
        seen = (_view(_rows(t, plan)) for t in (y_rows, dy_rows, drow_weight))
        self._c.combine_bwd(_view(dout), next(seen), _views(plan), *seen, torch.get_num_threads())
        return dy_rows, drow_weight

    def moe_mlp(self, x: Tensor, plan: RoutingPlan, w: LayerWeights, activation: str, save: bool):
        shared = bool(w.shared_intermediate_size)
        out = torch.empty_like(x)
        gate_up = _new((plan.num_rows, w.halves * w.intermediate_size) if save else (0,), x)
        shared_gate_up = _new((x.shape[0], w.halves * w.shared_intermediate_size) if save and shared else (0,), x)
        plan = plan.owned()
        packed, biases = self._packed.get(_key(w)), _biases(w)
        self._c.moe_mlp_fwd(
            _view(x), _views(plan), _matrices(w), activation, _all_views(biases), packed and packed.weights(),
            _view(out),
            _view(_rows(gate_up, plan)) if save else None, _view(shared_gate_up) if save and shared else None,
            torch.get_num_threads(),
        )  # fmt: skip
        return out, gate_up, shared_gate_up

    def pack(self, w: LayerWeights, activation: str, owners: Sequence[Tensor]) -> Callable[[], None]:
        key = _key(w)
        if key in self._packed:
            return lambda: None  # an enclosing context has it
        weights = self._c.PackedWeights(_matrices(w), activation, torch.get_num_threads())
        self._packed[key] = _Packed(weights, owners)
        return lambda: self._packed.pop(key)

    def moe_mlp_bwd(self, dout, x, plan, w: LayerWeights, gate_up, shared_gate_up, activation, needed):
        dx, drow_weight, plan = torch.empty_like(x), torch.empty_like(plan.row_weight), plan.owned()
        gate_up = _rows(gate_up, plan) if gate_up.numel() else gate_up
        grads, tables = _gradients(w, needed)
        biases = _biases(w)
        dbiases = _bias_gradients(biases, needed[4:])
        self._c.moe_mlp_bwd(
            _view(dout), _view(x), _views(plan), _matrices(w),
            *(_view(t) if t.numel() else None for t in (gate_up, shared_gate_up)), activation, _all_views(biases),
            _view(dx), _view(_rows(drow_weight, plan)), tables, _all_views(dbiases), torch.get_num_threads(),
        )  # fmt: skip
        return dx, drow_weight, *grads, *dbiases


def _key(w: LayerWeights) -> int:
    return w.kinds[1][0].data_ptr()


def _biases(w: LayerWeights) -> tuple[Tensor | None, ...]:
    """Return the biases as the extension takes them, fp32: of all kinds that w has, or none.

    They may be copies, and have to outlive the call: views do not own them.
    """
    if not any(w.biases):
        return ()
    return w.stacked_biases()[: 4 if w.kinds[3] else 2]


def _bias_gradients(biases: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
    pairs = zip(biases, needed, strict=False)
    return [torch.empty_like(bias) if wanted and bias is not None else None for bias, wanted in pairs]


def _all_views(tensors: Sequence[Tensor | None]) -> list:
    return [_view(t) for t in tensors]


_TABLES = (0, 1), (2,), (3, 4), (5,)  # where the matrices of a kind are among the tables


def _gradients(w: LayerWeights, needed: Sequence[bool]) -> tuple[list[list[Tensor] | None], list]:
    """Return empty gradients in the form of the weights, and their tables; None for kinds that nobody needs."""
    wanted = [flag and bool(kind) for flag, kind in zip(needed, w.kinds, strict=False)]
    grads = [_new_alike(kind) if flag else None for flag, kind in zip(wanted, w.kinds, strict=False)]
    # A kind without gradients stands in for itself, so that the sizes can be read, and is taken out again.
    forms = [kind if grad is None else grad for grad, kind in zip(grads, w.kinds, strict=False)]
    tables = _matrices(LayerWeights(*forms, layout=w.name))
    for flag, positions in zip(wanted, _TABLES, strict=False):
        for position in () if flag else positions:
            tables[position] = None
    return grads, tables
