# SPDX-License-Identifier: Apache-2.0
"""Where settings are searched for: ranges and choices by option, written like optimizer specs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from grng.compare.errors import UsageError
from grng.compare.optimizers import OptionValue, parse_value, valid_options

# A number of a range is rounded to so many digits before it is used: what is written is what was run.
_DIGITS = 3


@dataclass(frozen=True)
class Range:
    """Numbers of which the logarithm is drawn evenly."""

    low: float
    high: float

    def __contains__(self, value: object) -> bool:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and self.low <= value <= self.high  # type: ignore[operator]

    def round(self, value: float) -> float:
        """Return a value of few digits, inside the range."""
        return min(max(float(f"{value:.{_DIGITS}g}"), self.low), self.high)

    def __str__(self) -> str:
        return f"{self.low:.15g}..{self.high:.15g}"


@dataclass(frozen=True)
class Choice:
    """A few values, in no order."""

    values: tuple[OptionValue, ...]

    def __contains__(self, value: object) -> bool:
        return value in self.values

    def __str__(self) -> str:
        return "|".join(str(value) for value in self.values)


Space = dict[str, Range | Choice]

# Two of each: a number over a factor of 1,000 with the default in its middle, and three values, one of them
# the default. For those without a learning rate to speak of, the number is their prior.
_DECAYS = "weight_decay=0.0|0.01|0.1"
SPACES: dict[str, str] = {
    "ring": f"lr=1.6e-4..0.16:{_DECAYS}",
    "reng": f"lr=1.6e-4..0.16:{_DECAYS}",
    "adamw": f"lr=3.2e-5..0.032:{_DECAYS}",
    "muon": f"lr=3.2e-5..0.032:{_DECAYS}",
    "soap": f"lr=9.5e-5..0.095:{_DECAYS}",
    "sgd": "lr=3.2e-3..3.2:weight_decay=0.0|1e-4|1e-3",
    "adagrad": "lr=3.2e-4..0.32:weight_decay=0.0|1e-4|1e-3",
    "kfac": "lr=9.5e-4..0.95:weight_decay=0.0|5e-4|5e-3",
    "sophiag": f"lr=3.2e-6..3.2e-3:{_DECAYS}",
    "sophiah": f"lr=3.2e-6..3.2e-3:{_DECAYS}",
    "rkalman": "sigma0=0.063..63:rho=0.0|0.01|0.1",
    "loko": "sigma0=1.6e-3..1.6:beta=0.9|0.96|0.99",
}


def parse_space(optimizer: str, text: str) -> Space:
    """Return the space that a text such as ``"lr=1e-4..1e-1:weight_decay=0|0.1"`` describes.

    Args:
        optimizer: Whose options.
        text: Options separated by ``:``, each a range ``low..high`` or values separated by ``|``.

    Returns:
        By option, in the order given.

    Raises:
        UsageError: An option that the optimizer does not have or that is given twice; a range that is none; a
            value that is empty or given twice.
    """
    space: Space = {}
    keys = valid_options(optimizer)
    for part in text.replace(" ", "").split(":"):
        key, has_value, values = part.partition("=")
        if key not in keys:
            raise UsageError(
                f"--space: unknown option {key!r} of {optimizer!r}; valid options: {', '.join(keys)}"
            )
        if not has_value or not values:
            raise UsageError(f"--space: option {key!r} must be {key}=low..high or {key}=a|b|c")
        if key in space:
            raise UsageError(f"--space: option {key!r} is given twice")
        if ".." in values:
            space[key] = _range(key, values)
        else:
            space[key] = _choice(key, values)
    return space


def _choice(key: str, text: str) -> Choice:
    parts = text.split("|")
    if not all(parts):
        raise UsageError(f"--space: no value of {key} may be empty, got {text!r}")
    values = tuple(as_option(parse_value(part)) for part in parts)
    for place, value in enumerate(values):
        # Not by a set: 1, 1.0 and True are one value.
        if value in values[:place]:
            raise UsageError(f"--space: value {parts[place]} of {key} is given twice, in {text!r}")
    return Choice(values)


def as_option(value: Any) -> OptionValue:
    """Return a value as an option has it: JSON has no tuples, only lists."""
    return tuple(value) if isinstance(value, list) else value


def corners(space: Space) -> list[dict[str, OptionValue]]:
    """Return settings with each choice and both ends of each range, beside the first of the others."""
    ends = {
        key: (values.low, values.high) if isinstance(values, Range) else values.values
        for key, values in space.items()
    }
    first = {key: values[0] for key, values in ends.items()}
    others = [{**first, key: value} for key, values in ends.items() for value in values[1:]]
    return [first, *others]


def every_setting(space: Space) -> Iterator[dict[str, OptionValue]]:
    """Yield all settings of a space; none where it has a range, which has too many to count."""
    choices = [values.values for values in space.values() if isinstance(values, Choice)]
    if len(choices) == len(space):
        yield from (dict(zip(space, chosen, strict=True)) for chosen in itertools.product(*choices))


def _range(key: str, text: str) -> Range:
    low, _, high = text.partition("..")
    try:
        found = Range(float(low), float(high))
    except ValueError:
        found = Range(math.nan, math.nan)
    if not 0 < found.low < found.high < math.inf:
        raise UsageError(f"--space: {key} must be a range of numbers 0 < low < high, got {text!r}")
    return found


def space_text(space: Space) -> str:
    """Return the text that :func:`parse_space` reads."""
    return ":".join(f"{key}={values}" for key, values in space.items())


def spec_text(optimizer: str, options: Mapping[str, OptionValue]) -> str:
    """Return the spec of an optimizer with these options, as ``--optimizers`` takes it."""
    return ":".join([optimizer, *(f"{key}={value}" for key, value in options.items())])
