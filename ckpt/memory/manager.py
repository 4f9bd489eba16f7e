"""The snapshot manager process: it owns the memory, so that state outlives the ranks and the agent.

    python -m holdfast.ckpt.memory.manager --socket NAME --job ID --ttl SECONDS --token-env VARIABLE
                                           [--cleanup PATH ...] [--nice N]

Starts in less than 0.1 s (no torch), leads a session of its own, ignores Ctrl-C. Exit 0: goodbye of the
agent, SIGTERM, or nobody with a lease for `ttl`; 2: bad arguments; 3: another manager has the socket. Here
are only the process and its end; server.py has the loop. Invariants:

* one manager per socket name: the name is bound before anything else is touched;
* --cleanup paths are removed when the job is over, never while an agent lives that may use them, and never
  by a second manager that finds the first one running.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import math
import os
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from typing import NoReturn

from .server import Manager

log = logging.getLogger("holdfast.smp")


def _remove(paths: Sequence[str]) -> None:
    """Delete files and directories; a link is deleted, not followed."""
    import shutil  # here, because it costs a tenth of the start and is needed at the end

    for path in paths:
        try:
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            log.warning("cannot remove %s: %s", path, error)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="holdfast.ckpt.memory.manager", allow_abbrev=False)
    parser.add_argument("--socket", required=True, metavar="NAME", help="abstract socket name, without the NUL")
    parser.add_argument("--job", required=True, metavar="ID")
    parser.add_argument("--ttl", required=True, type=float, metavar="SECONDS", help="live so long without a lease")
    parser.add_argument("--token-env", required=True, metavar="VARIABLE", help="where the job token is")
    parser.add_argument("--cleanup", nargs="*", action="extend", default=[], metavar="PATH", help="removed at the end")
    parser.add_argument("--nice", type=int, default=0, metavar="N")
    return parser.parse_args(argv)


def _fail(code: int, message: str) -> NoReturn:
    print(f"holdfast: error: {message}", file=sys.stderr)
    raise SystemExit(code)


def _listen(name: str) -> socket.socket:
    """The socket's name is the lock: it is free exactly when no manager of this job runs here."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(f"\0{name}")
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            _fail(3, f"another snapshot manager has the socket {name}")
        _fail(2, f"cannot listen on the socket {name}: {error}")
    listener.listen(128)
    return listener


def main(argv: Sequence[str]) -> int:
    """Run a manager until its job is over."""
    options = _arguments(argv)
    token = os.environ.pop(options.token_env, "")
    if not token:
        _fail(2, f"{options.token_env} is not set; the agent sets it")
    if not 0 < options.ttl < math.inf:
        _fail(2, f"--ttl {options.ttl:g} is not a number of seconds above 0")
    cleanup = [os.path.abspath(path) for path in options.cleanup]
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s smp %(levelname)s %(message)s")
    with contextlib.suppress(PermissionError):  # we lead a session already
        os.setsid()
    os.chdir("/")
    os.nice(options.nice)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # two descriptors for each half
    manager = Manager(_listen(options.socket), job=options.job, token=token, ttl_ns=int(options.ttl * 1e9))
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: manager.stop("SIGTERM"))
    try:
        manager.run()
        log.info("ended: %s", manager.ended)
    finally:
        # After a fault of ours an agent that lives starts the next manager, and still uses its files.
        if manager.ended or not manager.agent_connected:
            _remove(cleanup)
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stderr.flush()
    # The worker may be reading an arena: leave without taking the interpreter and its memory down around it.
    os._exit(code)
