"""The saver: the process of a host that turns sealed snapshots into universal checkpoints while training goes on.

    page     words shared with the ranks: what is due, and that the saver lives
    choose   which step, under which name, what goes: decisions
    copy     out of the arenas into memory of its own, verified
    compose  from the ranks' shares to one checkpoint's tensors and metadata
    service  the loop around them

Several hosts write one checkpoint together:

    told     what a host tells of its shares, without the bytes
    divide   who takes, who writes what; one manifest from the parts': decisions
    hand     what each host does: copy its shares, write its part
    peers    how savers find and reach one another
    crew     all hands at once
    team     the loop: the saver beside rank 0 leads

Imports no torch. The trainer never waits for it.
"""
