"""replace_moe: the kernels of this project inside somebody else's DiT-MoE."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import weights
from ..backends import registry
from ..layer import describe_backend, moe_forward
from ..routing import TokenChoice

KINDS = ("gate_proj", "up_proj", "down_proj")


def replace_moe(model: nn.Module, backend: str = "auto", recompute: bool = False) -> int:
    """Swap, in place, every DiT-MoE block of a model for one that computes with this project.

    A block is a module with `gate.weight` (E, H), `experts`, an nn.ModuleList of modules with bias-free nn.Linear
    gate_proj, up_proj and down_proj, optionally `shared_experts` of the same kind, and `num_experts_per_tok` or
    `gate.top_k`. Its class is not imported. The module objects, their hooks, their state_dict() keys and values, their
    named_parameters() and the Parameter objects stay, so an optimizer or EMA made before goes on working. What changes
    is the block's class, hence its forward, and the storage: parameters become views of one slab per kind of matrix.
    Train and eval take the same path, and both give gradients (the original gives none in eval). The modules inside a
    block (`gate`, the experts and their nn.Linear) only hold parameters from then on: their forward is never called, so
    a hook that is registered on one of them afterwards never runs, and nothing says so. Hooks on the block itself run
    with its forward.

    Args:
        model: any module, the block itself included.
        backend: "auto" or a name out of `backends()`.
        recompute: keep no activations for backward, compute them there again: see `moe_mlp`.
    Returns: the number of blocks swapped. Doing it again is allowed: it takes over `backend` and `recompute`, and mends
        the slabs.
    Raises: ValueError where no block is found; ValueError, TypeError naming the module path of a block that is not as
        above (biases, unequal experts, other activations, hooks inside ...); RuntimeError for a backend that cannot run
        here. Nothing is changed where it raises.
    Cost: one copy of the expert weights, one block at a time.
    Source: the structure in the DiT-MoE repository; reference.moe.SparseMoeBlock has it too.
    """
    registry.check_name(backend)
    blocks = {path: module for path, module in model.named_modules() if _looks_like_a_block(module)}
    if not blocks:
        raise ValueError(
            f"model: found no DiT-MoE block in {type(model).__name__}, expected modules with gate.weight and experts, "
            "a ModuleList of modules with gate_proj, up_proj and down_proj"
        )
    routers = [_check_block(path or type(block).__name__, block) for path, block in blocks.items()]
    _check_untied(blocks)
    for block, router in zip(blocks.values(), routers, strict=True):
        block.moe_config = BlockConfig(router, backend, recompute)
        block.__class__ = DiTMoEBlock
        block.rehome()
    return len(blocks)


@dataclass(frozen=True)
class BlockConfig:
    """What a swapped block keeps of the original's attributes."""

    router: TokenChoice
    backend: str
    recompute: bool


class DiTMoEBlock(nn.Module):
    """A DiT-MoE block after `replace_moe`: the submodules and parameters of the original, this project's forward.

    At each forward outside torch.compile the data pointers are compared, and parameters that something re-allocated
    (deepcopy, .to(), load_state_dict(assign=True), unpickling) get a new slab. A compiled forward cannot do that: its
    op raises with the reason, and `rehome` or another `replace_moe` mends it. torch.save writes a slab once; plain
    pickle writes it again for each of its parameters.
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
        kinds, config = self._weights(), self.moe_config
        if not torch.compiler.is_compiling():
            self._mend(kinds)
        return moe_forward(
            x, self.gate.weight, kinds, "swiglu", config.backend, config.router, self.training, return_aux_loss,
            config.recompute, modulation,
        )  # fmt: skip

    def expert_weights(self) -> tuple[tuple[list[nn.Parameter] | None, ...], str, str]:
        """Return the four weights of `moe_mlp` as lists, the activation and the backend."""
        self.rehome()
        return self._weights(), "swiglu", self.moe_config.backend

    def rehome(self) -> bool:
        """Make the parameters views of one slab per kind of matrix where they are not; return whether any moved."""
        return self._mend(self._weights())

    def _mend(self, kinds: tuple[list[nn.Parameter] | None, ...]) -> bool:
        broken = [kind for kind in kinds if kind is not None and weights.slab_problem(kind)]
        if broken:
            _refuse_fsdp(self)
        return any([weights.rehome(kind) for kind in broken])

    def _weights(self) -> tuple[list[nn.Parameter] | None, ...]:
        gate_up, down = [], []
        for expert in self.experts:
            gate_up += expert.gate_proj.weight, expert.up_proj.weight
            down.append(expert.down_proj.weight)
        shared = getattr(self, "shared_experts", None)
        if shared is None:
            return gate_up, down, None, None
        return gate_up, down, [shared.gate_proj.weight, shared.up_proj.weight], [shared.down_proj.weight]

    def extra_repr(self) -> str:
        H, I = self.experts[0].down_proj.weight.shape
        shared = getattr(self, "shared_experts", None)
        Is = 0 if shared is None else shared.down_proj.weight.shape[1]
        E, config = len(self.experts), self.moe_config
        chosen = describe_backend(config.backend, self.gate.weight, E, H, I, Is, "swiglu")
        return f"router={config.router}, backend={chosen}"


def _refuse_fsdp(block: nn.Module) -> None:
    """Raise where fully_shard manages the parameters: it would not notice that they moved, and train stale copies."""
    if "torch.distributed.fsdp" not in sys.modules:
        return
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp import FSDPModule

    for module in list(_module_state_mapping):
        if isinstance(module, FSDPModule) and any(child is block for child in module.modules()):
            raise RuntimeError(
                "replace_moe: FSDP shards the parameters of a replaced block, which have to be views of one slab; "
                "expected whole parameters: use DDP, or give FSDP the block's parameters as ignored_params"
            )


def _looks_like_a_block(module: nn.Module) -> bool:
    experts = getattr(module, "experts", None)
    if not isinstance(experts, nn.ModuleList) or not len(experts):
        return False
    has_gate = isinstance(getattr(getattr(module, "gate", None), "weight", None), Tensor)
    return has_gate and all(hasattr(experts[0], kind) for kind in KINDS)


def _check_block(path: str, block: nn.Module) -> TokenChoice:
    if "forward" in vars(block):
        raise ValueError(f"{path}: forward was patched on the instance, expected a block that uses its class's")
    gate_weight = block.gate.weight
    if gate_weight.dim() != 2:
        raise ValueError(f"{path}.gate.weight: got shape {tuple(gate_weight.shape)}, expected (E, H)")
    E, H = gate_weight.shape
    if len(block.experts) != E:
        raise ValueError(f"{path}.experts: got {len(block.experts)} experts, expected {E} (the rows of gate.weight)")
    known = {"gate.weight"}
    first = _check_mlp(f"{path}.experts.0", block.experts[0], H, gate_weight)
    for e, expert in enumerate(block.experts):
        I = _check_mlp(f"{path}.experts.{e}", expert, H, gate_weight)
        if I != first:
            raise ValueError(f"{path}.experts.{e}: got intermediate size {I}, expected {first} as in experts.0")
        known |= {f"experts.{e}.{kind}.weight" for kind in KINDS}
    shared = getattr(block, "shared_experts", None)
    if shared is not None:
        _check_mlp(f"{path}.shared_experts", shared, H, gate_weight)
        known |= {f"shared_experts.{kind}.weight" for kind in KINDS}
    _check_extras(path, block, known)
    return _router(path, block, E)


def _check_untied(blocks: dict[str, nn.Module]) -> None:
    owners: dict[int, str] = {}
    for path, block in blocks.items():
        for name, parameter in block.named_parameters():
            owner = owners.setdefault(id(parameter), f"{path}.{name}")
            if owner != f"{path}.{name}":
                raise ValueError(f"{path}.{name}: got the parameter of {owner}, expected one of its own")


def _check_mlp(path: str, mlp: nn.Module, H: int, like: Tensor) -> int:
    """Check one expert; return its intermediate size."""
    matrices = []
    for kind in KINDS:
        linear = getattr(mlp, kind, None)
        if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
            raise TypeError(f"{path}.{kind}: got {type(linear).__name__}, expected a plain nn.Linear")
        if linear.bias is not None:
            raise ValueError(f"{path}.{kind}: got a bias, expected none")
        weight = linear.weight
        if not isinstance(weight, nn.Parameter) or type(weight.data) is not Tensor:
            raise TypeError(f"{path}.{kind}.weight: got {type(weight).__name__}, expected a plain nn.Parameter")
        if (weight.dtype, weight.device) != (like.dtype, like.device):
            raise TypeError(
                f"{path}.{kind}.weight: got {weight.dtype} on {weight.device}, expected {like.dtype} on {like.device} "
                "(as gate.weight)"
            )
        matrices.append(tuple(weight.shape))
    I = matrices[0][0]
    if matrices != [(I, H), (I, H), (H, I)]:
        raise ValueError(f"{path}: got weights {matrices}, expected (I, H), (I, H), (H, I) with H = {H}")
    activation = getattr(mlp, "act_fn", None)
    probe = torch.linspace(-4, 4, 9)
    if activation is not None and not torch.equal(activation(probe.clone()), F.silu(probe)):
        raise ValueError(f"{path}.act_fn: got {activation}, expected SiLU")
    return I


def _check_extras(path: str, block: nn.Module, known: set[str]) -> None:
    tensors = {name for name, _ in (*block.named_parameters(), *block.named_buffers())}
    if tensors != known:
        raise ValueError(f"{path}: got parameters or buffers {sorted(tensors ^ known)} too many or too few")
    for name, module in block.named_modules():
        if name and (module._forward_hooks or module._forward_pre_hooks):
            raise ValueError(f"{path}.{name}: got forward hooks, which would no longer run; expected none")


def _router(path: str, block: nn.Module, E: int) -> TokenChoice:
    """Read the routing from the attributes of the block or its gate."""
    if isinstance(block, DiTMoEBlock):
        return block.moe_config.router
    gate = block.gate
    expected = {"scoring_func": "softmax", "norm_topk_prob": False, "seq_aux": False}
    for name, value in expected.items():
        got = getattr(gate, name, value)
        if got != value:
            raise ValueError(f"{path}.gate.{name}: got {got!r}, expected {value!r}")
    top_k = {getattr(block, "num_experts_per_tok", None), getattr(gate, "top_k", None)} - {None}
    if len(top_k) != 1 or not 1 <= min(top_k) <= E:
        raise ValueError(f"{path}: got num_experts_per_tok or gate.top_k {sorted(top_k)}, expected one in [1, {E}]")
    alpha = getattr(gate, "alpha", getattr(block, "alpha", None))
    return TokenChoice(top_k.pop()) if alpha is None else TokenChoice(top_k.pop(), float(alpha))
