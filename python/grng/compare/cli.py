# SPDX-License-Identifier: Apache-2.0
"""``python -m grng compare``: options, the loop over optimizers and seeds, exit codes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console

from grng.compare import environment
from grng.compare.config import CompareConfig, resolve_device
from grng.compare.describe import describe_config, describe_data, without_paths
from grng.compare.errors import UsageError
from grng.compare.few_shot import first_of_each_class
from grng.compare.optimizers import OptimizerSpec, parse_specs
from grng.compare.plan import make_plan
from grng.compare.plots import save_figures
from grng.compare.progress import Reporter, choose_reporter
from grng.compare.records import DIVERGED, FINISHED, INTERRUPTED, RUNNING, RunRecord
from grng.compare.results import FILE_NAME, ComparisonResult, create_folder, load, utc_now
from grng.compare.resume import take_up
from grng.compare.runs import check_specs, execute
from grng.compare.summary import DEFAULT_REFERENCE
from grng.compare.table import print_summary
from grng.rl.compare import plots as rl_plots
from grng.rl.compare import results as rl_results
from grng.studies.plots import save_figure as save_study_figure
from grng.studies.records import FILE_NAME as STUDY_FILE
from grng.studies.records import is_study_result
from grng.studies.records import load as load_study
from grng.tasks import ClassificationData, DataError, LoadRequest
from grng.tune.plots import save_figure as save_tuning_figure
from grng.tune.records import FILE_NAME as TUNING_FILE
from grng.tune.records import is_tuning_result
from grng.tune.records import load as load_tuning

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
# Wide enough for one line per row in a file; a terminal keeps its own width.
_PLAIN_WIDTH = 160
_EPOCHS, _BATCH_SIZE = 10, 256


def _integers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option} must be whole numbers like 1,2,3, got {text!r}") from None


def config_of(arguments: argparse.Namespace) -> CompareConfig:
    """The settings that options stand for.

    Args:
        arguments: The parsed options.

    Returns:
        The settings.

    Raises:
        UsageError: A value is wrong, or two do not go together.
    """
    arguments = argparse.Namespace(**vars(arguments))  # whose defaults are filled in below
    has_seeds = arguments.seeds is not None
    hidden = arguments.hidden
    if arguments.stream is not None:
        for option, value in (("epochs", arguments.epochs), ("batch-size", arguments.batch_size)):
            if value is not None:
                raise UsageError(f"--{option} does not go with --stream: one pass with batch 1")
        arguments.epochs = arguments.batch_size = 1
    if arguments.steps is not None and arguments.stream is None:
        if arguments.epochs is not None:
            raise UsageError("--epochs does not go with --steps: give one of them")
        arguments.epochs = 1
    return CompareConfig(
        task=arguments.task,
        epochs=_given(arguments.epochs, _EPOCHS),
        seeds=_integers("--seeds", arguments.seeds) if has_seeds else (arguments.seed,),
        batch_size=_given(arguments.batch_size, _BATCH_SIZE),
        hidden=None if hidden is None else _integers("--hidden", hidden),
        device=arguments.device,
        threads=arguments.threads,
        warmup_fraction=arguments.warmup_fraction,
        train_limit=arguments.train_limit,
        lora_rank=arguments.lora_rank,
        stream=arguments.stream,
        validation=arguments.validation,
        checkpoints=arguments.checkpoints,
        schedule=arguments.schedule,
        model=arguments.model,
        steps=arguments.steps,
        reference=arguments.reference.replace(" ", ""),
        data_dir=arguments.data_dir,
        per_class=arguments.per_class,
    )


def _check_reference(config: CompareConfig, specs: list[OptimizerSpec]) -> None:
    """Refuses a reference that is not compared; without AdamW there is none unless one is named.

    Raises:
        UsageError: No spec has this label or name.
    """
    known = {name for spec in specs for name in (spec.name, spec.label)}
    if config.reference not in known and config.reference != DEFAULT_REFERENCE:
        raise UsageError(
            f"--reference must be one of --optimizers or the name of one, got {config.reference!r}"
        )


def _given(value: int | None, default: int) -> int:
    return default if value is None else value


def _run_all(
    result: ComparisonResult,
    specs: list[OptimizerSpec],
    config: CompareConfig,
    data: ClassificationData,
    reporter: Reporter,
    folder: Path,
) -> None:
    """Seed by seed: an interrupted comparison then has all optimizers of some seeds."""
    steps = make_plan(config, len(data.train_labels)).steps
    done = {(run.optimizer, run.seed) for run in result.runs}
    for seed in config.seeds:
        for spec in [spec for spec in specs if (spec.label, seed) not in done]:
            record = RunRecord(spec.label, seed)
            result.runs.append(record)

            def finish_epoch(record: RunRecord = record) -> None:
                result.save(folder)
                reporter.epoch(record)

            def finish_step(record: RunRecord = record) -> None:
                reporter.step(record)

            with reporter.run(record, steps):
                execute(spec, record, config, data, finish_step, finish_epoch)
            result.save(folder)
    has_diverged = any(run.status == DIVERGED for run in result.runs)
    result.status = DIVERGED if has_diverged else FINISHED


def _conclude(console: Console, result: ComparisonResult, folder: Path) -> None:
    result.save(folder)
    print_summary(console, result)
    written = [result.save(folder), *save_figures(result, folder)]
    for path in written:
        console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)


def make_console() -> Console:
    """Console for stdout; wide and without colours when stdout is not a terminal."""
    if sys.stdout.isatty():
        return Console()
    return Console(width=_PLAIN_WIDTH, no_color=True, emoji=False)


def load_data(config: CompareConfig, device: torch.device, console: Console) -> ClassificationData:
    """The data of the task, with a line for each thing that takes time.

    Args:
        config: The settings.
        device: Where the data goes.
        console: For the lines.

    Returns:
        The data.

    Raises:
        DataError: It is missing or damaged.
        UsageError: A class has fewer samples than are asked for.
    """
    request = LoadRequest(
        device=device,
        data_dir=config.data_dir,
        train_limit=config.train_limit,
        validation=config.held_out,
        report=lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True),
    )
    data = config.task_entry.load(request)
    if config.per_class is None:
        return data
    return first_of_each_class(data, config.task_entry.classes, config.per_class)


def _begin(fresh: ComparisonResult, folder: Path) -> None:
    """Takes the runs that are in this folder, if there are any.

    Raises:
        UsageError: They are of other settings, of other code or other data, or the folder cannot be made.
    """
    known = take_up(folder / FILE_NAME, fresh, load, option="--into")
    if known is not None:
        fresh.runs = [run for run in known.runs if run.status in (FINISHED, DIVERGED)]
        fresh.created_utc, fresh.command = known.created_utc, known.command


def compare(arguments: argparse.Namespace, argv: list[str], folder: Path | None = None) -> int:
    """Runs a comparison.

    Args:
        arguments: The parsed options.
        argv: The options as given, for the record.
        folder: Of the result; what is there is gone on with. None: a new one below ``--out``.

    Returns:
        The exit code: 0, 1 when a run diverged or there is no data, 130 when interrupted.

    Raises:
        UsageError: An argument is wrong.
    """
    config = config_of(arguments)
    device = resolve_device(config.device)
    likelihood = config.task_entry.likelihood
    specs = [spec.for_likelihood(likelihood) for spec in parse_specs(arguments.optimizers)]
    _check_reference(config, specs)
    folder = arguments.into if folder is None else folder
    if config.threads is not None:
        torch.set_num_threads(config.threads)

    console = make_console()
    try:
        resolved = check_specs(specs, config, device)
        data = load_data(config, device, console)
    except DataError as error:
        print(f"grng compare: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED

    # Wrong numbers are reported before there is a folder.
    make_plan(config, len(data.train_labels))
    result = ComparisonResult(
        command=["python", "-m", "grng", *without_paths(argv)],
        config=describe_config(config, specs, resolved),
        environment=environment.describe(device),
        data=describe_data(data, device),
        created_utc=utc_now(),
    )
    if folder is None:
        folder, _ = create_folder(arguments.out, config.task)
    else:
        _begin(result, folder)
    reporter = choose_reporter(
        console, config.counts, config.measure, is_silent=arguments.no_progress
    )
    try:
        _run_all(result, specs, config, data, reporter, folder)
    except KeyboardInterrupt:
        result.status = INTERRUPTED
        for run in result.runs:
            if run.status == RUNNING:
                run.status = INTERRUPTED
    _conclude(console, result, folder)
    return {FINISHED: EXIT_OK, INTERRUPTED: EXIT_INTERRUPTED}.get(result.status, EXIT_FAILED)


def _draw(path: Path, folder: Path) -> list[Path]:
    if is_tuning_result(path):
        return [save_tuning_figure(load_tuning(path), folder)]
    if is_study_result(path):
        return [save_study_figure(load_study(path), folder)]
    if rl_results.is_rl_result(path):
        return [rl_plots.save_figure(rl_results.load(path), folder)]
    return save_figures(load(path), folder)


def _below(path: Path) -> list[Path]:
    """A result, or all of them below a folder that holds none itself.

    Raises:
        UsageError: There is none.
    """
    names = (FILE_NAME, TUNING_FILE, STUDY_FILE)
    if not path.is_dir() or any((path / name).is_file() for name in names):
        return [path]
    found = sorted(file for name in names for file in path.rglob(name))
    if not found:
        known = f"{', '.join(names[:-1])} or {names[-1]}"
        raise UsageError(f"{path}: no {known} there, nor in a folder below")
    return found


def plot(arguments: argparse.Namespace) -> int:
    """Draws the figures of saved results again, next to each result.

    Args:
        arguments: The parsed options.

    Returns:
        The exit code 0.
    """
    console = make_console()
    for path in [file for given in arguments.results for file in _below(given)]:
        folder = path if path.is_dir() else path.parent
        for written in _draw(path, folder):
            console.print(f"wrote {written}", markup=False, highlight=False, soft_wrap=True)
    return EXIT_OK
