# SPDX-License-Identifier: Apache-2.0
"""Settings shared by all runs of a comparison, checked before anything starts."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from grng.compare.errors import UsageError
from grng.compare.measures import MEASURES, Measure
from grng.compare.summary import DEFAULT_REFERENCE
from grng.rl.environments import TASKS as ENVIRONMENTS
from grng.tasks import TASKS, Model, ModelOptions, Task
from grng_kernels import use_backend

SCHEDULES = ("cosine", "constant")
_LARGEST_SEED = 2**63 - 1
# More only slows down, and thousands crash the thread library.
_THREADS_PER_CORE = 8


@dataclass(frozen=True)
class CompareConfig:
    """What every optimizer of one comparison has in common."""

    task: str
    # Passes over the training samples; of no effect with a stream or a number of steps.
    epochs: int
    seeds: tuple[int, ...]
    batch_size: int
    # None: the task's own.
    hidden: tuple[int, ...] | None
    device: str
    threads: int | None
    warmup_fraction: float
    train_limit: int | None
    lora_rank: int | None = None
    # Samples of a stream: batch 1, one pass; None trains in epochs.
    stream: int | None = None
    # Held-out training samples; None is the task's own number.
    validation: int | None = None
    checkpoints: int | None = None
    schedule: str | None = None
    # None: the task's default.
    model: str | None = None
    # Steps of a run, in place of epochs.
    steps: int | None = None
    # Whose final values are to be reached.
    reference: str = DEFAULT_REFERENCE
    # Folder of the data files; None is the cache folder.
    data_dir: Path | None = None
    # Training samples of each class; None for all.
    per_class: int | None = None

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            UsageError: A value is outside its range, or the task is unknown.
        """
        if self.task not in TASKS:
            valid = ", ".join((*TASKS, *ENVIRONMENTS))
            raise UsageError(f"unknown task {self.task!r}; valid tasks: {valid}")
        self._check_model()
        _at_least_one("--epochs", self.epochs)
        _at_least_one("--batch-size", self.batch_size)
        _at_least_one("--threads", self.threads)
        _at_least_one("--train-limit", self.train_limit)
        _at_least_one("--per-class", self.per_class)
        _at_least_one("--stream", self.stream)
        _at_least_one("--steps", self.steps)
        _at_least_one("--checkpoints", self.checkpoints)
        most = _THREADS_PER_CORE * (os.cpu_count() or 1)
        if self.threads is not None and self.threads > most:
            raise UsageError(
                f"--threads must be at most {most} on this machine, got {self.threads}"
            )
        try:
            with use_backend(os.environ.get("GRNG_BACKEND", "auto")):
                pass
        except ValueError as error:
            raise UsageError(f"GRNG_BACKEND: {error}") from error
        if not 0.0 <= self.warmup_fraction < 1.0:
            raise UsageError(f"--warmup-fraction must be in [0, 1), got {self.warmup_fraction}")
        if self.schedule is not None and self.schedule not in SCHEDULES:
            valid = ", ".join(SCHEDULES)
            raise UsageError(f"--schedule must be one of {valid}, got {self.schedule!r}")
        self._check_samples()
        self._check_per_class()
        for seed in self.seeds:
            if not 0 <= seed <= _LARGEST_SEED:
                raise UsageError(f"--seeds must be in [0, 2**63), got {seed}")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise UsageError(f"--seeds must be different numbers, got {list(self.seeds)}")

    def _check_model(self) -> None:
        if self.model_name not in self.task_entry.models:
            valid = ", ".join(self.task_entry.models)
            raise UsageError(
                f"--model of task {self.task!r} must be one of {valid}, got {self.model!r}"
            )
        for size in self.hidden or ():
            _at_least_one("--hidden", size)
        _at_least_one("--lora-rank", self.lora_rank)
        self._check_model_option("hidden", self.hidden)
        self._check_model_option("lora_rank", self.lora_rank)

    def _check_model_option(self, name: str, value: object) -> None:
        option = self.model_entry.option
        if value is None or (option is not None and option[0] == name):
            return
        where, its = f"task {self.task!r}", "whose model has"
        if len(self.task_entry.models) > 1:
            where, its = f"model {self.model_name!r} of {where}", "which has"
        has = "no such option" if option is None else _as_option(option[0])
        raise UsageError(f"{_as_option(name)} does not apply to {where}, {its} {has}")

    def _check_samples(self) -> None:
        least = 0 if self.stream is None else 1
        if self.validation is not None and self.validation < least:
            where = " with --stream" if self.stream is not None else ""
            raise UsageError(f"--validation must be at least {least}{where}, got {self.validation}")
        if self.stream is not None and self.steps is not None:
            raise UsageError("--steps does not go with --stream: one pass with batch 1")
        unit = self.task_entry.unit
        if self.stream is not None and unit != "sample":
            raise UsageError(
                f"--stream does not apply to task {self.task!r}: it has one label per {unit}"
            )
        if self.stream is not None and self.task_entry.likelihood != "categorical":
            raise UsageError(
                f"--stream does not apply to task {self.task!r}: it predicts a number, of which none "
                "is right or wrong"
            )
        most, of = self.epochs, "epochs"
        if self.stream is not None:
            most, of = self.stream, "samples of the stream"
        elif self.steps is not None:
            most, of = self.steps, "steps"
        if self.checkpoints and self.checkpoints > most:
            raise UsageError(
                f"--checkpoints must be at most the {most} {of}, got {self.checkpoints}"
            )

    def _check_per_class(self) -> None:
        if self.per_class is None:
            return
        if self.train_limit is not None:
            raise UsageError("--per-class does not go with --train-limit: give one of them")
        task, why = self.task_entry, None
        if task.likelihood != "categorical":
            why = "it predicts numbers, not classes"
        elif task.unit != "sample":
            why = f"it has one label per {task.unit}"
        if why is not None:
            raise UsageError(f"--per-class does not apply to task {self.task!r}: {why}")

    @property
    def task_entry(self) -> Task:
        """The task."""
        return TASKS[self.task]

    @property
    def measure(self) -> Measure:
        """The figure on held-out data that the optimizers are compared by."""
        return MEASURES[self.task_entry.measure]

    @property
    def counts(self) -> Literal["epoch", "step", "sample"]:
        """What the length of the runs is given in."""
        if self.stream is not None:
            return "sample"
        return "epoch" if self.steps is None else "step"

    @property
    def model_name(self) -> str:
        """Name of the model among those of the task."""
        return self.task_entry.default_model if self.model is None else self.model

    @property
    def model_entry(self) -> Model:
        """The model."""
        return self.task_entry.models[self.model_name]

    @property
    def model_options(self) -> ModelOptions:
        """Options of the model; where none were given, those of the task."""
        option = self.model_entry.option
        if option is None:
            return ModelOptions(data_dir=self.data_dir)
        name, default = option
        given = getattr(self, name)
        chosen = {name: default if given is None else given}
        return ModelOptions(data_dir=self.data_dir, **chosen)  # type: ignore[arg-type]

    @property
    def held_out(self) -> int:
        """Number of validation samples."""
        if self.validation is not None:
            return self.validation
        task = self.task_entry
        return task.validation if self.stream is None else task.stream_validation

    @property
    def schedule_name(self) -> str:
        """Cosine for epochs; constant for a stream, whose end an optimizer could not know."""
        return self.schedule or ("cosine" if self.stream is None else "constant")


def _as_option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _at_least_one(option: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise UsageError(f"{option} must be at least 1, got {value}")


def resolve_device(name: str) -> torch.device:
    """The device that ``auto``, ``cpu`` or ``cuda`` stands for here.

    Args:
        name: ``"auto"``, ``"cpu"`` or ``"cuda"``.

    Returns:
        The device.

    Raises:
        UsageError: CUDA was asked for and there is none.
    """
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise UsageError("--device cuda: torch sees no CUDA device here; use --device cpu or auto")
    return torch.device("cuda" if has_cuda and name != "cpu" else "cpu")
