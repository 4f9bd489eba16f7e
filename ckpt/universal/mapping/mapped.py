"""A checkpoint seen through a mapping: names, shapes and values change as they are read, nothing is copied.

    Reader ── Layout ──▶ resolve ──▶ Mapped: a View; renamed tensors pass straight through, the rest by nodes

Memory is the blocks that permuted reads come back to, up to CACHE_BYTES. A tensor larger than that is read
again for each block if its axes are exchanged: correct, and slow. Writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from ...dtypes import ITEM_BYTES
from ..errors import MappingError
from ..geometry import boxes_of_flat, is_flat, volume
from ..model import Box, Region, TensorState
from ..read import Reader
from ..view import View
from .language import Layout
from .nodes import Blocks, Leaf, Node
from .resolve import resolve

CACHE_BYTES: Final = 256 << 20


class Mapped(View):
    """The checkpoint of a reader, under the names and shapes of a layout."""

    def __init__(
        self,
        reader: Reader,
        layout: Layout,
        given: Mapping[str, int],
        *,
        reverse: bool = False,
        cache: int = CACHE_BYTES,
    ) -> None:
        found = resolve(layout.inverted() if reverse else layout, reader, given, Blocks(reader, cache))
        self.losses: Final = found.losses
        self.memory: Final = min(cache, reader.checkpoint.nbytes)
        self._nodes: dict[tuple[str, str], Node] = found.nodes
        super().__init__(found.checkpoint, [reader])

    def fill(self, tensor: TensorState, region: Region, out: memoryview) -> None:
        """Compute a region."""
        node = self._nodes[tensor.key]
        if isinstance(node, Leaf):
            node.reader.read(*node.tensor.key, region, out)
            return
        item = ITEM_BYTES[tensor.dtype]
        values = np.frombuffer(out, f"u{item}")
        boxes: list[Box] = [region]  # type: ignore[list-item]  # a box, unless the next line says otherwise
        if is_flat(region):
            start, stop = region
            assert isinstance(start, int)
            assert isinstance(stop, int)
            boxes = boxes_of_flat((start, stop), tensor.shape)
        at = 0
        for box in boxes:
            size = volume(box)
            found = node.read(box)
            if found.size != size:
                raise MappingError("a mapping that makes another size than it said", name=tensor.name, box=box)
            values[at : at + size].reshape(found.shape)[...] = found
            at += size
