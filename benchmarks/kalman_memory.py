# SPDX-License-Identifier: Apache-2.0
"""Peak memory that one Kalman update takes beyond its arguments, against the number of parameters (Linux).

``python benchmarks/kalman_memory.py [--out FOLDER]`` prints a table and writes it as JSON. Each figure is
one call in a process of its own: the peak of its resident memory during the call, less that before it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from bench_kalman_update import NOISE, _lean_half, _ours
from harness.environment import describe

OUTPUTS = 2
PARAMETERS = (1_000_000, 5_000_000, 10_000_000, 50_000_000)
UPDATES = {"grng": _ours, "lean": _lean_half}


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def peak_of(call: Callable[[], object]) -> int:
    """Return the bytes that the process needed during a call beyond what it had before."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def _measure(name: str, d: int) -> int:
    """Return the bytes of one call. The Jacobian is bf16, the state fp32."""
    update = UPDATES[name]
    small = (torch.ones(OUTPUTS), NOISE * torch.eye(OUTPUTS))
    # What is loaded or started by a first call is no memory of the update.
    update(torch.zeros(64), torch.ones(64), torch.ones(OUTPUTS, 64, dtype=torch.bfloat16), *small)
    jacobian = torch.full((OUTPUTS, d), 2.0**-10, dtype=torch.bfloat16)
    mean, variance = torch.zeros(d), torch.ones(d)
    return peak_of(lambda: update(mean, variance, jacobian, *small))


def main() -> int:
    """Run every size in its own process, or measure one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for kalman_memory.json")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "D"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(_measure(options.one[0], int(options.one[1])))
        return 0
    environment = describe(torch.device("cpu"))
    rows = []
    print(f"C={OUTPUTS}, H bf16; MB beyond the arguments")
    print(f"{'parameters':>12} {'arguments':>10} " + " ".join(f"{n:>8}" for n in UPDATES))
    for d in PARAMETERS:
        row = {"parameters": d, "outputs": OUTPUTS, "arguments_mb": (2 * OUTPUTS + 8) * d / 1e6}
        for name in UPDATES:
            command = [sys.executable, __file__, "--one", name, str(d)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            row[f"{name}_mb"] = round(int(done.stdout) / 1e6, 2)
        rows.append(row)
        figures = " ".join(f"{row[f'{n}_mb']:8.1f}" for n in UPDATES)
        print(f"{d:12,} {row['arguments_mb']:10.0f} {figures}", flush=True)
    if options.out:
        text = (
            json.dumps({"environment": environment, "jacobian": "bfloat16", "rows": rows}, indent=2)
            + "\n"
        )
        (options.out / "kalman_memory.json").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
