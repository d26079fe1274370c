# SPDX-License-Identifier: Apache-2.0
"""KFAC against the equations of kfac-pytorch and of Martens & Grosse in fp64, and its promises to a loop."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import grng_kernels
from grng import KFAC
from grng.optim.kfac import _split_damping
from tests.optim.plain_factors import plain_factors


def make_net(dtype=torch.float64):
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3, bias=False)).to(dtype)


def make_conv_net():
    return nn.Sequential(
        nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 0)),
        nn.Tanh(),
        nn.Conv2d(4, 3, 2, bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(3 * 2 * 3, 3),
    ).double()


def image_batch(rows=40):
    return torch.randn(rows, 2, 6, 5, dtype=torch.float64), torch.randint(0, 3, (rows,))


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


def flat(params):
    return torch.cat([p.detach().reshape(-1) for p in params])


class PlainKfac:
    """The equations of kfac-pytorch's preconditioner, inverse method, for Linear and Conv2d layers.

    It changes the gradients in place, for torch.optim.SGD to use. ``accumulate`` takes the statistics of one
    micro-batch, whose loss is already divided by the number of micro-batches.
    """

    def __init__(self, net, *, decay, damping, kl_clip, factor_steps, inverse_steps):
        self.net = net
        self.layers = [m for m in net if isinstance(m, (nn.Linear, nn.Conv2d))]
        self.decay, self.damping, self.kl_clip = decay, damping, kl_clip
        self.factor_steps, self.inverse_steps = factor_steps, inverse_steps
        self.steps = 0
        self.factors = [None] * len(self.layers)
        self.inverses = [None] * len(self.layers)
        self.sums, self.count = [None] * len(self.layers), 0
        self.scale = None

    def accumulate(self, x, y, parts=1):
        if self.steps % self.factor_steps:
            return
        inputs, outputs = [], []
        for module in self.net:
            z = module(x)
            if module in self.layers:
                inputs.append(x.detach())
                outputs.append(z)
            x = z
        grads = torch.autograd.grad(F.cross_entropy(x, y) / parts, outputs)
        for i, (layer, v, g) in enumerate(zip(self.layers, inputs, grads, strict=True)):
            new = (self.input_factor(layer, v), self.output_factor(g))
            self.sums[i] = new if self.sums[i] is None else tuple(map(torch.add, self.sums[i], new))
        self.count += 1

    @staticmethod
    def input_factor(layer, v):
        places = 1
        if isinstance(layer, nn.Conv2d):
            up, side = layer.padding
            v = F.pad(v, (side, side, up, up))
            v = v.unfold(2, layer.kernel_size[0], layer.stride[0])
            v = v.unfold(3, layer.kernel_size[1], layer.stride[1])
            v = v.permute(0, 2, 3, 1, 4, 5).flatten(3)
            places = v.shape[1] * v.shape[2]
        v = v.reshape(-1, v.shape[-1])
        if layer.bias is not None:
            v = torch.cat([v, v.new_ones(len(v), 1)], 1)
        v = v / places
        return v.T @ v / len(v)

    @staticmethod
    def output_factor(g):
        if g.dim() == 4:
            g = g.permute(0, 2, 3, 1) / (g.shape[2] * g.shape[3])
        g = g.reshape(-1, g.shape[-1])
        return g.T @ g / len(g)

    def step(self, lr):
        if self.count:
            for i, sums in enumerate(self.sums):
                old = self.factors[i] or tuple(torch.eye(len(s), dtype=s.dtype) for s in sums)
                self.factors[i] = tuple(
                    self.decay * f + (1 - self.decay) * s / self.count
                    for f, s in zip(old, sums, strict=True)
                )
            self.sums, self.count = [None] * len(self.layers), 0
        if self.steps % self.inverse_steps == 0:
            self.inverses = [
                tuple(
                    torch.linalg.inv(f + self.damping * torch.eye(len(f), dtype=f.dtype))
                    for f in factors
                )
                for factors in self.factors
            ]
        new, total = [], 0.0
        for layer, (a_inverse, g_inverse) in zip(self.layers, self.inverses, strict=True):
            grad = layer.weight.grad.flatten(1)
            if layer.bias is not None:
                grad = torch.cat([grad, layer.bias.grad[:, None]], 1)
            new.append(g_inverse @ grad @ a_inverse)
            total += float((new[-1] * grad * lr**2).sum())
        self.scale = 1.0
        if self.kl_clip is not None and total != 0:
            self.scale = min(1.0, (self.kl_clip / abs(total)) ** 0.5)
        for layer, direction in zip(self.layers, new, strict=True):
            columns = layer.weight[0].numel()
            layer.weight.grad = self.scale * direction[:, :columns].reshape(layer.weight.shape)
            if layer.bias is not None:
                layer.bias.grad = self.scale * direction[:, columns]
        self.steps += 1


@pytest.mark.parametrize("parts", [1, 2], ids=["batch", "micro-batches"])
@pytest.mark.parametrize("intervals", [(1, 1), (2, 4)], ids=str)
@pytest.mark.parametrize("kl_clip", [1e-3, None])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_steps_are_those_of_kfac_pytorch_with_sgd(kind, kl_clip, intervals, parts):
    make, draw = {"linear": (make_net, batch), "conv2d": (make_conv_net, image_batch)}[kind]
    net = make()
    twin = copy.deepcopy(net)
    settings = dict(momentum=0.9, weight_decay=5e-3)
    opt = KFAC(
        net,
        lr=0.5,
        convention="kfac-pytorch",
        fisher="empirical",
        damping=2e-2,
        factor_decay=0.9,
        factor_every=intervals[0],
        refresh_every=intervals[1],
        kl_clip=kl_clip,
        **settings,
    )
    plain = PlainKfac(
        twin,
        decay=0.9,
        damping=2e-2,
        kl_clip=kl_clip,
        factor_steps=intervals[0],
        inverse_steps=intervals[1],
    )
    sgd = torch.optim.SGD(twin.parameters(), lr=0.5, **settings)
    scales = []
    for step in range(10):
        x, y = draw()
        for group in (opt.param_groups[0], sgd.param_groups[0]):
            group["lr"] = 0.5 / (1 + step) ** 2
        for part in range(parts):
            some = slice(part * 40 // parts, (part + 1) * 40 // parts)
            logits = net(x[some])
            opt.observe(logits)
            (F.cross_entropy(logits, y[some]) / parts).backward()
            plain.accumulate(x[some], y[some], parts)
            (F.cross_entropy(twin(x[some]), y[some]) / parts).backward()
        opt.step()
        opt.zero_grad()
        plain.step(sgd.param_groups[0]["lr"])
        sgd.step()
        sgd.zero_grad()
        scales.append(plain.scale)
        torch.testing.assert_close(
            flat(net.parameters()), flat(twin.parameters()), rtol=1e-10, atol=1e-10
        )
    if kl_clip is not None:
        assert min(scales) < 1 == max(scales), "both sides of the clip must be seen"


def dense_factors(net, x, step):
    """B, A of both layers from per-sample gradients of sampled labels, one sample at a time."""
    generator = torch.Generator().manual_seed(step)
    q = net(x).detach().float().softmax(-1)
    labels = torch.multinomial(q, 1, generator=generator).squeeze(1)
    found = [(0.0, 0.0), (0.0, 0.0)]
    for k in range(len(x)):
        h = net[0](x[k])
        a = h.relu()
        z = net[2](a)
        grads = torch.autograd.grad(F.cross_entropy(z[None], labels[k : k + 1]), [h, z])
        inputs = [torch.cat([x[k], x.new_ones(1)]), a.detach()]
        found = [
            (b + torch.outer(g, g) / len(x), f + torch.outer(v, v) / len(x))
            for (b, f), g, v in zip(found, grads, inputs, strict=True)
        ]
    return found


def check_factors(opt, layer, out, inp):
    state = opt.state[layer.weight]
    for side, want in (("output", out), ("input", inp)):
        got = state[f"{side}_factor"]
        torch.testing.assert_close(got, want if got.dim() == 3 else want[0], rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("groups", [1, 2])
def test_factors_of_a_convolution_in_both_conventions(groups):
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=groups).double()
    net = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(6 * 2 * 3, 3)).double()
    x, y = torch.randn(7, 4, 4, 5, dtype=torch.float64), torch.randint(0, 3, (7,))
    z = conv(x)
    (grad,) = torch.autograd.grad(F.cross_entropy(net[1:](z), y), z)
    # Gradients of the sum of the seven terms; one row for each of the six positions.
    out, inp = plain_factors(conv, x, [7 * grad], reduce=False, terms=7)
    opt = KFAC(net, fisher="empirical", lr=0.0)
    train_step(net, opt, x, y)
    check_factors(opt, conv, out, inp)
    eye = [torch.eye(f.shape[-1], dtype=f.dtype) for f in (out, inp)]
    opt = KFAC(net, fisher="empirical", lr=0.0, convention="kfac-pytorch", factor_decay=0.9)
    train_step(net, opt, x, y)
    # Rows of the mean loss, divided by the number of positions, and their mean.
    out, inp = out * 7 / 7**2 / (7 * 6) / 6**2, inp / 6**2
    check_factors(opt, conv, 0.9 * eye[0] + 0.1 * out, 0.9 * eye[1] + 0.1 * inp)


@pytest.mark.parametrize("convention", ["martens-grosse", "kfac-pytorch"])
def test_each_group_of_a_convolution_has_its_own_damping(convention):
    conv = nn.Conv2d(4, 6, 3, groups=2).double()
    with torch.no_grad():
        conv.weight[3:] *= 5
    opt = KFAC(
        conv,
        lr=0.1,
        convention=convention,
        momentum=0.0,
        weight_decay=0.0,
        kl_clip=None,
        damping=1e-2,
    )
    x = torch.randn(5, 4, 5, 5, dtype=torch.float64)
    outputs = conv(x).mean((2, 3))
    opt.observe(outputs)
    before = conv.weight.detach().clone(), conv.bias.detach().clone()
    outputs.square().mean().backward()
    opt.step()
    state = opt.state[conv.weight]
    steps = [(b - p.detach()) / 0.1 for b, p in zip(before, (conv.weight, conv.bias), strict=True)]
    for k in range(2):
        part = slice(3 * k, 3 * k + 3)
        out, inp = state["output_factor"][k], state["input_factor"][k]
        grad = torch.cat([conv.weight.grad[part].flatten(1), conv.bias.grad[part, None]], 1)
        if convention == "martens-grosse":
            wanted = damped_direction(grad, out, inp, 1e-2)
        else:
            a, b = (f + 1e-2 * torch.eye(len(f), dtype=f.dtype) for f in (out, inp))
            wanted = torch.linalg.inv(a) @ grad @ torch.linalg.inv(b)
        got = torch.cat([steps[0][part].flatten(1), steps[1][part, None]], 1)
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("convention", ["martens-grosse", "kfac-pytorch"])
def test_micro_batches_of_images_equal_one_large_batch(convention):
    net, (x, y) = make_conv_net(), image_batch()
    twin = copy.deepcopy(net)
    opts = [KFAC(n, fisher="exact", convention=convention, lr=0.01) for n in (net, twin)]
    for model, opt, parts in ((net, opts[0], 1), (twin, opts[1], 4)):
        for some in torch.arange(len(x)).chunk(parts):
            logits = model(x[some])
            opt.observe(logits)
            (F.cross_entropy(logits, y[some]) / parts).backward()
        opt.step()
    torch.testing.assert_close(flat(net.parameters()), flat(twin.parameters()), rtol=1e-9, atol=0)


def test_no_factor_is_diagonal():
    net = nn.Sequential(nn.Linear(6, 50), nn.ReLU(), nn.Linear(50, 3))
    net[0].register_module("lora_A", nn.Linear(64, 2))
    opt = KFAC(net, max_factor_dim=64)
    text = opt.explain()
    assert "diagonal" not in text
    assert "a factor of order 65 exceeds max_factor_dim=64" in text
    train_step(net, opt, *batch(dtype=torch.float32))
    assert opt.state[net[0].weight]["output_factor"].shape == (50, 50)
    assert KFAC(net, max_factor_dim=65).explain().count("2x2, 65x65") == 1


def damped_direction(grad, out, inp, damping):
    """Factored Tikhonov in the general form of kfac-jax: factors of unit mean trace, damped alike."""
    norms = [f.diagonal().mean() for f in (out, inp)]
    c = (norms[0] * norms[1]).sqrt()
    damped = [
        c * (f / n + damping**0.5 / c * torch.eye(len(f), dtype=f.dtype))
        for f, n in zip((out, inp), norms, strict=True)
    ]
    return torch.linalg.inv(damped[0]) @ grad @ torch.linalg.inv(damped[1])


@pytest.mark.parametrize("form", ["sgd", "decoupled"])
def test_steps_follow_martens_and_grosse(form):
    net = make_net()
    twin = copy.deepcopy(net)
    lr, decay, damping, momentum, wd = 0.05, 0.6, 3e-2, 0.8, 0.2
    opt = KFAC(
        net,
        lr=lr,
        damping=damping,
        factor_decay=decay,
        momentum=momentum,
        weight_decay=wd,
        decay_form=form,
        kl_clip=None,
    )
    factors, buffers = None, [torch.zeros(5, 7).double(), torch.zeros(3, 5).double()]
    for step in range(6):
        x, y = batch()
        train_step(net, opt, x, y)
        new = dense_factors(twin, x, step)
        b = min(1 - 1 / (step + 1), decay)
        factors = (
            new
            if step == 0
            else [
                tuple(b * f + (1 - b) * n for f, n in zip(old, fresh, strict=True))
                for old, fresh in zip(factors, new, strict=True)
            ]
        )
        first, second = twin[0], twin[2]
        g0, gb, g1 = torch.autograd.grad(F.cross_entropy(twin(x), y), list(twin.parameters()))
        grads = [torch.cat([g0, gb[:, None]], 1), g1]
        weights = [torch.cat([first.weight, first.bias[:, None]], 1), second.weight]
        for i, (grad, w) in enumerate(zip(grads, weights, strict=True)):
            w = w.detach().clone()
            buffers[i] = momentum * buffers[i] + damped_direction(grad, *factors[i], damping)
            if form == "sgd":
                buffers[i] = buffers[i] + wd * w
                w = w - lr * buffers[i]
            else:
                w = (1 - lr * wd) * w - lr * buffers[i]
            weights[i] = w
        with torch.no_grad():
            first.weight.copy_(weights[0][:, :6])
            first.bias.copy_(weights[0][:, 6])
            second.weight.copy_(weights[1])
        torch.testing.assert_close(
            flat(net.parameters()), flat(twin.parameters()), rtol=1e-10, atol=1e-10
        )


def test_the_split_damping_multiplies_to_the_damping_and_survives_zero_factors():
    def split(out, inp, dtype=torch.float32):
        state = {"output_factor": out.to(dtype), "input_factor": inp.to(dtype)}
        return [float(d) for (d,) in _split_damping(state, 1e-3)]

    eye, zero = torch.eye(4), torch.zeros(3, 3)
    b, a = split(eye * 4.0, torch.eye(3) * 9.0)
    assert (b, a) == pytest.approx((1e-3**0.5 * 2 / 3, 1e-3**0.5 * 3 / 2))
    for out, inp in ((zero, eye), (eye, zero), (zero, zero)):
        assert split(out, inp) == pytest.approx([1e-3**0.5] * 2)
    for dampings in (split(eye * 1e-38, eye), split(eye * 1e38, eye), split(eye, eye * 1e38)):
        assert dampings[0] * dampings[1] == pytest.approx(1e-3)


def test_a_layer_without_signal_stays_finite():
    # As LoRA at its start: the second weight is zero, so that no gradient reaches the first.
    net = nn.Sequential(nn.Linear(6, 2, bias=False), nn.Linear(2, 3, bias=False))
    nn.init.zeros_(net[1].weight)
    opt = KFAC(net)
    for _ in range(5):
        train_step(net, opt, *batch(dtype=torch.float32))
    assert torch.isfinite(flat(net.parameters())).all()
    assert net[1].weight.any()


def test_intervals_decide_what_is_computed(monkeypatch):
    inverted = []
    real = grng_kernels.damped_inverse

    def counted(factors, **kwargs):
        inverted.append(len(factors))
        return real(factors, **kwargs)

    monkeypatch.setattr(grng_kernels, "damped_inverse", counted)
    net = make_net()
    opt = KFAC(net, factor_every=2, refresh_every=4)
    updates, calls = [], []
    for _ in range(9):
        inverted.clear()
        train_step(net, opt, *batch())
        updates.append(int(opt.state[net[0].weight]["input_updates"]))
        calls.append(sum(inverted))
    assert updates == [1, 1, 2, 2, 3, 3, 4, 4, 5]
    assert calls == [4, 0, 0, 0, 4, 0, 0, 0, 4]


def test_a_head_that_is_first_used_late_is_inverted_at_once():
    heads = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)]).double()
    opt = KFAC(heads, refresh_every=10)
    for head in (heads[0], heads[0], heads[1]):
        train_step(head, opt, *batch())
    before = heads[1].weight.detach().clone()
    train_step(heads[1], opt, *batch())
    assert opt.state[heads[1].weight]["refreshes"] == 1
    assert not torch.equal(heads[1].weight, before)


def test_the_empirical_fisher_ignores_observe_and_explain_says_so():
    net = make_net()
    twin = copy.deepcopy(net)
    opt, other = KFAC(net, fisher="empirical"), KFAC(twin)
    x, y = batch()
    train_step(net, opt, x, y, observe=True)
    train_step(twin, other, x, y, observe=False)
    assert torch.equal(flat(net.parameters()), flat(twin.parameters()))
    assert "Fisher: empirical, as asked for" in opt.explain()
    assert "observe() was not called" in other.explain()


def test_sampled_labels_in_the_scale_of_kfac_pytorch():
    net = make_net()
    x, y = batch()
    factors = dense_factors(copy.deepcopy(net), x, 0)
    opt = KFAC(net, convention="kfac-pytorch", factor_decay=0.9)
    train_step(net, opt, x, y)
    state = opt.state[net[2].weight]
    eye = torch.eye(3, dtype=torch.float64)
    expected = 0.9 * eye + 0.1 * factors[1][0] / len(x) ** 2
    torch.testing.assert_close(state["output_factor"], expected, rtol=1e-12, atol=0)


def test_the_update_of_the_layers_never_waits_for_the_device(monkeypatch):
    net, (x, y) = make_net(torch.float32), batch(dtype=torch.float32)
    opt = KFAC(net)
    train_step(net, opt, x, y)
    real = KFAC._update_layers

    def refuse(tensor, *args):
        raise AssertionError("a value of a tensor was asked for")

    def guarded(self, group, layers):
        with monkeypatch.context() as patched:
            # Counts on the CPU are read, which waits for nothing; those on a device are not.
            patched.setattr("grng.optim.kfac.updates_so_far", lambda state: [1, 1])
            for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
                patched.setattr(torch.Tensor, name, refuse)
            real(self, group, layers)

    monkeypatch.setattr(KFAC, "_update_layers", guarded)
    before = flat(net.parameters())
    with grng_kernels.use_backend("cpu"):
        train_step(net, opt, x, y)
    assert not torch.equal(flat(net.parameters()), before)


def test_a_failed_inverse_keeps_the_previous_one(monkeypatch):
    net, (x, y) = make_net(torch.float32), batch(dtype=torch.float32)
    opt = KFAC(net)
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
    assert torch.isfinite(flat(net.parameters())).all()


@pytest.mark.parametrize("convention", ["martens-grosse", "kfac-pytorch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_resume_equals_the_uninterrupted_run(dtype, convention, tmp_path):
    def build():
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.LayerNorm(5), nn.Linear(5, 3)).to(dtype)
        return net, KFAC(net, factor_every=2, refresh_every=4, convention=convention)

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
    assert resumed.state[other[0].weight]["input_factor"].dtype == torch.float32
    for _ in range(5, 11):
        train_step(other, resumed, x, y)
    assert torch.equal(flat(net.parameters()), flat(other.parameters()))


def test_nonfinite_gradients_and_outputs_change_nothing():
    net, (x, y) = make_net(torch.float32), batch(dtype=torch.float32)
    opt = KFAC(net)
    train_step(net, opt, x, y)
    before = flat(net.parameters())
    state = copy.deepcopy(opt.state_dict()["state"])
    train_step(net, opt, x * float("nan"), y)
    assert torch.equal(flat(net.parameters()), before)
    for key, entry in opt.state_dict()["state"].items():
        for name, value in entry.items():
            expected = state[key][name]
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(expected)), name
    train_step(net, opt, x, y)
    assert not torch.equal(flat(net.parameters()), before)


def test_scheduler_tensor_lr_and_frozen_bias():
    net, (x, y) = make_net(torch.float32), batch(dtype=torch.float32)
    opt = KFAC(net, lr=torch.tensor(0.1), decay_form="decoupled")
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    losses = [train_step(net, opt, x, y)]
    net[0].bias.requires_grad_(False)
    frozen = net[0].bias.detach().clone()
    for _ in range(4):
        scheduler.step()
        losses.append(train_step(net, opt, x, y))
    assert losses[-1] < losses[0]
    assert torch.equal(net[0].bias, frozen)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -0.1),
        ("damping", 0.0),
        ("refresh_every", 0),
        ("factor_every", 0),
        ("factor_decay", 1.0),
        ("momentum", 1.5),
        ("weight_decay", -1.0),
        ("kl_clip", 0.0),
        ("adamw_lr", float("inf")),
        ("max_factor_dim", 0),
    ],
)
def test_bad_hyperparameters_are_named(name, value):
    with pytest.raises(ValueError, match=rf"KFAC: {name} must be a number in .*got {value!r}"):
        KFAC(make_net(), **{name: value})


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("convention", "one of martens-grosse, kfac-pytorch"),
        ("fisher", "one of sampled, exact, empirical"),
        ("decay_form", "one of sgd, decoupled"),
    ],
)
def test_bad_choices_are_named(name, said):
    with pytest.raises(ValueError, match=f"KFAC: {name} must be {said}, got 'x'"):
        KFAC(make_net(), **{name: "x"})
    with pytest.raises(ValueError, match=r"KFAC: factor_every must be a whole number, got 2\.5"):
        KFAC(make_net(), factor_every=2.5)


@pytest.mark.parametrize("convention", ["martens-grosse", "kfac-pytorch"])
def test_training_lowers_the_loss(convention):
    torch.manual_seed(0)
    net, x = make_net(torch.float32), torch.randn(200, 6)
    y = (x @ torch.randn(6, 3)).argmax(1)
    opt = KFAC(net, lr=0.1, convention=convention)
    losses = [train_step(net, opt, x, y) for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0], (losses[0], losses[-1])
