# SPDX-License-Identifier: Apache-2.0
"""Which forward passes a step takes its statistics from, and that memory stays bounded."""

import gc
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from grng import KFAC, RING
from grng.curvature.capture import MOST_ROUNDS, MOST_WAITING

CLASSES = 3


def backward(model, opt, x):
    out = model(x)
    opt.observe(out)
    F.cross_entropy(out, torch.arange(len(x)) % CLASSES).backward()


def inputs(n, rows=2):
    return [torch.randn(rows, 4, dtype=torch.float64) for _ in range(n)]


def mean_square(xs):
    rows = torch.cat([torch.cat([x, x.new_ones(len(x), 1)], 1) for x in xs])
    return rows.T @ rows / len(rows)


def linear():
    return nn.Linear(4, CLASSES).double()


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_backward_passes_without_a_step_keep_bounded_memory(fisher):
    model, xs = linear(), inputs(MOST_ROUNDS + 40)
    opt = RING(model, fisher=fisher)
    with pytest.warns(RuntimeWarning, match="backward passes without a step") as found:
        for x in xs:
            backward(model, opt, x)
            (records,) = opt._capture.records.values()
            assert len(records) <= MOST_ROUNDS
            assert len(opt._capture._edges) == len(records)
    assert len(found) == 1
    opt.step()
    factor = opt.state[model.weight]["input_factor"]
    torch.testing.assert_close(factor, mean_square(xs[-MOST_ROUNDS:]))


def test_as_many_micro_batches_are_one_large_batch():
    model, xs = linear(), inputs(MOST_ROUNDS)
    opt = RING(model, lr=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            for x in xs:
                backward(model, opt, x)
            opt.step()
    torch.testing.assert_close(opt.state[model.weight]["input_factor"], mean_square(xs))


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpoint", "reentrant"])
def test_a_module_may_be_used_more_often_in_one_pass(reentrant):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = nn.Linear(4, 4), nn.Linear(4, CLASSES)

        def run(self, h):
            for _ in range(2 * MOST_ROUNDS):
                h = self.cell(h).tanh()
            return h

        def forward(self, x):
            x = x.requires_grad_()
            if reentrant is None:
                return self.head(self.run(x))
            return self.head(checkpoint(self.run, x, use_reentrant=reentrant))

    model = Recurrent().double()
    opt = RING(model, lr=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            backward(model, opt, torch.randn(2, 4, dtype=torch.float64))
    cell = opt._layers[0]
    assert len(opt._capture.complete(cell)) == 3 * 2 * MOST_ROUNDS


@pytest.mark.parametrize("optimizer", [RING, KFAC])
def test_statistics_of_gradients_that_were_zeroed_do_not_count(optimizer):
    model, xs = linear(), inputs(5)
    opt = optimizer(model, lr=0.0)
    for x in xs[:3]:
        backward(model, opt, 100 * x)
        opt.zero_grad()
        assert sum(map(len, opt._capture.records.values())) == 1
    for x in xs[3:]:
        backward(model, opt, x)
    opt.step()
    torch.testing.assert_close(opt.state[model.weight]["input_factor"], mean_square(xs[3:]))


def test_gradients_may_be_zeroed_between_the_forward_and_the_backward_pass():
    model, xs = linear(), inputs(2)
    opt = RING(model, lr=0.0, refresh_every=1)
    for x in xs:
        out = model(x)
        opt.observe(out)
        opt.zero_grad()
        out.square().mean().backward()
        opt.step()
        assert opt._fisher == "sampled labels"
    state = opt.state[model.weight]
    assert state["input_factor"].any() and state["output_factor"].any()


def test_gradients_that_are_put_back_by_hand_keep_their_statistics():
    model, (x,) = linear(), inputs(1)
    opt = RING(model)
    backward(model, opt, x)
    grads = [p.grad.clone() for p in model.parameters()]
    opt.zero_grad()
    for p, g in zip(model.parameters(), grads, strict=True):
        p.grad = g
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()
    torch.testing.assert_close(opt.state[model.weight]["input_factor"], mean_square([x]))


@pytest.mark.parametrize("optimizer", [RING, KFAC])
def test_a_loss_in_two_parts_has_the_statistics_of_their_sum(optimizer):
    torch.manual_seed(0)
    model, (x,) = linear(), inputs(1, rows=8)
    factors = []
    for parts in ((1.0,), (0.01, 0.99)):
        opt = optimizer(model, lr=0.0, fisher="empirical")
        loss = F.cross_entropy(model(x), torch.arange(8) % CLASSES)
        for part in parts:
            (part * loss).backward(retain_graph=True)
        opt.step()
        opt.zero_grad()
        factors.append(opt.state[model.weight]["output_factor"])
    assert factors[0].any()
    torch.testing.assert_close(factors[1], factors[0])


def test_a_second_derivative_is_no_further_part_of_the_loss():
    torch.manual_seed(0)
    model, (x,) = linear(), inputs(1, rows=8)
    factors = []
    for penalty in (0.0, 3.0):
        opt = RING(model, lr=0.0, fisher="empirical")
        loss = F.cross_entropy(model(x), torch.arange(8) % CLASSES)
        (grad,) = torch.autograd.grad(loss, [model.weight], create_graph=True)
        (loss + penalty * grad.square().sum()).backward()
        opt.step()
        opt.zero_grad()
        factors.append(opt.state[model.weight]["output_factor"])
    assert factors[0].any() and torch.equal(*factors)


@pytest.mark.parametrize("used", ["all", "some", "recurrent"])
def test_forward_passes_without_a_backward_pass_keep_bounded_memory(used):
    """A validation that does not switch gradients off, on a step that takes statistics."""
    cell, head = nn.Linear(4, 4).double(), linear()
    model = nn.ModuleList([cell, head, *([linear()] if used == "some" else [])])
    opt = RING(model, lr=0.0)

    def run(x):
        for _ in range(2 if used == "recurrent" else 1):
            x = cell(x).tanh()
        return head(x)

    most = MOST_WAITING if used == "some" else (MOST_ROUNDS + 1) * (2 if used == "recurrent" else 1)
    kept = []
    passes = 3 * MOST_WAITING // 2 if used == "some" else 500
    with pytest.warns(RuntimeWarning, match=r"forward passes without a backward .*no_grad") as said:
        for x in inputs(passes):
            out = run(x)
            kept.append(weakref.ref(out.grad_fn.metadata.setdefault("test", weakref.WeakSet())))
            for records in opt._capture.records.values():
                assert len(records) <= most
    assert len(said) == 1
    del out
    gc.collect()
    assert sum(ref() is not None for ref in kept) <= most
    x = inputs(1)[0]
    out = run(x)
    opt.observe(out)
    F.cross_entropy(out, torch.arange(2) % CLASSES).backward()
    opt.step()
    assert "input_factor" in opt.state[head.weight]
    assert not any(opt._capture.records.values()) and not opt._capture._edges
    if used == "all":
        torch.testing.assert_close(opt.state[cell.weight]["input_factor"], mean_square([x]))
