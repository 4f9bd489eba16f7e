"""The pipeline engine: planner (pure), executor, dyadic gradient sum."""
