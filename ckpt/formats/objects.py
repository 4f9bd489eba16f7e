"""From the JSON of a checkpoint's metadata back to the objects that a framework expects in its files.

    {"$object": "collections.Counter", "args": [{"$key:30": 1}]}  ──▶  Construct(Global(...), ({30: 1},))

The other direction of torchzip.plain() and Builder.split_client(). Metadata may come from a stranger's file, so
only names of a short list are ever written into a pickle: a reader that trusts our output must not be led
anywhere else. Invariant: an object that is not on the list stays what it is in the metadata: a dictionary of text.
"""

from __future__ import annotations

import ast
from typing import Any, Final

from ..universal.read import Reader
from .inert import Global
from .pickling import Construct
from .source import stream
from .torchwrite import Tensor

WRITABLE: Final = frozenset(
    [
        "collections.Counter",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    ]
)


def known(name: str) -> Global:
    """A name from the list, in two parts."""
    module, _, short = name.rpartition(".")
    return Global(module, short)


def unplain(value: Any, reader: Reader | None = None) -> Any:
    """The value with its objects; tensors are taken from `reader`."""
    if isinstance(value, list):
        return [unplain(item, reader) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"$bytes"} and isinstance(value["$bytes"], str):
        return bytes.fromhex(value["$bytes"])
    if value.keys() == {"$tensor"} and isinstance(value["$tensor"], str) and reader is not None:
        return opaque_tensor(reader, value["$tensor"])
    if value.get("$object") in WRITABLE:
        args = tuple(unplain(item, reader) for item in value.get("args") or ())
        state = unplain(value.get("state"), reader)
        # A Counter is made by a call; objects with a state by __new__, as Python pickles them.
        return Construct(known(value["$object"]), args, state, new=state is not None)
    return {_key(key): unplain(item, reader) for key, item in value.items()}


def _key(key: str) -> Any:
    if not key.startswith("$key:"):
        return key
    return ast.literal_eval(key.removeprefix("$key:"))


def opaque_tensor(reader: Reader, name: str) -> Tensor:
    tensor = reader.checkpoint.tensor(name, "opaque")

    return Tensor(tensor.dtype, tensor.shape, lambda: stream(reader, name, "opaque"))
