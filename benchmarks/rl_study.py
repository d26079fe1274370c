# SPDX-License-Identifier: Apache-2.0
"""Reinforcement learning: each method tuned with the same budget, then run on other seeds.

``python benchmarks/rl_study.py TASK [--stage STAGE] [--quick] [--out FOLDER]`` with TASK one of
``STUDIES``. Stage ``tune`` runs six settings of each tuned method on seeds that are used for nothing else,
ours into ``FOLDER/rl-TASK-rank1-tuning``, rivals into ``FOLDER/rl-TASK-tuning``; ``final`` runs, into
``FOLDER/rl-TASK``, the setting of each with the highest mean of the learning curve, ``rank1`` with its
defaults and with one score, and what is not tuned. ``python benchmarks/rl_tables.py`` prints the tables.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from grng.__main__ import main as grng
from grng.rl.compare.results import load

RESULTS = Path(__file__).parent / "results"

# Six settings of each: how far a step goes or, of ours, how far along the plain gradient; and from how many
# actions.
OURS = "rank1:rollout=32|64:damping=0.1|0.3|1"
DEFAULTS = "rank1:rollout=32:damping=1"
DISCRETE = {
    "rmsprop": "rmsprop:rollout=32|64:lr=7e-4|2e-3|7e-3",
    "adamw": "adamw:rollout=32|64:lr=1e-3|3e-3|1e-2",
    "a2c": "a2c:n_steps=16|64:learning_rate=2e-3|5e-3|1e-2",
}
# Smaller rates of A2C: where the first runs had the best.
CONTINUOUS = DISCRETE | {
    "a2c": "a2c:n_steps=16|64:learning_rate=7e-4|2e-3|5e-3",
}
RIVALS = {
    "ppo": "ppo:n_steps=32|64|256:learning_rate=3e-4|1e-3",
    "trpo": "trpo:n_steps=32|64|256:target_kl=0.01|0.03",
}
UNTUNED = ("rank1:scores=1", "ppo", "trpo")


@dataclass(frozen=True)
class Study:
    """How long, on which seeds, and what is tuned."""

    tuning_steps: int
    steps: int
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    tuned: dict[str, str]
    # Run with the defaults of their library.
    others: tuple[str, ...]
    # Whether ours is tuned too, or runs with its defaults alone.
    is_ours_tuned: bool = False


FIVE, THREE = (0, 1, 2, 3, 4), (0, 1, 2)
STUDIES = {
    "cartpole": Study(60_000, 100_000, FIVE, (100, 101), DISCRETE | RIVALS, UNTUNED[:1], True),
    "acrobot": Study(60_000, 100_000, FIVE, (100, 101), DISCRETE | RIVALS, UNTUNED[:1], True),
    "pendulum": Study(150_000, 200_000, FIVE, (100,), CONTINUOUS, UNTUNED),
    "lunarlander": Study(150_000, 200_000, FIVE, (100,), DISCRETE, UNTUNED),
    "halfcheetah": Study(150_000, 200_000, THREE, (100,), CONTINUOUS, UNTUNED),
    "hopper": Study(150_000, 200_000, THREE, (100,), CONTINUOUS, UNTUNED),
    "walker2d": Study(150_000, 200_000, THREE, (100,), CONTINUOUS, UNTUNED),
    "swimmer": Study(150_000, 200_000, THREE, (100,), CONTINUOUS, UNTUNED),
}
_QUICK_STEPS = 2_000


def best(folder: Path) -> dict[str, str]:
    """Return for each method the spec whose curve has the highest mean; one that failed has none."""
    chosen: dict[str, tuple[float, str]] = {}
    for row in load(folder).rows():
        if row.mean_return is None:
            continue
        name, value = row.method.split(":")[0], row.mean_return.mean
        if name not in chosen or value > chosen[name][0]:
            chosen[name] = (value, row.method)
    return {name: spec for name, (_, spec) in chosen.items()}


def compare(task: str, specs: list[str], steps: int, seeds: tuple[int, ...], folder: Path) -> None:
    """Run ``grng compare`` and put its result into this folder, in place of one that was there.

    Raises:
        SystemExit: It failed or was interrupted.
    """
    with tempfile.TemporaryDirectory() as temporary:
        arguments = {
            "--task": task,
            "--steps": str(steps),
            "--seeds": ",".join(map(str, seeds)),
            "--threads": "1",
            "--optimizers": ",".join(specs),
            "--out": temporary,
        }
        code = grng(["compare", *(part for pair in arguments.items() for part in pair)])
        # A run that diverged is a result; everything else is none.
        found = list(Path(temporary).iterdir())
        if code not in (0, 1) or not found:
            raise SystemExit(code)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(found[0], folder)


def run(task: str, stage: str, out: Path, *, is_quick: bool) -> None:
    """Run one stage of a study, or both."""
    study = STUDIES[task]
    tuning, final = out / f"rl-{task}-tuning", out / f"rl-{task}"
    own_tuning = out / f"rl-{task}-rank1-tuning"
    if stage in ("tune", "all"):
        steps = _QUICK_STEPS if is_quick else study.tuning_steps
        compare(task, list(study.tuned.values()), steps, study.tuning_seeds, tuning)
    if stage in ("tune", "tune-ours", "all") and study.is_ours_tuned:
        steps = _QUICK_STEPS if is_quick else study.tuning_steps
        compare(task, [OURS], steps, study.tuning_seeds, own_tuning)
    if stage in ("final", "all"):
        chosen = best(tuning)
        for name in study.tuned.keys() - chosen.keys():
            print(f"no setting of {name} finished: it is left out", file=sys.stderr)
        ours = ["rank1"]
        if study.is_ours_tuned:
            found = best(own_tuning)["rank1"]
            # The defaults, spelled out, would be a second row of the same runs.
            ours += [found] if found != DEFAULTS else []
        specs = [*ours, *(chosen[n] for n in study.tuned if n in chosen), *study.others]
        steps = _QUICK_STEPS if is_quick else study.steps
        compare(task, list(dict.fromkeys(specs)), steps, study.seeds, final)


def main() -> int:
    """Run a study; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("task", choices=STUDIES)
    parser.add_argument("--stage", choices=("tune", "tune-ours", "final", "all"), default="all")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results")
    arguments = parser.parse_args()
    if arguments.quick and arguments.out is None:
        parser.error("--quick needs --out: it would replace the results that are kept")
    run(arguments.task, arguments.stage, arguments.out or RESULTS, is_quick=arguments.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
