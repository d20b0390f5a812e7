"""What a worker of the contest builds: a contender at a case, with its library on the path."""

from __future__ import annotations

from bench.instrument.cases import Case
from bench.instrument.seat import Seat
from bench.peers import libraries


class ContestSeat(Seat):
    """A contender that is ready to run a case."""

    def __init__(self, name: str, case: str):
        contender = libraries.CONTENDERS[name]
        libraries.use(contender.library)
        super().__init__(Case.from_id(case), contender.build, contender.version)
