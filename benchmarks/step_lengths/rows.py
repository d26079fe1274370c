# SPDX-License-Identifier: Apache-2.0
"""What the pictures and the table show: for each model and rule the means over the seeds."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step_lengths import rules, study
from step_lengths.store import Store


@dataclass(frozen=True)
class Row:
    """One rule on one model."""

    label: str
    title: str
    rate: float
    # By seed, None where a run ended early.
    losses: tuple[float | None, ...]
    accuracies: tuple[float | None, ...]
    collapsed: int
    ms_per_step: float
    noted: dict[str, float | None]

    @property
    def loss(self) -> float | None:
        """Mean over the seeds; None if one of them did not come to its end."""
        return _mean(self.losses)

    @property
    def accuracy(self) -> float | None:
        """Mean over the seeds; None if one of them did not come to its end."""
        return _mean(self.accuracies)


@dataclass(frozen=True)
class ModelRows:
    """All rules on one model, at the budget that most runs have."""

    name: str
    about: dict[str, Any]
    steps: int
    seeds: tuple[int, ...]
    rows: dict[str, Row]

    @property
    def title(self) -> str:
        """What is over the panel."""
        return study.TITLES[self.name]

    def adamw(self) -> Row | None:
        """AdamW at the rate with the best test accuracy: a choice that favours it."""
        found = [r for label, r in self.rows.items() if label.startswith("adamw") and r.accuracy]
        return max(found, key=lambda r: r.accuracy or 0.0, default=None)


def _mean(values: tuple[float | None, ...]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if len(known) == len(values) > 0 else None


def read(folder: Path) -> list[ModelRows]:
    """All models that have runs.

    Raises:
        ValueError: There is none.
    """
    found = [_of_model(name, Store(folder, name).load()) for name in study.MODELS]
    shown = [m for m in found if m is not None]
    if not shown:
        raise ValueError(f"{folder}: no result of step_length.py")
    return shown


def _of_model(name: str, content: dict[str, Any]) -> ModelRows | None:
    runs = content["runs"]
    if not runs:
        return None
    steps = statistics.mode(r["steps"] for r in runs)
    runs = [r for r in runs if r["steps"] == steps]
    rows = {}
    for label, rule in rules.ALL.items():
        mine = sorted((r for r in runs if r["rule"] == label), key=lambda r: r["seed"])
        if mine:
            rows[label] = _row(rule, mine, content["chance"])
    seeds = tuple(sorted({r["seed"] for r in runs}))
    return ModelRows(name, content, steps, seeds, rows)


def _row(rule: rules.Rule, runs: list[dict[str, Any]], chance: float) -> Row:
    keys = dict.fromkeys(k for r in runs for k in r["noted"])
    noted = {
        k: _mean(tuple(r["noted"][k] for r in runs if r["noted"].get(k) is not None)) for k in keys
    }
    return Row(
        label=rule.label,
        title=rule.title,
        rate=runs[0]["rate"],
        losses=tuple(study.final_loss(r) for r in runs),
        accuracies=tuple(study.final_accuracy(r) for r in runs),
        collapsed=sum(study.has_collapsed(r, chance) for r in runs),
        ms_per_step=statistics.fmean(sum(r["record"]["ms_per_step"].values()) for r in runs),
        noted=noted,
    )


def table(models: list[ModelRows]) -> str:
    """Everything, as Markdown: accuracies in per cent, mean (lowest to highest)."""
    lines = []
    for model in models:
        batch = model.about["batch_size"]
        lines += [
            f"**{model.title}**: {model.steps} steps of batch {batch}, "
            f"seeds {', '.join(map(str, model.seeds))}",
            "",
            "| rule | seeds | final training loss | test accuracy % | collapsed | "
            "true form / factors' | part of step kept | largest KL | ms per step |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for row in model.rows.values():
            cells = [
                f"{row.title} (`{row.label}`)",
                str(len(row.losses)),
                _number(row.loss, ".3f"),
                _spread(row.accuracies),
                str(row.collapsed) if row.collapsed else "",
                _number(row.noted.get("form_ratio_median"), ".1f"),
                _number(row.noted.get("kept_mean"), ".2f"),
                _number(row.noted.get("kl_largest"), ".2g"),
                f"{row.ms_per_step:.0f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _spread(values: tuple[float | None, ...]) -> str:
    known = [100 * v for v in values if v is not None]
    if len(known) < len(values):
        return f"{len(values) - len(known)} of {len(values)} diverged"
    mean = f"{statistics.fmean(known):.1f}"
    return mean if len(known) == 1 else f"{mean} ({min(known):.1f} to {max(known):.1f})"
