"""(d) Rebuilding all groups: from the order to leave a generation to the first collective of the next one.

    python benchmarks/rebuild.py [--ranks 4 8] [--rounds 60]

All ranks are alive and blocked in a receive when the order comes (as survivors are); each aborts, drops the
old group, builds the new one over a store, and does one all-gather and one neighbour exchange. The figure of a
round is the slowest rank's. Beside it, in turn in the same processes: torch's own destroy_process_group +
init_process_group over a fresh prefix. Prints one JSON line per world size. Goals: median <= 15 ms at 4
ranks, <= 40 ms at 8.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from ranks import Rank, run_ranks


def rank_main(rank: Rank, rounds: int) -> Any:
    import torch
    import torch.distributed as dist

    from holdfast.proto.errors import Fenced, PeerLost

    torch.set_num_threads(1)
    me, size = rank.rank, rank.world_size
    ours: list[float] = []
    theirs: list[float] = []
    group = rank.group(1)

    def everybody(key: str) -> None:
        rank.store.add(key, 1)
        while rank.store.add(key, 0) < size:
            time.sleep(0.0005)

    def first_use(allgather: Any, send: Any, receive: Any) -> None:
        allgather(torch.tensor([float(me)]))
        work = send(torch.ones(4), (me + 1) % size)
        receive(torch.empty(4), (me - 1) % size)
        work.wait()

    for number in range(rounds):
        generation = number + 2
        blocked = threading.Event()

        started: list[float] = []

        def order(
            current: Any = group,
            blocked: threading.Event = blocked,
            generation: int = generation,
            started: list[float] = started,
        ) -> None:
            blocked.wait()
            everybody(f"ours-{generation}")
            started.append(time.perf_counter())
            current.abort(Fenced(generation, "benchmark"))

        ordering = threading.Thread(target=order, daemon=True)
        ordering.start()
        try:
            pending = group.irecv(torch.empty(1 << 16), (me + 1) % size, 9)
            blocked.set()
            group.wait(pending)
        except (Fenced, PeerLost):  # the order, or the end of a peer that got it a moment earlier
            ordering.join()
            group.close(pending)
        group = rank.group(generation)
        current = group

        def send(t: Any, peer: int, current: Any = current) -> Any:
            return current.isend(t, peer, 3)

        def receive(t: Any, peer: int, current: Any = current) -> None:
            current.wait(current.irecv(t, peer, 3))

        first_use(current.allgather, send, receive)
        ours.append(time.perf_counter() - started[0])

        everybody(f"theirs-{generation}")
        begin = time.perf_counter()
        if dist.is_initialized():
            dist.destroy_process_group()
        store = dist.PrefixStore(f"torch-{generation}", rank.store)
        dist.init_process_group("gloo", store=store, rank=me, world_size=size)
        outputs = [torch.empty(1) for _ in range(size)]
        first_use(
            lambda t, outputs=outputs: dist.all_gather(outputs, t),
            lambda t, d: dist.isend(t, d),
            lambda t, s: dist.recv(t, s),
        )
        theirs.append(time.perf_counter() - begin)
    return {"ours": ours, "theirs": theirs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()
    for size in arguments.ranks:
        results = run_ranks(f"{Path(__file__).resolve()}:rank_main", size, {"rounds": arguments.rounds})
        slowest = {
            side: sorted(max(r[side][i] for r in results) * 1e3 for i in range(5, arguments.rounds))
            for side in ("ours", "theirs")
        }
        line: dict[str, Any] = {"benchmark": "rebuild", "ranks": size, "rounds": arguments.rounds - 5}
        for side, values in slowest.items():
            line[f"{side}_ms"] = {
                "median": round(statistics.median(values), 2),
                "p10": round(values[len(values) // 10], 2),
                "p90": round(values[-1 - len(values) // 10], 2),
                "max": round(values[-1], 2),
            }
        line["ratio"] = round(statistics.median(slowest["ours"]) / statistics.median(slowest["theirs"]), 3)
        line["goal_ms"] = {4: 15, 8: 40}.get(size)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
