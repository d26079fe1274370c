# SPDX-License-Identifier: Apache-2.0
"""What a study keeps, prints and returns where a run fails: by its numbers, its data, or its machine."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from grng.compare.errors import UsageError
from grng.studies.records import Panel, load
from grng.tasks.data import DataError

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import study  # noqa: E402
from studies import fine_tuning  # noqa: E402
from studies.definition import Definition, Measured, Options, Planned  # noqa: E402

PANEL = Panel("step", "loss", "Loss", "step", "loss")
# What torch says where the memory of the CPU is not enough (version 2.8).
NO_MEMORY = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 40000000000000000 bytes. Error code 12 (Cannot allocate memory)"
)


def good() -> Measured:
    return Measured([{"step": 1, "loss": 1.0}])


def run_study(monkeypatch: pytest.MonkeyPatch, folder: Path, second: Callable[[], Measured]) -> int:
    """The exit code of a study whose second run of three is given."""

    def plan(_: Options) -> Iterator[Planned]:
        for name, run in (("first", good), ("second", second), ("third", good)):
            yield Planned(name, "", 0, run)

    made_up = Definition("made-up", "Made up", "", (PANEL,), lambda _: {}, plan)
    monkeypatch.setitem(study.STUDIES, "memory", made_up)
    return study.main(["memory", "--seeds", "0", "--out", str(folder)])


def failing(error: BaseException) -> Callable[[], Measured]:
    def run() -> Measured:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("no such data; fetch it"), 1),
        (torch.OutOfMemoryError("CUDA out of memory"), 1),
        (NO_MEMORY, 1),
        (UsageError("no such optimizer"), 2),
    ],
)
def test_what_is_no_fault_of_the_numbers_ends_the_study(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    code: int,
) -> None:
    assert run_study(monkeypatch, tmp_path, failing(error)) == code
    assert f"study.py: {error}" in capsys.readouterr().err
    kept = load(tmp_path / "study-made-up")
    assert kept.status == "interrupted"
    assert [run.series for run in kept.runs] == ["first"]
    # Once the cause is gone, the study goes on where it stopped.
    assert run_study(monkeypatch, tmp_path, good) == 0
    kept = load(tmp_path / "study-made-up")
    assert [run.status for run in kept.runs] == ["finished"] * 3


def test_fault_of_the_program_is_not_hidden(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(KeyError):
        run_study(monkeypatch, tmp_path, failing(KeyError("loss")))
    assert load(tmp_path / "study-made-up").status == "interrupted"


def test_diverged_run_is_told_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_study(monkeypatch, tmp_path, failing(RuntimeError("singular matrix"))) == 1
    assert "diverged (RuntimeError: singular matrix)" in capsys.readouterr().out
    kept = load(tmp_path / "study-made-up")
    assert kept.status == "finished"
    assert [run.status for run in kept.runs] == ["finished", "diverged", "finished"]
    # It is there, and says so again.
    assert run_study(monkeypatch, tmp_path, good) == 1


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_number_that_is_not_finite_is_a_divergence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: float
) -> None:
    points = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": value}]
    assert run_study(monkeypatch, tmp_path, lambda: Measured(points)) == 1
    lost = load(tmp_path / "study-made-up").runs[1]
    assert (lost.status, lost.points) == ("diverged", [])
    assert lost.reason == f"loss of point 1 is {value}"


@pytest.mark.parametrize("error", [DataError("no such data"), NO_MEMORY])
def test_rate_is_not_chosen_where_the_machine_fails(
    monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    def train(label: str, *_: object) -> None:
        raise error

    made_up = torch.zeros(2)
    from grng.tasks import ClassificationData

    data = ClassificationData(made_up, made_up, made_up, made_up, "made up", {})
    monkeypatch.setattr(fine_tuning, "train", train)
    monkeypatch.setattr(fine_tuning, "data_of", lambda *_, **__: data)
    fine_tuning.tuned.cache_clear()
    with pytest.raises(RuntimeError) as caught:
        fine_tuning.tuned("r 4", Options(seeds=(0,)))
    assert caught.value is error
