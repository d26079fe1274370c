# SPDX-License-Identifier: Apache-2.0
"""Draws every figure again from the results that are kept: ``python benchmarks/figures.py [FOLDER]``.

Figures of ``python -m grng`` and of the studies are drawn by ``python -m grng plot``, those of the kernel
benchmarks and of single questions by the code that made them. Each is next to its result, but for the
schedule of Newton's iteration, which is in ``docs/images``. Nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import bench_step
import plot_schedule
import plot_searches
import plot_step_length
import plot_variants
from harness import results
from harness.plot import plot as draw_benchmark

from grng.__main__ import main as grng

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
_NAMES = ("result.json", "tune.json", "study.json")
# Measured by programs that draw nothing.
_WITHOUT = ("kalman_memory.json", "kalman_step.json")


def _step(file: Path, image: Path) -> None:
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    titles = {name: workload.title for name, workload in bench_step.WORKLOADS.items()}
    bench_step.draw(rows, titles, image)


def _benchmark(file: Path, image: Path) -> None:
    draw_benchmark(results.read(file), image)


def _machine(folder: Path) -> None:
    """The benchmarks of one machine, in a folder with its name."""
    for file in sorted(folder.rglob("*.json")):
        if file.name not in _WITHOUT:
            draw: Callable[[Path, Path], None] = _step if file.name == "step.json" else _benchmark
            draw(file, file.with_suffix(".png"))


def _plot(files: list[Path]) -> None:
    grng(["plot", *map(str, files)])


def _results(folder: Path) -> None:
    """The figures of ``python -m grng``, by as many processes as there are cores."""
    files = sorted(file for name in _NAMES for file in folder.rglob(name))
    if not files:
        # Says what is missing.
        _plot([folder])
        return
    workers = min(os.cpu_count() or 1, len(files))
    parts = [files[start::workers] for start in range(workers)]
    # A fresh process: torch's threads do not survive a fork.
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        # Taken from the pool, so that an error in it is one here.
        list(pool.map(_plot, parts))


def draw_all(folder: Path, images: Path) -> None:
    """Draw the figures of all results.

    Args:
        folder: Of the results, as ``benchmarks/results``.
        images: For the figure that is not next to its result.
    """
    _results(folder)
    for machine in sorted(folder.glob("*-threads")):
        _machine(machine)
    plot_searches.draw(folder, folder / plot_searches.IMAGE)
    steps, ablation = folder / "step-length", folder / "digits-ablation"
    if steps.is_dir():
        plot_step_length.main([str(steps)])
    if ablation.is_dir():
        plot_variants.main([str(ablation / "result.json"), str(ablation / "variants.png")])
    schedule = folder / "damped_inverse_schedule.json"
    if schedule.is_file():
        found = json.loads(schedule.read_text(encoding="utf-8"))
        plot_schedule.draw(found, images / "newton_schulz_schedule.png")


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=RESULTS)
    parser.add_argument("--images", type=Path, default=ROOT / "docs" / "images")
    arguments = parser.parse_args()
    draw_all(arguments.folder, arguments.images)


if __name__ == "__main__":
    main()
