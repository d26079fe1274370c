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

from grng.tasks.data import Likelihood

Protocol = Literal[
    "backward", "observe-backward", "observe-own-backward", "observe-loss", "observe-targets"
]
# They differentiate twice, which fused attention cannot.
_TWICE = ("observe-own-backward", "observe-loss")


def _mean_loss(outputs: Tensor, labels: Tensor, likelihood: Likelihood) -> Tensor:
    """Mean negative log likelihood; of a normal distribution of variance 1 without its constant."""
    if likelihood == "gaussian":
        return 0.5 * F.mse_loss(outputs, labels)
    return F.cross_entropy(outputs.flatten(0, -2), labels.flatten())


def take_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    protocol: Protocol,
    inputs: Tensor,
    labels: Tensor,
    mark: Callable[[], None],
    *,
    likelihood: Likelihood = "categorical",
) -> tuple[Tensor, Tensor]:
    """One training step on the mean cross entropy, or on half the mean squared error.

    ``"backward"``: ``loss.backward()``, ``optimizer.step()``. ``"observe-backward"``: before that
    ``optimizer.observe(logits)``; ``"observe-own-backward"``: that, and ``optimizer.backward(loss)``
    instead of ``loss.backward()``; ``"observe-loss"``: ``optimizer.observe(loss)``.
    ``"observe-targets"``, of Kalman optimizers: ``optimizer.observe(logits, labels)``,
    ``optimizer.step()``, and no backward pass of ours; the Jacobian that they take counts as time of
    the optimizer.

    Args:
        model: In training mode.
        optimizer: Updates ``model``.
        protocol: Which of the five.
        inputs: ``[n, ...]``.
        labels: ``[n]`` for logits ``[n, classes]``; ``[n, length]`` for ``[n, length, classes]``;
            numbers ``[n]`` for outputs ``[n, 1]``.
        mark: Called five times: at the start, after forward, observe, backward and step.
        likelihood: ``"gaussian"`` for numbers. Kalman optimizers must have been made with it.

    Returns:
        ``(loss, logits)`` from before the update, without a graph.
    """
    if likelihood == "gaussian":
        labels = labels.unsqueeze(-1)  # as the outputs
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
        return _mean_loss(logits, labels, likelihood), logits
    loss = _mean_loss(logits, labels, likelihood)
    mark()
    if protocol in ("observe-backward", "observe-own-backward"):
        observer.observe(logits, likelihood=likelihood)
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
