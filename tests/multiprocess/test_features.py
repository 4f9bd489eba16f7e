"""Every feature of the trainer under kills: the job ends with the bits of one process that nothing happened to.

    reference: one process, no agent ──┐
    job: other layout, scripted kills ─┴─▶ parameters, buffers, optimizer state, losses, norms: all equal

So each test shows two things at once: that the layout does not show, and that the failures do not.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "helpers"), str(ROOT / "benchmarks")]

import jobs  # noqa: E402
from ranks import Rank, run_ranks  # noqa: E402

FEATURES = ROOT / "tests" / "helpers" / "scripts" / "features.py"
PRETRAIN = ROOT / "examples" / "pretrain.py"


def assert_equal(run: jobs.Ended, reference: jobs.Ended) -> None:
    found, expected = run.state(), reference.state()
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different, f"{len(different)} of {len(expected)} differ: {different[:4]}"


def assert_survived(run: jobs.Ended, faults: list[str]) -> None:
    """Ended well; each fault fired once, and nobody else was replaced."""
    assert run.code == 0, run.err
    hit = Counter(int(fault.partition(",")[0].removeprefix("rank=")) for fault in faults)
    assert run.started() == {rank: 1 + hit[rank] for rank in run.started()}, run.err


def check(folder: Path, ranks: int, case: str, faults: list[str], *layout: str, steps: int = 12) -> jobs.Ended:
    """The case in one process and as a job with faults: same state, and rank 0 is told the same of each step."""
    common = (case, "--steps", str(steps))
    reference = jobs.reference(folder / "reference", FEATURES, *common)
    out = folder / "job"
    run = jobs.job(out, ranks, FEATURES, *common, "--out", str(out / "out"), *layout, faults=faults)
    assert_survived(run, faults)
    assert_equal(run, reference)
    if all("rank=0" not in fault for fault in faults):
        assert run.told() == reference.told()
    return run


def test_tuples_buffers_dropout_streams_and_user_state_survive_kills_in_every_stage(tmp_path: Path) -> None:
    faults = [
        "rank=2,step=3,at=backward:1,kind=kill",
        "rank=0,step=5,at=forward:3,kind=kill",
        "rank=1,step=7,at=optimizer,kind=kill",
        "rank=2,step=9,at=applied,kind=kill",
        "rank=1,step=11,at=forward:5,kind=kill",
    ]
    check(tmp_path, 3, "odd", faults)


def test_epochs_augmentation_counted_losses_clipping_and_validation_are_the_same_over_replicas(tmp_path: Path) -> None:
    faults = [
        "rank=1,step=2,at=exchange,kind=kill",
        "rank=3,step=4,at=applied,kind=kill",
        "rank=2,step=8,at=user,kind=kill",
        "rank=1,step=9,at=snapshot,kind=kill",
    ]
    check(tmp_path, 4, "epochs", faults, "--stages", "2")


def test_batch_statistics_and_user_objects_of_each_replica_come_back_as_its_own(tmp_path: Path) -> None:
    """They see only their replica's microbatches, so the other replica's memory is no source for them."""
    faults = [
        "rank=1,step=3,at=applied,kind=kill",
        "rank=0,step=5,at=backward:1,kind=kill",
        "rank=0,step=7,at=snapshot,kind=kill",
    ]
    found = []
    for name, given in (("unbroken", []), ("broken", faults)):
        out = ("--out", str(tmp_path / name / "out"))
        run = jobs.job(tmp_path / name, 2, FEATURES, "odd", "--steps", "8", "--stages", "1", *out, faults=given)
        assert_survived(run, given)
        found.append(run.state_by_rank())
    unbroken, broken = found
    key = "{} 4.norm.running_mean"
    own = [unbroken[key.format(f"rank-{rank}.safetensors")] for rank in (0, 1)]
    assert not torch.equal(*own), "else this shows nothing"
    assert broken.keys() == unbroken.keys()
    assert [name for name in unbroken if not torch.equal(broken[name], unbroken[name])] == []


def test_half_precision_with_a_dynamic_loss_scale_skips_the_same_steps_after_kills(tmp_path: Path) -> None:
    faults = ["rank=1,step=2,at=commit,kind=kill", "rank=1,step=5,at=backward:2,kind=kill"]
    run = check(tmp_path, 2, "half", faults, "--schedule", "gpipe")
    assert any(step["skipped"] for step in run.told())
    assert not all(step["skipped"] for step in run.told())


def test_tied_bf16_checkpointed_interleaved_chunks_end_as_one_process_does(tmp_path: Path) -> None:
    arguments = [
        "--preset",
        "tiny",
        "--steps",
        "10",
        "--microbatches",
        "4",
        "--microbatch-size",
        "2",
        "--context",
        "16",
    ]
    arguments += ["--tied", "--bf16", "--checkpoint-activations", "--validate-every", "4"]
    reference = jobs.reference(tmp_path / "reference", PRETRAIN, *arguments)
    faults = ["rank=0,step=3,at=backward:1,kind=kill", "rank=1,step=6,at=optimizer,kind=kill"]
    folder = tmp_path / "job"
    out = ("--out", str(folder / "out"), "--interleave", "2")
    run = jobs.job(folder, 2, PRETRAIN, *arguments, *out, faults=faults)
    assert_survived(run, faults)
    assert_equal(run, reference)


def test_swapped_stages_and_their_shadows_end_as_one_process_in_the_same_order_does(tmp_path: Path) -> None:
    """Tied edges, dropout, clipping, a buffer, a parameter without gradient; kills of workers and of shadows.

    Ended.state() compares what several ranks hold: here the edges' weights, moments and buffer.
    """
    faults = [
        "rank=1,step=2,at=backward:1,kind=kill",
        "rank=3,step=4,at=applied,kind=kill",
    ]
    run = check(tmp_path, 4, "swapped", faults, steps=6)
    held = run.state_by_rank()
    for rank, name in ((0, "0.weight"), (1, "0.weight@exp_avg_sq"), (2, "6.words@exp_avg"), (3, "6.seen")):
        assert f"rank-{rank}.safetensors {name}" in held
    assert run.state()["6.seen"] == 6 * 6
    assert not torch.equal(run.state()["0.weight@exp_avg"], torch.zeros(16, 8))


def test_kills_at_the_edges_and_of_many_ranks_at_once(tmp_path: Path) -> None:
    """First step, between steps, two, three and four ranks at once, and the last step after its update."""
    faults = ["rank=0,step=1,at=forward:0,kind=kill"]
    faults += [f"rank={rank},step=3,at=user,kind=kill" for rank in (1, 2)]
    faults += [f"rank={rank},step=5,at=applied,kind=kill" for rank in (0, 2, 3)]
    faults += [f"rank={rank},step=8,at=optimizer,kind=kill" for rank in range(4)]
    faults += ["rank=3,step=12,at=applied,kind=kill"]
    check(tmp_path, 4, "plain", faults)


def test_a_rank_that_dies_after_the_last_step_is_replaced_and_ends_with_the_same_state(tmp_path: Path) -> None:
    reference = jobs.reference(tmp_path / "reference", FEATURES, "plain", "--steps", "4")
    folder = tmp_path / "job"
    arguments = ("plain", "--steps", "4", "--out", str(folder / "out"), "--die-after-the-loop", "1")
    run = jobs.job(folder, 2, FEATURES, *arguments)
    assert run.code == 0, run.err
    assert run.started() == {0: 1, 1: 2}
    assert_equal(run, reference)


# ---- large messages in flight ---------------------------------------------------------------------------


def test_multi_megabyte_activations_in_flight_to_and_from_a_dying_rank_do_not_hold_anybody(tmp_path: Path) -> None:
    faults = [
        "rank=0,step=2,at=forward:1,kind=kill",  # its send of microbatch 0 is under way
        "rank=1,step=3,at=forward:0,kind=stop",  # microbatch 1 is being sent to it
        "rank=1,step=4,at=backward:1,kind=kill",  # the gradient of microbatch 0 is under way
    ]
    check(tmp_path, 2, "large", faults, "--stages", "2", steps=5)


def stopped_in_the_middle(rank: Rank) -> dict[str, Any]:
    """Rank 1 stops itself while 0 sends to it and it sends to 2. They are ordered out, then all build anew."""
    from holdfast.proto.errors import Fenced

    group = rank.group(1)
    rank.store.set(f"pid/{rank.rank}", str(os.getpid()))
    stopped = int(rank.store.get("pid/1"))
    tensor = torch.zeros(32 << 20)  # 128 MB: no buffer takes that
    freed_s, why = 0.0, ""
    if rank.rank == 1:
        other = torch.ones(32 << 20)
        pending = [group.irecv(tensor, 0, 7), group.isend(other, 2, 7)]
        os.kill(os.getpid(), signal.SIGSTOP)
        group.abort(Fenced(2, "I was stopped"))
        group.close(pending, tensor, other)
    else:
        ordered: list[float] = []

        def order() -> None:
            while Path(f"/proc/{stopped}/stat").read_text().rpartition(")")[2].split()[0] != "T":
                time.sleep(0.001)
            ordered.append(time.monotonic())
            group.abort(Fenced(2, "rank 1 is stopped"))

        work = group.isend(tensor, 1, 7) if rank.rank == 0 else group.irecv(tensor, 1, 7)
        threading.Thread(target=order, daemon=True).start()
        try:
            group.wait(work)
        except Fenced as fenced:
            why = fenced.reason
        group.close(work, tensor)
        freed_s = time.monotonic() - ordered[0]
        rank.store.set(f"free/{rank.rank}", "yes")
    if rank.rank == 0:
        rank.store.wait(["free/2"])
        os.kill(stopped, signal.SIGCONT)
    again = rank.group(2)
    return {"why": why, "freed_s": freed_s, "gathered": [int(t) for t in again.allgather(torch.tensor([rank.rank]))]}


def test_survivors_leave_a_half_sent_message_within_a_second_and_build_the_next_group() -> None:
    results = run_ranks(f"{Path(__file__).resolve()}:stopped_in_the_middle", 3)
    for rank in (0, 2):
        assert results[rank]["why"] == "rank 1 is stopped"
        assert results[rank]["freed_s"] < 1.0
    assert [result["gathered"] for result in results] == [[0, 1, 2]] * 3
