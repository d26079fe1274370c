# SPDX-License-Identifier: Apache-2.0
"""Several heads in one step, and several optimizers on one model."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from grng import KFAC, RING
from grng.curvature.quadratic import fisher_along

DTYPE = torch.float64


class TwoHeads(nn.Module):
    """The second head may have a loss term for each of five positions."""

    def __init__(self, *, positions=False):
        super().__init__()
        self.trunk, self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 2)
        self.positions = positions

    def forward(self, x):
        h = self.trunk(x).tanh()
        pooled = h.mean(1)
        return self.one(pooled), self.two(h if self.positions else pooled)


def exact(model, x, which):
    """Factors and the form along a step, observed from some of the heads."""
    opt = RING(model, lr=0.0, fisher="exact", sharing="expand")
    outputs = model(x)
    for i in which:
        opt.observe(outputs[i])
    generator = torch.Generator().manual_seed(0)
    used = [x for x in opt._layers if x.name in ("trunk", *(("one", "two")[i] for i in which))]
    steps = [
        [torch.randn(p.shape, dtype=DTYPE, generator=generator) for p in x.parameters]
        for x in opt._layers
    ]
    moved = [s for x, s in zip(opt._layers, steps, strict=True) if x in used]
    form = fisher_along(used, opt._capture.complete, moved)
    sum(o.square().mean() for o in outputs).backward()
    opt.step()
    factors = {
        x.name: [opt.state[x.weight][f"{side}_factor"] for side in ("output", "input")]
        for x in used
    }
    return factors, form


@pytest.mark.parametrize("positions", [False, True], ids=["same terms", "other terms"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=str)
def test_the_fisher_of_two_heads_is_the_sum(order, positions):
    model, x = TwoHeads(positions=positions).to(DTYPE), torch.randn(7, 5, 4, dtype=DTYPE)
    both, form = exact(model, x, order)
    first, first_form = exact(model, x, (0,))
    second, second_form = exact(model, x, (1,))
    torch.testing.assert_close(both["trunk"][0], first["trunk"][0] + second["trunk"][0])
    torch.testing.assert_close(both["trunk"][1], first["trunk"][1])
    for name, alone in (("one", first), ("two", second)):
        for got, want in zip(both[name], alone[name], strict=True):
            torch.testing.assert_close(got, want)
    if not positions:  # else the signs of the terms of an example meet: equal on average
        torch.testing.assert_close(form, first_form + second_form)


def test_sampled_labels_of_two_heads_have_that_sum_on_average():
    model, x = TwoHeads(positions=True).to(DTYPE), torch.randn(7, 5, 4, dtype=DTYPE)
    both, _ = exact(model, x, (0, 1))
    opt = RING(model, lr=0.0, sharing="expand", refresh_every=1, factor_decay=0.9999)
    for _ in range(500):
        outputs = model(x)
        for o in outputs:
            opt.observe(o)
        sum(o.square().mean() for o in outputs).backward()
        opt.step()
        opt.zero_grad()
    for name, p in (("trunk", model.trunk.weight), ("two", model.two.weight)):
        want, got = both[name][0], opt.state[p]["output_factor"]
        assert (got - want).abs().max() < 0.2 * want.abs().max(), name


@pytest.mark.parametrize("fisher", ["sampled", "exact", "empirical"])
def test_outputs_that_are_observed_twice_count_once(fisher):
    model, x = nn.Linear(4, 3).to(DTYPE), torch.randn(7, 4, dtype=DTYPE)
    factors = []
    for times in (1, 2):
        opt = RING(model, lr=0.0, fisher=fisher)
        outputs = model(x)
        for _ in range(times):
            opt.observe(outputs)
        outputs.square().mean().backward()
        opt.step()
        opt.zero_grad()
        factors.append(opt.state[model.weight]["output_factor"])
    assert torch.equal(*factors)


class Checkpointed(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return checkpoint(self.net, x, use_reentrant=False)


@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "checkpoint"])
@pytest.mark.parametrize("observed", [(0, 1), (1, 0), (0,)], ids=str)
def test_two_optimizers_on_one_model_see_what_each_alone_would(observed, recompute):
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(DTYPE)
    x, y = torch.randn(8, 4, dtype=DTYPE), torch.arange(8) % 3

    def train(model, make, order):
        opts = [cls(model, lr=0.0) for cls in make]
        called = Checkpointed(model) if recompute else model
        out = called(x)
        for i in order:
            opts[i].observe(out)
        F.cross_entropy(out, y).backward()
        for opt in opts:
            opt.step()
        return [
            [
                opt.state[model[k].weight][f"{side}_factor"]
                for k in (0, 2)
                for side in ("output", "input")
            ]
            for opt in opts
        ]

    together = train(copy.deepcopy(net), (RING, KFAC), observed)
    for i, cls in enumerate((RING, KFAC)):
        (alone,) = train(copy.deepcopy(net), (cls,), (0,) if i in observed else ())
        for got, want in zip(together[i], alone, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_each_optimizer_trains_its_part():
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    body, head = RING(net[0]), KFAC(net[2])
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    for _ in range(3):
        before = [p.detach().clone() for p in net.parameters()]
        out = net(x)
        for opt in (body, head):
            opt.observe(out)
        F.cross_entropy(out, y).backward()
        for opt in (body, head):
            opt.step()
            opt.zero_grad()
        for p, old in zip(net.parameters(), before, strict=True):
            assert not torch.equal(p, old)
    assert body._fisher == head._fisher == "sampled labels"
