# SPDX-License-Identifier: Apache-2.0
"""RankOneNPG: its direction against dense solves, its length against true divergences, its faults."""

import copy
import io
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import grng
from grng import PreconditionerError, RankOneNPG
from grng.curvature import low_rank
from tests.optim.training import same, same_state, snapshot, values

ACTIONS = 3


def policy(dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, ACTIONS)).to(dtype)


def drawn(model, rows=5, seed=0):
    """Log-probabilities of actions that a policy took, and what they were worth."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    states = torch.randn(rows, 4, generator=generator).to(dtype)
    log_probs = model(states).log_softmax(-1)
    actions = log_probs.detach().float().exp().multinomial(1, generator=generator)
    worth = torch.randn(rows, generator=generator).to(dtype)
    return log_probs.gather(1, actions).squeeze(1), worth


def take_step(model, opt, rows=5, seed=0, scale=1.0):
    log_probs, worth = drawn(model, rows, seed)
    opt.observe(log_probs)
    (-scale * (log_probs * worth).mean()).backward()
    opt.step()
    opt.zero_grad()


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def jacobian(log_probs, parameters):
    """Scores of all actions, ``[N, d]``, one backward pass each."""
    rows = [
        torch.autograd.grad(x, parameters, retain_graph=True, allow_unused=True) for x in log_probs
    ]
    return torch.stack(
        [
            flat(
                torch.zeros_like(p) if g is None else g
                for g, p in zip(row, parameters, strict=True)
            )
            for row in rows
        ]
    )


def dense(scores, grad, damping):
    """``(damping·I + UUᵀ/m)⁻¹ g`` by a Cholesky factor of that matrix."""
    matrix = scores.mT @ scores / len(scores)
    matrix.diagonal().add_(damping)
    return torch.cholesky_solve(grad[:, None], torch.linalg.cholesky(matrix))[:, 0]


def observed(rows=5, seed=0, **settings):
    """A step of fixed length: all scores, the gradient, and the direction that was taken."""
    model = policy()
    parameters = list(model.parameters())
    opt = RankOneNPG(model, step_length="fixed", **settings)
    log_probs, worth = drawn(model, rows, seed)
    scores = jacobian(log_probs, parameters)
    opt.observe(log_probs)
    (-(log_probs * worth).mean()).backward()
    grad, before = flat(p.grad for p in parameters), flat(parameters)
    opt.step()
    return scores, grad, before - flat(parameters)


def close(a, b, rtol=1e-9):
    """fp64, of systems with a condition below 1e4."""
    torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.abs().max()))


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


# ---- the step ----


def test_momentum_and_decay_are_those_of_the_docstring():
    model = policy()
    settings = dict(step_length="fixed", scores=5, damping=0.1)
    opt = RankOneNPG(model, lr=0.3, momentum=0.6, weight_decay=0.05, **settings)
    average = torch.zeros_like(flat(model.parameters()))
    for seed in range(4):
        before = flat(model.parameters())
        twin = copy.deepcopy(model)
        take_step(twin, RankOneNPG(twin, **settings), seed=seed)
        average = 0.6 * average + (before - flat(twin.parameters()))
        take_step(model, opt, seed=seed)
        close(flat(model.parameters()), (1 - 0.3 * 0.05) * before - 0.3 * average)


def test_momentum_that_was_switched_off_begins_anew():
    results = []
    for before in (0.0, 0.9):
        model = policy()
        opt = RankOneNPG(model, lr=0.0, momentum=before)
        take_step(model, opt)
        for momentum in (0.0, 0.5, 0.5):
            opt.param_groups[0].update(lr=1.0, momentum=momentum)
            take_step(model, opt)
        results.append(values(model))
    assert same(*results)


def test_rates_decay_and_sign_are_of_a_group():
    model, alone = policy(), policy()
    first, second = list(model.parameters())[:2], list(model.parameters())[2:]
    groups = [
        {"params": first, "lr": 0.5},
        {"params": second, "weight_decay": 0.1, "maximize": True},
    ]
    opt = RankOneNPG(groups, step_length="fixed", scores=5)
    before = values(model)
    log_probs, worth = drawn(model)
    opt.observe(log_probs)
    (-(log_probs * worth).mean()).backward()
    grads = [p.grad for p in model.parameters()]
    kept = [g.clone() for g in grads]
    scores = jacobian(drawn(alone)[0], list(alone.parameters()))
    # One vector: the sign goes into the products too.
    signed = flat([*kept[:2], *(-g for g in kept[2:])])
    direction = dense(scores, signed, 0.1)
    opt.step()
    assert same(grads, kept) and all(
        p.grad is g for p, g in zip(model.parameters(), grads, strict=True)
    )
    cut = sum(p.numel() for p in first)
    close(flat(first), flat(before[:2]) - 0.5 * direction[:cut])
    close(flat(second), 0.9 * flat(before[2:]) - direction[cut:])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("damping", 0.2),
        ("scores", 2),
        ("score", "mean"),
        ("step_length", "fixed"),
        ("max_kl", 0.5),
        ("seed", 3),
    ],
)
def test_groups_agree_on_what_there_is_once(name, value):
    model = policy()
    opt = RankOneNPG([{"params": [p]} for p in model.parameters()])
    log_probs, _ = drawn(model)
    opt.observe(log_probs)
    log_probs.mean().backward()
    kept = opt.param_groups[1][name]
    opt.param_groups[1][name] = value
    before = snapshot(model, opt)
    with pytest.raises(ValueError, match=rf"{name} must be the same in all parameter groups"):
        opt.step()
    assert same_state(before, snapshot(model, opt))
    opt.param_groups[1][name] = kept
    opt.step()
    assert not same(before[0], values(model))


@pytest.mark.parametrize(("name", "value"), [("damping", 0.0), ("max_kl", -1.0), ("momentum", 1.0)])
def test_a_setting_that_was_changed_is_checked_before_a_step(name, value):
    model = policy()
    opt = RankOneNPG(model)
    take_step(model, opt)
    opt.param_groups[0][name] = value
    before = snapshot(model, opt)
    with pytest.raises(ValueError, match=f"{name} must be"):
        take_step(model, opt)
    assert same_state(before, snapshot(model, opt))


def test_a_learning_rate_that_is_not_finite_changes_nothing():
    for lr in (math.nan, torch.tensor(math.inf)):
        model = policy()
        opt = RankOneNPG(model, momentum=0.5)
        take_step(model, opt)
        opt.param_groups[0]["lr"] = lr
        before = snapshot(model, opt)
        with pytest.raises(ValueError, match=r"lr of param_groups\[0\] must be a finite number"):
            take_step(model, opt)
        assert repr(before) == repr(snapshot(model, opt))  # a NaN is not equal to itself


@pytest.mark.parametrize("step_length", ["kl", "fixed"])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_narrow_parameters_are_rounded_once(step_length, momentum):
    model = policy(torch.bfloat16)
    opt = RankOneNPG(model, lr=0.5, step_length=step_length, momentum=momentum, weight_decay=0.1)
    log_probs, worth = drawn(model, rows=1)
    parameters = list(model.parameters())
    scores = jacobian(log_probs, parameters).double()
    opt.observe(log_probs)
    (-(log_probs * worth).mean()).backward()
    before = flat(parameters).double()
    direction = dense(scores, flat(p.grad for p in parameters).double(), 0.1)
    opt.step()
    factor = opt.diagnostics()["step_factor"]
    want = (1 - 0.5 * 0.1) * before - 0.5 * factor * direction
    # Half of the last place of bf16, whose eps is 2⁻⁷, and what fp32 adds to it.
    torch.testing.assert_close(flat(parameters).double(), want, rtol=2**-8 + 1e-5, atol=1e-6)
    for state in opt.state.values():
        assert state["momentum_buffer"].dtype == torch.float32
    assert len(opt.state) == (len(parameters) if momentum else 0)


# ---- observing ----


@pytest.mark.parametrize("settings", [{}, {"scores": 3}, {"step_length": "fixed"}])
def test_observing_leaves_gradients_graphs_and_random_numbers_alone(settings):
    model = policy()
    opt = RankOneNPG(model, **settings)
    log_probs, worth = drawn(model)
    before = torch.get_rng_state()
    opt.observe(log_probs)
    assert all(p.grad is None for p in model.parameters())
    (-(log_probs * worth).mean()).backward()  # without retain_graph
    got = [p.grad for p in model.parameters()]
    twin = policy()
    log_probs, worth = drawn(twin)
    (-(log_probs * worth).mean()).backward()
    assert same(got, [p.grad for p in twin.parameters()])
    opt.step()
    assert torch.equal(before, torch.get_rng_state())


def test_draws_differ_between_steps_and_seeds():
    def draws(seed):
        model = policy()
        opt = RankOneNPG(model, lr=0.0, seed=seed)
        norms = []
        for _ in range(12):
            take_step(model, opt)
            norms.append(opt.diagnostics()["score_squared_norm"])
        return norms

    first = draws(0)
    assert len(set(first)) > 2  # of five
    assert first == draws(0)
    assert first != draws(1)


def test_a_loaded_state_brings_its_seed():
    results = []
    for seed in (7, 8):
        model = policy()
        opt = RankOneNPG(model, seed=7)
        take_step(model, opt)
        other = RankOneNPG(model, seed=seed)
        other.load_state_dict(opt.state_dict())
        for number in range(1, 6):
            take_step(model, other, seed=number)
        results.append(values(model))
    assert same(*results)


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_may_be_zeroed_between_observing_and_the_backward_pass(to_none):
    results = []
    for late in (False, True):
        model = policy()
        opt = RankOneNPG(model)
        for seed in range(3):
            log_probs, worth = drawn(model, seed=seed)
            if not late:
                opt.zero_grad(to_none)
            opt.observe(log_probs)
            if late:
                opt.zero_grad(to_none)
            (-(log_probs * worth).mean()).backward()
            opt.step()
        results.append(values(model))
    assert same(*results)


def test_an_observation_whose_gradients_were_thrown_away_is_dropped():
    model = policy()
    opt = RankOneNPG(model)
    log_probs, _ = drawn(model)
    opt.observe(log_probs)
    log_probs.mean().backward()
    opt.zero_grad()
    with pytest.raises(RuntimeError, match="needs an observation"):
        opt.step()
    take_step(model, opt)


class Opaque(torch.autograd.Function):
    """The identity, whose derivative cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad


@pytest.mark.parametrize("place", ["head", "body"])
def test_without_second_derivatives_the_length_cannot_be_had(place):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = policy()

        def forward(self, x):
            if place == "head":
                return Opaque.apply(self.net(x))
            return self.net[2](Opaque.apply(self.net[:2](x)))

    model = Net().double()
    opt = RankOneNPG(model, momentum=0.5)
    take_step(model.net, RankOneNPG(model.net))
    before = snapshot(model, opt)
    with pytest.raises(RuntimeError, match='use step_length="fixed"'):
        take_step(model, opt)
    assert same_state(before, snapshot(model, opt))
    opt.zero_grad()
    opt.param_groups[0]["step_length"] = "fixed"
    for count in (1, 3):  # the last: no batching rule either
        opt.param_groups[0]["scores"] = count
        before = values(model)
        take_step(model, opt)
        assert not same(before, values(model))


def test_a_compiled_policy_has_no_second_derivatives():
    model = torch.compile(policy(), backend="aot_eager")
    with pytest.raises(RuntimeError, match='use step_length="fixed"'):
        take_step(model, RankOneNPG(model))
    before = values(model)
    take_step(model, RankOneNPG(model, step_length="fixed"))
    assert not same(before, values(model))


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
    "settings", [{}, {"step_length": "fixed"}, {"scores": 2}, {"scores": 2, "step_length": "fixed"}]
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
    opt = RankOneNPG(model, max_failures=2, momentum=0.5, **settings)
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


# ---- waits and memory ----


class Reads(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [{}, {"scores": 3}, {"step_length": "fixed"}])
def test_a_step_waits_for_the_device_once(settings, monkeypatch):
    model = policy()
    opt = RankOneNPG(model, lr=torch.tensor(0.5), momentum=0.5, **settings)
    lists, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: lists.append(1) or tolist(t))
    for _ in range(2):
        log_probs, _ = drawn(model)
        with Reads() as reads:
            opt.observe(log_probs)
        assert (reads.count, len(lists)) == (0, 0)
        log_probs.mean().backward()
        with Reads() as reads:
            opt.step()
        assert (reads.count, len(lists)) == (0, 1)
        lists.clear()
        opt.zero_grad()


def peak(call):
    """Bytes that a call had allocated at its highest, above what there was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    held = highest = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return highest


@pytest.mark.parametrize(
    ("settings", "vectors"), [({}, 1), ({"weight_decay": 0.1}, 1), ({"maximize": True}, 2)]
)
def test_an_update_of_rank_one_needs_no_more_than_two_vectors(settings, vectors):
    model = nn.Sequential(nn.Linear(4, 200), nn.Linear(200, 200), nn.Linear(200, ACTIONS))
    size = 4 * sum(p.numel() for p in model.parameters())
    opt = RankOneNPG(model, step_length="fixed", **settings)
    take_step(model, opt)
    log_probs, worth = drawn(model)
    opt.observe(log_probs)
    (-(log_probs * worth).mean()).backward()
    used = peak(opt.step)
    assert size <= used <= (vectors + 0.1) * size


# ---- reports, copies ----


def test_reports_say_what_there_is():
    model = policy(torch.float32)
    opt = RankOneNPG(model, scores=4, momentum=0.5)
    size = 4 * sum(p.numel() for p in model.parameters())
    before = opt.memory_estimate()
    assert (before.total, before.moments, before.refresh) == (size, size, 4 * size)
    assert before == grng.memory_estimate("RankOneNPG", model, scores=4, momentum=0.5)
    assert "none yet" in opt.explain()
    assert set(opt.diagnostics()) == {"step", "skipped", "skipped_in_a_row", "state_bytes"}
    take_step(model, opt)
    assert opt.memory_estimate() == before
    assert sum(s["momentum_buffer"].nbytes for s in opt.state.values()) == size
    report, text = opt.diagnostics(), opt.explain()
    assert all(type(value) is float for value in report.values())
    norms = [report[f"{name}/score"] for name, _ in model.named_parameters()]
    assert sum(n * n for n in norms) == pytest.approx(4 * report["score_squared_norm"], rel=1e-5)
    assert f"{norms[0]:.3g}" in text and "none yet" not in text
    assert "4 drawn by seed 0" in text and "KL divergence 0.01" in text
    fixed = RankOneNPG(model, score="mean", step_length="fixed")
    take_step(model, fixed)
    assert "the mean of all log-probabilities" in fixed.explain()
    assert "predicted_kl" not in fixed.diagnostics()
    assert fixed.diagnostics()["step_factor"] == 1.0
    assert fixed.memory_estimate().total == 0


def test_a_copy_and_a_pickle_go_on_alike():
    model = policy()
    opt = RankOneNPG(model, momentum=0.5)
    take_step(model, opt)
    opt.observe(drawn(model)[0])  # waits: it is of the original only
    copied = copy.deepcopy((model, opt))
    file = io.BytesIO()
    torch.save((model, opt), file)
    file.seek(0)
    pickled = torch.load(file, weights_only=False)
    for twin, other in (copied, pickled):
        for seed in range(1, 4):
            take_step(twin, other, seed=seed)
    assert same(values(copied[0]), values(pickled[0]))
    assert not same(values(copied[0]), values(model))


def test_a_state_dict_of_sgd_is_taken_over():
    model = policy()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    opt = RankOneNPG(model)
    opt.load_state_dict(sgd.state_dict())  # with nothing in it yet
    drawn(model)[0].mean().backward()
    sgd.step()
    sgd.zero_grad()
    opt.load_state_dict(sgd.state_dict())
    assert same(
        [opt.state[p]["momentum_buffer"] for p in model.parameters()],
        [sgd.state[p]["momentum_buffer"] for p in model.parameters()],
    )
    assert opt.param_groups[0]["momentum"] == 0.9
    take_step(model, opt)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"scores": 3}, {"step_length": "fixed"}])
def test_a_policy_on_two_devices_takes_the_same_steps(settings):
    results = []
    for places in (("cpu", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")):
        model = policy()
        model[0].to(places[0])
        model[2].to(places[1])
        opt = RankOneNPG(model, momentum=0.5, **settings)
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(5, 4, generator=generator, dtype=torch.float64).to(places[0])
            out = model[2](torch.tanh(model[0](x)).to(places[1])).log_softmax(-1)
            log_probs = out[torch.arange(5), torch.arange(5) % ACTIONS]
            opt.observe(log_probs)
            (log_probs * torch.arange(5, device=places[1])).mean().backward()
            opt.step()
            opt.zero_grad()
        results.append(flat(p.cpu() for p in model.parameters()))
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], rtol=1e-7, atol=1e-9)
