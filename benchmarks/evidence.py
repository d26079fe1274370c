# SPDX-License-Identifier: Apache-2.0
"""Every optimizer searched with the same budget on held-out samples, then run on other seeds and tested once.

``python benchmarks/evidence.py TASK [--optimizers A,B] [--budget B] [--stage STAGE] [--percent P,Q] [--quick]
[--out DIR]``
with TASK one of ``STUDIES``. Stage ``tune`` runs ``python -m grng tune`` for each optimizer, into
``DIR/evidence-TASK/tune-OPTIMIZER``; ``test`` compares the best settings of each, and the defaults of
ours, into ``DIR/evidence-TASK``; ``short`` does the same for RING and AdamW in 25, 40, 50 and 65 % of the
steps (``--percent 50``: in these alone), each with the whole schedule, into
``DIR/evidence-TASK/short-PERCENT``; ``all`` is the three. All go on where they were interrupted, by the same
command. ``time``, which is not among them, wants an idle machine: it
takes 80 steps with each, into ``DIR/evidence-TASK/time``.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grng.__main__ import main as grng
from grng.compare.errors import UsageError
from grng.compare.optimizers import OPTIMIZERS as KNOWN
from grng.compare.records import DIVERGED, FINISHED
from grng.tune.records import load

RESULTS = Path(__file__).parent / "results"
OPTIMIZERS = ("ring", "reng", "adamw", "muon", "soap", "sgd", "kfac", "sophiag")
# Where a run takes a minute: the best rivals of the others.
_FEW = ("ring", "adamw", "muon", "soap")
# Whose defaults are run beside what the search found.
OURS = ("ring", "reng")
SEEDS = "0,1,2"
_REFERENCE = "adamw"
# Percent of the steps: whether RING gets as far in these as AdamW does in all.
SHORT = (25, 40, 50, 65)
_QUICK = ("--steps", "3", "--checkpoints", "1", "--train-limit", "200", "--validation", "50")
# A search looks at the end alone; curves are of the test.
_LOOKS = ("--checkpoints", "2")


@dataclass(frozen=True)
class Study:
    """A task with how long and on what it is trained, what is compared, and trials for each of them."""

    title: str
    options: tuple[str, ...]
    optimizers: tuple[str, ...]
    budget: int


def _study(
    title: str, options: str, optimizers: tuple[str, ...] = OPTIMIZERS, budget: int = 10
) -> Study:
    return Study(title, tuple(options.split()), optimizers, budget)


STUDIES = {
    "digits": _study("MLP, digits", "--task digits --batch-size 32 --steps 400 --checkpoints 20"),
    "mlp": _study(
        "MLP, Fashion-MNIST",
        "--task fashion-mnist --model mlp --batch-size 256 --steps 1075 --checkpoints 20 --validation 5000",
    ),
    "resnet": _study(
        "ResNet, Fashion-MNIST",
        "--task fashion-mnist --model resnet --batch-size 64 --steps 250 --checkpoints 25 --validation 2000",
        _FEW,
        7,
    ),
    "vit": _study(
        "ViT, Fashion-MNIST",
        "--task fashion-mnist --model vit --batch-size 64 --steps 300 --checkpoints 20 --validation 2000",
        _FEW,
        7,
    ),
    "char": _study(
        "Transformer, characters of Shakespeare",
        "--task shakespeare-char --batch-size 16 --steps 300 --checkpoints 20 --validation 200",
        _FEW,
        7,
    ),
    "authors": _study(
        "MiniLM with LoRA, two authors",
        "--task authors --batch-size 16 --steps 120 --checkpoints 12",
        _FEW,
        7,
    ),
    "plays": _study(
        "MiniLM with LoRA, ten plays",
        "--task plays --batch-size 16 --steps 200 --checkpoints 10",
        _FEW,
        7,
    ),
}


def folder_of(task: str, out: Path) -> Path:
    """The folder of a study."""
    return out / f"evidence-{task}"


def _options(task: str, others: tuple[str, ...] = ()) -> list[str]:
    """The options of a study, of which others take the place of those of the same name."""
    options = STUDIES[task].options
    given = others[::2]
    pairs = zip(options[::2], options[1::2], strict=True)
    kept = [part for name, value in pairs if name not in given for part in (name, value)]
    return [*kept, *others]


def _run(arguments: list[str], file: Path) -> None:
    """Run a command; one in which a run diverged is a result, if its file says so.

    Raises:
        SystemExit: It failed or was interrupted.
    """
    # A file from before must not speak for a command that wrote nothing.
    before = file.stat().st_mtime_ns if file.is_file() else None
    code = grng([*arguments, "--threads", "1"])
    is_written = file.is_file() and file.stat().st_mtime_ns != before
    if code == 1 and is_written and _has_diverged(json.loads(file.read_text())):
        return
    if code != 0:
        raise SystemExit(code)


def _has_diverged(content: dict[str, Any]) -> bool:
    """Whether a comparison has runs that diverged, or a search none that did not."""
    if "trials" in content:
        statuses = [trial["status"] for trial in content["trials"]]
        return content["status"] == FINISHED and set(statuses) == {DIVERGED}
    return bool(content["status"] == DIVERGED)


def tune(task: str, optimizers: list[str], budget: int, out: Path, *, is_quick: bool) -> None:
    """Search for the settings of each optimizer."""
    for name in optimizers:
        search = ["tune", *_options(task, _QUICK if is_quick else _LOOKS), "--optimizer", name]
        folder = folder_of(task, out) / f"tune-{name}"
        _run([*search, "--budget", str(budget), "--out", str(folder)], folder / "tune.json")


def specs(task: str, optimizers: list[str], budget: int, out: Path) -> list[str]:
    """What is compared: the best settings that each search found, and the defaults of ours.

    Raises:
        SystemExit: A search is not complete, or found nothing.
        UsageError: There is no search of an optimizer.
    """
    found: list[str] = []
    for name in optimizers:
        folder = folder_of(task, out) / f"tune-{name}"
        result = load(folder)
        made = len(result.trials)
        if result.status != FINISHED or made != budget:
            raise SystemExit(
                f"{folder}: the search must be finished with {budget} trials, got status "
                f"{result.status!r} and {made} trials"
            )
        best = result.best
        if best is None:
            print(f"no trial of {name} finished: it is left out", file=sys.stderr)
            continue
        found.append(best.optimizer)
        if name in OURS and not result.is_default(best):
            found.append(name)
    if not found:
        raise SystemExit(f"{folder_of(task, out)}: nothing to compare: no search found a setting")
    return found


def _compare(task: str, chosen: list[str], folder: Path, others: tuple[str, ...]) -> None:
    names = [name.split(":")[0] for name in chosen]
    _run(
        [
            "compare",
            *_options(task, others),
            "--optimizers",
            ",".join(chosen),
            "--reference",
            _REFERENCE if _REFERENCE in names else chosen[0],
            "--seeds",
            "0" if others == _QUICK else SEEDS,
            "--into",
            str(folder),
        ],
        folder / "result.json",
    )


def test(task: str, optimizers: list[str], budget: int, out: Path, *, is_quick: bool) -> None:
    """Train what was found on other seeds, and look at the test set."""
    chosen = specs(task, optimizers, budget, out)
    _compare(task, chosen, folder_of(task, out), _QUICK if is_quick else ())


def short(
    task: str,
    optimizers: list[str],
    budget: int,
    out: Path,
    *,
    is_quick: bool,
    parts: tuple[int, ...] = SHORT,
) -> None:
    """Train RING and AdamW for parts of the steps, on the same seeds, and look at the test set.

    Raises:
        SystemExit: Neither is among the optimizers, or as :func:`specs` says.
    """
    names = [name for name in optimizers if name in (OURS[0], _REFERENCE)]
    if not names:
        raise SystemExit(f"stage short is of {OURS[0]} and {_REFERENCE}: --optimizers has neither")
    chosen = specs(task, names, budget, out)
    options = dict(zip(STUDIES[task].options[::2], STUDIES[task].options[1::2], strict=True))
    for percent in parts:
        steps = round(percent / 100 * int(options["--steps"]))
        length = ("--steps", str(steps), "--checkpoints", "1")
        folder = folder_of(task, out) / f"short-{percent}"
        _compare(task, chosen, folder, _QUICK if is_quick else length)


def time(task: str, optimizers: list[str], budget: int, out: Path, *, is_quick: bool) -> None:
    """Take a few steps with each, to know what a step takes: no setting but the optimizer matters."""
    del budget
    length = ("--steps", "80", "--checkpoints", "1", "--validation", "100")
    _compare(task, optimizers, folder_of(task, out) / "time", _QUICK if is_quick else length)


def _parts(written: str) -> tuple[int, ...]:
    """Percents, from "40,65".

    Raises:
        ArgumentTypeError: The tables know no such part.
    """
    known = {str(part): part for part in SHORT}
    given = written.replace(" ", "").split(",")
    if not known.keys() >= set(given):
        raise argparse.ArgumentTypeError(f"must be of {', '.join(known)}, got {written!r}")
    return tuple(known[part] for part in dict.fromkeys(given))


def main() -> int:
    """Run a study; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("task", choices=STUDIES)
    parser.add_argument("--optimizers", help="default: those of the task")
    parser.add_argument("--budget", type=int, help="trials of each (default: of the task, 7 or 10)")
    parser.add_argument("--stage", choices=("tune", "test", "short", "time", "all"), default="all")
    parser.add_argument(
        "--percent", type=_parts, help="of stage short, as 40,65; default: all of them"
    )
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results")
    arguments = parser.parse_args()
    if arguments.quick and arguments.out is None:
        parser.error("--quick needs --out: it would go on with the results that are kept")
    if arguments.percent is not None and arguments.stage not in ("short", "all"):
        parser.error(f"--percent is of stage short, got --stage {arguments.stage}")
    study, out = STUDIES[arguments.task], arguments.out or RESULTS
    given = arguments.optimizers
    names = list(study.optimizers) if given is None else given.replace(" ", "").split(",")
    for name in names:
        if name not in KNOWN:
            parser.error(f"--optimizers must be of {', '.join(KNOWN)}, got {name!r}")
    budget = study.budget if arguments.budget is None else arguments.budget
    budget = 2 if arguments.quick else budget
    try:
        shorter = functools.partial(short, parts=arguments.percent or SHORT)
        stages = {"tune": tune, "test": test, "short": shorter, "time": time}
        for name, stage in stages.items():
            if arguments.stage == name or (arguments.stage == "all" and name != "time"):
                stage(arguments.task, names, budget, out, is_quick=arguments.quick)
    except UsageError as error:
        print(f"evidence.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
