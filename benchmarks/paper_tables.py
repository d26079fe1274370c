# SPDX-License-Identifier: Apache-2.0
"""The tables of the GRNG paper, one command for each: its tasks, its optimizers, its figures beside ours.

``python benchmarks/paper_tables.py --table images|glue [--task TASK] [--data-dir FOLDER] [--device cuda]``
trains ViT-B/16 (images) or RoBERTa-base (glue), both with LoRA, on every task of the table, or on one,
with RING, RENG, AdamW at three rates and KFAC in batches, and with RKalman in one pass of batch 1, on three
seeds. It says first what that needs, keeps each comparison in ``OUT/paper-TASK`` and
``OUT/paper-TASK-one-by-one``, goes on with what was interrupted there, and ends with a Markdown table.

**No figure of these tables has been produced yet**: neither data nor weights were at hand. What has run are
the small files that the tests make (``--quick``).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from grng.__main__ import main as grng
from grng.compare.records import FINISHED
from grng.compare.results import ComparisonResult, load
from grng.compare.selection import family
from grng.compare.summary import Row
from grng.tasks import TASKS

RESULTS = Path(__file__).parent / "results"
NOTHING_YET = (
    "No figure of this table has been produced yet by the authors of this script: it has only run on small "
    "files made by its tests."
)
IN_BATCHES = "ring,reng,adamw:lr=1e-4|3e-4|1e-3,kfac"
ONE_BY_ONE = "rkalman"
SEEDS = "0,1,2"
COLUMNS = {"ring": "RING", "reng": "RENG", "adamw": "AdamW", "kfac": "KFAC", "rkalman": "RKalman"}

# Guesses, none of them measured: seconds of a step of AdamW for each sample in fp32 without fused attention
# on a GPU of about 10 TFLOP/s in use, of a step of RKalman with batch 1, and what steps cost beside AdamW's.
SECONDS = {"images": 7e-3, "glue": 4e-3}
ONE_BY_ONE_SECONDS = {"images": 0.08, "glue": 0.06}
COST = {"ring": 1.1, "reng": 3.0, "adamw": 3 * 1.0, "kfac": 1.3}
# GB: batches of 32 in fp32, RENG's second derivative included; the weights to fetch; free memory.
GPU_MEMORY = {"images": 16, "glue": 10}
WEIGHTS = {"images": 0.35, "glue": 0.5}


@dataclass(frozen=True)
class Study:
    """How one task is trained, and what is known of the paper's figure for it."""

    # Not known from the paper; chosen here.
    epochs: int
    samples: int
    # GB to fetch, an estimate.
    download: float
    # GB that prepared images take.
    prepared: float = 0.0
    # In percent, from texts about the paper: its own tables were not available.
    published: str = "unknown"
    trust: str = ""


WEAK = "weak: one summary, no settings"
TABLES: dict[str, dict[str, Study]] = {
    "images": {
        "cifar10": Study(
            5,
            *(45_000, 0.15, 0.2, "97.1 (R-Kalman, batch 1, one epoch)"),
            "fair: two texts about the paper agree, neither is the paper",
        ),
        "cifar100": Study(5, 45_000, 0.15, 0.2),
        "food101": Study(5, 70_750, 5.1, 15.2, "86.2 (R-Kalman)", WEAK),
        "oxford-pet": Study(
            20,
            3280,
            0.8,
            1.1,
            "92.8 (the best of GRNG)",
            "weak to fair: a listing without settings",
        ),
    },
    "glue": {
        "mnli": Study(
            3,
            *(387_702, 0.08, 0.0, "98.6 (RING, mismatched)"),
            "**no target**: implausible, fine-tuned RoBERTa-base has about 87",
        ),
        "qnli": Study(3, 102_743, 0.02, 0.0, "91.5 (RING)", WEAK),
        "sst2": Study(5, 66_349, 0.01),
        "cola": Study(20, 7751, 0.01),
        "mrpc": Study(20, 3268, 0.01),
        "stsb": Study(20, 5249, 0.01),
    },
}


def hours(table: str, study: Study) -> float:
    """Return a guess of the GPU hours of one task."""
    in_batches = study.epochs * sum(COST.values()) * SECONDS[table]
    seeds = len(SEEDS.split(","))
    return seeds * study.samples * (in_batches + ONE_BY_ONE_SECONDS[table]) / 3600


def needs(table: str, tasks: list[str]) -> str:
    """Return what the tasks need, before anything is started."""
    studies = {name: TABLES[table][name] for name in tasks}
    lines = [
        "Estimates, none of them measured:",
        f"  download: {WEIGHTS[table]:g} GB of weights, "
        f"{sum(s.download for s in studies.values()):.2f} GB of data (less what --data-dir has)",
        f"  disk: {sum(s.prepared for s in studies.values()):.1f} GB more for prepared images",
        f"  GPU memory: {GPU_MEMORY[table]} GB; on a CPU every task takes days",
        *(
            f"  {name}: about {hours(table, study):.0f} GPU hours"
            for name, study in studies.items()
        ),
        f"  together: about {sum(hours(table, s) for s in studies.values()):.0f} GPU hours",
        "Epochs, batch size and rates are chosen here: those of the paper are not known.",
        NOTHING_YET,
    ]
    return "\n".join(lines)


def commands(task: str, study: Study, *, is_quick: bool) -> dict[str, list[str]]:
    """Return the options of ``grng compare`` by the name of the folder of its result."""
    length = ["--epochs", str(study.epochs), "--batch-size", "32", "--seeds", SEEDS]
    once = ["--epochs", "1", "--batch-size", "1", "--schedule", "constant", "--seeds", SEEDS]
    if is_quick:
        short = ["--steps", "2", "--checkpoints", "1", "--validation", "4", "--seeds", "0,1"]
        length = [*short, "--batch-size", "4"]
        once = [*short, "--batch-size", "1", "--schedule", "constant"]
    shared = ["compare", "--task", task]
    return {
        f"paper-{task}": [*shared, "--optimizers", IN_BATCHES, *length],
        f"paper-{task}-one-by-one": [
            *(*shared, "--optimizers", ONE_BY_ONE, *once, "--reference", ONE_BY_ONE),
        ],
    }


def finished(folder: Path, *, is_quick: bool) -> ComparisonResult | None:
    """Return the result in a folder if all its runs came to their end, be it by divergence."""
    if not (folder / "result.json").is_file():
        return None
    result = load(folder)
    # Only quick runs count steps: theirs are no figures.
    is_other = result.counts_steps != is_quick
    is_open = any(run.status not in (FINISHED, "diverged") for run in result.runs)
    return None if is_other or is_open else result


def _test(row: Row, result: ComparisonResult) -> str:
    """The value on the test set in percent, or in hundredths."""
    is_accuracy = result.measure.name == "accuracy"
    mean = row.final_accuracy if is_accuracy else row.final_correlation
    spread = row.final_accuracy_std if is_accuracy else row.final_correlation_std
    if mean is None:
        return row.status
    return f"{100 * mean:.2f}" + ("" if spread is None else f" ± {100 * spread:.2f}")


def table_of(table: str, tasks: list[str], root: Path, *, is_quick: bool) -> str:
    """Return the Markdown table of what is in the folders, beside the published figures."""
    head = ["task", "measure", *COLUMNS.values(), "published", "how far to trust that"]
    lines = [head, ["---"] * len(head)]
    for task in tasks:
        study, cells = TABLES[table][task], dict.fromkeys(COLUMNS, "-")
        for name in commands(task, study, is_quick=False):
            result = finished(root / name, is_quick=is_quick)
            rows = [] if result is None else result.summary().rows
            for row in rows:
                if result is not None and row.is_selected:
                    cells[family(row.optimizer)] = _test(row, result)
        measure = TASKS[task].measure
        lines.append([task, measure, *cells.values(), study.published, study.trust])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def explain(*, is_quick: bool) -> str:
    """Return what stands below the table."""
    lines = [
        "Test set, mean ± standard deviation over the seeds, in percent (correlations in hundredths). AdamW: "
        "the best of three rates on held-out training samples. RKalman: one pass of batch 1. For GLUE the "
        "test set is the validation set, of MNLI the matched one.",
        "Published figures are from texts about the paper, not from its tables, which were not available.",
    ]
    if is_quick:
        lines.append("--quick: two steps on few samples; these numbers mean nothing.")
    return "\n\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="The tables of the GRNG paper. " + NOTHING_YET, allow_abbrev=False
    )
    parser.add_argument("--table", choices=TABLES, required=True)
    parser.add_argument("--task", help="one task of the table (default: all)")
    parser.add_argument("--data-dir", type=Path, help="as for grng compare")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results")
    parser.add_argument("--quick", action="store_true", help="two steps, to see that it runs")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run what is not there yet and print the table; the exit code is 1 if a comparison failed."""
    parser = _parser()
    given = parser.parse_args(argv)
    tasks = list(TABLES[given.table]) if given.task is None else [given.task]
    if given.task is not None and given.task not in TABLES[given.table]:
        valid = ", ".join(TABLES[given.table])
        parser.error(f"--task of table {given.table} must be one of {valid}, got {given.task!r}")
    if given.quick and given.out is None:
        parser.error("--quick needs --out: its results would be taken for real ones")
    root = given.out or RESULTS
    print(needs(given.table, tasks), flush=True)
    shared = ["--device", given.device]
    shared += [] if given.data_dir is None else ["--data-dir", str(given.data_dir)]
    worst = 0
    for task in tasks:
        for name, options in commands(
            task, TABLES[given.table][task], is_quick=given.quick
        ).items():
            print(f"\n{name}: grng {' '.join(options)}", flush=True)
            # What is there of the same settings stays, and what was interrupted goes on.
            code = grng([*options, *shared, "--into", str(root / name)])
            if code not in (0, 1):
                return code
            worst = max(worst, code)
    print(
        f"\n{table_of(given.table, tasks, root, is_quick=given.quick)}\n\n{explain(is_quick=given.quick)}"
    )
    return worst


if __name__ == "__main__":
    sys.exit(main())
