# SPDX-License-Identifier: Apache-2.0
"""Residual after every step of the Newton-Schulz schedule: the proved bound, and what matrices show.

Writes docs/images/newton_schulz_schedule.png and results/damped_inverse_schedule.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from emulation import SPECTRA, scaled
from harness.files import write_json
from harness.plot import COLORS
from torch import Tensor

from grng_kernels.damped_inverse.schedule import (
    condition_number,
    minimax_step,
    newton_schulz_schedule,
)

ROOT = Path(__file__).resolve().parents[1]
RHOS = (1e-1, 1e-2, 1e-3, 1e-4)
# Eigenvalues over the whole interval, so that one of them is always where the residual is largest.
WORST = "evenly spread"
# Factors of random activations with so many rows per column.
RANDOM = (1.5, 2.0, 4.0)
MARKS = {"worst case, fp64": "o", "largest of the named, fp32": "_"}
# Least residual of the picture; also where bounds end.
SMALLEST = 1e-13


def spectra(n: int) -> dict[str, Tensor]:
    """Return eigenvalues of A by name, largest 1: the usual ones, the worst case, and random matrices."""
    generator = torch.Generator().manual_seed(0)
    found = {name: make(n) for name, make in SPECTRA.items()}
    found[WORST] = torch.linspace(0, 1, n, dtype=torch.float64)
    for rows in RANDOM:
        x = torch.randn(int(rows * n), n, generator=generator, dtype=torch.float64)
        values = torch.linalg.eigvalsh(x.mT @ x)
        found[f"random, {rows:g} n rows"] = values / values[-1]
    return found


def bounds(kappa: float, count: int) -> list[float]:
    """Return the proved residual of the start and after every step."""
    errors = [(kappa - 1) / (kappa + 1)]
    while len(errors) <= count:
        errors.append(minimax_step(errors[-1])[2])
    return errors


def _norm(r: Tensor) -> float:
    return float(torch.linalg.eigvalsh(r.mT @ r)[-1].clamp(min=0).sqrt())


def _average(r: Tensor) -> float:
    return float(r.norm()) / len(r) ** 0.5


def measure(rho: float, n: int, dtype: torch.dtype) -> dict[str, list[float]]:
    """Return the residual of the start and after every step, by spectrum.

    It is ``‖I - B X‖₂``, and ``‖I - B X‖_F/√n`` for random factors: in the spectral norm every matrix
    reaches the bound, through its eigenvalue 1 alone.
    """
    kappa, generator = condition_number(rho), torch.Generator().manual_seed(1)
    schedule = newton_schulz_schedule(kappa, SMALLEST)
    eye, shift = torch.eye(n, dtype=torch.float64), rho**0.5
    measured = {}
    for name, values in spectra(n).items():
        q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
        b = (q * (values + shift)) @ q.mT / (1 + shift)
        b = ((b + b.mT) / 2).to(dtype)
        iterates = [schedule.start * eye, *(x.double() for x in scaled(b, schedule, "fp32"))]
        rests = [eye - b.double() @ x for x in iterates]
        measured[name] = [_average(r) if name.startswith("random") else _norm(r) for r in rests]
    return measured


def _largest(measured: dict[str, list[float]], names: Sequence[str]) -> list[float]:
    return [max(at) for at in zip(*(measured[name] for name in names), strict=True)]


def collect(n: int) -> dict[str, Any]:
    """Return the content of the result file."""
    rows = []
    for rho in RHOS:
        exact, single = (measure(rho, n, dtype) for dtype in (torch.float64, torch.float32))
        random = [name for name in exact if name.startswith("random")]
        named = [name for name in SPECTRA if name in exact]
        kappa = condition_number(rho)
        columns = {
            "bound": bounds(kappa, len(exact[WORST]) - 1),
            "worst case, fp64": exact[WORST],
            "largest of the named, fp64": _largest(exact, named),
            **{f"{name}, average, fp64": exact[name] for name in random},
            "largest of the named, fp32": _largest(single, named),
        }
        rows.append({
            "rho": rho,
            "kappa": round(kappa, 2),
            **{k: [float(f"{v:.2e}") for v in values] for k, values in columns.items()},
        })  # fmt: skip
    return {"schema": 1, "n": n, "spectra": list(spectra(n)), "rows": rows}


def draw(content: dict[str, Any], path: Path) -> None:
    """Draw the result file.

    Args:
        content: As written.
        path: PNG to write.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 4.2))
    for row, color in zip(content["rows"], COLORS, strict=False):
        bound = row["bound"]
        axis.plot(
            bound, "-", color=color, label=f"bound, rho = {row['rho']:g}, κ = {row['kappa']:g}"
        )
        for key in row:
            if key in MARKS or key.startswith("random"):
                mark = MARKS.get(key, "x")
                axis.plot(row[key], mark, color=color, markersize=5, fillstyle="none")
    for text, mark in {**MARKS, "average over random factors, fp64": "x"}.items():
        axis.plot([], [], mark, color="#444444", fillstyle="none", label=text)
    axis.set(yscale="log", ylim=(SMALLEST, 2), xlabel="steps (two products each)")
    axis.set_ylabel("residual ‖I − B X‖₂; average: ‖·‖_F/√n")
    axis.grid(color="#E4E4E4")
    axis.legend(frameon=False, fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")
    figure.savefig(partial, dpi=90, format="png", metadata={"Software": None})
    plt.close(figure)
    partial.replace(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write the file and the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small matrices, and no picture")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks/results", help="folder of the result file"
    )
    parser.add_argument("--images", type=Path, default=ROOT / "docs/images", help="of the picture")
    arguments = parser.parse_args(argv)
    content = collect(24 if arguments.quick else 192)
    file = arguments.out / "damped_inverse_schedule.json"
    write_json(file, content)
    if not arguments.quick:
        draw(json.loads(file.read_text()), arguments.images / "newton_schulz_schedule.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
