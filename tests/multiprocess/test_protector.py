"""Protectors as processes: what they bring back when hosts die, at any moment, and what they refuse.

Hosts are a real snapshot manager and a real protector each, on loopback; this process plays the ranks. What a
rebuilt half must hold follows from the seed. Nothing here sleeps: pages, lists and answers are waited for.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from holdfast.ckpt.memory.placement import decodable, lost_slots
from holdfast.ckpt.memory.protect.client import NO_DUTY, PARITY_SLOT, ProtectorClient
from holdfast.ckpt.memory.protect.net import MAGIC, NONCE_BYTES, PROOF_BYTES, Key, connect
from holdfast.ckpt.memory.protect.options import BLOCK_BYTES
from holdfast.proto.errors import ConfigError, HoldfastError, PeerLost, SnapshotError, SnapshotIncomplete

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from protected import DEADLINE_S, JOB, TOKEN, Cluster, Host, cluster, wait_for

CODES = [(1, 1), (2, 1), (3, 1), (4, 2), (6, 2)]


def sizes(count: int, seed: int = 0, most: int = 3_000_000) -> dict[int, int]:
    """Odd sizes, different for each slot."""
    rng = random.Random(seed)
    return {slot: rng.randrange(most // 3, most) | 1 for slot in range(count)}


def forget(made: Cluster, host: Host, slot: int) -> None:
    """Make a host not hold a slot (that is not its own) any more."""
    assert host.writer is not None
    for info in host.writer.list():
        if info.slot == slot:
            with host.writer.arena(slot, info.half, 1) as mapped:
                mapped.half.begin(0, bytes(32), 0, (), None)


def pretend_lost(made: Cluster, lost: Sequence[int], host: Host) -> None:
    """`host` is told of a world without the lost ones."""
    made.number += 1
    addresses = {other.number: other.address for other in made.live() if other.number not in lost}
    with host.client() as client:
        assert client.topology(made.number, host.number, addresses, made.placement)


def rebuild_all(made: Cluster, lost: Sequence[int], host: Host, step: int) -> list[str]:
    """Rebuild each slot of the lost hosts on `host`, and compare every byte; the sources."""
    found = []
    for slot, home in made.home.items():
        if home in lost:
            with host.client() as client:
                rebuilt = client.rebuild(slot, step, deadline_s=DEADLINE_S)
            made.check(host, slot, rebuilt.half, step)
            found.append(rebuilt.source)
    return found


# ---- what is lost comes back ----------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "m"), CODES)
def test_every_loss_of_up_to_m_hosts_is_rebuilt_bit_for_bit(k: int, m: int) -> None:
    with cluster(sizes(k + m, seed=k), k + m) as made:
        placement = made.place((k, m))
        made.tell(placement)
        made.write(7)
        made.wait_protected(7)
        for count in range(1, m + 1):
            for lost in itertools.combinations(range(k + m), count):
                host = made.hosts[next(i for i in range(k + m) if i not in lost)]
                pretend_lost(made, lost, host)
                assert set(rebuild_all(made, lost, host, 7)) == {"parity"}
                for slot in lost:
                    forget(made, host, slot)
        made.tell(placement)
        for host in made.hosts[:m]:
            host.kill()
        assert set(rebuild_all(made, range(m), made.hosts[m], 7)) == {"parity"}


@pytest.mark.parametrize(("k", "m"), [(2, 1), (4, 2)])
def test_one_loss_too_many_is_an_answer_that_names_what_is_missing(k: int, m: int) -> None:
    with cluster(sizes(k + m, most=300_000), k + m) as made:
        made.tell(made.place((k, m)))
        made.write(3)
        made.wait_protected(3)
        for host in made.hosts[: m + 1]:
            host.kill()
        survivor = made.hosts[m + 1]
        assert made.placement is not None
        lost = lost_slots(made.placement, range(m + 1))
        assert lost, "the test would prove nothing"
        began = time.monotonic()
        for slot in lost:
            with survivor.client() as client, pytest.raises(SnapshotIncomplete) as caught:
                client.rebuild(slot, 3, deadline_s=10.0)
            said = str(caught.value)
            assert f"needed={k}" in said
            assert "found=" in said
            assert "missing=" in said
            assert "silent=[" in said
        assert time.monotonic() - began < 10.0 * len(lost)
        with survivor.client() as client, pytest.raises(SnapshotIncomplete, match="there is no parity of that step"):
            client.rebuild(0, 99, deadline_s=10.0)


def test_a_replacement_knows_nothing_and_rebuilds_from_what_the_others_tell() -> None:
    with cluster(sizes(4), 4) as made:
        made.tell(made.place((2, 2)))
        made.write(1)
        made.wait_protected(1)
        made.hosts[2].kill()
        made.hosts[2].start()
        made.tell(None, hosts=[2])
        with made.hosts[2].client() as client:
            rebuilt = client.rebuild(2, 1, halves=[1])
            assert (rebuilt.half, rebuilt.source) == (1, "parity")
            assert client.rebuild(2, 1).source == "held"
        made.check(made.hosts[2], 2, 1, 1)


def test_a_living_holder_is_copied_and_parity_goes_on_where_the_copy_stopped() -> None:
    with cluster(sizes(3, most=9_000_000), 3) as made:
        made.tell(made.place((2, 1)))
        made.write(1)
        made.wait_protected(1)
        with made.hosts[0].client() as client:
            assert client.rebuild(1, 1).source == "copy"
        made.check(made.hosts[0], 1, 0, 1)
        forget(made, made.hosts[0], 1)
        # A byte of the holder's last block: the copy stops there, and only there.
        mapped = made.hosts[1].halves[1, 0]
        entry = mapped.half.read(1).entries[1]
        mapped.half.view(entry)[-1] ^= 4
        with made.hosts[0].client() as client:
            rebuilt = client.rebuild(1, 1)
        assert rebuilt.source == "parity"
        assert "host 1 slot 1" in rebuilt.shards
        made.check(made.hosts[0], 1, rebuilt.half, 1)


def test_state_whose_extra_differs_between_replicas_keeps_its_tail() -> None:
    made = Cluster(sizes(3), 3)
    made.replicated = True
    try:
        made.start()
        made.tell(made.place((2, 1)))
        made.write(2)
        made.wait_protected(2)
        made.hosts[0].kill()
        assert rebuild_all(made, [0], made.hosts[1], 2) == ["parity"]
    finally:
        made.close()


def test_slots_of_very_different_sizes_and_hosts_without_any() -> None:
    with cluster({0: 5, 1: 4_000_001, 2: 1, 3: 1_048_576}, 5) as made:
        placement = made.place((3, 1))
        made.tell(placement)
        made.write(1)
        made.wait_protected(1)
        for lost in range(4):
            host = made.hosts[4]
            pretend_lost(made, [lost], host)
            rebuild_all(made, [lost], host, 1)
            forget(made, host, lost)


def test_a_short_last_block_is_padded_with_zeros_and_not_with_the_block_before() -> None:
    with cluster({0: 12_000_001, 1: 5_300_003, 2: 8_100_001}, 3) as made:
        placement = made.place((2, 1))
        ends = {chunk.stop - chunk.start for stripe in placement.stripes for chunk in stripe.data}
        assert any(BLOCK_BYTES < end < placement.chunk and end % BLOCK_BYTES for end in ends), "proves nothing"
        made.tell(placement)
        made.write(1)
        made.wait_protected(1)
        for lost in range(3):
            host = made.hosts[(lost + 1) % 3]
            pretend_lost(made, [lost], host)
            assert rebuild_all(made, [lost], host, 1) == ["parity"]
            forget(made, host, lost)


# ---- killed at any moment -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_a_host_killed_while_a_step_is_encoded_costs_no_protected_step(seed: int) -> None:
    """Step 1 is protected, step 2 is under way when a host dies: whatever it left, step 1 comes back."""
    rng = random.Random(seed)
    with cluster(sizes(4, seed=seed, most=8_000_000), 4, seed=seed) as made:
        made.tell(made.place((3, 1)))
        made.write(1)
        made.wait_protected(1)
        for host in made.hosts:
            with host.client() as client:
                client.keep(1)
        made.write(2)
        threading.Event().wait(rng.random() * 0.15)
        lost = rng.randrange(4)
        made.hosts[lost].kill()
        survivor = made.hosts[(lost + 1) % 4]
        assert rebuild_all(made, [lost], survivor, 1) == ["parity"]


def test_an_encoder_killed_in_the_middle_is_replaced_and_the_step_is_protected_after_all() -> None:
    with cluster(sizes(3, most=8_000_000), 3) as made:
        made.tell(made.place((2, 1)))
        made.write(1)
        protector = made.hosts[0].protector
        assert protector is not None
        wait_for(lambda: made.hosts[0].states().get((PARITY_SLOT, 0), ("EMPTY",))[0] != "EMPTY", "it does not encode")
        protector.kill()
        protector.wait(DEADLINE_S)
        assert made.hosts[0].states()[PARITY_SLOT, 0][0] in ("FILLING", "COPIED", "SEALED")
        made.hosts[0].start_protector()
        made.tell(made.placement)
        made.wait_protected(1)
        made.hosts[1].kill()
        assert rebuild_all(made, [1], made.hosts[2], 1) == ["parity"]


def test_parity_outlives_the_protector_that_made_it() -> None:
    with cluster(sizes(3), 3) as made:
        placement = made.place((2, 1))
        made.tell(placement)
        made.write(1)
        made.wait_protected(1)
        for host in made.hosts:
            assert host.protector is not None
            host.protector.kill()
            host.protector.wait(DEADLINE_S)
            host.start_protector()
        # Nobody tells the new ones of the placement: it lies beside the parity.
        made.tell(None)
        made.hosts[0].kill()
        assert rebuild_all(made, [0], made.hosts[1], 1) == ["parity"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_source_that_dies_or_hangs_during_a_rebuild_is_replaced(how: signal.Signals) -> None:
    with cluster(sizes(4, most=24_000_000), 4) as made:
        made.tell(made.place((2, 2)))
        made.write(1)
        made.wait_protected(1)
        made.hosts[0].kill()
        rebuilt: list[str] = []
        failed: list[BaseException] = []

        def rebuild() -> None:
            try:
                rebuilt.extend(rebuild_all(made, [0], made.hosts[1], 1))
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=rebuild)
        thread.start()
        wait_for(lambda: any(slot == 0 for slot, _ in made.hosts[1].states()), "the rebuild does not begin")
        victim = made.hosts[2].protector
        assert victim is not None
        victim.send_signal(how)
        thread.join(DEADLINE_S)
        victim.send_signal(signal.SIGCONT)
        assert not thread.is_alive(), "it hangs"
        assert failed == []
        assert rebuilt == ["parity"]


def test_old_parity_serves_until_the_new_one_is_everywhere() -> None:
    """Re-protection under a new placement that never gets done, because one host is stopped."""
    with cluster(sizes(5), 5) as made:
        made.tell(made.place((2, 2)))
        made.write(1)
        made.wait_protected(1)
        old = made.placement
        assert old is not None
        for host in made.hosts:
            with host.client() as client:
                client.keep(1)
        stopped = made.hosts[4].protector
        assert stopped is not None
        stopped.send_signal(signal.SIGSTOP)
        new = made.place((3, 1))
        made.tell(new, hosts=[0, 1, 2, 3])
        made.write(2, slots=[0, 1, 2, 3])
        with contextlib.suppress(AssertionError):
            wait_for(lambda: made.hosts[1].status()["protected"] == 2, "it cannot be", deadline_s=1.0)
        assert not made.hosts[1].status()["everywhere"]
        made.hosts[0].kill()
        assert rebuild_all(made, [0], made.hosts[1], 1) == ["parity"]
        stopped.send_signal(signal.SIGCONT)


def test_after_a_loss_the_survivors_protect_again_and_stand_the_next_one() -> None:
    with cluster(sizes(5), 5) as made:
        made.tell(made.place((3, 2)))
        made.write(1)
        made.wait_protected(1)
        rebuilt_on = {0: 1, 1: 2, 2: 3}
        for lost, survivor in rebuilt_on.items():
            made.hosts[lost].kill()
            mine = [slot for slot, home in made.home.items() if home == lost]
            for slot in mine:
                with made.hosts[survivor].client() as client:
                    client.rebuild(slot, 1)
                made.home[slot] = survivor
            code = made.place("auto") if len(made.live()) < 4 else made.place((2, 2))
            made.tell(code)
            made.wait_protected(1)
        for slot in made.sizes:
            host = made.hosts[made.home[slot]]
            half = next(half for (s, half), state in host.states().items() if s == slot and state == ("SEALED", 1))
            made.check(host, slot, half, 1)


def test_ranks_that_never_pause_are_protected_when_they_do_and_nothing_torn_is_sealed() -> None:
    with cluster(sizes(3, most=4_000_000), 3) as made:
        made.tell(made.place((2, 1)))
        for step in range(1, 40):
            made.write(step)
        made.wait_protected(39)
        for step in range(40, 44):
            made.write(step)
            made.wait_protected(step)
        made.hosts[2].kill()
        assert rebuild_all(made, [2], made.hosts[0], 43) == ["parity"]


# ---- what is kept, what is shown ------------------------------------------------------------------------


def test_the_parity_of_the_kept_step_is_not_overwritten() -> None:
    with cluster(sizes(3, most=200_000), 3) as made:
        made.tell(made.place((2, 1)))
        made.write(1)
        made.wait_protected(1)
        for host in made.hosts:
            with host.client() as client:
                client.keep(1)
        for step in range(2, 6):
            made.write(step)
            made.wait_protected(step)
            for host in made.hosts:
                held = [at for (slot, _), (state, at) in host.states().items() if slot == PARITY_SLOT]
                assert 1 in held, held


def test_a_host_without_parity_does_not_hold_up_the_others() -> None:
    with cluster({0: 100_000, 1: 100_000}, 3) as made:
        placement = made.place((1, 1))
        made.tell(placement)
        made.write(4)
        made.wait_protected(4)
        for host in made.hosts:
            with host.client() as client, client.page() as page:
                idle = not placement.parity_on(host.number)
                assert page.read() == (placement.number, NO_DUTY if idle else 4)
        assert any(not placement.parity_on(host.number) for host in made.hosts) or len(placement.stripes) > 2


def test_the_page_forgets_when_its_protector_ends() -> None:
    with cluster(sizes(2, most=100_000), 2) as made:
        made.tell(made.place((1, 1)))
        made.write(1)
        made.wait_protected(1)
        with made.hosts[0].client() as client, client.page() as page:
            assert page.read() == (1, 1)
            client.bye()
            protector = made.hosts[0].protector
            assert protector is not None
            assert protector.wait(DEADLINE_S) == 0
            assert page.read() == (-1, -1)
        second = made.hosts[1]
        assert second.manager is not None
        assert second.protector is not None
        second.manager.kill()
        assert second.protector.wait(DEADLINE_S) == 0, "without a manager there is nothing to protect"


def test_status_says_what_is_protected_and_why_not() -> None:
    with cluster(sizes(3, most=100_000), 3) as made:
        small = made.place((2, 1))
        made.tell(small)
        made.write(6)
        made.wait_protected(6)
        wait_for(lambda: all(host.status()["tolerance"] == 1 for host in made.hosts), "tolerance 1")
        status = made.hosts[0].status()
        assert (status["protected"], status["newest"], status["lag"]) == (6, 6, 0)
        assert status["counters"]["encoded_bytes"] > 0
        made.hosts[2].kill()
        wait_for(lambda: made.hosts[0].status()["tolerance"] == 0, "one shard is missing")


def test_an_image_larger_than_planned_is_said_and_not_protected() -> None:
    with cluster(sizes(2, most=100_000), 2) as made:
        placement = made.place((1, 1))
        made.sizes = dict.fromkeys(made.sizes, 500_000)
        made.tell(placement)
        made.write(1)
        wait_for(lambda: "larger than was planned" in made.hosts[0].status()["error"], "no word of it")


def test_a_newer_topology_wins_and_the_same_one_changes_nothing() -> None:
    with cluster(sizes(2, most=100_000), 2) as made:
        placement = made.place((1, 1))
        made.tell(placement)
        made.write(1)
        made.wait_protected(1)
        addresses = {host.number: host.address for host in made.hosts}
        with made.hosts[0].client() as client:
            assert not client.topology(0, 0, {}, None)
            assert client.topology(made.number, 0, addresses, placement)
            assert client.status()["protected"] == 1
            assert client.reserve(placement) > 0


# ---- memory and descriptors -----------------------------------------------------------------------------


def test_parity_takes_what_was_planned_and_100_steps_leave_no_descriptor() -> None:
    with cluster(sizes(3, most=500_000), 3) as made:
        placement = made.place((2, 1))
        made.tell(placement)
        made.write(1)
        made.wait_protected(1)

        def descriptors() -> list[int]:
            pids = [process.pid for host in made.hosts for process in (host.protector, host.manager) if process]
            return [len(os.listdir(f"/proc/{pid}/fd")) for pid in pids]

        for step in range(2, 8):
            made.write(step)
            made.wait_protected(step)
        before = descriptors()
        for step in range(8, 108):
            made.write(step)
            made.wait_protected(step)
        wait_for(lambda: all(now <= then + 1 for now, then in zip(descriptors(), before, strict=True)), "they leak")
        for host in made.hosts:
            assert host.writer is not None
            planned = placement.parity_bytes(host.number)
            for info in host.writer.list():
                if info.slot == PARITY_SLOT:
                    assert planned <= info.nbytes <= planned + 400_000


# ---- strangers ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lone() -> Iterator[Cluster]:
    with cluster({0: 1000}, 1) as made:
        made.tell(None)
        yield made


def lives(made: Cluster) -> bool:
    """A peer with the key is still answered."""
    channel = connect(made.hosts[0].address, Key(JOB, TOKEN), patience_s=5.0)
    channel.send({"op": "inventory", "since": 0, "wait_ms": 0})
    answer, _ = channel.receive()
    channel.close()
    return answer["slots"] == []


def raw(made: Cluster) -> socket.socket:
    host, _, port = made.hosts[0].address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=10.0)


def ends(sock: socket.socket) -> bool:
    """The other side closes, without another word."""
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def test_a_peer_without_the_key_or_of_another_job_is_refused(lone: Cluster) -> None:
    for key in (Key(JOB, "other"), Key("other", TOKEN)):
        with pytest.raises(PeerLost, match="without the job key"):
            connect(lone.hosts[0].address, key, patience_s=5.0)
    assert lives(lone)


def test_a_proof_that_is_reflected_or_replayed_proves_nothing(lone: Cluster) -> None:
    with raw(lone) as first:
        nonce = os.urandom(NONCE_BYTES)
        first.sendall(MAGIC + nonce)
        answer = first.recv(NONCE_BYTES + PROOF_BYTES, socket.MSG_WAITALL)
        theirs, proof = answer[:NONCE_BYTES], answer[NONCE_BYTES:]
        first.sendall(proof)  # reflected
        assert ends(first)
    with raw(lone) as second:  # its own nonce and proof, to the server that made them
        second.sendall(MAGIC + theirs)
        second.recv(NONCE_BYTES + PROOF_BYTES, socket.MSG_WAITALL)
        second.sendall(proof)
        assert ends(second)
    right = Key(JOB, TOKEN).proof(b"client", theirs, nonce)
    with raw(lone) as third:  # what was right once
        third.sendall(MAGIC + nonce)
        third.recv(NONCE_BYTES + PROOF_BYTES, socket.MSG_WAITALL)
        third.sendall(right)
        assert ends(third)
    assert lives(lone)


@pytest.mark.parametrize("seed", range(8))
def test_garbage_ends_its_own_connection_only(lone: Cluster, seed: int) -> None:
    rng = random.Random(seed)
    with raw(lone) as sock:
        sock.sendall(rng.randbytes(4096))
        assert ends(sock)
    for frame in (
        struct.pack("!II", 1 << 31, 0),
        struct.pack("!II", 10, 1 << 30),
        struct.pack("!II", 4, 0) + b"nope",
        struct.pack("!II", 2, 0) + b"[]",
        struct.pack("!II", 2, 0) + b"{}",
        struct.pack("!II", 14, 0) + b'{"op":"read" }',
        struct.pack("!II", 13, 5) + b'{"op":"read"}12345',
        struct.pack("!II", 64, 0) + rng.randbytes(64),
    ):
        channel = connect(lone.hosts[0].address, Key(JOB, TOKEN), patience_s=5.0)
        channel.sock.sendall(frame)
        channel.sock.settimeout(10.0)
        assert ends(channel.sock)
        channel.close()
    assert lives(lone)


def test_a_slow_stranger_is_cut_off_by_the_deadline_of_the_hello(lone: Cluster) -> None:
    began = time.monotonic()
    with raw(lone) as silent, raw(lone) as drip:
        silent.settimeout(15.0)
        drip.settimeout(1.0)
        assert lives(lone), "others are not kept waiting"
        ended = False
        while not ended and time.monotonic() - began < 12.0:
            try:
                drip.sendall(b"H")
                ended = drip.recv(1) == b""
            except TimeoutError:
                continue
            except OSError:
                ended = True
        assert ended, "a byte a second is not a hello"
        assert ends(silent)
    assert time.monotonic() - began < 12.0


def test_the_control_socket_wants_the_token_the_job_and_a_role(lone: Cluster) -> None:
    name = lone.hosts[0].control
    for values in ({"token": "no"}, {"job": "no"}, {"role": "protector"}):
        with pytest.raises(ConfigError):
            ProtectorClient(name, **{"job": JOB, "token": TOKEN, "role": "agent", "timeout_s": 5.0, **values})
    with lone.hosts[0].client("rank") as rank:
        rank.keep(3)
        with pytest.raises(PeerLost):
            rank.bye()
    with lone.hosts[0].client("rank") as rank, pytest.raises(PeerLost):
        rank.topology(9, 0, {}, None)
    for request in ({"slot": -1}, {"halves": [2]}, {"deadline_s": 0}, {"step": "x"}, {"halves": []}):
        with lone.hosts[0].client() as client, pytest.raises(PeerLost):
            client._call("rebuild", **{"slot": 0, "step": 1, "halves": [0], "deadline_s": 1.0, **request})
    assert lone.hosts[0].status()["keep"] == 3


def test_too_little_memory_for_parity_is_an_answer_with_the_numbers(lone: Cluster) -> None:
    from holdfast.ckpt.memory.placement import HostInfo, Redundancy, SlotInfo, place

    infos = [SlotInfo(0, 0, 1 << 44), SlotInfo(1, 1, 1 << 44)]
    huge = place(infos, [HostInfo(0, "a"), HostInfo(1, "b")], Redundancy(1, 1), 1)
    with lone.hosts[0].client() as client, pytest.raises(SnapshotError, match=r"not enough memory.*needed_bytes"):
        client.reserve(huge, me=0)


def test_what_the_placement_says_can_be_decoded_is_what_is_rebuilt() -> None:
    """decodable(), which decides the resume step, and the protector agree, for every pair of lost hosts."""
    with cluster(sizes(4, most=200_000), 4) as made:
        made.tell(made.place((3, 1)))
        made.write(1)
        made.wait_protected(1)
        placement = made.placement
        assert placement is not None
        for lost in itertools.combinations(range(4), 2):
            host = made.hosts[next(i for i in range(4) if i not in lost)]
            data = {slot: frozenset({1} if home not in lost else ()) for slot, home in made.home.items()}
            parity = {
                (stripe.number, index): frozenset({1} if keeper not in lost else ())
                for stripe in placement.stripes
                for index, keeper in enumerate(stripe.parity)
            }
            can = decodable(placement, data, parity)
            pretend_lost(made, lost, host)
            for slot in [slot for slot, home in made.home.items() if home in lost]:
                try:
                    with host.client() as client:
                        client.rebuild(slot, 1, deadline_s=10.0)
                    came = True
                except HoldfastError:
                    came = False
                assert came == (1 in can.get(slot, frozenset())), (lost, slot)
                forget(made, host, slot)
