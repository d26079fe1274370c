# SPDX-License-Identifier: Apache-2.0
"""Making one run, whoever trains."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import grng
from grng.compare.errors import UsageError
from grng.rl.compare.methods import Method
from grng.rl.compare.records import DIVERGED, FINISHED, RLRun
from grng.rl.environments import MakeEnvironment, Task, find_task, first_line, maker
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
            ("evaluation_episodes", self.evaluation_episodes),
        ):
            if value < 1:
                raise UsageError(f"{option} must be > 0, got {value}")
        if any(seed < 0 for seed in self.seeds) or len(set(self.seeds)) < len(self.seeds):
            raise UsageError(f"--seeds must be different numbers >= 0, got {self.seeds}")
        if any(size < 1 for size in self.hidden):
            raise UsageError(f"--hidden must be numbers > 0, got {self.hidden}")

    @property
    def task(self) -> Task:
        """The environment."""
        return find_task(self.task_name)

    @property
    def points(self) -> list[int]:
        """Steps at which curves are read."""
        return [self.steps * (i + 1) // self.checkpoints for i in range(self.checkpoints)]


def check(methods: list[Method], config: RLConfig) -> None:
    """Make everything once that a run is made of, so that no run is wasted before a wrong option.

    Raises:
        UsageError: A method refuses an option.
        EnvironmentUnavailable: A package is missing.
    """
    for method in methods:
        if method.is_rival:
            from grng.rl.compare import rivals

            make = maker(config.task_name)
            rivals.build(method, config.task, make, seed=0, hidden=config.hidden)[1].close()
        else:
            _agent(method, config.seeds[0], config).close()


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
        Exception: Of ours, and no failure of the numerics: a defect. One of a rival is recorded.
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
        run.read_curve(episodes, points, solved)
        run.seconds = time.perf_counter() - begin
        found = [round(value, 4) for value in evaluate(config.evaluation_episodes)]
        _check_finite(found, "in the evaluation")
    except (UsageError, EnvironmentUnavailable):
        raise
    except (grng.PreconditionerError, ValueError) as error:
        # A distribution of NaN is a ValueError of torch's.
        run.status, run.problem = DIVERGED, first_line(error)
        return
    except Exception as error:
        is_draw_of_nan = isinstance(error, RuntimeError) and "probability tensor" in str(error)
        if not (is_draw_of_nan or method.is_rival):
            raise
        # What another library fails with is not the end of everybody else's runs.
        kind = "" if is_draw_of_nan else f"{type(error).__name__}: "
        run.status, run.problem = DIVERGED, f"{kind}{first_line(error)}"
        return
    run.evaluation, run.status = found, FINISHED


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
            _check_finite(returns, f"at step {steps}")
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
    agent = _agent(method, seed, config)

    def report(update: Update) -> None:
        episodes.extend((step, value) for step, value, _ in update.episodes)
        grow(update.steps)

    try:
        agent.train(config.steps, report=report)
    finally:
        agent.close()
    return agent.evaluate


def _agent(method: Method, seed: int, config: RLConfig) -> ActorCritic:
    try:
        settings = {"anneal_steps": config.steps, **method.settings()}
        return ActorCritic(config.task_name, seed=seed, hidden=config.hidden, **settings)
    except EnvironmentUnavailable:
        raise
    except RLError as error:
        raise UsageError(f"optimizer {method.label!r}: {error}") from error


def _check_finite(returns: list[float], place: str) -> None:
    if not all(map(math.isfinite, returns)):
        raise RLError(f"returns must be finite, got {returns} {place}")
