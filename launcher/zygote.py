"""The zygote, `python -m holdfast.launcher.zygote FD`: imports torch once, then forks warm standbys.

    agent ──"fork" + socket──▶ zygote ──fork──▶ (intermediate, exits) ──fork──▶ standby, now the agent's child
    agent ◀──────{"ready": pid}──────────────────────────────────────────────── standby
    agent ──{env, argv, cwd} + log descriptors──▶ standby ──▶ runs the script as __main__

A fresh process needs 1-2.4 s until torch is imported; a standby needs under a millisecond to its first line.
The zygote only imports: it starts no thread, opens no channel, makes no group, and runs no operation on
tensors, since one parallel region before a fork makes every child hang in its first matmul. Lifelines: the
zygote ends at EOF of FD, a standby at EOF of its own socket; neither outlives the agent.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import importlib
import io
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import struct
import sys
import threading
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

HEADER: Final = struct.Struct("!I")
FORK: Final = b"fork"
PRELOADED: Final = (
    "torch",
    "torch.distributed",
    "torch.distributed.tensor",
    "torch.optim",
    "torch._dynamo",  # the first optimizer step imports it: 1.5 s (measured)
    "torch.utils.data",
    "numpy",
    "grpc",
    "google.protobuf",
    "safetensors.torch",
    "xxhash",
    "holdfast.proto.gen.control_pb2_grpc",
)
OWN_PACKAGES: Final = ("holdfast.runtime", "holdfast.ckpt.memory", "holdfast.proto")


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a standby is to become. `argv` starts with the script or the module's name."""

    environment: dict[str, str]
    argv: list[str]
    is_module: bool
    cwd: str

    def encode(self) -> bytes:
        """As it goes over the standby's socket."""
        body = json.dumps([self.environment, self.argv, self.is_module, self.cwd]).encode()
        return HEADER.pack(len(body)) + body

    @staticmethod
    def decode(body: bytes) -> Assignment:
        """Inverse of encode, without the length."""
        return Assignment(*json.loads(body))


# ---- zygote ----------------------------------------------------------------------------------------------


def preload(modules: Sequence[str]) -> None:
    """Import what ranks need. What is missing is left to the ranks: they will say it better."""
    for name in (*PRELOADED, *_own_modules(), *modules):
        try:
            importlib.import_module(name)
        except Exception as error:  # any module of any user: none of them may cost all the others
            if name in modules or not isinstance(error, ImportError):
                print(f"[holdfast] standbys cannot preload {name}: {error}", file=sys.stderr)
    # Never scanned again, in any child: the pages stay shared and a collection in a rank stays cheap.
    gc.collect()
    gc.freeze()


def _own_modules() -> list[str]:
    names: list[str] = []
    for package in OWN_PACKAGES:
        try:
            path = importlib.import_module(package).__path__
        except ImportError:
            continue
        found = pkgutil.walk_packages(path, package + ".", onerror=lambda name: None)
        # Programs are for other processes.
        names += [module.name for module in found if not module.name.endswith((".__main__", ".manager"))]
    return names


def serve(control: socket.socket) -> socket.socket:
    """Fork on request until the agent is gone, then end. Returns in each standby: its socket."""
    while True:
        try:
            data, descriptors, _, _ = socket.recv_fds(control, 64, 1)
        except ConnectionError:
            data = b""
        if not data:
            os._exit(0)
        child = os.fork()
        if child == 0:
            control.close()
            middle = os.getpid()
            if os.fork():
                os._exit(0)  # its child becomes the agent's, which can then wait for it
            os.setsid()
            show("standby")
            _await_end(middle)
            return socket.socket(fileno=descriptors[0])
        for descriptor in descriptors:
            os.close(descriptor)
        os.waitpid(child, 0)


def _await_end(parent: int) -> None:
    """Wait until our parent has ended. An agent that heard of us before could not wait for us, and took us for lost."""
    try:
        pidfd = os.pidfd_open(parent)
    except ProcessLookupError:
        return
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    if os.getppid() == parent:  # else it has ended, and the number may be another's
        poller.poll()
    os.close(pidfd)


def show(what: str) -> None:
    """What `ps` shows this process as, cut to the room that the zygote's arguments took. The environment stays."""
    try:
        from setproctitle import setproctitle
    except ImportError:
        return
    setproctitle(f"holdfast {what}")


# ---- standby ---------------------------------------------------------------------------------------------


def warm_up() -> None:
    """Run one tiny training step: the first one in a process costs 30-50 ms more than the next (measured).

    In the standby, never in the zygote; and only where no device is, whose driver would be initialised before
    the assignment tells which device it is. The generator's state is put back.
    """
    if "torch" not in sys.modules or os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/kfd"):
        return
    try:
        _tiny_step()
    except Exception as error:  # a torch that cannot do this will tell the user in the user's own code
        print(f"[holdfast] standby not warmed up: {type(error).__name__}: {error}", file=sys.stderr)


def _tiny_step() -> None:
    import torch
    from torch.nn import functional

    with torch.random.fork_rng(devices=[]):
        layers = [torch.nn.Embedding(8, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 8)]
        parameters = [parameter for layer in layers for parameter in layer.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        tokens = torch.zeros(1, 2, 4, dtype=torch.long)
        hidden = layers[1](layers[0](tokens))
        hidden = functional.scaled_dot_product_attention(hidden, hidden, hidden, is_causal=True)
        logits = functional.gelu(layers[2](hidden)).flatten(0, 2)
        functional.cross_entropy(logits, tokens.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


def await_assignment(agent: socket.socket) -> Assignment:
    """Say that we are warm and wait. Ends this process if the agent goes away or needs us no more."""
    try:
        agent.sendall(json.dumps({"ready": os.getpid()}).encode() + b"\n")
        if not select.select([agent], [], [], 0)[0]:
            warm_up()  # nobody waits for us; an assignment that comes meanwhile loses nothing by it
        data, descriptors, _, _ = socket.recv_fds(agent, HEADER.size, 2)
        if not data:
            os._exit(0)
        data += _receive(agent, HEADER.size - len(data))
        body = _receive(agent, HEADER.unpack(data)[0])
    except ConnectionError:
        os._exit(0)
    assignment = Assignment.decode(body)
    for descriptor, target in zip(descriptors, (1, 2), strict=False):
        os.dup2(descriptor, target)
        os.close(descriptor)
    agent.close()
    return assignment


def _receive(agent: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = agent.recv(size - len(parts))
        if not part:
            os._exit(0)
        parts += part
    return bytes(parts)


def become(assignment: Assignment) -> Callable[[], object]:
    """Turn this process into what `python -u script.py` would be. Returns the program, not yet begun."""
    os.environ.clear()
    os.environ.update(assignment.environment)
    os.chdir(assignment.cwd)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()  # all children of one zygote would else draw the same numbers
    script = assignment.argv[0]
    sys.argv = list(assignment.argv)
    show(f"rank {assignment.environment.get('RANK', '?')}: {' '.join(sys.argv)}")
    if assignment.is_module:
        _put_first_on_path(assignment.cwd)
        return lambda: runpy.run_module(script, run_name="__main__", alter_sys=True)
    if Path(script).is_dir():
        return lambda: runpy.run_path(script, run_name="__main__")
    _put_first_on_path(os.path.dirname(os.path.realpath(script)))
    return lambda: _run_script(script)


def _put_first_on_path(folder: str) -> None:
    if not sys.flags.safe_path:
        sys.path.insert(0, folder)


def _run_script(script: str) -> None:
    # A real __main__ module, unlike runpy's temporary one: what the script defines can be pickled by name and
    # stays alive for its threads and exit handlers.
    main = types.ModuleType("__main__")
    main.__dict__.update(__file__=script, __builtins__=__builtins__)
    sys.modules["__main__"] = main
    with io.open_code(os.path.abspath(script)) as file:
        code = compile(file.read(), script, "exec", dont_inherit=True)
    exec(code, main.__dict__)


def run_to_exit(program: Callable[[], object]) -> NoReturn:
    """Run the program and end this process as the interpreter would, only faster (0.6 s, measured)."""
    code = 0
    try:
        program()
    except SystemExit as error:
        code = _exit_code(error)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException as error:
        code = 1
        _show(error)
    code = _finish() or code
    os._exit(code)


def _exit_code(error: SystemExit) -> int:
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code & 0xFF
    print(error.code, file=sys.stderr)
    return 1


def _show(error: BaseException) -> None:
    """Print as the interpreter does, without our own frames."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    sys.excepthook(type(error), error.with_traceback(trace), trace)


def _finish() -> int:
    """What the interpreter does before it tears down: threads, exit handlers, buffers."""
    code = 0
    internals: Any = threading
    for step in (internals._shutdown, atexit._run_exitfuncs):
        try:
            step()
        except Exception as error:
            print(f"error at exit: {type(error).__name__}: {error}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            code = 120  # what the interpreter answers to a stream that it cannot flush
    return code


def main() -> NoReturn:
    """Entry point: the zygote, and in each fork of it a standby and then a rank."""
    parser = argparse.ArgumentParser(prog="holdfast-zygote", description="forks warm standbys for the agent")
    parser.add_argument("fd", type=int, help="descriptor of the socket to the agent")
    parser.add_argument("--preload", default="", help="modules to import besides ours, separated by commas")
    parser.add_argument("--room", help="any text: what `ps` shows of ranks is as long as all these arguments at most")
    arguments = parser.parse_args()
    show("zygote")
    if not sys.flags.safe_path:
        sys.path.pop(0)  # `python -m` put the working directory there; a script gets its own folder
    # Same meaning as for a rank: --preload finds modules beside the working directory's code.
    control = socket.socket(fileno=arguments.fd)
    os.set_inheritable(arguments.fd, False)
    modules = [name for name in arguments.preload.split(",") if name]
    if modules and not sys.flags.safe_path:
        sys.path.insert(0, os.getcwd())
    preload(modules)
    if modules and not sys.flags.safe_path:
        sys.path.remove(os.getcwd())
    agent = serve(control)
    run_to_exit(become(await_assignment(agent)))


if __name__ == "__main__":
    main()
