"""Many more histories of simulated hosts than CI has time for (tests/sim/test_hosts.py): which seeds break a rule?

    .venv/bin/python benchmarks/sim_hosts.py --first 0 --count 5000 --scenario anything

One process, one core, about 17 seeds a second. Prints a line a finding and one JSON line at the end; exit code 1 if
anything was found. A seed is replayed by SIM_SEED=N with the test of its scenario.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / part) for part in ("sim", "helpers")]

from test_hosts import anything, promised, simulate


def verdict(seed: int, scenario: str) -> tuple[str, str]:
    """How that history ended; and what is wrong with that, or nothing."""
    try:
        world = simulate(seed, promised if scenario == "promised" else anything)
    except (AssertionError, KeyError) as error:
        return "broken", f"{type(error).__name__}: {error}".splitlines()[0]
    end = "done" if world.done else "stopped" if world.stopped is not None else "no quorum is left"
    wrong = f"{world}: {world.stopped or 'no end'}" if scenario == "promised" and end != "done" else ""
    return end, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--scenario", choices=("anything", "promised"), default="anything")
    parser.add_argument("--seconds", type=float, default=540.0, help="stop after so long")
    arguments = parser.parse_args()
    ends: Counter[str] = Counter()
    found: list[int] = []
    began = time.monotonic()
    for seed in range(arguments.first, arguments.first + arguments.count):
        if time.monotonic() - began > arguments.seconds:
            break
        end, wrong = verdict(seed, arguments.scenario)
        ends[end] += 1
        if wrong:
            found.append(seed)
            print(f"seed {seed}: {wrong}", flush=True)
    figures = {"scenario": arguments.scenario, "first": arguments.first, "seeds": ends.total(), "ends": ends}
    print(json.dumps({**figures, "found": found, "seconds": round(time.monotonic() - began, 1)}))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
