# SPDX-License-Identifier: Apache-2.0
"""Arguments that every benchmark takes, and what happens with the rows."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from harness import results
from harness.case import Bench, Plan
from harness.ceilings import measure_ceilings
from harness.environment import ROOT, describe, slug
from harness.measure import measure_bench
from harness.plot import plot
from harness.row import Ceilings
from harness.table import losses, summary
from harness.timer import Effort

FULL_CPU = Effort(max_s=8.0)
FULL_GPU = Effort(rounds=30, min_ms=0.5, warmup_ms=25.0, max_s=4.0)
QUICK = Effort(rounds=3, min_ms=0.2, warmup_ms=1.0, max_s=1.0, min_rounds=3)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(float(part)) for part in _names(text))


def parser(description: str) -> argparse.ArgumentParser:
    """Return the common arguments."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument(
        "--quick", action="store_true", help="smoke run: small, short, not for publication"
    )
    made.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    made.add_argument("--sizes", type=_numbers, help="sizes of the single shapes, e.g. 64,256")
    made.add_argument("--shapes", type=_names, help="names of model shapes (shapes.py), or none")
    made.add_argument("--dtypes", type=_names, help="e.g. float32,bfloat16")
    made.add_argument("--states", type=_names, help="warm,cold (default: both; quick: warm)")
    made.add_argument("--modes", type=_names, help="eager,graph (default: both on a GPU)")
    made.add_argument("--no-compile", action="store_true", help="leave the compiled rivals out")
    made.add_argument("--no-plot", action="store_true", help="write no PNG")
    made.add_argument("--rounds", type=int, help="samples per contender")
    made.add_argument(
        "--attempts", type=int, help="repeats under foreign load (default 4; quick: 1)"
    )
    made.add_argument(
        "--budget-s", type=float, default=600.0, help="no new shape after this, per operation"
    )
    made.add_argument(
        "--out",
        type=Path,
        help="folder of the files (default: benchmarks/results/<machine>; quick: under build/)",
    )
    return made


def plan_from(arguments: argparse.Namespace) -> Plan:
    """Return what the arguments ask for.

    Raises:
        SystemExit: A GPU is asked for and there is none.
    """
    name = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks: no CUDA device")
    quick = arguments.quick
    effort = QUICK if quick else FULL_GPU if name == "cuda" else FULL_CPU
    if arguments.rounds:
        effort = Effort(
            arguments.rounds,
            effort.min_ms,
            effort.warmup_ms,
            effort.max_s,
            min(5, arguments.rounds),
        )
    modes = arguments.modes or (("eager", "graph") if name == "cuda" else ("eager",))
    return Plan(
        device=torch.device(name),
        quick=quick,
        sizes=arguments.sizes,
        shapes=arguments.shapes,
        dtypes=arguments.dtypes,
        states=arguments.states or (("warm",) if quick else ("warm", "cold")),
        modes=modes if name == "cuda" else ("eager",),
        compile=not arguments.no_compile and not quick,
        effort=effort,
        attempts=arguments.attempts or (1 if quick else 4),
        budget_s=arguments.budget_s,
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _draw(file: Path) -> None:
    try:
        plot(results.read(file), file.with_suffix(".png"))
    except ImportError:
        _say("matplotlib is not installed: no plot")
    except ValueError as error:
        _say(f"no plot: {error}")


def ceilings_line(ceilings: Ceilings) -> str:
    """Return the ceilings in words."""
    rates = ", ".join(f"{k} {v:.3g} TFLOP/s" for k, v in ceilings.tflop_s.items() if k != "float16")
    load = ceilings.foreign_load
    return f"ceilings: copy {ceilings.copy_gb_s:.0f} GB/s, {rates}; foreign load " + (
        "not known" if load is None else f"{load:.0%}"
    )


def run(benches: Sequence[Bench], arguments: argparse.Namespace) -> int:
    """Measure benchmarks in one process, write their files, print their tables.

    Args:
        benches: Which.
        arguments: See ``parser``.

    Returns:
        Exit status: 1 where a result of ours is wrong or failed.
    """
    plan = plan_from(arguments)
    environment = describe(plan.device)
    folder = (
        ROOT
        / ("build/benchmarks-quick" if plan.quick else "benchmarks/results")
        / slug(environment)
    )
    folder = arguments.out or folder
    ceilings = measure_ceilings(plan)
    print(ceilings_line(ceilings))
    wrong = False
    for bench in benches:
        rows = measure_bench(bench, plan, ceilings, _say)
        more = ""
        if bench.finish:
            rows, more = bench.finish(rows)
        file = results.write(folder, bench.op, environment, ceilings, rows, quick=plan.quick)
        if not arguments.no_plot:
            _draw(file)
        print(
            f"\n== {bench.title}\n{summary(rows)}\n{losses(rows)}" + f"\n{more}" * bool(more),
            flush=True,
        )
        bad = ("red check", "failed")
        wrong |= any(r.role == "ours" and any(n.startswith(bad) for n in r.notes) for r in rows)
    print("\nours gave a wrong result or failed: see the notes" if wrong else "")
    return int(wrong)


def main(bench: Bench, argv: Sequence[str] | None = None) -> int:
    """Run one benchmark from the command line."""
    return run([bench], parser(bench.title).parse_args(argv))
