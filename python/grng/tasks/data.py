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
    """Where to look for the data, where to put it, and how much of it is wanted."""

    device: torch.device
    data_dir: Path | None = None
    train_limit: int | None = None
    # Taken from the end of the training samples, before train_limit counts from their start.
    validation: int = 0
    report: Callable[[str], None] = field(default=_silent)


@dataclass(frozen=True)
class ModelOptions:
    """Options of the models; each model reads at most one of them."""

    hidden: tuple[int, ...] = ()
    lora_rank: int = 8


@dataclass(frozen=True)
class ClassificationData:
    """A whole classification data set on one device.

    Inputs are normalised fp32 ``[n, features]``, token ids int64 ``[n, tokens]`` padded at the
    right, or characters int64 ``[n, length]``; labels are int64 ``[n]``, or ``[n, length]`` for one
    prediction per character.
    """

    train_inputs: Tensor
    train_labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor
    source: str
    checksums: dict[str, str]
    validation_inputs: Tensor | None = None
    validation_labels: Tensor | None = None

    @property
    def validation(self) -> tuple[Tensor, Tensor] | None:
        """Inputs and labels held out from training; None if there are none."""
        if self.validation_inputs is None or self.validation_labels is None:
            return None
        return self.validation_inputs, self.validation_labels
