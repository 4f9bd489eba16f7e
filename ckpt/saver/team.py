"""The saver of a job of several hosts: one on each, and the one beside rank 0 leads.

    leader    due ──▶ rank 0 says which step all ranks leave untouched ──▶ all hosts copy ──▶ due = nothing
              compose ▸ assign ──▶ all hosts write their part ──▶ merge ▸ MANIFEST ▸ COMMIT ▸ rename ▸ latest ▸ prune
    others    serve (peers.py); at the end of the job they wait for the leader's last checkpoint

Nobody is elected: whose shelf holds slot 0 leads, and rank 0 reads the due step from that host's page only. Should two
believe it for a moment, both write what is true, and one rename wins. The loop, and what a failure costs, are
service.py's. Invariants:

* a checkpoint of several hosts gets its name by one rename, after every host said that its part is durable;
* an attempt that fails for whatever reason leaves no folder, or one that the next attempt removes.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from holdfast.proto.errors import HoldfastError, PeerLost, SnapshotIncomplete
from holdfast.proto.ids import NO_STEP

from ..memory.client import HalfInfo, SmpClient
from ..memory.protect.net import Key
from ..universal.assembled import Assembled, remove_hidden
from ..universal.disk import Disk, explained
from ..universal.errors import CheckpointError, IncompleteError
from ..universal.jsonio import parse_canonical
from ..universal.latest import leftovers
from ..universal.manifest import MANIFEST, decode
from ..universal.model import Checkpoint, safe_path
from ..universal.save import choose_parts
from ..universal.write import Writer
from .choose import WHOLE, committed_steps, name_of, next_due
from .compose import compose
from .crew import Crew
from .divide import Holdings, Merged, assign, common, holders, merge
from .hand import Hand, Written
from .page import Page
from .peers import Register, Server
from .service import RETRY_S, Options, Saver

log = logging.getLogger("holdfast.saver")

GATHER_S: Final = 15.0
"""Longest that a step which not every host has yet (one is replaced, or has not stopped yet) is asked for again."""
FOLLOW_S: Final = 30.0
"""At the end of the job a host waits so long for a leader that says nothing."""


class TeamSaver(Saver):
    """See the module's docstring. One thread, one that beats, and the server's."""

    def __init__(
        self,
        connect: Callable[[], SmpClient],
        page: Page,
        options: Options,
        tell: Callable[[dict[str, Any]], None],
        *,
        hand: Hand,
        server: Server,
        register: Register,
        key: Key,
        disk: Disk | None = None,
    ) -> None:
        super().__init__(connect, page, options, tell, disk)
        self._hand = hand
        self._server = server
        self._register = register
        self._key = key
        self._leads = False
        self._asked: tuple[int, float] = (int(NO_STEP), 0.0)  # the step that is asked for, since when

    def run(self) -> bool:
        """See Saver."""
        self._server.start()
        try:
            return super().run()
        finally:
            self._register.leave()
            self._server.close()
            self._hand.close()

    def _clear_leftovers(self) -> None:
        """Who leads does that, before it writes: here another host may be writing."""

    def _turn(self, halves: tuple[HalfInfo, ...]) -> bool:
        leads = any(half.slot == 0 and half.state in WHOLE for half in halves)
        if leads and not self._leads:
            self._saved = max([self._options.start, *committed_steps(self._options.folder)], default=int(NO_STEP))
            self._next = next_due(self._saved, self._options.every)
            self._remove_leftovers()
            log.info("leads: step %d is saved, %d is next", self._saved, self._next)
        self._leads = leads
        self._page.due = self._next if leads else int(NO_STEP)
        step = self._page.reserved
        if not leads or step < self._next:
            return False
        if self._asked[0] != step:
            self._asked = (step, time.monotonic())
        try:
            with self._gather() as crew:
                held = crew.held()
                # After a recovery rank 0 may hold an older one, which a rank that was rebuilt elsewhere has not.
                step = next((one for one in common(held, self._slots) if one >= self._next), step)
                self._save_together(crew, held, step)
        except (SnapshotIncomplete, PeerLost) as error:
            # A host that is being replaced answers soon, and the others leave that step untouched meanwhile.
            if time.monotonic() - self._asked[1] > GATHER_S:
                self._failed(step, error)
            else:
                log.info("step %d is not to be had yet: %s", step, error)
                self._stopping.wait(RETRY_S)
        except HoldfastError as error:
            self._failed(step, error)
        return True

    def _gather(self) -> Crew:
        return Crew.gather(self._hand, self._register, self._key, os.urandom(8).hex())

    # ---- one checkpoint -------------------------------------------------------------------------------

    def _save_together(self, crew: Crew, held: Mapping[int, Holdings], step: int, *, last: bool = False) -> None:
        """All hosts copy, all write, we commit. SnapshotIncomplete, PeerLost: nothing was copied, ask again."""
        started = time.monotonic()
        hosts = holders(held, self._slots, step)
        if missing := sorted(set(self._slots) - hosts.keys()):
            raise SnapshotIncomplete("no saver that answers has the state of some ranks", step=step, ranks=missing)
        shares = crew.take(step, hosts)
        copied = time.monotonic()
        self._page.due = int(NO_STEP)
        folder = self._options.folder / f".{name_of(step)}.tmp-{crew.attempt}"
        try:
            composed = compose(shares, job=self._options.job, time_s=time.time())
        except SnapshotIncomplete as error:
            log.info("step %d is not whole: %s", step, error)
            self._next = step + 1
            return
        try:
            work = assign(choose_parts(composed.parts), hosts)
            with explained(folder, "making the folder of a checkpoint"):
                self._disk.mkdir(folder)
            written = crew.write(folder.name, crew.attempt, work)
            parts = {host: _part(folder, told) for host, told in written.items()}
            merged = merge(work, parts)
            self._move(folder, merged, written)
            details = composed.rated(self._metric(composed, step, last=last))
            with Writer(self._options.folder / name_of(step), disk=self._disk) as writer:
                writer.take_over(Assembled(folder, crew.attempt, merged.layout, merged.facts, self._disk))
                checkpoint = writer.commit(details)
        except HoldfastError as error:
            self._failed(step, error)
            self._remove(folder)
            return
        nbytes = sum(facts.nbytes for facts in checkpoint.files.values())
        self._written(step, checkpoint.root, nbytes, started=started, copied=copied)

    def _move(self, folder: Path, merged: Merged, written: Mapping[int, Written]) -> None:
        """The parts' files into the checkpoint's own folders; what is not there, or has another size, is refused."""
        with explained(folder, "putting the parts of a checkpoint together"):
            for move in merged.moves:
                source, target = folder / written[move.host].folder / move.source, folder / move.target
                try:
                    found = source.stat().st_size
                except FileNotFoundError:
                    raise IncompleteError(
                        "a host's file is not here: is the folder shared?", file=str(source)
                    ) from None
                if found != merged.facts[move.target].nbytes:
                    raise IncompleteError("a host's file has another size here", file=str(source), bytes=found)
                self._disk.mkdir(target.parent)
                self._disk.rename(source, target)
            for told in written.values():
                self._disk.remove_tree(folder / told.folder)

    # ---- the folder -----------------------------------------------------------------------------------

    def _remove_leftovers(self) -> None:
        """What attempts of hosts that are gone left; one that lives still loses its attempt, and nothing else."""
        try:
            found = leftovers(self._options.folder)
        except OSError as error:
            log.info("nothing to tidy up: %s", error)
            return
        for path in found:
            if path.name.startswith(".step-") and path.is_dir() and not path.is_symlink():
                self._remove(path)

    def _remove(self, folder: Path) -> None:
        try:
            remove_hidden(folder, self._disk)
        except (CheckpointError, OSError) as error:
            log.info("left %s: %s", folder, error)  # a host that is slow to notice still writes there

    # ---- the end of the job ---------------------------------------------------------------------------

    def _last(self) -> None:
        self._page.due = int(NO_STEP)
        try:
            halves = self._need_client().list()
        except PeerLost as error:
            log.warning("no last checkpoint: %s", error)
            return
        mine = {half.slot for half in halves if half.state in WHOLE and half.slot in self._slots}
        if 0 in mine:
            self._lead_last()
        elif mine:
            self._follow_last()

    def _lead_last(self) -> None:
        """The newest step that is whole on some host for every rank, unless it is saved already."""
        deadline = time.monotonic() + GATHER_S
        step = int(NO_STEP)
        while True:
            try:
                with self._gather() as crew:
                    held = crew.held()
                    own = [one for steps in held[0].values() for one in steps]
                    step = max(common(held, self._slots) or own, default=step)
                    saved = max([self._options.start, 0, *committed_steps(self._options.folder)])
                    if step > saved:
                        self._save_together(crew, held, step, last=True)
                    crew.bye()
                    return
            except (SnapshotIncomplete, PeerLost) as error:
                if time.monotonic() > deadline:
                    self._failed(step, error)
                    return
            except HoldfastError as error:
                self._failed(step, error)
                return
            threading.Event().wait(RETRY_S)

    def _follow_last(self) -> None:
        """Serve the leader until it says bye, or is silent for too long."""
        since = time.monotonic()
        while not self._server.released.wait(RETRY_S):
            if min(self._server.quiet_s(), time.monotonic() - since) > FOLLOW_S:
                log.warning("no leader came for the last checkpoint")
                return


def _part(folder: Path, told: Written) -> Checkpoint:
    """A host's part, from its manifest."""
    if not safe_path(told.folder) or "/" in told.folder:
        raise IncompleteError("a part that is nowhere", folder=repr(told.folder))
    label = f"{told.folder}/{MANIFEST}"
    value = parse_canonical(told.manifest, label)
    root = folder / told.folder
    return decode(value, home=root, root=root, metadata={}, label=label)
