# SPDX-License-Identifier: Apache-2.0
"""The tables of README and docs are those that the kept results make, and no link leads nowhere."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import tables  # noqa: E402

PAGES = pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)


@PAGES
def test_tables_are_those_of_the_results(page: Path) -> None:
    assert tables.filled(page) == page.read_text(encoding="utf-8"), "python benchmarks/tables.py"


def test_each_table_is_on_a_page() -> None:
    shown = {name for page in tables.PAGES for name in tables.names(page)}
    assert shown == set(tables.TABLES)


@PAGES
def test_links_lead_somewhere(page: Path) -> None:
    found = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    local = [link.split("#")[0] for link in found if not link.startswith(("http", "#"))]
    assert local
    missing = [link for link in local if not (page.parent / link).exists()]
    assert not missing


def test_each_result_is_on_a_page() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in tables.PAGES)
    text += (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    folders = [
        path.parent.name
        for name in ("result.json", "study.json")
        for path in tables.RESULTS.glob(f"*/{name}")
    ]
    # The searches of the studies stand beside their studies.
    unshown = [
        name for name in folders if f"results/{name}/" not in text and not name.endswith("-tuning")
    ]
    assert not unshown


def test_changed_number_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    original = (ROOT / "README.md").read_text(encoding="utf-8")
    number = re.search(r"\| \*\*(\d\d\.\d\d) ±", original)
    assert number is not None
    page.write_text(original.replace(number[1], "99.99"), encoding="utf-8")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert tables.filled(page) == original


def test_unknown_table_is_named(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- table: nothing -->\n<!-- end of table -->\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"page\.md: no table 'nothing'; known: ring-and-adamw"):
        tables.filled(page)


def test_missing_runs_are_named() -> None:
    with pytest.raises(ValueError, match="digits-stream: no finished runs of 'adam'"):
        tables.values("digits-stream", "adam", tables.TEST)
