"""Blocks and whole models of the families, tiny and random, and how two ways to compute one are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.peers import standins as timed
from moe_kernels import replace_moe
from moe_kernels.adapters.family import family_of
from tests.contenders import BACKENDS
from tests.product.families import standins
from tests.product.families.standins import E, H, I, K
from tests.trap_cases import DEVICE, sample

B, S = 2, 12
Arguments = dict[str, Any]
CONTENDERS = [
    pytest.param(backend, dtype, id=f"{backend}-{str(dtype).removeprefix('torch.')}")
    for backend in ("native", "eager")
    if backend in BACKENDS
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
]


@dataclass(frozen=True)
class Case:
    """`make` and `arguments` draw from torch's generator; `call` returns a tensor."""

    name: str
    make: Callable[[], nn.Module]
    arguments: Callable[[], Arguments]
    blocks: int = 1
    call: Callable[[nn.Module, Arguments], Tensor] = lambda module, arguments: module(**arguments)
    training: bool = False  # where the block computes something else in training
    several: bool = False  # no token with one pick: normalised weights have no gradient there, only its rounding

    def __str__(self) -> str:
        return self.name


def x_and(**more: Callable[[], Any]) -> Callable[[], Arguments]:
    return lambda: {"x": sample(torch.randn, B, S, H)} | {name: draw() for name, draw in more.items()}


def by_position(module: nn.Module, arguments: Arguments) -> Tensor:
    return module(*arguments.values())


def hidream_block() -> nn.Module:
    library = pytest.importorskip("diffusers.models.transformers.transformer_hidream_image")
    return library.MOEFeedForwardSwiGLU(H, I, E, K)


def nucleus_block(use_sigmoid: bool, capacity_factor: float) -> nn.Module:
    library = pytest.importorskip("diffusers.models.transformers.transformer_nucleusmoe_image")
    return filled(library.NucleusMoELayer(H, I, E, capacity_factor, use_sigmoid, 2.5))


def filled(module: nn.Module) -> nn.Module:
    """Write numbers into parameters of torch.empty."""
    for name, parameter in module.named_parameters():
        if "experts." in name:
            nn.init.normal_(parameter, std=0.2)
    return module


def picks() -> Arguments:
    x = sample(torch.randn, S, H)
    weights, ids = sample(torch.rand, S, E).topk(K)
    return {"hidden_states": x, "top_k_index": ids, "top_k_weights": weights}


def heads() -> Arguments:
    return {"x": sample(torch.randn, S, 3 * H // 2)}


def all_results(module: nn.Module, arguments: Arguments) -> Tensor:
    """Return (B, S, ...): what a block returns beside y behind it, a loss as a column; None is nothing."""
    y, *more = (t for t in module(*arguments.values()) if t is not None)
    return torch.cat([y, *(t.to(y.dtype).expand(B, S, -1 if t.dim() else 1) for t in more)], -1)


LABELLED = x_and(labels=lambda: torch.tensor([3, 1000, 5], device=DEVICE)[:B])
NUCLEUS = x_and(unmodulated=lambda: sample(torch.randn, B, S, H), timestep=lambda: sample(torch.randn, B, H))
BLOCKS = [
    Case("HiDream block", hidream_block, x_and()),
    Case("Nucleus block", lambda: nucleus_block(False, 3.7), NUCLEUS, several=True, call=by_position),
    Case("Nucleus sigmoid", lambda: nucleus_block(True, 4.0), NUCLEUS, several=True, call=by_position),
    Case("LingBot", standins.LingBotVideoSparseMoeBlock, x_and(), call=by_position),
    Case(
        "LingBot masked",
        standins.LingBotVideoSparseMoeBlock,
        x_and(padding_mask=lambda: torch.arange(B * S, device=DEVICE) % 4 > 0),
        call=by_position,
    ),
    Case("DSMoE", timed.DSMoE, x_and(), call=by_position),
    Case("DSMoE alone", lambda: timed.DSMoE(False), x_and(), call=by_position),
    Case("DSMoE biases", lambda: timed.DSMoE(bias=True), x_and(), call=by_position),
    Case("JiTMoE", timed.JiTMoE, x_and(), call=by_position),
    Case("MAGI-2", standins.CoreMultiHeadMoE, heads),
    Case("ProMoE", timed.ProMoE, LABELLED, call=all_results),
    Case(
        "ProMoE 2, in training",
        lambda: timed.ProMoE("softmax", 2, alpha=0.1, use_top_k_for_routing_contrastive=False),
        LABELLED,
        call=all_results,
        training=True,
    ),
    Case(
        "ProMoE without, in training",
        lambda: timed.ProMoE("sigmoid", 2, null=False, shared=False, alpha=0.1, seq_aux=True),
        x_and(labels=lambda: torch.arange(B, device=DEVICE)),
        call=all_results,
        training=True,
    ),
    Case("ProMoE by expert", lambda: timed.ProMoEByExpert("softmax", 2), LABELLED, call=all_results),
    Case(
        "ProMoE by expert, in training",
        timed.ProMoEByExpert,
        LABELLED,
        call=all_results,
        training=True,
    ),
    Case("DiffMoE", timed.DiffMoE, x_and(), call=all_results),
    Case(
        "DiffMoE in training",
        lambda: timed.DiffMoE(form=None),
        x_and(),
        call=all_results,
        training=True,
    ),
    Case("EC-DiT", timed.SparseMoEBlock, x_and()),
    Case("EC-DiT MLP", lambda: timed.SparseMoEBlock(form="tanh"), x_and()),
    Case("Hunyuan", standins.HunyuanMoE, x_and(), call=by_position),
    Case("transposed", lambda: standins.TransposedExperts(True), picks),
    Case("transposed gelu", lambda: standins.TransposedExperts(False), picks),
    Case("transposed biases", lambda: standins.TransposedExperts(True, True), picks),
    Case("transposed gelu_tanh biases", lambda: standins.TransposedExperts(False, True, "tanh"), picks),
]


def hidream() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    return diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, caption_channels=[16, 8], text_emb_dim=16, num_routed_experts=4,
        num_activated_experts=2, axes_dims_rope=(4, 2, 2), max_resolution=(8, 8), llama_layers=[0, 1],
        force_inference_output=True,
    )  # fmt: skip


def hidream_arguments() -> Arguments:
    return {
        "hidden_states": sample(torch.randn, B, 4, 4, 4),
        "timesteps": torch.tensor([700.0, 300.0], device=DEVICE),
        "encoder_hidden_states_t5": sample(torch.randn, B, 3, 16),
        "encoder_hidden_states_llama3": sample(torch.randn, 2, B, 2, 8),
        "pooled_embeds": sample(torch.randn, B, 16),
        "return_dict": False,
    }


def nucleus() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.NucleusMoEImageTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, axes_dims_rope=(4, 2, 2), mlp_ratio=2.0, moe_enabled=True,
        dense_moe_strategy="leave_first_block_dense", num_experts=4, moe_intermediate_dim=24,
        capacity_factors=[0.0, 2.0, 1.0],
    )  # fmt: skip
    return filled(model)


def nucleus_arguments() -> Arguments:
    return {
        "hidden_states": sample(torch.randn, B, 8, 4),
        "img_shapes": [(1, 2, 4)] * B,
        "encoder_hidden_states": sample(torch.randn, B, 3, 8),
        "timestep": torch.tensor([0.7, 0.3], device=DEVICE),
        "return_dict": False,
    }


SMALL = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2,
}  # fmt: skip


def mixtral() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SMALL, num_local_experts=4))
    model.set_experts_implementation("eager")  # the default knows no float64
    for layer in model.model.layers:  # as initialised all logits are next to equal, and what a gate learns cancels
        nn.init.normal_(layer.mlp.gate.weight)
    return model


def qwen2_moe() -> nn.Module:
    """With a shared expert of its own behind a sigmoid, and a dense layer of the experts' names."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2MoeConfig(
        **SMALL, shared_expert_intermediate_size=16, num_experts=4, mlp_only_layers=[0]
    )
    model = transformers.Qwen2MoeForCausalLM(config)
    model.set_experts_implementation("eager")
    nn.init.normal_(model.model.layers[1].mlp.gate.weight)
    return model


def words() -> Arguments:
    return {"input_ids": sample(torch.randint, 0, 32, (B, 6)), "use_cache": False}


def first(model: nn.Module, arguments: Arguments) -> Tensor:
    return model(**arguments)[0]


def ten_steps(time: str) -> Callable[[nn.Module, Arguments], Tensor]:
    """Return a denoising loop of ten steps; `time` is what the model calls it."""

    def call(model: nn.Module, arguments: Arguments) -> Tensor:
        x = arguments["hidden_states"]
        for step in range(10):
            now = arguments | {"hidden_states": x, time: arguments[time] * (1 - step / 10)}
            x = x - 0.1 * model(**now)[0]
        return x

    return call


MODELS = [
    Case("HiDream", hidream, hidream_arguments, 2, first),
    Case("Nucleus", nucleus, nucleus_arguments, 2, first),
    Case("Mixtral", mixtral, words, 2, first),
    Case("Qwen2-MoE", qwen2_moe, words, 1, first),
]
LOOPS = [
    Case("HiDream x 10", hidream, hidream_arguments, 2, ten_steps("timesteps")),
    Case("Nucleus x 10", nucleus, nucleus_arguments, 2, ten_steps("timestep")),
]


def build(case: Case, seed: int, dtype: torch.dtype) -> tuple[nn.Module, Arguments]:
    torch.manual_seed(seed)
    module = case.make().to(DEVICE)
    return cast(module, case.arguments(), dtype)


def cast(module: nn.Module, arguments: Arguments, dtype: torch.dtype) -> tuple[nn.Module, Arguments]:
    def one(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return module.to(dtype), {name: one(value) for name, value in arguments.items()}


def blocks_of(module: nn.Module) -> Iterator[nn.Module]:
    return (inner for inner in module.modules() if family_of(inner))


@cache
def with_equal_picks(case: Case, seed: int, dtype: torch.dtype) -> int:
    """Return the first seed from here where the routers say the same in float64, in a dtype, and after replace_moe.

    A pick that flips changes a token by its whole weight, and no error rule speaks of that. Behind a first block each
    way to compute has roundings of its own, so each is asked.
    """
    while True:
        exact = picks_of(case, *as_oracle(*build(case, seed, dtype)))
        single = case.several and any((offsets.diff() == 1).any() for offsets in exact[2::3])
        if not single and all(same(exact, picks_of(case, *way)) for way in ways(case, seed, dtype)):
            return seed
        seed += 10_000


def ways(case: Case, seed: int, dtype: torch.dtype) -> Iterator[tuple[nn.Module, Arguments, str]]:
    """Yield what computes a case in a dtype, and the backend that routes: the original, and each that replaces it."""
    yield *build(case, seed, dtype), "eager"
    for backend in ("native", "eager"):
        if backend in BACKENDS:
            module, arguments = build(case, seed, dtype)
            replace_moe(module, backend=backend)
            yield module, arguments, backend


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


def as_oracle(module: nn.Module, arguments: Arguments) -> tuple[nn.Module, Arguments]:
    return cast(module, arguments, torch.float64)


def picks_of(case: Case, module: nn.Module, arguments: Arguments, backend: str = "eager") -> list[Tensor]:
    found = []

    def record(block: nn.Module, args: tuple, kwargs: dict) -> None:
        plan = family_of(block).route(block, backend, *args, **kwargs).plan
        found.extend((plan.row_token, plan.expert_offsets, plan.token_row_offsets))

    handles = [block.register_forward_pre_hook(record, with_kwargs=True) for block in blocks_of(module)]
    with torch.no_grad():
        case.call(module, arguments)
    for handle in handles:
        handle.remove()
    return found


def computed(
    case: Case, seed: int, how: str, dtype: torch.dtype, training: bool = False, gradients: bool = True
) -> dict[str, Tensor]:
    """Return y and all gradients of its square; `how` as `judge` has it.

    The originals compute in training where only that gives gradients.
    """
    module, arguments = build(case, with_equal_picks(case, seed, dtype), dtype)
    module.train(training or case.training)
    if how == "oracle":
        module, arguments = as_oracle(module, arguments)
    if how in ("oracle", "loop"):
        for block in blocks_of(module):
            if gradients and not family_of(block).differentiates(block):
                block._force_inference_output = False
                block.train()
    else:
        assert replace_moe(module, backend=how) == case.blocks
    wanted = {f"d{n}": v.requires_grad_() for n, v in arguments.items() if differentiable(v)} if gradients else {}
    wanted |= {name: p for name, p in module.named_parameters() if gradients}
    with torch.set_grad_enabled(gradients):
        y = case.call(module, arguments)
        grads = torch.autograd.grad(y.square().sum(), list(wanted.values()), allow_unused=True) if gradients else ()
    found = {name: g for name, g in zip(wanted, grads, strict=True) if g is not None}
    if case in (*MODELS, *LOOPS):
        found = joined(found)
    matrices = {name for name, g in found.items() if g.dim() == 2 and not name.startswith("d")}
    # One slice (see error_rule) of a matrix: a row of its gradient may be next to nothing.
    return {"y": y.detach()} | {name: g[None] if name in matrices else g for name, g in found.items()}


def joined(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Make one gradient of each block's experts: behind a whole model, that of one with few tokens may cancel."""
    groups: dict[str, list[Tensor]] = {}
    for name, gradient in gradients.items():
        block, found, _ = name.partition("experts")
        groups.setdefault(block + found, []).append(gradient)
    return {name: torch.cat([g.flatten() for g in gs]) if len(gs) > 1 else gs[0] for name, gs in groups.items()}


def differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
