"""Ranks as plain processes over loopback, for benchmarks and oracle tests that need no agent.

    run_ranks("module:function", world_size, arguments) ──▶ [result of rank 0, ...]

Ranks are forks of one process that has imported torch and the target, with one intra-op thread each. A rank gets a
`Rank` (its number, a store, our Group of a generation, a default torch process group) and returns a JSON value. No
recovery and no Holdfast launcher.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any, NoReturn

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
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        request = json.dumps([target, world_size, port, arguments or {}, folder])
        mother = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), request],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"},
            start_new_session=True,
        )
        try:
            failed = mother.wait(DEADLINE_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(mother.pid, signal.SIGKILL)
            mother.wait()
        if failed:
            named = f"rank {failed - 1}" if failed <= world_size else "the process that forks the ranks"
            errors = Path(folder, f"{failed - 1}.err")
            told = errors.read_text()[-4000:] if errors.exists() else ""
            raise RuntimeError(f"{named} of {target} failed: {told}")
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world_size)]


def _main() -> int:
    """Import what ranks need, fork them, wait. Exit code: 0, or 1 + the first rank that failed; it ends the others."""
    target, world_size, port, arguments, folder = json.loads(sys.argv[1])
    module_name, _, function_name = target.rpartition(":")
    if module_name.endswith(".py"):
        path = Path(module_name).resolve()
        sys.path[:0] = [str(path.parent), str(Path(__file__).resolve().parent.parent / "examples")]
        module_name = path.stem
    function = getattr(importlib.import_module(module_name), function_name)
    importlib.import_module("torch._dynamo")  # else each rank does so at its first optimizer step
    gc.freeze()  # never looked through again, so that the pages stay shared
    ranks: dict[int, int] = {}
    for rank in range(world_size):
        pid = os.fork()
        if not pid:
            os.dup2(os.open(f"{folder}/{rank}.err", os.O_WRONLY | os.O_CREAT), 2)
            _be(rank, world_size, port, function, arguments, Path(folder, f"{rank}.json"))
        ranks[pid] = rank
    while ranks:
        pid, status = os.wait()
        rank = ranks.pop(pid)
        if status:
            for other in ranks:
                os.kill(other, signal.SIGKILL)
            return 1 + rank
    return 0


def _be(rank: int, world_size: int, port: int, function: Any, arguments: dict[str, Any], out: Path) -> NoReturn:
    code = 1
    try:
        out.write_text(json.dumps(function(Rank(rank, world_size, port), **arguments)))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)  # gloo's destructors would take a second; nothing is left to write


if __name__ == "__main__":
    sys.exit(_main())
