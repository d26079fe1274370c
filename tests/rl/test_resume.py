# SPDX-License-Identifier: Apache-2.0
"""A loaded run goes on bitwise as the one that was never interrupted."""

from dataclasses import asdict

import pytest
import torch

from grng.rl import ActorCritic
from tests.rl.environments import Bandit, Corridor, Target, agent, numbers, state

OPTIMIZERS = {
    "rank1": {"momentum": 0.9, "scores": 2},
    "adamw": {"weight_decay": 0.1},
    "rmsprop": {"momentum": 0.5},
}


def updates(one, count):
    """What updates told, without times and sizes in memory."""
    found = [asdict(one.update()) for _ in range(count)]
    for update in found:
        del update["seconds"]
    return found


@pytest.mark.parametrize("environment", ["cartpole", "pendulum"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_goes_on_exactly(optimizer, environment, tmp_path):
    one = agent(
        environment,
        optimizer=optimizer,
        optimizer_options=OPTIMIZERS[optimizer],
        normalize_observations=True,
        entropy=0.01,
        # In the middle of a rollout episodes end.
        rollout=25,
        seed=5,
    )
    updates(one, 3)
    one.save(tmp_path / "a.pt")
    saved = state(one)
    expected = updates(one, 5)
    assert any(update["episodes"] for update in expected) or environment == "pendulum"
    again = ActorCritic.load(tmp_path / "a.pt")
    assert state(again) == saved
    # Not by the global generator.
    torch.manual_seed(777)
    assert updates(again, 5) == expected
    assert state(again) == state(one)
    assert again.evaluate(2) == one.evaluate(2)


def test_goes_on_exactly_where_a_function_makes_the_environment(tmp_path):
    one = agent(Corridor, seed=3)
    updates(one, 2)
    one.save(tmp_path / "a.pt")
    again = ActorCritic.load(tmp_path / "a.pt", Corridor)
    assert updates(again, 4) == updates(one, 4)
    assert state(again) == state(one)


def test_the_same_seed_is_the_same_run_and_another_is_another():
    runs = []
    for seed in (0, 0, 1):
        one = agent("cartpole", seed=seed)
        runs.append((updates(one, 3), state(one)))
        torch.manual_seed(seed + 50)
    assert runs[0] == runs[1]
    assert runs[0][1]["policy"] != runs[2][1]["policy"]
    assert runs[0][0] != runs[2][0]


def test_settings_and_environment_come_from_the_file(tmp_path):
    settings = dict(
        gamma=0.9, hidden=(3, 4), critic_lr=0.1, optimizer_options={"max_kl": 0.02}, seed=9
    )
    one = agent("cartpole-1000", normalize_observations=True, **settings)
    one.save(tmp_path / "a.pt")
    again = ActorCritic.load(tmp_path / "a.pt")
    assert again.config == one.config and again.name == "cartpole-1000"
    assert again.optimizer.param_groups[0]["max_kl"] == 0.02


@pytest.mark.parametrize("environment", [Bandit, Target, "pendulum"])
def test_evaluating_does_not_touch_training(environment):
    runs = []
    for evaluates in (True, False):
        one = agent(environment)
        for _ in range(3):
            one.train(16)
            if evaluates:
                one.evaluate(2)
        runs.append(state(one))
    assert runs[0] == runs[1]


def test_evaluation_is_of_the_likeliest_actions_from_the_given_seeds():
    one = agent(Bandit)
    one.train(16)
    found = one.evaluate(6, seed=40)
    expected = []
    for i in range(6):
        env = Bandit()
        seen, _ = env.reset(seed=40 + i)
        with torch.no_grad():
            expected.append(env.step(int(one.policy.net(torch.from_numpy(seen)).argmax()))[1])
    assert found == expected
    assert one.evaluate(3, seed=43) == expected[3:]


def test_training_with_checkpoints_is_training_without(tmp_path):
    one, other = agent("cartpole"), agent("cartpole")
    one.train(48, checkpoint=tmp_path / "a.pt", checkpoint_every=16)
    other.train(48)
    assert state(one) == state(other)
    assert numbers(ActorCritic.load(tmp_path / "a.pt").policy.state_dict()) == state(one)["policy"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("place", ["step", "zero_grad"])
def test_training_goes_on_after_ctrl_c_in_an_update(optimizer, place, monkeypatch):
    one = agent(Bandit, optimizer=optimizer)
    one.train(16)

    def interrupt():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(one.optimizer, place, interrupt)
        with pytest.raises(KeyboardInterrupt):
            one.train(16)
    assert one.steps == 16
    one.train(16)
    assert one.steps == 32
