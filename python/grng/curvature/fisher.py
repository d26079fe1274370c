# SPDX-License-Identifier: Apache-2.0
"""Losses whose output gradients have the Fisher information as their second moment."""

import torch
import torch.nn.functional as F
from torch import Tensor

LIKELIHOODS = ("categorical", "gaussian")
FISHERS = ("sampled", "exact", "empirical")
# The exact Fisher takes a backward pass for each class.
MOST_CLASSES = 100


def check_outputs(outputs: Tensor, likelihood: str) -> None:
    """Check what a model is said to have returned.

    Raises:
        TypeError: Not a tensor, or not of floating point.
        ValueError: Unknown likelihood; a scalar, or fewer than two classes.
    """
    if likelihood not in LIKELIHOODS:
        raise ValueError(
            f"observe: likelihood must be one of {', '.join(LIKELIHOODS)}, got {likelihood!r}"
        )
    if not isinstance(outputs, Tensor):
        raise TypeError(f"observe: outputs must be a tensor, got {type(outputs).__name__}")
    if not outputs.is_floating_point():
        raise TypeError(f"observe: outputs must be of a floating-point dtype, got {outputs.dtype}")
    least = 2 if likelihood == "categorical" else 1
    if outputs.dim() == 0 or outputs.shape[-1] < least:
        raise ValueError(
            f"observe: outputs must have shape [..., C] with C >= {least}, got {list(outputs.shape)}"
        )


def loss_terms(outputs: Tensor) -> int:
    """Return the number of terms that a mean loss of these outputs ``[..., C]`` averages."""
    return outputs.shape[:-1].numel() if outputs.dim() > 1 else 1


def sampled_loss(outputs: Tensor, likelihood: str, generator: torch.Generator) -> Tensor:
    """Return ``Σ −log p(ŷ|outputs)`` with ``ŷ`` drawn from the model itself: the true Fisher, by sampling.

    Summed over the loss terms, so that each row of a gradient belongs to one term, unscaled.

    Args:
        outputs: ``"categorical"``: logits ``[..., C]``, one loss term per leading index.
            ``"gaussian"``: means ``[..., C]`` of unit-variance normals.
        likelihood: One of LIKELIHOODS.
        generator: Source of the samples, on the device of ``outputs``.

    Raises:
        TypeError: See :func:`check_outputs`.
        ValueError: See :func:`check_outputs`.
    """
    check_outputs(outputs, likelihood)
    if outputs.dtype != torch.float64:
        outputs = outputs.float()
    if likelihood == "gaussian":
        # −log p of ŷ = outputs + noise has the gradient −noise.
        noise = torch.randn(
            outputs.shape, generator=generator, device=outputs.device, dtype=outputs.dtype
        )
        return -(outputs * noise).sum()
    logits = outputs.reshape(-1, outputs.shape[-1])
    probabilities = logits.detach().float().softmax(-1)
    # multinomial refuses NaN. Any label will do: the gradients are NaN too, and that is what is counted.
    finite = torch.isfinite(probabilities).all(-1, keepdim=True)
    probabilities = torch.where(finite, probabilities, 1 / outputs.shape[-1])
    labels = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
    return F.cross_entropy(logits, labels, reduction="sum")


def exact_losses(outputs: Tensor, likelihood: str, generator: torch.Generator) -> list[Tensor]:
    """Return one loss for each class, whose output gradients together have the Fisher as second moment.

    That of class ``c`` has the gradient ``√p_c (p − e_c)`` by the logits of a term, the ``c``-th column of a
    root of ``diag(p) − p pᵀ``; by means, the ``c``-th unit vector. Each term has a random sign: where several
    meet in one row of a gradient, as where attention mixes the positions of an example, their products with
    each other vanish only on average.

    Args:
        outputs: As for :func:`sampled_loss`.
        likelihood: One of LIKELIHOODS.
        generator: Source of the signs, on the device of ``outputs``.

    Raises:
        TypeError: See :func:`check_outputs`.
        ValueError: See :func:`check_outputs`; or more than 100 classes.
    """
    check_outputs(outputs, likelihood)
    classes = outputs.shape[-1]
    if classes > MOST_CLASSES:
        raise ValueError(
            f'observe: fisher="exact" takes a backward pass for each of at most {MOST_CLASSES} classes, '
            f"got {classes}"
        )
    if outputs.dtype != torch.float64:
        outputs = outputs.float()
    signs = torch.randint(
        0, 2, outputs.shape[:-1], generator=generator, device=outputs.device, dtype=outputs.dtype
    )
    signs = 2 * signs - 1
    if likelihood == "gaussian":
        return [(signs * outputs[..., c]).sum() for c in range(classes)]
    log_p = outputs.log_softmax(-1)
    roots = log_p.detach().mul(0.5).exp() * signs[..., None]
    return [-(roots[..., c] * log_p[..., c]).sum() for c in range(classes)]
