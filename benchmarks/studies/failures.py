# SPDX-License-Identifier: Apache-2.0
"""Which errors are a result of a study, and which say that it cannot be made here and now."""

from __future__ import annotations

import torch

from grng.tasks.data import DataError


def is_out_of_memory(error: ArithmeticError | RuntimeError) -> bool:
    """Whether memory ran out: of the CPU's, torch says so with a plain ``RuntimeError``."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def is_divergence(error: ArithmeticError | RuntimeError) -> bool:
    """Whether the numbers of a run failed, and not its data or the memory of the machine."""
    return not isinstance(error, DataError) and not is_out_of_memory(error)
