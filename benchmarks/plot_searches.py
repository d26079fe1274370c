# SPDX-License-Identifier: Apache-2.0
"""Every setting that ``evidence.py`` tried: its value on held-out samples against its learning rate.

``plot_searches.py [FOLDER] [IMAGE]``: a panel for each task. Rates are in parts of the middle of each range,
which is the default of its optimizer, or what is usual for it.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from evidence import STUDIES
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from grng.compare.plot_style import RC, Style, assign_styles
from grng.tasks.atomic import replacing
from grng.tune.records import FILE_NAME, TuningResult, load
from grng.tune.space import Range, parse_space

RESULTS = Path(__file__).parent / "results"
IMAGE = "evidence-searches.png"
_PER_ROW = 3


def searches(folder: Path) -> dict[str, dict[str, TuningResult]]:
    """The searches by task and optimizer."""
    found: dict[str, dict[str, TuningResult]] = {}
    for task, study in STUDIES.items():
        for name in study.optimizers:
            own = folder / f"evidence-{task}" / f"tune-{name}"
            if (own / FILE_NAME).is_file():
                found.setdefault(task, {})[name] = load(own)
    return found


def _rates(result: TuningResult) -> tuple[list[float], list[float]]:
    """Rates in parts of the middle of the range, in rising order, and values."""
    space = parse_space(result.config["optimizer"], result.config["space"])["lr"]
    assert isinstance(space, Range), "rates are searched for in a range"
    middle = math.sqrt(space.low * space.high)
    pairs = sorted(
        (float(trial.options["lr"]) / middle, result.measure.scale * trial.value)  # type: ignore[arg-type]
        for trial in result.trials
        if trial.value is not None
    )
    return [x for x, _ in pairs], [y for _, y in pairs]


def _draw(axes: Axes, own: dict[str, TuningResult], styles: dict[str, Style]) -> None:
    for name, result in own.items():
        x, y = _rates(result)
        style = styles[name]
        is_ours = name in ("ring", "reng")
        axes.plot(
            x,
            y,
            color=style.color,
            marker="o" if is_ours else ".",
            ms=5 if is_ours else 6,
            lw=2 if is_ours else 1,
            alpha=1.0 if is_ours else 0.75,
            zorder=3 if is_ours else 2,
            label=name,
        )
    axes.set_xscale("log")
    first = next(iter(own.values()))
    if first.measure.sign < 0:
        axes.invert_yaxis()
    unit = " in %" if first.measure.scale == 100 else " (better is up)"
    axes.set_ylabel(f"validation {first.measure.title}{unit}")


def draw(folder: Path, image: Path) -> None:
    """Draw the figure; nothing where there is no search.

    Args:
        folder: Of the results.
        image: To be written.
    """
    found = searches(folder)
    if not found:
        return
    names = list(dict.fromkeys(name for own in found.values() for name in own))
    styles = assign_styles(names)
    columns = min(_PER_ROW, len(found))
    rows = -(-len(found) // columns)
    with rc_context(RC):
        figure = Figure(figsize=(4.4 * columns + 1.2, 3.6 * rows), layout="constrained")
        cells = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
        for axes, (task, own) in zip(cells, found.items(), strict=False):
            _draw(axes, own, styles)
            axes.set_title(STUDIES[task].title)
            axes.set_xlabel("learning rate / middle of its range")
        for axes in cells[len(found) :]:
            axes.set_axis_off()
        known = {
            label: handle
            for axes in cells
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(known.values(), known.keys(), loc="outside right upper", fontsize=9)
        with replacing(image) as partial:
            figure.savefig(partial, format="png", dpi=110)


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=RESULTS)
    parser.add_argument("image", nargs="?", type=Path, help=f"default: FOLDER/{IMAGE}")
    arguments = parser.parse_args()
    draw(arguments.folder, arguments.image or arguments.folder / IMAGE)


if __name__ == "__main__":
    main()
