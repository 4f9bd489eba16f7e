"""What a watcher sees of a rank that writes its lease page at the same time."""

from __future__ import annotations

import itertools
import os
from types import SimpleNamespace
from typing import Any

from holdfast.launcher.detector import Health, Limits, judge
from holdfast.launcher.watcher import Page, Slot
from holdfast.proto.lease import LeasePage, Phase, Word

S = 1_000_000_000
READS = 12
"""More than a sample makes."""


class Stores:
    """The words of a page, which keeps what was stored, in order."""

    def __init__(self) -> None:
        self.words = dict.fromkeys(map(int, Word), 0)
        self.order: list[tuple[int, int]] = []

    def __getitem__(self, index: int) -> int:
        return self.words[index]

    def __setitem__(self, index: int, value: int) -> None:
        self.words[index] = value
        self.order.append((index, value))


def stores_of(now_ns: int, phase: Phase) -> list[tuple[int, int]]:
    """What a renewal stores, word by word."""
    page: Any = LeasePage.__new__(LeasePage)
    page._words = Stores()
    page.renew(now_ns, phase)
    found: list[tuple[int, int]] = page._words.order
    return found


class Between:
    """A lease page in which a rank stores single words just before the watcher's reads of given numbers."""

    def __init__(self, page: LeasePage, stores: list[tuple[int, int]], before: tuple[int, ...]) -> None:
        self._page = page
        self._due = list(zip(before, stores, strict=True))
        self._reads = 0

    def get(self, word: Word) -> int:
        while self._due and self._due[0][0] <= self._reads:
            index, value = self._due.pop(0)[1]
            self._page.set(Word(index), value)
        self._reads += 1
        return self._page.get(word)


def test_a_rank_that_goes_on_after_a_long_wait_is_never_taken_for_hung_whenever_it_is_looked_at() -> None:
    stores = stores_of(9 * S, Phase.EXCHANGE)
    assert len(stores) >= 2
    for before in itertools.combinations_with_replacement(range(READS), len(stores)):
        page = Page.create(0, 0, 0)
        page.lease.renew(5 * S, Phase.WAITING)
        process: Any = SimpleNamespace(pid=os.getpid(), returncode=None, poll=lambda: None)
        slot = Slot(0, 0, page, process, 0)
        slot.open(0)
        slot.hello = True
        slot.sample(0)
        lease = page.lease
        page.lease = Between(lease, stores, before)  # type: ignore[assignment]
        verdict = judge(slot.sample(4 * S), Limits(lease_min_ns=S))
        page.lease = lease
        slot.close()
        page.close()
        assert verdict.health is Health.ALIVE, (before, verdict)


def test_a_rank_that_hangs_is_still_found() -> None:
    page = Page.create(0, 0, 0)
    page.lease.renew(5 * S, Phase.EXCHANGE)
    process: Any = SimpleNamespace(pid=os.getpid(), returncode=None, poll=lambda: None)
    slot = Slot(0, 0, page, process, 0)
    slot.open(0)
    slot.hello = True
    slot.sample(0)
    assert judge(slot.sample(4 * S), Limits(lease_min_ns=S)).health is Health.HUNG
    slot.close()
    page.close()
