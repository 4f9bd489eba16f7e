"""The words all Holdfast processes share: identifiers, plan, errors, events, lease page, wire messages.

No I/O, no torch, no clock; imports nothing of ours. Everything here may be imported by any process,
including the snapshot manager and the coordinator, which must start in milliseconds.
"""

if __name__ != "holdfast.proto":
    raise ImportError(f"import holdfast.proto, not {__name__}: the checkout itself is on sys.path")
