"""Hosts on one machine: a snapshot manager and a protector each, with ranks that this process plays.

    Cluster(sizes) ── hosts[i].start() ─▶ SMP + protector ── place() ─▶ topology to all
    write(slot, step) ▸ seeded bytes into the slot's next half, as a rank does ▸ copied
    wait_protected(step) ▸ every page says so

Bytes of (slot, step) follow from the seed, so nobody has to keep what a rebuilt half is compared with.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from holdfast.ckpt.memory.arena import ArenaEntry, arena_bytes
from holdfast.ckpt.memory.client import MappedHalf, SmpClient
from holdfast.ckpt.memory.placement import HostInfo, Placement, Redundancy, SlotInfo, place
from holdfast.ckpt.memory.protect.client import Page, ProtectorClient
from holdfast.ckpt.memory.table import ALIGN_BYTES, HEADER_BYTES, aligned, layout
from holdfast.proto.errors import PeerLost

DEADLINE_S = 30.0
JOB = "job-protect"
TOKEN = "secret"
PLAN = bytes(range(32))
ENVIRONMENT = {"TEST_TOKEN": TOKEN, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}


def wait_for(condition: Callable[[], bool], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Poll what other processes will do without telling us."""
    deadline = time.monotonic() + deadline_s
    turn = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, what
        turn.wait(0.01)


def entries_of(slot: int, nbytes: int) -> list[ArenaEntry]:
    """Two tensors of odd sizes, `nbytes` together, and a small extra one."""
    first = nbytes // 3
    return [
        ArenaEntry("w", "weight", "U8", (first,), 0, first),
        ArenaEntry("w", "exp_avg", "U8", (nbytes - first,), 0, nbytes - first),
        ArenaEntry("rng", "extra", "U8", (100 + slot,), 0, 100 + slot),
    ]


def image_bytes(slot: int, nbytes: int) -> int:
    """Size of the image that these entries make: all up to the table."""
    return aligned(layout(entries_of(slot, nbytes))[1], ALIGN_BYTES) - HEADER_BYTES


def content(seed: int, slot: int, step: int, nbytes: int) -> list[bytes]:
    """What is in the entries of a slot after a step."""
    rng = random.Random(f"{seed} {slot} {step}")
    return [rng.randbytes(entry.nbytes) for entry in entries_of(slot, nbytes)]


def metadata(slot: int, step: int, *, replicated: bool = False) -> dict[str, Any]:
    """Something that JSON must bring back as it was."""
    value: dict[str, Any] = {"lr": 0.1 / (step + 1), "slot": slot, "names": ["é", 'q"', None]}
    return {**value, "replicated": True} if replicated else value


@dataclass
class Host:
    """One machine: its processes, and where they listen."""

    number: int
    scrub_rate: int = 0
    smp: str = ""
    control: str = ""
    address: str = ""
    manager: subprocess.Popen[bytes] | None = None
    protector: subprocess.Popen[bytes] | None = None
    writer: SmpClient | None = None
    halves: dict[tuple[int, int], MappedHalf] = field(default_factory=dict)

    def start(self) -> None:
        """Both processes, with new names."""
        name = f"holdfast-test-{secrets.token_hex(8)}"
        self.smp, self.control = f"{name}-smp", f"{name}-protect"
        command = [sys.executable, "-m", "holdfast.ckpt.memory.manager", "--socket", self.smp, "--job", JOB]
        command += ["--ttl", "60", "--token-env", "TEST_TOKEN"]
        self.manager = subprocess.Popen(
            command, env={**os.environ, **ENVIRONMENT}, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        clients: list[SmpClient] = []

        def answers() -> bool:
            with contextlib.suppress(PeerLost):
                clients.append(SmpClient(self.smp, job=JOB, token=TOKEN, role="rank", timeout_s=DEADLINE_S))
            return bool(clients)

        wait_for(answers, "the manager does not listen")
        self.writer = clients[0]
        self.start_protector()

    def start_protector(self) -> None:
        """The protector alone."""
        reading, writing = os.pipe()
        command = [sys.executable, "-m", "holdfast.ckpt.memory.protect", "--smp", self.smp, "--control", self.control]
        command += ["--job", JOB, "--bind", "127.0.0.1:0", "--token-env", "TEST_TOKEN", "--ready-fd", str(writing)]
        command += ["--scrub-rate", str(self.scrub_rate), "--nice", "0"]
        quiet = None if os.environ.get("PROTECT_LOG") else subprocess.DEVNULL
        self.protector = subprocess.Popen(
            command, env={**os.environ, **ENVIRONMENT}, stdin=subprocess.DEVNULL, stderr=quiet, pass_fds=[writing]
        )
        os.close(writing)
        with os.fdopen(reading, "rb") as ready:
            assert select.select([ready], [], [], DEADLINE_S)[0], "the protector is late"
            line = ready.readline()
        assert line, "the protector ended at its start"
        self.address = json.loads(line)["address"]

    def kill(self) -> None:
        """The machine is gone: SIGKILL for both."""
        for process in (self.protector, self.manager):
            if process is not None:
                process.kill()
                process.wait(DEADLINE_S)
        self.manager = self.protector = None
        for mapped in self.halves.values():
            mapped.close()
        self.halves.clear()
        if self.writer is not None:
            self.writer.close()
            self.writer = None

    @property
    def alive(self) -> bool:
        """Whether its processes were started and not killed."""
        return self.manager is not None

    def client(self, role: str = "admin", timeout_s: float = DEADLINE_S) -> ProtectorClient:
        """A connection to the protector."""
        return ProtectorClient(self.control, job=JOB, token=TOKEN, role=role, timeout_s=timeout_s)

    def status(self) -> dict[str, Any]:
        """What the protector says of itself."""
        with self.client() as client:
            return client.status()

    def states(self) -> dict[tuple[int, int], tuple[str, int]]:
        """What the manager holds."""
        assert self.writer is not None
        return {(half.slot, half.half): (half.state, half.step) for half in self.writer.list()}


class Cluster:
    """Hosts, slots and one seed."""

    def __init__(self, sizes: Mapping[int, int], hosts: int, *, seed: int = 1, scrub_rate: int = 0) -> None:
        """`sizes`: bytes by slot; slot s lives on host s % hosts."""
        self.sizes = dict(sizes)
        self.seed = seed
        self.hosts = [Host(number, scrub_rate=scrub_rate) for number in range(hosts)]
        self.home = {slot: slot % hosts for slot in sizes}
        self.number = 0
        self.placement: Placement | None = None
        self.turn: dict[int, int] = {}
        self.replicated = False

    def start(self, only: Sequence[int] | None = None) -> None:
        """All hosts, or some."""
        for host in self.hosts:
            if only is None or host.number in only:
                host.start()

    def live(self) -> list[Host]:
        """Hosts that were not killed."""
        return [host for host in self.hosts if host.alive]

    def place(self, redundancy: str | tuple[int, int], *, slots: Sequence[int] | None = None) -> Placement:
        """A layout over the live hosts."""
        live = self.live()
        chosen = self.sizes if slots is None else slots
        k_m = Redundancy.parse(redundancy, len(live)) if isinstance(redundancy, str) else Redundancy(*redundancy)
        infos = [SlotInfo(s, self.home[s], image_bytes(s, self.sizes[s])) for s in chosen]
        hosts = [HostInfo(host.number, f"host-{host.number}") for host in live]
        return place(infos, hosts, k_m, self.number + 1)

    def tell(self, placement: Placement | None, hosts: Sequence[int] | None = None) -> None:
        """Topology to all live hosts, or to some."""
        self.number += 1
        self.placement = placement
        addresses = {host.number: host.address for host in self.live()}
        for host in self.live():
            if hosts is None or host.number in hosts:
                with host.client() as client:
                    assert client.topology(self.number, host.number, addresses, placement)

    def write(self, step: int, slots: Sequence[int] | None = None, *, tell: bool = True) -> None:
        """Each slot's rank keeps `step` in the half that is due."""
        for slot in self.sizes if slots is None else slots:
            host = self.hosts[self.home[slot]]
            if not host.alive:
                continue
            half = self.turn.get(slot, 0)
            self.turn[slot] = 1 - half
            self.fill(host, slot, half, step)
            if tell:
                assert host.writer is not None
                host.writer.copied(slot, half, step)

    def fill(self, host: Host, slot: int, half: int, step: int) -> MappedHalf:
        """What a rank does to one half."""
        assert host.writer is not None
        entries, meta = entries_of(slot, self.sizes[slot]), metadata(slot, step, replicated=self.replicated)
        mapped = host.halves.get((slot, half))
        if mapped is None:
            mapped = host.halves[slot, half] = host.writer.arena(slot, half, arena_bytes(entries, meta))
        placed = mapped.half.begin(step, PLAN, 3, entries, meta)
        for entry, data in zip(placed, content(self.seed, slot, step, self.sizes[slot]), strict=True):
            mapped.half.view(entry)[:] = data
        mapped.half.finish()
        return mapped

    def wait_protected(self, step: int, deadline_s: float = DEADLINE_S) -> None:
        """Until the smallest word of all live hosts' pages has reached `step` under the current placement."""
        assert self.placement is not None
        number = self.placement.number
        with contextlib.ExitStack() as stack:
            pages: dict[int, Page] = {}
            for host in self.live():
                with host.client() as client:
                    pages[host.number] = stack.enter_context(client.page())

            def done() -> bool:
                return all(page.read()[0] == number and page.read()[1] >= step for page in pages.values())

            try:
                wait_for(done, f"step {step} is not protected", deadline_s)
            except AssertionError as error:
                words = {host: page.read() for host, page in pages.items()}
                errors = {host.number: host.status()["errors"] for host in self.live()}
                raise AssertionError(f"{error}: {words} {errors}") from None

    def check(self, host: Host, slot: int, half: int, step: int) -> None:
        """The manager of `host` holds `slot` at `step`, SEALED, with all its bytes."""
        assert host.writer is not None
        with host.writer.open(slot, half) as mapped:
            table = mapped.half.read(step, PLAN)
            mapped.half.verify()
            assert table.metadata == metadata(slot, step, replicated=self.replicated)
            assert table.incarnation == 3
            found = [bytes(mapped.half.view(entry)) for entry in table.entries]
        assert found == content(self.seed, slot, step, self.sizes[slot])
        assert host.states()[slot, half] == ("SEALED", step)

    def close(self) -> None:
        """End everything."""
        for host in self.hosts:
            host.kill()


@contextlib.contextmanager
def cluster(sizes: Mapping[int, int], hosts: int, **options: Any) -> Iterator[Cluster]:
    """A started cluster that ends with the block."""
    made = Cluster(sizes, hosts, **options)
    try:
        made.start()
        yield made
    finally:
        made.close()
