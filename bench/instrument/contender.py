"""Who is timed: a backend of ours, a peer, somebody's library; what it takes, and how exact it has to be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from bench.instrument import workloads
from bench.instrument.cases import BACKENDS, DTYPES, MODES, Case
from bench.instrument.store import DISTRIBUTION
from bench.instrument.verify import BOUND

# Other people's kernels may trade accuracy for speed (zentorch's fp32 SiLU: 4.1 times plain torch's error): to 8 times
# plain torch's error they are timed, with the error beside the time.
FOREIGN_BOUND = 8.0


def nothing(*_: Any) -> None:
    """Have nothing to say against it."""


@dataclass(frozen=True)
class Contender:
    """One who is timed. `name` stands in case ids (no hyphen), `title` in tables.

    build: from a case to what runs. package: the distribution whose code computes; ours are held to the project's own
        rule. library: the folder of .peers that its process imports from.
    missing: says what is not installed here. refuses: says why it does not run a case on this machine.
    levels: of cases, () for all. device: the only one it runs on. compiles: takes torch.compile, a minute a case.
    strict: held to our own rule though it is not ours.
    """

    name: str
    title: str = ""
    build: Callable[[Case], workloads.Workload] = workloads.build
    package: str = "torch"
    library: str = ""
    missing: Callable[[], str | None] = nothing
    refuses: Callable[[Case], str | None] = nothing
    levels: tuple[str, ...] = ()
    modes: tuple[str, ...] = MODES
    dtypes: tuple[str, ...] = tuple(DTYPES)
    device: str = ""
    compiles: bool = False
    strict: bool = False

    @property
    def ours(self) -> bool:
        return self.package == DISTRIBUTION

    @property
    def bound(self) -> float:
        """How many times plain torch's error is still right."""
        return BOUND if self.ours or self.strict else FOREIGN_BOUND

    @property
    def version(self) -> str:
        """Whose code it is; a checkout that is not installed has no version."""
        try:
            return f"{self.package} {metadata.version(self.package)}"
        except metadata.PackageNotFoundError:
            return self.package

    def why_not(self, case: Case | None = None) -> str | None:
        """Say why it cannot run here, or cannot run this case; None when nothing is known against it."""
        if case and self.device and case.device != self.device:
            return f"runs on {self.device}"
        if (reason := self.missing()) or case is None:
            return reason
        if case.mode not in self.modes:
            return "inference only" if self.modes == ("fwd",) else f"computes {', '.join(self.modes)} only"
        if case.dtype not in self.dtypes:
            return f"computes {', '.join(self.dtypes)} only"
        return self.refuses(case) or workloads.why_not(case)


def by_name(name: str) -> Contender:
    """Return a backend of moe_kernels, or one of the PEERS, which are plain torch, as a contender."""
    return Contender(name, package=DISTRIBUTION if name in BACKENDS else "torch", strict=True)
