# SPDX-License-Identifier: Apache-2.0
"""Tasks on real data: what ``python -m grng compare --task NAME`` can train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from grng.tasks import fashion_mnist
from grng.tasks.data import ClassificationData, DataError, LoadRequest

__all__ = ["TASKS", "ClassificationData", "DataError", "LoadRequest", "Task"]


@dataclass(frozen=True)
class Task:
    """A data set together with the model that is trained on it."""

    title: str
    description: str
    load: Callable[[LoadRequest], ClassificationData]
    build_model: Callable[[Sequence[int]], nn.Module]


TASKS: dict[str, Task] = {
    "fashion-mnist": Task(
        title="Fashion-MNIST",
        description="10-class images 28x28, 60,000 train / 10,000 test, ReLU MLP",
        load=fashion_mnist.load,
        build_model=fashion_mnist.build_model,
    ),
}
