"""reference.moe against hand cases and token-by-token loops; gradients by gradcheck in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from reference.moe import (
    ExpertChoiceMoE,
    SparseMoeBlock,
    expert_mlp,
    inject_aux,
    moe,
    moe_expert_choice,
    spread_picks,
)
from reference.routing import aux_loss, expert_choice, token_choice

T, H, I_, SHARED, E, K = 24, 8, 12, 6, 5, 2


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(activation="swiglu", tokens=T):
    """Return x, topk_weights, topk_ids, gate_up_proj, down_proj, shared_gate_up_proj, shared_down_proj."""
    rows = 2 if activation == "swiglu" else 1
    x = normal(0, tokens, H)
    topk_weights, topk_ids, _ = token_choice(x, normal(1, E, H), K)
    shared = normal(4, rows * SHARED, H), normal(5, H, SHARED)
    return x, topk_weights, topk_ids, normal(2, E, rows * I_, H), normal(3, E, H, I_), *shared


def block(train=True, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return SparseMoeBlock(H, I_, E, K, SHARED, **options).to(dtype).train(train)


def relative_error(ours, expected):
    return ((ours - expected).norm() / expected.norm()).item()


def test_swiglu_by_hand():
    gate_up_proj = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)  # gate = x0, up = x1
    y = expert_mlp(torch.tensor([[2.0, 3.0]], dtype=torch.float64), gate_up_proj, torch.ones(2, 1).double(), "swiglu")
    assert y[0].tolist() == pytest.approx([2 / (1 + math.exp(-2)) * 3] * 2, rel=1e-14)


def test_gelu_is_the_exact_erf_form():
    weight = torch.eye(2, dtype=torch.float64)
    y = expert_mlp(torch.tensor([[2.0, -0.5]], dtype=torch.float64), weight, weight, "gelu")
    assert y[0].tolist() == pytest.approx([v / 2 * (1 + math.erf(v / math.sqrt(2))) for v in (2, -0.5)], rel=1e-14)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_moe_equals_the_token_loop(activation):
    x, topk_weights, topk_ids, gate_up, down, shared_gate_up, shared_down = problem(activation)
    out = moe(x, topk_weights, topk_ids, gate_up, down, shared_gate_up, shared_down, activation)
    for t in range(T):
        expected = expert_mlp(x[t : t + 1], shared_gate_up, shared_down, activation)
        for k in range(K):
            e = topk_ids[t, k]
            expected = expected + topk_weights[t, k] * expert_mlp(x[t : t + 1], gate_up[e], down[e], activation)
        assert relative_error(out[t], expected[0]) < 1e-14


def test_shared_expert_is_added_unweighted():
    *routed, shared_gate_up, shared_down = problem()
    difference = moe(*routed, shared_gate_up, shared_down) - moe(*routed)
    assert relative_error(difference, expert_mlp(routed[0], shared_gate_up, shared_down, "swiglu")) < 1e-14


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_moe_gradients(activation):
    x, topk_weights, topk_ids, *weights = problem(activation, tokens=4)
    inputs = [v.detach().clone().requires_grad_() for v in (x, topk_weights, *weights)]
    assert torch.autograd.gradcheck(
        lambda x, w, *p: moe(x, w, topk_ids, *p, activation=activation), inputs, fast_mode=True
    )


@pytest.mark.parametrize("train", [True, False])
def test_block_gradients_through_the_router(train):
    layer, x = block(train), normal(6, 4, H).requires_grad_()

    def forward(x, gate_weight):
        return torch.func.functional_call(layer, {"gate.weight": gate_weight}, (x, True))  # (y, aux): nothing injected

    assert torch.autograd.gradcheck(forward, (x, layer.gate.weight.detach().requires_grad_()))


def test_expert_choice_gradients_and_token_loop():
    x, (_, _, _, gate_up, down, _, _) = normal(7, 16, H), problem("gelu")
    gate_weight = 0.1 * normal(8, E, H)

    def forward(x, gate_weight, gate_up, down):
        return moe_expert_choice(x, *expert_choice(x, gate_weight, 1.5, 16), gate_up, down)

    affinities, picks = expert_choice(x, gate_weight, 1.5, 16)
    out = forward(x, gate_weight, gate_up, down)
    unpicked = picks.sum(1) == 0
    assert unpicked.any() and (picks.sum(1) > 1).any(), "the case must hold degree 0 and degree > 1"
    assert (out[unpicked] == 0).all(), "a token nobody picked is exactly zero"
    for t in (~unpicked).nonzero().flatten():
        expected = sum(
            affinities[t, e] * expert_mlp(x[t : t + 1], gate_up[e], down[e], "gelu")[0]
            for e in picks[t].nonzero()[:, 0]
        )
        assert relative_error(out[t], expected) < 1e-14
    inputs = [v.requires_grad_() for v in (x, gate_weight, gate_up, down)]
    assert torch.autograd.gradcheck(forward, inputs, fast_mode=True)


def test_the_block_is_the_function():
    layer, x = block(), normal(9, 3, T // 3, H)
    tokens = x.view(T, H)
    topk_weights, topk_ids, probs = token_choice(tokens, layer.gate.weight, K)
    gate_up = torch.stack([torch.cat([e.gate_proj.weight, e.up_proj.weight]) for e in layer.experts])
    down = torch.stack([e.down_proj.weight for e in layer.experts])
    shared = layer.shared_experts
    shared_gate_up = torch.cat([shared.gate_proj.weight, shared.up_proj.weight])
    expected = moe(tokens, topk_weights, topk_ids, gate_up, down, shared_gate_up, shared.down_proj.weight)
    out = layer(x)
    assert out.shape == x.shape and relative_error(out.view(T, H), expected) < 1e-14
    assert layer.last_aux == aux_loss(probs, topk_ids, 0.01) and not layer.last_aux.requires_grad


def gradients(layer, x, scale=1.0, scaled=False):
    layer.zero_grad()
    if scaled:
        y, aux = layer(x, return_aux_loss=True)
        (scale * (y.square().mean() + aux)).backward()
    else:
        (scale * layer(x).square().mean()).backward()
    return {name: p.grad.clone() for name, p in layer.named_parameters()}


def test_train_and_eval_take_the_same_path():
    x, train, evaluate = normal(10, T, H), block(True), block(False)
    assert torch.equal(train(x), evaluate(x))
    in_train, in_eval = gradients(train, x), gradients(evaluate, x)
    assert all(g.norm() > 0 for g in in_eval.values()), "the original has no routed gradients in eval mode"
    assert [name for name in in_train if not torch.equal(in_train[name], in_eval[name])] == ["gate.weight"]
    _, aux = train(x, return_aux_loss=True)
    (aux_gradient,) = torch.autograd.grad(aux, train.gate.weight)
    assert relative_error(in_train["gate.weight"] - in_eval["gate.weight"], aux_gradient) < 1e-10


def test_injected_aux_ignores_the_loss_scale_and_returned_aux_follows_it():
    x, layer = normal(11, T, H), block()
    main = gradients(layer.eval(), x)["gate.weight"]
    layer.train()
    aux = gradients(layer, x)["gate.weight"] - main
    injected = gradients(layer, x, scale=65536.0)["gate.weight"] - 65536 * main
    returned = gradients(layer, x, scale=65536.0, scaled=True)["gate.weight"] - 65536 * main
    assert relative_error(injected, aux) < 1e-6 and relative_error(returned, 65536 * aux) < 1e-10


def test_inject_aux_is_the_identity_with_gradient_one():
    y, aux = normal(12, 3).requires_grad_(), torch.tensor(7.0, requires_grad=True)
    out = inject_aux(y, aux)
    assert torch.equal(out, y)
    (out * 3).sum().backward()
    assert y.grad.tolist() == [3, 3, 3] and aux.grad.item() == 1 and aux.grad.dtype == torch.float32


def test_an_expert_without_tokens_gets_zero_gradients():
    layer = block()
    with torch.no_grad():
        layer.gate.weight.zero_()  # ties: every token goes to experts 0 and 1
    grads = gradients(layer, normal(13, T, H))
    for e in range(E):
        norms = [grads[f"experts.{e}.{name}_proj.weight"].norm().item() for name in ("gate", "up", "down")]
        assert all(n > 0 for n in norms) if e < K else norms == [0, 0, 0]


def test_keys_of_the_public_checkpoints():
    shapes = {name: tuple(p.shape) for name, p in block().state_dict().items()}
    expected = {"gate.weight": (E, H)}
    for prefix, width in [(f"experts.{i}", I_) for i in range(E)] + [("shared_experts", SHARED)]:
        expected |= {f"{prefix}.gate_proj.weight": (width, H), f"{prefix}.up_proj.weight": (width, H)}
        expected |= {f"{prefix}.down_proj.weight": (H, width)}
    assert shapes == expected
    assert block().num_experts_per_tok == K and block(alpha=0.5).alpha == 0.5


def test_a_hook_on_the_gate_sees_the_routing():
    layer, seen = block(), []
    layer.gate.register_forward_hook(lambda gate, inputs, outputs: seen.append(outputs[1]))
    x = normal(14, 2, T, H)
    layer(x)
    assert torch.equal(seen[0], token_choice(x.view(-1, H), layer.gate.weight, K)[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_trains(dtype):
    layer, exact = block(dtype=dtype), block().eval()
    x = normal(15, T, H).to(dtype)
    out = layer(x)
    out.float().square().mean().backward()
    exact.load_state_dict({k: v.double() for k, v in layer.state_dict().items()})
    assert out.dtype == dtype and all(p.grad.isfinite().all() for p in layer.parameters())
    same = (token_choice(x, layer.gate.weight, K)[1] == token_choice(x.double(), exact.gate.weight, K)[1]).all(1)
    assert (
        same.float().mean() > 0.8
        and relative_error(out[same].double(), exact(x.double())[same]) < 8 * torch.finfo(dtype).eps
    )


def test_autocast_deepcopy_and_no_tokens():
    layer = copy.deepcopy(block(dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        layer(normal(16, T, H).float()).sum().backward()
    copy.deepcopy(layer)
    out = layer(torch.zeros(0, H))
    assert out.shape == (0, H) and layer.last_aux == 0


def test_expert_choice_layer_per_image_and_per_group():
    torch.manual_seed(0)
    layer, x = ExpertChoiceMoE(H, I_, 4, capacity_factor=1.0).double(), normal(17, 4, 16, H)
    together = layer(x)
    alone = torch.cat([layer(image[None]) for image in x])
    assert together.shape == x.shape and relative_error(together, alone) < 1e-14, "per image: no batch dependence"
    layer.tokens_per_group = 32
    assert relative_error(layer(x)[:2], layer(x[:2])) < 1e-14
    assert relative_error(layer(x), alone) > 1e-3, "a group of two images couples them"
    together.sum().backward()
    assert all(p.grad.norm() > 0 for p in layer.parameters())


IDS = torch.tensor([[0], [5]])
ONES = torch.ones(2, 4)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: expert_mlp(ONES, torch.ones(2, 4), torch.ones(4, 1), "relu"), "activation: got 'relu'"),
        (
            lambda: expert_mlp(ONES, torch.ones(3, 4), torch.ones(4, 1), "swiglu"),
            "gate_up_proj: got 3 rows, expected 2",
        ),
        (lambda: spread_picks(torch.ones(2, 1), IDS, 5), "topk_ids: got 0..5, expected ids in 0..4"),
        (lambda: spread_picks(torch.ones(2, 2), IDS, 6), r"topk_ids: got shape \(2, 1\), expected \(2, 2\)"),
        (lambda: moe_expert_choice(ONES, ONES, ONES > 0, ONES[:, None], ONES[:, :, None]), r"got \[2, 4\] experts"),
        (lambda: block()(ONES.double()), r"x: got shape \(2, 4\), expected \(T, 8\)"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
