# SPDX-License-Identifier: Apache-2.0
"""What low precision does to the Newton-Schulz inverse, emulated on a CPU.

Errors only, no times. They do not depend on the machine beyond their last digit.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emulation import (
    SPECTRA,
    Errors,
    Problem,
    cholesky,
    errors,
    fifth_order,
    planned,
    problem,
    scaled,
    worst,
)
from harness.files import write_json, write_text
from torch import set_num_threads

from grng_kernels.damped_inverse.precision import (
    COST,
    MARGIN,
    ROUNDOFF,
    Plan,
    Step,
    cost_of,
    newton_schulz_plan,
)
from grng_kernels.damped_inverse.schedule import condition_number, newton_schulz_schedule

RESULTS = Path(__file__).resolve().parent / "results"
NAME = "damped_inverse_precision"
FORMATS = ("fp32", "tf32x3", "bf16x3", "fp16", "tf32", "tf32 truncated", "bf16")
TOLERANCE = 1e-3
SCHEMES = ("coupled", "symmetrised", "uncoupled", "order 5", "uncoupled + 1")
TABLE_RHOS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-6)
PLAN_RHOS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
NOISE_FORMATS = ("bf16", "tf32", "bf16x3", "tf32x3")


def _rounded(x: float) -> float:
    return float(f"{x:.1e}") if math.isfinite(x) else x


def _cell(e: Errors) -> dict[str, float]:
    return {"residual": _rounded(e.residual), "forward": _rounded(e.spectral)}


def schemes(n: int, rhos: Sequence[float]) -> list[dict[str, Any]]:
    """Return the errors of every scheme in every format, schedules to 1e-3, a log-uniform spectrum."""
    rows = []
    for rho in rhos:
        kappa, of = condition_number(rho), problem("log-uniform", n, rho, margin=1.0)
        schedule = newton_schulz_schedule(kappa, TOLERANCE)
        rows.append({
            "kappa": round(kappa, 2), "format": "fp32", "Cholesky": _cell(errors(of, cholesky(of)))
        })  # fmt: skip
        for name in FORMATS:
            found = {form: scaled(of.b, schedule, name, form=form)[-1] for form in SCHEMES[:3]}
            found["order 5"] = fifth_order(of.b, kappa, TOLERANCE, name)
            found["uncoupled + 1"] = scaled(of.b, schedule, name, corrections=1)[-1]
            cells = {scheme: _cell(errors(of, found[scheme])) for scheme in SCHEMES}
            rows.append({"kappa": round(kappa, 2), "format": name, **cells})
    return rows


def _single(precision: str, kappa: float) -> Plan:
    """Return a plan of one precision that goes on until rounding alone is left."""
    schedule = newton_schulz_schedule(kappa, 1e-6)
    steps = [Step(a, b, precision, precision) for a, b in schedule.steps]
    return Plan(schedule.start, (*steps, Step(2.0, -1.0, precision, precision)), math.nan)


def noise(n: int, rhos: Sequence[float], spectra: Sequence[str]) -> list[dict[str, Any]]:
    """Return the residual that rounding leaves, as a multiple of ``kappa·u`` or of ``kappa²·u``."""
    rows = []
    for rho in rhos:
        kappa = condition_number(rho, MARGIN)
        problems = {name: problem(name, n, rho) for name in spectra}
        for precision in NOISE_FORMATS:
            unit = kappa * ROUNDOFF[precision]
            if unit > 0.7:
                continue
            plan = _single(precision, kappa)
            found = {
                s: errors(of, planned(of, plan, kernel=False)[-1]) for s, of in problems.items()
            }
            where = max(found, key=lambda s: found[s].residual)
            residual = found[where].residual
            rows.append({
                "kappa": round(kappa, 2),
                "format": precision,
                "spectrum": where,
                "residual": _rounded(residual),
                "over kappa u": round(residual / unit, 2),
                "over kappa² u": round(residual / unit / kappa, 4),
            })  # fmt: skip
    return rows


def _ratios(of: Problem, found: Errors) -> dict[str, float]:
    base = errors(of, cholesky(of))
    return {
        "spectral": round(found.spectral / base.spectral, 2),
        "frobenius": round(found.frobenius / base.frobenius, 2),
    }


def plans(n: int, rhos: Sequence[float], spectra: Sequence[str]) -> list[dict[str, Any]]:
    """Return the plan for every ``rho`` and the largest errors over the spectra."""
    rows = []
    for rho in rhos:
        plan = newton_schulz_plan(rho)
        kinds = [(s.residual_precision, s.precision) for s in plan.steps]
        problems = {name: problem(name, n, rho) for name in spectra}
        found = {s: errors(of, planned(of, plan)[-1]) for s, of in problems.items()}
        swap = {name: "fp32" for name in COST}
        in_fp32 = {s: errors(of, planned(of, plan, swap)[-1]) for s, of in problems.items()}
        ratios = {s: _ratios(of, found[s]) for s, of in problems.items()}
        ratios32 = {s: _ratios(of, in_fp32[s]) for s, of in problems.items()}
        base = worst([errors(of, cholesky(of)) for of in problems.values()])
        largest = worst(list(found.values()))
        steps = len(newton_schulz_schedule(condition_number(rho, MARGIN), 2.0**-23).steps)
        rows.append({
            "rho": rho,
            "kappa": round(condition_number(rho, MARGIN), 1),
            "steps": ["/".join(kind) for kind in kinds],
            "cost": cost_of(kinds),
            "cost of tf32x3": cost_of([("tf32x3", "tf32x3")] * steps),
            "predicted residual": _rounded(plan.residual),
            "residual": _rounded(largest.residual),
            "residual of Cholesky": _rounded(base.residual),
            "forward error": _rounded(largest.spectral),
            "forward error of Cholesky": _rounded(base.spectral),
            "over Cholesky": ratios,
            "the same steps in fp32, over Cholesky": ratios32,
        })  # fmt: skip
    return rows


# ---- the page ----


def _text(cell: dict[str, float] | None) -> str:
    if cell is None:
        return ""
    residual, forward = (float(cell[k]) for k in ("residual", "forward"))
    if not math.isfinite(residual) or residual > 1:
        return "fails"
    return f"{residual:.1e} ({forward:.1e})"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _worst_ratio(ratios: dict[str, dict[str, float]], norm: str) -> str:
    where = max(ratios, key=lambda s: ratios[s][norm])
    return f"{ratios[where][norm]:.2f} ({where})"


def _in_short(steps: Sequence[str]) -> str:
    kinds = list(dict.fromkeys(steps))
    return ", ".join(f"{steps.count(k)} x {k}" for k in kinds)


def page(content: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    schemes_table = _table(
        ["kappa", "format", *SCHEMES, "Cholesky"],
        [
            [f"{r['kappa']:g}", r["format"], *(_text(r.get(s)) for s in (*SCHEMES, "Cholesky"))]
            for r in content["schemes"]
        ],
    )
    noise_columns = ("kappa", "format", "spectrum", "residual", "over kappa u", "over kappa² u")
    noise_table = _table(
        noise_columns, [[f"{r[c]}" for c in noise_columns] for r in content["noise"]]
    )
    plan_table = _table(
        ["rho", "kappa", "steps (`B X`/`X E`)", "cost", "all tf32x3", "residual: predicted", "measured",
         "Cholesky", "forward error", "Cholesky", "over Cholesky: spectral", "Frobenius",
         "the same in fp32: Frobenius"],
        [
            [
                f"{r['rho']:g}", f"{r['kappa']:g}", _in_short(r["steps"]), f"{r['cost']}",
                f"{r['cost of tf32x3']}", f"{r['predicted residual']:.1e}", f"{r['residual']:.1e}",
                f"{r['residual of Cholesky']:.1e}", f"{r['forward error']:.1e}",
                f"{r['forward error of Cholesky']:.1e}", _worst_ratio(r["over Cholesky"], "spectral"),
                _worst_ratio(r["over Cholesky"], "frobenius"),
                _worst_ratio(r["the same steps in fp32, over Cholesky"], "frobenius"),
            ]
            for r in content["plans"]
        ],
    )  # fmt: skip
    n = content["n"]
    return f"""\
# The damped inverse in low precision

Written by `python benchmarks/precision_table.py`{"; SMOKE RUN" if content["quick"] else ""}.
Order {n}, random eigenvectors. Products are emulated on a CPU: operands rounded to the format, sums in fp32.
**No GPU was used.** Residuals are `‖I - B X‖₂`, forward errors `‖X - B⁻¹‖/‖B⁻¹‖`, against fp64.
Cholesky is that of PyTorch on two threads; on one it errs up to twice as much.

## Schemes

Schedules of the package to 1e-3, a log-uniform spectrum in [1e-8, 1] plus the damping. Residual, and in
brackets the forward error. `coupled`: `R <- R p(R)`; `symmetrised`: `R = (B X + X B)/2`; `uncoupled`:
`R = B X`; `order 5`: the same with minimax steps of order 5; `+ 1`: one correction in fp32 behind.

{schemes_table}

## Rounding noise

The worst of {len(content["spectra"])} spectra ({", ".join(content["spectra"])}).
`E = (I - σ·X) - S X` with `B = S + σ·I`, steps of one precision until rounding alone is left. `u` is the
roundoff of an operand. The policy's constants `NOISE` and `ASYMMETRY` come from here.

{noise_table}

## Plans

`newton_schulz_plan(rho)`, the worst over the same spectra. Costs are tensor-core time in bf16 products.

{plan_table}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="order 48 and fewer rows")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the two files")
    parser.add_argument(
        "--page-only", action="store_true", help="write the page from the JSON file"
    )
    arguments = parser.parse_args(argv)
    file = arguments.out / f"{NAME}.json"
    if arguments.page_only:
        content = json.loads(file.read_text())
    else:
        # The better of what the rival does: with one thread its Cholesky errs up to twice as much.
        set_num_threads(2)
        n, spectra = (48, list(SPECTRA)[:2]) if arguments.quick else (512, list(SPECTRA))
        rows = slice(1, 3) if arguments.quick else slice(None)
        content = {
            "schema": 1,
            "quick": arguments.quick,
            "n": n,
            "spectra": spectra,
            "schemes": schemes(n, TABLE_RHOS[rows]),
            "noise": noise(n, TABLE_RHOS[rows], spectra),
            "plans": plans(n, PLAN_RHOS[rows], spectra),
        }
        write_json(file, content)
        content = json.loads(file.read_text())
    write_text(file.with_suffix(".md"), page(content))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
