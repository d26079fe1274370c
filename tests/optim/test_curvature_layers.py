# SPDX-License-Identifier: Apache-2.0
"""The factors of every kind of layer against plain torch in fp64, and what reaches them in real loops."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from grng import RING
from tests.optim.plain_factors import (
    exact_fisher,
    exact_grads,
    is_convolution,
    output_rows,
    plain_factors,
)

CLASSES = 3


def transposed_linear(bias):
    layer = pytest.importorskip("transformers.pytorch_utils").Conv1D(3, 4)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    layer.bias.requires_grad_(bias)  # it always has one: frozen, it has no column
    return layer


# Module, shape of its input.
KINDS = {
    "linear": (lambda b: nn.Linear(4, 3, bias=b), (5, 4)),
    "linear-sequence": (lambda b: nn.Linear(4, 3, bias=b), (5, 6, 4)),
    "linear-images": (lambda b: nn.Linear(4, 3, bias=b), (2, 3, 2, 4)),
    "linear-unbatched": (lambda b: nn.Linear(4, 3, bias=b), (4,)),
    "linear-batch-of-one": (lambda b: nn.Linear(4, 3, bias=b), (1, 6, 4)),
    "conv1d": (lambda b: nn.Conv1d(2, 3, 3, bias=b), (3, 2, 7)),
    "conv1d-strided": (
        lambda b: nn.Conv1d(4, 6, 3, 2, padding=3, dilation=2, groups=2, bias=b),
        (3, 4, 9),
    ),
    "conv1d-same": (lambda b: nn.Conv1d(2, 3, 5, padding="same", bias=b), (3, 2, 7)),
    "conv1d-unbatched": (lambda b: nn.Conv1d(2, 3, 3, bias=b), (2, 7)),
    "conv2d": (lambda b: nn.Conv2d(2, 3, 3, bias=b), (3, 2, 5, 4)),
    "conv2d-1x1": (lambda b: nn.Conv2d(2, 3, 1, bias=b), (3, 2, 4, 4)),
    "conv2d-strided": (
        lambda b: nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0), bias=b),
        (3, 2, 7, 5),
    ),
    "conv2d-dilated": (
        lambda b: nn.Conv2d(2, 3, 3, dilation=(2, 1), padding="same", bias=b),
        (3, 2, 6, 5),
    ),
    "conv2d-valid": (lambda b: nn.Conv2d(2, 3, 2, padding="valid", bias=b), (3, 2, 4, 4)),
    "conv2d-grouped": (lambda b: nn.Conv2d(4, 6, 3, groups=2, padding=1, bias=b), (3, 4, 4, 4)),
    "conv2d-depthwise": (lambda b: nn.Conv2d(4, 8, 3, groups=4, bias=b), (3, 4, 5, 5)),
    "conv2d-unbatched": (lambda b: nn.Conv2d(2, 3, 3, bias=b), (2, 5, 4)),
    "conv2d-one-position": (lambda b: nn.Conv2d(2, 3, 3, bias=b), (4, 2, 3, 3)),
    "transformers-conv1d": (transposed_linear, (5, 6, 4)),
}


class Classifier(nn.Module):
    """One layer and a head without parameters: a term of the loss for each example, or for each position."""

    def __init__(self, layer, *, pooled):
        super().__init__()
        self.layer, self.pooled = layer, pooled

    def forward(self, x):
        self.z = self.layer(x)
        return self.head(output_rows(self.layer, self.z))

    def fresh(self):
        """The same weights, without the last output and hooks."""
        self.z = None
        return copy.deepcopy(self)

    def head(self, rows):
        mix = torch.randn(
            rows.shape[-1], CLASSES, generator=torch.Generator().manual_seed(5), dtype=rows.dtype
        )
        if self.pooled:
            rows = rows * torch.linspace(0.5, 2.0, rows.shape[1], dtype=rows.dtype)[:, None]
            return rows.tanh().sum(1) @ mix
        return rows.tanh() @ mix


def factors(opt, layer):
    """Λ and Γ of a layer in the state of its optimizer, as blocks."""
    state = opt.state[layer.weight]
    found = state["output_factor"], state["input_factor"]
    return tuple(f if f.dim() == 3 else f[None] for f in found)


def observed_step(model, opt, x, likelihood="categorical", *, parts=1):
    """One step on the mean loss, in micro-batches; returns the outputs."""
    for part in x.chunk(parts) if parts > 1 else [x]:
        outputs = model(part)
        opt.observe(outputs, likelihood=likelihood)
        (outputs.square().mean() / parts).backward()
    opt.step()
    opt.zero_grad()
    return outputs


def auto_reduces(layer, pooled):
    """Whether ``sharing="auto"`` is *reduce*: where an example has one term, but not for convolutions."""
    return pooled and not is_convolution(layer)


def check(found, wanted):
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == torch.float64
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sharing", ["expand", "reduce", "auto"])
@pytest.mark.parametrize("pooled", [True, False], ids=["per-example", "per-position"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("kind", KINDS)
def test_factors_are_those_of_plain_torch(kind, bias, pooled, sharing):
    build, shape = KINDS[kind]
    model = Classifier(build(bias).double(), pooled=pooled)
    x = torch.randn(shape, dtype=torch.float64)
    outputs = model(x)
    terms = outputs.shape[:-1].numel()
    reduce = sharing == "reduce" or (sharing == "auto" and auto_reduces(model.layer, pooled))
    if reduce and not pooled:  # several terms meet in one row: exact only on average
        fisher, grads = "empirical", torch.autograd.grad(outputs.square().mean() * terms, model.z)
    else:
        fisher, grads = "exact", exact_grads(outputs, model.z)
    wanted = plain_factors(model.layer, x, grads, reduce=reduce, terms=terms)
    opt = RING(model, lr=0.0, fisher=fisher, sharing=sharing)
    observed_step(model, opt, x)
    check(factors(opt, model.layer), wanted)
    assert f"Fisher: {fisher}" in opt.explain()


@pytest.mark.parametrize("kind", ["linear-sequence", "conv1d-strided", "conv2d-grouped"])
@pytest.mark.parametrize("pooled", [True, False], ids=["per-example", "per-position"])
def test_factors_of_the_gradients_of_the_loss(kind, pooled):
    build, shape = KINDS[kind]
    model = Classifier(build(True).double(), pooled=pooled)
    x = torch.randn(shape, dtype=torch.float64)
    outputs = model(x)
    terms = outputs.shape[:-1].numel()
    # The loss is a mean over the terms: the gradients of their sum are larger by their number.
    (grad,) = torch.autograd.grad(outputs.square().mean() * terms, model.z)
    wanted = plain_factors(
        model.layer, x, [grad], reduce=auto_reduces(model.layer, pooled), terms=terms
    )
    opt = RING(model, lr=0.0, fisher="empirical")
    observed_step(model, opt, x)
    check(factors(opt, model.layer), wanted)


@pytest.mark.parametrize("kind", ["linear", "conv2d-strided", "transformers-conv1d"])
def test_factors_of_sampled_labels_agree_with_the_exact_ones_on_average(kind):
    build, shape = KINDS[kind]
    model = Classifier(build(True).double(), pooled=True)
    x = torch.randn(shape, dtype=torch.float64)
    exact = RING(model, lr=0.0, fisher="exact")
    observed_step(model, exact, x)
    sampled = RING(model, lr=0.0, refresh_every=1, factor_decay=0.9999)
    for _ in range(400):
        observed_step(model, sampled, x)
    (want, gamma), (got, same) = factors(exact, model.layer), factors(sampled, model.layer)
    # 400 labels for each of at least 3 examples: the standard error is a few percent of the largest.
    assert (got - want).abs().max() < 0.2 * want.abs().max()
    torch.testing.assert_close(same, gamma, rtol=1e-6, atol=1e-9)


class Mixing(nn.Module):
    """A layer whose rows reach the terms of all positions of their example."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("mix", torch.randn(5, 5))

    def forward(self, x):
        self.z = self.layer(x)
        return self.mix @ self.z.tanh()


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_the_exact_fisher_of_terms_that_meet_is_right_on_average(likelihood, sharing):
    model = Mixing().double()
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    outputs = model(x)
    # One term at a time: nothing meets.
    wanted = sum(
        plain_factors(
            model.layer,
            x,
            exact_grads(outputs[n, t], model.z, likelihood),
            reduce=sharing == "reduce",
            terms=15,
        )[0]
        for n in range(3)
        for t in range(5)
    )
    opt = RING(model, lr=0.0, fisher="exact", sharing=sharing, refresh_every=1, factor_decay=0.9999)
    for _ in range(300):
        observed_step(model, opt, x, likelihood)
    error = (factors(opt, model.layer)[0] - wanted).abs().max() / wanted.abs().max()
    assert error < 0.1


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_the_fisher_of_one_sample_is_the_kronecker_product(bias):
    net = nn.Sequential(nn.Linear(4, 5, bias=bias), nn.Tanh(), nn.Linear(5, 3, bias=bias)).double()
    x = torch.randn(1, 4, dtype=torch.float64)
    opt = RING(net, lr=0.0, fisher="exact")
    observed_step(net, opt, x)
    for layer in (net[0], net[2]):
        check_fisher(opt, net, layer, x, "categorical")


def check_fisher(opt, net, layer, x, likelihood):
    """Compare the block of one layer of the exact Fisher information with Λ ⊗ Γ."""
    out, inp = factors(opt, layer)
    fisher = exact_fisher(net(x), list(layer.parameters()), likelihood)
    d_out, d_in = layer.weight.flatten(1).shape
    # Rows of the weight, and then the bias: its entries are the last column of the matrix.
    place = torch.arange(d_out * d_in).view(d_out, d_in)
    if layer.bias is not None:
        place = torch.cat([place, d_out * d_in + torch.arange(d_out)[:, None]], 1)
    place = place.reshape(-1)
    torch.testing.assert_close(
        torch.kron(out[0], inp[0]), fisher[place][:, place], rtol=1e-9, atol=1e-12
    )


def test_the_fisher_of_a_linear_net_is_the_kronecker_product():
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double()
    x = torch.randn(7, 4, dtype=torch.float64)
    opt = RING(net, lr=0.0, fisher="exact")
    observed_step(net, opt, x, "gaussian")
    for layer in net:
        check_fisher(opt, net, layer, x, "gaussian")


class Pooled(nn.Module):
    def forward(self, x):
        return x.flatten(2).mean(2)


class LastChannels(nn.Module):
    def forward(self, x):
        return x.flatten(2).mT


@pytest.mark.parametrize(("pool", "sharing"), [(Pooled, "reduce"), (LastChannels, "expand")])
@pytest.mark.parametrize("kind", ["1d", "2d"])
def test_the_fisher_of_a_linear_convolution_is_the_kronecker_product(kind, pool, sharing):
    # Reduce is exact under an average over the positions, expand with a term for each.
    conv, shape = {
        "1d": (nn.Conv1d(2, 3, 3, padding=1), (4, 2, 5)),
        "2d": (nn.Conv2d(2, 3, 2, stride=(1, 2)), (4, 2, 4, 5)),
    }[kind]
    net = nn.Sequential(conv, pool(), nn.Linear(3, 2)).double()
    x = torch.randn(shape, dtype=torch.float64)
    opt = RING(net, lr=0.0, fisher="exact", sharing=sharing)
    observed_step(net, opt, x, "gaussian")
    check_fisher(opt, net, conv, x, "gaussian")


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("kind", ["linear", "linear-sequence", "transformers-conv1d"])
def test_diagonal_sides_are_the_diagonals_of_the_dense_ones(kind, sharing):
    build, shape = KINDS[kind]
    model = Classifier(build(True).double(), pooled=True)
    x = torch.randn(shape, dtype=torch.float64)
    states, said = [], []
    for most in (8192, 4, 2):
        opt = RING(model, lr=0.0, rho=1e-2, fisher="exact", sharing=sharing, max_factor_dim=most)
        observed_step(model, opt, x)
        states.append(opt.state[model.layer.weight])
        said.append(opt.explain())
    full, half, none = states
    assert "3x3, 5 (diagonal)" in said[1] and "3 (diagonal), 5 (diagonal)" in said[2]
    for side, state in (("input", half), ("input", none), ("output", none)):
        torch.testing.assert_close(state[f"{side}_factor"], full[f"{side}_factor"].diagonal())
    torch.testing.assert_close(half["output_factor"], full["output_factor"])
    for state in (half, none):
        s = state["input_factor"]
        torch.testing.assert_close(state["input_inverse"], 1 / (s + 0.1 * s.max()))


@pytest.mark.parametrize("max_factor_dim", [4, 2], ids=["one-side", "both-sides"])
def test_the_step_with_diagonal_sides_is_the_product(max_factor_dim):
    layer = nn.Linear(4, 3).double()
    opt = RING(
        layer, lr=0.1, step_length="kl_clip", kl_clip=None, weight_decay=0.0,
        max_factor_dim=max_factor_dim,
    )  # fmt: skip
    x = torch.randn(5, 4, dtype=torch.float64)
    before = torch.cat([layer.weight, layer.bias[:, None]], 1).detach()
    outputs = layer(x)
    opt.observe(outputs)
    outputs.square().mean().backward()
    grad = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
    opt.step()
    state = opt.state[layer.weight]
    left, right = (
        torch.diag(i) if i.dim() == 1 else i
        for i in (state["output_inverse"], state["input_inverse"])
    )
    after = torch.cat([layer.weight, layer.bias[:, None]], 1).detach()
    torch.testing.assert_close(before - after, 0.1 * left @ grad @ right)


@pytest.mark.parametrize("kind", KINDS)
def test_the_step_is_the_product_in_every_layer(kind):
    build, shape = KINDS[kind]
    model = Classifier(build(True).double(), pooled=True)
    layer, x = model.layer, torch.randn(shape, dtype=torch.float64)
    opt = RING(model, lr=0.1, step_length="kl_clip", kl_clip=None, weight_decay=0.0, rho=0.3)
    before = matrices(layer, layer.weight, layer.bias)
    outputs = model(x)
    opt.observe(outputs)
    outputs.square().mean().backward()
    grads = matrices(layer, layer.weight.grad, layer.bias.grad)
    opt.step()
    after = matrices(layer, layer.weight, layer.bias)
    out, inp = factors(opt, layer)
    for b, a, g, o, i in zip(before, after, grads, out, inp, strict=True):
        damped = [
            f + 0.3**0.5 * torch.linalg.matrix_norm(f, 2) * torch.eye(len(f), dtype=f.dtype)
            for f in (o, i)
        ]
        step = torch.linalg.solve(damped[0], torch.linalg.solve(damped[1], g.T).T)
        # The norm for the damping is an estimate, from one product so far.
        assert F.cosine_similarity((b - a).flatten(), step.flatten(), 0) > 0.995
        assert (b - a).norm() == pytest.approx(0.1 * step.norm().item(), rel=0.3)


def matrices(layer, weight, bias):
    """Weight and bias of each group as one matrix."""
    matrix = weight.mT if type(layer).__name__ == "Conv1D" else weight.flatten(1)
    whole = torch.cat([matrix, bias[:, None]], 1).detach().clone()
    return whole.chunk(getattr(layer, "groups", 1))


@pytest.mark.parametrize("sharing", ["expand", "reduce", "auto"])
@pytest.mark.parametrize("kind", ["conv1d-strided", "conv2d-strided", "conv2d-grouped"])
def test_micro_batches_of_images_equal_one_large_batch(kind, sharing):
    build, shape = KINDS[kind]
    model = Classifier(build(True).double(), pooled=True)
    x = torch.randn(6, *shape[1:], dtype=torch.float64)
    whole = RING(model, lr=0.0, fisher="exact", sharing=sharing)
    observed_step(model, whole, x)
    for parts in (2, 3):
        opt = RING(model, lr=0.0, fisher="exact", sharing=sharing)
        observed_step(model, opt, x, parts=parts)
        check(factors(opt, model.layer), factors(whole, model.layer))


def test_a_module_used_twice_counts_as_one_large_batch():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 3)

        def forward(self, x):
            self.zs = [self.conv(part) for part in (x, 2 * x.flip(3))]
            return sum(z.tanh().mean((2, 3)) for z in self.zs)

    model, x = Twice().double(), torch.randn(4, 2, 5, 5, dtype=torch.float64)
    outputs = model(x)
    inputs = torch.cat([x, 2 * x.flip(3)])
    grads = [
        torch.cat(pair) for pair in zip(*(exact_grads(outputs, z) for z in model.zs), strict=True)
    ]
    for sharing in ("expand", "reduce"):
        # Both uses lead to the same four terms.
        wanted = plain_factors(model.conv, inputs, grads, reduce=sharing == "reduce", terms=4)
        opt = RING(model, lr=0.0, fisher="exact", sharing=sharing)
        observed_step(model, opt, x)
        check(factors(opt, model.conv), wanted)


class Checkpointed(nn.Module):
    """A stem, a block that may be recomputed, a head."""

    def __init__(self, reentrant):
        super().__init__()
        self.stem, self.head = nn.Conv1d(2, 3, 3), nn.Linear(4, CLASSES)
        self.block = nn.Sequential(nn.Conv1d(3, 4, 1), nn.Tanh(), nn.Conv1d(4, 4, 3, groups=2))
        self.reentrant = reentrant

    def forward(self, x):
        h = self.stem(x).tanh()
        if self.reentrant is None:
            h = self.block(h)
        else:
            h = checkpoint(self.block, h, use_reentrant=self.reentrant)
        return self.head(h.tanh().mean(2))


@pytest.mark.parametrize("fisher", ["sampled", "exact", "empirical"])
def test_checkpointing_that_is_not_reentrant_changes_nothing(fisher):
    plain = Checkpointed(None).double()
    twin = copy.deepcopy(plain)
    twin.reentrant = False
    opts = [RING(m, fisher=fisher, refresh_every=2) for m in (plain, twin)]
    for _ in range(5):
        x = torch.randn(5, 2, 7, dtype=torch.float64)
        for model, opt in zip((plain, twin), opts, strict=True):
            observed_step(model, opt, x)
    for a, b in zip(plain.modules(), twin.modules(), strict=True):
        if isinstance(a, (nn.Conv1d, nn.Linear)):
            check(factors(opts[1], b), factors(opts[0], a))
            torch.testing.assert_close(a.weight, b.weight)
    assert opts[0].explain() == opts[1].explain()


def test_reentrant_checkpointing_falls_back_to_the_gradients_of_the_loss():
    plain = Checkpointed(None).double()
    twin = copy.deepcopy(plain)
    twin.reentrant = True
    opts = [RING(plain, lr=0.0, fisher="empirical"), RING(twin, lr=0.0)]
    x = torch.randn(5, 2, 7, dtype=torch.float64)
    for model, opt in zip((plain, twin), opts, strict=True):
        observed_step(model, opt, x)
    assert "Fisher: empirical: observe() was not called, or could not reach" in opts[1].explain()
    # The stem lies behind the block, and observe() cannot pass it.
    check(factors(opts[1], twin.stem), factors(opts[0], plain.stem))
    assert all(
        factors(opts[1], twin.block[i])[0].abs().max() > 0
        and torch.isfinite(factors(opts[1], twin.block[i])[0]).all()
        for i in (0, 2)
    )


def test_a_net_with_reentrant_checkpointing_is_trained():
    torch.manual_seed(0)
    model = Checkpointed(True)
    x = torch.randn(60, 2, 7)
    y = (x.mean(2) @ torch.randn(2, CLASSES)).argmax(1)
    opt = RING(model, lr=0.01)
    losses = []
    for _ in range(40):
        outputs = model(x)
        opt.observe(outputs)
        loss = F.cross_entropy(outputs, y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert "hooks never ran" not in opt.explain()


class LoraLinear(nn.Module):
    """The names of PEFT: a frozen layer, and a product of rank 2 beside it that starts at zero."""

    def __init__(self, n):
        super().__init__()
        self.base_layer = nn.Linear(n, n).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(n, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, n, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)

    def forward(self, x):
        return self.base_layer(x) + 2 * self.lora_B["default"](self.lora_A["default"](x))


@pytest.mark.parametrize("step_length", ["graft", "kl_clip"])
def test_lora_starts_without_signal_and_recovers(step_length):
    torch.manual_seed(0)
    model = nn.Sequential(LoraLinear(40), nn.Tanh(), nn.Linear(40, CLASSES).requires_grad_(False))
    x = torch.randn(50, 40)
    y = (x @ torch.randn(40, CLASSES)).argmax(1)
    opt = RING(model, lr=0.02, refresh_every=4, step_length=step_length)
    assert "2x2, 40 (diagonal)" in opt.explain() and "40 (diagonal), 2x2" in opt.explain()
    assert "base_layer" not in opt.explain()
    low, high = model[0].lora_A["default"], model[0].lora_B["default"]
    frozen = copy.deepcopy(model[0].base_layer.state_dict())
    losses = []
    for k in range(60):
        outputs = model(x)
        opt.observe(outputs)
        loss = F.cross_entropy(outputs, y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
        if k == 0:
            assert not opt.state[low.weight]["output_factor"].any(), "no gradient reaches A yet"
            assert high.weight.any()
        assert all(torch.isfinite(p).all() for p in model.parameters())
    assert losses[-1] < 0.7 * losses[0], losses
    for layer, (o, i) in ((low, (2, 40)), (high, (40, 2))):
        state = opt.state[layer.weight]
        assert len(state["output_factor"]) == o and len(state["input_factor"]) == i
        for key in ("output_factor", "input_factor", "output_inverse", "input_inverse"):
            assert torch.isfinite(state[key]).all() and state[key].any(), key
        assert opt.diagnostics()[f"0.lora_{'A' if o == 2 else 'B'}.default/factor_failures"] == 0
    for name, value in model[0].base_layer.state_dict().items():
        assert torch.equal(value, frozen[name])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_between_forward_and_backward_keeps_nothing(mode):
    model = Classifier(nn.Conv2d(2, 3, 3).double(), pooled=True)
    twin = copy.deepcopy(model)
    opts = [RING(m, lr=0.0, fisher="exact") for m in (model, twin)]
    x = torch.randn(4, 2, 5, 5, dtype=torch.float64)
    for net, opt in zip((model, twin), opts, strict=True):
        outputs = net(x)
        if net is model:
            with mode():
                net(torch.randn(9, 2, 5, 5, dtype=torch.float64))
            assert len(opt._capture.records[opt._layers[0]]) == 1
        opt.observe(outputs)
        outputs.square().mean().backward()
        opt.step()
    check(factors(opts[0], model.layer), factors(opts[1], twin.layer))


def test_nothing_is_kept_after_a_step_or_on_steps_that_need_nothing():
    model = Classifier(nn.Conv2d(2, 3, 3), pooled=True)
    opt = RING(model, refresh_every=8)
    for k in range(12):
        outputs = model(torch.randn(4, 2, 5, 5))
        kept = sum(len(r) for r in opt._capture.records.values())
        assert kept == (k in (0, 1, 2, 4, 8))
        opt.observe(outputs)
        outputs.square().mean().backward()
        opt.step()
        opt.zero_grad()
        assert not any(opt._capture.records.values()) and not opt._capture._edges


def test_the_hooks_go_with_the_optimizer():
    model = Classifier(nn.Conv2d(2, 3, 3), pooled=True)
    others = [RING(model) for _ in range(3)]
    assert len(model.layer._forward_hooks) == 3
    del others
    gc.collect()
    assert len(model.layer._forward_hooks) == 0
    RING(model)
    model(torch.randn(1, 2, 5, 5))


def test_a_transposed_linear_layer_called_with_a_keyword():
    layer = transposed_linear(True).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    opt = RING(layer, lr=0.0, fisher="exact")
    outputs = layer(x=x)
    opt.observe(outputs)
    outputs.square().mean().backward()
    opt.step()
    rows = torch.cat([x, x.new_ones(5, 1)], 1)
    torch.testing.assert_close(opt.state[layer.weight]["input_factor"], rows.T @ rows / 5)


def test_frozen_layers_and_layers_without_gradient():
    model = nn.ModuleDict(
        {"frozen": nn.Conv2d(2, 2, 1), "used": nn.Conv2d(2, 3, 3), "idle": nn.Conv2d(2, 3, 3)}
    )
    model["frozen"].requires_grad_(False)
    opt = RING(model)
    before = copy.deepcopy(model.state_dict())
    for _ in range(3):
        outputs = model["used"](model["frozen"](torch.randn(4, 2, 5, 5))).mean((2, 3))
        opt.observe(outputs)
        outputs.square().mean().backward()
        opt.step()
        opt.zero_grad()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (not name.startswith("used")), name
    assert not opt.state[model["idle"].weight]
    assert "frozen" not in opt.explain()


@pytest.mark.parametrize("kind", ["linear-sequence", "conv1d-strided", "conv2d-grouped"])
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_an_empty_batch_leaves_the_factors_alone(kind, first):
    build, shape = KINDS[kind]
    model = Classifier(build(True).double(), pooled=True)
    opt = RING(model, refresh_every=1)
    if not first:
        observed_step(model, opt, torch.randn(shape, dtype=torch.float64))
    kept = {k: torch.as_tensor(v).clone() for k, v in opt.state[model.layer.weight].items()}
    outputs = model(torch.zeros(0, *shape[1:], dtype=torch.float64))
    opt.observe(outputs)
    outputs.sum().backward()
    opt.step()
    opt.zero_grad()
    state = opt.state[model.layer.weight]
    for key in ("input_factor", "output_factor", "input_inverse", "output_inverse"):
        assert (key in state) == (not first)
        assert first or torch.equal(state[key], kept[key]), key
    # An empty micro-batch beside a full one does not count either.
    x = torch.randn(shape, dtype=torch.float64)
    pair = [model.fresh() for _ in range(2)]
    for net, parts in zip(pair, ([x], [x[:0], x, x[:0]]), strict=True):
        net.opt = RING(net, lr=0.0, fisher="exact")
        for part in parts:
            outputs = net(part)
            net.opt.observe(outputs)
            outputs.sum().backward()
        net.opt.step()
    check(factors(pair[1].opt, pair[1].layer), factors(pair[0].opt, pair[0].layer))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("what", ["activations", "gradients"])
@pytest.mark.parametrize(
    ("kind", "most"),
    [
        ("linear-sequence", 8192),
        ("linear-sequence", 2),  # both sides diagonal
        ("conv1d-strided", 8192),
        ("conv2d-grouped", 8192),
    ],
)
def test_statistics_with_nan_or_inf_are_dropped_and_counted(kind, most, what, value):
    build, shape = KINDS[kind]
    model = Classifier(build(True), pooled=True)
    opt = RING(model, lr=0.0, refresh_every=1, max_factor_dim=most)
    observed_step(model, opt, torch.randn(shape))
    state = opt.state[model.layer.weight]
    kept = {key: state[key].clone() for key in ("input_factor", "output_factor")}
    outputs = model(torch.randn(shape))
    opt.observe(outputs)
    outputs.square().mean().backward()
    (record,) = opt._capture.complete(opt._layers[0])
    bad = record.layer_input if what == "activations" else record.output_grad
    bad.data.view(-1)[3] = value  # as the model would: no version is counted
    opt.step()
    spared = "input_factor" if what == "activations" else "output_factor"
    assert torch.equal(state[spared], kept.pop(spared))
    ((other, before),) = kept.items()
    assert not torch.equal(state[other], before) and torch.isfinite(state[other]).all()
    assert opt.diagnostics()["layer/factor_failures"] == 1
    assert opt.diagnostics()["layer/inverse_failures"] == 0


@pytest.mark.parametrize("fisher", ["sampled", "exact", "empirical"])
@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda o: o.sum(), ValueError, r"shape \[\.\.\., C\] with C >= 2, got \[\]"),
        (lambda o: o[:, :1], ValueError, r"with C >= 2, got \[5, 1\]"),
        (lambda o: o.long(), TypeError, "floating-point dtype, got torch.int64"),
        (lambda o: [o], TypeError, "must be a tensor, got list"),
        (lambda o: o.detach(), ValueError, "attached to the graph"),
    ],
    ids=["scalar", "one-class", "integer", "list", "detached"],
)
def test_observe_names_what_it_cannot_use(make, error, said, fisher):
    model = Classifier(nn.Linear(4, 3), pooled=True)
    opt = RING(model, fisher=fisher)
    outputs = model(torch.randn(5, 4))
    with pytest.raises(error, match=said):
        opt.observe(make(outputs))
    # The error leaves the step as it was.
    opt.observe(outputs)
    outputs.square().mean().backward()
    opt.step()
    assert opt.state[model.layer.weight]["input_updates"] == 1


def test_the_exact_fisher_refuses_many_classes():
    layer = nn.Linear(4, 101)
    opt = RING(layer, fisher="exact")
    with pytest.raises(ValueError, match="at most 100 classes, got 101"):
        opt.observe(layer(torch.randn(2, 4)))


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (nn.Conv2d(2, 3, 2, padding="same"), "padding is not symmetric"),
        (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
        (nn.ConvTranspose2d(2, 3, 3), "ConvTranspose2d has no Kronecker factors"),
        (nn.Conv3d(2, 3, 3), "Conv3d has no Kronecker factors"),
        (nn.Conv2d(20, 3, 3), "order 181 exceeds max_factor_dim=100"),
    ],
    ids=["same", "reflect", "transposed", "3d", "large"],
)
def test_other_convolutions_are_trained_by_adamw_and_explained(layer, why):
    opt = RING(layer, max_factor_dim=100)
    assert why in opt.explain()
    shape = (2, layer.in_channels, *[5] * (layer.weight.dim() - 2))
    before = layer.weight.detach().clone()
    layer(torch.randn(shape)).square().mean().backward()
    opt.step()
    assert not torch.equal(layer.weight, before)
