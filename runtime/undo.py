"""Takes an unfinished step back: what a forward may change although nothing was committed.

    train_step:  before = Undo(...) ▸ read data, forward, backward, barrier ──▶ commit: `before` is dropped
                                                  └─ fence or lost peer ──▶ before.take_back()

Parameters and optimizer state change only in the commit, so they are not in here. Buffers (batch statistics),
a stream's position, the user's objects and the process' generators change as soon as a microbatch runs: a
survivor that kept them would do the step again with other numbers than an unbroken run. The copies are made
once a step: they cost what these things weigh, which is little next to the parameters.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from . import rng
from .data import Source
from .state import ModelState


class Undo:
    """The state between two steps, as far as a step can change it before its commit."""

    def __init__(self, state: ModelState, source: Source, device: torch.device) -> None:
        self._state = state
        self._source = source
        self._device = device
        self._buffers = [(entry.tensor, entry.tensor.clone()) for entry in state.entries() if entry.early]
        # A state_dict may hold what the object goes on changing.
        self._user = {name: copy.deepcopy(value.state_dict()) for name, value in state.user.items()}
        self._position: Any = copy.deepcopy(source.state())
        self._generators = rng.capture(device)

    def take_back(self) -> None:
        """Be as if the step had not begun."""
        for tensor, before in self._buffers:
            tensor.copy_(before)
        for name, before in self._user.items():
            self._state.user[name].load_state_dict(before)
        self._source.load_state(self._position)
        rng.restore(self._generators, self._device)
