# SPDX-License-Identifier: Apache-2.0
"""benchmarks/plot_variants.py: what is drawn of a result of grng compare."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def row(optimizer, online, held_out, seeds=2):
    return {
        "optimizer": optimizer,
        "seeds_finished": seeds,
        "online_accuracy": online,
        "online_accuracy_std": None if online is None else 0.01,
        "validation_accuracy": held_out,
        "validation_accuracy_std": None if held_out is None else 0.02,
    }


def run(tmp_path, rows):
    result = {"config": {"task": "digits"}, "summary": {"rows": rows}}
    (tmp_path / "result.json").write_text(json.dumps(result))
    command = [sys.executable, BENCHMARKS / "plot_variants.py", tmp_path / "result.json"]
    return subprocess.run(
        [*command, tmp_path / "sub" / "out.png"], capture_output=True, text=True, check=False
    )


def test_a_picture_with_and_without_online_accuracies(tmp_path):
    for online in (0.5, None):
        rows = [row("a", online, 0.6), row("b:x=1", online, 0.7), row("failed", None, None, 0)]
        done = run(tmp_path, rows)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "sub" / "out.png").read_bytes().startswith(b"\x89PNG")


def test_a_result_without_accuracies_is_refused(tmp_path):
    done = run(tmp_path, [row("a", None, None)])
    assert done.returncode != 0
    assert "neither online nor validation accuracies" in done.stderr
