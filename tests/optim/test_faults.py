# SPDX-License-Identifier: Apache-2.0
"""Faults in training, for every class: no gradients, zeros, NaN, skipped steps, cast models, no memory."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import grng_kernels as kernels
from grng import PreconditionerError
from tests.optim.training import (
    EACH,
    GRADIENT,
    KALMAN,
    KRONECKER,
    WAYS,
    backward,
    batch,
    new_net,
    observe_actions,
    same,
    same_state,
    snapshot,
    train,
    values,
)

each = pytest.mark.parametrize("name", EACH)
gradient = pytest.mark.parametrize("name", GRADIENT)


def run(name, **more):
    way, model = WAYS[name], new_net()
    return way, model, way(model, **more)


# ---- no gradients, zero gradients ----


class WithSpare(nn.Module):
    """A head that is used when it is asked for, and a frozen layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.net, self.spare, self.frozen = new_net(), nn.Linear(4, 3), nn.Linear(4, 3)
        self.frozen.requires_grad_(False)
        self.uses_spare = False

    def forward(self, x):
        out = self.net(x) + self.frozen(x)
        return out + self.spare(x) if self.uses_spare else out


@each
def test_what_has_no_gradient_is_left_alone_and_trained_from_its_first_on(name):
    way, model = WAYS[name], WithSpare()
    opt = way(model)
    before = copy.deepcopy(model.state_dict())
    train(way, model, opt, range(3))
    resting = [*model.spare.parameters(), *model.frozen.parameters()]
    if name != "LoKO":  # whose prior, the same for all weights, needs no observation
        assert not any(opt.state.get(p) for p in resting)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == key.startswith(("spare", "frozen"))
    model.uses_spare = True
    train(way, model, opt, range(3, 8))
    assert opt.state[model.spare.weight]
    assert not torch.equal(model.spare.weight, before["spare.weight"])
    assert torch.equal(model.frozen.weight, before["frozen.weight"])


@each
def test_a_layer_that_is_frozen_in_between_keeps_its_state(name):
    way, model, opt = run(name)
    train(way, model, opt, range(2))
    model.k.requires_grad_(False)
    kept = copy.deepcopy([opt.state[p] for p in model.k.parameters()]), values(model.k)
    train(way, model, opt, range(2, 6))
    assert same_state(kept, ([opt.state[p] for p in model.k.parameters()], values(model.k)))
    model.k.requires_grad_(True)
    train(way, model, opt, range(6, 9))
    assert not same(kept[1], values(model.k))


@pytest.mark.parametrize("after", [0, 3])
@gradient
def test_zero_gradients_change_nothing_but_what_decays(name, after):
    way, model, opt = run(
        name, weight_decay=0.0, **({"betas": (0.0, 0.9)} if name != "KFAC" else {})
    )
    if name == "KFAC":
        opt.param_groups[0]["momentum"] = 0.0
        opt.param_groups[1]["betas"] = (0.0, 0.9)
    train(way, model, opt, range(after))
    before = values(model)
    for number in range(after, after + 3):
        x, _ = batch(number, way.rows)
        out = model(x)
        loss = 0.0 * out.square().mean()
        if name == "RENG":
            opt.observe(out)
            opt.backward(loss)
        else:
            opt.observe(loss if name == "SophiaH" else out)
            loss.backward()
        opt.step()
        opt.zero_grad()
    if after == 0:
        assert same(before, values(model))
    for a, b in zip(before, values(model), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)
    assert all(
        v.isfinite().all() for s in opt.state.values() for v in s.values() if torch.is_tensor(v)
    )


# ---- NaN and infinity ----


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@each
def test_a_step_that_is_not_finite_changes_nothing_and_too_many_are_an_error(name, value):
    way = WAYS[name]
    most = {"max_failures": 3} if name not in ("KFAC", "SophiaG", "SophiaH") else {}
    model = new_net()
    opt = way(model, **most)
    train(way, model, opt, range(3))
    before = values(model), copy.deepcopy(opt.state_dict())

    def bad(number):
        if name in KALMAN:
            x, y = batch(number, way.rows)
            opt.observe(model(x * value), y)
        else:
            backward(way, model, opt, number)
            model.head.weight.grad[0, 0] = value
        opt.step()
        opt.zero_grad()

    for count in range(1, 4):
        bad(count)
        assert same(before[0], values(model))
        state = copy.deepcopy(opt.state_dict())
        counters = ("skipped", "skipped_in_a_row", "skipped_steps")
        for found in (*state["state"].values(), *state["param_groups"]):
            for key in counters:
                if key in found:
                    assert found[key] == count
                    del found[key]
        expected = copy.deepcopy(before[1])
        for found in (*expected["state"].values(), *expected["param_groups"]):
            for key in counters:
                found.pop(key, None)
        assert same_state(state, expected)
        numbers = opt.diagnostics()
        assert count in (numbers.get(k) for k in ("skipped_steps_in_a_row", "skipped_in_a_row"))
    with pytest.raises(PreconditionerError, match="in a row"):
        bad(4)
    assert same(before[0], values(model))
    opt.zero_grad()
    train(way, model, opt, [5])
    assert not same(before[0], values(model))


@pytest.mark.parametrize("name", [*GRADIENT, "RankOneNPG"])
def test_a_scaler_that_skips_steps_changes_nothing_else(name):
    """Statistics of a step that was skipped are dropped: the run is the one without it."""
    way, plain = WAYS[name], new_net()
    scaled = copy.deepcopy(plain)
    # An exact power of two, so that scaling loses no bit.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=1000)
    reference, opt = way(plain), way(scaled)
    for number in range(9):
        if number not in (0, 4, 5):
            train(way, plain, reference, [number])
        x, y = batch(number, way.rows)
        out = scaled(x)
        loss = F.cross_entropy(out, y)
        if name == "RENG":
            opt.observe(out)
            # The penalty does not scale with the loss, and the scaler has to see the sum of the two.
            opt.backward(loss)
            scaler.scale(torch.zeros(()))
            for p in scaled.parameters():
                p.grad.mul_(scaler.get_scale())
        else:
            if name == "SophiaH":
                opt.observe(loss)
            elif name == "RankOneNPG":
                observe_actions(opt, out, number)
            else:
                opt.observe(out)
            scaler.scale(loss).backward()
        if number in (0, 4, 5):
            scaled.norm.bias.grad[0] = float("inf")
        before = snapshot(scaled, opt)
        scaler.step(opt)
        scaler.update(2.0**4)
        assert same_state(before, snapshot(scaled, opt)) == (number in (0, 4, 5))
        opt.zero_grad()
    for a, b in zip(values(plain), values(scaled), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("name", ["SophiaG", "SophiaH"])
def test_gradients_may_be_zeroed_between_observing_and_the_backward_pass(name, to_none):
    results = []
    for late in (False, True):
        _, model, opt = run(name)
        for number in range(6):
            x, y = batch(number)
            if not late:
                opt.zero_grad(to_none)
            out = model(x)
            loss = F.cross_entropy(out, y)
            opt.observe(loss if name == "SophiaH" else out)
            if late:
                opt.zero_grad(to_none)
            loss.backward()
            opt.step()
        results.append((values(model), opt.state_dict()))
    assert same_state(*results)


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("name", ["SophiaG", "SophiaH"])
def test_statistics_of_a_backward_pass_without_a_step_go_with_its_gradients(name, to_none):
    results = []
    for skips in (False, True):
        way, model, opt = run(name)
        if skips:
            for number in (7, 8):
                backward(way, model, opt, number)
            opt.zero_grad(to_none)
        train(way, model, opt, range(3))
        results.append((values(model), opt.state_dict()))
    assert same_state(*results)


# ---- memory ----


@each
def test_a_long_run_keeps_no_more_tensors_than_a_short_one(name):
    way, model, opt = run(name)

    def tensors():
        gc.collect()
        return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())

    train(way, model, opt, range(9))
    before = tensors()
    train(way, model, opt, range(9, 49))
    with torch.no_grad():
        model(batch(0)[0])
    assert tensors() == before


# ---- models that are cast ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@each
def test_a_model_that_is_cast_after_steps_is_trained_on_or_named(name, dtype):
    way, model, opt = run(name)
    train(way, model, opt, range(2))
    model.to(dtype)
    before = snapshot(model, opt)
    if dtype == torch.float64:
        with pytest.raises(
            RuntimeError, match=r"was moved or cast after the optimizer got its state"
        ):
            train(way, model, opt, [2])
        assert same_state(before, snapshot(model, opt))
    else:
        train(way, model, opt, [2])
        assert not same(before[0], values(model))
    # What there is can be loaded into an optimizer of the model as it is now.
    opt.zero_grad()
    other = way(model)
    other.load_state_dict(opt.state_dict())
    train(way, model, other, range(3, 6))
    assert not same(before[0], values(model))


# ---- out of memory ----


# Kernel, and which of its calls in a step fails: the first, or one after others have written.
LAUNCHES = [
    *(
        (kernel, call, name)
        for kernel, call in (
            ("kron_factor_update_", 0),
            ("kron_factor_update_", 3),
            ("damped_inverse", 0),
        )
        for name in ("RING", "RING-stagger", "RING-kl_clip", "RENG", "KFAC", "KFAC-pytorch")
    ),
    *(("precondition", 0, name) for name in ("RING-kl_clip", "KFAC", "KFAC-pytorch")),
    *(
        ("kalman_update_", 0, name)
        for name in ("RKalman", "RKalman-factored", "RKalman-ema", "LoKO")
    ),
    ("rank1_precondition", 0, "RankOneNPG"),
]
# Steps of a whole optimizer in one call, which asks for no memory once it writes.
WHOLE_STEPS = [("rank1_step_", 0, "RankOneNPG-fixed")]


def step_without_memory(opt, kernel, call, monkeypatch, *, late=False):
    """A step whose kernel finds no memory: at once, or when it has written what it writes."""
    real, calls = getattr(kernels, kernel), []

    def fails(*args, **kwargs):
        calls.append(1)
        if len(calls) > call:
            if late:
                real(*args, **kwargs)
            raise torch.OutOfMemoryError("no memory")
        return real(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(kernels, kernel, fails)
        with pytest.raises(torch.OutOfMemoryError, match=r"^no memory$"):
            opt.step()
    assert len(calls) == call + 1  # nothing is tried again


@pytest.mark.parametrize("steps", [0, 12])  # of the first refresh, and of a later one
@pytest.mark.parametrize(
    ("kernel", "call", "name", "late"),
    [(*launch, late) for launch in LAUNCHES for late in (False, True)]
    + [(*launch, False) for launch in WHOLE_STEPS],
)
def test_a_kernel_without_memory_leaves_all_as_it_was(kernel, call, name, late, steps, monkeypatch):
    way, model, opt = run(name)
    train(way, model, opt, range(steps))
    plain, reference = copy.deepcopy((model, opt))
    backward(way, model, opt, steps)
    before = snapshot(model, opt)
    step_without_memory(opt, kernel, call, monkeypatch, late=late)
    assert same_state(before, snapshot(model, opt))
    opt.step()
    opt.zero_grad()
    train(way, model, opt, range(steps + 1, steps + 4))
    train(way, plain, reference, range(steps, steps + 4))
    assert same_state(snapshot(plain, reference), snapshot(model, opt))


@pytest.mark.parametrize(("kernel", "call", "name"), LAUNCHES + WHOLE_STEPS)
def test_after_a_kernel_without_memory_another_batch_may_come(kernel, call, name, monkeypatch):
    way, model, opt = run(name)
    train(way, model, opt, range(12))
    plain, reference = copy.deepcopy((model, opt))
    backward(way, model, opt, 12)
    step_without_memory(opt, kernel, call, monkeypatch)
    opt.zero_grad()
    train(way, model, opt, range(13, 16))
    train(way, plain, reference, range(13, 16))
    assert same_state(snapshot(plain, reference), snapshot(model, opt))


@pytest.mark.parametrize("steps", [0, 12])
@pytest.mark.parametrize("name", KRONECKER)
def test_where_adamw_finds_no_memory_the_layers_have_made_their_step(name, steps, monkeypatch):
    way, model, opt = run(name)
    train(way, model, opt, range(steps))
    plain, reference = copy.deepcopy((model, opt))
    backward(way, model, opt, steps)

    def fails(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr("grng.optim.fallback.adamw", fails)
        with pytest.raises(torch.OutOfMemoryError):
            opt.step()
    opt.zero_grad()
    backward(way, plain, reference, steps)
    plain.norm.zero_grad()
    reference.step()
    reference.zero_grad()
    assert same(values(plain), values(model))
    layers = [p for n, p in model.named_parameters() if not n.startswith("norm")]
    others = [p for n, p in plain.named_parameters() if not n.startswith("norm")]
    assert same_state([opt.state[p] for p in layers], [reference.state[p] for p in others])
    assert opt.param_groups[0]["step"] == reference.param_groups[0]["step"]
    train(way, model, opt, range(steps + 1, steps + 4))
    train(way, plain, reference, range(steps + 1, steps + 4))
    assert same(values(plain), values(model))
