# SPDX-License-Identifier: Apache-2.0
"""What is kept of each run; these dataclasses are the schema of ``result.json``."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

RUNNING = "running"
FINISHED = "finished"
INTERRUPTED = "interrupted"
DIVERGED = "diverged"


@dataclass
class EpochRecord:
    """State at the end of an epoch, or after so many steps or samples of a stream.

    ``epoch`` is the one that the last step belongs to; in a stream, the number of the evaluation.

    Seconds count training steps only. With validation samples, the test set is looked at only once,
    at the end of the run.
    """

    epoch: int
    step: int
    train_seconds: float
    train_loss: float
    test_loss: float | None = None
    test_accuracy: float | None = None
    validation_loss: float | None = None
    validation_accuracy: float | None = None
    # Of what is predicted with the labels, where that is what optimizers are compared by.
    test_correlation: float | None = None
    validation_correlation: float | None = None
    # Of a stream: part of all samples so far that was predicted before it was learned from.
    online_accuracy: float | None = None

    @property
    def held_out_accuracy(self) -> float:
        """Accuracy on the validation samples; on the test set where there are none."""
        accuracy = self.validation_accuracy
        accuracy = self.test_accuracy if accuracy is None else accuracy
        return 0.0 if accuracy is None else accuracy

    @property
    def held_out_correlation(self) -> float:
        """Correlation on the validation samples; on the test set where there are none."""
        found = self.validation_correlation
        found = self.test_correlation if found is None else found
        return 0.0 if found is None else found

    @property
    def held_out_loss(self) -> float:
        """Loss on the validation samples; on the test set where there are none."""
        loss = self.test_loss if self.validation_loss is None else self.validation_loss
        return math.inf if loss is None else loss


@dataclass
class StepSplit:
    """Mean milliseconds of one training step; optimizer includes ``observe`` and ``zero_grad``."""

    forward: float = 0.0
    backward: float = 0.0
    optimizer: float = 0.0

    @property
    def total(self) -> float:
        """Milliseconds of a whole step."""
        return self.forward + self.backward + self.optimizer


@dataclass
class Divergence:
    """Where a run stopped because its numbers were no longer finite."""

    step: int
    what: str
    # None for an optimizer without a learning rate.
    lr: float | None
    last_finite_loss: float | None
    diagnostics: Any = None


@dataclass
class RunRecord:
    """One optimizer with one seed; grows while the run goes on."""

    optimizer: str
    seed: int
    status: str = RUNNING
    steps_per_epoch: int = 0
    initial_weights_sha256: str = ""
    batch_order_sha256: str = ""
    ms_per_step: StepSplit = field(default_factory=StepSplit)
    peak_memory_bytes: int | None = None
    optimizer_state_bytes: int = 0
    divergence: Divergence | None = None
    epochs: list[EpochRecord] = field(default_factory=list)
    step_loss: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    # Of a stream: 1 where the sample was predicted before it was learned from, else 0.
    step_correct: list[int] = field(default_factory=list)

    @property
    def train_seconds(self) -> float:
        """Seconds of all steps so far."""
        return sum(self.step_seconds)

    @property
    def final_accuracy(self) -> float:
        """Test accuracy at the end of a finished run."""
        return self.epochs[-1].test_accuracy or 0.0

    @property
    def best_accuracy(self) -> float | None:
        """Highest held-out accuracy at any look; None where numbers are predicted."""
        if self.epochs[-1].test_accuracy is None:
            return None
        return max(epoch.held_out_accuracy for epoch in self.epochs)

    def to_json(self) -> dict[str, Any]:
        """The record as JSON objects."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> RunRecord:
        """The record that ``to_json`` wrote; unknown keys are ignored.

        Args:
            content: The JSON object.

        Returns:
            The record.
        """
        known = {key: content[key] for key in (f.name for f in fields(cls)) if key in content}
        known["ms_per_step"] = StepSplit(**known["ms_per_step"])
        known["epochs"] = [EpochRecord(**epoch) for epoch in known["epochs"]]
        if known.get("divergence") is not None:
            known["divergence"] = Divergence(**known["divergence"])
        return cls(**known)
