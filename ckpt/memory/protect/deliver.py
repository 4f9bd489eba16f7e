"""A rank's side of parity without the network: what its replica has of others' images, coded and handed over.

    announce(step) ─▶ rows: the stripes of my replicas' images whose parity this host keeps     before its own copy ends
    deliver():  k blocks of my replica ─▶ digests, for the owners' seal records to be compared with
                       └─ encode ─▶ ring (shared memory, RING_BLOCKS) ─▶ the protector's half    after it

The protector copies from the ring, so a rank that is late, fenced or killed cannot touch parity. It judges: nothing
here compares. Holds no tensor: images are read through `Image`. Invariants:

* a block is digested as its owner's seal record has it: as long as it really is, before the zeros of the padding;
* deliver() ends with all rows handed over or with an error, and then the protector gets that parity elsewhere.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from holdfast.proto.errors import ProtocolViolation, SnapshotError

from .client import ProtectorClient
from .options import BLOCK_BYTES, RING_BLOCKS, RING_BYTES
from .record import digest_of_block


class Image(Protocol):
    """The image of one slot's snapshot, as this replica would have written it."""

    @property
    def nbytes(self) -> int:
        """Its size."""

    def read(self, start: int, into: memoryview) -> None:
        """Bytes from `start` on, as many as `into` takes."""


@dataclass(frozen=True, slots=True)
class Row:
    """One parity chunk to compute: `index` of a stripe with these (slot, start, stop) as data."""

    stripe: int
    index: int
    data: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Work:
    """What to deliver for one step."""

    order: int
    step: int
    k: int
    m: int
    chunk: int
    rows: tuple[Row, ...]

    @property
    def slots(self) -> frozenset[int]:
        """Whose images it takes."""
        return frozenset(slot for row in self.rows for slot, _, _ in row.data)

    @staticmethod
    def of(step: int, reply: Mapping[str, Any]) -> Work:
        """What the protector answered."""
        try:
            rows = tuple(
                Row(int(stripe), int(index), tuple((int(slot), int(start), int(stop)) for slot, start, stop in data))
                for stripe, index, data in reply["rows"]
            )
            work = Work(int(reply["order"]), step, int(reply["k"]), int(reply["m"]), int(reply["chunk"]), rows)
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolViolation("work that cannot be read", reason=str(error)) from error
        if any(len(row.data) > work.k or not 0 <= row.index < work.m for row in rows) or work.chunk < 1:
            raise ProtocolViolation("work that fits no code", k=work.k, m=work.m, chunk=work.chunk)
        return work


class Delivery:
    """Deliveries of one slot's rank over one connection. One thread at a time."""

    def __init__(self, client: ProtectorClient, slot: int) -> None:
        self._client = client
        self._slot = slot
        self._ring: memoryview | None = None
        self._room: list[memoryview] = []
        self._stopped = False

    def announce(self, step: int, placement: int) -> Work | None:
        """This rank is about to keep `step`, and will deliver what is returned; None: there is nothing to deliver."""
        self._stopped = False
        reply = self._client.announce(self._slot, step, placement)
        work = Work.of(step, reply)
        return work if work.rows else None

    def deliver(self, work: Work, images: Mapping[int, Image]) -> int:
        """Compute and hand over all rows; the bytes of parity. SnapshotError: the protector goes another way."""
        missing = sorted(work.slots - images.keys())
        if missing:
            raise SnapshotError("parity of images of which this rank has no replica", slots=missing)
        for row in work.rows:
            self._deliver_row(work, row, images)
        return len(work.rows) * work.chunk

    def stop(self) -> None:
        """End a delivery that is under way (any thread): a recovery is not to wait for it."""
        self._stopped = True

    def _deliver_row(self, work: Work, row: Row, images: Mapping[int, Image]) -> None:
        blocks = -(-work.chunk // BLOCK_BYTES)
        for first in range(0, blocks, RING_BLOCKS):
            if self._stopped:
                raise SnapshotError("the generation is over", step=work.step)
            count = min(RING_BLOCKS, blocks - first)
            digests = [bytearray() for _ in row.data]
            parity = bytearray()
            for at in range(count):
                parity += digest_of_block(self._block(work, row, images, first + at, at, digests))
            self._client.deliver(
                self._slot,
                work.order,
                row.stripe,
                row.index,
                first=first,
                digests=[column.hex() for column in digests],
                parity=parity.hex(),
            )

    def _block(
        self, work: Work, row: Row, images: Mapping[int, Image], block: int, at: int, digests: Sequence[bytearray]
    ) -> memoryview:
        """One block of parity, in its place in the ring; digests of the data that it is of."""
        from .. import erasure

        ring, rooms = self._memory(work.k)
        offset = block * BLOCK_BYTES
        size = min(BLOCK_BYTES, work.chunk - offset)
        data: list[memoryview | None] = [None] * work.k
        for column, (slot, start, stop) in enumerate(row.data):
            real = min(size, min(stop, images[slot].nbytes) - start - offset)
            if real <= 0:
                continue
            room = rooms[column][:size]
            images[slot].read(start + offset, room[:real])
            digests[column] += digest_of_block(room[:real])
            room[real:] = bytes(size - real)
            data[column] = room
        parity = ring[at * BLOCK_BYTES : at * BLOCK_BYTES + size]
        erasure.encode(erasure.Code(work.k, work.m), data, [parity if i == row.index else None for i in range(work.m)])
        return parity

    def _memory(self, k: int) -> tuple[memoryview, list[memoryview]]:
        if self._ring is None:
            fd = self._client.ring(self._slot)
            try:
                self._ring = memoryview(mmap.mmap(fd, RING_BYTES))
            except (OSError, ValueError) as error:
                raise SnapshotError("a ring that cannot be mapped", reason=str(error)) from error
            finally:
                os.close(fd)
        while len(self._room) < k:
            self._room.append(memoryview(bytearray(BLOCK_BYTES)))
        return self._ring, self._room
