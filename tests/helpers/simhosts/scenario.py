"""What befalls a simulated job."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens: at `ns` of the simulation, or `ns` after the nth time that `on` happens, if `safe` only once
    redundancy is whole again."""

    kind: str  # kill, power, cut, coordinator, rank
    ns: int
    on: str = ""
    nth: int = 1
    count: int = 1  # hosts
    lasts_ns: int = 0  # of a cut; until a killed host is back (0: never)
    leader: bool = False  # the one in charge is among them
    safe: bool = False
    hosts: tuple[int, ...] = ()  # these machines, not just any


@dataclass(frozen=True, slots=True)
class Scenario:
    """A job, and what befalls it."""

    hosts: int = 3
    per_host: int = 1
    spares: int = 0
    replicas: int = 1
    redundancy: str = "auto"
    spread: bool = True
    until_ns: int = 200_000_000_000  # after which it hangs, if it has not ended
    faults: tuple[Fault, ...] = ()

    @property
    def size(self) -> int:
        return self.hosts * self.per_host
