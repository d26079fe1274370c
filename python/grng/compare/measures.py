# SPDX-License-Identifier: Apache-2.0
"""The figures on held-out data that optimizers are compared by: accuracy or loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from grng.compare.records import EpochRecord


@dataclass(frozen=True)
class Measure:
    """One of the two: which way is better, and how a value is written."""

    name: Literal["accuracy", "loss"]
    # +1 where higher is better, -1 where lower is.
    sign: int
    # From the value to the number that is shown.
    scale: int
    decimals: int
    suffix: str
    difference: str

    def of(self, epoch: EpochRecord) -> float:
        """The value at an evaluation: on the validation samples if there are any, else the test set."""
        return epoch.held_out_accuracy if self.name == "accuracy" else epoch.held_out_loss

    def score(self, value: float) -> float:
        """A number that is higher for a better value."""
        return self.sign * value

    def text(self, value: float) -> str:
        """The value as it is written: ``"89.80 %"`` or ``"1.5230"``."""
        return f"{self.scale * value:.{self.decimals}f}{self.suffix}"

    def gap(self, value: float, reference: float) -> str:
        """Difference of two values in words.

        Args:
            value: The one.
            reference: The other.

        Returns:
            For example ``"0.72 points above"`` or ``"0.0123 below"``.
        """
        size = f"{self.scale * abs(value - reference):.{self.decimals}f}{self.difference}"
        return f"{size} {'above' if value >= reference else 'below'}"


ACCURACY = Measure("accuracy", sign=1, scale=100, decimals=2, suffix=" %", difference=" points")
LOSS = Measure("loss", sign=-1, scale=1, decimals=4, suffix="", difference="")
MEASURES = {measure.name: measure for measure in (ACCURACY, LOSS)}
