# SPDX-License-Identifier: Apache-2.0
"""Curves and figures that are taken from the episodes of a run."""

import numpy as np
import pytest

from grng.rl.compare.records import RLRun
from tests.rl.comparison import result, run


def read(episodes, points, solved=None):
    made = RLRun("rank1", 0)
    made.read_curve(episodes, points, solved)
    return made


def test_the_curve_is_the_mean_of_the_last_100_episodes():
    draw = np.random.default_rng(0)
    ends = np.cumsum(draw.integers(1, 9, 250)).tolist()
    returns = draw.normal(50, 20, 250).tolist()
    points = list(range(100, ends[-1] + 200, 100))
    made = read(list(zip(ends, returns, strict=True)), points)
    expected = []
    for point in points:
        known = [value for end, value in zip(ends, returns, strict=True) if end <= point]
        expected.append(round(float(np.mean(known[-100:])), 4))
    assert made.curve_return == pytest.approx(expected, abs=1.01e-4)
    assert made.curve_steps == points and made.episodes == 250
    assert made.final_return == made.curve_return[-1]
    assert made.mean_return == pytest.approx(np.mean(made.curve_return))


def test_nothing_is_known_before_the_first_episode_ends():
    made = read([(20, 3.0), (20, 4.0), (31, 8.0)], [10, 19, 20, 30, 31])
    assert made.curve_return == [None, None, 3.5, 3.5, 5.0]
    assert made.mean_return == pytest.approx(4.0)
    assert read([], [10, 20]).curve_return == [None, None]
    assert read([], [10]).final_return is None and read([], [10]).mean_return is None
    assert RLRun("a", 0).final_return is None and RLRun("a", 0).evaluated_return is None


def test_returns_are_rounded_to_four_places():
    assert read([(1, 1.0), (2, 1.0), (3, 2.0)], [3]).curve_return == [1.3333]


def test_solved_at_the_step_where_the_mean_of_100_first_is_the_bound():
    ends = [5 * (i + 1) for i in range(160)]
    # 40 of 9, then 10: the mean is 10 when the last 9 has left, with the 140th.
    returns = [9.0] * 40 + [10.0] * 120
    episodes = list(zip(ends, returns, strict=True))
    assert read(episodes, [800], solved=10.0).solved_at == ends[139]
    # 9.7 where 30 of 9 are left, with the 110th.
    assert read(episodes, [800], solved=9.7).solved_at == ends[109]
    assert read(episodes, [800], solved=9.0).solved_at == ends[99]
    assert read(episodes, [800], solved=10.1).solved_at is None
    assert read(episodes, [800]).solved_at is None


def test_99_episodes_do_not_solve():
    episodes = [(i + 1, 500.0) for i in range(100)]
    assert read(episodes[:99], [100], solved=475.0).solved_at is None
    assert read(episodes, [100], solved=475.0).solved_at == 100


def test_rounding_does_not_decide_at_the_bound():
    # Sums of 0.1 are not exact.
    episodes = [(i + 1, 0.1) for i in range(5000)]
    assert read(episodes, [5000], solved=0.1).solved_at == 100


def test_what_comes_after_the_last_point_does_not_solve():
    episodes = [(i + 1, 500.0) for i in range(100)]
    assert read(episodes, [50, 99], solved=475.0).solved_at is None


# ---- rows ----


def test_mean_and_deviation_over_seeds():
    made = result([run("rank1", 0, [1.0, 2.0]), run("rank1", 1, [3.0, 6.0])], "rank1")
    [row] = made.rows()
    assert (row.final_return.mean, row.final_return.deviation) == (4.0, pytest.approx(8**0.5))
    assert row.mean_return.mean == pytest.approx(3.0)
    assert row.evaluated_return.mean == pytest.approx(2.25)
    assert row.seconds.mean == pytest.approx(1.5)
    assert (row.runs, row.finished, row.solved, row.solved_at) == (2, 2, 0, None)


def test_one_seed_has_no_deviation():
    [row] = result([run("rank1", 0, [1.0])], "rank1", (0,)).rows()
    assert row.final_return.mean == 1.0 and row.final_return.deviation is None


@pytest.mark.parametrize(
    "solved, expected",
    [
        ([10, 30, 20], 20),
        ([10, None, 20], 20),
        ([10, None, None], None),
        ([40, 10], 40),
        ([None, 10], None),
        ([30, 10, 20, 40], 30),
        ([None], None),
    ],
)
def test_steps_until_solved_are_the_upper_median_and_unsolved_is_infinite(solved, expected):
    runs = [run("rank1", i, [1.0], solved_at=at) for i, at in enumerate(solved)]
    [row] = result(runs, "rank1").rows()
    assert row.solved_at == expected and row.solved == len(solved) - solved.count(None)


def test_a_figure_that_not_every_run_has_is_left_out():
    runs = [run("rank1", 0, [1.0]), run("rank1", 1, [2.0], status="diverged")]
    [row] = result(runs, "rank1").rows()
    assert row.final_return is None and row.seconds is None and (row.runs, row.finished) == (2, 1)
    [row] = result([run("rank1", 0, [1.0]), run("rank1", 1, [None])], "rank1").rows()
    assert row.final_return is None and row.evaluated_return is not None


def test_a_method_without_a_run_has_a_row():
    rows = result([run("rank1", 0, [1.0])], "rank1,adamw").rows()
    assert [(row.method, row.runs) for row in rows] == [("rank1", 1), ("adamw", 0)]
    assert rows[1].final_return is None and rows[1].solved_at is None
