"""The other hosts: their addresses, connections to them, and what each of them says that it holds.

    one thread for each watched host:  inventory(since) ▸ waits there for news ▸ records that we lack ▸ our news
    link(host)                         a connection for one thread's requests, kept for the next one

Knows no more than it was told; a host that does not answer holds nothing. Invariants:

* a link on which anything went wrong, or that has answers to come, is never used again;
* a record is kept under the host, slot, step, fill (its token) and placement that it is of.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from holdfast.proto.errors import HoldfastError, PeerLost, ProtocolViolation

from ..wire import error_from
from .net import Channel, Key, connect
from .news import News
from .options import Options
from .record import Record

log = logging.getLogger("holdfast.protect")

LOST: Final = (OSError, EOFError, HoldfastError)
"""What a call of a peer raises: it is gone, slow, confused, or says no."""


@dataclass(frozen=True, slots=True)
class Inventory:
    """What one host holds sealed and digested."""

    version: int = 0
    slots: Mapping[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    """(slot, step) -> (token of the fill, placement of its record)."""
    parity: Mapping[tuple[int, int], int] = field(default_factory=dict)
    """(placement, step) -> token of the fill."""


@dataclass(frozen=True, slots=True)
class Sealed:
    """A record and the mirrored bytes that belong to it."""

    record: Record
    tail: bytes


class Link:
    """Requests to one host, and their answers in order. One thread."""

    def __init__(self, host: int, channel: Channel, patience_s: float) -> None:
        self.host: Final = host
        self._channel = channel
        self._patience_s = patience_s
        self.owed = 0
        """Answers that have not been taken."""

    def ask(
        self, header: Mapping[str, Any], payload: memoryview | bytes | bytearray = b"", *, wait_s: float = 0.0
    ) -> tuple[dict[str, Any], bytes]:
        """One request and its answer."""
        self.send(header, payload)
        answer, nbytes = self.answer(wait_s=wait_s)
        return answer, self._channel.payload(nbytes)

    def send(self, header: Mapping[str, Any], payload: memoryview | bytes | bytearray = b"") -> None:
        """One request, to be answered later."""
        self._channel.send(header, payload)
        self.owed += 1

    def answer(self, *, wait_s: float = 0.0) -> tuple[dict[str, Any], int]:
        """The next answer and the length of the payload, which the caller takes. Raises what the peer refused with."""
        answer, nbytes = self._channel.receive(wait_s=self._patience_s + wait_s)
        self.owed -= 1
        if "error" in answer:
            raise error_from(answer["error"])
        return answer, nbytes

    def take(self, into: memoryview) -> None:
        """The payload of the last answer."""
        self._channel.take(into)

    def ended(self) -> bool:
        """Whether the peer closed it, or said something that nobody asked."""
        return self._channel.readable()

    def wake(self) -> None:
        """From another thread: whoever waits in it finds it ended."""
        self._channel.wake()

    def close(self) -> None:
        """End it."""
        self._channel.close()


class Peers:
    """All other hosts."""

    def __init__(self, key: Key, news: News, options: Options) -> None:
        self._key = key
        self._news = news
        self._options = options
        self._lock = threading.Lock()
        self._addresses: dict[int, str] = {}
        self._idle: dict[int, list[Link]] = {}
        self._watches: dict[int, _Watch] = {}
        self._inventories: dict[int, Inventory] = {}
        self._records: dict[tuple[int, int, int, int, int], Sealed] = {}
        self._wanted: tuple[frozenset[int], int] = frozenset(), -1

    # ---- who is there -----------------------------------------------------------------------------------

    def set_hosts(self, addresses: Mapping[int, str]) -> None:
        """Other hosts, by number. Connections to all others are dropped."""
        with self._lock:
            gone = [host for host, address in self._addresses.items() if addresses.get(host) != address]
            self._addresses = dict(addresses)
            links = [link for host in gone for link in self._idle.pop(host, [])]
        for link in links:
            link.close()
        for host in gone:
            self._unwatch(host)

    def hosts(self) -> list[int]:
        """All of them, in order."""
        with self._lock:
            return sorted(self._addresses)

    def watch(self, hosts: Iterable[int], slots: frozenset[int], placement: int) -> None:
        """Follow these hosts, and fetch the records of these slots under that placement."""
        with self._lock:
            wanted = {host for host in hosts if host in self._addresses}
            self._wanted = slots, placement
            leave = [host for host in self._watches if host not in wanted]
            enter = [_Watch(self, host) for host in sorted(wanted) if host not in self._watches]
            self._watches.update((watch.host, watch) for watch in enter)
            self._records = {key: sealed for key, sealed in self._records.items() if key[4] == placement}
            stay = [watch for host, watch in self._watches.items() if host in wanted and watch not in enter]
        for host in leave:
            self._unwatch(host)
        for watch in enter:
            threading.Thread(target=watch.run, name=f"watch-{watch.host}", daemon=True).start()
        for watch in stay:
            watch.again()

    def inventories(self) -> dict[int, Inventory]:
        """What watched hosts said last; hosts that do not answer are not in it."""
        with self._lock:
            return dict(self._inventories)

    def record(self, slot: int, step: int, placement: int) -> tuple[int, int, Sealed] | None:
        """(host, token, record) of somebody who holds that, if it was fetched already."""
        with self._lock:
            for host, inventory in self._inventories.items():
                token, number = inventory.slots.get((slot, step), (-1, -1))
                sealed = self._records.get((host, slot, step, token, placement))
                if number == placement and sealed is not None:
                    return host, token, sealed
        return None

    # ---- connections ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def link(self, host: int) -> Iterator[Link]:
        """A link for the block; kept for the next one if all is well with it."""
        link = self.borrow(host)
        try:
            yield link
        except BaseException:
            link.close()
            raise
        self.give_back(link)

    def borrow(self, host: int, *, patience_s: float = 0.0) -> Link:
        """A link that the caller gives back, or closes. PeerLost if there is none."""
        with self._lock:
            address = self._addresses.get(host)
            idle = self._idle.get(host, [])
            while idle and not patience_s:
                link = idle.pop()
                if not link.ended():
                    return link
                link.close()
        if address is None:
            raise PeerLost("no such host", host=host)
        patience_s = patience_s or self._options.io_s
        return Link(host, connect(address, self._key, patience_s=patience_s), patience_s)

    def give_back(self, link: Link) -> None:
        """The caller needs it no more."""
        with self._lock:
            keep = link.owed == 0 and link.host in self._addresses
            if keep:
                self._idle.setdefault(link.host, []).append(link)
        if not keep:
            link.close()

    def survey(self, host: int) -> Inventory:
        """Ask one host now."""
        link = self.borrow(host, patience_s=self._options.survey_s)
        try:
            answer, _ = link.ask({"op": "inventory", "since": 0, "wait_ms": 0})
            return parse_inventory(answer)
        finally:
            link.close()

    def fetch_sealed(self, host: int, header: Mapping[str, Any]) -> Sealed:
        """Ask a host for a record."""
        with self.link(host) as link:
            return ask_sealed(link, header)

    # ---- watches ----------------------------------------------------------------------------------------

    def _unwatch(self, host: int) -> None:
        with self._lock:
            watch = self._watches.pop(host, None)
            self._inventories.pop(host, None)
            self._records = {key: sealed for key, sealed in self._records.items() if key[0] != host}
        if watch is not None:
            watch.close()
        self._news.bump()

    def told(self, host: int, watch: _Watch, inventory: Inventory | None) -> None:
        """A watched host said what it holds; None: it says nothing any more."""
        with self._lock:
            if self._watches.get(host) is not watch:
                return
            if inventory is None:
                self._inventories.pop(host, None)
            else:
                self._inventories[host] = inventory
            known = {(s, t, f, n) for (s, t), (f, n) in inventory.slots.items()} if inventory is not None else set()
            self._records = {k: v for k, v in self._records.items() if k[0] != host or k[1:] in known}
        self._news.bump()

    def lacking(self, host: int, inventory: Inventory) -> list[tuple[int, int, int, int, int]]:
        """Keys of records that we want of this inventory and do not have."""
        with self._lock:
            slots, placement = self._wanted
            rows = [(host, slot, step, *rest) for (slot, step), rest in inventory.slots.items() if slot in slots]
            return [key for key in rows if key[4] == placement and key not in self._records]

    def learned(self, key: tuple[int, int, int, int, int], sealed: Sealed) -> None:
        """A record that lacked."""
        with self._lock:
            self._records[key] = sealed
        self._news.bump()


class _Watch:
    """The thread that follows one host."""

    def __init__(self, peers: Peers, host: int) -> None:
        self.host: Final = host
        self._peers = peers
        self._link: Link | None = None
        self._ended = threading.Event()
        self._again = threading.Event()

    def run(self) -> None:
        """Until close()."""
        options = self._peers._options
        while not self._ended.is_set():
            try:
                self._link = self._peers.borrow(self.host)
                self._follow(self._link, options)
            except LOST as error:
                if not self._again.is_set():
                    log.info("host %d is silent: %s", self.host, error or type(error).__name__)
                    self._peers.told(self.host, self, None)
            finally:
                if self._link is not None:
                    self._link.close()
            if self._again.is_set():
                self._again.clear()
            else:
                self._ended.wait(options.retry_s)

    def again(self) -> None:
        """Other records are wanted now."""
        self._again.set()
        if self._link is not None:
            self._link.wake()  # the long wait ends; run() reconnects

    def close(self) -> None:
        """Stop following."""
        self._ended.set()
        if self._link is not None:
            self._link.wake()

    def _follow(self, link: Link, options: Options) -> None:
        since = 0
        while not self._ended.is_set():
            wait_ms = int(options.poll_s * 1000)
            answer, _ = link.ask({"op": "inventory", "since": since, "wait_ms": wait_ms}, wait_s=options.poll_s)
            inventory = parse_inventory(answer)
            since = inventory.version
            self._peers.told(self.host, self, inventory)
            for key in self._peers.lacking(self.host, inventory):
                _, slot, step, token, _ = key
                sealed = ask_sealed(link, {"op": "record", "slot": slot, "step": step, "token": token})
                self._peers.learned(key, sealed)


def ask_sealed(link: Link, header: Mapping[str, Any]) -> Sealed:
    """A record and its tail, as JSON and bytes in one payload."""
    answer, payload = link.ask(header)
    length = answer.get("json")
    if type(length) is not int or not 0 <= length <= len(payload):
        raise ProtocolViolation("an answer without a record")
    try:
        value = json.loads(payload[:length])
    except (ValueError, RecursionError) as error:
        raise ProtocolViolation("a record that is not JSON", reason=str(error)) from error
    record = Record.from_json(value)
    if record.tail_bytes != len(payload) - length:
        raise ProtocolViolation("a record without its tail", wanted=record.tail_bytes, found=len(payload) - length)
    return Sealed(record, payload[length:])


def parse_inventory(answer: Mapping[str, Any]) -> Inventory:
    """What a peer answered, checked."""
    slots, parity = answer.get("slots"), answer.get("parity")
    if not isinstance(slots, list) or not isinstance(parity, list) or type(answer.get("version")) is not int:
        raise ProtocolViolation("an inventory that cannot be read")
    for row, length in [(row, 4) for row in slots] + [(row, 3) for row in parity]:
        if not isinstance(row, list) or len(row) != length or any(type(value) is not int for value in row):
            raise ProtocolViolation("an inventory with an odd row")
    return Inventory(
        answer["version"],
        {(slot, step): (token, placement) for slot, step, token, placement in slots},
        {(placement, step): token for placement, step, token in parity},
    )
