"""A machine: power, its snapshot manager's memory, and what its protector does with it (ckpt/memory/protect)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from holdfast.ckpt.memory.placement import Placement
from holdfast.ckpt.memory.protect.parity import choose_half
from holdfast.proto.ids import NO_STEP
from holdfast.runtime.gather import STEP_MAX

from .network import MS, S

if TYPE_CHECKING:
    from .agent import Agent
    from .coordinator import Coordinator
    from .world import World

KEEP_NS = 2 * S


@dataclass(frozen=True, slots=True)
class Parity:
    """A parity half that is whole: the protector's Kept, and what is in it."""

    half: int
    layout: Placement
    step: int
    chunks: tuple[tuple[int, int], ...]

    @property
    def placement(self) -> int:
        return self.layout.number


class Machine:
    """What survives its agent: power, a number for the tester, its snapshot manager's and its protector's memory."""

    def __init__(self, world: World, number: int) -> None:
        self.world, self.number = world, number
        self.boot = 0
        self.up = True
        self.agent: Agent | None = None
        self.coordinator: Coordinator | None = None
        self.clear()

    @property
    def address(self) -> str:
        """Of its coordinator, and of its agent's door: new with every boot."""
        return f"{self.number}:{self.boot}"

    def clear(self) -> None:
        for slot, steps in getattr(self, "slots", {}).items():
            for half in range(len(steps)):
                self.put(slot, half, NO_STEP)
        self.slots: dict[int, list[int]] = {}
        self.parity: list[Parity | None] = [None, None]
        self.placement: Placement | None = None
        self.me = -1  # its number in the job, as its protector was told
        self.told = -1
        self.hosts: dict[int, str] = {}  # number -> address, of all protectors
        self.keep = -1
        self.filling = self.pending = False
        self.spared = (-1, 0)

    # ---- snapshot manager

    def put(self, slot: int, half: int, step: int) -> None:
        halves = self.slots.setdefault(slot, [NO_STEP, NO_STEP])
        before, halves[half] = halves[half], step
        holders = self.world.holders
        if before != NO_STEP and before not in halves:
            holders[slot, before].discard(self)
        if step != NO_STEP:
            holders.setdefault((slot, step), set()).add(self)

    def held(self) -> dict[int, frozenset[int]]:
        return {slot: frozenset(s for s in halves if s != NO_STEP) for slot, halves in self.slots.items()}

    def held_parity(self) -> dict[tuple[int, int, int], frozenset[int]]:
        found: dict[tuple[int, int, int], frozenset[int]] = {}
        for kept in self.whole():
            for stripe, index in kept.chunks:
                key = (kept.placement, stripe, index)
                found[key] = found.get(key, frozenset()) | {kept.step}
        return found

    def whole(self) -> list[Parity]:
        return [kept for kept in self.parity if kept is not None]

    def has_parity(self, number: int, step: int) -> bool:
        return any((kept.placement, kept.step) == (number, step) for kept in self.whole())

    # ---- protector (ckpt/memory/protect)

    def topology(self, number: int, me: int, hosts: dict[int, str], placement: Placement | None) -> None:
        if number < self.told:
            return
        self.told, self.me, self.hosts, self.placement = number, me, hosts, placement
        self.world.poke()

    def page(self) -> tuple[int, int]:
        if self.placement is None:
            return 0, NO_STEP
        if not self.placement.parity_on(self.me):
            return self.placement.number, STEP_MAX
        return self.placement.number, self.protected()

    def protected(self) -> int:
        number = self.placement.number if self.placement is not None else -1
        return max((kept.step for kept in self.whole() if kept.placement == number), default=-1)

    def asked(self) -> dict[int, Machine]:
        """Machines that its protector can ask now, by the numbers that it knows them under."""
        found = {number: self.world.machine_at(address) for number, address in self.hosts.items()}
        return {
            number: machine
            for number, machine in (found | {self.me: self}).items()
            if machine is self
            or (machine.agent is not None and machine.address == self.hosts[number] and self.world.reach(self, machine))
        }

    def everywhere(self, number: int, step: int) -> bool:
        layout = self.placement
        if layout is None or layout.number != number:
            return False
        known = {host for host, machine in self.asked().items() if machine.has_parity(number, step)}
        return {host.host for host in layout.hosts if layout.parity_bytes(host.host)} <= known

    def turn(self) -> None:
        """Protect the newest step that every slot holds, if it is not protected yet."""
        self.pending = False
        placement = self.placement
        if self.agent is None or placement is None or self.filling or not placement.parity_on(self.me):
            return
        asked = set(self.asked().values())
        slots = [slot.slot for slot in placement.slots]
        step = self.world.common_step(slots, asked)
        if step < 0 or self.has_parity(placement.number, step):
            return
        if self._spare(step):
            self.world.after(50 * MS, self.wake)
            return
        half = choose_half(self.whole(), self.keep, self.everywhere)
        self.parity[half], self.filling = None, True
        self.world.happens("encode", self)
        if any(kept.placement != placement.number for kept in self.whole()):
            self.world.happens("re-encode", self)  # old parity is needed until the new one is everywhere
        boot, me = self.boot, self.me

        def whole() -> None:
            if self.boot != boot or self.agent is None:
                return
            self.filling = False
            there = set(self.asked().values())
            if self.placement is placement and all(self.world.holds(slot, step, there) for slot in slots):
                self.parity[half] = Parity(half, placement, step, placement.parity_on(me))
            self.world.poke()

        self.world.soon(whole, self.world.encode_ms)

    def _spare(self, step: int) -> bool:
        protected = self.protected()
        if self.keep < 0 or protected <= self.keep or step <= protected:
            return False
        if self.spared[0] != protected:
            self.spared = protected, self.world.now_ns + KEEP_NS
        return self.world.now_ns < self.spared[1]

    def wake(self) -> None:
        if not self.pending:
            self.pending = True
            self.world.soon(self.turn, 8.0)

    def can_rebuild(self, slot: int, step: int) -> bool:
        """Whether its protector finds that slot, or enough shards of it, on hosts under the numbers they have now."""
        asked = self.asked()
        if self.world.holds(slot, step, set(asked.values())):
            return True
        layouts = {kept.placement: kept.layout for m in asked.values() for kept in m.whole() if kept.step == step}
        return any(self._decodes(slot, step, layout, asked) for layout in layouts.values())

    def _decodes(self, slot: int, step: int, layout: Placement, asked: dict[int, Machine]) -> bool:
        parity = {host for host, machine in asked.items() if machine.has_parity(layout.number, step)}
        machines = set(asked.values())
        stripes = [stripe for stripe in layout.stripes if any(chunk.slot == slot for chunk in stripe.data)]
        for stripe in stripes:
            shards = sum(self.world.holds(chunk.slot, step, machines) for chunk in stripe.data)
            if shards + sum(host in parity for host in stripe.parity) < len(stripe.data):
                return False
        return bool(stripes)
