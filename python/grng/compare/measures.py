# SPDX-License-Identifier: Apache-2.0
"""The figures on held-out data that optimizers are compared by: accuracy, loss or a correlation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from grng.compare.records import EpochRecord

MeasureName = Literal["accuracy", "loss", "matthews", "pearson"]


@dataclass(frozen=True)
class Measure:
    """One of them: which way is better, and how a value is written."""

    name: MeasureName
    # +1 where higher is better, -1 where lower is.
    sign: int
    # From the value to the number that is shown.
    scale: int
    decimals: int
    suffix: str
    difference: str
    # As in a heading.
    title: str

    @property
    def is_correlation(self) -> bool:
        """Whether it is the correlation of what is predicted with the labels."""
        return self.name in ("matthews", "pearson")

    def of(self, epoch: EpochRecord) -> float:
        """The value at an evaluation: on the validation samples if there are any, else the test set."""
        if self.is_correlation:
            return epoch.held_out_correlation
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


ACCURACY = Measure("accuracy", 1, 100, 2, " %", " points", "accuracy")
LOSS = Measure("loss", -1, 1, 4, "", "", "loss")
# In hundredths, as GLUE has them.
MATTHEWS = Measure("matthews", 1, 100, 2, "", " points", "Matthews correlation")
PEARSON = Measure("pearson", 1, 100, 2, "", " points", "Pearson correlation")
MEASURES = {measure.name: measure for measure in (ACCURACY, LOSS, MATTHEWS, PEARSON)}
