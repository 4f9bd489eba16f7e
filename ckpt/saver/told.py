"""What a host tells of its ranks' shares: all but the bytes, so that one host can compose for all.

    Taken (memory) ── describe() ──▶ JSON ──▶ Told.of() ── compose() ──▶ parts whose data is a Place

The digests of all entries come along: copies of tied parameters and buffers of replicas are compared by them. So do
the bytes of scalar steps, which become numbers of the manifest. Pure. Invariant: nothing is taken on trust; what is
not as describe() makes it is a ProtocolViolation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from holdfast.proto.errors import ProtocolViolation

from ..memory.digest import DIGEST_BYTES
from ..memory.table import ArenaEntry
from ..universal.chunks import Buffer
from .copy import Taken

STEP_BYTES_MAX: Final = 8


@dataclass(frozen=True, slots=True)
class Place:
    """Stands for the bytes of one entry, which are in the memory of the host that holds the slot."""

    slot: int
    entry: int

    def __call__(self) -> Buffer:
        raise AssertionError("bytes of another host are written there")


@dataclass(frozen=True, slots=True)
class Told:
    """One slot's share of the state after `step`, as its host tells it; stands for a Taken in compose()."""

    slot: int
    step: int
    entries: tuple[ArenaEntry, ...]
    """`offset` is the entry's index."""
    metadata: Any
    digests: tuple[bytes, ...]
    scalars: dict[int, bytes]

    def view(self, entry: ArenaEntry) -> memoryview:
        """The bytes of a scalar step."""
        if entry.offset not in self.scalars:
            raise ProtocolViolation("a scalar step without its bytes", slot=self.slot, name=entry.name)
        return memoryview(self.scalars[entry.offset])

    def data(self, entry: ArenaEntry) -> Place:
        """Where its bytes are."""
        return Place(self.slot, entry.offset)

    def digest(self, entry: ArenaEntry) -> bytes:
        """Of the bytes of one entry."""
        return self.digests[entry.offset]

    @staticmethod
    def of(value: Any) -> Told:
        """From JSON."""
        try:
            entries = tuple(
                ArenaEntry(str(name), str(state), str(dtype), tuple(map(int, shape)), int(start), int(stop), index)
                for index, (name, state, dtype, shape, start, stop) in enumerate(value["entries"])
            )
            digests = tuple(bytes.fromhex(text) for text in value["digests"])
            scalars = {int(index): bytes.fromhex(text) for index, text in value["scalars"].items()}
            told = Told(int(value["slot"]), int(value["step"]), entries, value["metadata"], digests, scalars)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ProtocolViolation("not a share", reason=f"{type(error).__name__}: {error}"[:200]) from error
        sizes = {index: entries[index].nbytes for index in scalars if 0 <= index < len(entries)}
        if len(digests) != len(entries) or {len(digest) for digest in digests} - {DIGEST_BYTES}:
            raise ProtocolViolation("a share without the digests of its entries", slot=told.slot)
        if sizes != {index: len(data) for index, data in scalars.items()}:
            raise ProtocolViolation("a scalar of another size than its entry", slot=told.slot)
        return told


def describe(taken: Taken) -> dict[str, Any]:
    """A share as JSON."""
    scalars = {
        str(index): taken.view(entry).hex()
        for index, entry in enumerate(taken.entries)
        if entry.state == "step" and entry.nbytes <= STEP_BYTES_MAX
    }
    return {
        "slot": taken.slot,
        "step": taken.step,
        "entries": [[e.name, e.state, e.dtype, list(e.shape), e.start, e.stop] for e in taken.entries],
        "metadata": taken.metadata,
        "digests": [taken.digest(entry).hex() for entry in taken.entries],
        "scalars": scalars,
    }
