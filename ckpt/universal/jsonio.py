"""JSON as the format writes it: canonical, so that equal values are equal bytes; capped, so that it ends.

    {"b":1,"a":[0.1]}  ──▶  {"a":[0.1],"b":1}\n        sorted keys, no blanks, UTF-8, one newline at the end

Floats are written in the shortest form that reads back as the same bits; infinities and NaN, which JSON does
not have, as {"$float":"inf"}, "-inf", "nan". Invariants:

* canonical(parse_canonical(data)) == data, or parse_canonical raises: no duplicate keys, no odd numbers;
* parse() of hostile bytes raises CorruptError within the caps; it never recurses beyond DEPTH_MAX.
"""

from __future__ import annotations

import json
import math
from typing import Any, Final

from .errors import CorruptError, UsageError

DEPTH_MAX: Final = 64
_FLOATS: Final = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def canonical(value: Any) -> bytes:
    """`value` as canonical JSON. UsageError for what is not a JSON value."""
    try:
        text = json.dumps(_plain(value, 0), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return text.encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise UsageError("not a value that JSON can hold", reason=str(error)) from error


def _plain(value: Any, depth: int) -> Any:
    if depth > DEPTH_MAX:
        raise UsageError("nested too deeply", depth=depth)
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"}
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise UsageError("a key that is not text", key=repr(key))
        if value.keys() == {"$float"}:
            raise UsageError("a key that the format keeps for itself", key="$float")
        return {key: _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth + 1) for item in value]
    return value


def parse(data: bytes, label: str) -> Any:
    """The value of some JSON, duplicate keys refused; `label` names it in errors."""
    try:
        value = json.loads(data.decode(), object_pairs_hook=lambda pairs: _object(pairs, label))
    except (ValueError, RecursionError) as error:
        raise CorruptError("not JSON", file=label, reason=str(error)[:200]) from error
    _check_depth(value, label)
    return value


def parse_canonical(data: bytes, label: str) -> Any:
    """The value of canonical JSON; CorruptError for any other bytes."""
    value = parse(data, label)
    try:
        same = canonical(value) == data
    except UsageError as error:
        raise CorruptError("not canonical JSON", file=label, reason=error.message) from error
    if not same:
        raise CorruptError("not canonical JSON", file=label)
    return value


def _object(pairs: list[tuple[str, Any]], label: str) -> Any:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise CorruptError("a key twice", file=label, key=next(key for key in keys if keys.count(key) > 1))
    if len(found) == 1 and isinstance(found.get("$float"), str):
        number = _FLOATS.get(found["$float"])
        if number is None:
            raise CorruptError("an unknown number", file=label, value=found["$float"])
        return number
    return found


def _check_depth(value: Any, label: str) -> None:
    waiting = [(value, 0)]
    while waiting:
        item, depth = waiting.pop()
        if depth > DEPTH_MAX:
            raise CorruptError("nested too deeply", file=label)
        if isinstance(item, dict):
            waiting += [(inner, depth + 1) for inner in item.values() if isinstance(inner, (dict, list))]
        elif isinstance(item, list):
            waiting += [(inner, depth + 1) for inner in item if isinstance(inner, (dict, list))]
