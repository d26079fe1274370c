# SPDX-License-Identifier: Apache-2.0
"""Peak memory of one run, and the bytes that an optimizer holds."""

from __future__ import annotations

import gc
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
# Writing 5 resets the peak resident set size of the process (man proc_pid_clear_refs).
_RESET_PEAK = "5"


def peak_memory_kind(device: torch.device) -> str:
    """Table heading of the peak memory on this device."""
    return "peak CUDA MB" if device.type == "cuda" else "peak RSS MB"


class PeakMemory:
    """Peak from construction on: CUDA allocator, or resident set of the process on the CPU."""

    def __init__(self, device: torch.device) -> None:
        """Args: device: the device of the run."""
        gc.collect()
        self._is_cuda = device.type == "cuda"
        self._is_reset = True
        if self._is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            return
        try:
            _CLEAR_REFS.write_text(_RESET_PEAK)
        except OSError:
            self._is_reset = False

    def read(self) -> int | None:
        """Peak in bytes; None where the system cannot reset or report it."""
        if self._is_cuda:
            return torch.cuda.max_memory_allocated()
        if not self._is_reset:
            return None
        try:
            found = re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
        except OSError:
            return None
        return int(found.group(1)) * 1024 if found else None


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in ``optimizer.state``; a shared storage counts once."""
    storages: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, Mapping):
            for item in value.values():
                visit(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item)

    visit(optimizer.state)
    return sum(storages.values())
