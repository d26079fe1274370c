# SPDX-License-Identifier: Apache-2.0
"""The five ways in which an optimizer takes part in a training step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Protocol = Literal[
    "backward", "observe-backward", "observe-own-backward", "observe-loss", "observe-targets"
]
# They differentiate twice, which fused attention cannot.
_TWICE = ("observe-own-backward", "observe-loss")


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
    ``optimizer.observe(logits)``; ``"observe-own-backward"``: that, and ``optimizer.backward(loss)``
    instead of ``loss.backward()``; ``"observe-loss"``: ``optimizer.observe(loss)``.
    ``"observe-targets"``, of Kalman optimizers: ``optimizer.observe(logits, labels)``,
    ``optimizer.step()``, and no backward pass of ours; the Jacobian that they take counts as time of
    the optimizer.

    Args:
        model: The classifier, in training mode.
        optimizer: Updates ``model``.
        protocol: Which of the five.
        inputs: ``[n, ...]``.
        labels: ``[n]`` for logits ``[n, classes]``; ``[n, length]`` for ``[n, length, classes]``.
        mark: Called five times: at the start, after forward, observe, backward and step.

    Returns:
        ``(loss, logits)`` from before the update, without a graph.
    """
    # Any: observe is not a method of torch's base class.
    observer: Any = optimizer
    mark()
    attention = sdpa_kernel(SDPBackend.MATH) if protocol in _TWICE else nullcontext()
    with attention:
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
    if protocol in ("observe-backward", "observe-own-backward"):
        observer.observe(logits)
    elif protocol == "observe-loss":
        observer.observe(loss)
    mark()
    if protocol == "observe-own-backward":
        observer.backward(loss)
    else:
        loss.backward()
    mark()
    optimizer.step()
    optimizer.zero_grad()
    mark()
    return loss.detach(), logits.detach()
