# SPDX-License-Identifier: Apache-2.0
"""``result.json``, the table and the figure of a comparison."""

import io
import itertools
import json

import pytest
from rich.console import Console

from grng.__main__ import main
from grng.compare.errors import UsageError
from grng.rl.compare.plots import FILE_NAME, draw, save_figure
from grng.rl.compare.results import is_rl_result, load
from grng.rl.compare.table import print_table
from tests.rl.comparison import result, run


@pytest.fixture
def made():
    runs = [
        run("rank1", 0, [None, 5.0, 9.0], solved_at=25),
        run("adamw:lr=0.5", 0, [1.0, 2.0], status="diverged", problem="NaN\tsomewhere"),
        run("rank1", 1, [2.0, 6.0, 11.0]),
    ]
    return result(runs, "rank1,adamw:lr=0.5,rmsprop")


def test_saved_and_loaded(made, tmp_path):
    path = made.save(tmp_path)
    assert is_rl_result(path) and is_rl_result(tmp_path)
    assert load(path) == load(tmp_path) == made
    content = json.loads(path.read_text())
    assert content["schema"] == "grng-rl" and len(content["summary"]) == 3
    # Loaded and saved again it is the same file.
    text = path.read_text()
    load(path).save(tmp_path)
    assert path.read_text() == text
    assert [each.name for each in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"schema": "grng-compare"}, "^[^:]*: must be a grng-rl result of version 1$"),
        ({"schema_version": 2}, "^[^:]*: must be a grng-rl result of version 1$"),
        ({"runs": [{"method": "rank1"}]}, "incomplete result: .*seed"),
        ({"runs": None}, "incomplete result"),
        ({"config": None, "runs": [{"what": 1}]}, "incomplete result: .*what"),
    ],
)
def test_files_that_are_no_such_result(change, message, made, tmp_path):
    path = made.save(tmp_path)
    content = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=message):
        load(path)
    del content["runs"]
    path.write_text(json.dumps({**content, "schema": "grng-rl", "schema_version": 1}))
    with pytest.raises(UsageError, match=r"result\.json: incomplete result: 'runs'"):
        load(path)


@pytest.mark.parametrize(
    "text, message",
    [(text, "not JSON: ") for text in ("", "{", "\x00", "[" * 100_000)]
    + [(text, "must be a grng-rl result of version 1") for text in ("[]", "3", "{}")],
)
def test_files_that_are_no_result_at_all(text, message, tmp_path):
    path = tmp_path / "result.json"
    path.write_text(text)
    assert not is_rl_result(path)
    with pytest.raises(UsageError, match=rf"result\.json: {message}"):
        load(path)


def test_no_file(tmp_path):
    assert not is_rl_result(tmp_path / "none.json")
    with pytest.raises(UsageError, match=r"none\.json: No such file"):
        load(tmp_path / "none.json")


# ---- table ----


def table(made):
    text = io.StringIO()
    print_table(Console(file=text, width=160), made)
    return text.getvalue().splitlines()


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table(made):
    lines = table(made)
    assert lines[0].strip() == "CartPole-v1: 30 steps, 2 seeds"
    rows = [cells(line) for line in lines if line.startswith("| ")]
    assert rows == [
        [
            "optimizer",
            "final return",
            "mean of curve",
            "evaluated",
            "solved (475)",
            "steps to it",
            "seconds",
        ],
        ["rank1", "10.0 ± 1.4", "6.7 ± 0.5", "2.2 ± 0.4", "1 of 2", "-", "1.5 ± 0.7"],
        ["adamw:lr=0.5 (1 of 2 seeds)", "-", "-", "-", "0 of 1", "-", "-"],
        ["rmsprop (0 of 2 seeds)", "-", "-", "-", "0 of 0", "-", "-"],
    ]
    assert lines[-1].startswith("adamw:lr=0.5 seed 0 failed: NaN")


def test_no_column_of_solved_where_nobody_says_so(made):
    made.config["solved"] = None
    rows = [cells(line) for line in table(made) if line.startswith("| ")]
    assert "solved" not in rows[0][4] and len(rows[1]) == 5


# ---- figure ----


def test_the_figure_shows_mean_and_range(made):
    axes = draw(made).axes[0]
    rank1, adamw, bound = axes.lines
    # The first point of one run is not known.
    assert rank1.get_xdata().tolist() == [20, 30] and rank1.get_ydata().tolist() == [5.5, 10.0]
    assert adamw.get_ydata().tolist() == [1.0, 2.0]
    assert set(bound.get_ydata()) == {475.0}
    [path] = axes.collections[0].get_paths()
    assert {(x, y) for x, y in path.vertices} >= {(20, 5), (20, 6), (30, 9), (30, 11)}
    assert {text.get_text() for text in axes.texts} >= {"rank1", "adamw:lr=0.5"}
    assert any("8 environments side by side" in text.get_text() for text in axes.texts)


def test_labels_of_many_methods_stand_apart_beside_the_axes():
    specs = [f"rank1:rollout={n}" for n in range(1, 31)]
    runs = [run(spec, 0, [100.0 if n else 0.0]) for n, spec in enumerate(specs)]
    figure = draw(result(runs, ",".join(specs)))
    figure.canvas.draw()
    box = figure.bbox
    shown = [text for text in figure.axes[0].texts if text.get_text() in specs]
    places = sorted(text.get_window_extent().y0 for text in shown)
    assert len(shown) == 30
    assert all(b - a > 9 for a, b in itertools.pairwise(places))
    for text in shown:
        extent = text.get_window_extent()
        assert box.x0 <= extent.x0 and extent.x1 <= box.x1 + 1
        assert box.y0 <= extent.y0 and extent.y1 <= box.y1


def test_the_figure_does_not_say_what_is_not_so():
    made = result([run("rank1:environments=4", 0, [1.0])], "rank1,rank1:environments=4")
    assert not any("side by side" in text.get_text() for text in draw(made).axes[0].texts)


@pytest.mark.parametrize("curve", [None, [], [None, None], [7.0], [7.0, 7.0]])
def test_the_figure_of_little(curve, tmp_path):
    made = result([] if curve is None else [run("rank1", 0, curve)], "rank1,adamw", (0,))
    path = save_figure(made, tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_plot_draws_again_what_was_saved(made, tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        made.save(tmp_path / name)
    assert main(["plot", str(tmp_path / "a"), str(tmp_path / "b" / "result.json")]) == 0
    assert capsys.readouterr().out.count("wrote") == 2
    for name in ("a", "b"):
        assert (tmp_path / name / FILE_NAME).is_file()
