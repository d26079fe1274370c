# SPDX-License-Identifier: Apache-2.0
"""Progress of the runs: a bar on a terminal, one line per evaluation in a file or pipe, or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from grng.compare.records import EpochRecord, RunRecord

# Redrawing costs processor time next to the training threads.
_REFRESH_PER_SECOND = 4
_UPDATE_EVERY = 10


def _place(record: RunRecord, step: int, epochs: int) -> str:
    if record.step_correct:
        return f"sample {step:,}/{record.steps_per_epoch:,}"
    epoch = min(epochs, 1 + max(0, step - 1) // record.steps_per_epoch)
    return f"epoch {epoch}/{epochs}"


def _accuracy(last: EpochRecord) -> str:
    kind = "test" if last.validation_accuracy is None else "val"
    online = last.online_accuracy
    before = "" if online is None else f"online {100 * online:.2f} %  "
    return f"{before}{kind} acc {100 * last.held_out_accuracy:.2f} %"


class Reporter:
    """Reports nothing; the base of the other two."""

    def run(self, record: RunRecord, epochs: int) -> AbstractContextManager[None]:
        """Surrounds one run.

        Args:
            record: The run.
            epochs: Epochs that it will take.

        Returns:
            A context manager.
        """
        return self._around(record, epochs)

    @contextmanager
    def _around(self, record: RunRecord, epochs: int) -> Iterator[None]:
        del record, epochs
        yield

    def step(self, record: RunRecord) -> None:
        """Called after each training step."""

    def epoch(self, record: RunRecord) -> None:
        """Called after each evaluation."""


class LineReporter(Reporter):
    """One short line per evaluation."""

    def __init__(self, console: Console) -> None:
        """Args: console: where to print."""
        self._console = console
        self._epochs = 0

    @contextmanager
    def _around(self, record: RunRecord, epochs: int) -> Iterator[None]:
        del record
        self._epochs = epochs
        yield

    def epoch(self, record: RunRecord) -> None:
        """Prints the line of the evaluation that has just ended."""
        last = record.epochs[-1]
        self._console.print(
            f"{record.optimizer} seed {record.seed}  {_place(record, last.step, self._epochs)}  "
            f"loss {last.train_loss:.4f}  {_accuracy(last)}  {last.train_seconds:.1f} s",
            markup=False,
            highlight=False,
        )


class BarReporter(Reporter):
    """A bar per run with the loss and the accuracy so far."""

    def __init__(self, console: Console) -> None:
        """Args: console: a terminal."""
        self._console = console
        self._progress: Progress | None = None
        self._epochs = 0
        self._steps = 0

    @contextmanager
    def _around(self, record: RunRecord, epochs: int) -> Iterator[None]:
        self._epochs, self._steps = epochs, 0
        columns = (
            TextColumn("{task.fields[name]}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[state]}", markup=False),
            TimeRemainingColumn(),
        )
        with Progress(
            *columns, console=self._console, refresh_per_second=_REFRESH_PER_SECOND
        ) as progress:
            self._progress = progress
            name = f"{record.optimizer} seed {record.seed}"
            progress.add_task("", total=None, name=name, state="preparing")
            yield
        self._progress = None

    def step(self, record: RunRecord) -> None:
        """Moves the bar now and then."""
        self._steps += 1
        if self._steps % _UPDATE_EVERY == 0:
            self._update(record)

    def epoch(self, record: RunRecord) -> None:
        """Moves the bar to the end of the epoch."""
        self._update(record)

    def _update(self, record: RunRecord) -> None:
        if self._progress is None:
            return
        state = Text(_place(record, self._steps, self._epochs))
        if record.step_loss:
            state.append(f"  loss {record.step_loss[-1]:.4f}")
        if record.epochs:
            state.append(f"  {_accuracy(record.epochs[-1])}")
        self._progress.update(
            self._progress.task_ids[0],
            completed=self._steps,
            total=self._epochs * record.steps_per_epoch,
            state=state.plain,
        )


def choose_reporter(console: Console, *, is_silent: bool) -> Reporter:
    """The reporter that fits where the output goes.

    Args:
        console: Where the output goes.
        is_silent: Report nothing.

    Returns:
        The reporter.
    """
    if is_silent:
        return Reporter()
    return BarReporter(console) if console.is_terminal else LineReporter(console)
