"""A family of models: how its blocks are recognised, where its experts' weights lie, and how it routes."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from ..plan import RoutingPlan
from .reading import Experts, Reader


class Routed(NamedTuple):
    """What a family makes of the arguments of a block's forward; `extra` is for its own `result`."""

    tokens: Tensor  # (T, H), what the experts see
    plan: RoutingPlan
    extra: Any = None


class Family:
    """One family; `register_family` makes it known to `replace_moe`. Subclasses fill in the structure, nothing else.

    Classes are named, never imported: a model's package need not be there.
    """

    name: ClassVar[str]
    classes: ClassVar[tuple[str, ...]] = ()  # names of the blocks' classes
    attributes: ClassVar[tuple[tuple[str, Any], ...]] = ()  # what a block must have: (dotted name, type or types)
    parts: ClassVar[tuple[str, ...]] = ("gate", "experts", "shared_experts")  # whose parameters the block computes with
    dropouts: ClassVar[tuple[str, ...]] = ()  # of MLPs, that `experts` refuses while they are at work
    block_class: ClassVar[type | None] = None  # where a block offers more than the original's forward

    @property
    def expected(self) -> str:
        """Say what was looked for, for errors."""
        return f"class {' or '.join(self.classes)}"

    def finds(self, module: nn.Module) -> bool:
        """Say whether a module is a block of this family, by class, that of an ancestor included."""
        return any(cls.__name__ in self.classes for cls in type(module).__mro__)

    def check(self, block: nn.Module, read: Reader) -> None:
        """Refuse a block that is not as the family's are; once, at `replace_moe`.

        Raises: ValueError, TypeError, NotUnderstoodError naming path and attribute.
        """
        for name, kind in self.attributes:
            owner = block
            for part in name.split("."):
                owner = getattr(owner, part, None)
            if not isinstance(owner, kind):
                kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
                raise ValueError(
                    f"{read.path}.{name}: got {type(owner).__name__} in a {type(block).__name__}, expected {kinds} "
                    f"as {self.name} has"
                )

    def experts(self, block: nn.Module, read: Reader) -> Experts:
        """Return the weights at this moment; called by every forward. Raises: NotUnderstoodError naming the module."""
        raise NotImplementedError

    def route(self, block: nn.Module, backend: str, x: Tensor, *args: Any, **kwargs: Any) -> Routed:
        """Return tokens and plan for the arguments of the block's forward. Raises: NotUnderstoodError."""
        raise NotImplementedError

    def result(self, block: nn.Module, y: Tensor, x: Tensor, extra: Any) -> Any:
        """Return what the block's forward returns, from y (T, H), the shared expert included."""
        return y.view(x.shape).to(x.dtype)

    def trial(self, block: nn.Module, x: Tensor) -> tuple[Any, ...] | None:
        """Return the arguments of a trial call for random tokens x (2, 8, H), x alone unless a family takes more.

        None where a copy of the block cannot be tried.
        """
        return (x,)

    def differentiates(self, block: nn.Module) -> bool:
        """Say whether the original's forward, in the state that the block is in, gives all gradients."""
        return True

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle, and so copy, as the registered one: blocks hold their family."""
        return family_named, (self.name,)


_families: dict[str, Family] = {}


def register_family(family: Family) -> Family:
    """Make a family known to `replace_moe`, in front of those that are; one of the same name is taken out.

    Args:
        family: an instance of a subclass of Family, with a `name`.
    Returns: the family.
    Raises: TypeError for anything else.
    """
    if not isinstance(family, Family) or not isinstance(getattr(family, "name", None), str):
        raise TypeError(f"family: got {family!r}, expected an instance of a Family with a name")
    others = {name: known for name, known in _families.items() if name != family.name}
    _families.clear()
    _families.update({family.name: family} | others)
    return family


def known_families() -> tuple[Family, ...]:
    """Return the families that `replace_moe` knows, in the order in which it asks them."""
    return tuple(_families.values())


def family_named(name: str) -> Family:
    """Return a registered family. Raises: ValueError naming those there are."""
    if name not in _families:
        raise ValueError(f"family: got {name!r}, expected one of {', '.join(map(repr, _families))}: register_family")
    return _families[name]


def family_of(module: nn.Module) -> Family | None:
    """Return the first family that finds a module to be a block of its own."""
    config = module.__dict__.get("moe_config")
    return config.family if config else next((f for f in _families.values() if f.finds(module)), None)
