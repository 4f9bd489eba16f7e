"""Identifiers. NewTypes, so that a rank is never passed where a step is meant."""

from typing import NewType

HostId = NewType("HostId", str)
"""One machine: unique within a job."""

Rank = NewType("Rank", int)
"""One worker process' place in the job, 0..world_size-1. A replacement process takes the same rank."""

Incarnation = NewType("Incarnation", int)
"""How many processes held this rank before: 0 for the first, +1 for each replacement."""

Generation = NewType("Generation", int)
"""Number of a membership; only ever rising, stamped on every message and every frame."""

Step = NewType("Step", int)
"""Optimizer steps applied. Step 0 is the initial state; step s is the state after s updates."""

NO_STEP = Step(-1)
"""A process without any training state."""
