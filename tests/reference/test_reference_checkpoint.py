"""reference.checkpoint: every container in which the weights are found, and the ways in which files go wrong."""

from __future__ import annotations

import argparse
import pathlib

import numpy as np
import pytest
import torch

from reference.checkpoint import check_layout, load_checkpoint, load_state_dict, save_safetensors
from reference.dit import DiTMoE, DiTMoEConfig


def tiny(**options):
    return DiTMoE(DiTMoEConfig(2, 16, 2, 2, 4, 2, input_size=8, num_classes=10, **options))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


STATE = tiny().state_dict()
OTHER = {key: value + 1 for key, value in STATE.items()}


class RunsCode:
    """Unpickling it creates the file it names."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        {"ema": STATE},
        {"model": STATE},
        {"module": STATE},
        {"state_dict": STATE},
        {"model_ema": STATE, "state_dict": OTHER},
        {"ema": {}, "model": STATE},
        {"model": OTHER, "ema": STATE, "opt": {"state": {}, "param_groups": [{"lr": 1e-4}]}},
        {"model": STATE, "args": argparse.Namespace(model="DiT-MoE-S/2-8E2A", lr=1e-4, rf=True)},
        {"ema": STATE, "args": argparse.Namespace(nested=argparse.Namespace(a=[1, "b", None]))},
    ],
    ids=[
        "bare",
        "ema",
        "model",
        "module",
        "state_dict",
        "model_ema",
        "empty ema",
        "ema before model",
        "namespace",
        "nested namespace",
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_containers(tmp_path, content, zipped):
    path = tmp_path / "weights.pt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert same(load_state_dict(path), STATE)
    model = tiny()
    load_checkpoint(model, path)
    assert same(model.state_dict(), STATE)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_stripped_aloud(tmp_path, prefix):
    torch.save({"model": {prefix + key: value for key, value in STATE.items()}}, tmp_path / "wrapped.pt")
    with pytest.warns(UserWarning, match=rf"wrapped\.pt: stripped '{prefix}' off every key"):
        assert same(load_state_dict(tmp_path / "wrapped.pt"), STATE)


def test_a_refused_class_is_named(tmp_path):
    """Training scripts keep numpy's state of random numbers; torch names the class in the last lines of its message."""
    torch.save({"model": STATE, "rng": np.random.get_state()}, tmp_path / "rng.pt")  # noqa: NPY002
    with pytest.raises(ValueError, match=r"rng\.pt.*trusted=True.*numpy.*_reconstruct"):
        load_state_dict(tmp_path / "rng.pt")
    assert same(load_state_dict(tmp_path / "rng.pt", trusted=True), STATE)


def test_a_real_training_checkpoint(tmp_path):
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 1])).square().mean().backward()
    optimizer.step()
    args = argparse.Namespace(global_seed=2024)
    torch.save(
        {"model": model.state_dict(), "ema": STATE, "opt": optimizer.state_dict(), "args": args}, tmp_path / "c.pt"
    )
    assert same(load_state_dict(tmp_path / "c.pt"), STATE)


def test_dtypes_stay_as_stored(tmp_path):
    half = {key: value.half() for key, value in STATE.items()}
    torch.save(half, tmp_path / "half.pt")
    save_safetensors(half, tmp_path / "half.safetensors")
    assert same(load_state_dict(tmp_path / "half.pt"), half) and same(
        load_state_dict(tmp_path / "half.safetensors"), half
    )


def test_safetensors_of_views_of_one_slab(tmp_path):
    slab = torch.randn(3, 4, 4)
    state = {"first": slab[0], "second": slab[1].T, "whole": slab}
    save_safetensors(state, tmp_path / "slab.safetensors", {"recipe": "1"})
    assert same(
        load_state_dict(tmp_path / "slab.safetensors"), {key: value.contiguous() for key, value in state.items()}
    )


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(OSError, match="nowhere/weights"):
        save_safetensors(STATE, tmp_path / "nowhere/weights.safetensors")


def test_no_code_is_run_unless_trusted(tmp_path):
    path, touched = tmp_path / "evil.pt", tmp_path / "touched"
    torch.save({"model": STATE, "args": RunsCode(touched)}, path)
    with pytest.raises(ValueError, match=r"evil\.pt.*trusted=True"):
        load_state_dict(path)
    assert not touched.exists()
    assert same(load_state_dict(path, trusted=True), STATE) and touched.exists()


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.9, 0.9999])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_files_are_named(tmp_path, kind, share):
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pt")
    if kind == "safetensors":
        save_safetensors(STATE, path)
    else:
        torch.save({"ema": STATE}, path, _use_new_zipfile_serialization=kind == "zip")
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=path.name.replace(".", r"\.")):
        load_state_dict(path)


@pytest.mark.parametrize("data", [b"hello world\n" * 50, bytes(range(256)) * 8])
def test_other_files_are_named(tmp_path, data):
    (tmp_path / "notes.pt").write_bytes(data)
    with pytest.raises(ValueError, match=r"notes\.pt"):
        load_state_dict(tmp_path / "notes.pt")
    with pytest.raises(FileNotFoundError):
        load_state_dict(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("content, found", [({"opt": {"lr": 1}}, "keys opt"), ([1, 2], "a list"), ({}, "a dict")])
def test_files_without_a_state_dict_say_what_they_hold(tmp_path, content, found):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=rf"other\.pt: got .*{found}"):
        load_state_dict(tmp_path / "other.pt")


def test_another_layout_is_explained(tmp_path):
    torch.save(STATE, tmp_path / "plain.pt")
    with pytest.raises(ValueError) as error:
        load_checkpoint(tiny(qk_norm=True), tmp_path / "plain.pt")
    for part in ("plain.pt", "16 missing: blocks.0.attn.Wqkv.weight", "8 unexpected: blocks.0.attn.qkv.weight", "more"):
        assert part in str(error.value)


def test_another_size_is_explained():
    model = tiny(in_channels=1)
    with pytest.raises(
        ValueError, match=r"3 misshapen: x_embedder\.proj\.weight \(16, 4, 2, 2\), expected \(16, 1, 2, 2\)"
    ):
        check_layout(model, STATE)
    check_layout(tiny(), STATE)
