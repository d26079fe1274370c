# SPDX-License-Identifier: Apache-2.0
"""The page on reinforcement learning shows every result that is kept."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import rl_tables  # noqa: E402

PAGE = ROOT / "docs" / "rank-one-policy-gradient.md"


def test_there_are_results():
    assert len(rl_tables.folders()) >= 1


# That the tables are those of the results, tests/integration/test_tables.py sees.
@pytest.mark.parametrize("folder", rl_tables.folders(), ids=lambda folder: folder.name)
def test_the_page_has_table_and_figure_of_each_result(folder):
    text = PAGE.read_text(encoding="utf-8")
    assert f"<!-- table: {folder.name} -->" in text
    assert f"results/{folder.name}/return.png" in text
