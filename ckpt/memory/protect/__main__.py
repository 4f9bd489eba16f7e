"""The protector process: arguments, the ready line, and the end.

    python -m holdfast.ckpt.memory.protect --smp NAME --control NAME --job ID --bind HOST:PORT
                                           --token-env VARIABLE --ready-fd N [--nice N] [--scrub-rate BYTES]

Exit 0: goodbye of the agent, SIGTERM, or the snapshot manager's end; 2: bad arguments; 3: another protector
has the control socket; 1: anything else. Leads a session of its own and ignores Ctrl-C. Writes one line of
JSON to --ready-fd when it listens: {"address": "host:port", "pid": N}. Decides nothing: service.py does.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import faulthandler
import json
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from typing import NoReturn

from holdfast.proto.errors import ConfigError, HoldfastError

from .options import Options
from .service import Protector

log = logging.getLogger("holdfast.protect")


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="holdfast.ckpt.memory.protect", allow_abbrev=False)
    parser.add_argument("--smp", required=True, metavar="NAME", help="abstract socket of the snapshot manager")
    parser.add_argument("--control", required=True, metavar="NAME", help="abstract socket to listen on")
    parser.add_argument("--job", required=True, metavar="ID")
    parser.add_argument("--bind", required=True, metavar="HOST:PORT", help="where other hosts reach us; port 0: any")
    parser.add_argument("--token-env", required=True, metavar="VARIABLE", help="where the job token is")
    parser.add_argument("--ready-fd", type=int, default=-1, metavar="N")
    parser.add_argument("--nice", type=int, default=5, metavar="N")
    parser.add_argument("--scrub-rate", type=int, default=64_000_000, metavar="BYTES", help="per second; 0: never")
    return parser.parse_args(argv)


def _fail(code: int, message: str) -> NoReturn:
    print(f"holdfast: error: {message}", file=sys.stderr)
    raise SystemExit(code)


def _listen_control(name: str) -> socket.socket:
    """The socket's name is the lock: one protector per name."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(f"\0{name}")
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            _fail(3, f"another protector has the socket {name}")
        _fail(2, f"cannot listen on the socket {name}: {error}")
    listener.listen(64)
    return listener


def _listen_peers(bind: str) -> socket.socket:
    host, _, port = bind.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        _fail(2, f"--bind {bind} is not HOST:PORT")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        _fail(2, f"cannot listen on {bind}: {error}")
    listener.listen(256)
    return listener


def _ready(fd: int, listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    line = json.dumps({"address": f"{shown}:{port}", "pid": os.getpid()}) + "\n"
    if fd >= 0:
        os.write(fd, line.encode())
        os.close(fd)


def main(argv: Sequence[str]) -> int:
    """Run a protector until its job, or its snapshot manager, is over."""
    arguments = _arguments(argv)
    token = os.environ.pop(arguments.token_env, "")
    if not token:
        _fail(2, f"{arguments.token_env} is not set; the agent sets it")
    if arguments.scrub_rate < 0:
        _fail(2, f"--scrub-rate {arguments.scrub_rate} is not a number of bytes")
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s protect %(levelname)s %(message)s")
    with contextlib.suppress(PermissionError):  # we lead a session already
        os.setsid()
    os.chdir("/")
    os.nice(arguments.nice)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    control, peers = _listen_control(arguments.control), _listen_peers(arguments.bind)
    options = Options(scrub_bytes_per_s=arguments.scrub_rate)
    try:
        protector = Protector(arguments.smp, control, peers, job=arguments.job, token=token, options=options)
    except HoldfastError as error:
        _fail(2 if isinstance(error, ConfigError) else 1, str(error))
    faulthandler.register(signal.SIGUSR1)  # where every thread is, to the log
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: protector.stop("SIGTERM"))
    _ready(arguments.ready_fd, peers)
    protector.run()
    log.info("ended: %s", protector.ended)
    return 0 if protector.orderly else 1


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stderr.flush()
    # Threads may be reading arenas or sockets: leave without taking the interpreter down around them.
    os._exit(code)
