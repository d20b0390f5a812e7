"""What the tables of one run say: figures of each layer and step, and the paper's claims as statistics of direction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from bench.images.analysis import statistics
from bench.images.analysis.counts import GROUPS
from bench.images.analysis.statistics import Information, entropy, max_over_mean, mutual_information

HOLDS, OPPOSITE, UNDECIDED = "holds", "the opposite holds", "undecided"
VARIABLES = ("position", "step", "class")
EARLY = 0.2  # of the run's evaluations
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Finding:
    """A claim as a number that is above 0 where it holds, with its 95 % interval over images (jackknife by group)."""

    claim: str
    statistic: str
    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        return HOLDS if self.low > 0 else OPPOSITE if self.high < 0 else UNDECIDED


def informations(tables: Arrays) -> list[dict[str, Information]]:
    """Judge position, step and class in each layer."""
    drawn = tables["labels"] >= 0
    images, labels = tables["images"][drawn], tables["labels"][drawn]
    return [
        {
            "position": statistics.information_by_group(tables["group_positions"][:, layer]),
            "step": statistics.information_by_group(tables["group_steps"][:, layer]),
            "class": statistics.information_by_image(images[:, layer], labels),
        }
        for layer in range(images.shape[1])
    ]


def by_layer(tables: Arrays) -> list[dict]:
    """Describe each layer over the whole run; None where nothing was counted (no guidance, one step, no trial)."""
    load, tokens = tables["load"][:, :, 0].sum(2), tables["tokens"]  # (L, S, E), (S,)
    rows = []
    for layer, infos in enumerate(informations(tables)):
        tried, survived = tables["survived"][layer].sum(0)
        both = tables["load"][layer, :, 1].any()
        whole = load[layer].sum(0)
        rows.append(
            {
                "layer": layer,
                "max_over_mean": float(max_over_mean(whole)),
                "max_over_mean_of_steps": float(max_over_mean(load[layer]).max()),
                "entropy": float(entropy(whole)),
                "idle_experts": int((whole == 0).sum()),
                **{f"{name}_bits": vars(infos[name]) for name in VARIABLES},
                "kept": _share(tables["kept"][layer, 1:].sum(), tokens[1:].sum()),
                "overlap": _share(tables["overlap"][layer].sum(), tokens.sum() if both else 0),
                "mass": float(tables["mass"][layer, :, 0].sum() / tokens.sum()),
                "survived_bf16": _share(survived, tried),
                **_degrees(tables["degrees"][layer].sum(0)),
                **_strongest_pair(statistics.pair_lift(tables["pairs"][layer])),
            }
        )
    return rows


def by_step(tables: Arrays) -> list[dict]:
    """Describe each evaluation, layers being lists."""
    load, tokens = tables["load"][:, :, 0].sum(2), tables["tokens"]
    degrees = tables["degrees"]
    columns = {
        "max_over_mean": max_over_mean(load),
        "entropy": entropy(load),
        "mass": tables["mass"][:, :, 0].sum(2) / tokens,
        "kept": tables["kept"] / tokens,
        "overlap": tables["overlap"] / tokens,
        "unrouted": degrees[..., 0] / tokens,
        "gini": statistics.gini(degrees),
    }
    return [
        {"step": step, **{name: [round(float(v), 4) for v in values[:, step]] for name, values in columns.items()}}
        for step in range(load.shape[1])
    ]


def findings(tables: Arrays) -> list[Finding]:
    """State the claims of DiT-MoE's abstract and text for this run, each with its interval.

    Bits are those above what permutations leave (the null level of the whole run; see statistics.excess). Leaving one
    group of images out at a time gives the interval; with few images it is wide, and a claim stays undecided.
    """
    infos = informations(tables)
    null, alike = (
        {name: np.array([getattr(layer[name], of) for layer in infos]) for name in VARIABLES}
        for of in ("null", "alike")
    )
    depth = len(infos)

    def bits(part: Arrays) -> dict[str, np.ndarray]:
        plain = {
            "position": mutual_information(part["group_positions"].sum(0)),
            "step": mutual_information(part["group_steps"].sum(0)),
            "class": mutual_information(statistics.by_class(part["images"], part["labels"]).transpose(1, 0, 2)),
        }
        return {name: statistics.excess(plain[name], null[name], alike[name]) for name in VARIABLES}

    def concentration(part: Arrays) -> float:
        even = entropy(part["group_steps"].sum(0)).mean(0)
        early = max(1, round(EARLY * len(even)))
        return float(even[early:].mean() - even[:early].mean()) if len(even) > early else 0.0

    def shallow(part: Arrays) -> float:
        position = bits(part)["position"]
        return float(position[: depth // 2].mean() - position[(depth + 1) // 2 :].mean()) if depth > 1 else 0.0

    claims: list[tuple[str, str, Callable[[Arrays], float]]] = [
        ("position tells where a token goes", "bits, mean of the layers", lambda t: float(bits(t)["position"].mean())),
        ("so does the sampling step", "bits, mean of the layers", lambda t: float(bits(t)["step"].mean())),
        (
            "the class tells less than position", "bits of position less those of class",
            lambda t: float((bits(t)["position"] - bits(t)["class"]).mean()),
        ),
        (
            "the class tells less than the step", "bits of step less those of class",
            lambda t: float((bits(t)["step"] - bits(t)["class"]).mean()),
        ),
        ("deeper layers spread", "bits of position, shallow half less deep half", shallow),
        ("early steps concentrate", "entropy of the load, later steps less the first fifth", concentration),
    ]  # fmt: skip
    return [Finding(claim, statistic, *jackknife(tables, of)) for claim, statistic, of in claims]


def jackknife(tables: Arrays, of: Callable[[Arrays], float]) -> tuple[float, float, float]:
    """Return a statistic of the tables and its 95 % interval, groups of images being left out in turn."""
    drawn = np.flatnonzero(tables["labels"] >= 0)
    used = np.unique(drawn % GROUPS)

    def part(groups: np.ndarray) -> Arrays:
        images = drawn[np.isin(drawn % GROUPS, groups)]
        return {
            **{name: tables[name][groups] for name in ("group_positions", "group_steps")},
            **{name: tables[name][images] for name in ("images", "labels")},
        }

    value = of(part(used))
    if len(used) < 3:
        return value, -np.inf, np.inf
    left = np.array([of(part(used[used != group])) for group in used])
    error = float(np.sqrt((len(used) - 1) * left.var()))
    return value, value - 1.96 * error, value + 1.96 * error


def _share(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def _degrees(histogram: np.ndarray) -> dict:
    """Describe how many experts tokens have; None where all have as many (token choice)."""
    E, n = len(histogram) - 1, histogram.sum()
    if (histogram > 0).sum() == 1:
        return {"degrees": None}
    mean = float((histogram * np.arange(E + 1)).sum() / n)
    chance = statistics.binomial(E, mean)
    return {
        "degrees": {
            "mean": mean, "none": float(histogram[0] / n), "none_by_chance": float(chance[0]),
            "most": int(np.flatnonzero(histogram).max()), "gini": float(statistics.gini(histogram)),
            "gini_by_chance": float(statistics.gini(chance)),
        }
    }  # fmt: skip


def _strongest_pair(lift: np.ndarray) -> dict:
    apart = np.where(np.eye(len(lift), dtype=bool), -1, lift)
    if len(lift) < 2 or apart.max() <= 0:
        return {"pair": None}
    a, b = np.unravel_index(int(apart.argmax()), lift.shape)
    return {"pair": {"experts": [int(a), int(b)], "lift": float(lift[a, b])}}
