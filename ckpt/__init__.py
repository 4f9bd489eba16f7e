"""State: what is kept, where, and how it comes back. Imports no torch at this level."""

if __name__ != "holdfast.ckpt":
    raise ImportError(f"import holdfast.ckpt, not {__name__}: the checkout itself is on sys.path")
