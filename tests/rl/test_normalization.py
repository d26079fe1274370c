# SPDX-License-Identifier: Apache-2.0
"""Running moments against those of all numbers at once."""

import json

import numpy as np
import pytest

from grng.rl.normalization import ObservationScale, RewardScale
from tests.rl.environments import Counter, agent


def moments(values):
    """Mean and variance of all rows, with the start that both scales have: 0 and 1 with weight 1e-4."""
    count = len(values) + 1e-4
    mean = values.sum(0) / count
    variance = ((values - mean) ** 2).sum(0) / count + 1e-4 * (1 + mean**2) / count
    return mean, variance


def test_observations_against_plain_moments():
    draw = np.random.default_rng(0)
    batches = [draw.normal(3, [1, 50, 0.01], (5, 2, 3)), draw.normal(-1, [2, 1, 4], (7, 2, 3))]
    scale = ObservationScale(3, is_active=True)
    for batch in batches:
        scale.learn(batch)
    mean, variance = moments(np.concatenate([b.reshape(-1, 3) for b in batches]))
    probe = draw.normal(0, 5, (4, 6, 3))
    expected = (probe - mean) / np.sqrt(variance + 1e-8)
    found = scale(probe)
    assert found.dtype == np.float32 and found.shape == probe.shape
    np.testing.assert_allclose(found, np.clip(expected, -10, 10), rtol=1e-5, atol=1e-6)


def test_observations_far_away_are_cut_off():
    scale = ObservationScale(1, is_active=True)
    scale.learn(np.random.default_rng(0).normal(size=(100, 1)))
    np.testing.assert_array_equal(scale(np.array([[1e9], [-1e9]])), [[10], [-10]])


def by_hand(rewards, ended, gamma):
    """The discounted returns of two environments, one row for each step."""
    returns, running = [], [0.0, 0.0]
    for reward, end in zip(rewards, ended, strict=True):
        running = [gamma * a + b for a, b in zip(running, reward, strict=True)]
        returns.append(list(running))
        running = [0.0 if is_end else a for a, is_end in zip(running, end, strict=True)]
    return np.array(returns)


def test_rewards_are_in_units_of_the_deviation_of_the_discounted_return():
    draw = np.random.default_rng(1)
    rewards, ended = draw.normal(2, 5, (50, 2)), draw.random((50, 2)) < 0.1
    scale = RewardScale(2, 0.9, is_active=True)
    for reward, end in zip(rewards, ended, strict=True):
        scale.learn(reward, end)
    _, variance = moments(by_hand(rewards, ended, 0.9).reshape(-1))
    probe = np.array([[-3.0, 0.0], [5.0, 1e6]])
    np.testing.assert_allclose(scale(probe), probe / np.sqrt(variance + 1e-8), rtol=1e-12)


@pytest.mark.parametrize("is_active", [True, False])
def test_the_state_goes_through_json_and_back(is_active):
    draw = np.random.default_rng(2)
    makers = (
        lambda: ObservationScale(3, is_active=is_active),
        lambda: RewardScale(3, 0.9, is_active=is_active),
    )
    for make in makers:
        one, again = make(), make()

        def learn(scale, values):
            if isinstance(scale, ObservationScale):
                scale.learn(values)
            else:
                scale.learn(values, np.array([True, False, False]))

        for _ in range(3):
            learn(one, draw.normal(1, 2, 3))
        again.load_state_dict(json.loads(json.dumps(one.state_dict())))
        # What is learned later is bitwise the same too.
        for values in draw.normal(1, 2, (4, 3)):
            learn(one, values)
            learn(again, values)
            assert one(values).tobytes() == again(values).tobytes()
        assert one.state_dict() == again.state_dict()


def test_inactive_scales_leave_everything_as_it_is():
    draw = np.random.default_rng(3)
    values, ended = draw.normal(5, 9, (4, 3)), np.zeros(3, bool)
    observations, rewards = (
        ObservationScale(3, is_active=False),
        RewardScale(3, 0.9, is_active=False),
    )
    observations.learn(values)
    rewards.learn(values[0], ended)
    np.testing.assert_array_equal(observations(values), values.astype(np.float32))
    np.testing.assert_array_equal(rewards(values), values)


def test_a_rollout_is_all_in_one_scale_and_only_then_learned():
    one = agent("pendulum", normalize_observations=True)
    collector = one._collector
    for _ in range(2):
        before = collector.observation_scale.state_dict()
        first = collector._observations.copy()
        found = collector.collect(one.policy, 8, one._generator)
        np.testing.assert_array_equal(found.observations[1:], found.next_observations[:-1])
        then = collector.observation_scale.state_dict()
        assert then["count"] == before["count"] + 16
        deviation = np.sqrt(np.array(before["variance"]) + 1e-8)
        expected = np.clip((first - before["mean"]) / deviation, -10, 10).astype(np.float32)
        np.testing.assert_array_equal(found.observations[0], expected)


def test_the_discounted_return_begins_anew_where_a_time_limit_cut():
    one = agent(lambda: Counter(3, is_cut=True), gamma=0.5)
    one._collector.collect(one.policy, 9, one._generator)
    rewards = np.repeat(1 + (np.arange(9) % 3 + 1)[:, None] / 10, 2, axis=1)
    ended = np.repeat((np.arange(9) % 3 == 2)[:, None], 2, axis=1)
    mean, variance = moments(by_hand(rewards, ended, 0.5).reshape(-1))
    found = one._collector._reward_scale.state_dict()
    assert found["mean"] == pytest.approx(mean) and found["variance"] == pytest.approx(variance)
