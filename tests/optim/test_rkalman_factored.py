# SPDX-License-Identifier: Apache-2.0
"""Factored Jacobians in R-Kalman: the same trajectory as with dense ones, and found only where they are."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from grng import LoKO, RKalman
from grng.curvature import rows as of_rows
from grng.curvature import single_row
from grng.curvature.jacobian import Jacobian
from grng_kernels import KroneckerJacobian


def mlp(classes=4, dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    layers = (nn.Linear(8, 12, bias=bias), nn.Tanh(), nn.Linear(12, 9, bias=bias), nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(9, classes, bias=bias)).to(dtype)


def data(n=20, classes=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 8, generator=generator).to(dtype)
    y = x @ torch.randn(8, classes, generator=generator).to(dtype)
    return x, y.argmax(1), y


def feed(optimizer, model, x, y, size=1):
    for inputs, targets in zip(x.split(size), y.split(size), strict=True):
        optimizer.observe(model(inputs), targets)
        optimizer.step()


def kinds(optimizer, model):
    engine = optimizer._engine
    flags = dict(zip(engine.parameters, engine.factored, strict=True))
    return {n: flags[p] for n, p in model.named_parameters() if p in flags}


def rows_of(model, outputs, jacobian="auto", **options):
    engine = Jacobian(list(model.parameters()), jacobian=jacobian, **options)
    c = outputs.shape[1]
    directions = torch.eye(c).repeat(1, len(outputs)).view(c, len(outputs), c)
    rows = engine.rows(outputs, directions)
    return [h.expanded() if isinstance(h, KroneckerJacobian) else h for h in rows], engine.factored


def assert_rows(model, call, wanted):
    """The rows are those of the dense way, and exactly the named parameters are factored."""
    dense, none = rows_of(model, call(), "dense")
    found, factored = rows_of(model, call())
    assert not any(none)
    names = [n for n, _ in model.named_parameters()]
    assert [n for n, flag in zip(names, factored, strict=True) if flag] == wanted
    for a, b in zip(found, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


WEIGHTS = ["0.weight", "2.weight", "4.weight"]


# ---- the trajectory ----


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (RKalman, {}),
        (RKalman, {"form": "fdekf", "regularization": "noise"}),
        (RKalman, {"noise": "ema"}),
        (RKalman, {"noise": 0.1, "correct_coherence": False}),
        (RKalman, {"likelihood": "gaussian", "prior": "fan_in"}),
        (RKalman, {"forgetting": 0.99, "process_noise": 1e-6, "prior": "global", "sigma0": 0.1}),
        (RKalman, {"batch": "sampled", "max_rows": 4}),
        (RKalman, {"jacobian_budget_mb": 0.001}),
        (LoKO, {}),
    ],
    ids=str,
)
def test_trajectory_is_that_of_dense_rows(kind, options):
    x, classes, values = data()
    y = values if options.get("likelihood") == "gaussian" else classes
    models, optimizers = [], []
    for jacobian in ("auto", "dense"):
        model = mlp(dtype=torch.float64)
        optimizer = kind(model, jacobian=jacobian, **options)
        feed(optimizer, model, x.double(), y.double() if y.is_floating_point() else y)
        models.append(model)
        optimizers.append(optimizer)
    assert kinds(optimizers[0], models[0])["2.weight"]
    assert not any(kinds(optimizers[1], models[1]).values())
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
        states = [o.state[p] for o, p in zip(optimizers, (a, b), strict=True)]
        torch.testing.assert_close(states[0]["variance"], states[1]["variance"], rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("dtype", "steps", "share"), [(torch.float32, 20, 1e-4), (torch.bfloat16, 1, 0.05)], ids=str
)
@pytest.mark.parametrize("options", [{}, {"noise": "ema"}], ids=str)
def test_trajectory_in_fewer_bits(dtype, steps, share, options):
    """The dense way rounds each product of gradients to bf16, and so does every weight after a step."""
    x, y, _ = data(steps)
    models = []
    for jacobian in ("auto", "dense"):
        model = mlp(dtype=dtype)
        feed(RKalman(model, jacobian=jacobian, **options), model, x.to(dtype), y)
        models.append(model)
    start = mlp(dtype=dtype)
    for a, b, old in zip(*(m.parameters() for m in (*models, start)), strict=True):
        a, b, old = (p.detach().float() for p in (a, b, old))
        assert float((a - b).norm()) <= share * float((b - old).norm())


def test_batches_and_single_samples_alternate():
    """The last score changes its form: what is compared with it is the same."""
    x, y, _ = data(30, dtype=torch.float64)
    models = []
    for jacobian in ("auto", "dense"):
        model = mlp(dtype=torch.float64)
        optimizer = RKalman(model, jacobian=jacobian)
        for size, i in ((1, 0), (3, 1), (1, 4), (1, 5), (2, 6), (1, 8)):
            feed(optimizer, model, x[i : i + size], y[i : i + size], size)
        models.append(model)
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


# ---- which weights ----


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 8), (1, 1, 8)], ids=str)
def test_every_layer_of_one_sample(bias, shape):
    model, x = mlp(bias=bias), torch.randn(shape)
    assert_rows(model, lambda: model(x).reshape(1, -1), WEIGHTS)


def test_a_vector_without_a_batch():
    model, x = mlp(), torch.randn(8)
    assert_rows(model, lambda: model(x).unsqueeze(0), WEIGHTS)


def test_samples_are_dense():
    model, x = mlp(), torch.randn(3, 8)
    assert_rows(model, lambda: model(x), [])


def test_tokens_of_one_sample_are_dense_and_the_head_is_factored():
    model, x = mlp(), torch.randn(1, 5, 8)
    assert_rows(model, lambda: model[4](model[:4](x).mean(1)), ["4.weight"])


def test_weight_that_is_used_twice_is_dense():
    model, x = mlp(), torch.randn(1, 8)
    model[2] = nn.Linear(12, 12)

    def call():
        h = model[:2](x)
        return model[4](model[2](model[2](h).tanh())[:, :9])

    assert_rows(model, call, ["0.weight", "4.weight"])


def test_weight_that_is_used_without_its_module_is_dense():
    model, x = mlp(), torch.randn(1, 8)
    assert_rows(model, lambda: model(x) * model[2].weight.square().sum(), ["0.weight", "4.weight"])


def test_transposed_weight_that_is_used_twice_is_dense():
    model, x = nn.Linear(6, 6, bias=False), torch.randn(1, 6)

    def call():
        transposed = model.weight.t()
        return x.mm(transposed).mm(transposed)

    assert_rows(model, call, [])


def test_weight_that_is_not_transposed_is_dense():
    model, x = nn.Linear(6, 6, bias=False), torch.randn(1, 6)
    assert_rows(model, lambda: x.mm(model.weight), [])


def test_scaled_product_is_dense():
    model, x = nn.Linear(6, 3), torch.randn(1, 6)
    call = lambda: torch.addmm(model.bias, x, model.weight.t(), alpha=2, beta=3)  # noqa: E731
    assert_rows(model, call, [])
    call = lambda: torch.addmm(model.bias, x, model.weight.t(), beta=3)  # noqa: E731
    assert_rows(model, call, ["weight"])


def test_shared_bias():
    model, x = mlp(), torch.randn(1, 8)
    model[2].bias = nn.Parameter(torch.randn(9))
    assert_rows(model, lambda: model(x) + model[2].bias[:4], WEIGHTS)


def test_parametrised_weight_is_dense():
    model, x = mlp(), torch.randn(1, 8)
    nn.utils.parametrizations.weight_norm(model[2])
    assert_rows(model, lambda: model(x), ["0.weight", "4.weight"])


def test_parameter_with_a_hook_is_dense():
    model, x = mlp(), torch.randn(1, 8)
    model[2].weight.register_hook(lambda g: 2 * g)
    assert_rows(model, lambda: model(x), ["0.weight", "4.weight"])


def test_hook_on_the_output_of_a_layer():
    model, x = mlp(), torch.randn(1, 8)

    def call():
        h = model[2](model[:2](x))
        h.register_hook(lambda g: 2 * g)
        return model[3:](h)

    assert_rows(model, call, WEIGHTS)


def test_hooks_on_modules():
    model, x = mlp(), torch.randn(1, 8)
    model[2].register_full_backward_hook(lambda m, i, o: (3 * i[0],))
    model[2].register_forward_hook(lambda m, i, o: 2 * o)
    assert_rows(model, lambda: model(x), WEIGHTS)


def test_other_modules_are_dense():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), nn.LayerNorm(12), nn.Linear(12, 3))
    x = torch.randn(1, 1, 8)
    assert_rows(model, lambda: model(x), ["3.weight"])


def test_autocast_is_dense():
    model, x = mlp(), torch.randn(1, 8)

    def call():
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float()

    assert rows_of(model, call())[1] == [False] * 6


def test_checkpointed_layers():
    from torch.utils.checkpoint import checkpoint

    model, x = mlp(), torch.randn(1, 8)
    call = lambda: model[2:](checkpoint(model[:2], x, use_reentrant=False))  # noqa: E731
    assert_rows(model, call, WEIGHTS)


def test_operation_without_a_batching_rule():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, g):
            assert g.dim() == 2 and g.shape[0] == 1
            return torch.from_numpy(2 * g.detach().numpy())

    model, x = mlp(), torch.randn(1, 8)
    assert_rows(model, lambda: model[2:](Double.apply(model[:2](x))), WEIGHTS)


def test_unused_and_frozen_parameters():
    model, x = mlp(), torch.randn(1, 8)
    model[0].weight.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad] + [
        nn.Parameter(torch.ones(3, 2))
    ]
    engine = Jacobian(parameters)
    rows = engine.rows(model(x), torch.eye(4).unsqueeze(1))
    assert engine.factored == [False, True, False, True, False, False]
    assert torch.equal(rows[-1], torch.zeros(4, 6))


@pytest.mark.parametrize("budget_mb", [1e-6, 2e-4])
def test_rows_in_several_passes(budget_mb):
    model, x = mlp(), torch.randn(1, 8)
    want, _ = rows_of(model, model(x))
    got, factored = rows_of(model, model(x), budget_mb=budget_mb)
    assert sum(factored) == 3
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_model_that_only_reads_parameters():
    """Parameters without their modules are all that is needed."""
    model = mlp()
    x, y, _ = data(2)
    optimizer = RKalman(list(model.parameters()))
    feed(optimizer, model, x, y)
    assert kinds(optimizer, model)["0.weight"]


def test_weight_gradients_are_not_formed():
    """No tensor as large as one row of the large weight is made while observing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(301, 203), nn.Tanh(), nn.Linear(203, 5))
    optimizer = RKalman(model)
    x, y = torch.randn(1, 301), torch.tensor([1])
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made = out if isinstance(out, (tuple, list)) else (out,)
            largest.extend(t.numel() for t in made if isinstance(t, torch.Tensor))
            return out

    for _ in range(2):
        outputs = model(x)
        with Watch():
            optimizer.observe(outputs, y)
        optimizer.step()
    assert 4 * 203 <= max(largest) < 301 * 203


# ---- what is kept ----


def test_evaluation_in_between_changes_nothing():
    x, y, _ = data()
    models = []
    for disturbed in (True, False):
        model = mlp()
        optimizer = RKalman(model)
        for i in range(len(x)):
            if disturbed:
                model.eval()
                with torch.no_grad():
                    model(x)
                model(x[i + 1 :][:1])  # with a graph that nobody uses
                model.train()
            outputs = model(x[i : i + 1])
            if disturbed:
                with torch.inference_mode():
                    model(x[:1])
                model(x[:1])
            optimizer.observe(outputs, y[i : i + 1])
            if disturbed:
                model(x[:1])
            optimizer.step()
        assert kinds(optimizer, model)["4.weight"]
        models.append(model)
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(a, b)


def test_input_that_is_overwritten_after_observing():
    x, y, _ = data(2)
    models = []
    for overwritten in (True, False):
        model = mlp()
        optimizer = RKalman(model)
        for i in range(2):
            sample = x[i : i + 1].clone()
            optimizer.observe(model(sample), y[i : i + 1])
            if overwritten:
                sample.fill_(7.0)
            optimizer.step()
        models.append(model)
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(a, b)


def test_input_that_is_overwritten_before_observing_is_an_error():
    model, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(1, 8)
    outputs = model(x)
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        RKalman(model).observe(outputs, torch.tensor([0]))


def test_graph_that_is_gone_is_an_error():
    model, x = mlp(), torch.randn(1, 8)
    outputs = model(x)
    outputs.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        RKalman(model).observe(outputs, torch.tensor([0]))


def test_nothing_is_kept_of_a_step():
    model = mlp()
    optimizer = RKalman(model)
    x, y, _ = data(3)
    feed(optimizer, model, x[:2], y[:2])
    sample = x[2:].clone()
    outputs = model(sample)
    optimizer.observe(outputs, y[2:])
    gone = [weakref.ref(sample), weakref.ref(outputs)]
    del sample, outputs
    gc.collect()
    assert [r() for r in gone] == [None, None], "not even while the observation waits"
    optimizer.step()
    assert optimizer._pending is None


def test_copies_go_on_by_themselves():
    x, y, _ = data()
    model = mlp()
    optimizer = RKalman(model)
    feed(optimizer, model, x[:10], y[:10])
    optimizer.observe(model(x[:1]), y[:1])  # waits, and does not belong to a copy
    copies = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    optimizer._pending = None
    for m, o in [*copies, (model, optimizer)]:
        feed(o, m, x[10:], y[10:])
        assert kinds(o, m)["0.weight"]
    for m, _ in copies:
        for a, b in zip(model.parameters(), m.parameters(), strict=True):
            assert torch.equal(a, b)


def test_resumed_run_equals_the_uninterrupted_one():
    x, y, _ = data()
    whole, first = mlp(), mlp()
    feed(RKalman(whole), whole, x, y)
    half = RKalman(first)
    feed(half, first, x[:9], y[:9])
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": half.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = mlp()
    second.load_state_dict(saved["model"])
    resumed = RKalman(second)
    resumed.load_state_dict(saved["optimizer"])
    feed(resumed, second, x[9:], y[9:])
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_state_is_small():
    """The last score is kept in its two factors."""
    model = mlp()
    optimizer = RKalman(model)
    x, y, _ = data(3)
    feed(optimizer, model, x, y)
    state = optimizer.state[model[2].weight]
    assert state["score_outputs"].shape == (9,) and state["score_inputs"].shape == (12,)
    assert "score" not in state
    feed(optimizer, model, x, y, 3)
    assert state["score"].shape == (108,) and "score_outputs" not in state


def test_explain_says_which():
    model = mlp()
    optimizer = RKalman(model)
    assert "none yet" in optimizer.explain()
    x, y, _ = data(4)
    feed(optimizer, model, x[:1], y[:1])
    lines = {line.split()[0]: line.split()[-1] for line in optimizer.explain().splitlines() if line}
    assert lines["2.weight"] == "factored" and lines["2.bias"] == "dense"
    feed(optimizer, model, x, y, 4)
    lines = {line.split()[0]: line.split()[-1] for line in optimizer.explain().splitlines() if line}
    assert lines["2.weight"] == "dense"


def test_unknown_choice():
    with pytest.raises(
        ValueError, match="RKalman: jacobian must be one of auto, dense, got 'sparse'"
    ):
        RKalman(mlp(), jacobian="sparse")


# ---- operations on rows ----


@pytest.mark.parametrize("kind", ["dense", "factored"])
def test_operations_are_those_on_the_rows_written_out(kind):
    h = KroneckerJacobian(*(torch.randn(s, dtype=torch.float64) for s in ((3, 4), (5,))))
    full = torch.stack([torch.kron(g, h.inputs) for g in h.outputs])
    if kind == "dense":
        h = full
    v, p, t, u = (torch.randn(s, dtype=torch.float64) for s in ((20,), (20,), (3, 2), (3,)))

    def written(value):
        return torch.kron(*value) if isinstance(value, KroneckerJacobian) and value[0].dim() == 1 else (
            value.expanded() if isinstance(value, KroneckerJacobian) else value
        )  # fmt: skip

    torch.testing.assert_close(of_rows.squares(h), full.square().sum(1))
    torch.testing.assert_close(of_rows.product(h, v), full @ v)
    torch.testing.assert_close(of_rows.gram(h, p), (full * p) @ full.mT)
    torch.testing.assert_close(written(of_rows.mixed(t, h)), t.mT @ full)
    torch.testing.assert_close(written(of_rows.combination(h, u)), full.mT @ u)
    torch.testing.assert_close(of_rows.square_norm(h), full.square().sum())
    for score in (torch.randn(20, dtype=torch.float64), KroneckerJacobian(p[:4], v[:5])):
        state = {}
        for _ in range(2):
            of_rows.remember(state, score)
            torch.testing.assert_close(of_rows.with_remembered(h, state), full @ written(score))


def test_find_reads_the_input():
    layer, x = nn.Linear(6, 3), torch.randn(1, 6)
    found = single_row.find(layer(x), list(layer.parameters()))
    assert torch.equal(found[layer.weight].inputs, x[0])
    assert found[layer.bias].inputs is None
    assert single_row.find(F.linear(x, layer.weight.detach()), list(layer.parameters())) == {}
