# SPDX-License-Identifier: Apache-2.0
"""``maximize=True``: a step for the negative of the objective."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def check_maximize(owner: str, maximize: Any) -> None:
    """Check the flag.

    Raises:
        ValueError: Neither True nor False.
    """
    if not isinstance(maximize, bool):
        raise ValueError(f"{owner}: maximize must be True or False, got {maximize!r}")


@contextlib.contextmanager
def ascending(groups: list[dict[str, Any]]) -> Iterator[None]:
    """Give the parameters of groups with ``maximize`` their negative gradients, for the length of a step.

    The tensors in ``.grad`` are put back as they were: they are others', and nothing is written into them.
    """
    kept: list[tuple[nn.Parameter, Tensor]] = [
        (p, p.grad)
        for group in groups
        if group["maximize"]
        for p in group["params"]
        if p.grad is not None
    ]
    try:
        for p, grad in kept:
            p.grad = -grad
        yield
    finally:
        for p, grad in kept:
            p.grad = grad
