# SPDX-License-Identifier: Apache-2.0
"""Tasks on real data: what ``python -m grng compare --task NAME`` can train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from grng.tasks import authors, digits, fashion_mnist, minilm, plays
from grng.tasks.data import ClassificationData, DataError, LoadRequest, ModelOptions

__all__ = ["TASKS", "ClassificationData", "DataError", "LoadRequest", "ModelOptions", "Task"]


@dataclass(frozen=True)
class Task:
    """A data set together with the model that is trained on it."""

    title: str
    description: str
    classes: int
    load: Callable[[LoadRequest], ClassificationData]
    build_model: Callable[[ModelOptions], nn.Module]
    describe_model: Callable[[ModelOptions], str]
    # Which field of ModelOptions the model reads, with its default.
    option: tuple[str, tuple[int, ...] | int]
    # Training samples held out unless --validation says another number.
    validation: int
    # The same for --stream, which measures held-out accuracy on them.
    stream_validation: int
    # Samples per evaluation step: what fits into the caches and into memory.
    evaluation_rows: int = 2500


def _describe_mlp(options: ModelOptions) -> str:
    return "ReLU MLP, hidden " + "-".join(str(size) for size in options.hidden)


def _describe_minilm(options: ModelOptions) -> str:
    return minilm.describe(options.lora_rank)


TASKS: dict[str, Task] = {
    "fashion-mnist": Task(
        title="Fashion-MNIST",
        description="10-class images 28x28, 60,000 train / 10,000 test, ReLU MLP",
        classes=10,
        load=fashion_mnist.load,
        build_model=fashion_mnist.build_model,
        describe_model=_describe_mlp,
        option=("hidden", (256, 256)),
        validation=0,
        stream_validation=5000,
    ),
    "digits": Task(
        title="Digits",
        description="10-class images 8x8, 1,237 train / 200 validation / 360 test, ReLU MLP",
        classes=10,
        load=digits.load,
        build_model=digits.build_model,
        describe_model=_describe_mlp,
        option=("hidden", (64, 64)),
        validation=200,
        stream_validation=200,
    ),
    "authors": Task(
        title="Shakespeare or Milton",
        description="sentences of 2 authors, 2,894 train / 400 validation / 800 test, MiniLM + LoRA",
        classes=2,
        load=authors.load,
        build_model=authors.build_model,
        describe_model=_describe_minilm,
        option=("lora_rank", 8),
        validation=authors.VALIDATION,
        stream_validation=authors.VALIDATION,
        evaluation_rows=100,
    ),
    "plays": Task(
        title="Ten plays of Shakespeare",
        description="passages of 10 plays, 5,090 train / 500 validation / 1,000 test, MiniLM + LoRA",
        classes=10,
        load=plays.load,
        build_model=plays.build_model,
        describe_model=_describe_minilm,
        option=("lora_rank", 8),
        validation=plays.VALIDATION,
        stream_validation=plays.VALIDATION,
        evaluation_rows=100,
    ),
}
