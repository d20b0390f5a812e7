"""The case list: ids, work counts against known figures, presets that are what they say, comparable inputs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from bench.__main__ import main
from bench.instrument import shapes, workloads
from bench.instrument.cases import Case, all_cases, make_inputs, select
from bench.instrument.contender import by_name
from bench.instrument.race import race
from bench.instrument.shapes import MODEL_SHAPES, ROUTING_PRESETS
from moe_kernels.backends import registry
from reference.dit import DiTMoEConfig

S2 = Case("layer", "native", MODEL_SHAPES["S/2-8E2A"], "uniform", 4096, "bf16", "fwd")
TINY = replace(S2, shape=MODEL_SHAPES["digits"], T=64, dtype="fp32")


def draw(preset: str, T=512, E=8, K=2, seed=0):
    return ROUTING_PRESETS[preset](T, E, K, torch.Generator().manual_seed(seed))


def test_ids_are_those_of_the_measurement_rules_and_read_back():
    case = replace(S2, level="experts")
    assert case.id == "experts-native-S2-uniform-T4096_H384_I1536_Is768_E8_K2-bf16-fwd-t1" == str(case)
    for size in ("tiny", "small", "full"):
        ids = [c.id for c in all_cases(size)]
        assert len(ids) == len(set(ids))
        assert all(Case.from_id(c.id) == c for c in all_cases(size))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zork", "expected level-backend-model"),
        (replace(S2, dtype="fp7").id, "got dtype 'fp7'"),
        (S2.id.replace("H384", "H385"), "got shape S2 H385"),
    ],
)
def test_ids_that_are_none_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Case.from_id(text)


@pytest.mark.parametrize("name", [n for n in MODEL_SHAPES if "/" in n])
def test_shapes_agree_with_the_oracle(name):
    s, c = MODEL_SHAPES[name], DiTMoEConfig.from_name(f"DiT-MoE-{name}")
    H = c.hidden_size
    assert (s.H, s.I, s.Is, s.E, s.K) == (H, c.mlp_ratio * H, c.num_shared * H, c.num_experts, c.top_k)
    assert (s.depth, s.num_heads, s.qk_norm) == (c.depth, c.num_heads, c.qk_norm)


@pytest.mark.parametrize(
    ("name", "gmac"),
    [("S/2-8E2A", 16.0), ("B/2-8E2A", 62.9), ("L/2-8E2A", 222.5), ("XL/2-8E2A", 328.0), ("G/2-16E2A", 698.3)],
)
def test_flops_of_a_model_are_those_of_the_paper_with_attention(name, gmac):
    one_image = replace(S2, level="sampling_step", shape=MODEL_SHAPES[name], T=256, mode="fwd")
    assert one_image.flops / 2e9 == pytest.approx(gmac, rel=0.01)


def test_flops_and_bytes_of_the_layer():
    d, T = 384, 4096
    assert S2.flops == pytest.approx(60 * T * d * d, rel=1e-3)  # 48 routed + 12 shared, and combine
    assert replace(S2, mode="bwd").flops == 2 * S2.flops and replace(S2, mode="fwdbwd").flops == 3 * S2.flops
    weights = 2 * (8 * 12 + 6) * d * d
    assert S2.bytes == weights + 2 * 2 * T * d + 8 * 2 * T
    assert replace(S2, level="dispatch").flops == 0 < replace(S2, level="dispatch").bytes
    assert replace(S2, dtype="fp32").bytes > S2.bytes


@pytest.mark.parametrize("preset", [p for p in ROUTING_PRESETS if p != "real"])
@pytest.mark.parametrize(("T", "E", "K"), [(512, 8, 2), (1, 4, 4), (0, 8, 2), (7, 48, 5), (33, 3, 2)])
def test_presets_give_what_a_gate_gives(preset, T, E, K):
    topk_ids, topk_weights = draw(preset, T, E, K)
    assert topk_ids.shape == topk_weights.shape == (T, K)
    assert topk_ids.dtype == torch.int32 and topk_weights.dtype == torch.float32
    assert all(len(set(row)) == K for row in topk_ids.tolist()), "an expert picked twice by one token"
    assert ((topk_ids >= 0) & (topk_ids < E)).all()
    assert (topk_weights > 0).all() and (topk_weights.sum(1) <= 1 + 1e-6).all()
    assert (topk_weights.diff(dim=1) <= 0).all()
    again = draw(preset, T, E, K)
    assert torch.equal(again[0], topk_ids) and torch.equal(again[1], topk_weights)


def test_presets_have_the_skew_of_their_name():
    load = {p: draw(p, T=4096)[0].flatten().bincount(minlength=8) for p in ROUTING_PRESETS if p != "real"}
    assert load["uniform"].max() < 1.15 * load["uniform"].min()
    assert load["zipf"].max() > 2.5 * load["zipf"].min() > 0
    assert load["one_expert"].tolist() == [4096, 4096, 0, 0, 0, 0, 0, 0]
    assert load["empty_experts"].tolist()[1::2] == [0] * 4 and (load["empty_experts"][::2] > 0).all()


def test_position_skew_follows_the_position_in_every_image():
    first_picks = draw("position_skewed", T=256 * 64)[0][:, 0].view(64, 256)
    agreement = (first_picks == first_picks.mode(dim=0).values).float().mean()
    uniform = draw("uniform", T=256 * 64)[0][:, 0].view(64, 256)
    assert agreement > 1.5 * (uniform == uniform.mode(dim=0).values).float().mean()


def test_real_routing_is_replayed_and_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_BENCH_ROUTING", str(tmp_path / "routing.npz"))
    assert not [c for c in all_cases("tiny") if c.routing == "real"]
    ids, weights = draw("zipf", T=10)
    shapes.save_routing(ids, weights, num_experts=8)
    assert [c for c in all_cases("tiny") if c.routing == "real"]
    topk_ids, topk_weights = draw("real", T=25)
    start = next(i for i in range(10) if torch.equal(ids[i], topk_ids[0]) and torch.equal(weights[i], topk_weights[0]))
    assert torch.equal(topk_ids, ids[(start + torch.arange(25)) % 10])
    with pytest.raises(ValueError, match=r"got routing over \(experts, picks\) = \(8, 2\), expected \(16, 2\)"):
        draw("real", E=16)
    np.savez(tmp_path / "routing.npz", topk_ids=ids.numpy())
    with pytest.raises(ValueError, match=r"expected .*num_experts.* too"):
        draw("real")
    (tmp_path / "routing.npz").write_text("no archive")
    with pytest.raises(ValueError, match=r"MOE_BENCH_ROUTING .*routing\.npz: .* no npz"):
        draw("real")


def test_inputs_are_the_same_numbers_in_every_dtype_and_free_of_near_ties():
    low, high = make_inputs(replace(TINY, dtype="bf16")), make_inputs(replace(TINY, dtype="bf16"), dtype=torch.float64)
    for name in ("x", "gate_weight", "gate_up_proj", "down_proj", "shared_gate_up_proj", "shared_down_proj"):
        assert getattr(low, name).dtype == torch.bfloat16
        assert torch.equal(getattr(low, name).double(), getattr(high, name)), name
    logits = (high.x @ high.gate_weight.T).sort(dim=-1).values
    assert logits.diff(dim=-1).min() > 5e-4
    with pytest.raises(ValueError, match="routing: got 'zork'"):
        make_inputs(replace(TINY, routing="zork"))


def test_list_prints_filtered_ids(capsys):
    options = ["--backend", "native", "--level", "op", "--size", "tiny"]
    assert main(["list", "-k", "gating and fp32", *options]) == 0
    ids = capsys.readouterr().out.split()
    assert len(ids) == 2 and all(i.startswith("gating-native-") and "fp32" in i for i in ids)
    assert main(["list", "-k", "zork"]) == 2
    assert "no case selected by -k 'zork'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="MOE_BENCH_SIZE: got 'huge'"):
        all_cases("huge")


@pytest.mark.parametrize("level", ["experts", "layer"])
@pytest.mark.parametrize("damage", ["one_row", "scale", "not_zero", "nan"])
def test_a_damaged_result_is_wrong(level, damage):
    """One bad row in many, a 1 % scale, garbage in an empty expert's gradient, NaN: each must cost the number."""
    case = replace(TINY, level=level, backend="eager", routing="empty_experts", mode="fwdbwd")
    work = workloads.build(case)
    named = {name: t.clone() for name, t in work.named(work.run()).items()}
    assert workloads.check(case, named).wrong is None
    if damage == "one_row":
        named["dx"][7] *= 1.001
    elif damage == "scale":
        named["ddown_proj"][0] *= 1.01
    elif damage == "not_zero":
        named["ddown_proj"][1, 0, 0] = 1e-20
    else:
        named["dgate_up_proj"][2, 3, 4] = float("nan")
    assert workloads.check(case, named).wrong


def test_race_yields_rows_that_compare_understands():
    cases = select(all_cases("tiny"), "layer and uniform and fp32-fwd-", backend="")
    chosen = [c for c in cases if c.backend in ("native", "eager", "authors_tp1")]
    rows = list(race(chosen[0], [by_name(c.backend) for c in chosen], 3, 0.0))
    assert [r["case"] for r in rows] == [c.id for c in chosen]
    rows = [r for r in rows if not r["reason"]]
    for row in rows:
        assert row["wrong"] is None and row["figures"]["gflops"] > 0 and len(row["samples_us"]) == 3
        assert len(row["speedups"]) == len(rows) - 1


def test_a_case_without_its_backend_says_why(monkeypatch):
    def refuse(name, request):
        raise RuntimeError(f"backend {name!r} is not available: no compiled extension")

    monkeypatch.setattr(registry, "choose", refuse)
    assert workloads.why_not(TINY) == "backend 'native' is not available: no compiled extension"
    assert workloads.why_not(replace(TINY, backend="authors_tp2")) is None
    (row,) = race(TINY, [by_name("native")], 3, 0.0)
    assert row["reason"] == workloads.why_not(TINY) and not row["figures"] and not row["samples_us"]


def test_what_a_backend_computes_is_its_own_answer():
    """Asked with the case's own dtype and widths, from the layer up about the fused call."""
    for level in ("experts", "dispatch", "layer", "train_step"):
        assert workloads.why_not(replace(TINY, level=level, dtype="fp16")) is None
    assert "dtype torch.float64, expected" in workloads.why_not(replace(TINY, dtype="fp64"))
    narrow = replace(TINY.shape, I=2)
    assert "intermediate_size = 2" in workloads.why_not(replace(TINY, backend="grouped", shape=narrow))
    assert workloads.why_not(replace(TINY, backend="grouped", level="gating", shape=narrow)) is None


@pytest.mark.parametrize("change", [{"T": 17}, {"shape": MODEL_SHAPES["DSMoE-S-E48"]}])
def test_a_block_needs_a_model_and_whole_images(change):
    with pytest.raises(ValueError, match="expected a DiT-MoE shape and a multiple of"):
        workloads.build(replace(TINY, level="block", routing="gate", **change))
    with pytest.raises(ValueError, match="backend: got 'zork'"):
        workloads.build(replace(TINY, backend="zork"))
