# SPDX-License-Identifier: Apache-2.0
"""What a trained model is measured by: its gradient, its curvature, its predictions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def mean_loss(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy, with its graph."""
    return F.cross_entropy(model(inputs).flatten(0, -2), labels.flatten())


def gradient_norm(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Euclidean norm of the gradient of the mean loss; ``grad`` of the parameters is left alone."""
    grads = torch.autograd.grad(mean_loss(model, inputs, labels), trained(model))
    return math.sqrt(sum(float(grad.square().sum()) for grad in grads))


def hessian(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    seed: int,
    *,
    iterations: int = 30,
    probes: int = 20,
) -> tuple[float, float]:
    """Largest eigenvalue and trace of the Hessian of the mean loss.

    By power iteration and by Hutchinson's estimate (1989) with random signs.

    Args:
        model: With a loss that can be differentiated twice.
        inputs: Samples.
        labels: Their classes.
        seed: Of the vectors that are drawn.
        iterations: Of the power iteration.
        probes: Of the estimate of the trace.

    Returns:
        ``(eigenvalue, trace)``; the eigenvalue is the one that is largest in size.
    """
    parameters = trained(model)
    generator = torch.Generator().manual_seed(seed)
    grads = torch.autograd.grad(mean_loss(model, inputs, labels), parameters, create_graph=True)

    def product(vectors: list[Tensor]) -> list[Tensor]:
        return list(torch.autograd.grad(grads, parameters, vectors, retain_graph=True))

    def dot(a: list[Tensor], b: list[Tensor]) -> float:
        return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))

    vectors = [torch.randn(p.shape, generator=generator) for p in parameters]
    eigenvalue = 0.0
    for _ in range(iterations):
        size = math.sqrt(dot(vectors, vectors))
        vectors = [v / size for v in vectors]
        image = product(vectors)
        eigenvalue = dot(vectors, image)
        vectors = image
    traces = []
    for _ in range(probes):
        signs = [
            torch.randint(0, 2, p.shape, generator=generator).to(p) * 2 - 1 for p in parameters
        ]
        traces.append(dot(signs, product(signs)))
    return eigenvalue, sum(traces) / len(traces)
