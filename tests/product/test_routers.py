"""Every router of the family: the oracle's values and gradients, batch invariance, state, no wait, what it refuses."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from moe_kernels import (
    DiffMoE,
    ExpertChoice,
    ExpertRace,
    GroupLimitedChoice,
    MoELayer,
    ProMoE,
    Router,
    RouterCall,
    Scores,
    gating,
)
from moe_kernels.ops.adaln import modulate, normalise
from moe_kernels.routing import losses
from reference import routers
from tests.contenders import BACKENDS
from tests.error_rule import judge
from tests.router_cases import CASES, NULL, B, E, H, L, by_oracle, double, draw, predicted

TRIED = [name for name in ("native", "eager") if name in BACKENDS]  # no rule has a kernel of its own: two are enough
each_case = pytest.mark.parametrize("name", CASES)


@each_case
@pytest.mark.parametrize("backend", TRIED)
def test_equals_the_oracle(name, backend, seed):
    case = CASES[name]

    def compute(seed, how):
        plain = how in ("oracle", "loop")
        layer, x, call = draw(case, "eager" if plain else how, seed)
        layer, x, call = double(layer, x, call) if how == "oracle" else (layer, x, call)
        x = x.detach().requires_grad_()
        dout = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.dtype)
        out, aux = by_oracle(case, layer, x, call) if plain else layer(x, return_aux_loss=True, **call)
        aux = out.new_zeros(()) if aux is None else aux
        ((out * dout).sum() + aux).backward()
        grads = {f"d{name}": p.grad for name, p in layer.named_parameters() if p.grad is not None}
        if "dgate_weight" in grads:  # an expert's row may cancel as a scalar does where its weights are renormalised
            grads["dgate_weight"] = grads["dgate_weight"].T
        x_grad = x.grad.flatten(0, 1)
        return {"out": out.detach().flatten(0, 1), "aux": aux.detach().view(1), "dx": x_grad} | grads

    judge(f"router {name}"[:10], compute, backend, torch.float32, seed)


def dense(layer, x, call):
    """A layer's routing as weights (T, E), exactly zero where nothing is picked."""
    how = {"tokens_per_image": L, "with_aux": False, **call}
    plan, _ = layer.router.route(x.flatten(0, 1), layer.gate_weight, "eager", **how)
    plan.validate()
    plan = plan.owned()
    expert = torch.repeat_interleave(torch.arange(E), plan.expert_counts.long())
    return torch.zeros(x.shape[0] * L, E).index_put_((plan.row_token.long(), expert), plan.row_weight.detach())


@each_case
def test_an_image_alone_is_routed_as_in_a_batch_where_a_router_says_so(name, seed):
    """And where it says not, some image is not: in five draws."""
    case, differs = CASES[name], False
    for attempt in range(5):
        layer, x, call = draw(case, "eager", seed + attempt)
        together = dense(layer, x, call).view(B, L, E)
        layer, *_ = draw(case, "eager", seed + attempt)  # thresholds as before
        for b in range(B):
            conditioning = {key: value[b : b + 1] for key, value in call["conditioning"].items()}
            part = {"router_input": call["router_input"][b : b + 1], "conditioning": conditioning}
            alone = dense(layer, x[b : b + 1], part)
            differs |= not torch.equal(alone != 0, together[b] != 0)
            if layer.router.batch_invariant():
                torch.testing.assert_close(alone, together[b])
    assert differs != layer.router.batch_invariant()


def test_a_group_of_several_images_is_no_image():
    assert ExpertChoice().batch_invariant() and not ExpertChoice(tokens_per_group=24).batch_invariant()


@each_case
def test_no_host_wait(name):
    """Fake tensors have no values: whoever asks for one fails."""
    layer, x, call = draw(CASES[name], "eager", 0)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        parameters = [*layer.named_parameters(), *layer.named_buffers()]
        fake = {key: mode.from_tensor(value) for key, value in parameters}
        conditioning = {key: mode.from_tensor(value) for key, value in call["conditioning"].items()}
        call = {"router_input": mode.from_tensor(call["router_input"]), "conditioning": conditioning}
        out = torch.func.functional_call(layer, fake, (mode.from_tensor(x),), call)
        out.sum().backward()
    assert out.shape == x.shape


@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", ["Nucleus", "race", "DiffMoE, sampling", "ProMoE, K = 2"])
def test_compiles_as_one_graph(name):
    layer, x, call = draw(CASES[name], TRIED[0], 0)
    expected = layer(x, **call)
    layer, *_ = draw(CASES[name], TRIED[0], 0)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, **call), expected)


def test_thresholds_are_averages_over_training(seed):
    layer, x, call = draw(CASES["race of an image"], "eager", seed)
    before, logits = layer.router.threshold.clone(), layer.router.scores(_call(layer, x)).detach().view(B, L * E)
    layer(x, **call)
    slowest = logits.sort(descending=True).values[:, 2 * L - 1].mean()
    torch.testing.assert_close(layer.router.threshold, routers.ema(before, slowest, 0.95))
    layer, x, call = draw(CASES["DiffMoE"], "eager", seed)
    before, tokens = layer.router.expert_threshold.clone(), x.flatten(0, 1)
    kth = routers.diffmoe_training(gating(tokens, layer.gate_weight, 0)[2], predicted(layer, tokens), 1.3)[2]
    layer(x, **call)
    torch.testing.assert_close(layer.router.expert_threshold, routers.ema(before, kth, 0.95))
    kept = layer.router.expert_threshold.clone()
    layer.eval()(x, **call)
    assert torch.equal(layer.router.expert_threshold, kept)
    assert {"router.expert_threshold", "router.ema_decay"} < set(layer.state_dict())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["race", "DiffMoE"])
def test_a_recomputed_step_counts_once(name, reentrant, seed):
    found = []
    for way in ("plain", "checkpoint"):
        layer, x, call = draw(CASES[name], "eager", seed)
        x = x.detach().requires_grad_()
        if way == "plain":
            y = layer(x, **call)
        else:
            y = checkpoint(functools.partial(layer, **call), x, use_reentrant=reentrant)
        y.square().sum().backward()
        found.append([x.grad, layer.gate_weight.grad, *layer.router.buffers()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("name", ["race of an image", "DiffMoE", "DSMoE"])
def test_behind_to_empty_a_router_begins_anew(name):
    layer = MoELayer(H, 24, E, 2, router=CASES[name].make())
    first = {key: buffer.clone() for key, buffer in layer.named_buffers()}
    for tensor in layer.to_empty(device="cpu").state_dict().values():
        tensor.fill_(torch.nan)
    layer.reset_parameters()
    assert all(torch.equal(buffer, first[key]) for key, buffer in layer.named_buffers()) and first
    assert all(p.isfinite().all() and p.any() for p in layer.parameters())
    loaded = ExpertRace(2)
    loaded.threshold.fill_(3.0)
    assert MoELayer(H, 24, E, 2, router=loaded).router.threshold == 3.0, "a layer around a router keeps what it has"


def _call(layer, x):
    return RouterCall(x.flatten(0, 1), layer.gate_weight, tokens_per_image=L)


def test_thresholds_are_means_over_a_process_group(monkeypatch):
    """Of those that have tokens, of which there may be none."""
    others = torch.tensor([3.0, 3.0, 1.0])  # the sum of the other ranks' values, and their number
    monkeypatch.setattr(losses.distributed, "all_reduce", lambda t, group: t.add_(others))
    for value, count, expected in ((torch.zeros(2), 1, 1.25), (None, 1, 2.0), (None, 0, 1.0)):
        average, others[-1] = torch.ones(2), count
        losses.update_ema(average, value, 0.5, object())
        assert average.tolist() == [expected, expected]


@pytest.mark.parametrize("make", [lambda: ExpertRace(2), lambda: DiffMoE(E, H)])
def test_averages_stay_wide_in_a_narrow_layer(make):
    layers = [MoELayer(H, 8, E, 2, router=make(), backend="eager") for _ in range(2)]
    layers[1].to(torch.bfloat16).to(torch.float32)
    averages = [{n: b for n, b in layer.router.named_buffers()} for layer in layers]
    narrow = MoELayer(H, 8, E, 2, router=make()).to(torch.bfloat16)
    assert all(b.dtype == torch.float32 for b in narrow.router.buffers()) and narrow.gate_weight.dtype == torch.bfloat16
    assert all(torch.equal(averages[0][n], averages[1][n]) for n in averages[0])
    narrow(torch.zeros(0, H, dtype=torch.bfloat16))


def test_a_copy_shares_the_process_group_and_a_file_has_none():
    class Group:
        def __reduce__(self):
            raise TypeError("cannot pickle")

    router = ExpertRace(2, process_group=Group())
    assert copy.deepcopy(router).process_group is router.process_group is not None
    assert pickle.loads(pickle.dumps(router)).process_group is None and router.process_group is not None


def test_a_part_that_learns_is_not_hidden():
    class Learned(Router, torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scores = Scorer()

        def pick(self, scores, call):
            return scores >= scores.topk(2, -1).values[:, -1:]

    class Scorer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.map = torch.nn.Linear(H, E)

        def forward(self, call):
            return self.map(call.tokens).softmax(-1)

    layer = copy.deepcopy(MoELayer(H, 8, E, 2, router=Learned(), backend="eager"))
    layer(torch.randn(5, H)).square().sum().backward()
    assert layer.router.scores.map.weight.grad.count_nonzero() and layer.gate_weight.grad is None


@pytest.mark.parametrize("name", ["race", "DiffMoE", "ProMoE", "ProMoE, experts choose"])
def test_losses_are_injected_in_training_alone(name, seed):
    grads = []
    for way in ("injected", "asked", "eval"):
        layer, x, call = draw(CASES[name], "eager", seed)
        layer.train(way != "eval")
        y, aux = layer(x, return_aux_loss=True, **call) if way == "asked" else (layer(x, **call), 0)
        ((y * 0).sum() + aux).backward()
        grads.append(torch.cat([p.grad.flatten() for p in layer.parameters() if p.grad is not None]))
    injected, asked, evaluated = grads
    assert asked.any() and torch.equal(injected, asked) and not evaluated.any()


def test_a_bound_keeps_the_best():
    torch.manual_seed(0)
    layer = MoELayer(H, 24, E, 2, router=ExpertRace(2, max_picks=0.5)).eval()
    x = torch.randn(B, L, H)
    layer.router.threshold.fill_(-1e9)
    kept, logits = dense(layer, x, {}) != 0, x.flatten(0, 1) @ layer.gate_weight.T
    assert kept.sum() == B * L // 2 and logits[kept].min() > logits[~kept].max()


def test_capacity_by_noise_level_and_by_call():
    annealed = ExpertChoice(lambda conditioning: 1 + 3 * conditioning["noise"])
    x, gate_weight = torch.randn(2 * L, H), torch.randn(E, H)
    for conditioning, count in (({"noise": 0.0}, 2), ({"noise": 1.0}, 8), ({"capacity_factor": 3.0}, 6)):
        plan, _ = annealed.route(x, gate_weight, tokens_per_image=L, conditioning=conditioning)
        assert plan.expert_counts.tolist() == [2 * count] * E


@pytest.mark.parametrize("name", ["Nucleus", "DSMoE", "race, threshold"])
def test_adaln(name, seed):
    """Routers that do not begin with gating get modulated tokens, and LayerNorm(x) as the unmodulated ones."""
    layer, x, call = draw(CASES[name], "eager", seed)
    shift, scale, gate = torch.randn(3, B, H)
    around = layer.forward_adaln(x, shift, scale, gate, conditioning=call["conditioning"])
    inside = layer(modulate(x, shift, scale), router_input=normalise(x), conditioning=call["conditioning"])
    torch.testing.assert_close(around, x + gate[:, None] * inside)


def test_a_router_in_three_lines():
    class Positive(Router):
        def pick(self, scores, call):
            return scores > 1 / scores.shape[1]

    x, gate_weight = torch.randn(9, H), torch.randn(E, H)
    plan, _ = Positive().route(x, gate_weight)
    plan.validate()
    assert int(plan.expert_offsets[-1]) == int((gating(x, gate_weight, 0)[2] > 1 / E).sum())


X, CALL = torch.zeros(B, L, H), {"labels": torch.zeros(B).long(), "timestep": torch.zeros(B, H)}
NUCLEUS, LABELS = CASES["Nucleus"].make, CASES["ProMoE"].make
REFUSED = {
    "no labels": (LABELS, {}, ValueError, r"conditioning\['labels'\]: got none, expected a tensor \(B\)"),
    "labels of others": (
        LABELS,
        {"labels": torch.zeros(2).long()},
        ValueError,
        r"\['labels'\]: got shape \(2,\), .* \(3,\)",
    ),
    "labels that are numbers": (LABELS, {"labels": torch.zeros(B)}, TypeError, r"\['labels'\]: got torch.float32"),
    "no timestep": (NUCLEUS, {"labels": CALL["labels"]}, ValueError, r"\['timestep'\]: got 'labels', expected"),
    "a wide timestep": (NUCLEUS, {"timestep": torch.zeros(B, 33)}, ValueError, r"\['timestep'\]: got shape \(3, 33\)"),
    "no input": (NUCLEUS, CALL, ValueError, "router_input: got None"),
    "capacity": (
        ExpertChoice,
        {"capacity_factor": torch.ones(())},
        TypeError,
        "capacity_factor: got Tensor, expected a number",
    ),
    "much capacity": (ExpertChoice, {"capacity_factor": 7}, ValueError, r"capacity_factor: got 7, expected \(0, E\]"),
}


@pytest.mark.parametrize(("make", "conditioning", "error", "said"), REFUSED.values(), ids=REFUSED)
def test_what_a_call_lacks_is_named(make, conditioning, error, said):
    layer = MoELayer(H, 24, E, getattr(make(), "top_k", 2), router=make())
    with pytest.raises(error, match=said):
        layer(X, conditioning=conditioning)


def test_router_inputs_of_another_shape_are_named():
    layer = MoELayer(H, 24, E, 2, router=NUCLEUS())
    with pytest.raises(ValueError, match=r"router_input: got shape \(3, 11, 32\), expected 36 tokens"):
        layer(X, router_input=X[:, 1:], conditioning=CALL)
    with pytest.raises(ValueError, match=r"gate_weight: got shape \(6, 32\), expected \(E,D\) with D = 31"):
        layer(X, router_input=X[..., 1:], conditioning=CALL)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Scores(by="relu"), "by: got 'relu', expected 'softmax'"),
        (lambda: ExpertChoice(rounding="up"), "rounding: got 'up'"),
        (lambda: GroupLimitedChoice(2, 6, groups=4), "groups: got 4, expected a divisor of num_experts = 6"),
        (lambda: GroupLimitedChoice(3, 6, groups=3), "top_k: got 3, expected at most the 2 experts of 1 groups"),
        (lambda: ExpertRace(2, "all"), "group: got 'all'"),
        (lambda: DiffMoE(6, 32, 7), r"capacity_factor: got 7, expected \(0, E\]"),
        (lambda: MoELayer(H, 24, E, 6, router=ProMoE(6)), "top_k: got 6, expected at most the 5 experts"),
    ],
)
def test_routers_that_could_not_run(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_the_null_label_takes_an_expert_of_its_own():
    layer, x, call = draw(CASES["ProMoE, K = 2"], "eager", 0)
    weights = dense(layer, x, call).view(B, L, E)
    null = call["conditioning"]["labels"] == NULL
    assert (weights[null] == torch.eye(E)[-1]).all() and not weights[~null][..., -1].any()
