"""One rank's training step, from microbatches to committed state; and validation. No recovery in here.

    forward/backward ▸ gradient exchange ▸ snapshot fence ▸ gather (norms, losses, flags: the barrier)
    ▸ optimizer ▸ snapshot of the new state begins, and overlaps the next forward/backward

Until the optimizer runs nothing of the state has changed, so an error before it costs only the step. The
gather tells every rank that every rank has final gradients, and which snapshot everybody has wholly copied:
only then may the half of an older one be overwritten.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from holdfast.proto.errors import ConfigError, Fenced, PeerLost
from holdfast.proto.ids import NO_STEP
from holdfast.proto.lease import Phase
from holdfast.proto.plan import Plan

from . import rng
from .config import TrainerConfig
from .data import make_source
from .device import choose_device, numerics_identity
from .finish import finish
from .gather import KEPT, NO_GRADIENT, Gathered, Kept
from .layout import Layout
from .pipeline.exchange import exchange, exchange_ties, plan_exchanges
from .pipeline.executor import LOSS, Executor, Numerics, Outcome
from .pipeline.schedule import make_schedule
from .pipeline.shadow import Shadows
from .recovery.boost import Boosts
from .recovery.disk import Checkpoints
from .recovery.forward import Forward, Gradients
from .scaler import LossScaler
from .snapshot import Snapshots
from .state import ModelState, build_unit, check_layers, equalise_ties, find_ties, kind_of
from .undo import Undo
from .validation import Validation

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from .comm.group import Group
    from .recovery.rejoin import Session


@dataclass(frozen=True, slots=True)
class StepReport:
    """Result of a committed step, equal on all ranks."""

    step: int
    loss: float
    tokens: int
    grad_norm: float
    lr: float
    skipped: bool
    snapshot_step: int


class Engine:
    """Model, data, plan and executor of one rank. Lives as long as the process; `attach` per generation."""

    def __init__(self, config: TrainerConfig, session: Session) -> None:
        identity = session.identity
        self.config = config = config.with_zero(identity.zero, identity.recovery)
        self.rank = identity.rank
        self.step = 0
        self.born = 0  # generation that committed the state in memory
        self.report: StepReport | None = None
        self.kept = Kept()
        self._session = session
        self._lease = session.lease
        self.device = choose_device(config.device, identity.local_rank)
        session.use_backend(self.device.backend(identity.address))
        self.injector = session.injector
        layers = check_layers(config.layers)
        self.layout = Layout.of(config, layers, identity.world_size, identity.recovery)
        self.plan = self.layout.training()
        hosted = self.plan.hosted(self.rank)
        device = self.device.device
        modules = {unit: build_unit(layers[unit], unit, config.seed, device) for unit in hosted}
        self.ties = find_ties(layers, modules)
        equalise_ties(self.ties, layers, modules, config.seed, device)
        self.scaler = LossScaler(config.loss_scale)
        self.state = ModelState(modules, config.optimizer, config.scheduler, config.state)
        if config.zero:
            self.state.shard(self.plan, self.rank, proven=identity.incarnation > 0)
        boosts = Boosts(self.state.optimizer, self.state.by_unit, config.neighbours, lambda: self.step)
        self.forward = Forward(identity.recovery, boosts, clipped=config.neighbours.clip == "after")
        self.numerics = Numerics(config.seed, config.exact, config.autocast, config.checkpoint_activations)
        self.compute = numerics_identity(config.autocast, device)
        self.deterministic_start = all(not isinstance(layer, torch.nn.Module) for layer in layers)
        self.source = make_source(
            config.data,
            microbatch_size=config.microbatch_size,
            microbatches=config.step_microbatches,
            seed=config.seed,
            shuffle=config.shuffle,
        )
        self._exchanges = plan_exchanges(self.plan, exact=config.exact)
        self._worked = self.state.keys(self.plan.worked(self.rank))
        self._shadows = Shadows(self.plan, self.rank, self.state)
        # Errors of a replacement are no faults of the set-up: the process before it ran the same layers.
        self._proven = {LOSS, *hosted} if identity.incarnation else set()
        self._executor = self._make_executor(self.plan, self.layout.costs)
        self._validation = None
        if config.validation is not None:
            self._validation = Validation(config, self.layout.validation, self._make_executor, session.lease)
        self._group: Group | None = None
        self._names: list[list[str]] = []
        self._first_after_resume = True
        self.checkpoints = Checkpoints(self, session)
        self.snapshots = Snapshots(self, session)
        self.snapshots.reserve()

    # ---- building -----------------------------------------------------------------------------------

    def _make_executor(self, plan: Plan, costs: Sequence[float] | None = None) -> Executor:
        return Executor(
            plan=plan,
            schedule=make_schedule(plan, unit_costs=costs).ranks[self.rank],
            rank=self.rank,
            modules=self.state.modules,
            loss=self.config.loss,
            numerics=self.numerics,
            device=self.device.device,
            lease=self._lease,
            injector=self.injector,
            proven=self._proven,
        )

    def signature(self) -> str:
        """What ranks must agree on besides numerics: the plan and the parts of the configuration that count."""
        config, identity = self.config, self._session.identity
        parts = [self.plan.digest()[:16], config.seed, config.microbatch_size, config.clip_norm, config.exact]
        parts += [config.validate_every, config.snapshot_every, config.zero]
        # Only jobs that may recover inexactly depend on how.
        parts += [self.forward.mode, config.neighbours, identity.snapshot_every] if self.forward.on else []
        return ":".join(map(str, parts))

    def peers(self) -> tuple[int, ...]:
        """Ranks whose state is the same as this one's (data-parallel replicas), itself included.

        Buffers and the user's objects see only their own replica's microbatches, and with ZeRO-1 each has other
        moments: then a replica is no source for another, and each rank's snapshot holds all of its state.
        """
        own = bool(self.config.state) or self.state.shards is not None
        if own or any(entry.early for entry in self.state.entries()):
            return (self.rank,)
        mine = self.plan.hosted(self.rank)
        return tuple(rank for rank in range(self.plan.world_size) if self.plan.hosted(rank) == mine)

    # ---- a generation -------------------------------------------------------------------------------

    def attach(self, group: Group) -> None:
        """Train over `group` from now on, once all ranks agree on where they are (raises ConfigError if not).

        The names of all ranks' parameters are exchanged too: the norm adds them in one order.
        """
        self._group = group
        self._executor.attach(group)
        if self._validation is not None:
            self._validation.attach(group)
        names = [f"{unit}.{name}" for unit, name in self._worked]
        mine = {"names": names, "gate": self.gate(), "kept": self.snapshots.keeps()}
        self._lease.renew(Phase.WAITING)
        everybody = [json.loads(row) for row in group.allgather_bytes(json.dumps(mine).encode())]
        self._lease.renew(Phase.RECOVERING)
        self._names = [row["names"] for row in everybody]
        for key in self.gate():
            told = {rank: row["gate"][key] for rank, row in enumerate(everybody) if row["gate"][key] is not None}
            if len(set(map(str, told.values()))) > 1:
                raise ConfigError(f"the ranks disagree on the {key} that they resume with: {told}")
        if self.step == 0:
            self._shadows.start(group)
        self.kept = Kept.of([row["kept"] for row in everybody], self.snapshots.placement)
        self.snapshots.resumed(self.step, self.kept)
        self._first_after_resume = True

    # ---- a step -------------------------------------------------------------------------------------

    def train_step(self) -> None:
        """Compute and commit the next step. Raises Fenced or PeerLost; the state is then what it was, or forgotten."""
        group, lease, step = self._need_group(), self._lease, self.step + 1
        started = time.monotonic()
        self._session.check()
        lease.renew(Phase.USER)  # reading data is the user's code
        before = Undo(self.state, self.source, self.device.device)
        gradients: Gradients | None = None
        try:
            self.source.begin(step)
            outcome = self._executor.run(step, self.source, train=True, loss_scale=self.scaler.scale)
            gradients = self._exchange(group, outcome, step)
            lease.renew(Phase.WAITING)  # for the copy; the manager's own deadlines bound it
            self.snapshots.fence()
            self.injector.at("commit", step)
            gathered = self._gather(group, outcome, gradients)
        except (Fenced, PeerLost):
            if self.forward.on and gradients is not None:
                self.forward.cut_off(step, gradients, Undo(self.state, self.source, self.device.device))
            before.take_back()
            raise
        self._commit(step, gathered, gradients, time.monotonic() - started)

    def _exchange(self, group: Group, outcome: Outcome, step: int) -> Gradients:
        self._lease.renew(Phase.EXCHANGE)
        self.injector.at("exchange", step)
        self._lease.renew(Phase.WAITING)
        totals = exchange(
            group,
            self._exchanges,
            self.rank,
            outcome.sums,
            self.state.by_unit,
            self.plan.microbatches,
            exact=self.config.exact,
        )
        gradients: Gradients = dict.fromkeys(self.state.parameters)
        flat = [gradient for unit in sorted(totals) for gradient in totals[unit]]
        gradients.update(zip(self._worked, flat, strict=True))
        if self.ties:
            exchange_ties(group, self.plan, self.ties, self.rank, gradients)
        self._shadows.hand_on(group, gradients)
        return gradients

    def _gather(self, group: Group, outcome: Outcome, gradients: Gradients) -> Gathered:
        """The step's barrier: everybody's losses, gradient norms and newest whole snapshot."""
        self._lease.renew(Phase.EXCHANGE)
        microbatches = self.plan.microbatches
        width = max(len(names) for names in self._names)
        vector = torch.full((KEPT + 3 * microbatches + width,), math.nan, dtype=torch.float64)
        vector[:KEPT] = torch.tensor(self.snapshots.keeps(), dtype=torch.float64)
        vector[KEPT + 3 * microbatches :] = NO_GRADIENT
        for microbatch, (value, count) in outcome.losses.items():
            vector[KEPT + microbatch] = value.double().cpu() if value.dtype != torch.float64 else value.cpu()
            vector[KEPT + microbatches + microbatch] = count
            vector[KEPT + 2 * microbatches + microbatch] = outcome.tokens[microbatch]
        # A shadow's norm is its worker's, but perhaps not to the bit: strides decide in which order it is added.
        present = [(i, key, g) for i, key in enumerate(self._worked) if (g := gradients[key]) is not None]
        if present:
            norms = torch.stack(torch._foreach_norm([g for _, _, g in present])).double().cpu()
            vector[torch.tensor([KEPT + 3 * microbatches + i for i, _, _ in present])] = norms
            self.forward.measured({key: norm for (_, key, _), norm in zip(present, norms.tolist(), strict=True)})
        self._lease.renew(Phase.WAITING)
        rows = group.allgather(vector)
        tied = frozenset(f"{tie.second_unit}.{tie.second}" for tie in self.ties)
        return Gathered.of(rows, self._names, microbatches, tied, self.snapshots.placement, self.kept)

    def _commit(self, step: int, gathered: Gathered, gradients: Gradients, seconds: float) -> None:
        """Apply the update: from here on nothing can fail but this process (with ZeRO-1: until its end)."""
        first = self._first_after_resume or gathered.kept.protected_under() != self.kept.protected_under()
        self._apply(step, gathered, gradients)
        self._lease.committed(step, gathered.loss, seconds, gathered.tokens)
        alarm = self.snapshots.alarm()
        self._session.committed(step, gathered.loss, self.kept, first=self._first_after_resume, tell=first, alarm=alarm)
        self._first_after_resume = False
        self.snapshots.begin(step, self.kept)

    def _apply(self, step: int, gathered: Gathered, gradients: Gradients) -> None:
        """Become the state after `step`."""
        config, lease = self.config, self._lease
        lease.renew(Phase.OPTIMIZER)
        scale = mean = 1.0 / (gathered.count * self.scaler.scale)
        norm = gathered.norm * scale
        finite = math.isfinite(norm)
        skipped = not finite and (config.skip_nonfinite or config.loss_scale is not None)
        lr = self.state.learning_rate
        if not skipped:
            if config.clip_norm is not None and norm > config.clip_norm:
                scale *= config.clip_norm / (norm + 1e-6)
            torch._foreach_mul_([g for g in gradients.values() if g is not None], scale)
            self.injector.at("optimizer", step)
            if (shards := self.state.shards) is not None:
                self.forget()  # weights of two steps, until the other holders' parts are here
            self.state.apply_gradients(gradients)
            self.injector.at("applied", step)
            if shards is not None:
                lease.renew(Phase.WAITING)
                shards.gather(self._need_group(), lambda: self.injector.at("gather", step))
                lease.renew(Phase.OPTIMIZER)
        self.scaler.update(finite)
        self.step, self.born = step, self._session.generation
        self.kept = gathered.kept
        self.report = StepReport(step, gathered.loss, gathered.tokens, norm, lr, skipped, self.kept.sealed)
        self.forward.applied(step, gathered, mean, scale)

    def roll_forward(self, gathered: Gathered, born: int) -> None:
        """Commit the pending step with what its barrier told the others: the bits of a commit that was not cut off."""
        pending = self.forward.pending
        assert pending is not None, "the coordinator knows what this rank has ready"
        pending.after.take_back()
        self._apply(pending.step, gathered, pending.gradients)
        self.born = born

    # ---- validation and the end ---------------------------------------------------------------------

    def validate_if_due(self) -> None:
        """Validate the current step if one is due and not done. Collective. Changes no state."""
        every, validation = self.config.validate_every, self._validation
        if not every or validation is None or self.step == 0 or self.step % every or self._session.solo:
            return
        if validation.newest is not None and validation.newest[0] == self.step:
            return
        step, loss = validation.run(self._need_group(), self.step)
        if self.rank == 0:
            self.snapshots.saver.validated(step, loss)

    def validation_loss(self, step: int) -> float | None:
        """Validation loss of `step`, if it was due there."""
        newest = self._validation.newest if self._validation is not None else None
        return newest[1] if newest is not None and newest[0] == step else None

    def finish(self) -> None:
        """Wait until every rank holds the last state whole, so that none can lose what another reported. Collective."""
        if not self._session.solo and self._session.managed:
            finish(self._need_group(), self.snapshots, self.step, self.kept, self._lease)

    def _need_group(self) -> Group:
        assert self._group is not None, "no generation stands"
        return self._group

    @property
    def live_step(self) -> int:
        """Step of the state in this process' memory. A replacement's initial state counts only if it must be
        what the first process had, and what the job starts from."""
        lost = self._session.identity.incarnation > 0 and not self.deterministic_start
        if self.step == 0 and (lost or self.checkpoints.resumes):
            return NO_STEP
        return self.step

    def kinds(self) -> dict[int, str]:
        """Hosted units and their kinds: those of one kind have tensors of the same names, shapes and types."""
        return {unit: kind_of(module) for unit, module in self.state.modules.items()}

    def forget(self) -> None:
        """The state in this process' memory is not to be trained from: it is about to be, or may be, of two steps."""
        self.step = NO_STEP

    def gate(self) -> dict[str, Any]:
        """What all ranks must agree on before a generation trains; None: this rank does not know."""
        lr = self.state.learning_rate
        return {
            "step": self.step,
            "loss scale": self.scaler.scale,
            "learning rate": None if math.isnan(lr) else lr,
        }

    # ---- capture ------------------------------------------------------------------------------------

    def metadata(self) -> dict[str, Any]:
        """Everything to capture that is not a tensor of the model or the optimizer."""
        return {
            "step": self.step,
            "signature": self.signature(),
            "origin": self.checkpoints.origin(),
            **self.state.metadata(),
            "report": asdict(self.report) if self.report is not None else None,
            "scaler": self.scaler.state_dict(),
            "data": self.source.state(),
            "rng": rng.capture(self.device.device),
            **self.forward.metadata(),
        }

    def load(self, step: int, tensors: Any, metadata: Any) -> None:
        """Become the state after `step`."""
        self.forget()
        self.state.load(tensors, metadata)
        self.scaler.load_state_dict(metadata["scaler"])
        self.source.load_state(metadata["data"])
        rng.restore(metadata["rng"], self.device.device)
        self.forward.load(metadata)
        # A survivor may be moved forward to a step that it never finished, and must still report it.
        self.report = StepReport(**metadata["report"]) if metadata["report"] is not None else None
        self.step, self.born = step, metadata["origin"]["generation"]
