# SPDX-License-Identifier: Apache-2.0
"""Where the time of a training step goes, in units of forward plus backward, beside other optimizers.

``python benchmarks/bench_step.py [--workloads mlp,minilm-lora,vit-s,resnet-18] [--optimizers 'RING;KFAC;...']
[--periods N] [--out FOLDER]`` prints a table for each workload and writes step.json and step.png.
Which optimizers there are, and how to install the foreign ones: step_costs/contenders.py. They take turns
step by step; the first refresh period is not counted. A figure is the median over the periods of the mean of
the steps of one: cheap and dear steps are mixed as training mixes them. The backward pass of statistics
counts as "statistics", what hooks do in the model's passes as "forward" and "backward". Memory is the peak of
the first steps, a refresh among them, beyond what was there before, each in a process of its own (Linux).
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from harness.environment import describe
from harness.files import text_table
from kalman_memory import peak_of
from step_costs.clock import PARTS, Clock
from step_costs.contenders import CONTENDERS, EQUAL, LARGE, REFRESH_EVERY
from step_costs.picture import draw
from step_costs.workloads import SLOW, SMALL, WORKLOADS
from torch.nn.functional import cross_entropy

BASE = "AdamW foreach"


class Training:
    """A model and its optimizer."""

    def __init__(self, workload: str, optimizer: str) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model, self._x, self._y = WORKLOADS[workload].make(device)
        self._clock = Clock(device)
        self._autocast = functools.partial(
            torch.autocast, device.type, torch.bfloat16, enabled=WORKLOADS[workload].autocast
        )
        self.contender = CONTENDERS[optimizer](self.model)

    def step(self) -> dict[str, float]:
        """Make one training step; return the seconds of its parts.

        Raises:
            RuntimeError: The loss is not finite.
        """
        clock, contender = self._clock, self.contender
        with clock.watching(contender.seams):
            with clock.part("update"):
                contender.optimizer.zero_grad()
            with clock.part("forward"), self._autocast():
                logits = self.model(self._x).float()
            if contender.observe is not None:
                contender.observe(logits)
            with clock.part("backward"):
                loss = cross_entropy(logits, self._y)
                loss.backward()  # type: ignore[no-untyped-call]
            with clock.part("update"):
                contender.step()
        if not bool(torch.isfinite(loss.detach())):
            raise RuntimeError("the loss is not finite")
        return clock.take()


def measure(
    workload: str, names: list[str], periods: int, period: int = REFRESH_EVERY
) -> list[dict[str, Any]]:
    """Return one row for each optimizer: ms of each part, and of the whole."""
    trainings, problems = {}, {}
    for name in names:
        try:
            trainings[name] = Training(workload, name)
            trainings[name].step()
        except Exception as failure:
            trainings.pop(name, None)
            problems[name] = f"{type(failure).__name__}: {str(failure).strip().splitlines()[0]}"
    for _ in range(period - 1):
        for training in trainings.values():
            training.step()
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in trainings}
    for _ in range(periods * period):
        for name, training in trainings.items():
            samples[name].append(training.step())
    rows = []
    for name in names:
        row: dict[str, Any] = {"workload": workload, "optimizer": name}
        if name in problems:
            rows.append({**row, "problem": problems[name]})
            continue
        means = [
            {p: statistics.mean(s[p] for s in chunk) * 1e3 for p in PARTS}
            for chunk in _chunks(samples[name], period)
        ]
        row["ms"] = {p: statistics.median(mean[p] for mean in means) for p in PARTS}
        totals = [sum(mean.values()) for mean in means]
        row["step_ms"], row["spread_ms"] = (
            statistics.median(totals),
            max(totals) - min(totals),
        )
        row["state_mb"] = trainings[name].contender.state_bytes() / 1e6
        rows.append(row)
    return rows


def _chunks(samples: list[dict[str, float]], size: int) -> list[list[dict[str, float]]]:
    return [samples[i : i + size] for i in range(0, len(samples), size)]


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Add what each step is in units of the base's forward and backward, and of the base's step."""
    base = next((r for r in rows if r["optimizer"] == BASE and "ms" in r), None)
    if base is None:
        return
    unit = base["ms"]["forward"] + base["ms"]["backward"]
    for row in rows:
        if "ms" in row:
            row["units"] = {p: ms / unit for p, ms in row["ms"].items()}
            row["step_per_adamw_step"] = row["step_ms"] / base["step_ms"]


def memory(workload: str, optimizer: str) -> int:
    """Return the bytes at the peak until everything was done once, beyond those before the first step."""
    training = Training(workload, optimizer)

    def period() -> None:
        for _ in range(training.contender.warm_up):
            training.step()

    return peak_of(period)


def _peak_mb(workload: str, optimizer: str) -> float:
    command = [sys.executable, *sys.argv, "--memory", workload, optimizer]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1]) / 1e6


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as text."""
    head = ("optimizer", "ms", *PARTS, "of AdamW", "state MB", "peak MB")
    lines = []
    for row in rows:
        if "problem" in row:
            lines.append((row["optimizer"], row["problem"], *[""] * (len(head) - 2)))
            continue
        units = row.get("units", {})
        lines.append(
            (
                row["optimizer"],
                f"{row['step_ms']:.1f}",
                *(f"{units[p]:.3f}" if units else "-" for p in PARTS),
                f"{row['step_per_adamw_step']:.2f}" if units else "-",
                f"{row['state_mb']:.1f}",
                f"{row['peak_mb']:.0f}" if "peak_mb" in row else "-",
            )
        )
    return text_table(head, lines)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser(description=__doc__)
    found.add_argument("--workloads", default=",".join(SMALL), help=f"of {', '.join(WORKLOADS)}")
    found.add_argument("--optimizers", help=f"separated by ';', of {'; '.join(CONTENDERS)}")
    found.add_argument("--periods", type=int, default=2, help="to take the median of")
    found.add_argument("--period", type=int, default=REFRESH_EVERY, help="steps of one")
    found.add_argument("--no-memory", action="store_true", help="do not measure the peak of memory")
    found.add_argument("--out", type=Path, help="folder for step.json and step.png")
    found.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    return found


def main() -> int:
    """Measure what was asked for."""
    options = parser().parse_args()
    if options.memory:
        print(memory(*options.memory))
        return 0
    environment = describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    found = []
    for workload in options.workloads.split(","):
        names = options.optimizers or ";".join(LARGE if workload in SLOW else EQUAL)
        rows = measure(workload, names.split(";"), options.periods, options.period)
        add_ratios(rows)
        for row in rows:
            if "ms" in row and not options.no_memory:
                row["peak_mb"] = _peak_mb(workload, row["optimizer"])
        found += rows
        print(f"{WORKLOADS[workload].title}; parts in units of AdamW's forward + backward")
        print(table(rows), flush=True)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"environment": environment, "rows": found}, indent=2) + "\n"
        (options.out / "step.json").write_text(text, encoding="utf-8")
        draw(found, {name: w.title for name, w in WORKLOADS.items()}, options.out / "step.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
