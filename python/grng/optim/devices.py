# SPDX-License-Identifier: Apache-2.0
"""Devices: what goes to one kernel is on one of them, numbers meet on the first; no step in a CUDA graph."""

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


def beside(number: float | Tensor, tensor: Tensor) -> float | Tensor:
    """Return a number, or a 0-d tensor where another one is; from the host it goes into any launch."""
    if not isinstance(number, Tensor) or number.is_cpu:
        return number
    return number.to(tensor.device)


def scale_(tensors: list[Tensor], factor: float | Tensor) -> None:
    """Multiply tensors in place by a number, or by a tensor 0-d, which nothing waits for."""
    if not isinstance(factor, Tensor):
        torch._foreach_mul_(tensors, factor)
        return
    for together in by_device(tensors, lambda t: t):
        torch._foreach_mul_(together, beside(factor, together[0]))


def refuse_graph_capture(owner: str) -> None:
    """Refuse a step while a CUDA graph is captured: the graph would repeat its host numbers for ever.

    Raises:
        RuntimeError: The current stream is being captured.
    """
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{owner}: a step cannot be captured into a CUDA graph, as its counts and the schedule of its "
            "refreshes live on the host. Capture the forward and the backward pass, and call step() outside"
        )
