# SPDX-License-Identifier: Apache-2.0
"""Dotted names: what all have in common, and one name for those that differ in a number."""

from collections.abc import Hashable, Sequence


def common_ends(names: Sequence[str]) -> tuple[str, str]:
    """Return the whole parts that all of several names begin with, and those that all end with, with dots."""
    if len(names) < 2:
        return "", ""
    parts = [name.split(".") for name in names]
    front = _common([p[:-1] for p in parts])
    back = _common([p[len(front) + 1 :][::-1] for p in parts])[::-1]
    return ".".join([*front, ""]) if front else "", ".".join(["", *back]) if back else ""


def _common(parts: Sequence[Sequence[str]]) -> list[str]:
    common: list[str] = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1 or column[0].isdigit():
            break
        common.append(column[0])
    return common


def alike(name: str) -> Hashable:
    """Return what names have in common that differ in numbers only."""
    return tuple("" if part.isdigit() else part for part in name.split("."))


def together(names: Sequence[str]) -> str:
    """Return one name for several that are :func:`alike`: ``layer.[0-3,7].query``.

    Where they differ in several numbers these are not listed: ``layer.*.expert.*.up``.
    """
    columns = list(zip(*(name.split(".") for name in names), strict=True))
    varied = sum(len(set(column)) > 1 for column in columns)
    parts = []
    for column in columns:
        if len(set(column)) == 1:
            parts.append(column[0])
        else:
            parts.append("*" if varied > 1 else f"[{_ranges(sorted(set(map(int, column))))}]")
    return ".".join(parts)


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def difference(name: str, other: str) -> str:
    """Return the parts of ``name`` that ``other`` does not have in their place."""
    mine, theirs = name.split("."), other.split(".")
    if len(mine) != len(theirs):
        return name
    return ".".join(a for a, b in zip(mine, theirs, strict=True) if a != b) or name
