"""What runs outside the ranks: the `holdfast` command, the agent, the coordinator, the zygote."""

if __name__ != "holdfast.launcher":
    raise ImportError(f"import holdfast.launcher, not {__name__}: the checkout itself is on sys.path")
