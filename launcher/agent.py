"""torch's elastic agent, with two changes: a lost rank of a managed job is replaced alone, the others live on; and
Python programs are forked from the zygote where it can be had, so that torch is imported once and not by each rank.

    torchrun's loop ──▶ _start_workers ──▶ services up, ranks started by torch, handed to the Supervisor
                    ──▶ _monitor_workers ─▶ managed? HEALTHY while a replacement is under way : torch's own
                    ──▶ _shutdown ───────▶ no more replacements, torch ends the ranks, the services end

Everything else (command line, environment, rendezvous, logs, error files, signals, exit codes) stays torch's.
Managed means that a rank has said hello on the agent socket; other jobs get stock behaviour. The private
parts of torch that are used are checked at start (`self_test`). Not here: who is replaced (supervisor.py), what
runs beside the ranks (site.py).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any, Final

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException, SubprocessContext

from .bootstrap import own_address, publish, receive
from .site import Host, Options, Site
from .standby import Standby
from .starter import Program, python_argv
from .zygote import Assignment

multiprocessing: Any = importlib.import_module("torch.distributed.elastic.multiprocessing.api")

_NEEDED: Final = {
    multiprocessing: ("get_subprocess_handler",),
    LocalElasticAgent: ("_start_workers", "_monitor_workers", "_shutdown", "_stop_workers", "_exit_barrier"),
    SubprocessContext: ("_start", "_poll", "_close", "pids"),
}


def self_test() -> str | None:
    """What of torch's private parts is not as expected, or None."""
    for owner, names in _NEEDED.items():
        missing = [name for name in names if not hasattr(owner, name)]
        if missing:
            return f"torch's {owner.__name__} has no {', '.join(missing)}"
    return None


class HoldfastAgent(LocalElasticAgent):
    """See the module's docstring."""

    def __init__(self, *args: Any, options: Options, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._options = options
        self._host: Host | None = None
        self._epoch = 0
        self._left = False  # torch's rendezvous
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
            self._host = self._open_host(worker_group)
        supervisor, ours = self._host.supervisor, self._host.environment(self._epoch)
        supervisor.attached = False
        standbys = supervisor.first_standbys(spec.local_world_size) if self._host.site.python else []
        with supervisor.locked(), _environment(ours), _forked(standbys):
            pids: dict[int, Any] = super()._start_workers(worker_group)
            context = self._pcontext
            if isinstance(context, SubprocessContext):
                programs = {local_rank: self._program(context, local_rank, ours) for local_rank in pids}
                supervisor.attach(context.subprocess_handlers, worker_group.workers, programs, self._epoch)
        self._epoch += 1
        return pids

    def _open_host(self, worker_group: WorkerGroup) -> Host:
        spec, options = worker_group.spec, self._options
        assert isinstance(spec.entrypoint, str)
        hosts = int(worker_group.group_world_size or 1)
        site = Site(
            index=int(worker_group.group_rank or 0),
            hosts=hosts,
            world_size=int(worker_group.workers[0].world_size),
            capacity=spec.local_world_size,
            address=own_address(options.local_address, options.endpoint) if hosts > 1 else "127.0.0.1",
            python=python_argv(spec.entrypoint, tuple(spec.args)) is not None and spec.numa_options is None,
        )
        if not site.leads:
            return Host(options, site, receive(worker_group.store))
        host = Host(options, site)
        if site.several:
            publish(worker_group.store, host.bootstrap())
        return host

    def _leave_rendezvous(self) -> None:
        """The first host may go, and torch's rendezvous with it: nobody is to complain of that every few seconds."""
        handler: Any = self._worker_group.spec.rdzv_handler
        if hasattr(handler, "_stop_heartbeats"):
            handler._stop_heartbeats()
        handler.shutdown = lambda: True

    def _exit_barrier(self) -> None:
        if not self._managed():  # a managed job has ended for all of its hosts at once
            super()._exit_barrier()  # type: ignore[no-untyped-call]

    def _program(self, context: Any, local_rank: int, ours: dict[str, str]) -> Program:
        arguments = tuple(str(argument) for argument in context.args[local_rank])
        command: tuple[str, ...] = (context.entrypoint, *arguments)
        python = python_argv(context.entrypoint, arguments)
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
            if view.good:
                supervisor.freeze()
                values = {worker.global_rank: None for worker in worker_group.workers}
                return RunResult(state=WorkerState.SUCCEEDED, return_values=values)
            if view.managed and not view.ended:
                if self._host.site.several and not self._left:
                    self._left = True
                    self._leave_rendezvous()
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
                self._host.close(stopped=isinstance(sys.exception(), SignalException))


@contextlib.contextmanager
def _forked(standbys: list[Standby]) -> Iterator[None]:
    """Let torch start its ranks in these; the rest, if any, as fresh processes."""
    stock = multiprocessing.get_subprocess_handler

    def start(**given: Any) -> Any:
        python = python_argv(given["entrypoint"], given["args"])
        assert python is not None
        argv, is_module = python
        assignment = Assignment({**os.environ, **given["env"]}, list(argv), is_module, os.getcwd())
        logs = {"stdout": given["stdout"] or "", "stderr": given["stderr"] or ""}
        while standbys:
            handler = standbys.pop().become(given["local_rank_id"], assignment, **logs)
            if handler is not None:
                return handler
        return stock(**given)

    multiprocessing.get_subprocess_handler = start if standbys else stock
    try:
        yield
    finally:
        multiprocessing.get_subprocess_handler = stock
        for standby in standbys:
            standby.discard()


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
