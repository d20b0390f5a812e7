"""A run by the oracle's model, on one process and in a loop of its own: what every layout has to give."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.training.data import Draws, Source
from bench.training.trainer import OBJECTIVES, PRECISIONS, Job
from reference.dit import DiTMoE


def train(job: Job, source: Source, steps: int, dtype: torch.dtype, parts: int = 1) -> tuple[Tensor, nn.Module]:
    """Take the first steps of a job, in float64 without its autocast.

    Args: parts: into as many a batch is cut, each with a balance loss of its own.
    Returns: (3, steps) in dtype: loss without the auxiliary one, that one, norm of the gradients before --clip; and the
        model, which has the last step's gradients.
    """
    recipe = job.recipe
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = DiTMoE(job.config).train().to(dtype)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.0)
    draws = Draws(source, recipe.seed, recipe.batch, job.predicts, recipe.label_dropout)
    narrow = PRECISIONS[job.precision] if dtype != torch.float64 else None
    rows = []
    for step in range(steps):
        total, aux_total = 0.0, 0.0
        for part in (draws.part(step, r, parts) for r in range(parts)):
            aux = None

            def net(x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
                nonlocal aux
                with torch.autocast("cpu", narrow, enabled=narrow is not None):
                    out, aux = model(x, t * recipe.time_scale, y, return_aux_loss=True)
                return out.to(dtype), aux

            own = part.x0.to(dtype), part.labels
            loss = OBJECTIVES[job.predicts].loss(net, *own, t=part.t, noise=part.noise.to(dtype))
            share = len(part.labels) / recipe.batch
            total, aux_total = total + share * loss, aux_total + share * aux.detach()
        optimizer.zero_grad()
        total.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), job.clip or torch.inf)
        optimizer.param_groups[0]["lr"] = recipe.rate_at(step)
        optimizer.step()
        rows.append((float(total.detach() - aux_total), float(aux_total), float(norm)))
    return torch.tensor(rows, dtype=dtype).T, model
