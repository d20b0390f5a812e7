"""The CUDA C++ backend: every room and the fused layer in csrc/cuda/, on NVIDIA GPUs; built only when asked for."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import wraps
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from ..plan import RoutingPlan
from ..weights import MoEWeights
from ._device import tf32_allowed, unfit_devices
from ._views import TAGS, empty_plan
from .base import Backend, Request
from .kept import Kept

FIBERS = "MOE_KERNELS_FIBERS"  # path of the module that runs the same sources on CPU tensors, for tests
ALIGNMENT = 16  # bytes of one access of the kernels
_FLOATS = torch.float32, torch.bfloat16, torch.float16
_INSTALL = "built without CUDA (pip install . -C cmake.define.MOE_KERNELS_CUDA=ON)"


def _load() -> ModuleType | None:
    path = os.environ.get(FIBERS)
    if not path:
        name = f"{__package__.rpartition('.')[0]}._cuda"
        return importlib.import_module(name) if importlib.util.find_spec(name) else None
    spec = importlib.util.spec_from_file_location("_cuda_fibers", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_c = _load()


@contextmanager
def early_starts(wanted: bool = True) -> Iterator[None]:
    """Let a kernel start before the one before it in its stream has ended, or not: all that is launched inside.

    Programmatic dependent launch, csrc/cuda/device.h; for the whole process. Outside MOE_KERNELS_PDL decides. The same
    bits either way.
    """
    before = _c.early_starts()
    _c.set_early_starts(wanted)
    try:
        yield
    finally:
        _c.set_early_starts(before)


def _on_device(method: Callable[..., Any]) -> Callable[..., Any]:
    """Launch on the device of the tensors and on its current stream; operands start at multiples of 16 bytes."""

    @wraps(method)
    def run(self: CudaBackend, *args: Any) -> Any:
        if not _c.aligned(args):
            args = [*map(_aligned, args)]
        device = (args[0] if isinstance(args[0], Tensor) else next(t for t in args if isinstance(t, Tensor))).device
        if device.type != "cuda":
            return method(self, *args)
        with nullcontext() if torch.cuda.current_device() == device.index else torch.cuda.device(device):
            _c.use_device(device.index)  # torch leaves a thread without a context where its device is the default one
            return method(self, *args)

    return run


def _aligned(value: Any) -> Any:
    if isinstance(value, MoEWeights):
        return MoEWeights(*map(_aligned, value))
    if not isinstance(value, Tensor) or value.data_ptr() % ALIGNMENT == 0 or not value.is_contiguous():
        return value  # of weights with an index a copy would hold all slices, which overlap, one by one
    return value.clone()


def _stream(t: Tensor) -> int:
    return torch._C._cuda_getCurrentRawStream(t.device.index) if t.is_cuda else 0  # without a Python object around it


# Sizes go to new_empty one by one: torch 2.13 takes longer over a tuple of them.
def _workspace(nbytes: int, like: Tensor) -> Tensor:
    return like.new_empty(-(-nbytes // 4), dtype=torch.float32)


def _allocator(like: Tensor) -> Callable[[int], Tensor]:
    """Return what the extension asks for memory, once it knows how much."""

    def allocate(words: int) -> Tensor:
        return like.new_empty(words, dtype=torch.int32)

    return allocate


def _tf32(x: Tensor) -> bool:
    return x.dtype == torch.float32 and tf32_allowed()


class CudaBackend(Backend):
    """Kernels of csrc/cuda/: wgmma and TMA on Hopper, mma.sync from sm_80 on, plain fp32 products elsewhere.

    float32 products use TF32 where torch allows it (torch.backends.cuda.matmul.fp32_precision). Widths are
    multiples of 8.
    """

    name = "cuda"
    fuses_token_choice = True
    reads = "indexed"

    def why_not(self) -> str:
        if _c is None:
            return _INSTALL
        return "" if _c.on_fibers or torch.cuda.is_available() else "built, no device"

    def supports(self, request: Request) -> str | None:
        expected = "cpu" if _c.on_fibers else "cuda"
        if request.device != expected:
            return f"device {request.device}, expected {expected}"
        if request.dtype not in _FLOATS:
            return f"dtype {request.dtype}, expected torch.float32, torch.bfloat16 or torch.float16"
        for what in ("hidden_size", "intermediate_size", "shared_intermediate_size"):
            if getattr(request, what) % 8:
                return f"{what} {getattr(request, what)}, expected a multiple of 8"
        return request.unlike_plain_experts() or (None if _c.on_fibers else unfit_devices((7, 5)))

    @_on_device
    def gating(self, x: Tensor, gate_weight: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
        topk_weights, topk_ids, probs = _scores(x, x.shape[0], gate_weight, top_k)
        _c.gating_fwd(x, _wide(gate_weight), probs, topk_weights, topk_ids, _stream(x))
        _checks.finite(probs)
        return topk_weights, topk_ids, probs

    @_on_device
    def gating_bwd(
        self,
        dtopk_weights: Tensor | None,
        dprobs: Tensor | None,
        x: Tensor,
        gate_weight: Tensor,
        topk_ids: Tensor,
        probs: Tensor,
    ) -> tuple[Tensor, Tensor]:
        weight = _wide(gate_weight)
        dx, dweight = torch.empty_like(x), torch.empty_like(weight)
        sizes = *x.shape, weight.shape[0], topk_ids.shape[1]
        workspace = _workspace(_c.gating_bwd_workspace_bytes(*sizes), x)
        _c.gating_bwd(
            dtopk_weights, dprobs, x, weight, topk_ids, probs, dx,
            dweight, workspace, _stream(x),
        )  # fmt: skip
        return dx, dweight.to(gate_weight.dtype)

    @_on_device
    def modulated_gating(
        self, x: Tensor, shift: Tensor, scale: Tensor, gate_weight: Tensor, top_k: int, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        T, H = x.shape[0] * x.shape[1], x.shape[2]
        tokens, moments = x.new_empty(T, H, dtype=dtype), x.new_empty(2, T, dtype=torch.float32)
        topk_weights, topk_ids, probs = _scores(x, T, gate_weight, top_k)
        _c.modulated_gating_fwd(
            x, shift, scale, _wide(gate_weight), eps, tokens, probs,
            topk_weights, topk_ids, moments, _stream(x),
        )  # fmt: skip
        _checks.finite(probs)
        return tokens, topk_weights, topk_ids, probs, moments

    @_on_device
    def modulated_gating_bwd(
        self,
        dtokens: Tensor | None,
        dtopk_weights: Tensor | None,
        dprobs: Tensor | None,
        x: Tensor,
        shift: Tensor,
        scale: Tensor,
        gate_weight: Tensor,
        topk_ids: Tensor,
        probs: Tensor,
        moments: Tensor,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        (B, L, H), weight = x.shape, _wide(gate_weight)
        dx, dshift, dscale, dweight = (torch.empty_like(t) for t in (x, shift, scale, weight))
        sizes = B, B * L, H, weight.shape[0], topk_ids.shape[1]
        workspace = _workspace(_c.modulated_gating_bwd_workspace_bytes(*sizes), x)
        _c.modulated_gating_bwd(
            dtokens, dtopk_weights, dprobs, x, shift, scale, weight,
            topk_ids, probs, moments, TAGS[dtype], dx, dshift, dscale,
            dweight, workspace, _stream(x),
        )  # fmt: skip
        return dx, dshift, dscale, dweight.to(gate_weight.dtype)

    @_on_device
    def dispatch(self, topk_ids: Tensor, topk_weights: Tensor, num_experts: int) -> RoutingPlan:
        T, K = topk_ids.shape
        plan = empty_plan(topk_ids.device, T, num_experts, T * K)
        workspace = _workspace(_c.dispatch_workspace_bytes(T, K, num_experts), topk_weights)
        _c.dispatch(topk_ids, topk_weights, num_experts, plan.tensors(), workspace, _stream(topk_ids))
        return plan

    @_on_device
    def dispatch_bwd(self, drow_weight: Tensor, row_pick: Tensor, count: int) -> Tensor:
        out = drow_weight.new_empty(count)
        _c.dispatch_bwd(drow_weight, row_pick, out, _stream(out))
        return out

    @_on_device
    def dispatch_expert_choice(self, affinities: Tensor, capacity: int, tokens_per_group: int) -> RoutingPlan:
        T, E = affinities.shape
        plan = empty_plan(affinities.device, T, E, E * (T // tokens_per_group) * capacity)
        workspace = _workspace(_c.dispatch_expert_choice_workspace_bytes(T, E), affinities)
        _c.dispatch_expert_choice(
            affinities, capacity, tokens_per_group, plan.tensors(), workspace, _stream(affinities)
        )
        return plan

    @_on_device
    def dispatch_mask(self, weights: Tensor, picks: Tensor, max_rows: int) -> RoutingPlan:
        plan = empty_plan(weights.device, *weights.shape, max_rows)
        workspace = _workspace(_c.dispatch_mask_workspace_bytes(*weights.shape), weights)
        _c.dispatch_mask(weights, picks, plan.tensors(), workspace, _stream(weights))
        return plan

    @_on_device
    def select_top(self, scores: Tensor, counts: Tensor | int) -> tuple[Tensor, Tensor]:
        picks, least = torch.empty_like(scores, dtype=torch.bool), scores.new_empty(scores.shape[::2])
        each, all_of_them = (counts, 0) if isinstance(counts, Tensor) else (None, counts)
        workspace = _workspace(_c.select_top_workspace_bytes(*scores.shape), scores)
        _c.select_top(scores, each, all_of_them, picks, least, workspace, _stream(scores))
        return picks, least

    @_on_device
    def select_experts(self, scores: Tensor, top_k: int, groups: int, groups_taken: int) -> Tensor:
        topk_ids = scores.new_empty(scores.shape[0], top_k, dtype=torch.int32)
        _c.select_experts(scores, groups, groups_taken, topk_ids, _stream(scores))
        return topk_ids

    @_on_device
    def experts(
        self, x: Tensor, plan: RoutingPlan, w: MoEWeights, activation: str, save: bool
    ) -> tuple[Tensor, Tensor]:
        R, I, width = plan.num_rows, w.down_proj.shape[2], w.stacked_shapes(plan.num_experts)[0][1]
        y_rows, gate_up = x.new_empty(R, x.shape[1]), x.new_empty((R, width) if save else 0)
        workspace = _workspace(R * I * x.element_size(), x)
        _c.experts_fwd(
            x, plan.tensors(), w.matrices, activation, _tf32(x), y_rows, gate_up if save else None,
            workspace, _stream(x),
        )  # fmt: skip
        return y_rows, gate_up

    @_on_device
    def experts_bwd(
        self,
        dy_rows: Tensor,
        x: Tensor,
        plan: RoutingPlan,
        gate_up: Tensor,
        w: MoEWeights,
        activation: str,
        needed: Sequence[bool] = (True, True),
    ) -> tuple[Tensor, Tensor, Tensor]:
        dx, dgate_up_proj, ddown_proj = map(x.new_empty, (x.shape, *w.stacked_shapes(plan.num_experts)))
        inputs, seen, how = (x, plan.tensors()), w.matrices, (activation, _tf32(x))
        workspace = _workspace(_c.moe_mlp_bwd_workspace_bytes(*inputs, seen, *how, False), x)
        _c.experts_bwd(
            dy_rows, *inputs, gate_up, seen, *how, dx, dgate_up_proj, ddown_proj,
            workspace, _stream(x),
        )  # fmt: skip
        return dx, dgate_up_proj, ddown_proj

    @_on_device
    def combine(self, y_rows: Tensor, plan: RoutingPlan, shared: Tensor | None) -> Tensor:
        out = y_rows.new_empty(plan.num_tokens, y_rows.shape[1])
        _c.combine(y_rows, plan.tensors(), shared, out, _stream(out))
        return out

    @_on_device
    def combine_bwd(self, dout: Tensor, y_rows: Tensor, plan: RoutingPlan) -> tuple[Tensor, Tensor]:
        dy_rows, drow_weight = torch.empty_like(y_rows), torch.empty_like(plan.row_weight)
        _c.combine_bwd(dout, y_rows, plan.tensors(), dy_rows, drow_weight, _stream(dout))
        return dy_rows, drow_weight

    @_on_device
    def moe_mlp(
        self, x: Tensor, plan: RoutingPlan, w: MoEWeights, activation: str, save: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self._forward(x, plan, w, activation, save)[:3]

    @_on_device
    def gated_moe_mlp(
        self, x: Tensor, plan: RoutingPlan, w: MoEWeights, activation: str, save: bool, residual: Tensor, gate: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self._forward(x, plan, w, activation, save, residual, gate)

    def _forward(self, x, plan, w, activation, save, residual=None, gate=None):
        shapes = w.stacked_shapes(plan.num_experts)
        kept = save and len(shapes) == 4
        out = torch.empty_like(x if residual is None else residual)
        y = None if residual is None else torch.empty_like(x)
        gate_up = x.new_empty(plan.num_rows, shapes[0][1]) if save else x.new_empty(0)
        shared_gate_up = x.new_empty(x.shape[0], shapes[2][0]) if kept else x.new_empty(0)
        call = x, plan.tensors(), w.matrices, activation, _tf32(x)
        workspace = _workspace(_c.moe_mlp_fwd_workspace_bytes(*call), x)
        _c.moe_mlp_fwd(
            *call, out, gate_up if save else None, shared_gate_up if kept else None, residual,
            gate, y, workspace, _stream(x),
        )  # fmt: skip
        return out, gate_up, shared_gate_up, y

    @_on_device
    def moe_mlp_bwd(
        self,
        dout: Tensor,
        x: Tensor,
        plan: RoutingPlan,
        w: MoEWeights,
        gate_up: Tensor,
        shared_gate_up: Tensor,
        activation: str,
        needed: Sequence[bool] = (True,) * 4,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        dx, drow_weight = torch.empty_like(x), torch.empty_like(plan.row_weight)
        grads = _empty_gradients(w, plan.num_experts)
        saved = [t if t.numel() else None for t in (gate_up, shared_gate_up)]
        inputs, how = (x, plan.tensors(), w.matrices), (activation, _tf32(x))
        workspace = _workspace(
            _c.moe_mlp_bwd_workspace_bytes(*inputs, *how, not any(t.numel() for t in (gate_up, shared_gate_up))), x
        )
        _c.moe_mlp_bwd(
            dout, *inputs, *saved, *how, dx, drow_weight,
            *grads, workspace, _stream(x),
        )  # fmt: skip
        return dx, drow_weight, *grads

    @_on_device
    def token_choice(
        self, x: Tensor, gate_weight: Tensor, w: MoEWeights, top_k: int, activation: str, keep: bool, keep_gate_up: bool
    ) -> tuple[Tensor, Kept]:
        out = torch.empty_like(x)
        memory, offsets = _c.token_choice_fwd(
            x, _narrow(gate_weight), w.matrices, top_k, activation, _tf32(x), keep, keep_gate_up, out,
            _allocator(x), _stream(x),
        )  # fmt: skip
        kept = Kept((memory,), offsets)
        if not x.is_cuda:
            _expect_finite(kept, x, gate_weight)
        return out, kept

    @_on_device
    def token_choice_bwd(
        self,
        dout: Tensor,
        aux_scale: float,
        x: Tensor,
        gate_weight: Tensor,
        w: MoEWeights,
        kept: Kept,
        top_k: int,
        activation: str,
        kept_gate_up: bool,
        router: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None]:
        weight, dx, grads = _narrow(gate_weight), torch.empty_like(x), _empty_gradients(w, gate_weight.shape[0])
        dgate_weight = torch.empty_like(weight) if router else None
        _c.token_choice_bwd(
            dout, aux_scale, x, weight, w.matrices, kept.tensors[0], top_k, activation, _tf32(x), kept_gate_up, dx,
            *grads, dgate_weight, _allocator(x), _stream(x),
        )  # fmt: skip
        return dx, dgate_weight if weight is gate_weight or not router else dgate_weight.to(gate_weight.dtype), *grads

    @_on_device
    def gated_residual_bwd(self, dout: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        dy, dgate = torch.empty_like(y), torch.empty_like(gate)
        nbytes = _c.gated_residual_bwd_workspace_bytes(gate.shape[0], *y.shape)
        _c.gated_residual_bwd(dout, y, gate, dy, dgate, _workspace(nbytes, y), _stream(y))
        return dy, dgate


def _scores(x: Tensor, T: int, gate_weight: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return topk_weights, topk_ids and probs, to be filled."""
    topk_weights = x.new_empty(T, top_k, dtype=torch.float32)
    probs = x.new_empty(T, gate_weight.shape[0], dtype=torch.float32)
    return topk_weights, x.new_empty(T, top_k, dtype=torch.int32), probs


def _empty_gradients(w: MoEWeights, num_experts: int) -> list[Tensor | None]:
    """Return what the gradients of the four weights are to be written to, None for a shared expert's that is not."""
    if w.gate_up_index is None and w.down_index is None:
        return [t if t is None else torch.empty_like(t) for t in w[:4]]
    shapes = w.stacked_shapes(num_experts)
    return [*(w.down_proj.new_empty(*shape) for shape in shapes), *[None] * (4 - len(shapes))]


def _expect_finite(kept: Kept, x: Tensor, gate_weight: Tensor) -> None:
    _checks.finite(kept.probs(x.shape[0], gate_weight.shape[0]))


def _wide(gate_weight: Tensor) -> Tensor:
    return gate_weight.float()


def _narrow(gate_weight: Tensor) -> Tensor:
    return gate_weight.float() if gate_weight.dtype == torch.float64 else gate_weight
