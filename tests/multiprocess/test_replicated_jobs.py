"""Data-parallel jobs over hosts: parity of their state crosses no network, and makes up for lost hosts all the same."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "helpers")]

from host_losses import SCRIPT, compare, count, is_protected, options_of, steps_of  # noqa: E402
from hosts import Host, HostJob, Hosts, start_job, wait_for  # noqa: E402
from jobs import reference  # noqa: E402

from holdfast.proto import env  # noqa: E402

START_S, END_S = 90.0, 90.0
STEPS = 24
WIDTH = 300  # 6.5 MB of state: images of several blocks
ASK = """
import json, sys
from holdfast.ckpt.memory.protect.client import ProtectorClient
with ProtectorClient(sys.argv[1], job=sys.argv[2], token=sys.argv[3], role="admin") as client:
    print(json.dumps(client.status()))
"""

pytestmark = pytest.mark.skipif(Hosts.available() is not None, reason=f"no namespaces: {Hosts.available()}")


def status_of(host: Host) -> dict[str, Any]:
    """What the protector of a host says of itself; asked there, for its socket is not to be seen from elsewhere."""
    for pid in host.pids():
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            if "holdfast.ckpt.memory.protect" in words:
                values = dict(pair.partition("=")[::2] for pair in Path(f"/proc/{pid}/environ").read_text().split("\0"))
                name, job = words[words.index("--control") + 1], words[words.index("--job") + 1]
                status: dict[str, Any] = json.loads(host.run(host.python(ASK, name, job, values[env.TOKEN])))
                return status
    raise AssertionError(f"no protector on host {host.index}")


@pytest.fixture
def run() -> Iterator[Any]:
    """Starts a job and waits until its parity is complete; ends whatever is left of it."""
    opened: list[tuple[Hosts, HostJob]] = []

    def begin(
        code: str, size: int, *arguments: str, nproc: int = 1, protected: bool = True, more: tuple[str, ...] = ()
    ) -> HostJob:
        hosts = Hosts(size).__enter__()
        options = [*options_of(code, "spread"), *more]
        steps = ["--steps", str(STEPS), "--step-seconds", "0.2", "--width", str(WIDTH)]
        job = start_job(hosts, SCRIPT, [*steps, *arguments], options=options, nproc=nproc)
        opened.append((hosts, job))
        if protected:
            wait_for(lambda: is_protected(job) and steps_of(job) > 4, START_S, "parity")
        return job

    yield begin
    for hosts, job in opened:
        job.kill()
        hosts.close()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same job as one process that nothing happens to."""
    arguments = ["--steps", str(STEPS), "--width", str(WIDTH)]
    return reference(tmp_path_factory.mktemp("unbroken"), SCRIPT, *arguments)


@pytest.mark.parametrize(("code", "size", "nproc"), [("1+1", 2, 1), ("1+1", 2, 2), ("2+1", 3, 1)])
def test_replicated_state_is_protected_without_the_network_and_survives_a_host(
    run: Any, unbroken: Any, code: str, size: int, nproc: int
) -> None:
    """`nproc` stages a host, and a replica of the pipeline on each host."""
    job = run(code, size, "--replicas", str(size), "--stages", str(nproc), nproc=nproc)
    found = [status_of(host) for host in job.hosts]
    assert [status["mismatch"] for status in found] == [""] * size
    counters = [status["counters"] for status in found]
    for one in counters:
        assert one["delivered_rows"] > 0, counters
        moved = ("encoded_bytes", "pushed_bytes", "read_bytes", "written_bytes", "not_delivered", "replica_mismatches")
        assert {name: one[name] for name in moved} == dict.fromkeys(moved, 0), counters
    job.hosts[1].kill()
    ended = job.wait(END_S, only=set(range(size)) - {1})
    assert ended.code == 0, ended.err
    assert compare(ended, unbroken) == []
    assert count(job, "recovery") == 1
    assert count(job, "replica_mismatch") == 0


def test_moments_that_only_a_lost_host_had_are_decoded_from_parity(run: Any, unbroken: Any) -> None:
    """With ZeRO-1 no replica has them: parity is made of what the owners hold, and crosses the network."""
    job = run("1+1", 2, "--replicas", "2", "--stages", "1", more=("--zero", "1"))
    for one in [status_of(host)["counters"] for host in job.hosts]:
        assert one["encoded_bytes"] > 0, one
        assert one["delivered_rows"] == one["replica_mismatches"] == 0, one
    job.hosts[1].kill()
    ended = job.wait(END_S, only={0})
    assert ended.code == 0, ended.err
    assert compare(ended, unbroken) == []
    assert any("@exp_avg[" in name for name in ended.state_by_rank()), "nothing was sharded"
    (recovery,) = [event for event in job.events() if event["event"] == "recovery"]
    assert "parity" in recovery["sources"], recovery


def test_a_replica_that_goes_wrong_is_told_to_the_operator_and_what_it_trains_is_not_protected(run: Any) -> None:
    flip = 8
    job = run("1+1", 2, "--replicas", "2", "--stages", "1", "--flip", f"1:{flip}")
    wait_for(lambda: count(job, "replica_mismatch") > 0, END_S, "the difference")
    told = next(event for event in job.events() if event["event"] == "replica_mismatch")
    assert flip < told["step"] <= flip + 12, "not noticed for long"
    for words in ("slot", "first at block", "silent corruption"):
        assert words in told["reason"], told["reason"]
    seen = steps_of(job)
    wait_for(lambda: steps_of(job) >= min(seen + 4, STEPS - 2), END_S, "training goes on")
    assert min(status_of(host)["protected"] for host in job.hosts) <= flip
    ended = job.wait(END_S)
    assert ended.code == 0, ended.err
    assert "warning: replicas differ after step" in ended.err
