# SPDX-License-Identifier: Apache-2.0
"""A model on several devices: what goes to one kernel is on one of them, numbers meet on the first."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def by_device(items: Sequence[T], tensor_of: Callable[[T], Tensor]) -> list[list[T]]:
    """Sort items by the device of a tensor of theirs, in the order given."""
    found: dict[torch.device, list[T]] = {}
    for item in items:
        found.setdefault(tensor_of(item).device, []).append(item)
    return list(found.values())


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Stack tensors on the device of the first."""
    return torch.stack([t.to(tensors[0].device) for t in tensors])
