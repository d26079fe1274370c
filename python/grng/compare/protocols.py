# SPDX-License-Identifier: Apache-2.0
"""The four ways in which an optimizer takes part in a training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Protocol = Literal["backward", "observe-backward", "observe-loss", "observe-targets"]


def _mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def take_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    protocol: Protocol,
    inputs: Tensor,
    labels: Tensor,
    mark: Callable[[], None],
) -> tuple[Tensor, Tensor]:
    """One training step on the mean cross entropy.

    ``"backward"``: ``loss.backward()``, ``optimizer.step()``. ``"observe-backward"``: before that
    ``optimizer.observe(logits)``; ``"observe-loss"``: ``optimizer.observe(loss)``.
    ``"observe-targets"``, of Kalman optimizers: ``optimizer.observe(logits, labels)``,
    ``optimizer.step()``, and no backward pass of ours; the Jacobian that they take counts as time of
    the optimizer.

    Args:
        model: The classifier, in training mode.
        optimizer: Updates ``model``.
        protocol: Which of the four.
        inputs: ``[n, ...]``.
        labels: ``[n]`` for logits ``[n, classes]``; ``[n, length]`` for ``[n, length, classes]``.
        mark: Called five times: at the start, after forward, observe, backward and step.

    Returns:
        ``(loss, logits)`` from before the update, without a graph.
    """
    # Any: observe is not a method of torch's base class.
    observer: Any = optimizer
    mark()
    logits = model(inputs)
    if protocol == "observe-targets":
        mark()
        observer.observe(logits, labels)
        mark()
        mark()
        optimizer.step()
        mark()
        logits = logits.detach()
        return _mean_cross_entropy(logits, labels), logits
    loss = _mean_cross_entropy(logits, labels)
    mark()
    if protocol == "observe-backward":
        observer.observe(logits)
    elif protocol == "observe-loss":
        observer.observe(loss)
    mark()
    loss.backward()
    mark()
    optimizer.step()
    optimizer.zero_grad()
    mark()
    return loss.detach(), logits.detach()
