# SPDX-License-Identifier: Apache-2.0
"""Look of the figures: colours for colour-blind readers too, quiet axes, places of labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Okabe and Ito, "Color Universal Design" (2008); where it runs out, Tol's muted scheme.
_FAMILY_COLORS = {
    "ring": "#0072B2",
    "adamw": "#D55E00",
    "sgd": "#009E73",
    "rkalman": "#000000",
    "loko": "#CC79A7",
    "adagrad": "#E69F00",
    "kfac": "#56B4E9",
    "sophiag": "#882255",
    "sophiah": "#999933",
    "reng": "#332288",
    "muon": "#44AA99",
    "soap": "#999999",
    "rank1": "#0072B2",
    "rmsprop": "#CC79A7",
    "a2c": "#009E73",
    "ppo": "#E69F00",
    "trpo": "#56B4E9",
}
_OTHER_COLORS = ("#117733", "#DDCC77", "#AA4499")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
_MARKERS = ("o", "s", "^", "D")

# Any: matplotlib lists its hundreds of keys as literals.
RC: Any = {
    "font.size": 10.5,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": "#333333",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "figure.facecolor": "white",
}


@dataclass(frozen=True)
class Style:
    """How one optimizer is drawn in every panel."""

    color: str
    dash: Any
    marker: str


def assign_styles(labels: Sequence[str]) -> dict[str, Style]:
    """A colour per optimizer, a dash and a marker per variant of it.

    Args:
        labels: Optimizer labels, ``name`` or ``name:key=value``.

    Returns:
        Style by label.
    """
    colors = dict(_FAMILY_COLORS)
    variants: dict[str, int] = {}
    styles = {}
    for label in labels:
        family = label.split(":")[0]
        used = len(colors) - len(_FAMILY_COLORS)
        color = colors.setdefault(family, _OTHER_COLORS[used % len(_OTHER_COLORS)])
        variant = variants.get(family, 0)
        variants[family] = variant + 1
        index = variant % len(_DASHES)
        styles[label] = Style(color, _DASHES[index], _MARKERS[index])
    return styles


def spread_labels(heights: Sequence[float], gap: float) -> list[float]:
    """Moves heights apart until no two are closer than ``gap``, keeping their order.

    Args:
        heights: Wanted heights.
        gap: Least distance.

    Returns:
        Heights in the order given.
    """
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    placed = [heights[index] for index in order]
    for above in range(1, len(placed)):
        placed[above] = max(placed[above], placed[above - 1] + gap)
    # Moving only upwards would lift a crowd off its lines: centre it again.
    shift = sum(placed) - sum(heights)
    shift = shift / len(placed) if placed else 0.0
    result = [0.0] * len(placed)
    for index, height in zip(order, placed, strict=True):
        result[index] = height - shift
    return result
