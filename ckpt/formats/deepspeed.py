"""DeepSpeed's checkpoints, ZeRO-0 to 3, read where they lie: plain, pipeline, tied, frozen, mixture of experts.

    folder/latest ──▶ folder/global_step3/*.pt ──▶ open() ──▶ Checkpoint over the original bytes

Neither torch nor deepspeed is needed, and no pickle runs. What is read is one small pickle for each file.
Model-parallel rank mp is tensor-parallel rank mp % tp of pipeline stage mp // tp; parts of parameters become pieces of
the wholes where universal_checkpoint_info says how (deepspeed_tp.py), else the checkpoint is refused. Invariants:

* files that are missing are told from their names, with a grid, before any of them is opened;
* files of different saves (another step count) are refused;
* states are per parameter, steps and hyper-parameters per parameter and group, as they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ..universal.errors import CorruptError, MappingError
from ..universal.model import Checkpoint, Kept
from .building import Builder
from .deepspeed_experts import Experts
from .deepspeed_files import Files, check_grid, classify, folder_of, listed
from .deepspeed_modules import add_frozen_slices, add_layers, add_module, shapes_of, shared_of
from .deepspeed_zero import Partition, original_order, partition, recomputed, scattered, sliced
from .inert import Instance
from .torchzip import plain, read_torch

NAMES: Final = frozenset(
    [
        ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
        ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
        ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
        ("deepspeed.utils.tensor_fragment", "fragment_address"),
        ("deepspeed.checkpoint.universal_checkpoint", "SubparamShape"),
    ]
)
STATE: Final = "optimizer_state_dict"
KNOWN: Final = frozenset(
    (
        *("module", "buffer_names", "optimizer", "lr_scheduler", "data_sampler", "random_ltd"),
        *("param_shapes", "frozen_param_shapes", "frozen_param_fragments", "shared_params"),
        *("sparse_tensor_module_names", "skipped_steps", "global_steps", "global_samples"),
        *("dp_world_size", "mp_world_size", "checkpoint_parallel_dimensions", "ds_config", "ds_version"),
        *("num_experts", "ds_autoep_layers"),
    )
)
"""Keys that DeepSpeed writes; everything else is what the job gave to save_checkpoint."""


@dataclass(slots=True)
class Opened:
    """A checkpoint in the middle of being understood."""

    root: Path
    files: Files
    main: Mapping[str, Any]
    models: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    builder: Builder = field(default_factory=Builder)
    layers: dict[str, str] = field(default_factory=dict)
    """Pipeline: number of a layer -> prefix of its parameters' names."""
    tp: int = 1
    builders: list[Builder] = field(default_factory=list)
    """Of each model-parallel rank; all fill `builder`."""
    splits: Any = None
    """With several tensor-parallel ranks: deepspeed_tp.Splits."""

    @property
    def stages(self) -> list[list[str]]:
        """Pipeline: names of each stage's trainable parameters."""
        first = [model for mp, model in self.models.items() if mp % self.tp == 0]
        return [[name for group in shapes_of(m, "") for name in group] for m in first]

    def understand(self) -> None:
        """Once all models are there: who adds for which tensor-parallel rank."""
        dims = self.main.get("checkpoint_parallel_dimensions")
        dims = dims if isinstance(dims, dict) else {}
        told, pp = dims.get("tp_degree"), dims.get("pp_degree")
        # Before 0.19 it is not told: several ranks with a module each, or a layer's file for each of them.
        guessed = self.mp if self.main.get("module") is not None else max(self.files.layers_tp, 1)
        self.tp = told if type(told) is int and told > 0 else guessed
        fits = self.mp % self.tp == 0 and (type(pp) is not int or pp * self.tp == self.mp)
        if not fits or self.files.layers_tp > self.tp:
            raise CorruptError("not as many ranks as it says", ranks=self.mp, tp=self.tp, pp=pp)
        self.builders = [self.builder] * self.mp
        if self.mp > 1:
            from .deepspeed_tp import Sharded, splits_of  # the rarer case, and one more module to import

            self.splits = splits_of(self.main, self.models, self.tp) if self.tp > 1 else None
            by_name = self.splits.by_name if self.splits is not None else {}
            tied = [frozenset(names) for names in self.earlier()]
            self.builders = [
                Sharded.of(self.builder, mp % self.tp, by_name, tied[mp // self.tp]) for mp in range(self.mp)
            ]

    def earlier(self) -> Iterator[set[str]]:
        """For each pipeline stage, the names of its parameters that a stage before has too; only tied ones may be."""
        seen: set[str] = set()
        for stage in self.stages:
            again = seen.intersection(stage)
            untied = next((name for name in sorted(again) if not name.startswith("tied_modules.")), None)
            if untied is not None:
                raise CorruptError("one parameter on two pipeline stages", name=untied, stages=self.mp // self.tp)
            yield again
            seen.update(stage)

    def whole(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The parameter's own shape, of which the model lists a part."""
        split = self.splits.by_name.get(name) if self.splits is not None else None
        return shape if split is None else tuple(split.shape)

    @property
    def dp(self) -> int:
        return max(int(self.main.get("dp_world_size") or 1), self.files.dp, 1)

    @property
    def mp(self) -> int:
        return max(self.files.mp, 1)

    def read(self, file: str) -> Mapping[str, Any]:
        value = read_torch(self.root, file, names=NAMES)
        if not isinstance(value, dict):
            raise CorruptError("not a file of a DeepSpeed checkpoint", file=file)
        return value


def detect(path: Path) -> bool:
    """Whether the folder (or the tag that its `latest` names) holds files named as DeepSpeed names them."""
    folder = folder_of(path) if path.is_dir() else path
    if not folder.is_dir() or (folder / "zero").is_dir():
        return False
    files = classify(listed(folder))
    return bool(files.model or files.model3)


def open(path: Path) -> Checkpoint:
    """The checkpoint, as slabs over the original files."""
    root = folder_of(path)
    files = classify(listed(root))
    first = files.first()
    opened = Opened(root, files, read_torch(root, first, names=NAMES))
    if not isinstance(opened.main, dict) or "module" not in opened.main:
        raise CorruptError("not a model_states file of DeepSpeed", file=first)
    stage = 3 if files.model3 else 1 if files.optim else 0
    mp = int(opened.main.get("mp_world_size") or 1)
    check_grid(files, dp=int(opened.main.get("dp_world_size") or 1), mp=mp, stage=stage)
    for rank in range(opened.mp):
        file = files.model3[0, rank] if stage == 3 else files.model[rank]
        opened.models[rank] = opened.main if file == first else opened.read(file)
        same_save(opened.main, opened.models[rank], file)
    if stage == 0 and opened.mp > 1:
        raise MappingError("no optimizer files, and several model-parallel ranks: not understood", ranks=opened.mp)
    opened.understand()
    if stage == 3:
        found = _zero3(opened)
    elif stage:
        found = _zero12(opened)
    else:
        from .deepspeed_zero0 import zero0  # the rare case, and one more module to import

        found = Found(0, optimizer=zero0(opened.builder, opened.root, opened.main, first))
    return finished(opened, found)


def same_save(one: Mapping[str, Any], other: Mapping[str, Any], file: str) -> None:
    """Refuse a file of another save: step counts differ."""
    for key in ("global_steps", "dp_world_size", "mp_world_size"):
        if one.get(key) != other.get(key):
            raise CorruptError(
                "files of different saves", file=file, differs=key, one=one.get(key), other=other.get(key)
            )


@dataclass(slots=True)
class Found:
    """What only optimizer files say."""

    stage: int
    optimizer: Kept = "exact"
    scaler: Any = None
    extra: dict[str, Any] = field(default_factory=dict)


def _inner(opened: Opened, dp: int, mp: int) -> Mapping[str, Any]:
    file = opened.files.optim[dp, mp]
    inner = opened.read(file).get(STATE)
    if not isinstance(inner, dict):
        raise CorruptError("an optim_states file without its states", file=file)
    return inner


def _zero12(opened: Opened) -> Found:
    """Every model-parallel rank has its own groups; within one, partitions are joined over the data-parallel ranks."""
    files = opened.files
    experts = Experts.of(opened.models.values(), files)
    found = Found(1)
    for mp in range(opened.mp):
        builder = opened.builders[mp]
        shapes = shapes_of(opened.models[mp], files.model[mp])
        add_module(builder, opened.models[mp], files.model[mp])
        inners = [_inner(opened, dp, mp) for dp in range(opened.dp)]
        names = [files.optim[dp, mp] for dp in range(opened.dp)]
        if mp == 0:
            extra = {"clip_grad": plain(inners[0].get("clip_grad")), "overflow": plain(inners[0].get("overflow"))}
            found = Found(stage_of(inners[0]), scaler=plain(inners[0].get("loss_scaler")), extra=extra)
        for index, group in enumerate(shapes):
            _group12(opened, builder, experts, inners, names, index, group)
    opened.layers = layers_of(opened)
    experts.add_weights(opened.builder, opened.root, files)
    return found


def layers_of(opened: Opened) -> dict[str, str]:
    """Weights of all pipeline layers, of each tensor-parallel rank by its own shapes; the prefix of each layer."""
    found: dict[str, str] = {}
    for tp in range(opened.tp):
        stages = [shapes_of(model, "") for mp, model in opened.models.items() if mp % opened.tp == tp]
        found.update(add_layers(opened.builders[tp], opened.root, opened.files, stages, tp))
    return found


def stage_of(inner: Mapping[str, Any]) -> int:
    value = inner.get("zero_stage", 1)
    if isinstance(value, Instance):
        value = value.args[0] if value.args else 1
    return value if isinstance(value, int) and 0 <= value <= 3 else 1


def _group12(
    opened: Opened,
    builder: Builder,
    experts: Experts,
    inners: list[Mapping[str, Any]],
    files: list[str],
    index: int,
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """One group over all data-parallel ranks; a group of experts falls into one part for each expert-parallel rank."""
    everywhere: list[str] = []
    shuffled, aligned = _layout(opened.main, inners[0], index)
    for ranks, rename in experts.parts(shapes, opened.dp):
        parts = [_partition(opened.root, inners[rank], index, files[rank]) for rank in ranks]
        mappings = [inners[rank].get("param_slice_mappings") for rank in ranks]
        if shuffled and not aligned:
            recomputed(builder, shapes, parts, rename)
        elif all(isinstance(mapping, (list, tuple)) and index < len(mapping) for mapping in mappings):
            pairs = [(p, m[index]) for p, m in zip(parts, mappings, strict=True) if m is not None]
            sliced(builder, shapes, pairs, rename)
        else:
            recomputed(builder, shapes, parts, rename)
        names = original_order(list(shapes), len(parts)) if shuffled else list(shapes)
        everywhere += [rename(name) for name in names]
    base = inners[0].get("base_optimizer_state")
    builder.group(index, base["param_groups"][index] if isinstance(base, dict) else {}, everywhere)


def _layout(main: Mapping[str, Any], inner: Mapping[str, Any], index: int) -> tuple[bool, bool]:
    """Whether the group was reordered round-robin, and whether its parameters are padded one by one.

    Reordered groups have wrong mappings (see deepspeed_zero.py), but not if they are padded too.
    """
    zero = (main.get("ds_config") or {}).get("zero_optimization")
    padded = inner.get("param_alignment_paddings")
    shuffled = isinstance(zero, dict) and bool(zero.get("round_robin_gradients")) and stage_of(inner) == 2
    return shuffled, isinstance(padded, list) and index < len(padded) and any(padded[index])


def _partition(root: Path, inner: Mapping[str, Any], index: int, file: str) -> Partition:
    fp32 = inner.get("single_partition_of_fp32_groups")
    base = inner.get("base_optimizer_state")
    if not isinstance(fp32, list) or index >= len(fp32):
        raise CorruptError("an optim_states file with fewer groups than the model", file=file, group=index)
    if isinstance(base, dict):
        state = base["state"].get(base["param_groups"][index]["params"][0], {})
    else:
        # elastic_checkpoint: a list of states without padding, and one step for all.
        state = base[index] if isinstance(base, list) and index < len(base) else {}
    return partition(root, file, fp32[index], state, inner.get("base_optimizer_state_step"))


def _zero3(opened: Opened) -> Found:
    """Every rank has a slice of every parameter, frozen ones included; buffers are whole in each model file."""
    if opened.mp != opened.tp:
        raise MappingError("ZeRO-3 with a pipeline is not understood", ranks=opened.mp, tp=opened.tp)
    found = Found(3)
    for mp, builder in enumerate(opened.builders):
        first = opened.files.model3[0, mp]
        for rank in range(opened.dp):
            inner = _rank3(opened, builder, rank, mp)
            if rank == mp == 0:
                found.scaler = plain(inner.get("loss_scaler"))
                found.extra = {"overflow": plain(inner.get("overflow"))}
        add_module(builder, opened.models[mp], first, only_buffers=True)
    return found


def _rank3(opened: Opened, builder: Builder, rank: int, mp: int) -> Mapping[str, Any]:
    """What one rank has of every parameter; its optimizer's states, for what else they say."""
    files = opened.files
    model = opened.models[mp] if rank == 0 else opened.read(files.model3[rank, mp])
    same_save(opened.main, model, files.model3[rank, mp])
    shapes = shapes_of(opened.models[mp], files.model3[0, mp])
    add_frozen_slices(builder, model, rank, opened.dp, files.model3[rank, mp])
    file = files.optim[rank, mp]
    inner = _inner(opened, rank, mp)
    flats, base = inner.get("fp32_flat_groups"), inner.get(STATE)
    if not isinstance(flats, list) or not isinstance(base, dict):
        raise CorruptError("an optim_states file without its flat groups", file=file)
    if inner.get("partition_count", opened.dp) != opened.dp:
        raise CorruptError("a rank file of another world size", file=file, ranks=inner["partition_count"])
    owners = _owners(base["param_groups"], len(shapes), file)
    numbers = [number for group in base["param_groups"] for number in group["params"]]
    if len(numbers) != len(flats):
        raise CorruptError("as many flat groups as states expected", file=file, flat=len(flats), states=len(numbers))
    parts = [
        partition(opened.root, file, flat, base["state"].get(number, {}), None)
        for flat, number in zip(flats, numbers, strict=True)
    ]
    position = (0, 0)
    for owner, group in zip(owners, shapes, strict=True):
        position = scattered(builder, group, rank, opened.dp, parts, position)
        if rank == 0:
            builder.group(owner, base["param_groups"][owner], list(group))
    return inner


def _owners(groups: Any, shapes: int, file: str) -> list[int]:
    """For each entry of param_shapes the optimizer's group: one entry a sub-group (sub_group_size), or one a group."""
    if not isinstance(groups, list) or not all(
        isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups
    ):
        raise CorruptError("an optim_states file without param_groups", file=file)
    if sum(len(group["params"]) for group in groups) == shapes:
        return [index for index, group in enumerate(groups) for _ in group["params"]]
    if len(groups) == shapes:
        return list(range(shapes))
    raise CorruptError(
        "groups of the optimizer and of the model do not agree", file=file, groups=len(groups), shapes=shapes
    )


def finished(opened: Opened, found: Found, form: str = "") -> Checkpoint:
    """Metadata, aliases, and the checkpoint itself."""
    main, builder = opened.main, opened.builder
    client = {key: value for key, value in main.items() if key not in KNOWN}
    scheduler = main.get("lr_scheduler")
    for model in opened.models.values():
        builder.aliases.update(shared_of(model, ""))
    mesh = {"dp": opened.dp, "pp": opened.mp // opened.tp, "tp": opened.tp}
    trainer = {key: plain(main.get(key)) for key in ("global_steps", "global_samples", "skipped_steps")}
    metadata = {
        "trainer": trainer,
        "client": builder.split_client(client),
        "scheduler": plain(scheduler),
        "scaler": {"state": found.scaler, **found.extra},
        "source": {
            "framework": "deepspeed",
            "version": plain(main.get("ds_version")),
            "mesh": mesh,
            "stage": found.stage,
            "config": plain(main.get("ds_config")),
            "layers": opened.layers,
            "stages": [list(flat) for flat in opened.stages] if main.get("module") is None else [],
            "num_experts": plain(main.get("num_experts")),
            **({"kept": dict(opened.splits.kept)} if opened.splits is not None and opened.splits.kept else {}),
        },
    }
    completeness: dict[str, Kept] = {
        "optimizer": found.optimizer,
        "scheduler": "absent" if scheduler is None else "exact",
        # DeepSpeed saves neither; a job that keeps them in its client state knows where.
        "rng": "absent",
        "data": "absent",
    }
    return builder.checkpoint(
        opened.root, form or f"deepspeed:zero{found.stage}", metadata=metadata, completeness=completeness
    )
