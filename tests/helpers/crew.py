"""All ranks of a job as engines in one process, one thread each, with deaths at scripted points. No agent.

    crew = Crew(4, "neighbours", layers=...)     engines over a Post: it carries their messages, and breaks when one
    crew.train(9, ["rank=2,step=5,at=forward"])  dies; until all are there, or all others have stopped
    crew.recover()                               what the coordinator decides and the ranks then do: all the real code

What is faked: processes, sockets, who tells whom that somebody died, and snapshots (copies in a dict, every so often).
"""

from __future__ import annotations

import copy
import mmap
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from holdfast.launcher.exactness import Exactness
from holdfast.proto.errors import PeerLost
from holdfast.proto.faults import parse_faults
from holdfast.proto.ids import NO_STEP
from holdfast.proto.lease import PAGE_BYTES, LeasePage
from holdfast.runtime.config import TrainerConfig
from holdfast.runtime.engine import Engine
from holdfast.runtime.joining import Formed, Identity
from holdfast.runtime.lease import Lease
from holdfast.runtime.recovery.decide import Impossible, Report, Resume
from holdfast.runtime.recovery.ladder import Mode, decide, stages
from holdfast.runtime.recovery.rebuild import Restored, restore_state

WAIT_S = 60.0


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours may catch it."""


class Post:
    """Messages between the ranks of one generation."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.changed = threading.Condition()
        self.boxes: dict[tuple[int, int, int], deque[torch.Tensor]] = defaultdict(deque)
        self.gathers: dict[int, dict[int, torch.Tensor]] = defaultdict(dict)
        self.broken = False

    def wait_for(self, ready: Callable[[], bool]) -> None:
        """With the lock held."""
        if not self.changed.wait_for(lambda: self.broken or ready(), WAIT_S) or not ready():
            raise PeerLost("the post broke")

    def shut(self) -> None:
        """Somebody died: whoever waits is freed."""
        with self.changed:
            self.broken = True
            self.changed.notify_all()


class PostGroup:
    """One rank's end, in the place of a Group."""

    def __init__(self, post: Post, rank: int) -> None:
        self._post, self.rank, self.world_size, self.generation = post, rank, post.ranks, 1
        self._gathered = 0
        self.sent = 0

    def isend(self, tensor: torch.Tensor, dst: int, tag: int) -> Callable[[], None]:
        self.sent += tensor.numel() * tensor.element_size()
        with self._post.changed:
            self._post.boxes[self.rank, dst, tag].append(tensor.detach().clone())
            self._post.changed.notify_all()
        return lambda: None

    def irecv(self, tensor: torch.Tensor, src: int, tag: int) -> Callable[[], None]:
        def receive() -> None:
            box = self._post.boxes[src, self.rank, tag]
            with self._post.changed:
                self._post.wait_for(lambda: bool(box))
                sent = box.popleft()
            assert (sent.shape, sent.dtype) == (tensor.shape, tensor.dtype)
            with torch.no_grad():
                tensor.copy_(sent)

        return receive

    def wait(self, work: Callable[[], None]) -> None:
        work()

    def allgather(self, vector: torch.Tensor) -> list[torch.Tensor]:
        self.sent += vector.numel() * vector.element_size()
        self._gathered += 1
        with self._post.changed:
            rows = self._post.gathers[self._gathered]
            rows[self.rank] = vector.detach().clone()
            self._post.changed.notify_all()
            self._post.wait_for(lambda: len(rows) == self.world_size)
        return [rows[rank] for rank in range(self.world_size)]

    def allgather_bytes(self, data: bytes) -> list[bytes]:
        sizes = [int(n) for n in self.allgather(torch.tensor([len(data)]))]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return [t[:n].numpy().tobytes() for t, n in zip(self.allgather(padded), sizes, strict=True)]


class Faults:
    """In the place of an Injector."""

    def __init__(self, rank: int) -> None:
        self.rank, self.faults = rank, []  # type: ignore[var-annotated]

    def at(self, point: str, step: int = -1, microbatch: int = -1) -> None:
        for fault in [f for f in self.faults if f.rank == self.rank and f.at == point]:
            if fault.step in (-1, step) and fault.microbatch in (-1, microbatch):
                self.faults.remove(fault)
                raise Killed


class FakeSession:
    """In the place of a Session without an agent."""

    def __init__(self, identity: Identity) -> None:
        self.identity, self.generation, self.solo, self.managed = identity, 1, False, False
        self.injector = Faults(identity.rank)
        self.lease = Lease(LeasePage(memoryview(mmap.mmap(-1, PAGE_BYTES))))

    def use_backend(self, backend: object) -> None: ...

    def on_fence(self, call: object) -> None: ...

    def check(self) -> None: ...

    def committed(self, *news: object, **more: object) -> None: ...


class Crew:
    """See the module's docstring."""

    def __init__(self, ranks: int, mode: Mode, *, keep_every: int = 0, **arguments: Any) -> None:
        self.arguments, self.mode, self.generation = arguments, mode, 0
        self.keep_every = keep_every
        self.kept: dict[int, dict[int, Any]] = {rank: {} for rank in range(ranks)}
        """Rank -> step -> its state then."""
        self.identity = Identity(0, 0, ranks, 0, "", "", "", "", "", "", snapshots=False, recovery=mode)
        self.engines = [self._engine(rank, 0) for rank in range(ranks)]
        self.dead: set[int] = set()
        self.deaf: dict[int, int] = {}
        """Rank -> step whose barrier it does not hear the end of."""
        self.losses: dict[int, float] = {}
        self.exactness = Exactness()
        self._form(Formed(1, 0, True, False, {}), lambda rank: None)

    def _engine(self, rank: int, incarnation: int) -> Engine:
        identity = replace(self.identity, rank=rank, incarnation=incarnation)
        own = {name: copy.deepcopy(self.arguments[name]) for name in ("data", "state") if name in self.arguments}
        engine = Engine(TrainerConfig(**{**self.arguments, **own}), FakeSession(identity))  # type: ignore[arg-type]
        gather = engine._gather

        def heard(*told: Any) -> Any:
            gathered = gather(*told)
            if self.deaf.get(rank) == engine.step + 1:
                del self.deaf[rank]
                self.post.shut()
                raise PeerLost("cut off")
            return gathered

        engine._gather = heard  # type: ignore[method-assign]
        restore = engine.snapshots.restore

        def from_memory(formed: Formed, over: Any = lambda own: own) -> list[tuple[str, int, int]]:
            source = formed.sources[rank]
            if source.rung not in ("stale", "snapshot"):
                return restore(formed)
            tensors, metadata = self.kept[rank][source.step if source.rung == "stale" else formed.resume_step]
            engine.load(formed.resume_step, tensors, over(metadata))
            return [(source.rung, 0, len(tensors))]

        engine.snapshots.restore = from_memory  # type: ignore[method-assign]
        return engine

    def _keep(self, engine: Engine) -> None:
        if self.keep_every and engine.step % self.keep_every == 0:
            tensors = {(entry.name, entry.state): entry.tensor.clone() for entry in engine.state.entries()}
            self.kept[engine.rank][engine.step] = tensors, copy.deepcopy(engine.metadata())

    def _form(self, formed: Formed, restore: Callable[[int], Any]) -> None:
        self.generation += 1
        self.post = Post(len(self.engines))
        self.groups = [PostGroup(self.post, rank) for rank in range(len(self.engines))]

        def enter(rank: int) -> None:
            engine = self.engines[rank]
            engine._session.generation = self.generation
            engine.injector.at("restore", engine.step)
            restore(rank)
            engine.attach(self.groups[rank])  # type: ignore[arg-type]

        self._together(enter)

    def _together(self, work: Callable[[int], None]) -> None:
        """`work` of every rank that lives, each in a thread; whoever dies ends all of it."""
        failed: list[BaseException] = []

        def run(rank: int) -> None:
            try:
                work(rank)
            except Killed:
                self.dead.add(rank)
                self.post.shut()
            except PeerLost:
                self.post.shut()
            except BaseException as error:  # for the main thread, which raises it
                failed.append(error)
                self.post.shut()

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(self.engines))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
            assert not thread.is_alive(), "a rank hangs"
        if failed:
            raise failed[0]

    def train(self, until: int, faults: Sequence[str] = ()) -> None:
        """Until all are at `until`, or somebody is lost."""

        def steps(rank: int) -> None:
            engine = self.engines[rank]
            engine.injector.faults = list(parse_faults(";".join(faults)))  # type: ignore[assignment]
            self._keep(engine)
            while engine.step < until:
                engine.injector.at("user", engine.step + 1)
                engine.train_step()
                assert engine.report is not None
                self.losses[engine.step] = engine.report.loss
                self._keep(engine)

        self._together(steps)

    def recover(self, faults: Sequence[str] = ()) -> Resume | Impossible:
        """Replace the dead, decide, restore; with further deaths the dead are left for the next call."""
        for rank in self.dead:
            self.engines[rank] = self._engine(rank, 1)
        self.dead = set()
        reports = [self._report(engine) for engine in self.engines]
        decision = decide(self.mode, reports)
        if isinstance(decision, Impossible):
            return decision
        carried = {engine.rank: engine.forward.since for engine in self.engines}
        self.formation = self.exactness.formed(decision, carried, stages(reports))
        told = (self.formation.told, self.formation.since)
        formed = Formed(self.generation + 1, decision.step, decision.fresh, False, dict(decision.sources), 0, *told)
        self.restored: dict[int, Restored] = {}
        for engine in self.engines:
            engine.injector.faults = list(parse_faults(";".join(faults)))  # type: ignore[assignment]

        def restore(rank: int) -> None:
            engine = self.engines[rank]
            self.restored[rank] = restore_state(engine, self.groups[rank], formed, engine._lease)  # type: ignore[arg-type]

        self._form(formed, restore)
        return decision

    def _report(self, engine: Engine) -> Report:
        live, forward = engine.live_step, engine.forward
        live = live if engine._session.identity.incarnation == 0 or live else int(NO_STEP)
        held = {engine.rank: frozenset(self.kept[engine.rank])}
        steps = (forward.ready_step, forward.told_step)
        return Report(engine.rank, live, engine.peers(), held, frozenset(), *steps, engine.kinds())

    def state(self) -> dict[str, torch.Tensor]:
        """Everything of all ranks by name; replicas must be equal."""
        whole: dict[str, torch.Tensor] = {}
        for engine in self.engines:
            for entry in engine.state.entries():
                name = f"{entry.name}@{entry.state}"
                assert torch.equal(whole.setdefault(name, entry.tensor), entry.tensor), f"replicas differ in {name}"
        return whole


def assert_equal(crew: Crew, plain: Crew) -> None:
    """The same names, bits and losses."""
    found, expected = crew.state(), plain.state()
    assert found.keys() == expected.keys()
    different = [name for name in found if not torch.equal(found[name], expected[name])]
    assert different == [], f"{len(different)} of {len(found)}"
    assert crew.losses == plain.losses
