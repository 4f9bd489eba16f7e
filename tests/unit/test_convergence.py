"""The convergence benchmark: its traces, its numbers, and that its simulator is the runtime and not a model of it."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "helpers")]

from convergence import measure, report, timing  # noqa: E402
from convergence.campaign import Campaign, Job, fingerprint, jobs, read  # noqa: E402
from convergence.methods import METHODS, Method  # noqa: E402
from convergence.settings import SPLIT, STAGES, TINY, trainer_arguments  # noqa: E402
from convergence.simulator import Checkpoint, Run, Simulator, block_of, units_of  # noqa: E402
from convergence.trace import RATES, Failure, Trace, draw, scripted_faults  # noqa: E402
from crew import Crew  # noqa: E402

from holdfast.proto.faults import parse_faults  # noqa: E402
from holdfast.runtime import Trainer  # noqa: E402
from holdfast.runtime.recovery.decide import Resume  # noqa: E402
from holdfast.runtime.recovery.ladder import Mode  # noqa: E402

# ---- traces ------------------------------------------------------------------------------------------------


def test_a_trace_depends_on_its_seed_alone() -> None:
    assert draw(1, 0.004, STAGES, 700) == draw(1, 0.004, STAGES, 700)
    assert draw(1, 0.004, STAGES, 700) != draw(2, 0.004, STAGES, 700)
    assert draw(1, 0.004, STAGES, 300) == tuple(f for f in draw(1, 0.004, STAGES, 700) if f.iteration <= 300)


def test_the_first_iterations_are_clean_and_no_neighbours_fail_together() -> None:
    failures = draw(5, 0.9, STAGES, 400)
    assert min(failure.iteration for failure in failures) == 51
    assert not [f for f in failures if Failure(f.iteration, f.stage + 1) in failures]
    together = [f for f in failures if Failure(f.iteration, f.stage + 2) in failures]
    assert together, "stages that are not adjacent may fail together"


def test_a_lower_rate_meets_failures_of_the_higher_one_only() -> None:
    rates = sorted(RATES.values())
    for seed in range(20):
        low, high = draw(seed, rates[0], STAGES, 700), draw(seed, rates[2], STAGES, 700)
        assert set(low) <= set(high)


def test_the_interior_suite_spares_the_ends_and_nothing_else() -> None:
    every, interior = draw(3, 0.02, STAGES, 700), draw(3, 0.02, STAGES, 700, interior=True)
    assert {failure.stage for failure in every} == set(range(STAGES))
    assert {failure.stage for failure in interior} == {1, 2, 3, 4}
    assert {f for f in every if 1 < f.stage < 4} <= set(interior)


def test_failures_are_as_many_as_their_rate_says() -> None:
    found = sum(len(draw(seed, 0.004, STAGES, 700)) for seed in range(60)) / 60
    assert 0.004 * STAGES * 650 * 0.93 < found < 0.004 * STAGES * 650 * 1.07


def test_scripted_faults_are_the_trace_up_to_an_iteration() -> None:
    text = scripted_faults((Failure(60, 2), Failure(70, 0), Failure(90, 5)), 80)
    assert [(fault.step, fault.rank, fault.at) for fault in parse_faults(text)] == [(60, 2, "user"), (70, 0, "user")]


# ---- numbers -----------------------------------------------------------------------------------------------


def test_the_time_model_is_the_papers_formula() -> None:
    assert timing.modelled_h(10_000, 0, 0.0) == pytest.approx(253.6, abs=0.1)
    assert timing.modelled_h(10_000, 0, timing.REDUNDANT_PAPER) == pytest.approx(419.5, abs=0.1)
    assert timing.modelled_h(0, 120, 0.5) == 1.0
    assert timing.measured_s(100, 3, 0.05, 0.2) == pytest.approx(5.6)


def test_replicas_of_the_papers_stage_cost_what_the_reference_computed() -> None:
    assert timing.overhead("stale", 50) == pytest.approx(0.017, abs=0.0005)
    assert timing.overhead("stale", 10) == pytest.approx(0.086, abs=0.0005)
    assert timing.overhead("average", 0) == 0.0
    assert timing.PAPER.stage_state_bytes == 805_306_368
    assert timing.PAPER.stale_share(50) < 0.02


def test_targets_are_reached_at_the_first_point_at_or_below() -> None:
    curve = [[25, 2.0], [50, 1.9], [75, 1.95], [100, 1.7]]
    assert [measure.first_at(curve, target) for target in (1.9, 1.8, 1.6)] == [50, 100, None]
    assert measure.failures_until([[60, 1], [75, 2], [90, 0]], 75) == 2
    assert measure.cell([1.23456, None, 2], 2) == "1.23 / - / 2.00"
    assert measure.mean([1.0, 3.0]) == 2.0
    assert measure.mean([1.0, None]) is None


def test_rollback_goes_back_to_the_last_multiple_and_meets_no_failure_twice() -> None:
    assert measure.rolled_back([8, 10], 5, 12) == [1, 2, 3, 4, 5, 6, 7, 6, 7, 6, 7, 8]


def test_plotted_values_lie_on_the_curve() -> None:
    curve = [[25, 2.0], [50, 1.0]]
    assert [measure.at_step(curve, step) for step in (10, 25, 30, 50, 60)] == [2.0, 2.0, 1.8, 1.0, 1.0]
    assert measure.tail([[1, 9.0], [2, 5.0], [3, 1.0], [4, 2.0], [5, 3.0], [6, 4.0]]) == 3.0
    assert measure.smoothed([1.0, 2.0, 3.0, 4.0], 2) == [1.0, 1.5, 2.5, 3.5]


# ---- the simulator -----------------------------------------------------------------------------------------


def test_the_simulator_without_failures_is_a_trainer_in_one_process_bit_for_bit() -> None:
    simulator = Simulator(TINY, seed=4)
    trainer = Trainer(**trainer_arguments(TINY, 4))
    for step in trainer.steps(until=6):
        simulator.train_step()
        assert simulator.report is not None
        assert step.run().loss == simulator.report.loss
    ours, theirs = simulator.capture().tensors, trainer.final_state()
    assert len(ours) == len(theirs) > 0
    for (name, state), tensor in ours.items():
        assert torch.equal(tensor, theirs[name if state == "weight" else f"{name}@{state}"]), (name, state)


@pytest.mark.parametrize("swapped", [False, True])
def test_every_other_microbatch_runs_the_ends_in_reverse_if_stages_are_swapped(
    swapped: bool,
) -> None:
    simulator = Simulator(TINY, 0, swapped=swapped)
    orders = [[unit for hop in path.hops for unit in hop.units] for path in simulator.plan.paths]
    assert orders[0] == list(range(STAGES + 2))
    assert orders[1] == ([0, 2, 1, 3, 4, 6, 5, 7] if swapped else orders[0])


def test_a_run_that_begins_at_a_state_of_the_unbroken_one_gives_the_same_bits() -> None:
    settings = replace(TINY, iterations=14)
    states: dict[int, Checkpoint] = {}

    def keep(simulator: Simulator, iteration: int) -> None:
        states[iteration] = simulator.capture()

    unbroken = Run(settings, 1, METHODS["none"], (), validate_every=4).all(keep)
    method, trace = METHODS["checkfree"], (Failure(10, 2),)
    whole = Run(settings, 1, method, trace, validate_every=4).all()
    part = Run(settings, 1, method, trace, start=states[8], prefix=unbroken, validate_every=4).all()
    assert (part.losses, part.validation, part.final) == (whole.losses, whole.validation, whole.final)
    assert whole.losses[:9] == unbroken.losses[:9]
    assert whole.losses[9] != unbroken.losses[9]


def test_an_executed_rollback_is_the_unbroken_run_replayed() -> None:
    settings = replace(TINY, iterations=16)
    unbroken = Run(settings, 2, METHODS["none"], (), validate_every=4).all()
    method = Method(name="r", title="r", kind="rollback", every=5)
    run = Run(settings, 2, method, (Failure(9, 1), Failure(9, 3), Failure(13, 0)), validate_every=4).all()
    line = {"validation": unbroken.validation, "losses": unbroken.losses, "final": unbroken.final}
    replayed = measure.replayed(line, [[9, 1], [9, 3], [13, 0]], 5, 16)
    assert run.steps == replayed["steps"]
    assert run.losses == replayed["losses"]


@pytest.mark.parametrize(
    ("method", "mode", "trace"),
    [
        ("checkfree", "neighbours", (Failure(4, 2), Failure(6, 4), Failure(6, 1))),
        ("checkfree+", "neighbours+", (Failure(4, 0), Failure(6, 1), Failure(7, 3), Failure(7, 5))),
    ],
)
def test_six_ranks_that_lose_stages_are_the_simulator_bit_for_bit(method: str, mode: Mode, trace: Trace) -> None:
    """Ranks are threads here; with processes and SIGKILL it is `holdfast bench convergence --real`."""
    settings = replace(TINY, iterations=9)
    crew = Crew(STAGES, mode, **trainer_arguments(settings, 5), stages=STAGES, split=SPLIT)
    for at in sorted({failure.iteration for failure in trace}):
        faults = [fault for fault in scripted_faults(trace, at).split(";") if f"step={at}," in fault]
        crew.train(settings.iterations, faults)
        assert isinstance(crew.recover(), Resume)
    crew.train(settings.iterations)
    run = Run(settings, 5, METHODS[method], trace)
    assert run.all().losses == [crew.losses[step] for step in range(1, 10)]
    ranks = crew.state()
    simulated = run.simulator.capture().tensors
    assert len(ranks) == len(simulated)
    for (name, state), tensor in simulated.items():
        assert torch.equal(tensor, ranks[f"{name}@{state}"]), (name, state)


def lost(method: str, stage: int, *, every: int = 4, steps: int = 6) -> tuple[Simulator, Checkpoint, Checkpoint]:
    """A simulator right after losing a stage; the states just before, and of step 4."""
    run = Run(TINY, 3, replace(METHODS[method], every=every), (Failure(steps + 1, stage),))
    states: dict[int, Checkpoint] = {}
    for iteration in range(1, steps + 1):
        run.fail(iteration)
        run.simulator.train_step()
        states[iteration] = run.simulator.capture()
        run._keep()
    run.fail(steps + 1)
    return run.simulator, states[steps], states[4]


def changed(simulator: Simulator, before: Checkpoint) -> set[int]:
    now = simulator.capture().tensors
    return {
        int(name.split(".")[0]) for (name, state), t in now.items() if not torch.equal(t, before.tensors[name, state])
    }


@pytest.mark.parametrize("stage", [0, 2, 5])
def test_a_stale_stage_alone_goes_back_with_its_moments(stage: int) -> None:
    simulator, before, older = lost("stale-50", stage)
    assert changed(simulator, before) == set(units_of(stage))
    now = simulator.capture()
    for (name, state), tensor in now.tensors.items():
        if int(name.split(".")[0]) in units_of(stage):
            assert torch.equal(tensor, older.tensors[name, state])


def test_a_replica_counts_only_once_it_can_have_landed() -> None:
    simulator, _, _ = lost("stale-50", 2, every=3)
    assert {float(s["step"]) for s in (simulator.state.optimizer.state[p] for p in simulator.state.by_unit[3])} == {3.0}


@pytest.mark.parametrize("stage", [0, 2, 5])
def test_checkfree_averages_by_gradient_norm_and_copies_at_the_ends(stage: int) -> None:
    simulator, before, _ = lost("checkfree", stage)
    block = block_of(stage)
    assert changed(simulator, before) == {block}
    name = "attn.wq.weight"
    if stage in (0, 5):
        expected = before.tensors[f"{2 if stage == 0 else 5}.{name}", "weight"]
    else:
        left, right = (before.norms[unit] + 1e-4 for unit in (block - 1, block + 1))
        sides = [before.tensors[f"{unit}.{name}", "weight"] for unit in (block - 1, block + 1)]
        expected = (left * sides[0] + right * sides[1]) / (left + right)
        assert not torch.equal(expected, sides[0])
    parameter = simulator.state.parameters[block, name]
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=0)
    assert parameter not in simulator.state.optimizer.state
    boosts = simulator.forward.boosts
    assert [unit for unit in range(STAGES + 2) if boosts.factor(unit) == 1.1] == [block]


def test_random_weights_are_no_neighbours_and_differ_between_losses() -> None:
    simulator, before, _ = lost("random", 2)
    again, _, _ = lost("random", 2, steps=7)
    weights = [s.state.parameters[3, "attn.wq.weight"].detach() for s in (simulator, again)]
    assert changed(simulator, before) == {3}
    assert not torch.equal(*weights)


# ---- the campaign ------------------------------------------------------------------------------------------


def test_a_run_that_is_in_the_file_is_not_run_again_and_a_cut_line_is_no_run(tmp_path: Path) -> None:
    path, settings = tmp_path / "runs.jsonl", replace(TINY, iterations=3)
    wanted = [Job("all", "0", "none", 0), Job("all", "16 %", "checkfree", 0)]
    Campaign(path, settings).run(wanted)
    first = path.read_text()
    assert [line["method"] for line in read(path, settings)] == ["none", "checkfree"]
    Campaign(path, settings).run(wanted)
    assert path.read_text() == first
    path.write_text(first + '{"kind": "run", "suite"')
    assert len(read(path, settings)) == 2
    assert read(path, replace(settings, dim=16)) == []
    assert fingerprint(settings) != fingerprint(replace(settings, dim=16))


def test_the_campaign_has_every_method_at_the_highest_rate_with_every_seed() -> None:
    wanted = jobs([0, 1, 2])
    assert len(set(wanted)) == len(wanted)
    for name, method in METHODS.items():
        label = "0" if method.kind == "none" else "16 %"
        assert {job.seed for job in wanted if (job.suite, job.label, job.method) == ("all", label, name)} == {0, 1, 2}


def test_the_report_has_a_row_for_what_was_run_and_names_what_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And without matplotlib it is tables alone, with one line that says why."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    settings = replace(TINY, iterations=50)
    wanted = [Job("all", "0", "none", 1), Job("all", "16 %", "stale-50", 1)]
    Campaign(tmp_path / "runs.jsonl", settings).run(wanted)
    assert report.write(tmp_path, settings)["plots"] == []
    assert "pip install matplotlib" in capsys.readouterr().err
    text = (tmp_path / "report.md").read_text()
    unbroken = read(tmp_path / "runs.jsonl", settings)[0]["final"]
    assert f"| no failure | {unbroken:.3f} | +0.000 | +0.000 |" in text
    assert "| stale stage k=50 | " in text
    assert "| CheckFree | " not in text
    assert "CheckFree (all, 16 %): 1" in text.partition("Not run yet")[2]
    assert "stale stage k=50 (all, 16 %)" not in text.partition("Not run yet")[2]
