"""The layout of one half: one step of one slot's state in shared memory, readable after its writer died.

    0                4096                                  64 B aligned                    end of the memfd
    | header page    | data: each tensor 64 B aligned      | table (JSON): entries, metadata | slack |
      STATE   fill << 8 | EMPTY, FILLING, COPIED           written by the rank alone
      VERDICT fill << 8 | SEALED, CORRUPT                  written by the manager alone

    rank     begin() STATE=FILLING ▸ header, table ▸ bytes ▸ finish() STATE=COPIED
    manager  digest while COPIED ▸ still the same fill? ▸ data digest ▸ VERDICT=SEALED
    reader   STATE, then VERDICT of the same fill ▸ header, table digest ▸ (verify: data digest) ▸ STATE again

A half is SEALED or CORRUPT only if the verdict is about the fill that STATE names. So each word has one
writer and no compare-and-swap is needed: a verdict that comes late, when the next fill has begun, says
nothing. `fill` counts the times this memory was begun. Opens no files, allocates nothing. Invariants:

* STATE is FILLING before the first other byte of a fill changes, and COPIED after the last one: one
  aligned 8-byte store each. A writer killed at any instruction leaves FILLING, or a whole older or newer step.
* No length or offset from a header or table is used before it is checked against the real size of the
  mapping. What does not fit is refused; bytes are never reinterpreted.
* Step, fill, plan and incarnation are in the digested table too, so that a flipped header bit is found.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from mmap import mmap
from typing import Any, Final

from holdfast.ckpt.pieces import Piece
from holdfast.proto.errors import ConfigError, HoldfastError, SnapshotCorrupt, SnapshotIncomplete

from .digest import digest_of, digest_while

