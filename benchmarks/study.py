# SPDX-License-Identifier: Apache-2.0
"""Studies of one question each: ``python benchmarks/study.py NAME [--quick] [--seeds 0,1,2] [--out FOLDER]``.

NAME is one of ``studies.catalogue.STUDIES``, or ``all``. The result is ``FOLDER/study-NAME/study.json`` with
its figure; an interrupted study goes on by the same command, also with more seeds. A run that diverges is
recorded as such.

Exit code: 0, 1 when a run diverged, the data is missing or memory ran out, 2 for a wrong argument, 130 when
interrupted.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from studies.catalogue import STUDIES
from studies.definition import Definition, Options, Planned
from studies.failures import is_divergence, is_out_of_memory

from grng.compare import environment
from grng.compare.errors import UsageError
from grng.compare.records import DIVERGED, FINISHED, INTERRUPTED
from grng.compare.results import utc_now
from grng.compare.resume import take_up
from grng.studies.plots import save_figure
from grng.studies.records import FILE_NAME, StudyResult, StudyRun, Value, load
from grng.tasks.data import DataError

RESULTS = Path(__file__).parent / "results"


def _begin(
    definition: Definition, options: Options, plan: list[Planned], command: list[str], out: Path
) -> StudyResult:
    """A new result, or the one that is there.

    Raises:
        UsageError: The one that is there was begun with other settings, code or versions, or has runs of
            other seeds; or the folder cannot be made.
    """
    fresh = StudyResult(
        name=definition.name,
        title=definition.title,
        subtitle=definition.subtitle,
        panels=list(definition.panels),
        command=command,
        config={**definition.config(options), "quick": options.is_quick},
        environment=environment.describe(torch.device("cpu")),
        created_utc=utc_now(),
    )
    known = take_up(out / FILE_NAME, fresh, load, option="--out")
    if known is None:
        return fresh
    others = sorted({run.seed for run in known.runs} - set(options.seeds))
    if others:
        # Else it would be called finished although these may lack runs.
        raise UsageError(
            f"{out / FILE_NAME}: has runs of seeds that --seeds does not ask for: "
            f"{', '.join(map(str, others))}; give these too, or another folder"
        )
    fresh.runs = known.runs
    fresh.created_utc = known.created_utc
    if known.status == FINISHED and all(known.has(p.series, p.setting, p.seed) for p in plan):
        # Nothing is added: what is there is what that command made.
        fresh.command = known.command
    return fresh


def _not_finite(points: list[dict[str, Value]]) -> str | None:
    """The first number that JSON has no word for; None if there is none."""
    for place, point in enumerate(points):
        for key, value in point.items():
            if isinstance(value, float) and not math.isfinite(value):
                return f"{key} of point {place} is {value}"
    return None


def _make(planned: Planned) -> StudyRun:
    status, reason, points, seconds = FINISHED, None, [], 0.0
    try:
        points, seconds = planned.run()
        reason = _not_finite(points)
    except (ArithmeticError, RuntimeError) as error:
        # As in grng compare: what torch and the optimizers raise when their numbers fail.
        if not is_divergence(error):
            raise
        reason = f"{type(error).__name__}: {error}"[:300]
    if reason is not None:
        status, points = DIVERGED, []
    return StudyRun(
        planned.series, planned.setting, planned.seed, status, points, round(seconds, 3), reason
    )


def run(definition: Definition, options: Options, command: list[str], folder: Path) -> StudyResult:
    """Make the runs that are not there yet, and draw the figure.

    Args:
        definition: The study.
        options: Seeds and length.
        command: For the record.
        folder: Of the results of all studies.

    Returns:
        The study, which is also in ``folder/study-NAME``.

    Raises:
        UsageError: What is there was begun with other settings, code or versions, or has other seeds.
        DataError: Of a run, as all errors that are no divergence: after what is there was saved.
        KeyboardInterrupt: After what is there was saved.
    """
    out = folder / f"study-{definition.name}"
    plan = list(definition.plan(options))
    result = _begin(definition, options, plan, command, out)
    try:
        for number, planned in enumerate(plan, start=1):
            key = (planned.series, planned.setting, planned.seed)
            if result.has(*key):
                continue
            start = time.perf_counter()
            result.runs.append(_make(planned))
            result.save(out)
            took = time.perf_counter() - start
            name = " ".join(part for part in (planned.series, planned.setting) if part)
            made = result.runs[-1]
            why = f" ({made.reason})" if made.reason else ""
            options.report(
                f"{definition.name} {number}/{len(plan)}: {name}, seed {planned.seed}, "
                f"{made.status}{why}, {took:.0f} s"
            )
    except BaseException:
        result.status = INTERRUPTED
        result.save(out)
        raise
    # In the order of the plan: one that was gone on with reads like one that was not.
    order = {(p.series, p.setting, p.seed): place for place, p in enumerate(plan)}
    result.runs.sort(key=lambda one: order.get(one.key, len(order)))
    result.status = FINISHED
    result.save(out)
    save_figure(result, out)
    return result


def main(given: Sequence[str] | None = None) -> int:
    """Run the program; return the exit code.

    Raises:
        RuntimeError: A fault of the program; not one of data or memory, which is printed.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=(*STUDIES, "all"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results")
    parser.add_argument("--data-dir", type=Path, help="folder with the data, as for grng compare")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    arguments = parser.parse_args(given)
    if arguments.quick and arguments.out is None:
        parser.error("--quick needs --out: it would go on with the results that are kept")
    try:
        seeds = tuple(int(seed) for seed in arguments.seeds.split(","))
    except ValueError:
        parser.error(f"--seeds must be whole numbers like 0,1,2, got {arguments.seeds!r}")
    if arguments.threads < 1:
        parser.error(f"--threads must be at least 1, got {arguments.threads}")
    torch.set_num_threads(arguments.threads)
    options = Options(
        (0,) if arguments.quick else seeds,
        arguments.quick,
        arguments.data_dir,
        lambda text: print(text, flush=True),
    )
    names = list(STUDIES) if arguments.name == "all" else [arguments.name]
    has_diverged = False
    try:
        for name in names:
            command = ["python", "benchmarks/study.py", name, "--seeds", arguments.seeds]
            result = run(STUDIES[name], options, command, arguments.out or RESULTS)
            has_diverged |= any(one.status == DIVERGED for one in result.runs)
    except UsageError as error:
        print(f"study.py: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not isinstance(error, DataError) and not is_out_of_memory(error):
            raise
        print(f"study.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 1 if has_diverged else 0


if __name__ == "__main__":
    sys.exit(main())
