# SPDX-License-Identifier: Apache-2.0
"""Models under torch.compile: statistics come through, at the price of a graph break after each layer."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from grng import RING

testing = pytest.importorskip("torch._dynamo.testing")
CLASSES = 3


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES))


def train(model, opt, steps):
    for k in steps:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(k))
        out = model(x)
        opt.observe(out)
        F.cross_entropy(out, torch.arange(8) % CLASSES).backward()
        opt.step()
        opt.zero_grad()


def compiled(order, model, backend):
    """The callable to train, and its optimizer, made in one of the usual orders."""
    if order == "optimizer first":
        opt = RING(model, refresh_every=3)
        return torch.compile(model, backend=backend), opt
    if order == "compiler first":
        called = torch.compile(model, backend=backend)
        return called, RING(model, refresh_every=3)
    if order == "of the compiled model":
        called = torch.compile(model, backend=backend)
        return called, RING(called, refresh_every=3)
    opt = RING(model, refresh_every=3)
    model.compile(backend=backend)
    return model, opt


@pytest.mark.parametrize(
    "order", ["optimizer first", "compiler first", "of the compiled model", "in place"]
)
def test_a_compiled_model_is_trained_as_the_plain_one(order):
    counter = testing.CompileCounterWithBackend("aot_eager")
    plain, model = net(), net()
    reference = RING(plain, refresh_every=3)
    called, opt = compiled(order, model, counter)
    train(called, opt, range(2))
    compiles = counter.frame_count
    assert compiles > 0
    train(called, opt, range(2, 14))
    assert counter.frame_count == compiles, "the step count must not make it compile again"
    train(plain, reference, range(14))
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert "sampled labels" in opt.explain()


def test_one_graph_for_the_whole_model_is_refused_with_the_reason():
    model = net()
    opt = RING(model)
    called = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(
        Exception, match="grng takes statistics between the layers: use fullgraph=False"
    ):
        called(torch.randn(8, 4))
    del opt


def test_a_model_that_ran_compiled_before_is_left_to_adamw_with_a_warning():
    model = net()
    called = torch.compile(model, backend="eager", fullgraph=True)
    called(torch.randn(8, 4))
    opt = RING(model)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.warns(RuntimeWarning, match="no statistics reached 0, 2 .*compiled before"):
        train(called, opt, range(1))
    for p, old in zip(model.parameters(), before, strict=True):
        assert not torch.equal(p, old)
    # As the warning says: what was compiled is forgotten, and the next call sees the hooks.
    torch._dynamo.reset()
    fresh = RING(model)
    train(torch.compile(model, backend="eager"), fresh, range(1))
    assert "sampled labels" in fresh.explain()


def test_the_hooks_of_a_discarded_optimizer_break_no_graph():
    model = net()
    RING(model)
    torch.compile(model, backend="eager", fullgraph=True)(torch.randn(8, 4))
