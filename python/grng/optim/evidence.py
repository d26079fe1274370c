# SPDX-License-Identifier: Apache-2.0
"""How far a filter may move on one sample, by how well it predicted the samples before.

The step of one sample changes what is predicted for others. Where classes are told apart soon, a long step
is right; where a sample says little of the next, as in a hard task of many classes, steps of that length undo
each other, and the variances shrink meanwhile. What tells the two apart on the tasks of the README is whether
the predictions, each made before its sample was learned from, beat the uniform distribution. That a class is
frequent, or that samples come sorted by class, counts as evidence too.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Chosen on single samples of digits, Fashion-MNIST, the authors' sentences and ten plays; see the README.
LONGEST = 1.0  # largest KL divergence of a step in nats, of all its samples together
SHORTEST = 0.03  # the same without evidence, for each of its samples
_ENOUGH = 3.0  # evidence from which on steps are as long as they may be
_EXPECTED = 0.1  # part of log C by which a sample has to beat the uniform distribution
_WORST = -1.0  # one sample that was sure of a wrong class counts no more than this


def of_predictions(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return what logits ``[N, C]``, made before the classes ``[N]`` were seen, add to the evidence.

    The sum over the samples of ``max(−1, 1 + log q_y / log C) − 0.1``; fp64, 0-d: 0.9 for each sample at
    most, −0.1 for the uniform distribution.
    """
    loss = F.cross_entropy(outputs.detach().double(), targets, reduction="none")
    return ((1 - loss / math.log(outputs.shape[1])).clamp(min=_WORST) - _EXPECTED).sum()


def grown(evidence: Tensor, more: Tensor) -> Tensor:
    """Return the evidence with more of it, in [0, 3].

    The cumulative sum of Page 1954, "Continuous Inspection Schemes", capped: so much is lost soon, too.
    """
    return (evidence + more).clamp(0.0, _ENOUGH)


def largest_divergence(evidence: Tensor, samples: int) -> Tensor:
    """Return the largest KL divergence of a step from that many samples.

    From 0.03 nats for each of them without evidence to 1 for all with 3 of it; 1 from 34 samples on.
    """
    least = min(1.0, samples * SHORTEST / LONGEST)
    return LONGEST * (evidence / _ENOUGH).clamp(least, 1.0)


def none_yet(device: torch.device) -> Tensor:
    """Return the evidence before the first sample."""
    return torch.zeros((), dtype=torch.float64, device=device)
