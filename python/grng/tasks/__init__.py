# SPDX-License-Identifier: Apache-2.0
"""Tasks on real data: what ``python -m grng compare --task NAME`` can train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import nn

from grng.tasks import (
    authors,
    digits,
    fashion_mnist,
    glue,
    images,
    minilm,
    plays,
    shakespeare_char,
)
from grng.tasks.data import (
    ClassificationData,
    DataError,
    Likelihood,
    LoadRequest,
    ModelOptions,
)

__all__ = [
    "TASKS",
    "ClassificationData",
    "DataError",
    "LoadRequest",
    "Model",
    "ModelOptions",
    "Task",
]


@dataclass(frozen=True)
class Model:
    """A model that can be trained on a task."""

    build: Callable[[ModelOptions], nn.Module]
    describe: Callable[[ModelOptions], str]
    # Which field of ModelOptions the model reads, with its default; None reads none.
    option: tuple[str, tuple[int, ...] | int] | None = None
    # Samples per evaluation step: what fits into the caches and into memory.
    evaluation_rows: int = 2500


@dataclass(frozen=True)
class Task:
    """A data set together with the models that can be trained on it."""

    title: str
    description: str
    # Outputs of the model; of numbers 1.
    classes: int
    load: Callable[[LoadRequest], ClassificationData]
    # By the name that --model takes; the first is the default.
    models: dict[str, Model]
    # Training samples held out unless --validation says another number.
    validation: int
    # The same for --stream, which measures held-out accuracy on them.
    stream_validation: int
    # What is predicted: one label of each, and losses and accuracies are means over all of them.
    unit: Literal["sample", "character"] = "sample"
    # The figure on held-out data by which optimizers are compared and their settings chosen.
    measure: Literal["accuracy", "loss", "matthews", "pearson"] = "accuracy"
    # Whether labels are classes or numbers.
    likelihood: Likelihood = "categorical"

    @property
    def default_model(self) -> str:
        """Name of the model that is trained unless another is asked for."""
        return next(iter(self.models))


def _mlp(build: Callable[[ModelOptions], nn.Module], hidden: tuple[int, ...]) -> Model:
    def describe(options: ModelOptions) -> str:
        return "ReLU MLP, hidden " + "-".join(str(size) for size in options.hidden)

    return Model(build, describe, option=("hidden", hidden))


def _minilm(classes: int) -> dict[str, Model]:
    def with_lora(options: ModelOptions) -> nn.Module:
        return minilm.build_model(options.lora_rank, classes)

    def describe(options: ModelOptions) -> str:
        return minilm.describe(options.lora_rank)

    def whole(*, is_pretrained: bool) -> Model:
        def build(options: ModelOptions) -> nn.Module:
            del options
            return minilm.build_whole(classes, is_pretrained=is_pretrained)

        def describe(options: ModelOptions) -> str:
            del options
            return minilm.describe_whole(is_pretrained=is_pretrained)

        return Model(build, describe, evaluation_rows=100)

    return {
        "minilm": Model(with_lora, describe, option=("lora_rank", 8), evaluation_rows=100),
        "minilm-full": whole(is_pretrained=True),
        "minilm-scratch": whole(is_pretrained=False),
    }


def _images(task: images.ImageSet, title: str, train: int, test: int, validation: int) -> Task:
    build = partial(images.build_model, task=task)
    return Task(
        title=title,
        description=f"{task.classes}-class images {task.side}x{task.side}, {train - validation:,} train / "
        f"{validation:,} validation / {test:,} test, ViT-B/16 + LoRA",
        classes=task.classes,
        load=partial(images.load, task=task),
        models={
            "vit-b16": Model(build, images.describe, option=("lora_rank", 8), evaluation_rows=100)
        },
        validation=validation,
        stream_validation=validation,
    )


def _glue(
    task: glue.Glue,
    title: str,
    train: int,
    test: int,
    validation: int,
    measure: Literal["accuracy", "matthews", "pearson"] = "accuracy",
) -> Task:
    build = partial(glue.build_model, task=task)
    what = "numbers" if task.classes is None else f"{task.classes} classes"
    samples = "sentences" if len(task.texts) == 1 else "pairs of sentences"
    return Task(
        title=title,
        description=f"{samples}, {what}, {train - validation:,} train / {validation:,} validation / "
        f"{test:,} test, RoBERTa-base + LoRA",
        classes=task.outputs,
        load=partial(glue.load, task=task),
        models={
            "roberta": Model(build, glue.describe, option=("lora_rank", 8), evaluation_rows=100)
        },
        validation=validation,
        stream_validation=validation,
        measure=measure,
        likelihood="gaussian" if task.classes is None else "categorical",
    )


def _describe_resnet(options: ModelOptions) -> str:
    del options
    return "ResNet, blocks of width 16-32-64"


def _describe_vit(options: ModelOptions) -> str:
    del options
    return "ViT, patch 4, width 64, depth 4, 4 heads"


def _describe_char_transformer(options: ModelOptions) -> str:
    del options
    return "transformer, context 64, width 128, depth 4, 4 heads"


TASKS: dict[str, Task] = {
    "fashion-mnist": Task(
        title="Fashion-MNIST",
        description="10-class images 28x28, 60,000 train / 10,000 test, MLP, ResNet or ViT",
        classes=10,
        load=fashion_mnist.load,
        models={
            "mlp": _mlp(fashion_mnist.build_mlp_model, hidden=(256, 256)),
            "resnet": Model(fashion_mnist.build_resnet, _describe_resnet, evaluation_rows=250),
            "vit": Model(fashion_mnist.build_vit, _describe_vit, evaluation_rows=250),
        },
        validation=0,
        stream_validation=5000,
    ),
    "digits": Task(
        title="Digits",
        description="10-class images 8x8, 1,237 train / 200 validation / 360 test, ReLU MLP",
        classes=10,
        load=digits.load,
        models={"mlp": _mlp(digits.build_model, hidden=(64, 64))},
        validation=200,
        stream_validation=200,
    ),
    "authors": Task(
        title="Shakespeare or Milton",
        description="sentences of 2 authors, 2,894 train / 400 validation / 800 test, MiniLM",
        classes=2,
        load=authors.load,
        models=_minilm(classes=2),
        validation=authors.VALIDATION,
        stream_validation=authors.VALIDATION,
    ),
    "plays": Task(
        title="Ten plays of Shakespeare",
        description="passages of 10 plays, 5,090 train / 500 validation / 1,000 test, MiniLM",
        classes=10,
        load=plays.load,
        models=_minilm(classes=10),
        validation=plays.VALIDATION,
        stream_validation=plays.VALIDATION,
    ),
    "shakespeare-char": Task(
        title="Shakespeare by characters",
        description="next character in 10 plays, 16,418 train / 1,000 validation / 2,000 test "
        "windows of 64, transformer",
        classes=len(shakespeare_char.ALPHABET),
        load=shakespeare_char.load,
        models={
            "transformer": Model(
                shakespeare_char.build_model, _describe_char_transformer, evaluation_rows=100
            )
        },
        validation=shakespeare_char.VALIDATION,
        stream_validation=shakespeare_char.VALIDATION,
        unit="character",
        measure="loss",
    ),
    # The tasks of the papers: read from --data-dir or the Hugging Face hub.
    "cifar10": _images(images.CIFAR10, "CIFAR-10", 50_000, 10_000, 5000),
    "cifar100": _images(images.CIFAR100, "CIFAR-100", 50_000, 10_000, 5000),
    "food101": _images(images.FOOD101, "Food-101", 75_750, 25_250, 5000),
    "oxford-pet": _images(images.OXFORD_PET, "Oxford-IIIT Pet", 3680, 3669, 400),
    "mnli": _glue(glue.MNLI, "MNLI (matched)", 392_702, 9815, 5000),
    "qnli": _glue(glue.QNLI, "QNLI", 104_743, 5463, 2000),
    "sst2": _glue(glue.SST2, "SST-2", 67_349, 872, 1000),
    "cola": _glue(glue.COLA, "CoLA", 8551, 1043, 800, "matthews"),
    "mrpc": _glue(glue.MRPC, "MRPC", 3668, 408, 400),
    "stsb": _glue(glue.STSB, "STS-B", 5749, 1500, 500, "pearson"),
}
