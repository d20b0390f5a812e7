"""bench.images.dmcmc: evaluations add up, figures mean what they say, and what comes out is said, whichever way."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch

from bench.__main__ import main
from bench.images.digits import Dataset
from bench.images.dmcmc import command, verdicts
from bench.images.dmcmc.arms import Amount, Arm, Problem, run, split
from bench.images.dmcmc.judge import Reference, effective, figures, precision_recall
from bench.images.dmcmc.levels import level_error, train_levels
from bench.images.dmcmc.loads import SLICES, LevelLoads, compare, count_chains, count_trajectories
from bench.images.dmcmc.tiers import Oracle
from bench.images.fid import Moments
from bench.images.sampling.integrators import INTEGRATORS, rk45
from bench.instrument import store
from bench.page import chains
from reference.dmcmc import level_grid
from reference.mixture import GaussianMixture
from reference.samplers import karras_sigmas

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.rand(40, 1, 4, 4, generator=GENERATOR) * 2 - 1
DATA = Dataset("toy", IMAGES, torch.arange(40) % 4, IMAGES[:0], torch.zeros(0), 4)
AMOUNT = Amount(chains=8, windows=4, start=5, burn=3)
ORACLE = Oracle(DATA)


@pytest.mark.parametrize("budget", [5, 10])
@pytest.mark.parametrize("name", INTEGRATORS)
def test_no_arm_takes_more_than_its_budget(name, budget):
    """What is planned is what the counters saw: the start's share, the steps between images, the way down."""
    alone = run(Arm(name), budget, ORACLE.problem, AMOUNT, 0)
    assert alone.evaluations == INTEGRATORS[name].evaluations(budget) and alone.classified == 0
    sent = run(Arm(name, "drawn level"), budget, ORACLE.problem, AMOUNT, 0)
    planned = split(Arm(name, "drawn level"), budget, AMOUNT)
    assert sent.evaluations == sum(planned.values()) <= budget and planned == {**planned, "start": 2.0}
    assert sent.classified == planned["skip"] + (1 + AMOUNT.burn) / AMOUNT.windows
    assert sent.images.shape == alone.images.shape == (4, 8, 1, 4, 4) and sent.sigmas.shape == (4, 8)


def test_a_budget_that_the_start_eats_is_refused():
    with pytest.raises(ValueError, match=r"budget: got 3 evaluations, of which a chain's start takes 2\.00"):
        split(Arm("dpmpp_2m", "released"), 3, AMOUNT)


def test_samples_depend_on_seed_and_place_alone():
    fewer = dataclasses.replace(AMOUNT, chains=3)
    for arm in (Arm("heun_churn"), Arm("euler_maruyama", "preserving"), Arm("dpmpp_2m", "drawn level")):
        all_of_them, again, few = (run(arm, 8, ORACLE.problem, amount, 1).images for amount in (AMOUNT, AMOUNT, fewer))
        assert torch.equal(all_of_them, again)
        assert torch.allclose(all_of_them[0, :3], few[0], atol=1e-9)
        assert not torch.allclose(all_of_them, run(arm, 8, ORACLE.problem, AMOUNT, 2).images)


def test_nan_of_the_model_stops_with_evaluation_and_image():
    calls = []

    def denoise(y, sigma, labels):
        calls.append(1)
        return torch.where((torch.arange(8) == 5).view(8, 1, 1, 1) & (len(calls) == 3), torch.nan, y)

    broken = Problem(denoise, ORACLE.problem.levels, ORACLE.problem.grid, (1, 4, 4), 4, 0.05, 20.0, torch.float64)
    with pytest.raises(FloatingPointError, match="the model: NaN or infinity in evaluation 3, image 5 of 8"):
        run(Arm("dpmpp_2m"), 5, broken, AMOUNT, 0)
    calls.clear()
    with pytest.raises(FloatingPointError, match="evaluation 3, image 5 of 8"):
        run(Arm("dpmpp_2m", "released"), 5, broken, AMOUNT, 0)


def test_rk45_arrives_where_the_flow_does():
    """Probability flow of one Gaussian: (y - mean) / sqrt(std^2 + sigma^2) stays, and D takes the last of the noise."""
    data = GaussianMixture(torch.full((1, 3), 0.7, dtype=torch.float64), 0.5)
    y, sigma = torch.linspace(-9, 9, 6, dtype=torch.float64).view(2, 3), torch.tensor([8.0, 2.0], dtype=torch.float64)
    end = (0.25 + 0.01**2) ** 0.5 * (y - 0.7) / (0.25 + sigma[:, None] ** 2).sqrt()
    exact = 0.7 + end * 0.25 / (0.25 + 0.01**2)
    assert torch.allclose(rk45(data.denoise, y, sigma, 0.01, 1e-9), exact, atol=1e-7)


def test_the_classifier_learns_levels_from_data_alone():
    grid, images = level_grid(0.05, 20.0, 20), torch.rand(300, 1, 8, 8, generator=GENERATOR) * 2 - 1
    model, losses = train_levels(images, grid, 150)
    assert np.mean(losses[-20:]) < 0.7 * np.log(20)
    assert level_error(model, images) < 0.35, "the step of the grid is 0.30"
    assert torch.equal(*(train_levels(images, grid, 2)[0](images) for _ in range(2)))


def test_effective_samples_are_counted_by_what_chains_repeat():
    rng = np.random.default_rng(0)
    independent = rng.normal(size=(20, 400))
    assert effective(independent, 1) == pytest.approx(8000, rel=0.2)
    assert effective(np.repeat(independent[:1], 20, 0), 1) == pytest.approx(400, rel=0.01)
    correlated = np.empty((20, 400))
    correlated[0] = independent[0]
    for i in range(1, 20):
        correlated[i] = 0.8 * correlated[i - 1] + 0.6 * independent[i]
    inflation = 1 + 2 * sum((1 - k / 20) * 0.8**k for k in range(1, 20))
    assert effective(correlated, 1) == pytest.approx(8000 / inflation, rel=0.2)


def test_figures_of_the_data_themselves_and_of_a_lost_mode():
    rng = np.random.default_rng(0)
    real = np.concatenate([rng.normal(size=(300, 4)) * 0.2 + 3 * k for k in (0, 1)])
    data = Reference(Moments(real.mean(0), np.cov(real.T), 600), real, np.array([0.5, 0.5]))

    def judged(modes):
        samples = rng.normal(size=(20, 30, 4)) * 0.2 + 3 * modes[..., None]
        return figures(samples, modes.astype(int), np.arange(30) % 2, False, data)

    whole, half = judged(np.broadcast_to(np.arange(30) % 2, (20, 30))), judged(np.zeros((20, 30)))
    assert whole["fd"] < 0.1 and whole["class_tv"] == 0 and min(whole["precision"], whole["recall"]) > 0.85
    assert half["fd"] > 5 and half["class_tv"] == 0.5 and half["precision"] > 0.85 and half["recall"] < 0.55
    assert precision_recall(real + 100, real) == (0.0, 0.0)
    late = np.concatenate([real, real[:150] + 100])  # the larger set is thinned over its whole length
    assert precision_recall(late, real)[0] == pytest.approx(0.8 * precision_recall(real, real)[0], abs=0.03)
    assert abs(whole["fd_bias"]) < 5 * whole["fd_error"] + 0.02 and whole["ess"] == 600


def row(title: str, choice: str = "", budget: int = 5, fd: float = 1.0, **changes) -> dict:
    f = {"fd": fd, "fd_bias": 0.0, "fd_error": 0.05, "ess": 90.0, "recall": 0.9, "evaluations": 5.0, "cpu_ms": 2.0}
    f |= {key: changes.pop(key) for key in f.keys() & changes.keys()}
    return {"tier": "oracle", "arm": title, "title": title, "integrator": "heun", "choice": choice, "budget": budget,
            "samples": 500, "dimension": 10, "figures": f, **changes}  # fmt: skip


@pytest.mark.parametrize(
    "chain, word",
    [
        (dict(fd=0.5), verdicts.BETTER), (dict(fd=1.5), verdicts.WORSE), (dict(fd=1.1), verdicts.UNSURE),
        (dict(fd=0.5, recall=0.8), verdicts.NARROW), (dict(fd=0.5, ess=14.0), verdicts.UNSURE),
    ],
)  # fmt: skip
def test_verdicts(chain, word):
    (found,) = verdicts.comparisons(verdicts.lines([row("Heun"), row("chains", "released", **chain)]))
    assert {found[key].verdict for key in ("evaluations", "time", "alone")} == {word}
    assert f"1 {word}" in verdicts.sentence([found])


def test_chains_meet_the_best_rival_of_as_many_evaluations_and_of_as_much_time():
    rows = [
        row("quick", fd=3.0, cpu_ms=1.0, evaluations=4.0), row("slow", fd=2.0, cpu_ms=9.0), 
        row("long", fd=0.1, budget=10, evaluations=10.0, cpu_ms=9.0), row("chains", "released", evaluations=4.5),
    ]  # fmt: skip
    (found,) = verdicts.comparisons(verdicts.lines(rows))
    assert (found["evaluations"].against.title, found["time"].against.title) == ("slow", "quick")
    seeds = verdicts.lines([row("Heun", fd=fd) for fd in (1.0, 2.0, 3.0)])[0]
    assert seeds.fd == 2.0 and seeds.error == pytest.approx(1 / 3**0.5), "seeds differ by more than each one's error"


EDGES = torch.tensor([0.3, 1.0, 3.0], dtype=torch.float64)


class Router(torch.nn.Module):
    """Denoises as the mixture does; its one routed layer takes the expert by `of(y, sigma)`, an id for each image."""

    def __init__(self, of, E: int = 4):
        super().__init__()
        self.experts, self.gate = torch.nn.ModuleList(torch.nn.Identity() for _ in range(E)), torch.nn.Identity()
        self.gate.weight, self.of = torch.zeros(E, 1), of

    def denoise(self, y, sigma, labels):
        ids = self.of(y, sigma.double().expand(len(y))).long().view(-1, 1)
        self.gate((ids, torch.ones(ids.shape)))
        return ORACLE.mixture.denoise(y, sigma)


def along(of, choice: str = "drawn level", chains: int = 40) -> tuple[LevelLoads, LevelLoads, dict]:
    amount, model, labels = Amount(chains, 1, 5, 3), Router(of), np.arange(chains) % 4
    problem = dataclasses.replace(ORACLE.problem, denoise=model.denoise, classes=4)
    ours = count_chains(model, problem, choice, amount, 0)
    ordinary = count_trajectories(model, problem, amount, 0)
    return ours, ordinary, compare(ours, ordinary, labels)


def test_load_by_level_alone_is_no_difference_at_the_same_levels():
    """A router that looks at the level: chains differ from a trajectory by where they are, and by nothing else."""
    grid = ORACLE.problem.grid
    chains, trajectories, row = along(lambda y, sigma: torch.bucketize(sigma.contiguous(), EDGES))
    assert (trajectories.visits == 1).all() and (chains.visits.sum(0) == len(grid)).all()
    assert torch.equal(chains.picks.sum((2, 3)), chains.visits)
    expert = torch.bucketize(grid, EDGES)
    assert all((chains.picks[:, :, 0, e].sum(1) > 0).le(expert == e).all() for e in range(4)), "counted where it was"
    (layer,) = row["layers"]
    assert layer["same_levels"]["value"] == 0 and layer["whole"]["low"] > 0.2
    assert sum(row["visits"]) == pytest.approx(1) and len(row["slices"]) == len(row["visits"]) == SLICES
    nodes = torch.bucketize(karras_sigmas(20, 20.0, float(grid[-1]))[:-1], EDGES)
    assert layer["trajectories"] == pytest.approx(torch.bincount(nodes).max() / 5)


def test_load_of_states_that_no_trajectory_has_is_one():
    """A router that knows chains: at every level one image of four takes the second expert, of a trajectory's two."""
    calls = []

    def of(y, sigma):
        calls.append(1)
        chains = len(calls) <= 5 + 3 + len(ORACLE.problem.grid)  # the start, the burn-in, the steps
        return torch.arange(len(y)) % 4 < (1 if chains else 2)

    layer = along(of)[2]["layers"][0]
    same, whole = layer["same_levels"], layer["whole"]
    assert [whole["value"], whole["low"], same["value"]] == pytest.approx([0.25] * 3), "chains of a label are alike"
    assert same["low"] > 0.1 and same["p"] == whole["p"] == 0.001
    assert (layer["chains"], layer["trajectories"]) == (3.0, 2.0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dmcmc")
    assert main(["dmcmc", "--size", "tiny", "--out", str(folder), "--guidance", "1.5"]) == 0
    return folder


def test_the_command_writes_rows_goes_on_and_makes_a_page(finished, capsys):
    rows = store.read(finished / command.FILE)
    assert main(["dmcmc", "--size", "tiny", "--out", str(finished), "--guidance", "1.5"]) == 0
    out = capsys.readouterr().out
    assert store.read(finished / command.FILE) == rows, "nothing is measured twice"
    assert "a guided field is the score of no density" in out and out.count("chains against") == 2
    measured = [r for r in rows if r["kind"] == "dmcmc"]
    assert [r["choice"] for r in rows if r["kind"] == "dmcmc_load"] == ["released", "drawn level"]
    assert {r["tier"] for r in measured} == {"oracle", "trained"} and all(r["trace"] for r in measured if r["choice"])
    assert all(len(r["loads"]["per_call"]) == 4 and min(r["loads"]["per_call"]) >= 1 for r in measured if r["loads"])
    assert main(["report", str(finished)]) == 0
    page = (finished / chains.NAME).read_text()
    for text in (
        "DPM-Solver++(2M)",
        "chains (drawn level)",
        "Heuristic:",
        "load along chains",
        "sent twice",
        'class="chart"',
    ):
        assert text in page, text
    assert not re.search(r"(src|href)\s*=", page) and page.count("<table") == page.count('<div class="scroll"><table')


def test_an_outlier_leaves_the_others_their_room():
    """Three decades above the least distance are drawn; what lies above is a mark that says so."""
    fds = {"good": (0.2, 0.1), "fair": (20.0, 2.0), "wild": (3.9e6, 0.3)}
    rows = [row(t, budget=b, fd=fd, evaluations=b) for t in fds for b, fd in zip((5, 20), fds[t], strict=True)]
    drawn = {line["title"]: line["points"] for line in chains.chart(verdicts.lines(rows))["lines"]}
    assert [p["over"] for p in drawn["wild"]] == ["3.9e+06", ""] and drawn["wild"][0]["y"] == 0
    assert not any(p["over"] for title in ("good", "fair") for p in drawn[title])
    heights = [(chains.HEIGHT - drawn[t][0]["y"]) / chains.HEIGHT for t in ("good", "fair")]
    assert heights == pytest.approx(np.log10([2, 200]) / 3, abs=1e-3)
    assert [x for x, _ in chains.chart(verdicts.lines(rows))["x_ticks"]] == [0, chains.WIDTH]
    alone = chains.chart(verdicts.lines(rows[:1]))
    assert alone["lines"][0]["points"] == [{"x": 0.0, "y": chains.HEIGHT, "over": ""}], "a single point has its place"


def test_a_nan_of_the_model_keeps_the_rows(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(GaussianMixture, "denoise", lambda self, y, sigma: y * torch.nan)
    assert main(["dmcmc", "--size", "tiny", "--tier", "oracle", "--out", str(tmp_path)]) == 1
    assert "stopped: the model: NaN or infinity in evaluation 1, image 0 of 20; 1 rows kept" in capsys.readouterr().out
