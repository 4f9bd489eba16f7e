"""The options that `holdfast run` adds to torchrun's."""

from __future__ import annotations

import argparse

from . import recovering, saving


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add them, in groups of their own."""
    add = parser.add_argument_group("holdfast").add_argument
    add("--standbys", type=int, default=1, metavar="N", help="warm standby processes per host (default 1)")
    add("--preload", default="", metavar="MODULE[,...]", help="modules that standbys import in advance")
    add("--job-id", default="", metavar="ID", help="name of the job (default: random)")
    add(
        "--coordinator-bind",
        default="",
        metavar="HOST:PORT",
        help="default: a free port of 127.0.0.1; with several hosts, of the address that reaches the rendezvous",
    )
    add(
        "--events",
        default="",
        metavar="FILE",
        help="event record; 'none' for none (default: in the run's folder)",
    )
    add(
        "--lease-min",
        type=float,
        default=2.0,
        metavar="S",
        help="shortest silence taken for a hang (default 2)",
    )
    add("--lease-start", type=float, default=600.0, metavar="S", help="longest start of a rank (default 600)")
    add(
        "--lease-user",
        type=float,
        default=300.0,
        metavar="S",
        help="longest user code between steps (default 300)",
    )
    add(
        "--stop-grace",
        type=float,
        default=0.5,
        metavar="S",
        help="stopped (SIGSTOP) so long: replaced (default 0.5)",
    )
    add(
        "--faults",
        default="",
        metavar="SPEC",
        help="scripted faults: rank=2,step=5,at=backward:3,kind=kill;...",
    )
    add("--snapshots", choices=("on", "off"), default="on", help="snapshots in memory (default on)")
    add("--zero", choices=("0", "1"), default="", help="1: shard the optimizer's state over replicas (ZeRO-1)")
    recovering.add_options(parser)
    saving.add_options(parser)
    _add_hosts(parser)


def _add_hosts(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("holdfast, several hosts").add_argument
    add(
        "--redundancy",
        default="auto",
        metavar="CODE",
        help="how lost hosts are made up for: rs:K+M (any M of K+M), xor, mirror, none, auto (default; by host count)",
    )
    add(
        "--failure-domain",
        default="",
        metavar="LABEL|FILE",
        help="what this host fails together with, such as rack=r12; or a file of lines 'HOSTNAME LABEL'",
    )
    add(
        "--lost-host",
        choices=("spread", "wait"),
        default="spread",
        help="without a spare the ranks of a lost host go to the other hosts (default), or wait for a host to come",
    )
    add("--host-wait", type=float, default=600.0, metavar="S", help="longest such wait (default 600)")
    add(
        "--host-lease",
        type=float,
        default=6.0,
        metavar="S",
        help="silence after which a host that is perhaps only cut off is given up (default 6)",
    )
    add("--spare", action="store_true", help="be a host without ranks until another one is lost")
    add(
        "--join",
        default="",
        metavar="HOST:PORT",
        help="coordinator of a running job (holdfast status shows it) whose rendezvous is gone; needs HOLDFAST_TOKEN",
    )
