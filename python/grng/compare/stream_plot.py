# SPDX-License-Identifier: Apache-2.0
"""The figure of a stream: online accuracy on the left, held-out accuracy on the right."""

from __future__ import annotations

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from grng.compare.plot_parts import (
    draw_curve,
    held_out_names,
    label_ends,
    limit_held_out,
    make_figure,
)
from grng.compare.plot_series import Series, collect_series
from grng.compare.plot_style import RC
from grng.compare.results import ComparisonResult

# The mean over the first few samples jumps about; it sets no limit of the axes.
_SETTLED_FRACTION = 0.05


def _online_limits(all_series: list[Series]) -> tuple[float, float] | None:
    lows, highs = [], []
    for series in all_series:
        if series.left is not None:
            start = int(len(series.left.mean) * _SETTLED_FRACTION)
            lows.append(float(np.min(series.left.low[start:])))
            highs.append(float(np.max(series.left.high[start:])))
    if not lows:
        return None
    margin = max(1.0, 0.05 * (max(highs) - min(lows)))
    return max(-1.0, min(lows) - margin), min(101.0, max(highs) + margin)


def draw_stream(result: ComparisonResult) -> Figure:
    """One figure: online accuracy and held-out accuracy against the samples seen.

    Args:
        result: A comparison on a stream.

    Returns:
        The figure, without any window.
    """
    all_series = collect_series(result)
    with rc_context(RC):
        figure, online, held_out = make_figure(result)
        for series in all_series:
            if series.left is not None:
                draw_curve(online, series.left, "epochs", series, has_markers=False)
            if series.held_out is not None:
                draw_curve(held_out, series.held_out, "epochs", series, has_markers=True)
        limits = _online_limits(all_series)
        if limits is not None:
            online.set_ylim(limits)
        limit_held_out(held_out, all_series, result.measure)
        label_ends(held_out, all_series, result.measure)
        online.set_title("Online accuracy")
        online.set_ylabel("predicted before learned from, mean so far in %")
        title, label = held_out_names(result)
        held_out.set_title(title)
        held_out.set_ylabel(label)
        for axes in (online, held_out):
            axes.set_xlabel("samples seen")
            axes.set_xlim(left=0)
    return figure
