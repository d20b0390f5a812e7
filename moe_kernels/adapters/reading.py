"""The matrices of a block's experts, read from its modules as they are at this moment."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..weights import Biases
from ..weights.layouts import in_two_stacks
from .linear import NotUnderstoodError, bias_of, plain, refuse_watched, watched, weight_of

Matrices = Sequence[Tensor] | None


class Experts(NamedTuple):
    """The weights of a block as `moe_mlp` takes them: a kind is one stacked tensor in a list, or all its matrices;
    gate_up may be [gate_proj, up_proj], two stacks."""

    gate_up: Sequence[Tensor]
    down: Sequence[Tensor]
    shared_gate_up: Matrices = None
    shared_down: Matrices = None
    activation: str = "swiglu"
    layout: str = "gate_up"
    biases: Biases | None = None  # as `Reader.biases` gives them

    @property
    def weights(self) -> tuple[Matrices, ...]:
        return self[:4]

    @property
    def tensors(self) -> tuple[Matrices, ...]:
        """Weights, and biases."""
        return *self.weights, *(self.biases or ())


@dataclass(frozen=True)
class Reader:
    """Reads modules of the block at `path`; `known` are forwards and activations that `replace_moe` has looked at.

    What does more than its weights show (hooks, patched forwards, other classes than before, quantised layers ...)
    raises NotUnderstoodError: the block's own forward then computes the call.
    """

    path: str
    known: frozenset[Any]

    def mlps(
        self, block: nn.Module, name: str, kinds: tuple[str, ...], biased: bool = False
    ) -> tuple[list[Tensor], list[Tensor]] | tuple[None, None]:
        """Return [gate_0, up_0, gate_1, ...] and [down_0, ...] of the MLPs in a ModuleList, or of a single one.

        kinds: the linear layers' names, (gate, up, down) or (up, down). None where the block has nothing of the name.
        biased: layers may have biases, which the family asks `biases` for.
        """
        mlps = self._mlps(block, name)
        if not mlps:
            return None, None
        plain = plain_weights(mlps.values(), kinds, self.known, biased)
        if plain is not None:
            return plain
        paths = {key: self._path(name, key) for key in mlps}
        for key, mlp in mlps.items():
            self.check(mlp, paths[key])
        layers = [(mlp._modules.get(kind), f"{paths[key]}.{kind}") for key, mlp in mlps.items() for kind in kinds]
        weights = [weight_of(layer, where, biased) for layer, where in layers]
        return split(weights, len(kinds))

    def _mlps(self, block: nn.Module, name: str) -> dict[str, nn.Module]:
        """Return the MLPs in a ModuleList by their index, or a single one by ""."""
        module = self.find(block, name)
        if type(module) is nn.ModuleList:
            return module._modules
        return {} if module is None else {"": module}

    def _path(self, name: str, *inside: str) -> str:
        return ".".join(filter(None, (self.where(name), *inside)))

    def biases(self, block: nn.Module, names: tuple[str, ...], kinds: tuple[str, ...]) -> Biases | None:
        """Return the biases of MLPs that `mlps` has understood: of the routed ones, and of a shared one.

        Of a kind all layers have one, or none.
        """
        found: list[list[Tensor] | None] = []
        for name in names:
            mlps = self._mlps(block, name)
            for layers in (kinds[:-1], kinds[-1:]) if mlps else ():
                places = [(key, layer) for key in mlps for layer in layers]
                vectors = [bias_of(mlps[key]._modules[layer], self._path(name, key, layer)) for key, layer in places]
                given = [vector is not None for vector in vectors]
                if any(given) and not all(given):
                    where = self._path(name, *places[given.index(False)])
                    raise NotUnderstoodError(f"{where}: got no bias, expected one as in others, or in none")
                found.append(vectors if all(given) else None)
        return Biases(*found) if any(found) else None

    def refuse_dropout(self, block: nn.Module, name: str, layer: str) -> None:
        """Refuse MLPs, read by `mlps`, whose dropout `layer` is at work."""
        for key, mlp in self._mlps(block, name).items():
            dropout = mlp._modules[layer]
            if dropout.training and dropout.p:
                where = self._path(name, key, layer)
                raise NotUnderstoodError(f"{where}: got {dropout} in training, expected none at work")

    def gelu(self, block: nn.Module, names: tuple[str, ...], layer: str) -> str:
        """Return the form of GELU that all MLPs have in `layer`: an activation of `moe_mlp`.

        Raises: NotUnderstoodError for another activation, or two forms.
        """
        activations = [mlp._modules.get(layer) for name in names for mlp in self._mlps(block, name).values()]
        forms = {act.approximate if type(act) is nn.GELU else f"{act}" for act in activations}
        if not forms <= {"none", "tanh"} or len(forms) > 1:
            raise NotUnderstoodError(
                f"{self.where(names[0])}: got {layer} {sorted(forms)}, expected one form of nn.GELU in all"
            )
        return "gelu_tanh" if forms == {"tanh"} else "gelu"

    def linear(self, block: nn.Module, name: str) -> Tensor:
        """Return W of a linear layer, LoRA included."""
        return weight_of(self.find(block, name), self.where(name))

    def parameter(self, block: nn.Module, name: str) -> Tensor:
        """Return a parameter, of the block or of a module in it that is as it was; a parametrized one as computed."""
        owner_name, _, last = name.rpartition(".")
        owner, where = block, self.where(name)
        if owner_name:
            owner = self.find(block, owner_name)
            self.check(owner, where.rpartition(".")[0])
        weight = owner.__dict__["_parameters"].get(last)
        weight = getattr(owner, last, None) if weight is None else weight
        if not isinstance(weight, Tensor):
            raise NotUnderstoodError(f"{where}: got {type(weight).__name__}, expected a parameter")
        return plain(weight, where)

    def where(self, name: str) -> str:
        """Return where a module is in the model; in the block alone under torch.compile, which would guard on it."""
        return name if torch.compiler.is_compiling() else f"{self.path}.{name}"

    def check(self, module: nn.Module | None, path: str) -> None:
        """Refuse a module whose forward, or whose activation, is not one that `replace_moe` has looked at."""
        if module is None:
            raise NotUnderstoodError(f"{path}: got None, expected a module")
        if watched(module):
            refuse_watched(module, path)
        if type(module).forward not in self.known or activation_of(module) not in self.known:
            raise NotUnderstoodError(f"{path}: got {type(module).__name__}, another module than at replace_moe")

    def find(self, block: nn.Module, name: str) -> nn.Module | None:
        """Return a module by its dotted name; those on the way are checked, for their forward is not called."""
        if "." not in name:
            return block.__dict__["_modules"].get(name)
        module = block
        *outer, last = name.split(".")
        for part in outer:
            module = module.__dict__["_modules"].get(part)
            if not isinstance(module, (nn.ModuleList, nn.Sequential)):
                self.check(module, f"{self.where(name)}: {part}")
        return module.__dict__["_modules"].get(last)


def plain_weights(
    mlps: Iterable[nn.Module], kinds: tuple[str, ...], known: frozenset[Any], biased: bool
) -> tuple[list[Tensor], list[Tensor]] | None:
    """Return what `Reader.mlps` does, of MLPs of plain nn.Linear; None where anything is unusual, or missing.

    What `Reader.check` and `weight_of` look at, without a call and past nn.Module's own slow ways to an attribute: this
    runs in every forward.
    """
    linear, parameter = nn.Linear, nn.Parameter
    weights: list[Tensor] = []
    try:
        for mlp in mlps:
            own = mlp.__dict__
            inner = own["_modules"]
            if (
                own["_forward_hooks"]
                or own["_forward_pre_hooks"]
                or own["_backward_hooks"]
                or own["_backward_pre_hooks"]
                or "forward" in own
                or type(mlp).forward not in known
                or (own["act_fn"] if "act_fn" in own else type(inner.get("act_fn"))) not in known
            ):
                return None
            for kind in kinds:
                layer = inner[kind]
                own = layer.__dict__
                parameters = own["_parameters"]
                weight = parameters["weight"]
                if (
                    own["_forward_hooks"]
                    or own["_forward_pre_hooks"]
                    or own["_backward_hooks"]
                    or own["_backward_pre_hooks"]
                    or "forward" in own
                    or type(layer) is not linear
                    or type(weight) is not parameter
                    or (parameters["bias"] is not None and not biased)
                ):
                    return None
                weights.append(weight)
    except (AttributeError, KeyError):  # a None in its place, or no such place
        return None
    return split(weights, len(kinds))


def split(weights: list[Tensor], each: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return the weights of MLPs of `each` layers as those of all but the last layers, and of the last ones."""
    down = weights[each - 1 :: each]
    del weights[each - 1 :: each]
    return weights, down


def known_of(block: nn.Module) -> frozenset[Any]:
    """Return what a Reader is to know of a block: forwards and activations of all modules inside."""
    inner = [module for module in block.modules() if module is not block]
    return frozenset({type(m).forward for m in inner} | {activation_of(m) for m in (block, *inner)} | {type(None)})


def activation_of(mlp: nn.Module) -> Any:
    """Return what tells an expert's activation from others: the class of a module (None's without), or the function."""
    own = mlp.__dict__
    return own["act_fn"] if "act_fn" in own else type(own["_modules"].get("act_fn"))


def halves(matrices: Sequence[Tensor], up_first: bool = False) -> list[Tensor]:
    """Return [gate_0, up_0, gate_1, ...] of matrices or vectors whose halves are [gate; up], or [up; gate]."""
    pairs = (both.chunk(2) for both in matrices)
    return [half for pair in pairs for half in (pair[::-1] if up_first else pair)]


def unequal(path: str, weights: tuple[Matrices, ...], dtype: torch.dtype, device: torch.device) -> str:
    """Say which expert differs from the first in shape, dtype or device, or all from what is given; "" if none does."""
    gate_up, down = weights[:2]
    each = max(len(gate_up) // len(down), 1)
    for kind, tensors, count in (("gate_proj, up_proj", gate_up, each), ("down_proj", down, 1)):
        for position, tensor in enumerate(tensors):
            first = tensors[0]
            got, expected = ((t.shape, t.dtype, t.device) for t in (tensor, first))
            if got != expected:
                what = " ".join(map(str, (tuple(got[0]), *got[1:])))
                if in_two_stacks(tensors):
                    return f"{path}: up_proj: got {what}, other than gate_proj"
                return f"{path}.experts.{position // count} ({kind}): got {what}, other than experts.0"
    for tensor in (tensor for kind in weights for tensor in kind or ()):
        if (tensor.dtype, tensor.device) != (dtype, device):
            return f"{path}: got weights in {tensor.dtype} on {tensor.device} beside {dtype} on {device}"
    return ""


def expect_silu(mlp: nn.Module, path: str) -> None:
    """Refuse an MLP whose `act_fn` is another than SiLU; one without computes what the trial call shows."""
    activation = getattr(mlp, "act_fn", None)
    if activation is not None and not computes(activation, F.silu):
        raise ValueError(f"{path}.act_fn: got {activation}, expected SiLU")


def computes(activation: Callable[[Tensor], Tensor], function: Callable[[Tensor], Tensor]) -> bool:
    """Say whether an activation gives the same bits as a function of torch."""
    with torch.no_grad():  # the model may be on meta, and so the default device
        probe = torch.linspace(-4, 4, 9, device="cpu")
        return torch.equal(activation(probe.clone()), function(probe))
