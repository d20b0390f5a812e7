"""A DiT-MoE block after `replace_moe`: the modules of the original, read live, and this project's forward."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..layer import describe_backend, moe_forward
from ..ops.adaln import modulate
from ..routing import TokenChoice
from .linear import NotUnderstoodError, plain, plain_weights, refuse_watched, watched, weight_of

KINDS = ("gate_proj", "up_proj", "down_proj")
EXPECTED = {"scoring_func": "softmax", "norm_topk_prob": False, "seq_aux": False}  # of the gate, or of the block
AUX_ALPHA = 0.01
_MISSING = object()


@dataclass(frozen=True)
class BlockConfig:
    """What `replace_moe` was told, and what it has looked at: `known` are forwards and activations of the modules.

    router_class is made of the top_k and alpha that a block has; another one than TokenChoice is for whoever wants to
    see what other routing does to a model.
    """

    path: str
    backend: str
    recompute: bool
    aux_loss_mode: str
    known: frozenset[Any]
    router_class: type[TokenChoice] = TokenChoice


class Reading(NamedTuple):
    """What a block's modules hold at one moment."""

    gate_weight: Tensor
    weights: tuple[list[Tensor] | None, ...]  # as `moe_mlp` takes them
    router: TokenChoice


class MoEBlock(nn.Module):
    """The forward of a replaced block; its class is a subclass of this one and of the original's.

    At each call the weights, top_k and alpha are read from the modules as they are, wherever their memory lies; nothing
    is moved or kept. Where a module does something that reading cannot show (hooks, offloading, quantised layers ...),
    the original's own forward computes the call, and a warning names the module once. Under torch.compile, and where
    the original gives no gradient, that is an error instead.
    """

    moe_config: BlockConfig

    def forward(self, x: Tensor, return_aux_loss: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Apply the block to (..., H); arguments and results as in MoELayer.forward."""
        return self._forward(x, return_aux_loss, None)

    def forward_adaln(
        self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, return_aux_loss: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Apply norm, modulation, block, gate and residual; arguments and results as in MoELayer.forward_adaln."""
        return self._forward(x, return_aux_loss, (shift, scale, gate))

    def _forward(
        self, x: Tensor, return_aux_loss: bool, modulation: tuple[Tensor, Tensor, Tensor] | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        config = self.moe_config
        try:
            gate_weight, weights, router = read(self, config)
        except NotUnderstoodError as reason:
            return self._by_the_original(x, return_aux_loss, modulation, str(reason))
        try:
            return moe_forward(
                x, gate_weight, weights, "swiglu", "gate_up", config.backend, router, self.training, return_aux_loss,
                config.recompute, modulation,
            )  # fmt: skip
        except (TypeError, ValueError):
            reason = unequal(config.path, weights, gate_weight)
            if not reason:
                raise
        return self._by_the_original(x, return_aux_loss, modulation, reason)

    def _by_the_original(
        self, x: Tensor, return_aux_loss: bool, modulation: tuple[Tensor, Tensor, Tensor] | None, reason: str
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Compute a call by the original's forward, and say so once for each reason."""
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"replace_moe: {reason}; under torch.compile only blocks that the kernels compute can run"
            )
        said = self.__dict__.setdefault("moe_said", set())
        if reason not in said:
            said.add(reason)
            warnings.warn(f"replace_moe: {reason}; the block's original forward computes it", stacklevel=6)
        original = super().forward
        if return_aux_loss and "return_aux_loss" not in inspect.signature(original).parameters:
            raise NotImplementedError(
                f"replace_moe: return_aux_loss: {reason}, and the original's forward has no such argument"
            )
        shift, scale, gate = modulation or (None, None, None)
        tokens = x if modulation is None else modulate(x, shift, scale)
        result = original(tokens, return_aux_loss=True) if return_aux_loss else original(tokens)
        y, *aux = result if return_aux_loss else (result,)
        self._require_gradients(tokens, y, reason)
        if modulation is not None:
            y = (x + gate[:, None] * y).to(x.dtype)
        return (y, *aux) if aux else y

    def _require_gradients(self, x: Tensor, y: Tensor, reason: str) -> None:
        wanted = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))
        if wanted and not y.requires_grad:
            raise RuntimeError(
                f"replace_moe: {reason}, and the original's forward gives no gradients "
                f"{'in training' if self.training else 'in eval'}; expected train(), or torch.no_grad()"
            )

    def expert_weights(self) -> tuple[tuple[list[Tensor] | None, ...], str, str, str]:
        """Return the four weights of `moe_mlp`, the activation, the layout and the backend."""
        try:
            return read(self, self.moe_config).weights, "swiglu", "gate_up", self.moe_config.backend
        except NotUnderstoodError as reason:
            raise ValueError(f"replace_moe: {reason}") from None

    def router(self) -> TokenChoice:
        """Return the router that top_k and alpha say at this moment."""
        return router_of(self, self.moe_config, len(self.experts))

    def extra_repr(self) -> str:
        config = self.moe_config
        try:
            gate_weight, weights, router = read(self, config)
            reason = unequal(config.path, weights, gate_weight)
        except NotUnderstoodError as error:
            reason = str(error)
        if reason:
            return f"backend=the original's forward ({reason})"
        (E, H), (gate_up, down, shared, _) = gate_weight.shape, weights
        sizes = E, H, down[0].shape[1], shared[0].shape[0] if shared else 0
        return f"router={router}, backend={describe_backend(config.backend, gate_up[0], *sizes, 'swiglu')}"

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        """Pickle, and so copy, as the original's class: the one of this block is made at run time."""
        return _rebuild, (original_class(self),), self.__dict__


@cache
def replaced_class(original: type[nn.Module]) -> type[MoEBlock]:
    """Return the class that a block of class `original` has after `replace_moe`: a subclass, of the same name."""
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": MoEBlock.__doc__}
    return type(original.__name__, (MoEBlock, original), names)


def original_class(block: MoEBlock) -> type[nn.Module]:
    """Return what a block's class was before `replace_moe`."""
    order = type(block).__mro__
    return order[order.index(MoEBlock) + 1]


def _rebuild(original: type[nn.Module]) -> MoEBlock:
    cls = replaced_class(original)
    return cls.__new__(cls)


def read(block: nn.Module, config: BlockConfig) -> Reading:
    """Read the weights and the routing of a block. Raises: NotUnderstoodError naming the module.

    Cost: 35 us at E = 8 and 224 at E = 64 where all layers are plain, on a busy machine (results/FACTS.md).
    """
    path, modules = config.path, block.__dict__["_modules"]
    experts = modules["experts"]._modules
    gate_up, down = _read_mlps(experts, f"{path}.experts", config.known)
    gate_weight = _gate_weight(modules["gate"], path, config.known)
    if len(experts) != gate_weight.shape[0]:
        raise NotUnderstoodError(
            f"{path}.experts: got {len(experts)}, expected {gate_weight.shape[0]} as gate.weight has"
        )
    shared = modules.get("shared_experts")
    shared_weights = (None, None) if shared is None else _read_mlps({"shared_experts": shared}, path, config.known)
    router = router_of(block, config, len(experts))
    return Reading(gate_weight, (gate_up, down, *shared_weights), router)


def _read_mlps(mlps: dict[str, nn.Module], path: str, known: frozenset[Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Return [gate_0, up_0, gate_1, ...] and [down_0, ...]."""
    ups, downs = [], []
    for name, mlp in mlps.items():
        if watched(mlp):
            refuse_watched(mlp, f"{path}.{name}")
        _check_known(mlp, path, name, known)
        inner = mlp.__dict__["_modules"]
        ups += inner["gate_proj"], inner["up_proj"]
        downs.append(inner["down_proj"])
    gate_up, down = plain_weights(ups), plain_weights(downs)
    if gate_up is None:
        names = [f"{path}.{name}.{kind}" for name in mlps for kind in KINDS[:2]]
        gate_up = [weight_of(module, where) for module, where in zip(ups, names, strict=True)]
    if down is None:
        down = [weight_of(module, f"{path}.{name}.{KINDS[2]}") for module, name in zip(downs, mlps, strict=True)]
    return gate_up, down


def _check_known(module: nn.Module, path: str, name: str, known: frozenset[Any]) -> None:
    """Refuse a module whose forward, or whose activation, is not one that `replace_moe` has looked at."""
    if type(module).forward not in known or activation_of(module) not in known:
        raise NotUnderstoodError(f"{path}.{name}: got {type(module).__name__}, another module than at replace_moe")


def activation_of(mlp: nn.Module) -> Any:
    """Return what tells an expert's activation from others: the class of a module, else the function; None without."""
    own = mlp.__dict__
    if "act_fn" in own:
        return own["act_fn"]
    module = own["_modules"].get("act_fn")
    return None if module is None else type(module)


def _gate_weight(gate: nn.Module, path: str, known: frozenset[Any]) -> Tensor:
    own = gate.__dict__
    if isinstance(gate, nn.Linear) or "base_layer" in own["_modules"]:
        return weight_of(gate, f"{path}.gate")
    _check_known(gate, path, "gate", known)
    if watched(gate):
        refuse_watched(gate, f"{path}.gate")
    weight = own["_parameters"].get("weight")
    return plain(gate.weight if weight is None else weight, f"{path}.gate")


def router_of(block: nn.Module, config: BlockConfig, num_experts: int) -> TokenChoice:
    """Read the routing from the attributes of a block and its gate. Raises: NotUnderstoodError naming one."""
    gate, path = block._modules["gate"], config.path
    for owner in (gate, block):
        own, cls = owner.__dict__, type(owner)
        for name, value in EXPECTED.items():
            if (name in own or hasattr(cls, name)) and (got := getattr(owner, name)) != value:
                where = f"{path}.gate" if owner is gate else path
                raise NotUnderstoodError(f"{where}.{name}: got {got!r}, expected {value!r}")
    top_k, of_gate = _attribute(block, "num_experts_per_tok"), _attribute(gate, "top_k")
    top_k = of_gate if top_k is None else top_k
    if top_k is None or of_gate not in (None, top_k) or not 1 <= top_k <= num_experts:
        found = sorted({_attribute(block, "num_experts_per_tok"), of_gate} - {None})
        raise NotUnderstoodError(
            f"{path}: got num_experts_per_tok or gate.top_k {found}, expected one in [1, {num_experts}]"
        )
    alpha = _attribute(gate, "alpha", _MISSING)
    alpha = _attribute(block, "alpha") if alpha is _MISSING else alpha
    make = _router.__wrapped__ if torch.compiler.is_compiling() else _router  # Dynamo warns about caches
    alpha = AUX_ALPHA if alpha is None else float(alpha)
    return make(config.router_class, top_k, alpha, config.aux_loss_mode)


@cache
def _router(router_class: type[TokenChoice], top_k: int, alpha: float, mode: str) -> TokenChoice:
    return router_class(top_k, alpha, mode)


def _attribute(module: nn.Module, name: str, default: Any = None) -> Any:
    """getattr that does not pay for nn.Module's search where there is nothing of the name."""
    if name in module.__dict__:
        return module.__dict__[name]
    return getattr(module, name) if hasattr(type(module), name) else default


def unequal(path: str, weights: tuple[list[Tensor] | None, ...], like: Tensor) -> str:
    """Say which expert differs from the first in shape, dtype or device; "" where all agree."""
    gate_up, down = weights[:2]
    for kind, tensors, each in (("gate_proj, up_proj", gate_up, 2), ("down_proj", down, 1)):
        for position, tensor in enumerate(tensors):
            first = tensors[0]
            got, expected = ((t.shape, t.dtype, t.device) for t in (tensor, first))
            if got != expected:
                what = " ".join(map(str, (tuple(got[0]), *got[1:])))
                return f"{path}.experts.{position // each} ({kind}): got {what}, other than experts.0"
    for kind in (*weights, [like]):
        for tensor in kind or ():
            if (tensor.dtype, tensor.device) != (like.dtype, like.device):
                return f"{path}: got weights in {tensor.dtype} on {tensor.device} beside {like.dtype} on {like.device}"
    return ""
