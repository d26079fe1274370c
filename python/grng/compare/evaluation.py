# SPDX-License-Identifier: Apache-2.0
"""Loss and accuracy of a classifier on samples that it is not trained on."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@torch.no_grad()
def evaluate(model: nn.Module, inputs: Tensor, labels: Tensor, rows: int) -> tuple[float, float]:
    """Mean cross entropy and accuracy over all labels.

    Args:
        model: The classifier; left in training mode.
        inputs: ``[n, ...]``.
        labels: ``[n]`` for logits ``[n, classes]``; ``[n, length]`` for ``[n, length, classes]``.
        rows: Samples per forward pass.

    Returns:
        ``(loss, accuracy)``, accuracy in ``[0, 1]``.
    """
    model.eval()
    loss_sum = torch.zeros((), dtype=torch.float64, device=inputs.device)
    correct = torch.zeros((), dtype=torch.int64, device=inputs.device)
    chunks = zip(torch.split(inputs, rows), torch.split(labels, rows), strict=True)
    for samples, targets in chunks:
        logits = model(samples)
        loss_sum += F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum")
        correct += (logits.argmax(dim=-1) == targets).sum()
    model.train()
    return float(loss_sum) / labels.numel(), int(correct) / labels.numel()
