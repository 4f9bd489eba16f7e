"""Pretrain a byte-level decoder over a pipeline, and keep going while ranks die.

    holdfast run --nproc-per-node 4 examples/pretrain.py --preset demo --steps 200
    python examples/pretrain.py --preset tiny --steps 20          one process, no agent, same numbers

Every rank runs this script from the top, a replacement too; `trainer.steps` puts it where the job is. What is
in here is what any user's script has: arguments, model, data, a loop that prints. Not here: recovery code of
any kind, process groups, seeding, checkpoints.

Invariant: only rank 0 prints progress, and --out holds for each rank a whole file or none.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

# Under PYTHONSAFEPATH (the Makefile sets it, and a checkout needs it) a script's own folder is not searched.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from model import PRESETS, DecoderConfig, build_layers, count_parameters, loss
from text import TextDataset, load_tokens

from holdfast.proto.errors import ConfigError
from holdfast.runtime import StepResult, Trainer


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Exits with code 2 for what makes no sense on its own."""
    parser = argparse.ArgumentParser(description="Pretrain a byte-level decoder that survives the loss of ranks.")
    add = parser.add_argument
    add("--preset", choices=sorted(PRESETS), default="demo", help="size of the model (demo)")
    add("--steps", type=_positive, default=100, help="optimizer steps in all (100)")
    add("--microbatches", type=_positive, default=8, help="microbatches a step, over all replicas (8)")
    add("--microbatch-size", type=_positive, default=4, help="sequences in a microbatch (4)")
    add("--context", type=_positive, help="tokens in a sequence (the preset's)")
    add("--stages", type=_positive, help="pipeline stages (all ranks); ranks beyond are replicas")
    add("--schedule", choices=("1f1b", "gpipe"), default="1f1b", help="order of forwards and backwards (1f1b)")
    add("--interleave", type=_positive, default=1, help="chunks of layers on each rank (1)")
    add("--lr", type=float, default=3e-3, help="peak learning rate, after a linear warm-up (3e-3)")
    add("--clip", type=float, default=1.0, help="largest global gradient norm, 0 for no clipping (1.0)")
    add("--seed", type=int, default=0, help="decides weights, data order, dropout, validation split (0)")
    add("--tied", action="store_true", help="one matrix for embedding and output")
    add("--bf16", action="store_true", help="autocast to bfloat16")
    add("--checkpoint-activations", action="store_true", help="recompute each layer's forward in the backward")
    add("--validate-every", type=int, default=0, help="steps between validations, 0 for none (0)")
    add("--data", metavar="FILE_OR_GLOB", help="text to learn (the source of Python's standard library)")
    add("--out", type=Path, metavar="DIR", help="write the final state there, one safetensors file a rank")
    add("--step-log", type=Path, metavar="FILE", help="append one JSON line a step there (rank 0)")
    add("--log-every", type=_positive, default=10, help="steps between lines (10)")
    arguments = parser.parse_args(argv)
    if not arguments.lr > 0:
        parser.error(f"--lr must be above 0, got {arguments.lr}")
    if arguments.clip < 0 or arguments.validate_every < 0:
        parser.error("--clip and --validate-every must not be negative")
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Train to --steps, then write --out."""
    arguments = parse_arguments(argv)
    cfg = replace(PRESETS[arguments.preset], tied=arguments.tied)
    if arguments.context is not None:
        cfg = replace(cfg, context=arguments.context)
    tokens = load_tokens(arguments.data)
    try:
        trainer = make_trainer(arguments, cfg, tokens)
        if trainer.rank == 0:
            print(
                f"pretrain: {arguments.preset}, {count_parameters(cfg) / 1e6:.2f} M parameters, "
                f"{cfg.layers + 2} units on {trainer.world_size} ranks, {tokens.numel() / 1e6:.1f} MB text",
                flush=True,
            )
        train(trainer, arguments)
    except ConfigError as error:
        # Plain python only: under an agent the trainer reports it to the operator, once for all ranks.
        print(f"pretrain: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    if arguments.out is not None:
        write_state(arguments.out, trainer)


def make_trainer(arguments: argparse.Namespace, cfg: DecoderConfig, tokens: torch.Tensor) -> Trainer:
    """The trainer that the arguments describe. Raises ConfigError for a layout that cannot be."""
    validation = None
    if arguments.validate_every:
        validation = TextDataset(tokens, cfg.context, "validation", arguments.seed)
    return Trainer(
        layers=build_layers(cfg),
        loss=loss,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=arguments.lr, betas=(0.9, 0.95)),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(arguments.steps)),
        data=TextDataset(tokens, cfg.context, "train", arguments.seed),
        validation=validation,
        validate_every=arguments.validate_every,
        validation_microbatches=8,
        microbatch_size=arguments.microbatch_size,
        microbatches=arguments.microbatches,
        stages=arguments.stages,
        schedule=arguments.schedule,
        interleave=arguments.interleave,
        clip_norm=arguments.clip or None,
        autocast=torch.bfloat16 if arguments.bf16 else None,
        checkpoint_activations=arguments.checkpoint_activations,
        seed=arguments.seed,
    )


def train(trainer: Trainer, arguments: argparse.Namespace) -> None:
    """The loop. A survivor stays inside `run()` while a rank is replaced."""
    tokens, seconds, joined = 0, 0.0, False
    for step in trainer.steps(until=arguments.steps):
        if not joined and step.number > 1 and trainer.rank == 0:
            print(f"joined  from the state after step {step.number - 1}", flush=True)
        joined = True
        result = step.run()
        tokens, seconds = tokens + result.tokens, seconds + result.seconds
        if trainer.rank != 0:
            continue
        if arguments.step_log is not None:
            with arguments.step_log.open("a") as log:
                log.write(json.dumps({"step": result.step, "loss": result.loss, "seconds": result.seconds}) + "\n")
        for recovery in result.recovered:
            print(f"recovered  {recovery}", flush=True)
        last = step.number == arguments.steps
        if step.every(arguments.log_every) or last or result.validation_loss is not None:
            print(progress_line(result, tokens / seconds), flush=True)
            tokens, seconds = 0, 0.0


def progress_line(result: StepResult, tokens_per_s: float) -> str:
    """One step for a terminal: what was learnt, how fast, and what a failure now could not take away."""
    parts = [f"step {result.step:>5}", f"loss {result.loss:.4f}"]
    if result.validation_loss is not None:
        parts.append(f"validation {result.validation_loss:.4f}")
    parts += [f"{tokens_per_s:,.0f} tokens/s", f"grad norm {result.grad_norm:.3f}", f"lr {result.lr:.2e}"]
    if result.skipped:
        parts.append("update skipped")
    kept = f"step {result.snapshot_step} in memory" if result.snapshot_step >= 0 else "nothing"
    return "  ".join([*parts, f"protected: {kept}"])


def warmup_cosine(steps: int) -> Callable[[int], float]:
    """Factor on the peak rate: linear up over a tenth of the steps (100 at most), half a cosine to 0.1."""
    warmup = min(100, max(1, steps // 10))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        return 0.1 + 0.45 * (1.0 + math.cos(math.pi * done))

    return factor


def write_state(folder: Path, trainer: Trainer) -> None:
    """Write this rank's final state as FOLDER/rank-R-of-N.safetensors: the whole file, or none.

    The rename is the commit point; a file of that name is then durable, a crash before leaves the old one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank-{trainer.rank}-of-{trainer.world_size}.safetensors"
    state = {name: tensor.cpu().contiguous() for name, tensor in trainer.final_state().items()}
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{path.stem}.") as aside:
        whole = Path(aside) / path.name
        save_file(state, whole, metadata={"step": str(trainer.step)})
        _sync(whole)
        os.replace(whole, path)
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


if __name__ == "__main__":
    main()
