# SPDX-License-Identifier: Apache-2.0
"""``adam_moments_`` and ``grafted_step_``: against AdamW itself, and against the formulas in fp64."""

import math

import pytest
import torch

from grng_kernels import adam_moments_, backends, grafted_step_, use_backend
from tests.cases import ALL_DTYPES, dtype_id
from tests.ops.errors import assert_raises

BACKENDS = ["reference", "cpu"]
backend = pytest.mark.parametrize("backend", BACKENDS)
BETAS, EPS = (0.9, 0.999), 1e-8
SHAPES = [(), (1,), (17,), (33, 65), (5, 3, 3, 3), (70001,)]


def moments(shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype), torch.rand(shape, dtype=dtype) + 1e-3


def adam_step(mean, square, step):
    """In fp64."""
    mean, square = mean.double(), square.double()
    root = (square / (1 - BETAS[1] ** step)).sqrt() + EPS
    return mean / (1 - BETAS[0] ** step) / root


@backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
def test_moments_are_those_of_adamw(backend, dtype):
    """Three steps of torch's AdamW; the norm is that of what it subtracts at lr 1."""
    shapes = SHAPES
    params = [torch.zeros(s, dtype=dtype, requires_grad=True) for s in shapes]
    adamw = torch.optim.AdamW(params, lr=1.0, betas=BETAS, eps=EPS, weight_decay=0.0)
    ours = [(torch.zeros_like(p), torch.zeros_like(p)) for p in params]
    for step in (1, 2, 3):
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.randn_like(p)
        adamw.step()
        with use_backend(backend):
            norms = adam_moments_(
                [m for m, _ in ours],
                [v for _, v in ours],
                [p.grad for p in params],
                step=step,
                betas=BETAS,
                eps=EPS,
            )
        assert norms.dtype == torch.float64
        for p, (m, v), norm, old in zip(params, ours, norms, before, strict=True):
            state = adamw.state[p]
            torch.testing.assert_close(m, state["exp_avg"])
            torch.testing.assert_close(v, state["exp_avg_sq"])
            torch.testing.assert_close(
                norm, (p.detach() - old).double().norm(), rtol=1e-5, atol=1e-6
            )


@backend
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_is_within_budget(backend, shape):
    """At most twice the error of the same formula in torch's fp32."""
    mean, square = moments(shape)
    grad = torch.randn(shape)
    exact_mean = BETAS[0] * mean.double() + (1 - BETAS[0]) * grad.double()
    exact_square = BETAS[1] * square.double() + (1 - BETAS[1]) * grad.double().square()
    exact = adam_step(exact_mean, exact_square, 7).norm()
    plain = (exact_mean.float() / (1 - BETAS[0] ** 7)) / (
        (exact_square.float() / (1 - BETAS[1] ** 7)).sqrt() + EPS
    )
    with use_backend(backend):
        norm = adam_moments_(mean, square, grad, step=7, betas=BETAS, eps=EPS)
    assert norm.shape == ()
    error = abs(float(norm - exact)) / float(exact)
    assert error <= 2 * abs(float(plain.norm() - exact)) / float(exact) + 2e-6


@backend
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.95, 0.99999)])
def test_moments_are_within_budget(backend, betas):
    """1 − β is a small difference: in fp32 most of its digits would be gone."""
    mean, square, grad = torch.zeros(1000), torch.zeros(1000), torch.randn(1000)
    want = (1 - betas[0]) * grad.double(), (1 - betas[1]) * grad.double().square()
    with use_backend(backend):
        adam_moments_(mean, square, grad, step=1, betas=betas)
    for got, exact in zip((mean, square), want, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=3e-7, atol=0)


@backend
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_step_follows_the_direction(backend, dtype, shape):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    param, direction = torch.randn(shape).to(dtype), torch.randn(shape, dtype=wide)
    mean, square = moments(shape, wide)
    want = 0.99 * param.double() - 0.1 * 0.25 * direction.double()
    with use_backend(backend):
        grafted_step_(
            param,
            direction,
            mean,
            square,
            scale=torch.tensor(0.25, dtype=torch.float64),
            lr=0.1,
            decay=0.99,
            step=3,
        )
    # Rounded once to the dtype of the parameter.
    eps = torch.finfo(dtype).eps
    assert torch.all((param.double() - want).abs() <= 0.51 * eps * want.abs() + 4e-7 * (eps < 1e-3))


@backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_rounding_of_what_has_no_number(backend, dtype):
    """NaN, inf and overflow, as torch rounds them; and ties."""
    values = [
        math.nan,
        math.inf,
        -math.inf,
        3.4e38,
        -3.4e38,
        65520.0,
        1 + 2**-8,
        1 + 3 * 2**-8,
        -0.0,
    ]
    direction, param = torch.tensor(values), torch.zeros(len(values), dtype=dtype)
    mean, square = moments((len(values),))
    one = torch.tensor(1.0, dtype=torch.float64)
    with use_backend(backend):
        grafted_step_(param, direction, mean, square, scale=one, lr=1.0, step=1)
    torch.testing.assert_close(param, (0.0 - direction).to(dtype), rtol=0, atol=0, equal_nan=True)


@backend
@pytest.mark.parametrize("scale", [math.nan, math.inf, 1e80])  # the last leaves the range of fp32
def test_without_a_scale_the_step_is_adams(backend, scale):
    params = [torch.randn(33, 65), torch.randn(7)]
    both = [moments(p.shape) for p in params]
    # What is in a direction that does not serve must not reach the parameters.
    directions = [torch.full_like(params[0], math.nan), torch.randn(7)]
    want = [
        params[0].double() - 0.1 * adam_step(*both[0], 2),
        params[1].double() - 0.1 * 2 * directions[1].double(),
    ]
    with use_backend(backend):
        grafted_step_(
            params,
            directions,
            [m for m, _ in both],
            [v for _, v in both],
            scale=torch.tensor([scale, 2.0], dtype=torch.float64),
            lr=0.1,
            step=2,
        )
    for got, expected in zip(params, want, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)


@backend
def test_huge_directions_take_tiny_scales(backend):
    """A scale that fp32 has no normal number for."""
    direction = torch.randn(100) * 1e37
    param, (mean, square) = torch.zeros(100), moments((100,))
    scale = torch.tensor(1.0, dtype=torch.float64) / direction.double().norm()
    with use_backend(backend):
        grafted_step_(param, direction, mean, square, scale=scale, lr=1.0, step=1)
    torch.testing.assert_close(
        param.double(), -direction.double() / direction.double().norm(), rtol=1e-5, atol=1e-8
    )


def layouts():
    """``(param, direction)`` that lie differently, as what comes out of preconditioning does."""
    whole = torch.randn(8, 13)
    yield "column cut off", torch.randn(8, 12), whole[:, :12]
    yield "last column", torch.randn(8), whole[:, -1]
    yield "transposed", torch.randn(8, 13), torch.randn(13, 8).mT
    conv = torch.randn(6, 19)[:, :18].unflatten(1, (2, 3, 3))
    yield "convolution", torch.randn(6, 2, 3, 3), conv
    last = torch.randn(6, 2, 3, 3).to(memory_format=torch.channels_last)
    yield "channels last", last, torch.randn(6, 2, 3, 3)
    yield "both", torch.randn(13, 8).mT, torch.randn(13, 8).mT
    yield (
        "six dimensions",
        torch.randn(2, 1, 2, 3, 2, 2),
        torch.randn(2, 2, 2, 3, 2, 1).mT.transpose(1, 5),
    )
    yield "empty", torch.randn(0, 3), torch.randn(3, 0).mT


@backend
@pytest.mark.parametrize("case", list(layouts()), ids=lambda case: case[0])
def test_layouts(backend, case):
    _, param, direction = case
    if direction.shape != param.shape:
        direction = direction.reshape(param.shape)
    param = param.clone(memory_format=torch.preserve_format)
    mean = torch.empty_like(param).normal_()
    square = torch.empty_like(param).fill_(0.3)
    grad = torch.randn(param.shape)  # contiguous, whatever the moments are
    want_mean = mean.lerp(grad, 0.1)
    want = param - 0.5 * direction
    scale = torch.tensor(1.0, dtype=torch.float64)
    with use_backend(backend):
        adam_moments_(mean, square, grad, step=2)
        grafted_step_(param, direction, mean, square, scale=scale, lr=0.5, step=2)
    torch.testing.assert_close(mean, want_mean)
    torch.testing.assert_close(param, want)


@backend
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=dtype_id)
def test_gradients_of_any_dtype(backend, dtype):
    grad = torch.randn(300).to(dtype)
    mean, square = moments((300,))
    want = mean.lerp(grad.float(), 0.1)
    with use_backend(backend):
        adam_moments_(mean, square, grad, step=2)
    torch.testing.assert_close(mean, want)


def test_cpu_and_reference_agree_on_many():
    torch.manual_seed(3)
    shapes = [(64, 33), (64,), (1, 9), (200, 300)]
    results = []
    for name in BACKENDS:
        torch.manual_seed(4)
        params = [torch.randn(s) for s in shapes]
        both = [moments(s) for s in shapes]
        grads, directions = [torch.randn(s) for s in shapes], [torch.randn(s) for s in shapes]
        means, squares = [m for m, _ in both], [v for _, v in both]
        with use_backend(name):
            norms = adam_moments_(means, squares, grads, step=[1, 2, 3, 400])
            grafted_step_(
                params,
                directions,
                means,
                squares,
                scale=norms
                / 1000,  # steps of the size of the parameters, whose rounding is then known
                lr=torch.tensor(0.01),
                decay=torch.tensor(0.999),
                step=[1, 2, 3, 400],
            )
        results.append([*params, *means, *squares, norms])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("threads", [2, 3])
def test_norms_do_not_depend_on_the_threads(threads):
    if not backends()["cpu"].available:
        pytest.fail("the C++ kernels must be built here")
    before = torch.get_num_threads()
    grad = torch.randn(100_003, generator=torch.Generator().manual_seed(0))
    norms = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            norms.append(adam_moments_(torch.zeros(100_003), torch.zeros(100_003), grad, step=1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*norms)


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_gpu_backend_by_name_is_no_error(name):
    """An optimizer runs on one backend: of these two ops a GPU has torch's own kernels."""
    with use_backend(name):
        adam_moments_(torch.zeros(3), torch.zeros(3), torch.ones(3), step=1)
        scale = torch.tensor(1.0, dtype=torch.float64)
        grafted_step_(*(torch.ones(3) for _ in range(4)), scale=scale, lr=0.1, step=1)


def test_empty_lists():
    assert adam_moments_([], [], [], step=1).shape == (0,)
    grafted_step_([], [], [], [], scale=torch.zeros(0, dtype=torch.float64), lr=0.1, step=1)


def arguments(**changes):
    given = {
        "param": torch.zeros(3),
        "direction": torch.zeros(3),
        "exp_avg": torch.zeros(3),
        "exp_avg_sq": torch.zeros(3),
        "scale": torch.tensor(1.0, dtype=torch.float64),
        "lr": 0.1,
        "step": 1,
    }
    return given | changes


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        (
            {"direction": torch.zeros(4)},
            ValueError,
            "direction must have shape [3] (as exp_avg), got [4]",
        ),
        (
            {"direction": torch.zeros(3).double()},
            TypeError,
            "direction must have dtype float32, got float64",
        ),
        (
            {"exp_avg": torch.zeros(3).bfloat16()},
            TypeError,
            "exp_avg must have dtype float32, float64",
        ),
        ({"scale": torch.tensor(1.0)}, TypeError, "scale must have dtype float64, got float32"),
        ({"scale": torch.ones(2, dtype=torch.float64)}, ValueError, "scale must have shape []"),
        ({"step": 0}, ValueError, "step must be finite and in [1.0"),
        ({"step": [1, 2]}, ValueError, "step must be one number or one for each item, got 2 for 1"),
        ({"betas": (0.9,)}, ValueError, "betas must be two numbers"),
        ({"betas": (0.9, 1.0)}, ValueError, "betas[1] must be finite and in"),
        ({"eps": -1.0}, ValueError, "eps must be finite and in [0.0"),
        ({"lr": math.nan}, ValueError, "lr must be finite"),
        ({"decay": "x"}, TypeError, "decay must be a number"),
        ({"param": [torch.zeros(3)]}, TypeError, "must all be tensors or all be lists"),
        ({"param": torch.zeros(1).expand(3)}, ValueError, "must not overlap itself"),
    ],
)
def test_bad_input_of_the_step(changes, error, text):
    given = arguments(**changes)
    lists = [given.pop(name) for name in ("param", "direction", "exp_avg", "exp_avg_sq")]
    assert_raises(error, text, lambda: grafted_step_(*lists, **given))


def test_bad_input_of_the_moments():
    same = torch.zeros(3)
    assert_raises(ValueError, "overlap in memory", lambda: adam_moments_(same, same, same, step=1))
    with pytest.raises(
        ValueError, match=r"grad\[0\] must have shape \[3\] \(as exp_avg\), got \[2\]"
    ):
        adam_moments_([same], [same.clone()], [torch.zeros(2)], step=1)
    with pytest.raises(ValueError, match="lists must have the same length"):
        adam_moments_([same], [], [same], step=1)


def test_nothing_moves_where_a_later_item_is_wrong():
    params = [torch.ones(3), torch.ones(3)]
    with pytest.raises(ValueError, match=r"direction\[1\]"):
        grafted_step_(
            params,
            [torch.ones(3), torch.ones(4)],
            [torch.ones(3)] * 2,
            [torch.ones(3)] * 2,
            scale=torch.ones(2, dtype=torch.float64),
            lr=0.1,
            step=1,
        )
    assert all(torch.equal(p, torch.ones(3)) for p in params)
