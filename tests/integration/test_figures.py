# SPDX-License-Identifier: Apache-2.0
"""Every figure that is kept can be drawn again from the results that are kept."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import figures  # noqa: E402


def kept() -> set[str]:
    """The pictures that are under version control; all that are there where there is none."""
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), "ls-files", "*.png"],
            capture_output=True,
            text=True,
            check=True,
        )
        found = set(done.stdout.split())
    except (OSError, subprocess.CalledProcessError):
        found = {str(file.relative_to(ROOT)) for file in figures.RESULTS.rglob("*.png")}
    assert found
    return found


def test_all_figures_are_drawn(tmp_path: Path) -> None:
    folder, images = tmp_path / "benchmarks" / "results", tmp_path / "docs" / "images"
    images.mkdir(parents=True)
    shutil.copytree(figures.RESULTS, folder, ignore=shutil.ignore_patterns("*.png"))
    figures.draw_all(folder, images)
    drawn = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.png")}
    assert kept() <= drawn


def test_half_a_folder_is_drawn(tmp_path: Path) -> None:
    shutil.copytree(figures.RESULTS / "max-kl-digits", tmp_path / "max-kl-digits")
    figures.draw_all(tmp_path, tmp_path)
    assert (tmp_path / "max-kl-digits" / "stream_accuracy.png").is_file()


def test_folder_without_results_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures.draw_all(tmp_path, tmp_path)
    assert f"{tmp_path}: no " in capsys.readouterr().err
