"""The parity ladder: does a backend route, compute and sample like the oracle?

1. plans: the same picks and plan as the oracle's float64 router; tokens whose picks are a near tie are left out.
2. layers: outputs, token rows and expert slices within twice plain PyTorch's error against float64.
3. samples: same weights, noise and labels; cosine, PSNR, share of samples in which some token was routed otherwise.
4. distance: paired difference of FD-cls with its 90 % interval against a margin fixed here.
5. figures: FD-cls itself and the share of samples recognised as their label.
The verdict is DIFFERENT when 1 or 2 fails or 4 says so, else it is 4's. Three sabotaged models must come out DIFFERENT.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

import moe_kernels
from bench.images import fid
from bench.images.digits import Classifier, features, recognised
from bench.images.hooks import looking_at
from bench.images.training import sample
from bench.instrument.verify import slice_error, whole_error
from moe_kernels import RouterCall, RoutingPlan, TokenChoice
from moe_kernels.weights import stack_dit_moe
from reference import rooms
from reference.moe import moe

PASS, FAIL = "pass", "fail"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TIE = 1e-5  # router logits nearer than this (relative to the largest) may fall either way in float32
TRIED = 32  # samples by which the pace is taken
NO_NUMBER = 1e30  # in place of NaN and infinity, which the rows' JSON does not know


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
    probes: list  # of what the ladder's rungs are held on: layer and input
    ties: int
    samples: Tensor
    routing: Tensor
    features: np.ndarray

    def first(self, count: int) -> Baseline:
        """Return the baseline of the first `count` samples."""
        parts = {"samples": self.samples[:count], "features": self.features[:count]}
        return dataclasses.replace(self, routing=self.routing[:, :, :count], **parts)


class Ladder:
    """The rungs for one trained model: `baseline` once per dtype, then `climb` once per candidate.

    For DiT-MoE's token choice; bench/images/routed.py has them for the family's other rules.
    """

    @property
    def sabotages(self) -> dict[str, Callable[[nn.Module], nn.Module]]:
        """The negative controls: each breaks a replaced model in place."""
        return SABOTAGES

    def replaced(self, model: nn.Module, backend: str) -> nn.Module:
        """Return a copy of the model whose MoE layers run on `backend`."""
        return replaced(model, backend)

    def __init__(self, model: nn.Module, classifier: Classifier, images: Tensor, case: Case, time_scale: float):
        self.model, self.classifier, self.case, self.time_scale = model, classifier, case, time_scale
        generator = torch.Generator().manual_seed(case.seed)
        self.noise = torch.randn(case.samples, *images.shape[1:], generator=generator)
        self.labels = torch.arange(case.samples) % model.config.num_classes
        self.moments = fid.moments(features(classifier, images))

    def baseline(self, dtype: torch.dtype, count: int | None = None) -> Baseline:
        """Draw `count` samples (all) of the oracle in `dtype`, keep its layer inputs as probes and its routing."""
        model = copy.deepcopy(self.model).to(dtype)
        samples, routing, probes, ties = self._probed(model, count)
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

    @property
    def _calls(self) -> set[int]:
        """Calls of the model whose layers' inputs are kept: first, middle, last."""
        last = self.case.steps - 1
        return {0, last // 2, last}

    def _probed(self, model: nn.Module, count: int | None) -> tuple[Tensor, Tensor, list, int]:
        """Return samples, routing, probes and how many were left out for a near tie."""
        with capture_inputs(model, self._calls, self.case.probe_tokens // 3) as inputs:
            samples, routing = self.draw(model, count)
        probes, ties = [], 0
        for layer, block in enumerate(model.blocks):
            x = torch.cat(inputs[layer])
            clear = ~near_ties(x, block.moe.gate.weight, model.config.top_k)
            ties += int((~clear).sum())
            probes.append((layer, x[clear]))
        return samples, routing, probes, ties

    def draw(self, model: nn.Module, count: int | None = None) -> tuple[Tensor, Tensor]:
        """Return the first `count` samples (all), and routing (calls, layers, samples, tokens) as masks of experts."""
        noise, labels = self.noise[:count], self.labels[:count]
        with self._recording(model) as masks:
            samples = sample(model, noise, labels, self.case.steps, self.case.guidance, time_scale=self.time_scale)
        depth = len(model.blocks)
        calls = torch.stack(masks).view(len(masks) // depth, depth, -1, len(noise), masks[0].shape[-1])
        return samples, calls.transpose(2, 3).flatten(3)

    def _recording(self, model: nn.Module) -> AbstractContextManager[list[Tensor]]:
        return record_routing(model)

    def climb(self, model: nn.Module, baseline: Baseline) -> tuple[dict, Tensor]:
        """Run the five rungs, with as many samples as the baseline has.

        Returns: a flat record (each rung's figures, `failed`, `verdict`) and the samples.
        """
        plans, layers = self.plans(model, baseline), self.layers(model, baseline)
        samples, routing = self.draw(model, len(baseline.samples))
        flips = (routing != baseline.routing).flatten(3)
        paired = fid.paired_difference(
            baseline.features, features(self.classifier, samples), self.moments, self.case.margin
        )
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
        """Rung 1: each probe's plan against the one built from the float64 router's picks."""
        same, worst = True, 0.0
        for layer, x in baseline.probes:
            exact = oracle_plan(x, baseline.model.blocks[layer])
            plan, rival = (route(m.blocks[layer], x) for m in (model, baseline.rival))
            names = [name for name in exact._fields if name != "row_weight"]
            same &= all(torch.equal(getattr(plan, name), getattr(exact, name)) for name in names)
            if same:
                worst = max(worst, ratio(plan.row_weight, rival.row_weight, exact.row_weight))
        passed = same and worst <= 2
        return {"plans": PASS if passed else FAIL, "plans_equal": same, "weights_ratio": worst, "ties": baseline.ties}

    @torch.no_grad()
    def layers(self, model: nn.Module, baseline: Baseline) -> dict:
        """Rung 2: e_ours / e_torch of layer outputs, and of each expert's rows on a plan that reaches all experts."""
        outputs, slices, error = 0.0, 0.0, 0.0
        for layer, x in baseline.probes:
            block = baseline.model.blocks[layer].moe
            exact = oracle_layer(x, block)
            ours, theirs = (m.blocks[layer].moe(x).double() for m in (model, baseline.rival))
            error = max(error, quotient(whole_error(ours, exact), 1.0))
            outputs = max(outputs, ratio(ours, theirs, exact), rows_ratio(ours, theirs, exact))
            plan = even_plan(len(x), model.config.top_k, model.config.num_experts)
            counts = plan.expert_counts.tolist()
            weights = exact_weights(block)
            exact_rows = rooms.experts(x.double(), plan, weights["gate_up_proj"], weights["down_proj"]).split(counts)
            ours, theirs = (expert_rows(m.blocks[layer].moe, x, plan).split(counts) for m in (model, baseline.rival))
            slices = max([slices, *(ratio(*parts) for parts in zip(ours, theirs, exact_rows, strict=True))])
        passed = max(outputs, slices) <= 2
        return {
            "layers": PASS if passed else FAIL, "e_ours": error, "outputs_ratio": outputs, "experts_ratio": slices,
        }  # fmt: skip


def replaced(model: nn.Module, backend: str) -> nn.Module:
    """Return a copy of the model whose MoE blocks run on `backend`."""
    model = copy.deepcopy(model)
    moe_kernels.replace_moe(model, backend=backend)
    return model


@dataclass(frozen=True)
class RenormalisedChoice(TokenChoice):
    """Token choice whose weights sum to one per token: what most MoE kernels do, and DiT-MoE does not."""

    def plan(self, call: RouterCall) -> tuple[RoutingPlan, Tensor | None]:
        plan, aux = super().plan(call)
        token = plan.row_token.long()
        total = torch.zeros(plan.num_tokens, dtype=plan.row_weight.dtype).index_add(0, token, plan.row_weight)
        return dataclasses.replace(plan, row_weight=plan.row_weight / total[token]), aux


def _renormalise(model: nn.Module) -> nn.Module:
    for block in model.blocks:
        block.moe.moe_config = dataclasses.replace(block.moe.moe_config, router_class=RenormalisedChoice)
    return model


@torch.no_grad()
def _drop_shared(model: nn.Module) -> nn.Module:
    for block in model.blocks:
        block.moe.shared_experts.down_proj.weight.zero_()
    return model


@torch.no_grad()
def _disturb(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for weight in model.blocks[0].moe.experts[0].parameters():
        noise = torch.randn(weight.shape, generator=generator).to(weight.dtype)
        weight += 0.01 * weight.std() * noise
    return model


SABOTAGES: dict[str, Callable[[nn.Module], nn.Module]] = {  # negative controls, each breaks a replaced model in place
    "renormalised top-k": _renormalise,
    "dropped shared expert": _drop_shared,
    "1 % error in one expert": _disturb,
}


@contextmanager
def capture_inputs(model: nn.Module, calls: set[int], tokens: int) -> Iterator[list[list[Tensor]]]:
    """Collect, per layer, up to `tokens` random tokens (t, H) of the MoE inputs in the given calls of the model."""
    inputs: list[list[Tensor]] = [[] for _ in model.blocks]
    seen = [0] * len(model.blocks)

    def look(layer: int, args: tuple[Tensor, ...], _: object) -> None:
        if seen[layer] in calls:
            generator = torch.Generator().manual_seed(len(inputs) * seen[layer] + layer)
            x = args[0].detach().flatten(0, -2)
            inputs[layer].append(x[torch.randperm(len(x), generator=generator)[:tokens]])
        seen[layer] += 1

    with looking_at((block.moe for block in model.blocks), look):
        yield inputs


@contextmanager
def record_routing(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect a bit mask of picked experts (images, tokens) for every MoE call, by one float32 router for all."""
    masks: list[Tensor] = []

    def look(layer: int, args: tuple[Tensor, ...], _: object) -> None:
        x, module = args[0].detach(), model.blocks[layer].moe
        logits = nn.functional.linear(x.float(), module.gate.weight.detach().float())
        ids = logits.topk(model.config.top_k, dim=-1).indices
        masks.append((1 << ids).sum(-1).to(torch.uint8 if len(module.gate.weight) <= 8 else torch.int64))

    with looking_at((block.moe for block in model.blocks), look):
        yield masks


def near_ties(x: Tensor, gate_weight: Tensor, top_k: int) -> Tensor:
    """Mark tokens (T,) whose picks or their order hang on a logit gap that float32 may not resolve."""
    logits = nn.functional.linear(x.double(), gate_weight.double())
    top = logits.sort(-1, descending=True).values[:, : top_k + 1]
    return (top[:, :-1] - top[:, 1:]).min(-1).values < TIE * logits.abs().amax().clamp(min=1)


@torch.no_grad()
def oracle_plan(x: Tensor, block: nn.Module) -> rooms.Plan:
    """Build the plan of the float64 router's picks."""
    weights, ids, probs = rooms.gating(x.double(), block.moe.gate.weight.double(), block.moe.num_experts_per_tok)
    return rooms.dispatch(ids, weights, probs.shape[1])


def even_plan(T: int, K: int, E: int) -> RoutingPlan:
    """Send token t to experts t, t + 1, ... (modulo E) with weight 1: an idle expert's error shows, too."""
    ids = (torch.arange(T)[:, None] + torch.arange(K)) % E
    return RoutingPlan(*rooms.dispatch(ids, torch.ones(T, K), E))


def route(block: nn.Module, x: Tensor) -> RoutingPlan:
    """Return the plan that a replaced block makes for x (T, H)."""
    return block.moe.router().route(x, block.moe.gate.weight, block.moe.moe_config.backend, with_aux=False)[0]


def stacked(block: nn.Module) -> dict[str, Tensor]:
    """Return a block's expert weights as the four stacked tensors of the public ops."""
    return {key.rpartition(".")[2]: value for key, value in stack_dit_moe(block.state_dict()).items()}


def expert_rows(block: nn.Module, x: Tensor, plan: RoutingPlan) -> Tensor:
    """Run the experts room of a replaced block on a given plan: (R, H) float64."""
    w = stacked(block)
    return moe_kernels.experts(x, plan, w["gate_up_proj"], w["down_proj"], backend=block.moe_config.backend).double()


def exact_weights(block: nn.Module) -> dict[str, Tensor]:
    return {key: value.double() for key, value in stacked(block).items()}


def oracle_layer(x: Tensor, block: nn.Module) -> Tensor:
    w = exact_weights(block)
    weights, ids, _ = rooms.gating(x.double(), block.gate.weight.double(), block.num_experts_per_tok)
    shared = w.get("shared_gate_up_proj"), w.get("shared_down_proj")
    return moe(x.double(), weights, ids, w["gate_up_proj"], w["down_proj"], *shared)


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
