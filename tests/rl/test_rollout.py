# SPDX-License-Identifier: Apache-2.0
"""What a rollout holds, above all at the ends of episodes; what is refused."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete

from grng.rl import ActorCritic, RLError
from tests.rl.environments import Bandit, Counter, Failing, Target, agent, state


def rollout(one, steps=8):
    return one._collector.collect(one.policy, steps, one._generator)


def plain(environment, **settings):
    return agent(environment, normalize_rewards=False, **settings)


@pytest.mark.parametrize("is_cut", [False, True], ids=["terminated", "cut"])
def test_the_ends_of_episodes(is_cut):
    found = rollout(plain(lambda: Counter(3, is_cut=is_cut)))
    steps = np.arange(8)
    # (episode, step) before and after; after an end that of the episode that ended.
    before = np.stack([steps // 3, steps % 3], 1)
    after = np.stack([steps // 3, steps % 3 + 1], 1)
    ended = steps % 3 == 2
    for i in range(2):
        np.testing.assert_array_equal(found.observations[:, i], before)
        np.testing.assert_array_equal(found.next_observations[:, i], after)
        np.testing.assert_array_equal(found.ended[:, i], ended)
        np.testing.assert_array_equal(found.terminated[:, i], ended & (not is_cut))
        np.testing.assert_allclose(found.rewards[:, i], 1 + (steps % 3 + 1) / 10)
    assert found.observations.dtype == found.next_observations.dtype == np.float32


def test_returns_and_lengths_of_episodes_that_go_over_several_rollouts():
    one = plain(lambda: Counter(5))
    found = [rollout(one, 4).episodes for _ in range(3)]
    total = pytest.approx(5 + 1.5)
    assert found == [[], [(0, total, 5)] * 2, [(1, total, 5)] * 2]


def test_steps_of_episodes_count_all_environments():
    one = plain(lambda: Counter(5))
    updates = [one.update() for _ in range(2)]
    assert [step for step, _, _ in updates[0].episodes] == [10, 10]
    assert [step for step, _, _ in updates[1].episodes] == [20, 20, 30, 30]
    assert [update.steps for update in updates] == [16, 32]


def test_a_rollout_stays_as_it_was_when_the_next_is_made():
    one = plain(lambda: Counter(3))
    first = rollout(one)
    names = ("observations", "next_observations", "rewards", "terminated", "ended")
    before = {name: getattr(first, name).copy() for name in names}
    actions = first.actions.clone()
    rollout(one)
    for name in names:
        np.testing.assert_array_equal(getattr(first, name), before[name])
    assert torch.equal(first.actions, actions)


# ---- spaces ----


def taken(one):
    return [action for env in one._collector._environments.envs for action in env.unwrapped.taken]


def test_discrete_actions_that_do_not_begin_at_0():
    one = plain(lambda: Counter(3, actions=Discrete(3, start=-1)))
    found = rollout(one, 40)
    assert set(found.actions.flatten().tolist()) == {0, 1, 2}
    assert {int(action) for action in taken(one)} == {-1, 0, 1}
    first = one._collector._environments.envs[0].unwrapped.taken
    assert [int(action) for action in first] == (found.actions[:, 0] - 1).tolist()


def test_boxes_of_any_bounds_are_reached_and_not_left():
    bounds = Box(np.array([-1.0, 2.0], np.float32), np.array([3.0, 2.5], np.float32))
    one = plain(lambda: Counter(3, actions=bounds))
    found = rollout(one, 60)
    given = np.stack(taken(one))
    assert given.dtype == np.float32 and all(bounds.contains(action) for action in given)
    assert (given == bounds.low).any(0).all() and (given == bounds.high).any(0).all()
    # What is learned from is the action that was drawn, also beyond the bounds.
    assert (found.actions.abs() > 1).any()
    inside = (found.actions[:, 0].abs() < 1).all(-1).numpy()
    half = (bounds.high - bounds.low) / 2
    middle = (bounds.high + bounds.low) / 2
    np.testing.assert_allclose(
        given[:60][inside], (middle + half * found.actions[:, 0].numpy())[inside], rtol=1e-6
    )


def test_rounding_does_not_leave_the_bounds():
    draw = np.random.default_rng(0)
    # Of very different size: there low + (high - low) is not high in one of nine.
    low, high = np.sort(draw.normal(size=(2, 200)) * np.exp(3 * draw.normal(size=(2, 200))), axis=0)
    bounds = Box(low.astype(np.float32), high.astype(np.float32))
    policy = plain(lambda: Counter(3, actions=bounds)).policy
    for value in (-2.0, -1.0, 1.0, 2.0):
        assert bounds.contains(policy.to_environment(torch.full((200,), value)))


def spaces(observations=None, actions=None):
    class Other(Counter):
        def __init__(self):
            super().__init__(3)
            self.observation_space = observations or self.observation_space
            self.action_space = actions or self.action_space

        def _observation(self):
            return self.observation_space.sample()

    return Other


@pytest.mark.parametrize(
    "environment, message",
    [
        (spaces(observations=Discrete(3)), r"observation space must be a Box, got Discrete\(3\)"),
        (spaces(observations=Dict(a=Discrete(3))), "observation space must be a Box, got Dict"),
        (spaces(actions=MultiDiscrete([2, 2])), "action space must be Discrete or a Box of one"),
        (
            spaces(actions=Box(0, 1, (2, 2))),
            "action space must be Discrete or a Box of one dimension",
        ),
        (spaces(actions=Box(0, np.inf, (2,))), "action space must have finite bounds, got Box"),
        (spaces(actions=Box(0, 9, (2,), np.int64)), "action space must be .* of floating-point"),
    ],
)
def test_spaces_that_are_not_supported(environment, message):
    with pytest.raises(RLError, match=message):
        agent(environment)


def test_an_observation_of_any_shape_is_flattened():
    class Square(Counter):
        def __init__(self):
            super().__init__(3)
            self.observation_space = Box(-1, 1, (2, 3), np.float64)

        def _observation(self):
            return np.arange(6.0).reshape(2, 3) + self._step

    one = plain(Square)
    found = rollout(one, 4)
    np.testing.assert_array_equal(found.observations[1, 0], np.arange(6) + 1)
    assert one.act(np.zeros((5, 2, 3))).shape == (5,)


# ---- what is not finite ----


def first_fails(at, what, bad=np.nan):
    """Of two environments, the second gives something wrong at its step ``at``."""
    made = []

    def make():
        made.append(None)
        return Failing(at if len(made) == 2 else 10**9, what, bad)

    return make


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("what", ["reward", "observation"])
@pytest.mark.parametrize("at", [11, 12], ids=["middle", "end"])
def test_the_environment_and_the_step_are_named_and_nothing_is_learned(what, at, bad):
    one = plain(first_fails(at, what, bad))
    one.train(16)
    before = state(one)
    with pytest.raises(RLError, match=rf"{what} of environment 1 .*{bad}.* step {at - 9} of"):
        one.train(16)
    after = state(one)
    for name in ("policy", "value", "optimizer", "value_optimizer", "steps"):
        assert after[name] == before[name]


def test_a_start_that_is_not_finite():
    with pytest.raises(
        RLError, match=r"observation of environment 1 must be finite.* at the start"
    ):
        agent(first_fails(0, "reset"))
    one = agent(first_fails(4, "reset"))
    with pytest.raises(RLError, match=r"observation of environment 1 must be finite.*step 3 of"):
        one.train(16)


@pytest.mark.parametrize("what", ["reward", "interrupt"])
def test_after_a_rollout_that_failed_new_episodes_begin(what):
    one = plain(first_fails(3, what))
    with pytest.raises((RLError, KeyboardInterrupt)):
        one.train(16)
    found = rollout(one)
    # Episodes 0 were given up, and count for nothing.
    assert found.observations[0].tolist() == [[1, 0], [1, 0]]
    assert found.episodes[0] == (3, pytest.approx(5.0), 4)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_checkpoint_after_a_rollout_that_was_interrupted(tmp_path, normalize):
    one = agent("cartpole", normalize_observations=normalize)
    one.train(16)
    envs = one._collector._environments.envs
    original = envs[1].step

    def interrupt(action):
        raise KeyboardInterrupt

    envs[1].step = interrupt
    with pytest.raises(KeyboardInterrupt):
        one.train(16)
    envs[1].step = original
    one.save(tmp_path / "a.pt")
    again = ActorCritic.load(tmp_path / "a.pt")
    for each in (one, again):
        each.train(32)
    assert state(one) == state(again)


def test_a_policy_that_is_not_finite_is_no_fault_of_the_environment():
    for environment in (Bandit, Target):
        one = agent(environment)
        with torch.no_grad():
            next(one.policy.parameters()).fill_(torch.nan)
        with pytest.raises(RLError, match=r"policy.*must be finite.*diverged"):
            one.train(16)
        with pytest.raises(RLError, match=r"policy.*must be finite.*diverged"):
            one.evaluate(1)


def test_one_environment_for_all_is_refused():
    shared = gymnasium.make("CartPole-v1")
    with pytest.raises(RLError, match="environment must be made anew"):
        agent(lambda: shared)
