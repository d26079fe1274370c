# SPDX-License-Identifier: Apache-2.0
"""Progress of the runs: a bar on a terminal, one line per evaluation in a file or pipe, or nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from grng.compare.measures import ACCURACY, Measure
from grng.compare.records import EpochRecord, RunRecord

# Redrawing costs processor time next to the training threads.
_REFRESH_PER_SECOND = 4
_UPDATE_EVERY = 10


def _held_out(last: EpochRecord, measure: Measure) -> str:
    kind = "test" if last.validation_loss is None else "val"
    name = "acc" if measure is ACCURACY else measure.name
    online = last.online_accuracy
    before = "" if online is None else f"online {100 * online:.2f} %  "
    return f"{before}{kind} {name} {measure.text(measure.of(last))}"


class Reporter:
    """Reports nothing; the base of the other two."""

    def __init__(self, counts: str = "epoch", measure: Measure = ACCURACY) -> None:
        """Args: counts: ``"epoch"``, ``"step"`` or ``"sample"``; measure: what is shown."""
        self._counts, self._measure = counts, measure
        self._total = 0

    def run(self, record: RunRecord, steps: int) -> AbstractContextManager[None]:
        """Surrounds one run.

        Args:
            record: The run.
            steps: Steps that it will take.

        Returns:
            A context manager.
        """
        self._total = steps
        return self._around(record)

    @contextmanager
    def _around(self, record: RunRecord) -> Iterator[None]:
        del record
        yield

    def _place(self, record: RunRecord, step: int) -> str:
        if self._counts != "epoch":
            return f"{self._counts} {step:,}/{self._total:,}"
        epoch, epochs = (
            math.ceil(count / record.steps_per_epoch) for count in (max(1, step), self._total)
        )
        return f"epoch {epoch}/{epochs}"

    def step(self, record: RunRecord) -> None:
        """Called after each training step."""

    def epoch(self, record: RunRecord) -> None:
        """Called after each evaluation."""


class LineReporter(Reporter):
    """One short line per evaluation."""

    def __init__(self, console: Console, counts: str, measure: Measure) -> None:
        """Args: console: where to print; others: see Reporter."""
        super().__init__(counts, measure)
        self._console = console

    def epoch(self, record: RunRecord) -> None:
        """Prints the line of the evaluation that has just ended."""
        last = record.epochs[-1]
        self._console.print(
            f"{record.optimizer} seed {record.seed}  {self._place(record, last.step)}  "
            f"loss {last.train_loss:.4f}  {_held_out(last, self._measure)}  "
            f"{last.train_seconds:.1f} s",
            markup=False,
            highlight=False,
        )


class BarReporter(Reporter):
    """A bar per run with the training loss and the held-out accuracy or loss so far."""

    def __init__(self, console: Console, counts: str, measure: Measure) -> None:
        """Args: console: a terminal; others: see Reporter."""
        super().__init__(counts, measure)
        self._console = console
        self._progress: Progress | None = None
        self._steps = 0

    @contextmanager
    def _around(self, record: RunRecord) -> Iterator[None]:
        self._steps = 0
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
        state = Text(self._place(record, self._steps))
        if record.step_loss:
            state.append(f"  loss {record.step_loss[-1]:.4f}")
        if record.epochs:
            state.append(f"  {_held_out(record.epochs[-1], self._measure)}")
        self._progress.update(
            self._progress.task_ids[0],
            completed=self._steps,
            total=self._total,
            state=state.plain,
        )


def choose_reporter(
    console: Console, counts: str, measure: Measure, *, is_silent: bool
) -> Reporter:
    """The reporter that fits where the output goes.

    Args:
        console: Where the output goes.
        counts: What the length of a run is given in: ``"epoch"``, ``"step"`` or ``"sample"``.
        measure: The held-out figure that is shown.
        is_silent: Report nothing.

    Returns:
        The reporter.
    """
    if is_silent:
        return Reporter()
    if console.is_terminal:
        return BarReporter(console, counts, measure)
    return LineReporter(console, counts, measure)
