"""A host that comes when the job already runs: a spare, or one that was lost and is back.

    --spare, --join, or a job at the rendezvous ──▶ Host without ranks ──▶ Adopt: ranks of a lost host ──▶ end of job

torchrun's rendezvous is over by then and would keep it waiting for ever, so torch's agent has no part in this; the
ranks are started with the environment that torchrun would give them. Not here: who gets which rank (hosts.py).
"""

from __future__ import annotations

import argparse
import os
import threading
from typing import Any, Final

from holdfast.proto import env
from holdfast.proto.channel import CHANNEL
from holdfast.proto.errors import ConfigError

from .bootstrap import Bootstrap, own_address, running
from .processes import tell
from .session import TOKEN_HEADER
from .site import Host, Options, Site
from .starter import Program, python_argv

POLL_S: Final = 0.1
WAIT_S: Final = 1.0
JOIN_S: Final = 10.0


def serve_as_spare(arguments: argparse.Namespace, options: Options) -> bool:
    """Serve a job that runs already, to its end; False if there is none and this host starts one with others."""
    from torch.distributed.run import parse_min_max_nnodes

    several = parse_min_max_nnodes(arguments.nnodes)[1] > 1
    if arguments.join:
        bootstrap = _ask(arguments.join)
    elif arguments.spare:
        bootstrap = _await_job(options.endpoint)
    elif several and (found := running(options.endpoint)) is not None:
        bootstrap = found
    else:
        return False
    _serve(arguments, options, bootstrap)
    return True


def _await_job(endpoint: str) -> Bootstrap:
    told = False
    while (found := running(endpoint)) is None:
        if not told:
            tell(f"a spare: waits for the job of the rendezvous {endpoint}")
            told = True
        threading.Event().wait(WAIT_S)
    return found


def _ask(coordinator: str) -> Bootstrap:
    import json

    import grpc

    from holdfast.proto.gen import control_pb2 as pb
    from holdfast.proto.gen import control_pb2_grpc

    token = os.environ.get(env.TOKEN, "")
    if not token:
        raise ConfigError(f"--join needs {env.TOKEN}, the secret with which the job was started")
    with grpc.insecure_channel(coordinator, options=CHANNEL) as channel:
        try:
            stub = control_pb2_grpc.ControlStub(channel)
            metadata = [(TOKEN_HEADER, token)]
            # It may be about to take over.
            reply = stub.Status(pb.StatusRequest(), metadata=metadata, timeout=JOIN_S, wait_for_ready=True)
        except grpc.RpcError as error:
            raise ConfigError(f"--join: no coordinator answers at {coordinator}: {error.details()}") from None
    state = json.loads(reply.json)
    if state.get("standby"):
        raise ConfigError(f"--join: the coordinator at {coordinator} is not in charge; see holdfast status")
    return Bootstrap(state["job"], token, coordinator, coordinator, int(state["world_size"]))


def _serve(arguments: argparse.Namespace, options: Options, bootstrap: Bootstrap) -> None:
    """Run until the job has ended. Raises what ended it, if that was no good end."""
    from torch.distributed.run import config_from_args

    config, entrypoint, argv = config_from_args(arguments)
    assert isinstance(entrypoint, str)
    python = python_argv(entrypoint, tuple(argv))
    site = Site(
        index=-1,
        hosts=0,
        world_size=bootstrap.world_size,
        capacity=config.nproc_per_node,
        address=own_address(options.local_address, bootstrap.coordinator),
        python=python is not None,
    )
    host = Host(options, site, bootstrap)
    try:
        tell(f"job {host.job} runs: this host is ready to take ranks of one that is lost")
        host.supervisor.stand_by(_template(arguments, host, (entrypoint, *map(str, argv)), python, config))
        woken = threading.Event()
        while not (view := host.supervisor.view()).good:
            if view.stop is not None:
                raise view.stop
            woken.wait(POLL_S)
        host.supervisor.freeze()
    finally:
        host.close()


def _template(arguments: argparse.Namespace, host: Host, command: tuple[str, ...], python: Any, config: Any) -> Program:
    """How one of our ranks would be started, had torchrun started it."""
    sized = {"LOCAL_WORLD_SIZE": config.nproc_per_node, "WORLD_SIZE": host.site.world_size}
    environment = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "ROLE_RANK": "0",
        "ROLE_WORLD_SIZE": str(host.site.world_size),
        "ROLE_NAME": config.role,
        "MASTER_ADDR": host.site.address,
        "MASTER_PORT": "0",  # nobody listens: a managed rank needs no rendezvous
        "TORCHELASTIC_RUN_ID": config.run_id,
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": str(config.max_restarts),
        "TORCHELASTIC_USE_AGENT_STORE": "False",
        **{name: str(value) for name, value in sized.items()},
    }
    logs = "" if arguments.redirects in ("0", 0) else os.path.join(arguments.log_dir, "spare", "0")
    return Program(
        command=command,
        environment={**os.environ, **host.environment(0), **environment},
        stdout=os.path.join(logs, "stdout.log") if logs else "",
        stderr=os.path.join(logs, "stderr.log") if logs else "",
        error_file=os.path.join(arguments.log_dir, "spare", "0", "error.json"),
        python=python,
    )
