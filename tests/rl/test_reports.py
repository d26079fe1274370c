# SPDX-License-Identifier: Apache-2.0
"""What an update tells reaches TensorBoard's file and the progress bar."""

import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from grng.rl import ActorCritic, TensorBoardLog
from tests.rl.environments import Corridor, agent


def scalars(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


@pytest.mark.parametrize("optimizer", ["rank1", "adamw"])
def test_what_is_written_can_be_read(optimizer, tmp_path):
    updates = []
    with TensorBoardLog(str(tmp_path)) as log:

        def report(update):
            updates.append(update)
            log(update)

        agent(Corridor, optimizer=optimizer, rollout=30).train(180, report=report)
    found = scalars(tmp_path)

    def approx(pairs):
        # Events hold fp32.
        return [(step, pytest.approx(value, rel=1e-6)) for step, value in pairs]

    episodes = [episode for update in updates for episode in update.episodes]
    assert len(episodes) > 3
    expected = {
        "episode/return": [(step, value) for step, value, _ in episodes],
        "episode/length": [(step, length) for step, _, length in episodes],
        "policy/entropy": [(u.steps, u.entropy) for u in updates],
        "value/loss": [(u.steps, u.value_loss) for u in updates],
        "value/explained_variance": [(u.steps, u.explained_variance) for u in updates],
        "time/steps_per_second": [(u.steps, 60 / u.seconds) for u in updates],
    }
    for name in updates[0].optimizer:
        expected[f"optimizer/{name}"] = [(u.steps, u.optimizer[name]) for u in updates]
    assert ("optimizer/predicted_kl" in expected) == (optimizer == "rank1")
    assert set(found) == set(expected)
    for tag, pairs in expected.items():
        assert found[tag] == approx(pairs), tag


def test_the_rate_of_a_resumed_run_is_of_its_own_steps(tmp_path):
    one = agent(Corridor)
    one.train(160)
    one.save(tmp_path / "a.pt")
    updates = []
    with TensorBoardLog(str(tmp_path / "log")) as log:
        again = ActorCritic.load(tmp_path / "a.pt", Corridor)
        again.train(16, report=lambda update: [updates.append(update), log(update)])
    [(step, rate)] = scalars(tmp_path / "log")["time/steps_per_second"]
    assert step == 176 and rate == pytest.approx(16 / updates[0].seconds, rel=1e-6)


def test_tensorboard_is_asked_for_by_name(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"grng-kernels\[tensorboard\]"):
        TensorBoardLog(str(tmp_path))


def test_the_progress_bar_shows_steps_and_returns(capsys):
    one = agent(Corridor)
    one.train(32)
    one.train(160, progress=True)
    shown = capsys.readouterr().out
    assert "given" in shown and "step 192/192" in shown and "return " in shown


def test_no_bar_unless_asked_for(capsys):
    agent(Corridor).train(16)
    assert capsys.readouterr().out == ""


def test_rich_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    one = agent(Corridor)
    with pytest.raises(ImportError, match=r"progress=True needs rich.*grng-kernels\[rl\]"):
        one.train(16, progress=True)
