"""What adaLN puts around the layer: LayerNorm, modulation and gating in front, gate and residual behind."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

import reference.moe
import reference.rooms
import reference.routing
from moe_kernels import ExpertChoice, MoELayer, TokenChoice, modulated_gating, moe_mlp, replace_moe
from reference.dit import modulate
from reference.moe import SparseMoeBlock
from tests.contenders import IN_TORCH, each_backend, each_contender, gradients, moe_loop, moe_oracle, plan_of, refusals
from tests.error_rule import judge
from tests.trap_cases import BY_NAME, PLAIN, make_problem, sample

SHAPES = {  # B, L, H, E, K
    "plain": (3, 7, 32, 5, 2),
    "no image": (0, 7, 32, 5, 2),
    "one token": (1, 1, 16, 4, 1),
    "image longer than a block": (2, 45, 72, 8, 2),
    "many experts": (2, 9, 40, 48, 5),
    "odd width": (2, 5, 21, 6, 3),
}


def draw(shape, dtype, seed):
    """x far from zero, so that a variance by sums of squares would show; tokens whose logits nearly tie drawn again."""
    B, L, H, E, K = shape
    g = torch.Generator().manual_seed(seed)
    x = (sample(torch.randn, B, L, H, generator=g) + 3 * sample(torch.randn, B, L, 1, generator=g)).to(dtype)
    shift, scale = (sample(torch.randn, B, H, generator=g).mul(0.5).to(dtype) for _ in range(2))
    gate_weight = (sample(torch.randn, E, H, generator=g) * H**-0.5).to(dtype)
    near = torch.ones(B, L, dtype=torch.bool)
    while near.any():
        x[near] = (sample(torch.randn, int(near.sum()), H, generator=g) + 3).to(dtype)
        top = (prologue(x.double(), shift.double(), scale.double()) @ gate_weight.double().T).sort(-1, descending=True)
        gap = (-top.values[..., : K + 1].diff(dim=-1)).amin(-1) if E > 1 else torch.ones(B, L)
        near = gap < (0.05 if dtype == torch.bfloat16 else 5e-3)
    return x, shift, scale, gate_weight


def prologue(x, shift, scale):
    return modulate(F.layer_norm(x, x.shape[-1:], eps=1e-6), shift[:, None], scale[:, None])


def compute_modulated(shape, dtype):
    def compute(seed, how):
        (B, L, H, E, K), g = shape, torch.Generator().manual_seed(seed)
        inputs = draw(shape, dtype, seed)
        dtokens, dweights, dprobs = (sample(torch.randn, B * L, n, generator=g).to(dtype) for n in (H, K, E))
        inputs = [(t.double() if how == "oracle" else t).detach().requires_grad_() for t in inputs]
        if how in IN_TORCH:
            tokens = prologue(*inputs[:3]).reshape(-1, H)
            weights, ids, probs = reference.rooms.gating(tokens, inputs[3], K)
        else:
            tokens, weights, ids, probs = modulated_gating(*inputs, K, backend=how)
        loss = sum((t * d.to(t.dtype)).sum() for t, d in ((tokens, dtokens), (weights, dweights), (probs, dprobs)))
        names = ("dx", "dshift", "dscale", "dgate_weight")
        gradients = dict(zip(names, torch.autograd.grad(loss, inputs), strict=True))
        return {"tokens": tokens, "topk_weights": weights, "probs": probs, "topk_ids": ids} | gradients

    return compute


@each_contender
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_modulated_gating(shape, backend, dtype, seed):
    with refusals(backend, shape is SHAPES["odd width"]):
        judge("modulated_gating", compute_modulated(shape, dtype), backend, dtype, seed)


@each_backend
def test_modulated_gating_routes_the_tokens_that_it_returns(backend, seed):
    """Those rounded to bfloat16, not what they were rounded from."""

    def compute(seed, how):
        *inputs, gate_weight = draw(SHAPES["plain"], torch.bfloat16, seed)
        tokens, *scores = modulated_gating(*inputs, gate_weight, 2, backend=backend)
        if how != backend:
            scores = reference.rooms.gating(tokens.double() if how == "oracle" else tokens, gate_weight, 2)
        return dict(zip(("topk_weights", "topk_ids", "probs"), scores, strict=True))

    judge("modulated_gating", compute, backend, torch.bfloat16, seed)


@each_backend
@pytest.mark.parametrize("which", ["tokens", "topk_weights", "probs"])
def test_gradients_through_one_output_only(which, backend, seed):
    index = ("tokens", "topk_weights", "topk_ids", "probs").index(which)

    def compute(seed, how):
        inputs = draw(SHAPES["plain"], torch.float32, seed)
        inputs = [(t.double() if how == "oracle" else t).requires_grad_() for t in inputs]
        if how in IN_TORCH:
            tokens = prologue(*inputs[:3]).reshape(-1, 32)
            outputs = tokens, *reference.rooms.gating(tokens, inputs[3], 2)
        else:
            outputs = modulated_gating(*inputs, 2, backend=how)
        grads = torch.autograd.grad(outputs[index].square().sum(), inputs, allow_unused=True)
        pairs = zip(("dx", "dshift", "dscale", "dgate_weight"), inputs, grads, strict=True)
        return {name: torch.zeros_like(t) if grad is None else grad for name, t, grad in pairs}

    judge("modulated_gating", compute, backend, torch.float32, seed)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("shift", (2, 32), r"shift: got shape \(2, 32\), expected \(B,H\) = \(3, 32\)"),
        ("gate_weight", (5, 31), r"gate_weight: got shape"),
        ("x", (21, 32), r"x: got shape \(21, 32\), expected \(B,L,H\)"),
    ],
)
def test_bad_shapes_of_modulated_gating(name, changes, said, seed):
    inputs = dict(zip(("x", "shift", "scale", "gate_weight"), draw(SHAPES["plain"], torch.float32, seed), strict=True))
    inputs[name] = torch.zeros(changes)
    with pytest.raises(ValueError, match=said):
        modulated_gating(**inputs, top_k=2)


def gated_compute(trap, dtype, images):
    def compute(seed, how):
        problem = make_problem(trap, seed, dtype)
        g = torch.Generator().manual_seed(seed)
        residual = sample(torch.randn, trap.T, trap.H, generator=g).to(dtype)
        gate = sample(torch.randn, images, trap.H, generator=g).to(dtype)
        if how == "oracle":
            problem, residual, gate = problem.double(), residual.double(), gate.double()
        problem, leaves = problem.with_leaves()
        leaves |= {"residual": residual.requires_grad_(), "gate": gate.requires_grad_()}
        if how in ("oracle", "loop"):
            y = {"oracle": moe_oracle, "loop": moe_loop}[how](problem).view(images, -1, trap.H)
            out = residual + (gate[:, None] * y).view(trap.T, trap.H)
        else:
            p = problem
            weights = (p.gate_up_proj, p.down_proj, p.shared_gate_up_proj, p.shared_down_proj)
            given = {"activation": trap.activation, "backend": how, "residual": residual, "gate": gate}
            out = moe_mlp(p.x, plan_of(p, how), *weights, **given)
        return gradients(out, leaves, problem.dout)

    return compute


@each_contender
@pytest.mark.parametrize(("trap", "images"), [("plain", 1), ("above_tile", 7), ("no_shared", 37), ("expert_choice", 1)])
def test_gate_and_residual(trap, images, backend, dtype, seed):
    judge("gated_moe_mlp", gated_compute(BY_NAME[trap], dtype, images), backend, dtype, seed)


@each_contender
def test_layer_in_a_block(backend, dtype, seed):
    judge("forward_adaln", layer_compute(None, dtype), backend, dtype, seed)


@each_backend
def test_layer_in_a_block_with_expert_choice(backend, seed):
    judge("forward_adaln", layer_compute(ExpertChoice(), torch.float32), backend, torch.float32, seed)


def layer_compute(router, dtype):
    """MoELayer.forward_adaln against reference/ in float64; its rival is reference/ in dtype behind a plain router."""

    def compute(seed, how):
        torch.manual_seed(seed)
        named = "eager" if how in IN_TORCH else how
        layer = MoELayer(32, 24, 5, 2, shared_intermediate_size=16, router=router, backend=named).to(dtype)
        x, shift, scale, gate_weight = draw(SHAPES["plain"], dtype, seed)
        with torch.no_grad():
            layer.gate_weight.copy_(gate_weight)
        gate = torch.randn(3, 32, dtype=torch.promote_types(dtype, torch.float32))
        leaves = {"x": x, "shift": shift, "scale": scale, "gate": gate, **dict(layer.named_parameters())}
        if how in IN_TORCH:
            leaves = {name: t.detach().double() if how == "oracle" else t.detach() for name, t in leaves.items()}
        for leaf in leaves.values():
            leaf.requires_grad_()
        if how in IN_TORCH:
            out = block_by_hand(isinstance(router, ExpertChoice), *leaves.values())
        else:
            out = layer.forward_adaln(x, shift, scale, gate)
        return gradients(out, leaves, torch.ones_like(x))

    return compute


def block_by_hand(experts_choose, x, shift, scale, gate, gate_weight, gate_up, down, *shared):
    """The second half of reference.dit.DiTBlock from the functions of reference/, with the defaults of our routers."""
    tokens = prologue(x, shift, scale).reshape(-1, x.shape[2])
    if experts_choose:
        scores = reference.routing.expert_choice(tokens, gate_weight, 2.0, x.shape[1])
        y = reference.moe.moe_expert_choice(tokens, *scores, gate_up, down, "swiglu")
        y = y + reference.moe.expert_mlp(tokens, *shared, "swiglu")
    else:
        topk_weights, ids, probs = reference.rooms.gating(tokens, gate_weight, 2)
        y = reference.moe.moe(tokens, topk_weights, ids, gate_up, down, *shared)
        y = reference.moe.inject_aux(y, reference.routing.aux_loss(probs, ids, 0.01))
    return (x + gate[:, None] * y.view(x.shape)).to(x.dtype)


@each_backend
def test_replaced_blocks_have_it_too(backend, seed):
    def compute(seed, how):
        torch.manual_seed(seed)
        block = SparseMoeBlock(32, 24, 5, 2, 16).eval()
        x, shift, scale, block.gate.weight.data = draw(SHAPES["plain"], torch.float32, seed)
        gate = torch.randn(3, 32)
        if how == "oracle":
            block, (x, shift, scale, gate) = block.double(), (t.double() for t in (x, shift, scale, gate))
        if how in IN_TORCH:
            return {"out": x + gate[:, None] * block(prologue(x, shift, scale))}
        replace_moe(block, backend=how)
        return {"out": block.forward_adaln(x, shift, scale, gate)}

    judge("forward_adaln", compute, backend, torch.float32, seed)


class Reversed(TokenChoice):
    """A router with a plan of its own: other scores than gating's, so that going around it shows."""

    def plan(self, call):
        call.gate_weight = -call.gate_weight
        return super().plan(call)


class Unfused(TokenChoice):
    """Token choice that looks at the tokens before it scores them: nothing is fused with adaLN then."""

    def plan(self, call):
        assert call.tokens.shape == (12, 32)
        return super().plan(call)


@each_backend
def test_a_router_with_a_plan_of_its_own_is_asked(backend, seed):
    torch.manual_seed(seed)
    layer = MoELayer(32, 24, 5, 2, router=Reversed(2), backend=backend).eval()
    mirrored = MoELayer(32, 24, 5, 2, backend=backend).eval()
    mirrored.load_state_dict(layer.state_dict())
    mirrored.gate_weight.data.neg_()
    x, (shift, scale, gate) = torch.randn(2, 6, 32), torch.randn(3, 2, 32)
    out = layer.forward_adaln(x, shift, scale, gate)
    assert torch.equal(out, mirrored.forward_adaln(x, shift, scale, gate))
    assert torch.equal(layer.forward_adaln(x, shift, scale, gate * 0), x)
    layer.router, mirrored.gate_weight.data = Unfused(2), layer.gate_weight.data
    outs = (module.forward_adaln(x, shift, scale, gate) for module in (layer, mirrored))
    torch.testing.assert_close(*outs)


def test_a_route_that_nobody_would_call_is_refused():
    with pytest.raises(TypeError, match=r"Old\.route: layers call plan\(call\)"):

        class Old(TokenChoice):
            def route(self, x, gate_weight, backend="auto", **how):
                return super().route(x, -gate_weight, backend, **how)


@each_backend
def test_a_gate_of_zero_still_learns(backend, seed):
    """adaLN-Zero starts there: the gate's gradient cannot be had by dividing the output by it."""
    problem = make_problem(PLAIN, seed, torch.float32)
    gate, residual = torch.zeros(1, PLAIN.H, requires_grad=True), torch.randn(PLAIN.T, PLAIN.H)
    weights = (problem.gate_up_proj, problem.down_proj, problem.shared_gate_up_proj, problem.shared_down_proj)
    out = moe_mlp(problem.x, plan_of(problem, backend), *weights, backend=backend, residual=residual, gate=gate)
    assert torch.equal(out, residual)
    assert torch.autograd.grad(out.sum(), gate)[0].abs().min() > 0


@each_backend
def test_a_gate_saves_itself_and_y(backend, seed):
    problem, saved = make_problem(BY_NAME["no_shared"], seed, torch.float32), {}
    problem, _ = problem.with_leaves()
    plan, residual, gate = plan_of(problem, backend), torch.randn(37, 32), torch.randn(37, 32)
    given = {t.data_ptr() for t in (problem.x, problem.gate_up_proj, problem.down_proj, *plan.tensors())}
    with saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t.detach()), lambda t: t):
        moe_mlp(problem.x, plan, problem.gate_up_proj, problem.down_proj, backend=backend, residual=residual, gate=gate)
    own = {pointer: tuple(t.shape) for pointer, t in saved.items() if pointer not in given and t.numel()}
    assert sorted(own.values()) == [(37, 32), (37, 32), (74, 48)] and gate.data_ptr() in own
    assert residual.data_ptr() not in own


@each_backend
def test_the_dtype_of_the_residual_is_kept(backend, seed):
    problem = make_problem(PLAIN, seed, torch.bfloat16)
    weights = (problem.gate_up_proj, problem.down_proj, problem.shared_gate_up_proj, problem.shared_down_proj)
    residual, gate = torch.randn(PLAIN.T, PLAIN.H), torch.randn(1, PLAIN.H)
    out = moe_mlp(problem.x, plan_of(problem, backend), *weights, backend=backend, residual=residual, gate=gate)
    assert out.dtype == torch.float32


@pytest.mark.parametrize(
    ("residual", "gate", "said"),
    [
        (torch.zeros(37, 32), None, "gate: got None, expected both"),
        (None, torch.zeros(1, 32), "residual: got None, expected both"),
        (torch.zeros(36, 32), torch.zeros(1, 32), r"residual: got shape \(36, 32\)"),
        (torch.zeros(37, 32), torch.zeros(2, 32), "gate: got 2 images, expected a divisor of T = 37"),
        (torch.zeros(37, 32), torch.zeros(1, 31), r"gate: got shape \(1, 31\)"),
    ],
)
def test_bad_gates(residual, gate, said, seed):
    problem = make_problem(PLAIN, seed, torch.float32)
    weights = (problem.gate_up_proj, problem.down_proj, problem.shared_gate_up_proj, problem.shared_down_proj)
    with pytest.raises(ValueError, match=said):
        moe_mlp(problem.x, plan_of(problem, "eager"), *weights, residual=residual, gate=gate)
