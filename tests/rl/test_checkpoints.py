# SPDX-License-Identifier: Apache-2.0
"""Checkpoints are whole; a file that is none, or of another environment, is refused by name."""

import pickle

import numpy as np
import pytest
import torch

from grng.rl import ActorCritic, RLError
from tests.rl.environments import Bandit, Corridor, agent


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "agent.pt"
    one = agent(Bandit)
    one.train(16)
    one.save(path)
    return path


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no checkpoint at all\n",
        b"\x80\x02",
        b"PK\x03\x04 and so on",
        pickle.dumps({"a": print}),
    ],
    ids=["empty", "text", "pickle", "zip", "function"],
)
def test_a_file_that_is_no_checkpoint(content, tmp_path):
    path = tmp_path / "other.pt"
    path.write_bytes(content)
    with pytest.raises(RLError, match=r"other\.pt: no checkpoint that can be read"):
        ActorCritic.load(path)


def test_random_bytes(tmp_path):
    path, draw = tmp_path / "other.pt", np.random.default_rng(0)
    for _ in range(200):
        path.write_bytes(b"\x80\x02" + draw.integers(0, 256, 40).astype(np.uint8).tobytes())
        with pytest.raises(RLError, match=r"other\.pt: "):
            ActorCritic.load(path)


def test_no_file_and_a_folder(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(RLError, match=f"{path.name}: no checkpoint that can be read"):
            ActorCritic.load(path)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.99])
def test_a_truncated_file(part, checkpoint):
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(RLError, match=r"agent\.pt: no checkpoint that can be read"):
        ActorCritic.load(checkpoint, Bandit)


@pytest.mark.parametrize("content", [{"format": "other"}, {}, [1, 2], torch.zeros(2)])
def test_a_file_of_torch_that_is_something_else(content, tmp_path):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(RLError, match=r"must be a checkpoint of format grng-actor-critic-1"):
        ActorCritic.load(tmp_path / "other.pt")


def test_one_made_by_a_function_needs_the_function(checkpoint):
    with pytest.raises(RLError, match="environment must be given: it was made by a function"):
        ActorCritic.load(checkpoint)
    assert ActorCritic.load(checkpoint, Bandit).steps == 16


@pytest.mark.parametrize("other", [lambda: Bandit(actions=4), lambda: Bandit(start=1)])
def test_another_action_space(other, checkpoint):
    with pytest.raises(RLError, match=r"Discrete\(3\).*, got .*Discrete\((4|3, start=1)\)"):
        ActorCritic.load(checkpoint, other)


def test_another_observation_space(checkpoint):
    with pytest.raises(RLError, match=r"\(4,\), float32.*, got .*\(5,\), float32"):
        ActorCritic.load(checkpoint, Corridor)


def test_a_save_that_fails_leaves_the_old_file(checkpoint, monkeypatch):
    one = ActorCritic.load(checkpoint, Bandit)
    one.train(16)

    def torn(state, path):
        path.write_bytes(b"half of it")
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", torn)
        with pytest.raises(OSError, match="no space left"):
            one.train(16, checkpoint=checkpoint, checkpoint_every=1)
    assert ActorCritic.load(checkpoint, Bandit).steps == 16
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_checkpoints_are_written_on_the_way_and_at_the_end(tmp_path):
    path, seen = tmp_path / "a.pt", []

    def report(update):
        steps = ActorCritic.load(path, Bandit).steps if path.exists() else None
        seen.append((update.steps, steps))

    one = agent(Bandit)
    one.train(80, report=report, checkpoint=path, checkpoint_every=32)
    assert seen == [(16, None), (32, None), (48, 32), (64, 32), (80, 64)]
    assert ActorCritic.load(path, Bandit).steps == one.steps == 80


def test_ctrl_c_leaves_the_last_checkpoint_and_nothing_else(tmp_path):
    def report(update):
        if update.steps == 48:
            raise KeyboardInterrupt

    path = tmp_path / "a.pt"
    with pytest.raises(KeyboardInterrupt):
        agent(Bandit).train(160, report=report, checkpoint=path, checkpoint_every=16)
    assert ActorCritic.load(path, Bandit).steps == 32
    assert [each.name for each in tmp_path.iterdir()] == ["a.pt"]


def test_a_run_that_goes_beyond_its_steps_ends_with_a_whole_rollout():
    one = agent(Bandit)
    one.train(17)
    assert one.steps == 32
    one.train(1)
    assert one.steps == 48


def test_a_folder_that_is_not_there_is_found_before_training(tmp_path):
    one, path = agent(Bandit), tmp_path / "none" / "a.pt"
    with pytest.raises(
        RLError, match=r"checkpoint must be a file in a folder that exists, got .*a\.pt"
    ):
        one.train(16, checkpoint=path)
    assert one.steps == 0
    with pytest.raises(RLError, match=r"path must be a file in a folder that exists"):
        one.save(path)
