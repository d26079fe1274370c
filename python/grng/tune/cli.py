# SPDX-License-Identifier: Apache-2.0
"""``python -m grng tune``: options, the search, its table, and the runs of what it found."""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from grng.compare import cli as comparison
from grng.compare import environment
from grng.compare.cli import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, config_of, load_data
from grng.compare.config import CompareConfig, resolve_device
from grng.compare.describe import describe_config, describe_data, without_paths
from grng.compare.errors import UsageError
from grng.compare.optimizers import OPTIMIZERS, OptionValue, parse_spec
from grng.compare.plan import make_plan
from grng.compare.progress import Reporter, choose_reporter
from grng.compare.records import FINISHED, INTERRUPTED, RunRecord
from grng.compare.results import utc_now
from grng.compare.resume import take_up
from grng.compare.runs import check_specs
from grng.rl.environments import TASKS as ENVIRONMENTS
from grng.tasks import DataError
from grng.tune.plots import save_figure
from grng.tune.records import FILE_NAME, Trial, TuningResult, load
from grng.tune.search import search
from grng.tune.space import (
    SPACES,
    Space,
    as_option,
    corners,
    parse_space,
    space_text,
    spec_text,
)

# Trials that the table shows, besides the defaults.
_SHOWN = 5
# Of the runs with the test set, below the folder of the search: the begin of their folders.
TEST_FOLDER = "test"
_LEAST_TRIALS = 2


def _space(arguments: argparse.Namespace) -> Space:
    """Where to search.

    Raises:
        UsageError: The optimizer is unknown, or the space is wrong.
    """
    name = arguments.optimizer
    if name not in OPTIMIZERS:
        known = ", ".join(OPTIMIZERS)
        raise UsageError(f"--optimizer must be one of {known}, got {name!r}")
    return parse_space(name, SPACES[name] if arguments.space is None else arguments.space)


def _settings(arguments: argparse.Namespace) -> CompareConfig:
    """The settings of the trials.

    Raises:
        UsageError: One is wrong, or nothing is held out.
    """
    if arguments.task in ENVIRONMENTS:
        raise UsageError(
            f"--task must be a data set: settings of reinforcement learning are not searched for, got "
            f"{arguments.task!r}"
        )
    own = argparse.Namespace(**vars(arguments))
    own.seeds, own.reference = None, arguments.optimizer
    config = config_of(own)
    if config.held_out < 1:
        raise UsageError(
            "--validation must be at least 1: settings are chosen on held-out samples, got "
            f"{config.held_out}"
        )
    if arguments.budget < _LEAST_TRIALS:
        raise UsageError(f"--budget must be at least {_LEAST_TRIALS}, got {arguments.budget}")
    return config


def _take_up(fresh: TuningResult, folder: Path, space: Space) -> None:
    """Take the trials that are in this folder, if there are any.

    Raises:
        UsageError: They are of other settings, code or data, or more than the budget, or the folder cannot be
            made.
    """
    file = folder / FILE_NAME
    known = take_up(file, fresh, load, option="--out", but=("budget",))
    if known is None:
        return
    if len(known.trials) > fresh.config["budget"]:
        raise UsageError(
            f"--budget must be at least {len(known.trials)}, the number of trials in {file}, got "
            f"{fresh.config['budget']}"
        )
    for number, trial in enumerate(known.trials):
        if any(trial.options.get(key) not in values for key, values in space.items()):
            raise UsageError(f"{file}: trials[{number}].options must be of the space")
    fresh.trials = known.trials
    fresh.created_utc = known.created_utc


def tune(arguments: argparse.Namespace, argv: list[str]) -> int:
    """Run a search.

    Args:
        arguments: The parsed options.
        argv: The options as given, for the record.

    Returns:
        The exit code: 0, 1 when no trial finished, a run of the test diverged or there is no data, 130 when
        interrupted.

    Raises:
        UsageError: An argument is wrong.
    """
    name, space = arguments.optimizer, _space(arguments)
    config = _settings(arguments)
    device = resolve_device(config.device)
    if arguments.seeds is not None:
        # What is wrong with them is said before hours of search.
        _test_settings(arguments, name)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    console = comparison.make_console()
    try:
        likelihood = config.task_entry.likelihood
        specs = [parse_spec(name).for_likelihood(likelihood)]
        # A value that the optimizer refuses would else end the search in its middle.
        tried = [parse_spec(spec_text(name, options)) for options in corners(space)]
        resolved = check_specs(
            [*specs, *(spec.for_likelihood(likelihood) for spec in tried)], config, device
        )
        data = load_data(config, device, console)
    except DataError as error:
        print(f"grng tune: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    steps = make_plan(config, len(data.train_labels)).steps
    described: dict[str, Any] = describe_config(config, specs, resolved)
    result = TuningResult(
        command=["python", "-m", "grng", *without_paths(argv)],
        config={
            **described,
            "optimizer": name,
            "space": space_text(space),
            "budget": arguments.budget,
        },
        environment=environment.describe(device),
        data=describe_data(data, device),
        created_utc=utc_now(),
    )
    folder = arguments.out or Path("results") / f"tune-{config.task}-{name}"
    _take_up(result, folder, space)
    reporter = _Report(console, config, steps, is_silent=arguments.no_progress)
    defaults: dict[str, OptionValue] = {k: as_option(v) for k, v in resolved[name].items()}

    def keep(trial: Trial) -> None:
        result.save(folder)
        reporter.ended(trial)

    try:
        search(name, space, arguments.budget, config, data, result, defaults, keep, reporter)
    except KeyboardInterrupt:
        result.status = INTERRUPTED
    _conclude(console, result, folder)
    if result.status != FINISHED:
        return EXIT_INTERRUPTED
    if result.best is None:
        return EXIT_FAILED
    return (
        EXIT_OK if arguments.seeds is None else _test(arguments, argv, result, result.best, folder)
    )


def _test(
    arguments: argparse.Namespace,
    argv: list[str],
    result: TuningResult,
    best: Trial,
    folder: Path,
) -> int:
    """Run the best settings and the defaults, once where they are the same, with the test set."""
    specs = best.optimizer
    if not result.is_default(best):
        specs += f",{arguments.optimizer}"
    own = _test_settings(arguments, specs)
    return comparison.compare(own, argv, folder / _test_name(best, own))


def _test_name(best: Trial, tested: argparse.Namespace) -> str:
    """The folder of the runs with the test set: another for other settings or seeds, so that none is lost.

    The best of a search may change when it goes on.
    """
    text = f"{tested.optimizers} {config_of(tested).seeds}"
    return f"{TEST_FOLDER}-trial-{best.number}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _test_settings(arguments: argparse.Namespace, specs: str) -> argparse.Namespace:
    """The options of the comparison on the test set.

    Raises:
        UsageError: The seeds are wrong, or one is that of the search.
    """
    own = argparse.Namespace(**vars(arguments))
    own.optimizers, own.into, own.reference = specs, None, arguments.optimizer
    if arguments.seed in config_of(own).seeds:
        raise UsageError(
            f"--seeds must be others than that of the search, --seed {arguments.seed}: settings were chosen "
            "on it"
        )
    return own


class _Report:
    """The progress of a trial, and a line for each that has ended."""

    def __init__(
        self, console: Console, config: CompareConfig, steps: int, *, is_silent: bool
    ) -> None:
        self._console, self._measure = console, config.measure
        self._is_silent = is_silent
        # A line for each evaluation of each trial would be too many.
        is_quiet = is_silent or not console.is_terminal
        self._bars: Reporter = choose_reporter(
            console, config.counts, config.measure, is_silent=is_quiet
        )
        self._steps = steps

    def run(self, record: RunRecord) -> Any:
        """Surround a trial."""
        return self._bars.run(record, self._steps)

    def step(self, record: RunRecord) -> None:
        """Called after each step of a trial."""
        self._bars.step(record)

    def ended(self, trial: Trial) -> None:
        """Called after each trial."""
        if self._is_silent:
            return
        found = "diverged" if trial.value is None else self._measure.text(trial.value)
        line = f"trial {trial.number}  {trial.optimizer}  {found}  {trial.seconds:.1f} s"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _conclude(console: Console, result: TuningResult, folder: Path) -> None:
    written = [result.save(folder)]
    if result.trials:
        console.print(_table(result))
        written.append(save_figure(result, folder))
    lost = sum(trial.value is None for trial in result.trials)
    if lost:
        console.print(Text(f"{lost} of {len(result.trials)} trials diverged; they count as worst"))
    if result.status == FINISHED and len(result.trials) < result.config["budget"]:
        line = f"the space has no more settings than these {len(result.trials)}: --budget was not used up"
        console.print(Text(line), soft_wrap=True)
    best = result.best
    if best is not None:
        line = f"best of {len(result.trials)} trials on the validation samples: {best.optimizer}"
        console.print(Text(line), soft_wrap=True)
    for path in written:
        console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)


def _table(result: TuningResult) -> Table:
    """The best trials, and the first."""
    ordered = sorted(result.trials, key=lambda t: (-result.score(t), t.number))
    shown = ordered[:_SHOWN] + [t for t in ordered[_SHOWN:] if t.number == 0]
    measure = result.measure
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("trial", justify="right")
    table.add_column("settings")
    table.add_column(f"validation {measure.title}", justify="right")
    for trial in shown:
        note = " (defaults)" if result.is_default(trial) else ""
        value = "diverged" if trial.value is None else measure.text(trial.value)
        table.add_row(str(trial.number), Text(trial.optimizer + note), value)
    return table
