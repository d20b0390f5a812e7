"""Train the oracle's DiT-MoE by rectified flow: seeded, resumable, and reproducible from its recipe alone."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from bench import progress
from bench.digits import Dataset
from reference.checkpoint import load_state_dict
from reference.diffusion import RectifiedFlow
from reference.dit import DiTMoE, DiTMoEConfig
from reference.samplers import rf_euler

ASSET = Path(__file__).parent / "assets" / "digits_8E2A.safetensors"


@dataclass(frozen=True)
class Recipe:
    """Everything the trained weights depend on; equal hashes mean the same weights up to the machine's rounding.

    `time_scale` multiplies t in [0, 1] on its way into the timestep embedding; the DiT-MoE authors use 1.
    """

    data: str
    data_digest: str
    in_channels: int
    input_size: int
    num_classes: int
    hidden_size: int = 96
    depth: int = 4
    num_heads: int = 4
    patch_size: int = 2
    num_experts: int = 8
    top_k: int = 2
    mlp_ratio: int = 4
    label_dropout: float = 0.1
    aux_alpha: float = 0.01
    time_scale: float = 1.0
    steps: int = 600
    batch: int = 128
    learning_rate: float = 2e-3
    warmup: int = 20
    ema: float = 0.99
    seed: int = 0

    @classmethod
    def of(cls, data: Dataset, **changes) -> Recipe:
        """Return the recipe for a data set, with some of its fields changed."""
        channels, size, _ = data.shape
        return cls(data.name, data.digest(), channels, size, data.num_classes, **changes)

    @property
    def config(self) -> DiTMoEConfig:
        names = {f.name for f in dataclasses.fields(DiTMoEConfig)} & {f.name for f in dataclasses.fields(self)}
        return DiTMoEConfig(learn_sigma=False, **{name: getattr(self, name) for name in names})

    @property
    def hash(self) -> str:
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:12]


@dataclass
class Trained:
    """A generator ready to be sampled: EMA weights rounded through float16, as its checkpoint file stores them."""

    model: DiTMoE
    recipe: Recipe | None
    identity: str
    time_scale: float
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    origin: str = "trained"


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
            group["lr"] = recipe.learning_rate * self._schedule()
        self.optimizer.step()
        self.step += 1
        keep = min(recipe.ema, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.values()), list(self.model.parameters()), 1 - keep)
        self.losses.append(float(loss.detach()))
        self.seconds += time.perf_counter() - start
        return self.losses[-1]

    def _schedule(self) -> float:
        warm, done = self.recipe.warmup, self.step
        if done < warm:
            return (done + 1) / warm
        return 0.05 + 0.95 * (1 + math.cos(math.pi * (done - warm) / max(1, self.recipe.steps - warm))) / 2

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
    weights = {name: value.half().float() for name, value in trainer.ema.items()}
    trainer.model.load_state_dict(weights)
    recipe = trainer.recipe
    return Trained(
        trainer.model.eval(), recipe, recipe.hash, recipe.time_scale, list(trainer.losses), trainer.seconds, "trained"
    )


def save_checkpoint(path: Path, trained: Trained, figures: dict) -> None:
    """Write the weights (float16) with recipe, figures and losses as the file's metadata."""
    from safetensors.torch import save_file

    metadata = {
        "recipe": json.dumps(dataclasses.asdict(trained.recipe)), "recipe_hash": trained.recipe.hash,
        "figures": json.dumps(figures), "losses": json.dumps([round(x, 4) for x in trained.losses]),
        "seconds": f"{trained.seconds:.1f}",
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half().contiguous() for k, v in trained.model.state_dict().items()}, path, metadata)


def load_checkpoint(recipe: Recipe, path: Path = ASSET) -> Trained | None:
    """Load a checkpoint whose recipe is this one; None when the file is absent or its recipe another."""
    if not path.exists():
        return None
    metadata = read_metadata(path)
    if metadata.get("recipe_hash") != recipe.hash:
        return None
    model = DiTMoE(recipe.config)
    model.load_state_dict({k: v.float() for k, v in load_state_dict(path).items()})
    return Trained(
        model.eval(), recipe, recipe.hash, recipe.time_scale, json.loads(metadata["losses"]),
        float(metadata["seconds"]), f"checkpoint {path.name}",
    )  # fmt: skip


def load_foreign(path: Path, data: Dataset) -> Trained:
    """Load somebody's DiT-MoE weights, its geometry read from the shapes of its tensors.

    Heads (head size 64, or the size of the qk-norm) and top-k (2) leave no trace in the shapes: a safetensors file
    written here carries them in its metadata.
    Raises: ValueError naming the file, when it is no DiT-MoE, or does not make images of the data's shape and classes.
    """
    try:
        state = load_state_dict(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"--ckpt {path}: {error}") from None
    recipe = json.loads(read_metadata(path).get("recipe", "{}"))
    config = infer_config(path, state, recipe)
    made = (config.in_channels, config.input_size, config.input_size)
    if made != data.shape or config.num_classes < data.num_classes:
        raise ValueError(
            f"--ckpt {path}: makes {made} images of {config.num_classes} classes, but the data is {data.shape} with "
            f"{data.num_classes} classes; pass --data with images or latents of the model's shape"
        )
    model = DiTMoE(config)
    model.load_state_dict({k: v.float() for k, v in state.items()})
    digest = hashlib.sha256(b"".join(v.float().numpy().tobytes() for v in state.values())).hexdigest()[:12]
    return Trained(model.eval(), None, digest, recipe.get("time_scale", 1.0), [], 0.0, f"checkpoint {Path(path).name}")


def infer_config(path: Path, state: dict[str, Tensor], recipe: dict) -> DiTMoEConfig:
    """Read a DiT-MoE's geometry from its state dict; ValueError names the file and the missing key."""
    try:
        hidden, channels, patch, _ = state["x_embedder.proj.weight"].shape
        experts = state["blocks.0.moe.gate.weight"].shape[0]
        intermediate = state["blocks.0.moe.experts.0.gate_proj.weight"].shape[0]
        shared = state["blocks.0.moe.shared_experts.gate_proj.weight"].shape[0]
        outputs = state["final_layer.linear.weight"].shape[0] // patch**2
        tokens, table = state["pos_embed"].shape[1], state["y_embedder.embedding_table.weight"]
    except KeyError as error:
        raise ValueError(f"--ckpt {path}: no DiT-MoE state dict: the key {error} is missing") from None
    norm = state.get("blocks.0.attn.q_norm.weight")
    head = norm.numel() if norm is not None else 64
    return DiTMoEConfig(
        depth=1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")),
        hidden_size=hidden, num_heads=recipe.get("num_heads", max(1, hidden // head)), patch_size=patch,
        num_experts=experts, top_k=recipe.get("top_k", 2), input_size=math.isqrt(tokens) * patch, in_channels=channels,
        num_classes=table.shape[0] - 1, learn_sigma=outputs == 2 * channels, qk_norm=norm is not None,
        mlp_ratio=intermediate // hidden, num_shared=shared // hidden,
    )  # fmt: skip


def read_metadata(path: Path) -> dict[str, str]:
    """Return a safetensors file's metadata; empty for any other file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


@torch.no_grad()
def sample(
    model: nn.Module, noise: Tensor, labels: Tensor, steps: int, guidance: float = 1.0, time_scale: float = 1.0
) -> Tensor:
    """Draw samples by Euler steps of the rectified flow; the state stays float32, the model runs in its own dtype.

    Args: noise (N, C, height, width) float32; labels (N,) int64; guidance: 1 means one forward without guidance.
    Returns: (N, C, height, width) float32.
    """
    dtype, channels = next(model.parameters()).dtype, noise.shape[1]

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        x, t = x.to(dtype), (t * time_scale).to(dtype)
        if guidance == 1.0:
            return model(x, t, labels)[:, :channels].float()
        return model.forward_with_guidance(x, t, labels, guidance, channels="all")[:, :channels].float()

    return rf_euler(velocity, noise, steps)
