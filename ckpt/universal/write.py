"""Writing a checkpoint: streaming, in any order, from any threads; all of it appears, or nothing.

    begin(plan) ──▶ put(name, state, bytes) ... ──▶ commit(details)
    .name.tmp-PLAN/   data in place (staging.py)    fsync ▶ MANIFEST ▶ COMMIT ▶ fsync ▶ rename ▶ fsync parent

A killed write is taken up from its journal (`resume=True`). Does not convert, does not decide what belongs
into a checkpoint. What a crash leaves: before the rename a hidden folder that no reader is pointed to, after
it the whole checkpoint. Invariants:

* the target name appears by one rename of a folder whose files and COMMIT are durable (but with `Unsynced`);
* one writer per target and plan: the folder is locked.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from .assembled import Assembled
from .chunks import Buffer, Codec, digest
from .disk import Disk, explained
from .errors import UsageError
from .journal import FILE_NAME as JOURNAL
from .jsonio import canonical
from .layout import StatePlan, weight_index
from .manifest import COMMIT, MANIFEST, TOPIC, commit_bytes, encode
from .model import Checkpoint, FileFacts, Group, Kept, Region, Span, safe_path, validate
from .staging import Stage, WriteOptions

__all__ = ["Details", "StatePlan", "WriteOptions", "Writer"]

WEIGHT_INDEX: Final = "weights/model.safetensors.index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Details:
    """Everything of a checkpoint that is not a tensor."""

    metadata: Mapping[str, Any] = field(default_factory=dict)
    groups: tuple[Group, ...] = ()
    steps: Mapping[str, int | float] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    completeness: Mapping[str, Kept] = field(default_factory=dict)
    parents: tuple[str, ...] = ()
    """Ids of the checkpoints that this one was made from."""


class Writer:
    """Writes one checkpoint. put() may be called from several threads; the rest from one.

    As a context manager it removes what was written unless commit() was reached; with `resume` it is kept.
    """

    def __init__(self, target: Path | str, options: WriteOptions | None = None, disk: Disk | None = None) -> None:
        self.target: Final = Path(os.path.abspath(target))
        self.options: Final = options or WriteOptions()
        self._disk: Final = disk or Disk()
        self._stage: Stage | Assembled | None = None
        self._renamed = False
        self._extra: dict[str, FileFacts] = {}
        self._opaque: dict[str, Span] = {}
        if self.options.archive:
            Codec()  # says now, and not after an hour, that the compressor is not installed

    @property
    def stage(self) -> Stage:
        if not isinstance(self._stage, Stage):
            raise UsageError("a writer before begin() or after its end", target=str(self.target))
        return self._stage

    @property
    def bytes_written(self) -> int:
        """Payload bytes written by this process: what a resumed write did not have to do again."""
        return self.stage.bytes_written

    def begin(self, states: Iterable[StatePlan]) -> None:
        """Lay out the files and give them their sizes; a full disk is found here, before any data moves."""
        if self._stage is not None:
            raise UsageError("begin() twice", target=str(self.target))
        self._refuse_existing()
        self._stage = Stage(self.target, list(states), self.options, self._disk)

    def take_over(self, filled: Assembled) -> None:
        """Instead of begin() and put(): the files are there, written by others."""
        assert self._stage is None
        self._refuse_existing()
        self._stage = filled

    def put(self, name: str, state: str, data: Buffer, region: Region | None = None) -> None:
        """Write the elements of `region` (a box, a flat range, or None for all), row-major in `data`.

        In any order; what is in place already is not written again.
        """
        self.stage.put(name, state, data, region)

    def missing(self, name: str, state: str) -> list[tuple[int, int]]:
        """Flat ranges of elements that are still wanted, ascending. With tiles: whole rows around them."""
        return self.stage.missing(name, state)

    def put_opaque(self, name: str, data: bytes) -> None:
        """Keep bytes that nobody understands, as state/opaque/NAME."""
        if not safe_path(name) or name in self._opaque:
            raise UsageError("not a name for an opaque file, or one used twice", name=repr(name))
        path = f"state/opaque/{name}"
        self._write(path, data)
        self._opaque[name] = Span(path, 0, len(data))

    def commit(self, details: Details | None = None) -> Checkpoint:
        """Make the checkpoint visible under its name. IncompleteError, naming ranges, if bytes are missing.

        The rename is the commit point: a crash at any line leaves the whole checkpoint or none of it.
        """
        details = details or Details()
        stage, disk = self._filled(), self._disk
        states, facts = stage.finished()
        for topic, value in details.metadata.items():
            if not TOPIC.match(topic):
                raise UsageError("a topic of metadata that cannot be a file name", topic=repr(topic))
            self._write(f"state/{topic}.json", canonical(value))
        if not self.options.archive and any(path.startswith("weights/") for path in facts):
            self._write(WEIGHT_INDEX, weight_index(stage.layout))
        checkpoint = Checkpoint(
            root=self.target,
            format="holdfast",
            states=states,
            aliases=dict(details.aliases),
            groups=details.groups,
            steps=dict(details.steps),
            metadata=dict(details.metadata),
            completeness=dict(details.completeness),
            opaque=dict(self._opaque),
            id=stage.id,
            files={**facts, **self._extra},
        )
        validate(checkpoint)
        manifest = encode(checkpoint, parents=details.parents)
        with explained(self.target, "committing a checkpoint"):
            self._sync({**facts, **self._extra})
            disk.write_file(stage.folder / MANIFEST, manifest, sync=self.options.fsync)
            disk.write_file(stage.folder / COMMIT, commit_bytes(manifest), sync=self.options.fsync)
            if self.options.fsync:
                disk.fsync_directory(stage.folder)
            self._refuse_existing()
            disk.rename(stage.folder, self.target)
            self._renamed = True
            if self.options.fsync:
                disk.fsync_directory(self.target.parent)
            # Readers ignore a journal: it may go after the commit, and must not go before.
            disk.unlink(self.target / JOURNAL)
        stage.close()
        self._stage = None
        return checkpoint

    def _refuse_existing(self) -> None:
        if os.path.lexists(self.target):
            raise UsageError("the target is there already: choose another name, or remove it", target=str(self.target))

    def _write(self, path: str, data: bytes) -> None:
        stage = self._filled()
        full = stage.folder / path
        with explained(full, "writing a checkpoint"):
            for folder in reversed(Path(path).parents[:-1]):
                self._disk.mkdir(stage.folder / folder)
            self._disk.write_file(full, data, sync=False)  # commit() makes all of them durable
        self._extra[path] = FileFacts(len(data), digest(data))

    def _sync(self, files: Iterable[str]) -> None:
        """The payload is durable already: its stage, or its hosts, saw to that."""
        if self.options.fsync:
            folder = self._filled().folder
            for path in self._extra:
                self._disk.fsync_file(folder / path)
            for inner in sorted({inner for path in files for inner in Path(path).parents}, reverse=True):
                self._disk.fsync_directory(folder / inner)

    def _filled(self) -> Stage | Assembled:
        return self._stage if isinstance(self._stage, Assembled) else self.stage

    def abort(self, *, keep: bool = False) -> None:
        """End without a checkpoint; `keep` what was written, to be taken up with `resume`."""
        if self._stage is not None:
            stage, self._stage = self._stage, None
            stage.close(remove=not keep and not self._renamed)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort(keep=self.options.resume)
