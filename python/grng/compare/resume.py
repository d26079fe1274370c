# SPDX-License-Identifier: Apache-2.0
"""Going on with something that was interrupted: only with the settings, code and data it began with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from grng.compare.errors import UsageError

# What a number may depend on; the rest of an environment may change.
_ENVIRONMENT = (
    "versions",
    "git",
    "device",
    "cpu",
    "gpu",
    "threads",
    "backend",
    "float32_matmul_precision",
)


Result = TypeVar("Result")


def take_up(
    file: Path,
    fresh: Result,
    load: Callable[[Path], Result],
    *,
    option: str,
    but: tuple[str, ...] = (),
) -> Result | None:
    """What was begun in a folder, which is made if it is not there.

    Args:
        file: Where the result would be.
        fresh: What a new one would be.
        load: Reads the file.
        option: That named the folder, for errors.
        but: Settings that may differ.

    Returns:
        The result that is there, or None.

    Raises:
        UsageError: It is of other settings, code or data, or the folder cannot be made.
    """
    if file.is_file():
        known = load(file)
        check_same(file, known, fresh, but)
        return known
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{option} {file.parent}: {error.strerror}") from error
    return None


def check_same(file: Path, known: Any, fresh: Any, but: tuple[str, ...] = ()) -> None:
    """Refuse to go on where settings, versions, commit or data are others.

    Args:
        file: Named in the error.
        known: The saved result; has ``config``, ``environment`` and perhaps ``data``.
        fresh: What a new one would have.
        but: Settings that may differ.

    Raises:
        UsageError: One differs; says which.
    """
    pairs = {
        "setting": (_without(known.config, but), _without(fresh.config, but)),
        # Where the data was found differs between the run that fetched it and the next.
        "data": tuple(_without(getattr(one, "data", {}), ("source",)) for one in (known, fresh)),
        "environment": (
            {key: known.environment.get(key) for key in _ENVIRONMENT},
            {key: fresh.environment.get(key) for key in _ENVIRONMENT},
        ),
    }
    for kind, (before, now) in pairs.items():
        # As files have them: there, a tuple is a list.
        for key, was, found in _differences(_plain(before), _plain(now)):
            raise UsageError(
                f"{file}: can only be gone on with as it was begun: {kind} {key} was {was!r}, is {found!r}; "
                "give another folder, or the same settings"
            )


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _without(config: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in names}


def _differences(before: Any, now: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in [*before, *(key for key in now if key not in before)]:
            yield from _differences(before.get(key), now.get(key), f"{path}.{key}".lstrip("."))
    elif before != now:
        yield path, before, now
