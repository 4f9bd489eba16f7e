"""Connections of the simulation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .machine import Machine
    from .world import World

MS = 1_000_000
S = 1_000 * MS

Call = Callable[[], None]


class Pipe:
    """A connection: in order, late; held back across a cut; reset by the kernel of a machine whose process is gone.

    Side 0 is whoever connected.
    """

    def __init__(self, world: World, machines: tuple[Machine, Machine], ended: tuple[Call, Call]) -> None:
        self.world, self.machines, self.ended = world, machines, ended
        self.open = [True, True]
        self.free_ns = [0, 0]
        self.held: list[list[Call | None]] = [[], []]
        world.pipes.append(self)

    def send(self, side: int, call: Call) -> None:
        if self.open[side]:
            self._carry(side, call)

    def close(self, side: int) -> None:
        """Its process ends it, or the kernel after its death."""
        if self.open[side]:
            self.open[side] = False
            self._carry(side, None)

    def vanish(self, side: int) -> None:
        """Its machine is without power: nobody hears of it."""
        self.open[side], self.held[side] = False, []

    def _carry(self, side: int, call: Call | None) -> None:
        world = self.world
        at = max(self.free_ns[side], world.now_ns + world.chance.randrange(2 * MS)) + 1
        self.free_ns[side] = at
        world.at(at, lambda: self._arrive(side, call))

    def _arrive(self, side: int, call: Call | None) -> None:
        here, there = self.machines[side], self.machines[1 - side]
        if self.held[side] or not self.world.reach(here, there):
            if here.up:
                self.held[side].append(call)
        elif not self.open[1 - side]:
            self._end(side)
        elif call is None:
            self._end(1 - side)
        else:
            call()

    def _end(self, side: int) -> None:
        if self.open[side]:
            self.open[side] = False
            self.ended[side]()

    def flush(self) -> None:
        """The network is another: what was held back goes on its way."""
        for side in (0, 1):
            held, self.held[side] = self.held[side], []
            for call in held:
                self._carry(side, call)
