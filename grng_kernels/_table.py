# SPDX-License-Identifier: Apache-2.0
"""Small arrays that a grouped launch reads on the device, copied there once and kept.

A grouped launch takes addresses, strides and sizes from memory: as kernel arguments they would limit the
number of layers. Copying them costs more than the launch, and in training the same call comes back at
every step.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

# Plans kept for calls outside of a graph. A training step makes a few different calls.
CAPACITY = 64
# int64 numbers of pinned memory reserved ahead for CUDA graphs: 4 MiB, tables of 20,000 layers.
RESERVE = 1 << 19

_lock = threading.Lock()
_recent: OrderedDict[Hashable, Any] = OrderedDict()
_recorded: dict[Hashable, Any] = {}
_captured: list[Any] = []
# Pinned memory that is left of the reserve.
_reserve: list[Tensor] = []


def clear() -> None:
    """Forget everything that no CUDA graph reads."""
    with _lock:
        _recent.clear()


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _pinned(numbers: int, capturing: bool) -> Tensor:
    """Return pinned int64 memory; what a graph copies from must never be given back.

    torch pins memory with a call that CUDA forbids while a graph is captured, so the first call outside
    of a capture (the warm-up that Triton needs anyway) puts some aside.
    """
    if not _reserve:
        _reserve.append(torch.empty(RESERVE, dtype=torch.int64, pin_memory=True))
    if capturing and numbers <= _reserve[0].numel():
        taken, _reserve[0] = _reserve[0][:numbers], _reserve[0][numbers:]
        return taken
    return torch.empty(numbers, dtype=torch.int64, pin_memory=True)


def upload(values: Tensor, device: torch.device) -> Tensor:
    """Copy an int64 or fp32 CPU tensor to a device without waiting for it."""
    if device.type != "cuda":
        return values.clone()
    capturing = _capturing(device)
    with _lock:
        # fp32 numbers lie in the same memory, two to a slot.
        buffer = _pinned(-(-values.numel() * values.element_size() // 8), capturing)
        staged = buffer.view(values.dtype)[: values.numel()].copy_(values)
        if capturing:
            # The copy is a node of the graph: each replay reads the pinned memory again.
            _captured.append(staged)
    return staged.to(device, non_blocking=True)


def cached(key: Hashable, device: torch.device, build: Callable[[], Any]) -> Any:
    """Return ``build()``, or what it returned for an equal key; the key must say all that ``build`` reads.

    A result is used on one stream only, where the copy to the device comes before its use and any later
    use of freed memory after it. What a captured graph reads is kept for ever: nobody knows when the last
    replay has been. What is built during a capture is filled by the replay, so no other call may see it.
    """
    if device.type == "cuda":
        key = (key, device, torch.cuda.current_stream(device).cuda_stream)
    else:
        key = (key, device)
    capturing = _capturing(device)
    with _lock:
        if key in _recorded:
            return _recorded[key]
        if key in _recent:
            _recent.move_to_end(key)
            found = _recent[key]
            if capturing:
                _recorded[key] = _recent.pop(key)
            return found
    result = build()
    with _lock:
        if capturing:
            _captured.append(result)
        else:
            _recent[key] = result
            while len(_recent) > CAPACITY:
                _recent.popitem(last=False)
    return result
