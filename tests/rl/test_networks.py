# SPDX-License-Identifier: Apache-2.0
"""The policy: log-probabilities by their formulas, draws that follow them, its start."""

import math

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

from grng.rl.networks import Policy, mlp

OBSERVATIONS = Box(-np.inf, np.inf, (3,), np.float32)


def policy(actions, seed=0):
    """A policy that is far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    made = Policy(OBSERVATIONS, actions, (5,), generator)
    with torch.no_grad():
        made.net[-1].weight.normal_(generator=generator)
        made.net[-1].bias.normal_(generator=generator)
        if not made.is_discrete:
            made.log_std.copy_(torch.tensor([-0.7, 0.4]))
    return made


def test_discrete_log_probabilities_and_entropy():
    made = policy(Discrete(4, start=3))
    x = torch.randn(6, 3)
    actions = torch.tensor([0, 1, 2, 3, 0, 1])
    logits = made.net(x).detach().double()
    log_probs = logits - logits.exp().sum(-1, keepdim=True).log()
    distribution = made(x)
    found = distribution.log_prob(actions)
    torch.testing.assert_close(
        found.double(), log_probs[torch.arange(6), actions], rtol=0, atol=1e-6
    )
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    torch.testing.assert_close(distribution.entropy().double(), entropy, rtol=0, atol=1e-6)


def test_continuous_log_densities_and_entropy():
    made = policy(Box(-1, 1, (2,)))
    x, actions = torch.randn(6, 3), torch.randn(6, 2)
    mean, deviation = made.net(x).detach().double(), made.log_std.detach().double().exp()
    z = (actions.double() - mean) / deviation
    expected = (-z.square() / 2 - deviation.log() - math.log(2 * math.pi) / 2).sum(-1)
    found = made(x).log_prob(actions)
    assert found.shape == (6,)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)
    entropy = (deviation.log() + math.log(2 * math.pi * math.e) / 2).sum().expand(6)
    torch.testing.assert_close(made(x).entropy().double(), entropy, rtol=0, atol=1e-6)


def test_discrete_draws_follow_the_distribution():
    made, count = policy(Discrete(4, start=3)), 20_000
    x = torch.tensor([[0.3, -1.0, 0.5]]).expand(count, 3)
    drawn = made.draw(x, torch.Generator().manual_seed(1))
    expected = made(x[:1]).probs[0].detach().double() * count
    seen = torch.bincount(drawn, minlength=4).double()
    chi_square = ((seen - expected).square() / expected).sum()
    # Of 3 degrees of freedom: 16.3 is passed once in a thousand.
    assert chi_square < 16.3
    assert expected.max() > 1.2 * count / 4, "a uniform draw would pass as well"


def test_continuous_draws_follow_the_distribution():
    made, count = policy(Box(-1, 1, (2,))), 20_000
    x = torch.tensor([[0.3, -1.0, 0.5]])
    drawn = made.draw(x.expand(count, 3), torch.Generator().manual_seed(1)).double()
    mean, deviation = made.net(x)[0].detach().double(), made.log_std.detach().double().exp()
    z = (drawn - mean) / deviation
    # Four standard errors of a mean, a variance, a covariance and a fourth moment.
    assert z.mean(0).abs().max() < 4 / math.sqrt(count)
    assert (z.var(0) - 1).abs().max() < 4 * math.sqrt(2 / count)
    assert (z[:, 0] * z[:, 1]).mean().abs() < 4 / math.sqrt(count)
    assert ((z**4).mean(0) - 3).abs().max() < 4 * math.sqrt(96 / count)


@pytest.mark.parametrize("actions", [Discrete(4), Box(-1, 1, (2,))], ids=["discrete", "box"])
def test_draws_are_of_the_generator_alone(actions):
    made, x = policy(actions), torch.randn(5, 3)
    first = made.draw(x, torch.Generator().manual_seed(3))
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert torch.equal(made.draw(x, torch.Generator().manual_seed(3)), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not first.requires_grad


def test_the_best_is_the_likeliest():
    x = torch.randn(7, 3)
    made = policy(Discrete(4, start=3))
    each = torch.stack([made(x).log_prob(torch.full((7,), a)) for a in range(4)], -1)
    assert torch.equal(made.best(x), each.argmax(-1))
    made = policy(Box(-1, 1, (2,)))
    best = made.best(x)
    for other in (best + 0.01, best - 0.01, best + torch.tensor([0.0, 0.01])):
        assert (made(x).log_prob(best) > made(x).log_prob(other)).all()


def test_starts_near_uniform_with_orthogonal_weights():
    generator = torch.Generator().manual_seed(0)
    made = Policy(OBSERVATIONS, Discrete(4), (5, 6), generator)
    assert (made(torch.randn(9, 3)).probs - 0.25).abs().max() < 0.02
    first = made.net[0].weight.detach()
    torch.testing.assert_close(first.T @ first, 2 * torch.eye(3))
    assert all((layer.bias == 0).all() for layer in made.net if hasattr(layer, "bias"))
    assert [layer.out_features for layer in made.net if hasattr(layer, "bias")] == [5, 6, 4]


def test_the_generator_decides_the_weights_and_nothing_else_is_drawn():
    def weights(seed):
        return [*mlp(3, (4,), 2, 1.0, torch.Generator().manual_seed(seed)).parameters()]

    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = weights(0)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one, weights(0), strict=True))
    assert not torch.equal(one[0], weights(1)[0])
