"""Checkpoints of a job as `holdfast run` sees them: what was asked for, where to start from, and the saver's process.

    plan_saving(arguments) ──▶ Saving        one clear line, before anything starts, for what cannot be done
    SaverProcess: begin() ──▶ adopt(loop): watched, restarted if it dies ──▶ finish(): a last checkpoint, then the end

The record of the run gets what the saver tells; the terminal gets what failed. Not here: what is saved when
(ckpt/saver); whether hosts share the folder (sharing.py). Invariants: a folder holds the checkpoints of one history, so
"newest" is never of another; of several hosts the first one decides what the job starts from; ranks never wait for this
process, nor does the agent before the end of the job.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Final

from holdfast.ckpt.saver.choose import committed_steps
from holdfast.ckpt.saver.page import Page
from holdfast.ckpt.universal.errors import CheckpointError
from holdfast.ckpt.universal.latest import committed
from holdfast.ckpt.universal.open import open_checkpoint
from holdfast.proto import env
from holdfast.proto.errors import ConfigError
from holdfast.proto.ids import NO_STEP

from .eventlog import EventLog
from .loop import Loop
from .processes import describe_exit, tell
from .services import Backoff

MODULE: Final = "holdfast.ckpt.saver"
LATEST: Final = "latest"
END_S: Final = 600.0
"""A job that ended well waits so long for its last checkpoint; one that was stopped has its scheduler's grace only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """What was asked for. `folder` None: no checkpoints are written."""

    folder: Path | None = None
    every: int = 1000
    keep: int = 3
    keep_best: int = 0
    grace_s: float = 20.0
    resume: Path | None = None
    start: int = int(NO_STEP)
    """Step of `resume`."""
    asked: str = ""
    """The user's word for it."""

    def told(self) -> str:
        """What the first host decided, for the others: the step and the path; empty: from the start."""
        return f"{self.start}:{self.resume}" if self.resume is not None else ""

    def as_told(self, told: str | None) -> Saving:
        """What the first host decided instead of what this one found later; None: it cannot be asked."""
        if told is None:
            return replace(self, resume=None, start=int(NO_STEP)) if self.asked == LATEST else self
        step, _, path = told.partition(":")
        return replace(self, resume=Path(path) if path else None, start=int(step or NO_STEP))


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `holdfast run` that are about checkpoints."""
    add = parser.add_argument_group("holdfast, checkpoints").add_argument
    add(
        "--checkpoint-dir",
        default="",
        metavar="DIR",
        help="write checkpoints to DIR/step-NNNNNNNN, in the background; several hosts: a folder that all share",
    )
    add("--checkpoint-every", type=int, default=1000, metavar="N", help="steps between two of them (default 1000)")
    add("--checkpoint-keep", type=int, default=3, metavar="N", help="the newest that are kept (default 3)")
    add(
        "--checkpoint-keep-best",
        type=int,
        default=0,
        metavar="N",
        help="those with the lowest validation loss (without validation: loss) that are kept too (default 0)",
    )
    add(
        "--checkpoint-grace",
        type=float,
        default=20.0,
        metavar="S",
        help="when the run is stopped by a signal, longest wait for its last checkpoint (default 20)",
    )
    add(
        "--resume",
        default="",
        metavar="latest|PATH",
        help="go on from the newest checkpoint in --checkpoint-dir (from the start if there is none), or from PATH; "
        "the layout may be another one",
    )


def plan_saving(arguments: argparse.Namespace, hosts: int) -> Saving:
    """The checked wish. Raises ConfigError with one line; makes the folder, and nothing else."""
    for name in ("checkpoint_every", "checkpoint_keep"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}")
    if arguments.checkpoint_keep_best < 0:
        raise ConfigError(f"--checkpoint-keep-best must be 0 or more, got {arguments.checkpoint_keep_best}")
    if not arguments.checkpoint_grace > 0:
        raise ConfigError(f"--checkpoint-grace must be above 0 seconds, got {arguments.checkpoint_grace}")
    folder = Path(arguments.checkpoint_dir).absolute() if arguments.checkpoint_dir else None
    if arguments.resume == LATEST and folder is None:
        raise ConfigError("--resume latest needs --checkpoint-dir; or give --resume the path of a checkpoint")
    if folder is not None and arguments.snapshots == "off":
        raise ConfigError(
            "--checkpoint-dir needs snapshots, which checkpoints are written from: leave out --snapshots off"
        )
    there = committed_steps(folder) if folder is not None else {}
    resume, start = _start(arguments.resume, there)
    if folder is not None:
        if hosts == 1:
            check_history(folder, start, asked=bool(arguments.resume))
        _check_folder(folder)
    return Saving(
        folder=folder,
        every=arguments.checkpoint_every,
        keep=arguments.checkpoint_keep,
        keep_best=arguments.checkpoint_keep_best,
        grace_s=arguments.checkpoint_grace,
        resume=resume,
        start=start,
        asked=arguments.resume,
    )


def _start(asked: str, there: dict[int, Path]) -> tuple[Path | None, int]:
    """The checkpoint to start from and its step."""
    if not asked:
        return None, int(NO_STEP)
    if asked == LATEST:
        if not there:
            tell("--resume latest: no checkpoint there yet, the run starts from step 0")
            return None, int(NO_STEP)
        step = max(there)
        path = there[step]
    else:
        path = Path(asked).absolute()
        if not path.is_dir():
            raise ConfigError(f"--resume: no such folder: {asked}")
        if not committed(path):
            inside = committed_steps(path)
            hint = f"; its newest one is {inside[max(inside)]}" if inside else ""
            raise ConfigError(f"--resume: {asked} is not a committed checkpoint: it has no COMMIT{hint}")
    try:
        trainer = open_checkpoint(path).metadata.get("trainer")
    except CheckpointError as error:
        raise ConfigError(f"--resume {path}: {error}") from None
    if not isinstance(trainer, dict) or type(trainer.get("step")) is not int:
        raise ConfigError(f"--resume {path}: it was not written by training: it has no trainer section to go on from")
    tell(f"resuming from step {trainer['step']}: {path}")
    return path, int(trainer["step"])


def check_history(folder: Path, start: int, *, asked: bool) -> None:
    """Raise ConfigError if a job that starts there would write a second history into the folder."""
    there = committed_steps(folder)
    newest = max(there, default=int(NO_STEP))
    if newest > max(start, 0) or (there and not asked):
        what = f"the run starts from step {max(start, 0)}"
        raise ConfigError(
            f"{folder} has checkpoints up to step {newest}, {what}: give --resume latest to go on from there, or "
            "another --checkpoint-dir"
        )


def _check_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"--checkpoint-dir {folder} cannot be written: {error.strerror}") from None


class SaverProcess:
    """The host's saver. See the module's docstring."""

    def __init__(
        self,
        saving: Saving,
        *,
        smp: str,
        job: str,
        token: str,
        world_size: int,
        directory: Path,
        events: Path,
        bind: str = "",
        name: str = "",
    ) -> None:
        """`bind`, `name`: in a job of several hosts, whose savers write together."""
        assert saving.folder is not None
        self.page = directory / "saver.page"
        Page.create(self.page)
        self._saving = saving
        self._command = ["--smp", smp, "--job", job, "--token-env", env.TOKEN, "--page", str(self.page)]
        self._command += ["--dir", str(saving.folder), "--every", str(saving.every), "--keep", str(saving.keep)]
        self._command += ["--keep-best", str(saving.keep_best), "--world-size", str(world_size)]
        self._command += ["--start", str(saving.start)]
        self._command += ["--bind", bind, "--name", name] if bind else []
        self._token = token
        self._log = directory / "saver.log"
        self._events = EventLog(events)
        self._proc: subprocess.Popen[bytes] | None = None
        self._news: IO[bytes] | None = None
        self._partial = b""
        self._pidfd = -1
        self._loop: Loop | None = None
        self._backoff = Backoff()
        self._stopped = False

    @property
    def pid(self) -> int:
        """Its process; 0 while there is none."""
        return self._proc.pid if self._proc is not None else 0

    def begin(self) -> None:
        """Start the process. Nobody waits for it: it connects when the snapshot manager is there."""
        reading, writing = os.pipe2(os.O_CLOEXEC)
        fcntl.fcntl(reading, fcntl.F_SETFL, os.O_NONBLOCK)
        command = [sys.executable, "-m", MODULE, *self._command, "--news-fd", str(writing)]
        try:
            with self._log.open("ab") as log:
                self._proc = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=[writing],
                    env={**os.environ, env.TOKEN: self._token},
                    start_new_session=True,
                )
        finally:
            os.close(writing)
        self._news, self._partial = os.fdopen(reading, "rb", buffering=0), b""
        self._backoff.started()
        self._events.write({"event": "saver_started", "pid": self._proc.pid})

    def adopt(self, loop: Loop) -> None:
        """Watch it from the loop from now on."""
        assert self._proc is not None
        assert self._news is not None
        self._loop = loop
        self._pidfd = os.pidfd_open(self._proc.pid)
        loop.watch(self._pidfd, self._ended)
        loop.watch(self._news.fileno(), self._hear)

    def stopped(self) -> None:
        """The run was stopped by a signal: close() has the grace that the scheduler gives, no more."""
        self._stopped = True

    def close(self) -> None:
        """Have the last checkpoint written, and end it (any thread; the loop has stopped and the ranks are gone)."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        if self._proc is None:
            return
        patience_s = self._saving.grace_s if self._stopped else END_S
        self._proc.terminate()
        started = time.monotonic()
        try:
            self._proc.wait(patience_s)
        except subprocess.TimeoutExpired:
            tell(f"the last checkpoint was not written within {patience_s:g} s")
        finally:
            if self._proc.poll() is None:
                self._proc.kill()
                self._proc.wait()
        for news in self._read():
            self._record(news)
            if news.get("event") == "checkpoint_written":
                tell(f"step {news['step']} saved in {time.monotonic() - started:.1f} s: {news['path']}")
        if self._news is not None:
            self._news.close()
            self._news = None

    # ---- what it tells --------------------------------------------------------------------------------

    def _read(self) -> list[dict[str, Any]]:
        """Whole lines that have come."""
        if self._news is None:
            return []
        while True:
            data = self._news.read(65536)
            if not data:  # None: nothing now; empty: its end
                break
            self._partial += data
        *lines, self._partial = self._partial.split(b"\n")
        found = []
        for line in lines:
            with contextlib.suppress(ValueError):
                value = json.loads(line)
                found += [value] if isinstance(value, dict) else []
        return found

    def _record(self, news: dict[str, Any]) -> None:
        first = news.pop("first", True)
        self._events.write(news)
        if news.get("event") != "checkpoint_written" and first:
            tell(f"no checkpoint of step {news.get('step')}: {news.get('reason')}; training goes on")

    # ---- callbacks ------------------------------------------------------------------------------------

    def _hear(self) -> None:
        for news in self._read():
            self._record(news)

    def _ended(self) -> None:
        assert self._loop is not None
        assert self._proc is not None
        self._loop.unwatch(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        code = self._proc.wait()
        self._hear()
        if self._news is not None:
            self._loop.unwatch(self._news.fileno())
            self._news.close()
            self._news = None
        self._proc = None
        tell(f"the saver ended ({describe_exit(code)}); restarting it")
        self._loop.later(self._backoff.next_s(), self._restart)

    def _restart(self) -> None:
        assert self._loop is not None
        self.begin()
        self.adopt(self._loop)
