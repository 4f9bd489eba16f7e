"""A sealed snapshot becomes a checkpoint: parts from many holders, put together in one pass.

    stage 0, replica 0:  w [0, 500)  exp_avg [0, 500)     ┐
    stage 0, replica 1:  w [500, 900) ...                  ├──▶ save_universal() ──▶ runs/step-00000100
    stage 1:             ...                               ┘

The parts say what they are; where they came from does not matter. Elements that several hold are taken from
the first that has them. Memory beyond the parts themselves is a few blocks; a part may be given as a function
that fetches its bytes when its turn comes, in any of the threads that write. Runs in one process: parts of other
hosts come here first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..dtypes import ITEM_BYTES
from .chunks import Buffer
from .disk import Disk
from .errors import CorruptError, IncompleteError, UsageError
from .model import Checkpoint, Role
from .write import Details, StatePlan, WriteOptions, Writer


@dataclass(frozen=True, slots=True)
class Part:
    """Elements [start, stop) of one state of one parameter."""

    name: str
    state: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    data: Buffer | Callable[[], Buffer]
    role: Role = "param"


Chosen = list[tuple[Part, int, int]]
"""Elements [start, stop) to take from which part."""


def save_universal(
    root: Path | str,
    parts: Sequence[Part],
    details: Details | None = None,
    options: WriteOptions | None = None,
    disk: Disk | None = None,
) -> Checkpoint:
    """Write the parts as one checkpoint at `root`. IncompleteError, before anything is written, for a gap."""
    chosen = choose_parts(parts)
    with Writer(root, options, disk) as writer:
        writer.begin(chosen)
        _put_all(writer, chosen.values())
        return writer.commit(details)


def choose_parts(parts: Sequence[Part]) -> dict[StatePlan, Chosen]:
    """Which elements of each tensor to take from which part: ascending, without overlap. IncompleteError for a gap."""
    plans: dict[tuple[str, str], StatePlan] = {}
    held: dict[tuple[str, str], list[Part]] = {}
    for part in parts:
        key = (part.name, part.state)
        plan = StatePlan(part.name, part.state, part.dtype, part.shape, part.role)
        if plans.setdefault(key, plan) != plan:
            raise CorruptError("two parts of one tensor disagree", name=part.name, state=part.state)
        held.setdefault(key, []).append(part)
    return {plans[key]: _disjoint(plans[key], members) for key, members in held.items()}


def _put_all(writer: Writer, chosen: Iterable[Chosen]) -> None:
    """Several tensors at a time: one is digested while another is on its way to the disk."""

    def put(ranges: Chosen) -> None:
        for part, start, stop in ranges:
            if any(low < stop and start < high for low, high in writer.missing(part.name, part.state)):
                _put(writer, part, start, stop)

    with ThreadPoolExecutor(writer.options.jobs, thread_name_prefix="checkpoint-save") as pool:
        futures = [pool.submit(put, ranges) for ranges in chosen]
        try:
            for future in futures:
                future.result()
        finally:  # the first error ends all
            for future in futures:
                future.cancel()


def _disjoint(plan: StatePlan, parts: list[Part]) -> Chosen:
    """Which elements to take from which part, ascending and without overlap."""
    elements = 1
    for length in plan.shape:
        elements *= length
    reached = 0
    found: Chosen = []
    for part in sorted(parts, key=lambda part: (part.start, -part.stop)):
        if not 0 <= part.start <= part.stop <= elements:
            raise UsageError(
                "a part outside of its tensor", name=plan.name, state=plan.state, range=(part.start, part.stop)
            )
        if part.start > reached:
            break
        if part.stop > reached:
            found.append((part, reached, part.stop))
            reached = part.stop
    if reached < elements:
        later = min((part.start for part in parts if part.start > reached), default=elements)
        raise IncompleteError("elements are missing", name=plan.name, state=plan.state, missing=[(reached, later)])
    return found


def _put(writer: Writer, part: Part, start: int, stop: int) -> None:
    data = memoryview(part.data() if callable(part.data) else part.data)
    item = ITEM_BYTES[part.dtype]
    if data.nbytes != (part.stop - part.start) * item:
        raise UsageError(
            "a part whose bytes are not those of its range", name=part.name, state=part.state, bytes=data.nbytes
        )
    if data.nbytes:
        data = data.cast("B")[(start - part.start) * item : (stop - part.start) * item]
        writer.put(part.name, part.state, data, (start, stop))
