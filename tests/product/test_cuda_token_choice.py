"""Token choice and its experts in one call of a backend: the bits of the rooms one by one, and less to do."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from moe_kernels import MoELayer, TokenChoice
from moe_kernels.backends import cuda, registry
from moe_kernels.layer import moe_forward
from moe_kernels.ops import token_choice
from tests.contenders import BACKENDS
from tests.product.test_direct_calls import Watching
from tests.trap_cases import DEVICE, embedded, strided

each_fused = pytest.mark.parametrize("backend", [name for name in ("cuda", "triton") if name in BACKENDS])
on_cuda = pytest.mark.skipif("cuda" not in BACKENDS, reason=f"needs a GPU, or {cuda.FIBERS}: make test-cuda")
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_experts": 5, "top_k": 2, "shared_intermediate_size": 64}


def make(T: int = 37, dtype: torch.dtype = torch.float32, backend: str = "cuda", **options):
    layer = MoELayer(**SIZES | options, backend=backend, dtype=dtype).to(DEVICE)
    return layer, torch.randn(1, T, layer.gate_weight.shape[1], dtype=dtype, device=DEVICE, requires_grad=True)


def results(layer: MoELayer, x: torch.Tensor, weights=None, how=None) -> list[torch.Tensor | None]:
    """Return the output and all gradients; of those that are asked for with requires_grad."""
    own, *rest = layer.expert_weights()
    y = moe_forward(x, layer.gate_weight, weights or own, *rest, layer.router, True, False, layer.recompute)
    leaves = [t for t in (x, *layer.parameters()) if t.requires_grad]
    dout = y.new_ones(()).expand_as(y) if how == "expanded" else y.detach().sin()
    return [y.detach(), *torch.autograd.grad(y, leaves, dout)]


def frozen(layer, x):
    layer.gate_weight.requires_grad_(False), x.requires_grad_(False)


def without_x(layer, x):
    x.requires_grad_(False), layer.down_proj.requires_grad_(False)


@each_fused
@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({}, None),
        ({"dtype": torch.bfloat16}, None),
        ({"dtype": torch.float16, "activation": "gelu"}, None),
        ({"shared_intermediate_size": 0, "recompute": True}, None),
        ({"recompute": True, "dtype": torch.bfloat16}, None),
        ({"T": 0}, None),
        ({"T": 1, "top_k": 5}, None),
        ({"num_experts": 1, "top_k": 1}, None),
        ({"router": TokenChoice(2, aux_loss_alpha=0.0)}, None),
        ({"layout": "up_gate"}, None),
        ({"layout": "gate_up_in_out"}, None),
        ({"intermediate_size": 24, "layout": "up_gate"}, None),
        ({}, frozen),
        ({"dtype": torch.bfloat16}, without_x),
    ],
    ids=str,
)
def test_the_bits_of_the_rooms(options, change, backend, seed, monkeypatch):
    torch.manual_seed(seed)
    layer, x = make(**options, backend=backend)
    if change:
        change(layer, x)
    calls, kind = [], type(registry.get(backend))
    for name in ("token_choice", "token_choice_bwd"):
        whole = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda *a, whole=whole: calls.append(whole) or whole(*a))
    for how in (None, "expanded"):
        at_once = results(layer, x, how=how)
        assert len(calls) == 2
        with torch.no_grad():
            assert torch.equal(layer(x), at_once[0])
        monkeypatch.setattr(kind, "fuses_token_choice", False)
        by_rooms = results(layer, x, how=how)
        monkeypatch.undo() if how else monkeypatch.setattr(kind, "fuses_token_choice", True)
        assert len(calls) == 3
        assert all(map(torch.equal, at_once, by_rooms))
        calls.clear()


@each_fused
def test_weights_and_tokens_wherever_they_lie(backend, seed):
    """Matrices one by one, which come with an index, beside tokens that are strided or not aligned."""
    torch.manual_seed(seed)
    layer, x = make(dtype=torch.bfloat16, backend=backend)
    expected = results(layer, x)
    with torch.no_grad():
        gate_up = [m.clone().requires_grad_() for m in layer.gate_up_proj.reshape(-1, 64, 32)]
        down = [m.clone().requires_grad_() for m in layer.down_proj]
    shared = layer.shared_gate_up_proj, layer.shared_down_proj
    leaves = [*gate_up, *down]
    _, *rest = layer.expert_weights()
    for tokens in strided(x.detach()), embedded(x.detach(), 1):
        y = moe_forward(tokens, layer.gate_weight, (gate_up, down, *shared), *rest, layer.router, True, False, False)
        grads = torch.autograd.grad(y, leaves, y.detach().sin())
        assert torch.equal(y.detach(), expected[0])
        assert torch.equal(torch.stack(grads[: len(gate_up)]).view_as(layer.gate_up_proj), expected[3])
        assert torch.equal(torch.stack(grads[len(gate_up) :]), expected[4])


@each_fused
@pytest.mark.parametrize("recompute", [False, True])
def test_what_was_kept_reaches_the_ops_where_somebody_sees_them(recompute, backend, seed):
    torch.manual_seed(seed)
    layer, x = make(dtype=torch.bfloat16, recompute=recompute, backend=backend)
    expected = results(layer, x)
    y, leaves = layer(x), (x, *layer.parameters())
    with Watching() as mode:
        seen = torch.autograd.grad(y, leaves, y.detach().sin(), retain_graph=True)
    assert sorted(mode.seen) == ["dispatch_bwd", "gating_bwd", "moe_mlp_bwd"]
    twice = torch.autograd.grad(y, leaves, y.detach().sin(), create_graph=True)
    for grads in (seen, twice):
        assert all(map(torch.equal, grads, expected[1:]))
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        twice[0].sum().backward()


@on_cuda
def test_what_is_kept_may_move_between_the_passes(seed):
    """Hooks put it elsewhere: one int32 tensor beside x and the weights, and with recompute no activations in it."""
    torch.manual_seed(seed)
    sizes = []
    for recompute in (False, True):
        layer, x = make(recompute=recompute)
        expected, packed = results(layer, x), []

        def pack(t, packed=packed):
            packed.append(t)
            return t.clone()

        with saved_tensors_hooks(pack, torch.clone):
            assert all(map(torch.equal, results(layer, x), expected))
        (memory,) = (t for t in packed if t.dtype == torch.int32)
        assert len(packed) == 2 + 1 + 4
        sizes.append(memory.nbytes)
    activations = 4 * 37 * (2 * 128 + 128)  # gate_up of two picks, and the shared expert's
    assert 0 <= sizes[0] - sizes[1] - activations < 2 * 256


@on_cuda
def test_arguments_unlike_those_before_are_checked(seed):
    """What was found of the first call holds for none of the others."""
    layer, x = make()
    own, *rest = layer.expert_weights()

    def call(x=x, gate_weight=layer.gate_weight, weights=own, biases=None):
        return moe_forward(x, gate_weight, weights, *rest[:3], biases, layer.router, True, False, False)

    call()
    kinds = len(token_choice._kinds)
    call(torch.randn(2, 5, 32, device=DEVICE))
    assert len(token_choice._kinds) == kinds
    gate_up, down, *shared = own
    for match, changed in {
        "gate_weight: got shape": {"gate_weight": layer.gate_weight[:, :16]},
        "down_proj: got torch.bfloat16": {"weights": (gate_up, down.bfloat16(), *shared)},
        "down_proj: got shape": {"weights": (gate_up, down[:, :, :56], *shared)},
        "gate_up_proj: got 4 tensors": {"weights": ([gate_up] * 4, down, *shared)},
        "shared_down_proj: got None": {"weights": (gate_up, down, shared[0], None)},
        "shared_gate_up_proj: got an empty": {"weights": (gate_up, down, [], shared[1])},
        "biases: got int": {"biases": 5},
        "biases: got list": {"biases": [None] * 4},
    }.items():
        with pytest.raises((TypeError, ValueError), match=match):
            call(**changed)


@each_fused
@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU cannot raise")
def test_logits_that_are_not_finite_are_refused(backend):
    layer, x = make(backend=backend)
    with torch.no_grad():
        x[0, 3, 0] = torch.inf
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=r"non-finite router logits \(token 3\)"):
            layer(x)


@on_cuda
def test_bindings_check_what_was_kept():
    layer, x = make()
    x, gate_weight, w = x.detach()[0], layer.gate_weight.detach(), [p.detach() for p in list(layer.parameters())[1:]]
    weights, dx, dgate_weight = (*w, None, None), torch.empty_like(x), torch.empty_like(gate_weight)
    _, kept = cuda.CudaBackend().token_choice(x, gate_weight, cuda.MoEWeights(*w), 2, "swiglu", True, True)

    def call(memory, dgate_weight):
        how = 2, "swiglu", False, True
        grads = dx, *map(torch.empty_like, w), dgate_weight
        cuda._c.token_choice_bwd(x, 0.0, x, gate_weight, weights, memory, *how, *grads, cuda._allocator(x), 0)

    with pytest.raises(ValueError, match=r"kept: .* bytes, expected at least"):
        call(kept.tensors[0][:-64], dgate_weight)
    with pytest.raises(ValueError, match="dgate_weight: dtype tag 1, expected 0"):
        call(kept.tensors[0], dgate_weight.bfloat16())
    with pytest.raises(ValueError, match="top_k: 6, expected 0 to 5 experts"):
        cuda._c.token_choice_fwd(x, gate_weight, weights, 6, "swiglu", False, True, True, dx, cuda._allocator(x), 0)
    with pytest.raises(ValueError, match="workspace: 4 bytes, expected at least"):
        cuda._c.token_choice_fwd(
            x, gate_weight, weights, 2, "swiglu", False, True, True, dx, lambda words: x.new_empty(1), 0
        )
