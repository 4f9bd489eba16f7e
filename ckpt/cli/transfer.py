"""From a reader to a checkpoint on disk, of our format or any other: the end of convert, merge and prune.

    Reader or View ──▶ estimate, refuse ──▶ our Writer (streaming, --resume) or a format's writer ──▶ whole target

Memory is a few blocks per job. Invariant: whatever happens, the target's name is a whole checkpoint or nothing; with
--no-sync, whatever happens but a loss of power or a failing disk right after it.
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..dtypes import ITEM_BYTES
from ..universal.copies import agree
from ..universal.disk import Disk, Unsynced
from ..universal.errors import UsageError
from ..universal.files import block
from ..universal.manifest import TOPIC
from ..universal.model import Checkpoint, Region, Role, TensorState
from ..universal.plan import TARGETS, Estimate, Wanted, check, estimate, jobs_within
from ..universal.read import BLOCK_BYTES, Reader
from ..universal.view import View, blocks, is_optimizer
from ..universal.write import Details, StatePlan, WriteOptions, Writer
from .console import Console, duration, human

OURS = "holdfast"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One transfer."""

    target: Path
    spec: str = OURS
    """As "deepspeed:zero3,dp=6"; "holdfast" is ours."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Options for a format's writer, besides those in `spec`."""
    wanted: Wanted = field(default_factory=Wanted)
    parents: tuple[str, ...] = ()
    bytes_read: int = -1


def run(reader: Reader, job: Job, arguments: argparse.Namespace, console: Console) -> int:
    """Do it, or with --dry-run say what would be done."""
    kind = job.spec.partition(":")[0].partition(",")[0]
    _check_options(kind, job, arguments)
    native = job.spec.partition(",")[0]
    wanted = replace(job.wanted, kind=native if native in TARGETS else kind)
    jobs = jobs_within(arguments.jobs, arguments.max_memory, lambda n: _estimate(reader, job, wanted, n).memory)
    found = _estimate(reader, job, wanted, jobs)
    if arguments.dry_run:
        value = {"dry_run": True, "path": str(job.target), "jobs": jobs, **found.as_json()}
        console.result(value, _plan_lines(found, job, jobs))
        return 0
    check(found, job.target, allow_lossy=arguments.allow_lossy, max_memory=arguments.max_memory)
    done = Done()
    with console.progress(console.verb, found.bytes_read, lambda: reader.bytes_read):
        if kind == OURS:
            agree(reader, allow_lossy=arguments.allow_lossy)
            write_ours(reader, job, arguments, jobs, done)
        else:
            from ..formats.registry import write_as

            lossy = bool(arguments.allow_lossy)
            write_as(job.spec, Presented(reader), job.target, allow_lossy=lossy, disk=disk_of(arguments), **job.more)
    written = {"bytes_written": done.bytes_written} if kind == OURS else {}
    value = {"path": str(job.target), **found.as_json(), "bytes_read": reader.bytes_read, **written}
    lost = [f"left out: {loss}" for loss in found.losses]
    text = f"{job.target}: {kind}, {found.tensors} tensors, {human(found.bytes_written)}"
    console.result(value, [*lost, text])
    return 0


def disk_of(arguments: argparse.Namespace) -> Disk:
    """What writes: durable on return, unless --no-sync."""
    return Unsynced() if getattr(arguments, "no_sync", False) else Disk()


@dataclass(slots=True)
class Done:
    """What was really written."""

    bytes_written: int = 0


def _estimate(reader: Reader, job: Job, wanted: Wanted, jobs: int) -> Estimate:
    return estimate(reader.checkpoint, job.target, wanted, jobs=jobs, bytes_read=job.bytes_read)


def _check_options(kind: str, job: Job, arguments: argparse.Namespace) -> None:
    if kind == OURS:
        if job.spec != OURS:
            raise UsageError("our own format has no options in --to", to=job.spec)
        return
    for name in ("resume", "archive", "tile"):
        if getattr(arguments, name, False):
            raise UsageError(f"--{name} is for targets of our own format; leave it out", target=kind)
    from ..formats.registry import parse_target

    parse_target(job.spec)


def _plan_lines(found: Estimate, job: Job, jobs: int) -> list[str]:
    fits = "" if found.bytes_written <= found.free else "  NOT ENOUGH"
    return [
        f"would write {job.target} as {job.spec}: {found.tensors} tensors",
        f"  read    {human(found.bytes_read)}",
        f"  write   {human(found.bytes_written)} ({human(found.free)} free){fits}",
        f"  memory  about {human(found.memory)} with {jobs} jobs",
        f"  time    about {duration(found.seconds)} on an ordinary disk",
        *(f"  note    {note}" for note in found.notes),
        *(f"  loses   {loss}" for loss in found.losses),
    ]


# ---- our own format -----------------------------------------------------------------------------------------


def write_ours(
    reader: Reader, job: Job, arguments: argparse.Namespace, jobs: int, done: Done | None = None
) -> Checkpoint:
    """Stream every tensor into a checkpoint of our format."""
    how = {name: getattr(arguments, name) for name in ("archive", "tile", "resume")}
    options = WriteOptions(direct=True, jobs=jobs, **how)
    source = reader.checkpoint
    with Writer(job.target, options, disk_of(arguments)) as writer:
        writer.begin(plans(source))
        _copy_all(reader, writer, source.states.values(), jobs)
        if done is not None:
            done.bytes_written = writer.bytes_written
        for name in source.opaque:
            writer.put_opaque(name, reader.opaque(name))
        return writer.commit(details_of(source, job.parents))


def plans(checkpoint: Checkpoint) -> list[StatePlan]:
    """What will be written, in the checkpoint's order."""
    return [StatePlan(t.name, t.state, t.dtype, t.shape, t.role) for t in checkpoint.states.values()]


def details_of(checkpoint: Checkpoint, parents: tuple[str, ...] = ()) -> Details:
    """All that is no tensor. Topics that cannot be file names go together under one that can."""
    topics = {key: value for key, value in checkpoint.metadata.items() if TOPIC.match(key)}
    odd = {key: value for key, value in checkpoint.metadata.items() if not TOPIC.match(key)}
    if odd:
        topics["other"] = {**topics.get("other", {}), **odd}
    return Details(
        metadata=topics,
        groups=checkpoint.groups,
        steps=checkpoint.steps,
        aliases=checkpoint.aliases,
        completeness=checkpoint.completeness,
        parents=parents or ((checkpoint.id,) if checkpoint.id else ()),
    )


def _copy_all(reader: Reader, writer: Writer, tensors: Iterable[TensorState], jobs: int) -> None:
    """Several tensors at a time: one is read while another is digested and written."""
    with ThreadPoolExecutor(jobs, thread_name_prefix="checkpoint-convert") as pool:
        local = threading.local()
        futures = [pool.submit(_copy, reader, writer, tensor, local) for tensor in tensors]
        try:
            for future in futures:
                future.result()
        finally:  # the first error ends all: no thread may write after the writer is gone
            for future in futures:
                future.cancel()


def _copy(reader: Reader, writer: Writer, tensor: TensorState, local: threading.local) -> None:
    """`local`: this thread's block, used again: fresh pages for each would cost more than the copy."""
    if not hasattr(local, "block"):
        local.block = block(BLOCK_BYTES)
    item = ITEM_BYTES[tensor.dtype]
    for first, last in writer.missing(*tensor.key):
        for low, high in blocks(tensor, first, last):
            data = local.block[: (high - low) * item]
            reader.read(*tensor.key, (low, high), data)
            writer.put(*tensor.key, data, (low, high))


# ---- other people's formats ---------------------------------------------------------------------------------


class Presented(View):
    """A checkpoint as writers of foreign formats expect it: parameters, buffers and optimizer states, told by role.

    Generators' states belong to no parameter and have no place there; the estimate lists them as left out.
    """

    def __init__(self, reader: Reader) -> None:
        source = reader.checkpoint
        states = {
            key: replace(tensor, role=_role(tensor), slabs=())
            for key, tensor in source.states.items()
            if tensor.state != "rng"
        }
        super().__init__(replace(source, states=states), [reader])

    def fill(self, tensor: TensorState, region: Region, out: memoryview) -> None:
        self.sources[0].read(tensor.name, tensor.state, region, out)


def _role(tensor: TensorState) -> Role:
    if tensor.role in ("frozen", "opaque"):
        return tensor.role
    return "buffer" if tensor.state == "buffer" else "optim" if is_optimizer(tensor) else "param"
