"""DeepSpeed's universal folders, written: for jobs that ask for load_universal, at any world size.

    target/latest_universal, target/global_step3_universal/zero/embed.weight/{fp32,exp_avg,exp_avg_sq,step}.pt ...

Unlike ds_to_universal's, one folder serves ZeRO-1, 2 and 3: states are shaped, and both kinds of model files are
there. DeepSpeed's own loader has limits that no file can mend (seen in 0.19.8): under ZeRO-3 it gives the first
group's hyper-parameters to all groups and shares one step among them, and it loads neither buffers nor frozen
parameters; native files (deepspeed_write.py) have none of these limits. Invariants: as in deepspeed_write.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from ..universal.disk import Disk
from ..universal.errors import UsageError
from ..universal.model import Checkpoint, safe_path
from ..universal.read import Reader
from .deepspeed_experts import LOCAL
from .deepspeed_layout import Layout
from .deepspeed_tp_rules import Rules
from .deepspeed_tp_split import INFO
from .deepspeed_universal import GLOBAL_STATE, LATEST, ZERO
from .deepspeed_write import (
    SUB_GROUP,
    WRITTEN_AS,
    Job,
    clip_of,
    group_states,
    head_of,
    steps_done,
    weights_dtype,
    write_models3,
    write_models12,
)
from .inert import Global
from .objects import unplain
from .output import Folder
from .pickling import Construct
from .source import MASTER, master_of, value_of
from .torch_file import hyper_of
from .torchwrite import scalar, write_torch


def write(reader: Reader, target: Path, *, tag: str = "", dtype: str = "", disk: Disk | None = None) -> None:
    """A folder of states by parameter; `dtype`: of the weights in the model files."""
    checkpoint = reader.checkpoint
    names = [name for group in checkpoint.groups for name in group.params]
    if not names:
        raise UsageError("no optimizer groups in the source: there is nothing that DeepSpeed would resume")
    if any(LOCAL.fullmatch(name) for name in names):
        raise UsageError("DeepSpeed's universal loader knows no experts: write native files (deepspeed:zero2)")
    if any(not safe_path(name) or "/" in name for name in names):
        raise UsageError("a parameter whose name cannot be a folder's")
    tag = tag or f"global_step{steps_done(checkpoint)}_universal"
    if not safe_path(tag) or "/" in tag:
        raise UsageError("not a name for a tag", tag=tag)
    layout = Layout.of(checkpoint, dp=1, ep=1, sub_group=SUB_GROUP)
    with Folder(target, disk=disk) as folder:
        job = Job(reader, folder.folder(tag), folder.disk, 1, layout, weights_dtype(checkpoint, dtype))
        hints = hints_of(checkpoint)
        write_models12(job)
        if not layout.layers:
            write_models3(job)
        for group in checkpoint.groups:
            states, at = group_states(checkpoint, list(group.params))
            for name in group.params:
                inner = folder.folder(f"{tag}/{ZERO}/{name}")
                own = {MASTER: master_of(checkpoint, name).state, **{state: state for state in states}}
                for file, state in own.items():
                    atom = {**hints(name, job.tensor(name, state).shape), "param": job.tensor(name, state)}
                    write_torch(inner / f"{file}.pt", atom, disk=job.disk)
                if at is not None:
                    write_torch(inner / "step.pt", scalar(at), disk=job.disk)
        for tensor in checkpoint.states.values():
            if tensor.role == "buffer" or (tensor.role == "frozen" and tensor == value_of(checkpoint, tensor.name)):
                inner = folder.folder(f"{tag}/{ZERO}/{tensor.name}")
                atom = {"param": job.tensor(tensor.name, tensor.state, dtype="F32" if tensor.dtype in FLOATS else "")}
                write_torch(inner / "fp32.pt", atom, disk=job.disk)
        _global_state(job, folder.folder(f"{tag}/{ZERO}"))
        folder.text(LATEST, tag)


FLOATS = ("BF16", "F16", "F64")
SUB_PARAMS: Final = Global("deepspeed.checkpoint.universal_checkpoint", "SubparamShape")


def hints_of(checkpoint: Checkpoint) -> Callable[[str, tuple[int, ...]], dict[str, Any]]:
    """What the folder says of a parameter of a name and shape, for a job that splits it over tensor-parallel ranks."""
    info = (checkpoint.metadata.get("client") or {}).get(INFO)
    mesh = (checkpoint.metadata.get("source") or {}).get("mesh") or {}
    if not isinstance(info, dict) or int(mesh.get("tp") or 1) == 1:
        return lambda name, shape: {"cat_dim": 0}
    rules = Rules(unplain(info))

    def hints(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
        found = rules.hints(name, shape)
        if "sub_param_shape" in found:
            state = {"patterns": [name], "shape": found["sub_param_shape"], "partition_dim": found.pop("partition_dim")}
            found["sub_param_shape"] = Construct(SUB_PARAMS, (), state, new=True)
        return found

    return hints


def _global_state(job: Job, folder: Path) -> None:
    checkpoint = job.checkpoint
    groups = [{**hyper_of(group.hyper), "params": [i]} for i, group in enumerate(checkpoint.groups)]
    state = {}
    for i, group in enumerate(checkpoint.groups):
        step = group_states(checkpoint, list(group.params))[1]
        state[i] = {"step": scalar(step)} if step is not None else {}
    value = {
        **head_of(job),
        **clip_of(job),
        "ds_version": WRITTEN_AS,
        "param_groups": groups,
        "optimizer_state_dict": {"state": state, "param_groups": groups},
    }
    write_torch(folder / GLOBAL_STATE, value, disk=job.disk)
