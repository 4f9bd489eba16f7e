"""Other people's checkpoint formats: told apart, read without their framework, written as they write them.

    open_any(path)                               ──▶ Checkpoint over the original bytes
    write_as("deepspeed:zero3,dp=6", reader, path)   ──▶ files that DeepSpeed's ordinary loader takes

No pickle runs, and no framework is needed; see unpickle.py. One module is one format: detect(path), open(path),
write(reader, target, ...). Formats are imported when asked for. Invariants:

* a path is opened by the first format that knows it, in the order of FORMATS, or refused with their list;
* a writer's target appears whole, or not at all, and never replaces anything.
"""

from __future__ import annotations

from .registry import FORMATS, TARGETS, Target, detect, open_any, parse_target, write_as

__all__ = ["FORMATS", "TARGETS", "Target", "detect", "open_any", "parse_target", "write_as"]
