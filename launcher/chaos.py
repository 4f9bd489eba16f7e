"""`holdfast chaos`: runs a job and injects seeded faults into it while it trains; each must prove that it fired.

    seed ──▶ plan_faults() ──▶ at each time: order through the coordinator ──▶ agent ──▶ the rank
    the rank's process must be replaced (the fault fired) and a step committed after it (it was survived)

The plan is a pure function of the seed, so a run replays: same times, ranks and kinds. Faults inside a rank
(hang, loop, raise, segv, exit) fire at its next microbatch boundary; kill and stop are signals from outside.
For faults at an exact point of a step use `holdfast run --faults`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc

from holdfast.proto.channel import CHANNEL
from holdfast.proto.errors import ConfigError
from holdfast.proto.faults import FaultKind
from holdfast.proto.gen import control_pb2 as pb
from holdfast.proto.gen import control_pb2_grpc

from . import registry

POLL_S = 0.02
FIRE_DEADLINE_S = 90.0
EXAMPLES = """examples:
  holdfast chaos --every 5s -- holdfast run --nproc-per-node 4 train.py
  holdfast chaos --seed 7 --every 2s --kinds kill,stop,hang --count 20 -- holdfast run --nproc-per-node 4 train.py
  holdfast chaos --json report.json --every 10s -- holdfast run --nproc-per-node 8 -m my.training
"""


@dataclass(frozen=True, slots=True)
class PlannedFault:
    """One fault: `wait_s` after the one before was survived (or after training began)."""

    wait_s: float
    rank: int
    kind: str


@dataclass(slots=True)
class Outcome:
    """What became of a planned fault."""

    fault: PlannedFault
    fired: bool = False
    survived: bool = False
    step: int = -1
    lost_s: float = 0.0
    """From the order to the first step committed after it."""


def plan_faults(seed: int, *, every_s: float, kinds: Sequence[str], world_size: int, count: int) -> list[PlannedFault]:
    """Faults for a seed: uniformly chosen ranks and kinds, intervals between half and one and a half `every_s`."""
    chance = random.Random(seed)
    return [
        PlannedFault(round(every_s * chance.uniform(0.5, 1.5), 3), chance.randrange(world_size), chance.choice(kinds))
        for _ in range(count)
    ]


def parse_seconds(text: str) -> float:
    """'5s', '500ms', '2m' or plain seconds. Raises argparse.ArgumentTypeError."""
    for suffix, factor in (("ms", 1e-3), ("s", 1.0), ("m", 60.0)):
        if text.endswith(suffix):
            text, scale = text.removesuffix(suffix), factor
            break
    else:
        scale = 1.0
    try:
        value = float(text) * scale
    except ValueError:
        value = -1.0
    if value <= 0:
        raise argparse.ArgumentTypeError("a time such as 5s, 500ms or 2m")
    return value


def parse_kinds(text: str) -> tuple[str, ...]:
    """Comma-separated fault kinds. Raises argparse.ArgumentTypeError naming the unknown one."""
    kinds = tuple(kind.strip() for kind in text.split(",") if kind.strip())
    known = [member.lower() for member in FaultKind.__members__]
    for kind in kinds:
        if kind not in known:
            raise argparse.ArgumentTypeError(f"no fault kind {kind!r}; one of {', '.join(known)}")
    return kinds or ("kill",)


class Job:
    """The job under test, seen through its coordinator (whichever process that is now)."""

    def __init__(self, name: str, process: subprocess.Popen[bytes]) -> None:
        self._name = name
        self._process = process
        self._address = ""
        self._channel: grpc.Channel | None = None

    def running(self) -> bool:
        """Whether the command has not ended."""
        return self._process.poll() is None

    def pause(self, seconds: float) -> bool:
        """Wait that long or until the command ends; whether it still runs."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return True
        return False

    def call(self, method: str, request: Any) -> Any:
        """One unary call, or None while no coordinator answers."""
        try:
            entry = registry.find(self._name)
            if entry.coordinator != self._address or self._channel is None:
                self._channel = grpc.insecure_channel(entry.coordinator, options=CHANNEL)
                self._address = entry.coordinator
            stub = control_pb2_grpc.ControlStub(self._channel)
            return getattr(stub, method)(request, metadata=[("holdfast-token", entry.token)], timeout=2.0)
        except (ConfigError, grpc.RpcError):
            return None

    def status(self) -> dict[str, Any] | None:
        """The coordinator's state, or None."""
        reply = self.call("Status", pb.StatusRequest())
        if reply is None:
            return None
        status: dict[str, Any] = json.loads(reply.json)
        return status

    def await_status(self, accept: Any, deadline_s: float) -> dict[str, Any] | None:
        """First status that `accept` likes; None at the deadline or when the command ends."""
        until = time.monotonic() + deadline_s
        while time.monotonic() < until:
            status = self.status()
            if status is not None and accept(status):
                return status
            if not self.pause(POLL_S):
                return None
        return None


def inject(job: Job, number: int, fault: PlannedFault) -> Outcome:
    """Order one fault; wait until its rank was replaced and a step was committed after that."""
    outcome = Outcome(fault)
    before = job.await_status(lambda s: s["state"] == "running", FIRE_DEADLINE_S)
    if before is None:
        return outcome
    outcome.step = before["step"]
    incarnation = before["ranks"][fault.rank]["incarnation"]
    started = time.monotonic()
    request = pb.InjectRequest(rank=fault.rank, kind=fault.kind, id=str(number))
    reply = job.call("Inject", request)
    if reply is None or not reply.accepted:
        return outcome

    def replaced(status: dict[str, Any]) -> bool:
        return bool(status["ranks"][fault.rank]["incarnation"] > incarnation)

    outcome.fired = job.await_status(replaced, FIRE_DEADLINE_S) is not None

    def recovered(status: dict[str, Any]) -> bool:
        return bool(status["state"] == "running" and status["recoveries"] > before["recoveries"])

    outcome.survived = outcome.fired and job.await_status(recovered, FIRE_DEADLINE_S) is not None
    outcome.lost_s = round(time.monotonic() - started, 3)
    return outcome


def run(arguments: argparse.Namespace, command: list[str]) -> int:
    """Start the command, inject, report. Returns the exit code."""
    name = f"chaos-{arguments.seed}-{os.getpid()}"
    process = subprocess.Popen(with_job_id(command, name))
    job = Job(name, process)
    outcomes: list[Outcome] = []
    try:
        status = job.await_status(lambda s: s["state"] == "running" and s["step"] >= 1, arguments.start_deadline)
        if status is not None:
            plan = plan_faults(
                arguments.seed,
                every_s=arguments.every,
                kinds=arguments.kinds,
                world_size=status["world_size"],
                count=arguments.count,
            )
            for number, fault in enumerate(plan):
                if not job.pause(fault.wait_s):
                    break
                outcome = inject(job, number, fault)
                if outcome.fired:
                    outcomes.append(outcome)
                    say(number, outcome)
                elif job.running():
                    outcomes.append(outcome)
                    say(number, outcome)
                    break
        code = process.wait()
    except KeyboardInterrupt:
        process.wait()
        code = 130
    fired, survived = sum(o.fired for o in outcomes), sum(o.survived for o in outcomes)
    print(
        f"[chaos] seed {arguments.seed}: {fired} faults fired, {survived} survived, exit code of the job: {code}",
        file=sys.stderr,
    )
    if arguments.json:
        report = {"seed": arguments.seed, "exit_code": code, "faults": [asdict(o) for o in outcomes]}
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")
    return code if code or all(o.fired for o in outcomes) else 3


def say(number: int, outcome: Outcome) -> None:
    """One line per fault."""
    fault = outcome.fault
    became = (
        f"survived, next step after {outcome.lost_s * 1e3:.0f} ms"
        if outcome.survived
        else "fired; the job ended first"
        if outcome.fired
        else "DID NOT FIRE"
    )
    print(
        f"[chaos] fault {number}: {fault.kind} rank {fault.rank} at step {outcome.step}: {became}",
        file=sys.stderr,
        flush=True,
    )


def with_job_id(command: list[str], name: str) -> list[str]:
    """`command` with --job-id after its `run`. Raises ConfigError when it is no `holdfast run`."""
    for index, word in enumerate(command):
        if word == "run" and index:
            return [*command[: index + 1], "--job-id", name, *command[index + 1 :]]
        if word == "holdfast.launcher.run":
            return [*command[: index + 1], "--job-id", name, *command[index + 1 :]]
    raise ConfigError("the command after -- must be `holdfast run ...`")


def main(argv: list[str]) -> int:
    """Entry point of `holdfast chaos`."""
    parser = argparse.ArgumentParser(
        prog="holdfast chaos",
        description="Run a job and inject seeded faults into it while it trains.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--seed", type=int, default=0, help="decides times, ranks and kinds (0)")
    parser.add_argument("--every", type=parse_seconds, default=5.0, help="mean time between faults (5s)")
    parser.add_argument(
        "--kinds",
        type=parse_kinds,
        default=("kill",),
        help="comma-separated: kill,stop,exit,raise,segv,hang,loop",
    )
    parser.add_argument("--count", type=int, default=1000, help="at most so many faults (1000)")
    parser.add_argument("--start-deadline", type=parse_seconds, default=600.0, help="for the first step (10m)")
    parser.add_argument("--json", help="write what became of every fault there")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- holdfast run ...")
    arguments = parser.parse_args(argv)
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    try:
        if not command:
            raise ConfigError("no command given: holdfast chaos [options] -- holdfast run ...")
        return run(arguments, command)
    except ConfigError as error:
        print(f"holdfast: error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
