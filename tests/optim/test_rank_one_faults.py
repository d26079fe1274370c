# SPDX-License-Identifier: Apache-2.0
"""RankOneNPG: what cannot be used is named, and changes nothing."""

import copy
import math

import pytest
import torch
from torch import nn

from grng import PreconditionerError, RankOneNPG
from tests.optim.rank_one_policy import drawn, policy, take_step
from tests.optim.training import same_state, values

# ---- faults ----


def misuse(model):
    log_probs, _ = drawn(model)
    return {
        "no tensor": (log_probs.tolist(), TypeError, "log_probs must be a tensor, got list"),
        "integers": (torch.zeros(3, dtype=torch.long), TypeError, "log_probs must be of a real"),
        "complex": (log_probs.to(torch.complex64), TypeError, "log_probs must be of a real"),
        "empty": (log_probs[:0], ValueError, r"log_probs must have at least one .* shape \[0\]"),
        "no graph": (log_probs.detach(), ValueError, "log_probs must be attached to the graph"),
    }


@pytest.mark.parametrize("fault", misuse(policy()))
def test_log_probs_that_cannot_be_used_are_named(fault):
    model = policy()
    opt = RankOneNPG(model)
    value, error, message = misuse(model)[fault]
    with pytest.raises(error, match=rf"RankOneNPG.observe: {message}"):
        opt.observe(value)
    take_step(model, opt)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(lr=-1.0), "lr must be"),
        (dict(lr=torch.ones(2)), "lr must be a number or 0-d"),
        (dict(damping=0.0), "damping must be"),
        (dict(damping=math.nan), "damping must be"),
        (dict(scores=0), "scores must be"),
        (dict(scores=1.5), "scores must be a whole number"),
        (dict(score="max"), "score must be one of sample, mean"),
        (dict(score="mean", scores=2), 'scores must be 1 with score="mean"'),
        (dict(step_length="auto"), "step_length must be one of kl, fixed"),
        (dict(max_kl=0.0), "max_kl must be"),
        (dict(momentum=1.0), "momentum must be"),
        (dict(weight_decay=-0.1), "weight_decay must be"),
        (dict(maximize=1), "maximize must be True or False"),
        (dict(seed=-1), "seed must be"),
        (dict(seed=0.5), "seed must be a whole number"),
        (dict(max_failures=0.5), "max_failures must be a whole number"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=f"RankOneNPG: {message}"):
        RankOneNPG(policy(), **settings)


def test_parameters_that_cannot_be_trained_are_refused():
    frozen = policy().requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameters"):
        RankOneNPG(frozen)
    opt = RankOneNPG(policy())
    with pytest.raises(TypeError, match=r"real floating-point dtype, got torch\.complex64"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=torch.complex64))]})
    assert len(opt.param_groups) == 1


def test_an_observation_and_a_step_take_turns():
    model = policy()
    opt = RankOneNPG(model)
    with pytest.raises(RuntimeError, match=r"call observe\(log_probs\) before loss.backward"):
        model(torch.randn(1, 4).double()).sum().backward()
        opt.step()
    opt.zero_grad()
    opt.observe(drawn(model)[0])
    with pytest.raises(RuntimeError, match=r"observe\(\) was called twice"):
        opt.observe(drawn(model)[0])


def test_a_graph_that_is_gone_is_said_to_be():
    for settings in ({}, {"step_length": "fixed"}, {"step_length": "fixed", "scores": 2}):
        model = policy()
        opt = RankOneNPG(model, **settings)
        log_probs, _ = drawn(model)
        log_probs.mean().backward()
        with pytest.raises(RuntimeError, match="second time"):
            opt.observe(log_probs)


def bad_log_probs(model, opt):
    log_probs, _ = drawn(model)
    # Of a constant: the scores are finite.
    opt.observe(torch.cat([log_probs, log_probs[:1] + math.nan]))
    log_probs.mean().backward()


def bad_score(model, opt):
    # Finite at zero, where the derivative is not; the loss does not have it.
    opt.observe((model[2].bias * 0).sqrt() + model[2].bias)
    drawn(model)[0].mean().backward()


def bad_gradient(model, opt):
    log_probs, _ = drawn(model)
    opt.observe(log_probs)
    log_probs.mean().backward()
    model[2].bias.grad[1] = math.nan


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"step_length": "fixed"},
        {"step_length": "fixed", "momentum": 0.0},
        {"scores": 2},
        {"scores": 2, "step_length": "fixed"},
    ],
)
@pytest.mark.parametrize(
    ("make", "what"),
    [
        (bad_log_probs, "log_probs"),
        (bad_score, "the score of 2.bias"),
        (bad_gradient, "the gradient of 2.bias"),
    ],
)
def test_what_is_not_finite_is_skipped_counted_and_named(make, what, settings):
    model = policy()
    opt = RankOneNPG(model, max_failures=2, **{"momentum": 0.5, **settings})
    take_step(model, opt)
    before = values(model), copy.deepcopy(opt.state_dict()["state"])
    for count in (1, 2):
        make(model, opt)
        opt.step()
        opt.zero_grad()
        report = opt.diagnostics()
        assert (report["skipped"], report["skipped_in_a_row"], report["step"]) == (count, count, 1)
    make(model, opt)
    with pytest.raises(
        PreconditionerError, match=f"3 steps in a row .* a NaN or infinity in {what}"
    ):
        opt.step()
    opt.zero_grad()
    assert same_state(before, (values(model), opt.state_dict()["state"]))
    take_step(model, opt)
    report = opt.diagnostics()
    assert (report["skipped"], report["skipped_in_a_row"], report["step"]) == (3, 0, 2)


def test_densities_above_one_are_log_probabilities_too():
    mean = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    opt = RankOneNPG([mean])
    normal = torch.distributions.Normal(mean, 1e-3)
    log_probs = normal.log_prob(normal.sample((8,))).sum(-1)
    assert (log_probs.detach() > 0).any()
    opt.observe(log_probs)
    (log_probs * torch.arange(8)).mean().backward()
    opt.step()
    assert mean.detach().abs().max() > 0
    # Steps in units of the deviation, as the divergence is.
    assert mean.detach().norm() < 1e-3
