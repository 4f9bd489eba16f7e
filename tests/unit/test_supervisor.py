"""What an agent does with an order that comes while its ranks are still being started."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from holdfast.launcher.detector import Limits
from holdfast.launcher.supervisor import Supervisor
from holdfast.proto.errors import ConfigError, HoldfastError, JobFailed
from holdfast.proto.gen import control_pb2 as pb


def starting() -> tuple[Supervisor, list[Any], list[Any]]:
    """A supervisor before its ranks are there, what it told the coordinator, and what it put off."""
    told: list[Any] = []
    later: list[Any] = []
    loop: Any = SimpleNamespace(post=lambda act: act(), later=lambda seconds, act: later.append((seconds, act)))
    session: Any = SimpleNamespace(failed=lambda reason, waits=False: told.append((reason, waits)))
    return Supervisor(loop, session, job="j", limits=Limits(), budget=3, host="here"), told, later


@pytest.mark.parametrize(("code", "kind"), [(1, JobFailed), (2, ConfigError)])
def test_a_stop_counts_although_no_rank_is_there_yet(code: int, kind: type[HoldfastError]) -> None:
    supervisor, _, _ = starting()
    supervisor.on_order(pb.AgentOrder(stop=pb.StopJob(exit_code=code, reason="host b: no folder")))
    stop = supervisor.view().stop
    assert type(stop) is kind
    assert "host b: no folder" in str(stop)


def test_other_orders_wait_for_the_ranks_and_come_in_their_order() -> None:
    supervisor, _, _ = starting()
    heard: list[str] = []
    supervisor.on_topology = heard.append
    for text in ("one", "two"):
        supervisor.on_order(pb.AgentOrder(topology=pb.Topology(json=text)))
    assert heard == []
    supervisor.attach({}, [], {}, 0)
    assert heard == ["one", "two"]
    supervisor.freeze()
    supervisor.on_order(pb.AgentOrder(topology=pb.Topology(json="after the end")))
    assert heard == ["one", "two"]


def test_a_host_that_refuses_ends_when_it_is_told_to_with_its_own_reason() -> None:
    supervisor, told, later = starting()
    supervisor.refuse("no folder")
    assert told == [("no folder", True)]
    assert supervisor.view().stop is None, "the others must know first"
    supervisor.on_order(pb.AgentOrder(stop=pb.StopJob(exit_code=1, reason="host here: no folder")))
    stop = supervisor.view().stop
    assert type(stop) is ConfigError
    assert str(stop) == "no folder"
    ((seconds, _),) = later
    assert seconds == 30.0
    alone, _, later = starting()
    alone.refuse("no folder")
    later[0][1]()
    assert type(alone.view().stop) is ConfigError, "nobody in charge was heard in time"
