"""Numbers of the protector: deadlines, sizes, rates, each with where it came from. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

BLOCK_BYTES: Final = 1 << 20
"""Unit of digests, of coding and of the wire: 1 MiB records were the fastest over TCP, 4 MiB ones slower."""
RING_BLOCKS: Final = 4
"""Blocks that a rank hands over at once: enough that a call costs little beside its bytes."""
RING_BYTES: Final = RING_BLOCKS * BLOCK_BYTES
HEADER_BYTES_MAX: Final = 1 << 20
PAYLOAD_BYTES_MAX: Final = 8 << 20


@dataclass(frozen=True, slots=True)
class Options:
    """What a test may want to change."""

    scrub_bytes_per_s: int = 64_000_000
    """0.3 % of one core's memory bandwidth: 64 GB of snapshots are looked at every 17 minutes."""
    scrub_pass_s: float = 0.5
    """A look at everything takes at least so long: small images would else be read over and over."""
    io_s: float = 5.0
    """A peer that sends nothing for so long while it owes us something is lost."""
    hello_s: float = 5.0
    serve_s: float = 20.0
    """How long a server waits for a reader: longer than io_s, because a reader may wait for another source."""
    idle_s: float = 300.0
    """A connection without a request for so long is closed; who needs it again reconnects."""
    poll_s: float = 10.0
    """How long an inventory waits for news: what is lost without a word is found after this."""
    retry_s: float = 0.5
    """Pause before something that failed is tried again, when nothing changes meanwhile."""
    connections_max: int = 512
    window: int = 4
    """Blocks that are asked for at once; so many, or twice that, are in flight per source."""
    keep_s: float = 2.0
    """How long the newest parity is spared while ranks may still be about to say keep."""
    secondary_s: float = 2.0
    """How long a parity holder waits for its encoder without progress before it fetches the data itself."""
    survey_s: float = 2.0
    """How long a rebuild waits for a host to say what it has."""
    placements_kept: int = 4
