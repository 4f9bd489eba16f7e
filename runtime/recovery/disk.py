"""The "disk" rung: a rank reads its own units from a universal checkpoint, whatever layout wrote it.

    steps()    what this host can read: the checkpoint that the job started from, and those in its folder
    check()    at the start: is it of this model?                one line if not, before anybody has joined
    restore()  when the Form says "disk": regions of own units ──▶ tensors ──▶ engine.load()

A resumed run is this rung at its first generation: nobody has a state, so all take the newest that all can read.
Not here: which step that is (decide.py), what a rank takes from which of the old ranks (recovery/remap.py).
Invariants: only bytes of units that this rank hosts are read; nothing is loaded unless all of it was read and
verified; a checkpoint that turned out bad is not offered again.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from holdfast.ckpt.saver.choose import committed_steps
from holdfast.ckpt.universal.errors import CheckpointError
from holdfast.ckpt.universal.latest import committed
from holdfast.ckpt.universal.model import Checkpoint, TensorState
from holdfast.ckpt.universal.open import open_checkpoint
from holdfast.ckpt.universal.read import Reader
from holdfast.proto.errors import ConfigError, SnapshotCorrupt
from holdfast.proto.ids import NO_STEP
from holdfast.proto.lease import Phase

from ..arenas import DTYPES
from ..joining import Formed
from ..origin import optimizer_kind, origin, replica_of, unchanging
from .remap import Old, compose

if TYPE_CHECKING:
    from ..engine import Engine
    from .rejoin import Session

log = logging.getLogger(__name__)

TORCH: Final = {name: dtype for dtype, name in DTYPES.items()}
MODEL_STATES: Final = ("weight", "buffer")
_BATCH_BYTES: Final = 256 << 20


class Checkpoints:
    """Checkpoints on disk, as sources of one rank's state. Main thread only."""

    def __init__(self, engine: Engine, session: Session) -> None:
        """Raises ConfigError if the job is to resume from what is of another model."""
        identity = session.identity
        self._engine = engine
        self._session = session
        self._folder = identity.checkpoints
        self._bad: set[int] = set()
        self._unchanging = unchanging(engine)
        step, _, self._path = identity.resume.partition(":")
        self._start = int(step) if self._path else int(NO_STEP)
        if self.resumes and identity.incarnation == 0:
            self.check()

    @property
    def resumes(self) -> bool:
        """Whether the job started from a checkpoint: its initial state is then nobody's."""
        return self._start != NO_STEP

    def origin(self) -> dict[str, Any]:
        """What a checkpoint must know of this rank."""
        return origin(self._engine, self._unchanging)

    def steps(self) -> list[int]:
        """Steps that this rank could restore from disk."""
        found = set(committed_steps(self._folder)) if self._folder else set()
        if self.resumes and committed(Path(self._path)):
            found.add(self._start)
        return sorted(found - self._bad)

    def check(self) -> None:
        """Raise ConfigError, one line, unless the checkpoint that the job starts from is of this model."""
        try:
            self._examine(open_checkpoint(self._path))
        except CheckpointError as error:
            raise ConfigError(f"--resume {self._path}: {error}") from None

    def restore(self, formed: Formed) -> list[tuple[str, int, int]]:
        """Load the state after formed.resume_step, if the Form says that it comes from disk; the source as told.

        Raises SnapshotCorrupt when it is damaged: the next generation goes on from something else; ConfigError when
        it is what the job was to start from, and there is nothing else.
        """
        step = formed.resume_step
        if formed.sources[self._engine.rank].rung != "disk":
            return []
        path = self._path if step == self._start else str(committed_steps(self._folder).get(step, ""))
        try:
            checkpoint = open_checkpoint(path)
            old = self._examine(checkpoint)
            with Reader(checkpoint, jobs=2) as reader:
                tensors = self._tensors(reader, old)
                meta = compose(self._engine, old, lambda name, state: self._read(reader, name, state))
                size, pieces = reader.bytes_read, len(tensors)
        except CheckpointError as error:
            if step == self._start and self._session.generation <= 1:
                raise ConfigError(f"--resume {self._path}: {error}") from None
            self._bad.add(step)
            raise SnapshotCorrupt(f"the checkpoint cannot be read: {error}", path=path) from error
        self._engine.load(step, tensors, meta)
        log.info("restored step %d from %s: %d bytes read", step, path, size)
        return [("disk", size, pieces)]

    # ---- is it ours? ----------------------------------------------------------------------------------

    def _examine(self, checkpoint: Checkpoint) -> Old:
        """What is to be read, if this is the state of our model. Raises ConfigError with one line."""
        engine, where = self._engine, str(checkpoint.root)
        old = Old.of(checkpoint)
        if old.units != engine.plan.units:
            raise ConfigError(f"{where} is of a model of {old.units} layers, the script has {engine.plan.units}")
        ours = {(entry.name, entry.state): entry for entry in engine.state.entries() if entry.state in MODEL_STATES}
        for (name, state), entry in ours.items():
            found = self._find(checkpoint, name, state)
            if found is None:
                raise ConfigError(f"{where} has no {state} of {name}: it is of another model")
            dtype = DTYPES.get(entry.tensor.dtype, str(entry.tensor.dtype))
            if (found.shape, found.dtype) != (tuple(entry.tensor.shape), dtype):
                ours_is, theirs = f"{dtype}{list(entry.tensor.shape)}", f"{found.dtype}{list(found.shape)}"
                raise ConfigError(f"{where} has {name} as {theirs}, the script as {ours_is}")
        hosted = set(map(str, engine.plan.hosted(engine.rank)))
        names = [*checkpoint.states, *((alias, "weight") for alias in checkpoint.aliases)]
        for name, state in names:
            if state in MODEL_STATES and name.partition(".")[0] in hosted and (name, state) not in ours:
                raise ConfigError(f"{where} has a {state} {name} that the script's model has not")
        kind = optimizer_kind(engine)
        if kind and old.optimizer and kind != old.optimizer:
            raise ConfigError(f"{where} has the state of {old.optimizer}, the script uses {kind}")
        if set(engine.state.user) - old.user_names():
            missing = ", ".join(sorted(set(engine.state.user) - old.user_names()))
            raise ConfigError(f"{where} has no state of {missing}: it was written without")
        if engine.rank == 0:
            for difference in old.differences(engine):
                log.warning("resumed with another %s: the run does not go on as it would have", difference)
        return old

    @staticmethod
    def _find(checkpoint: Checkpoint, name: str, state: str) -> TensorState | None:
        owner = checkpoint.aliases.get(name, name)
        return checkpoint.states.get((owner, state))

    # ---- reading --------------------------------------------------------------------------------------

    def _tensors(self, reader: Reader, old: Old) -> dict[tuple[str, str], torch.Tensor]:
        """Every tensor that this rank's state consists of, by our names."""
        engine, checkpoint = self._engine, reader.checkpoint
        replica, same = replica_of(engine), old.replicas == len(engine.plan.workers(0))
        states = old.states_by_name
        wanted: dict[tuple[str, str], TensorState] = {}
        for entry in engine.state.entries():
            if entry.state not in MODEL_STATES:
                continue
            own = checkpoint.states.get((entry.name, f"buffer.replica{replica}")) if entry.early and same else None
            wanted[entry.name, entry.state] = own or checkpoint.tensor(entry.name, entry.state)
        for name in engine.state.names():
            for state in states.get(checkpoint.aliases.get(name, name), ()):
                wanted.setdefault((name, state), checkpoint.tensor(name, state))
        tensors: dict[tuple[str, str], torch.Tensor] = {}
        batch: list[Any] = []
        size = 0
        for key, found in wanted.items():
            region = engine.state.region(*key)  # with ZeRO-1: moments of the own parts only
            shape = found.shape if region is None else (region[1] - region[0],)
            tensors[key] = torch.empty(shape, dtype=TORCH[found.dtype])
            batch.append((found.name, found.state, region, bytes_of(tensors[key])))
            size += tensors[key].nbytes
            if size >= _BATCH_BYTES:
                self._take(reader, batch)
                batch, size = [], 0
        self._take(reader, batch)
        if old.step_dtype:
            for name in engine.state.names():
                value = checkpoint.steps.get(checkpoint.aliases.get(name, name))
                if value is not None:
                    tensors[name, "step"] = torch.tensor(value, dtype=TORCH[old.step_dtype])
        return tensors

    def _take(self, reader: Reader, batch: list[Any]) -> None:
        self._session.lease.renew(Phase.RECOVERING)  # a big state takes a while, batch by batch
        reader.read_many(batch)

    @staticmethod
    def _read(reader: Reader, name: str, state: str) -> torch.Tensor:
        found = reader.checkpoint.tensor(name, state)
        tensor = torch.empty(found.shape, dtype=TORCH[found.dtype])
        reader.read(name, state, None, bytes_of(tensor))
        return tensor


def bytes_of(tensor: torch.Tensor) -> Any:
    """The memory of a contiguous tensor, as a buffer of bytes."""
    return tensor.view(-1).view(torch.uint8).numpy() if tensor.numel() else bytearray()
