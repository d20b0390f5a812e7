"""How long a run may take: each stage gets its part of what is left, and what it leaves goes on to the next."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from bench.instrument import progress, store


class Budget:
    """The seconds of a run, shared by its stages.

    Args:
        seconds: of the whole run. parts: stage -> how long it takes beside the others, in any unit.
        spent: seconds that went before, where an interrupted run goes on.
        clock: like time.monotonic.
    """

    def __init__(
        self,
        seconds: float,
        parts: Mapping[str, float],
        spent: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.seconds, self.parts, self.clock = seconds, dict(parts), clock
        self.end = clock() + seconds - spent

    @property
    def left(self) -> float:
        """Seconds until the end, 0 behind it."""
        return max(0.0, self.end - self.clock())

    def share(self, *stages: str) -> float:
        """Return the seconds that stages to come may take; KeyError for one that began."""
        return self.left * sum(self.parts[stage] for stage in stages) / sum(self.parts.values())

    def begin(self, stage: str) -> float:
        """Return when a stage that begins now has to end, on the clock; KeyError for one that began."""
        end = self.clock() + self.share(stage)
        del self.parts[stage]
        return end

    def left_out(self, what: str) -> dict:
        """Say, and return as a row, that something was left out for time."""
        row = store.row("left_out", what=f"{what}: left out for time, beyond {self.seconds / 60:g} minutes")
        progress.say(f"  {row['what']}")
        return row
