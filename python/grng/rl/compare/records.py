# SPDX-License-Identifier: Apache-2.0
"""One run: its episodes, and the figures that are taken from them."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import asdict, dataclass, field
from typing import Any

from grng.compare.records import DIVERGED, FINISHED, INTERRUPTED, RUNNING
from grng.rl.reports import EPISODES

__all__ = ["DIVERGED", "FINISHED", "INTERRUPTED", "RUNNING", "RLRun"]


@dataclass
class RLRun:
    """A method with a seed: its learning curve and what it came to.

    Returns are sums of the environment's own rewards. Those of training are of drawn actions; those of the
    evaluation, after it, of the likeliest.
    """

    method: str
    seed: int
    status: str = RUNNING
    problem: str | None = None
    # Steps in all environments at which the curve was read, and there the mean return of the last 100
    # episodes that had ended; None before the first.
    curve_steps: list[int] = field(default_factory=list)
    curve_return: list[float | None] = field(default_factory=list)
    # Steps at which the mean over 100 episodes first was what counts as solved.
    solved_at: int | None = None
    episodes: int = 0
    seconds: float = 0.0
    evaluation: list[float] = field(default_factory=list)

    @property
    def final_return(self) -> float | None:
        """Mean return of the last 100 episodes of training."""
        return self.curve_return[-1] if self.curve_return else None

    @property
    def mean_return(self) -> float | None:
        """Mean of the curve: the area below it, over its length."""
        known = [value for value in self.curve_return if value is not None]
        return sum(known) / len(known) if known else None

    @property
    def evaluated_return(self) -> float | None:
        """Mean return of the evaluation."""
        return sum(self.evaluation) / len(self.evaluation) if self.evaluation else None

    def read_curve(
        self, episodes: list[tuple[int, float]], points: list[int], solved: float | None
    ) -> None:
        """Take the curve from the episodes ``(steps, return)`` so far, in the order of their ends."""
        ends = [step for step, _ in episodes]
        totals = [0.0]
        for _, value in episodes:
            totals.append(totals[-1] + value)

        def mean(count: int) -> float:
            begin = max(0, count - EPISODES)
            return (totals[count] - totals[begin]) / (count - begin)

        counts = [bisect_right(ends, point) for point in points]
        self.curve_steps = points
        self.curve_return = [round(mean(count), 4) if count else None for count in counts]
        self.episodes = len(episodes)
        self.solved_at = None
        if solved is not None:
            # Methods end with whole rollouts: what they do beyond the last point does not count.
            full = range(EPISODES, counts[-1] + 1 if counts else 0)
            # Rounding must not decide it where every episode reaches the bound.
            at = next((n for n in full if mean(n) >= solved - 1e-9), None)
            self.solved_at = None if at is None else ends[at - 1]

    def to_json(self) -> dict[str, Any]:
        """Return numbers, strings and lists."""
        return asdict(self)
