# SPDX-License-Identifier: Apache-2.0
"""Watching a run: what an update did, a progress bar, TensorBoard scalars."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

# Episodes that a mean return is over.
EPISODES = 100


@dataclass
class Update:
    """What one update did."""

    steps: int  # taken in all environments so far
    taken: int  # of them, in this update
    episodes: list[tuple[int, float, int]]  # that ended: steps taken so far, return, length
    entropy: float
    value_loss: float
    explained_variance: float  # of the returns, by the value before it was fitted
    seconds: float
    optimizer: dict[str, float]  # the diagnostics of the policy's optimizer, where it has any


@contextmanager
def progress_bar(
    name: str, begin: int, goal: int, *, is_shown: bool
) -> Iterator[Callable[[Update], None]]:
    """A bar from ``begin`` to ``goal`` steps with the mean return of the last 100 episodes.

    Yields:
        What to call after each update; it does nothing where the bar is not shown.

    Raises:
        ImportError: rich is not installed; says how to install it.
    """
    if not is_shown:
        yield lambda update: None
        return
    try:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError as error:
        raise ImportError('progress=True needs rich: pip install "grng-kernels[rl]"') from error

    returns: deque[float] = deque(maxlen=EPISODES)
    columns = (
        TextColumn(name, markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[state]}", markup=False),
        TimeRemainingColumn(),
    )
    with Progress(*columns, refresh_per_second=4) as bar:
        task = bar.add_task("", total=goal - begin, state="")

        def show(update: Update) -> None:
            returns.extend(r for _, r, _ in update.episodes)
            state = f"step {update.steps:,}/{goal:,}"
            if returns:
                state += f"  return {sum(returns) / len(returns):.1f}"
            bar.update(task, completed=update.steps - begin, state=state)

        yield show


class TensorBoardLog:
    """Scalars of a run, by steps: pass it as ``report`` to :meth:`grng.rl.ActorCritic.train`.

    ``episode/return`` and ``episode/length`` of each episode; ``policy/entropy``, ``value/loss``,
    ``value/explained_variance``, ``time/steps_per_second`` and ``optimizer/…`` of each update.
    """

    def __init__(self, folder: str) -> None:
        """Args: folder: Of the event file.

        Raises:
            ImportError: TensorBoard is not installed; says how to install it.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                'TensorBoardLog needs tensorboard: pip install "grng-kernels[tensorboard]"'
            ) from error
        self._writer: SummaryWriter = SummaryWriter(folder)

    def __call__(self, update: Update) -> None:
        """Write the scalars of one update."""
        add: Any = self._writer.add_scalar
        for step, value, length in update.episodes:
            add("episode/return", value, step)
            add("episode/length", length, step)
        add("policy/entropy", update.entropy, update.steps)
        add("value/loss", update.value_loss, update.steps)
        add("value/explained_variance", update.explained_variance, update.steps)
        rate = update.taken / max(update.seconds, 1e-9)
        add("time/steps_per_second", rate, update.steps)
        for key, number in update.optimizer.items():
            add(f"optimizer/{key}", number, update.steps)

    def close(self) -> None:
        """Write what is left and close the file."""
        self._writer.close()

    def __enter__(self) -> TensorBoardLog:
        """Return the log."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        self.close()
