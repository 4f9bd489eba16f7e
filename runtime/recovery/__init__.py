"""Recovery decisions: which step to resume from, and from which source."""
