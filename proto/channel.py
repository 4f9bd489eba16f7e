"""Options of every gRPC channel that we open. Values only.

* No retries: a call that the library retries by itself, because the server went before it had seen it (GOAWAY), never
  ends if the server cannot be reached any more, and cancelling it does nothing (grpcio 1.85, tests/unit/
  test_channel.py). Whoever opens a stream here opens the next one itself.
* No proxy: coordinators, agents and ranks are each other's neighbours, whatever http_proxy says of the world outside.
"""

from __future__ import annotations

from typing import Final

CHANNEL: Final[tuple[tuple[str, int], ...]] = (
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
)
