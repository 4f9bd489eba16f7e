"""The saver: the process of a host that turns sealed snapshots into universal checkpoints while training goes on.

    page     words shared with the ranks: what is due, and that the saver lives
    choose   which step, under which name, what goes: decisions
    copy     out of the arenas into memory of its own, verified
    compose  from the ranks' shares to one checkpoint's tensors and metadata
    service  the loop around them

Imports no torch. The trainer never waits for it.
"""
