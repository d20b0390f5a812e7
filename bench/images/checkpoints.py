"""Recipes and weights: what a model was trained by, the file that keeps both, and weights that come from elsewhere."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from bench.images.digits import Dataset
from reference.checkpoint import check_layout, load_state_dict
from reference.dit import DiTMoE, DiTMoEConfig

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
    router: str = "token_choice"

    @classmethod
    def of(cls, data: Dataset, **changes) -> Recipe:
        """Return the recipe for a data set, with some of its fields changed."""
        channels, size, _ = data.shape
        return cls(data.name, data.digest(), channels, size, data.num_classes, **changes)

    @property
    def config(self) -> DiTMoEConfig:
        names = {f.name for f in dataclasses.fields(DiTMoEConfig)} & {f.name for f in dataclasses.fields(self)}
        return DiTMoEConfig(learn_sigma=False, **{name: getattr(self, name) for name in names})

    def rate_at(self, done: int) -> float:
        """Return the learning rate of the step behind `done` steps: a linear warm-up, then a cosine down to 5 %."""
        if done < self.warmup:
            return self.learning_rate * ((done + 1) / self.warmup)
        share = (done - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.05 + 0.95 * (1 + math.cos(math.pi * share)) / 2)

    def kept_at(self, done: int) -> float:
        """Return the share of the EMA that stays in its update behind `done` steps: less in the beginning."""
        return min(self.ema, done / (done + 10))

    @property
    def hash(self) -> str:
        fields = dataclasses.asdict(self)
        if self.router == "token_choice":  # as before there were others
            del fields["router"]
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]


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
    """Load somebody's DiT-MoE weights for a data set, as load_any.

    Raises: ValueError naming the file, when it is no DiT-MoE, or does not make images of the data's shape and classes.
    """
    found = load_any(path)
    config = found.model.config
    made = (config.in_channels, config.input_size, config.input_size)
    if made != data.shape or config.num_classes < data.num_classes:
        raise ValueError(
            f"--ckpt {path}: makes {made} images of {config.num_classes} classes, but the data is {data.shape} with "
            f"{data.num_classes} classes; pass --data with images or latents of the model's shape"
        )
    return found


def load_any(path: Path, dtype: torch.dtype = torch.float32) -> Trained:
    """Load somebody's DiT-MoE weights, its geometry read from the shapes of its tensors.

    Heads (head size 64, or the size of the qk-norm) and top-k (2) leave no trace in the shapes: a safetensors file
    written here carries them in its metadata.
    Raises: ValueError naming the file, when it is no DiT-MoE.
    """
    try:
        state = load_state_dict(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"--ckpt {path}: {error}") from None
    recipe = _recipe_of(path)
    with torch.device("meta"):
        model = DiTMoE(infer_config(path, state, recipe))
    check_layout(model, state, f"--ckpt {path}")
    digest = hashlib.sha256()
    for value in state.values():
        digest.update(value.float().numpy().tobytes())
    model.load_state_dict({k: v.to(dtype) for k, v in state.items()}, assign=True)
    scale, origin = recipe.get("time_scale", 1.0), f"checkpoint {Path(path).name}"
    return Trained(model.eval(), None, digest.hexdigest()[:12], scale, [], 0.0, origin)


def infer_config(path: Path, state: dict[str, Tensor], recipe: dict) -> DiTMoEConfig:
    """Read a DiT-MoE's geometry from its state dict; ValueError names the file and the missing key."""
    router = recipe.get("router", "token_choice")
    try:
        hidden, channels, patch, _ = state["x_embedder.proj.weight"].shape
        experts, intermediate, shared = _experts(state, router)
        outputs = state["final_layer.linear.weight"].shape[0] // patch**2
        tokens, table = state["pos_embed"].shape[1], state["y_embedder.embedding_table.weight"]
    except KeyError as error:
        raise ValueError(f"--ckpt {path}: no DiT-MoE state dict: the key {error} is missing") from None
    except (ValueError, IndexError, ZeroDivisionError):
        raise ValueError(f"--ckpt {path}: no DiT-MoE state dict: its tensors have other numbers of axes") from None
    norm = state.get("blocks.0.attn.q_norm.weight")
    head = norm.numel() if norm is not None else 64
    return DiTMoEConfig(
        depth=1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")),
        hidden_size=hidden, num_heads=recipe.get("num_heads", max(1, hidden // head)), patch_size=patch,
        num_experts=experts, top_k=recipe.get("top_k", 2), input_size=math.isqrt(tokens) * patch, in_channels=channels,
        num_classes=table.shape[0] - 1, learn_sigma=outputs == 2 * channels, qk_norm=norm is not None,
        mlp_ratio=intermediate // hidden, num_shared=shared // hidden, router=router,
    )  # fmt: skip


def _experts(state: dict[str, Tensor], router: str) -> tuple[int, int, int]:
    """Return E, I and Is of a state dict's first block."""
    if router == "token_choice":
        experts = state["blocks.0.moe.gate.weight"].shape[0]
        kinds = "experts.0.gate_proj", "shared_experts.gate_proj"
        return experts, *(state[f"blocks.0.moe.{kind}.weight"].shape[0] for kind in kinds)
    experts, _, intermediate = state["blocks.0.moe.down_proj"].shape
    return experts, intermediate, state["blocks.0.moe.shared_down_proj"].shape[1]


def _recipe_of(path: Path) -> dict:
    """Return the recipe in a checkpoint's metadata, {} where there is none; ValueError for one that is no recipe."""
    text = read_metadata(path).get("recipe", "{}")
    try:
        recipe = json.loads(text)
    except json.JSONDecodeError:
        recipe = None
    if not isinstance(recipe, dict):
        raise ValueError(f"--ckpt {path}: recipe: expected a JSON object in the metadata, got {text[:60]!r}")
    return recipe


def predicts(path: Path) -> str | None:
    """Return what a checkpoint's metadata says its model predicts: "velocity" where a recipe says nothing else."""
    recipe = _recipe_of(path)
    return recipe.get("predicts", "velocity") if recipe else None


def read_metadata(path: Path) -> dict[str, str]:
    """Return a safetensors file's metadata; empty for any other file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}
