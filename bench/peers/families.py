"""Layers and blocks of the family's models: as their packages compute them, and after replace_moe.

A case of a family (routing "own") is the module of the model's own package with its router, at the published sizes; of
a model without a package it is our stand-in for it, in plain torch (standins.py). The oracle is that module in float64,
plain torch the module itself in the case's dtype. All contenders share its parameters. In bfloat16, where a router's
scores tie, the oracle has the picks and the weights of the original: what is judged are the experts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from importlib import import_module
from itertools import product
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import moe_kernels
from bench.instrument import workloads
from bench.instrument.cases import OWN, Case, backends_on
from bench.instrument.contender import Contender, by_name
from bench.instrument.race import InProcess, race
from bench.instrument.shapes import MODEL_SHAPES, MoEShape
from bench.instrument.verify import Check, judge
from bench.peers import standins
from moe_kernels.adapters.family import Routed, family_of

TEXT_TOKENS = 256  # that a block attends to beside the image
SEEDS = 20  # drawn until float32 and float64 pick the same
CALIBRATION = 8192  # tokens
ORIGINAL = "original"
NARROW = "bf16"  # of layers, forward
HIDREAM = "diffusers.models.transformers.transformer_hidream_image"
NUCLEUS = "diffusers.models.transformers.transformer_nucleusmoe_image"
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Part:
    """A layer or a block of a model: how it is made, and from a generator of numbers what it is called with."""

    make: Callable[[MoEShape], nn.Module]
    inputs: Callable[[Callable[..., Tensor], MoEShape, int, int], Inputs]


@dataclass(frozen=True)
class Model:
    """One member of the family. variants: other ways of its package to compute the same, by contender.

    package: whose code the module is; torch where it is our stand-in.
    own_picks: whether ours takes the original's picks where scores are equal, as most are in bfloat16.
    """

    shape: MoEShape
    parts: Mapping[str, Part]
    variants: Mapping[str, tuple[str, Callable[[nn.Module], None]]] = field(default_factory=dict)
    package: str = "diffusers"
    own_picks: bool = True

    @property
    def titles(self) -> dict[str, str]:
        """Return the other ways to compute it than ours, by contender."""
        own = "its structure in plain torch" if self.package == "torch" else f"{self.package}' own"
        return {ORIGINAL: own, **{variant: title for variant, (title, _) in self.variants.items()}}

    def missing(self) -> str | None:
        """Say what is not installed."""
        try:
            import_module(self.package)
        except ImportError:
            return f'not installed: pip install "dit-moe-kernels[{self.package}]"'
        return None


def _tokens(draw: Callable[..., Tensor], s: MoEShape, B: int, L: int) -> Inputs:
    return (draw(B, L, s.H),), {}


def _side(L: int) -> tuple[int, int]:
    """Return the sides of an image of L tokens, as square as whole numbers allow."""
    height = next(n for n in range(math.isqrt(L), 0, -1) if L % n == 0)
    return height, L // height


def _hidream_layer(s: MoEShape) -> nn.Module:
    return import_module(HIDREAM).MOEFeedForwardSwiGLU(s.H, 4 * s.H, s.E, s.K)


def _hidream_block(s: MoEShape) -> nn.Module:
    return import_module(HIDREAM).HiDreamImageSingleTransformerBlock(s.H, s.H // 128, 128, s.E, s.K)


def _hidream_block_inputs(draw: Callable[..., Tensor], s: MoEShape, B: int, L: int) -> Inputs:
    height, width = _side(L)
    ids = torch.cartesian_prod(torch.arange(1), torch.arange(height), torch.arange(width))
    rotary = import_module(HIDREAM).HiDreamImageEmbedND(10000, (64, 32, 32))(ids.expand(B, -1, -1))
    return (draw(B, L, s.H),), {"temb": draw(B, s.H), "image_rotary_emb": rotary}


CAPACITY = {"capacity_factor": 2.0, "use_sigmoid": False, "route_scale": 2.5}  # as published; 4 in the first layers


def _nucleus_layer(s: MoEShape) -> nn.Module:
    return _filled(import_module(NUCLEUS).NucleusMoELayer(s.H, s.I, s.E, **CAPACITY))


def _nucleus_block(s: MoEShape) -> nn.Module:
    heads = s.H // 128
    sizes = {"dim": s.H, "num_attention_heads": heads, "attention_head_dim": 128, "num_key_value_heads": heads // 4}
    experts = {"moe_enabled": True, "num_experts": s.E, "moe_intermediate_dim": s.I, **CAPACITY}
    return _filled(import_module(NUCLEUS).NucleusMoEImageTransformerBlock(**sizes, **experts))


def _filled(module: nn.Module) -> nn.Module:
    """Draw the experts, which the package leaves to a checkpoint."""
    for name, parameter in module.named_parameters():
        if "experts." in name:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return module


def _nucleus_block_inputs(draw: Callable[..., Tensor], s: MoEShape, B: int, L: int) -> Inputs:
    rotary = import_module(NUCLEUS).NucleusMoEEmbedRope(10000, [16, 56, 56], scale_rope=True)
    rotary = rotary((1, *_side(L)), max_txt_seq_len=TEXT_TOKENS)
    text = draw(B, TEXT_TOKENS, 3584)
    return (draw(B, L, s.H), text, draw(B, s.H)), {"image_rotary_emb": rotary}


def _grouped(module: nn.Module) -> None:
    for inner in module.modules():
        if hasattr(inner, "use_grouped_mm"):
            inner.use_grouped_mm = True


def _promoe_inputs(draw: Callable[..., Tensor], s: MoEShape, B: int, L: int) -> Inputs:
    """As under guidance: every second image has no label."""
    return (draw(B, L, s.H), torch.where(torch.arange(B) % 2 > 0, 1000, torch.arange(B))), {}


def _diffmoe(s: MoEShape) -> nn.Module:
    """Set the thresholds such that its experts take in eval what they take in training."""
    module = standins.DiffMoE(s.K, s=s)
    with torch.no_grad():
        module.expert_threshold.zero_()
        module.update_threshold(module.capacity_predictor(torch.randn(CALIBRATION, s.H)))
    module.expert_threshold /= 1 - module.ema_decay
    return module


def _standin(
    name: str, make: Callable[[MoEShape], nn.Module], inputs: Callable[..., Inputs] = _tokens, own_picks: bool = True
) -> Model:
    return Model(MODEL_SHAPES[name], {"layer": Part(make, inputs)}, package="torch", own_picks=own_picks)


MODELS = {
    model.shape.name: model
    for model in (
        Model(
            MODEL_SHAPES["HiDream-I1"],
            {
                "layer": Part(_hidream_layer, _tokens),
                "block": Part(_hidream_block, _hidream_block_inputs),
            },
        ),
        Model(
            MODEL_SHAPES["Nucleus-Image"],
            {
                "layer": Part(
                    _nucleus_layer,
                    lambda draw, s, B, L: ((draw(B, L, s.H), draw(B, L, s.H)), {"timestep": draw(B, s.H)}),
                ),
                "block": Part(_nucleus_block, _nucleus_block_inputs),
            },
            {"original_grouped": ("diffusers' own, grouped_mm", _grouped)},
        ),
        _standin("DSMoE-S-E48", lambda s: standins.DSMoE(s=s)),
        _standin("DSMoE-L-E48", lambda s: standins.DSMoE(s=s)),
        _standin("JiTMoE-B-E16", lambda s: standins.JiTMoE(s=s)),
        _standin("ProMoE-B", lambda s: standins.ProMoE(s=s), _promoe_inputs),
        _standin("EC-DiT-L-E8", lambda s: standins.SparseMoEBlock(s.K, "tanh", s)),
        _standin("DiffMoE-L-E8", _diffmoe, own_picks=False),
    )
}


def images(case: Case) -> tuple[int, int]:
    """Return B and L of a case; fewer tokens than an image has are one smaller image. ValueError for other numbers."""
    B = max(1, case.T // case.shape.tokens_per_image)
    if case.T % B:
        raise ValueError(f"--tokens: got {case.T}, expected a multiple of {case.shape.tokens_per_image}, or fewer")
    return B, case.T // B


@lru_cache(maxsize=1)
def _made(case: Case) -> tuple[nn.Module, Inputs]:
    """Make the module and its inputs, such that its routers pick the same in float32 and in float64."""
    part, shape = MODELS[case.shape.name].parts[case.level], case.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = part.make(shape).train(case.mode != "fwd")
        if case.dtype == NARROW:
            given = part.inputs(partial(_randn, torch.Generator().manual_seed(0)), shape, *images(case))
            return module.to(case.torch_dtype), _cast(given, case.torch_dtype)
        for seed in range(SEEDS):
            generator = torch.Generator().manual_seed(seed)
            given = part.inputs(partial(_randn, generator), shape, *images(case))
            if case.level != "layer" or _same_picks(module, given):
                return module, given
    raise ValueError(f"case {case}: float32 and float64 pick otherwise in each of {SEEDS} draws")


def _randn(generator: torch.Generator, *size: int) -> Tensor:
    return torch.randn(size, generator=generator)


@torch.no_grad()
def _same_picks(module: nn.Module, given: Inputs) -> bool:
    router, wide = copy.copy(module), _cast(given, torch.float64)
    own = {name: inner for name, inner in module._modules.items() if "expert" not in name}  # which are large
    router._modules = module._modules | {name: copy.deepcopy(inner).double() for name, inner in own.items()}
    for kind in ("_parameters", "_buffers"):
        setattr(router, kind, _cast(getattr(module, kind), torch.float64))
    plans = [family_of(m).route(m, "eager", *g[0], **g[1]).plan for m, g in ((module, given), (router, wide))]
    return all(torch.equal(getattr(plans[0], n), getattr(plans[1], n)) for n in ("row_token", "expert_offsets"))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Return inputs with their real tensors in a dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: _cast(v, dtype) for name, v in value.items()}
    return tuple(_cast(v, dtype) for v in value) if isinstance(value, tuple) else value


def build(case: Case, how: str | None = None) -> workloads.Workload:
    """Build a case of a family: how, by default the case's backend, is a backend of ours, "original" or one of the
    model's variants, or "oracle"."""
    how, (module, given) = how or case.backend, _made(replace(case, backend="", threads=1))
    if how == "oracle" and case.dtype == NARROW:
        return workloads.Workload(case, lambda: [_with_its_picks(module, given)], lambda y: {"out": y[0]})
    if how == "oracle":
        module, given = copy.deepcopy(module).double(), _cast(given, torch.float64)
    else:
        module = copy.deepcopy(module, {id(p): p for p in module.parameters()})
    if how in backends_on("cpu"):
        moe_kernels.replace_moe(module, how)
    elif variant := MODELS[case.shape.name].variants.get(how):
        variant[1](module)
    (x, *args), more = given
    x = x.clone()
    leaves = {"x": x, **dict(module.named_parameters())}
    run = partial(_outputs, module, case.mode, x, *args, **more)
    return workloads.timed(case, how, run, ("out",), leaves, workloads.group_parameters)


@torch.no_grad()
def _with_its_picks(module: nn.Module, given: Inputs) -> Tensor:
    """Return what a layer gives in float64 with the picks and the weights of its router in its own dtype."""
    family, (args, more) = family_of(module), given
    routed = family.route(module, "eager", *args, **more)
    plan = replace(routed.plan, row_weight=routed.plan.row_weight.double())
    wide = copy.deepcopy(module).double()
    moe_kernels.replace_moe(wide, "eager")
    with mock.patch.object(type(family), "route", lambda *_, **__: Routed(routed.tokens.double(), plan, routed.extra)):
        return _outputs(wide, "fwd", *_cast(args, torch.float64), **_cast(more, torch.float64))[0]


def _outputs(module: nn.Module, mode: str, *args: Any, **more: Any) -> list[Tensor]:
    """Return what a module gives: some return a loss or predictions beside y, in training."""
    out = module(*args, **more)
    tensors = [t for t in (out if isinstance(out, tuple) else (out,)) if t is not None]
    return tensors if mode == "fwd" else [t for t in tensors if t.requires_grad]


@lru_cache(maxsize=2)
def _expected(case: Case, how: str) -> workloads.Named:
    work = build(case, how)
    return {name: t.detach() for name, t in work.named(work.run()).items()}


class Families(InProcess):
    """Contenders in this process, held against the float64 original; plain torch is the original in float32."""

    def judge(self, contender: Contender, case: Case, result: Any) -> Check:
        known = replace(case, backend="", threads=1)
        oracle, plain = _expected(known, "oracle"), _expected(known, ORIGINAL)
        named = self.works[contender.name].named(result)
        return judge(named, oracle, plain, slices=case.level == "layer", bound=contender.bound)


def contenders(name: str, asked: str | None = None) -> list[Contender]:
    """Return who takes part at a model: ours by default "native", its package's own code and the variants of it.

    Raises: ValueError naming one that is unknown.
    """
    model = MODELS[name]
    titles = model.titles
    known = (*backends_on("cpu"), *titles)
    names = asked.split(",") if asked else ("native", *titles)
    if unknown := [word for word in names if word not in known]:
        raise ValueError(f"--backends: got {unknown[0]!r}, expected some of {', '.join(known)}")
    about = {"build": build, "dtypes": ("fp32", NARROW), "modes": ("fwd", "fwdbwd")}
    foreign = {n: Contender(n, titles[n], package=model.package, missing=model.missing, **about) for n in titles}
    return [foreign.get(n) or replace(by_name(n), **about) for n in names]


@dataclass(frozen=True)
class FamilyRace:
    """A case of a family's model, who is timed at it, and for how long."""

    case: Case
    contenders: tuple[Contender, ...]
    min_rounds: int
    max_seconds: float

    def run(self) -> Iterator[dict]:
        """Yield the rows, of kind "time"."""
        try:
            yield from race(self.case, self.contenders, self.min_rounds, self.max_seconds, Families())
        finally:
            _made.cache_clear()
            _expected.cache_clear()


def races(
    name: str,
    level: str,
    tokens: list[int],
    dtypes: list[str],
    modes: list[str],
    threads: list[int],
    who: str | None,
    *timing: Any,
) -> Iterator[FamilyRace]:
    """Yield a model's races. timing: least rounds, seconds. Raises: ValueError for a level that it does not have, and
    for bf16 of anything but a layer's forward."""
    model = MODELS[name]
    if level not in model.parts:
        raise ValueError(f"--model {name}: got level {level!r}, expected {' or '.join(model.parts)}")
    if reason := model.missing():
        raise ValueError(f"--model {name}: {reason}")
    if NARROW in dtypes and (level, modes) != ("layer", ["fwd"]):
        raise ValueError(
            f"--dtypes: got {NARROW} for {level} {', '.join(modes)}, expected layer and --modes fwd with it"
        )
    if NARROW in dtypes and not model.own_picks:
        raise ValueError(f"--dtypes: got {NARROW}, expected fp32: of equal scores {name} and ours pick others")
    for T, dtype, mode, n in product(tokens, dtypes, modes, threads):
        case = Case(level, "any", model.shape, OWN, T, dtype, mode, n)
        images(case)
        yield FamilyRace(case, tuple(contenders(name, who)), *timing)
