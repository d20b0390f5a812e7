"""Gating: router logits, softmax and top-k against the oracle; ties; the aux loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import reference.routing
from bench.instrument.verify import NARROW
from moe_kernels import aux_loss, gating
from tests.contenders import IN_TORCH, SCALES, each_backend, each_contender, refusals, rooms_of
from tests.error_rule import judge
from tests.trap_cases import draw_router, sample, strided

SHAPES = {  # T, H, E, K
    "plain": (37, 32, 5, 2),
    "no token": (0, 32, 8, 2),
    "one token": (1, 32, 8, 2),
    "E=16, longer than a block": (130, 296, 16, 2),
    "DSMoE E=48 K=5": (20, 16, 48, 5),
    "K = E": (9, 16, 4, 4),
    "one expert": (7, 16, 1, 1),
    "odd width": (11, 21, 6, 3),
}


def gating_compute(shape, dtype, scale=1.0, layout=lambda t: t):
    T, H, E, K = shape

    def compute(seed, how):
        x, gate_weight = (layout(t) for t in draw_router(T, H, E, K, dtype, scale, seed))
        g = torch.Generator().manual_seed(seed)
        dweights, dprobs = (sample(torch.randn, T, n, generator=g, dtype=torch.float64) for n in (K, E))
        if how == "oracle":
            x, gate_weight = x.double(), gate_weight.double()
        x, gate_weight = x.detach().requires_grad_(), gate_weight.detach().requires_grad_()
        weights, ids, probs = rooms_of(how).gating(x, gate_weight, K)
        loss = (weights * dweights.to(weights.dtype)).sum() + (probs * dprobs.to(probs.dtype)).sum()
        dx, dgate_weight = torch.autograd.grad(loss, (x, gate_weight))
        # An expert's row sums T tokens: a few may cancel as a scalar does. By feature it is narrow, and judged as such.
        dgate_weight = dgate_weight if T >= NARROW else dgate_weight.T
        return {"topk_weights": weights, "probs": probs, "dx": dx, "dgate_weight": dgate_weight, "topk_ids": ids}

    return compute


@each_contender
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape, backend, dtype, seed):
    with refusals(backend, shape is SHAPES["odd width"]):
        judge("gating", gating_compute(shape, dtype), backend, dtype, seed)


@each_contender
@pytest.mark.parametrize("scale", SCALES)
def test_scale(scale, backend, dtype, seed):
    judge("gating", gating_compute(SHAPES["plain"], dtype, scale), backend, dtype, seed, scale)


@each_backend
def test_strided_inputs(backend, seed):
    judge("gating", gating_compute(SHAPES["plain"], torch.float32, layout=strided), backend, torch.float32, seed)


@each_contender
def test_dtypes_and_raw_probabilities(backend, dtype, seed):
    """fp32 routing whatever the dtype of x, no renormalisation, weights descending."""
    x, gate_weight = draw_router(37, 32, 5, 2, dtype, 1.0, seed)
    weights, ids, probs = gating(x, gate_weight, 2, backend=backend)
    wide = torch.promote_types(dtype, torch.float32)
    assert (weights.dtype, ids.dtype, probs.dtype) == (wide, torch.int32, wide)
    assert torch.equal(weights, probs.gather(1, ids.long()))
    assert (weights.diff(dim=-1) <= 0).all() and (weights.sum(-1) < 1).all()
    assert (probs.sum(-1) - 1).abs().max() <= 8 * torch.finfo(wide).eps


@each_backend
def test_probabilities_that_underflow_tie(backend):
    logits = torch.tensor([[200.0, 1, 5, 3], [-300, -200, 0, -250]])
    _, ids, probs = gating(torch.eye(2, 8), F.pad(logits.T, (0, 6)), 3, backend=backend)
    assert probs.tolist() == [[1, 0, 0, 0], [0, 0, 1, 0]]
    assert ids.tolist() == [[0, 1, 2], [2, 0, 1]]


@each_backend
def test_affinities_only(backend, seed):
    x, gate_weight = draw_router(9, 16, 4, 1, torch.float32, 1.0, seed)
    weights, ids, probs = gating(x, gate_weight, 0, backend=backend)
    assert weights.shape == ids.shape == (9, 0)
    assert torch.equal(probs, gating(x, gate_weight, 2, backend=backend)[2])


def test_eager_gradcheck(seed):
    inputs = [t.requires_grad_() for t in draw_router(7, 5, 4, 2, torch.float64, 1.0, seed)]
    picked = [0, 2]  # topk_ids carry no gradient
    assert torch.autograd.gradcheck(
        lambda *a: [gating(*a, 2, backend="eager")[i] for i in picked], inputs, fast_mode=True
    )


def aux_loss_loop(probs, ids, alpha):
    E = probs.shape[1]
    fraction = torch.bincount(ids.flatten(), minlength=E) / ids.numel()
    return alpha * E * (fraction * probs.mean(0)).sum()


@each_backend
def test_aux_loss_value_and_gradient(backend, seed):
    def compute(seed, how):
        x, gate_weight = draw_router(37, 32, 5, 2, torch.float32, 1.0, seed)
        x, gate_weight = (x.double(), gate_weight.double()) if how == "oracle" else (x, gate_weight)
        gate_weight.requires_grad_()
        _, ids, probs = rooms_of(how).gating(x, gate_weight, 2)
        if how in IN_TORCH:
            loss = {"oracle": reference.routing.aux_loss, "loop": aux_loss_loop}[how](probs, ids, 0.01)
        else:
            loss = aux_loss(probs, torch.bincount(ids.flatten(), minlength=5).int(), 2, 0.01)
        return {"loss": loss.detach(), "dgate_weight": torch.autograd.grad(loss, gate_weight)[0]}

    judge("aux_loss", compute, backend, torch.float32, seed)


def test_aux_loss_of_a_uniform_router_is_alpha():
    probs = torch.full((16, 8), 1 / 8)
    assert aux_loss(probs, torch.full((8,), 4, dtype=torch.int32), 2, 0.01).item() == pytest.approx(0.01, rel=1e-6)
