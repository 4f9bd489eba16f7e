"""Pretends to train: managed.py STEPS SECONDS_PER_STEP [what=rank:incarnation:step ...]

what: exit (code 3), kill, stop, hang (compute phase without progress), config, orphan (leaves a child behind).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

from agent_client import Client

from holdfast.proto.lease import Phase


def fail(what: str, client: Client) -> None:
    if what == "exit":
        sys.exit(3)
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "orphan":
        subprocess.Popen(["sleep", "1000"])
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == "hang":
        threading.Event().wait()
    if what == "config":
        client.send({"config_error": "microbatches must be divisible [by=4]"})
        sys.exit(2)


def main() -> None:
    steps, seconds = int(sys.argv[1]), float(sys.argv[2])
    client = Client()
    print(f"up rank={client.rank} incarnation={client.incarnation} pid={os.getpid()}", flush=True)
    for step in range(1, steps + 1):
        client.renew(Phase.FORWARD)
        for order in sys.argv[3:]:
            what, _, where = order.partition("=")
            rank, incarnation, at = where.split(":")
            if int(rank) == client.rank and incarnation in ("*", str(client.incarnation)) and int(at) == step:
                fail(what, client)
        time.sleep(seconds)
        # With steps without end, they are the clock's: a job whose replacements go on where it is.
        client.commit(step if steps < 100_000 else int(time.monotonic() * 20))
    client.send({"done": True})
    print(
        f"done rank={client.rank} incarnation={client.incarnation} coordinator={client.coordinator} told={client.told}",
        flush=True,
    )


if __name__ == "__main__":
    main()
