# SPDX-License-Identifier: Apache-2.0
"""``python -m grng compare`` with a task of reinforcement learning."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from grng.compare import environment
from grng.compare.cli import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, make_console
from grng.compare.describe import without_paths
from grng.compare.errors import UsageError
from grng.compare.results import FILE_NAME, create_folder, utc_now
from grng.compare.resume import take_up
from grng.rl.compare.methods import Method, parse_methods
from grng.rl.compare.plots import save_figure
from grng.rl.compare.records import DIVERGED, FINISHED, INTERRUPTED, RUNNING, RLRun
from grng.rl.compare.results import RLResult, load
from grng.rl.compare.runs import RLConfig, check, execute
from grng.rl.compare.table import print_table
from grng.rl.environments import maker
from grng.rl.errors import RLError

DEFAULT_METHODS = "rank1,rmsprop,adamw"
_STEPS = 100_000
# Options of the other tasks, and what each is when it was not given.
_FOREIGN: dict[str, Any] = {
    "model": None,
    "epochs": None,
    "stream": None,
    "batch_size": None,
    "lora_rank": None,
    "schedule": None,
    "train_limit": None,
    "per_class": None,
    "validation": None,
    "data_dir": None,
    "warmup_fraction": 0.05,
    "reference": "adamw",
}


def _config(arguments: argparse.Namespace) -> RLConfig:
    for name, unset in _FOREIGN.items():
        if getattr(arguments, name) != unset:
            raise UsageError(f"--{name.replace('_', '-')} does not go with --task {arguments.task}")
    if arguments.device == "cuda":
        raise UsageError("--device must be cpu or auto: these networks are small")
    if arguments.threads is not None and arguments.threads < 1:
        raise UsageError(f"--threads must be > 0, got {arguments.threads}")
    has_seeds, has_hidden = arguments.seeds is not None, arguments.hidden is not None
    return RLConfig(
        task_name=arguments.task,
        steps=_STEPS if arguments.steps is None else arguments.steps,
        seeds=_integers("--seeds", arguments.seeds) if has_seeds else (arguments.seed,),
        checkpoints=50 if arguments.checkpoints is None else arguments.checkpoints,
        hidden=_integers("--hidden", arguments.hidden) if has_hidden else (64, 64),
    )


def _integers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option} must be whole numbers like 1,2,3, got {text!r}") from None


class _Progress:
    """A bar on a terminal; else a line for each run."""

    def __init__(self, console: Console, config: RLConfig, *, is_silent: bool) -> None:
        self._console, self._config, self._is_silent = console, config, is_silent
        self._bar: Any = None
        self._task: Any = None

    def around(self, run: RLRun) -> AbstractContextManager[Any]:
        from contextlib import nullcontext

        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        if self._is_silent or not self._console.is_terminal:
            return nullcontext()
        self._bar = Progress(
            TextColumn(f"{run.method} seed {run.seed}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[state]}", markup=False),
            TimeRemainingColumn(),
            console=self._console,
            refresh_per_second=4,
        )
        self._task = self._bar.add_task("", total=self._config.steps, state="preparing")
        return self._bar

    def grown(self, run: RLRun) -> None:
        if self._bar is None or not run.curve_steps:
            return
        steps, value = run.curve_steps[-1], run.final_return
        state = f"step {steps:,}/{self._config.steps:,}"
        state += "" if value is None else f"  return {value:.1f}"
        self._bar.update(self._task, completed=steps, state=state)

    def ended(self, run: RLRun) -> None:
        self._bar = None
        if self._is_silent or self._console.is_terminal:
            return
        value = "none" if run.final_return is None else f"{run.final_return:.1f}"
        line = (
            f"{run.method} seed {run.seed}  {run.status}  final return {value}  {run.seconds:.1f} s"
        )
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _describe(config: RLConfig, methods: list[Method]) -> dict[str, Any]:
    return {
        "task": config.task_name,
        "title": config.task.title,
        "environment_id": config.task.id,
        "environment_options": config.task.options,
        "is_normalized": config.task.is_normalized,
        "solved": config.task.solved,
        "steps": config.steps,
        "seeds": list(config.seeds),
        "checkpoints": config.checkpoints,
        "hidden": list(config.hidden),
        "evaluation_episodes": config.evaluation_episodes,
        "methods": [
            {
                "label": m.label,
                "name": m.name,
                "options": m.options,
                "settings": m.settings(),
                "resolved": m.resolved(),
            }
            for m in methods
        ],
    }


def _begin(fresh: RLResult, folder: Path) -> None:
    """Take the runs that are in this folder, if there are any.

    Raises:
        UsageError: They are of other settings or of other code, or the folder cannot be made.
    """
    known = take_up(folder / FILE_NAME, fresh, load, option="--into")
    if known is not None:
        fresh.runs = [run for run in known.runs if run.status in (FINISHED, DIVERGED)]
        fresh.created_utc, fresh.command = known.created_utc, known.command


def compare(arguments: argparse.Namespace, argv: list[str]) -> int:
    """Run a comparison.

    Args:
        arguments: The parsed options.
        argv: The options as given, for the record.

    Returns:
        The exit code: 0, 1 when a run failed, 130 when interrupted.

    Raises:
        UsageError: An argument is wrong, or a package is missing.
    """
    config = _config(arguments)
    console = make_console()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    try:
        # By name, before a run: what is missing, and which task is unknown.
        maker(config.task_name)
        given = arguments.optimizers
        methods = parse_methods(DEFAULT_METHODS if given is None else given)
        check(methods, config)
    except RLError as error:
        raise UsageError(str(error)) from error
    result = RLResult(
        command=["python", "-m", "grng", *without_paths(argv)],
        config=_describe(config, methods),
        environment=environment.describe(torch.device("cpu")),
        created_utc=utc_now(),
    )
    folder = arguments.into
    if folder is None:
        folder, _ = create_folder(arguments.out, config.task_name)
    else:
        _begin(result, folder)
    done = {(run.method, run.seed) for run in result.runs}
    progress = _Progress(console, config, is_silent=arguments.no_progress)
    try:
        # Seed by seed: an interrupted comparison then has all methods of some seeds.
        for seed in config.seeds:
            for method in [m for m in methods if (m.label, seed) not in done]:
                run = RLRun(method.label, seed)
                result.runs.append(run)
                with progress.around(run):
                    execute(method, run, config, lambda run=run: progress.grown(run))  # type: ignore[misc]
                progress.ended(run)
                result.save(folder)
        has_failed = any(run.status == DIVERGED for run in result.runs)
        result.status = DIVERGED if has_failed else FINISHED
    except KeyboardInterrupt:
        result.status = INTERRUPTED
        for run in result.runs:
            if run.status == RUNNING:
                run.status = INTERRUPTED
    print_table(console, result)
    for path in (result.save(folder), save_figure(result, folder)):
        console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)
    return {FINISHED: EXIT_OK, INTERRUPTED: EXIT_INTERRUPTED}.get(result.status, EXIT_FAILED)
