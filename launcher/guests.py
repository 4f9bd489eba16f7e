"""How a rank of another host is started here: the program of our own ranks, told that it is that rank. Pure.

Everything that torchrun puts into a rank's environment is the same on every host but for the numbers that name
the rank and its place on the host. Logs, where torchrun redirects them, go into a folder of their own.
"""

from __future__ import annotations

import os
from dataclasses import replace

from .starter import Program

_RANK_NAMES = ("RANK", "ROLE_RANK")
_LOCAL_NAMES = ("LOCAL_RANK",)


def guest_program(template: Program, rank: int, local_rank: int) -> Program:
    """`template`, as `rank`, in the place `local_rank` of this host."""
    named = {name: str(rank) for name in _RANK_NAMES} | {name: str(local_rank) for name in _LOCAL_NAMES}
    error_file = _log(template.error_file, rank)
    if error_file:
        named["TORCHELASTIC_ERROR_FILE"] = error_file
    return replace(
        template,
        environment={**template.environment, **named},
        stdout=_log(template.stdout, rank),
        stderr=_log(template.stderr, rank),
        error_file=error_file,
    )


def _log(path: str, rank: int) -> str:
    """.../attempt_0/1/stdout.log of one of our ranks becomes .../attempt_0/guest-7/stdout.log of rank 7."""
    if not path or path == os.devnull:
        return path
    folder, name = os.path.split(path)
    return os.path.join(os.path.dirname(folder), f"guest-{rank}", name)
