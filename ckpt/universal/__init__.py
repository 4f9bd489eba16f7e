"""The universal checkpoint: a data format and the library that writes, reads and verifies it. Imports no torch.

    model     what a checkpoint is: values            geometry  boxes and flat ranges: intersections
    read      any region of any tensor, verified      write     streaming, resumable, all or nothing
    open      our own folders; refuses the rest       adopt     a manifest over somebody else's files
    verify    what is wrong, and exactly where        save      a sealed snapshot becomes a checkpoint
    latest    which one is newest; which may go

docs/CHECKPOINT_FORMAT.md specifies the bytes. Nothing is imported here: a reader of headers needs no digests.
"""
