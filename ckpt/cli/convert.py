"""`convert`, `reshard`, `export`: one checkpoint in, one of another format, layout or world size out.

    convert   into our format, or what --to says           the universal form: resume anywhere
    reshard   --to is required: a framework's own files    its ordinary loader reads them
    export    a Hugging Face folder; weights only          transformers, vLLM and others load it

Losses are listed and refused unless --allow-lossy. The optimizer is what export leaves out by its name.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final

from ..universal.model import Checkpoint, TensorState
from ..universal.plan import Wanted, check_dtype
from ..universal.read import Reader
from ..universal.view import View
from . import transfer
from .arguments import Parser, add_layout, add_writing, size
from .console import Console
from .source import open_reader

TO: Final = """\
targets of --to:
  holdfast                          our format (convert's default)
  deepspeed:zero1|zero2|zero3,dp=N  DeepSpeed's native files for N data-parallel ranks; ,tp=M: times M tensor-parallel
  deepspeed-universal               DeepSpeed's universal folder, for load_universal
  dcp:dp=N   fsdp2:dp=N             PyTorch distributed checkpoint
  hf[:dtype=BF16]                   Hugging Face folder: weights only
  torch                             one file of torch.save"""

EXAMPLES: Final = {
    "convert": f"""\
  holdfast ckpt convert checkpoints/global_step100 step-100
  holdfast ckpt convert big-run out --max-memory 256M --jobs 4 --resume
  holdfast ckpt convert hf-model out --to dcp:dp=8 --layout llama-torchtitan --set heads=32 --set kv_heads=8
  holdfast ckpt convert run/step-00000100 model.pt --to torch --allow-lossy

{TO}""",
    "reshard": f"""\
  holdfast ckpt reshard checkpoints/global_step100 out --to deepspeed:zero3,dp=6
  holdfast ckpt reshard checkpoints/global_step100 out --to fsdp2:dp=4
  holdfast ckpt reshard run out --to deepspeed:zero1,dp=3 --dry-run

{TO}""",
    "export": """\
  holdfast ckpt export checkpoints/global_step100 my-model
  holdfast ckpt export run my-model --dtype bf16 --shard-size 2G --allow-lossy
  holdfast ckpt export run my-model --masters
  holdfast ckpt export megatron-run my-model --layout llama-megatron:reverse --set kv_heads=8""",
}


def add(parser: Parser, verb: str) -> None:
    """Arguments of one of the verbs."""
    parser.add_argument("source", help="checkpoint of any format, or a run's folder")
    parser.add_argument("target", help="what to make; must not be there yet")
    if verb == "export":
        parser.add_argument("--dtype", default="", help="convert weights to this: bf16, fp16, fp32")
        parser.add_argument("--shard-size", type=size, default=0, metavar="5G", help="largest file")
        parser.add_argument("--masters", action="store_true", help="export the float32 master copies as the weights")
    else:
        parser.add_argument("--to", required=verb == "reshard", default="holdfast", metavar="TARGET", help="see below")
    add_layout(parser)
    add_writing(parser)


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Convert."""
    with open_reader(arguments, arguments.source) as reader:
        losses, extra = _of_mappings(reader)
        target = Path(arguments.target)
        if console.verb != "export":
            job = transfer.Job(target=target, spec=arguments.to, wanted=Wanted(losses=losses, memory_extra=extra))
            if arguments.to.startswith("hf"):
                job = _with_dtype(job)
            return transfer.run(reader, job, arguments, console)
        dtype = check_dtype(arguments.dtype) if arguments.dtype else ""
        more: dict[str, Any] = {"dtype": dtype} if dtype else {}
        if arguments.shard_size:
            more["file_bytes"] = arguments.shard_size
        wanted = Wanted(losses=losses, memory_extra=extra, dtype=dtype, weights_only=True)
        source = Masters(reader) if arguments.masters else reader
        job = transfer.Job(target=target, spec="hf", more=more, wanted=wanted)
        return transfer.run(source, job, arguments, console)


def _of_mappings(reader: Reader) -> tuple[tuple[str, ...], int]:
    """Losses of all mappings on the way, and the memory that they keep blocks in."""
    losses: tuple[str, ...] = getattr(reader, "losses", ())
    memory: int = getattr(reader, "memory", 0)
    for source in reader.sources if isinstance(reader, View) else ():
        more, extra = _of_mappings(source)
        losses, memory = (*more, *losses), memory + extra
    return losses, memory


def _with_dtype(job: transfer.Job) -> transfer.Job:
    """The dtype inside of --to counts as a rounding, too."""
    from ..formats.registry import parse_target

    options = dict(parse_target(job.spec).options)
    if not options.get("dtype"):
        return job
    dtype = check_dtype(str(options["dtype"]))
    wanted = Wanted(losses=job.wanted.losses, memory_extra=job.wanted.memory_extra, dtype=dtype)
    return transfer.Job(target=job.target, spec=job.spec, more={"dtype": dtype}, wanted=wanted)


class Masters(View):
    """The float32 master copies in the place of the weights that were rounded from them."""

    def __init__(self, reader: Reader) -> None:
        source = reader.checkpoint
        states = {}
        for (name, state), tensor in source.states.items():
            master = source.states.get((name, "fp32"))
            if state in ("weight", "buffer"):
                dtype = master.dtype if master is not None and master.shape == tensor.shape else tensor.dtype
                states[name, state] = TensorState(name, state, dtype, tensor.shape, (), tensor.role)
            elif state == "fp32" and (name, "weight") not in source.states:
                states[name, "weight"] = TensorState(name, "weight", tensor.dtype, tensor.shape, (), tensor.role)
        checkpoint = Checkpoint(source.root, source.format, states, source.aliases, metadata=source.metadata)
        super().__init__(checkpoint, [reader])

    def fill(self, tensor: TensorState, region: Any, out: memoryview) -> None:
        reader = self.sources[0]
        master = reader.checkpoint.states.get((tensor.name, "fp32"))
        state = "fp32" if master is not None and master.shape == tensor.shape else tensor.state
        reader.read(tensor.name, state, region, out)
