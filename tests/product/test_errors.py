"""Bad input: a ValueError or TypeError that names the argument, what came and what was expected; never a wild read."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import moe_kernels
from bench.instrument.verify import whole_error
from moe_kernels import (
    ExpertChoice,
    MoELayer,
    TokenChoice,
    combine,
    dispatch,
    dispatch_expert_choice,
    experts,
    gating,
    moe_mlp,
)
from moe_kernels.backends import _views, registry
from moe_kernels.weights import load, save, stack_dit_moe, unstack_dit_moe
from tests.contenders import BACKENDS, each_backend, moe_ours, needs_native, plan_of
from tests.trap_cases import DEVICE, PLAIN, make_problem

T, H, I, E, K = 6, 16, 8, 4, 2
X, GATE = torch.ones(T, H), torch.ones(E, H)
IDS, WEIGHTS = torch.tensor([[0, 1]] * T, dtype=torch.int32), torch.full((T, K), 0.25)
GATE_UP, DOWN = torch.ones(E, 2 * I, H), torch.ones(E, H, I)
SHARED_GATE_UP, SHARED_DOWN = torch.ones(2 * I, H), torch.ones(H, I)
PLAN = dispatch(IDS, WEIGHTS, E, backend="eager")
AFFINITIES = torch.rand(T, E)
Y_ROWS = torch.ones(T * K, H)

CALLS = {
    "gating": (gating, {"x": X, "gate_weight": GATE, "top_k": K}),
    "dispatch": (dispatch, {"topk_ids": IDS, "topk_weights": WEIGHTS, "num_experts": E}),
    "dispatch_expert_choice": (
        dispatch_expert_choice,
        {"affinities": AFFINITIES, "capacity": 2, "tokens_per_group": T},
    ),
    "experts": (experts, {"x": X, "plan": PLAN, "gate_up_proj": GATE_UP, "down_proj": DOWN, "activation": "swiglu"}),
    "combine": (combine, {"y_rows": Y_ROWS, "plan": PLAN, "shared": X}),
    "moe_mlp": (
        moe_mlp,
        {
            "x": X,
            "plan": PLAN,
            "gate_up_proj": GATE_UP,
            "down_proj": DOWN,
            "shared_gate_up_proj": SHARED_GATE_UP,
            "shared_down_proj": SHARED_DOWN,
        },
    ),
}
BAD_INPUTS = [  # op, argument, value, what the message must show
    ("gating", "x", X[0], r"\(16,\)"),
    ("gating", "x", X[:, :5], "gate_weight|x"),
    ("gating", "x", X.int(), "int32"),
    ("gating", "x", [[1.0]], "list"),
    ("gating", "x", X.to("meta"), "meta"),
    ("gating", "x", X[:, :0], "0"),
    ("gating", "gate_weight", GATE[:0], "0"),
    ("gating", "gate_weight", GATE.bool(), "bool"),
    ("gating", "top_k", E + 1, str(E + 1)),
    ("gating", "top_k", -1, "-1"),
    ("gating", "top_k", 1.5, "float"),
    ("dispatch", "topk_ids", IDS.float(), "float32"),
    ("dispatch", "topk_ids", IDS[:, 0], r"\(6,\)"),
    ("dispatch", "topk_ids", IDS[:3], r"\((3|6), 2\)"),
    ("dispatch", "topk_weights", WEIGHTS.int(), "int32"),
    ("dispatch", "topk_weights", WEIGHTS[:, :1], r"\(6, 1\)"),
    ("dispatch", "num_experts", 0, "0"),
    ("dispatch", "num_experts", 4.0, "float"),
    ("dispatch_expert_choice", "affinities", AFFINITIES[0], r"\(4,\)"),
    ("dispatch_expert_choice", "capacity", 0, "0"),
    ("dispatch_expert_choice", "capacity", T + 1, str(T + 1)),
    ("dispatch_expert_choice", "tokens_per_group", 4, "4"),
    ("dispatch_expert_choice", "tokens_per_group", 0, "0"),
    ("experts", "x", X[:3], "3"),
    ("experts", "x", X.bfloat16(), "bfloat16"),
    ("experts", "x", X.long(), "int64"),
    ("experts", "plan", PLAN.tensors(), "tuple"),
    ("experts", "plan", dispatch(IDS[:3], WEIGHTS[:3], E, backend="eager"), "3 tokens"),
    ("experts", "gate_up_proj", GATE_UP[:3], r"\(3, 16, 16\)"),
    ("experts", "gate_up_proj", GATE_UP[..., :8], r"\(4, 16, 8\)"),
    ("experts", "gate_up_proj", GATE_UP[:, :7], "7"),
    ("experts", "gate_up_proj", GATE_UP.double(), "float64"),
    ("experts", "gate_up_proj", GATE_UP.to("meta"), "meta"),
    ("experts", "gate_up_proj", None, "NoneType"),
    ("experts", "gate_up_proj", [], "empty"),
    ("experts", "gate_up_proj", GATE_UP[:, :0], "0"),
    (
        "experts",
        "gate_up_proj",
        GATE_UP[:3].chunk(2, 1),
        r"_proj\[0\]: got shape \(3, 8, 16\), .*\(E,I,H\) = \(4, 8, 16",
    ),
    ("experts", "gate_up_proj", GATE_UP[..., :9].chunk(2, 1), r"_proj\[0\]: got shape \(4, 8, 9\), .* = \(4, 8, 16\)"),
    ("experts", "gate_up_proj", GATE_UP.split([8, 7, 1], 1)[:2], r"_proj\[1\]: got shape \(4, 7, 16\), .*\(4, 8, 16\)"),
    ("experts", "gate_up_proj", [GATE_UP[:, :I]] * 3, r"got 3 tensors.* or two such, \[gate, up\], or 8 matrices"),
    ("experts", "gate_up_proj", torch.stack(GATE_UP.chunk(2, 1)), r"got 1 tensors.*\(2, 4, 8, 16\)"),
    ("experts", "down_proj", DOWN[..., :3], r"\(4, 16, 3\)"),
    ("experts", "down_proj", DOWN.transpose(1, 2), r"\(4, 8, 16\)"),
    ("experts", "activation", "relu", "relu"),
    ("experts", "activation", ["relu"], "relu"),
    ("combine", "y_rows", Y_ROWS[:5], r"\(5, 16\)"),
    ("combine", "y_rows", Y_ROWS.int(), "int32"),
    ("combine", "shared", X[:3], r"\(3, 16\)"),
    ("combine", "shared", X.bfloat16(), "bfloat16"),
    ("combine", "plan", None, "NoneType"),
    ("moe_mlp", "x", X[:5], "5"),
    ("moe_mlp", "x", X[:, None], r"\(6, 1, 16\)"),
    ("moe_mlp", "shared_gate_up_proj", SHARED_GATE_UP[:, :3], r"\(16, 3\)"),
    ("moe_mlp", "shared_gate_up_proj", None, "None"),
    ("moe_mlp", "shared_down_proj", None, "None"),
    ("moe_mlp", "shared_down_proj", SHARED_DOWN.T, r"\(8, 16\)"),
]
BAD_VALUES = [  # not looked for on a GPU, which would have to be waited for: see test_triton.py
    ("gating", "x", X * float("nan"), "finite"),
    ("gating", "x", X * float("inf"), "finite"),
    ("dispatch", "topk_ids", IDS + E - 1, str(E)),
    ("dispatch", "topk_ids", IDS - 1, "-1"),
    ("dispatch_expert_choice", "affinities", AFFINITIES * float("nan"), "finite"),
]
RELATED = {"x": "x|gate_weight|plan|gate_up_proj|H", "gate_weight": "gate_weight|num_experts", "topk_ids": r"topk_\w+"}


@each_backend
@pytest.mark.parametrize(("op", "argument", "value", "shown"), BAD_INPUTS + (BAD_VALUES if DEVICE == "cpu" else []))
def test_bad_input(op, argument, value, shown, backend):
    function, arguments = CALLS[op]
    with pytest.raises((ValueError, TypeError)) as raised:
        function(**arguments | {argument: value}, backend=backend)
    message = str(raised.value)
    assert re.search(rf"\b({RELATED.get(argument, argument)})\b", message) and re.search(shown, message), message
    assert "expected" in message, message


@each_backend
@pytest.mark.parametrize(
    ("argument", "activation", "shown"),
    [
        ("gate_up_proj", "gelu", r"gate_up_proj: got 2 tensors.*\(4, 8, 16\), expected one .* or 4 matrices"),
        ("down_proj", "swiglu", r"down_proj: got 2 tensors.*\(4, 8, 16\), expected one .* or 4 matrices"),
        ("shared_gate_up_proj", "swiglu", r"shared_gate_up_proj: got 2 tensors.* 2 dimensions or 2 matrices"),
    ],
)
def test_two_stacks_are_a_gate_and_an_up_of_routed_experts(argument, activation, shown, backend):
    function, arguments = CALLS["moe_mlp"]
    with pytest.raises(ValueError, match=shown):
        function(**arguments | {argument: GATE_UP.chunk(2, 1), "activation": activation}, backend=backend)


@each_backend
@pytest.mark.parametrize("op", CALLS)
def test_the_good_call_is_good(op, backend):
    function, arguments = CALLS[op]
    function(**arguments, backend=backend)


@needs_native
@pytest.mark.parametrize("field", ["row_token", "token_rows", "expert_offsets", "token_row_offsets", "expert_counts"])
@pytest.mark.parametrize("value", [-1, 10**6, -(2**31), 2**31 - 1])
@pytest.mark.parametrize("where", [0, 1, -1])
def test_native_never_reads_out_of_bounds_whatever_the_plan(field, value, where):
    tensor = getattr(PLAN, field).clone()
    tensor[where] = value
    plan = dataclasses.replace(PLAN, **{field: tensor})
    for call in (
        lambda: moe_mlp(X, plan, GATE_UP, DOWN, backend="native"),
        lambda: experts(X, plan, GATE_UP, DOWN, backend="native"),
        lambda: combine(Y_ROWS, plan, backend="native"),
    ):
        try:
            out = call()
        except ValueError as error:
            assert field in str(error) or "plan" in str(error)
        else:
            assert out.isfinite().all()  # this room has no use for the field


@pytest.mark.parametrize("op", CALLS)
def test_backend_that_is_not_there(op, monkeypatch):
    function, arguments = CALLS[op]
    with pytest.raises(ValueError, match=r"backend: got 'warp', expected .*'auto'.*'eager'"):
        function(**arguments, backend="warp")
    monkeypatch.setenv("MOE_KERNELS_BACKEND", "warp")
    with pytest.raises(ValueError, match="warp"):
        function(**arguments)


def test_unavailable_backend_raises_its_reason(monkeypatch):
    monkeypatch.setattr(registry, "_load", lambda name: (None, "no such luck"))
    with pytest.raises(RuntimeError, match=r"native.*no such luck"):
        registry.get("native")


def test_backends_are_reported():
    infos = {info.name: info for info in moe_kernels.backends()}
    assert isinstance(moe_kernels.backends(), tuple) and {"eager", "grouped", "native"} <= infos.keys()
    assert all(info.available or info.reason for info in infos.values())
    assert infos["eager"].available and infos["grouped"].available
    assert infos["native"].available, f"the extension is part of every build on the CPU: {infos['native'].reason}"


@pytest.mark.parametrize("name", BACKENDS)
def test_environment_forces_auto(name, monkeypatch, seed):
    monkeypatch.setenv("MOE_KERNELS_BACKEND", name)
    problem = make_problem(PLAIN, seed, torch.float32)
    assert torch.equal(moe_ours(problem, "auto"), moe_ours(problem, name))


@each_backend
def test_tokens_that_are_not_finite_go_through_where_that_is_asked_for(backend, seed):
    """As a loss scaler wants it: NaN comes out of that token alone."""
    layer, x = MoELayer(16, 8, 4, 2, backend=backend), torch.randn(9, 16)
    expected = layer(x)
    x[4] = torch.inf
    with pytest.raises(ValueError, match=r"token 4.*set_nonfinite"):
        layer(x)
    moe_kernels.set_nonfinite("propagate")
    try:
        y = layer(x)
    finally:
        moe_kernels.set_nonfinite("raise")
    others = torch.arange(9) != 4
    assert y[4].isnan().all()
    # The token changes experts, and with them the sizes of torch's products, whose bits depend on those.
    assert whole_error(y[others], expected[others].double()) < (1e-30 if backend == "native" else 1e-6)
    with pytest.raises(ValueError, match="mode: got 'ignore', expected 'raise' or 'propagate'"):
        moe_kernels.set_nonfinite("ignore")


LAYERS = {
    "router": (dict(router="top2"), TypeError, "router: got str 'top2', expected a moe_kernels.Router"),
    "dtype": (dict(dtype=torch.complex64), TypeError, "dtype: got torch.complex64, expected one of torch.float32"),
    "layout": (dict(layout="rows"), ValueError, "layout: got 'rows', expected one of 'gate_up', 'up_gate'"),
    "top_k": (dict(top_k=2.0), TypeError, "top_k: got float, expected an int"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_could_not_run_are_refused_at_once(name):
    changed, kind, said = LAYERS[name]
    with pytest.raises(kind, match=said):
        MoELayer(**{"hidden_size": 16, "intermediate_size": 8, "num_experts": 4, "top_k": 2, **changed})


def test_integers_of_numpy_are_sizes():
    sizes = np.array([16, 8, 4, 2])
    assert MoELayer(*sizes)(torch.randn(3, 16)).shape == (3, 16)


def test_safetensors_is_named_where_it_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ModuleNotFoundError, match=r"moe_kernels\.weights: .*pip install safetensors"):
        save({"a": torch.zeros(1)}, tmp_path / "a.safetensors")


@each_backend
def test_float64_is_computed_or_refused(backend, seed):
    problem = make_problem(PLAIN, seed, torch.float64)
    expected = moe_ours(problem, "eager")
    try:
        assert torch.allclose(moe_ours(problem, backend), expected, rtol=1e-12, atol=0)
    except RuntimeError as refusal:
        assert re.search(f"{backend}.*float64", str(refusal)), refusal


def test_a_dtype_that_kernels_do_not_know_is_named():
    with pytest.raises(TypeError, match=r"got torch.float64, expected one of torch.float32, torch.bfloat16"):
        _views.view(SimpleNamespace(Tensor=None), torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_auto_finds_a_backend_for_every_dtype(dtype, seed):
    assert moe_ours(make_problem(PLAIN, seed, dtype), "auto").isfinite().all()


@each_backend
@pytest.mark.parametrize("op", ["moe_mlp", "experts", "combine", "gating"])
def test_double_backward(op, backend, seed):
    problem, leaves = make_problem(PLAIN, seed, torch.float32).with_leaves()
    x, gate_up, down, plan = leaves["x"], leaves["gate_up_proj"], leaves["down_proj"], plan_of(problem, backend)
    call = {
        "moe_mlp": lambda: moe_ours(problem, backend),
        "experts": lambda: experts(x, plan, gate_up, down, backend=backend),
        "combine": lambda: combine(x[plan.row_token.long()], plan, backend=backend),
        "gating": lambda: gating(x, gate_up[0], 2, backend=backend)[2],
    }[op]
    (dx,) = torch.autograd.grad(call().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="moe_kernels: double backward is not supported"):
        dx.sum().backward()


BAD_LAYERS = {"hidden_size": 0, "intermediate_size": -1, "num_experts": 0, "top_k": 5, "shared_intermediate_size": -1}
BAD_LAYERS |= {"activation": "relu", "backend": "warp"}


@pytest.mark.parametrize(("argument", "value"), [*BAD_LAYERS.items(), ("top_k", 0), ("activation", ["relu"])])
def test_layer_arguments(argument, value):
    arguments = {"hidden_size": H, "intermediate_size": I, "num_experts": E, "top_k": K} | {argument: value}
    with pytest.raises((ValueError, TypeError), match=rf"{argument}: got '?{re.escape(str(value))}.*expected"):
        MoELayer(**arguments)


NO_NUMBERS = ["x", None, True, float("nan"), float("inf")]


@pytest.mark.parametrize("value", NO_NUMBERS)
def test_router_numbers(value):
    with pytest.raises((ValueError, TypeError), match=r"aux_loss_alpha: got .*expected a"):
        TokenChoice(2, aux_loss_alpha=value)
    with pytest.raises((ValueError, TypeError), match=r"capacity_factor: got .*expected a"):
        ExpertChoice(capacity_factor=value)


def test_capacity_factor_above_the_number_of_experts():
    for name in ("forward", "forward_adaln"):
        layer, vector = MoELayer(H, I, E, K, router=ExpertChoice(9.0)), torch.ones(1, H)
        with pytest.raises(ValueError, match=r"capacity_factor: got 9.0, expected \(0, E\] with E = 4"):
            getattr(layer, name)(X[None], *([vector] * 3 if name == "forward_adaln" else []))
    assert MoELayer(H, I, E, K, router=ExpertChoice(float(E)))(X).shape == X.shape


@pytest.mark.parametrize("x", [torch.ones(3, H + 1), torch.ones(3, H).int(), torch.ones(3, H).double(), "x"])
def test_layer_input(x):
    with pytest.raises((ValueError, TypeError), match=r"(x|gate_up_proj|gate_weight): got"):
        MoELayer(H, I, E, K)(x)


def test_layer_refuses_a_state_dict_in_another_layout():
    layer = MoELayer(H, I, E, K)
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match="gate_up_proj"):
        layer.load_state_dict(unstack_dit_moe(state))
    with pytest.raises(RuntimeError, match="gate_up_proj"):
        layer.load_state_dict(state | {"gate_up_proj": state["gate_up_proj"].transpose(1, 2)})


def half(weight):
    return weight.half()


MISFITS = [  # conversion, what is changed, how, what the message must say
    (unstack_dit_moe, "gate_weight", lambda w: w[0], r"gate_weight: got shape \(16,\), expected \(E,H\)"),
    (unstack_dit_moe, "down_proj", lambda w: w[:3], r"down_proj: got shape \(3, 16, 8\), expected .* \(4, 16, 8\)"),
    (unstack_dit_moe, "gate_up_proj", lambda w: w[:3], r"gate_up_proj: got shape \(3, 16, 16\), expected \(E,2I,H"),
    (
        unstack_dit_moe,
        "gate_up_proj",
        lambda w: w[:, :8],
        r"gate_up_proj: got shape \(4, 8, 16\), .*gelu.* \(4, 16, 16\)",
    ),
    (unstack_dit_moe, "shared_down_proj", lambda w: w[:5], r"shared_down_proj: got shape \(5, 4\), expected \(H,I"),
    (
        unstack_dit_moe,
        "shared_gate_up_proj",
        lambda w: w[:4],
        r"shared_gate_up_proj: got shape \(4, 16\), .* \(8, 16\)",
    ),
    (stack_dit_moe, "gate.weight", lambda w: w[:3], r"gate.weight: got shape \(3, 16\), expected \(E,H\) = \(4, 16\)"),
    (stack_dit_moe, "experts.1.up_proj.weight", half, r"experts.1.: got .*float16.*, expected one dtype"),
    (stack_dit_moe, "shared_experts.down_proj.weight", half, r"shared_experts.: got .*float16, expected one dtype"),
]


@pytest.mark.parametrize(("convert", "key", "change", "said"), MISFITS)
def test_conversions_refuse_weights_that_do_not_fit(convert, key, change, said):
    state = MoELayer(H, I, E, K, shared_intermediate_size=4).state_dict()
    state = unstack_dit_moe(state) if convert is stack_dit_moe else state
    with pytest.raises(ValueError, match=rf"state_dict: {said}"):
        convert(state | {key: change(state[key])})


def test_conversions_refuse_a_shared_expert_of_another_width_and_experts_of_another_dtype():
    state = unstack_dit_moe(MoELayer(H, I, E, K).state_dict())
    other = unstack_dit_moe(MoELayer(8, I, E, K, shared_intermediate_size=4).state_dict())
    with pytest.raises(ValueError, match=r"shared_experts.down_proj.weight: got shape \(8, 4\), expected \(H,Is\) ="):
        stack_dit_moe(state | {key: weight for key, weight in other.items() if "shared" in key})
    with pytest.raises(ValueError, match=r"experts: got .*float16.*, expected one shape and dtype"):
        stack_dit_moe(state | {key: half(weight) for key, weight in state.items() if "experts.2." in key})


def test_conversions_refuse_foreign_layouts(tmp_path):
    state = MoELayer(H, I, E, K, shared_intermediate_size=4).state_dict()
    split = unstack_dit_moe(state)
    with pytest.raises(ValueError, match="expected DiT-MoE"):
        stack_dit_moe(state)
    with pytest.raises(ValueError, match="gate_up_proj"):
        unstack_dit_moe(split)
    with pytest.raises(ValueError, match=r"experts\.1\.up_proj\.weight"):
        stack_dit_moe({key: value for key, value in split.items() if key != "experts.1.up_proj.weight"})
    save(state, tmp_path / "layer.safetensors")
    with pytest.raises(OSError, match="nowhere/layer"):
        save(state, tmp_path / "nowhere/layer.safetensors")
    whole = (tmp_path / "layer.safetensors").read_bytes()
    for name, content in {"truncated": whole[:-5], "empty": b"", "foreign": json.dumps({}).encode()}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            load(tmp_path / name)
