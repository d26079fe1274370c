# SPDX-License-Identifier: Apache-2.0
"""Making one run, whoever trains."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

import grng
from grng.compare.errors import UsageError
from grng.rl.compare.methods import Method
from grng.rl.compare.records import DIVERGED, FINISHED, RLRun
from grng.rl.environments import MakeEnvironment, Task, find_task, maker
from grng.rl.errors import EnvironmentUnavailable, RLError
from grng.rl.reports import Update
from grng.rl.trainer import ActorCritic


@dataclass(frozen=True)
class RLConfig:
    """What all runs of a comparison have in common."""

    task_name: str
    steps: int
    seeds: tuple[int, ...]
    checkpoints: int = 50
    hidden: tuple[int, ...] = (64, 64)
    evaluation_episodes: int = 100

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            UsageError: One is out of range.
        """
        for option, value in (
            ("--steps", self.steps),
            ("--checkpoints", self.checkpoints),
            ("--evaluation-episodes", self.evaluation_episodes),
        ):
            if value < 1:
                raise UsageError(f"{option} must be > 0, got {value}")
        if any(seed < 0 for seed in self.seeds) or len(set(self.seeds)) < len(self.seeds):
            raise UsageError(f"--seeds must be different numbers >= 0, got {self.seeds}")

    @property
    def task(self) -> Task:
        """The environment."""
        return find_task(self.task_name)

    @property
    def points(self) -> list[int]:
        """Steps at which curves are read."""
        return [self.steps * (i + 1) // self.checkpoints for i in range(self.checkpoints)]


def execute(method: Method, run: RLRun, config: RLConfig, tell: Callable[[], None]) -> None:
    """Train and evaluate, into ``run``; a failure of the numerics is recorded there.

    Args:
        method: What to train with.
        run: A new record.
        config: What is trained on, and how long.
        tell: Called now and then, when the curve has grown.

    Raises:
        EnvironmentUnavailable: A package is missing.
        UsageError: The method refuses an option.
    """
    episodes: list[tuple[int, float]] = []
    points, solved = config.points, config.task.solved
    begin = time.perf_counter()

    def grow(steps: int) -> None:
        known = sum(point <= steps for point in points)
        if known > len(run.curve_steps):
            run.read_curve(episodes, points[:known], solved)
            run.seconds = time.perf_counter() - begin
            tell()

    try:
        evaluate = _train(method, run.seed, config, episodes, grow)
    except (UsageError, EnvironmentUnavailable):
        raise
    except (grng.PreconditionerError, ValueError) as error:
        # A distribution of NaN is a ValueError of torch's.
        run.status, run.problem = DIVERGED, str(error).splitlines()[0]
        return
    run.read_curve(episodes, points, solved)
    run.seconds = time.perf_counter() - begin
    run.evaluation = [round(value, 4) for value in evaluate(config.evaluation_episodes)]
    run.status = FINISHED


def _train(
    method: Method,
    seed: int,
    config: RLConfig,
    episodes: list[tuple[int, float]],
    grow: Callable[[int], None],
) -> Callable[[int], list[float]]:
    make: MakeEnvironment = maker(config.task_name)
    if method.is_rival:
        from grng.rl.compare import rivals

        def tell(steps: int, returns: list[float]) -> None:
            episodes.extend((steps, value) for value in returns)
            grow(steps)

        return rivals.train(
            method,
            config.task,
            make,
            steps=config.steps,
            seed=seed,
            hidden=config.hidden,
            tell=tell,
        )
    try:
        agent = ActorCritic(config.task_name, seed=seed, hidden=config.hidden, **method.settings())
    except EnvironmentUnavailable:
        raise
    except RLError as error:
        raise UsageError(f"optimizer {method.label!r}: {error}") from error

    def report(update: Update) -> None:
        episodes.extend((step, value) for step, value, _ in update.episodes)
        grow(update.steps)

    torch.manual_seed(seed)
    agent.train(config.steps, report=report)
    agent.close()
    return agent.evaluate
