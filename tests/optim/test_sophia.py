# SPDX-License-Identifier: Apache-2.0
"""SophiaG and SophiaH against their equations in fp64, exact Hessians, and their promises to a loop."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import grng.optim.sophia
from grng import PreconditionerError, SophiaG, SophiaH

BOTH = pytest.mark.parametrize("cls", [SophiaG, SophiaH])


def make_net(dtype=torch.float64):
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)).to(dtype)


def batch(rows=40, dtype=torch.float64):
    return torch.randn(rows, 6, dtype=dtype), torch.randint(0, 3, (rows,))


def train_step(net, opt, x, y, *, observe=True):
    logits = net(x)
    loss = F.cross_entropy(logits, y)
    if observe:
        opt.observe(loss if isinstance(opt, SophiaH) else logits)
    loss.backward()
    opt.step()
    opt.zero_grad()
    return loss.item()


def twin_of(net):
    return copy.deepcopy(net)


def sampled_labels(logits, step):
    generator = torch.Generator().manual_seed(step)
    return torch.multinomial(logits.detach().float().softmax(-1), 1, generator=generator).squeeze(1)


def flat_grad(loss, params, **kwargs):
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, params, **kwargs)])


def hessian(loss, params):
    """Dense Hessian, row by row."""
    grad = flat_grad(loss, params, create_graph=True)
    return torch.stack([flat_grad(g, params, retain_graph=True) for g in grad])


def flat(params):
    return torch.cat([p.detach().reshape(-1) for p in params])


def read_into(params, vector):
    with torch.no_grad():
        torch.nn.utils.vector_to_parameters(vector, params)


def hand_written(net, batches, curvature, *, lr, betas, gamma, eps, wd, k):
    """The paper's loop over one flat vector; ``curvature(net, x, y, step)`` gives the estimate."""
    params = list(net.parameters())
    theta = flat(params)
    m, h = torch.zeros_like(theta), torch.zeros_like(theta)
    for t, (x, y) in enumerate(batches):
        g = flat_grad(F.cross_entropy(net(x), y), params)
        m = betas[0] * m + (1 - betas[0]) * g
        if t % k == 0:
            h = betas[1] * h + (1 - betas[1]) * curvature(net, x, y, t)
        theta = theta - lr * wd * theta
        scale = torch.where(gamma * h > eps, gamma * h, torch.full_like(h, eps))
        theta = theta - lr * (m / scale).clamp(-1, 1)
        read_into(params, theta)
    return theta, m, h


def gnb(net, x, y, step):
    logits = net(x)
    mean = F.cross_entropy(logits, sampled_labels(logits, step))
    return len(x) * flat_grad(mean, list(net.parameters())) ** 2


def hutchinson(net, x, y, step):
    params = list(net.parameters())
    generator = torch.Generator().manual_seed(step)
    u = torch.cat(
        [torch.randn(p.shape, generator=generator, dtype=p.dtype).reshape(-1) for p in params]
    )
    return u * (hessian(F.cross_entropy(net(x), y), params) @ u)


@pytest.mark.parametrize(
    ("cls", "curvature"), [(SophiaG, gnb), (SophiaH, hutchinson)], ids=["g", "h"]
)
def test_steps_follow_the_equations(cls, curvature):
    net = make_net()
    twin = twin_of(net)
    batches = [batch() for _ in range(7)]
    # So that some coordinates are clipped and some are not.
    gamma, eps = 1.0, 1e-3
    settings = dict(lr=0.02, betas=(0.9, 0.8), gamma=gamma, eps=eps)
    opt = cls(net, **settings, weight_decay=0.3, refresh_every=3)
    for x, y in batches:
        train_step(net, opt, x, y)
    theta, m, h = hand_written(twin, batches, curvature, **settings, wd=0.3, k=3)
    torch.testing.assert_close(flat(net.parameters()), theta, rtol=1e-12, atol=1e-13)
    for key, value in (("exp_avg", m), ("hessian", h)):
        got = flat([opt.state[p][key] for p in net.parameters()])
        torch.testing.assert_close(got, value, rtol=1e-11, atol=1e-14)
    clipped = (m.abs() >= (gamma * h).clamp(min=eps)).double().mean()
    assert 0.1 < clipped < 0.9, "the test must see both sides of the clip"
    assert opt.diagnostics()["unclipped"] == pytest.approx(1 - float(clipped))


def softmax_regression(rows=12):
    net = nn.Linear(4, 3, bias=False).double()
    x = torch.randn(rows, 4, dtype=torch.float64)
    return net, x


def exact_diagonal(net, x):
    """Of the mean cross entropy, whose Hessian is the Gauss-Newton matrix: mean_n x_j² q_c (1 − q_c)."""
    q = net(x).detach().softmax(-1)
    return (q * (1 - q)).T @ x.square() / len(x)


def test_g_estimates_the_exact_diagonal_without_bias():
    net, x = softmax_regression()
    exact = exact_diagonal(net, x)
    labels = torch.randint(0, 3, (len(x),))
    dense = hessian(F.cross_entropy(net(x), labels), [net.weight]).diagonal()
    torch.testing.assert_close(exact.reshape(-1), dense, rtol=1e-12, atol=0)
    draws = 3000
    opt = SophiaG(net, betas=(0.9, 0.0), refresh_every=1, lr=0.0)
    estimates = []
    for step in range(draws):
        opt.param_groups[0]["step"] = step
        opt.observe(net(x))
        estimates.append(opt._estimates()[net.weight])
        opt._forget()
    estimates = torch.stack(estimates)
    error = (estimates.mean(0) - exact) / (estimates.std(0) / draws**0.5)
    assert error.abs().max() < 4.5, error
    assert (estimates.std(0) / exact / draws**0.5).max() < 0.1, "the test could not see a bias"


def test_g_counts_the_loss_terms_from_the_outputs():
    # [batch, positions, classes] are batch x positions terms, whatever their arrangement.
    net, x = softmax_regression(rows=12)
    flat_opt, shaped = SophiaG(net), SophiaG(net)
    flat_opt.observe(net(x))
    shaped.observe(net(x.view(3, 4, 4)))
    assert flat_opt._terms == shaped._terms == 12
    a, b = (o._estimates()[net.weight] for o in (flat_opt, shaped))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_h_of_a_diagonal_quadratic_is_exact():
    w = nn.Parameter(torch.randn(50, dtype=torch.float64))
    curvature = torch.randn(50, dtype=torch.float64)
    opt = SophiaH([w], betas=(0.9, 0.0))
    loss = (curvature * w.square()).sum() / 2
    opt.observe(loss)
    loss.backward()
    opt.step()
    u = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(opt.state[w]["hessian"], u**2 * curvature, rtol=1e-14, atol=0)


def test_h_estimates_the_exact_diagonal_without_bias():
    net, x = softmax_regression()
    exact = exact_diagonal(net, x)
    labels = torch.randint(0, 3, (len(x),))
    opt = SophiaH(net, refresh_every=1)
    draws, estimates = 3000, []
    for step in range(draws):
        opt.param_groups[0]["step"] = step
        opt.observe(F.cross_entropy(net(x), labels))
        estimates.append(opt._estimates()[net.weight])
        opt._forget()
    estimates = torch.stack(estimates)
    error = (estimates.mean(0) - exact) / (estimates.std(0) / draws**0.5)
    assert error.abs().max() < 4.5, error


def test_h_takes_the_sign_where_the_curvature_is_negative():
    w = nn.Parameter(torch.tensor([0.5, -2.0], dtype=torch.float64))
    opt = SophiaH([w], lr=0.1, weight_decay=0.0)
    loss = -w.square().sum() / 2
    opt.observe(loss)
    loss.backward()
    opt.step()
    torch.testing.assert_close(w.detach(), torch.tensor([0.6, -2.1], dtype=torch.float64))


def published(net, batches, *, form, bs, lr, rho=None, gamma=None, betas, wd, k):
    """SophiaG in the two public parametrisations: h without B, steps by sign and clipped ratio."""
    params = list(net.parameters())
    theta = flat(params)
    m, h = torch.zeros_like(theta), torch.zeros_like(theta)
    for t, (x, y) in enumerate(batches):
        m = betas[0] * m + (1 - betas[0]) * flat_grad(F.cross_entropy(net(x), y), params)
        if t % k == 0:
            h = betas[1] * h + (1 - betas[1]) * gnb(net, x, y, t) / bs
        if form == "release":
            ratio = (m.abs() / (rho * bs * h + 1e-15)).clamp(max=1)
        else:
            ratio = (m.abs() / (h + 1e-15)).clamp(max=gamma)
        theta = theta * (1 - lr * wd) - lr * m.sign() * ratio
        read_into(params, theta)
    return theta


def test_the_two_published_parametrisations_are_this_one():
    rows, rho, lr, wd = 40, 0.8, 0.02, 0.3
    batches = [batch(rows) for _ in range(6)]
    net = make_net()
    shared = dict(betas=(0.9, 0.8), k=2, bs=rows)
    release = published(
        twin_of(net), batches, form="release", lr=lr, rho=rho, wd=wd, **shared
    )  # fmt: skip
    gamma = rho * rows
    snapshot = published(
        twin_of(net), batches, form="snapshot", lr=lr / gamma, gamma=gamma, wd=wd * gamma, **shared
    )
    for mapped in (
        dict(lr=lr, gamma=rho, weight_decay=wd),
        # From the snapshot's: lr·gamma, gamma/B, weight_decay/gamma.
        dict(lr=lr / gamma * gamma, gamma=gamma / rows, weight_decay=wd * gamma / gamma),
    ):
        mine = twin_of(net)
        opt = SophiaG(mine, betas=(0.9, 0.8), refresh_every=2, **mapped)
        for x, y in batches:
            train_step(mine, opt, x, y)
        assert 0.1 < opt.diagnostics()["unclipped"] < 0.9
        for theirs in (release, snapshot):
            torch.testing.assert_close(flat(mine.parameters()), theirs, rtol=1e-9, atol=1e-11)


def test_micro_batches_of_g_are_one_large_batch(monkeypatch):
    # Drawn labels differ between one draw of 32 and two of 16: use labels that are fixed.
    drawn = []

    def fixed(outputs, likelihood, generator):
        return F.cross_entropy(outputs, drawn.pop(0), reduction="sum")

    monkeypatch.setattr(grng.optim.sophia, "sampled_loss", fixed)
    net, (x, y) = make_net(), batch(rows=32)
    twin = twin_of(net)
    opt, other = SophiaG(net, lr=0.01), SophiaG(twin, lr=0.01)
    labels = torch.randint(0, 3, (32,))
    drawn += [labels, labels[:12], labels[12:]]
    train_step(net, opt, x, y)
    for part in (slice(0, 12), slice(12, 32)):
        logits = twin(x[part])
        other.observe(logits)
        (F.cross_entropy(logits, y[part], reduction="sum") / 32).backward()
    other.step()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13)
        a, b = opt.state[p]["hessian"], other.state[q]["hessian"]
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-16)


def test_micro_batches_of_h_are_one_large_batch():
    net, (x, y) = make_net(), batch(rows=32)
    twin = twin_of(net)
    opt, other = SophiaH(net, lr=0.01), SophiaH(twin, lr=0.01)
    train_step(net, opt, x, y)
    for part in (slice(0, 12), slice(12, 32)):
        loss = F.cross_entropy(twin(x[part]), y[part], reduction="sum") / 32
        other.observe(loss)
        loss.backward()
    other.step()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13)
        a, b = opt.state[p]["hessian"], other.state[q]["hessian"]
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-15)


def test_micro_batches_of_g_draw_different_labels():
    net = nn.Linear(1, 64, bias=False)
    opt = SophiaG(net)
    grads = []
    for _ in range(2):
        before = opt._sums.get(net.weight, torch.zeros(64, 1)).clone()
        opt.observe(net(torch.ones(1, 1)))
        grads.append(opt._sums[net.weight] - before)
    assert not torch.equal(*grads)


@BOTH
def test_observe_is_free_between_refreshes_and_made_up_when_missed(cls, monkeypatch):
    calls = []
    real = torch.autograd.grad

    def counted(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs)

    net, (x, y) = make_net(), batch()
    opt = cls(net, refresh_every=4)
    monkeypatch.setattr(torch.autograd, "grad", counted)
    seen = []
    for step in range(14):
        calls.clear()
        # Steps 4 and 5 go without: step 6 makes up for them, and the next is 4 steps later.
        train_step(net, opt, x, y, observe=step not in (4, 5))
        seen.append(bool(calls))
    assert [i for i, s in enumerate(seen) if s] == [0, 6, 10]


@BOTH
def test_observe_leaves_gradients_and_random_state_alone(cls):
    net, (x, y) = make_net(), batch()
    opt = cls(net)
    loss = F.cross_entropy(net(x), y)
    state = torch.get_rng_state()
    opt.observe(loss if cls is SophiaH else net(x))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in net.parameters())
    loss.backward()


def test_without_observe_the_step_is_the_sign_of_the_momentum():
    net, (x, y) = make_net(), batch()
    opt = SophiaG(net, lr=0.01, weight_decay=0.0)
    before = flat(net.parameters())
    train_step(net, opt, x, y, observe=False)
    moved = flat(net.parameters()) - before
    torch.testing.assert_close(moved.abs(), torch.full_like(moved, 0.01))


def assert_same_state(a, b, *, but=()):
    for x, y in zip(a["param_groups"], b["param_groups"], strict=True):
        assert {k: v for k, v in x.items() if k not in but} == {
            k: v for k, v in y.items() if k not in but
        }
    assert a["state"].keys() == b["state"].keys()
    for key, entry in a["state"].items():
        for name, value in entry.items():
            other = b["state"][key][name]
            assert torch.equal(value, other) and value.dtype == other.dtype, name


@BOTH
def test_nonfinite_gradient_changes_nothing_and_raises_after_three(cls):
    net, (x, y) = make_net(torch.float32), batch(dtype=torch.float32)
    opt = cls(net, refresh_every=1)
    train_step(net, opt, x, y)
    before, state = flat(net.parameters()), copy.deepcopy(opt.state_dict())
    for attempt in range(4):
        logits = net(x)
        loss = F.cross_entropy(logits, y)
        opt.observe(loss if cls is SophiaH else logits)
        loss.backward()
        net[2].weight.grad[0, 0] = float("nan")
        if attempt < 3:
            opt.step()
        else:
            with pytest.raises(
                PreconditionerError, match=r"in 4 steps in a row.*2\.weight \[3, 5\]"
            ):
                opt.step()
        opt.zero_grad()
    assert torch.equal(flat(net.parameters()), before)
    assert_same_state(opt.state_dict(), state, but=["skipped_steps"])
    assert opt.diagnostics()["skipped_steps"] == 4
    train_step(net, opt, x, y)
    assert opt.diagnostics()["skipped_steps_in_a_row"] == 0
    assert not torch.equal(flat(net.parameters()), before)


@BOTH
def test_nonfinite_statistics_are_dropped_and_counted(cls):
    net, (x, y) = make_net(torch.float32), batch(dtype=torch.float32)
    opt = cls(net, refresh_every=1)
    train_step(net, opt, x, y)
    kept = flat([opt.state[p]["hessian"] for p in net.parameters()])
    before = flat(net.parameters())
    logits = net(x)
    loss = F.cross_entropy(logits, y)
    opt.observe((loss if cls is SophiaH else logits) * float("nan"))
    loss.backward()
    opt.step()
    assert torch.equal(flat([opt.state[p]["hessian"] for p in net.parameters()]), kept)
    assert opt.diagnostics()["dropped_statistics"] == 1
    assert not torch.equal(flat(net.parameters()), before)
    assert torch.isfinite(flat(net.parameters())).all()


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_resume_equals_the_uninterrupted_run(cls, dtype, tmp_path):
    def build():
        torch.manual_seed(3)
        net = make_net(dtype)
        return net, cls(net, lr=0.01, refresh_every=3)

    x, y = batch(dtype=dtype)
    net, opt = build()
    for step in range(11):
        if step == 5:
            torch.save({"net": net.state_dict(), "opt": opt.state_dict()}, tmp_path / "c.pt")
        train_step(net, opt, x, y)
    other, resumed = build()
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    other.load_state_dict(saved["net"])
    resumed.load_state_dict(saved["opt"])
    assert {v.dtype for s in resumed.state.values() for v in s.values()} == {torch.float32}
    for _ in range(5, 11):
        train_step(other, resumed, x, y)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    assert_same_state(opt.state_dict(), resumed.state_dict())


@BOTH
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_steps_its_own_parameters(cls, way):
    net, (x, y) = make_net(), batch()
    opt = cls(net, lr=0.01, refresh_every=2)
    torch.optim.lr_scheduler.ConstantLR(opt, 1.0)  # puts a step() of its own on the instance
    train_step(net, opt, x, y)
    pair = (net, opt)
    other, copied = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
    before = flat(net.parameters())
    for _ in range(3):
        train_step(other, copied, x, y)
    assert torch.equal(flat(net.parameters()), before)
    for _ in range(3):
        train_step(net, opt, x, y)
    assert torch.equal(flat(net.parameters()), flat(other.parameters()))
    assert_same_state(opt.state_dict(), copied.state_dict())


@BOTH
def test_groups_scheduler_and_closure(cls):
    net, (x, y) = make_net(), batch()
    groups = [
        {"params": net[0].parameters(), "lr": 0.0},
        {"params": net[2].parameters(), "weight_decay": 0.0},
    ]
    opt = cls(groups, lr=torch.tensor(0.02), gamma=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    before = [p.detach().clone() for p in net.parameters()]

    def closure():
        opt.zero_grad()
        logits = net(x)
        loss = F.cross_entropy(logits, y)
        opt.observe(loss if cls is SophiaH else logits)
        loss.backward()
        return loss

    losses = []
    for _ in range(4):
        losses.append(opt.step(closure).item())
        scheduler.step()
    assert losses == sorted(losses, reverse=True)
    assert float(opt.param_groups[1]["lr"]) == pytest.approx(0.02 / 16)
    changed = [not torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True)]
    assert changed == [False, False, True]
    # No coordinate moves further than the learning rates allow.
    assert (net[2].weight - before[2]).abs().max() <= 0.02 * (1 + 0.5 + 0.25 + 0.125) + 1e-12


@BOTH
def test_a_head_that_is_not_used_keeps_its_state(cls):
    net = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)]).double()
    x, y = batch()
    opt = cls(net, refresh_every=1)
    train_step(net[0], opt, x, y)
    assert "hessian" not in opt.state.get(net[1].weight, {})
    train_step(net[1], opt, x, y)
    kept = {k: v.clone() for k, v in opt.state[net[1].weight].items()}
    before = net[1].weight.detach().clone()
    train_step(net[0], opt, x, y)
    assert torch.equal(net[1].weight, before)
    for key, value in kept.items():
        assert torch.equal(opt.state[net[1].weight][key], value)


@BOTH
def test_frozen_and_added_parameters(cls):
    net, (x, y) = make_net(), batch()
    opt = cls([net[0].weight, net[0].bias], lr=0.01)
    train_step(net, opt, x, y)
    opt.add_param_group({"params": [net[2].weight]})
    net[0].requires_grad_(False)
    before = [p.detach().clone() for p in net.parameters()]
    for _ in range(11):
        train_step(net, opt, x, y)
    changed = [not torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True)]
    assert changed == [False, False, True]
    assert opt.state[net[2].weight]["hessian"].any()


@BOTH
def test_low_precision_parameters_are_rounded_once(cls):
    net, (x, y) = make_net(torch.bfloat16), batch(dtype=torch.bfloat16)
    opt = cls(net, lr=0.01, weight_decay=0.5)
    before = flat(net.parameters()).float()
    train_step(net, opt, x, y)
    m = flat([opt.state[p]["exp_avg"] for p in net.parameters()])
    h = flat([opt.state[p]["hessian"] for p in net.parameters()])
    step = (m / (opt.param_groups[0]["gamma"] * h).clamp(min=1e-12)).clamp(-1, 1)
    expected = (before * (1 - 0.01 * 0.5) - 0.01 * step).bfloat16()
    torch.testing.assert_close(flat(net.parameters()), expected, rtol=0, atol=0)


def test_large_batches_stay_in_the_range_of_fp16():
    # The gradient of the sum over 40,000 terms is about 8e5, beyond fp16.
    rows, size = 40_000, 8000.0
    w = nn.Parameter(torch.zeros(1, 2, dtype=torch.float16))
    opt = SophiaG([w], betas=(0.9, 0.0))
    logits = torch.full((rows, 1), size, dtype=torch.float16) @ w
    opt.observe(logits)
    w.grad = torch.ones_like(w)
    opt.step()
    counts = torch.bincount(sampled_labels(torch.zeros(rows, 2), 0), minlength=2).double()
    total = size * (rows / 2 - counts)
    assert total.abs().max() > torch.finfo(torch.float16).max
    expected = total.square() / rows
    torch.testing.assert_close(opt.state[w]["hessian"][0].double(), expected, rtol=0.01, atol=0)


def test_large_finite_gradients_are_not_called_infinite():
    w = nn.Parameter(torch.ones(1000, 1000, dtype=torch.float16))
    opt = SophiaG([w], lr=0.1, weight_decay=0.0)
    for _ in range(5):
        w.grad = torch.full_like(w, 100.0)
        opt.step()
    assert opt.diagnostics()["skipped_steps"] == 0
    assert (w < 0.6).all()


def test_an_empty_batch_is_no_statistic():
    net = nn.Linear(4, 3)
    opt = SophiaG(net)
    opt.observe(net(torch.randn(0, 4)))
    assert not opt._sums
    net.weight.grad = torch.ones_like(net.weight)
    opt.step()
    assert opt.param_groups[0]["next_refresh"] == 0


def test_a_linear_loss_has_no_curvature():
    w = nn.Parameter(torch.ones(3))
    opt = SophiaH([w])
    loss = w.sum()
    opt.observe(loss)
    loss.backward()
    opt.step()
    assert torch.equal(opt.state[w]["hessian"], torch.zeros(3))
    assert opt.param_groups[0]["next_refresh"] == 10


@BOTH
@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("lr", -0.1, "lr must be a number in"),
        ("lr", float("nan"), "lr must be a number in"),
        ("betas", (1.0, 0.9), r"betas\[0\] must be a number in"),
        ("betas", (0.9, -0.1), r"betas\[1\] must be a number in"),
        ("betas", 0.9, "betas must be two numbers, got 0.9"),
        ("gamma", 0.0, "gamma must be a number in"),
        ("eps", 0.0, "eps must be a number in"),
        ("weight_decay", -1.0, "weight_decay must be a number in"),
        ("refresh_every", 0, "refresh_every must be a number in"),
        ("refresh_every", 2.5, "refresh_every must be a whole number"),
    ],
)
def test_bad_hyperparameters_are_named(cls, name, value, said):
    with pytest.raises(ValueError, match=rf"^{cls.__name__}: {said}"):
        cls(make_net(), **{name: value})


@BOTH
def test_bad_models_and_parameters_are_named(cls):
    with pytest.raises(ValueError, match="no trainable parameters"):
        cls(nn.ReLU())
    with pytest.raises(TypeError, match=r"floating-point dtype, got torch\.complex64"):
        cls([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    embedding = nn.Embedding(5, 2, sparse=True)
    opt = cls(embedding)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"gradients must be dense, that of weight has layout"):
        opt.step()


@BOTH
def test_a_state_of_another_shape_is_refused_and_nothing_is_loaded(cls):
    small, large = nn.Linear(6, 3).double(), nn.Linear(6, 4).double()
    opt, other = cls(small), cls(large)
    train_step(small, opt, *batch())
    with pytest.raises(ValueError, match=r"exp_avg of weight must have shape \[4, 6\].*\[3, 6\]"):
        other.load_state_dict(opt.state_dict())
    assert not other.state


@BOTH
def test_observe_errors(cls):
    net, (x, y) = make_net(), batch()
    opt = cls(net)
    name = "loss" if cls is SophiaH else "outputs"
    with pytest.raises(ValueError, match=f"{name} must be attached to the graph"):
        opt.observe(torch.zeros(()))
    logits = net(x)
    loss = F.cross_entropy(logits, y)
    loss.backward()
    with pytest.raises(RuntimeError, match=r"before loss\.backward\(\)"):
        opt.observe(loss if cls is SophiaH else logits)
    if cls is SophiaH:
        with pytest.raises(ValueError, match=r"loss must be a scalar, got shape \[40, 3\]"):
            opt.observe(net(x))
    else:
        with pytest.raises(ValueError, match="outputs must have shape"):
            opt.observe(net(x).sum())
        with pytest.raises(ValueError, match="likelihood must be one of categorical, gaussian"):
            opt.observe(net(x), likelihood="x")


def test_a_model_without_second_derivative_is_explained():
    w = nn.Parameter(torch.randn(1, 2, 8, 16))
    with pytest.raises(RuntimeError, match=r"no second derivative.*or use SophiaG"):
        SophiaH([w]).observe(F.scaled_dot_product_attention(w, w, w).square().sum())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        SophiaH([w]).observe(F.scaled_dot_product_attention(w, w, w).square().sum())


@BOTH
def test_training_lowers_the_loss(cls):
    torch.manual_seed(0)
    net, x = make_net(torch.float32), torch.randn(200, 6)
    y = (x @ torch.randn(6, 3)).argmax(1)
    opt = cls(net, lr=0.02)
    losses = [train_step(net, opt, x, y) for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0], (losses[0], losses[-1])
