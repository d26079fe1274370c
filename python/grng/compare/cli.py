# SPDX-License-Identifier: Apache-2.0
"""``python -m grng compare``: options, the loop over optimizers and seeds, exit codes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from grng.compare import environment
from grng.compare.config import CompareConfig, resolve_device
from grng.compare.errors import UsageError
from grng.compare.memory import peak_memory_kind
from grng.compare.optimizers import OptimizerSpec, parse_specs
from grng.compare.plan import make_plan
from grng.compare.plots import save_figures
from grng.compare.progress import Reporter, choose_reporter
from grng.compare.records import DIVERGED, FINISHED, INTERRUPTED, RUNNING, RunRecord
from grng.compare.results import ComparisonResult, create_folder, load
from grng.compare.runs import check_specs, execute, parameter_counts
from grng.compare.summary import DEFAULT_REFERENCE
from grng.compare.table import print_summary
from grng.rl.compare import plots as rl_plots
from grng.rl.compare import results as rl_results
from grng.tasks import ClassificationData, DataError, LoadRequest

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
# Wide enough for one line per row in a file; a terminal keeps its own width.
_PLAIN_WIDTH = 160
_EPOCHS, _BATCH_SIZE = 10, 256
_SCHEDULES = {
    "cosine": "linear warm-up, then cosine to zero",
    "constant": "constant learning rate",
}


def _integers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option} must be whole numbers like 1,2,3, got {text!r}") from None


def _config(arguments: argparse.Namespace) -> CompareConfig:
    """The settings.

    Raises:
        UsageError: A value is wrong, or two do not go together.
    """
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


def without_paths(argv: list[str]) -> list[str]:
    """The arguments with folders of this machine replaced by the name of their option."""
    cleaned: list[str] = []
    for argument in argv:
        option, has_value, value = argument.partition("=")
        if has_value and option.startswith("--") and Path(value).expanduser().is_absolute():
            cleaned.append(f"{option}=<{option.lstrip('-')}>")
        elif Path(argument).expanduser().is_absolute():
            cleaned.append(f"<{cleaned[-1].lstrip('-')}>" if cleaned else "<path>")
        else:
            cleaned.append(argument)
    return cleaned


def _describe_config(
    config: CompareConfig, specs: list[OptimizerSpec], resolved: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    parameters, trained = parameter_counts(config)
    return {
        "task": config.task,
        "mode": {"epoch": "epochs", "step": "steps", "sample": "stream"}[config.counts],
        "optimizers": [
            {
                "label": spec.label,
                "name": spec.name,
                "options": {key: _plain(value) for key, value in spec.options.items()},
                "hyperparameters": resolved[spec.label],
            }
            for spec in specs
        ],
        "epochs": config.epochs if config.steps is None else None,
        "steps": config.steps,
        "seeds": list(config.seeds),
        "batch_size": config.batch_size,
        "stream": config.stream,
        "checkpoints": config.checkpoints,
        "reference": config.reference,
        "measure": config.measure.name,
        "unit": config.task_entry.unit,
        "likelihood": config.task_entry.likelihood,
        "model_name": config.model_name,
        "model": config.model_entry.describe(config.model_options),
        "model_options": _options(config),
        "model_parameters": parameters,
        "trained_parameters": trained,
        "schedule": _SCHEDULES[config.schedule_name],
        "warmup_fraction": config.warmup_fraction if config.schedule_name == "cosine" else 0.0,
        "train_limit": config.train_limit,
        "validation": config.held_out,
        "device": config.device,
        "threads": config.threads,
    }


def _options(config: CompareConfig) -> dict[str, Any]:
    option = config.model_entry.option
    return {} if option is None else {option[0]: _plain(getattr(config.model_options, option[0]))}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _describe_data(data: ClassificationData, device: torch.device) -> dict[str, Any]:
    return {
        "source": data.source,
        "sha256_decompressed": data.checksums,
        "train_samples": len(data.train_labels),
        "validation_samples": 0 if data.validation is None else len(data.validation[1]),
        "test_samples": len(data.test_labels),
        "peak_memory_kind": peak_memory_kind(device),
    }


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
    for seed in config.seeds:
        for spec in specs:
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


def compare(arguments: argparse.Namespace, argv: list[str]) -> int:
    """Runs a comparison.

    Args:
        arguments: The parsed options.
        argv: The options as given, for the record.

    Returns:
        The exit code: 0, 1 when a run diverged or there is no data, 130 when interrupted.

    Raises:
        UsageError: An argument is wrong.
    """
    config = _config(arguments)
    device = resolve_device(config.device)
    likelihood = config.task_entry.likelihood
    specs = [spec.for_likelihood(likelihood) for spec in parse_specs(arguments.optimizers)]
    _check_reference(config, specs)
    if config.threads is not None:
        torch.set_num_threads(config.threads)

    console = make_console()
    request = LoadRequest(
        device=device,
        data_dir=config.data_dir,
        train_limit=config.train_limit,
        validation=config.held_out,
        report=lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True),
    )
    try:
        resolved = check_specs(specs, config, device)
        data = config.task_entry.load(request)
    except DataError as error:
        print(f"grng compare: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED

    # Wrong numbers are reported before there is a folder.
    make_plan(config, len(data.train_labels))
    folder, created_utc = create_folder(arguments.out, config.task)
    result = ComparisonResult(
        command=["python", "-m", "grng", *without_paths(argv)],
        config=_describe_config(config, specs, resolved),
        environment=environment.describe(device),
        data=_describe_data(data, device),
        created_utc=created_utc,
    )
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
    if rl_results.is_rl_result(path):
        return [rl_plots.save_figure(rl_results.load(path), folder)]
    return save_figures(load(path), folder)


def plot(arguments: argparse.Namespace) -> int:
    """Draws the figures of saved results again, next to each result.

    Args:
        arguments: The parsed options.

    Returns:
        The exit code 0.
    """
    console = make_console()
    for path in arguments.results:
        folder = path if path.is_dir() else path.parent
        for written in _draw(path, folder):
            console.print(f"wrote {written}", markup=False, highlight=False, soft_wrap=True)
    return EXIT_OK
