"""`python -m bench fid`: what it prints and writes, its exit codes, and one line for everything that is wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.__main__ import main
from bench.images import fid
from bench.images.fid import command
from bench.images.fid.extractors import Pixels

N = 300


def save(path: Path, array: np.ndarray, **others: np.ndarray) -> str:
    np.savez(path, arr_0=array, **others)
    return str(path)


def noise(seed: int, count: int = N, size: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(40, 216, (count, size, size, 3), np.uint8)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """A, a nearly equal B, a bad one, and the data R; all 8 x 8."""
    folder = tmp_path_factory.mktemp("samples")
    a = noise(0)
    near, bad = a.copy(), a.copy()
    near[:, 0, 0, 0] ^= 1
    bad //= 2
    named = {"A": a, "B": near, "bad": bad, "R": noise(1, 400), "short": a[:-1], "few": a[:10], "other": noise(2)}
    return {name: save(folder / f"{name}.npz", array) for name, array in named.items()}


def run(*words: str | Path) -> int:
    return main(["fid", *map(str, words), "--features", "pixels"])


def test_parity_is_judged_and_written(files, tmp_path, capsys):
    out = tmp_path / "out.json"
    assert run(files["A"], files["B"], "--ref", files["R"], "--json", out) == 0
    text, record = capsys.readouterr().out, json.loads(out.read_text())
    assert "PARITY" in text and f"at N = {N}" in text and "without the bias" in text and "warning" not in text
    found = record["difference"]
    assert record["distance"] == "FD-pixels" and found["verdict"] == "PARITY" and found["margin"] == 0.001
    assert found["low"] < found["difference"] < found["high"] and record["samples"]["A"]["bias"] > 0
    features = {key: Pixels(None, "cpu")(np.load(files[key])["arr_0"]) for key in ("A", "R")}
    exact = fid.frechet_distance(*(fid.moments(features[key]) for key in ("A", "R")))
    assert record["samples"]["A"]["fd"] == pytest.approx(exact, rel=1e-9)


def test_a_difference_is_an_exit_code(files, capsys):
    assert run(files["A"], files["bad"], "--ref", files["R"]) == 1
    assert "DIFFERENT" in capsys.readouterr().out


def test_margin_and_confidence_are_taken(files, capsys):
    assert run(files["A"], files["bad"], "--ref", files["R"], "--margin", "100", "--confidence", "0.99") == 0
    assert "at 99% confidence, margin +-100: PARITY" in capsys.readouterr().out


def test_statistics_serve_as_reference_like_the_samples(files, tmp_path, capsys):
    stats, out = tmp_path / "R_stats.npz", [tmp_path / f"{i}.json" for i in range(2)]
    assert run(files["R"], "--save-stats", stats) == 0
    for reference, file in zip((stats, files["R"]), out, strict=True):
        assert run(files["A"], "--ref", reference, "--json", file) == 0
    first, second = (json.loads(file.read_text()) for file in out)
    assert first["samples"] == second["samples"] and first["reference_count"] == 400
    assert first["difference"] is None
    with np.load(stats) as file:
        assert file["mu"].shape == (192,) and file["sigma"].shape == (192, 192)


def test_statistics_of_other_tools_are_used_with_a_warning(files, tmp_path, capsys):
    np.savez(tmp_path / "foreign.npz", mu=np.zeros(192), sigma=np.eye(192) * 0.001)
    assert run(files["A"], "--ref", tmp_path / "foreign.npz") == 0
    assert "warning: the reference does not say which extractor" in capsys.readouterr().out


def test_reference_batches_with_samples_and_other_statistics_are_read_as_samples(files, tmp_path, capsys):
    """ADM's reference files: arr_0 beside mu and sigma of Inception."""
    both = save(tmp_path / "adm.npz", noise(1, 400), mu=np.zeros(2048), sigma=np.zeros((2048, 2048)))
    out = [tmp_path / f"{i}.json" for i in range(2)]
    for reference, file in zip((both, files["R"]), out, strict=True):
        assert run(files["A"], "--ref", reference, "--json", file) == 0
    assert len({json.dumps(json.loads(file.read_text())["samples"]) for file in out}) == 1


def test_rows_that_are_not_paired_get_a_warning(files, capsys):
    run(files["A"], files["other"], "--ref", files["R"])
    assert "do rows i of A and of B come from the same noise?" in capsys.readouterr().out


def test_few_samples_per_dimension_get_a_warning(files, tmp_path, capsys):
    few = save(tmp_path / "few.npz", noise(3, 250))
    assert run(few, "--ref", files["R"]) == 0
    assert "250 samples for 192 dimensions" in capsys.readouterr().out


def bad_statistics() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """mu and sigma that no images have, by name."""
    mu, unsymmetric, indefinite = np.zeros(192), np.eye(192), np.eye(192)
    unsymmetric[3, 5] = 0.1
    indefinite[0, 0] = -0.5
    return {
        "complex": (mu, np.eye(192) + 1j), "indefinite": (mu, indefinite), "unsymmetric": (mu, unsymmetric),
        "sizes": (mu, np.eye(191)), "words": (np.full(192, "x"), np.eye(192)),
    }  # fmt: skip


def bad_inputs(folder: Path, files: dict[str, str]) -> dict[str, tuple[list, str]]:
    (folder / "text.npz").write_text("no archive")
    (folder / "image.jpg").write_bytes(b"\xff\xd8\xff")
    np.save(folder / "plain.npy", noise(0, 4))
    np.savez(folder / "keys.npz", images=noise(0, 4))
    np.savez(folder / "nan.npz", mu=np.full(192, np.nan), sigma=np.eye(192))
    np.savez(folder / "small.npz", mu=np.zeros(3), sigma=np.eye(3))
    foreign = fid.Moments(np.zeros(192), np.eye(192), 9, "inception-v3-2048-abc")
    fid.save_moments(folder / "foreign.npz", foreign)
    floats = save(folder / "floats.npz", noise(0).astype(np.float32))
    either = save(folder / "either.npz", noise(0)[:, :3])
    fortran = save(folder / "fortran.npz", np.asfortranarray(noise(0)))
    zipped = folder / "broken.npz"
    np.savez_compressed(zipped, arr_0=noise(0))
    zipped.write_bytes(zipped.read_bytes()[:3000] + b"?" + zipped.read_bytes()[3001:])
    for name, (mu, sigma) in bad_statistics().items():
        np.savez(folder / f"{name}.npz", mu=mu, sigma=sigma)
    objects = save(folder / "objects.npz", np.array([None]))
    tiny = save(folder / "tiny.npz", noise(0, N, 4))
    label_a = save(folder / "la.npz", noise(0), arr_1=np.arange(N))
    label_b = save(folder / "lb.npz", noise(0), arr_1=np.arange(N)[::-1])
    a, b, ref = files["A"], files["B"], ["--ref", files["R"]]
    return {
        "no such file": ([folder / "none.npz", *ref], r"A\.npz .*none\.npz.*no such file"),
        "no archive": ([folder / "text.npz", *ref], r"A\.npz .*text\.npz.*no npz"),
        "npy": ([folder / "plain.npy", *ref], r"A\.npz .*plain\.npy.*no npz"),
        "byte flipped in A": ([zipped, *ref], r"A\.npz .*broken\.npz: arr_0: expected a readable array"),
        "byte flipped in ref": ([a, "--ref", zipped], r"--ref .*broken\.npz: arr_0: expected a readable array"),
        "channels first or last": (
            [either, *ref],
            r"A\.npz .*arr_0: .*\(300, 3, 8, 3\), whose channels may be first or",
        ),
        "Fortran order": ([fortran, *ref], r"A\.npz .*arr_0: .*in Fortran order"),
        "complex ref": (
            [a, "--ref", folder / "complex.npz"],
            "--ref .*complex.npz: sigma: .*real numbers, got complex",
        ),
        "indefinite ref": ([a, "--ref", folder / "indefinite.npz"], r"--ref .*sigma: .*eigenvalue -0\.5 beside 1"),
        "unsymmetric ref": ([a, "--ref", folder / "unsymmetric.npz"], "--ref .*sigma: expected a symmetric matrix"),
        "sizes of ref": ([a, "--ref", folder / "sizes.npz"], r"--ref .*got \(192,\) and \(191, 191\)"),
        "words in ref": ([a, "--ref", folder / "words.npz"], "--ref .*words.npz: mu: .*real numbers, got <U1"),
        "jpeg": ([folder / "image.jpg", *ref], r"A\.npz .*image\.jpg.*lossy"),
        "folder": ([folder, *ref], "a folder"),
        "keys": ([folder / "keys.npz", *ref], r"A\.npz .*arr_0.*got the keys \['images'\]"),
        "dtype": ([a, floats, *ref], r"B\.npz .*floats.*uint8.*got float32"),
        "objects": ([objects, *ref], r"A\.npz .*objects.*arr_0: .*Object arrays"),
        "size": ([tiny, *ref], r"A\.npz .*tiny.*at least 8 x 8 pixels, got 4 x 4"),
        "other N": ([a, files["short"], *ref], r"B\.npz .*expected 300 samples.*got 299"),
        "other labels": ([label_a, label_b, *ref], r"B\.npz .*arr_1: expected A's labels"),
        "too few": ([files["few"], *ref], r"A\.npz .*10 samples for 192 dimensions, expected at least 96"),
        "few in ref": ([a, "--ref", files["few"]], "--ref .*at least 20 samples, got 10"),
        "NaN in ref": ([a, "--ref", folder / "nan.npz"], r"nan\.npz: mu: expected finite values, got 192"),
        "dimension of ref": ([a, "--ref", folder / "small.npz"], "--ref .*pixels-192, got 3 dimensions"),
        "ref of another extractor": ([a, "--ref", folder / "foreign.npz"], "--ref .*192 dimensions of inception"),
        "keys of ref": ([a, "--ref", folder / "keys.npz"], "--ref .*mu and sigma, or arr_0.*got"),
        "no ref": ([a, b], "--ref: "),
        "no ref, two files": ([a, b, "--save-stats", folder / "s.npz"], "--ref: B.npz was given"),
        "margin": ([a, b, *ref, "--margin", "0"], "--margin: expected a positive number, got 0"),
        "margin NaN": ([a, b, *ref, "--margin", "nan"], "--margin: expected a positive number, got nan"),
        "confidence": ([a, b, *ref, "--confidence", "95"], "--confidence: .*between 0.5 and 1, as 0.90, got 95"),
        "device": ([a, *ref, "--device", "cuda"], "--device: got cuda, expected a GPU"),
        "folder of json": ([a, *ref, "--json", folder / "no" / "x.json"], "--json .*no folder"),
        "folder as json": ([a, *ref, "--json", folder], "--json .*expected a file, got a folder"),
        "weights": ([a, *ref, "--weights", folder / "w.pth"], "--weights .*only --features inception"),
    }


def test_bad_input_is_one_line_that_names_it(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, (words, message) in bad_inputs(tmp_path, files).items():
        assert run(*words) == 2, name
        text = capsys.readouterr().err
        assert text.count("\n") == 1 and text.startswith("python -m bench fid: error: "), (name, text)
        assert re.search(message, text), (name, text)


def test_grey_and_channels_first_are_taken_and_said(files, tmp_path, capsys):
    """The same images, kept in four ways, have the same distance."""
    grey = np.repeat(noise(0)[..., :1], 3, -1)
    wide = np.concatenate([grey, grey], 2)
    ways = {
        "last": (wide, ""), "first": (np.moveaxis(wide, 3, 1), "taken as (N, channels, height, width)"),
        "flat": (wide[..., 0], "taken as grey (N, height, width)"),
        "one": (wide[..., :1], "taken as grey (N, height, width, channels)"),
    }  # fmt: skip
    figures = set()
    for name, (array, said) in ways.items():
        out = tmp_path / "out.json"
        assert run(save(tmp_path / f"{name}.npz", array), "--ref", files["R"], "--json", out) == 0
        text = capsys.readouterr().out
        assert said in text and (said != "") == (f"A.npz {tmp_path / name}.npz: arr_0: " in text)
        figures.add(json.dumps(json.loads(out.read_text())["samples"]))
    assert len(figures) == 1


def test_another_scale_of_pixels_gets_a_warning(files, tmp_path, capsys):
    """Images of 0..1 cast to uint8, and statistics of pixels of 0..255 where the features are of -1..1."""
    dark = save(tmp_path / "dark.npz", noise(0) // 128)
    assert run(dark, "--ref", files["R"]) == 0
    assert "warning: the features of A have a total variance of" in capsys.readouterr().out
    np.savez(tmp_path / "loud.npz", mu=np.full(192, 128.0), sigma=np.eye(192) * 2500)
    assert run(files["A"], "--ref", tmp_path / "loud.npz") == 0
    assert "in another scale (0..1 for 0..255)?" in capsys.readouterr().out
    assert run(files["A"], "--ref", files["R"]) == 0
    assert "another scale" not in capsys.readouterr().out


def test_what_was_given_is_never_written_over(files, tmp_path, capsys):
    given = {name: Path(files[name]) for name in ("A", "B", "R")}
    before = {name: path.read_bytes() for name, path in given.items()}
    links = {"soft": tmp_path / "soft.npz", "hard": tmp_path / "hard.npz"}
    links["soft"].symlink_to(given["R"])
    links["hard"].hardlink_to(given["A"])
    folder = given["A"].parent
    for option, target, name in (
        ("--save-stats", given["A"], "A.npz"), ("--save-stats", folder / ".." / folder.name / "A.npz", "A.npz"),
        ("--save-stats", links["hard"], "A.npz"), ("--json", given["B"], "B.npz"), ("--json", links["soft"], "--ref"),
    ):  # fmt: skip
        assert run(given["A"], given["B"], "--ref", given["R"], option, target) == 2
        said = capsys.readouterr().err
        assert f"{option} {target}: is the file given as {name}, which is never written over" in said
    out = tmp_path / "both"
    assert run(given["A"], "--ref", given["R"], "--json", out, "--save-stats", out) == 2
    assert "is the file of" in capsys.readouterr().err and not out.exists()
    assert {name: path.read_bytes() for name, path in given.items()} == before


def test_what_is_written_holds_no_path_of_this_machine(files, tmp_path):
    out = tmp_path / "out.json"
    assert run(files["A"], "--ref", files["R"], "--json", out) == 0
    assert json.loads(out.read_text())["files"] == {"A": "A.npz", "reference": "R.npz"}


def test_nothing_is_extracted_before_all_arguments_are_checked(files, monkeypatch, capsys):
    """Extraction takes minutes for real samples."""
    monkeypatch.setattr(command, "extract", lambda *_: pytest.fail("extracted"))
    assert run(files["A"], files["short"], "--ref", files["R"]) == 2
    assert run(files["A"], files["B"], "--ref", "none.npz") == 2
