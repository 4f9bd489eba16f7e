"""Convergence under failures: traces, methods, a simulator made of the runtime's own parts, measures, plots.

trace.py (who fails when) ─┐
methods.py (what is done) ─┼─▶ simulator.py (one process) ──▶ campaign.py: results, one JSON line a run
settings.py (what learns) ─┤            ║ must be equal, loss by loss
                           └─▶ real.py + job.py (6 ranks, SIGKILL)
results ──▶ measure.py, timing.py (pure) ──▶ report.py (tables), plots.py (PNG)
"""
