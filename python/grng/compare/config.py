# SPDX-License-Identifier: Apache-2.0
"""Settings shared by all runs of a comparison, checked before anything starts."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from grng.compare.errors import UsageError
from grng.tasks import TASKS
from grng_kernels import use_backend

_LARGEST_SEED = 2**63 - 1
# More only slows down, and thousands crash the thread library.
_THREADS_PER_CORE = 8


@dataclass(frozen=True)
class CompareConfig:
    """What every optimizer of one comparison has in common."""

    task: str
    epochs: int
    seeds: tuple[int, ...]
    batch_size: int
    hidden: tuple[int, ...]
    device: str
    threads: int | None
    warmup_fraction: float
    train_limit: int | None

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            UsageError: A value is outside its range, or the task is unknown.
        """
        if self.task not in TASKS:
            raise UsageError(f"unknown task {self.task!r}; valid tasks: {', '.join(TASKS)}")
        _at_least_one("--epochs", self.epochs)
        _at_least_one("--batch-size", self.batch_size)
        _at_least_one("--threads", self.threads)
        _at_least_one("--train-limit", self.train_limit)
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
        for size in self.hidden:
            _at_least_one("--hidden", size)
        if not 0.0 <= self.warmup_fraction < 1.0:
            raise UsageError(f"--warmup-fraction must be in [0, 1), got {self.warmup_fraction}")
        for seed in self.seeds:
            if not 0 <= seed <= _LARGEST_SEED:
                raise UsageError(f"--seeds must be in [0, 2**63), got {seed}")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise UsageError(f"--seeds must be different numbers, got {list(self.seeds)}")


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
