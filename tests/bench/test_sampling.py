"""`python -m bench sample`: image i is a matter of (seed, i); files, resuming, several processes, bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.__main__ import main
from bench.images import digits
from bench.images.sampling import draw
from bench.images.sampling.draw import Drawing, generator, label, to_uint8
from bench.images.sampling.samplers import NOISE, SAMPLERS
from bench.instrument.verify import BOUND, whole_error
from reference import samplers
from reference.checkpoint import save_safetensors
from reference.denoiser import Denoiser
from reference.dit import DiTMoE, DiTMoEConfig

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = dict(sampler="rf_euler", steps=3, guidance=1.5, channels="all", labels="cycle", seed=7, batch=4)


def random_model(channels: int = 1, dtype: torch.dtype = torch.float32, **changes) -> DiTMoE:
    """A DiT-MoE of head size 64 whose every part counts: what adaLN-Zero starts from is drawn, too."""
    sizes = dict(depth=2, hidden_size=64, num_heads=1, patch_size=2, num_experts=4, top_k=2, input_size=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DiTMoE(
            DiTMoEConfig(**sizes, in_channels=channels, num_classes=10, mlp_ratio=2, num_shared=1, **changes)
        )
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
    return model.to(dtype).eval()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """Of pixels, of latents, and one that has gone bad for label 3."""
    folder = tmp_path_factory.mktemp("checkpoints")
    bad = random_model()
    with torch.no_grad():
        bad.y_embedder.embedding_table.weight[3] = float("nan")
    models = {"pixels": random_model(), "latents": random_model(4), "bad": bad}
    paths = {name: folder / f"{name}.safetensors" for name in models}
    for name, path in paths.items():
        save_safetensors(models[name].state_dict(), path)
    return paths


def sample(ckpt: Path, out: Path, *words: str | Path) -> int:
    given = ["--ckpt", ckpt, "--out", out, "--predicts", "velocity", "--steps", 2, "--batch", 4, "--count", 10, *words]
    return main(["sample", *map(str, given)])


def drawing(model: DiTMoE, **changes) -> Drawing:
    return Drawing(model, 1.0, **{**SETTINGS, **changes})


def drawn(model: DiTMoE, monkeypatch, **changes) -> torch.Tensor:
    """Draw 12 images in batches, not quantised."""
    monkeypatch.setattr(draw, "to_uint8", lambda x: x.double())
    job = drawing(model, **changes)
    parts = [job.range(first, min(job.batch, 12 - first))["arr_0"] for first in range(0, 12, job.batch)]
    return torch.cat(parts)


def in_its_own_time(name, fn, noise, generators, steps):
    more = {"generators": generators} if name == "ddpm" else {}
    return getattr(samplers, name)(fn, noise, steps, **more)


def by_level(name, fn, noise, generators, steps):
    """As docs/samplers.md has it, of a flow."""
    schedule = samplers.geometric_sigmas if name == "reverse_diffusion" else samplers.karras_sigmas
    more = {"generators": generators} if name in ("heun_churn", "reverse_diffusion") else {}
    more |= {"churn": samplers.Churn()} if name == "heun_churn" else {}
    denoise = Denoiser(lambda x, t, _: fn(x, t), "flow")
    return getattr(samplers, name.removesuffix("_churn"))(denoise, 20 * noise, schedule(steps, 20.0, 0.05), **more)


WAYS = dict.fromkeys(("rf_euler", "rf_heun", "ddpm", "ddim"), in_its_own_time)
WAYS |= dict.fromkeys(("dpmpp_2m", "unipc", "heun", "heun_churn", "reverse_diffusion"), by_level)


@pytest.mark.parametrize("name", WAYS)
def test_an_image_is_what_its_sampler_makes_of_seed_and_number(name, monkeypatch):
    """One by one, from the generator of (seed, i) alone, by reference.samplers: no neighbour, no batch, no place."""
    model, steps = random_model(dtype=torch.float64), 4
    guided = dict(scale=1.5, channels="first3" if name in ("ddpm", "ddim") else "all")
    found = drawn(model, monkeypatch, sampler=name, steps=steps, channels=guided["channels"], batch=5, labels="random")
    for i in (0, 4, 5, 11):
        source = generator(7, i)
        noise = torch.randn(1, 8, 8, generator=source, dtype=torch.float64)[None]
        y = torch.tensor([label("random", 7, i, 10)])
        alone = WAYS[name](
            name, lambda x, t, y=y: model.forward_with_guidance(x, t, y, **guided), noise, [source], steps
        )
        torch.testing.assert_close(found[i], alone[0], rtol=1e-9, atol=1e-9)  # float64: another order of sums
    assert (found[0] - found[1]).abs().max() > 0.1


def test_the_batch_moves_rounding_alone(monkeypatch):
    """Torch's products sum in an order that depends on the rows: each batch is as near to float64 as any other."""
    exact = drawn(random_model(dtype=torch.float64), monkeypatch)
    errors = [whole_error(drawn(random_model(), monkeypatch, batch=batch), exact) for batch in (1, 3, 5, 12)]
    assert 0 < max(errors) <= BOUND * min(errors) < 1e-4


def test_generators_and_labels_of_images_differ():
    keys = {generator(seed, i).initial_seed() for seed in (0, 1, 2, 4293) for i in (0, 1, 2, 999_999)}
    assert len(keys) == 16 and max(keys) < 2**32
    labels = [label("random", 0, i, 10) for i in range(2000)]
    assert min(np.bincount(labels, minlength=10)) > 150 and labels[:50] != [
        label("random", 1, i, 10) for i in range(50)
    ]
    assert [label("cycle", 0, i, 3) for i in range(4)] == [0, 1, 2, 0] == [label([0, 1, 2], 5, i, 3) for i in range(4)]


def test_two_processes_write_the_bytes_of_one(checkpoints, tmp_path):
    """As torchrun starts them; more ranges than processes, the last one short."""
    assert sample(checkpoints["pixels"], tmp_path / "one", "--guidance", "1.5", "--backend", "eager") == 0
    words = f"sample --ckpt {checkpoints['pixels']} --out {tmp_path / 'two'} --predicts velocity --steps 2 --batch 4"
    command = [sys.executable, "-m", "bench", *words.split(), *"--count 10 --guidance 1.5 --backend eager".split()]
    ranks = [
        subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "RANK": str(r), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        )
        for r in range(2)
    ]
    assert [process.wait(timeout=600) for process in ranks] == [0, 0]
    for name in ("samples.npz", "grid.png", "settings.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert not list((tmp_path / "two" / "ranges").iterdir())


KILLED = """
import os, signal, sys
from bench.__main__ import main
from bench.images.sampling import ranges
ranges.os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)  # its range is written, not yet named
main(sys.argv[1:])
"""


def test_a_lost_processs_ranges_are_drawn_by_the_next_run(checkpoints, tmp_path):
    """The second of two is killed while it writes its only range; one process alone then finishes."""
    assert sample(checkpoints["pixels"], tmp_path / "whole") == 0
    words = f"sample --ckpt {checkpoints['pixels']} --out {tmp_path / 'lost'} --predicts velocity --steps 2 --batch 4"
    environment = {**os.environ, "RANK": "1", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, *words.split(), "--count", "10"]
    assert subprocess.run(command, cwd=ROOT, env=environment, timeout=600).returncode == -signal.SIGKILL
    left = [path.suffix for path in (tmp_path / "lost/ranges").iterdir()]
    assert left == [".tmp"]
    assert sample(checkpoints["pixels"], tmp_path / "lost") == 0
    assert (tmp_path / "lost/samples.npz").read_bytes() == (tmp_path / "whole/samples.npz").read_bytes()
    assert not list((tmp_path / "lost/ranges").iterdir())


def test_an_interrupted_run_goes_on(checkpoints, tmp_path, monkeypatch, capsys):
    sample(checkpoints["pixels"], tmp_path / "whole")
    once, calls = Drawing.range, []

    def interrupted(self, first, count):
        calls.append(first)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return once(self, first, count)

    monkeypatch.setattr(Drawing, "range", interrupted)
    assert sample(checkpoints["pixels"], tmp_path / "cut") == 130
    assert "4 of 10 images kept" in capsys.readouterr().out and not (tmp_path / "cut/samples.npz").exists()
    assert sample(checkpoints["pixels"], tmp_path / "cut") == 0 and calls == [0, 4, 4, 8]
    out = capsys.readouterr().out
    assert "4 of 10 images are there" in out and "images/s" in out and "s left" in out
    assert (tmp_path / "cut/samples.npz").read_bytes() == (tmp_path / "whole/samples.npz").read_bytes()
    assert sample(checkpoints["pixels"], tmp_path / "cut") == 0 and len(calls) == 4, "nothing is drawn twice"


class Waits(TorchDispatchMode):
    """Counts how often somebody asks a tensor of device "meta" for its value; any other way of asking raises there."""

    asked = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            self.asked += 1
            return True
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_step_waits_for_the_host(name):
    """Twice the steps ask no more often; evaluations are those that were planned."""
    sampler, asked = SAMPLERS[name], []
    for steps in (3, 6):
        calls, noise = [], torch.empty(2, 1, 4, 4, device="meta")
        generators = [torch.Generator() for _ in range(2)]
        with Waits() as waits:
            out = sampler.run(
                lambda x, t, calls=calls: calls.append(1) or x * t.view(-1, 1, 1, 1), noise, steps, generators,
                sampler.predicts[-1],
            )  # fmt: skip
        assert out.is_meta and len(calls) == sampler.evaluations(steps)
        asked.append(waits.asked)
    assert asked[0] == asked[1] <= 4, "a schedule is looked at, once"


def test_a_guided_score_is_called_a_heuristic(checkpoints, tmp_path, capsys):
    for name, expected in (("dpmpp_2m", False), ("reverse_diffusion", True)):
        assert sample(checkpoints["pixels"], tmp_path / name, "--guidance", "2", "--sampler", name) == 0
        assert ("a guided field is no score" in capsys.readouterr().out) == expected
        assert json.loads((tmp_path / name / "settings.json").read_text())["heuristic"] == expected


def test_files_of_another_run_are_named_by_what_differs(checkpoints, tmp_path, capsys):
    assert sample(checkpoints["pixels"], tmp_path) == 0
    before = (tmp_path / "samples.npz").read_bytes()
    assert sample(checkpoints["pixels"], tmp_path, "--seed", "1", "--guidance", "2") == 2
    error = capsys.readouterr().err
    assert "seed 0 there, 1 now" in error and "guidance 1.0 there, 2.0 now" in error and "steps" not in error
    assert sample(checkpoints["bad"], tmp_path) == 2 and "checkpoint" in capsys.readouterr().err
    (tmp_path / "settings.json").write_text("{")
    assert sample(checkpoints["pixels"], tmp_path) == 2 and "settings.json is damaged" in capsys.readouterr().err
    assert (tmp_path / "samples.npz").read_bytes() == before


def test_what_is_not_finite_stops_the_run_and_keeps_the_rest(checkpoints, tmp_path, capsys):
    assert sample(checkpoints["bad"], tmp_path, "--labels", "0,1,2,4,5,3", "--steps", "3") == 1
    out = capsys.readouterr().out
    assert "image 5 (label 3)" in out and "evaluation 1 of 3" in out and "1 of the 4 images" in out
    assert "4 images kept" in out and [path.name for path in (tmp_path / "ranges").iterdir()] == ["000000000.npz"]


@pytest.mark.parametrize(
    "words, what",
    [
        (["--sampler", "ddpm"], "predicts velocity, expected one of rf_euler, rf_heun, euler"),
        (["--predicts", "noise", "--sampler", "rf_euler"], "predicts noise, expected one of ddpm, ddim, euler"),
        (["--predicts", "noise", "--steps", "1"], "expected at least 2 for ddpm"),
        (["--labels", "4,11"], "--labels: got 11, expected 0..9, or 10 for no label"),
        (["--labels", "cats"], "--labels: got 'cats'"),
        (["--seed", "-1"], "--seed: got -1"),
        (["--backend", "none"], "none"),
        (["--vae", "nowhere"], "--vae nowhere: expected a folder"),
    ],
)
def test_bad_input_is_one_line(checkpoints, tmp_path, capsys, words, what):
    assert sample(checkpoints["pixels"], tmp_path / "out", *words) == 2
    error = capsys.readouterr().err
    assert what in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_file_that_says_what_it_predicts_is_believed(checkpoints, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    assert main(["sample", *out, "--predicts", NOISE]) == 2, "the committed digits were trained by rectified flow"
    assert "says that it was trained on velocity" in capsys.readouterr().err
    assert main(["sample", *out, "--ckpt", str(checkpoints["pixels"])]) == 2
    assert "--predicts" in capsys.readouterr().err


def test_fid_takes_the_file_and_the_file_tells_its_labels(checkpoints, tmp_path, capsys):
    for seed in ("0", "1"):
        words = ["--count", "120", "--batch", "60", "--steps", "1", "--seed", seed, "--labels", "cycle"]
        assert sample(checkpoints["pixels"], tmp_path / seed, *words) == 0
    assert (
        main(["fid", str(tmp_path / "0/samples.npz"), "--ref", str(tmp_path / "1/samples.npz"), "--features", "pixels"])
        == 0
    )
    assert "FD-pixels" in capsys.readouterr().out
    file = np.load(tmp_path / "0/samples.npz")
    assert file["arr_0"].shape == (120, 8, 8, 1) and file["arr_1"].tolist() == list(range(10)) * 12
    assert len(digits.load_npz(tmp_path / "0/samples.npz").images) == 120


def test_latents_without_a_vae_are_kept_as_such(checkpoints, tmp_path):
    words = ["--count", "60", "--batch", "30", "--steps", "1", "--labels", "cycle"]
    assert sample(checkpoints["latents"], tmp_path, *words) == 0
    file = np.load(tmp_path / "samples.npz")
    assert file["latents"].shape == (60, 4, 8, 8) and file["latents"].dtype == np.float32
    assert digits.load_npz(tmp_path / "samples.npz").shape == (4, 8, 8)


def test_a_vae_of_diffusers_makes_pixels(checkpoints, tmp_path, capsys):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, scaling_factor=0.25,
    )  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    assert sample(checkpoints["latents"], tmp_path / "plain") == 0
    assert sample(checkpoints["latents"], tmp_path / "decoded", "--vae", tmp_path / "vae") == 0
    latents = torch.from_numpy(np.load(tmp_path / "plain/samples.npz")["latents"])
    with torch.no_grad():
        expected = to_uint8(vae.eval().decode(latents / 0.25).sample)
    found = np.load(tmp_path / "decoded/samples.npz")["arr_0"]
    assert found.shape == (10, 16, 16, 3) and found.std() > 1
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1, "a value at the edge of two numbers"
    assert json.loads((tmp_path / "decoded/settings.json").read_text())["vae"]
    assert sample(checkpoints["pixels"], tmp_path / "none", "--vae", tmp_path / "vae") == 2
    assert "latents of 4 channels, but the model's have 1" in capsys.readouterr().err
