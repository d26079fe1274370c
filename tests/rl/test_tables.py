# SPDX-License-Identifier: Apache-2.0
"""The tables of the documentation are those of the results."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import rl_tables  # noqa: E402

PAGE = ROOT / "docs" / "rank-one-policy-gradient.md"


def test_there_are_results():
    assert len(rl_tables.folders()) >= 1


@pytest.mark.parametrize("folder", rl_tables.folders(), ids=lambda folder: folder.name)
def test_the_page_has_the_table_of_each_result(folder):
    assert rl_tables.table(rl_tables.load(folder)) in PAGE.read_text(encoding="utf-8")
    assert f"results/{folder.name}/return.png" in PAGE.read_text(encoding="utf-8")
