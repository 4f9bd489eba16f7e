"""Rebuild of a lost host's snapshot from the others, over the smaller of loopback and decoding, in one run.

    python benchmarks/rebuild_host.py [--mib 192] [--rounds 5] [--codes 1+1,2+1,4+2]

A snapshot manager and a protector a host, all on this machine. A step is protected, one host is dropped, and another
rebuilds its slot: blocks from k hosts over TCP, each block's digest checked, decoded, the whole digest compared, and
sealed, into memory that was taken before (as a rank does at its start). Interleaved with it: the same number of bytes
over one bare loopback connection (recv_into warm memory), and decoding alone. For every byte rebuilt k bytes are
received (mirror: one), so rates are of received bytes. Goal: rebuild / min of the two >= 0.6. One JSON line a code.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import sys
import threading
import time
from pathlib import Path

import numpy

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "helpers"))

from protected import Cluster, cluster

from holdfast.ckpt.memory import erasure

BLOCK = 1 << 20


def loopback(nbytes: int) -> float:
    """Bytes a second over one connection, in blocks, into memory that is there."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        source, target = memoryview(bytearray(b"x" * BLOCK)), memoryview(bytearray(BLOCK))
        blocks = nbytes // BLOCK

        def send() -> None:
            with socket.create_connection(server.getsockname()) as out:
                for _ in range(blocks):
                    out.sendall(source)

        sender = threading.Thread(target=send)
        started = time.perf_counter()
        sender.start()
        connection, _ = server.accept()
        with connection:
            for _ in range(blocks):
                got = 0
                while got < BLOCK:
                    got += connection.recv_into(target[got:])
        sender.join()
        return blocks * BLOCK / (time.perf_counter() - started)


def decoding(k: int, m: int, nbytes: int) -> float:
    """Bytes read a second while one lost shard is decoded from k."""
    code = erasure.Code(k, m)
    size = max(BLOCK, nbytes // k // BLOCK * BLOCK)
    have = {
        shard: numpy.random.default_rng(shard).integers(0, 256, size, dtype=numpy.uint8) for shard in range(1, k + 1)
    }
    want = numpy.zeros(size, dtype=numpy.uint8)
    started = time.perf_counter()
    for start in range(0, size, BLOCK):
        blocks = {shard: memoryview(data)[start : start + BLOCK] for shard, data in have.items()}
        erasure.decode(code, blocks, {0: memoryview(want)[start : start + BLOCK]})
    return k * size / (time.perf_counter() - started)


def rebuild(made: Cluster, lost: int, step: int, nbytes: int, k: int) -> float:
    """Bytes received a second while the slot of a dropped host is rebuilt."""
    others = {host.number: host.address for host in made.hosts if host.number != lost}
    made.number += 1
    for host in made.hosts:
        if host.number != lost:
            with host.client() as client:
                client.topology(made.number, host.number, others, made.placement)
    target = made.hosts[(lost + 1) % len(made.hosts)]
    assert target.writer is not None
    for half in (0, 1):
        target.writer.arena(lost, half, nbytes + (1 << 20)).close()
    with target.client() as client:
        rebuilt = client.rebuild(lost, step, deadline_s=120.0)
    assert rebuilt.source in ("parity", "copy"), rebuilt
    made.check(target, lost, rebuilt.half, step)
    return k * nbytes / rebuilt.seconds


def main() -> int:
    """Run the rounds and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--codes", default="1+1,2+1,4+2")
    arguments = parser.parse_args()
    for text in arguments.codes.split(","):
        k, m = map(int, text.split("+"))
        nbytes = arguments.mib * BLOCK
        rates: dict[str, list[float]] = {"rebuild": [], "loopback": [], "decode": []}
        for number in range(arguments.rounds):
            with cluster(
                {slot: nbytes if slot == 0 else nbytes // 8 for slot in range(k + m)}, k + m, seed=number
            ) as made:
                made.tell(made.place((k, m)))
                made.write(1)
                made.wait_protected(1, 120.0)
                rates["loopback"].append(loopback(k * nbytes))
                rates["decode"].append(decoding(k, m, k * nbytes) if k > 1 else float("inf"))
                rates["rebuild"].append(rebuild(made, 0, 1, nbytes, k))
        least = [min(a, b) for a, b in zip(rates["loopback"], rates["decode"], strict=True)]
        ratios = [a / b for a, b in zip(rates["rebuild"], least, strict=True)]
        line = {
            "benchmark": "rebuild_host",
            "code": text,
            "mib": arguments.mib,
            "gb_per_s": {name: round(statistics.median(values) / 1e9, 3) for name, values in rates.items()},
            "ratio": round(statistics.median(ratios), 3),
            "ratio_min_max": [round(min(ratios), 3), round(max(ratios), 3)],
            "goal": 0.6,
        }
        print(json.dumps(line).replace("Infinity", "null"), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
