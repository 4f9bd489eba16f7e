"""A rank's way into a generation: leave the old one, join, build the group, restore the state, check, go on.

    await fence(g) ▸ drop the old group ▸ join(g) ▸ Form ▸ build ▸ restore ▸ gate ▸ train
          ▲ any fence or broken connection on the way: begin again with the newest generation

There is no nested recovery: a failure during any of this is simply the next generation. Every wait in here
can be ended by a fence. A process without an agent (plain python, one rank) has no membership: a generation
is then only a local group.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from holdfast.proto import env
from holdfast.proto.errors import ConfigError, Fenced, PeerLost, SnapshotError
from holdfast.proto.faults import parse_faults
from holdfast.proto.lease import PAGE_BYTES, LeasePage, Phase

from ..comm.group import Backend, Group
from ..comm.reaper import Reaper
from ..inject import Injector
from ..joining import Identity, JoinReport
from ..lease import Lease
from ..member import AgentLink, Member
from .ladder import MODES, Mode
from .rebuild import restore_state

if TYPE_CHECKING:
    from ..engine import Engine
    from ..gather import Kept

REAP_DEADLINE_S = 2.0
"""At the end of a job: destructors of healthy groups take milliseconds, those of stuck ones are not waited for."""


def identity_from_environment() -> Identity:
    """Who this process is. The one place of the runtime that reads the environment.

    Raises ConfigError for several ranks without a Holdfast agent.
    """
    get = os.environ.get
    world_size = int(get("WORLD_SIZE", "1"))
    agent = get(env.AGENT, "")
    if world_size > 1 and not agent:
        raise ConfigError(
            f"{world_size} ranks without a Holdfast agent: start the script with `holdfast run` instead of torchrun"
        )
    return Identity(
        rank=int(get("RANK", "0")),
        local_rank=int(get("LOCAL_RANK", "0")),
        world_size=world_size,
        incarnation=int(get(env.INCARNATION, "0")),
        job=get(env.JOB, ""),
        token=get(env.TOKEN, ""),
        agent=agent,
        smp=get(env.SMP, ""),
        coordinator=get(env.COORDINATOR, ""),
        faults=get(env.FAULTS, ""),
        snapshots=get(env.SNAPSHOTS, "on") != "off",
        host=int(get(env.HOST, "0")),
        address=get(env.ADDRESS, "127.0.0.1"),
        protector=get(env.PROTECTOR, ""),
        saver=get(env.SAVER, ""),
        checkpoints=get(env.CHECKPOINTS, ""),
        resume=get(env.RESUME, ""),
        zero=get(env.ZERO, ""),
        recovery=_mode(get(env.RECOVERY, "exact")),
        snapshot_every=int(get(env.SNAPSHOT_EVERY, "0")),
    )


def _mode(text: str) -> Mode:
    for mode in MODES:
        if text == mode:
            return mode
    raise ConfigError(f"{env.RECOVERY} is one of {', '.join(MODES)}, got {text!r}")


class Session:
    """This process' place in the job, over all generations."""

    def __init__(self, identity: Identity, member: Member | None, lease: Lease, injector: Injector) -> None:
        self.identity = identity
        self.lease = lease
        self.injector = injector
        self.generation = 0
        self.reason = ""
        self.solo = False
        self.announced = ""
        """What is not exact about the newest generation; empty if it is."""
        self._member = member
        self._group: Group | None = None
        self._backend: Backend | None = None
        self._reaper = Reaper()

    @staticmethod
    def from_environment() -> Session:
        """Connect to the agent, if there is one. Raises ConfigError."""
        identity = identity_from_environment()
        try:
            faults = parse_faults(identity.faults)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if not identity.agent:
            page = LeasePage(memoryview(mmap.mmap(-1, PAGE_BYTES)))
            injector = Injector(identity.rank, faults, page)
            return Session(identity, None, Lease(page, injector.ordered), injector)
        link = AgentLink(identity)
        injector = Injector(identity.rank, faults, link.page)
        lease = Lease(link.page, injector.ordered)
        member = Member(identity, link, lease)
        return Session(identity, member, lease, injector)

    def check_faults(self) -> None:
        """Raise ConfigError for a scripted fault that could never fire."""
        ranks = self.identity.world_size
        for fault in self.injector.faults:
            if not 0 <= fault.rank < ranks:
                raise ConfigError(f"fault {str(fault)!r} is for rank {fault.rank}, the job has {ranks} ranks")

    def on_fence(self, call: Callable[[], None]) -> None:
        """`call` ends whatever the main thread waits for outside of the group (called by another thread)."""
        if self._member is not None:
            self._member.interrupt = call

    @property
    def managed(self) -> bool:
        """Whether an agent supervises this process."""
        return self._member is not None

    def check(self) -> None:
        """Raise Fenced if this generation is over."""
        if self._member is not None:
            self._member.check()

    def committed(
        self, step: int, loss: float, kept: Kept, *, first: bool, tell: bool = False, alarm: str = ""
    ) -> None:
        """Tell the coordinator, without waiting: a generation's first commit, an alarm, rank 0's news now and then."""
        if self._member is not None and (first or alarm or (self.identity.rank == 0 and (tell or step % 8 == 0))):
            protected = (kept.protected_under(), kept.protected)
            self._member.committed(self.generation, step, loss, first=first, protected=protected, alarm=alarm)

    def goodbye(self, step: int) -> None:
        """The last step is kept everywhere; this rank takes part no more."""
        if self._member is not None:
            self._member.goodbye(step)
        if self._group is not None:
            self._group.close()
            self._group = None
        self._reaper.wait(REAP_DEADLINE_S)

    def config_error(self, message: str) -> None:
        """Report a fatal configuration error to the operator."""
        assert self._member is not None
        self._member.config_error(message)

    # ---- the way into a generation ------------------------------------------------------------------

    def rejoin(self, engine: Engine, until: int, error: Fenced | PeerLost | SnapshotError) -> None:
        """Join the newest generation and make `engine` train in it. Returns when its state is restored."""
        if self._member is None:
            if self._group is not None:
                raise error
            self._group = self._local_group()
            engine.attach(self._group)
            return
        while True:
            # A snapshot that turns out bad is told too: what the next generation resumes from leaves it out.
            if isinstance(error, (PeerLost, SnapshotError)) and self.generation:
                self._member.suspect(self.generation, error.message)
            try:
                self._attempt(engine, until)
                return
            except (Fenced, PeerLost, SnapshotError) as again:
                error = again.with_traceback(None)

    def _attempt(self, engine: Engine, until: int) -> None:
        member = self._member
        assert member is not None
        self.lease.renew(Phase.RECOVERING)
        if self._group is not None:
            self._group.close()
            self._group = None
        self.injector.at("join", engine.step)
        self.lease.renew(Phase.WAITING)
        engine.snapshots.fence()
        generation = member.await_fence(self.generation)
        # Whatever comes of this attempt, only a newer generation can follow it.
        self.generation, self.reason = generation, member.reason
        report = JoinReport(
            plan=engine.signature(),
            compute=engine.compute,
            live_step=engine.live_step,
            peers=engine.peers(),
            held=engine.snapshots.held(),
            until=until,
            image_bytes=engine.snapshots.image_bytes(),
            parity=engine.snapshots.held_parity(),
            disk=engine.checkpoints.steps(),
            recovery=engine.forward.mode,
            ready_step=engine.forward.ready_step,
            told_step=engine.forward.told_step,
            units=engine.kinds() if engine.forward.on else {},
            inexact_since=engine.forward.since,
        )
        formed = member.join(generation, report)
        self.lease.renew(Phase.RECOVERING)
        self.solo = formed.solo
        group = None if formed.solo else self._build(generation, engine.step)
        self.injector.at("restore", engine.step)
        restored = restore_state(engine, group, formed, self.lease)
        self.announced = formed.inexact
        member.restored(
            generation, formed.resume_step, restored.sources, note=restored.note, since=engine.forward.since
        )
        self.lease.joined(generation, formed.resume_step)
        if group is not None:
            engine.attach(group)

    def _build(self, generation: int, step: int) -> Group:
        member = self._member
        assert member is not None
        group = Group(
            generation=generation,
            rank=self.identity.rank,
            world_size=self.identity.world_size,
            backend=self._need_backend(),
            publish=lambda key, value: member.publish(generation, key, value, gather=True),
            exclude_ports=member.control_ports(),
            reaper=self._reaper,
        )
        self._group = group
        member.attach(group)
        self.injector.at("build", step)
        self.lease.renew(Phase.WAITING)
        group.build()
        self.lease.renew(Phase.RECOVERING)
        return group

    def use_backend(self, backend: Backend) -> None:
        """The device's communication backend; kept for the life of the process."""
        self._backend = backend

    def _need_backend(self) -> Backend:
        assert self._backend is not None, "the engine sets the backend"
        return self._backend

    def _local_group(self) -> Group:
        return Group(
            generation=1,
            rank=0,
            world_size=1,
            backend=self._need_backend(),
            publish=lambda key, value: None,
        )
