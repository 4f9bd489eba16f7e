"""The saver process: arguments and the end.

    python -m holdfast.ckpt.saver --smp NAME --job ID --page FILE --dir FOLDER --every N --keep N --keep-best N
                                  --world-size N --start STEP --token-env VARIABLE --news-fd N [--nice N]
                                  [--bind HOST:PORT --name NAME]     in a job of several hosts

Exit 0: SIGTERM, after a last checkpoint; 1: there is no snapshot manager any more; 2: bad arguments. Leads a
session of its own and ignores Ctrl-C. Writes one line of JSON to --news-fd for each checkpoint that was written,
or failed. Decides nothing: service.py does.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from holdfast.proto.errors import ConfigError, HoldfastError

from ..memory.client import SmpClient
from ..universal.disk import Disk
from .hand import Hand
from .page import Page
from .peers import Register, key_of, listen
from .service import Options, Saver
from .team import TeamSaver

log = logging.getLogger("holdfast.saver")


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="holdfast.ckpt.saver", allow_abbrev=False)
    parser.add_argument("--smp", required=True, metavar="NAME", help="abstract socket of the snapshot manager")
    parser.add_argument("--job", required=True, metavar="ID")
    parser.add_argument("--token-env", required=True, metavar="VARIABLE", help="where the job token is")
    parser.add_argument("--page", required=True, metavar="FILE", help="page shared with the ranks")
    parser.add_argument("--dir", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--every", required=True, type=int, metavar="N", help="steps")
    parser.add_argument("--keep", required=True, type=int, metavar="N")
    parser.add_argument("--keep-best", type=int, default=0, metavar="N")
    parser.add_argument("--world-size", required=True, type=int, metavar="N")
    parser.add_argument("--start", type=int, default=-1, metavar="STEP", help="step that the job started from")
    parser.add_argument("--news-fd", type=int, default=-1, metavar="N")
    parser.add_argument(
        "--bind", default="", metavar="HOST:PORT", help="several hosts: where the other savers reach us"
    )
    parser.add_argument("--name", default="", metavar="NAME", help="several hosts: this one, in the folder")
    parser.add_argument("--nice", type=int, default=10, metavar="N")
    return parser.parse_args(argv)


def _fail(code: int, message: str) -> NoReturn:
    print(f"holdfast: error: {message}", file=sys.stderr)
    raise SystemExit(code)


def _team(
    arguments: argparse.Namespace,
    connect: Callable[[], SmpClient],
    page: Page,
    options: Options,
    tell: Callable[[dict[str, Any]], None],
    token: str,
) -> TeamSaver:
    disk, key = Disk(), key_of(options.job, token)
    hand, register = Hand(connect, options.folder, disk), Register(options.folder, options.job, disk)
    server, address = listen(arguments.bind, key, hand)
    saver = TeamSaver(connect, page, options, tell, hand=hand, server=server, register=register, key=key, disk=disk)
    register.enter(arguments.name, address)
    return saver


def main(argv: Sequence[str]) -> int:
    """Run a saver until its job is over."""
    arguments = _arguments(argv)
    token = os.environ.pop(arguments.token_env, "")
    if not token:
        _fail(2, f"{arguments.token_env} is not set; the agent sets it")
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s saver %(levelname)s %(message)s")
    with contextlib.suppress(PermissionError):  # we lead a session already
        os.setsid()
    folder = arguments.dir.absolute()
    os.chdir("/")
    os.nice(arguments.nice)
    options = Options(
        folder=folder,
        every=arguments.every,
        keep=arguments.keep,
        keep_best=arguments.keep_best,
        world_size=arguments.world_size,
        start=arguments.start,
        job=arguments.job,
    )

    def tell(news: dict[str, Any]) -> None:
        log.info("%s", news)
        if arguments.news_fd >= 0:
            with contextlib.suppress(BrokenPipeError):
                os.write(arguments.news_fd, json.dumps(news).encode() + b"\n")

    def connect() -> SmpClient:
        return SmpClient(arguments.smp, job=arguments.job, token=token, role="admin")

    try:
        page = Page(arguments.page)
        saver = (
            _team(arguments, connect, page, options, tell, token)
            if arguments.bind
            else (Saver(connect, page, options, tell))
        )
    except HoldfastError as error:
        _fail(2 if isinstance(error, ConfigError) else 1, str(error))
    except OSError as error:
        _fail(1, f"the savers of other hosts cannot be reached: {error.strerror or error}")
    faulthandler.register(signal.SIGUSR1)  # where every thread is, to the log
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: saver.stop())
    return 0 if saver.run() else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
