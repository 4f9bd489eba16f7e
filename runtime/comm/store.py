"""The key-value store of one generation's groups, carried on the control channel instead of a TCPStore.

    gloo ──set(key, blob)──▶ publish ──▶ coordinator collects one blob of every rank, sends all to all
    gloo ◀─get(key)──────── deliver ◀───┘

No new connection is opened during a recovery, every wait can be aborted, and each generation has its own
store, so that an address of an older generation can never be read (that is what breaks gloo under
torchrun's restarts).
"""

from __future__ import annotations

import datetime
import threading
from collections.abc import Callable, Mapping, Sequence

import torch.distributed as dist

from holdfast.proto.errors import Fenced, PeerLost


class GenerationStore(dist.Store):  # type: ignore[name-defined, misc]
    """dist.Store over `publish` and `deliver`. Thread-safe."""

    def __init__(self, publish: Callable[[str, bytes], None], timeout_s: float) -> None:
        super().__init__()
        self._publish = publish
        self._timeout_s = timeout_s
        self._values: dict[str, bytes] = {}
        self._fenced: Fenced | None = None
        self._changed = threading.Condition()

    def set(self, key: str, value: bytes | str) -> None:
        """Publish a value to all ranks of the generation."""
        data = value.encode() if isinstance(value, str) else bytes(value)
        self.deliver({key: data})
        self._publish(key, data)

    def deliver(self, values: Mapping[str, bytes]) -> None:
        """Values arrived from the coordinator."""
        with self._changed:
            self._values.update(values)
            self._changed.notify_all()

    def abort(self, fenced: Fenced) -> None:
        """Free every waiter with `fenced`."""
        with self._changed:
            self._fenced = fenced
            self._changed.notify_all()

    def get(self, key: str) -> bytes:
        """Value of `key`; waits for it. Raises Fenced or PeerLost (deadline)."""
        self.wait([key])
        return self._values[key]

    def wait(self, keys: Sequence[str], timeout: datetime.timedelta | None = None) -> None:
        """Wait until all `keys` have values. Raises Fenced or PeerLost (deadline)."""
        limit_s = timeout.total_seconds() if timeout is not None else self._timeout_s
        with self._changed:
            arrived = self._changed.wait_for(
                lambda: self._fenced is not None or all(key in self._values for key in keys), limit_s
            )
            if self._fenced is not None:
                raise self._fenced.again()
            if not arrived:
                missing = [key for key in keys if key not in self._values]
                raise PeerLost("peers did not publish their addresses", missing=missing, deadline_s=limit_s)

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all `keys` have values now."""
        with self._changed:
            return all(key in self._values for key in keys)

    def add(self, key: str, amount: int) -> int:
        """Not offered: gloo does not need it, and a shared counter would need a round trip."""
        raise NotImplementedError("a generation's store has no counters")

    def set_timeout(self, timeout: datetime.timedelta) -> None:
        """Longest wait of later calls."""
        self._timeout_s = timeout.total_seconds()

    @property
    def timeout(self) -> datetime.timedelta:
        """Longest wait of a call."""
        return datetime.timedelta(seconds=self._timeout_s)

    def has_extended_api(self) -> bool:
        """No append, multi_get or multi_set."""
        return False
