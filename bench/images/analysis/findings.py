"""What the tables of one run say: figures of each layer and step, and the paper's claims as statistics of direction."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from bench.images.analysis import statistics
from bench.images.analysis.counts import GROUPS
from bench.images.analysis.statistics import Information, entropy, max_over_mean, mutual_information

HOLDS, FAILS, UNSURE = "holds", "does not hold", "cannot say"
VARIABLES = ("position", "step", "class")
EARLY = 0.2  # of the run's evaluations
LEAST = 0.01  # of log2 E: bits below it are next to nothing, however surely they are there
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Finding:
    """A claim as a number that is above `least` where it holds, with its 95 % interval over images."""

    claim: str
    statistic: str
    value: float
    low: float
    high: float
    least: float = 0.0

    @property
    def verdict(self) -> str:
        """HOLDS or FAILS where the whole interval lies above or below `least`, else UNSURE."""
        return HOLDS if self.low > self.least else FAILS if self.high < self.least else UNSURE


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


def rise(values: np.ndarray, share: float = 0.5) -> float:
    """Return the mean of values behind the first `share` of them, less the mean of those; 0 for a single value."""
    first = max(1, int(share * len(values)))
    return float(values[first:].mean() - values[:first].mean()) if len(values) > first else 0.0


CLAIMS: tuple[tuple[str, str, float, Callable[[Arrays], float]], ...] = (  # the number, and what of log2 E it must pass
    ("position tells where a token goes", "bits, mean of the layers", LEAST, lambda m: m["position"].mean()),
    ("so does the sampling step", "bits, mean of the layers", LEAST, lambda m: m["step"].mean()),
    (
        "the class tells less than position", "bits of position less those of class", 0.0,
        lambda m: (m["position"] - m["class"]).mean(),
    ),
    (
        "the class tells less than the step", "bits of step less those of class", 0.0,
        lambda m: (m["step"] - m["class"]).mean(),
    ),
    ("deeper layers spread", "bits of position, shallow half less deep half", 0.0, lambda m: -rise(m["position"])),
    (
        "deeper layers balance", "entropy of a step's load, deep half less shallow half", 0.0,
        lambda m: rise(m["entropy"].mean(1)),
    ),
    (
        "early steps concentrate", "entropy of the load, later steps less the first fifth", 0.0,
        lambda m: rise(m["entropy"].mean(0), EARLY),
    ),
    (
        "late steps are even", "entropy of the load, second half of the steps less the first", 0.0,
        lambda m: rise(m["entropy"].mean(0)),
    ),
)  # fmt: skip


def findings(tables: Arrays) -> list[Finding]:
    """State the claims of DiT-MoE's abstract (arXiv 2407.11633) for this run, each with its interval and verdict.

    Leaving one group of images out at a time gives the interval (jackknife, Student's quantile); with few images it is
    wide, and nothing can be said.
    """
    whole, *parts = measures(tables)
    n, least = len(parts), float(np.log2(tables["images"].shape[-1]))
    out = []
    for claim, statistic, share, number in CLAIMS:
        value = float(number(whole))
        left = np.array([number(part) for part in parts])
        reach = float(stdtrit(n - 1, 0.975) * np.sqrt((n - 1) * left.var())) if n > 2 else np.inf
        out.append(Finding(claim, statistic, value, value - reach, value + reach, share * least))
    return out


def measures(tables: Arrays) -> Iterator[Arrays]:
    """Yield what claims are about: of all images, then without each group of them in turn.

    position, step, class (L,): bits above what permutations leave, the null level being that of the whole run (see
    statistics.excess). entropy (L, S): of the load, as a share of the largest.
    """
    infos, drawn = informations(tables), np.flatnonzero(tables["labels"] >= 0)
    null, alike = (
        {name: np.array([getattr(layer[name], of) for layer in infos]) for name in VARIABLES}
        for of in ("null", "alike")
    )
    used = np.unique(drawn % GROUPS)
    for groups in (used, *(used[used != group] for group in used if len(used) > 1)):
        images = drawn[np.isin(drawn % GROUPS, groups)]
        positions, steps = (tables[name][groups].sum(0) for name in ("group_positions", "group_steps"))
        classes = statistics.by_class(tables["images"][images], tables["labels"][images]).transpose(1, 0, 2)
        counts = {"position": positions, "step": steps, "class": classes}
        bits = {k: statistics.excess(mutual_information(v), null[k], alike[k]) for k, v in counts.items()}
        yield {**bits, "entropy": entropy(steps)}


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
