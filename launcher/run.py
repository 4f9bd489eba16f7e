"""`holdfast run`: torchrun's command line and behaviour, plus ours.

    argv ──▶ torchrun's parser + our options ──▶ checks (exit 2 before anything starts)
         ──▶ torch.distributed.run.run, with our agent in the place of torch's LocalElasticAgent

Exit codes: 0 all ranks ended well, 1 the job failed or was stopped by a signal, 2 it cannot be done as asked.
What the user got wrong is one line on stderr. Not here: supervision (agent.py, supervisor.py).
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import gc
import importlib
import importlib.util
import io
import logging
import os
import re
import secrets
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, NoReturn

from holdfast.ckpt.memory.redundancy import Redundancy
from holdfast.proto import env
from holdfast.proto.errors import ConfigError, HoldfastError
from holdfast.proto.faults import parse_faults

from . import registry
from .bootstrap import is_ours, own_address
from .detector import Limits
from .options import add_options
from .processes import tell
from .recovering import plan_recovering
from .runfolder import RunFolder
from .saving import check_history, plan_saving
from .standby import begin_early

if TYPE_CHECKING:
    from .site import Options

MANAGED_BUDGET: Final = 1000
LEASE_LEAST_S: Final = 3.0
CPP_LOG: Final = "TORCH_CPP_LOG_LEVEL"
_JOB_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")

EXAMPLES: Final = """\
examples:
  holdfast run --nproc-per-node 4 train.py --config llama.toml
  holdfast run --nproc-per-node 4 --standbys 2 --log-dir logs --tee 3 train.py
  holdfast run --nproc-per-node 4 -m package.train
  holdfast run --nproc-per-node 4 --checkpoint-dir runs/a --checkpoint-every 500 --resume latest train.py
  holdfast run --nproc-per-node 4 --faults rank=2,step=5,at=backward:3,kind=kill train.py
  holdfast run --nnodes 8 --nproc-per-node 4 --rdzv-endpoint host0:29400 --redundancy rs:6+2 train.py   (on 8 hosts)

Every option of torchrun works as there. A rank that says hello to the agent (holdfast.runtime.Trainer does)
is replaced alone when it dies or hangs; a plain torchrun script is run as torchrun runs it.
"""


class Stopped(Exception):
    """The run ended with an exit code that is not 0; `message`, if any, was not printed yet."""

    def __init__(self, code: int, message: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message


def build_parser() -> argparse.ArgumentParser:
    """torchrun's parser with our options added."""
    from torch.distributed.run import get_args_parser

    parser: argparse.ArgumentParser = get_args_parser()
    parser.prog = "holdfast run"
    parser.description = "Run a distributed training script and keep it running while its processes fail."
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = partial(_refuse, parser)  # type: ignore[method-assign]
    for action in parser._actions:
        if action.dest == "max_restarts":
            action.help = (
                f"Replacements of single ranks before the job fails (default {MANAGED_BUDGET}); for scripts that "
                "do not use holdfast.runtime: restarts of the whole group, as torchrun's (default 0)."
            )
            if action.default == 0:
                action.default = None  # else PET_MAX_RESTARTS has set it
    add_options(parser)
    return parser


def _refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """One line; with the nearest option for one that does not exist."""
    unknown = re.search(r"unrecognized arguments: (-\S+)", message)
    if unknown:
        name = unknown[1].partition("=")[0]
        known = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(name, known, n=1)
        message = f"unknown option {name}" + (f"; did you mean {near[0]}?" if near else "")
    elif "training_script" in message:
        message = "no script given"
    raise Stopped(2, f"{message} (see holdfast run --help)")


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Arguments for torch, and fields for agent.Options. Raises ConfigError, Stopped; starts nothing."""
    from torch.distributed.run import parse_min_max_nnodes

    arguments = build_parser().parse_args(list(argv))
    for name in ("lease_min", "lease_start", "lease_user", "stop_grace", "host_wait", "host_lease"):
        if not getattr(arguments, name) > 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be above 0 seconds, got {getattr(arguments, name)}")
    if arguments.host_lease < LEASE_LEAST_S:
        raise ConfigError(
            f"--host-lease must be at least {LEASE_LEAST_S:g} seconds, got {arguments.host_lease:g}: less would lose "
            "hosts while another coordinator takes over"
        )
    if arguments.standbys < 0:
        raise ConfigError(f"--standbys must be 0 or more, got {arguments.standbys}")
    if arguments.max_restarts is not None and arguments.max_restarts < 0:
        raise ConfigError(f"--max-restarts must be 0 or more, got {arguments.max_restarts}")
    for name in ("coordinator_bind", "join"):
        text = getattr(arguments, name)
        host, _, port = text.rpartition(":")
        if text and (not host or not port.isascii() or not port.isdigit() or int(port) > 65535):
            raise ConfigError(f"--{name.replace('_', '-')} is HOST:PORT, got {text!r}")
    try:
        parse_faults(arguments.faults)
    except ValueError as error:
        raise ConfigError(f"--faults: {error}") from None
    _check_torchrun(arguments)
    _check_script(arguments)
    job = arguments.job_id or secrets.token_hex(4)
    if not _JOB_ID.fullmatch(job):
        raise ConfigError(f"--job-id has letters, digits, '.', '_' and '-' (at most 40), got {job!r}")
    if any(one.job == job for one in registry.list_jobs()):
        raise ConfigError(f"a job {job!r} already runs on this machine")
    return arguments, {
        "job": job,
        "token": os.environ.get(env.TOKEN) or secrets.token_hex(16),
        "bind": arguments.coordinator_bind,
        "endpoint": arguments.rdzv_endpoint or f"{arguments.master_addr}:{arguments.master_port}",
        "local_address": arguments.local_addr or "",
        "domain": _domain(arguments.failure_domain),
        "redundancy": arguments.redundancy,
        "host_lease_s": arguments.host_lease,
        "coordinator": (
            *("--redundancy", arguments.redundancy, "--lost-host", arguments.lost_host),
            *("--host-wait", str(arguments.host_wait), "--host-lease", str(arguments.host_lease)),
        ),
        "standbys": arguments.standbys,
        "preload": tuple(name for name in arguments.preload.split(",") if name),
        "limits": Limits(
            lease_min_ns=int(arguments.lease_min * 1e9),
            start_ns=int(arguments.lease_start * 1e9),
            user_ns=int(arguments.lease_user * 1e9),
            stop_grace_ns=int(arguments.stop_grace * 1e9),
        ),
        "budget": MANAGED_BUDGET if arguments.max_restarts is None else arguments.max_restarts,
        "faults": arguments.faults,
        "zero": arguments.zero,
        "recovering": plan_recovering(arguments),
        "saving": plan_saving(arguments, parse_min_max_nnodes(arguments.nnodes)[1]),
    }


def _check_torchrun(arguments: argparse.Namespace) -> None:
    """What torch would answer with a traceback, answered with a line; and its defaults without its banner."""
    from torch.distributed.elastic.multiprocessing import Std
    from torch.distributed.run import determine_local_world_size, parse_min_max_nnodes

    try:
        least, most = parse_min_max_nnodes(arguments.nnodes)
    except (RuntimeError, ValueError):
        raise ConfigError(f"--nnodes is N or MIN:MAX, got {arguments.nnodes!r}") from None
    if not 0 < least <= most:
        raise ConfigError(f"--nnodes must be at least 1 and rising, got {arguments.nnodes!r}")
    try:
        Redundancy.parse(arguments.redundancy, least)
    except ConfigError as error:
        raise ConfigError(f"--redundancy: {error.message}") from None
    try:
        processes = determine_local_world_size(arguments.nproc_per_node)
    except ValueError as error:
        raise ConfigError(f"--nproc-per-node: {error}") from None
    if processes < 1:
        raise ConfigError(f"--nproc-per-node must be at least 1, got {processes}")
    for name in ("redirects", "tee"):
        try:
            Std.from_str(getattr(arguments, name))
        except ValueError:
            raise ConfigError(f"--{name} is 0..3 or RANK:0..3,..., got {getattr(arguments, name)!r}") from None
    if arguments.module and arguments.no_python:
        raise ConfigError("--module and --no-python exclude each other")
    if processes > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def _domain(given: str) -> str:
    """The failure domain of this host: a label, or its line in a file."""
    if not given or not os.path.isfile(given):
        return given
    name = socket.gethostname()
    for line in Path(given).read_text().splitlines():
        words = line.split()
        if len(words) == 2 and words[0] == name:
            return words[1]
    raise ConfigError(f"--failure-domain: {given} has no line '{name} LABEL'")


def _check_script(arguments: argparse.Namespace) -> None:
    script = arguments.training_script
    if arguments.module:
        with _path_of_ranks():
            try:
                found = importlib.util.find_spec(script) is not None
            except (ImportError, ValueError):
                found = False
        if not found:
            raise ConfigError(f"no module named {script}")
    elif not arguments.no_python and not os.path.exists(script):
        raise ConfigError(f"no such script: {script}")


@contextlib.contextmanager
def _path_of_ranks() -> Iterator[None]:
    """sys.path as `python -m` will have it."""
    before = list(sys.path)
    if not sys.flags.safe_path:
        sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path[:] = before


def launch(arguments: argparse.Namespace, fields: dict[str, Any]) -> None:
    """Run the job to its end. Raises Stopped for every end but a good one."""
    from torch.distributed import DistError
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
    from torch.distributed.elastic.rendezvous import RendezvousError

    from .site import Options
    from .spare import serve_as_spare

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # --tee into a pipe or a file: lines as they come
    folder = RunFolder(arguments, fields["job"])
    if arguments.max_restarts is None:
        arguments.max_restarts = 0
    options = Options(events=folder.events, run_dir=folder.folder, **fields)
    if arguments.nnodes not in ("1", "1:1"):
        _place(arguments)
    try:
        with _signals(arguments.signals_to_handle), _agent(options):
            if not serve_as_spare(arguments, options):
                _check_history(options)
                record(torchrun.run)(arguments)
    except ChildFailedError as error:
        raise Stopped(1, f"the job failed\n{error}") from None
    except SignalException as error:
        raise Stopped(1, f"stopped by {error.sigval.name}") from None
    except (RendezvousError, DistError) as error:
        raise Stopped(1, f"no rendezvous: {str(error).splitlines()[0]}") from None
    finally:
        folder.tidy()


def _check_history(options: Options) -> None:
    """Of a job that starts now: one that runs already has its history in the folder."""
    saving = options.saving
    if saving.folder is not None:
        check_history(saving.folder, saving.start, asked=bool(saving.asked))


def _place(arguments: argparse.Namespace) -> None:
    """Tell torch's rendezvous what it would otherwise guess from host names, which need not resolve anywhere."""
    endpoint = arguments.rdzv_endpoint or f"{arguments.master_addr}:{arguments.master_port}"
    if not arguments.local_addr:
        arguments.local_addr = own_address("", endpoint)
    if arguments.rdzv_backend == "c10d" and "is_host" not in arguments.rdzv_conf:
        from torch.distributed.elastic.rendezvous.utils import _matches_machine_hostname

        # What it is told it insists on; where it guesses right it also copes with a second agent on the machine.
        ours = is_ours(endpoint)
        if ours != _matches_machine_hostname(endpoint.rpartition(":")[0].strip("[]")):
            arguments.rdzv_conf = ",".join(filter(None, (arguments.rdzv_conf, f"is_host={ours}")))


@contextlib.contextmanager
def _agent(options: Options) -> Iterator[None]:
    """Our agent in the place of torch's, if torch is as we know it."""
    from .agent import HoldfastAgent, self_test

    launcher: Any = importlib.import_module("torch.distributed.launcher.api")
    # One line per rank that is asked to end says nothing, and would bury the one line that says why.
    multiprocessing_log = logging.getLogger("torch.distributed.elastic.multiprocessing.api")
    multiprocessing_log.addFilter(lambda record: "closing signal" not in record.getMessage())
    mismatch = self_test()
    if mismatch is not None:
        tell(f"{mismatch}: ranks are not replaced, this is plain torchrun")
        yield
        return
    stock = launcher.LocalElasticAgent
    launcher.LocalElasticAgent = partial(HoldfastAgent, options=options)
    try:
        yield
    finally:
        launcher.LocalElasticAgent = stock


@contextlib.contextmanager
def _signals(names: str) -> Iterator[None]:
    """Death signals raise from the beginning: torch sets its handlers only when the ranks start."""
    from torch.distributed.elastic.multiprocessing.api import SignalException

    def stop(number: int, frame: FrameType | None) -> None:
        raise SignalException(f"got signal {number}", sigval=signal.Signals(number))

    known = [name.strip() for name in names.split(",") if name.strip() in signal.Signals.__members__]
    before = {name: signal.signal(signal.Signals[name], stop) for name in known}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(signal.Signals[name], handler)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `holdfast run`; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    # Stock restarts of the whole group find the dead ranks' addresses in the shared store and fail with gloo.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    zygote = begin_early(argv, os.environ)  # what takes longest first: it imports while we do
    # The first host may be lost: torch's rendezvous in C++ would print a stack for each word it cannot say to it.
    quiet = os.environ.setdefault(CPP_LOG, "ERROR") == "ERROR"
    try:
        arguments, fields = parse(argv)
        if quiet:
            del os.environ[CPP_LOG]  # read by now, and not meant for the ranks
        launch(arguments, fields | {"zygote": zygote})
    except Stopped as stopped:
        if stopped.message:
            print(f"holdfast: error: {stopped.message}", file=sys.stderr)
        return stopped.code
    except HoldfastError as error:
        print(f"holdfast: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130  # nothing had started
    finally:
        if zygote is not None:
            zygote.close()
        gc.freeze()  # Python looks for garbage when it ends, in all that torch made too: half a second
    return 0


if __name__ == "__main__":
    sys.exit(main())
