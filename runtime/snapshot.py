"""Copies a rank's state after every committed step into its host's snapshot manager, behind the next step.

    commit of s ▸ begin(s, keep): metadata and buffers at once, the rest in the copy thread ──┐ overlaps the
    next forward/backward ...                                                                  │ next step
    fence(): before the barrier of s+1, wait until the copy of s is whole  ◀───────────────────┘
    the barrier of s+1 tells every rank which halves all have; the newest step that all hold is kept

Parameters and moments change only inside optimizer.step(), so a copy between two of them is consistent
without copy-on-write. State that is replicated over n ranks is copied 1/n by each; parity of the others' shares is
then computed from this rank's replica (replica.py). Trouble with the manager never reaches training: the snapshot is
skipped and counted, and the arenas are offered again to the next manager. Invariants:

* the half that holds the newest step which every rank holds, or the newest with parity, is never overwritten;
* a half is FILLING before its first byte changes, and COPIED only after its last one is in place.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import torch

from holdfast.ckpt.memory import metadata as blob
from holdfast.ckpt.memory.arena import ArenaEntry, Table, arena_bytes
from holdfast.ckpt.memory.client import SmpClient
from holdfast.ckpt.memory.memfd import MappedHalf
from holdfast.ckpt.memory.protect.client import PARITY_SLOT
from holdfast.ckpt.memory.protect.deliver import Work
from holdfast.proto.errors import ConfigError, PeerLost, SnapshotCorrupt, SnapshotError, SnapshotIncomplete
from holdfast.proto.ids import NO_STEP
from holdfast.proto.lease import Phase

from .arenas import DTYPES, arena_entry, as_cpu, shape_here, tensor_of, whole_sizes
from .copyjob import CopyJob, discard
from .gather import Kept
from .hold import Hold
from .joining import Formed
from .keep import choose
from .redundancy import Redundancy, held_parity
from .replica import clear_gaps, images_of, marked, shares
from .state import Entry

if TYPE_CHECKING:
    from .engine import Engine
    from .recovery.rejoin import Session

log = logging.getLogger(__name__)

_TIMEOUT_S = 10.0
RESTORABLE = ("COPIED", "SEALED")


class Snapshots:
    """Snapshots of one rank. Main thread only; the copy thread is inside."""

    def __init__(self, engine: Engine, session: Session) -> None:
        identity = session.identity
        self._engine = engine
        self._session = session
        self._slot = identity.rank
        self.every = identity.snapshot_every or engine.config.snapshot_every
        self._sparse = identity.snapshot_every > 0
        self.enabled = identity.snapshots and bool(identity.smp)
        self._client: SmpClient | None = None
        self._halves: dict[int, MappedHalf] = {}
        self._steps: dict[int, int] = {0: NO_STEP, 1: NO_STEP}  # what each half holds whole
        self._jobs: SimpleQueue[CopyJob | None] = SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        self._opened: list[tuple[MappedHalf, Table]] = []
        self._redundancy = Redundancy(identity)
        self.saver = Hold(identity.saver)
        session.on_fence(self._redundancy.interrupt)
        self._image_bytes: int | None = None
        self.skipped = 0
        self._captured()  # what cannot be captured is refused now, not when the first snapshot is due
        if self.enabled:
            threading.Thread(target=self._copy_loop, name="holdfast-snapshot", daemon=True).start()

    def steps(self) -> list[int]:
        """What each half holds whole, NO_STEP for nothing. Call after fence()."""
        return list(self._steps.values())

    @property
    def placement(self) -> int:
        """Number of this generation's placement of parity; 0: none."""
        return self._redundancy.placement

    def keeps(self) -> list[int]:
        """What this rank brings to gather.Kept."""
        kept = self._engine.kept
        known = kept.protected if kept.placement == self.placement else int(NO_STEP)
        return [*self.steps(), *self._redundancy.protected(), self.saver.due(self.steps()), known]

    def alarm(self) -> str:
        """That replicas were found to differ, once."""
        return self._redundancy.alarm()

    # ---- every step ---------------------------------------------------------------------------------

    def begin(self, step: int, kept: Kept, *, must: bool = False) -> None:
        """Start the copy of the state after `step` over a half that recovery does not need. Never waits.

        Only every `every`-th step is kept, and what `must` be: the resume step, the last step. With parity that
        lags behind both halves may be needed: then this snapshot is left out.
        """
        self.saver.kept(self._slot, self.steps(), kept)
        if not self.enabled or (step % self.every and not must):
            return
        half = choose(self.steps(), step, kept, must=must)
        if half is None:
            self.skipped += 1
            self._session.lease.snapshot(max(self.steps()), self.skipped)
            return
        entries, meta, split = self._captured()
        self._steps[half] = NO_STEP
        self._idle.clear()
        entries = [replace(e, tensor=e.tensor.clone()) if e.early else e for e in entries]
        # A step that is redone need not have the same bytes unless steps are exact: replicas are not compared then.
        replicas = split if len(split) > 1 and self._engine.config.exact else {}
        self._jobs.put(CopyJob(step, half, entries, meta, self._engine.device.mark(), kept.protected, replicas))

    def _captured(self) -> tuple[list[Entry], Any, dict[int, list[Entry]]]:
        """What this rank keeps of the state, and each holder's share of it. ConfigError for what it cannot keep."""
        split = shares(self._engine.state.entries(), self._engine.peers())
        entries = list(split[self._slot])
        meta, extra = blob.encode(self._engine.metadata(), is_tensor=lambda v: isinstance(v, torch.Tensor))
        entries += [Entry(path, "extra", as_cpu(tensor)) for path, tensor in extra]
        for entry in entries:
            if entry.tensor.dtype not in DTYPES:
                raise ConfigError(f"cannot capture {entry.name}: its type is {entry.tensor.dtype}")
        return entries, marked(meta, replicated=len(split) > 1), split

    def fence(self) -> None:
        """Wait until the copy under way is whole: the optimizer is about to change what it reads."""
        self._idle.wait()

    def _skip(self, reason: str) -> None:
        self.skipped += 1
        log.warning("snapshot skipped: %s", reason)

    # ---- the copy thread ----------------------------------------------------------------------------

    def _copy_loop(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                work = self._copy(job)
                self._steps[job.half] = job.step
                self._session.lease.snapshot(job.step, self.skipped)
                if work is not None:
                    images = images_of(job.replicas, work.slots, self._engine.device, job.mark)
                    self._redundancy.deliver(work, images)
            except Exception as error:  # whatever it is, training goes on: unprotected, and said so
                self._skip(str(error))
                self._reconnect()
            finally:
                del job
                self._idle.set()

    def _copy(self, job: CopyJob) -> Work | None:
        """Fill a half: FILLING, bytes, COPIED. Returns the parity to compute next."""
        heard = self._redundancy.keep(job.protected)
        work = self._redundancy.announce(self._slot, job.step) if heard and job.replicas else None
        arena_entries = [arena_entry(entry) for entry in job.entries]
        mapped = self._arena(job.half, arena_entries, job.metadata)
        half = mapped.half
        digest = bytes.fromhex(self._engine.plan.digest())
        placed = half.begin(job.step, digest, self._session.identity.incarnation, arena_entries, job.metadata)
        if job.replicas:
            clear_gaps(half, placed)
        targets = [
            tensor_of(half.view(entry), entry.dtype, tuple(e.tensor.shape))
            for entry, e in zip(placed, job.entries, strict=True)
            if e.tensor.numel()
        ]
        sources = [e.tensor for e in job.entries if e.tensor.numel()]
        middle = len(sources) // 2
        self._engine.device.copy_to_host(targets[:middle], sources[:middle], job.mark)
        self._engine.injector.at("snapshot", job.step)
        self._engine.device.copy_to_host(targets[middle:], sources[middle:], job.mark)
        half.finish()
        self._need_client().copied(self._slot, job.half, job.step)
        return work

    def _arena(self, index: int, entries: list[ArenaEntry], metadata: Any) -> MappedHalf:
        """The mapping of one half, big enough; the manager makes (and fills with pages) what is missing."""
        needed = arena_bytes(entries, metadata)
        mapped = self._halves.get(index)
        if mapped is None or mapped.nbytes < needed:
            larger = self._need_client().arena(self._slot, index, needed)
            self._halves[index] = larger
            if mapped is not None:
                mapped.close()
            mapped = larger
        return mapped

    # ---- the manager --------------------------------------------------------------------------------

    def _connect(self) -> None:
        identity = self._session.identity
        self._client = SmpClient(
            identity.smp,
            job=identity.job,
            token=identity.token,
            role="rank",
            rank=identity.rank,
            incarnation=identity.incarnation,
            timeout_s=_TIMEOUT_S,
        )

    def _need_client(self) -> SmpClient:
        if self._client is None:
            self._connect()
        assert self._client is not None
        return self._client

    def _reconnect(self) -> None:
        """The manager is gone or confused: offer it (or its successor) the arenas that we still map."""
        if self._client is not None:
            self._client.close()
            self._client = None
        try:
            client = self._need_client()
            for index, mapped in list(self._halves.items()):
                # Also a half that holds nothing: what the manager does not have must not be written to.
                if not client.adopt(self._slot, index, mapped):
                    self._steps[index] = NO_STEP
                    self._halves.pop(index).close()
        except (PeerLost, SnapshotError, ConfigError) as error:
            log.warning("no snapshot manager: %s", error)
            self._client = None

    # ---- recovery -----------------------------------------------------------------------------------

    def held(self) -> dict[int, list[int]]:
        """Slot -> steps that this host's manager holds whole."""
        if not self.enabled:
            return {}
        try:
            listed = self._need_client().list()
        except (PeerLost, SnapshotError) as error:
            log.warning("no snapshot manager: %s", error)
            self._reconnect()
            return {self._slot: sorted(step for step in self._steps.values() if step != NO_STEP)}
        held: dict[int, list[int]] = {}
        self._steps = dict.fromkeys(self._steps, int(NO_STEP))
        for half in listed:
            if half.state in RESTORABLE and half.slot != PARITY_SLOT:
                held.setdefault(half.slot, []).append(half.step)
                if half.slot == self._slot:
                    self._steps[half.half] = half.step
        return held

    def held_parity(self) -> dict[tuple[int, int, int], list[int]]:
        """(placement, stripe, index) -> steps, of the parity that this host holds."""
        if not self.enabled or not self._session.identity.protector:
            return {}
        try:
            return held_parity(self._need_client())
        except (PeerLost, SnapshotError) as error:
            log.warning("no snapshot manager: %s", error)
            return {}

    def image_bytes(self) -> int:
        """Bytes of this rank's snapshot that parity is computed over, once the optimizer has its state; 0: none."""
        if not self.enabled or not self._session.identity.protector:
            return 0
        if self._image_bytes is None:
            self._image_bytes = self._whole()[0]
        return self._image_bytes

    def _whole(self) -> tuple[int, int]:
        """Sizes of the image and of the arena of this rank's state, as it will be after the first step."""
        entries, meta, split = self._captured()
        return whole_sizes(entries, self._engine.state.future_entries(), meta, replicated=len(split) > 1)

    def reserve(self) -> None:
        """Take the memory of both halves now. Raises ConfigError with the numbers if it is not there."""
        if not self.enabled:
            return
        nbytes = self._whole()[1]
        try:
            for half in self._steps:
                if half not in self._halves:
                    self._halves[half] = self._need_client().arena(self._slot, half, nbytes)
        except SnapshotError as error:
            raise ConfigError(
                f"no room for two snapshots of {nbytes / 1e6:.1f} MB of rank {self._slot}: {error}; run fewer ranks a "
                "host, or without snapshots (--snapshots off)"
            ) from None
        except PeerLost as error:
            log.warning("no snapshot manager yet: %s", error)

    def restore(
        self, formed: Formed, over: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda own: own
    ) -> list[tuple[str, int, int]]:
        """Make the engine's state that after formed.resume_step; sources as (rung, bytes, pieces).

        On the rung "stale" the snapshot is an older one, and `over` makes its metadata that of the resume step.
        Raises SnapshotIncomplete or SnapshotCorrupt when the snapshot that was decided on is not there.
        """
        step, engine = formed.resume_step, self._engine
        sources = []
        source = formed.sources[self._slot]
        rung: str = source.rung
        self._redundancy.placement = formed.placement
        if rung in ("live", "ready"):
            if engine.step != step:
                raise SnapshotIncomplete("the live state is of another step", step=step, live=engine.step)
            sources.append((rung, 0, 0))
        elif rung in ("peer", "disk", "neighbours"):
            return []  # state comes over the group, or from a checkpoint: see recovery/{peer,rebuild,disk}.py
        else:
            kept = source.step if rung == "stale" else step
            if rung in ("parity", "stale"):
                found = self._rebuild(kept)
                rung = rung if rung == "stale" else found
            tensors: dict[tuple[str, str], torch.Tensor] = {}
            try:
                meta, size = self._read(kept, tensors)
                engine.load(step, tensors, over(meta))
                for mapped, table in self._opened:
                    mapped.half.confirm(table)
            except SnapshotError:
                engine.forget()  # what is in place now may be of two steps
                raise
            finally:
                pieces = len(tensors)
                tensors.clear()
                for mapped, _ in self._opened:
                    mapped.close()
                self._opened.clear()
            sources.append((rung, size, pieces))
        return sources

    def _rebuild(self, step: int) -> str:
        """Get what this rank's units need into this host's memory, from other hosts; "parity" if any was decoded."""
        client, rung = self._need_client(), "remote"
        here = {half.slot for half in client.list() if half.step == step and half.state in RESTORABLE}
        for peer in self._engine.peers():
            if peer in here:
                continue
            self._session.lease.renew(Phase.WAITING)  # for other hosts; a fence ends it
            rebuilt = self._redundancy.rebuild(peer, step)
            log.info("slot %d after step %d rebuilt in %.3f s: %s", peer, step, rebuilt.seconds, rebuilt.source)
            rung = "parity" if rebuilt.source == "parity" else rung
            if peer == self._slot:
                self._steps[rebuilt.half] = step
        self._session.lease.renew(Phase.RECOVERING)
        return rung

    def resumed(self, step: int, kept: Kept) -> None:
        """The generation trains on from `step`: forget what is newer, and keep this step if nobody does."""
        for index, held in self._steps.items():
            if held > step:
                self._steps[index] = NO_STEP  # of a history that is being redone
                if self._engine.forward.on and index in self._halves:
                    discard(self._halves[index].half, held, self._session.identity.incarnation)
        if self.enabled and step not in self._steps.values():
            self.begin(step, kept, must=not self._sparse)

    def _read(self, step: int, tensors: dict[tuple[str, str], torch.Tensor]) -> tuple[Any, int]:
        """Fill `tensors` with this rank's units after `step` (views of the arenas); its own metadata, and bytes."""
        client, engine = self._need_client(), self._engine
        where = {h.slot: h.half for h in client.list() if h.step == step and h.state in RESTORABLE}
        meta: Any = None
        size = 0
        for peer in engine.peers():
            self._session.lease.renew(Phase.RECOVERING)  # a big state takes a while, slot by slot
            if peer not in where:
                raise SnapshotIncomplete("no whole snapshot", step=step, slot=peer)
            mapped = client.open(peer, where[peer])
            half = mapped.half
            try:
                table = half.read(step, bytes.fromhex(engine.plan.digest()))
                half.verify()
            except SnapshotCorrupt:
                client.corrupt(peer, where[peer], step)
                raise
            self._opened.append((mapped, table))
            extra = []
            for entry in table.entries:
                tensor = tensor_of(half.view(entry), entry.dtype, shape_here(entry))
                size += entry.nbytes
                if entry.state == "extra":
                    extra.append(tensor)
                else:
                    tensors[(entry.name, entry.state)] = tensor
            if peer == self._slot:
                meta = blob.decode(blob.unmarked(table.metadata), [tensor.clone() for tensor in extra])
        return meta, size
