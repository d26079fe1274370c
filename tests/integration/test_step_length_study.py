# SPDX-License-Identifier: Apache-2.0
"""benchmarks/step_length.py: each rule against its formula in fp64, and the program on a little data."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jvp

from grng import RING
from grng.optim.factors import preconditioned
from grng.tasks import TASKS, ClassificationData

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import plot_step_length  # noqa: E402
import step_length  # noqa: E402
from step_lengths import damping, grafting, quadratic, rows, rules, study  # noqa: E402
from step_lengths.watched import Watched, kronecker_form  # noqa: E402

X = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.arange(12) % 3


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def backward(model, opt, x=X, y=Y):
    opt.zero_grad()
    logits = model(x)
    if hasattr(opt, "observe"):
        opt.observe(logits)
    loss = F.cross_entropy(logits, y)
    loss.backward()
    return float(loss.detach())


def true_form(model, step):
    """``ΔᵀFΔ`` by a forward-mode derivative, ``step`` one tensor for each parameter."""
    weights = {n: p.detach() for n, p in model.named_parameters()}
    step = dict(zip(weights, step, strict=True))
    logits, z = jvp(lambda w: functional_call(model, w, (X,)), (weights,), (step,))
    p = logits.softmax(-1)
    return float(((p * z.square()).sum(-1) - (p * z).sum(-1).square()).mean())


def model_of_loss(model, opt, step):
    """``−⟨g, Δ⟩ + ½ (ΔᵀFΔ + Σ λ‖Δ_layer‖²)``, with ``λ = ρ·max(‖Λ‖‖Γ‖, floor·largest)``."""
    slope = sum(float((p.grad * d).sum()) for p, d in zip(model.parameters(), step, strict=True))
    norms = []
    for layer in opt._layers:
        factors = [opt.state[layer.weight][f"{side}_factor"] for side in ("output", "input")]
        norms.append(float(torch.stack([torch.linalg.matrix_norm(f, 2) for f in factors]).prod()))
    squares = [sum(float(d.square().sum()) for d in step[i : i + 2]) for i in (0, 2)]
    lambdas = [opt.param_groups[0]["rho"] * max(n, opt.floor * max(norms)) for n in norms]
    damped = sum(a * b for a, b in zip(lambdas, squares, strict=True))
    return -slope + 0.5 * (true_form(model, step) + damped)


def combined(*parts):
    """Sum of multiples of steps, ``(factor, step)``."""
    columns = zip(*([c * t for t in step] for c, step in parts), strict=True)
    return [sum(column) for column in columns]


def flat(steps):
    return [t for step in steps for t in step]


@pytest.fixture(params=[quadratic.QuadraticMomentum, quadratic.DampedQuadraticMomentum])
def ready(request):
    """A small model and an optimizer that has refreshed its curvature, in the middle of a step."""
    model = small()
    opt = request.param(model, lr=1.0, rho=0.3, fisher="exact", max_kl=1e30, weight_decay=0.0)
    backward(model, opt)
    with torch.no_grad():
        opt._refresh(opt.param_groups[0], opt._layers)
        # The norms of the damping are those of power iterations: here as exact as the test.
        for layer in opt._layers:
            state = opt.state[layer.weight]
            for side in ("output", "input"):
                state[f"{side}_vector"].copy_(torch.linalg.eigh(state[f"{side}_factor"])[1][:, -1])
    return model, opt


def random_steps(model, seed):
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in model.parameters()]
    return [found[:2], found[2:]]


def test_the_length_along_the_direction_minimises_the_model(ready):
    model, opt = ready
    direction = [[p.grad + 0.1 * r for p, r in zip(x.parameters, s, strict=True)]
                 for x, s in zip(opt._layers, random_steps(model, 1), strict=True)]  # fmt: skip
    slope = sum(
        (p.grad * d).sum() for p, d in zip(model.parameters(), flat(direction), strict=True)
    )
    with torch.no_grad():
        alpha = float(opt.length(opt.param_groups[0], opt._layers, direction, slope))
    values = {
        c: model_of_loss(model, opt, combined((c * alpha, flat(direction))))
        for c in (0.0, 0.5, 0.9, 0.999, 1.0, 1.001, 1.1, 1.5, 2.0)
    }
    assert min(values, key=values.get) == 1.0
    # The parabola through 0 and 2 says the same to rounding.
    assert values[2.0] == pytest.approx(values[0.0], abs=1e-9 * abs(values[1.0]))
    assert values[1.0] < 0


def test_direction_and_previous_step_minimise_the_model_together(ready):
    model, opt = ready
    # Of very different sizes, as the two are in practice.
    direction, old = random_steps(model, 1), random_steps(model, 2)
    old = [[1e-3 * t for t in step] for step in old]
    with torch.no_grad():
        found = opt.coefficients(opt.param_groups[0], opt._layers, direction, old)
    alpha, mu = found.tolist()

    def value(a, m):
        step = combined((a * alpha, flat(direction)), (m * mu, flat(old)))
        return model_of_loss(model, opt, step)

    grid = {
        (a, m): value(a, m) for a in (0.5, 0.99, 1, 1.01, 1.5) for m in (0.5, 0.99, 1, 1.01, 1.5)
    }
    assert min(grid, key=grid.get) == (1, 1)
    for h in ((1e-2, 0), (0, 1e-2)):
        up, down = value(1 + h[0], 1 + h[1]), value(1 - h[0], 1 - h[1])
        assert abs(up - down) < 1e-8 * abs(up + down - 2 * value(1, 1))


def test_without_a_previous_step_two_directions_are_one(ready):
    model, opt = ready
    direction = random_steps(model, 1)
    none = [[torch.zeros_like(t) for t in step] for step in direction]
    slope = sum(
        (p.grad * d).sum() for p, d in zip(model.parameters(), flat(direction), strict=True)
    )
    group = opt.param_groups[0]
    with torch.no_grad():
        alone = opt.length(group, opt._layers, direction, slope)
        for old in (none, direction):  # the latter: a step along the direction itself
            alpha, mu = opt.coefficients(group, opt._layers, direction, old)
            total = alpha + (mu if old is direction else 0)
            torch.testing.assert_close(total, alone, rtol=1e-6, atol=0)


def test_the_first_quadratic_step_cannot_be_scaled_to_a_better_one():
    for rule in (quadratic.QuadraticDirection, quadratic.QuadraticMomentum):
        model = small()
        before = [p.detach().clone() for p in model.parameters()]
        opt = rule(model, lr=1.0, fisher="exact", max_kl=1e30, weight_decay=0.0)
        backward(model, opt)
        opt.step()
        step = [b - p.detach() for b, p in zip(before, model.parameters(), strict=True)]
        with torch.no_grad():
            for p, b in zip(model.parameters(), before, strict=True):
                p.copy_(b)
        values = {c: model_of_loss(model, opt, combined((c, step))) for c in (0.9, 1.0, 1.1)}
        assert min(values, key=values.get) == 1.0
        assert model_of_loss(model, opt, combined((1e-3, step))) < 0


def test_a_quadratic_step_stays_in_the_trust_region():
    for rule in (quadratic.QuadraticDirection, quadratic.QuadraticMomentum):
        model = small()
        opt = rule(model, lr=1.0, fisher="exact", max_kl=1e-5, weight_decay=0.0)
        before = [p.detach().clone() for p in model.parameters()]
        backward(model, opt)
        opt.step()
        step = [b - p.detach() for b, p in zip(before, model.parameters(), strict=True)]
        with torch.no_grad():
            for p, b in zip(model.parameters(), before, strict=True):
                p.copy_(b)
        assert 0.5 * true_form(model, step) == pytest.approx(1e-5, rel=1e-6)
        assert opt.noted["kl"] == [pytest.approx(1e-5, rel=1e-6)]


def test_coefficients_are_kept_between_refreshes_or_found_at_every_step():
    found = {}
    for rule in (quadratic.QuadraticMomentum, quadratic.QuadraticMomentumAlways):
        model = small()
        opt = rule(model, lr=1.0, fisher="exact", max_kl=1e30, weight_decay=0.0)
        shared = opt.state[opt._all_layers[0].weight]
        train(opt, model, 3)
        old, kept = [p.detach().clone() for p in model.parameters()], shared["coefficients"].clone()
        previous = [opt.state[p]["momentum_buffer"].clone() for p in model.parameters()]
        backward(model, opt)  # step 3 is between refreshes
        layers = opt._layers
        states = [opt.state[x.weight] for x in layers]
        direction = flat(preconditioned(layers, states, [x.grads() for x in layers])[0])
        opt.step()
        found[rule], updates = shared["coefficients"], states[0]["input_updates"]
        assert updates == 3  # at 0, 1, 2
        mu = found[rule][1] if rule is quadratic.QuadraticMomentumAlways else kept[1].clamp(0, 0.9)
        step = combined((found[rule][0], direction), (mu, previous))
        assert_equal([o - p.detach() for o, p in zip(old, model.parameters(), strict=True)], step)
        assert torch.equal(found[rule], kept) == (rule is quadratic.QuadraticMomentum)


def train(opt, model, steps):
    for _ in range(steps):
        backward(model, opt)
        opt.step()
    return [p.detach().clone() for p in model.parameters()]


def assert_equal(left, right):
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_watching_changes_nothing_and_notes_the_forms():
    models = [small(), small()]
    plain, watched = RING(models[0], fisher="exact"), Watched(models[1], fisher="exact")
    assert_equal(train(plain, models[0], 12), train(watched, models[1], 12))
    # Steps 0, 1, 2, 4, 8, 10 refresh.
    assert [len(watched.noted[k]) for k in ("kept", "kl", "form_ratio")] == [12, 12, 6]
    assert max(watched.noted["kl"]) <= 0.01 * (1 + 1e-9)


def test_the_form_of_the_factors_is_their_kronecker_product():
    model = small()
    opt = Watched(model, fisher="exact")
    backward(model, opt)
    opt._refresh(opt.param_groups[0], opt._layers)
    steps, expected = random_steps(model, 3), 0.0
    states = [opt.state[x.weight] for x in opt._layers]
    for state, (weight, bias) in zip(states, steps, strict=True):
        vector = torch.cat([weight, bias[:, None]], 1).flatten()
        block = torch.kron(state["output_factor"], state["input_factor"])
        expected += vector @ block @ vector
    found = kronecker_form(opt._layers, states, steps)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


def test_without_averaging_before_and_after_are_the_same():
    models = [small(), small()]
    options = dict(fisher="exact", betas=(0.0, 0.999))
    after = grafting.MomentumAfter(models[0], **options)
    assert_equal(train(after, models[0], 6), train(RING(models[1], **options), models[1], 6))


def test_momentum_after_averages_preconditioned_gradients():
    model = small()
    opt = grafting.MomentumAfter(model, fisher="exact", lr=1e-3, weight_decay=0.0)
    layer, average = opt._layers[1], 0.0
    for _ in range(4):
        backward(model, opt)
        grad = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
        old = [p.detach().clone() for p in layer.parameters]
        opt.step()
        state = opt.state[layer.weight]
        # Step 3 keeps the inverses of step 2; the steps before have new ones.
        average = 0.9 * average + 0.1 * (state["output_inverse"] @ grad @ state["input_inverse"])
        moved = [(o - p.detach()) for o, p in zip(old, layer.parameters, strict=True)]
        moved = torch.cat([moved[0], moved[1][:, None]], 1)
        along = (moved * average).sum() / (moved.norm() * average.norm())
        assert float(along) == pytest.approx(1.0, abs=1e-10)


def test_warm_up_takes_adamws_steps_and_then_its_own():
    models = [small(), small()]
    opt = grafting.WarmUp(models[0], lr=3e-3, weight_decay=0.1)
    adamw = torch.optim.AdamW(models[1].parameters(), lr=3e-3, weight_decay=0.1)
    assert_equal(train(opt, models[0], 20), train(adamw, models[1], 20))
    assert opt.state[opt._layers[0].weight]["input_updates"] == 6  # at 0, 1, 2, 4, 8, 10
    mine, theirs = train(opt, models[0], 1), train(adamw, models[1], 1)
    assert (mine[0] - theirs[0]).abs().max() > 1e-5


def test_statistics_of_every_step_but_inverses_of_few():
    model = small()
    opt = grafting.MoreStatistics(model, fisher="exact", lr=1e-3)
    state = opt.state[opt._layers[0].weight]
    expected, inverses = 0.0, []
    decay = 0.95 ** (1 / 10)
    for n in range(8):
        rows = torch.cat([X, torch.ones(12, 1, dtype=X.dtype)], 1) * (1 + n)
        train_on = rows[:, :4].clone()
        backward(model, opt, x=train_on)
        rows[:, 4] = 1
        kept = decay * (1 - decay**n) / (1 - decay ** (n + 1))
        expected = kept * expected + (1 - kept) * rows.T @ rows / 12
        opt.step()
        inverses.append(state["input_inverse"].clone())
    torch.testing.assert_close(state["input_factor"], expected, rtol=1e-10, atol=0)
    changed = [n for n in range(1, 8) if not torch.equal(inverses[n], inverses[n - 1])]
    assert changed == [1, 2, 4]


@pytest.mark.parametrize("floor", [0.0, 10.0])
def test_the_floor_is_under_the_damping_of_every_layer(floor):
    model = small()
    opt = damping.ModelFloor(model, rho=0.2, fisher="exact")
    opt.floor = floor
    for _ in range(3):
        backward(model, opt)
        with torch.no_grad():
            opt._refresh(opt.param_groups[0], opt._layers)
        opt._forget()
    states = [opt.state[x.weight] for x in opt._layers]
    norms = [
        [float(torch.linalg.matrix_norm(s[f"{side}_factor"], 2)) for side in ("output", "input")]
        for s in states
    ]
    largest = max(a * b for a, b in norms)
    for state, (a, b) in zip(states, norms, strict=True):
        scale = (max(a * b, floor * largest) / (a * b)) ** 0.5
        for side, own in (("output", a), ("input", b)):
            factor = state[f"{side}_factor"]
            damped = factor + 0.2**0.5 * scale * own * torch.eye(len(factor), dtype=factor.dtype)
            product = state[f"{side}_inverse"] @ damped
            # The norm is that of a few power iterations.
            torch.testing.assert_close(
                product, torch.eye(len(factor)).to(factor), rtol=0, atol=2e-2
            )


def test_a_layer_whose_factor_vanished_is_damped_like_the_model():
    norms = torch.tensor([[4.0, 1.0], [0.0, 2.0], [0.0, 0.0]])
    lambdas = damping.layer_damping(norms, 0.01, 0.1)
    torch.testing.assert_close(lambdas, torch.tensor([0.04, 0.004, 0.004]))
    sides = damping.split_damping(norms, lambdas)
    torch.testing.assert_close(sides.prod(1), lambdas)
    torch.testing.assert_close(sides[0], 0.1 * norms[0])
    assert (sides > 0).all() and torch.isfinite(sides).all()


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [(0.9, 1 / 1.5), (0.75, 1.0), (0.25, 1.0), (0.2, 1.5), (-1.0, 1.5), (float("nan"), 1.5)],
)
def test_damping_follows_the_reduction_ratio(ratio, expected):
    assert grafting.adapted(1.0, ratio, 1.5, (1e-6, 1e2)) == pytest.approx(expected)
    assert grafting.adapted(1e2, ratio, 1.5, (1e-6, 1e2)) <= 1e2
    assert grafting.adapted(1e-6, ratio, 1.5, (1e-6, 1e2)) >= 1e-6


@pytest.mark.parametrize("lr", [1e-3, 0.3])
def test_the_reduction_of_the_loss_is_compared_with_that_of_the_model(lr):
    model = small()
    opt = grafting.AdaptiveDamping(model, lr=lr, fisher="exact", max_kl=1e30)
    opt.batch_loss = lambda: grafting.loss_on(model, X, Y)
    old = [p.detach().clone() for p in model.parameters()]
    before = backward(model, opt)
    grads = [p.grad for p in model.parameters()]
    opt.step()
    after = grafting.loss_on(model, X, Y)
    step = [o - p.detach() for o, p in zip(old, model.parameters(), strict=True)]
    with torch.no_grad():
        for p, o in zip(model.parameters(), old, strict=True):
            p.copy_(o)
    # The decay of the weights, which moves them too, is no part of the form.
    decayed = combined((1, step), (-lr * 0.01, old))
    slope = sum(float((g * d).sum()) for g, d in zip(grads, step, strict=True))
    predicted = slope - 0.5 * true_form(model, decayed)
    assert opt.noted["reduction_ratio"] == pytest.approx([(before - after) / predicted], rel=1e-8)


def test_a_short_step_reduces_the_loss_as_predicted_and_shrinks_the_damping():
    model = small()
    opt = grafting.AdaptiveDamping(model, lr=1e-4, rho=1e-2, fisher="exact", weight_decay=0.0)
    opt.batch_loss = lambda: grafting.loss_on(model, X, Y)
    train(opt, model, 5)
    assert opt.noted["reduction_ratio"] == pytest.approx([1.0] * 4, abs=2e-2)
    assert opt.param_groups[0]["rho"] == pytest.approx(1e-2 / 1.5**4)


def test_judging_a_batch_leaves_running_statistics():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    before = {n: b.clone() for n, b in model.named_buffers()}
    expected = F.cross_entropy(nn.Sequential(*model)(X), Y)
    model.load_state_dict(before, strict=False)
    assert grafting.loss_on(model, X, Y) == pytest.approx(float(expected.detach()))
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())


# ---- the program ----


@pytest.fixture
def little_data(monkeypatch):
    """Ten noisy patterns in place of Fashion-MNIST."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(10, 784, generator=generator)
    labels = torch.arange(300) % 10
    inputs = patterns[labels] + torch.randn(300, 784, generator=generator)
    data = ClassificationData(inputs[:200], labels[:200], inputs[200:], labels[200:], "made up", {})
    task = dataclasses.replace(TASKS["fashion-mnist"], load=lambda request: data)
    monkeypatch.setitem(TASKS, "fashion-mnist", task)
    small_mlp = dataclasses.replace(study.MODELS["mlp"], hidden=(8,), batch_size=50)
    monkeypatch.setitem(study.MODELS, "mlp", small_mlp)


def run(out, *options):
    step_length.main(
        ["--models", "mlp", "--seeds", "3", "--steps", "6", "--out", str(out), *options]
    )


def test_a_study_is_resumed_and_drawn(little_data, tmp_path, capsys):
    run(tmp_path, "--rules", "graft,adamw:lr=0.003")
    first = json.loads((tmp_path / "mlp.json").read_text())
    run(tmp_path, "--rules", "graft,no-region,graft:lr=0.05,adamw:lr=0.003")
    second = json.loads((tmp_path / "mlp.json").read_text())
    assert "mlp: 2 runs of 6 steps to go" in capsys.readouterr().out
    # What was there was not run again, but for seconds the same would come out.
    assert second["runs"][:2] == first["runs"]
    labels = [r["rule"] for r in second["runs"]]
    assert labels == ["graft", "adamw:lr=0.003", "no-region", "graft:lr=0.05"]
    graft = second["runs"][0]
    assert len(graft["record"]["step_loss"]) == 6
    assert graft["noted"]["kl_largest"] <= 0.01 * 1.001
    weights = {r["record"]["initial_weights_sha256"] for r in second["runs"]}
    orders = {r["record"]["batch_order_sha256"] for r in second["runs"]}
    assert len(weights) == len(orders) == 1
    plot_step_length.main([str(tmp_path)])
    table = capsys.readouterr().out
    assert all(f"`{label}`" in table for label in labels)
    for name in ("rules.png", "rates.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_every_rule_trains(little_data, tmp_path):
    run(tmp_path, "--rules", "rules")
    runs = json.loads((tmp_path / "mlp.json").read_text())["runs"]
    assert [r["rule"] for r in runs] == [r.label for r in rules.RULES]
    for r in runs:
        losses = r["record"]["step_loss"]
        assert losses[-1] < losses[0], r["rule"]


def test_a_run_that_diverges_is_kept_and_drawn(little_data, tmp_path, monkeypatch, capsys):
    wild = dataclasses.replace(rules.ALL["adamw:lr=0.003"], options={"lr": 1e38})
    monkeypatch.setitem(rules.ALL, "adamw:lr=0.003", wild)
    run(tmp_path, "--rules", "graft,adamw:lr=0.003")
    found = json.loads((tmp_path / "mlp.json").read_text())["runs"][1]["record"]
    assert found["status"] == "diverged"
    plot_step_length.main([str(tmp_path)])
    assert "diverged" in capsys.readouterr().out
    run(tmp_path, "--rules", "adamw:lr=0.003")
    assert "mlp: 0 runs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rules", "graft,luck"], "unknown rule 'luck'; valid: all, rules, rates, graft"),
        (["--models", "mlp,lenet"], "unknown model 'lenet'; valid: mlp, resnet, vit, plays"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--seeds", "3,x"], "invalid literal"),
    ],
)
def test_wrong_options_are_refused(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        step_length.main([*options, "--out", str(tmp_path)])
    assert message in capsys.readouterr().err


def test_another_file_is_not_overwritten(little_data, tmp_path):
    (tmp_path / "mlp.json").write_text("{}")
    with pytest.raises(ValueError, match="must be a grng-step-length result"):
        run(tmp_path, "--rules", "graft")
    assert (tmp_path / "mlp.json").read_text() == "{}"


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.label)
def test_what_adamw_trains_is_trained_the_same_under_every_rule(rule):
    usual = rules.GRAFT.build(small()).param_groups[1]
    group = rule.build(small()).param_groups[1]
    assert group["kind"] == "adamw"
    for key in ("lr", "weight_decay"):
        assert group[key] == usual[key]


def test_a_run_with_other_settings_is_made_again(little_data, tmp_path, capsys, monkeypatch):
    run(tmp_path, "--rules", "graft")
    floor = dataclasses.replace(rules.GRAFT, options={"rho": 0.5})
    monkeypatch.setitem(rules.ALL, "graft", floor)
    capsys.readouterr()
    run(tmp_path, "--rules", "graft")
    assert "1 runs of" in capsys.readouterr().out
    [kept] = json.loads((tmp_path / "mlp.json").read_text())["runs"]
    assert kept["settings"]["rho"] == 0.5


def test_a_rule_with_a_diverged_seed_has_no_mean():
    assert rows._mean((0.5, None)) is None and rows._mean((0.5, 0.7)) == pytest.approx(0.6)
