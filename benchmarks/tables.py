# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of README and docs from the results that are kept.

``python benchmarks/tables.py`` writes each table again, between ``<!-- table: NAME -->`` and ``<!-- end of
table -->``; ``--check`` writes nothing, and exits with 1 where a page has another table than its results.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import evidence_tables
import rl_tables
import study_tables
from table_text import markdown, text

from grng.compare.records import FINISHED, EpochRecord
from grng.compare.results import ComparisonResult, load

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# Times are quoted from this machine, idle.
MACHINE = RESULTS / "intel-xeon-2-threads"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
_MARKED = re.compile(r"<!-- table: (\S+) -->\n(.*?)<!-- end of table -->", re.S)


@dataclass(frozen=True)
class Column:
    """What a column shows of the last evaluation of each run."""

    heading: str
    field: str
    # +1 where higher is better.
    sign: int = 1
    scale: float = 100
    decimals: int = 2

    def of(self, epoch: EpochRecord) -> float:
        """The value of one run, as it is written."""
        value = getattr(epoch, self.field)
        assert value is not None, f"{self.field} was not measured"
        return float(self.scale * value)


ONLINE = Column("online %", "online_accuracy")
VALIDATION = Column("validation %", "validation_accuracy")
TEST = Column("test %", "test_accuracy")
TEST_LOSS = Column("test loss", "test_loss", sign=-1, scale=1, decimals=3)


@dataclass(frozen=True)
class Line:
    """One line: what it is called, and which runs it is of."""

    title: str
    folder: str
    label: str
    # Behind a value, by heading: the mark of a footnote.
    notes: tuple[tuple[str, str], ...] = ()


@functools.cache
def result(folder: str) -> ComparisonResult:
    """The result of a folder."""
    return load(RESULTS / folder)


def values(folder: str, label: str, column: Column) -> list[float]:
    """The values of all seeds.

    Raises:
        ValueError: There are none, or a run did not finish.
    """
    runs = [run for run in result(folder).runs if run.optimizer == label]
    if not runs or any(run.status != FINISHED for run in runs):
        raise ValueError(f"{folder}: no finished runs of {label!r}")
    return [column.of(run.epochs[-1]) for run in runs]


def by_line(lines: Sequence[Line], columns: Sequence[Column], heading: str = "optimizer") -> str:
    """A table of values, the best of each column in bold."""
    cells = []
    for column in columns:
        found = [values(line.folder, line.label, column) for line in lines]
        means = [statistics.fmean(own) for own in found]
        best = max(column.sign * mean for mean in means)
        cells.append(
            [
                text(own, column.decimals, is_bold=column.sign * mean == best)
                + dict(line.notes).get(column.heading, "")
                for line, own, mean in zip(lines, found, means, strict=True)
            ]
        )
    rows = [[line.title, *row] for line, row in zip(lines, zip(*cells, strict=True), strict=True)]
    return markdown([heading, *(column.heading for column in columns)], rows)


# ---- RING against AdamW ----


@dataclass(frozen=True)
class Task:
    """A comparison of RING's defaults with AdamW at the best of several rates."""

    title: str
    folder: str
    column: Column = TEST
    adamw_note: str = ""
    part_note: str = ""
    # Another setting that stands beside the defaults.
    beside: str | None = None


TASKS = (
    Task(
        "[ViT]({}), 4 blocks of width 64, Fashion-MNIST, 400 steps of 64",
        "fashion-mnist-vit",
    ),
    Task(
        "[ResNet]({}), 7 convolutions of 16 to 64 channels, Fashion-MNIST, 300 steps of 64",
        "fashion-mnist-resnet",
    ),
    Task(
        "[Transformer]({}), 4 blocks of width 128, characters of Shakespeare, 500 steps of 16",
        "shakespeare-char",
        TEST_LOSS,
        adamw_note=" ¹",
    ),
    Task(
        "[MiniLM with LoRA r 8]({}), 10 plays of Shakespeare, 250 steps of 32",
        "plays-lora",
        part_note=" ²",
    ),
    Task(
        "[MLP]({}) 784-256-256-10, Fashion-MNIST, 2,150 steps of 256",
        "fashion-mnist",
        part_note=" ³",
        beside="weight_decay=0.1",
    ),
)


def ring_and_adamw() -> str:
    """RING with its defaults, AdamW at its best rate, and in what part of the steps RING is there."""
    rows = []
    for task in TASKS:
        column, summary = task.column, result(task.folder).summary()
        assert summary.target is not None, "AdamW finished"
        known = {row.optimizer: row for row in summary.rows}
        best = summary.target.optimizer
        ours, theirs = values(task.folder, "ring", column), values(task.folder, best, column)
        beside = ""
        candidates = [ours]
        if task.beside is not None:
            candidates.append(values(task.folder, f"ring:{task.beside}", column))
            own = text(
                candidates[-1], column.decimals, is_bold=_wins(candidates[-1], theirs, column)
            )
            beside = f"; {own}{_unit(column)} with `{task.beside}`"
        part, loss = (
            known["ring"].part_of_steps_to_target,
            known["ring"].part_of_steps_to_train_loss,
        )
        assert part is not None, "RING came there"
        in_loss = "-" if loss is None else f"{loss:.2f}"
        rows.append(
            [
                task.title.format(f"benchmarks/results/{task.folder}/result.json"),
                text(ours, column.decimals, is_bold=_wins(ours, theirs, column))
                + f"{_unit(column)}{beside}",
                f"{text(theirs, column.decimals)}{' %' if column.scale == 100 else ''}"
                f" (lr {_rate(best)}){task.adamw_note}",
                f"{part:.2f} ({in_loss}){task.part_note}",
            ]
        )
    return markdown(["model and task", "RING", "AdamW", "part of the steps"], rows)


def _rate(label: str) -> str:
    return label.split("lr=")[1].split(":")[0]


def _unit(column: Column) -> str:
    return " %" if column.scale == 100 else " (loss)"


def _wins(ours: Sequence[float], theirs: Sequence[float], column: Column) -> bool:
    """Beyond the spread of the seeds."""
    gap = column.sign * (statistics.fmean(ours) - statistics.fmean(theirs))
    return gap > max(statistics.stdev(ours), statistics.stdev(theirs))


# ---- streams ----

_OURS = "**`RKalman(model)`** (defaults)"


def digits_stream() -> str:
    """Digits, 1,000 samples one by one."""
    where = "digits-stream"
    lines = [
        Line("**`RKalman(model)`** (defaults; sigma0 0.3, 1, 2, 5)", where, "rkalman"),
        Line("RKalman, `rho=0`", where, "rkalman:rho=0"),
        Line("AdaGrad, lr 0.03 (0.01, 0.03, 0.1)", where, "adagrad:lr=0.03"),
        Line("AdamW, lr 1e-3 (3e-4, 1e-3, 3e-3, 1e-2)", where, "adamw:lr=1e-3", _note("¹")),
        Line("SGD, lr 0.01 (0.01, 0.03, 0.1)", where, "sgd:lr=0.01:momentum=0", _note("¹")),
        Line("LoKO, sigma0 0.3 (0.1, 0.3, 1)", where, "loko:sigma0=0.3"),
    ]
    return by_line(lines, (ONLINE, VALIDATION, TEST))


def _note(mark: str) -> tuple[tuple[str, str], ...]:
    return ((ONLINE.heading, f" {mark}"),)


def fashion_stream() -> str:
    """Fashion-MNIST, 3,000 samples one by one."""
    where = "fashion-mnist-stream"
    lines = [
        Line(_OURS, where, "rkalman"),
        Line("AdaGrad, lr 0.01 (0.001, 0.003, 0.01)", where, "adagrad:lr=0.01", _note("²")),
        Line("AdamW, lr 3e-4 (1e-4, 3e-4, 1e-3)", where, "adamw:lr=3e-4"),
        Line("SGD, lr 0.01 (0.003, 0.01)", where, "sgd:lr=0.01:momentum=0"),
        Line("LoKO, sigma0 0.1 (0.1, 0.3)", where, "loko:sigma0=0.1"),
    ]
    return by_line(lines, (ONLINE, VALIDATION, TEST))


def authors_stream() -> str:
    """Sentences of two authors, 600 samples one by one."""
    where = "authors-stream"
    lines = [
        Line(_OURS, where, "rkalman"),
        Line("AdaGrad, lr 0.01 (0.003, 0.01)", where, "adagrad:lr=0.01"),
        Line("AdamW, lr 1e-3 (3e-4, 1e-3)", where, "adamw:lr=1e-3"),
        Line(
            "SGD, lr 0.03 (0.003, 0.01, 0.03) ³", "authors-stream-rivals", "sgd:lr=0.03:momentum=0"
        ),
        Line("LoKO, sigma0 0.05", where, "loko:sigma0=0.05"),
    ]
    return by_line(lines, (ONLINE, VALIDATION, TEST))


def plays_stream() -> str:
    """Passages of ten plays, 480 samples one by one."""
    where = "plays-stream-480"
    lines = [
        Line("RKalman, `max_kl=0.03`", where, "rkalman:max_kl=0.03"),
        Line(_OURS, where, "rkalman"),
        Line("AdamW, lr 1e-3 (3e-4, 1e-3, 3e-3)", where, "adamw:lr=1e-3"),
        Line("RKalman, `max_kl=1`", where, "rkalman:max_kl=1"),
    ]
    return by_line(lines, (ONLINE, VALIDATION, TEST))


def max_kl() -> str:
    """How far one sample may move the model, on four streams: mean online accuracy."""
    streams = {
        "digits, [seeds 9 to 11](benchmarks/results/max-kl-digits/result.json)": "max-kl-digits",
        "Fashion-MNIST, 2,000 samples, [9 and 10](benchmarks/results/max-kl-fashion/result.json)": (
            "max-kl-fashion"
        ),
        "authors, [0 to 2](benchmarks/results/max-kl-authors/result.json)": "max-kl-authors",
        "plays, 0 to 2": "plays-stream-480",
    }
    settings = {'**`"auto"`**': "rkalman", "1": "rkalman:max_kl=1", "0.03": "rkalman:max_kl=0.03"}
    means = {
        (title, folder): statistics.fmean(values(folder, label, ONLINE))
        for title, label in settings.items()
        for folder in streams.values()
    }
    rows = []
    for title in settings:
        cells = []
        for folder in streams.values():
            best = max(means[other, folder] for other in settings)
            mean = means[title, folder]
            cells.append(f"**{mean:.2f}**" if mean == best else f"{mean:.2f}")
        rows.append([title, *cells])
    return markdown(["`max_kl`", *streams], rows)


def few_samples() -> str:
    """Test accuracy with few labelled sentences, AdamW at the rate that is best on the validation samples."""
    counts = (100, 300, 1000)
    columns = []
    for count in counts:
        ours = values(f"authors-{count}-samples-rkalman", "rkalman", TEST)
        theirs = values(f"authors-{count}-samples", _best(f"authors-{count}-samples"), TEST)
        is_ahead = statistics.fmean(ours) > statistics.fmean(theirs)
        columns.append((text(ours, 2, is_bold=is_ahead), text(theirs, 2, is_bold=not is_ahead)))
    rivals = "AdamW, lr 1e-3 (1e-4, 3e-4, 1e-3, 3e-3; with 1,000 without the first)"
    rows = [[_OURS, *(own for own, _ in columns)], [rivals, *(other for _, other in columns)]]
    return markdown(["optimizer", *(f"{count:,} samples" for count in counts)], rows)


def _best(folder: str, name: str = "adamw") -> str:
    """The setting of an optimizer that is best on the validation samples."""
    labels = [label for label in result(folder).labels if label.split(":")[0] == name]
    return max(labels, key=lambda label: statistics.fmean(values(folder, label, VALIDATION)))


# ---- reinforcement learning ----


def policy_directions() -> str:
    """What the gain of each direction is at the default damping, as a part of the exact one's."""
    found = json.loads(
        (RESULTS / "policy-direction" / "policy-direction.json").read_text(encoding="utf-8")
    )
    names = {"gradient": "plain gradient", "m = all": f"m = {found['settings']['states']}, all"}
    gains: dict[str, dict[str, str]] = {}
    for row in found["rows"]:
        if row["damping"] == 0.1:
            gain = row["gain"]
            written = f"{gain['mean']:.3f} ± {gain['deviation']:.3f}"
            gains.setdefault(row["direction"], {})[row["policy"]] = written
    rows = [[names.get(key, key), own["new"], own["decided"]] for key, own in gains.items()]
    return markdown(["direction", "new policy", "decided policy"], rows)


def rank_one_step() -> str:
    """Milliseconds of an update beside Adam's, warm; behind ours its ratio to both."""
    file = MACHINE / "rank_one_step.json"
    found = json.loads(file.read_text(encoding="utf-8"))["rows"]
    rows = []
    for size in dict.fromkeys(row["dims"]["parameters"] for row in found):
        own = {
            row["provider"]: row["p50_ms"]
            for row in found
            if row["dims"]["parameters"] == size and row["state"] == "warm"
        }
        ours, rivals = own["grng"], [own["Adam foreach"], own["Adam fused"]]
        ratios = " and ".join(f"{ours / rival:.2f}" for rival in rivals)
        cells = [f"{value:.3g}" for value in (ours, *rivals)]
        rows.append([f"{size:.0e}".replace("e+0", "e"), *cells, ratios])
    head = ["parameters", "`RankOneNPG`", "Adam, foreach", "Adam, fused", "ratio to them"]
    return markdown(head, rows)


def _rl(folder: Path) -> str:
    return rl_tables.table(rl_tables.load(folder)) + "\n"


def cartpole_time() -> str:
    """Seconds for 1,000 steps of the environment, acting and learning, over the seeds."""
    found = rl_tables.load(RESULTS / "cartpole-time")
    steps, rows = found.config["steps"] / 1000, []
    for row in found.rows():
        seconds = [run.seconds / steps for run in found.runs if run.method == row.method]
        cells = [
            f"{value:.2f}" for value in (statistics.median(seconds), min(seconds), max(seconds))
        ]
        rows.append([rl_tables.NAMES[row.method.split(":")[0]], _settings(row.method), *cells])
    return markdown(["method", "settings", "median", "least", "most"], rows)


def _settings(label: str) -> str:
    options = label.partition(":")[2]
    return f"`{options}`" if options else "defaults"


TABLES: dict[str, Callable[[], str]] = {
    "ring-and-adamw": ring_and_adamw,
    "digits-stream": digits_stream,
    "fashion-mnist-stream": fashion_stream,
    "authors-stream": authors_stream,
    "plays-stream": plays_stream,
    "max-kl": max_kl,
    "few-samples": few_samples,
    "policy-directions": policy_directions,
    "rank-one-step": rank_one_step,
    "cartpole-time": cartpole_time,
    **evidence_tables.TABLES,
    **study_tables.TABLES,
    **{folder.name: functools.partial(_rl, folder) for folder in rl_tables.folders()},
}


def filled(page: Path) -> str:
    """The text of a page with its tables as the results make them.

    Raises:
        ValueError: It names a table that there is not.
    """

    def table(match: re.Match[str]) -> str:
        name = match[1]
        if name not in TABLES:
            raise ValueError(f"{page.name}: no table {name!r}; known: {', '.join(TABLES)}")
        made = TABLES[name]()
        if page.parent != ROOT:
            # Links of a page in docs/.
            made = made.replace("](benchmarks/", "](../benchmarks/")
        return f"<!-- table: {name} -->\n{made}<!-- end of table -->"

    return _MARKED.sub(table, page.read_text(encoding="utf-8"))


def names(page: Path) -> list[str]:
    """The tables of a page."""
    return [match[1] for match in _MARKED.finditer(page.read_text(encoding="utf-8"))]


def main() -> int:
    """Write or check the tables; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where one differs")
    arguments = parser.parse_args()
    code = 0
    for page in PAGES:
        before, now = page.read_text(encoding="utf-8"), filled(page)
        if before == now:
            continue
        print(f"{page.relative_to(ROOT)}: {'differs' if arguments.check else 'written'}")
        code = 1 if arguments.check else 0
        if not arguments.check:
            page.write_text(now, encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
