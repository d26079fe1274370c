# SPDX-License-Identifier: Apache-2.0
"""Tables of int64 on a device for grouped launches: written once for the same tensors, then found again."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Table(NamedTuple):
    """A table on the device, and what the host has to know to launch with it."""

    data: Tensor
    plan: Any


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class TableCache:
    """Tables by a key that holds everything in them: addresses, shapes, strides.

    A table is written in stream order, so it belongs to the stream that it was made on. What a CUDA graph
    reads lives as long as the process: the graph keeps the address and nothing that says so.

    Args:
        size: How many tables to keep beside those of graphs; the one used longest ago goes first.
    """

    def __init__(self, size: int = 16) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._recent: OrderedDict[Hashable, Table] = OrderedDict()
        self._kept: dict[Hashable, Table] = {}
        self._captured: list[tuple[Table, Tensor]] = []

    def get(
        self,
        device: torch.device,
        key: Hashable,
        build: Callable[[], tuple[Sequence[int], Any]],
    ) -> Table:
        """Return the table of ``key``, with no wait for the device.

        Args:
            device: Where the table goes; CUDA devices with an index.
            key: Equal only for equal tables.
            build: Called where the table is not there: returns its numbers and the plan.
        """
        capturing = _capturing(device)
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        key = (device, stream, key)
        with self._lock:
            found = self._kept.get(key) or self._recent.get(key)
            if found is not None:
                if capturing:
                    self._recent.pop(key, None)
                    self._kept[key] = found
                elif key in self._recent:
                    self._recent.move_to_end(key)
                return found
        numbers, plan = build()
        host = torch.tensor(numbers, dtype=torch.int64)
        if device.type == "cuda":
            host = host.pin_memory()
        table = Table(host.to(device, non_blocking=True), plan)
        with self._lock:
            if capturing:
                # Its content arrives when the graph is replayed, from the memory of the host: the entry is
                # of no use to anyone else, and both memories have to stay.
                self._captured.append((table, host))
            else:
                self._recent[key] = table
                if len(self._recent) > self._size:
                    self._recent.popitem(last=False)
        return table
