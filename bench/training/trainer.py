"""The steps of a run: loss, gradients, AdamW and EMA, the same on one process and on many."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.api import CheckpointException

import moe_kernels
from bench.images.checkpoints import Recipe
from bench.images.sampling.samplers import NOISE, VELOCITY
from bench.training import layouts
from bench.training.data import Draws, Source
from bench.training.processes import AgreedError, Ranks
from moe_kernels.distributed import AdamW, balance_over_ranks, checkpoints, clip_grad_norm, stack_experts
from moe_kernels.distributed.optimizer import own_parts
from reference.diffusion import GaussianDiffusion, RectifiedFlow
from reference.dit import DiTMoE, DiTMoEConfig

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
OBJECTIVES = {VELOCITY: RectifiedFlow, NOISE: GaussianDiffusion()}
GROWTH_STEPS = 2000  # torch.amp.GradScaler's, and its factors


@dataclass(frozen=True)
class Job:
    """Everything a run's weights depend on beside the order of sums; equal jobs go on from each other's checkpoints.

    precision: of activations, by autocast; parameters, gradients and what AdamW keeps are float32.
    balance: the auxiliary loss is that of the tokens of all ranks, or the mean of each "rank"'s own.
    clip: bound of the gradients' norm, None for none.
    """

    recipe: Recipe
    predicts: str = VELOCITY
    qk_norm: bool = False
    precision: str = "fp32"
    balance: str = "all"
    clip: float | None = None

    @property
    def config(self) -> DiTMoEConfig:
        """Of the model; labels are dropped by Draws."""
        learn_sigma = self.predicts == NOISE
        return replace(self.recipe.config, learn_sigma=learn_sigma, qk_norm=self.qk_norm, label_dropout=0.0)

    @property
    def metadata(self) -> dict[str, str]:
        """For the file of weights, as `bench sample` reads it."""
        return {"recipe": json.dumps(asdict(self.recipe) | {"predicts": self.predicts})}


class Trainer:
    """A run: `advance` takes a step, `save` and `load` keep it, for any number of ranks and any layout.

    Args: parallel: one of LAYOUTS, or None for one process; sharing: as `layouts.check` returns it.
    """

    def __init__(
        self, job: Job, source: Source, ranks: Ranks, parallel: str | None, sharing: int = 1, backend: str = "auto"
    ):
        self.job, self.ranks, recipe = job, ranks, job.recipe
        self.draws = Draws(source, recipe.seed, recipe.batch, job.predicts, recipe.label_dropout)
        model = ranks.together(lambda: _build(job, backend, ranks))
        self.model = layouts.distribute(model, parallel, sharing, ranks)
        self.named = {name.removeprefix("module."): p for name, p in self.model.named_parameters()}
        self.ema = {name: p.detach().clone() for name, p in self.named.items()}
        self.trained = [p for p in self.named.values() if p.requires_grad]
        self.optimizer = AdamW(self.trained, lr=recipe.learning_rate, weight_decay=0.0, fused=True)
        self.scale = LossScale(job.precision == "fp16")
        self.step = 0

    def advance(self) -> dict[str, float]:
        """Take one step; returns the row of it for the log.

        Raises: FloatingPointError, on all ranks, naming step and ranks whose loss is not finite.
        """
        start, recipe = time.perf_counter(), self.job.recipe
        batch = self.draws.part(self.step, self.ranks.rank, self.ranks.world).to(self.ranks.device)
        weight = len(batch.labels) / recipe.batch
        loss, aux = self._loss(batch)
        self.optimizer.zero_grad()
        (loss * (weight * self.ranks.world * self.scale.value)).backward()
        norm = self._norm()
        loss, aux = self._mean(loss, aux, weight)
        taken = bool(norm.isfinite())
        if not taken and not self.scale.used:
            raise FloatingPointError(f"step {self.step + 1}: the gradients' norm is {float(norm)}, the loss {loss:.4g}")
        rate = recipe.rate_at(self.step)
        row = {"step": self.step + 1, "loss": loss, "aux": aux, "grad_norm": float(norm) if taken else None}
        row |= {"learning_rate": rate, "loss_scale": self.scale.value}
        if taken:
            self._update(rate)
        self.scale.update(taken)
        self.step += 1
        return row | {"images_per_s": round(recipe.batch / (time.perf_counter() - start), 2)}

    def save(self, folder: Path) -> Path:
        """Write a checkpoint of this step. Collective. Raises: as `checkpoints.save`."""
        return checkpoints.save(folder, self.step, self.model, self.optimizer, self._extra())

    def load(self, path: Path) -> None:
        """Go on from a checkpoint. Collective. Raises: AgreedError for one of another model."""
        extra = self._extra()
        try:
            checkpoints.load(path, self.model, self.optimizer, extra)
        except (CheckpointException, RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[-300:]
            raise AgreedError(f"--resume: {path}: expected a checkpoint of this model, got: {reason}") from None
        self.scale.value, self.scale.good = float(extra["loss_scale"][0]), int(extra["loss_scale"][1])
        self.step = int(extra["step"])

    def gather_ema(self) -> dict[str, Tensor]:
        """Return the EMA weights under the names of DiT-MoE, on the CPU of rank 0. Collective; the end of the run."""
        with torch.no_grad():
            torch._foreach_copy_(own_parts(self.named.values()), own_parts(self.ema.values()))
        return checkpoints.gather_dit_moe(self.model)

    def _extra(self) -> dict[str, Tensor]:
        scale = torch.tensor([self.scale.value, self.scale.good], dtype=torch.float64)
        ema = {f"ema.{name}": value for name, value in self.ema.items()}
        return {"step": torch.tensor(self.step), "loss_scale": scale} | ema

    def _loss(self, batch) -> tuple[Tensor, Tensor]:
        """Return this rank's loss, the auxiliary one included, and that."""
        dtype, kind, aux = PRECISIONS[self.job.precision], self.ranks.device.type, None

        def net(x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal aux
            with torch.autocast(kind, dtype, enabled=dtype is not None):
                out, aux = self.model(x, t * self.job.recipe.time_scale, y, return_aux_loss=True)
            return out.float(), aux

        loss = OBJECTIVES[self.job.predicts].loss(net, batch.x0, batch.labels, t=batch.t, noise=batch.noise)
        return loss, aux.detach()

    def _norm(self) -> Tensor:
        """Undo the loss scale, clip, and return the norm of all ranks' gradients before that."""
        if self.scale.used:
            torch._foreach_mul_(own_parts(p.grad for p in self.trained), 1 / self.scale.value)
        return clip_grad_norm(self.trained, self.job.clip or torch.inf)

    def _mean(self, loss: Tensor, aux: Tensor, weight: float) -> tuple[float, float]:
        """Return the means over the batch of loss without aux, and of aux."""
        table = torch.zeros(self.ranks.world, 3, dtype=torch.float64, device=self.ranks.device)
        table[self.ranks.rank] = torch.stack([loss.detach() - aux, aux, torch.full_like(aux, weight)])
        if distributed.is_initialized():
            distributed.all_reduce(table)  # each in its own row: NaN stays there
        rows = table.tolist()
        bad = [str(rank) for rank, row in enumerate(rows) if not torch.tensor(row).isfinite().all()]
        if bad:
            plural = "s" * (len(bad) > 1)
            raise FloatingPointError(f"step {self.step + 1}: the loss of rank{plural} {', '.join(bad)} is not finite")
        return tuple(sum(row[i] * row[2] for row in rows) for i in range(2))

    @torch.no_grad()
    def _update(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        share = 1 - self.job.recipe.kept_at(self.step + 1)
        torch._foreach_lerp_(own_parts(self.ema.values()), own_parts(self.named.values()), share)


class LossScale:
    """What fp16's loss is multiplied by, as torch.amp.GradScaler does it, which knows DTensors of one mesh only."""

    def __init__(self, used: bool):
        self.used, self.value, self.good = used, 65536.0 if used else 1.0, 0

    def update(self, taken: bool) -> None:
        """Halve it after gradients that are not finite, double it after GROWTH_STEPS that are."""
        if not self.used:
            return
        self.good = self.good + 1 if taken else 0
        if not taken:
            self.value /= 2
        elif self.good == GROWTH_STEPS:
            self.value, self.good = self.value * 2, 0


def _build(job: Job, backend: str, ranks: Ranks) -> nn.Module:
    """Return the seed's model with MoELayers, whose balance loss is asked for."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.recipe.seed)
        model = DiTMoE(job.config).train().to(ranks.device)
    moe_kernels.replace_moe(model, backend=backend, aux_loss_mode="scaled")
    stack_experts(model)
    if job.balance == "all" and ranks.world > 1:
        balance_over_ranks(model)
    return model
