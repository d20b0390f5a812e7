"""The parity ladder: does a backend route, compute and sample like the oracle, by whatever rule a model routes?

1. plans: a valid plan with the picks of the oracle's float64 router; images with a near tie are left out.
2. layers: outputs, token rows and expert slices within twice plain PyTorch's error against float64.
3. samples: same weights, noise and labels; cosine, PSNR, share of samples in which some token was routed otherwise.
4. distance: paired difference of FD-cls with its 90 % interval against a margin fixed here.
5. figures: FD-cls itself and the share of samples recognised as their label.
The verdict is DIFFERENT when 1 or 2 fails or 4 says so, else it is 4's. Three sabotaged models must come out DIFFERENT.
Rules route an image by itself in eval mode, so a probe is whole images with all that the layer was called with.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import moe_kernels
from bench.images import fid
from bench.images.digits import Classifier, features, recognised
from bench.images.hooks import looking_at
from bench.images.layers import SABOTAGES, backend_of, dense, exact, expert_weights, plan_of, replaced, route
from bench.images.training import sample
from bench.instrument.verify import slice_error, whole_error
from moe_kernels import RoutingPlan
from reference import rooms

PASS, FAIL = "pass", "fail"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TIE = 1e-5  # what moves picks when all that is scored moves by this share of its size may fall either way in float32
TRIED = 32  # samples by which the pace is taken
NO_NUMBER = 1e30  # in place of NaN and infinity, which the rows' JSON does not know
Call = dict[str, Any]
Probe = tuple[int, Tensor, Call]  # a layer's number, images x (B, L, H), what else it was called with


@dataclass(frozen=True)
class Case:
    """What the ladder is run on. The margin is a share of the data's feature variance, fixed before any run."""

    samples: int = 500
    steps: int = 16
    guidance: float = 1.5
    margin: float = 0.001
    probe_tokens: int = 1024
    seed: int = 1


@dataclass
class Baseline:
    """What candidates of one dtype are compared with: the oracle's probes, samples and routing."""

    dtype: torch.dtype
    model: nn.Module
    rival: nn.Module
    probes: list[Probe]
    ties: int
    samples: Tensor
    routing: Tensor
    features: np.ndarray

    def first(self, count: int) -> Baseline:
        """Return the baseline of the first `count` samples."""
        parts = {"samples": self.samples[:count], "features": self.features[:count]}
        return dataclasses.replace(self, routing=self.routing[:, :, :count], **parts)


class Ladder:
    """The rungs for one trained model: `baseline` once per dtype, then `climb` once per candidate."""

    def __init__(self, model: nn.Module, classifier: Classifier, images: Tensor, case: Case, time_scale: float):
        self.model, self.classifier, self.case, self.time_scale = model, classifier, case, time_scale
        generator = torch.Generator().manual_seed(case.seed)
        self.noise = torch.randn(case.samples, *images.shape[1:], generator=generator)
        self.labels = torch.arange(case.samples) % model.config.num_classes
        self.moments = fid.moments(features(classifier, images))

    @property
    def sabotages(self) -> dict[str, Callable[[nn.Module], nn.Module]]:
        """The negative controls: each breaks a replaced model in place."""
        return SABOTAGES

    def replaced(self, model: nn.Module, backend: str) -> nn.Module:
        """Return a copy of the model whose MoE layers run on `backend`."""
        return replaced(model, backend)

    def baseline(self, dtype: torch.dtype, count: int | None = None) -> Baseline:
        """Draw `count` samples (all) of the oracle in `dtype`; its layers' inputs in three calls are the probes."""
        model, kept, seen = copy.deepcopy(self.model).to(dtype), [], [0] * len(self.model.blocks)
        last = self.case.steps - 1

        def look(layer: int, args: tuple[Tensor, ...], _: object, **call: Any) -> None:
            if seen[layer] in {0, last // 2, last}:
                kept.append((layer, *self._some(layer + seen[layer], args[0], call)))
            seen[layer] += 1

        with looking_at((block.moe for block in model.blocks), look):
            samples, routing = self.draw(model, count)
        probes, ties = [], 0
        for layer, x, call in kept:
            clear = clear_images(exact(model, layer), x, call)
            ties += int((~clear).sum()) * x.shape[1]
            probes.append((layer, x[clear], take(call, clear)))
        rival = self.replaced(model, "eager")
        return Baseline(dtype, model, rival, probes, ties, samples, routing, features(self.classifier, samples))

    def pace(self, dtype: torch.dtype) -> float:
        """Return the seconds that a sample takes the oracle in `dtype`: of two single steps the second counts."""
        model, noise, labels = copy.deepcopy(self.model).to(dtype), self.noise[:TRIED], self.labels[:TRIED]
        for _ in range(2):
            start = time.perf_counter()
            sample(model, noise, labels, 1, self.case.guidance, time_scale=self.time_scale)
            seconds = time.perf_counter() - start
        return seconds * self.case.steps / len(noise)

    def _some(self, seed: int, x: Tensor, call: Call) -> tuple[Tensor, Call]:
        """Keep as many random images of a call as make up the case's number of tokens."""
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(x), generator=generator)[: max(1, self.case.probe_tokens // 3 // x.shape[1])]
        return x[chosen].detach(), take(call, chosen)

    def draw(self, model: nn.Module, count: int | None = None) -> tuple[Tensor, Tensor]:
        """Return the first `count` samples (all), and routing (calls, layers, samples, tokens) as masks of experts."""
        noise, labels = self.noise[:count], self.labels[:count]
        with self.recording(model) as masks:
            samples = sample(model, noise, labels, self.case.steps, self.case.guidance, time_scale=self.time_scale)
        depth = len(model.blocks)
        calls = torch.stack(masks).view(len(masks) // depth, depth, -1, len(noise), masks[0].shape[-1])
        return samples, calls.transpose(2, 3).flatten(3)

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[list[Tensor]]:
        """Collect a bit mask of picked experts (images, tokens) for every MoE call, by the oracle's float32 rule."""
        masks: list[Tensor] = []

        def look(layer: int, args: tuple[Tensor, ...], _: object, **call: Any) -> None:
            x = args[0].detach()
            picks = route(self.model.blocks[layer].moe, x.float(), **cast(call, Tensor.float))[1]
            bits = (picks.long() << torch.arange(picks.shape[1])).sum(-1)
            masks.append(bits.view(x.shape[:2]).to(torch.uint8 if picks.shape[1] <= 8 else torch.int64))

        with looking_at((block.moe for block in model.blocks), look):
            yield masks

    def climb(self, model: nn.Module, baseline: Baseline) -> tuple[dict, Tensor]:
        """Run the five rungs, with as many samples as the baseline has.

        Returns: a flat record (each rung's figures, `failed`, `verdict`) and the samples.
        """
        plans, layers = self.plans(model, baseline), self.layers(model, baseline)
        samples, routing = self.draw(model, len(baseline.samples))
        flips = (routing != baseline.routing).flatten(3)
        pair = (fid.estimate(x, self.moments) for x in (baseline.features, features(self.classifier, samples)))
        paired = fid.compare(*pair, self.case.margin)
        verdict = fid.DIFFERENT if FAIL in (plans["plans"], layers["layers"]) else paired.verdict
        rungs = {"plans": plans["plans"], "layers": layers["layers"], "dfd": paired.verdict}
        record = {
            "verdict": verdict,
            "failed": [rung for rung, result in rungs.items() if result in (FAIL, fid.DIFFERENT)],
            **plans,
            **layers,
            **agreement(samples, baseline.samples),
            "flipped_samples": float(flips.any(-1).any(0).any(0).double().mean()),
            "flipped_tokens": float(flips.double().mean()),
            "recognised": recognised(self.classifier, samples, self.labels[: len(samples)]),
            **{("dfd" if k == "difference" else k): v for k, v in dataclasses.asdict(paired).items() if k != "verdict"},
            "dfd_verdict": paired.verdict,
        }
        return record, samples

    @torch.no_grad()
    def plans(self, model: nn.Module, baseline: Baseline) -> dict:
        """Rung 1: of each probe's plan the picks, the weights, and the plan's own rules."""
        same, worst = True, 0.0
        for layer, x, call in baseline.probes:
            weights, picks = route(exact(baseline.model, layer), x.double(), **cast(call, Tensor.double))
            plan, rival = (plan_of(m.blocks[layer].moe, x, **call) for m in (model, baseline.rival))
            (ours, mine), (theirs, _) = dense(plan), dense(rival)
            same &= torch.equal(mine, picks) and valid(plan)
            worst = max(worst, ratio(ours, theirs, torch.where(picks, weights, 0))) if same else worst
        passed = same and worst <= 2
        return {"plans": PASS if passed else FAIL, "plans_equal": same, "weights_ratio": worst, "ties": baseline.ties}

    @torch.no_grad()
    def layers(self, model: nn.Module, baseline: Baseline) -> dict:
        """Rung 2: e_ours / e_torch of layer outputs, and of each expert's rows on a plan that reaches all experts."""
        outputs, slices, error = 0.0, 0.0, 0.0
        for layer, x, call in baseline.probes:
            block, pair = exact(baseline.model, layer), [m.blocks[layer].moe for m in (model, baseline.rival)]
            expected = block(x.double(), **cast(call, Tensor.double)).flatten(0, 1)
            ours, theirs = (moe(x, **call).double().flatten(0, 1) for moe in pair)
            error = max(error, quotient(whole_error(ours, expected), 1.0))
            outputs = max(outputs, ratio(ours, theirs, expected), rows_ratio(ours, theirs, expected))
            slices = max(slices, experts_ratio(pair, x.flatten(0, 1), block, model.config.top_k))
        verdict = PASS if max(outputs, slices) <= 2 else FAIL
        return {"layers": verdict, "e_ours": error, "outputs_ratio": outputs, "experts_ratio": slices}


def valid(plan: RoutingPlan) -> bool:
    try:
        plan.validate()
    except ValueError:
        return False
    return True


def experts_ratio(pair: list[nn.Module], x: Tensor, exact: nn.Module, top_k: int) -> float:
    """Return the largest error of one expert's rows, ours over the rival's, where an idle expert's error shows, too:
    token t goes to experts t, t + 1, ... (modulo E) with weight 1."""
    weights = expert_weights(exact)
    T, E = len(x), len(weights[0])
    ids = (torch.arange(T)[:, None] + torch.arange(top_k)) % E
    plan = RoutingPlan(*rooms.dispatch(ids, torch.ones(T, top_k), E))
    rows = [moe_kernels.experts(x, plan, *expert_weights(moe), backend=backend_of(moe)).double() for moe in pair]
    parts = (r.split(plan.expert_counts.tolist()) for r in (*rows, rooms.experts(x.double(), plan, *weights)))
    return max(ratio(*of_expert) for of_expert in zip(*parts, strict=True))


def cast(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a call's arguments with every real tensor changed."""
    if isinstance(value, dict):
        return {name: cast(v, change) for name, v in value.items()}
    return change(value) if value.is_floating_point() else value


def take(call: Call, images: Tensor) -> Call:
    """Return what a call says of some of its images."""
    return {name: take(v, images) if isinstance(v, dict) else v[images] for name, v in call.items()}


@torch.no_grad()
def clear_images(block: nn.Module, x: Tensor, call: Call) -> Tensor:
    """Mark the images (B,) whose picks stay when all that is scored is moved by TIE of its size."""
    picks = []
    for sign in (0.0, 1.0, -1.0):  # the same noise both ways: one of them turns a tie over
        generator = torch.Generator().manual_seed(0)

        def moved(t: Tensor, sign: float = sign, generator: torch.Generator = generator) -> Tensor:
            t = t.double()
            return t + sign * TIE * t.std() * torch.randn(t.shape, generator=generator, dtype=t.dtype)

        picks.append(route(block, moved(x), **cast(call, moved))[1].view(len(x), -1))
    return ((picks[0] == picks[1]) & (picks[0] == picks[2])).all(1)


def ratio(ours: Tensor, theirs: Tensor, exact: Tensor) -> float:
    """Return e_ours / e_torch for one tensor; 0 for an empty or exact one."""
    return quotient(*(whole_error(v.double(), exact) for v in (ours, theirs)))


def rows_ratio(ours: Tensor, theirs: Tensor, exact: Tensor) -> float:
    """Return the largest relative row error of ours over the largest of theirs."""
    return quotient(*(slice_error(v.double(), exact) for v in (ours, theirs)))


def quotient(ours: float, theirs: float) -> float:
    """Return ours / theirs, 0 for no error; NO_NUMBER where one is not finite: NaN loses in max() and every `>`."""
    if not math.isfinite(ours + theirs):
        return NO_NUMBER
    return ours / (theirs + 1e-30) if ours > 1e-30 else 0.0


def agreement(samples: Tensor, baseline: Tensor) -> dict:
    """Rung 3's likeness: mean and smallest cosine, median PSNR in dB for values in [-1, 1] (100 when equal)."""
    a, b = samples.flatten(1).double(), baseline.flatten(1).double()
    cosine = nn.functional.cosine_similarity(a, b)
    psnr = 10 * torch.log10(4 / (a - b).square().mean(1).clamp(min=4e-10))
    return {"cosine": float(cosine.mean()), "cosine_min": float(cosine.min()), "psnr_db": float(psnr.median())}
