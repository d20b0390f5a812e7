"""MoELayer: the sparse feed-forward layer, from tokens to tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import _checks, ops
from .activation import Activation, halves, spelled
from .backends import registry
from .backends.base import Request
from .ops.token_choice import How, token_choice_mlp
from .routing import Router, RouterCall, TokenChoice
from .weights import LAYOUTS, Biases

_WEIGHTS = "gate_up_proj", "down_proj", "shared_gate_up_proj", "shared_down_proj"


class MoELayer(nn.Module):
    """Mixture-of-experts layer with stacked parameters.

    y = shared(x) + sum over the picks (e, p) of x of p expert_e(x); experts are MLPs of two products, with or without
    biases, SwiGLU or GELU between them.

    Args:
        hidden_size: H.
        intermediate_size: I of the routed experts.
        num_experts: E.
        top_k: K, picks per token; a router that is given and has its own top_k must agree. Not used by ExpertChoice.
        shared_intermediate_size: Is of the always-on expert, 0 for none.
        activation: "swiglu"; "gelu" or "gelu_tanh", exact or not (two matrices per expert); or a ClampedSwiGLU.
        router: TokenChoice(top_k) by default.
        backend: "auto" or a name out of `backends()`.
        recompute: keep no activations for backward, compute them there again: see `moe_mlp`.
        device, dtype: of the parameters; float32, bfloat16, float16 or float64. A router's own keep theirs.
        layout: how the parameters are stored, a name out of `moe_kernels.weights.LAYOUTS`: "up_gate" has rows
            [up; gate], "gate_up_in_out" gate_up_proj (E, H, 2I) and down_proj (E, I, H). Native reads all of them as
            they are; triton and cuda read (out, in) in place where the widths are multiples of 64; else other
            backends copy what is not "gate_up" in every call.
        bias: all experts add a gate_up_bias (E, 2I), halves as in gate_up_proj, and a down_bias (E, H). These,
            gelu_tanh and ClampedSwiGLU are what native, grouped and eager compute; triton and cuda refuse them.
    Raises: TypeError, ValueError naming the argument; RuntimeError with the reason for a backend that cannot run here.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        shared_intermediate_size: int = 0,
        activation: Activation = "swiglu",
        router: Router | None = None,
        backend: str = "auto",
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        layout: str = "gate_up",
        bias: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "num_experts": num_experts}
        H, I, E = (_checks.positive(name, size) for name, size in sizes.items())
        Is = shared_intermediate_size and _checks.positive("shared_intermediate_size", shared_intermediate_size)
        self.router = TokenChoice(top_k) if router is None else router
        _check_router(self.router, top_k, E)
        if device is not None and isinstance(self.router, nn.Module) and torch.device(device).type != "meta":
            self.router.to(device)
        registry.check_name(backend)
        if dtype is not None and dtype not in _checks.FLOATS:
            raise TypeError(f"dtype: got {dtype}, expected one of {', '.join(map(str, _checks.FLOATS))}")
        if layout not in LAYOUTS:
            raise ValueError(f"layout: got {layout!r}, expected one of {', '.join(map(repr, LAYOUTS))}")
        self.activation, self.backend, self.recompute, self.layout = spelled(activation), backend, recompute, layout
        n = halves(self.activation)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        def projection(*shape: int) -> nn.Parameter:
            *lead, rows, columns = shape
            return parameter(*lead, columns, rows) if LAYOUTS[layout].in_out else parameter(*shape)

        self.gate_weight = parameter(*self.router.gate_shape(E, H))
        self.gate_up_proj, self.down_proj = projection(E, n * I, H), projection(E, H, I)
        self.shared_gate_up_proj = projection(n * Is, H) if Is else None
        self.shared_down_proj = projection(H, Is) if Is else None
        self.gate_up_bias, self.down_bias = (parameter(E, n * I), parameter(E, H)) if bias else (None, None)
        self.shared_gate_up_bias = parameter(n * Is) if bias and Is else None
        self.shared_down_bias = parameter(H) if bias and Is else None
        self._draw_weights()

    def reset_parameters(self) -> None:
        """Draw weights as DiT-MoE does: Xavier-uniform for each expert matrix, U(+-1/sqrt(H)) for the router,
        zeros for biases.

        A router that is a module with a `reset_parameters` of its own begins anew, too: what `to_empty` left in its
        averages is whatever memory held.
        """
        self._draw_weights()
        begin = getattr(self.router, "reset_parameters", None)
        if begin is not None:
            begin()

    def _draw_weights(self) -> None:
        H, inner = self._hidden_size(), -2 if LAYOUTS[self.layout].in_out else -1
        bound = self.gate_weight.shape[1] ** -0.5
        nn.init.uniform_(self.gate_weight, -bound, bound)
        mlps = (self.gate_up_proj, self.down_proj), (self.shared_gate_up_proj, self.shared_down_proj)
        for gate_up, down in mlps:
            if down is not None:
                bound = (6 / (H + down.shape[inner])) ** 0.5
                nn.init.uniform_(gate_up, -bound, bound)
                nn.init.uniform_(down, -bound, bound)
        for bias in filter(lambda b: b is not None, self._biases()):
            nn.init.zeros_(bias)

    def _biases(self) -> Biases:
        return Biases(self.gate_up_bias, self.down_bias, self.shared_gate_up_bias, self.shared_down_bias)

    def _hidden_size(self) -> int:
        return self.down_proj.shape[-1 if LAYOUTS[self.layout].in_out else -2]

    def forward(
        self,
        x: Tensor,
        return_aux_loss: bool = False,
        *,
        router_input: Tensor | None = None,
        conditioning: Mapping[str, Any] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Apply the layer.

        y_t = shared(x_t) + sum_k topk_weights_tk expert_{topk_ids_tk}(x_t).

        Args:
            x: (..., H) in the dtype of the parameters, or of any dtype under autocast.
            return_aux_loss: also return the auxiliary loss.
            router_input: (..., H), tokens to be scored instead of x, for routers that say so (Scores).
            conditioning: what the router may ask for by name: "timestep" (B, H), "labels" (B,), "capacity_factor".
        Returns:
            y (..., H), in autocast's dtype where it is on; with return_aux_loss (y, aux), aux a differentiable scalar
            to be added to the loss: y then carries nothing of it, in mode "injected" either. Zero for a router without
            auxiliary loss. See TokenChoice.
        Raises: TypeError, ValueError naming the argument.
        Cost: 6 T K H I + 6 T H Is + 2 T H E FLOPs (swiglu); no host syncs on a GPU but for the loop of `eager`.
        Source: reference.moe.SparseMoeBlock, reference.moe.ExpertChoiceMoE.
        """
        return self._forward(x, return_aux_loss, None, router_input, conditioning)

    def forward_adaln(
        self,
        x: Tensor,
        shift: Tensor,
        scale: Tensor,
        gate: Tensor,
        return_aux_loss: bool = False,
        *,
        router_input: Tensor | None = None,
        conditioning: Mapping[str, Any] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Apply the layer as a DiT block with adaLN does, LayerNorm, modulation, gate and residual included.

        out = x + gate_b layer(LayerNorm(x) (1 + scale_b) + shift_b), b the image.

        Args:
            x: (B, L, H) images of L tokens, in the dtype of the parameters, or of any dtype under autocast.
            shift, scale, gate: (B, H), of any float dtype. LayerNorm has no parameters, and 1e-6 is its epsilon.
            return_aux_loss, router_input, conditioning: as in `forward`; router_input is LayerNorm(x) by default.
        Returns: out (B, L, H) in the dtype of x; with return_aux_loss (out, aux).
        Raises: TypeError, ValueError naming the argument.
        Cost: as `forward`; where the backend fuses (triton, cuda) x is read once in front, by routers that begin with
            `gating`, and the residual once behind. For other routers plain torch normalises and modulates.
        Source: reference.dit.DiTBlock.
        """
        return self._forward(x, return_aux_loss, (shift, scale, gate), router_input, conditioning)

    def _forward(
        self,
        x: Tensor,
        return_aux_loss: bool,
        modulation: tuple[Tensor, Tensor, Tensor] | None,
        router_input: Tensor | None,
        conditioning: Mapping[str, Any] | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        how = self.router, self.training, return_aux_loss, self.recompute, modulation, router_input, conditioning
        return moe_forward(x, self.gate_weight, *self.expert_weights(), *how, self._mlp)

    _mlp = staticmethod(ops.moe_mlp)  # ExpertParallelLayer has its own

    def expert_weights(self) -> tuple[Sequence[Any], str, str, str, Biases | None]:
        """Return the four weights of `moe_mlp`, the activation, the layout, the backend and the biases."""
        own = self._parameters  # nn.Module's way to them takes four times as long
        weights = [own[name] if name in own else getattr(self, name) for name in _WEIGHTS]
        biases = None if self.down_bias is None else self._biases()
        return weights, self.activation, self.layout, self.backend, biases

    def extra_repr(self) -> str:
        inner = -2 if LAYOUTS[self.layout].in_out else -1
        E, H = self.down_proj.shape[0], self._hidden_size()
        I = self.down_proj.shape[inner]
        Is = 0 if self.shared_down_proj is None else self.shared_down_proj.shape[inner]
        has_bias = self.down_bias is not None
        chosen = describe_backend(self.backend, self.down_proj, E, H, I, Is, self.activation, has_bias)
        return (
            f"hidden_size={H}, intermediate_size={I}, num_experts={E}, shared_intermediate_size={Is}, "
            f"activation={self.activation!r}, bias={has_bias}, layout={self.layout!r}, router={self.router}, "
            f"backend={chosen}"
        )


def moe_forward(
    x: Tensor,
    gate_weight: Tensor,
    weights: Sequence[Any],
    activation: str,
    layout: str,
    backend: str,
    biases: Biases | None,
    router: Router,
    training: bool,
    return_aux_loss: bool,
    recompute: bool,
    modulation: tuple[Tensor, Tensor, Tensor] | None = None,
    router_input: Tensor | None = None,
    conditioning: Mapping[str, Any] | None = None,
    mlp: Callable[..., Tensor] = ops.moe_mlp,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute what MoELayer.forward documents, from any form of the weights that `moe_mlp` takes.

    modulation: shift, scale and gate for what MoELayer.forward_adaln documents.
    mlp: what computes as `moe_mlp` does; with expert parallelism on several ranks.
    """
    if not isinstance(x, Tensor) or x.dim() < 1:
        raise TypeError(f"x: got {f'shape {tuple(x.shape)}' if isinstance(x, Tensor) else type(x)}, expected (..., H)")
    down = weights[1] if isinstance(weights[1], Tensor) else weights[1][0]
    H = down.shape[-1 if LAYOUTS[layout].in_out else -2]
    _checks.shape("x", x.shape, (*x.shape[:-1], H), "...,H")
    tokens = x.reshape(-1, H)
    inject_aux = training and not return_aux_loss and torch.is_grad_enabled()
    plainly = mlp is ops.moe_mlp and modulation is None and router_input is None and conditioning is None
    if plainly and type(router) is TokenChoice and not return_aux_loss:
        alpha = router.aux_loss_alpha if inject_aux and router.aux_loss_mode == "injected" else None
        step = How(router.top_k, alpha, spelled(activation), layout, backend, recompute)
        y = token_choice_mlp(tokens, gate_weight, weights, biases, step)
        if y is not None:
            return y.reshape(*x.shape)
    call = RouterCall(
        tokens if modulation is None else x,
        gate_weight,
        backend,
        tokens_per_image=x.shape[-2] if x.dim() > 1 else 1,
        inject_aux=inject_aux,
        with_aux=return_aux_loss,
        router_input=router_input,
        conditioning=conditioning,
        modulation=modulation and modulation[:2],
    )
    plan, aux = router.plan(call)
    around = {}
    if modulation is not None:
        gate = modulation[2]
        _checks.tensor("gate", gate, "B,H", like=x)
        _checks.shape("gate", gate.shape, (x.shape[0], H), "B,H")  # moe_mlp knows tokens, not images: any divisor does
        around = {"residual": tokens, "gate": gate}
    how = {"activation": activation, "layout": layout, "backend": backend, "recompute": recompute, "biases": biases}
    y = mlp(call.tokens, plan, *weights, **how, **around).reshape(x.shape)
    if not return_aux_loss:
        return y
    if aux is None:
        return y, torch.zeros((), dtype=_checks.accumulator(x.dtype), device=x.device)
    return y, aux


def describe_backend(
    backend: str, weight: Tensor, E: int, H: int, I: int, Is: int, activation: str, biases: bool
) -> str:
    """Say which backend computes a layer with these weights, and that "auto" chose it."""
    request = Request("moe_mlp", weight.dtype, weight.device.type, E, H, I, Is, activation, biases)
    try:
        chosen = registry.choose(backend, request).name
    except (RuntimeError, ValueError) as error:
        return f"{backend} ({error})"
    return chosen if chosen == backend else f"{backend} -> {chosen}"


def _check_router(router: Router, top_k: int, num_experts: int) -> None:
    if not isinstance(router, Router):
        raise TypeError(f"router: got {type(router).__name__} {router!r}, expected a moe_kernels.Router")
    own = getattr(router, "top_k", None)
    if own is None:
        return
    if own != top_k:
        raise ValueError(f"top_k: got {top_k}, expected the router's top_k = {own}")
    if own > num_experts:
        raise ValueError(f"top_k: got {own}, expected at most num_experts = {num_experts}")
