# SPDX-License-Identifier: Apache-2.0
"""Whether what was read from a file is what its dataclass says: files can be damaged or written by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from grng.compare.errors import UsageError

_NAMES = {
    dict: "an object",
    list: "a list",
    tuple: "a list",
    str: "text",
    int: "a whole number",
    float: "a number",
    type(None): "null",
}


def check(file: Path, value: Any, kind: Any, place: str = "") -> None:
    """Refuse a value that is not of its type.

    Args:
        file: Named in the error.
        value: What was read; a dataclass is looked into.
        kind: A type as annotations have them.
        place: Of the value in the file.

    Raises:
        UsageError: Names file and key.
    """
    for wrong in _faults(value, kind, place):
        raise UsageError(f"{file}: {wrong}")


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _faults(value: Any, kind: Any, place: str) -> Iterator[str]:
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return
    if origin in (Union, UnionType):
        found = [next(_faults(value, one, place), None) for one in inner]
        if None not in found:
            yield found[0] or place
    elif not _fits(value, origin or kind):
        expected = _NAMES.get(origin or kind, "an object")
        yield f"{place} must be {expected}, got {str(value)[:60]!r}"
    elif origin is list:
        for number, item in enumerate(value):
            yield from _faults(item, inner[0], f"{place}[{number}]")
    elif is_dataclass(kind):
        own: Any = type(value)
        for key, hint in _hints(own).items():
            yield from _faults(getattr(value, key), hint, f"{place}.{key}".lstrip("."))


def _fits(value: Any, kind: Any) -> bool:
    if kind in (int, float):
        is_number = isinstance(value, (int, float) if kind is float else int)
        return is_number and not isinstance(value, bool)
    return isinstance(value, kind)
