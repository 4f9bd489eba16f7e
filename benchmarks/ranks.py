"""Ranks as plain processes over loopback, for benchmarks and oracle tests that need no agent.

    run_ranks("module:function", world_size, arguments) ──▶ [result of rank 0, ...]

Each rank is a fresh interpreter with one intra-op thread; it gets a `Rank` (its number, a store, our Group of
a generation, a default torch process group) and returns a JSON value. No recovery and no Holdfast launcher.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

DEADLINE_S = 600.0


class Rank:
    """One process of a run."""

    def __init__(self, rank: int, world_size: int, port: int) -> None:
        import torch.distributed as dist

        self.rank = rank
        self.world_size = world_size
        self.store = dist.TCPStore("127.0.0.1", port, world_size, rank == 0, use_libuv=False)
        # A client of its own for waiting: one client serialises, and a get that waits would hold up every set. Made
        # once: a TCPStore looks the peer's name up at each connection, which may take seconds.
        self._reader = self.store.clone()
        self._backend: Any = None

    def torch_group(self) -> Any:
        """The default torch process group, on gloo."""
        import torch.distributed as dist

        if not dist.is_initialized():
            dist.init_process_group("gloo", store=self.store, rank=self.rank, world_size=self.world_size)
        return dist.group.WORLD

    def group(self, generation: int = 1) -> Any:
        """Our Group of one generation, its addresses exchanged through the store instead of a coordinator."""
        from holdfast.runtime.comm.group import GlooBackend, Group

        if self._backend is None:
            self._backend = GlooBackend("127.0.0.1")
        prefix = f"generation-{generation}/"

        def publish(key: str, value: bytes) -> None:
            self.store.set(prefix + key, value)
            threading.Thread(target=collect, daemon=True).start()

        def collect() -> None:
            keys = [f"0/{rank}" for rank in range(self.world_size)]
            group.deliver({key: self._reader.get(prefix + key) for key in keys})

        group = Group(
            generation=generation,
            rank=self.rank,
            world_size=self.world_size,
            backend=self._backend,
            publish=publish,
            exclude_ports=frozenset({self.store.port}),
        )
        group.build()
        return group


def run_ranks(target: str, world_size: int, arguments: dict[str, Any] | None = None) -> list[Any]:
    """Run `target` ("path/to/file.py:function" or "module:function") in `world_size` processes.

    Raises RuntimeError with the first failing rank's error output.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
        processes = []
        for rank in range(world_size):
            request = json.dumps([target, rank, world_size, port, arguments or {}, f"{folder}/{rank}.json"])
            with open(f"{folder}/{rank}.err", "wb") as errors:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, str(Path(__file__).resolve()), request],
                        env=environment,
                        stderr=errors,
                    )
                )
        try:
            codes = [process.wait(DEADLINE_S) for process in processes]
        finally:
            for process in processes:
                process.kill()
        if any(codes):
            first = next(rank for rank, code in enumerate(codes) if code)
            raise RuntimeError(f"rank {first} of {target}: {Path(folder, f'{first}.err').read_text()[-4000:]}")
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world_size)]


def _main() -> None:
    target, rank, world_size, port, arguments, out = json.loads(sys.argv[1])
    module_name, _, function_name = target.rpartition(":")
    if module_name.endswith(".py"):
        path = Path(module_name).resolve()
        sys.path[:0] = [str(path.parent), str(Path(__file__).resolve().parent.parent / "examples")]
        module_name = path.stem
    module = importlib.import_module(module_name)
    result = getattr(module, function_name)(Rank(rank, world_size, port), **arguments)
    Path(out).write_text(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # gloo's destructors would take a second; nothing is left to write


if __name__ == "__main__":
    _main()
