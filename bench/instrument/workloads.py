"""From a case to something that runs: build it for a backend or a peer, verify it against the oracle.

`how` names who computes: a backend of moe_kernels, a peer, "plain" (the oracle's code in the case's dtype) or
"oracle" (float64).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import moe_kernels
from bench.instrument import loops, measure
from bench.instrument.cases import BACKENDS, ONLY_ON, PEERS, ROOMS, Case, make_inputs
from bench.instrument.rooms import OPS, PLAIN, ours
from bench.instrument.verify import BOUND, Check, judge
from moe_kernels.backends import base, registry
from reference.diffusion import RectifiedFlow
from reference.dit import DiTBlock, DiTMoE, DiTMoEConfig
from reference.moe import SparseMoeBlock

PEER_CLASSES = {
    "sorted_loop": (loops.SortedLoopMoE, 1),
    "authors_tp1": (loops.AuthorsMoE, 1),
    "authors_tp2": (loops.AuthorsMoE, 2),
}
GUIDANCE = 1.5
Named = dict[str, Tensor]
Run = Callable[[], Sequence[Tensor]]
Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # x0, noise, t, y of images


@dataclass
class Workload:
    """`run` is what is timed; `named` turns its result into tensors by name, for the verification."""

    case: Case
    run: Run
    named: Callable[[Sequence[Tensor]], Named]


def why_not(case: Case) -> str | None:
    """Say why a case cannot run here, or None: no such device, or its backend refuses it."""
    if case.device == "cuda" and not torch.cuda.is_available():
        return "this machine has no CUDA device"
    if case.dtype == "tf32" and case.device != "cuda":
        return "only GPUs have TF32"
    if ONLY_ON.get(case.backend, case.device) != case.device:
        return f"backend {case.backend} runs on {ONLY_ON[case.backend]}"
    if case.backend in BACKENDS:
        try:
            registry.choose(case.backend, _request(case))
        except RuntimeError as refusal:
            return str(refusal)
    return None


def _request(case: Case) -> Any:
    """Return the call that a backend is asked about; from the layer up, where it is several, the fused one."""
    room, s = (case.level if case.level in ROOMS else "moe_mlp"), case.shape
    kind = getattr(base, "Request", None) or base.Case  # what revisions before 2026-11-27 call it (bench/compare)
    return kind(room, case.torch_dtype, case.device, s.E, s.H, s.I, s.Is, s.activation)


@contextmanager
def arithmetic(dtype: str) -> Iterator[None]:
    """Let GPUs compute products of float32 in TF32 if that is the dtype of a case, and only then.

    Through torch's older switches: with `fp32_precision` set, torch.compile (2.13) fails to read them.
    """
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = dtype == "tf32"
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


def build(case: Case, how: str | None = None) -> Workload:
    """Build the workload of a case, by default for its own backend; same case, same numbers for everybody.

    Raises: ValueError for an unknown backend, a level its shape has no model for, T that is no whole number of images.
    """
    how = how or case.backend
    if how not in (*BACKENDS, *PEERS, "plain", "oracle"):
        raise ValueError(f"backend: got {how!r}, expected one of {', '.join((*BACKENDS, *PEERS))}")
    expect_model(case)
    if case.level in OPS:
        return _build_op(case, how)
    return (_build_block if case.level == "block" else _build_step)(case, how)


def expect_model(case: Case) -> None:
    """Raise ValueError for a level that needs a whole model, where the shape has none or T is no number of images."""
    images = case.shape.tokens_per_image * (2 if case.level == "sampling_step" else 1)
    if case.level not in OPS and (not case.shape.num_heads or case.T % images):
        raise ValueError(f"case {case}: expected a DiT-MoE shape and a multiple of {images} tokens")


def _build_op(case: Case, how: str) -> Workload:
    op, s = OPS[case.level], case.shape
    p = make_inputs(case, dtype=_dtype(case, how))
    p.shape, p.rule = s, case.routing
    p.plan = moe_kernels.dispatch(p.topk_ids, p.topk_weights, s.E, "eager")
    p.row_weight = p.plan.row_weight.clone()
    if case.level == "combine":
        generator = torch.Generator().manual_seed(1)
        p.y_rows, p.shared = (_draw(n, s.H, case=case, generator=generator).to(p.x) for n in (case.rows, case.T))
    leaves = {name: getattr(p, name) for name in op.leaves if getattr(p, name) is not None}
    if how in PEERS:
        return build_loop(case, how)
    rooms = ours(how) if how in BACKENDS else PLAIN
    return timed(case, how, lambda: op.call(p, rooms), op.outputs, leaves)


def build_loop(case: Case, how: str, wrap: Callable[[Callable], Callable] = lambda call: call) -> Workload:
    """Build a layer case for one of the PEERS; wrap is put around its call, e.g. torch.compile."""
    p = make_inputs(case, dtype=_dtype(case, how))
    peer = _peer_layer(case, how, p)
    leaves = {"x": p.x, "topk_weights": p.topk_weights, **dict(peer.named_parameters())}
    leaves.pop("gate.weight")
    call, given = wrap(peer.on_given_picks), (p.x, p.topk_weights, p.topk_ids)
    return timed(case, how, lambda: [call(*given)], OPS["layer"].outputs, leaves, _stack_experts)


def build_layer(
    case: Case, prepare: Callable[[SimpleNamespace], Run], merge: Callable[[Named], Named] = lambda named: named
) -> Workload:
    """Build a layer case for somebody else's code.

    Args:
        prepare: from the inputs (`make_inputs`, and the shape) to the forward that is timed. What it does itself, such
            as packing weights, is not; it may put parameters of its own in the place of the inputs.
        merge: from the gradients by name to those of the inputs' layout.
    """
    p = make_inputs(case)
    p.shape = case.shape
    forward, op = prepare(p), OPS["layer"]
    leaves = {name: getattr(p, name) for name in op.leaves if getattr(p, name) is not None}
    return timed(case, case.backend, forward, op.outputs, leaves, merge)


def _dtype(case: Case, how: str) -> torch.dtype:
    if how == "oracle":
        return torch.float64
    return torch.float32 if _needs_autocast(case, how) else case.torch_dtype


def _needs_autocast(case: Case, how: str) -> bool:
    """The authors' training path crashes in pure bf16: their way is fp32 parameters under autocast."""
    return how.startswith("authors") and case.mode != "fwd" and case.torch_dtype.itemsize == 2


def _autocast(case: Case, how: str) -> Any:
    return torch.autocast(case.device, case.torch_dtype) if _needs_autocast(case, how) else nullcontext()


def _draw(*size: int, case: Case, generator: torch.Generator) -> Tensor:
    return torch.randn(size, generator=generator).to(case.torch_dtype)


def timed(
    case: Case,
    how: str,
    forward: Run,
    outputs: Sequence[str],
    leaves: Named,
    merge: Callable[[Named], Named] = lambda named: named,
) -> Workload:
    """Make the run of a mode out of a forward: its outputs, or the leaves' gradients for drawn output gradients.

    how: as in `build`; merge: from the gradients by name to those that are judged.
    """

    def plain_forward() -> Sequence[Tensor]:
        with torch.no_grad():
            return forward()

    if case.mode == "fwd":
        return Workload(case, plain_forward, lambda result: dict(zip(outputs, result, strict=True)))

    def graph() -> list[Tensor]:
        with _autocast(case, how):
            return [y for y in forward() if y.is_floating_point()]

    tensors = [leaf.requires_grad_() for leaf in leaves.values()]
    kept, generator = graph(), torch.Generator().manual_seed(2)
    douts = [_draw(*y.shape, case=case, generator=generator).to(y) for y in kept]
    if case.mode != "bwd":
        kept = []  # else its saved tensors would stay allocated

    def run() -> Sequence[Tensor]:
        if case.mode == "bwd":
            return torch.autograd.grad(kept, tensors, douts, retain_graph=True, materialize_grads=True)
        return torch.autograd.grad(graph(), tensors, douts, materialize_grads=True)

    return Workload(case, run, lambda result: merge({f"d{n}": g for n, g in zip(leaves, result, strict=True)}))


def _peer_layer(case: Case, how: str, p: SimpleNamespace) -> loops.PeerMoE:
    """Make a peer whose parameters are views of the stacked weights."""
    s, (cls, tp) = case.shape, PEER_CLASSES[how]
    with torch.device("meta"):
        block = SparseMoeBlock(s.H, s.I, s.E, s.K, s.Is)
    block.gate.weight = nn.Parameter(p.gate_weight)
    experts = list(zip(block.experts, p.gate_up_proj, p.down_proj, strict=True))
    if s.Is:
        experts.append((block.shared_experts, p.shared_gate_up_proj, p.shared_down_proj))
    for mlp, gate_up_proj, down_proj in experts:
        gate, up = gate_up_proj.chunk(2)
        for linear, weight in ((mlp.gate_proj, gate), (mlp.up_proj, up), (mlp.down_proj, down_proj)):
            linear.weight = nn.Parameter(weight)
    return cls(block, tp).train(case.mode != "fwd")


def _stack_experts(named: Named) -> Named:
    """Turn per-expert gradients into the stacked ones of the other contenders."""

    def pair(prefix: str) -> Tensor:
        return torch.cat([named[f"{prefix}.gate_proj.weight"], named[f"{prefix}.up_proj.weight"]])

    out = {"dx": named["dx"], "dtopk_weights": named["dtopk_weights"]}
    count = sum(name.startswith("dexperts.") and name.endswith(".down_proj.weight") for name in named)
    out["dgate_up_proj"] = torch.stack([pair(f"dexperts.{e}") for e in range(count)])
    out["ddown_proj"] = torch.stack([named[f"dexperts.{e}.down_proj.weight"] for e in range(count)])
    if "dshared_experts.down_proj.weight" in named:
        out["dshared_gate_up_proj"] = pair("dshared_experts")
        out["dshared_down_proj"] = named["dshared_experts.down_proj.weight"]
    return out


def _config(case: Case) -> DiTMoEConfig:
    s = case.shape
    latent = {"patch_size": 2, "input_size": 2 * math.isqrt(s.tokens_per_image), "label_dropout": 0.0}
    experts = {"num_experts": s.E, "top_k": s.K, "mlp_ratio": s.I // s.H, "num_shared": s.Is // s.H}
    return DiTMoEConfig(s.depth, s.H, s.num_heads, qk_norm=s.qk_norm, **latent, **experts)


def build_model(cls: type[nn.Module], case: Case, how: str) -> nn.Module:
    """Build the oracle's module, nothing in it zero (adaLN-Zero would hide the MoE), and swap its MoE.

    On a GPU its own generator draws the weights: billions of them would take a CPU minutes.
    """
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.device(case.device):
        torch.manual_seed(0)
        module = cls(_config(case))
        for parameter in module.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=case.shape.H**-0.5)
    module = module.to(case.torch_dtype).to(_dtype(case, how)).train(case.mode != "fwd")
    if how in BACKENDS:
        moe_kernels.replace_moe(module, how)
    elif how in PEERS:
        peer, tp = PEER_CLASSES[how]
        loops.install(module, tp, peer)
    return module


def _build_block(case: Case, how: str) -> Workload:
    block, generator = build_model(DiTBlock, case, how), torch.Generator().manual_seed(1)
    L, H = case.shape.tokens_per_image, case.shape.H
    B = case.T // L
    to = dict(device=case.device, dtype=_dtype(case, how))
    x, condition = (_draw(*size, H, case=case, generator=generator).to(**to) for size in ((B, L), (B,)))
    leaves = {"x": x, "condition": condition, **dict(block.named_parameters())}
    return timed(case, how, lambda: [block(x, condition)], ("out",), leaves, group_parameters)


def group_parameters(named: Named) -> Named:
    """Join gradients into the router's, the experts' and the rest: single ones are too small for a fair error."""
    groups: dict[str, list[Tensor]] = {}
    for name, gradient in named.items():
        kind = name if name in ("dx", "dcondition") else "drest"
        if "gate.weight" in name:
            kind = "dgate_weight"
        elif "experts." in name:
            kind = "dexperts"
        groups.setdefault(kind, []).append(gradient.flatten())
    return {kind: torch.cat(parts) for kind, parts in groups.items()}


def latents(case: Case, how: str) -> Batch:
    """Draw x0, noise, t, y of as many images as a step has."""
    B = case.T // case.shape.tokens_per_image // (2 if case.level == "sampling_step" else 1)
    config, generator = _config(case), torch.Generator().manual_seed(1)
    size = (B, config.in_channels, config.input_size, config.input_size)
    dtype = _dtype(case, how)
    x0, noise = (_draw(*size, case=case, generator=generator).to(case.device, dtype) for _ in range(2))
    t = torch.rand(B, generator=generator).to(case.device, torch.float64 if how == "oracle" else torch.float32)
    return x0, noise, t, torch.randint(config.num_classes, (B,), generator=generator).to(case.device)


def _build_step(case: Case, how: str) -> Workload:
    model, batch = build_model(DiTMoE, case, how), latents(case, how)
    if case.level == "sampling_step":
        return sampling_step(case, model, batch)
    return train_step(case, model, batch, adamw(model), _needs_autocast(case, how))


def adamw(model: nn.Module, **options: bool) -> torch.optim.Optimizer:
    """Return an optimizer whose learning rate 0 does all the work and leaves the weights alone."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=True, **options)


def train_step(case: Case, model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer, low: bool) -> Workload:
    """Rectified-flow loss (low: under autocast), backward, AdamW; the result is the loss, named are the gradients."""
    x0, noise, t, y = batch
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def run() -> Sequence[Tensor]:
        optimizer.zero_grad()
        with torch.autocast(case.device, case.torch_dtype if low else None, enabled=low):
            loss = RectifiedFlow.loss(model, x0, y, t=t, noise=noise)
        loss.backward()
        optimizer.step()
        return [loss.detach()]

    def named(_: Sequence[Tensor]) -> Named:
        return group_parameters(
            {f"d{n}": torch.zeros_like(p) if p.grad is None else p.grad for n, p in trained.items()}
        )

    return Workload(case, run, named)


def sampling_step(case: Case, model: nn.Module, batch: Batch) -> Workload:
    _, noise, t, y = batch
    return timed(case, "", lambda: [model.forward_with_guidance(noise, t, y, GUIDANCE)], ("velocity",), {})


def check(case: Case, named: Named, bound: float = BOUND) -> Check:
    """Judge the tensors of a case by the correctness rule (bench/instrument/verify.py).

    e_torch is the eager backend's error; for eager itself and the peers that of the oracle's code in the case's dtype.
    From the block up gates may pick differently in different precision: whole tensors are judged.
    """
    rival = "eager" if case.backend in BACKENDS and case.backend != "eager" else "plain"
    key = replace(case, backend="", threads=1, mode="fwd" if case.mode == "fwd" else "fwdbwd")
    expected = (_expected(key, how) for how in ("oracle", rival))
    return judge(named, *expected, slices=case.level in OPS, bound=bound)


@lru_cache(maxsize=3)
def _expected(case: Case, how: str) -> Named:
    work = build(case, how)
    return {name: t.detach().double() for name, t in work.named(work.run()).items()}


def timer_of(case: Case) -> measure.Timer:
    """Return the timer of a case: of rooms and layers the kernels count, of blocks and steps their launches too."""
    if case.level not in OPS:
        return measure.time_calls
    both = case.mode == "fwdbwd"
    return partial(measure.time_queued, lead=measure.LONG_LEAD_CYCLES) if both else measure.time_queued
