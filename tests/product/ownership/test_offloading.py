"""Weights that hooks bring at the moment of use, or cast there: accelerate's and diffusers' offloading and casting."""

from __future__ import annotations

import pytest
import torch

from tests.product.ownership.models import make_model, make_replaced, make_x, native_and_eager, on_the_cpu, one_warning

pytestmark = [pytest.mark.unpoisoned, on_the_cpu]


def accelerate_cpu(model, folder):
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(model, execution_device="cpu")


def accelerate_disk(model, folder):
    accelerate = pytest.importorskip("accelerate")
    accelerate.disk_offload(model, folder, execution_device="cpu")


def accelerate_whole_model(model, folder):
    """What diffusers' model offload does: one hook on the model moves all of it."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload_with_hook(model, execution_device="cpu")


def casting(model, folder):
    pytest.importorskip("diffusers")
    from diffusers.hooks import apply_layerwise_casting

    apply_layerwise_casting(model, storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


def casting_to_float8(model, folder):
    pytest.importorskip("diffusers")
    from diffusers.hooks import apply_layerwise_casting

    apply_layerwise_casting(model, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def groups_of_leaves(model, folder):
    pytest.importorskip("diffusers")
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(model, torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")


def groups_of_blocks(model, folder):
    pytest.importorskip("diffusers")
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(
        model, torch.device("cpu"), torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )


INSIDE = [accelerate_cpu, accelerate_disk, casting, casting_to_float8, groups_of_leaves]
each_way = pytest.mark.parametrize("way", INSIDE)


@torch.no_grad()
def outputs(model, seed):
    return [model(make_x(seed + i)) for i in range(3)]


@native_and_eager
@each_way
@pytest.mark.parametrize("used", ["fresh", "used"])
def test_hooks_on_the_leaves_are_obeyed(used, way, backend, seed, tmp_path):
    plain, ours = make_model(seed), make_replaced(seed, backend)
    if used == "used":
        outputs(ours, seed)
    way(plain, tmp_path / "plain")
    way(ours, tmp_path / "ours")
    with one_warning("moe."):
        got = outputs(ours, seed)
    assert all(torch.equal(a, b) for a, b in zip(got, outputs(plain, seed), strict=True))


@native_and_eager
@pytest.mark.parametrize("way", [accelerate_whole_model, groups_of_blocks])
def test_hooks_around_the_block_are_obeyed(way, backend, seed, tmp_path):
    """The kernels compute, or the original's forward: the bits are those of one of them."""
    rivals = [outputs(make(seed), seed) for make in (make_model, lambda seed: make_replaced(seed, backend))]
    ours = make_replaced(seed, backend)
    way(ours, tmp_path)
    got = outputs(ours, seed)
    assert any(all(torch.equal(a, b) for a, b in zip(got, rival, strict=True)) for rival in rivals)


@native_and_eager
def test_hooks_taken_off_the_kernels_compute_again(backend, seed):
    accelerate = pytest.importorskip("accelerate")
    ours = make_replaced(seed, backend)
    expected = outputs(ours, seed)
    accelerate_cpu(ours, None)
    with one_warning("moe."):
        outputs(ours, seed)
    accelerate.hooks.remove_hook_from_module(ours, recurse=True)
    assert all(torch.equal(a, b) for a, b in zip(outputs(ours, seed), expected, strict=True))


@native_and_eager
def test_layerwise_casting_as_a_method_of_diffusers_models(backend, seed):
    pytest.importorskip("diffusers")
    from diffusers import ModelMixin

    class Denoiser(ModelMixin):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x)

    plain, ours = Denoiser(make_model(seed)), Denoiser(make_replaced(seed, backend))
    for model in (plain, ours):
        model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    with one_warning("moe.experts.0.gate_proj"):
        got = outputs(ours, seed)
    assert all(torch.equal(a, b) for a, b in zip(got, outputs(plain, seed), strict=True))
