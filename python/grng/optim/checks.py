# SPDX-License-Identifier: Apache-2.0
"""Checks of what an optimizer is given, and the error for numerics that failed too often."""

import math
import numbers
from typing import Any

from torch import Tensor

COUNTS = (
    *("refresh_every", "max_factor_dim", "max_rows", "max_failures", "check_interval"),
    *("scores", "seed"),
)


class PreconditionerError(RuntimeError):
    """The numerics failed too often in a row, or at all with ``strict``; parameters are of the last step."""


def check_hyperparameter(
    owner: str, name: str, value: Any, *, low: float = 0.0, high: float = math.inf
) -> None:
    """Check a number in ``[low, high]``; a learning rate may also be a tensor, 0-d.

    Raises:
        ValueError: Out of range, NaN, or not a number; not a whole number for a count.
    """
    number = value
    if isinstance(value, Tensor) and name in ("lr", "adamw_lr"):
        if value.dim() > 0:
            raise ValueError(
                f"{owner}: {name} must be a number or 0-d, got shape {list(value.shape)}: "
                "a Tensor lr must be 1-element, and have no dimensions"
            )
        number = float(value)
    right = ")" if high == math.inf else "]"
    known = isinstance(number, numbers.Real) and not isinstance(number, bool)
    if not (known and math.isfinite(number) and low <= number <= high):
        raise ValueError(
            f"{owner}: {name} must be a number in [{low}, {high}{right}, got {value!r}"
        )
    if name in COUNTS and not isinstance(value, int):
        raise ValueError(
            f"{owner}: {name} must be a whole number in [{low}, {high}{right}, got {value!r}"
        )


def check_rates(owner: str, groups: list[dict[str, Any]]) -> None:
    """Check that what a schedule made of the learning rates can be used; tensors are not read.

    Raises:
        ValueError: NaN or infinite, or a tensor with dimensions.
    """
    for i, group in enumerate(groups):
        lr = group["lr"]
        is_good = lr.dim() == 0 if isinstance(lr, Tensor) else math.isfinite(lr)
        if not is_good:
            raise ValueError(
                f"{owner}: lr of param_groups[{i}] must be a finite number or a 0-d tensor, got {lr!r}"
            )


def check_betas(owner: str, betas: Any) -> None:
    """Check AdamW's pair of decays.

    Raises:
        ValueError: Not two numbers in ``[0, 1)``.
    """
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"{owner}: betas must be two numbers in [0, 1), got {betas!r}")
    for i, value in enumerate(betas):
        check_hyperparameter(owner, f"betas[{i}]", value, high=1 - 1e-9)
