"""How many host losses at once leave all state: the placement that runs, every policy, exact and drawn.

    python benchmarks/survival.py [--trials 20000] [--seed 0] [--out survival.json]

Prints the Markdown tables of docs/REDUNDANCY.md and writes the same as JSON. One slot a host, equal images. Exact
figures count every set of lost hosts: stripes never leave their group, so subsets are counted group by group and the
counts multiplied. The same fraction is drawn by chance through `lost_slots`, which shares no code with the
count, and stands beside the closed formula for fixed groups. No processes, no bytes: this measures where shards lie.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from holdfast.ckpt.memory.placement import HostInfo, Placement, Redundancy, SlotInfo, lost_slots, place

POLICIES = [Redundancy(1, 1), Redundancy(7, 1), Redundancy(6, 2), Redundancy(8, 3), Redundancy(12, 4)]
NAMES = {Redundancy(1, 1): "mirror", Redundancy(7, 1): "xor (7+1)"}
HOSTS = (16, 128)
RACK = {16: 4, 128: 8}
LOSSES = (1, 2, 3, 4)
IMAGE_BYTES = 1 << 30


def layout(hosts: int, redundancy: Redundancy, rack: int = 1) -> Placement:
    domains = [f"host-{h}" if rack == 1 else f"rack-{h // rack}" for h in range(hosts)]
    return place(
        [SlotInfo(h, h, IMAGE_BYTES) for h in range(hosts)],
        [HostInfo(h, domain) for h, domain in enumerate(domains)],
        redundancy,
        0,
    )


def masks_of(placement: Placement) -> set[int]:
    """The sets of hosts that share a stripe, as bit masks."""
    host_of = {slot.slot: slot.host for slot in placement.slots}
    return {
        sum(1 << host for host in {*(host_of[chunk.slot] for chunk in stripe.data), *stripe.parity})
        for stripe in placement.stripes
    }


def survives(masks: Iterable[int], m: int, lost: Collection[int]) -> bool:
    gone = sum(1 << host for host in lost)
    return all((mask & gone).bit_count() <= m for mask in masks)


def groups_of(masks: Collection[int]) -> list[tuple[list[int], list[int]]]:
    """(hosts, masks) of each set of hosts that no stripe leaves."""
    parts: list[int] = []
    for mask in masks:
        touching = [part for part in parts if part & mask]
        parts = [part for part in parts if not part & mask]
        for part in touching:
            mask |= part
        parts.append(mask)
    return [
        ([h for h in range(part.bit_length()) if part >> h & 1], [mask for mask in masks if mask & part])
        for part in parts
    ]


def times(a: Sequence[int], b: Sequence[int], most: int) -> list[int]:
    """Product of two counts by size: ways to lose i here and j there."""
    total = [0] * (most + 1)
    for (i, x), (j, y) in itertools.product(enumerate(a), enumerate(b)):
        if i + j <= most:
            total[i + j] += x * y
    return total


def exact(masks: Collection[int], m: int, hosts: int, most: int) -> list[float]:
    """Fraction of the sets of f lost hosts that lose nothing, f = 0..most; every set is counted."""
    counts = [1]
    for members, own in groups_of(masks):
        within = [
            sum(survives(own, m, lost) for lost in itertools.combinations(members, f))
            for f in range(min(most, len(members)) + 1)
        ]
        counts = times(counts, within, most)
    return [count / math.comb(hosts, f) for f, count in enumerate(counts)]


def formula(masks: Collection[int], m: int, hosts: int, most: int) -> list[float]:
    """Fixed groups: nothing is lost while no group loses more than m. A lower bound where groups exceed k+m."""
    counts = [1]
    for members, _ in groups_of(masks):
        counts = times(counts, [math.comb(len(members), f) for f in range(m + 1)], most)
    return [count / math.comb(hosts, f) for f, count in enumerate(counts)]


def drawn(placement: Placement, losses: int, trials: int, rng: random.Random) -> float:
    hosts = [host.host for host in placement.hosts]
    return sum(not lost_slots(placement, rng.sample(hosts, losses)) for _ in range(trials)) / trials


def host_losses(hosts: int, trials: int, rng: random.Random) -> list[dict[str, Any]]:
    rows = []
    for redundancy in POLICIES:
        placement = layout(hosts, redundancy)
        masks = masks_of(placement)
        sizes = sorted(len(members) for members, _ in groups_of(masks))
        parity = sum(placement.parity_bytes(h) for h in range(hosts))
        # A stripe has k + m hosts and a trial looks at all of them: fewer trials where there are more stripes.
        tries = max(500, trials * 16 // hosts)
        rows.append(
            {
                "hosts": hosts,
                "policy": NAMES.get(redundancy, str(redundancy)),
                "groups": f"{len(sizes)} of {sizes[0]}" + (f"-{sizes[-1]}" if sizes[0] != sizes[-1] else ""),
                "wider": sizes[-1] > redundancy.k + redundancy.m,
                "exact": exact(masks, redundancy.m, hosts, LOSSES[-1])[1:],
                "formula": formula(masks, redundancy.m, hosts, LOSSES[-1])[1:],
                "drawn": [drawn(placement, f, tries, rng) for f in LOSSES],
                "trials": tries,
                "memory": parity / (hosts * IMAGE_BYTES),
            }
        )
    return rows


def rack_losses(hosts: int) -> list[dict[str, Any]]:
    """Whole racks: placed by rack labels, and as groups of adjacent hosts, the usual way without labels."""
    rack, rows = RACK[hosts], []
    racks = [range(first, first + rack) for first in range(0, hosts, rack)]
    for redundancy in POLICIES:
        placement = layout(hosts, redundancy, rack)
        labelled = masks_of(placement)
        sizes = [len(members) for members, _ in groups_of(masks_of(layout(hosts, redundancy)))]
        ends = list(itertools.accumulate(sizes, initial=0))
        adjacent = [sum(1 << h for h in range(a, b)) for a, b in itertools.pairwise(ends)]

        def fraction(masks: Collection[int], lost: int, m: int = redundancy.m) -> float:
            sets = list(itertools.combinations(racks, lost))
            return sum(survives(masks, m, [h for part in chosen for h in part]) for chosen in sets) / len(sets)

        rows.append(
            {
                "hosts": hosts,
                "rack": rack,
                "policy": NAMES.get(redundancy, str(redundancy)),
                "labelled": [fraction(labelled, lost) for lost in (1, 2)],
                "adjacent": [fraction(adjacent, lost) for lost in (1, 2)],
                "memory": sum(placement.parity_bytes(h) for h in range(hosts)) / (hosts * IMAGE_BYTES),
                "warnings": placement.warnings,
            }
        )
    return rows


def spreading(trials: int, rng: random.Random) -> list[dict[str, Any]]:
    """Why groups: chance that m + 1 losses are fatal with the same code in groups, rotated, and over random hosts."""
    hosts, rows = HOSTS[-1], []
    for redundancy in (Redundancy(6, 2), Redundancy(12, 4)):
        n, m = redundancy.k + redundancy.m, redundancy.m
        chance = {sum(1 << h for h in rng.sample(range(hosts), n)) for _ in range(hosts)}
        lost = sum(not survives(chance, m, rng.sample(range(hosts), m + 1)) for _ in range(trials))
        fatal = {
            "in groups": 1 - exact(masks_of(layout(hosts, redundancy)), m, hosts, m + 1)[-1],
            # Stripe i on hosts i..i+n-1: a fatal set is its first host and m of the n - 1 that follow.
            "rotated over all": hosts * math.comb(n - 1, m) / math.comb(hosts, m + 1),
            "over hosts drawn by chance": lost / trials,
        }
        rows.append({"hosts": hosts, "policy": str(redundancy), "losses": m + 1, "fatal": fatal, "trials": trials})
    return rows


def percent(fraction: float, digits: int = 1) -> str:
    """Never rounded up to a full 100 %, nor down to an empty 0."""
    if fraction in (0.0, 1.0):
        return f"{100 * fraction:.0f} %"
    shown = f"{100 * fraction:.{digits}f}"
    return f"{100 * fraction:.{digits + 2}f} %" if float(shown) in (0.0, 100.0) else f"{shown} %"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown(result: dict[str, Any]) -> str:
    parts = []
    for hosts in HOSTS:
        rows = [row for row in result["host_losses"] if row["hosts"] == hosts]
        lines = []
        for row in rows:
            cells = [
                percent(e) + ("" if abs(e - f) < 1e-9 else f" (≥ {percent(f)})")
                for e, f in zip(row["exact"], row["formula"], strict=True)
            ]
            lines.append([row["policy"], row["groups"], *cells, percent(row["memory"], 0)])
        head = [f"{hosts} hosts", "groups", *(f"f={f}" for f in LOSSES), "extra memory"]
        parts.append(table(head, lines))
        off = max(abs(e - d) for row in rows for e, d in zip(row["exact"], row["drawn"], strict=True))
        parts.append(
            f"Drawn {rows[0]['trials']:,} times a cell through `lost_slots`: at most {100 * off:.1f} points off."
        )
    lines = [
        [
            f"{row['hosts']} hosts, racks of {row['rack']}",
            row["policy"],
            *(percent(x) for x in row["labelled"]),
            *(percent(x) for x in row["adjacent"]),
            "yes" if row["warnings"] else "",
        ]
        for row in result["rack_losses"]
    ]
    head = ["", "policy", "1 rack", "2 racks", "1 rack, adjacent hosts", "2 racks, adjacent hosts", "warned at start"]
    parts.append(table(head, lines))
    spread = result["spreading"]
    kinds = list(spread[0]["fatal"])
    head = ["128 hosts", "hosts lost", *(f"fatal with stripes {kind}" for kind in kinds)]
    parts.append(
        table(
            head, [[r["policy"], str(r["losses"]), *(percent(r["fatal"][kind], 2) for kind in kinds)] for r in spread]
        )
    )
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20_000, help="sets of lost hosts drawn for a cell of 16 hosts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write all figures as JSON to this file")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    result = {
        "benchmark": "survival",
        "seed": arguments.seed,
        "host_losses": [row for hosts in HOSTS for row in host_losses(hosts, arguments.trials, rng)],
        "rack_losses": [row for hosts in HOSTS for row in rack_losses(hosts)],
        "spreading": spreading(5 * arguments.trials, rng),
    }
    print(markdown(result))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
