"""Train the oracle's DiT-MoE by rectified flow, seeded and resumable, and sample it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.images.checkpoints import Recipe, Trained
from bench.images.digits import Dataset
from bench.images.sampling.samplers import ModelFn
from bench.instrument import progress
from reference.diffusion import RectifiedFlow
from reference.dit import DiTMoE
from reference.samplers import rf_euler


class TimeScaled(nn.Module):
    """Feed `scale` * t to the model's timestep embedding."""

    def __init__(self, model: nn.Module, scale: float):
        super().__init__()
        self.model, self.scale = model, scale

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.model(x, t * self.scale, y)


class Trainer:
    """One training run: model, AdamW, EMA and losses, advanced step by step.

    Step n draws its batch, noise and times from a seed made of (recipe.seed, n), so a run that was interrupted and
    resumed is the same run.
    """

    def __init__(self, recipe: Recipe, data: Dataset):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.model = DiTMoE(recipe.config).train()
        self.recipe, self.data = recipe, data
        self.ema = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=0.0)
        self.step, self.losses, self.seconds = 0, [], 0.0

    def advance(self) -> float:
        """Take one optimizer step; returns the loss."""
        start, recipe = time.perf_counter(), self.recipe
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed * 1_000_003 + self.step + 1)
            batch = torch.randint(len(self.data.train), (recipe.batch,))
            net = TimeScaled(self.model, recipe.time_scale)
            loss = RectifiedFlow.loss(net, self.data.train[batch], self.data.train_labels[batch])
            self.optimizer.zero_grad()
            loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate_at(self.step)
        self.optimizer.step()
        self.step += 1
        keep = recipe.kept_at(self.step)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                self.ema[name].lerp_(parameter, 1 - keep)
        self.losses.append(float(loss.detach()))
        self.seconds += time.perf_counter() - start
        return self.losses[-1]

    def save(self, path: Path) -> None:
        """Write the state in one piece: an interruption leaves the old file or the new one."""
        state = {
            "recipe": self.recipe.hash, "step": self.step, "losses": self.losses, "seconds": self.seconds,
            "model": self.model.state_dict(), "ema": self.ema, "optimizer": self.optimizer.state_dict(),
        }  # fmt: skip
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    def resume(self, path: Path) -> bool:
        """Continue from a saved state of the same recipe; False when there is none."""
        if not path.exists():
            return False
        try:
            state = torch.load(path, weights_only=True)
        except Exception as error:
            raise ValueError(f"{path}: unreadable training state ({error}); delete it to train from scratch") from None
        if state["recipe"] != self.recipe.hash:
            return False
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema = state["ema"]
        self.step, self.losses, self.seconds = state["step"], state["losses"], state["seconds"]
        return True


def train(recipe: Recipe, data: Dataset, state_path: Path, save_every: int = 50) -> Trained:
    """Train from scratch, or go on from `state_path` when it holds a state of this recipe.

    Interrupted by Ctrl-C it saves its state and lets the interruption through.
    """
    trainer = Trainer(recipe, data)
    if trainer.resume(state_path):
        progress.say(f"training resumes at step {trainer.step} of {recipe.steps} ({state_path})")
    try:
        for _ in progress.track(range(trainer.step, recipe.steps), "training", recipe.steps - trainer.step):
            trainer.advance()
            if trainer.step % save_every == 0:
                trainer.save(state_path)
    finally:
        trainer.save(state_path)
    return finished(trainer)


def finished(trainer: Trainer) -> Trained:
    """Return the EMA weights, rounded as the file stores them."""
    state = {**trainer.model.state_dict(), **trainer.ema}  # routers' own averages are no parameters
    weights = {name: value.half().float() for name, value in state.items()}
    trainer.model.load_state_dict(weights)
    recipe = trainer.recipe
    return Trained(
        trainer.model.eval(), recipe, recipe.hash, recipe.time_scale, list(trainer.losses), trainer.seconds, "trained"
    )


def sample(
    model: nn.Module, noise: Tensor, labels: Tensor, steps: int, guidance: float = 1.0, time_scale: float = 1.0
) -> Tensor:
    """Draw samples by Euler steps of the rectified flow; the state stays float32, the model runs in its own dtype.

    Args: noise (N, C, height, width) float32; labels (N,) int64; guidance: 1 means one forward without guidance.
    Returns: (N, C, height, width) float32.
    """
    return rf_euler(ModelFn(model, labels, guidance, "all", time_scale), noise, steps)
