# SPDX-License-Identifier: Apache-2.0
"""The final table and the sentences below it."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from grng.compare.records import DIVERGED, FINISHED
from grng.compare.results import ComparisonResult
from grng.compare.summary import Row, Summary

# Below this many columns the table has no room for all numbers of several seeds.
_NARROW = 106
_OMITTED_WHEN_NARROW = ("best %", "state MB")
_NAME_WIDTH = 12
_NEVER = "-"
_NOT_APPLICABLE = "n/a"


def _percent(mean: float | None, std: float | None) -> str:
    if mean is None:
        return _NEVER
    return f"{100 * mean:.2f}" + ("" if std is None else f" ± {100 * std:.2f}")


def _megabytes(count: int | None) -> str:
    return _NOT_APPLICABLE if count is None else f"{count / 1e6:.1f}"


def _reached(row: Row, summary: Summary) -> str:
    if summary.target is None:
        return _NOT_APPLICABLE
    if row.epochs_to_target is None or row.seconds_to_target is None:
        return _NEVER
    return f"{row.epochs_to_target} ep, {row.seconds_to_target:.1f} s"


def _label(row: Row) -> str:
    notes = []
    if row.status != FINISHED:
        notes.append(row.status)
    if 0 < row.seeds_finished < row.seeds_total:
        notes.append(f"{row.seeds_finished} of {row.seeds_total} seeds")
    return row.optimizer + (f" ({', '.join(notes)})" if notes else "")


def _cells(row: Row, summary: Summary, peak_heading: str) -> dict[str, str]:
    """The cells by heading, in the order of the columns."""
    split = row.ms_per_step
    cells = {
        "optimizer": _label(row),
        "test acc %": _percent(row.final_accuracy, row.final_accuracy_std),
        "best %": _percent(row.best_accuracy, row.best_accuracy_std),
        "to AdamW": _reached(row, summary),
        "ms/step": _NEVER,
        "fwd bwd opt": _NEVER,
        peak_heading: _megabytes(row.peak_memory_bytes),
        "state MB": _megabytes(row.optimizer_state_bytes),
    }
    if split is None:
        return dict.fromkeys(cells, _NEVER) | {"optimizer": _label(row)}
    cells["ms/step"] = f"{split.total:.2f}"
    cells["fwd bwd opt"] = f"{split.forward:.2f} {split.backward:.2f} {split.optimizer:.2f}"
    return cells


def build_table(result: ComparisonResult, summary: Summary, *, width: int | None) -> Table:
    """The table of a comparison.

    Args:
        result: Says which kind of memory was measured.
        summary: The rows.
        width: Columns of the terminal; None draws Markdown of any width, for files and pipes.

    Returns:
        The table, for a console.
    """
    is_plain = width is None
    omitted = _OMITTED_WHEN_NARROW if width is not None and width < _NARROW else ()
    rows = [_cells(row, summary, result.data["peak_memory_kind"]) for row in summary.rows]
    table = Table(
        box=box.MARKDOWN if is_plain else box.SIMPLE_HEAD,
        pad_edge=is_plain,
        collapse_padding=not is_plain,
    )
    headings = [heading for heading in rows[0] if heading not in omitted]
    for heading in headings:
        is_name = heading == "optimizer"
        table.add_column(
            heading,
            justify="left" if is_name else "right",
            overflow="fold",
            no_wrap=is_plain,
            # Headings and long names may wrap, numbers may not.
            min_width=_NAME_WIDTH if is_name else max(len(row[heading]) for row in rows),
        )
    for row in rows:
        # Text, not str: square brackets of an option value are not markup.
        table.add_row(*(Text(row[heading]) for heading in headings))
    return table


def _ending(row: Row, result: ComparisonResult) -> Iterator[str]:
    for run in result.runs:
        if run.optimizer != row.optimizer or run.status != DIVERGED or run.divergence is None:
            continue
        found = run.divergence
        last = found.last_finite_loss
        yield (
            f"{run.optimizer} seed {run.seed} stopped at step {found.step}: {found.what}; "
            f"lr {found.lr:.3g}, last finite loss {'none' if last is None else f'{last:.4g}'}"
        )


def verdicts(result: ComparisonResult, summary: Summary) -> Iterator[str]:
    """Plain sentences: who reaches AdamW's final accuracy, and which runs did not end well.

    Args:
        result: The comparison.
        summary: Its rows.

    Yields:
        One line each.
    """
    epochs = result.config["epochs"]
    target = summary.target
    baseline = next((r for r in summary.rows if target and r.optimizer == target.optimizer), None)
    for row in summary.rows:
        yield from _ending(row, result)
        if target is None or baseline is None or row.final_accuracy is None or row is baseline:
            continue
        points = 100 * (row.final_accuracy - target.accuracy)
        side = "above" if points >= 0 else "below"
        ends = f"{row.optimizer} ends {abs(points):.2f} points {side} {target.optimizer}"
        if row.epochs_to_target is None or row.seconds_to_target is None:
            yield f"{ends} and never reached its final {100 * target.accuracy:.2f} %"
        else:
            yield (
                f"{ends}; reached its final {100 * target.accuracy:.2f} % after epoch "
                f"{row.epochs_to_target} of {epochs} in {row.seconds_to_target:.1f} s "
                f"({target.optimizer}: {baseline.seconds_to_target or 0:.1f} s)"
            )


def _notes(result: ComparisonResult) -> list[str]:
    seeds = result.config["seeds"]
    accuracy = f"accuracy on {result.data['test_samples']:,} test samples"
    if len(seeds) > 1:
        accuracy += f", mean ± standard deviation over {len(seeds)} seeds"
    memory = (
        "peak CUDA MB: allocated by torch"
        if result.environment["device"] == "cuda"
        else "peak RSS MB: the whole process with the data set"
    )
    return [
        f"{accuracy}; to AdamW: epochs and seconds until AdamW's final accuracy is reached",
        "s, ms (median of the seeds): forward, backward, optimizer (observe, step, zero_grad), no evaluation",
        f"{memory}; state MB: tensors in optimizer.state",
    ]


def print_summary(console: Console, result: ComparisonResult) -> None:
    """Prints table, notes and sentences.

    Args:
        console: Where to.
        result: The comparison.
    """
    summary = result.summary()
    is_plain = not console.is_terminal
    table = build_table(result, summary, width=None if is_plain else console.width)
    if is_plain:
        # The Markdown box has blank lines above and below that would be padded to full width.
        with console.capture() as captured:
            console.print(table)
        lines = [line.rstrip() for line in captured.get().splitlines()]
        console.print(Text("\n".join(["", *filter(None, lines), ""])), soft_wrap=True)
    else:
        console.print(table)
    for line in _notes(result):
        console.print(Text(line, style="dim"), highlight=False)
    for line in verdicts(result, summary):
        console.print(Text(line), highlight=False, soft_wrap=is_plain)
