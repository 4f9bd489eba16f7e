"""Rebuild of a lost host's snapshot on an empty host, over the smaller of bare loopback and decoding, in one run.

    python benchmarks/rebuild_host.py [--mib 192] [--rounds 7] [--codes 1+1,2+1,4+2,6+2] [--memory warm]

A snapshot manager and a protector a host, all on this machine. A step is protected and the first host killed. In each
round a replacement that holds nothing starts, and has the lost slot rebuilt: every byte comes from k other hosts over
TCP (mirror: one), is digested, decoded, digested where it lies, and sealed. Around each rebuild, in turn: the same
number of bytes over one bare connection from another process (from and into warm memory of the slot's size), and
decoding alone, block by block in warm memory. Rates are of received bytes, k for each byte rebuilt. The replacement
has taken the memory before, as a rank does at its start (--memory warm), or takes it then (cold): on a virtual machine
new memory costs many times its use. A ratio is of one round: rebuild over the smaller of decoding and the mean of the
two transfers around it. Goal: >= 0.6. One JSON line a code and kind of memory.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent / "tests" / "helpers")]

from protected import Cluster, Host, image_bytes
from table import Report, add_markdown, shown, spread

from holdfast.ckpt.memory import erasure
from holdfast.ckpt.memory.placement import HostInfo, Placement, Redundancy, SlotInfo, place

BLOCK = 1 << 20
GOAL = 0.6
SENDER = """
import socket, sys
port, nbytes, size, block = map(int, sys.argv[1:])
source = memoryview(bytearray(b"x") * size)
with socket.create_connection(("127.0.0.1", port)) as out:
    out.recv(1)
    for start in range(0, nbytes, block):
        out.sendall(source[start % size : start % size + block])
"""


def warm(nbytes: int) -> memoryview:
    """Memory whose pages are there."""
    return memoryview(bytearray(b"\1" * nbytes))


def loopback(nbytes: int, target: memoryview) -> float:
    """Bytes a second over one connection from another process, in blocks."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        numbers = server.getsockname()[1], nbytes, len(target), BLOCK
        command = [sys.executable, "-c", SENDER, *map(str, numbers)]
        sender = subprocess.Popen(command)
        connection, _ = server.accept()
        with connection:
            started = time.perf_counter()
            connection.send(b"x")
            done = 0
            while done < nbytes:
                at = done % len(target)
                done += connection.recv_into(target[at : at + BLOCK], min(BLOCK, nbytes - done, len(target) - at))
            seconds = time.perf_counter() - started
        sender.wait()
    return nbytes / seconds


class Decoding:
    """One lost data shard of k, decoded block by block; memory and codec are warm."""

    def __init__(self, code: erasure.Code, nbytes: int) -> None:
        self._code = code
        chance = numpy.random.default_rng(0)
        self._have = {n: memoryview(chance.integers(0, 256, nbytes, numpy.uint8)) for n in range(1, code.k + 1)}
        self._want = warm(nbytes)
        self.rate()

    def rate(self) -> float:
        """Bytes read a second."""
        started = time.perf_counter()
        for start in range(0, len(self._want), BLOCK):
            have = {shard: data[start : start + BLOCK] for shard, data in self._have.items()}
            erasure.decode(self._code, have, {0: self._want[start : start + BLOCK]})
        return len(self._have) * len(self._want) / (time.perf_counter() - started)


class Group:
    """k+m hosts with one protected step, the first of them lost, and an empty host that starts anew each time."""

    def __init__(self, k: int, m: int, nbytes: int) -> None:
        self.nbytes = nbytes
        # Only slot 0 is rebuilt; the others make it stripes of k on k+m hosts.
        self.made = Cluster({slot: nbytes for slot in range(k + m)}, k + m + 1)
        self.spare = self.made.hosts[-1]
        self._number = 1

    def protect(self, k: int, m: int) -> None:
        """Write one step, and wait for its parity; then lose the first host."""
        made, hosts = self.made, range(k + m)
        made.start(hosts)
        made.tell(self._place(k, m, hosts))
        made.write(1)
        made.wait_protected(1, 180.0)
        made.hosts[0].kill()

    def _place(self, k: int, m: int, hosts: range) -> Placement:
        sizes = self.made.sizes
        slots = [SlotInfo(slot, slot, image_bytes(slot, nbytes)) for slot, nbytes in sizes.items()]
        return place(slots, [HostInfo(host, f"host-{host}") for host in hosts], Redundancy(k, m), 1)

    def rebuild(self, *, taken: bool, check: bool) -> tuple[float, tuple[str, ...]]:
        """Seconds, and where the bytes came from."""
        spare = self.spare
        spare.start()
        try:
            self._tell(spare)
            assert spare.writer is not None
            if taken:
                for half in (0, 1):
                    spare.writer.arena(0, half, self.nbytes + BLOCK).close()
            with spare.client(timeout_s=60.0) as client:
                rebuilt = client.rebuild(0, 1, deadline_s=120.0)
            assert rebuilt.source == "parity", rebuilt
            if check:
                self.made.check(spare, 0, rebuilt.half, 1)
        finally:
            spare.kill()
        return rebuilt.seconds, rebuilt.shards

    def _tell(self, spare: Host) -> None:
        """Everybody who is left learns of the new host, as after a loss."""
        addresses = {host.number: host.address for host in self.made.hosts if host.alive}
        self._number += 1
        for host in self.made.hosts:
            if host.alive:
                with host.client() as client:
                    placement = None if host is spare else self.made.placement
                    client.topology(self._number + 1, host.number, addresses, placement)


def run_code(k: int, m: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All rounds of one code."""
    nbytes = arguments.mib * BLOCK
    received = k * nbytes
    target = warm(nbytes)
    decoding = Decoding(erasure.Code(k, m), nbytes) if k > 1 else None
    kinds = ["warm", "cold"] if arguments.memory == "both" else [arguments.memory]
    rates: dict[str, dict[str, list[float]]] = {kind: {"rebuild": [], "loopback": [], "decode": []} for kind in kinds}
    group = Group(k, m, nbytes)
    try:
        group.protect(k, m)
        loopback(received, target)
        for number in range(arguments.rounds):
            for kind in kinds:
                before = loopback(received, target)
                decode = decoding.rate() if decoding is not None else float("inf")
                seconds, shards = group.rebuild(taken=kind == "warm", check=number == 0)
                assert len(shards) >= k and not any(f"host {group.spare.number} " in one for one in shards), shards
                rates[kind]["loopback"].append((before + loopback(received, target)) / 2)
                rates[kind]["decode"].append(decode)
                rates[kind]["rebuild"].append(received / seconds)
    finally:
        group.made.close()
    return [as_line(f"{k}+{m}", kind, arguments, found) for kind, found in rates.items()]


def as_line(code: str, kind: str, arguments: argparse.Namespace, rates: dict[str, list[float]]) -> dict[str, Any]:
    """What is printed."""
    least = [min(pair) for pair in zip(rates["loopback"], rates["decode"], strict=True)]
    ratios = [ours / bound for ours, bound in zip(rates["rebuild"], least, strict=True)]
    finite = {name: [rate / 1e9 for rate in found if rate != float("inf")] for name, found in rates.items()}
    return {
        "benchmark": "rebuild_host",
        "code": code,
        "memory": kind,
        "mib": arguments.mib,
        "rounds": arguments.rounds,
        "received_gb_per_s": {name: spread(found) if found else None for name, found in finite.items()},
        "ms": round(statistics.median(int(code[0]) * arguments.mib * BLOCK / r for r in rates["rebuild"]) * 1e3, 1),
        "ratio": spread(ratios),
        "goal": GOAL,
        "load": round(os.getloadavg()[0], 2),
    }


def as_row(line: dict[str, Any]) -> list[object]:
    """The line in a table."""
    rates = line["received_gb_per_s"]
    cells = [shown(rates[name]) if rates[name] else "" for name in ("rebuild", "loopback", "decode")]
    met = "met" if line["ratio"]["median"] >= GOAL else "missed"
    return [line["code"], line["memory"], line["ms"], *cells, shown(line["ratio"]), f">= {GOAL}: {met}"]


def main() -> int:
    """Run the rounds and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=192, help="size of the lost slot (192)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--codes", default="1+1,2+1,4+2,6+2")
    parser.add_argument("--memory", choices=("warm", "cold", "both"), default="warm", help="of the replacement (warm)")
    add_markdown(parser)
    arguments = parser.parse_args()
    report = Report(arguments.markdown, "Rebuild of a lost host")
    rows = []
    for text in arguments.codes.split(","):
        k, m = map(int, text.split("+"))
        for line in run_code(k, m, arguments):
            report.line(line)
            rows.append(as_row(line))
    columns = ["code", "memory", "ms", "rebuild GB/s", "loopback GB/s", "decode GB/s", "ratio", "goal"]
    note = "Rates are of received bytes, k for each byte rebuilt; median (least-most) over rounds."
    report.table(columns, rows, note)
    report.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
