# SPDX-License-Identifier: Apache-2.0
"""An environment is saved in the middle of an episode and goes on bitwise the same."""

import json

import gymnasium
import numpy as np
import pytest
import torch

from grng.rl import ActorCritic, RLError
from grng.rl.environments import maker
from grng.rl.replay import Replayable
from tests.rl.environments import Corridor, Counter, agent

NAMES = ("cartpole", "acrobot", "pendulum", "lunarlander", "hopper", "halfcheetah")


def go_on(env, actions):
    """What the environment gives for the actions, as bytes."""
    found = []
    for action in actions:
        observation, reward, terminated, truncated, _ = env.step(action)
        found.append((np.asarray(observation).tobytes(), float(reward), terminated, truncated))
        if terminated or truncated:
            found.append(np.asarray(env.reset()[0]).tobytes())
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("is_first", [True, False], ids=["seeded", "later"])
def test_goes_on_bitwise_the_same(name, is_first):
    make = maker(name)
    env = Replayable(make())
    env.action_space.seed(3)
    actions = [env.action_space.sample() for _ in range(40)]
    env.reset(seed=7)
    if not is_first:
        env.step(actions[0])
        env.reset()
    for action in actions[:6]:
        env.step(action)
    saved = env.snapshot()
    before = json.dumps(saved)
    expected = go_on(env, actions[6:])
    # Going on does not change what was saved.
    assert json.dumps(saved) == before
    again = Replayable(make())
    again.reset(seed=99)
    again.restore(json.loads(before))
    assert go_on(again, actions[6:]) == expected
    env.close()
    again.close()


def test_what_was_restored_can_be_saved_again():
    env, again = Replayable(maker("cartpole")()), Replayable(maker("cartpole")())
    env.reset(seed=1)
    env.reset()
    for action in (0, 1, 1):
        env.step(np.int64(action))
    again.reset(seed=5)
    observation = again.restore(env.snapshot())
    assert again.snapshot() == env.snapshot()
    np.testing.assert_array_equal(observation, np.array(env.unwrapped.state, dtype=np.float32))


def test_the_snapshot_is_loaded_with_weights_only(tmp_path):
    env = Replayable(maker("hopper")())
    env.reset(seed=1)
    env.reset()
    env.step(env.action_space.sample())
    torch.save(env.snapshot(), tmp_path / "snapshot.pt")
    assert torch.load(tmp_path / "snapshot.pt", weights_only=True) == env.snapshot()
    env.close()


def test_a_generator_whose_state_is_an_array():
    env, again = Replayable(maker("cartpole")()), Replayable(maker("cartpole")())
    env.reset(seed=1)
    again.reset(seed=2)
    env.unwrapped.np_random = np.random.Generator(np.random.MT19937(5))
    env.reset()
    saved = json.dumps(env.snapshot())
    assert json.dumps(env.snapshot()) == saved
    again.restore(json.loads(saved))
    actions = [np.int64(1)] * 30
    assert go_on(again, actions) == go_on(env, actions)


@pytest.mark.parametrize("now", [2, 3])
def test_refuses_an_environment_whose_episode_ends_earlier_now(now):
    env = Replayable(Counter(5))
    env.reset(seed=0)
    for _ in range(3):
        env.step(np.int64(0))
    other = Replayable(Counter(now))
    with pytest.raises(RLError, match=f"at action {now} of 3"):
        other.restore(env.snapshot())


class ByName(Corridor):
    """Looks actions up in a dict, as many do: an array is not found there."""

    def step(self, action):
        return super().step({0: 0, 1: 1}[action])


def test_actions_are_repeated_in_the_kind_they_had(tmp_path):
    first = agent(ByName)
    first.train(16)
    first.save(tmp_path / "a.pt")
    assert ActorCritic.load(tmp_path / "a.pt", ByName).steps == 16


class Unseeded(gymnasium.Env):
    """Draws from a generator of its own, which no seed reaches."""

    def __init__(self) -> None:
        self.observation_space = gymnasium.spaces.Box(0, 1, (1,), np.float64)
        self.action_space = gymnasium.spaces.Discrete(2)
        self._draw = np.random.default_rng()

    def reset(self, *, seed=None, options=None):
        return self._draw.random(1), {}

    def step(self, action):
        return self._draw.random(1), 0.0, False, False, {}


def test_an_environment_that_is_not_deterministic_is_refused_on_loading(tmp_path):
    one = agent(Unseeded)
    one.train(16)
    one.save(tmp_path / "a.pt")
    with pytest.raises(
        RLError, match=r"environment 0 came to another observation.*not deterministic"
    ):
        ActorCritic.load(tmp_path / "a.pt", Unseeded)
