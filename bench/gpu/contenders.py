"""Who is timed on a GPU: our backends, the loops that users have, grouped_mm as users write it, two libraries.

Contenders share a process there: CUDA libraries do not fight for cores, and events need one stream. Adapters follow
the libraries' own sources; one that does not fit the installed version raises, and its row says so.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.plan import S
from bench.instrument import workloads
from bench.instrument.cases import BACKENDS, ONLY_ON, ROOMS, Case
from bench.instrument.contender import Contender, by_name
from bench.peers.libraries import Compute, joined, plain_shared


def _needs(module: str) -> Callable[[], str | None]:
    """Return what says that a package is missing."""
    return lambda: None if importlib.util.find_spec(module) else f"not available: no package {module}"


def _compiled(build: Callable[[Case], workloads.Workload]) -> Callable[[Case], workloads.Workload]:
    def fresh(case: Case) -> workloads.Workload:
        torch._dynamo.reset()  # or the cases before this one count towards its limit of recompilations
        return build(case)

    return fresh


def grouped_mm(p: SimpleNamespace) -> Compute:
    """Sort the picks, gather, two grouped products, one weighted index_add; gradients by torch's autograd."""
    K, E = p.topk_ids.shape[1], p.shape.E

    def compute() -> Tensor:
        flat_ids = p.topk_ids.flatten()
        order = flat_ids.argsort(stable=True)
        row_token = order // K
        experts = torch.arange(E, device=order.device, dtype=flat_ids.dtype)
        ends = torch.searchsorted(flat_ids[order], experts, right=True, out_int32=True)
        gate, up = F.grouped_mm(p.x[row_token], p.gate_up_proj.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        y = F.grouped_mm(F.silu(gate) * up, p.down_proj.transpose(1, 2), offs=ends)
        weighted = y * p.topk_weights.flatten()[order].unsqueeze(-1)
        return torch.zeros_like(p.x, dtype=weighted.dtype).index_add(0, row_token, weighted).to(p.x.dtype)

    return compute


def liger(p: SimpleNamespace) -> Compute:
    """Liger-Kernel's fused experts: (x, gate_up (E, 2I, H) as [gate; up], down (E, H, I), int32 picks, weights)."""
    from liger_kernel.ops import LigerFusedMoEFunction

    return lambda: LigerFusedMoEFunction.apply(p.x, p.gate_up_proj, p.down_proj, p.topk_ids, p.topk_weights)


def sonic(p: SimpleNamespace) -> Compute:
    """SonicMoE on given picks. It wants gate and up rows in turn, weights as (2I, H, E) views, picks by token."""
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_general_routing_inputs

    (T, K), E, I = p.topk_ids.shape, p.shape.E, p.shape.I
    p.gate_up_proj = p.gate_up_proj.view(E, 2, I, -1).transpose(1, 2).reshape(E, 2 * I, -1)
    token_ids = torch.arange(T, dtype=torch.int32, device=p.x.device).repeat_interleave(K)
    flat_ids, stream = p.topk_ids.flatten(), torch.cuda.current_stream().cuda_stream

    def compute() -> Tensor:
        weights = p.gate_up_proj.permute(1, 2, 0), None, p.down_proj.permute(1, 2, 0), None
        scores, inference = p.topk_weights.flatten(), not torch.is_grad_enabled()
        picks = scores, token_ids, flat_ids
        return moe_general_routing_inputs(p.x, *picks, *weights, E, stream, ActivationType.SWIGLU, inference)[0]

    return compute


def _rows_apart(named: workloads.Named) -> workloads.Named:
    """Put the gate rows of sonic's gradient before the up rows again."""
    if "dgate_up_proj" not in named:
        return named
    both = named["dgate_up_proj"]
    return {**named, "dgate_up_proj": both.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)}


def _layer(
    routed: Callable[[SimpleNamespace], Compute], *merge: Callable[[workloads.Named], workloads.Named]
) -> Callable[[Case], workloads.Workload]:
    return lambda case: workloads.build_layer(case, joined(routed, plain_shared), *merge)


def _early(case: Case) -> workloads.Workload:
    """Our CUDA layer, each kernel launched to start before the one before it has ended."""
    from moe_kernels.backends.cuda import early_starts  # not before the stage "build" has put the extension there

    work = workloads.build(case, "cuda")

    def run() -> Sequence[Tensor]:
        with early_starts():
            return work.run()

    return replace(work, run=run)


def _cannot_start_early(case: Case) -> str | None:
    why = workloads.why_not(replace(case, backend="cuda"))
    hopper = why or torch.cuda.get_device_capability() == (9, 0)
    return why or (None if hopper else "only the images for sm_90 wait for their predecessors")


_ROOMS, _LAYER = (*ROOMS, "layer"), ("layer",)
EARLY = replace(
    by_name("cuda"), name="cuda_early", title="cuda, kernels started early (MOE_KERNELS_PDL)", build=_early,
    refuses=_cannot_start_early, levels=_LAYER, device="cuda",
)  # fmt: skip
CONTENDERS = (
    *(replace(by_name(name), levels=_ROOMS, device=ONLY_ON.get(name, "")) for name in BACKENDS),
    *(replace(by_name(name), levels=_LAYER, strict=False) for name in ("authors_tp1", "sorted_loop")),
    EARLY,
    Contender("grouped_mm", build=_layer(grouped_mm), levels=_LAYER),
    Contender(
        "liger", build=_layer(liger), package="liger-kernel", missing=_needs("liger_kernel"), levels=_LAYER,
        dtypes=("bf16", "fp16", "fp32"), device="cuda",
    ),
    Contender(
        "sonic", build=_layer(sonic, _rows_apart), package="sonic-moe", missing=_needs("sonicmoe"), levels=_LAYER,
        dtypes=("bf16", "fp16"), device="cuda",
    ),
    Contender(
        "authors_compiled", build=_compiled(lambda case: workloads.build_loop(case, "authors_tp1", torch.compile)),
        levels=_LAYER, compiles=True,
    ),
    Contender(
        "grouped_mm_compiled", build=_compiled(_layer(lambda p: torch.compile(grouped_mm(p)))), levels=_LAYER,
        compiles=True,
    ),
)  # fmt: skip
RACED_WITH_COMPILED = ("triton", "cuda", "native", "authors_tp1", "grouped_mm")


def contenders_of(case: Case, compiled: bool) -> list[Contender]:
    """Return who belongs to a case, able to run it or not; of ours those of its device, EARLY at S/2 only.

    compiled: those that torch.compile makes, and the few that they are compared with; else all others.
    """
    here = [c for c in CONTENDERS if case.level in c.levels and (not c.ours or c.device in ("", case.device))]
    here = [c for c in here if c is not EARLY or case.shape.name == S]
    return [c for c in here if (c.compiles or c.name in RACED_WITH_COMPILED if compiled else not c.compiles)]
