"""Training: reproducible, resumable, and what is saved is what is used."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench.images.checkpoints import ASSET, Recipe, load_checkpoint, load_foreign, save_checkpoint
from bench.images.digits import load_digits
from bench.images.training import Trainer, sample, train
from reference.checkpoint import save_safetensors
from reference.dit import DiTMoE

SMALL = dict(hidden_size=32, depth=1, num_heads=2, steps=6, batch=8, warmup=2)


@pytest.fixture(scope="module")
def digits():
    return load_digits()


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    return train(Recipe.of(digits, **SMALL), digits, tmp_path_factory.mktemp("state") / "training.pt")


def weights(trained):
    return trained.model.state_dict()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_same_recipe_same_bits_other_seed_others(digits, trained, tmp_path):
    again = train(trained.recipe, digits, tmp_path / "a.pt")
    other = train(dataclasses.replace(trained.recipe, seed=1), digits, tmp_path / "b.pt")
    assert again.losses == trained.losses and equal(weights(again), weights(trained))
    assert other.losses != trained.losses


def test_interrupted_and_resumed_is_the_same_run(digits, trained, tmp_path, monkeypatch):
    state, advance = tmp_path / "training.pt", Trainer.advance

    def interrupted(self):
        if self.step == 3:
            raise KeyboardInterrupt
        return advance(self)

    monkeypatch.setattr(Trainer, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(trained.recipe, digits, state)
    monkeypatch.setattr(Trainer, "advance", advance)
    assert torch.load(state, weights_only=True)["step"] == 3
    resumed = train(trained.recipe, digits, state)
    assert resumed.losses == trained.losses and equal(weights(resumed), weights(trained))


def test_state_of_another_recipe_is_not_resumed_and_a_broken_one_is_named(digits, trained, tmp_path):
    trainer = Trainer(trained.recipe, digits)
    trainer.advance()
    trainer.save(tmp_path / "training.pt")
    other = Trainer(dataclasses.replace(trained.recipe, seed=1), digits)
    assert not other.resume(tmp_path / "training.pt") and other.step == 0
    (tmp_path / "training.pt").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"training\.pt"):
        trainer.resume(tmp_path / "training.pt")


def test_training_lowers_the_loss_and_moves_the_ema(digits):
    trainer = Trainer(Recipe.of(digits, **{**SMALL, "steps": 40, "batch": 32}), digits)
    start = {name: value.clone() for name, value in trainer.ema.items()}
    losses = [trainer.advance() for _ in range(40)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert any(not torch.equal(trainer.ema[name], start[name]) for name in start)
    assert torch.equal(trainer.ema["pos_embed"], start["pos_embed"])


def test_checkpoint_gives_the_model_back_bit_for_bit(trained, tmp_path):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, trained, {"guided": 1.0})
    again = load_checkpoint(trained.recipe, path)
    assert equal(weights(again), weights(trained)) and again.identity == trained.recipe.hash
    assert len(again.losses) == trained.recipe.steps
    assert load_checkpoint(dataclasses.replace(trained.recipe, steps=7), path) is None
    assert load_checkpoint(trained.recipe, tmp_path / "none.safetensors") is None


def test_every_field_of_the_recipe_is_in_its_hash(trained):
    for field in dataclasses.fields(Recipe):
        value = getattr(trained.recipe, field.name)
        changed = value + "x" if isinstance(value, str) else value + 1
        assert dataclasses.replace(trained.recipe, **{field.name: changed}).hash != trained.recipe.hash, field.name


def test_committed_checkpoint_belongs_to_the_default_recipe(digits):
    assert load_checkpoint(Recipe.of(digits)) is not None, "recipe or data changed: train anew and commit the file"
    assert ASSET.stat().st_size < 9e6


def test_foreign_checkpoint_is_read_by_its_shapes(digits, trained, tmp_path):
    path = tmp_path / "foreign.pt"
    torch.save({"ema": weights(trained)}, path)
    foreign = load_foreign(path, digits)
    config = dataclasses.replace(trained.recipe.config, num_heads=1)  # 32 wide: one head of up to 64
    assert dataclasses.asdict(foreign.model.config) == dataclasses.asdict(config)
    save_checkpoint(tmp_path / "own.safetensors", trained, {})
    assert load_foreign(tmp_path / "own.safetensors", digits).model.config == trained.recipe.config


def test_bad_foreign_checkpoints_are_named(digits, trained, tmp_path):
    path = tmp_path / "cut.safetensors"
    save_checkpoint(path, trained, {})
    path.write_bytes(path.read_bytes()[:1000])
    dense = tmp_path / "dense.pt"
    torch.save({"x_embedder.proj.weight": torch.zeros(32, 1, 2, 2)}, dense)
    other = tmp_path / "other.pt"
    torch.save(DiTMoE(dataclasses.replace(trained.recipe.config, in_channels=4)).state_dict(), other)
    flat, short, words = (tmp_path / name for name in ("flat.pt", "short.pt", "words.safetensors"))
    state = weights(trained)
    torch.save({**state, "x_embedder.proj.weight": torch.zeros(32)}, flat)
    torch.save({k: v for k, v in state.items() if not k.endswith("shared_experts.down_proj.weight")}, short)
    save_safetensors(state, words, {"recipe": "no recipe"})
    for bad, match in (
        (path, "cut"), (dense, r"dense.*missing"), (other, "--data"), (tmp_path / "no.pt", "no"),
        (flat, "flat.*other numbers of axes"), (short, "short.* missing: "), (words, "words.*recipe: expected a JSON"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"--ckpt .*{match}"):
            load_foreign(bad, digits)


def test_guidance_of_one_is_no_guidance_and_sampling_repeats(trained):
    noise, labels = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    plain = sample(trained.model, noise, labels, 3)
    assert torch.equal(plain, sample(trained.model, noise, labels, 3))
    almost = sample(trained.model, noise, labels, 3, guidance=1 + 1e-7)
    assert (plain - almost).norm() < 1e-4 * plain.norm()
