# SPDX-License-Identifier: Apache-2.0
"""The committed errors of low-precision inverses: the scripts run, and the pages say what the files say."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from grng_kernels.damped_inverse.precision import ASYMMETRY, NOISE, ROUNDOFF, newton_schulz_plan
from grng_kernels.damped_inverse.schedule import condition_number, newton_schulz_schedule

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results"
PAGE = ROOT / "docs/why-no-convergence-test.md"


def run(script, *arguments):
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr


def read(name, folder=RESULTS):
    return json.loads((folder / f"{name}.json").read_text())


def test_quick_run_of_the_table(tmp_path):
    run("precision_table.py", "--quick", "--out", tmp_path)
    content, committed = (read("damped_inverse_precision", f) for f in (tmp_path, RESULTS))
    assert content["quick"] and not committed["quick"]
    for part in ("schemes", "noise", "plans"):
        assert set(content[part][-1]) == set(committed[part][-1])
    assert all(row["residual"] <= row["predicted residual"] for row in content["plans"])
    # Order 2 from B in every step is the best of the schemes in low precision.
    for row in content["schemes"]:
        if row["format"] in ("bf16", "tf32"):
            rivals = [row[s]["residual"] for s in ("coupled", "symmetrised", "order 5")]
            assert row["uncoupled"]["residual"] < min(float(r) for r in rivals)
    assert "SMOKE RUN" in (tmp_path / "damped_inverse_precision.md").read_text()


def test_quick_run_of_the_picture(tmp_path):
    run("plot_schedule.py", "--quick", "--out", tmp_path)
    for row in read("damped_inverse_schedule", tmp_path)["rows"]:
        for bound, measured in zip(row["bound"], row["worst case, fp64"], strict=True):
            assert measured == pytest.approx(bound, rel=1e-2, abs=1e-12)


def test_committed_page_is_that_of_the_committed_file(tmp_path):
    name = "damped_inverse_precision"
    (tmp_path / f"{name}.json").write_text((RESULTS / f"{name}.json").read_text())
    run("precision_table.py", "--page-only", "--out", tmp_path)
    assert (tmp_path / f"{name}.md").read_text() == (RESULTS / f"{name}.md").read_text()


def test_policy_and_committed_results_belong_together():
    content = read("damped_inverse_precision")
    for row in content["plans"]:
        plan = newton_schulz_plan(row["rho"])
        assert ["/".join(step[2:]) for step in plan.steps] == row["steps"]
        assert (
            row["residual"] <= row["predicted residual"] == pytest.approx(plan.residual, rel=0.05)
        )
    single = [r["over kappa u"] for r in content["noise"] if r["format"] in ("bf16", "tf32")]
    assert 0.9 * NOISE <= max(single) <= NOISE
    fine = [r for r in content["noise"] if r["format"].endswith("x3")]
    for row in fine:
        u = ROUNDOFF[row["format"]]
        assert (
            row["over kappa² u"] * u <= ASYMMETRY * u + ROUNDOFF["fp32"] + NOISE * u / row["kappa"]
        )


def test_numbers_of_the_explanation():
    from math import ceil, log

    text = PAGE.read_text()
    rows = re.findall(r"^\| (1e-\d) \| (\S+) \| (\d) \| (\d+) \| (\S+) \| (\d+) \|$", text, re.M)
    assert [float(row[0]) for row in rows] == [1e-1, 1e-2, 1e-3, 1e-4]
    for rho, kappa, steps, products, residual, textbook in rows:
        exact = condition_number(float(rho))
        schedule = newton_schulz_schedule(exact, 1e-3)
        assert float(kappa) == pytest.approx(exact, rel=2e-3)
        assert (len(schedule.steps), 2 * len(schedule.steps) - 2) == (int(steps), int(products))
        assert float(residual) == pytest.approx(schedule.residual, rel=2e-2)
        squarings = ceil(log(log(1e-3) / log(1 - 1 / exact), 2))
        assert 2 * squarings - 2 == int(textbook)
    floors = {
        r["rho"]: r["largest of the named, fp32"][-1]
        for r in read("damped_inverse_schedule")["rows"]
    }
    plan = next(r for r in read("damped_inverse_precision")["plans"] if r["rho"] == 1e-2)
    ratio = max(r["spectral"] for r in plan["over Cholesky"].values())
    for number in (
        f"stops at {floors[1e-2]:.1e} for", f"at {floors[1e-4]:.1e} for",
        f"residual of {plan['predicted residual']:.1e}", f"measured is {plan['residual']:.1e}",
        f"is {ratio} times", f"`{NOISE}·κ·u`",
    ):  # fmt: skip
        assert number.replace("e-0", "e-") in re.sub(r"\s+", " ", text), number


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", PAGE.read_text()):
        assert (PAGE.parent / target).exists(), target
    assert "docs/why-no-convergence-test.md" in (ROOT / "README.md").read_text()
