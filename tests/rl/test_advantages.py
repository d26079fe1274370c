# SPDX-License-Identifier: Apache-2.0
"""Generalised advantages against their definition, and against Stable-Baselines3 as it is installed."""

import gymnasium
import numpy as np
import pytest
import torch
from stable_baselines3.common.buffers import RolloutBuffer

from grng.rl.advantages import generalized_advantages

STEPS, ENVIRONMENTS = 11, 3


def numbers(seed=0, share_of_ends=0.3):
    """Rewards, values before and after, terminated, ended; some episodes are cut by a time limit."""
    draw = np.random.default_rng(seed)
    rewards, values, following = draw.normal(size=(3, STEPS, ENVIRONMENTS))
    ended = draw.random((STEPS, ENVIRONMENTS)) < share_of_ends
    terminated = ended & (draw.random((STEPS, ENVIRONMENTS)) < 0.5)
    assert (ended & ~terminated).any() and terminated.any()
    return rewards, values, following, terminated, ended


def by_definition(rewards, values, following, terminated, ended, gamma, gae_lambda):
    """The sum over what comes later in the same episode, Σ_k (γλ)^k δ_{t+k}, by two loops."""
    found = np.zeros_like(rewards)
    for i in range(ENVIRONMENTS):
        for t in range(STEPS):
            for k in range(STEPS - t):
                after = 0.0 if terminated[t + k, i] else following[t + k, i]
                error = rewards[t + k, i] + gamma * after - values[t + k, i]
                found[t, i] += (gamma * gae_lambda) ** k * error
                if ended[t + k, i]:
                    break
    return found


@pytest.mark.parametrize("gamma, gae_lambda", [(0.99, 0.95), (0.5, 0.5), (1, 1), (0, 1), (1, 0)])
def test_against_the_definition(gamma, gae_lambda):
    given = numbers()
    found = generalized_advantages(*given, gamma=gamma, gae_lambda=gae_lambda)
    expected = by_definition(*given, gamma, gae_lambda)
    # Sums of eleven numbers of order one in fp64.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)


def test_what_comes_after_counts_where_a_time_limit_cut_and_not_where_it_terminated():
    rewards, values, following = np.ones((1, 2)), np.full((1, 2), 5.0), np.full((1, 2), 7.0)
    terminated, ended = np.array([[True, False]]), np.array([[True, True]])
    found = generalized_advantages(
        rewards, values, following, terminated, ended, gamma=0.5, gae_lambda=0.9
    )
    np.testing.assert_array_equal(found, [[1 - 5, 1 + 3.5 - 5]])


def test_lambda_0_is_the_error_of_one_step():
    rewards, values, following, terminated, ended = numbers(1)
    found = generalized_advantages(
        rewards, values, following, terminated, ended, gamma=0.9, gae_lambda=0.0
    )
    np.testing.assert_array_equal(found, rewards + 0.9 * following * ~terminated - values)


def test_gamma_0_is_the_reward_alone():
    rewards, values, *others = numbers(2)
    found = generalized_advantages(rewards, values, *others, gamma=0.0, gae_lambda=0.9)
    np.testing.assert_array_equal(found, rewards - values)


def test_lambda_1_is_the_discounted_return_of_whole_episodes():
    rewards, values = np.array([[1.0], [2.0], [4.0]]), np.array([[9.0], [8.0], [7.0]])
    last = np.array([[False], [False], [True]])
    following = np.array([[8.0], [7.0], [1e6]])
    found = generalized_advantages(
        rewards, values, following, last, last, gamma=0.5, gae_lambda=1.0
    )
    np.testing.assert_allclose(found + values, [[3.0], [4.0], [4.0]], rtol=1e-15)


def test_nothing_given_is_changed():
    given = numbers()
    copies = [one.copy() for one in given]
    generalized_advantages(*given, gamma=0.9, gae_lambda=0.9)
    for one, copy in zip(given, copies, strict=True):
        np.testing.assert_array_equal(one, copy)


def test_the_same_as_stable_baselines3():
    rewards, values, _, _, ended = numbers(3)
    last_values = np.random.default_rng(4).normal(size=ENVIRONMENTS)
    # That buffer knows of no time limits, and takes the value of the next state from the next step.
    following = np.concatenate([values[1:], last_values[None]])
    buffer = RolloutBuffer(
        STEPS,
        gymnasium.spaces.Box(-1, 1, (1,)),
        gymnasium.spaces.Discrete(2),
        device="cpu",
        gae_lambda=0.9,
        gamma=0.97,
        n_envs=ENVIRONMENTS,
    )
    starts = np.concatenate([np.zeros((1, ENVIRONMENTS), bool), ended[:-1]])
    nothing, log_probs = np.zeros((ENVIRONMENTS, 1)), torch.zeros(ENVIRONMENTS)
    for t in range(STEPS):
        value = torch.from_numpy(values[t])
        buffer.add(nothing, nothing, rewards[t], starts[t], value, log_probs)
    buffer.compute_returns_and_advantage(torch.from_numpy(last_values), ended[-1])
    found = generalized_advantages(
        rewards, values, following, ended, ended, gamma=0.97, gae_lambda=0.9
    )
    # The buffer holds fp32.
    np.testing.assert_allclose(buffer.advantages, found, rtol=0, atol=5e-6)
