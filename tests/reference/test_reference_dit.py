"""reference.dit: exact parameter counts, the documented keys, and each part against an independent computation."""

from __future__ import annotations

import math

import pytest
import torch

from reference.dit import (
    Attention,
    DiTMoE,
    DiTMoEConfig,
    QKNormAttention,
    count_parameters,
    position_embedding,
    timestep_embedding,
)
from reference.moe import moe

TINY = dict(depth=2, hidden_size=16, num_heads=2, patch_size=2, num_experts=4, top_k=2, input_size=8, num_classes=10)


with torch.device("meta"):  # torch remembers its allocators here, before a fixture wraps them
    torch.empty(0)


def on_meta(config):
    with torch.device("meta"):
        assert torch.empty(0).is_meta, "a G model would allocate 66 GB"
        return DiTMoE(config)


def tiny(**options):
    """Return a float64 eval model, all parameters random (a new one returns zero), every expert with some tokens."""
    torch.manual_seed(0)
    model = DiTMoE(DiTMoEConfig(**{**TINY, **options})).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model


def batch(model, B=3):
    torch.manual_seed(1)
    config = model.config
    x = torch.randn(B, config.in_channels, config.input_size, config.input_size, dtype=torch.float64)
    return x, torch.rand(B, dtype=torch.float64), torch.randint(config.num_classes, (B,))


def relative_error(ours, expected):
    return ((ours - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    "name, total, active, keys",
    [
        ("S/2-8E2A", 199_307_552, 71_905_568, 420),
        ("S/2-16E2A", 369_213_728, 71_942_432, 708),
        ("B/2-8E2A", 795_861_536, 286_253_600, 420),
        ("L/2-8E2A", 2_823_764_000, 1_011_824_672, 24 * 34 + 12),
        ("XL/2-8E2A", 4_168_172_192, 1_492_730_528, 1076),
        ("G/2-16E2A", 16_503_731_232, 3_181_573_152, 2492),
    ],
)
def test_parameter_counts(name, total, active, keys):
    model = on_meta(DiTMoEConfig.from_name(f"DiT-MoE-{name}"))
    assert count_parameters(model) == (total, active)
    assert len(model.state_dict()) == keys


@pytest.mark.parametrize("name, total", [("XL/2-8E2A", 4_169_056_928), ("G/2-16E2A", 16_504_812_576)])
def test_512_pixel_models_differ_in_pos_embed_only(name, total):
    assert count_parameters(on_meta(DiTMoEConfig.from_name(name, input_size=64)))[0] == total


@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize("size", ["S", "B", "L", "XL", "G"])
def test_every_name_builds(size, patch):
    config = DiTMoEConfig.from_name(f"DiT-MoE-{size}/{patch}-4E1A", depth=1)
    model = on_meta(config)
    assert config.patch_size == patch and config.top_k == 1 and len(model.blocks[0].moe.experts) == 4
    assert model.pos_embed.shape == (1, (32 // patch) ** 2, config.hidden_size)


def documented_keys(depth, D, heads, E, patch, size=32, channels=4, out_channels=8, classes=1000, qk_norm=False):
    """Return the public checkpoints' key list with shapes, as the facts sheet documents it."""
    keys = {
        "pos_embed": (1, (size // patch) ** 2, D),
        "x_embedder.proj.weight": (D, channels, patch, patch),
        "x_embedder.proj.bias": (D,),
        "t_embedder.mlp.0.weight": (D, 256),
        "t_embedder.mlp.0.bias": (D,),
        "t_embedder.mlp.2.weight": (D, D),
        "t_embedder.mlp.2.bias": (D,),
        "y_embedder.embedding_table.weight": (classes + 1, D),
        "final_layer.linear.weight": (patch * patch * out_channels, D),
        "final_layer.linear.bias": (patch * patch * out_channels,),
        "final_layer.adaLN_modulation.1.weight": (2 * D, D),
        "final_layer.adaLN_modulation.1.bias": (2 * D,),
    }
    attention = {"qkv.weight": (3 * D, D), "qkv.bias": (3 * D,), "proj.weight": (D, D), "proj.bias": (D,)}
    if qk_norm:
        attention = {"Wqkv.weight": (3 * D, D), "Wqkv.bias": (3 * D,), "out_proj.weight": (D, D), "out_proj.bias": (D,)}
        attention |= {f"{n}_norm.{kind}": (D // heads,) for n in "qk" for kind in ("weight", "bias")}
    expert = {"gate_proj.weight": (4 * D, D), "up_proj.weight": (4 * D, D), "down_proj.weight": (D, 4 * D)}
    shared = {"gate_proj.weight": (2 * D, D), "up_proj.weight": (2 * D, D), "down_proj.weight": (D, 2 * D)}
    for n in range(depth):
        block = {f"attn.{key}": shape for key, shape in attention.items()} | {"moe.gate.weight": (E, D)}
        block |= {f"moe.experts.{i}.{key}": shape for i in range(E) for key, shape in expert.items()}
        block |= {f"moe.shared_experts.{key}": shape for key, shape in shared.items()}
        block |= {"adaLN_modulation.1.weight": (6 * D, D), "adaLN_modulation.1.bias": (6 * D,)}
        keys |= {f"blocks.{n}.{key}": shape for key, shape in block.items()}
    return keys


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("S/2-8E2A", (12, 384, 6, 8, 2)),
        ("S/4-16E2A", (12, 384, 6, 16, 4)),
        ("B/2-8E2A", (12, 768, 12, 8, 2)),
        ("XL/2-8E2A", (28, 1152, 16, 8, 2)),
        ("G/2-16E2A", (40, 1408, 16, 16, 2)),
    ],
)
def test_keys_and_shapes_are_the_documented_ones(name, arguments):
    model = on_meta(DiTMoEConfig.from_name(name))
    expected = documented_keys(*arguments, qk_norm=name[0] in "XG")
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == expected


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_state_dict_from_the_documented_keys_loads_strictly(qk_norm):
    model = tiny(qk_norm=qk_norm)
    keys = documented_keys(2, 16, 2, 4, 2, size=8, classes=10, qk_norm=qk_norm)
    state = {key: torch.randn(shape, dtype=torch.float64) for key, shape in keys.items()}
    model.load_state_dict(state, strict=True)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    other = documented_keys(2, 16, 2, 4, 2, size=8, classes=10, qk_norm=not qk_norm)
    with pytest.raises(RuntimeError, match="Wqkv"):
        model.load_state_dict({key: torch.zeros(shape) for key, shape in other.items()}, strict=True)


def test_initialisation():
    torch.manual_seed(0)
    model = DiTMoE(DiTMoEConfig(**{**TINY, "hidden_size": 64}))
    block = model.blocks[0]
    bound = {"gate": 1 / math.sqrt(64), "expert": math.sqrt(6 / (64 + 256)), "attn": math.sqrt(6 / (64 + 192))}
    for weight, limit in (
        (block.moe.gate.weight, bound["gate"]),
        (block.moe.experts[3].up_proj.weight, bound["expert"]),
        (block.attn.qkv.weight, bound["attn"]),
    ):
        assert 0.9 * limit < weight.abs().max() <= limit
    assert model.y_embedder.embedding_table.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert model.t_embedder.mlp[2].weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert block.adaLN_modulation[1].weight.count_nonzero() == block.attn.qkv.bias.count_nonzero() == 0
    assert not model.pos_embed.requires_grad
    tokens = torch.randn(2, 16, 64)
    assert torch.equal(block(tokens, torch.randn(2, 64)), tokens), "adaLN-Zero: a new block is the identity"
    assert model(torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 10])).count_nonzero() == 0


def test_timestep_embedding_is_fed_unscaled_t():
    first, second = timestep_embedding(torch.tensor([0.02, 1.0], dtype=torch.float64), 256)
    assert first[0].item() == pytest.approx(math.cos(0.02)) and first[128].item() == pytest.approx(math.sin(0.02))
    assert second[64].item() == pytest.approx(math.cos(10000**-0.5))
    assert torch.cosine_similarity(first, second, dim=0).item() == pytest.approx(0.973, abs=5e-4)
    first, second = timestep_embedding(torch.tensor([20.0, 1000.0], dtype=torch.float64), 256)
    assert torch.cosine_similarity(first, second, dim=0).item() == pytest.approx(0.226, abs=5e-4)


def test_position_embedding_puts_the_column_first():
    table = position_embedding(16, 4).view(4, 4, 16)
    for row, column in ((0, 1), (2, 3), (3, 0)):
        for half, position in ((0, column), (1, row)):
            angles = [position / 10000 ** (i / 4) for i in range(4)]
            expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            assert table[row, column, 8 * half : 8 * half + 8].tolist() == pytest.approx(expected, abs=1e-6)


def test_patches_come_out_as_row_column_channel():
    model = tiny(learn_sigma=True)
    tokens = torch.arange(16 * 2 * 2 * 8, dtype=torch.float64).view(1, 16, 32)
    image = model._unpatchify(tokens)
    for height, width, c in ((0, 0, 0), (1, 0, 3), (0, 1, 7), (5, 6, 2), (7, 7, 7)):
        token, p, q = (height // 2) * 4 + width // 2, height % 2, width % 2
        assert image[0, c, height, width] == tokens[0, token, (p * 2 + q) * 8 + c]


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_equals_the_head_loop(qk_norm):
    torch.manual_seed(2)
    D, heads, size = 12, 3, 4
    attn = (QKNormAttention if qk_norm else Attention)(D, heads).double()
    x = torch.randn(2, 5, D, dtype=torch.float64)
    packed, out = (attn.Wqkv, attn.out_proj) if qk_norm else (attn.qkv, attn.proj)
    if qk_norm:
        for norm in (attn.q_norm, attn.k_norm):
            torch.nn.init.normal_(norm.weight)
            torch.nn.init.normal_(norm.bias)
    parts = []
    for h in range(heads):
        q, k, v = (packed(x)[..., i * D + h * size : i * D + (h + 1) * size] for i in range(3))
        if qk_norm:
            q, k = attn.q_norm(q), attn.k_norm(k)
        parts.append((q @ k.transpose(1, 2) / math.sqrt(size)).softmax(-1) @ v)
    assert relative_error(attn(x), out(torch.cat(parts, dim=-1))) < 1e-14


@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_whole_model_equals_a_functional_rewrite(qk_norm):
    model = tiny(qk_norm=qk_norm)
    x, t, y = batch(model)
    p = dict(model.named_parameters())
    silu, linear = torch.nn.functional.silu, torch.nn.functional.linear

    def dense(v, prefix):
        return linear(v, p[f"{prefix}.weight"], p[f"{prefix}.bias"])

    def norm(v):
        return (v - v.mean(-1, keepdim=True)) / (v.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    patches = x.view(3, 4, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(3, 16, 16)
    h = linear(patches, p["x_embedder.proj.weight"].flatten(1), p["x_embedder.proj.bias"]) + p["pos_embed"]
    c = dense(silu(dense(timestep_embedding(t, 256), "t_embedder.mlp.0")), "t_embedder.mlp.2")
    c = silu(c + p["y_embedder.embedding_table.weight"][y])
    for n, block in enumerate(model.blocks):
        m = dense(c, f"blocks.{n}.adaLN_modulation.1").view(3, 6, 1, 16)
        h = h + m[:, 2] * block.attn(norm(h) * (1 + m[:, 1]) + m[:, 0])
        tokens = (norm(h) * (1 + m[:, 4]) + m[:, 3]).view(48, 16)
        topk = linear(tokens, p[f"blocks.{n}.moe.gate.weight"]).softmax(-1).topk(2)
        gate_up = torch.stack([torch.cat([e.gate_proj.weight, e.up_proj.weight]) for e in block.moe.experts])
        down = torch.stack([e.down_proj.weight for e in block.moe.experts])
        shared = block.moe.shared_experts
        shared_gate_up = torch.cat([shared.gate_proj.weight, shared.up_proj.weight])
        y_moe = moe(tokens, topk.values, topk.indices, gate_up, down, shared_gate_up, shared.down_proj.weight)
        h = h + m[:, 5] * y_moe.view(3, 16, 16)
    shift, scale = dense(c, "final_layer.adaLN_modulation.1").view(3, 2, 1, 16).unbind(1)
    out = dense(norm(h) * (1 + scale) + shift, "final_layer.linear")
    expected = torch.einsum("bhwpqc->bchpwq", out.view(3, 4, 4, 2, 2, 8)).reshape(3, 8, 8, 8)
    assert relative_error(model(x, t, y), expected) < 1e-12


def test_digit_images_without_learned_sigma():
    for learn_sigma, channels in ((False, 1), (True, 2)):
        model = tiny(in_channels=1, learn_sigma=learn_sigma)
        assert model(*batch(model)).shape == (3, channels, 8, 8)


def test_an_image_does_not_depend_on_its_batch():
    model = tiny()
    x, t, y = batch(model, B=4)
    alone = torch.cat([model(x[b : b + 1], t[b : b + 1], y[b : b + 1]) for b in range(4)])
    assert relative_error(model(x, t, y), alone) < 1e-12


@pytest.mark.parametrize("channels, guided", [("first3", 3), ("all", 4)])
def test_guidance_conventions(channels, guided):
    model = tiny()
    x, t, y = batch(model)
    cond, uncond = model(x, t, y), model(x, t, torch.full_like(y, 10))
    out = model.forward_with_guidance(x, t, y, 7.0, channels)
    expected = torch.cat([uncond[:, :guided] + 7 * (cond - uncond)[:, :guided], cond[:, guided:]], dim=1)
    assert relative_error(out, expected) < 1e-12
    assert relative_error(model.forward_with_guidance(x, t, y, 1.0, channels), cond) < 1e-12
    assert relative_error(expected[:, :guided], cond[:, :guided]) > 0.01, "the labels must matter for this test to see"


def test_guidance_of_one_channel_leaves_the_variance_alone():
    model = tiny(in_channels=1)
    x, t, y = batch(model)
    out = model.forward_with_guidance(x, t, y, 3.0, "first3")
    assert torch.equal(out[:, 1:], model.forward_with_guidance(x, t, y, 0.0, "first3")[:, 1:])


def test_label_dropout_only_in_training():
    model = tiny(label_dropout=1.0)
    x, t, y = batch(model)
    dropped = model.train()(x, t, y)
    assert torch.equal(dropped, model.eval()(x, t, torch.full_like(y, 10))) and not torch.equal(dropped, model(x, t, y))
    model = tiny(label_dropout=0.0)
    assert torch.equal(model.train()(x, t, y), model.eval()(x, t, y)), "train and eval take the same path"


@pytest.mark.parametrize("qk_norm", [False, True])
def test_eval_mode_gives_every_gradient(qk_norm):
    model = tiny(qk_norm=qk_norm)
    model(*batch(model)).square().mean().backward()
    assert all(p.grad.norm() > 0 for p in model.parameters() if p.requires_grad)


def test_model_gradient_by_finite_differences():
    model = tiny(in_channels=1, depth=1)
    x, t, y = batch(model, B=1)
    assert torch.autograd.gradcheck(
        lambda x, t: model(x, t, y), (x.requires_grad_(), t.requires_grad_()), fast_mode=True
    )


def test_aux_loss_is_injected_or_returned():
    model = tiny(label_dropout=0.0).train()
    inputs = batch(model)
    gates = [block.moe.gate.weight for block in model.blocks]
    out, aux = model(*inputs, return_aux_loss=True)
    assert aux.item() == pytest.approx(sum(block.moe.last_aux.item() for block in model.blocks), rel=1e-14)
    assert 0.02 <= aux.item() < 0.1
    main = torch.autograd.grad(out.square().mean(), gates, retain_graph=True)
    returned = torch.autograd.grad(out.square().mean() + aux, gates)
    injected = torch.autograd.grad(model(*inputs).square().mean(), gates)
    for m, r, i in zip(main, returned, injected, strict=True):
        assert relative_error(i, r) < 1e-12 and relative_error(m, r) > 1e-9


def test_hooks_on_the_gates_see_every_layer():
    model, ids = tiny(), []
    for block in model.blocks:
        block.moe.gate.register_forward_hook(lambda gate, args, out: ids.append(out[1]))
    model(*batch(model))
    assert [tuple(i.shape) for i in ids] == [(48, 2)] * 2


def test_bfloat16_keeps_large_timesteps_apart():
    model = tiny().bfloat16()
    x, _, y = batch(model)
    out = [model(x.bfloat16(), torch.full((3,), t), y) for t in (998, 999)]  # both 1000 in bf16
    assert out[0].dtype == torch.bfloat16 and not torch.equal(*out)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: DiTMoEConfig.from_name("DiT-MoE-M/2-8E2A"), "name: got 'DiT-MoE-M/2-8E2A'"),
        (lambda: DiTMoEConfig.from_name("S/2-2E3A"), r"top_k: got 3, expected 1..2 \(num_experts\)"),
        (lambda: DiTMoEConfig(**{**TINY, "hidden_size": 18}), "hidden_size: got 18"),
        (lambda: DiTMoEConfig(**{**TINY, "input_size": 9}), "input_size: got 9, expected a multiple of patch_size 2"),
        (lambda: DiTMoEConfig(**{**TINY, "depth": 0}), "depth: got 0"),
        (lambda: tiny()(torch.ones(2, 3, 8, 8), torch.ones(2), torch.zeros(2).long()), r"x: got shape \(2, 3, 8, 8\)"),
        (lambda: tiny()(torch.ones(2, 4, 8, 8), torch.ones(1), torch.zeros(2).long()), r"t: got shape \(1,\)"),
        (lambda: tiny()(torch.ones(2, 4, 8, 8), torch.ones(2), torch.tensor([0, 11])), "y: got labels 0..11"),
        (lambda: tiny().forward_with_guidance(*batch(tiny()), 2.0, "some"), "channels: got 'some'"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
