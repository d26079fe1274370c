# SPDX-License-Identifier: Apache-2.0
"""RING against its equations, written out densely in fp64, and its promises to a training loop."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import grng_kernels
from grng import RING, PreconditionerError
from grng.curvature.fisher import sampled_loss
from grng.optim.factors import corrected_decay


def make_net(dtype=torch.float64, *, inplace=False):
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=inplace), nn.Linear(5, 3, bias=False))
    return net.to(dtype)


def batch(rows=40, dtype=torch.float64):
    return torch.randn(rows, 6, dtype=dtype), torch.randint(0, 3, (rows,))


def train_step(net, opt, x, y, *, observe=True):
    logits = net(x)
    if observe:
        opt.observe(logits)
    loss = F.cross_entropy(logits, y)
    loss.backward()
    opt.step()
    opt.zero_grad()
    return loss.item()


def dense_factors(net, x, step=0):
    """Λ, Γ of both layers from per-sample gradients of the sampled loss, one sample at a time."""
    generator = torch.Generator().manual_seed(step)
    logits = net(x)
    labels = torch.multinomial(logits.detach().float().softmax(-1), 1, generator=generator).squeeze(
        1
    )
    sizes = [(5, 7), (3, 5)]
    factors = [
        (torch.zeros(o, o, dtype=x.dtype), torch.zeros(i, i, dtype=x.dtype)) for o, i in sizes
    ]
    for k in range(len(x)):
        h = net[0](x[k])
        a = h.relu()
        z = net[2](a)
        g_h, g_z = torch.autograd.grad(F.cross_entropy(z[None], labels[k : k + 1]), [h, z])
        inputs = [torch.cat([x[k], x.new_ones(1)]), a.detach()]
        for (out, inp), g, v in zip(factors, (g_h, g_z), inputs, strict=True):
            out += torch.outer(g, g) / len(x)
            inp += torch.outer(v, v) / len(x)
    return factors


def damped(factor, rho):
    result = grng_kernels.damped_inverse(factor, rho=rho)
    assert result.damping >= rho**0.5 * torch.linalg.eigvalsh(factor)[-1] * 0.98
    return result.inverse


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("step_length", ["graft", "kl_clip"])
def test_first_step_follows_the_equations(inplace, step_length):
    net = make_net(inplace=inplace)
    x, y = batch()
    before = [p.detach().clone() for p in net.parameters()]
    factors = dense_factors(make_copy(net), x)
    F.cross_entropy(net(x), y).backward()
    grads = [torch.cat([net[0].weight.grad, net[0].bias.grad[:, None]], 1), net[2].weight.grad]
    directions = [
        damped(out, 0.02) @ g @ damped(inp, 0.02)
        for (out, inp), g in zip(factors, grads, strict=True)
    ]
    net.zero_grad()
    if step_length == "graft":
        directions = [
            d * (g / (g.abs() + 1e-8)).norm() / d.norm()
            for d, g in zip(directions, grads, strict=True)
        ]
    opt = RING(
        net,
        lr=0.1,
        rho=0.02,
        step_length=step_length,
        max_kl=None,
        kl_clip=None,
        weight_decay=0.5,
    )
    train_step(net, opt, x, y)
    expected = [
        before[0] * 0.95 - 0.1 * directions[0][:, :6],
        before[1] * 0.95 - 0.1 * directions[0][:, 6],
        before[2] * 0.95 - 0.1 * directions[1],
    ]
    for got, want in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def make_copy(net):
    """The same weights without the hooks of an optimizer, and without in-place activations."""
    fresh = make_net(next(net.parameters()).dtype)
    fresh.load_state_dict(net.state_dict())
    return fresh


def test_kl_clip_bounds_the_quadratic_form():
    net, (x, y) = make_net(), batch()
    opt = RING(
        net, lr=3.0, step_length="kl_clip", betas=(0.0, 0.999), kl_clip=1e-3, weight_decay=0.0
    )
    logits = net(x)
    opt.observe(logits)
    F.cross_entropy(logits, y).backward()
    before = [p.detach().clone() for p in net.parameters()]
    grads = [p.grad.clone() for p in net.parameters()]
    opt.step()
    # step = lr·ν·D and ν = √(c / (lr² ⟨D, G⟩)), so lr·⟨step, G⟩ = lr²·ν·⟨D, G⟩ = √(c · lr² ⟨D, G⟩).
    steps = [b - p.detach() for b, p in zip(before, net.parameters(), strict=True)]
    predicted = sum((s * g).sum() for s, g in zip(steps, grads, strict=True))
    unclipped = make_copy(net)
    with torch.no_grad():
        for p, b in zip(unclipped.parameters(), before, strict=True):
            p.copy_(b)
    free = RING(
        unclipped, lr=3.0, step_length="kl_clip", betas=(0.0, 0.999), kl_clip=None, weight_decay=0.0
    )
    train_step(unclipped, free, x, y)
    full = [b - p.detach() for b, p in zip(before, unclipped.parameters(), strict=True)]
    form = 3.0 * sum((s * g).sum() for s, g in zip(full, grads, strict=True))  # lr² ⟨D, G⟩
    assert form > 1e-3, "the clip must be active in this test"
    torch.testing.assert_close(predicted * 3.0, (1e-3 * form).sqrt())


def test_scaling_the_loss_divides_the_direction():
    # F scales by c² and G by c, so the update by 1/c: empirical Fisher sees the scaled loss.
    moves = []
    for scale in (1.0, 4.0):
        torch.manual_seed(0)
        net, (x, y) = make_net(), batch()
        before = net[2].weight.detach().clone()
        opt = RING(net, step_length="kl_clip", kl_clip=None, weight_decay=0.0)
        (F.cross_entropy(net(x), y) * scale).backward()
        opt.step()
        moves.append(before - net[2].weight.detach())
    torch.testing.assert_close(moves[0], moves[1] * 4.0)


def test_corrected_decay_weighs_batches_like_a_bias_corrected_average():
    decay, weights = 0.9, []
    for k in range(6):
        d = corrected_decay(k, decay)
        weights = [w * d for w in weights] + [1 - d]
    exact = [decay ** (5 - i) * (1 - decay) / (1 - decay**6) for i in range(6)]
    assert weights == pytest.approx(exact, rel=1e-12)
    assert corrected_decay(0, decay) == 0.0


@pytest.mark.parametrize("observe", [True, False])
def test_micro_batches_equal_one_large_batch(observe):
    torch.manual_seed(0)
    net, (x, y) = make_net(), batch(rows=32)
    twin = make_copy(net)
    opt, other = RING(net), RING(twin)
    if observe:
        # Sampled labels differ between one draw of 32 and two of 16: use outputs whose noise is fixed.
        logits, halves = net(x), [twin(x[:16]), twin(x[16:])]
        noise = torch.randn(32, 3, dtype=torch.float64)
        opt._capture.observe([(logits * noise).sum()], 32)
        for half, n in zip(halves, (noise[:16], noise[16:]), strict=True):
            other._capture.observe([(half * n).sum()], 16)
        F.cross_entropy(logits, y).backward()
        for half, labels in zip(halves, (y[:16], y[16:]), strict=True):
            (F.cross_entropy(half, labels) / 2).backward()
    else:
        F.cross_entropy(net(x), y).backward()
        for i in (0, 16):
            F.cross_entropy(twin(x[i : i + 16]), y[i : i + 16]).backward()
        for p in twin.parameters():
            p.grad /= 2
    opt.step()
    other.step()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


def test_observe_leaves_gradients_and_random_state_alone():
    net, (x, _) = make_net(), batch()
    opt = RING(net)
    logits = net(x)
    state = torch.get_rng_state()
    opt.observe(logits)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in net.parameters())


def test_sampled_loss_gives_the_model_fisher():
    # E[g gᵀ] over sampled labels is diag(q) − q qᵀ: 60,000 samples, standard error about 2e-3.
    logits = torch.tensor([0.5, -1.0, 0.2]).repeat(60_000, 1).requires_grad_()
    (g,) = torch.autograd.grad(
        sampled_loss(logits, "categorical", torch.Generator().manual_seed(0)), logits
    )
    q = torch.softmax(logits[0].detach(), 0)
    torch.testing.assert_close(
        g.T @ g / len(g), torch.diag(q) - torch.outer(q, q), rtol=0, atol=8e-3
    )
    (g,) = torch.autograd.grad(
        sampled_loss(logits, "gaussian", torch.Generator().manual_seed(0)), logits
    )
    torch.testing.assert_close(g.T @ g / len(g), torch.eye(3), rtol=0, atol=3e-2)


def test_without_observe_the_fisher_is_empirical_and_explain_says_so():
    net, (x, y) = make_net(), batch()
    opt = RING(net)
    train_step(net, opt, x, y, observe=False)
    assert "empirical" in opt.explain()
    opt._capture.clear()
    for _ in range(3):
        train_step(net, opt, x, y)
    assert "sampled labels" in opt.explain()


def test_evaluation_keeps_nothing():
    net, (x, _) = make_net(), batch()
    opt = RING(net)
    with torch.no_grad():
        net(x)
    assert not any(opt._capture.records.values())


def test_nonfinite_gradient_changes_nothing_and_raises_after_three():
    net, (x, y) = make_net(torch.float32), batch(dtype=torch.float32)
    opt = RING(net)
    train_step(net, opt, x, y)
    params = [p.detach().clone() for p in net.parameters()]
    state = copy.deepcopy(opt.state_dict())
    for attempt in range(4):
        F.cross_entropy(net(x), y).backward()
        net[2].weight.grad[0, 0] = float("nan")
        if attempt < 3:
            opt.step()
        else:
            with pytest.raises(
                PreconditionerError, match=r"non-finite gradients in 4 steps.*2\.weight"
            ):
                opt.step()
        opt.zero_grad()
    for p, q in zip(net.parameters(), params, strict=True):
        assert torch.equal(p, q)
    assert_same_state(opt.state_dict(), state)


def test_a_good_step_resets_the_count_of_bad_ones():
    net, (x, y) = make_net(torch.float32), batch(dtype=torch.float32)
    opt = RING(net)
    for bad in (True, True, True, False, True, True, True, False):
        F.cross_entropy(net(x), y).backward()
        if bad:
            net[0].bias.grad[0] = float("inf")
        opt.step()
        opt.zero_grad()
    assert opt.diagnostics()["skipped_steps_in_a_row"] == 0


def test_a_failed_inverse_keeps_the_previous_one(monkeypatch):
    net, (x, y) = make_net(torch.float32), batch(dtype=torch.float32)
    opt = RING(net, refresh_every=1)
    train_step(net, opt, x, y)
    kept = opt.state[net[0].weight]["input_inverse"].clone()
    real = grng_kernels.damped_inverse

    def failing(*args, **kwargs):
        result = real(*args, **kwargs)
        broken = [torch.full_like(i, float("nan")) for i in result.inverse]
        return result._replace(inverse=broken, info=[torch.full_like(i, 2) for i in result.info])

    monkeypatch.setattr(grng_kernels, "damped_inverse", failing)
    train_step(net, opt, x, y)
    assert torch.equal(opt.state[net[0].weight]["input_inverse"], kept)
    assert opt.diagnostics()["0/inverse_failures"] == 2
    assert all(torch.isfinite(p).all() for p in net.parameters())


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    assert a["param_groups"] == b["param_groups"]
    for key, entry in a["state"].items():
        for name, value in entry.items():
            other = b["state"][key][name]
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, other) and value.dtype == other.dtype, name
            else:
                assert value == other, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_resume_equals_the_uninterrupted_run(dtype, tmp_path):
    def build():
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.LayerNorm(5), nn.Linear(5, 3)).to(dtype)
        return net, RING(net, refresh_every=4)

    x, y = batch(dtype=dtype)
    net, opt = build()
    for step in range(13):
        if step == 6:
            torch.save({"net": net.state_dict(), "opt": opt.state_dict()}, tmp_path / "c.pt")
        train_step(net, opt, x, y)
    other, resumed = build()
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    other.load_state_dict(saved["net"])
    resumed.load_state_dict(saved["opt"])
    assert resumed.state[other[0].weight]["input_factor"].dtype == torch.float32
    for _ in range(6, 13):
        train_step(other, resumed, x, y)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    assert_same_state(opt.state_dict(), resumed.state_dict())


def test_bare_parameters_train_exactly_like_adamw():
    torch.manual_seed(0)
    net, (x, y) = make_net(torch.float32), batch(dtype=torch.float32)
    twin = make_copy(net)
    opt = RING(net.parameters(), adamw_lr=2e-3, weight_decay=0.1)
    other = torch.optim.AdamW(twin.parameters(), lr=2e-3, weight_decay=0.1)
    for _ in range(5):
        train_step(net, opt, x, y)
        F.cross_entropy(twin(x), y).backward()
        other.step()
        other.zero_grad()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    assert "bare parameter" in opt.explain()


def test_scheduler_closure_and_frozen_layers():
    net, (x, y) = make_net(torch.float32), batch(dtype=torch.float32)
    net[0].requires_grad_(False)
    frozen = net[0].weight.detach().clone()
    opt = RING(net, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)

    def closure():
        opt.zero_grad()
        logits = net(x)
        opt.observe(logits)
        loss = F.cross_entropy(logits, y)
        loss.backward()
        return loss

    losses = [opt.step(closure).item() for _ in range(1)]
    scheduler.step()
    losses += [opt.step(closure).item() for _ in range(8)]
    assert opt.param_groups[0]["lr"] == 0.05
    assert losses[-1] < losses[0]
    assert torch.equal(net[0].weight, frozen)


def test_warm_up_does_not_undo_the_kl_clip():
    # The step of a tiny learning rate is tiny, and stays so in the momentum when the rate rises.
    net, (x, y) = make_net(), batch()
    opt = RING(net, lr=1e-6, step_length="kl_clip", refresh_every=1, weight_decay=0.0)
    for _ in range(3):
        train_step(net, opt, x, y)
    stored = opt.state[net[2].weight]["momentum_buffer"].norm().item()
    opt.param_groups[0]["lr"] = 1.0
    before = net[2].weight.detach().clone()
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    assert (net[2].weight - before).norm().item() == pytest.approx(0.9 * stored, rel=1e-6)


def test_a_bypassed_layer_is_handed_to_adamw_with_one_warning():
    class Bypass(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.bypassed = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x):
            return F.linear(self.used(x), self.bypassed.weight, self.bypassed.bias)

    net, (x, y) = Bypass(), batch(dtype=torch.float32)
    opt = RING(net)
    before = net.bypassed.weight.detach().clone()
    with pytest.warns(RuntimeWarning, match="no statistics reached bypassed"):
        train_step(net, opt, x, y)
    assert not torch.equal(net.bypassed.weight, before)
    train_step(net, opt, x, y)
    assert "its module's hooks never ran" in opt.explain()


def test_shared_weights_and_other_layers_are_explained():
    net = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    net["head"].weight = net["embed"].weight
    net["norm"] = nn.LayerNorm(4)
    net["wide"] = nn.Linear(3, 40)
    text = RING(net, max_factor_dim=20).explain()
    assert "shared: embed.weight, head.weight" in text or "Embedding has no" in text
    assert "LayerNorm has no Kronecker factors" in text
    assert "40 (diagonal), 4x4" in text


def test_observe_errors():
    net, (x, y) = make_net(), batch()
    opt = RING(net)
    logits = net(x)
    with pytest.raises(
        ValueError, match="likelihood must be one of categorical, gaussian, got 'x'"
    ):
        opt.observe(logits, likelihood="x")
    with pytest.raises(ValueError, match="attached to the graph"):
        opt.observe(logits.detach())
    F.cross_entropy(logits, y).backward()
    opt._capture.clear()
    logits = net(x)
    F.cross_entropy(logits, y).backward()
    for records in opt._capture.records.values():
        for record in records:
            record.output_grad, record.passed = None, False
    with pytest.raises(RuntimeError, match=r"before loss\.backward\(\)"):
        opt.observe(logits)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -0.1),
        ("lr", float("nan")),
        ("rho", 0.0),
        ("refresh_every", 0),
        ("factor_decay", 1.0),
        ("betas", (0.9, 1.0)),
        ("betas", 0.9),
        ("step_length", "long"),
        ("fisher", "none"),
        ("sharing", "mean"),
        ("weight_decay", -1.0),
        ("kl_clip", 0.0),
        ("adamw_lr", float("inf")),
        ("max_factor_dim", 0),
    ],
)
def test_bad_hyperparameters_are_named(name, value):
    with pytest.raises(ValueError, match=rf"RING: {name}.* must be .*got "):
        RING(make_net(), **{name: value})


def test_a_model_without_trainable_parameters_is_an_error():
    with pytest.raises(ValueError, match="no trainable parameters"):
        RING(nn.ReLU())


def test_a_discarded_optimizer_leaves_only_idle_hooks():
    net, (x, y) = make_net(torch.float32), batch(dtype=torch.float32)
    RING(net)
    opt = RING(net)
    train_step(net, opt, x, y)
    assert opt.diagnostics()["kronecker_layers"] == 2


def test_a_layer_without_signal_cannot_poison_the_others():
    # Inputs near 1e-18 give an input factor near 1e-36, whose inverse overflows beside a real gradient.
    net = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 3))
    opt = RING(net)
    x, y = torch.randn(40, 6) * 1e-20, torch.randint(0, 3, (40,))
    for _ in range(3):
        logits = net(x)
        opt.observe(logits)
        F.cross_entropy(logits, y).backward()
        for p in net.parameters():
            p.grad.add_(1e-3)
        opt.step()
        opt.zero_grad()
    assert all(torch.isfinite(p).all() for p in net.parameters())
