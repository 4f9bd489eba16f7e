"""All communication of one rank in one generation: built, used, woken and dropped as one thing.

    Group(generation, ...)  build()            constructor runs in the waiter: it can be aborted too
        isend / irecv       tagged, asynchronous; wait(work) goes through the waiter
        allgather           small vectors: the step's barrier
        abort(fenced)       from the monitor thread: frees the main thread in about a millisecond
        close()             forget everything; slow destructors run in the reaper

One group of all ranks on gloo, over a device (listener and I/O thread) that the process keeps for its
life. Old groups are never reused: a message of an older generation has no socket to arrive on. On NCCL the
same interface aborts the communicator from the monitor thread (see backend below; not yet run, FAULTS.md).
"""

from __future__ import annotations

import datetime
import socket
import threading
from collections.abc import Callable, Collection
from typing import Any, Protocol

import torch
import torch.distributed as dist

from holdfast.proto.errors import Fenced, PeerLost

from .reaper import Reaper
from .sockets import duplicate_new_connections, shut_down, socket_inodes
from .store import GenerationStore
from .waiter import Waiter

GROUP_TIMEOUT_S = 90.0
"""gloo's own timeout. Not a detector: it only bounds how long an abandoned waiter keeps its tensors."""


class Work(Protocol):
    """What isend and irecv return; only ever passed back to `wait`."""

    def wait(self) -> bool: ...


class Backend(Protocol):
    """Makes the process group of a generation and wakes it. One per device type."""

    def create(self, store: Any, rank: int, world_size: int) -> Any: ...
    def wake(self, process_group: Any) -> None: ...


class GlooBackend:
    """gloo over one device that is shared by all generations of this process."""

    def __init__(self, address: str) -> None:
        self._device = dist.ProcessGroupGloo.create_device(hostname=address)

    def create(self, store: Any, rank: int, world_size: int) -> Any:
        """A raw ProcessGroupGloo; blocks until all ranks are connected."""
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [self._device]
        options._timeout = datetime.timedelta(seconds=GROUP_TIMEOUT_S)
        options._threads = 1
        return dist.ProcessGroupGloo(store, rank, world_size, options)

    def wake(self, process_group: Any) -> None:
        """Nothing to do: gloo's abort() wakes nobody, its sockets are shut instead."""


class NcclBackend:
    """NCCL: groups are built non-blocking and aborted by the monitor thread. Not yet run on a GPU."""

    def create(self, store: Any, rank: int, world_size: int) -> Any:
        """A raw ProcessGroupNCCL; communicators are created lazily at first use."""
        options = dist.ProcessGroupNCCL.Options()
        options.config.blocking = 0
        options._timeout = datetime.timedelta(seconds=GROUP_TIMEOUT_S)
        return dist.ProcessGroupNCCL(store, rank, world_size, options)

    def wake(self, process_group: Any) -> None:
        """Abort all communicators of the group."""
        process_group.abort()


class Group:
    """See the module's docstring. Main thread only, but for `abort` and `deliver`."""

    def __init__(
        self,
        *,
        generation: int,
        rank: int,
        world_size: int,
        backend: Backend,
        publish: Callable[[str, bytes], None],
        build_timeout_s: float = 30.0,
        exclude_ports: Collection[int] = (),
        reaper: Reaper | None = None,
    ) -> None:
        self._reaper = reaper or Reaper()
        self.generation = generation
        self.rank = rank
        self.world_size = world_size
        self._backend = backend
        self._store = GenerationStore(publish, build_timeout_s)
        self._exclude_ports = exclude_ports
        self._waiter = Waiter(generation)
        self._process_group: Any = None
        self._sockets: list[socket.socket] = []
        self._fenced: Fenced | None = None
        self._lock = threading.Lock()

    def deliver(self, values: dict[str, bytes]) -> None:
        """Addresses of the other ranks arrived (any thread)."""
        self._store.deliver(values)

    def build(self) -> None:
        """Connect to all ranks of the generation. Raises Fenced or PeerLost."""

        def construct() -> tuple[Any, list[socket.socket]]:
            before = frozenset(socket_inodes())
            made = self._backend.create(self._store, self.rank, self.world_size)
            return made, duplicate_new_connections(before, self._exclude_ports)

        if self.world_size == 1:
            return
        process_group, sockets = self._call(construct)
        with self._lock:
            self._process_group, self._sockets = process_group, sockets
            if self._fenced is not None:
                shut_down(sockets)
                raise self._fenced.again()

    def isend(self, tensor: torch.Tensor, dst: int, tag: int) -> Work:
        """Start sending a contiguous tensor. Raises Fenced or PeerLost."""
        return self._start(lambda: self._process_group.send([tensor], dst, tag))

    def irecv(self, tensor: torch.Tensor, src: int, tag: int) -> Work:
        """Start receiving into a contiguous tensor of exactly the sent size. Raises Fenced or PeerLost."""
        return self._start(lambda: self._process_group.recv([tensor], src, tag))

    def wait(self, work: Work) -> None:
        """Wait for an operation. Raises Fenced (ordered to leave) or PeerLost (connection broke)."""
        self._call(work.wait)

    def allgather(self, vector: torch.Tensor) -> list[torch.Tensor]:
        """`vector` of every rank, in rank order. All ranks pass the same shape and dtype."""
        if self.world_size == 1:
            return [vector.clone()]
        gathered = [torch.empty_like(vector) for _ in range(self.world_size)]
        self.wait(self._start(lambda: self._process_group.allgather([gathered], [vector])))
        return gathered

    def allgather_bytes(self, data: bytes) -> list[bytes]:
        """`data` of every rank, in rank order; lengths may differ."""
        lengths = self.allgather(torch.tensor([len(data)], dtype=torch.int64))
        sizes = [int(length.item()) for length in lengths]
        padded = torch.zeros(max(1, *sizes), dtype=torch.uint8)
        if data:
            padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return [t[:n].numpy().tobytes() for t, n in zip(self.allgather(padded), sizes, strict=True)]

    def abort(self, fenced: Fenced) -> None:
        """Free the main thread and break every connection. Any thread, at any time, idempotent."""
        with self._lock:
            if self._fenced is not None:
                return
            self._fenced = fenced
            shut_down(self._sockets)
            held = [self._process_group]
        self._store.abort(fenced)
        self._waiter.abort(fenced)
        if held[0] is not None:
            self._backend.wake(held[0])
            self._reaper.drop_later(
                held
            )  # the main thread may have closed the group meanwhile: then ours was the last reference

    def close(self, *pending: object) -> None:
        """Drop the group and `pending` (works, tensors of a broken step). Peers see our end at once."""
        held = list(pending)
        del pending
        with self._lock:
            shut_down(self._sockets)
            sockets, self._sockets = self._sockets, []
            held.append(self._process_group)
            self._process_group = None
        for sock in sockets:
            sock.close()  # our duplicates: a peer gets FIN only when gloo's own is closed too
        self._waiter.close()
        self._reaper.drop_later(held)

    def _start(self, start: Callable[[], Any]) -> Work:
        if self._fenced is not None:
            raise self._fenced.again()
        try:
            work: Work = start()
        except RuntimeError as error:
            raise self._lost(error) from None
        return work

    def _call(self, fn: Callable[[], Any]) -> Any:
        try:
            return self._waiter.call(fn)
        except RuntimeError as error:
            raise self._lost(error) from None

    def _lost(self, error: RuntimeError) -> PeerLost | Fenced:
        if self._fenced is not None:
            return self._fenced.again()
        return PeerLost(f"communication broke: {_first_line(error)}", generation=self.generation, rank=self.rank)


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
