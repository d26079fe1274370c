# SPDX-License-Identifier: Apache-2.0
"""RENG's gradient against Hessian-vector products in fp64, and what it leaves as it was."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.functional import hvp
from torch.func import functional_call

from grng import RENG, RING
from grng.optim import reng


def batch(rows=20, dtype=torch.float64):
    return torch.randn(rows, 2, 6, dtype=dtype), torch.randint(0, 3, (rows,))


class Net(nn.Module):
    """A frozen bias, and a parameter that is not used: neither has a gradient."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))
        self.idle = nn.Parameter(torch.ones(2))
        self.body[0].bias.requires_grad_(False)
        self.to(dtype)

    def forward(self, x):
        return self.body(x)


def used(net):
    return {n: p for n, p in net.named_parameters() if p.requires_grad and n != "idle"}


def gradient_and_product(net, loss_of):
    """∇L and H·∇L at the weights of a net, by torch.autograd.functional.hvp."""
    names, values = zip(*((n, p.detach().clone()) for n, p in used(net).items()), strict=True)

    def f(*args):
        return loss_of(lambda x: functional_call(net, dict(zip(names, args, strict=True)), (x,)))

    loss = f(*(v.requires_grad_() for v in values))
    grads = torch.autograd.grad(loss, values)
    _, products = hvp(f, values, grads)
    return loss.detach(), grads, products


def difference(net, loss_of, length):
    """What the finite difference of gradients gives for H·∇L: from a point ``length`` along ∇L."""
    grads = torch.autograd.grad(loss_of(net), list(used(net).values()))
    norm = torch.cat([g.reshape(-1) for g in grads]).norm()
    other = copy.deepcopy(net)
    with torch.no_grad():
        for p, g in zip(used(other).values(), grads, strict=True):
            p.add_(g * length / norm)
    ahead = torch.autograd.grad(loss_of(other), list(used(other).values()))
    return [(a - g) * norm / length for a, g in zip(ahead, grads, strict=True)]


def found(net):
    return [p.grad for p in used(net).values()]


@pytest.mark.parametrize("as_closure", [False, True], ids=["loss", "closure"])
@pytest.mark.parametrize("rho_gr", [0.3, 5.0])
def test_double_backprop_adds_the_hessian_vector_product(rho_gr, as_closure):
    net, (x, y) = Net(), batch()
    loss, grads, products = gradient_and_product(net, lambda f: F.cross_entropy(f(x), y))
    opt = RENG(net, rho_gr=rho_gr)

    def closure():
        return F.cross_entropy(net(x), y)

    value = opt.backward(closure if as_closure else closure())
    assert torch.equal(value, loss) and not value.requires_grad
    assert net.idle.grad is None and net.body[0].bias.grad is None
    for got, g, h in zip(found(net), grads, products, strict=True):
        assert (rho_gr * h).abs().max() > 1e-3 * g.abs().max()
        torch.testing.assert_close(got, g + rho_gr * h, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("rho_gr", [0.3, 5.0])
def test_the_finite_difference_is_exact_but_for_its_length(rho_gr, monkeypatch):
    net, (x, y) = Net(), batch()

    def loss_of(f):
        return F.cross_entropy(f(x), y)

    loss, grads, products = gradient_and_product(net, loss_of)
    errors = []
    size = torch.cat([p.detach().reshape(-1) for p in used(net).values()]).norm()
    default = reng.RELATIVE_LENGTH
    for relative in (default, default / 10):
        monkeypatch.setattr(reng, "RELATIVE_LENGTH", relative)
        length = relative * size
        opt = RENG(net, rho_gr=rho_gr, method="finite_difference")
        assert torch.equal(opt.backward(lambda: loss_of(net)), loss)
        wanted = difference(net, loss_of, length)
        for got, g, h in zip(found(net), grads, wanted, strict=True):
            torch.testing.assert_close(got, g + rho_gr * h, rtol=1e-6, atol=1e-7)
        error = [
            got - g - rho_gr * h for got, g, h in zip(found(net), grads, products, strict=True)
        ]
        errors.append(torch.cat([e.reshape(-1) for e in error]).norm())
        opt.zero_grad()
    size = rho_gr * torch.cat([h.reshape(-1) for h in products]).norm()
    # The error is of first order in the length.
    assert errors[0] < 0.1 * size
    assert errors[1] < 0.15 * errors[0]


def test_the_finite_difference_is_double_backprop_but_for_a_few_percent():
    net, (x, y) = Net(), batch()
    found_by = {}
    for method in reng.METHODS:
        opt = RENG(net, rho_gr=3.0, method=method)
        opt.backward(lambda: F.cross_entropy(net(x), y))
        found_by[method] = torch.cat([g.reshape(-1) for g in found(net)])
        opt.zero_grad()
    F.cross_entropy(net(x), y).backward()
    plain = torch.cat([g.reshape(-1) for g in found(net)])
    exact, near = (found_by[m] - plain for m in reng.METHODS)
    assert (near - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_length_of_the_difference_follows_the_weights(scale):
    # The same function of weights that are scaled: H·∇L scales with 1/scale³, its relative error does not.
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.randint(0, 3, (9,))
    start = nn.Linear(4, 3).double()
    errors = []
    for factor in (1.0, scale):
        layer = copy.deepcopy(start)
        with torch.no_grad():
            for p in layer.parameters():
                p.mul_(factor)
        products = {}
        for method in reng.METHODS:
            opt = RENG(layer, rho_gr=1.0, method=method)
            opt.backward(lambda layer=layer, factor=factor: F.cross_entropy(layer(x) / factor, y))
            opt_grad = layer.weight.grad.clone()
            opt.zero_grad()
            F.cross_entropy(layer(x) / factor, y).backward()
            products[method] = opt_grad - layer.weight.grad
            opt.zero_grad()
        exact, near = (products[m] for m in reng.METHODS)
        errors.append(((near - exact).norm() / exact.norm()).item())
    # The bias scales too: ∇L is that of a fixed function, so that the directions agree.
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)


def test_the_finite_difference_from_zero_weights():
    layer = nn.Linear(4, 3).double()
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.randint(0, 3, (9,))
    grads = []
    for method in reng.METHODS:
        opt = RENG(layer, rho_gr=1.0, method=method)
        opt.backward(lambda: F.cross_entropy(layer(x), y))
        grads.append(layer.weight.grad.clone())
        opt.zero_grad()
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-2, atol=1e-3)


def test_the_finite_difference_is_refused_with_several_processes(monkeypatch):
    net, (x, y) = Net(), batch()
    opt = RENG(net, method="finite_difference")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match=r"is for one process, there are 2: .*double_backprop"):
        opt.backward(lambda: F.cross_entropy(net(x), y))
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")
def test_double_backprop_under_ddp():
    net, (x, y) = Net(), batch()
    twin = copy.deepcopy(net)

    def train():
        wrapped = nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)
        for model, owner in ((wrapped, net), (twin, twin)):
            RENG(owner, rho_gr=2.0).backward(F.cross_entropy(model(x), y))

    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        train()
        # Its buckets must be gone before the group is: else its end can wait for the interpreter's lock.
        gc.collect()
    finally:
        torch.distributed.destroy_process_group()
    for got, want in zip(found(net), found(twin), strict=True):
        torch.testing.assert_close(got, want)


def test_the_finite_difference_is_exact_for_a_quadratic_loss():
    layer = nn.Linear(4, 2).double()
    x = torch.randn(9, 4, dtype=torch.float64)
    grads = {}
    for method in ("double_backprop", "finite_difference"):
        opt = RENG(layer, rho_gr=0.7, method=method)
        opt.backward(lambda: layer(x).square().sum())
        grads[method] = layer.weight.grad.clone()
        opt.zero_grad()
    torch.testing.assert_close(
        grads["finite_difference"], grads["double_backprop"], rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("method", reng.METHODS)
def test_micro_batches_add_up(method):
    net, (x, y) = Net(), batch(rows=12)
    opt = RENG(net, rho_gr=2.0, method=method)
    sums = None
    for rows in (slice(0, 4), slice(4, 12)):
        twin = copy.deepcopy(net)
        twin.zero_grad()
        alone = RENG(twin, rho_gr=2.0, method=method)
        alone.backward(lambda f=twin, r=rows: F.cross_entropy(f(x[r]), y[r]) / 2)
        sums = (
            found(twin) if sums is None else [a + b for a, b in zip(sums, found(twin), strict=True)]
        )
        opt.backward(lambda r=rows: F.cross_entropy(net(x[r]), y[r]) / 2)
    for got, want in zip(found(net), sums, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    # As with loss.backward(), gradients stay until they are cleared.
    (held,) = (p for n, p in net.named_parameters() if n == "body.3.weight")
    before = held.grad.clone()
    opt.backward(lambda: F.cross_entropy(net(x), y))
    assert not torch.equal(held.grad, before)


class Noisy(nn.Module):
    """Batch normalisation and dropout: a buffer and a random number in every forward pass."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.drop, self.last = nn.Dropout(0.5), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.drop(self.norm(self.first(x)).tanh()))


def test_the_finite_difference_sees_the_same_dropout_and_leaves_no_trace():
    model = Noisy()
    twin, x, y = copy.deepcopy(model), torch.randn(16, 6), torch.randint(0, 3, (16,))
    before = copy.deepcopy(model.state_dict())
    opt = RENG(model, rho_gr=0.1, method="finite_difference")
    calls = []

    def closure():
        outputs = model(x)
        calls.append(outputs.detach())
        return F.cross_entropy(outputs, y)

    torch.manual_seed(7)
    opt.backward(closure)
    after_random, after = torch.get_rng_state(), model.state_dict()
    torch.manual_seed(7)
    expected = twin(x)
    assert torch.equal(torch.get_rng_state(), after_random), "as after one forward pass"
    assert torch.equal(calls[0], expected)
    # The masks are the same, so that the outputs of two near points are near.
    assert len(calls) == 2 and not torch.equal(calls[0], calls[1])
    assert (calls[0] - calls[1]).abs().max() < 0.2
    for name, value in twin.state_dict().items():
        assert torch.equal(after[name], value), name
    for name, _ in model.named_parameters():
        assert torch.equal(after[name], before[name]), name
    assert after["norm.num_batches_tracked"] == 1


def test_everything_is_restored_when_the_second_pass_fails():
    model = Noisy()
    x, y = torch.randn(16, 6), torch.randint(0, 3, (16,))
    opt = RENG(model, method="finite_difference")
    calls = []

    def closure():
        outputs = model(x)
        calls.append(copy.deepcopy(model.norm.state_dict()))
        if len(calls) == 2:
            raise KeyError("the second pass")
        return F.cross_entropy(outputs, y)

    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(KeyError, match="the second pass"):
        opt.backward(closure)
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, old)
    for name, value in model.norm.state_dict().items():
        assert torch.equal(value, calls[0][name]), name
    # Recording goes on.
    opt.zero_grad()
    calls.extend([None] * 5)
    opt.backward(closure)
    opt.step()
    assert opt.state[model.first.weight]["input_updates"] == 1


@pytest.mark.parametrize("method", reng.METHODS)
@pytest.mark.parametrize("fisher", ["sampled", "exact", "empirical"])
def test_the_curvature_is_that_of_the_loss_without_penalty(method, fisher):
    net, (x, y) = Net(), batch()
    twin = copy.deepcopy(net)
    opt = RENG(net, lr=0.0, rho_gr=3.0, method=method, fisher=fisher)
    other = RING(twin, lr=0.0, fisher=fisher)

    def closure():
        logits = net(x)
        opt.observe(logits)
        return F.cross_entropy(logits, y)

    for _ in range(2):
        opt.backward(closure)
        opt.step()
        opt.zero_grad()
        logits = twin(x)
        other.observe(logits)
        F.cross_entropy(logits, y).backward()
        other.step()
        other.zero_grad()
    for a, b in ((net.body[0], twin.body[0]), (net.body[3], twin.body[3])):
        for key in ("input_factor", "output_factor"):
            got, want = opt.state[a.weight][key], other.state[b.weight][key]
            assert want.any()
            torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    assert opt.explain().replace("RENG", "RING") == other.explain()


@pytest.mark.parametrize("method", reng.METHODS)
def test_without_a_penalty_it_is_ring(method):
    net, (x, y) = Net(torch.float32), batch(dtype=torch.float32)
    twin = copy.deepcopy(net)
    opt, other = RENG(net, rho_gr=0.0, method=method, lr=0.01), RING(twin, lr=0.01)
    for _ in range(4):

        def closure():
            logits = net(x)
            opt.observe(logits)
            return F.cross_entropy(logits, y)

        opt.backward(closure)
        logits = twin(x)
        other.observe(logits)
        F.cross_entropy(logits, y).backward()
        for o in (opt, other):
            o.step()
            o.zero_grad()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("method", reng.METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_training_lowers_the_loss(method, dtype):
    torch.manual_seed(0)
    net, (x, _) = Net(dtype), batch(rows=64, dtype=dtype)
    y = (x.float().flatten(1) @ torch.randn(12, 3)).argmax(1)
    opt = RENG(net, lr=0.02, rho_gr=0.05, method=method)
    losses = []
    for _ in range(25):

        def closure():
            logits = net(x)
            opt.observe(logits)
            return F.cross_entropy(logits.float(), y)

        losses.append(opt.backward(closure).item())
        opt.step()
        opt.zero_grad()
    assert losses[-1] < 0.6 * losses[0], losses


@pytest.mark.parametrize("method", reng.METHODS)
def test_at_a_stationary_point_the_gradient_is_zero(method):
    layer = nn.Linear(3, 2)
    opt = RENG(layer, method=method)
    opt.backward(lambda: layer(torch.ones(4, 3)).sum() * 0)
    assert not layer.weight.grad.any()


@pytest.mark.parametrize("method", reng.METHODS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_a_bad_step(method, value):
    net, (x, y) = Net(torch.float32), batch(dtype=torch.float32)
    opt = RENG(net, method=method)
    before = [p.detach().clone() for p in net.parameters()]
    opt.backward(lambda: F.cross_entropy(net(x), y) * value)
    opt.step()
    for p, old in zip(net.parameters(), before, strict=True):
        assert torch.equal(p, old)
    assert opt.diagnostics()["skipped_steps_in_a_row"] == 1


def test_errors_say_what_is_wrong():
    net, (x, y) = Net(), batch()
    with pytest.raises(ValueError, match="RENG: method must be one of double_backprop, finite_"):
        RENG(net, method="x")
    with pytest.raises(ValueError, match=r"RENG: rho_gr must be a number in \[0\.0, inf\), got -1"):
        RENG(net, rho_gr=-1)
    with pytest.raises(ValueError, match="RENG: rho must be a number"):
        RENG(net, rho=0.0)
    opt = RENG(net, method="finite_difference")
    with pytest.raises(TypeError, match="loss must be a closure that returns the loss, got Tensor"):
        opt.backward(F.cross_entropy(net(x), y))
    for method in reng.METHODS:
        opt = RENG(net, method=method)
        with pytest.raises(ValueError, match=r"loss must be one number, got shape \[20\]"):
            opt.backward(lambda: F.cross_entropy(net(x), y, reduction="none"))
        assert all(p.grad is None for p in net.parameters())
