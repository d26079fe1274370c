# SPDX-License-Identifier: Apache-2.0
"""``diagnostics()`` of the optimizers with Kronecker factors: plain numbers."""

from collections.abc import Mapping, Sequence

from grng.optim.factors import COUNTERS, SIDES
from grng.reports.measures import Measured
from grng.reports.subject import Subject, read


def diagnostics(subject: Subject) -> dict[str, float]:
    """Return the numbers; see :meth:`grng.optim.base.KroneckerOptimizer.diagnostics`."""
    measured, kept = read(subject)
    flops = subject.flops()
    report: dict[str, float] = {
        "step": subject.step,
        "kronecker_layers": len(subject.layers),
        "adamw_parameters": len(subject.others()),
        "skipped_steps_in_a_row": subject.skipped,
        "state_bytes": subject.memory.total,
        "factor_bytes": subject.memory.factors,
        "inverse_bytes": subject.memory.inverses,
        "moment_bytes": subject.memory.moments,
        "other_bytes": subject.memory.other,
        "refresh_bytes": subject.memory.refresh,
        "flops_per_row": flops.row,
        "flops_per_refresh": flops.refresh,
        "flops_per_step": flops.step,
    }
    if kept is not None:
        report["step_kept"] = kept
    for layer in subject.layers:
        of_layer = subject.flops_of(layer)
        report[f"{layer.name}/state_bytes"] = subject.bytes_of(layer)
        report[f"{layer.name}/flops_per_row"] = of_layer.row
        report[f"{layer.name}/flops_per_refresh"] = of_layer.refresh
        report[f"{layer.name}/flops_per_step"] = of_layer.step
    for layer, found in measured.items():
        report.update(
            {f"{layer.name}/{k}": v for k, v in _numbers(found, subject.age_of(layer)).items()}
        )
    report.update(_over_layers(report, [x.name for x in measured]))
    return {key: float(value) for key, value in report.items()}


def _numbers(found: Measured, age: int) -> dict[str, float]:
    numbers: dict[str, float] = {
        "refresh_age": age,
        "inverse_failures_in_a_row": found.in_a_row,
        **found.failures,
    }
    for i, side in enumerate(SIDES):
        numbers[f"{side}_residual"] = found.residual[i]
        if found.inverted[i]:
            numbers[f"{side}_damping"] = found.damping[i]
            numbers[f"{side}_norm"] = found.norm[i]
            numbers[f"{side}_condition"] = found.condition[i]
    return numbers


def _over_layers(report: Mapping[str, float], layers: Sequence[str]) -> dict[str, float]:
    """Return the sums and the largest of what the layers have."""

    def of(*keys: str) -> list[float]:
        return [report[f"{x}/{k}"] for x in layers for k in keys if f"{x}/{k}" in report]

    totals: dict[str, float] = {counter: sum(of(counter)) for counter in COUNTERS}
    for key, parts in (
        ("largest_condition", ("output_condition", "input_condition")),
        ("largest_residual", ("output_residual", "input_residual")),
        ("largest_refresh_age", ("refresh_age",)),
        ("inverse_failures_in_a_row", ("inverse_failures_in_a_row",)),
    ):
        values = of(*parts)
        if values:
            totals[key] = max(values)
    return totals
