# SPDX-License-Identifier: Apache-2.0
"""R-Kalman and LoKO: against dense filters, the prior and the coherence, batches, faults, state, errors."""

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import grng
from grng import LoKO, PreconditionerError, RKalman

PLAIN = dict(rho=0.0, correct_coherence=False, max_kl=None, prior="global", sigma0=0.5)


def linear(inputs=6, outputs=3, dtype=torch.float64, bias=False):
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias).to(dtype)


def mlp(classes=3, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, classes)).to(dtype)


def data(n=60, classes=3, inputs=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, inputs, generator=generator).to(dtype)
    teacher = torch.randn(inputs, classes, generator=generator).to(dtype)
    return x, (x @ teacher).argmax(1), x @ teacher


def feed(optimizer, model, x, y, size=1):
    for rows, targets in zip(x.split(size), y.split(size), strict=True):
        optimizer.observe(model(rows), targets)
        optimizer.step()


def dense_step(model, x, y, variance, rho, form):
    """Information form ``(P⁻¹ + Jᵀ C J)⁻¹`` of one batch, softmax outputs of a linear model."""
    w = model.weight.detach().numpy()
    q = torch.from_numpy(x.numpy() @ w.T).softmax(-1).numpy()
    n, c = q.shape
    jacobian = np.concatenate([np.kron(np.eye(c), row[None]) for row in x.numpy()])
    r = np.zeros((n * c, n * c))
    for i, p in enumerate(q):
        r[i * c : (i + 1) * c, i * c : (i + 1) * c] = np.diag(p) - np.outer(p, p)
    error = (np.eye(c)[y.numpy()] - q).reshape(-1)
    gram = jacobian @ jacobian.T
    curvature = r + rho * r @ gram @ r
    score = error + rho * r @ gram @ error
    precision = np.eye(w.size) / variance + jacobian.T @ curvature @ jacobian
    posterior = np.linalg.inv(precision)
    new = np.diag(posterior) if form == "fdekf" else 1 / np.diag(precision)
    return w.reshape(-1) + posterior @ jacobian.T @ score, new


# ---- against dense filters ----


@pytest.mark.parametrize("form", ["vdekf", "fdekf"])
@pytest.mark.parametrize("rho", [0.0, 0.05])
@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("classes", [2, 5])
def test_one_step_equals_the_dense_filter(form, rho, n, classes):
    model = linear(outputs=classes)
    x, y, _ = data(n, classes, 6, torch.float64)
    wanted = dense_step(model, x, y, 0.25, rho, form)
    optimizer = RKalman(model, **{**PLAIN, "rho": rho}, form=form, batch="stacked")
    feed(optimizer, model, x, y, n)
    variance = optimizer.state[model.weight]["variance"]
    np.testing.assert_allclose(model.weight.detach().numpy().reshape(-1), wanted[0], rtol=1e-9)
    np.testing.assert_allclose(variance.numpy().reshape(-1), wanted[1], rtol=1e-9)


def test_scalar_regression_is_recursive_least_squares():
    """One weight: the filter is exact, its mean that of Bayesian linear regression."""
    model = nn.Linear(1, 1, bias=False).double()
    start = model.weight.item()
    x = torch.randn(50, 1, dtype=torch.float64)
    y = 2 * x + 0.1 * torch.randn_like(x)
    optimizer = RKalman(model, likelihood="gaussian", noise=0.01, **PLAIN)
    feed(optimizer, model, x, y)
    precision = 1 / 0.25 + float(x.square().sum()) / 0.01
    mean = (start / 0.25 + float((x * y).sum()) / 0.01) / precision
    assert model.weight.item() == pytest.approx(mean, rel=1e-9)
    assert float(optimizer.state[model.weight]["variance"]) == pytest.approx(
        1 / precision, rel=1e-9
    )


def test_loko_is_the_filter_without_regularisation_and_additions():
    x, y, _ = data(20)
    models = mlp(), mlp()
    options = dict(noise="ema", sigma0=0.1, prior="global", form="fdekf")
    feed(LoKO(models[0], **options), models[0], x, y)
    plain = RKalman(models[1], rho=0.0, correct_coherence=False, max_kl=None, **options)
    feed(plain, models[1], x, y)
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("sign", [1, -1])
def test_regularisation_changes_the_step_the_way_it_says(sign):
    """``"gradient"`` leaves less variance than no regularisation, ``"noise"`` more."""
    x, y, _ = data(1)
    sums = {}
    for name, options in {
        "plain": {"rho": 0.0},
        "regularised": {"rho": 0.5, "regularization": "gradient" if sign > 0 else "noise"},
    }.items():
        model = mlp()
        optimizer = RKalman(model, prior="global", sigma0=0.5, correct_coherence=False, **options)
        feed(optimizer, model, x, y)
        sums[name] = sum(float(optimizer.state[p]["variance"].sum()) for p in model.parameters())
    assert sign * (sums["plain"] - sums["regularised"]) > 0


# ---- batches ----


def test_directions_are_no_more_than_needed():
    for classes, n in ((2, 1), (5, 1), (3, 4)):
        model = mlp(classes)
        optimizer = RKalman(model)
        x, y, _ = data(n, classes)
        optimizer.observe(model(x), y)
        assert f"stacked, {n * (classes - 1)} rows" in optimizer.explain()


def test_sampled_batch_keeps_the_gradient_exact():
    """With a vanishing prior the step is ``p · gradient`` of the log-likelihood, whatever was drawn."""
    x, y, _ = data(16)
    model = mlp(dtype=torch.float64)
    x = x.double()
    loss = torch.nn.functional.cross_entropy(model(x), y, reduction="sum")
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    before = [p.detach().clone() for p in model.parameters()]
    sigma0 = 1e-6
    optimizer = RKalman(model, prior="global", sigma0=sigma0, rho=0.0, batch="sampled", max_rows=4)
    feed(optimizer, model, x, y, 16)
    for p, old, g in zip(model.parameters(), before, gradients, strict=True):
        torch.testing.assert_close((p - old) / sigma0**2, -g, rtol=1e-4, atol=1e-4)


def test_mean_of_one_sample_is_that_sample():
    x, y, _ = data(10)
    models = mlp(), mlp()
    for model, batch in zip(models, ("mean", "stacked"), strict=True):
        feed(RKalman(model, batch=batch), model, x, y)
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_leading_dimensions_are_samples():
    x, y, _ = data(6)
    models = mlp(), mlp()
    a, b = RKalman(models[0]), RKalman(models[1])
    a.observe(models[0](x), y)
    b.observe(models[1](x.view(2, 3, 8)), y.view(2, 3))
    a.step()
    b.step()
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(p, q)


# ---- prior and coherence ----


@pytest.mark.parametrize("batch", ["stacked", "sampled", "mean"])
@pytest.mark.parametrize(
    ("likelihood", "noise"), [("categorical", "fisher"), ("categorical", "ema"), ("gaussian", 0.01)]
)
def test_output_prior_predicts_outputs_with_standard_deviation_sigma0(batch, likelihood, noise):
    """Of logits: relative to the likeliest class, averaged over the others."""
    model = mlp()
    x, y, values = data(8)
    optimizer = RKalman(model, sigma0=3.0, batch=batch, likelihood=likelihood, noise=noise)
    logits = model(x)[0]
    if likelihood == "categorical":
        others = [c for c in range(3) if c != int(logits.argmax())]
        outputs = [logits[c] - logits.max() for c in others]
    else:
        outputs = list(logits)
    rows = [torch.autograd.grad(z, list(model.parameters()), retain_graph=True) for z in outputs]
    optimizer.observe(model(x), y if likelihood == "categorical" else values)
    optimizer._start_variances(optimizer._pending[1], list(model.parameters()))
    total = sum(
        float((optimizer.state[p]["variance"] * h.square()).sum())
        for row in rows
        for p, h in zip(model.parameters(), row, strict=True)
    )
    unit = (
        1.0 if likelihood == "categorical" else float((values - model(x)).detach().square().mean())
    )
    assert total / len(rows) == pytest.approx(9.0 * unit, rel=1e-4)


def test_layer_without_gradient_at_first_joins_later():
    """LoRA at B = 0: A has no gradient, its variance comes with its first one, and it then learns."""
    torch.manual_seed(0)
    a, b = nn.Linear(8, 2, bias=False), nn.Linear(2, 3, bias=False)
    nn.init.zeros_(b.weight)
    model, (x, y, _) = nn.Sequential(a, b), data(20)
    start = a.weight.detach().clone()
    optimizer = RKalman(model)
    feed(optimizer, model, x[:1], y[:1])
    assert "variance" not in optimizer.state[a.weight] and torch.equal(a.weight, start)
    assert "not yet" in optimizer.explain()
    feed(optimizer, model, x[1:], y[1:])
    expected = (optimizer.state[b.weight]["prior"] * float(start.square().mean())) ** 0.5
    assert 0 < optimizer.state[a.weight]["prior"] <= expected * (1 + 1e-6)
    assert not torch.equal(a.weight, start)


def test_coherence_of_one_direction_and_of_many():
    from grng.curvature.prior import coherence, update_coherence

    d, generator = 64, torch.Generator().manual_seed(0)
    one, many = {}, {}
    direction = torch.randn(1, d, generator=generator)
    for _ in range(400):
        scale = torch.randn(1, generator=generator)
        update_coherence(one, direction, direction[0] * scale)
        row = torch.randn(1, d, generator=generator)
        update_coherence(many, row, row[0] * scale)
    assert float(coherence(one, d)) == pytest.approx(d**0.5, rel=0.2)
    assert float(coherence(many, d)) == pytest.approx(1, abs=0.2)


def test_coherence_counts_information_more_often():
    x, y, _ = data(30)
    variances = []
    for corrected in (True, False):
        model = mlp()
        optimizer = RKalman(model, correct_coherence=corrected)
        feed(optimizer, model, x, y)
        variances.append(
            sum(float(optimizer.state[p]["variance"].sum()) for p in model.parameters())
        )
    assert variances[0] < variances[1]


# ---- learning and safety ----


@pytest.mark.parametrize(
    ("likelihood", "noise"), [("categorical", "fisher"), ("categorical", 0.1), ("gaussian", 0.1)]
)
def test_step_is_shortened_to_the_divergence_it_may_predict(likelihood, noise):
    """On a linear model the prediction is exact: for softmax to second order in the change of the logits."""
    changes = []
    for max_kl, lr in ((1e-4, 1.0), (1e-4, 4.0), (None, 1.0)):
        model = linear(inputs=8)
        x, y, values = data(1, dtype=torch.float64)
        before = model(x).detach()
        optimizer = RKalman(
            model,
            likelihood=likelihood,
            noise=noise,
            max_kl=max_kl,
            lr=lr,
            sigma0=3.0,
            prior="fan_in",
        )
        feed(optimizer, model, x, y if likelihood == "categorical" else values)
        changes.append((model(x).detach() - before)[0])
    if likelihood == "gaussian":
        assert float(changes[0].square().sum() / (2 * noise)) == pytest.approx(1e-4, rel=1e-6)
    elif noise == "fisher":
        q = before.softmax(-1)[0]
        divergence = 0.5 * changes[0] @ (torch.diag(q) - torch.outer(q, q)) @ changes[0]
        assert float(divergence) == pytest.approx(1e-4, rel=1e-6)
    torch.testing.assert_close(changes[0], changes[1], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(
        changes[0] / changes[0].norm(), changes[2] / changes[2].norm(), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("sigma0", [1e-6, 0.02, 0.2, 2.0, 1e4])
@pytest.mark.parametrize("prior", ["output", "fan_in", "global"])
@pytest.mark.parametrize("options", [{}, {"noise": "ema"}, {"form": "fdekf"}], ids=str)
def test_no_prior_gives_nan(sigma0, prior, options):
    x, y, _ = data(60)
    model = mlp()
    optimizer = RKalman(model, sigma0=sigma0, prior=prior, **options)
    feed(optimizer, model, x, y)
    for p in model.parameters():
        assert torch.isfinite(p).all()
        if "variance" in optimizer.state[p]:
            assert (optimizer.state[p]["variance"] >= 0).all()


@pytest.mark.parametrize(
    "options",
    [{}, {"noise": "ema"}, {"noise": 0.1}, {"batch": "sampled"}, {"form": "fdekf"}],
    ids=str,
)
def test_defaults_learn_a_stream_of_classes(options):
    x, y, _ = data(400)
    model = mlp()
    feed(RKalman(model, **options), model, x, y, 2)
    assert (model(x).argmax(1) == y).float().mean() > 0.9


@pytest.mark.parametrize("options", [{}, {"noise": 0.01}, {"batch": "mean"}], ids=str)
def test_defaults_learn_a_stream_of_numbers(options):
    x, _, y = data(400)
    model = mlp()
    feed(RKalman(model, likelihood="gaussian", **options), model, x, y, 2)
    assert (model(x) - y).square().mean() < 0.1 * y.var()


# ---- faults ----


def snapshot(optimizer, model):
    """Everything but the count of what was skipped."""
    state = copy.deepcopy(optimizer.state_dict())
    for entries in state["state"].values():
        for key in ("skipped", "skipped_in_a_row"):
            entries.pop(key, None)
    return [p.detach().clone() for p in model.parameters()], state


def assert_same(before, after):
    for a, b in zip(before[0], after[0], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(before[1]["state"].values(), after[1]["state"].values(), strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(b[key])), key


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, {"noise": "ema"}, {"batch": "sampled"}], ids=str)
def test_bad_sample_changes_nothing_and_is_counted(value, options):
    x, y, _ = data(10)
    model = mlp()
    optimizer = RKalman(model, **options)
    feed(optimizer, model, x, y)
    before = snapshot(optimizer, model)
    bad = x[:1].clone()
    bad[0, 0] = value
    optimizer.observe(model(bad), y[:1])
    optimizer.step()
    assert_same(before, snapshot(optimizer, model))
    assert optimizer.diagnostics()["skipped"] == 1
    feed(optimizer, model, x, y)
    assert optimizer.diagnostics()["skipped_in_a_row"] == 0


@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("value", [1e25, 1e38])
def test_finite_sample_that_overflows_leaves_no_trace(first, value):
    x, _, y = data(12)
    model = mlp()
    optimizer = RKalman(model, likelihood="gaussian")
    if not first:
        feed(optimizer, model, x[:2], y[:2])
    before = snapshot(optimizer, model)
    optimizer.observe(model(x[:1]), torch.full((1, 3), value))
    optimizer.step()
    skipped = optimizer.diagnostics()["skipped"]
    if skipped:
        after = snapshot(optimizer, model)
        before[1]["state"] = {k: v for k, v in before[1]["state"].items() if v}
        after[1]["state"] = {k: v for k, v in after[1]["state"].items() if v}
        assert_same(before, after)
    feed(optimizer, model, x[2:], y[2:])
    assert optimizer.diagnostics()["skipped"] == skipped
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("beta", [0.5, 0.96, 0.999])
def test_estimated_noise_is_that_of_the_data(beta):
    """With a prior of almost nothing the filter explains nothing: all variance of the targets is noise."""
    model = nn.Linear(2, 1).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = RKalman(
        model, likelihood="gaussian", beta=beta, prior="global", sigma0=1e-12, rho=0.0
    )
    generator = torch.Generator().manual_seed(0)
    expected = None
    for _ in range(500):
        x = torch.randn(1, 2, generator=generator, dtype=torch.float64)
        y = 2 * torch.randn(1, 1, generator=generator, dtype=torch.float64)
        optimizer.observe(model(x), y)
        optimizer.step()
        square = float(y) ** 2
        expected = square if expected is None else beta * expected + (1 - beta) * square
    assert float(optimizer.state[model.weight]["noise"]) == pytest.approx(expected, rel=1e-6)


def test_forgetting_never_knows_less_than_the_prior():
    """A weight without gradient keeps its prior; with no bound it would overflow after some hundred steps."""
    model = linear(dtype=torch.float32)
    optimizer = RKalman(model, forgetting=0.5, prior="global", sigma0=0.5)
    x, y, _ = data(300, 3, 6)
    x[:, 2] = 0
    feed(optimizer, model, x, y)
    variance = optimizer.state[model.weight]["variance"]
    assert float(variance.max()) <= 0.25 * (1 + 1e-5)
    assert torch.allclose(variance[:, 2], torch.tensor(0.25))


def test_parameters_may_be_frozen_and_freed_between_steps():
    x, y, _ = data(6)
    model = mlp()
    optimizer = RKalman([p for p in model.parameters()])
    for i, frozen in enumerate((0, 2, 0, 2)):
        model.requires_grad_(True)
        model[frozen].requires_grad_(False)
        before = model[frozen].weight.detach().clone()
        feed(optimizer, model, x[i : i + 1], y[i : i + 1])
        assert torch.equal(model[frozen].weight, before)


def test_old_graph_cannot_be_differentiated_after_the_step():
    x, y, _ = data(1)
    model = mlp()
    optimizer = RKalman(model)
    outputs = model(x)
    optimizer.observe(outputs, y)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outputs.sum().backward()


def test_bf16_weights_that_somebody_sets_are_taken_over():
    x, y, _ = data(4)
    model = mlp().bfloat16()
    optimizer = RKalman(model, lr=1e-3)
    feed(optimizer, model, x.bfloat16()[:2], y[:2])
    with torch.no_grad():
        model[0].weight.zero_()
    feed(optimizer, model, x.bfloat16()[2:], y[2:])
    assert float(model[0].weight.abs().max()) < 1e-2


def test_wider_outputs_than_parameters():
    x, y, _ = data(2)
    model = mlp()
    optimizer = RKalman(model)
    optimizer.observe(model(x).double(), y)
    optimizer.step()
    assert optimizer.diagnostics()["skipped"] == 0


def test_too_many_bad_samples_in_a_row_are_an_error():
    model = mlp()
    optimizer = RKalman(model, max_failures=2)
    for _ in range(2):
        optimizer.observe(model(torch.full((1, 8), math.nan)), torch.tensor([0]))
        optimizer.step()
    optimizer.observe(model(torch.full((1, 8), math.nan)), torch.tensor([0]))
    with pytest.raises(PreconditionerError, match="3 observations in a row could not be used"):
        optimizer.step()


@pytest.mark.parametrize("options", [{"noise": "ema"}, {"likelihood": "gaussian"}], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_sampled_batch_with_a_bad_sample_is_skipped(options, value):
    x, labels, numbers = data(20)
    y = numbers if "likelihood" in options else labels
    model = mlp()
    optimizer = RKalman(model, batch="sampled", **options)
    optimizer.observe(model(x), y)
    optimizer.step()
    before = snapshot(optimizer, model)
    bad = x.clone()
    bad[15:, 0] = value
    optimizer.observe(model(bad), y)
    optimizer.step()
    assert_same(before, snapshot(optimizer, model))
    assert optimizer.diagnostics()["skipped"] == 1
    optimizer.observe(model(x), y)
    optimizer.step()
    assert optimizer.diagnostics()["skipped_in_a_row"] == 0


def test_nan_target_is_skipped():
    x, _, y = data(4)
    model = mlp()
    optimizer = RKalman(model, likelihood="gaussian")
    feed(optimizer, model, x, y)
    before = snapshot(optimizer, model)
    optimizer.observe(model(x[:1]), torch.full((1, 3), math.nan))
    optimizer.step()
    assert_same(before, snapshot(optimizer, model))


# ---- the torch.optim contract ----


@pytest.mark.parametrize("options", [{}, {"noise": "ema"}], ids=str)
def test_resumed_run_equals_the_uninterrupted_one(options):
    x, y, _ = data(30)
    whole, first = mlp(), mlp()
    optimizer = RKalman(whole, **options)
    feed(optimizer, whole, x, y)
    half = RKalman(first, **options)
    feed(half, first, x[:13], y[:13])
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": half.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = mlp()
    second.load_state_dict(saved["model"])
    resumed = RKalman(second, **options)
    resumed.load_state_dict(saved["optimizer"])
    feed(resumed, second, x[13:], y[13:])
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_state_of_another_shape_is_refused():
    model, other = mlp(), mlp(classes=5)
    x, y, _ = data(2)
    optimizer = RKalman(model)
    feed(optimizer, model, x, y)
    with pytest.raises(ValueError, match=r"variance of 2.weight must have shape"):
        RKalman(other).load_state_dict(optimizer.state_dict())


def test_copies_go_on_by_themselves():
    x, y, _ = data(20)
    model = mlp()
    optimizer = RKalman(model)
    feed(optimizer, model, x[:10], y[:10])
    twin_model, twin = copy.deepcopy((model, optimizer))
    restored_model, restored = pickle.loads(pickle.dumps((model, optimizer)))
    feed(optimizer, model, x[10:], y[10:])
    for other_model, other in ((twin_model, twin), (restored_model, restored)):
        feed(other, other_model, x[10:], y[10:])
        for a, b in zip(model.parameters(), other_model.parameters(), strict=True):
            assert torch.equal(a, b)


def test_a_copy_of_a_scheduled_optimizer_steps_itself():
    model = mlp()
    optimizer = RKalman(model)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1.0)
    x, y, _ = data(2)
    twin_model, twin = copy.deepcopy((model, optimizer))
    before = [p.detach().clone() for p in model.parameters()]
    feed(twin, twin_model, x[:1], y[:1])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert any(not torch.equal(p, q) for p, q in zip(twin_model.parameters(), before, strict=True))


def test_learning_rate_scales_the_step():
    x, y, _ = data(1)
    moves = []
    for lr in (1.0, 0.25):
        model = mlp()
        before = [p.detach().clone() for p in model.parameters()]
        feed(RKalman(model, lr=lr, max_kl=None), model, x, y)
        moves.append([p - b for p, b in zip(model.parameters(), before, strict=True)])
    for whole, part in zip(*moves, strict=True):
        torch.testing.assert_close(part, 0.25 * whole, rtol=1e-4, atol=1e-6)


def test_scheduler_and_groups():
    x, y, _ = data(6)
    model = mlp()
    optimizer = RKalman(
        [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[2].parameters()}]
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    feed(optimizer, model, x[:1], y[:1])
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.25, 0.5]
    optimizer.param_groups[0]["rho"] = 0.7
    optimizer.observe(model(x[1:2]), y[1:2])
    with pytest.raises(ValueError, match="rho must be the same in all parameter groups"):
        optimizer.step()


def test_frozen_parameters_stay():
    model = mlp()
    model[0].weight.requires_grad_(False)
    frozen = model[0].weight.detach().clone()
    x, y, _ = data(3)
    feed(RKalman(model), model, x, y)
    assert torch.equal(model[0].weight, frozen)


def test_bf16_parameters_have_a_state_in_fp32():
    x, y, _ = data(200)
    model = mlp().bfloat16()
    optimizer = RKalman(model)
    feed(optimizer, model, x.bfloat16(), y)
    assert optimizer.state[model[0].weight]["variance"].dtype == torch.float32
    assert optimizer.state[model[0].weight]["weights"].dtype == torch.float32
    assert (model(x.bfloat16()).argmax(1) == y).float().mean() > 0.7


def test_closure_observes():
    x, y, _ = data(1)
    model = mlp()
    optimizer = RKalman(model)

    def closure():
        outputs = model(x)
        optimizer.observe(outputs, y)
        return outputs

    assert optimizer.step(closure).shape == (1, 3)


def test_gradients_are_never_touched():
    model = mlp()
    x, y, _ = data(1)
    feed(RKalman(model), model, x, y)
    assert all(p.grad is None for p in model.parameters())


# ---- errors ----

X, Y, _ = data(4)
OBSERVE = {
    "no_graph": (ValueError, "attached to the graph", lambda m: m(X).detach(), Y),
    "no_tensor": (TypeError, "outputs must be a tensor, got list", lambda m: [1.0], Y),
    "target_no_tensor": (TypeError, "targets must be a tensor, got int", lambda m: m(X), 3),
    "one_dim": (ValueError, "shape [..., C]", lambda m: m(X)[:, 0], Y),
    "one_class": (ValueError, "C >= 2; got [4, 1]", lambda m: m(X)[:, :1], Y),
    "empty": (ValueError, "got [0, 3]", lambda m: m(X[:0]), Y[:0]),
    "target_shape": (ValueError, "targets must have shape [4]", lambda m: m(X), Y[:2]),
    "target_kind": (TypeError, "integer dtype, got torch.float32", lambda m: m(X), Y.float()),
    "target_bool": (TypeError, "integer dtype, got torch.bool", lambda m: m(X), Y > 0),
    "target_range": (ValueError, "in [0, 3), got", lambda m: m(X), Y + 2),
    "target_negative": (ValueError, "in [0, 3), got -1", lambda m: m(X), torch.full_like(Y, -1)),
}


@pytest.mark.parametrize("name", OBSERVE)
def test_observe_says_what_is_wrong_and_changes_nothing(name):
    kind, text, outputs, targets = OBSERVE[name]
    model = mlp()
    optimizer = RKalman(model)
    with pytest.raises(kind) as caught:
        optimizer.observe(outputs(model), targets)
    assert text in str(caught.value) and "RKalman.observe" in str(caught.value)
    with pytest.raises(RuntimeError, match="needs an observation"):
        optimizer.step()


def test_regression_targets_of_integers_are_refused():
    model = mlp()
    with pytest.raises(TypeError, match=r"floating-point dtype, got torch\.int64"):
        RKalman(model, likelihood="gaussian").observe(
            model(X), torch.zeros(4, 3, dtype=torch.int64)
        )


def test_observe_twice_and_step_without():
    model = mlp()
    optimizer = RKalman(model)
    with pytest.raises(RuntimeError, match=r"RKalman: step\(\) needs an observation"):
        optimizer.step()
    optimizer.observe(model(X), Y)
    with pytest.raises(RuntimeError, match=r"RKalman: observe\(\) was called twice"):
        optimizer.observe(model(X), Y)
    optimizer.step()


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("sigma0 must be a number", {"sigma0": 0.0}),
        ("sigma0 must be a number", {"sigma0": math.nan}),
        ("lr must be a number", {"lr": -1}),
        ("rho must be a number", {"rho": -0.1}),
        ("forgetting must be a number", {"forgetting": 0.0}),
        ("forgetting must be a number", {"forgetting": 1.1}),
        ("process_noise must be a number", {"process_noise": -1}),
        ("beta must be a number", {"beta": 1.5}),
        ("max_kl must be a number", {"max_kl": 0.0}),
        ("prior must be one of", {"prior": "none"}),
        ("form must be one of", {"form": "ekf"}),
        ("likelihood must be one of", {"likelihood": "poisson"}),
        ("regularization must be one of", {"regularization": "both"}),
        ("batch must be one of", {"batch": "all"}),
        ("max_rows must be a", {"max_rows": 0}),
        ("noise must be > 0", {"noise": 0.0}),
        ("noise must be a number > 0 or one of", {"noise": "white"}),
        ("one of ema with likelihood='gaussian'", {"noise": "fisher", "likelihood": "gaussian"}),
    ],
)
def test_constructor_errors(text, options):
    with pytest.raises(ValueError, match="RKalman: ") as caught:
        RKalman(mlp(), **options)
    assert text in str(caught.value)


def test_model_without_trainable_parameters():
    model = mlp().requires_grad_(False)
    with pytest.raises(ValueError, match="RKalman: the model has no trainable parameters"):
        RKalman(model)


def test_public_names():
    assert {"RKalman", "LoKO"} <= set(grng.__all__)


def test_count_of_skipped_observations_is_in_the_checkpoint():
    x, y, _ = data(6)
    model = mlp()
    optimizer = RKalman(model)
    feed(optimizer, model, x[:3], y[:3])
    for _ in range(2):
        feed(optimizer, model, torch.full_like(x[:1], float("nan")), y[:1])
    resumed = RKalman(mlp())
    resumed.load_state_dict(optimizer.state_dict())
    report = resumed.diagnostics()
    assert report["skipped"] == report["skipped_in_a_row"] == 2
    feed(optimizer, model, x[3:], y[3:])
    assert optimizer.diagnostics()["skipped"] == 2
    assert optimizer.diagnostics()["skipped_in_a_row"] == 0


def test_zero_biases_behind_a_zero_head_start_late_and_learn():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    for p in (model[0].bias, model[2].weight, model[2].bias):
        nn.init.zeros_(p)
    x, y, _ = data(20)
    x = x[:, :4]
    optimizer = RKalman(model)
    feed(optimizer, model, x, y)
    for p in model.parameters():
        assert optimizer.state[p]["prior"] > 0 and float(p.detach().abs().max()) > 0


def test_checkpoint_of_a_transposed_weight_is_refused():
    x, y, _ = data(4)
    model = nn.Linear(x.shape[1], 3)
    optimizer = RKalman(model)
    feed(optimizer, model, x, y)
    other = RKalman([nn.Parameter(torch.zeros(x.shape[1], 3)), nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match="variance of a parameter must have shape"):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state
