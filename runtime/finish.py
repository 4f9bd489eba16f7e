"""The end of a job: nobody leaves before the last state is kept everywhere, with its parity if there is any.

A rank that dies after it is replaced alone and restores that state, so none can lose what another reported. Not
here: the goodbye (recovery/rejoin.py).
"""

from __future__ import annotations

import logging
import threading
from typing import Final

import torch

from holdfast.proto.lease import Phase

from .comm.group import Group
from .gather import Kept
from .lease import Lease
from .snapshot import Snapshots

log = logging.getLogger(__name__)

TRIES: Final = 3
"""Without a snapshot manager there is nothing to wait for; after so many tries that is said and accepted."""
PAUSES: Final = 60
PAUSE_S: Final = 0.05


def finish(group: Group, snapshots: Snapshots, step: int, kept: Kept, lease: Lease) -> None:
    """Wait until every rank holds the state after `step` whole. Collective. Raises Fenced or PeerLost.

    `kept`: what the last barrier told.
    """
    for _ in range(TRIES):
        lease.renew(Phase.WAITING)
        snapshots.fence()
        kept = _gather(group, snapshots, kept)
        if kept.sealed == step or not snapshots.enabled:
            _await_parity(group, snapshots, step, kept, lease)
            return
        if step not in snapshots.steps():
            snapshots.begin(step, kept, must=True)
    log.warning("the state after the last step %d is not in memory on every rank", step)


def _gather(group: Group, snapshots: Snapshots, before: Kept) -> Kept:
    rows = group.allgather(torch.tensor(snapshots.keeps()))
    return Kept.of([row.tolist() for row in rows], snapshots.placement, before)


def _await_parity(group: Group, snapshots: Snapshots, step: int, kept: Kept, lease: Lease) -> None:
    pause = threading.Event()
    for _ in range(PAUSES):
        if not kept.placement or kept.protected >= step or not snapshots.enabled:
            return
        lease.renew(Phase.WAITING)
        pause.wait(PAUSE_S)
        kept = _gather(group, snapshots, kept)
    log.warning("the state after the last step %d has no parity yet", step)
