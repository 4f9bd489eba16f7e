"""torch's elastic agent, with one change: a lost rank of a managed job is replaced alone; the others live on.

    torchrun's loop ──▶ _start_workers ──▶ services up, ranks started by torch, handed to the Supervisor
                    ──▶ _monitor_workers ─▶ managed? HEALTHY while a replacement is under way : torch's own
                    ──▶ _shutdown ───────▶ no more replacements, torch ends the ranks, the services end

Everything else (command line, environment, rendezvous, logs, error files, signals, exit codes) stays torch's.
Managed means that a rank has said hello on the agent socket; other jobs get stock behaviour. The private
parts of torch that are used are checked at start (`self_test`). Not here: who is replaced (supervisor.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SubprocessContext

from holdfast.proto import env
from holdfast.proto.errors import ConfigError

from . import registry
from .detector import Limits
from .loop import Loop
from .processes import become_subreaper, kill_leaders
from .services import Coordinator, SnapshotManager
from .session import CoordinatorSession
from .standby import StandbyPool
from .starter import Program
from .supervisor import Supervisor

SNAPSHOTS: Final = "HOLDFAST_SNAPSHOTS"
_BOOTSTRAP_KEY: Final = "holdfast/bootstrap"
_NEEDED: Final = {
    LocalElasticAgent: ("_start_workers", "_monitor_workers", "_shutdown", "_stop_workers"),
    SubprocessContext: ("_start", "_poll", "_close", "pids"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What `holdfast run` adds to torchrun's arguments. `budget` None: as many as `MANAGED_BUDGET`."""

    job: str
    token: str
    bind: str
    events: Path | None
    run_dir: Path | None
    standbys: int
    preload: tuple[str, ...]
    limits: Limits
    budget: int
    faults: str
    snapshots: bool


def self_test() -> str | None:
    """What of torch's private parts is not as expected, or None."""
    for owner, names in _NEEDED.items():
        missing = [name for name in names if not hasattr(owner, name)]
        if missing:
            return f"torch's {owner.__name__} has no {', '.join(missing)}"
    return None


class Host:
    """Everything beside the ranks on this host, from the first start to the end of the job."""

    def __init__(self, options: Options, store: Any, group_rank: int, world_size: int, python: bool) -> None:
        self.options = options
        self.job, self.token = options.job, options.token
        self.name = socket.gethostname()
        self.directory = Path(tempfile.mkdtemp(prefix="holdfast-"))
        self._group_rank = group_rank
        self._coordinator: Coordinator | None = None
        self._smp: SnapshotManager | None = None
        self._supervisor: Supervisor | None = None
        self._loop: Loop | None = None
        self._session: CoordinatorSession | None = None
        self._closed = False
        try:
            self._start(store, world_size, python)
        except BaseException:
            self.close()
            raise

    @property
    def supervisor(self) -> Supervisor:
        """The supervisor of this host's ranks."""
        assert self._supervisor is not None
        return self._supervisor

    def _start(self, store: Any, world_size: int, python: bool) -> None:
        options = self.options
        become_subreaper()
        if self._group_rank == 0:
            events = options.events or self.directory / "events.jsonl"
            self._coordinator = Coordinator(
                bind=options.bind,
                job=self.job,
                world_size=world_size,
                events=events,
                token=self.token,
                directory=self.directory,
            )
            self._coordinator.begin()
        else:
            self._read_bootstrap(store)
        suffix = f"{self.name}-{self._group_rank}" if self._group_rank else self.name
        if SnapshotManager.available():
            cleanup = [self.directory, *([registry.path_of(self.job)] if self._group_rank == 0 else [])]
            self._smp = SnapshotManager(
                name=f"{self.job}-smp-{suffix}",
                job=self.job,
                token=self.token,
                directory=self.directory,
                cleanup=cleanup,
            )
            self._smp.begin()
        self._assemble(f"{self.job}-agent-{suffix}", world_size, python)
        if self._coordinator is not None:
            self._address = self._coordinator.await_ready()
            self._publish(store)
        if self._smp is not None:
            self._smp.await_ready()
        self._run()

    def _read_bootstrap(self, store: Any) -> None:
        told = json.loads(store.get(_BOOTSTRAP_KEY))
        self.job, self.token, self._address = told["job"], told["token"], told["coordinator"]
        if told["host"] != self.name and self._address.startswith(("127.", "localhost", "[::1]")):
            raise ConfigError(
                f"the coordinator on {told['host']} listens on {self._address}, out of reach of this host; "
                "give --coordinator-bind HOST:PORT on the first host"
            )

    def _publish(self, store: Any) -> None:
        told = {"job": self.job, "token": self.token, "coordinator": self._address, "host": self.name}
        store.set(_BOOTSTRAP_KEY, json.dumps(told))
        registry.write(registry.entry(self.job, self._address, self.token, str(self.options.events or "")))

    def _assemble(self, socket_name: str, world_size: int, python: bool) -> None:
        options = self.options
        loop = Loop(lambda error: self.supervisor.on_crash(error))
        session = CoordinatorSession(
            host=self.name,
            token=self.token,
            world_size=world_size,
            on_order=lambda order: self.supervisor.on_order(order),
        )
        self._loop, self._session = loop, session
        self._supervisor = Supervisor(
            loop, session, job=self.job, limits=options.limits, budget=options.budget, host=self.name
        )
        self._socket_name = socket_name
        pool = None
        if options.standbys and python:
            pool = StandbyPool(
                loop,
                target=options.standbys,
                preload=options.preload,
                environment={**os.environ},
                on_change=self._supervisor.on_pool_change,
            )
        self._supervisor.listen(socket_name, pool, self._service_pids)

    def _service_pids(self) -> list[int]:
        return [part.pid for part in (self._coordinator, self._smp) if part is not None]

    def _run(self) -> None:
        assert self._loop is not None
        assert self._session is not None
        supervisor = self.supervisor
        supervisor.set_coordinator(self._address)
        if self._coordinator is not None:
            self._coordinator.adopt(self._loop, self._moved)
        if self._smp is not None:
            self._smp.adopt(self._loop)
        self._session.start(self._address)
        self._loop.start()

    def _moved(self, address: str) -> None:
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
            SNAPSHOTS: "on" if options.snapshots else "off",
        }
        if self._smp is not None:
            found[env.SMP] = self._smp.name
        return found

    def close(self) -> None:
        """End everything; harmless to repeat. After the ranks have ended: the socket is their lifeline."""
        if self._closed:
            return
        self._closed = True
        with contextlib.ExitStack() as stack:
            # Run in reverse order, each whatever the others do.
            stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
            stack.callback(lambda: registry.remove(self.job) if self._group_rank == 0 else None)
            stack.callback(self._kill_unknown)
            for part in (self._smp, self._coordinator, self._supervisor):
                if part is not None:
                    stack.callback(part.close)
            if self._session is not None:
                stack.callback(self._session.close)
            if self._loop is not None:
                stack.callback(self._loop.stop)

    def _kill_unknown(self) -> None:
        if self._supervisor is not None and not self._supervisor.attached:
            kill_leaders(())  # a signal came while torch was starting ranks: it lost count of them


class HoldfastAgent(LocalElasticAgent):
    """See the module's docstring."""

    def __init__(self, *args: Any, options: Options, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._options = options
        self._host: Host | None = None
        self._epoch = 0
        handler = self._worker_group.spec.rdzv_handler
        waiting = handler.num_nodes_waiting
        # torch restarts all workers when a node waits; a managed job keeps its survivors.
        handler.num_nodes_waiting = lambda: 0 if self._managed() else waiting()  # type: ignore[method-assign]

    def _managed(self) -> bool:
        return self._host is not None and self._host.supervisor.view().managed

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        spec = worker_group.spec
        if not isinstance(spec.entrypoint, str):
            return super()._start_workers(worker_group)  # type: ignore[no-any-return]
        if self._host is None:
            python = _python_argv(spec.entrypoint, tuple(spec.args)) is not None and spec.numa_options is None
            group_rank = int(worker_group.group_rank or 0)
            world_size = int(worker_group.workers[0].world_size)
            self._host = Host(self._options, worker_group.store, group_rank, world_size, python)
        supervisor, ours = self._host.supervisor, self._host.environment(self._epoch)
        supervisor.attached = False
        with supervisor.locked(), _environment(ours):
            pids: dict[int, Any] = super()._start_workers(worker_group)
            context = self._pcontext
            if isinstance(context, SubprocessContext):
                programs = {local_rank: self._program(context, local_rank, ours) for local_rank in pids}
                supervisor.attach(context.subprocess_handlers, worker_group.workers, programs, self._epoch)
        self._epoch += 1
        return pids

    def _program(self, context: Any, local_rank: int, ours: dict[str, str]) -> Program:
        arguments = tuple(str(argument) for argument in context.args[local_rank])
        command: tuple[str, ...] = (context.entrypoint, *arguments)
        python = _python_argv(context.entrypoint, arguments)
        if self._worker_group.spec.numa_options is not None:
            from torch.numa.binding import _maybe_wrap_command_args_with_numa_binding

            python = None
            command = tuple(
                _maybe_wrap_command_args_with_numa_binding(
                    command, gpu_index=local_rank, numa_options=self._worker_group.spec.numa_options
                )
            )
        return Program(
            command=command,
            environment={**os.environ, **ours, **context.envs[local_rank]},
            stdout=context.stdouts[local_rank],
            stderr=context.stderrs[local_rank],
            error_file=context.error_files[local_rank],
            python=python,
        )

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if self._host is None:
            return super()._monitor_workers(worker_group)  # type: ignore[no-any-return]
        supervisor = self._host.supervisor
        with supervisor.locked():
            view = supervisor.view()
            if view.stop is not None:
                raise view.stop
            if view.managed and not view.ended:
                return RunResult(state=WorkerState.HEALTHY)
            if view.managed:
                self._remaining_restarts = 0  # replacing was our restart: what is lost now is lost
            result = super()._monitor_workers(worker_group)
            if result.state is not WorkerState.HEALTHY:
                supervisor.freeze()  # torch has ended the others: a hello that comes now changes nothing
            return result  # type: ignore[no-any-return]

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        if self._host is not None:
            self._host.supervisor.freeze()
        super()._shutdown()

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        try:
            if self._host is not None:
                self._host.supervisor.freeze()
            super()._shutdown(death_sig, timeout)
        finally:
            if self._host is not None:
                self._host.close()


def _python_argv(entrypoint: str, arguments: tuple[Any, ...]) -> tuple[tuple[str, ...], bool] | None:
    """(argv, is_module) if a standby can run it: our interpreter with a script or module."""
    rest = [str(argument) for argument in arguments]
    if entrypoint != sys.executable or rest[:1] != ["-u"]:
        return None
    rest = rest[1:]
    is_module = rest[:1] == ["-m"]
    argv = tuple(rest[1:] if is_module else rest)
    return (argv, is_module) if argv else None


@contextlib.contextmanager
def _environment(added: dict[str, str]) -> Iterator[None]:
    """Our variables in this process' environment, from which torch copies the ranks'."""
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
