"""How hosts find one another: what the first host publishes in torchrun's rendezvous, and where a host is reached.

    first host ── publish ──▶ store of the rendezvous ──▶ receive ── the other hosts
                          └─▶ the rendezvous' endpoint ──▶ running ── hosts that come later (a spare, one that is back)

Whoever can reach the rendezvous can read the job's token there, as it can read everything of torchrun's; with
HOLDFAST_TOKEN set to one secret on every host nothing secret is published. Not here: the rendezvous itself.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any, Final

from holdfast.proto import env
from holdfast.proto.errors import ConfigError

KEY: Final = "holdfast/bootstrap"
CONNECT_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """What a host must know to take part in a job."""

    job: str
    token: str
    coordinator: str
    host: str
    world_size: int
    resume: str | None = None
    """What the job started from (Saving.told); None: not known here."""
    checkpoints: bool | None = None
    """Whether its hosts write checkpoints; None: not known here."""

    def encoded(self) -> str:
        """As JSON; without the token if every host was given it."""
        told = replace(self, token="") if os.environ.get(env.TOKEN) else self
        return json.dumps(asdict(told))

    @staticmethod
    def decoded(text: str | bytes) -> Bootstrap:
        """From JSON. Raises ConfigError."""
        try:
            told = Bootstrap(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"the rendezvous holds something else than a Holdfast job: {error}") from None
        token = told.token or os.environ.get(env.TOKEN, "")
        if not token:
            raise ConfigError(f"the first host was started with {env.TOKEN} set: set it to the same secret here")
        return replace(told, token=token)


def publish(store: Any, bootstrap: Bootstrap) -> None:
    """Tell the hosts of this rendezvous, and those that come when it is over."""
    text = bootstrap.encoded()
    store.set(KEY, text)
    base = store
    while hasattr(base, "underlying_store"):
        base = base.underlying_store
    base.set(KEY, text)


def receive(store: Any) -> Bootstrap:
    """Wait for what the first host publishes. Raises ConfigError if this host cannot reach it."""
    told = Bootstrap.decoded(store.get(KEY))
    if told.host != socket.gethostname() and told.coordinator.startswith(("127.", "localhost", "[::1]")):
        raise ConfigError(
            f"the coordinator on {told.host} listens on {told.coordinator}, out of reach of this host; "
            "give --local-addr or --coordinator-bind HOST:PORT on the first host"
        )
    return told


def running(endpoint: str) -> Bootstrap | None:
    """The job that already runs at this rendezvous, if there is one."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    host, _, port = endpoint.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_S):
            pass
        store = TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=CONNECT_S))
        return Bootstrap.decoded(store.get(KEY)) if store.check([KEY]) else None
    except (OSError, ValueError, RuntimeError):
        return None


def is_ours(endpoint: str) -> bool:
    """Whether an address of this host is meant: something could listen there."""
    host = endpoint.rpartition(":")[0].strip("[]")
    try:
        family, _, _, _, address = socket.getaddrinfo(host or "localhost", 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address[0], 0))
    except OSError:
        return False
    return True


def own_address(given: str, endpoint: str) -> str:
    """Where other hosts reach this one: what was given, else the address from which it reaches the rendezvous."""
    if given:
        return given
    host, _, port = endpoint.rpartition(":")
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host.strip("[]") or "localhost", int(port or 1)))  # sends nothing: asks for the route
            return str(probe.getsockname()[0])
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot tell which address reaches {endpoint}: {error}; give --local-addr") from None
