# SPDX-License-Identifier: Apache-2.0
"""One training run of a study: the tasks, weights, batches, schedule and loop of ``grng compare``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grng.compare.config import CompareConfig
from grng.compare.few_shot import first_of_each_class
from grng.compare.optimizers import parse_spec
from grng.compare.records import RunRecord
from grng.compare.runs import build_model
from grng.compare.training import Trainer
from grng.tasks import ClassificationData, LoadRequest

_SHARED: dict[str, Any] = dict(
    epochs=1,
    seeds=(0,),
    hidden=None,
    device="cpu",
    threads=None,
    warmup_fraction=0.05,
    train_limit=None,
)
_QUICK_TEST = 200
_QUICK = dict(steps=3, train_limit=200, validation=50, checkpoints=1)


def settings(*, is_quick: bool = False, **options: Any) -> CompareConfig:
    """The settings of a run.

    Args:
        is_quick: Three steps on 200 samples.
        **options: Of ``CompareConfig``; ``task``, ``batch_size`` and ``steps`` at least.

    Returns:
        The settings.
    """
    chosen = {**_SHARED, **options, **(_QUICK if is_quick else {})}
    return CompareConfig(**chosen)


def fashion_mnist(
    model: str, batch_size: int, steps: int, *, is_quick: bool, **options: Any
) -> CompareConfig:
    """The settings of a run on Fashion-MNIST that is looked at when it ends.

    Args:
        model: ``"mlp"``, ``"resnet"`` or ``"vit"``.
        batch_size: Samples of a step.
        steps: How many, with a whole schedule.
        is_quick: As for :func:`settings`.
        **options: Others of ``CompareConfig``.

    Returns:
        The settings, with 5,000 held-out samples.
    """
    return settings(
        is_quick=is_quick,
        task="fashion-mnist",
        model=model,
        batch_size=batch_size,
        steps=steps,
        validation=5000,
        checkpoints=1,
        **options,
    )


def about(config: CompareConfig) -> dict[str, Any]:
    """The settings that are kept beside a study."""
    return {
        "task": config.task,
        "model": config.model_entry.describe(config.model_options),
        "batch_size": config.batch_size,
        "steps": config.steps,
        "warmup_fraction": config.warmup_fraction,
        "schedule": config.schedule_name,
        "train_limit": config.train_limit,
        "per_class": config.per_class,
        "validation": config.held_out,
    }


@functools.lru_cache(maxsize=4)
def _data(
    task: str, train_limit: int | None, validation: int, data_dir: Path | None
) -> ClassificationData:
    from grng.tasks import TASKS

    request = LoadRequest(
        torch.device("cpu"), data_dir, train_limit=train_limit, validation=validation
    )
    return TASKS[task].load(request)


def data_of(
    config: CompareConfig, data_dir: Path | None, *, is_quick: bool = False
) -> ClassificationData:
    """The data of the settings, read once.

    Args:
        config: Task and numbers of samples.
        data_dir: Where it is looked for.
        is_quick: With 200 test samples only.

    Returns:
        The data.
    """
    data = _data(config.task, config.train_limit, config.held_out, data_dir)
    if config.per_class is not None:
        data = first_of_each_class(data, config.task_entry.classes, config.per_class)
    if not is_quick:
        return data
    few = slice(_QUICK_TEST)
    return replace(data, test_inputs=data.test_inputs[few], test_labels=data.test_labels[few])


def copied(model: nn.Module, config: CompareConfig) -> nn.Module:
    """A model of the same weights and buffers, for evaluation, that no optimizer knows.

    What is differentiated on the model itself between two steps, an optimizer with hooks would take for a
    part of the next one.
    """
    device = next(model.parameters()).device
    twin = build_model(config, config.seeds[0], device)
    twin.load_state_dict(model.state_dict())
    return twin.eval()


@dataclass
class Trained:
    """A model after its last step, and the record of the run."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    record: RunRecord

    @property
    def ms_per_step(self) -> float:
        """Mean of a whole step: forward, backward, observe, optimizer."""
        return self.record.ms_per_step.total


def train(
    label: str,
    config: CompareConfig,
    seed: int,
    data: ClassificationData,
    *,
    watch: Callable[[int, nn.Module], None] | None = None,
) -> Trained:
    """Train from the weights of a seed.

    Args:
        label: The optimizer, written as ``--optimizers`` takes it.
        config: Task, model and length.
        seed: Of weights and batches.
        data: The samples.
        watch: Called after each step with the number of steps taken and the model, which must not be
            differentiated there: :func:`copied` may be.

    Returns:
        The model and what was recorded.

    Raises:
        ArithmeticError: Loss or weights stopped being finite (``NonFiniteError``).
        RuntimeError: torch's or an optimizer's own, for the same reason.
    """
    spec = parse_spec(label).for_likelihood(config.task_entry.likelihood)
    config = replace(config, seeds=(seed,))
    model = build_model(config, seed, data.device)
    optimizer = spec.build(model)
    record = RunRecord(label, seed)
    trainer = Trainer(record, model, optimizer, data, config, protocol=spec.entry.protocol)
    steps = 0

    def on_step() -> None:
        nonlocal steps
        steps += 1
        if watch is not None:
            watch(steps, model)

    trainer.train(on_step, lambda: None)
    return Trained(model, optimizer, record)
