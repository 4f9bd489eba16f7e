"""Finds the verb and calls it; every error becomes one line on stderr, and an exit code that scripts can rely on.

    0 ok   1 usage   2 corrupt (or: differs)   3 incomplete   4 mapping   5 unsafe   6 storage   7 lossy

A verb is a module with ABOUT, EXAMPLES, add(parser) and run(arguments, console); only the one that was asked
for is imported. An error that is none of ours is a bug of ours, and keeps its traceback.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from holdfast.proto.errors import HoldfastError

from ..collecting import uncollected
from ..universal.errors import UsageError
from .arguments import Parser, make_parser
from .console import Console

VERBS: Final[Mapping[str, tuple[str, str]]] = MappingProxyType(
    {
        "inspect": ("inspect", "what is in a checkpoint: headers only"),
        "verify": ("verify", "whether its bytes are those that were written"),
        "adopt": ("adopt", "a manifest over somebody's files, which stay as they are"),
        "convert": ("convert", "into our format, or any other"),
        "reshard": ("convert", "into a framework's native files, for another number of ranks"),
        "export": ("convert", "a Hugging Face folder: weights only"),
        "slice": ("slice", "one rank's bytes, as a file or a stream"),
        "diff": ("diff", "what differs between two, in bits, ulps and values"),
        "merge": ("merge", "several into one: averages of many kinds"),
        "repair": ("repair", "damaged chunks from copies that prove to be the same"),
        "prune": ("prune", "leave out the optimizer; or remove old checkpoints of a run"),
    }
)

USAGE: Final = """\
usage: holdfast ckpt VERB ... (holdfast ckpt VERB --help)

Checkpoints of any framework, without that framework: DeepSpeed ZeRO, PyTorch DCP and FSDP2, Megatron, Hugging
Face, torch.save, and our own. Nothing in a checkpoint is ever executed.

verbs:
{verbs}

examples:
  holdfast ckpt inspect checkpoints/global_step100
  holdfast ckpt verify --full run/step-00000100
  holdfast ckpt reshard checkpoints/global_step100 out --to deepspeed:zero3,dp=6
  holdfast ckpt export checkpoints/global_step100 my-model

exit codes: 0 ok, 1 usage, 2 corrupt or different, 3 incomplete, 4 mapping, 5 unsafe, 6 storage, 7 lossy
"""

NEXT: Final[Mapping[int, str]] = MappingProxyType(
    {
        2: "`holdfast ckpt verify` lists every fault, `holdfast ckpt repair` rebuilds from copies",
        3: "bring the missing part back, or take another checkpoint",
        4: "see docs/CHECKPOINTS.md on mapping files; `holdfast ckpt inspect --tensors` lists names and shapes",
        5: "nothing was executed; ask who made the file, and save it again as safetensors",
        7: "--allow-lossy, if that is meant",
    }
)


def usage() -> str:
    """The text of `holdfast ckpt --help`."""
    return USAGE.format(verbs="\n".join(f"  {name:<9} {about}" for name, (_, about) in VERBS.items()))


def run(argv: Sequence[str]) -> int:
    """Run one verb; the exit code."""
    arguments = list(argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0 if arguments else 1
    try:
        return _run(arguments[0], arguments[1:])
    except HoldfastError as error:
        print(one_line(arguments[0], error), file=sys.stderr)
        return exit_code(error)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        reason = error.strerror or str(error)
        print(f"holdfast ckpt {arguments[0]}: error: {reason} [file={error.filename}]", file=sys.stderr)
        return 6
    except MemoryError:
        print(f"holdfast ckpt {arguments[0]}: error: out of memory; next: fewer --jobs", file=sys.stderr)
        return 6
    except KeyboardInterrupt:
        print(f"\nholdfast ckpt {arguments[0]}: interrupted; nothing was left under the target's name", file=sys.stderr)
        return 130


def _run(verb: str, argv: list[str]) -> int:
    if verb not in VERBS:
        import difflib

        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {' '.join(VERBS)}"
        raise UsageError(f"no verb {verb!r}; {hint}")
    name, about = VERBS[verb]
    with uncollected():
        module: Any = importlib.import_module(f"{__package__}.{name}")
        parser: Parser = make_parser(verb, about, module.EXAMPLES[verb])
        module.add(parser, verb)
        arguments = parser.parse_args(argv)
    console = Console(json=arguments.json, verb=verb, progress=not arguments.no_progress)
    code: int = module.run(arguments, console)
    return code


def exit_code(error: HoldfastError) -> int:
    """Errors of the checkpoint library say theirs; any other of ours is about what was asked for."""
    from ..universal.errors import CheckpointError

    return error.exit_code if isinstance(error, CheckpointError) else 1


def one_line(verb: str, error: HoldfastError) -> str:
    """The error, its fields, and what to do next, in one line."""
    fields = {key: value for key, value in error.fields.items() if key != "next"}
    text = " ".join(str(HoldfastError(error.message, **fields)).split())
    hint = error.fields.get("next") or NEXT.get(exit_code(error), "")
    return f"holdfast ckpt {verb}: error: {text}" + (f"; next: {hint}" if hint else "")
