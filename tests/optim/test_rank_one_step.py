# SPDX-License-Identifier: Apache-2.0
"""RankOneNPG: groups, momentum, rates, what observe() leaves alone, waits, reports, copies."""

import copy
import io
import itertools
import math

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import grng
from grng import RankOneNPG
from tests.optim.rank_one_policy import (
    ACTIONS,
    close,
    dense,
    drawn,
    flat,
    jacobian,
    policy,
    take_step,
)
from tests.optim.training import same, same_state, snapshot, values

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
    rates = (math.nan, torch.tensor(math.inf))
    ways = ({"momentum": 0.5}, {"step_length": "fixed"})
    for lr, settings in itertools.product(rates, ways):
        model = policy()
        opt = RankOneNPG(model, **settings)
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


UPDATES = [({}, 1), ({"weight_decay": 0.1}, 1), ({"maximize": True}, 2)]


@pytest.mark.parametrize(
    ("settings", "vectors"), [*UPDATES, *((settings, 0) for settings, _ in UPDATES)]
)
def test_an_update_of_rank_one_needs_no_more_than_two_vectors(settings, vectors, monkeypatch):
    if vectors:  # as on a GPU; else the step is one call
        monkeypatch.setattr(RankOneNPG, "_step_at_once", lambda *_: False)
    model = nn.Sequential(nn.Linear(4, 200), nn.Linear(200, 200), nn.Linear(200, ACTIONS))
    size = 4 * sum(p.numel() for p in model.parameters())
    opt = RankOneNPG(model, step_length="fixed", **settings)
    take_step(model, opt)
    log_probs, worth = drawn(model)
    opt.observe(log_probs)
    (-(log_probs * worth).mean()).backward()
    used = peak(opt.step)
    assert min(vectors, 1) * size <= used <= (vectors + 0.1) * size


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
