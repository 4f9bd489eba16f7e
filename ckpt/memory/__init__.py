"""In-memory snapshots: arenas, the snapshot manager process, and its client."""
