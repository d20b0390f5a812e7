"""What a layer hands its router for one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _checks, ops
from ..ops.adaln import modulate, normalise


class RouterCall:
    """The tokens of one call, the router's weight, and what the call says.

    Args:
        x: (T, H) tokens; with modulation (B, L, H), the images before LayerNorm.
        gate_weight: the layer's, in the shape that the router's `gate_shape` says; (E, H) for most.
        backend: "auto" or a name out of `backends()`.
        tokens_per_image: L, how many consecutive tokens are one image; None: all of them.
        inject_aux: in mode "injected", let the weights of the rows carry the gradient of the auxiliary loss.
        with_aux: whether to return the auxiliary loss.
        router_input: (..., H) what to score instead of the tokens, where a router says so: T rows.
        conditioning: what else routers may ask for, by name: "timestep", "labels", "capacity_factor" ...
        modulation: shift and scale (B, H) of adaLN, where x is not modulated yet.
    """

    def __init__(
        self,
        x: Tensor,
        gate_weight: Tensor,
        backend: str = "auto",
        *,
        tokens_per_image: int | None = None,
        inject_aux: bool = False,
        with_aux: bool = True,
        router_input: Tensor | None = None,
        conditioning: Mapping[str, Any] | None = None,
        modulation: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self._x, self._modulation = x, modulation
        self._tokens = x if modulation is None else None
        self.gate_weight, self.backend, self._tokens_per_image = gate_weight, backend, tokens_per_image
        self.inject_aux, self.with_aux = inject_aux, with_aux
        self._router_input, self.conditioning = router_input, conditioning or {}

    @property
    def tokens(self) -> Tensor:
        """The layer's tokens (T, H), modulated."""
        if self._tokens is None:
            self._tokens = modulate(self._x, *self._modulation).reshape(-1, self._x.shape[-1])
        return self._tokens

    @property
    def num_tokens(self) -> int:
        x = self._x
        return x.shape[0] if self._modulation is None else x.shape[0] * x.shape[1]

    @property
    def tokens_per_image(self) -> int:
        return self._tokens_per_image or max(self.num_tokens, 1)

    @property
    def num_images(self) -> int:
        return self.num_tokens // self.tokens_per_image

    @property
    def unmodulated(self) -> Tensor:
        """The tokens (T, D) that the call gave as router_input; in front of adaLN LayerNorm(x), unless it gave any."""
        if self._router_input is None and self._modulation is not None:
            return normalise(self._x).reshape(-1, self._x.shape[-1])
        given = self._router_input
        if given is None:
            raise ValueError("router_input: got None, expected the tokens to be scored: forward(x, router_input=...)")
        if not isinstance(given, Tensor) or not given.is_floating_point():
            raise TypeError(f"router_input: got {getattr(given, 'dtype', type(given))}, expected a floating tensor")
        if given.dim() < 1 or given.shape[:-1].numel() != self.num_tokens:
            raise ValueError(
                f"router_input: got shape {tuple(given.shape)}, expected {self.num_tokens} tokens (..., D)"
            )
        return given.reshape(self.num_tokens, given.shape[-1])

    def gating(self, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return what `gating` makes of the tokens; in front of adaLN what `modulated_gating` does, in one pass."""
        if self._tokens is not None:
            return ops.gating(self._tokens, self.gate_weight, top_k, self.backend)
        shift, scale = self._modulation
        self._tokens, *scores = ops.modulated_gating(
            self._x, shift, scale, self.gate_weight, top_k, backend=self.backend
        )
        return tuple(scores)

    def per_image(self, name: str, *features: int, dtypes: Sequence[torch.dtype] = _checks.FLOATS) -> Tensor:
        """Return the tensor that the call's conditioning has under a name: (B, *features), checked."""
        value = self.get(name)
        dims = ",".join(["B", "D"][: 1 + len(features)])
        if value is None:
            known = ", ".join(map(repr, self.conditioning)) or "none"
            raise ValueError(f"conditioning[{name!r}]: got {known}, expected a tensor ({dims}) of that name")
        _checks.tensor(f"conditioning[{name!r}]", value, dims, dtypes, like=self._x)
        _checks.shape(f"conditioning[{name!r}]", value.shape, (self.num_images, *features), dims)
        return value

    def get(self, name: str) -> Any:
        """Return what the call's conditioning has under a name, None without."""
        return self.conditioning.get(name)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x weight^T + bias in float32 (float64 for float64 x), under autocast, too: as `gating` computes logits."""
    wide = _checks.accumulator(x.dtype)
    if x.shape[-1] != weight.shape[-1]:
        raise ValueError(f"gate_weight: got shape {tuple(weight.shape)}, expected (E,D) with D = {x.shape[-1]}")
    x, weight, bias = x.to(wide), weight.to(wide), None if bias is None else bias.to(wide)
    with outside_autocast(x):
        return F.linear(x, weight, bias)


def outside_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Return the context in which products with x keep their dtype."""
    return torch.autocast(x.device.type, enabled=False) if _checks.autocast_enabled(x) else nullcontext()
