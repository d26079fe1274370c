# SPDX-License-Identifier: Apache-2.0
"""What every task hands to the training loop, and the error of a task without its data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

# What a label is to the model's outputs: one of their classes, or a number that one of them predicts.
Likelihood = Literal["categorical", "gaussian"]


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
    """Options of the models; each model reads at most one of them, and some the folder of the data."""

    hidden: tuple[int, ...] = ()
    lora_rank: int = 8
    # Where pretrained weights are looked for.
    data_dir: Path | None = None


@dataclass(frozen=True)
class ClassificationData:
    """A whole data set; labels are on the device of the runs, and inputs too unless they are large.

    Inputs are normalised fp32 ``[n, features]``, token ids int64 ``[n, tokens]`` padded at the
    right, characters int64 ``[n, length]``, or images uint8 ``[n, 3, side, side]``, which stay on the
    CPU in a mapped file: a batch is moved when it is used. Labels are int64 ``[n]``, ``[n, length]``
    for one prediction per character, or fp32 ``[n]`` for numbers to predict.
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
    def device(self) -> torch.device:
        """Device of the runs."""
        return self.train_labels.device

    @property
    def validation(self) -> tuple[Tensor, Tensor] | None:
        """Inputs and labels held out from training; None if there are none."""
        if self.validation_inputs is None or self.validation_labels is None:
            return None
        return self.validation_inputs, self.validation_labels
