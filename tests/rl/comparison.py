# SPDX-License-Identifier: Apache-2.0
"""Running a small comparison, and a result that was written by hand."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from grng.__main__ import main
from grng.rl.compare import cli
from grng.rl.compare.methods import parse_methods
from grng.rl.compare.records import FINISHED, RLRun
from grng.rl.compare.results import RLResult
from grng.rl.compare.runs import RLConfig

SPECS = "rank1:rollout=16,a2c,ppo:n_steps=32:n_epochs=1,trpo:n_steps=32"


def compare(monkeypatch, out: Path, *options: str, task: str = "cartpole") -> tuple[int, Any, Any]:
    """Return the exit code, what ``result.json`` holds, and its folder; both None where there is none."""
    # A hundred episodes take longer than this training.
    monkeypatch.setattr(cli, "RLConfig", functools.partial(RLConfig, evaluation_episodes=3))
    before = set(out.glob("*"))
    code = main(["compare", "--task", task, "--out", str(out), "--hidden", "8", *options])
    made = set(out.glob("*")) - before
    if not made:
        return code, None, None
    (folder,) = made
    return code, json.loads((folder / "result.json").read_text()), folder


def run(method: str, seed: int, curve: list[float | None], **more: Any) -> RLRun:
    """A finished run with this curve, read every 10 steps."""
    steps = [10 * (i + 1) for i in range(len(curve))]
    given = dict(status=FINISHED, seconds=1.0 + seed, evaluation=[1.0, 3.0 + seed], episodes=5)
    return RLRun(method, seed, curve_steps=steps, curve_return=curve, **{**given, **more})


def result(runs: list[RLRun], specs: str, seeds: tuple[int, ...] = (0, 1)) -> RLResult:
    config = RLConfig("cartpole", 30, seeds)
    described = cli._describe(config, parse_methods(specs))
    return RLResult(["python"], described, {"torch": "2"}, "2000-01-01T00:00:00Z", FINISHED, runs)
