# SPDX-License-Identifier: Apache-2.0
"""The final table and the sentences below it."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from grng.compare.measures import ACCURACY, LOSS, Measure
from grng.compare.records import DIVERGED, FINISHED
from grng.compare.results import ComparisonResult
from grng.compare.selection import family
from grng.compare.summary import Row, Summary, Target
from grng.compare.trailing import TRAILING_STEPS

# Below this many columns the table has no room for all numbers of several seeds.
_NARROW = 122
_OMITTED_WHEN_NARROW = ("best %", "state MB", "train loss")
_NAME_WIDTH = 12
_NEVER = "-"
_NOT_APPLICABLE = "n/a"


def _number(measure: Measure, mean: float | None, std: float | None) -> str:
    """In percent for an accuracy; the heading says so."""
    if mean is None:
        return _NEVER
    places, scale = measure.decimals, measure.scale
    spread = "" if std is None else f" ± {scale * std:.{places}f}"
    return f"{scale * mean:.{places}f}{spread}"


def _percent(mean: float | None, std: float | None) -> str:
    return _number(ACCURACY, mean, std)


def _megabytes(count: int | None) -> str:
    return _NOT_APPLICABLE if count is None else f"{count / 1e6:.1f}"


def _reached(row: Row, summary: Summary) -> str:
    if summary.target is None:
        return _NOT_APPLICABLE
    if row.part_of_steps_to_target is None or row.seconds_to_target is None:
        return _NEVER
    return f"{row.part_of_steps_to_target:.3f}x, {row.seconds_to_target:.1f} s"


def _train_loss(row: Row) -> str:
    if row.final_train_loss is None:
        return _NEVER
    part = row.part_of_steps_to_train_loss
    reached = "" if part is None else f" ({part:.3f}x)"
    return f"{LOSS.text(row.final_train_loss)}{reached}"


def _label(row: Row, rows: list[Row]) -> str:
    notes = []
    siblings = [other for other in rows if family(other.optimizer) == family(row.optimizer)]
    if row.is_selected and not all(other.is_selected for other in siblings):
        notes.append("best")
    if row.status != FINISHED:
        notes.append(row.status)
    if 0 < row.seeds_finished < row.seeds_total:
        notes.append(f"{row.seeds_finished} of {row.seeds_total} seeds")
    return row.optimizer + (f" ({', '.join(notes)})" if notes else "")


def _values(row: Row, summary: Summary, result: ComparisonResult) -> dict[str, str]:
    """The columns that depend on what was measured."""
    test = {"test acc %": _percent(row.final_accuracy, row.final_accuracy_std)}
    validation = {"val acc %": _percent(row.validation_accuracy, row.validation_accuracy_std)}
    if result.is_stream:
        online = {"online %": _percent(row.online_accuracy, row.online_accuracy_std)}
        return online | validation | test
    reached = {f"to {family(result.reference)}": _reached(row, summary)}
    reached["train loss"] = _train_loss(row)
    has_validation = bool(result.data.get("validation_samples"))
    measure = result.measure
    if measure.is_correlation:
        final = _number(measure, row.final_correlation, row.final_correlation_std)
        held_out = _number(measure, row.validation_correlation, row.validation_correlation_std)
        loss = {"test loss": _number(LOSS, row.final_loss, row.final_loss_std)}
        is_number = result.config.get("likelihood") == "gaussian"
        test = {f"test {measure.name}": final} | (loss if is_number else test)
        validation = {f"val {measure.name}": held_out}
    elif measure is LOSS:
        test = {"test loss": _number(LOSS, row.final_loss, row.final_loss_std)} | test
        validation = {"val loss": _number(LOSS, row.validation_loss, row.validation_loss_std)}
    elif not has_validation:
        test |= {"best %": _percent(row.best_accuracy, row.best_accuracy_std)}
    return (validation if has_validation else {}) | test | reached


def _cells(row: Row, summary: Summary, result: ComparisonResult) -> dict[str, str]:
    """The cells by heading, in the order of the columns."""
    split = row.ms_per_step
    peak_heading = result.data["peak_memory_kind"]
    label = _label(row, summary.rows)
    cells = {
        "optimizer": label,
        **_values(row, summary, result),
        "ms/step": _NEVER,
        "fwd bwd opt": _NEVER,
        peak_heading: _megabytes(row.peak_memory_bytes),
        "state MB": _megabytes(row.optimizer_state_bytes),
    }
    if split is None:
        return dict.fromkeys(cells, _NEVER) | {"optimizer": label}
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
    rows = [_cells(row, summary, result) for row in summary.rows]
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
        rate = "none" if found.lr is None else f"{found.lr:.3g}"
        yield (
            f"{run.optimizer} seed {run.seed} stopped at step {found.step}: {found.what}; "
            f"lr {rate}, last finite loss {'none' if last is None else f'{last:.4g}'}"
        )


def _against_in_stream(row: Row, baseline: Row) -> str:
    parts = []
    for name, found, known in (
        ("online", row.online_accuracy, baseline.online_accuracy),
        ("on the test set", row.final_accuracy, baseline.final_accuracy),
    ):
        if found is not None and known is not None:
            side = "above" if found >= known else "below"
            parts.append(f"{name} {100 * abs(found - known):.2f} points {side}")
    return f"{row.optimizer} against {baseline.optimizer}: {', '.join(parts)}"


def verdicts(result: ComparisonResult, summary: Summary) -> Iterator[str]:
    """Plain sentences: who reaches the reference's final values, and which runs did not end well.

    Args:
        result: The comparison.
        summary: Its rows.

    Yields:
        One line each.
    """
    target, measure = summary.target, result.measure
    baseline = next((r for r in summary.rows if target and r.optimizer == target.optimizer), None)
    for row in summary.rows:
        yield from _ending(row, result)
        value = row.held_out(measure)
        if target is None or baseline is None or value is None or row is baseline:
            continue
        if not row.is_selected:
            continue
        if result.is_stream:
            yield _against_in_stream(row, baseline)
            continue
        gap = measure.gap(value, target.value)
        yield f"{row.optimizer} ends {gap} {target.optimizer}; " + _reached_in_words(
            row, baseline, target, measure
        )


def _reached_in_words(row: Row, baseline: Row, target: Target, measure: Measure) -> str:
    value = f"its final {measure.text(target.value)}"
    if row.part_of_steps_to_target is None or row.seconds_to_target is None:
        words = f"never reached {value}"
    else:
        words = (
            f"reached {value} after {row.part_of_steps_to_target:.3f} of its {target.steps:,} steps in "
            f"{row.seconds_to_target:.1f} s ({target.optimizer}: {baseline.seconds_to_target or 0:.1f} s)"
        )
    if target.train_loss is None:
        return words
    part = row.part_of_steps_to_train_loss
    when = "never" if part is None else f"after {part:.3f} of them"
    return f"{words}, its final training loss of {LOSS.text(target.train_loss)} {when}"


def _explain_columns(result: ComparisonResult) -> str:
    parts = []
    validation = result.data.get("validation_samples", 0)
    if result.is_stream:
        parts.append("online: predicted before learned from")
    else:
        name = family(result.reference)
        parts.append(
            f"to {name}: part of the steps and seconds until {name}'s final {result.measure.title} is reached"
        )
        parts.append(
            f"train loss: mean of the last {TRAILING_STEPS} steps (part of the steps until {name}'s "
            "is reached)"
        )
    if validation:
        parts.append(
            f"val: {validation:,} held-out training samples; of several settings the best on them "
            "is marked, and only its test results are shown"
        )
    return "; ".join(parts)


def _notes(result: ComparisonResult) -> list[str]:
    seeds = result.config["seeds"]
    what = "accuracy" if result.measure is ACCURACY else f"loss and accuracy per {result.unit}"
    if result.measure.is_correlation:
        is_number = result.config.get("likelihood") == "gaussian"
        what = f"{result.measure.title} and {'loss' if is_number else 'accuracy'}"
    accuracy = f"{what} on {result.data['test_samples']:,} test samples"
    if len(seeds) > 1:
        accuracy += f", mean ± standard deviation over {len(seeds)} seeds"
    memory = (
        "peak CUDA MB: allocated by torch"
        if result.environment["device"] == "cuda"
        else "peak RSS MB: the whole process with the data set"
    )
    return [
        f"{accuracy}; {_explain_columns(result)}",
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
