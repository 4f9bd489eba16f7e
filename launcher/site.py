"""A host of the job: everything that runs beside its ranks, from the first start to the end of the job.

    Host ── coordinator (one leads, the others stand by) ── snapshot manager ── protector (several hosts)
        └── loop thread: supervisor, standbys, the stream to the coordinator in charge, the door

A spare has the same, only no ranks yet. Not here: how torchrun starts ranks (agent.py), supervision
(supervisor.py). Invariant: after close() nothing of it is left, whatever had been started.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from holdfast.proto import env
from holdfast.proto.errors import ConfigError

from . import registry
from .bootstrap import Bootstrap
from .detector import Limits
from .eventlog import claim
from .hosts import Host as Described
from .loop import Loop
from .processes import become_subreaper, kill_leaders
from .protection import Protection
from .recovering import Recovering
from .saving import SaverProcess, Saving
from .services import Coordinator, SnapshotManager
from .session import CoordinatorSession, Hooks
from .sharing import mark, refusal
from .standby import StandbyPool, Zygote
from .supervisor import Supervisor

FENCE_PART: Final = 0.8
"""Part of the lease after which a host that hears no coordinator ends its ranks: before the others count on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What `holdfast run` adds to torchrun's arguments. `budget` None: as many as `MANAGED_BUDGET`."""

    job: str
    token: str
    bind: str
    events: Path | None
    run_dir: Path | None
    endpoint: str  # of the rendezvous
    local_address: str
    domain: str
    redundancy: str
    host_lease_s: float
    coordinator: tuple[str, ...]  # options of every coordinator
    standbys: int
    preload: tuple[str, ...]
    limits: Limits
    budget: int
    faults: str
    zero: str
    recovering: Recovering
    saving: Saving
    zygote: Zygote | None = None  # started already


@dataclass(frozen=True, slots=True)
class Site:
    """What this host is in the job. `index` -1: it has no ranks yet and waits to be given some."""

    index: int
    hosts: int  # that the job starts with
    world_size: int
    capacity: int  # ranks it is meant for
    address: str  # where the other hosts reach it
    python: bool  # whether standbys can run the program

    @property
    def leads(self) -> bool:
        """Whether its coordinator is the first in charge."""
        return self.index == 0

    @property
    def several(self) -> bool:
        """Whether the job has other hosts."""
        return self.hosts > 1 or self.index < 0


class Host:
    """Everything beside the ranks on this host, from the first start to the end of the job."""

    def __init__(self, options: Options, site: Site, bootstrap: Bootstrap | None = None) -> None:
        """`bootstrap`: what the first host published; None on the first host itself."""
        self.options = options
        self.site = site
        self.job = bootstrap.job if bootstrap is not None else options.job
        self.token = bootstrap.token if bootstrap is not None else options.token
        self.saving = options.saving.as_told(bootstrap.resume) if bootstrap is not None else options.saving
        self.name = socket.gethostname()
        self.directory = Path(tempfile.mkdtemp(prefix="holdfast-"))
        self._address = bootstrap.coordinator if bootstrap is not None else ""
        self._coordinator: Coordinator | None = None
        self._smp: SnapshotManager | None = None
        self._protection: Protection | None = None
        self._saver: SaverProcess | None = None
        self._supervisor: Supervisor | None = None
        self._loop: Loop | None = None
        self._session: CoordinatorSession | None = None
        self._door: socket.socket | None = None
        self._closed = False
        try:
            why = refusal(self.saving.folder, self.job, self.token, bootstrap)
            if why and site.index < 0:
                raise ConfigError(why)
            self._start()
            if why:
                self.supervisor.refuse(why)
        except BaseException:
            self.close()
            raise

    @property
    def supervisor(self) -> Supervisor:
        """The supervisor of this host's ranks."""
        assert self._supervisor is not None
        return self._supervisor

    def bootstrap(self) -> Bootstrap:
        """What the other hosts must know to take part."""
        saving = self.saving
        return Bootstrap(
            self.job,
            self.token,
            self._address,
            self.name,
            self.site.world_size,
            resume=saving.told(),
            checkpoints=saving.folder is not None,
        )

    def _start(self) -> None:
        options, site = self.options, self.site
        become_subreaper()
        bind = options.bind or f"{site.address}:0"
        events = options.events or self.directory / "events.jsonl"
        claim(events, self.job, anew=site.leads)
        if site.leads or site.several:
            self._coordinator = Coordinator(
                bind=bind if site.leads else f"{site.address}:0",
                job=self.job,
                world_size=site.world_size,
                events=events,
                token=self.token,
                directory=self.directory,
                options=[*options.coordinator, "--hosts", str(site.hosts), *([] if site.leads else ["--standby"])],
            )
            self._coordinator.begin()
        suffix = f"{self.name}-{site.index}" if site.index > 0 else self.name
        suffix += f"-{secrets.token_hex(3)}" if site.index < 0 else ""
        if SnapshotManager.available():
            smp = f"{self.job}-smp-{suffix}"
            entry = [registry.path_of(self.job)] if site.leads else []
            self._smp = SnapshotManager(
                name=smp, job=self.job, token=self.token, directory=self.directory, cleanup=[self.directory, *entry]
            )
            self._smp.begin()
            if self.saving.folder is not None:
                self._saver = self._make_saver(self.saving.folder, smp, suffix, events)
            if site.several and options.redundancy != "none":
                self._protection = Protection(
                    name=f"{self.job}-protect-{suffix}",
                    smp=smp,
                    bind=f"{site.address}:0",
                    job=self.job,
                    token=self.token,
                    directory=self.directory,
                    on_refused=lambda why: self.supervisor.refuse(why),
                )
        if self._smp is not None:
            self._smp.await_ready()
        if self._saver is not None:
            self._saver.begin()
        if self._protection is not None:
            self._protection.begin()
        own = self._coordinator.await_ready() if self._coordinator is not None else ""
        self._address = self._address or own
        if self._protection is not None:
            self._protection.await_ready()
        self._assemble(f"{self.job}-agent-{suffix}", own)
        registry.write(registry.entry(self.job, self._address, self.token, str(options.events or "")))
        self._run()

    def _make_saver(self, folder: Path, smp: str, name: str, events: Path) -> SaverProcess:
        site = self.site
        if site.leads and site.several:
            mark(folder, self.job, self.token)
        return SaverProcess(
            self.saving,
            smp=smp,
            job=self.job,
            token=self.token,
            world_size=site.world_size,
            directory=self.directory,
            events=events,
            bind=f"{site.address}:0" if site.several else "",
            name=name,
        )

    def _open_door(self) -> str:
        """A socket that takes connections as long as this process lives."""
        self._door = socket.create_server((self.site.address, 0), backlog=64)
        self._door.setblocking(False)
        assert self._loop is not None
        self._loop.watch(self._door.fileno(), self._at_the_door)
        return f"{self.site.address}:{self._door.getsockname()[1]}"

    def _at_the_door(self) -> None:
        assert self._door is not None
        with contextlib.suppress(OSError):
            self._door.accept()[0].close()

    def _assemble(self, socket_name: str, own: str) -> None:
        options, site = self.options, self.site
        loop = Loop(lambda error: self.supervisor.on_crash(error))
        self._loop = loop
        me = Described(
            index=site.index,
            name=self.name,
            address=site.address,
            door=self._open_door() if site.several else "",
            coordinator=own,
            protector=self._protection.address if self._protection is not None else "",
            capacity=site.capacity,
            domain=options.domain,
        )
        hooks = Hooks(
            on_order=lambda order: self.supervisor.on_order(order),
            on_leader=lambda address: loop.post(lambda: self._led_from(address)),
            on_fenced=lambda: self.supervisor.fence("this host was given up by the others"),
        )
        session = CoordinatorSession(me=me, token=self.token, world_size=site.world_size, hooks=hooks)
        self._session = session
        self._supervisor = Supervisor(
            loop, session, job=self.job, limits=options.limits, budget=options.budget, host=self.name
        )
        if site.several:
            self._supervisor.several_hosts(options.host_lease_s * FENCE_PART)
        if self._protection is not None:
            self._supervisor.on_topology = self._protection.topology
        self._socket_name = socket_name
        pool = None
        if options.standbys and site.python:
            pool = StandbyPool(
                loop,
                target=options.standbys,
                preload=options.preload,
                environment={**os.environ},
                on_change=self._supervisor.on_pool_change,
                early=options.zygote,
            )
        elif options.zygote is not None:
            options.zygote.close()  # nobody will ask it for anything
        self._supervisor.listen(socket_name, pool, self._service_pids)

    def _service_pids(self) -> list[int]:
        return [part.pid for part in (self._coordinator, self._smp, self._protection, self._saver) if part is not None]

    def _run(self) -> None:
        assert self._loop is not None
        assert self._session is not None
        supervisor = self.supervisor
        supervisor.set_coordinator(self._address)
        if self._coordinator is not None:
            self._coordinator.adopt(self._loop, self._moved)
        if self._smp is not None:
            self._smp.adopt(self._loop)
        if self._saver is not None:
            self._saver.adopt(self._loop)
        if self._protection is not None:
            self._protection.adopt(self._loop)
        self._session.start(self._address)
        self._loop.start()

    def _moved(self, address: str) -> None:
        """Our own coordinator was restarted, and listens there."""
        assert self._session is not None
        self._session.moved(address)
        if not self.site.several:
            self._led_from(address)

    def _led_from(self, address: str) -> None:
        """The coordinator in charge listens there."""
        self.supervisor.on_coordinator_moved(address)
        registry.write(registry.entry(self.job, address, self.token, str(self.options.events or "")))

    def environment(self, epoch: int) -> dict[str, str]:
        """What every rank of this host finds in its environment besides torchrun's."""
        options = self.options
        found = {
            env.JOB: self.job,
            env.TOKEN: self.token,
            env.AGENT: self._socket_name,
            env.COORDINATOR: self.supervisor.coordinator,
            env.INCARNATION: str(epoch),
            env.FAULTS: options.faults,
            env.RUN_DIR: str(options.run_dir or ""),
            **options.recovering.environment(),
        }
        found[env.ADDRESS] = self.site.address
        found[env.HOST] = str(self.site.index)
        if self._protection is not None:
            found[env.PROTECTOR] = self._protection.name
        if self._smp is not None:
            found[env.SMP] = self._smp.name
        if self._saver is not None:
            found |= {env.SAVER: str(self._saver.page), env.CHECKPOINTS: str(self.saving.folder)}
        if self.saving.resume is not None:
            found[env.RESUME] = self.saving.told()
        if options.zero:
            found[env.ZERO] = options.zero
        return found

    def close(self, *, stopped: bool = False) -> None:
        """End everything; harmless to repeat. After the ranks have ended: the socket is their lifeline."""
        if self._closed:
            return
        self._closed = True
        if stopped and self._saver is not None:
            self._saver.stopped()
        with contextlib.ExitStack() as stack:
            # Run in reverse order, each whatever the others do.
            stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
            stack.callback(registry.remove, self.job)
            stack.callback(self._kill_unknown)
            parts = (self._smp, self._saver, self._protection, self._coordinator, self._supervisor, self._door)
            for part in parts:
                if part is not None:
                    stack.callback(part.close)
            if self._session is not None:
                stack.callback(self._session.close)
            if self._loop is not None:
                stack.callback(self._loop.stop)

    def _kill_unknown(self) -> None:
        if self._supervisor is not None and not self._supervisor.attached:
            kill_leaders(())  # a signal came while torch was starting ranks: it lost count of them
