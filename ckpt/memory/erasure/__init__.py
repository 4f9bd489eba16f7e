"""Erasure coding of equal-length shards: k of data, m of parity, and any k of the k+m bring back the rest.

    data 0 … k-1 ── encode ──▶ parity k … k+m-1          m = 1 is XOR, k = 1 is mirroring
    any k shards ── decode ──▶ whichever are wanted      straight into the memory that will be used

    codec   checks buffers, chooses the engine     matrix  which shards times which coefficients
    isal    Intel's library through ctypes         field   arithmetic on bytes
    fallback  numpy: the same bytes, slowly

Does not detect damage (digests do: a damaged shard counts as missing), decide where shards live, or move them.
What all processes of a job must agree on is the matrix; it is the same on every machine and in every release.
"""

from .codec import BLOCK_BYTES, decode, encode, engine
from .fallback import Engine
from .matrix import Code

__all__ = ["BLOCK_BYTES", "Code", "Engine", "decode", "encode", "engine"]
