# SPDX-License-Identifier: Apache-2.0
"""What every task hands to the training loop, and the error of a task without its data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor


class DataError(RuntimeError):
    """The data of a task is missing, damaged, or could not be fetched."""


def _silent(message: str) -> None:
    del message


@dataclass(frozen=True)
class LoadRequest:
    """Where to look for the data and where to put it."""

    device: torch.device
    data_dir: Path | None = None
    train_limit: int | None = None
    report: Callable[[str], None] = field(default=_silent)


@dataclass(frozen=True)
class ClassificationData:
    """A whole classification data set on one device; inputs are fp32 and normalised."""

    train_inputs: Tensor
    train_labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor
    source: str
    checksums: dict[str, str]
