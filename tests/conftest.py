"""For all tests: torch gets one thread, as torchrun gives each of several ranks on a host.

Two cores would be fought for else; and what torch computes on narrow types depends on where threads split a tensor, so
that ZeRO-1 rightly refuses some optimizers there (runtime/prove.py). Before anything imports torch.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
