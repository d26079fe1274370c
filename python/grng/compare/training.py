# SPDX-License-Identifier: Apache-2.0
"""The training loop of one run: the same for every optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from grng.compare.config import CompareConfig
from grng.compare.evaluation import Evaluation, evaluate
from grng.compare.plan import make_plan
from grng.compare.protocols import Protocol, take_step
from grng.compare.records import EpochRecord, RunRecord, StepSplit
from grng.compare.schedule import warmup_cosine
from grng.compare.timing import StepTimer
from grng.tasks import ClassificationData

# Reading a loss on CUDA waits for the device, so it is done once in so many steps.
_CUDA_CHECK_EVERY = 50


class NonFiniteError(ArithmeticError):
    """Loss or weights stopped being finite."""

    def __init__(self, step: int, what: str, lr: float | None) -> None:
        """Args: step: first bad step, from 1; what: the bad number; lr: that step's rate."""
        super().__init__(f"{what} at step {step}")
        self.step, self.what, self.lr = step, what, lr


def learning_rate(optimizer: torch.optim.Optimizer) -> float | None:
    """Rate of the first group; None for an optimizer that has none."""
    rate = optimizer.param_groups[0].get("lr")
    return None if rate is None else float(rate)


class Trainer:
    """Trains one model with one optimizer and fills a ``RunRecord``."""

    def __init__(
        self,
        record: RunRecord,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        data: ClassificationData,
        config: CompareConfig,
        *,
        protocol: Protocol,
        check_every: int | None = None,
    ) -> None:
        """Prepares the run; nothing is trained yet.

        Args:
            record: Filled as the run goes on, so that an interrupted run keeps what it has.
            model: On the device of the labels of ``data``.
            optimizer: Updates ``model``.
            data: Training, validation and test samples.
            config: Shared settings.
            protocol: How the optimizer takes part in a step.
            check_every: Steps between two looks at the losses; 1 on the CPU if None.
        """
        device = data.device
        default_check = _CUDA_CHECK_EVERY if device.type == "cuda" else 1
        self._record, self._model, self._optimizer = record, model, optimizer
        self._data, self._protocol = data, protocol
        self._likelihood = config.task_entry.likelihood
        self._measure = config.measure
        self._rows = config.model_entry.evaluation_rows
        self._is_stream = config.stream is not None
        self._check_every = check_every or default_check
        self._timer = StepTimer(device)
        self._losses: list[Tensor] = []
        self._correct: list[Tensor] = []
        self._rates: list[float | None] = []
        self._split_seconds = [0.0, 0.0, 0.0]
        self._plan = make_plan(config, len(data.train_labels))
        record.steps_per_epoch = self._plan.steps_per_pass
        has_rate = all("lr" in group for group in optimizer.param_groups)
        self._scheduler = None
        if has_rate and config.schedule_name == "cosine":
            factor = warmup_cosine(self._plan.steps, config.warmup_fraction)
            self._scheduler = LambdaLR(optimizer, factor)

    def train(self, on_step: Callable[[], None], on_checkpoint: Callable[[], None]) -> None:
        """Runs the whole plan.

        Args:
            on_step: Called after each step.
            on_checkpoint: Called after each evaluation: after each epoch unless planned otherwise.

        Raises:
            NonFiniteError: A loss is not finite; ``record`` holds the steps before it.
        """
        data, record, plan = self._data, self._record, self._plan
        stops = set(plan.checkpoints)
        self._model.train()
        for step, (index, order_sha256) in enumerate(plan.batches(record.seed), start=1):
            # Images may be in a file on the CPU side: only the batch goes to the device.
            inputs = data.train_inputs[index.to(data.train_inputs.device)].to(data.device)
            self._step(inputs, data.train_labels[index.to(data.device)])
            if len(self._losses) >= self._check_every:
                self._collect()
            on_step()
            if step in stops:
                self._collect()
                record.batch_order_sha256 = order_sha256
                self._evaluate(is_last=step == plan.steps)
                on_checkpoint()

    def _step(self, inputs: Tensor, labels: Tensor) -> None:
        self._rates.append(learning_rate(self._optimizer))
        loss, logits = take_step(
            self._model,
            self._optimizer,
            self._protocol,
            inputs,
            labels,
            self._timer.mark,
            likelihood=self._likelihood,
        )
        self._losses.append(loss)
        if self._is_stream:
            # These logits are from before the update: the prediction of a sample not yet seen.
            self._correct.append((logits.argmax(dim=1) == labels).sum())
        if self._scheduler is not None:
            self._scheduler.step()

    def _collect(self) -> None:
        """Moves losses and times to the record.

        Raises:
            NonFiniteError: A loss is not finite.
        """
        if not self._losses:
            return
        record = self._record
        losses = torch.stack(self._losses).tolist()
        correct = torch.stack(self._correct).tolist() if self._correct else []
        rates = list(self._rates)
        self._losses.clear()
        self._correct.clear()
        self._rates.clear()
        for place, parts in enumerate(self._timer.flush()):
            loss = losses[place]
            if not math.isfinite(loss):
                step = len(record.step_loss) + 1
                raise NonFiniteError(step, f"training loss {loss}", rates[place])
            # Nine digits identify an fp32 number; times need no more than microseconds.
            record.step_loss.append(float(f"{loss:.9g}"))
            record.step_seconds.append(round(sum(parts), 7))
            record.step_correct += correct[place : place + 1]
            self._split_seconds = [a + b for a, b in zip(self._split_seconds, parts, strict=True)]
        milliseconds = (1e3 * part / len(record.step_loss) for part in self._split_seconds)
        record.ms_per_step = StepSplit(*(round(value, 5) for value in milliseconds))

    def _held_out(self, what: str, inputs: Tensor, labels: Tensor) -> Evaluation:
        """Loss, accuracy and correlation on held-out samples.

        Raises:
            NonFiniteError: The loss is not finite.
        """
        found = evaluate(
            self._model, inputs, labels, self._rows, has_correlation=self._measure.is_correlation
        )
        if not math.isfinite(found.loss):
            rate = learning_rate(self._optimizer)
            raise NonFiniteError(len(self._record.step_loss), f"{what} loss {found.loss}", rate)
        return found

    def _evaluate(self, *, is_last: bool) -> None:
        """Evaluates the model and adds a record of it.

        Raises:
            NonFiniteError: A loss is not finite.
        """
        record, data, done = self._record, self._data, len(self._record.step_loss)
        before = record.epochs[-1].step if record.epochs else 0
        losses = record.step_loss[before:]
        number = len(record.epochs) + 1
        if not self._is_stream:
            number = math.ceil(done / record.steps_per_epoch)
        found = EpochRecord(
            epoch=number,
            step=done,
            train_seconds=round(record.train_seconds, 6),
            train_loss=sum(losses) / len(losses),
        )
        if record.step_correct:
            found.online_accuracy = sum(record.step_correct) / len(record.step_correct)
        if data.validation is not None:
            held_out = self._held_out("validation", *data.validation)
            found.validation_loss, found.validation_accuracy = held_out.loss, held_out.accuracy
            found.validation_correlation = held_out.correlation
        # None of them in a search for settings.
        if len(data.test_labels) and (is_last or data.validation is None):
            test = self._held_out("test", data.test_inputs, data.test_labels)
            found.test_loss, found.test_accuracy = test.loss, test.accuracy
            found.test_correlation = test.correlation
        record.epochs.append(found)
