"""DeepSpeed's own files for a world of any size: what its ordinary loader takes, without load_universal.

    "deepspeed:zero3,dp=6" ──▶ target/latest, target/global_step100/{zero_pp_rank_0..5_mp_rank_00_*.pt}

The target job must have the same parameters in the same optimizer groups and order, zero_optimization with the
same stage, sub_group_size (ZeRO-3), and neither parameter_alignment nor round_robin_gradients. Streams: memory
is one piece, whatever the model. What the format cannot hold is refused, not approximated. Invariants:

* master copies, moments and buffers go over bit for bit; weights of another dtype are rounded from the masters;
* a step that differs inside of one group is refused (LossyError): DeepSpeed keeps one step a group;
* the target appears with `latest` in it, or not at all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..universal.disk import Disk
from ..universal.errors import IncompleteError, LossyError, UsageError
from ..universal.model import Checkpoint, safe_path
from ..universal.read import Reader
from .deepspeed_experts import LOCAL
from .deepspeed_layout import Layout, flat_group, shard_group
from .deepspeed_tp_rules import info_for
from .deepspeed_tp_split import INFO
from .inert import Global
from .objects import unplain
from .output import Folder
from .pickling import Construct, Ordered, size
from .source import MASTER, float_dtype, master_of, stream, value_of
from .torch_file import hyper_of
from .torchwrite import Tensor, scalar, write_torch

STAGE: Final = Global("deepspeed.runtime.zero.config", "ZeroStageEnum")
FRAGMENT: Final = Global("deepspeed.utils.tensor_fragment", "fragment_address")
SCALER: Final = Global("deepspeed.runtime.fp16.loss_scaler", "LossScaler")
SUB_GROUP: Final = 1_000_000_000
"""DeepSpeed's own default of sub_group_size."""
WRITTEN_AS: Final = "0.19.8"
"""The version whose files these are; loaders compare it with minimum versions."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is written, for whom."""

    reader: Reader
    folder: Path
    disk: Disk
    stage: int
    layout: Layout
    dtype: str
    """Of the model's own weights."""
    tp: int = 1
    rank: int = 0
    """Tensor-parallel rank; `reader` is of its parts."""

    def mp(self, stage: int) -> int:
        """The model-parallel rank of a pipeline stage."""
        return stage * self.tp + self.rank

    @property
    def checkpoint(self) -> Checkpoint:
        return self.reader.checkpoint

    @property
    def prefix(self) -> str:
        return "bf16_" if self.dtype == "BF16" else ""

    def tensor(self, name: str, state: str, *, dtype: str = "") -> Tensor:
        found = self.checkpoint.tensor(name, state)
        return Tensor(dtype or found.dtype, found.shape, lambda: stream(self.reader, name, state, dtype=dtype))


def write(
    reader: Reader,
    target: Path,
    *,
    variant: str = "zero1",
    dp: int = 0,
    tp: int = 0,
    ep: int = 0,
    dtype: str = "",
    tag: str = "",
    sub_group: int = 0,
    disk: Disk | None = None,
) -> None:
    """Files for `dp` data-parallel and `tp` tensor-parallel ranks (default: as many as the source had).

    `dtype`: of the weights.
    """
    checkpoint = reader.checkpoint
    if not checkpoint.groups:
        raise UsageError("no optimizer groups in the source: load plain weights with the model's own loader instead")
    source = checkpoint.metadata.get("source") or {}
    mesh = source.get("mesh") or {}
    config = (source.get("config") or {}).get("zero_optimization") or {}
    sub_group = sub_group or int(config.get("sub_group_size") or SUB_GROUP)
    stage = int(variant.removeprefix("zero"))
    if stage == 3 and any(LOCAL.fullmatch(name) for group in checkpoint.groups for name in group.params):
        raise UsageError("DeepSpeed does not load experts under ZeRO-3: choose zero1 or zero2")
    dp, tp = dp or int(mesh.get("dp") or 1), tp or int(mesh.get("tp") or 1)
    parts = parts_of(reader, tp)
    tag = tag or f"global_step{steps_done(checkpoint)}"
    if not safe_path(tag) or "/" in tag:
        raise UsageError("not a name for a tag", tag=tag)
    with Folder(target, disk=disk) as folder:
        for rank, part in enumerate(parts):
            layout = Layout.of(part.checkpoint, dp=dp, ep=ep, sub_group=sub_group)
            if tp > 1 and layout.experts:
                raise UsageError("experts on tensor-parallel ranks are not written: leave tp out", tp=tp)
            dtype = weights_dtype(checkpoint, dtype)
            job = Job(part, folder.folder(tag), folder.disk, stage, layout, dtype, tp, rank)
            if stage == 3:
                write_zero3(job)
            else:
                write_zero12(job)
        folder.text("latest", tag)


def parts_of(reader: Reader, tp: int) -> list[Reader]:
    """What each of `tp` tensor-parallel ranks is to have."""
    if tp == 1:
        return [reader]
    from .deepspeed_tp import Part, divided

    splits = divided(reader.checkpoint, tp)
    return [Part(reader, splits, rank) for rank in range(tp)]


def steps_done(checkpoint: Checkpoint) -> int:
    """How many steps it was trained for, in DeepSpeed's word or in ours."""
    trainer = checkpoint.metadata.get("trainer") or {}
    found = (trainer.get(key) for key in ("global_steps", "step"))
    return next((step for step in found if type(step) is int), 0)


def weights_dtype(checkpoint: Checkpoint, asked: str) -> str:
    """BF16, F16 or F32: as asked, else as the source's weights are, else as its configuration says."""
    if asked:
        return float_dtype(asked)
    found = {t.dtype for t in checkpoint.states.values() if t.state == "weight" and t.role == "param"}
    if len(found) == 1:
        return found.pop()
    config = (checkpoint.metadata.get("source") or {}).get("config") or {}
    for key, dtype in (("bf16", "BF16"), ("bfloat16", "BF16"), ("fp16", "F16")):
        if isinstance(config.get(key), dict) and config[key].get("enabled"):
            return dtype
    return "F32"


# ---- model files -------------------------------------------------------------------------------------------


def common_of(job: Job) -> dict[str, Any]:
    """Everything of a model_states file but its tensors."""
    metadata = job.checkpoint.metadata
    trainer = metadata.get("trainer") or {}
    frozen = [t for t in job.checkpoint.states.values() if t.role == "frozen" and t.state == "weight"]
    return {
        "buffer_names": [name for (name, _), t in job.checkpoint.states.items() if t.role == "buffer"],
        "optimizer": None,
        "param_shapes": [],
        "frozen_param_shapes": Ordered({t.name: size(t.shape) for t in frozen}),
        "shared_params": dict(job.checkpoint.aliases),
        "frozen_param_fragments": Ordered(),
        "lr_scheduler": unplain(metadata.get("scheduler"), job.reader),
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": trainer.get("skipped_steps") or 0,
        "global_steps": steps_done(job.checkpoint),
        "global_samples": trainer.get("global_samples") or 0,
        "dp_world_size": job.layout.dp,
        "mp_world_size": job.layout.pp * job.tp,
        "checkpoint_parallel_dimensions": {"pp_degree": job.layout.pp, "tp_degree": job.tp},
        "ds_config": config_of(job),
        "ds_version": WRITTEN_AS,
        **({"num_experts": job.layout.num_experts} if job.layout.num_experts else {}),
        **client_of(job),
    }


def client_of(job: Job) -> dict[str, Any]:
    """What the job gave to save_checkpoint; how parameters are split, for the ranks that are written."""
    client = job.checkpoint.metadata.get("client") or {}
    found: dict[str, Any] = unplain(client, job.reader)
    if isinstance(client.get(INFO), dict):
        source = job.checkpoint.metadata.get("source") or {}
        names = [tensor.name for tensor in job.checkpoint.states.values() if tensor.role in ("param", "frozen")]
        source_tp = int((source.get("mesh") or {}).get("tp") or 1)
        found[INFO] = info_for(found[INFO], job.tp, source_tp, names, source.get("kept") or {})
    return found


def config_of(job: Job) -> dict[str, Any]:
    """The source's configuration; for people, no loader reads it."""
    config = (job.checkpoint.metadata.get("source") or {}).get("config")
    return config if isinstance(config, dict) else {}


def weight_of(job: Job, name: str) -> Tensor:
    """A parameter in the compute dtype: as saved, or rounded from what the optimizer steps on."""
    value = value_of(job.checkpoint, name)
    if value.dtype == job.dtype or value.role == "buffer":
        return job.tensor(name, value.state)
    if value.role == "frozen":
        return job.tensor(name, value.state, dtype=job.dtype)
    return job.tensor(name, master_of(job.checkpoint, name).state, dtype=job.dtype)


def module_of(job: Job) -> Ordered:
    """The state dict of the whole model, without experts, which have files of their own."""
    names = dict.fromkeys(t.name for t in job.checkpoint.states.values() if t.role in ("param", "frozen", "buffer"))
    module = Ordered({name: weight_of(job, name) for name in names if not LOCAL.fullmatch(name)})
    for alias, owner in job.checkpoint.aliases.items():
        module[alias] = module[owner]
    return module


def write_models12(job: Job) -> None:
    """mp_rank_XX_model_states.pt, and a file for each pipeline layer and each expert."""
    layout = job.layout
    common = common_of(job)
    module = None if layout.pp > 1 or layout.layers else module_of(job)
    frozen = Ordered({name: module[name] for name in common["frozen_param_shapes"]}) if module else None
    for stage in range(layout.pp):
        local = [layout.local(group, stage, 0) for group in layout.groups]
        value = {
            "module": module,
            **common,
            "param_shapes": [Ordered({name: size(shape_of(job, name)) for name in names}) for names in local],
            "frozen_param_shapes": common["frozen_param_shapes"] if module else None,
            "frozen_param_fragments": frozen,
        }
        write_torch(job.folder / f"mp_rank_{job.mp(stage):02d}_model_states.pt", value, disk=job.disk)
    for layer, prefix in layout.layers.items():
        names = dict.fromkeys(n for n, _ in job.checkpoint.states if n.startswith(prefix))
        tensors = Ordered({n.removeprefix(prefix): weight_of(job, n) for n in names})
        rank = f"-model_{job.rank:02d}" if job.tp > 1 else ""
        write_torch(job.folder / f"layer_{int(layer):02d}{rank}-model_states.pt", tensors, disk=job.disk)
    for index, experts in enumerate(layout.experts.values()):
        for expert, names_ in experts.items():
            file = f"layer_{index}_expert_{expert}_mp_rank_00_model_states.pt"
            write_torch(job.folder / file, {name: weight_of(job, name) for name in names_}, disk=job.disk)


def write_zero12(job: Job) -> None:
    write_models12(job)
    for stage in range(job.layout.pp):
        for rank in range(job.layout.dp):
            name = f"{job.prefix}zero_pp_rank_{rank}_mp_rank_{job.mp(stage):02d}_optim_states.pt"
            write_torch(job.folder / name, _optim12(job, stage, rank), disk=job.disk)


def shape_of(job: Job, name: str) -> tuple[int, ...]:
    return master_of(job.checkpoint, job.layout.model_name(name)).shape


# ---- optimizer files ----------------------------------------------------------------------------------------


def group_states(checkpoint: Checkpoint, names: list[str]) -> tuple[list[str], float | None]:
    """States that all parameters of a group have, and their one step; anything else does not fit into a flat group."""
    states = [sorted(s for (n, s), t in checkpoint.states.items() if n == name and t.role == "optim") for name in names]
    if any(found != states[0] for found in states):
        odd = next(name for name, found in zip(names, states, strict=True) if found != states[0])
        raise IncompleteError("parameters of one group with different optimizer states", name=odd, states=states[0])
    steps = {checkpoint.steps.get(name) for name in names}
    if len(steps) > 1:
        raise LossyError(
            "parameters of one group at different steps: DeepSpeed keeps one", steps=sorted(map(str, steps))
        )
    return (states[0] if states else []), (steps.pop() if steps else None)


def _scaler(job: Job) -> Any:
    saved = (job.checkpoint.metadata.get("scaler") or {}).get("state")
    if isinstance(saved, dict) and str(saved.get("$object", "")).startswith("deepspeed."):
        return unplain(saved)
    return Construct(SCALER, (), {"cur_scale": 1.0, "dynamic": False}, new=True)


def head_of(job: Job) -> dict[str, Any]:
    saved = (job.checkpoint.metadata.get("scaler") or {}).get("state")
    dynamic = bool((saved.get("state") or {}).get("dynamic")) if isinstance(saved, dict) else False
    return {"loss_scaler": _scaler(job), "dynamic_loss_scale": dynamic, "overflow": False}


def clip_of(job: Job) -> dict[str, Any]:
    """ZeRO-3 and others do not save it; left out, the target's own configuration holds, and 0 would switch it off."""
    saved = (job.checkpoint.metadata.get("scaler") or {}).get("clip_grad")
    return {} if saved is None else {"clip_grad": saved}


def _optim12(job: Job, stage: int, rank: int) -> dict[str, Any]:
    layout = job.layout
    fp32, state, groups, paddings, counts, mappings, aligned = [], {}, [], [], [], [], []
    for index, group in enumerate(layout.groups):
        names = layout.local(group, stage, rank)
        models = [layout.model_name(name, rank) for name in names]
        world, place = layout.place(group, rank)
        flat = flat_group(names, [math.prod(master_of(job.checkpoint, n).shape) for n in models], world, place)
        states, step = group_states(job.checkpoint, models)
        fp32.append(flat.tensor(job.reader, models, MASTER, padded=False))
        entry = {"step": scalar(step)} if step is not None else {}
        state[index] = {**entry, **{s: flat.tensor(job.reader, models, s, padded=True) for s in states}}
        groups.append({**layout.hyper(group), "params": [index]})
        paddings.append(flat.padding)
        counts.append(world)
        aligned.append([0] * len(names))
        mappings.append(
            Ordered({n: Construct(FRAGMENT, (), {"numel": c, "start": at}, new=True) for n, c, at in flat.fragments})
        )
    inner = {
        **head_of(job),
        **clip_of(job),
        "base_optimizer_state": {"state": state, "param_groups": groups},
        "single_partition_of_fp32_groups": fp32,
        "zero_stage": Construct(STAGE, (job.stage,)),
        "group_paddings": paddings,
        "param_alignment_paddings": aligned,
        "partition_count": counts,
        "ds_version": WRITTEN_AS,
        "param_slice_mappings": mappings,
    }
    return {"optimizer_state_dict": inner, "ds_config": config_of(job), "ds_version": WRITTEN_AS}


def write_models3(job: Job) -> None:
    """zero_pp_rank_D_mp_rank_MM_model_states.pt: placeholders, buffers, and slices of frozen parameters."""
    layout, checkpoint = job.layout, job.checkpoint
    common = common_of(job)
    module = Ordered()
    for name in dict.fromkeys(t.name for t in checkpoint.states.values() if t.role in ("param", "frozen", "buffer")):
        buffer = value_of(checkpoint, name).role == "buffer"
        module[name] = weight_of(job, name) if buffer else Tensor(job.dtype, (0,), tuple)
    for alias, owner in checkpoint.aliases.items():
        module[alias] = module[owner]
    shapes = [Ordered({n: size(shape_of(job, n)) for n in part}) for _, part in layout.all_sub_groups()]
    for rank in range(layout.dp):
        slices = Ordered()
        for name in common["frozen_param_shapes"]:
            shard = shard_group([name], [math.prod(value_of(checkpoint, name).shape)], layout.dp, rank)
            slices[name] = shard.tensor(job.reader, [name], "weight", dtype=job.dtype)
        model = {"module": module, **common, "param_shapes": shapes, "frozen_param_fragments": slices}
        name = f"zero_pp_rank_{rank}_mp_rank_{job.mp(0):02d}_model_states.pt"
        write_torch(job.folder / name, model, disk=job.disk)


def write_zero3(job: Job) -> None:
    if job.layout.pp > 1 or job.layout.layers:
        raise UsageError("DeepSpeed has no pipeline under ZeRO-3: choose zero1")
    write_models3(job)
    for rank in range(job.layout.dp):
        name = f"{job.prefix}zero_pp_rank_{rank}_mp_rank_{job.mp(0):02d}_optim_states.pt"
        write_torch(job.folder / name, _optim3(job, rank), disk=job.disk)


def _optim3(job: Job, rank: int) -> dict[str, Any]:
    layout, checkpoint = job.layout, job.checkpoint
    subs = layout.all_sub_groups()
    flats, state = [], {}
    for number, (_, names) in enumerate(subs):
        shard = shard_group(names, [math.prod(master_of(checkpoint, n).shape) for n in names], layout.dp, rank)
        states, step = group_states(checkpoint, names)
        flats.append(shard.tensor(job.reader, names, MASTER))
        entry = {"step": scalar(step)} if step is not None else {}
        state[number] = {**entry, **{s: shard.tensor(job.reader, names, s) for s in states}}
    groups = [
        {**hyper_of(checkpoint.groups[i].hyper), "params": [k for k, (owner, _) in enumerate(subs) if owner == i]}
        for i in range(len(layout.groups))
    ]
    inner = {
        "zero_stage": Construct(STAGE, (3,)),
        **head_of(job),
        "partition_count": layout.dp,
        "optimizer_state_dict": {"state": state, "param_groups": groups},
        "fp32_flat_groups": flats,
    }
    return {"optimizer_state_dict": inner, "ds_config": config_of(job), "ds_version": WRITTEN_AS}
