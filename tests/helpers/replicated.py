"""Replicas played by a test: every host's rank has the state of all slots, and delivers parity of it.

    Replicated(sizes, hosts)  a Cluster whose slots form one replica set, with a Meter before each protector
    write(step, …)            announce ▸ fill ▸ copied ▸ deliver, as a rank does; `flip` damages one rank's replica

A Meter stands between protectors and counts the bytes that cross, so a claim about traffic is no counter of ours.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Sequence
from typing import Any

from protected import Cluster, content, entries_of

from holdfast.ckpt.memory.placement import HostInfo, Placement, Redundancy, SlotInfo, place
from holdfast.ckpt.memory.protect.client import ProtectorClient
from holdfast.ckpt.memory.protect.deliver import Delivery, Work
from holdfast.ckpt.memory.table import ALIGN_BYTES, HEADER_BYTES, aligned, layout
from holdfast.proto.errors import SnapshotError


class Meter:
    """Forwards connections to an address, and counts."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.count = 0
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
            except OSError:
                return
            self._open += [near, far]
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(one, other), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self.count += len(data)
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End it."""
        self._listener.close()
        for end in self._open:
            end.close()


class Replica:
    """A slot's image after a step, as bytes; `flip` is a byte of it that this replica has wrong."""

    def __init__(self, seed: int, slot: int, step: int, nbytes: int, flip: int = -1) -> None:
        entries = entries_of(slot, nbytes)[:-1]
        offsets, end = layout(entries)
        self._bytes = bytearray(aligned(end, ALIGN_BYTES) - HEADER_BYTES)
        for offset, data in zip(offsets, content(seed, slot, step, nbytes)[:-1], strict=True):
            self._bytes[offset - HEADER_BYTES : offset - HEADER_BYTES + len(data)] = data
        if flip >= 0:
            self._bytes[flip] ^= 16

    @property
    def nbytes(self) -> int:
        return len(self._bytes)

    def read(self, start: int, into: memoryview) -> None:
        assert 0 <= start <= start + len(into) <= len(self._bytes)
        into[:] = self._bytes[start : start + len(into)]


class Replicated(Cluster):
    """One replica set over all hosts."""

    def __init__(self, sizes: dict[int, int], hosts: int, **options: Any) -> None:
        super().__init__(sizes, hosts, **options)
        self.replicated = True
        self.meters: dict[int, Meter] = {}
        self.clients: dict[int, ProtectorClient] = {}
        self.deliveries: dict[int, Delivery] = {}

    def place(self, redundancy: str | tuple[int, int], *, slots: Sequence[int] | None = None) -> Placement:
        live = self.live()
        assert not isinstance(redundancy, str)
        infos = [
            SlotInfo(s, self.home[s], max(4096, Replica(0, s, 0, self.sizes[s]).nbytes), 0)
            for s in (self.sizes if slots is None else slots)
        ]
        hosts = [HostInfo(host.number, f"host-{host.number}") for host in live]
        return place(infos, hosts, Redundancy(*redundancy), self.number + 1)

    def tell(self, placement: Placement | None, hosts: Sequence[int] | None = None) -> None:
        for host in self.live():
            if host.number not in self.meters:
                self.meters[host.number] = Meter(host.address)
                host.address = self.meters[host.number].address
        super().tell(placement, hosts)

    def crossed(self) -> int:
        """Bytes between protectors so far."""
        return sum(meter.count for meter in self.meters.values())

    def announce(self, slot: int, step: int) -> Work | None:
        """What the slot's rank says before it copies."""
        if slot not in self.deliveries:
            self.clients[slot] = self.hosts[self.home[slot]].client(role="rank")
            self.deliveries[slot] = Delivery(self.clients[slot], slot)
        assert self.placement is not None
        return self.deliveries[slot].announce(step, self.placement.number)

    def deliver(self, slot: int, work: Work | None, flip: dict[int, int] | None = None) -> int:
        """What the slot's rank does after it has copied. `flip`: by slot, the byte that its replica has wrong."""
        if work is None:
            return 0
        flips = flip or {}
        images = {s: Replica(self.seed, s, work.step, self.sizes[s], flips.get(s, -1)) for s in self.sizes}
        return self.deliveries[slot].deliver(work, images)

    def train(self, step: int) -> int:
        """Every live host's ranks keep `step` and deliver; the bytes of parity that they made."""
        slots = [slot for slot, home in self.home.items() if self.hosts[home].alive]
        made = 0
        for slot in slots:
            work = self.announce(slot, step)
            self.write(step, [slot])
            with contextlib.suppress(SnapshotError):  # refused: a rank goes on without, too
                made += self.deliver(slot, work)
        return made

    def close(self) -> None:
        for client in self.clients.values():
            client.close()
        super().close()
        for meter in self.meters.values():
            meter.close()
