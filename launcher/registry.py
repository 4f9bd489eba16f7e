"""Which jobs run on this machine: one small private file per job, for `holdfast status` and `holdfast chaos`.

    ${XDG_RUNTIME_DIR:-tmp}/holdfast-<uid>/<job>.json   mode 0600, in a directory of mode 0700

The file holds the job's token, so both modes are checked, not assumed. A file whose agent is gone (by pid and
start time) is stale and is removed by whoever lists.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import stat
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from holdfast.proto.errors import ConfigError

from .processes import start_ticks


@dataclass(frozen=True, slots=True)
class Job:
    """One running job."""

    job: str
    coordinator: str
    token: str = dataclasses.field(repr=False)
    agent: int
    agent_start: int
    started: float
    events: str


def directory() -> Path:
    """The registry's directory; created if missing. Raises ConfigError if others could read or write it."""
    base = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    path = Path(base) / f"holdfast-{os.getuid()}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        info = path.lstat()
    except OSError as error:
        raise ConfigError(f"cannot create {path}: {error.strerror}; set XDG_RUNTIME_DIR") from None
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise ConfigError(f"{path} must be a directory of yours with mode 0700; remove it or set XDG_RUNTIME_DIR")
    return path


def path_of(job: str) -> Path:
    """Where a job's entry lies."""
    return directory() / f"{job}.json"


def entry(job: str, coordinator: str, token: str, events: str) -> Job:
    """The entry of a job whose agent is this process."""
    pid = os.getpid()
    return Job(job, coordinator, token, pid, start_ticks(pid), time.time(), events)


def write(job: Job) -> Path:
    """Publish or update an entry; readers see the old or the new one, whole. Returns its path."""
    path = path_of(job.job)
    handle, temporary = tempfile.mkstemp(prefix=".", dir=path.parent)  # mkstemp makes it 0600
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(dataclasses.asdict(job), file)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path


def read(path: Path) -> Job | None:
    """The entry in a file, or None if it is none."""
    try:
        return Job(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def is_alive(job: Job) -> bool:
    """Whether the agent that wrote the entry still runs."""
    return start_ticks(job.agent) == job.agent_start != 0


def list_jobs() -> list[Job]:
    """Running jobs of this user, oldest first; stale entries are removed."""
    found = []
    for path in directory().glob("[!.]*.json"):
        job = read(path)
        if job is not None and is_alive(job):
            found.append(job)
        else:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
    return sorted(found, key=lambda job: job.started)


def find(job: str | None) -> Job:
    """The running job of that name, or the only one. Raises ConfigError that names the choices."""
    jobs = list_jobs()
    chosen = [one for one in jobs if job in (None, one.job)]
    if len(chosen) == 1:
        return chosen[0]
    names = ", ".join(one.job for one in jobs)
    if not jobs:
        raise ConfigError("no job runs on this machine")
    if job is None:
        raise ConfigError(f"several jobs run: {names}; choose one with --job")
    raise ConfigError(f"no job {job!r} runs on this machine; running: {names}")


def remove(job: str) -> None:
    """Take an entry away; harmless if it is gone."""
    with contextlib.suppress(OSError, ConfigError):
        path_of(job).unlink()
