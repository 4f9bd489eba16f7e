"""(e) The erasure codec against memcpy, and against pyeclib's own API and zfec, in one run.

    python benchmarks/erasure.py [--codes 2,1 4,2 6,2 8,3] [--megabytes 192] [--turns 15] [--json] [--markdown FILE]

All candidates work on the same warm data in the same thread and take turns in seeded random order; memcpy is one
of them, and copies the k data shards. GB/s counts data bytes, of encoding and decoding alike. Compared are medians
over turns, of wall time and of the thread's CPU time, as ratios with the spread (10th to 90th percentile) of the
per-turn ratios. Decoding rebuilds m lost data shards (decode) or one (decode_one) into place; encode_blocks is
encode, called block by block as a pipeline would. A ratio above 1 is no wonder: memcpy writes k shards, a codec m.
Peers return new memory each time, so they get their data in segments of --segment-kb per shard (whole shards take
them longer) and an allocator that keeps what it has; pyeclib's decode also copies what was not lost. A peer that is
not installed is said to be so. Goals: encode / memcpy >= 0.8, decode / memcpy >= 0.7. Prints a table, or JSON lines
(--json); --out writes the lines to a file as well.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from table import Report, add_markdown

from holdfast.ckpt.memory.erasure import BLOCK_BYTES, Code, decode, encode, engine
from holdfast.proto.errors import HoldfastError

GOALS = {"encode": 0.8, "encode_blocks": 0.8, "decode": 0.7, "decode_one": 0.7}
WARM_TURNS = 2
NOTE = (
    "Ratios of medians over turns, with the 10th and 90th percentile of a turn's ratio; the goal is judged by CPU time."
)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


@dataclass(frozen=True)
class Stripe:
    """One stripe in memory, and warm memory to write to."""

    code: Code
    data: list[Any]
    parity: list[Any]
    rebuilt: list[Any]

    @property
    def data_bytes(self) -> int:
        return self.code.k * self.data[0].nbytes

    @property
    def lost(self) -> list[int]:
        """The data shards that decoding rebuilds."""
        return list(range(min(self.code.k, self.code.m)))


Candidates = dict[tuple[str, str], Callable[[], object]]
"""(engine, operation) to what is timed."""


def make_stripe(code: Code, megabytes: int, segment_bytes: int) -> Stripe:
    nbytes = max(1, megabytes * 1_000_000 // code.k // segment_bytes) * segment_bytes
    chance = np.random.default_rng(0)
    data = [chance.integers(0, 256, nbytes, np.uint8) for _ in range(code.k)]
    parity = [np.ones(nbytes, np.uint8) for _ in range(code.m)]
    encode(code, data, parity)
    return Stripe(code, data, parity, [np.ones(nbytes, np.uint8) for _ in range(code.k)])


def ours(stripe: Stripe) -> Candidates:
    code, data, name = stripe.code, stripe.data, engine().name
    scratch = [np.ones_like(shard) for shard in stripe.parity]
    shards = {**dict(enumerate(data)), **{code.k + at: shard for at, shard in enumerate(stripe.parity)}}

    def by_blocks() -> None:
        for start in range(0, data[0].nbytes, BLOCK_BYTES):
            block = slice(start, start + BLOCK_BYTES)
            encode(code, [shard[block] for shard in data], [shard[block] for shard in scratch])

    def rebuild(lost: list[int]) -> None:
        have = {shard: buffer for shard, buffer in shards.items() if shard not in lost}
        decode(code, have, {shard: stripe.rebuilt[shard] for shard in lost})

    rebuild(stripe.lost)
    assert all(np.array_equal(stripe.rebuilt[shard], data[shard]) for shard in stripe.lost)
    return {
        (name, "encode"): lambda: encode(code, data, scratch),
        (name, "encode_blocks"): by_blocks,
        (name, "decode"): lambda: rebuild(stripe.lost),
        (name, "decode_one"): lambda: rebuild(stripe.lost[:1]),
    }


def pyeclib_api(stripe: Stripe, segment_bytes: int) -> Candidates:
    from pyeclib.ec_iface import ECDriver

    code = stripe.code
    driver = ECDriver(k=code.k, m=code.m, ec_type="isa_l_rs_cauchy")
    segments = [
        b"".join(shard[start : start + segment_bytes].tobytes() for shard in stripe.data)
        for start in range(0, stripe.data[0].nbytes, segment_bytes)
    ]
    kept = [driver.encode(segment)[len(stripe.lost) :] for segment in segments]
    assert driver.decode(kept[0]) == segments[0]

    def encode_all() -> None:
        for segment in segments:
            driver.encode(segment)

    def decode_all() -> None:
        for fragments in kept:
            driver.decode(fragments)

    return {("pyeclib", "encode"): encode_all, ("pyeclib", "decode"): decode_all}


def zfec_api(stripe: Stripe, segment_bytes: int) -> Candidates:
    import zfec

    code, lost = stripe.code, stripe.lost
    encoder, decoder = zfec.Encoder(code.k, code.n), zfec.Decoder(code.k, code.n)
    starts = range(0, stripe.data[0].nbytes, segment_bytes)
    segments = [tuple(memoryview(shard)[start : start + segment_bytes] for shard in stripe.data) for start in starts]
    parity = tuple(range(code.k, code.n))
    numbers = (*range(len(lost), code.k), *parity[: len(lost)])
    kept = [(*segment[len(lost) :], *encoder.encode(segment, parity)[: len(lost)]) for segment in segments]
    assert [bytes(shard) for shard in decoder.decode(kept[0], numbers)] == [bytes(shard) for shard in segments[0]]

    def encode_all() -> None:
        for segment in segments:
            encoder.encode(segment, parity)

    def decode_all() -> None:
        for shards in kept:
            decoder.decode(shards, numbers)

    return {("zfec", "encode"): encode_all, ("zfec", "decode"): decode_all}


def measure(candidates: Candidates, turns: int, seed: int) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """(wall, CPU of this thread) in seconds, for each candidate and turn."""
    times: dict[tuple[str, str], list[tuple[float, float]]] = {name: [] for name in candidates}
    order = random.Random(seed)
    for turn in range(WARM_TURNS + turns):
        names = list(candidates)
        order.shuffle(names)
        for name in names:
            wall, cpu = time.perf_counter(), time.thread_time()
            candidates[name]()
            cpu, wall = time.thread_time() - cpu, time.perf_counter() - wall
            if turn >= WARM_TURNS:
                times[name].append((wall, cpu))
    return times


def ratio(fast: list[float], slow: list[float]) -> dict[str, float]:
    """How many times `fast` is as quick as `slow`: of the medians, and the spread over turns."""
    pairs = sorted(b / a for a, b in zip(fast, slow, strict=True))
    return {
        "ratio": round(statistics.median(slow) / statistics.median(fast), 3),
        "p10": round(pairs[len(pairs) // 10], 3),
        "p90": round(pairs[-1 - len(pairs) // 10], 3),
    }


def keep_freed_memory() -> None:
    """glibc gives large blocks back to the system; taking them again would be most of what the peers do."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, 1 << 30)


def run_code(code: Code, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    segment_bytes = arguments.segment_kb << 10
    stripe = make_stripe(code, arguments.megabytes, segment_bytes)
    copied = [np.ones_like(shard) for shard in stripe.data]

    def memcpy() -> None:
        for target, source in zip(copied, stripe.data, strict=True):
            np.copyto(target, source)

    candidates: Candidates = {("memcpy", "copy"): memcpy, **ours(stripe)}
    missing = []
    for name, api in (("pyeclib", pyeclib_api), ("zfec", zfec_api)):
        try:
            candidates |= api(stripe, segment_bytes)
        except ImportError:
            missing.append(name)
    times = measure(candidates, arguments.turns, arguments.seed)
    split = {name: {"wall": [t[0] for t in rows], "cpu": [t[1] for t in rows]} for name, rows in times.items()}
    lines = []
    for (name, operation), spent in split.items():
        line: dict[str, Any] = {"benchmark": "erasure", "k": code.k, "m": code.m, "engine": name}
        line |= {"operation": operation, "data_mb": round(stripe.data_bytes / 1e6, 1), "turns": arguments.turns}
        line["gb_s"] = {of: round(stripe.data_bytes / statistics.median(spent[of]) / 1e9, 2) for of in spent}
        if name != "memcpy":
            line["over_memcpy"] = {of: ratio(spent[of], split["memcpy", "copy"][of]) for of in spent}
        if name == engine().name:
            line["goal"] = GOALS[operation]
            for peer in {"pyeclib", "zfec"} & {other for other, what in split if what == operation}:
                line[f"over_{peer}"] = {of: ratio(spent[of], split[peer, operation][of]) for of in spent}
        lines.append(line)
    return lines + [{"benchmark": "erasure", "k": code.k, "m": code.m, "not_installed": name} for name in missing]


def as_text(line: dict[str, Any]) -> str:
    code = f"({line['k']},{line['m']})"
    if "not_installed" in line:
        return f"{code:>7} {line['not_installed']}: not installed"
    text = f"{code:>7} {line['engine']:>8} {line['operation']:<14}"
    text += f"{line['gb_s']['wall']:7.2f} GB/s wall {line['gb_s']['cpu']:7.2f} GB/s CPU"
    for of, ratios in line.items():
        if of.startswith("over_"):
            text += (
                f"   {of.removeprefix('over_')} x {ratios['wall']['ratio']:.2f} wall {ratios['cpu']['ratio']:.2f} CPU"
            )
    if "goal" in line:
        text += f"   goal memcpy x {line['goal']}: {'met' if is_met(line) else 'missed'}"
    return text


def as_row(line: dict[str, Any]) -> list[object]:
    """The line in a table."""

    def over(name: str, of: str) -> str:
        found = line.get(f"over_{name}")
        return f"{found[of]['ratio']:g} ({found[of]['p10']:g}-{found[of]['p90']:g})" if found else ""

    goal = f">= {line['goal']}: {'met' if is_met(line) else 'missed'}" if "goal" in line else ""
    ratios = [over("memcpy", "wall"), over("memcpy", "cpu"), over("pyeclib", "wall"), over("zfec", "wall")]
    return [f"{line['k']}+{line['m']}", line["engine"], line["operation"], line["gb_s"]["wall"], *ratios, goal]


def is_met(line: dict[str, Any]) -> bool:
    """Whether the goal is: by CPU time, which other processes change least."""
    return bool(line["over_memcpy"]["cpu"]["ratio"] >= line["goal"])


def code_of(text: str) -> Code:
    k, _, m = text.partition(",")
    try:
        return Code(int(k), int(m))
    except HoldfastError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", nargs="+", type=code_of, default=[Code(2, 1), Code(4, 2), Code(6, 2), Code(8, 3)])
    parser.add_argument("--megabytes", type=int, default=192, help="data per stripe (192): beyond any cache")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--segment-kb", type=int, default=64, help="per shard and call, for the peers (64)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    parser.add_argument("--out", type=Path, help="write the JSON lines there")
    add_markdown(parser)
    arguments = parser.parse_args()
    keep_freed_memory()
    report = Report(arguments.markdown, "Erasure code against memcpy, pyeclib and zfec")
    lines = []
    for code in arguments.codes:
        for line in run_code(code, arguments):
            lines.append(line)
            report.line(line, print_as=None if arguments.json else as_text(line))
    if arguments.out:
        arguments.out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    columns = ["code", "engine", "operation", "GB/s", "/ memcpy wall", "/ memcpy CPU", "/ pyeclib", "/ zfec", "goal"]
    report.table(columns, [as_row(line) for line in lines if "engine" in line], NOTE)
    report.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
