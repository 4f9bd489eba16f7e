"""ZeRO-1: where parameters are cut, that parts give the bits of the whole, what is refused, and failures."""

from __future__ import annotations

import math
import random
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from holdfast.ckpt.universal.chunks import chunk_bytes_for
from holdfast.ckpt.universal.read import Reader
from holdfast.proto.errors import ConfigError, PeerLost
from holdfast.proto.ids import NO_STEP
from holdfast.runtime.arenas import arena_entry
from holdfast.runtime.config import TrainerConfig
from holdfast.runtime.cut import GRAIN, cut_unit, grain_of
from holdfast.runtime.engine import Engine
from holdfast.runtime.pipeline.planner import grid_plan
from holdfast.runtime.prove import HOLDERS, SHAPES, prove
from holdfast.runtime.recovery.decide import Report, Resume, Source, decide_resume
from holdfast.runtime.recovery.rejoin import Session
from holdfast.runtime.state import ModelState, build_unit

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from models import save

CPU = torch.device("cpu")
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


# ---- where the cuts are -------------------------------------------------------------------------------------


@pytest.mark.parametrize("holders", [1, 2, 3, 7, 16])
def test_parts_cover_each_parameter_once_in_the_order_of_holders_at_multiples_of_the_grain(holders: int) -> None:
    rng = random.Random(holders)
    sizes = [0, 1, 63, 64, 65, *(rng.randrange(300_000) for _ in range(30))]
    for first in range(holders):
        for elements, parts in zip(sizes, cut_unit(sizes, holders, first), strict=True):
            assert [parts[0][0], *(stop for _, stop in parts)] == [*(start for start, _ in parts), elements]
            assert all(start <= stop for start, stop in parts)
            assert all(stop % grain_of(elements) == 0 or stop == elements for _, stop in parts)


@pytest.mark.parametrize("holders", [2, 3, 8])
def test_holders_of_a_layer_have_nearly_the_same_to_do(holders: int) -> None:
    sizes = [1024 * 1024, 1024, 4 * 1024 * 1024, 4096, 1024, 1024, 3 * 1024 * 1024 + 17]
    parts = cut_unit(sizes, holders)
    loads = [sum(each[holder][1] - each[holder][0] for each in parts) for holder in range(holders)]
    assert max(loads) - min(loads) <= max(grain_of(size) for size in sizes)
    firsts = [cut_unit([GRAIN], holders, unit)[0] for unit in range(holders)]
    assert len(set(firsts)) == holders, "a small parameter of each layer lies on another holder"


def test_large_parameters_are_cut_between_the_chunks_of_a_checkpoint() -> None:
    for elements in (65_536, 1_000_003, 50_000_000, 600_000_000):
        chunk = chunk_bytes_for(4 * elements)
        for parts in (cut_unit([elements], holders)[0] for holders in (2, 3, 8)):
            assert all(4 * stop % chunk == 0 or stop == elements for _, stop in parts)


def test_a_resumed_holder_reads_its_own_bytes_and_hardly_any_others(tmp_path: Path) -> None:
    """Chunks are read whole, to be verified: a cut inside of one would have both sides read it."""
    shapes = {"embed": (3000, 512), "up": (512, 1536), "down": (1536, 512), "bias": (1536,), "norm": (512,)}
    arrays = {(name, "exp_avg"): np.random.default_rng(1).random(shape, np.float32) for name, shape in shapes.items()}
    checkpoint = save(tmp_path / "saved", arrays)
    for holders in (2, 3, 4):
        cuts = cut_unit([array.size for array in arrays.values()], holders)
        for holder in range(holders):
            with Reader(checkpoint) as reader:
                for (name, state), parts in zip(arrays, cuts, strict=True):
                    start, stop = parts[holder]
                    found = np.frombuffer(reader.read(name, state, (start, stop)), np.float32)
                    assert np.array_equal(found, arrays[name, state].reshape(-1)[start:stop])
                assert reader.bytes_wanted < 1.1 * sum(array.nbytes for array in arrays.values()) / holders
                assert reader.bytes_read <= 1.05 * reader.bytes_wanted


def test_what_is_tried_is_cut_at_an_odd_multiple_of_the_grain_too() -> None:
    small = cut_unit([math.prod(SHAPES[1])], HOLDERS)[0]
    assert [stop // GRAIN % 2 for _, stop in small[:-1]] == [1, 0]
    assert math.prod(SHAPES[0]) > 2 * 32_768, "torch splits it over threads"


# ---- the same bits ------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """Odd sizes, a narrow type, a scalar, nothing, something frozen, and what does not lie in row-major order."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.randn(67, 131))
        self.bias = nn.Parameter(torch.randn(67))
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.narrow = nn.Parameter(torch.randn(33, 7).bfloat16())
        self.none = nn.Parameter(torch.empty(0, 3))
        self.turned = nn.Parameter(torch.randn(19, 23).t())
        self.frozen = nn.Parameter(torch.randn(5), requires_grad=False)


def by_shape(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Groups that only whole parameters tell apart."""
    matrices, vectors = ([p for p in parameters if (p.dim() > 1) == wide] for wide in (True, False))
    return torch.optim.AdamW([{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "lr": 1e-3}], lr=1e-2)


OPTIMIZERS: dict[str, Make] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "foreach amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True, foreach=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, initial_accumulator_value=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, centered=True),
    "by shape": by_shape,
}


class Wire:
    """What ranks in threads have for a group."""

    def __init__(self) -> None:
        self.sent: dict[tuple[int, int, int], SimpleQueue[torch.Tensor]] = {}
        self.lock = threading.Lock()

    def queue(self, *key: int) -> SimpleQueue[torch.Tensor]:
        with self.lock:
            return self.sent.setdefault(key, SimpleQueue())  # type: ignore[arg-type]


class Joined:
    """One rank's end of it."""

    def __init__(self, wire: Wire, rank: int) -> None:
        self.wire, self.rank = wire, rank

    def isend(self, tensor: torch.Tensor, dst: int, tag: int) -> Any:
        self.wire.queue(self.rank, dst, tag).put(tensor.clone())

    def irecv(self, tensor: torch.Tensor, src: int, tag: int) -> Any:
        return tensor, self.wire.queue(src, self.rank, tag)

    def wait(self, work: Any) -> None:
        if work is not None:
            received = work[1].get(timeout=20)
            assert received.numel() == work[0].numel()
            work[0].copy_(received)


def make_state(make: Make, holders: int = 1, rank: int = 0, scheduler: Any = None) -> ModelState:
    state = ModelState({unit: build_unit(Scaled, unit, 0, CPU) for unit in (0, 1, 2)}, make, scheduler, {})
    if holders > 1:
        state.shard(grid_plan(units=3, stages=1, replicas=holders, microbatches=holders), rank, proven=False)
    return state


def train(holders: list[ModelState], steps: int, seed: int) -> None:
    """Some steps of all holders; in one of them some parameters get no gradient."""
    wire = Wire()

    def work(rank: int, state: ModelState) -> None:
        generator = torch.Generator().manual_seed(seed)
        for step in range(steps):
            drawn: Any = {k: torch.randn(p.shape, generator=generator).to(p.dtype) for k, p in state.parameters.items()}
            if step == 1:
                drawn[1, "bias"] = drawn[2, "wide"] = None
            state.apply_gradients(drawn)
            if state.shards is not None:
                state.shards.gather(Joined(wire, rank))  # type: ignore[arg-type]

    threads = [threading.Thread(target=work, args=(rank, state)) for rank, state in enumerate(holders)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def together(holders: list[ModelState]) -> dict[tuple[str, str], torch.Tensor]:
    """Every tensor whole: parts in their places, and what all hold the same on all."""
    found: dict[tuple[str, str], torch.Tensor] = {}
    covered: dict[tuple[str, str], int] = {}
    for state in holders:
        for entry in state.entries():
            key, piece = (entry.name, entry.state), arena_entry(entry)
            if entry.whole is None:
                assert torch.equal(found.setdefault(key, entry.tensor), entry.tensor), key
                continue
            whole = found.setdefault(key, torch.zeros(entry.whole, dtype=entry.tensor.dtype))
            whole.view(-1)[piece.start : piece.stop] = entry.tensor
            covered[key] = covered.get(key, 0) + entry.tensor.numel()
    assert all(found[key].numel() == count for key, count in covered.items()), "each element is kept once"
    return found


def assert_same(one: dict[Any, torch.Tensor], other: dict[Any, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key]) or one[key].shape != other[key].shape] == []


@pytest.mark.parametrize("holders", [2, 3, 5])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_holders_that_update_parts_have_the_bits_of_one_that_updates_all(optimizer: str, holders: int) -> None:
    alone = make_state(OPTIMIZERS[optimizer])
    states = [make_state(OPTIMIZERS[optimizer], holders, rank) for rank in range(holders)]
    train([alone], 5, seed=1)
    train(states, 5, seed=1)
    assert_same(together(states), together([alone]))
    if optimizer == "adamw":
        kept = [sum(e.tensor.numel() for e in state.entries() if e.state == "exp_avg") for state in states]
        total = sum(p.numel() for p in alone.parameters.values())
        whole = 3 * 19 * 23  # what is not cut is kept by all
        assert sum(kept) == total + (holders - 1) * whole
        assert max(kept) - whole <= (total - whole) / holders * 1.1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_replacement_that_loads_what_a_holder_kept_trains_on_with_the_same_bits(optimizer: str) -> None:
    def scheduler(o: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(o, lambda step: step / 4)  # nothing moves in the first step

    def begun() -> list[ModelState]:
        states = [make_state(OPTIMIZERS[optimizer], 2, rank, scheduler) for rank in (0, 1)]
        train(states, 3, seed=1)
        return states

    unbroken, (survivor, lost) = begun(), begun()
    kept = {(e.name, e.state): e.tensor.clone() for e in lost.entries()}
    future = {(e.name, e.state): arena_entry(e) for e in lost.future_entries()}
    now = {(e.name, e.state): arena_entry(e) for e in lost.entries()}
    assert future.items() <= now.items(), "the memory that is reserved is what will be needed"
    replacement = make_state(OPTIMIZERS[optimizer], 2, 1, scheduler)
    replacement.load(kept, lost.metadata())
    train(unbroken, 3, seed=2)
    train([survivor, replacement], 3, seed=2)
    assert_same(together([survivor, replacement]), together(unbroken))
    assert replacement.metadata() == unbroken[1].metadata()


# ---- what is refused ----------------------------------------------------------------------------------------


class Lamb(torch.optim.Optimizer):
    """Steps as long as the parameter."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data -= group["lr"] * p.grad * p.data.norm() / (p.grad.norm() + 1e-6)


class Own(torch.optim.SGD):
    """Updates what it was made with, whatever its groups say."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr)
        self.own = [p for group in self.param_groups for p in group["params"]]

    def step(self, closure: Any = None) -> None:
        for p in self.own:
            if p.grad is not None:
                p.data -= self.param_groups[0]["lr"] * p.grad


class Needy(torch.optim.SGD):
    """An optimizer like any other, whose constructor wants what no group tells."""

    def __init__(self, params: Any, secret: object) -> None:
        super().__init__(params, lr=0.1)
        self.secret = secret

    def step(self, closure: Any = None) -> None:
        assert self.secret is not None
        super().step()


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: Lamb(p, 0.1), "gives other numbers on a part of a parameter"),
        (lambda p: torch.optim.Adafactor(p), "cannot be tried on parts of parameters"),
        (lambda p: torch.optim.Muon(p[:1]), "cannot be tried on parts of parameters"),
        (lambda p: Own(p, 0.1), "gives other numbers on a part of a parameter"),
        (lambda p: torch.optim.LBFGS(p), "cannot be tried on parts of parameters"),
    ],
    ids=["LAMB", "Adafactor", "Muon", "own list", "LBFGS"],
)
def test_an_optimizer_that_looks_at_more_than_an_element_is_refused_with_a_line(make: Make, says: str) -> None:
    optimizer = make(parameters())
    drawn = torch.get_rng_state()
    with pytest.raises(ConfigError, match=says) as error:
        prove(optimizer)
    assert "\n" not in str(error.value)
    assert type(optimizer).__qualname__ in str(error.value)
    assert torch.equal(drawn, torch.get_rng_state())


def test_what_is_tried_says_which_states_are_cut_and_a_rate_that_begins_at_zero_hides_nothing() -> None:
    assert prove(torch.optim.AdamW(parameters())) == {"exp_avg", "exp_avg_sq"}
    assert prove(torch.optim.AdamW(parameters(), amsgrad=True), again=True) == {
        "exp_avg",
        "exp_avg_sq",
        "max_exp_avg_sq",
    }
    assert prove(torch.optim.SGD(parameters(), lr=0.1)) == frozenset()
    assert prove(torch.optim.SGD(parameters(), lr=0.1, momentum=0.9), again=True) == {"momentum_buffer"}
    assert prove(torch.optim.Adagrad(parameters())) == {"sum"}
    assert prove(Needy(parameters(), object())) == frozenset()
    for optimizer in (Lamb(parameters(), 0.1), torch.optim.SGD(parameters(), lr=0.1)):
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step))
        assert optimizer.param_groups[0]["lr"] == 0
        if isinstance(optimizer, Lamb):
            with pytest.raises(ConfigError):
                prove(optimizer)
        else:
            prove(optimizer)


@pytest.mark.parametrize(("script", "option", "chosen"), [(None, "", 0), (1, "", 1), (None, "1", 1), (0, "0", 0)])
def test_the_script_and_the_command_may_both_choose(script: int | None, option: str, chosen: int) -> None:
    assert config(zero=script).with_zero(option, "exact").zero == chosen


def test_a_script_and_a_command_that_disagree_are_refused() -> None:
    for script, option in ((1, "0"), (0, "1")):
        with pytest.raises(ConfigError, match=f"the script says zero={script} and the command --zero {option}"):
            config(zero=script).with_zero(option, "exact")


@pytest.mark.parametrize("mode", ["neighbours", "neighbours+", "stale", "auto"])
def test_moments_that_only_a_lost_rank_had_are_refused_where_recovery_would_need_anothers(mode: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"--recovery {mode} does not go with ZeRO-1")):
        config(zero=1).with_zero("", mode)
    assert config().with_zero("", mode).zero == 0
    with pytest.raises(ConfigError, match="zero is 0 or 1"):
        config(zero=2)


# ---- what a failure leaves ----------------------------------------------------------------------------------


def config(**more: Any) -> TrainerConfig:
    data = [(torch.randn(3), torch.randn(3)) for _ in range(8)]
    sgd = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.1), "loss": nn.functional.mse_loss, "data": data}
    return TrainerConfig(layers=[lambda: nn.Linear(3, 3)], microbatch_size=2, microbatches=2, **{**sgd, **more})


class Broken:
    """A holder was lost before its part was here."""

    def part(self, key: Any, gradient: Any) -> Any:
        return gradient

    def region(self, name: str, state: str) -> None:
        return None

    def gather(self, group: Any, between: Any) -> None:
        raise PeerLost("a holder is gone")


def test_a_rank_whose_weights_are_of_two_steps_has_no_live_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDFAST_SNAPSHOTS", "off")
    session = Session.from_environment()
    engine = Engine(config(), session)
    session.rejoin(engine, 2, PeerLost("start"))
    engine.train_step()
    assert engine.live_step == 1
    engine.state.shards = Broken()  # type: ignore[assignment]
    with pytest.raises(PeerLost):
        engine.train_step()
    assert engine.live_step == NO_STEP


def test_a_rank_that_keeps_parts_has_no_peer_that_could_stand_in_for_it() -> None:
    plan = grid_plan(units=3, stages=1, replicas=2, microbatches=2)
    for holders, peers in ((1, (0, 1)), (2, (0,))):
        state = make_state(OPTIMIZERS["adamw"], holders)
        rank: Any = SimpleNamespace(config=config(), state=state, plan=plan, rank=0)
        assert Engine.peers(rank) == peers


def test_who_has_lost_moments_gets_them_from_the_snapshot_and_never_from_a_replica() -> None:
    """With ZeRO-1 a rank names itself alone as its peer; torn ranks (no live step) go back with it."""
    held = {rank: frozenset({6, 7}) for rank in range(4)}
    live = [7, -1, 7, -1]
    decision = decide_resume([Report(rank, live[rank], (rank,), held) for rank in range(4)])
    assert decision == Resume(7, sources={r: Source("snapshot" if live[r] < 0 else "live") for r in range(4)})
    torn = [8, -1, -1, -1]  # one has all parts of step 8, the others have some
    decision = decide_resume([Report(rank, torn[rank], (rank,), held) for rank in range(4)])
    assert decision == Resume(7, sources={r: Source("snapshot") for r in range(4)})
