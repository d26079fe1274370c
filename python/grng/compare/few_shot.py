# SPDX-License-Identifier: Apache-2.0
"""Training sets of a few samples of each class."""

from __future__ import annotations

from dataclasses import replace

import torch

from grng.compare.errors import UsageError
from grng.tasks import ClassificationData


def first_of_each_class(data: ClassificationData, classes: int, count: int) -> ClassificationData:
    """The data with the first training samples of each class alone, in the order that they had.

    Args:
        data: Of a classification task; validation and test samples are left as they are.
        classes: How many there are.
        count: Samples of each.

    Returns:
        The data with ``classes * count`` training samples.

    Raises:
        UsageError: A class has fewer.
    """
    labels = data.train_labels
    there = torch.bincount(labels, minlength=classes)
    rarest = int(there.argmin())
    if there[rarest] < count:
        raise UsageError(
            f"--per-class must be at most the {int(there[rarest])} training samples of class {rarest}, "
            f"got {count}"
        )
    firsts = [torch.nonzero(labels == label).flatten()[:count] for label in range(classes)]
    kept = torch.cat(firsts).sort().values
    return replace(
        data,
        train_inputs=data.train_inputs[kept.to(data.train_inputs.device)],
        train_labels=labels[kept],
    )
