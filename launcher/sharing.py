"""Whether all hosts of a job see the same checkpoint folder: the first one leaves a proof in it, the others look.

    first host ── mark ──▶ DIR/.savers/JOB.job   a digest that only who knows the job's token can make ──▶ refusal

Hosts that each wrote into a folder of their own would never have a checkpoint, and would say so at the first due step
only, hours later. Not here: what is written (ckpt/saver).
"""

from __future__ import annotations

import hmac
import threading
import time
from pathlib import Path
from typing import Final

from holdfast.ckpt.saver.peers import FOLDER
from holdfast.proto.errors import ConfigError

from .bootstrap import Bootstrap

SEEN_S: Final = 5.0
"""A network file system may show another host's new file as late as this."""
_POLL_S: Final = 0.1


def mark(folder: Path, job: str, token: str) -> None:
    """Leave the proof. Raises ConfigError if it cannot be written."""
    path = _path(folder, job)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in path.parent.glob("*.job"):
            old.unlink(missing_ok=True)
        path.write_text(_proof(job, token))
    except OSError as error:
        raise ConfigError(f"--checkpoint-dir {folder} cannot be written: {error.strerror}") from None


def refusal(folder: Path | None, job: str, token: str, bootstrap: Bootstrap | None) -> str:
    """Why this host cannot take part in the job's checkpoints; empty: it can. `bootstrap` None: it is the first."""
    if bootstrap is None or bootstrap.checkpoints is None:
        return ""
    if bootstrap.checkpoints != (folder is not None):
        there, here = ("with", "without") if bootstrap.checkpoints else ("without", "with")
        return (
            f"{bootstrap.host} was started {there} --checkpoint-dir, this host {here}: give it on all hosts, or on none"
        )
    if folder is None or _sees(folder, job, token):
        return ""
    return (
        f"--checkpoint-dir {folder} is not the folder that {bootstrap.host} has there: hosts write a checkpoint "
        "together, so it must be on a file system that all of them share"
    )


def _sees(folder: Path, job: str, token: str) -> bool:
    deadline, turn = time.monotonic() + SEEN_S, threading.Event()
    while True:
        try:
            if hmac.compare_digest(_path(folder, job).read_text(), _proof(job, token)):
                return True
        except (OSError, UnicodeDecodeError):
            pass
        if time.monotonic() > deadline:
            return False
        turn.wait(_POLL_S)


def _path(folder: Path, job: str) -> Path:
    return folder / FOLDER / f"{job}.job"


def _proof(job: str, token: str) -> str:
    return hmac.new(token.encode(), f"checkpoint folder of {job}".encode(), "sha256").hexdigest()
