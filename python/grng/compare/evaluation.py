# SPDX-License-Identifier: Apache-2.0
"""Loss, accuracy and correlation of a model on samples that it is not trained on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Evaluation(NamedTuple):
    """Means over all labels; None for what was not asked for, or does not apply to numbers."""

    loss: float
    # In [0, 1].
    accuracy: float | None
    # In [-1, 1].
    correlation: float | None = None


def correlation(predicted: Tensor, labels: Tensor) -> float:
    """Pearson's correlation; of two classes 0 and 1 it is Matthews' (Matthews 1975).

    Args:
        predicted: ``[n]``, numbers or classes.
        labels: ``[n]``.

    Returns:
        In ``[-1, 1]``; 0 where one of the two is constant, for which it is not defined.
    """
    a, b = (values.double() - values.double().mean() for values in (predicted, labels))
    norm = float(a.norm() * b.norm())
    return float(a @ b) / norm if norm > 0 else 0.0


@torch.no_grad()
def evaluate(
    model: nn.Module, inputs: Tensor, labels: Tensor, rows: int, *, has_correlation: bool = False
) -> Evaluation:
    """Loss and accuracy over all labels.

    Args:
        model: On the device of the labels; left in training mode.
        inputs: ``[n, ...]``, on any device.
        labels: Classes ``[n]`` for logits ``[n, classes]``; ``[n, length]`` for
            ``[n, length, classes]``; or numbers ``[n]`` for ``[n, 1]``.
        rows: Samples per forward pass.
        has_correlation: Whether to correlate labels ``[n]`` with what is predicted: the likeliest
            class, or the number.

    Returns:
        Mean cross entropy, or half the mean squared error, and the others.
    """
    is_number = labels.is_floating_point()
    model.eval()
    loss_sum = torch.zeros((), dtype=torch.float64, device=labels.device)
    correct = torch.zeros((), dtype=torch.int64, device=labels.device)
    predictions = []
    chunks = zip(torch.split(inputs, rows), torch.split(labels, rows), strict=True)
    for samples, targets in chunks:
        outputs = model(samples.to(labels.device))
        if is_number:
            predicted = outputs.squeeze(-1)
            loss_sum += 0.5 * F.mse_loss(predicted, targets, reduction="sum")
        else:
            predicted = outputs.argmax(dim=-1)
            loss_sum += F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="sum")
            correct += (predicted == targets).sum()
        if has_correlation:
            predictions.append(predicted)
    model.train()
    count = labels.numel()
    return Evaluation(
        loss=float(loss_sum) / count,
        accuracy=None if is_number else int(correct) / count,
        correlation=correlation(torch.cat(predictions), labels) if has_correlation else None,
    )
