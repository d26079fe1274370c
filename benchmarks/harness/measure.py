# SPDX-License-Identifier: Apache-2.0
"""From a case to its rows: check every contender, then time those that are right."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch
from torch import Tensor

from harness.case import Bench, Case, Contender, Plan
from harness.device import (
    CALLS_PER_GRAPH,
    NotCapturableError,
    cache_flush,
    capture,
    stopwatch_for,
)
from harness.load import under_watch
from harness.row import Ceilings, Row, make_row, name_rivals
from harness.timer import Call, Timing, interleave


def check(
    case: Case, contender: Contender, remarks: dict[str, str] | None = None
) -> tuple[float | None, str | None]:
    """Run a contender once from fresh state.

    Args:
        case: Judges the result.
        contender: Who.
        remarks: Takes the remark of the case on the result, by the contender's name.

    Returns:
        ``(error against fp64, why it must not be timed)``, either of them None.
    """
    try:
        contender.reset()
        outputs = contender.call()
        error = case.error(outputs)
        if case.remark is not None and remarks is not None:
            remarks[contender.name] = case.remark(outputs)
        contender.reset()
    except Exception as failure:
        reason = str(failure).strip().split("\n")[0]
        return None, f"failed: {type(failure).__name__}: {reason}"[:240]
    if not error <= case.limit:
        return error, f"red check: error {error:.1e} > {case.limit:.0e}, not timed"
    return error, None


def _check_graph(case: Case, contender: Contender, errors: dict[str, float]) -> str | None:
    """Replay one captured call from fresh state; return why the graph must not be timed."""
    outputs: list[Tensor] = []

    def call() -> None:
        outputs[:] = contender.call()

    try:
        replay = capture(call, 1)
    except NotCapturableError as refusal:
        return f"not capturable: {refusal}"
    contender.reset()
    replay()
    torch.cuda.synchronize()
    error = case.error(outputs)
    contender.reset()
    errors[contender.name] = max(error, errors.get(contender.name, 0.0))
    return None if error <= case.limit else f"red check in a graph: error {error:.1e}"


def _graphs(
    case: Case, sound: list[Contender], state: str, errors: dict[str, float]
) -> tuple[dict[str, Call], dict[str, str]]:
    """Capture what can be captured; return the replays, and the reasons for the rest."""
    calls: dict[str, Call] = {}
    refused: dict[str, str] = {}
    for contender in sound:
        problem = _check_graph(case, contender, errors)
        if problem is None:
            try:
                calls[contender.name] = capture(
                    contender.call, CALLS_PER_GRAPH if state == "warm" else 1
                )
            except NotCapturableError as refusal:
                problem = f"not capturable: {refusal}"
        if problem is not None:
            refused[contender.name] = problem
    return calls, refused


def _scaled(timing: Timing, calls: int) -> Timing:
    return Timing(timing.p20 / calls, timing.p50 / calls, timing.p80 / calls, timing.rounds)


def _compare(
    case: Case,
    plan: Plan,
    ceilings: Ceilings,
    errors: dict[str, float],
    problems: dict[str, str],
    state: str,
    mode: str,
    flush: Callable[[], object] | None,
) -> list[Row]:
    sound = [c for c in case.contenders if c.name not in problems]
    problems, per_replay, repetitions = dict(problems), 1, case.repetitions
    if mode == "graph":
        calls, refused = _graphs(case, sound, state, errors)
        problems |= refused
        per_replay = CALLS_PER_GRAPH if state == "warm" else 1
        repetitions = None
    else:
        calls = {c.name: c.call for c in sound}
    effort = dataclasses.replace(plan.effort, max_s=min(plan.effort.max_s, case.max_s))
    timings: dict[str, Timing] = {}
    load = None
    if calls:
        timings, load = under_watch(
            lambda: interleave(
                calls,
                stopwatch_for(plan.device),
                effort,
                before=flush if state == "cold" else None,
                repetitions=repetitions,
            ),
            attempts=plan.attempts,
        )
    rows = [
        make_row(
            case,
            c,
            ceilings,
            state=state,
            mode=mode,
            timing=_scaled(timings[c.name], per_replay) if c.name in timings else None,
            error=errors.get(c.name),
            foreign_load=load if c.name in timings else None,
            notes=[problems[c.name]] if c.name in problems else [],
        )
        for c in case.contenders
    ]
    return name_rivals(rows)


def measure_case(case: Case, plan: Plan, ceilings: Ceilings) -> list[Row]:
    """Return the rows of one case in every state and mode of the plan."""
    errors: dict[str, float] = {}
    problems: dict[str, str] = {}
    remarks: dict[str, str] = {}
    for contender in case.contenders:
        error, problem = check(case, contender, remarks)
        if error is not None:
            errors[contender.name] = error
        if problem is not None:
            problems[contender.name] = problem
    contenders = [
        dataclasses.replace(c, notes=(*c.notes, remarks[c.name])) if c.name in remarks else c
        for c in case.contenders
    ]
    case = dataclasses.replace(case, contenders=contenders)
    flush = cache_flush(plan.device) if "cold" in plan.states else None
    return [
        row
        for state in plan.states
        if state in case.states
        # Consecutive calls that belong together cannot each start from an empty cache.
        if not (case.repetitions and state == "cold")
        for mode in plan.modes
        if mode in case.modes
        for row in _compare(case, plan, ceilings, errors, problems, state, mode, flush)
    ]


def measure_bench(
    bench: Bench, plan: Plan, ceilings: Ceilings, say: Callable[[str], None]
) -> list[Row]:
    """Measure every case of a benchmark, within its budget.

    Args:
        bench: Which.
        plan: How.
        ceilings: Of this machine, measured in this run.
        say: Shows progress.

    Returns:
        The rows of the cases that were begun in time; those left out are named by ``say``.
    """
    start = time.monotonic()
    rows: list[Row] = []
    for case in bench.cases(plan):
        if time.monotonic() - start > plan.budget_s:
            say(f"{bench.op}: out of time, left out from {case.shape} {case.dtype} on")
            break
        begun = time.monotonic()
        rows += measure_case(case, plan, ceilings)
        say(f"{bench.op} {case.shape} {case.dtype}: {time.monotonic() - begun:.1f} s")
    return rows
