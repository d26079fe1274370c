# SPDX-License-Identifier: Apache-2.0
"""Two pictures: rules side by side on each model, and final accuracy against the learning rate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.plot import COLORS

from step_lengths import rules
from step_lengths.rows import ModelRows, Row

BLUE, RED, GREEN = COLORS[0], COLORS[1], COLORS[2]
# Beyond this many times the best loss, or below this part of the best accuracy, a dot would leave no room
# to tell the others apart: it is drawn at the edge, with its value.
_WORST_LOSS, _WORST_ACCURACY = 2.2, 0.6


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    _pyplot().close(figure)


def draw_rules(models: list[ModelRows], out: Path) -> None:
    """Rules as lines, models as columns; accuracy above, training loss below.

    Raises:
        ValueError: No rule has a run.
    """
    labels = [r.label for r in rules.RULES if any(r.label in m.rows for m in models)]
    if not labels:
        raise ValueError("no run of a rule, only of learning rates")
    titles = [rules.ALL[label].title for label in labels]
    height = 1.6 + 2 * 0.29 * (len(labels) + 2)
    figure, axes = _pyplot().subplots(
        2,
        len(models),
        figsize=(3.4 + 2.9 * len(models), height),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for column, model in enumerate(models):
        shown = [(len(labels) - i, model.rows[n]) for i, n in enumerate(labels) if n in model.rows]
        if (adamw := model.adamw()) is not None:
            shown.append((0, adamw))
        top, bottom = axes[:, column]
        seeds = f"seed{'s' if len(model.seeds) > 1 else ''} {', '.join(map(str, model.seeds))}"
        top.set_title(f"{model.title}\n{model.steps} steps, {seeds}", fontsize=10)
        _dots(top, shown, lambda r: r.accuracies, higher_is_better=True)
        top.set_xlabel("test accuracy %")
        _dots(bottom, shown, lambda r: r.losses, higher_is_better=False)
        bottom.set_xlabel("training loss, last tenth of the steps")
    places = [*range(len(labels), 0, -1), 0]
    for row in axes:
        row[0].set_yticks(places, [*titles, "AdamW, best of its rates"], fontsize=9)
    figure.suptitle(
        "How far to step: dots are means, lines the range over seeds, dotted: the default, "
        "× collapsed in some run",
        fontsize=10,
    )
    _save(figure, out)


def _dots(
    axes: Any,
    shown: list[tuple[int, Row]],
    values_of: Callable[[Row], tuple[float | None, ...]],
    *,
    higher_is_better: bool,
) -> None:
    scale = 100 if higher_is_better else 1
    points = []
    for place, row in shown:
        values = [scale * v for v in values_of(row) if v is not None]
        points.append((place, row, values))
    means = [sum(v) / len(v) for _, _, v in points if v]
    if not means:
        return
    best = max(means) if higher_is_better else min(means)
    limit = best * (_WORST_ACCURACY if higher_is_better else _WORST_LOSS)
    beyond = min if higher_is_better else max
    inside = [m for m in means if beyond(m, limit) != m or m == limit]
    edge = beyond(inside)
    width = max(abs(edge - best), 0.02 * abs(best))
    outside = edge - 0.3 * width if higher_is_better else edge + 0.3 * width
    for place, row, values in points:
        mean = sum(values) / len(values) if values else None
        is_out = mean is None or (beyond(mean, edge) == mean and mean != edge)
        x = outside if mean is None or is_out else mean
        color = RED if row.collapsed else GREEN if row.label.startswith("adamw") else BLUE
        if not is_out:
            axes.hlines(place, min(values), max(values), color=color, linewidth=2, alpha=0.5)
        axes.plot(x, place, "x" if row.collapsed else "o", color=color, markersize=6)
        if is_out:
            text = "diverged" if mean is None else f"{mean:.1f}" if scale == 100 else f"{mean:.2f}"
            side = (6, "left") if higher_is_better else (-6, "right")
            axes.annotate(
                text, (x, place), (side[0], 0), textcoords="offset points", ha=side[1],
                va="center", fontsize=8, color=color,
            )  # fmt: skip
        if row.label == rules.GRAFT.label and mean is not None:
            axes.axvline(mean, color="#888888", linestyle=":", linewidth=1, zorder=0)
    margin = 0.1 * width
    ends = (min(edge, best, outside) - margin, max(edge, best, outside) + margin)
    axes.set_xlim(*ends)
    axes.locator_params(axis="x", nbins=5)
    _quiet(axes)


def draw_rates(models: list[ModelRows], out: Path) -> None:
    """Final accuracy against the learning rate, with and without the trust region, and AdamW's.

    Raises:
        ValueError: No learning rate has a run.
    """
    figure, axes = _pyplot().subplots(
        1,
        len(models),
        figsize=(1 + 3.1 * len(models), 4.2),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    kinds = (
        (rules.GRAFT.label, "RING, trust region", BLUE, "o"),
        (rules.NO_REGION.label, "RING, no trust region", RED, "s"),
        ("adamw", "AdamW", GREEN, "^"),
    )
    handles: dict[str, Any] = {}
    for model, panel in zip(models, axes[0], strict=True):
        for kind, name, color, marker in kinds:
            found = sorted(
                (r.rate, r) for label, r in model.rows.items() if label.split(":")[0] == kind
            )
            known = [(rate, r) for rate, r in found if r.accuracy is not None]
            if known:
                (handles[name],) = panel.plot(
                    [rate for rate, _ in known],
                    [100 * (r.accuracy or 0.0) for _, r in known],
                    color=color,
                    marker=marker,
                    linewidth=1.6,
                )
                for rate, r in known:
                    ends = [100 * a for a in r.accuracies if a is not None]
                    if len(ends) > 1:
                        panel.vlines(
                            rate, min(ends), max(ends), color=color, linewidth=3, alpha=0.3
                        )
            lost = [rate for rate, r in found if r.accuracy is None]
            if lost:  # an empty line that is not clipped has no size, which the layout cannot take
                panel.plot(lost, [0] * len(lost), "x", color=color, clip_on=False)
        chance = 100 * model.about["chance"]
        panel.axhspan(0, chance, color="#EEEEEE", zorder=0)
        note = panel.text(0.02, chance / 2, "no better than chance", va="center", fontsize=8,
                          color="#777777", transform=panel.get_yaxis_transform())  # fmt: skip
        note.set_in_layout(False)
        panel.set_xscale("log")
        panel.set_ylim(0, None)
        panel.set_title(model.title, fontsize=10)
        panel.set_xlabel(f"learning rate, {model.steps} steps")
        _quiet(panel)
    if not handles:
        raise ValueError("no run has a learning rate")
    axes[0][0].set_ylabel("test accuracy %, mean and range")
    figure.legend(
        handles.values(), handles.keys(), frameon=False, loc="outside lower center", ncols=3
    )
    _save(figure, out)


def _quiet(axes: Any) -> None:
    axes.grid(color="#E4E4E4")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
