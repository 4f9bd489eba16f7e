"""Redundancy as values: what was asked for, and the layout that says which byte is protected where. Pure.

    "rs:6+2"   any 6 of 8 shards rebuild the other 2         "mirror"  1+1       "xor"  (hosts-1)+1
    6+2 ── 7 hosts left ──▶ 5+2 ── 4 left ──▶ 2+2 ── 3 left ──▶ 1+2 ── 2 left ──▶ 1+1 ── 1 left ──▶ none

    slot 0 |chunk 0|chunk 1|        stripe 0 = data (slot 0 chunk 0, slot 1 chunk 0)   parity on hosts 2, 3
    slot 1 |chunk 0|chun|           stripe 1 = data (slot 0 chunk 1, slot 1 chunk 1)   parity on hosts 3, 2

A *slot* is one rank's snapshot, its *image* the bytes of that at one step; a *stripe* is up to k chunks of
images and m parity chunks, all padded with zeros to `chunk` bytes. placement.py makes placements and answers questions
about them; here they are only spelt, and read back from whoever sends them. Invariants:

* k == m == 0 (none), or k >= 1, m >= 1 and k + m <= SHARDS_MAX: no other redundancy exists;
* chunk i of a slot is [i * chunk, min((i + 1) * chunk, nbytes)): so a layout is small and cannot overlap;
* what `Placement.from_json` returns covers every image exactly once; anything else is a ProtocolViolation.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

from holdfast.proto.errors import ConfigError, ProtocolViolation

SHARDS_MAX: Final = 64
"""Widest stripe that the codec takes."""
_RS: Final = re.compile(r"rs:(\d{1,4})\+(\d{1,4})", re.ASCII)
_FORMS: Final = "auto, none, mirror, xor, or rs:K+M such as rs:6+2"


@dataclass(frozen=True, slots=True)
class Redundancy:
    """k data chunks and m parity chunks a stripe: any m of them may be lost. 0+0 is none."""

    k: int
    m: int

    def __post_init__(self) -> None:
        none = self.k == 0 and self.m == 0
        if not none and (self.k < 1 or self.m < 1 or self.k + self.m > SHARDS_MAX):
            raise ConfigError(
                f"redundancy {self.k}+{self.m}: K and M must be at least 1 and K+M at most {SHARDS_MAX}; "
                f"or ask for none, mirror (1+1), or rs:6+2"
            )

    @staticmethod
    def parse(text: str, hosts: int) -> Redundancy:
        """What `text` asks for on so many hosts; what cannot be had there is refused, with what could be."""
        if hosts < 1:
            raise ConfigError(f"redundancy over {hosts} hosts: there must be at least 1")
        if text == "none":
            return NONE
        if text == "auto":
            return _auto(hosts)
        if text in ("mirror", "xor"):
            if hosts < 2:
                raise ConfigError(f"redundancy {text} needs at least 2 hosts and there is 1: ask for none or auto")
            if text == "xor" and hosts > SHARDS_MAX:
                raise ConfigError(
                    f"redundancy xor over {hosts} hosts is wider than {SHARDS_MAX} shards: ask for rs:12+4 or rs:7+1"
                )
            return Redundancy(1, 1) if text == "mirror" else Redundancy(hosts - 1, 1)
        match = _RS.fullmatch(text)
        if match is None:
            raise ConfigError(f"redundancy {text[:60]!r} is not one of: {_FORMS}")
        asked = Redundancy(int(match[1]), int(match[2]))
        if asked.fitted(hosts) != asked:
            least = asked.k + asked.m
            raise ConfigError(f"redundancy {asked} needs {least} hosts and there are {hosts}: {_offer(asked, hosts)}")
        return asked

    def fitted(self, hosts: int) -> Redundancy:
        """The same after losses: m is kept while it can be, since losses come in clusters; k pays first."""
        if hosts < 1:
            raise ConfigError(f"redundancy over {hosts} hosts: there must be at least 1")
        if hosts >= self.k + self.m:
            return self
        if hosts == 1:
            return NONE
        m = min(self.m, hosts - 1)
        return Redundancy(hosts - m, m)

    @property
    def overhead(self) -> float:
        """Parity bytes per byte protected, when stripes are full."""
        return self.m / self.k if self.k else 0.0

    def __str__(self) -> str:
        return f"rs:{self.k}+{self.m}" if self.k else "none"


NONE: Final = Redundancy(0, 0)


def _auto(hosts: int) -> Redundancy:
    if hosts == 1:
        return NONE
    if hosts <= 3:
        return Redundancy(1, 1)
    if hosts <= 7:
        return Redundancy(hosts - 2, 2) if hosts >= 6 else Redundancy(hosts - 1, 1)
    return Redundancy(6, 2) if hosts <= 15 else Redundancy(12, 4)


def _offer(asked: Redundancy, hosts: int) -> str:
    if hosts == 1:
        return "one host has nobody to keep its parity: ask for none or auto"
    best = {str(asked.fitted(hosts)), str(Redundancy(hosts - 1, 1)), "auto"}
    return f"ask for {' or '.join(sorted(best, key=lambda s: (s == 'auto', s)))}"


# ---- the layout -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HostInfo:
    """A machine, and what it fails together with."""

    host: int
    domain: str


@dataclass(frozen=True, slots=True)
class SlotInfo:
    """A rank's snapshot: where it is and how long its image is at every step."""

    slot: int
    host: int
    nbytes: int
    replicas: int = -1
    """Number of the replica set: its slots hold replicas of one another's state. -1: alone."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes [start, stop) of a slot's image. Empty only as the one chunk of an empty image."""

    slot: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Stripe:
    """Data chunks and the hosts of their parity: parity[i] keeps row i of the code, parity[0] encodes."""

    number: int
    data: tuple[Chunk, ...]
    parity: tuple[int, ...]
    local: bool
    """Every parity host has a slot in the replica set of all the data: parity needs no network."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Who keeps whose parity. Same inputs, same placement, on every host; compared by digest."""

    number: int
    k: int
    m: int
    chunk: int
    """Bytes of every parity chunk, and of every data chunk but the last of an image."""
    stripes: tuple[Stripe, ...]
    slots: tuple[SlotInfo, ...]
    hosts: tuple[HostInfo, ...]
    warnings: tuple[str, ...]
    """What the operator should know before the first failure, a line each."""

    def encoder(self, stripe: int) -> int:
        """The host that reads a stripe's data and computes all its parity."""
        return self.stripes[stripe].parity[0]

    def parity_on(self, host: int) -> tuple[tuple[int, int], ...]:
        """(stripe, index) of each parity chunk that `host` keeps."""
        return tuple(
            (stripe.number, index)
            for stripe in self.stripes
            for index, keeper in enumerate(stripe.parity)
            if keeper == host
        )

    def parity_bytes(self, host: int) -> int:
        """Memory that `host` gives for the parity of one step."""
        return self.chunk * sum(stripe.parity.count(host) for stripe in self.stripes)

    def digest(self) -> bytes:
        """SHA-256 of the canonical JSON, 32 bytes. Equal digests mean equal layouts."""
        return hashlib.sha256(self.to_json().encode()).digest()

    def to_json(self) -> str:
        """Canonical text: chunks by index, which is a third of the length of their ranges."""
        value = {
            "format": FORMAT,
            "number": self.number,
            "k": self.k,
            "m": self.m,
            "chunk": self.chunk,
            "hosts": [[host.host, host.domain] for host in self.hosts],
            "slots": [[slot.slot, slot.host, slot.nbytes, slot.replicas] for slot in self.slots],
            "stripes": [
                [[number for chunk in stripe.data for number in (chunk.slot, chunk.start // self.chunk)], stripe.parity]
                for stripe in self.stripes
            ],
            "warnings": self.warnings,
        }
        return json.dumps(value, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Placement:
        """The placement that a peer sent; ProtocolViolation for anything that `to_json` cannot have written."""
        return _read(text)


FORMAT: Final = 1
TEXT_MAX: Final = 16 << 20
NUMBER_MAX: Final = (1 << 53) - 1
HOSTS_MAX: Final = 1 << 16
SLOTS_MAX: Final = (1 << 20) - 1
"""Slot numbers lie below it; it is itself the number under which parity is kept."""
DOMAIN_CHARS_MAX: Final = 128
_WARNINGS_MAX: Final = 16
_WARNING_CHARS_MAX: Final = 1000
_FIELDS: Final = frozenset({"format", "number", "k", "m", "chunk", "hosts", "slots", "stripes", "warnings"})


def chunk_count(nbytes: int, chunk: int) -> int:
    """Chunks of an image. An empty image has one, empty: so that its slot has a stripe, whose hosts know of it."""
    return max(1, -(-nbytes // chunk))


def make_stripe(number: int, data: list[tuple[SlotInfo, int]], parity: list[int], chunk: int, sets: Sets) -> Stripe:
    """A stripe of (slot, chunk index) pairs; whether it is local follows from `sets`, as of `replica_sets`."""
    chunks = tuple(
        [Chunk(slot.slot, index * chunk, min((index + 1) * chunk, slot.nbytes)) for slot, index in data],
    )
    shared = data[0][0].replicas
    local = shared >= 0 and all(slot.replicas == shared for slot, _ in data) and sets[shared].issuperset(parity)
    return Stripe(number, chunks, tuple(parity), local)


Sets = dict[int, frozenset[int]]


def replica_sets(slots: tuple[SlotInfo, ...]) -> Sets:
    """Replica set -> hosts that have a slot of it."""
    hosts: dict[int, set[int]] = {}
    for slot in slots:
        if slot.replicas >= 0:
            hosts.setdefault(slot.replicas, set()).add(slot.host)
    return {replicas: frozenset(of) for replicas, of in hosts.items()}


# ---- reading what a peer sent -----------------------------------------------------------------------------


def _read(text: str) -> Placement:
    if len(text) > TEXT_MAX:
        raise ProtocolViolation("placement is too long", characters=len(text), most=TEXT_MAX)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ProtocolViolation(f"placement is not JSON: {str(error)[:100]}") from None
    if type(value) is not dict or value.keys() != _FIELDS:
        raise ProtocolViolation("placement has other fields than it should")
    _int(value["format"], FORMAT, FORMAT)
    k, m = _int(value["k"], 0, SHARDS_MAX), _int(value["m"], 0, SHARDS_MAX)
    try:
        Redundancy(k, m)
    except ConfigError as error:
        raise ProtocolViolation(f"placement: {error.message}") from None
    chunk = _int(value["chunk"], 1, NUMBER_MAX)
    hosts = tuple(_host(entry) for entry in _list(value["hosts"], 1, HOSTS_MAX))
    slots = tuple(_slot(entry) for entry in _list(value["slots"], 0, SLOTS_MAX))
    _ascending([host.host for host in hosts], "hosts")
    _ascending([slot.slot for slot in slots], "slots")
    known = {host.host for host in hosts}
    if any(slot.host not in known for slot in slots):
        raise ProtocolViolation("placement has a slot on a host that it does not list")
    warnings = tuple(_text(line, _WARNING_CHARS_MAX) for line in _list(value["warnings"], 0, _WARNINGS_MAX))
    stripes = _stripes(value["stripes"], Redundancy(k, m), chunk, slots, known)
    return Placement(_int(value["number"], 0, NUMBER_MAX), k, m, chunk, stripes, slots, hosts, warnings)


def _stripes(
    value: object, redundancy: Redundancy, chunk: int, slots: tuple[SlotInfo, ...], hosts: set[int]
) -> tuple[Stripe, ...]:
    by_number, sets = {slot.slot: slot for slot in slots}, replica_sets(slots)
    counts = {slot.slot: chunk_count(slot.nbytes, chunk) for slot in slots}
    wanted = sum(counts.values()) if redundancy.k else 0
    entries = _list(value, 0, wanted)
    seen: set[tuple[int, int]] = set()
    stripes = []
    for number, entry in enumerate(entries):
        pair = _list(entry, 2, 2)
        numbers, parity = _list(pair[0], 2, 2 * redundancy.k), _list(pair[1], redundancy.m, redundancy.m)
        if any(type(x) is not int for x in numbers) or any(type(x) is not int or x not in hosts for x in parity):
            raise ProtocolViolation("placement has a stripe with something else than chunks and hosts", stripe=number)
        chunks = list(zip(numbers[::2], numbers[1::2], strict=False))
        if len(numbers) % 2 or any(s not in counts or not 0 <= index < counts[s] for s, index in chunks):
            raise ProtocolViolation("placement has a chunk of no slot", stripe=number)
        if len({by_number[s].host for s, _ in chunks}) < len(chunks) or not seen.isdisjoint(chunks):
            raise ProtocolViolation("placement has a chunk twice, or two of a host in a stripe", stripe=number)
        seen.update(chunks)
        stripes.append(make_stripe(number, [(by_number[s], index) for s, index in chunks], parity, chunk, sets))
    if len(seen) != wanted:
        raise ProtocolViolation("placement leaves chunks unprotected", chunks=wanted, protected=len(seen))
    return tuple(stripes)


def _host(value: object) -> HostInfo:
    host, domain = _list(value, 2, 2)
    return HostInfo(_int(host, 0, NUMBER_MAX), _text(domain, DOMAIN_CHARS_MAX))


def _slot(value: object) -> SlotInfo:
    slot, host, nbytes, replicas = _list(value, 4, 4)
    return SlotInfo(
        _int(slot, 0, SLOTS_MAX - 1),
        _int(host, 0, NUMBER_MAX),
        _int(nbytes, 0, NUMBER_MAX),
        _int(replicas, -1, NUMBER_MAX),
    )


def _int(value: object, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ProtocolViolation(f"placement has {str(value)[:40]!r} where a number in {low}..{high} belongs")
    return value


def _list(value: object, least: int, most: int) -> list[Any]:
    if type(value) is not list or not least <= len(value) <= most:
        raise ProtocolViolation(f"placement lacks a list of {least}..{most} entries")
    return value


def _text(value: object, most: int) -> str:
    if type(value) is not str or not 0 < len(value) <= most or not value.isprintable():
        raise ProtocolViolation(f"placement lacks a line of 1..{most} characters")
    return value


def _ascending(numbers: list[int], what: str) -> None:
    if any(a >= b for a, b in pairwise(numbers)):
        raise ProtocolViolation(f"placement has {what} twice or out of order")
