"""DiT-MoE, and whoever has its attributes: softmax over all experts, raw weights of the best, one shared expert."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...layer import moe_forward
from ...ops.adaln import modulate
from ...routing import TokenChoice
from ..block import BlockConfig, MoEBlock
from ..family import Family
from ..linear import NotUnderstoodError, plain, weight_of
from ..reading import Experts, Reader, expect_silu, unequal

KINDS = ("gate_proj", "up_proj", "down_proj")
EXPECTED = {"scoring_func": "softmax", "norm_topk_prob": False, "seq_aux": False}  # of the gate, or of the block
AUX_ALPHA = 0.01
_MISSING = object()


class DiTMoEBlock(MoEBlock):
    """A DiT-MoE block after `replace_moe`; it also takes what MoELayer takes: the loss, and adaLN around it."""

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
            gate_weight, experts, router = read(self, config)
        except NotUnderstoodError as reason:
            return self._around_the_original(str(reason), x, return_aux_loss, modulation)
        try:
            return moe_forward(
                x, gate_weight, experts.weights, "swiglu", "gate_up", config.backend, None, router,
                self.training, return_aux_loss, config.recompute, modulation,
            )  # fmt: skip
        except (TypeError, ValueError):
            reason = unequal(config.path, experts.weights, gate_weight.dtype, gate_weight.device)
            if not reason:
                raise
        return self._around_the_original(reason, x, return_aux_loss, modulation)

    def _around_the_original(
        self, reason: str, x: Tensor, return_aux_loss: bool, modulation: tuple[Tensor, Tensor, Tensor] | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        if return_aux_loss and "return_aux_loss" not in inspect.signature(super(MoEBlock, self).forward).parameters:
            raise NotImplementedError(
                f"replace_moe: return_aux_loss: {reason}, and the original's forward has no such argument"
            )
        asked = {"return_aux_loss": True} if return_aux_loss else {}
        if modulation is None:
            return self.by_the_original(reason, x, **asked)
        shift, scale, gate = modulation
        result = self.by_the_original(reason, modulate(x, shift, scale), **asked)
        y, *aux = result if return_aux_loss else (result,)
        y = (x + gate[:, None] * y).to(x.dtype)
        return (y, *aux) if aux else y

    def router(self) -> TokenChoice:
        """Return the router that top_k and alpha say at this moment."""
        return router_of(self, self.moe_config, len(self.experts))

    def extra_repr(self) -> str:
        try:
            return f"router={self.router()}, {super().extra_repr()}"
        except NotUnderstoodError as reason:
            return f"backend=the original's forward ({reason})"


class DiTMoE(Family):
    """Found by structure, whatever the class is called."""

    name = "DiT-MoE"
    block_class = DiTMoEBlock
    expected = "modules with gate.weight and experts, a ModuleList of modules with gate_proj, up_proj and down_proj"

    def finds(self, module: nn.Module) -> bool:
        experts = getattr(module, "experts", None)
        if not isinstance(experts, nn.ModuleList) or not len(experts):
            return False
        has_gate = isinstance(getattr(getattr(module, "gate", None), "weight", None), Tensor)
        return has_gate and all(hasattr(experts[0], kind) for kind in KINDS)

    def check(self, block: nn.Module, read: Reader) -> None:
        path = read.path
        if block.gate.weight.dim() != 2:
            raise ValueError(f"{path}.gate.weight: got shape {tuple(block.gate.weight.shape)}, expected (E, H)")
        mlps = {f"{path}.experts.{e}": expert for e, expert in enumerate(block.experts)}
        shared = getattr(block, "shared_experts", None)
        if shared is not None:
            mlps[f"{path}.shared_experts"] = shared
        for where, mlp in mlps.items():
            for kind in KINDS:
                if kind not in mlp._modules:
                    got = type(getattr(mlp, kind, None)).__name__
                    raise TypeError(f"{where}.{kind}: got {got}, expected an nn.Linear")
            expect_silu(mlp, where)
        experts = self.experts(block, read)
        gate_weight = _gate_weight(block.gate, read, len(experts.down))
        reason = unequal(path, experts.weights, gate_weight.dtype, gate_weight.device)
        if reason:
            raise ValueError(f"{reason}; expected experts of one shape, dtype and device")
        _expect_shapes(path, experts, gate_weight.shape[1])
        routing_of(block, path, len(experts.down))

    def experts(self, block: nn.Module, read: Reader) -> Experts:
        return Experts(*read.mlps(block, "experts", KINDS), *read.mlps(block, "shared_experts", KINDS))


def _expect_shapes(path: str, experts: Experts, hidden_size: int) -> None:
    H = hidden_size
    for name, gate_up, down in (("experts", *experts[:2]), ("shared_experts", *experts[2:4])):
        if gate_up is None:
            continue
        got = [tuple(t.shape) for t in (*gate_up[:2], down[0])]
        I = got[0][0]
        if got != [(I, H), (I, H), (H, I)]:
            raise ValueError(f"{path}.{name}: got weights {got}, expected (I, H), (I, H), (H, I) with H = {H}")


class Reading(NamedTuple):
    """What a block's modules hold at one moment."""

    gate_weight: Tensor
    experts: Experts
    router: TokenChoice


def read(block: nn.Module, config: BlockConfig) -> Reading:
    """Read the weights and the routing of a block. Raises: NotUnderstoodError naming the module.

    Cost: 24 us at E = 8 and 105 at E = 64 where all layers are plain nn.Linear (results/FACTS.md).
    """
    experts = config.family.experts(block, config.read)
    num_experts = len(experts.down)
    gate_weight = _gate_weight(block.__dict__["_modules"]["gate"], config.read, num_experts)
    return Reading(gate_weight, experts, router_of(block, config, num_experts))


def _gate_weight(gate: nn.Module, read: Reader, num_experts: int) -> Tensor:
    own, path = gate.__dict__, read.where("gate")
    if isinstance(gate, nn.Linear) or "base_layer" in own["_modules"]:
        weight = weight_of(gate, path)
    else:
        read.check(gate, path)
        weight = own["_parameters"].get("weight")
        weight = plain(gate.weight if weight is None else weight, path)
    if num_experts != weight.shape[0]:
        expected = f"{weight.shape[0]} as gate.weight has"
        raise NotUnderstoodError(f"{read.where('experts')}: got {num_experts}, expected {expected}")
    return weight


def router_of(block: nn.Module, config: BlockConfig, num_experts: int) -> TokenChoice:
    """Return the router that the attributes of a block and its gate say. Raises: NotUnderstoodError naming one."""
    compiling = torch.compiler.is_compiling()
    top_k, alpha = routing_of(block, "" if compiling else config.path, num_experts)
    make = _router.__wrapped__ if compiling else _router  # Dynamo warns about caches
    return make(config.router_class, top_k, alpha, config.aux_loss_mode)


def routing_of(block: nn.Module, path: str, num_experts: int) -> tuple[int, float]:
    """Return top_k and alpha. Raises: NotUnderstoodError naming an attribute that says otherwise."""
    gate = block._modules["gate"]
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
    return top_k, AUX_ALPHA if alpha is None else float(alpha)


@cache
def _router(router_class: type[TokenChoice], top_k: int, alpha: float, mode: str) -> TokenChoice:
    return router_class(top_k, alpha, mode)


def _attribute(module: nn.Module, name: str, default: Any = None) -> Any:
    """getattr that does not pay for nn.Module's search where there is nothing of the name."""
    if name in module.__dict__:
        return module.__dict__[name]
    return getattr(module, name) if hasattr(type(module), name) else default
