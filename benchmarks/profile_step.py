# SPDX-License-Identifier: Apache-2.0
"""What RING's own part of a step is made of: PyTorch's profiler, on the models of bench_step.py (CPU).

``python benchmarks/profile_step.py [--workloads mlp,vit-s] [--out FOLDER]`` prints for each model the
operators of ``observe`` and ``step``, between refreshes and at one, by their own time, in parts of the whole;
and writes them as step-profile.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from bench_step import Training
from step_costs.workloads import SMALL, WORKLOADS
from torch.profiler import ProfilerActivity, profile

OPTIMIZER, SHOWN = "RING", 8


def profiled(training: Training, *, refresh: bool) -> list[tuple[str, float, int]]:
    """Return the operators of the optimizer's part of one step: name, part of the time, calls.

    Args:
        training: After its first refreshes.
        refresh: Whether the step is one that refreshes.
    """
    optimizer: Any = training.contender.optimizer
    group = optimizer.param_groups[0]
    every = group["refresh_every"]
    group["step"] = every * (group["step"] // every + 1) + (0 if refresh else 1)
    found: dict[str, tuple[float, int]] = {}

    def watched(call: Any) -> Any:
        def run(*args: Any) -> Any:
            with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
                result = call(*args)
            for event in profiler.key_averages():
                seconds, calls = found.get(event.key, (0.0, 0))
                found[event.key] = seconds + event.self_cpu_time_total, calls + event.count
            return result

        return run

    contender = training.contender
    plain = contender.step, contender.observe
    contender.step, contender.observe = watched(contender.step), watched(contender.observe)  # type: ignore[method-assign]
    try:
        training.step()
    finally:
        contender.step, contender.observe = plain  # type: ignore[method-assign]
    whole = sum(seconds for seconds, _ in found.values())
    rows = [(name, seconds / whole, calls) for name, (seconds, calls) in found.items()]
    return sorted(rows, key=lambda row: -row[1])[:SHOWN]


def section(workload: str) -> str:
    """Return the tables of one model, as Markdown."""
    training = Training(workload, OPTIMIZER)
    for _ in range(3):
        training.step()
    lines = [f"## {WORKLOADS[workload].title}", ""]
    for refresh in (False, True):
        lines += [
            f"{OPTIMIZER}, {'at a refresh, `observe` included' if refresh else 'between refreshes'}:",
            "",
            "| operator | part of its time | calls |",
            "|---|---|---|",
        ]
        rows = profiled(training, refresh=refresh)
        lines += [f"| `{name}` | {100 * part:.1f} % | {calls} |" for name, part, calls in rows]
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    """Profile the models that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workloads", default=",".join(SMALL), help=f"of {', '.join(WORKLOADS)}")
    parser.add_argument("--out", type=Path, help="folder for step-profile.md")
    options = parser.parse_args()
    text = (
        "# Profile of RING's part of a step\n\n`python benchmarks/profile_step.py`: time of each operator "
        f"itself, {torch.get_num_threads()} threads; what is called `Optimizer.step` is Python.\n\n"
    )
    for workload in options.workloads.split(","):
        found = section(workload)
        print(found, flush=True)
        text += found + "\n"
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "step-profile.md").write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
