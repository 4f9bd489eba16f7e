"""Where microbatches come from: a pure function of (step, microbatch) for datasets, a position for streams.

    map-style dataset   sample i of the job = permutation of its epoch, keyed by the seed: no state at all
    anything else       an iterator of (inputs, targets) microbatches with state_dict / load_state_dict:
                        every rank that needs data reads the whole step's microbatches in order, and the
                        position after each step is captured with the state

Microbatch m of step s (1-based) holds samples ((s-1)*M + m)*B .. +B-1 of the job, whichever rank runs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch.utils.data import default_collate

from holdfast.proto.errors import ConfigError

from . import rng

Batch = tuple[Any, Any]


class Source(Protocol):
    """What the executor reads from."""

    def microbatch(self, step: int, microbatch: int) -> Batch: ...
    def begin(self, step: int) -> None: ...
    def state(self) -> Any: ...
    def load_state(self, state: Any) -> None: ...


class DatasetSource:
    """Map-style dataset: `len(dataset)` and `dataset[i] -> (input, target)`. Stateless."""

    def __init__(self, dataset: Any, *, microbatch_size: int, microbatches: int, seed: int, shuffle: bool) -> None:
        self._dataset = dataset
        self._size = microbatch_size
        self._microbatches = microbatches
        self._seed = seed
        self._shuffle = shuffle
        self._length = len(dataset)
        if self._length < 1:
            raise ConfigError("the dataset is empty")
        self._epoch = -1
        self._order: torch.Tensor = torch.empty(0)
        self._cached: tuple[tuple[int, int], Batch] | None = None

    def begin(self, step: int) -> None:
        """Nothing to prepare."""

    def microbatch(self, step: int, microbatch: int) -> Batch:
        """(inputs, targets) of one microbatch, collated: a leading dimension of microbatch_size."""
        at = (step, microbatch)
        if self._cached is None or self._cached[0] != at:
            first = ((step - 1) * self._microbatches + microbatch) * self._size
            # The first and the last stage each read the microbatch: random augmentation must agree between them.
            with rng.seeded(torch.device("cpu"), rng.key(self._seed, 0xA06, step, microbatch)):
                samples = [self._dataset[self._index(first + i)] for i in range(self._size)]
                self._cached = (at, _pair(_collate(samples), "a sample of the dataset"))
        return self._cached[1]

    def _index(self, position: int) -> int:
        if not self._shuffle:
            return position % self._length
        epoch, offset = divmod(position, self._length)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(rng.key(self._seed, 0xDA7A, epoch))
            self._order, self._epoch = torch.randperm(self._length, generator=generator), epoch
        return int(self._order[offset])

    def state(self) -> Any:
        """None: the step number says everything."""
        return None

    def load_state(self, state: Any) -> None:
        """Nothing to restore."""


class StreamSource:
    """An iterable of (inputs, targets) microbatches that has state_dict and load_state_dict."""

    def __init__(self, stream: Any, *, microbatches: int) -> None:
        self._stream = stream
        self._microbatches = microbatches
        self._iterator: Iterator[Batch] | None = None
        self._step = 0
        self._read: list[Batch] = []

    def begin(self, step: int) -> None:
        """Read the step's microbatches; every rank that needs data reads all, so positions agree."""
        if self._iterator is None:
            self._iterator = iter(self._stream)
        self._read = []
        for _ in range(self._microbatches):
            try:
                self._read.append(_pair(next(self._iterator), "a microbatch of the data stream"))
            except StopIteration:
                self._iterator = iter(self._stream)  # a new epoch
                batch = next(self._iterator, None)
                if batch is None:
                    raise ConfigError("the data stream gives nothing, not even at the start of an epoch") from None
                self._read.append(_pair(batch, "a microbatch of the data stream"))
        self._step = step

    def microbatch(self, step: int, microbatch: int) -> Batch:
        """(inputs, targets) of one microbatch of the step that `begin` read."""
        assert step == self._step, "a stream is read in the order of the steps"
        return self._read[microbatch]

    def state(self) -> Any:
        """The stream's own position."""
        return self._stream.state_dict()

    def load_state(self, state: Any) -> None:
        """Go back to a position."""
        self._stream.load_state_dict(state)
        self._iterator = None


def _pair(batch: Any, what: str) -> Batch:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise ConfigError(f"{what} must be a pair (input, target), got {_named(batch)}")
    return batch[0], batch[1]


def _collate(samples: list[Any]) -> Any:
    try:
        if not all(isinstance(sample, (tuple, list)) for sample in samples):
            return samples[0]  # for _pair to refuse: stacked scalars are a tensor, and might be two
        return default_collate(samples)
    except (RuntimeError, TypeError) as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"the samples of the dataset do not stack to a microbatch: {why}") from None


def _named(value: Any) -> str:
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    return f"{kind} of {len(value)}" if isinstance(value, (tuple, list)) else kind


def make_source(data: Any, *, microbatch_size: int, microbatches: int, seed: int, shuffle: bool = True) -> Source:
    """Source for a user's data. Raises ConfigError when it is neither kind."""
    if hasattr(data, "state_dict") and hasattr(data, "load_state_dict") and hasattr(data, "__iter__"):
        return StreamSource(data, microbatches=microbatches)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return DatasetSource(
            data, microbatch_size=microbatch_size, microbatches=microbatches, seed=seed, shuffle=shuffle
        )
    raise ConfigError(
        "data must be a map-style dataset (__len__, __getitem__) or an iterable with state_dict and "
        f"load_state_dict, got {type(data).__module__}.{type(data).__qualname__}"
    )
