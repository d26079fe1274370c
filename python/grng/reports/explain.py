# SPDX-License-Identifier: Apache-2.0
"""``explain()`` of the optimizers with Kronecker factors: tables."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.parameter import UninitializedParameter

from grng.curvature.layers import KroneckerLayer
from grng.reports import names as of_names
from grng.reports.measures import Measured
from grng.reports.memory import bytes_of
from grng.reports.subject import Subject, read
from grng.reports.text import WIDTH, Grid, Report, bytes_text, count_text, shape_text


def explain(subject: Subject, *, full: bool) -> Report:
    """Return the tables; see :meth:`grng.optim.base.KroneckerOptimizer.explain`."""
    others = subject.others()
    ends = ("", "")
    if not full:
        ends = of_names.common_ends(
            [x.name for x in subject.layers] + [_name(subject, p) for p in others]
        )
    parts: list[Grid | str] = [
        f"{subject.owner} after {_many(subject.step, 'step')}: {_many(len(subject.layers), 'layer')} with "
        f"curvature (kronecker), {_many(len(others), 'parameter')} without (adamw)"
    ]
    if any(ends):
        parts.append(f"All names are {ends[0]}…{ends[1]}")
    groups = _groups(subject, full)
    if groups:
        parts += ["", _route_table(subject, groups, ends), *_shared(subject, groups, ends)]
    measured, kept = read(subject)
    if measured:
        parts += [
            "",
            _curvature_table(subject, groups, measured, ends),
            "norm, damping, condition of the damped factor: output, input side; age: steps since a refresh",
        ]
    if others:
        parts += ["", _other_table(subject, others, ends, full)]
    parts += ["", *_totals(subject, kept)]
    return Report(parts, width=None if full else WIDTH)


def _name(subject: Subject, parameter: nn.Parameter) -> str:
    return subject.names.get(parameter, "a parameter")


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _groups(subject: Subject, full: bool) -> list[list[KroneckerLayer]]:
    """Return the layers, those that are alike together."""
    if full:
        return [[x] for x in subject.layers]

    def form(x: KroneckerLayer) -> Hashable:
        leader = subject.leaders.get(x)
        return (
            of_names.alike(x.name),
            x.kind,
            tuple(x.weight.shape),
            x.sizes,
            x.diagonal,
            x.weight.dtype,
            None if leader is None else of_names.difference(leader.name, x.name),
        )

    return _alike(subject.layers, form)


def _alike(items: Iterable[Any], key_of: Any) -> list[list[Any]]:
    found: dict[Hashable, list[Any]] = {}
    for item in items:
        found.setdefault(key_of(item), []).append(item)
    return list(found.values())


def _label(group: Sequence[KroneckerLayer], ends: tuple[str, str]) -> str:
    name = of_names.together([x.name for x in group])
    return _short(name, ends) + (f" ({len(group)})" if len(group) > 1 else "")


def _short(name: str, ends: tuple[str, str]) -> str:
    return name.removeprefix(ends[0]).removesuffix(ends[1])


def _route_table(
    subject: Subject, groups: Sequence[Sequence[KroneckerLayer]], ends: tuple[str, str]
) -> Grid:
    rows = []
    for group in groups:
        first, flops = group[0], [subject.flops_of(x) for x in group]
        rows.append(
            (
                _label(group, ends),
                first.kind + (" + bias" if first.bias is not None else ""),
                shape_text(first.weight.shape),
                ", ".join(_factor_text(first, side) for side in (0, 1)),
                bytes_text(sum(subject.bytes_of(x) for x in group)),
                count_text(sum(f.refresh for f in flops)),
                count_text(sum(f.step for f in flops)),
            )
        )
    columns = ("kronecker", "kind", "shape", "factors (out, in)", "state", "refresh", "step")
    return Grid(columns, tuple(rows), frozenset({4, 5, 6}))


def _factor_text(layer: KroneckerLayer, side: int) -> str:
    n = layer.sizes[side]
    text = f"{n} (diagonal)" if layer.diagonal[side] else f"{n}x{n}"
    return text if layer.blocks == 1 else f"{layer.blocks} of {text}"


def _shared(
    subject: Subject, groups: Sequence[Sequence[KroneckerLayer]], ends: tuple[str, str]
) -> list[str]:
    """Say which layers have the input factor of another, in a line for each that has followers."""
    followers: dict[str, list[str]] = {}
    for group in groups:
        leaders = [subject.leaders[x] for x in group if x in subject.leaders]
        if leaders:
            leader = of_names.together([x.name for x in leaders])
            mine = of_names.together([x.name for x in group])
            followers.setdefault(leader, []).append(of_names.difference(mine, leader))
    return [
        f"One input factor: {_short(leader, ends)} shares its with {', '.join(found)}"
        for leader, found in followers.items()
    ]


def _curvature_table(
    subject: Subject,
    groups: Sequence[Sequence[KroneckerLayer]],
    of_layer: Mapping[KroneckerLayer, Measured],
    ends: tuple[str, str],
) -> Grid:
    rows = []
    for group in groups:
        found = [of_layer[x] for x in group if x in of_layer]
        if not found:
            rows.append((_label(group, ends), *["none yet"] * 3, "", "", ""))
            continue
        failures = sum(sum(m.failures.values()) for m in found)
        in_a_row = max(m.in_a_row for m in found)
        rows.append(
            (
                _label(group, ends),
                _largest([m.norm for m in found]),
                _largest([m.damping for m in found]),
                _largest([m.condition for m in found]),
                f"{max(max(m.residual) for m in found):.1e}",
                str(max(subject.age_of(x) for x in group if x in of_layer)),
                str(failures) + (f" ({in_a_row} in a row)" if in_a_row else ""),
            )
        )
    columns = (
        "curvature (out, in)",
        "norm",
        "damping",
        "condition",
        "residual",
        "age",
        "failures",
    )
    return Grid(columns, tuple(rows), frozenset({4, 5, 6}))


def _largest(pairs: Sequence[tuple[float, float]]) -> str:
    return ", ".join(f"{max(pair[side] for pair in pairs):.2g}" for side in (0, 1))


def _other_table(
    subject: Subject, others: Sequence[nn.Parameter], ends: tuple[str, str], full: bool
) -> Grid:
    def why(p: nn.Parameter) -> str:
        return subject.reasons.get(p, "given as a bare parameter, without its module")

    def shape(p: nn.Parameter) -> str:
        return "unknown" if isinstance(p, UninitializedParameter) else shape_text(p.shape)

    numbered = list(enumerate(others))
    groups = _alike(
        numbered,
        lambda item: (
            item[0] if full else of_names.alike(_name(subject, item[1])),
            shape(item[1]),
            why(item[1]),
        ),
    )
    rows = []
    for group in groups:
        ps = [p for _, p in group]
        name = of_names.together([_name(subject, p) for p in ps])
        rows.append(
            (
                _short(name, ends) + (f" ({len(ps)})" if len(ps) > 1 else ""),
                shape(ps[0]),
                bytes_text(sum(bytes_of(subject.states.get(p, {})) for p in ps)),
                why(ps[0]),
            )
        )
    return Grid(("adamw", "shape", "state", "why"), tuple(rows), frozenset({2}))


def _totals(subject: Subject, kept: float | None) -> list[str]:
    flops = subject.flops()
    lines = [f"State: {subject.memory}"]
    if subject.layers:
        lines += [
            f"Flops: {count_text(flops.step)} in a step; {count_text(flops.refresh)} in a refresh (every "
            f"{subject.refresh_every} steps)",
            f"       and {count_text(flops.row)} for each row of its statistics; in products, nothing else",
        ]
    if kept is not None:
        lines.append(f"Trust: {subject.kept_by} left {100 * kept:.3g} % of the last step")
    if subject.skipped:
        lines.append(
            f"Skipped: {_many(subject.skipped, 'step')} in a row, for non-finite gradients"
        )
    return [*lines, f"Fisher: {subject.fisher}"]
