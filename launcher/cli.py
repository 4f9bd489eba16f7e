"""The `holdfast` command: finds the subcommand and calls it. Imports nothing heavy before it knows which.

    holdfast run | status | chaos | bench | version

A subcommand is a module with `main(argv) -> int`; one that is not installed is said so in a line. Exit code 2
means that nothing was done.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final

from holdfast.proto.channel import CHANNEL
from holdfast.proto.errors import ConfigError

COMMANDS: Final = {
    "run": ("holdfast.launcher.run", "run a training script; torchrun's arguments, and ours"),
    "status": ("", "what a running job does now"),
    "chaos": ("holdfast.launcher.chaos", "hurt a running job on purpose"),
    "bench": ("holdfast.launcher.bench", "measure recovery and overhead"),
    "ckpt": ("holdfast.ckpt.cli", "look at, verify, convert, merge checkpoints of any framework"),
    "version": ("", "print the version"),
}

EXAMPLES: Final = """\
examples:
  holdfast run --nproc-per-node 4 train.py --config llama.toml
  holdfast status
  holdfast chaos --every 30s --kinds kill,hang -- holdfast run --nproc-per-node 4 train.py
  holdfast bench recovery
  holdfast run --help
"""


def usage() -> str:
    """The text of `holdfast --help`."""
    lines = "\n".join(f"  {name:<9} {text}" for name, (_, text) in COMMANDS.items())
    about = "Fault-tolerant pipeline-parallel training."
    return f"usage: holdfast COMMAND ...\n\n{about}\n\ncommands:\n{lines}\n\n{EXAMPLES}"


def status(argv: Sequence[str]) -> int:
    """`holdfast status`: ask the job's coordinator."""
    parser = argparse.ArgumentParser(prog="holdfast status", description="What a running job does now.")
    parser.add_argument("--job", help="which job; needed if several run")
    parser.add_argument("--json", action="store_true", help="all there is, for programs")
    arguments = parser.parse_args(list(argv))

    from . import registry

    job = registry.find(arguments.job)
    import grpc

    from holdfast.proto.gen import control_pb2 as pb
    from holdfast.proto.gen import control_pb2_grpc

    with grpc.insecure_channel(job.coordinator, options=CHANNEL) as channel:
        stub = control_pb2_grpc.ControlStub(channel)
        try:
            reply = stub.Status(pb.StatusRequest(), metadata=[("holdfast-token", job.token)], timeout=5.0)
        except grpc.RpcError as error:
            raise ConfigError(f"the coordinator of {job.job} does not answer: {error.details()}") from None
    if arguments.json:
        print(reply.json)
        return 0
    print("\n".join(describe(job.job, job.events, json.loads(reply.json))))
    return 0


def describe(job: str, events: str, state: dict[str, Any]) -> list[str]:
    """A status reply for people: what the job does, then one line per rank."""
    step = "no step yet" if state["step"] < 0 else f"step {state['step']}"
    loss = f", loss {state['loss']:.4f}" if math.isfinite(state["loss"]) else ""
    lines = [
        f"{job}: {state['state']}, {step}{loss}; generation {state['generation']}, {state['recoveries']} recoveries",
        f"events: {events or 'none'}",
        *_describe_exactness(state.get("exactness", {})),
        *_describe_hosts(state),
        f"{'rank':>4}  {'pid':>8}  {'process':>7}  {'host':<20}  does",
    ]
    for row in state["ranks"]:
        does = (
            "finished"
            if row["finished"]
            else "being replaced"
            if not row["alive"]
            else "starts"
            if not row["connected"]
            else "joined, waits for others"
            if row["joined"]
            else "trains"
            if state["state"] == "running"
            else "is joining"
        )
        lines.append(f"{row['rank']:>4}  {row['pid']:>8}  {row['incarnation']:>7}  {row['host']:<20}  {does}")
    return lines


def _describe_exactness(found: dict[str, Any]) -> list[str]:
    """That the run is no longer what an unbroken one would be."""
    if not found.get("inexact_since"):
        return []
    last = f"; last: {found['last']}" if found["last"] else ""
    return [f"NOT exact since step {found['inexact_since']} ({found['inexact_recoveries']} such recoveries{last})"]


def _describe_hosts(state: dict[str, Any]) -> list[str]:
    """What a job of several hosts can lose, and which hosts it has."""
    hosts = state.get("hosts", [])
    if len(hosts) < 2:
        return []
    lines = []
    redundancy = state.get("redundancy")
    if redundancy is None:
        lines.append("redundancy: none; the loss of a host ends the job unless replicas hold its state")
    else:
        step = redundancy["protected_step"]
        protected = f"step {step} protected" if step >= 0 else "parity is being computed"
        left = Counter(redundancy["stripes"].values())
        stripes = ", ".join(f"{count} stripes {tolerated}" for tolerated, count in sorted(left.items()))
        tolerated = redundancy["losses_tolerated"]
        lines.append(
            f"redundancy: {redundancy['code']}, {protected}; {tolerated} more hosts may be lost now ({stripes})"
        )
        lines += [f"warning: {warning}" for warning in redundancy["warnings"]]
    for host in hosts:
        ranks = ", ".join(map(str, host["ranks"])) or "none (spare)"
        does = f"lost: {host['lost']}" if host["lost"] else f"ranks {ranks}" if host["connected"] else "silent"
        lines.append(f"host {host['host']}  {host['name']:<16} {host['address']:<15} {host['domain']:<12} {does}")
    if state.get("waiting"):
        lines.append(f"ranks {', '.join(map(str, state['waiting']))} wait for a host")
    return lines


def version(argv: Sequence[str]) -> int:
    """`holdfast version`."""
    del argv
    import importlib.metadata

    try:
        print(f"holdfast {importlib.metadata.version('holdfast')}")
    except importlib.metadata.PackageNotFoundError:
        print("holdfast (not installed)")
    return 0


def _find(command: str) -> Callable[[Sequence[str]], int]:
    if command == "status":
        return status
    if command == "version":
        return version
    if command not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"no command {command!r}{hint} (see holdfast --help)")
    name = COMMANDS[command][0]
    try:
        found: Callable[[Sequence[str]], int] = importlib.import_module(name).main
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise
        raise ConfigError(f"`holdfast {command}` is not part of this installation") from None
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `holdfast` command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0 if arguments else 2
    try:
        return _find("version" if arguments[0] == "--version" else arguments[0])(arguments[1:])
    except ConfigError as error:
        print(f"holdfast: error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
