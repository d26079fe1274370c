# SPDX-License-Identifier: Apache-2.0
"""The training loop of one run: the same for every optimizer."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from grng.compare.config import CompareConfig
from grng.compare.records import EpochRecord, RunRecord, StepSplit
from grng.compare.schedule import warmup_cosine
from grng.compare.timing import StepTimer
from grng.tasks import ClassificationData

# Reading a loss on CUDA waits for the device, so it is done once in so many steps.
_CUDA_CHECK_EVERY = 50
_EVALUATION_ROWS = 2500


class NonFiniteError(ArithmeticError):
    """Loss or weights stopped being finite."""

    def __init__(self, step: int, what: str, lr: float) -> None:
        """Args: step: first bad step, from 1; what: the bad number; lr: that step's rate."""
        super().__init__(f"{what} at step {step}")
        self.step, self.what, self.lr = step, what, lr


@torch.no_grad()
def evaluate(model: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean cross entropy and accuracy.

    Args:
        model: The classifier; left in training mode.
        inputs: ``[n, ...]``.
        labels: ``[n]``.

    Returns:
        ``(loss, accuracy)``, accuracy in ``[0, 1]``.
    """
    model.eval()
    loss_sum = torch.zeros((), dtype=torch.float64, device=inputs.device)
    correct = torch.zeros((), dtype=torch.int64, device=inputs.device)
    chunks = zip(
        torch.split(inputs, _EVALUATION_ROWS), torch.split(labels, _EVALUATION_ROWS), strict=True
    )
    for rows, targets in chunks:
        logits = model(rows)
        loss_sum += F.cross_entropy(logits, targets, reduction="sum")
        correct += (logits.argmax(dim=1) == targets).sum()
    model.train()
    return float(loss_sum) / len(labels), int(correct) / len(labels)


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
        observes: bool,
        check_every: int | None = None,
    ) -> None:
        """Prepares the run; nothing is trained yet.

        Args:
            record: Filled as the run goes on, so that an interrupted run keeps what it has.
            model: On the device of ``data``.
            optimizer: Updates ``model``.
            data: Training and test set.
            config: Shared settings.
            observes: Whether ``optimizer.observe(logits)`` is called in each step.
            check_every: Steps between two looks at the losses; 1 on the CPU if None.
        """
        device = data.train_inputs.device
        default_check = _CUDA_CHECK_EVERY if device.type == "cuda" else 1
        self._record, self._model, self._optimizer = record, model, optimizer
        self._data, self._config = data, config
        self._observe = optimizer.observe if observes else None  # type: ignore[attr-defined]
        self._check_every = check_every or default_check
        self._timer = StepTimer(device)
        self._losses: list[Tensor] = []
        self._rates: list[float] = []
        self._split_seconds = [0.0, 0.0, 0.0]
        samples = len(data.train_labels)
        record.steps_per_epoch = math.ceil(samples / config.batch_size)
        total_steps = config.epochs * record.steps_per_epoch
        self._scheduler = LambdaLR(optimizer, warmup_cosine(total_steps, config.warmup_fraction))

    def train(self, on_step: Callable[[], None], on_epoch: Callable[[], None]) -> None:
        """Runs all epochs.

        Args:
            on_step: Called after each step.
            on_epoch: Called after each epoch and its evaluation.

        Raises:
            NonFiniteError: A loss is not finite; ``record`` holds the steps before it.
        """
        data, record = self._data, self._record
        # Its own generator: an optimizer that draws random numbers must not change the batches.
        generator = torch.Generator().manual_seed(record.seed)
        order_hash = hashlib.sha256()
        self._model.train()
        for epoch in range(1, self._config.epochs + 1):
            order = torch.randperm(len(data.train_labels), generator=generator)
            order_hash.update(order.numpy().tobytes())
            for index in torch.split(order.to(data.train_labels.device), self._config.batch_size):
                self._step(data.train_inputs[index], data.train_labels[index])
                if len(self._losses) >= self._check_every:
                    self._collect()
                on_step()
            self._collect()
            record.batch_order_sha256 = order_hash.hexdigest()
            self._finish_epoch(epoch)
            on_epoch()

    def _step(self, inputs: Tensor, labels: Tensor) -> None:
        timer, optimizer = self._timer, self._optimizer
        self._rates.append(float(optimizer.param_groups[0]["lr"]))
        timer.mark()
        logits = self._model(inputs)
        loss = F.cross_entropy(logits, labels)
        timer.mark()
        if self._observe is not None:
            self._observe(logits)
        timer.mark()
        loss.backward()
        timer.mark()
        optimizer.step()
        optimizer.zero_grad()
        timer.mark()
        self._losses.append(loss.detach())
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
        rates = list(self._rates)
        self._losses.clear()
        self._rates.clear()
        for loss, rate, parts in zip(losses, rates, self._timer.flush(), strict=True):
            if not math.isfinite(loss):
                raise NonFiniteError(len(record.step_loss) + 1, f"training loss {loss}", rate)
            # Nine digits identify an fp32 number; times need no more than microseconds.
            record.step_loss.append(float(f"{loss:.9g}"))
            record.step_seconds.append(round(sum(parts), 7))
            self._split_seconds = [a + b for a, b in zip(self._split_seconds, parts, strict=True)]
        milliseconds = (1e3 * part / len(record.step_loss) for part in self._split_seconds)
        record.ms_per_step = StepSplit(*(round(value, 5) for value in milliseconds))

    def _finish_epoch(self, epoch: int) -> None:
        """Evaluates the model and records the epoch.

        Raises:
            NonFiniteError: The test loss is not finite.
        """
        record, data = self._record, self._data
        test_loss, test_accuracy = evaluate(self._model, data.test_inputs, data.test_labels)
        if not math.isfinite(test_loss):
            rate = float(self._optimizer.param_groups[0]["lr"])
            raise NonFiniteError(len(record.step_loss), f"test loss {test_loss}", rate)
        epoch_losses = record.step_loss[-record.steps_per_epoch :]
        record.epochs.append(
            EpochRecord(
                epoch=epoch,
                step=len(record.step_loss),
                train_seconds=round(record.train_seconds, 6),
                train_loss=sum(epoch_losses) / len(epoch_losses),
                test_loss=test_loss,
                test_accuracy=test_accuracy,
            )
        )
