# SPDX-License-Identifier: Apache-2.0
"""Which samples a run trains on, in which order, and after which steps it is evaluated."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from grng.compare.config import CompareConfig
from grng.compare.errors import UsageError

# Evaluations of a stream, or of so many steps.
_DEFAULT_CHECKPOINTS = 10


@dataclass(frozen=True)
class Plan:
    """Passes over the training samples in batches, or one pass over some of them one by one.

    The last pass may be partial: it ends with the last of all steps.
    """

    samples: int
    samples_per_pass: int
    batch_size: int
    # Of the whole run.
    steps: int
    # Numbers of steps taken, in rising order; the last is that of all steps.
    checkpoints: tuple[int, ...]

    @property
    def steps_per_pass(self) -> int:
        """Steps of one pass."""
        return math.ceil(self.samples_per_pass / self.batch_size)

    def batches(self, seed: int) -> Iterator[tuple[Tensor, str]]:
        """The batches of a run.

        Args:
            seed: Of a generator that nothing else draws from: an optimizer that draws random
                numbers must not change the batches.

        Yields:
            ``(sample numbers, SHA-256 of the order so far)`` for each step.
        """
        yield from itertools.islice(self._endless_batches(seed), self.steps)

    def _endless_batches(self, seed: int) -> Iterator[tuple[Tensor, str]]:
        generator = torch.Generator().manual_seed(seed)
        digest = hashlib.sha256()
        while True:
            order = torch.randperm(self.samples, generator=generator)[: self.samples_per_pass]
            digest.update(order.numpy().tobytes())
            for index in torch.split(order, self.batch_size):
                yield index, digest.hexdigest()


def make_plan(config: CompareConfig, samples: int) -> Plan:
    """The plan of every run of a comparison.

    Args:
        config: Shared settings.
        samples: Training samples that there are.

    Returns:
        The plan.

    Raises:
        UsageError: The stream is longer than the training set.
    """
    if config.stream is not None:
        if config.stream > samples:
            raise UsageError(
                f"--stream must be at most the {samples} training samples of "
                f"{config.task!r}, got {config.stream}"
            )
        stops = _spread(config.stream, config.checkpoints or _DEFAULT_CHECKPOINTS)
        return Plan(samples, config.stream, 1, config.stream, stops)
    if config.steps is not None:
        stops = _spread(config.steps, config.checkpoints or _DEFAULT_CHECKPOINTS)
        return Plan(samples, samples, config.batch_size, config.steps, stops)
    steps = math.ceil(samples / config.batch_size)
    ends = _spread(config.epochs, config.checkpoints or config.epochs)
    stops = tuple(steps * epoch for epoch in ends)
    return Plan(samples, samples, config.batch_size, config.epochs * steps, stops)


def _spread(count: int, parts: int) -> tuple[int, ...]:
    """Ends of ``parts`` nearly equal parts of ``1..count``; fewer where there are not so many."""
    return tuple(sorted({max(1, round(count * part / parts)) for part in range(1, parts + 1)}))
