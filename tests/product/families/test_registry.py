"""What is no block of a known family, and what is one but for an attribute; transformers' registry."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bench.peers.standins import DiffMoE, DSMoE, JiTMoE, ProMoE, SparseMoEBlock
from moe_kernels import replace_moe
from moe_kernels.adapters import Family, experts_forward, known_families, register_family
from moe_kernels.adapters.families.transformers import TransformersExperts
from moe_kernels.adapters.family import family_of
from tests.product.families.cases import BLOCKS, MODELS, build, hidream_block, nucleus_block
from tests.product.families.standins import (
    CoreMultiHeadMoE,
    H,
    HunyuanMoE,
    I,
    LingBotVideoSparseMoeBlock,
    TransposedExperts,
)


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(3, 3)])


def test_an_unknown_model_lists_the_families_and_what_has_experts():
    with pytest.raises(ValueError) as error:
        replace_moe(nn.Sequential(nn.Linear(3, 3), Unknown()))
    text = str(error.value)
    assert "1 (Unknown)" in text and "class NucleusMoELayer" in text and "register_family" in text
    assert all(family.name in text for family in known_families())


def without(make, name):
    def spoiled():
        block = make()
        owner, _, last = name.rpartition(".")
        delattr(block.get_submodule(owner), last)
        return block

    return spoiled


def changed(make, name, value):
    def spoiled():
        block = make()
        owner, _, last = name.rpartition(".")
        setattr(block.get_submodule(owner), last, value)
        return block

    return spoiled


class Scaled(LingBotVideoSparseMoeBlock):
    def forward(self, x, padding_mask=None):
        return 1.0001 * super().forward(x, padding_mask)


class OtherGroups(SparseMoEBlock):
    """Two images are one group: alike while a batch is one image."""

    def forward(self, x):
        return super().forward(x.view(1, -1, H)).view(x.shape)


class TanhForm(TransposedExperts):
    def __init__(self):
        super().__init__(False)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        self.act_fn = nn.GELU("tanh")
        y = super().forward(hidden_states, top_k_index, top_k_weights)
        self.act_fn = nn.GELU()
        return y


class OtherNull(ProMoE):
    def forward(self, hidden_states, labels):
        return super().forward(hidden_states, labels + 1)


class NoLabels(ProMoE):
    def compute_router(self, hidden_states):
        raise NotImplementedError

    def routed_by(self, x, labels):
        return ProMoE.compute_router(self, x, labels)


class Alone(DiffMoE):
    def forward(self, x):
        return super().forward(x)[0]


SPOILED = {
    "no gate": (without(hidream_block, "gate"), r"0\.gate: got NoneType in a MOEFeedForwardSwiGLU, expected Module"),
    "no w3": (without(hidream_block, "experts.1.w3"), r"0\.experts\.1\.w3: got None, expected an nn\.Linear"),
    "bias": (changed(hidream_block, "experts.2.w1", nn.Linear(H, 256)), r"0\.experts\.2\.w1: got a bias"),
    "no scale": (without(lambda: nucleus_block(False, 2.0), "route_scale"), r"0\.route_scale: got NoneType"),
    "no stack": (without(LingBotVideoSparseMoeBlock, "experts.w3"), r"0\.experts\.w3: got NoneType"),
    "extra": (changed(DSMoE, "scale", nn.Parameter(torch.ones(H))), r"0: got a parameter or buffer scale"),
    "drops tokens": (changed(HunyuanMoE, "gate.drop_tokens", True), r"0\.gate\.drop_tokens: got True"),
    "another rule": (Scaled, r"0: its own forward differs .* by 1\.0e-04 .* LingBot-Video"),
    "other groups": (OtherGroups, r"0: its own forward differs .* EC-DiT"),
    "GELU's tanh form": (TanhForm, r"0: its own forward differs .* by \d\.\de-0[34] .* transformers"),
    "another activation": (changed(lambda: TransposedExperts(True), "act_fn", nn.GELU()), r"0\.act_fn: got GELU"),
    "has_bias": (changed(lambda: TransposedExperts(True), "has_bias", True), r"0\.gate_up_proj_bias: got NoneType"),
    "some biases": (
        changed(DSMoE, "experts.blocks.2.up_proj", nn.Linear(H, I)),
        r"0\.experts\.blocks\.0\.gate_proj: got no bias",
    ),
    "two forms": (changed(lambda: SparseMoEBlock(form="tanh"), "experts.1.act", nn.GELU()), r"0\.experts: got act"),
    "interleaved": (changed(lambda: TransposedExperts(True), "is_concatenated", False), r"0\.is_concatenated"),
    "a layer of two": (without(JiTMoE, "experts.blocks.1.w12"), r"0\.experts\.blocks\.1\.w12: got None"),
    "halves of a shared one": (without(JiTMoE, "shared_experts.w3"), r"0\.shared_experts\.w3: got None"),
    "another dropout": (changed(DSMoE, "ffn_dropout", nn.Dropout(0.1)), r"0\.ffn_dropout: got Dropout"),
    "heads elsewhere": (changed(CoreMultiHeadMoE, "ep_size", 2), r"0\.ep_size: got 2, expected 1"),
    "no bias": (without(CoreMultiHeadMoE, "router.expert_bias"), r"0\.router\.expert_bias: got NoneType"),
    "weighed otherwise": (changed(ProMoE, "router_weight_mode", "relu"), r"0\.router_weight_mode: got 'relu'"),
    "no temperature": (without(ProMoE, "routing_contrastive_temperature"), r"0\.routing_contrastive_temp.*NoneType"),
    "exact GELU in one": (changed(ProMoE, "experts.2.act_fn", nn.GELU()), r"0\.experts: got act_fn \['none', 'tanh'\]"),
    "another null label": (OtherNull, r"0: its own forward differs .* ProMoE"),
    "tokens instead of experts": (NoLabels, r"0: its own forward differs .* ProMoE by expert"),
    "a difference": (changed(DiffMoE, "diff_expert", nn.Linear(H, H)), r"0: got a parameter or buffer diff_expert"),
    "no thresholds": (without(DiffMoE, "expert_threshold"), r"0\.expert_threshold: got NoneType"),
    "y alone": (Alone, r"0: its forward returned shape \(2, 8, 32\), expected \(shape \(2, 8, 32\), a NoneType"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_refused_by_path_and_attribute(name):
    make, message = SPOILED[name]
    torch.manual_seed(0)
    model = nn.Sequential(make())
    cls = type(model[0])
    with pytest.raises((ValueError, TypeError), match=message):
        replace_moe(model)
    assert type(model[0]) is cls and "moe_config" not in vars(model[0])


def test_empty_memory_and_zeros_are_no_reason_to_refuse():
    """Models on the way to their checkpoint: Nucleus' experts are torch.empty, others' routers zeros."""
    block = nucleus_block(False, 2.0)
    nn.init.constant_(block.experts.gate_up_proj, float("nan"))
    nn.init.zeros_(block.gate.weight)
    assert replace_moe(block) == 1 and block.experts.gate_up_proj.isnan().all()


def test_a_trial_is_of_full_precision_and_nobody_sees_it():
    seen, matmul = [], torch.backends.mkldnn.matmul
    block, before = DSMoE(), matmul.fp32_precision
    block.register_forward_hook(lambda *_: seen.append(1))
    matmul.fp32_precision = "bf16"
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert replace_moe(nn.Sequential(DSMoE(), block)) == 2
        assert not seen and matmul.fp32_precision == "bf16"
    finally:
        matmul.fp32_precision = before


def test_a_dense_layer_with_names_of_another_family_is_left_alone():
    dense = nn.Module()
    for name in ("W_gate", "W_up", "W_down"):
        setattr(dense, name, nn.Linear(4, 4))
    assert replace_moe(nn.Sequential(DSMoE(), dense)) == 1


def test_blocks_that_differ_in_a_function_are_tried_each(monkeypatch):
    from moe_kernels.adapters import replace

    tried, blocks = [], [DSMoE(), DSMoE(), DSMoE()]
    blocks[2].function = F.gelu
    monkeypatch.setattr(replace, "try_block", lambda block, config, size: tried.append(config.path))
    assert replace_moe(nn.Sequential(*blocks)) == 3 and tried == ["0", "2"]


def test_blocks_of_one_kind_are_tried_once(monkeypatch):
    from moe_kernels.adapters import replace

    tried = []
    monkeypatch.setattr(replace, "try_block", lambda block, config, size: tried.append(config.path))
    other = DSMoE()
    other.top_k = 1
    assert replace_moe(nn.Sequential(DSMoE(), DSMoE(), DSMoE(False), other)) == 4 and tried == ["0", "2", "3"]


def test_a_family_registered_again_is_taken_over_and_asked_first():
    before = known_families()

    class Mine(Family):
        name, classes = before[-1].name, ("Linear",)

    try:
        mine = register_family(Mine())
        assert known_families()[0] is mine and len(known_families()) == len(before)
        with pytest.raises(TypeError, match="family: got"):
            register_family(Mine)
    finally:
        for family in reversed(before):
            register_family(family)
    assert known_families() == before


def test_the_registry_of_transformers(seed):
    integration = pytest.importorskip("transformers.integrations.moe")
    integration.ALL_EXPERTS_FUNCTIONS.register("moe_kernels", experts_forward)
    for case in (case for case in MODELS if "M" in case.name):
        model, arguments = build(case, seed, torch.float32)
        expected = case.call(model, arguments)
        model.set_experts_implementation("moe_kernels")
        got = case.call(model, arguments)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        replace_moe(model)
        assert torch.equal(case.call(model, arguments), got)


@pytest.mark.parametrize(
    ("name", "value"),
    [("is_concatenated", False), ("act_fn", nn.GELU())],
)
def test_the_registry_refuses_by_name(name, value):
    experts = TransposedExperts(True)
    setattr(experts, name, value)
    with pytest.raises(ValueError, match=rf"TransposedExperts\.{name}: got"):
        experts_forward(experts, torch.randn(2, H), torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1))


def test_a_gate_of_its_own_is_refused():
    """gpt-oss, DeepSeek-V4 and others clamp in it."""

    class Clamped(TransposedExperts):
        def _apply_gate(self, both):
            gate, up = both.chunk(2, -1)
            return F.silu(gate.clamp(max=7)) * up

    with pytest.raises(ValueError, match=r"Clamped\._apply_gate: got Clamped's own"):
        replace_moe(Clamped(True))


def test_every_family_has_a_case():
    """But DiT-MoE, which has tests of its own, and what an example of docs/ registers."""
    ours = {f.name for f in known_families() if type(f).__module__.startswith("moe_kernels.")}
    assert {family_of(case.make()).name for case in BLOCKS} == ours - {"DiT-MoE"}


@pytest.mark.parametrize("has_gate", [True, False])
def test_picks_that_live_on_other_ranks_are_no_rows(has_gate, seed):
    """As the library's all-reduce does it: local ids, its number of experts and weight 0 for picks elsewhere."""
    torch.manual_seed(seed)
    whole = TransposedExperts(has_gate).double()
    E, T = whole.num_experts, 9
    x = torch.randn(T, H, dtype=torch.float64)
    weights, ids = torch.randn(T, E, dtype=torch.float64).softmax(-1).topk(2)
    expected = experts_forward(whole, x, ids, weights)
    total, rows = torch.zeros_like(x), 0
    for rank in range(2):
        half = copy.deepcopy(whole)
        half.num_experts, half._is_expert_parallel = E // 2, True
        for name, p in whole.named_parameters():
            setattr(half, name, nn.Parameter(p.detach().chunk(2)[rank].clone()))
        away = ids // (E // 2) != rank
        local = torch.where(away, E // 2, ids % (E // 2))
        total += experts_forward(half, x, local, weights.masked_fill(away, 0.0))
        rows += int(TransformersExperts().route(half, "auto", x, local, weights).plan.expert_counts.sum())
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-14)
    assert rows == ids.numel(), "each pick is computed once, by the rank of its expert"
