# SPDX-License-Identifier: Apache-2.0
"""What reaches the optimizers is the gradient that the docstring says, computed here by hand in fp64."""

import copy

import numpy as np
import pytest
import torch

from grng import RankOneNPG
from tests.rl.environments import Corridor, Target, agent

GAMMA, LAMBDA, ENTROPY = 0.9, 0.8, 0.3


def spied(environment, **settings):
    """An agent, its networks before the update, the rollout, and the gradients that a step found."""
    one = agent(
        environment, gamma=GAMMA, gae_lambda=LAMBDA, entropy=ENTROPY, rollout=24, **settings
    )
    seen = {"policy": copy.deepcopy(one.policy), "value": copy.deepcopy(one.value)}
    collect, step = one._collector.collect, one.optimizer.step

    def keep_rollout(*arguments):
        seen["rollout"] = collect(*arguments)
        return seen["rollout"]

    def keep_gradients():
        seen["gradients"] = [p.grad.clone() for p in one.policy.parameters()]
        return step()

    one._collector.collect, one.optimizer.step = keep_rollout, keep_gradients
    return one, seen


def advantages(rollout, value):
    """By the definition, for each step of each environment."""
    steps, environments = rollout.rewards.shape

    def of(observations):
        x = torch.from_numpy(observations).double()
        return value(x).squeeze(-1).detach().numpy()

    values, following = of(rollout.observations), of(rollout.next_observations)
    following = np.where(rollout.terminated, 0, following)
    errors = rollout.rewards + GAMMA * following - values
    found = np.zeros((steps, environments))
    for i in range(environments):
        for t in range(steps):
            for k in range(t, steps):
                found[t, i] += (GAMMA * LAMBDA) ** (k - t) * errors[k, i]
                if rollout.ended[k, i]:
                    break
    return found, values


def objective(policy, rollout, weights):
    x, actions = torch.from_numpy(rollout.observations).double(), rollout.actions
    out = policy.net(x)
    if policy.is_discrete:
        each = out - out.logsumexp(-1, keepdim=True)
        log_probs = each.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
        entropy = -(each.exp() * each).sum(-1)
    else:
        z = (actions.double() - out) / policy.log_std.exp()
        log_probs = (-z.square() / 2 - policy.log_std).sum(-1)  # and a constant
        entropy = policy.log_std.sum().expand_as(log_probs)  # and a constant
    return (torch.from_numpy(weights) * log_probs).mean() + ENTROPY * entropy.mean()


@pytest.mark.parametrize("environment", [Corridor, Target])
@pytest.mark.parametrize("optimizer", ["rank1", "adamw", "rmsprop"])
def test_the_gradient_of_the_policy(environment, optimizer):
    one, seen = spied(environment, optimizer=optimizer)
    one.update()
    rollout = seen["rollout"]
    assert rollout.ended.any() and (rollout.rewards != 0).any()
    found, _ = advantages(rollout, seen["value"].double())
    weights = (found - found.mean()) / found.std()
    policy = seen["policy"].double()
    (-objective(policy, rollout, weights)).backward()
    largest = max(p.grad.abs().max() for p in policy.parameters())
    for p, gradient in zip(policy.parameters(), seen["gradients"], strict=True):
        assert gradient.abs().max() > 0
        # fp32 sums of 48 terms, against the largest number.
        torch.testing.assert_close(gradient.double(), p.grad, rtol=0, atol=float(2e-6 * largest))


def test_the_scores_are_of_the_actions_taken():
    one, seen = spied(Corridor)
    assert isinstance(one.optimizer, RankOneNPG)
    observe = one.optimizer.observe

    def keep(log_probs):
        seen["log_probs"] = log_probs.detach().clone()
        observe(log_probs)

    one.optimizer.observe = keep
    one.update()
    rollout = seen["rollout"]
    out = seen["policy"].net(torch.from_numpy(rollout.observations)).log_softmax(-1)
    expected = out.gather(-1, rollout.actions.unsqueeze(-1)).flatten()
    torch.testing.assert_close(seen["log_probs"], expected.detach())


def test_the_value_learns_the_returns():
    one, seen = spied(Corridor, critic_batch=10**6)
    update = one.update()
    found, values = advantages(seen["rollout"], seen["value"].double())
    # One batch: the loss is that before its step, and the returns are advantage + value.
    assert update.value_loss == pytest.approx(np.mean(found**2), rel=1e-5)
    explained = 1 - np.var(found) / np.var(found + values)
    assert update.explained_variance == pytest.approx(explained, abs=1e-4)
