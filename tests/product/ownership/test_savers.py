"""Savers of state dicts and of whole modules write a replaced model as they write the plain one, and load it back."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.distributed import checkpoint

from moe_kernels import replace_moe
from reference.moe import SparseMoeBlock
from tests.contenders import each_backend
from tests.product.ownership.models import (
    Model,
    assert_like_untouched,
    assert_same,
    gradients,
    make_model,
    make_replaced,
    make_x,
    native_and_eager,
    on_the_cpu,
    ten_losses,
)


def saved(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def loaded(data: bytes):
    return torch.load(io.BytesIO(data), weights_only=False)


def assert_weights(model, state):
    assert_same(model.state_dict(), state)


@pytest.fixture(params=["fresh", "used"])
def model(request, seed):
    """A replaced model, right after replacing and after some training; native, the default."""
    model = make_replaced(seed, "auto")
    if request.param == "used":
        ten_losses(model, seed)
    return model


@each_backend
def test_torch_save_writes_the_bytes_of_the_plain_model(backend, seed):
    plain, ours = make_model(seed), make_replaced(seed, backend)
    gradients(ours, make_x(seed))
    for part in (lambda m: m, lambda m: m.moe.experts[0], lambda m: m.moe.experts[4].down_proj):
        theirs, own = saved(part(plain).state_dict()), saved(part(ours).state_dict())
        assert abs(len(own) - len(theirs)) <= 1024
        assert_same(loaded(own), loaded(theirs))


@each_backend
def test_safetensors_keeps_every_tensor(backend, seed, tmp_path):
    plain, ours = make_model(seed), make_replaced(seed, backend)
    gradients(ours, make_x(seed))
    safetensors.torch.save_file(ours.state_dict(), tmp_path / "dict")
    safetensors.torch.save_model(ours, tmp_path / "model")
    assert_same(safetensors.torch.load_file(tmp_path / "dict"), plain.state_dict())
    assert_same(safetensors.torch.load_file(tmp_path / "model"), plain.state_dict())
    into_plain, into_replaced = make_model(seed + 1), make_replaced(seed + 1, backend)
    for model in (into_plain, into_replaced):
        safetensors.torch.load_model(model, tmp_path / "model")
        assert_weights(model, plain.state_dict())
    assert_like_untouched(into_replaced, backend, seed)


@each_backend
@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: loaded(saved(m))])
def test_copies_of_the_module_stay_replaced_and_apart(way, backend, seed):
    model = make_replaced(seed, backend)
    expected = gradients(model, make_x(seed))
    other = way(model)
    assert isinstance(other.moe, SparseMoeBlock) and type(other.moe) is type(model.moe)
    assert f"backend={backend}" in repr(other)
    assert_same(gradients(other, make_x(seed)), expected)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert_same(gradients(model, make_x(seed)), expected)


def test_a_pickled_module_is_no_larger_than_the_plain_one(model, seed):
    plain = make_model(seed)
    assert abs(len(saved(model)) - len(saved(plain))) <= 8 * 1024


@native_and_eager
def test_copies_of_one_expert_are_the_experts_alone(backend, seed):
    model = make_replaced(seed, backend)
    expert = model.moe.experts[2]
    other = copy.deepcopy(expert)
    assert all(p.untyped_storage().nbytes() == p.numel() * p.element_size() for p in other.parameters())
    assert abs(len(saved(expert)) - len(saved(make_model(seed).moe.experts[2]))) <= 1024
    model.moe.experts[2] = other
    assert_like_untouched(model, backend, seed)


@on_the_cpu
def test_accelerate_save_model(model, seed, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerate.Accelerator(cpu=True).save_model(model, tmp_path, max_shard_size="24KB")
    shards = [safetensors.torch.load_file(path) for path in sorted(tmp_path.glob("*.safetensors"))]
    assert len(shards) > 1
    assert_same({name: t for shard in shards for name, t in shard.items()}, dict(model.state_dict()))
    plain = make_model(seed + 1)
    accelerate.load_checkpoint_in_model(plain, tmp_path)
    assert_weights(plain, model.state_dict())


@on_the_cpu
def test_accelerate_save_state_and_load_state(seed, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    losses = []
    for _ in range(2):
        accelerator = accelerate.Accelerator(cpu=True)
        model = accelerator.prepare(make_replaced(seed, "auto"))
        optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters(), lr=1e-2))
        if not losses:
            ten_losses(model, seed, optimizer.step)
            accelerator.save_state(tmp_path)
        else:
            accelerator.load_state(tmp_path)
        losses.append(ten_losses(model, seed, optimizer.step))
        accelerator.free_memory()
    assert torch.equal(*losses)


def test_hub_mixin(model, seed, tmp_path):
    hub = pytest.importorskip("huggingface_hub")

    class Hub(nn.Module, hub.PyTorchModelHubMixin):
        def __init__(self):
            super().__init__()
            self.model = Model()

    mine = Hub()
    mine.model = model
    mine.save_pretrained(tmp_path)
    assert_weights(Hub.from_pretrained(tmp_path).model, model.state_dict())


def test_diffusers_models(model, tmp_path):
    pytest.importorskip("diffusers")
    from diffusers import ConfigMixin, ModelMixin
    from diffusers.configuration_utils import register_to_config

    class Denoiser(ModelMixin, ConfigMixin):
        @register_to_config
        def __init__(self, depth: int = 1):
            super().__init__()
            self.model = Model()

    mine = Denoiser()
    mine.model = model
    mine.save_pretrained(tmp_path, max_shard_size="24KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_weights(Denoiser.from_pretrained(tmp_path).model, model.state_dict())


def test_transformers_models(model, tmp_path):
    transformers = pytest.importorskip("transformers")

    class Config(transformers.PreTrainedConfig):
        model_type = "a_block"

    class Pretrained(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config):
            super().__init__(config)
            self.model = Model()
            self.post_init()

        def _init_weights(self, module):
            pass

    mine = Pretrained(Config())
    mine.model = model
    mine.save_pretrained(tmp_path, max_shard_size="24KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_weights(Pretrained.from_pretrained(tmp_path).model, model.state_dict())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_distributed_checkpoint(model, seed, tmp_path):
    checkpoint.save(model.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    plain, ours = make_model(seed + 1), make_replaced(seed + 1, "auto")
    for other in (plain, ours):
        state = other.state_dict()
        checkpoint.load(state, checkpoint_id=tmp_path, no_dist=True)
        other.load_state_dict(state)
        assert_weights(other, model.state_dict())
    assert_like_untouched(ours, "auto", seed)


def test_replacing_leaves_a_state_dict_that_was_taken_before_as_it_is(seed):
    model = make_model(seed)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = model.state_dict()
    replace_moe(model)
    assert_same(state, before)
    assert_weights(model, before)
