# SPDX-License-Identifier: Apache-2.0
"""Losses whose output gradients have the Fisher information as their second moment."""

import torch
import torch.nn.functional as F
from torch import Tensor

LIKELIHOODS = ("categorical", "gaussian")


def sampled_loss(outputs: Tensor, likelihood: str, generator: torch.Generator) -> Tensor:
    """Return ``Σ −log p(ŷ|outputs)`` with ``ŷ`` drawn from the model itself: the true Fisher, by sampling.

    Summed over the loss terms, so that each row of a gradient belongs to one term, unscaled.

    Args:
        outputs: ``"categorical"``: logits ``[..., C]``, one loss term per leading index.
            ``"gaussian"``: means ``[..., C]`` of unit-variance normals.
        likelihood: One of LIKELIHOODS.
        generator: Source of the samples, on the device of ``outputs``.

    Raises:
        ValueError: Unknown likelihood.
    """
    if likelihood not in LIKELIHOODS:
        raise ValueError(
            f"observe: likelihood must be one of {', '.join(LIKELIHOODS)}, got {likelihood!r}"
        )
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
