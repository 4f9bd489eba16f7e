"""A rank's view of the parity that its host keeps: what is protected, what is held, and how to get a slot rebuilt.

    page (shared word) ──▶ protected(): newest step whose parity this host holds, without a call
    protector          ◀── keep(step), rebuild(slot, step), announce(step) and deliver(parity of replicated state)

Everything is best effort but rebuild: without a protector training goes on unprotected, and says so. Not here:
encoding and decoding (ckpt/memory/protect), who keeps what (the placement, made by the coordinator).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from typing import Final

from holdfast.ckpt.memory.client import SmpClient
from holdfast.ckpt.memory.protect.client import NO_DUTY, PARITY_SLOT, Page, ProtectorClient, Rebuilt
from holdfast.ckpt.memory.protect.deliver import Delivery, Image, Work
from holdfast.proto.errors import HoldfastError, PeerLost, SnapshotError
from holdfast.proto.ids import NO_STEP

from .gather import STEP_MAX
from .joining import Identity

log = logging.getLogger(__name__)

REBUILD_S: Final = 600.0
"""Only bounds what no fence ends: the protector's own deadlines notice hosts that are gone."""


class Redundancy:
    """`protected` is of the main thread, `keep` and deliveries of the copy thread, never both at once."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._client: ProtectorClient | None = None
        self._page: Page | None = None
        self._rebuilding: ProtectorClient | None = None
        self._delivery: Delivery | None = None
        self._alarms = 0
        self._alarm = ""
        self.placement = 0
        """Number of the placement of this generation; 0: the job has no parity."""

    def protected(self) -> tuple[int, int]:
        """(placement, step) that this host has protected; (0, NO_STEP) for nothing."""
        if not self._identity.protector:
            return 0, NO_STEP
        try:
            if self._page is None:
                self._page = self._connected().page()
            placement, step = self._page.read()
            self._look(self._page.alarms())
        except HoldfastError as error:
            self._lost(error)
            return 0, NO_STEP
        return max(0, placement), STEP_MAX if step >= NO_DUTY else step

    def alarm(self) -> str:
        """That replicas were found to differ, in words, once; empty if they were not."""
        found, self._alarm = self._alarm, ""
        return found

    def keep(self, step: int) -> bool:
        """`step` is protected on every host: nobody overwrites its parity until a newer one is. False: nobody heard."""
        if not self._identity.protector:
            return False
        if step == NO_STEP:
            return True
        try:
            self._connected().keep(step)
        except HoldfastError as error:
            self._lost(error)
            return False
        return True

    def announce(self, slot: int, step: int) -> Work | None:
        """This rank is about to keep `step` in `slot`: the parity that it can compute for its host."""
        if not self._identity.protector or not self.placement:
            return None
        try:
            if self._delivery is None:
                self._delivery = Delivery(self._connected(), slot)
            return self._delivery.announce(step, self.placement)
        except HoldfastError as error:
            self._lost(error)
            return None

    def deliver(self, work: Work, images: Mapping[int, Image]) -> None:
        """Compute it, from this rank's replica. Without it the protector fetches the data."""
        try:
            if self._delivery is not None:
                self._delivery.deliver(work, images)
        except SnapshotError as error:
            log.info("parity of step %d is not computed here: %s", work.step, error)
        except HoldfastError as error:
            self._lost(error)

    def rebuild(self, slot: int, step: int) -> Rebuilt:
        """Have this host's snapshot manager hold `slot` after `step`. SnapshotIncomplete: not enough shards."""
        if not self._identity.protector:
            raise SnapshotError("no protector on this host", slot=slot, step=step)
        try:
            self._rebuilding = self._connected()
            return self._rebuilding.rebuild(slot, step, deadline_s=REBUILD_S)
        except PeerLost as error:
            self._lost(error)
            raise SnapshotError("the protector was lost while it rebuilt", slot=slot, step=step) from error
        finally:
            self._rebuilding = None

    def interrupt(self) -> None:
        """End a rebuild or delivery that is under way (any thread): a newer generation decides anew."""
        if (delivery := self._delivery) is not None:
            delivery.stop()
        if (client := self._rebuilding) is not None:
            client.close()

    def _look(self, alarms: int) -> None:
        """Learn why, if replicas were found to differ since."""
        if alarms > self._alarms:
            self._alarm = str(self._connected().status()["mismatch"])
            self._alarms = alarms
            log.error("%s", self._alarm)

    def _connected(self) -> ProtectorClient:
        if self._client is None:
            identity = self._identity
            self._client = ProtectorClient(
                identity.protector, job=identity.job, token=identity.token, role="rank", timeout_s=2.0
            )
        return self._client

    def _lost(self, error: HoldfastError) -> None:
        log.warning("no protector: %s", error)
        with contextlib.suppress(OSError):
            if self._page is not None:
                self._page.close()
            if self._client is not None:
                self._client.close()
        self._client, self._page, self._delivery, self._alarms = None, None, None, 0


def held_parity(client: SmpClient) -> dict[tuple[int, int, int], list[int]]:
    """(placement, stripe, index) -> steps, of the parity that a host's snapshot manager holds whole."""
    held: dict[tuple[int, int, int], list[int]] = {}
    for half in client.list():
        if half.slot != PARITY_SLOT or half.state not in ("COPIED", "SEALED"):
            continue
        try:
            with client.open(half.slot, half.half) as mapped:
                table = mapped.half.read()
        except SnapshotError as error:
            log.warning("parity that cannot be read: %s", error)
            continue
        for entry in table.entries:
            if entry.state == "parity":
                _, stripe, index = entry.name.split(".")
                key = (int(table.metadata["placement"]), int(stripe), int(index))
                held.setdefault(key, []).append(table.step)
    return held
