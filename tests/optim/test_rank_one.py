# SPDX-License-Identifier: Apache-2.0
"""RankOneNPG: its direction against dense solves, its length against true divergences."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from grng import RankOneNPG
from grng.curvature import low_rank
from tests.optim.rank_one_policy import (
    ACTIONS,
    close,
    dense,
    drawn,
    flat,
    jacobian,
    observed,
    policy,
    take_step,
)
from tests.optim.training import same, values

# ---- direction ----


@pytest.mark.parametrize("damping", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_direction_is_the_dense_solve_for_some_distinct_scores(count, damping):
    scores, grad, direction = observed(scores=count, damping=damping)
    fits = [
        chosen
        for chosen in itertools.combinations(range(5), count)
        if torch.allclose(dense(scores[list(chosen)], grad, damping), direction, rtol=1e-7, atol=0)
    ]
    assert len(fits) == 1


@pytest.mark.parametrize("count", [5, 100])
def test_all_scores_give_the_empirical_fisher_matrix_as_conjugate_gradients_do(count):
    scores, grad, direction = observed(scores=count, damping=0.05)
    close(direction, dense(scores, grad, 0.05))

    def product(v):
        return 0.05 * v + scores.mT @ (scores @ v) / len(scores)

    found, rest = torch.zeros_like(grad), grad.clone()
    along = rest.clone()
    for _ in range(len(scores) + 1):  # as many different eigenvalues
        image = product(along)
        length = rest.dot(rest) / along.dot(image)
        found += length * along
        new = rest - length * image
        along = new + along * new.dot(new) / rest.dot(rest)
        rest = new
    close(direction, found)


def test_the_mean_score_is_the_gradient_of_the_mean():
    scores, grad, direction = observed(score="mean", damping=0.02)
    close(direction, dense(scores.mean(0, keepdim=True), grad, 0.02))


def test_of_one_action_the_direction_is_a_normalised_policy_gradient():
    scores, grad, direction = observed(rows=1, damping=0.3)
    u = scores[0]
    worth = grad.dot(u) / u.dot(u)
    close(grad, worth * u)
    close(direction, worth * u / (0.3 + u.dot(u)))


@pytest.mark.parametrize("piece", [2**21, 7])
@pytest.mark.parametrize("count", [1, 3])
def test_woodbury_is_the_dense_solve_in_pieces_and_the_kernel(count, piece, monkeypatch):
    monkeypatch.setattr(low_rank, "_PIECE", piece)
    grads = [torch.randn(3, 4), torch.randn(5), torch.randn(0)]
    scores = [torch.randn(count, g.numel()) for g in grads]
    found, info = low_rank._woodbury(grads, scores, 0.1)
    assert int(info) == 0
    assert [d.shape for d in found] == [g.shape for g in grads]
    want = dense(torch.cat(scores, 1).double(), flat(grads).double(), 0.1)
    # Solved in fp64 and rounded once.
    torch.testing.assert_close(flat(found).double(), want, rtol=1e-6, atol=1e-6)
    if count == 1:
        torch.testing.assert_close(flat(low_rank.solve(grads, scores, 0.1)[0]), flat(found))


@pytest.mark.parametrize("settings", [{}, {"scores": 3}])
def test_a_direction_where_little_is_left_of_the_gradient_is_rounded_once(settings):
    # The gradient is a sum of scores, and damping small: what is left is 1e-6 of it.
    u = torch.randn(3, 50)
    worth = torch.randn(3) if settings else torch.tensor([1.0, 0.0, 0.0])
    count = settings.get("scores", 1)
    grad = worth @ u
    (found,), _ = low_rank.solve([grad], [u[:count]], 1e-5)
    torch.testing.assert_close(
        found.double(), dense(u[:count].double(), grad.double(), 1e-5), rtol=1e-4, atol=1e-5
    )


def test_what_has_no_gradient_neither_moves_nor_counts():
    model = policy()
    opt = RankOneNPG(model, step_length="fixed", scores=5, damping=0.1, weight_decay=0.5)
    log_probs, worth = drawn(model)
    moved = [model[0].weight, model[2].bias]
    scores = jacobian(log_probs, moved)
    opt.observe(log_probs)
    (-(log_probs * worth).mean()).backward()
    model[0].bias.grad = model[2].weight.grad = None
    before, rest = flat(moved), [model[0].bias.clone(), model[2].weight.clone()]
    grad = flat(p.grad for p in moved)
    opt.step()
    close(0.5 * before - flat(moved), dense(scores, grad, 0.1))
    assert same(rest, [model[0].bias, model[2].weight])


@pytest.mark.parametrize("settings", [{}, {"scores": 3}, {"score": "mean"}])
@pytest.mark.parametrize("step_length", ["kl", "fixed"])
def test_without_scores_the_direction_is_the_gradient_over_the_damping(step_length, settings):
    policy_weight, critic = (nn.Parameter(torch.randn(4, dtype=torch.float64)) for _ in range(2))
    opt = RankOneNPG([policy_weight, critic], damping=0.2, step_length=step_length, **settings)
    before = critic.detach().clone()
    opt.observe(policy_weight * torch.randn(4, dtype=torch.float64))
    (critic**2).sum().backward()  # and nothing of the policy
    grad = critic.grad.clone()
    opt.step()
    d = grad / 0.2
    length = math.sqrt(2 * 0.01 / (0.2 * float(d.dot(d)))) if step_length == "kl" else 1.0
    close(before - critic.detach(), length * d)


# ---- length ----


def probabilities_of_quarters():
    """A linear softmax policy of 1/2, 1/4, 1/4 in every state, and each state's actions as often."""
    weight = nn.Parameter(torch.zeros(ACTIONS, 4, dtype=torch.float64))
    bias = nn.Parameter(torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).log())
    states = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def log_probs():
        return F.linear(states, weight, bias).log_softmax(-1)

    return [weight, bias], log_probs, torch.tensor([0, 0, 1, 2]).expand(6, 4)


def test_the_divergence_is_the_one_asked_for_to_second_order():
    ratios = []
    for max_kl in (0.04, 0.01, 0.0025):
        parameters, log_probs, actions = probabilities_of_quarters()
        opt = RankOneNPG(parameters, max_kl=max_kl, damping=1e-9, scores=24)
        worth = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        old = log_probs()
        taken = old.gather(1, actions)
        opt.observe(taken)
        (-(taken * worth).mean()).backward()
        opt.step()
        new = log_probs().detach()
        kl = float((old.detach().exp() * (old.detach() - new)).sum(-1).mean())
        ratios.append(kl / max_kl)
        # With every action enumerated the Fisher matrix is exact; nothing is damped away.
        assert opt.diagnostics()["predicted_kl"] == pytest.approx(max_kl, rel=1e-6)
    errors = [abs(ratio - 1) for ratio in ratios]
    assert errors[0] < 0.3
    # Of third order in the step: half of it at a quarter of the divergence.
    assert errors[1] < 0.7 * errors[0] and errors[2] < 0.7 * errors[1]
    assert errors[1] > 0  # and not the divergence of the model with itself


@pytest.mark.parametrize("settings", [{}, {"scores": 3}, {"score": "mean"}])
def test_the_length_is_that_of_all_observed_actions(settings):
    model = policy()
    parameters = list(model.parameters())
    opt = RankOneNPG(model, damping=0.03, max_kl=0.02, **settings)
    log_probs, worth = drawn(model, 7)
    scores, before = jacobian(log_probs, parameters), flat(parameters)
    opt.observe(log_probs)
    (-(log_probs * worth).mean()).backward()
    opt.step()
    step = before - flat(parameters)
    close(
        (scores @ step).square().mean() / 2 + 0.03 / 2 * step.dot(step),
        torch.tensor(0.02, dtype=torch.float64),
    )
    report = opt.diagnostics()
    length = report["step_factor"] * report["direction_norm"]
    assert float(step.norm()) == pytest.approx(length)
    predicted = (scores @ step).square().mean() / 2
    assert report["predicted_kl"] == pytest.approx(float(predicted))
    drawn_norms = (
        scores.mean(0).square().sum()[None]
        if settings.get("score") == "mean"
        else scores.square().sum(1)
    )
    assert drawn_norms.min() <= report["score_squared_norm"] * (1 + 1e-6)
    assert report["score_squared_norm"] <= drawn_norms.max() * (1 + 1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e30])
@pytest.mark.parametrize("count", [1, 3])
def test_the_scale_of_the_loss_does_not_matter(count, scale):
    results = []
    for factor in (1.0, scale):
        model = policy(torch.float32)
        take_step(model, RankOneNPG(model, scores=count), scale=factor)
        results.append(flat(model.parameters()))
    assert not torch.equal(results[0], flat(policy(torch.float32).parameters()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_a_fixed_step_beyond_the_range_of_a_norm_is_made():
    # Squares of 1e25 are infinite in fp32; the numbers are not.
    p = nn.Parameter(torch.zeros(3))
    opt = RankOneNPG([p], step_length="fixed", damping=1.0)
    opt.observe(p * torch.tensor([1.0, 0.0, 0.0]))
    p.grad = torch.tensor([0.0, 1e25, -1e25])
    opt.step()
    torch.testing.assert_close(p.detach(), torch.tensor([0.0, -1e25, 1e25]))


@pytest.mark.parametrize("step_length", ["kl", "fixed"])
def test_a_gradient_of_zero_moves_nothing(step_length):
    model = policy()
    opt = RankOneNPG(model, step_length=step_length)
    before = values(model)
    take_step(model, opt, scale=0.0)
    assert same(before, values(model))
    assert all(math.isfinite(x) for x in opt.diagnostics().values())
    assert opt.param_groups[0]["step"] == 1
    take_step(model, opt)
    assert not same(before, values(model))


def test_lengths_of_actions_of_several_dimensions():
    # One action for each element, whatever the shape.
    results = []
    for shape in ((6,), (2, 3)):
        model = policy()
        opt = RankOneNPG(model, scores=2)
        log_probs, worth = drawn(model, 6)
        opt.observe(log_probs.view(shape))
        (-(log_probs * worth).mean()).backward()
        opt.step()
        results.append(values(model))
    assert same(*results)
