"""What is sampled: a mixture at real images, whose score and levels are exact, and a model trained on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import moe_kernels
from bench.images import checkpoints, digits, fid, training
from bench.images.dmcmc.arms import Problem, Samples
from bench.images.dmcmc.judge import Reference, figures
from bench.images.dmcmc.levels import level_error, train_levels
from bench.instrument.progress import say
from reference.denoiser import Denoiser
from reference.dmcmc import level_grid
from reference.mixture import GaussianMixture

SIGMAS = 0.05, 20.0  # a flow trained on logit-normal t has hardly seen t < 0.03
LEVELS = 100
POINTS, BANDWIDTH = 10, 0.1  # images of each class that the mixture stands on, and its standard deviation
DRAWN = 2000  # of the mixture, for precision and recall


class Oracle:
    """A Gaussian mixture at training images: exact denoiser, exact posterior of the level, known moments, no labels."""

    name, distance = "oracle", "FD of pixels"

    def __init__(self, data: digits.Dataset):
        labels = data.train_labels
        picks = torch.cat([torch.nonzero(labels == label).flatten()[:POINTS] for label in range(data.num_classes)])
        self.mixture = GaussianMixture(data.train[picks].flatten(1).double(), BANDWIDTH)
        self.classes = data.train_labels[picks]
        grid = level_grid(*SIGMAS, LEVELS)
        self.problem = Problem(
            lambda y, sigma, _: self.mixture.denoise(y, sigma), lambda y: self.mixture.levels(y, grid), grid,
            tuple(data.train.shape[1:]), 1, *SIGMAS, torch.float64,
        )  # fmt: skip
        mean, cov = (v.numpy() for v in self.mixture.moments())
        points, _ = self.mixture.sample(DRAWN, torch.Generator().manual_seed(0))
        shares = np.bincount(self.classes, minlength=data.num_classes) / len(self.classes)
        self.reference = Reference(fid.Moments(mean, cov, 0), points.numpy(), shares)

    def facts(self) -> dict:
        return {"modes": len(self.classes), "bandwidth": BANDWIDTH}

    def judge(self, samples: Samples, correlated: bool) -> dict:
        flat = samples.images.flatten(2)
        classes = self.classes[self.mixture.modes(flat.flatten(0, 1))].view(flat.shape[:2])
        return figures(flat.numpy(), classes.numpy(), samples.labels.numpy(), correlated, self.reference)


class Trained:
    """The main job's DiT-MoE on the digits, a label per chain, judged in the features of its classifier.

    Its experts run on the backend that "auto" takes, which takes little more than half as long as the oracle's loop.
    """

    name, distance = "trained", "FD-cls"

    def __init__(self, data: digits.Dataset, folder: Path, epochs: int, level_steps: int, guidance: float):
        self.model, self.guidance = load_model(data, folder), guidance
        self.steps = {"epochs": epochs, "level_steps": level_steps}
        moe_kernels.replace_moe(self.model.model)
        self.classifier, _ = digits.train_classifier(data, epochs)
        grid = level_grid(*SIGMAS, LEVELS)
        self.levels, losses = train_levels(data.train, grid, level_steps)
        self.level_error, self.level_loss = level_error(self.levels, data.held), float(np.mean(losses[-100:]))
        self.problem = Problem(
            Denoiser(self._velocity, "flow"), self.levels, grid, data.shape, data.num_classes, *SIGMAS
        )  # fmt: skip
        real = digits.features(self.classifier, data.train)
        asked = np.full(data.num_classes, 1 / data.num_classes)
        self.reference = Reference(fid.moments(real), real, asked)

    def _velocity(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        net, t = self.model.model, t * self.model.time_scale
        if self.guidance == 1.0:
            return net(x, t, labels)
        return net.forward_with_guidance(x, t, labels, self.guidance, channels="all")

    def facts(self) -> dict:
        return {
            "model": self.model.identity, "guidance": self.guidance, "heuristic": self.guidance != 1.0,
            "origin": self.model.origin, **self.steps, "level_error": self.level_error, "level_loss": self.level_loss,
        }  # fmt: skip

    def judge(self, samples: Samples, correlated: bool) -> dict:
        flat = samples.images.flatten(0, 1).float()
        shape = samples.images.shape[:2]
        found = digits.features(self.classifier, flat).reshape(*shape, -1)
        with torch.no_grad():
            classes = self.classifier(flat).argmax(1).view(shape)
        out = figures(found, classes.numpy(), samples.labels.numpy(), correlated, self.reference)
        return out | {"recognised": float((classes == samples.labels).double().mean())}


def load_model(data: digits.Dataset, folder: Path) -> checkpoints.Trained:
    """Return the main job's model: the folder's, else the committed one, else trained now and kept in the folder."""
    recipe, own = checkpoints.Recipe.of(data), folder / "model.safetensors"
    found = checkpoints.load_checkpoint(recipe, own) or checkpoints.load_checkpoint(recipe)
    if found is None:
        say(f"no checkpoint of recipe {recipe.hash}: training one")
        found = training.train(recipe, data, folder / "training.pt")
        checkpoints.save_checkpoint(own, found, {})
    return found
