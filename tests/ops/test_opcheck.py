# SPDX-License-Identifier: Apache-2.0
"""``torch.library.opcheck`` on every registered operator: schema, fake tensors, dynamic shapes."""

import pytest
import torch
from torch.library import opcheck

from grng_kernels import backends
from tests.cases import spd


def mats(*sizes):
    return [spd(n) for n in sizes]


def kron_samples():
    half, one = torch.tensor(0.5), torch.tensor(1.0)
    yield "single", (mats(9), [torch.randn(5, 9)], False, 0.9, None, None, None)
    yield "bias", (mats(9), [torch.randn(5, 8)], True, 0.9, None, 0.1, None)
    yield (
        "list",
        (
            mats(9, 3, 1),
            [torch.randn(5, 9), torch.randn(2, 3), torch.randn(7, 1)],
            False,
            0.9,
            None,
            None,
            None,
        ),
    )
    yield "strided", ([spd(18)[::2, ::2]], [torch.randn(9, 5).mT], False, 0.9, None, None, None)
    yield "bf16", (mats(9), [torch.randn(5, 9).bfloat16()], False, 0.9, None, None, None)
    yield "fp64", ([spd(9).double()], [torch.randn(5, 9).double()], False, 0.9, None, None, None)
    yield "tensors", (mats(9), [torch.randn(5, 9)], False, None, half, None, one)
    yield "empty", (mats(9), [torch.randn(0, 9)], False, 0.9, None, None, None)


def conv2d_samples():
    def geometry(kernel, stride=1, padding=0, dilation=1, groups=1):
        return [v for v in (kernel, stride, padding, dilation) for _ in range(2)] + [groups]

    image, rest = torch.randn(2, 2, 5, 6), (False, False, 0.9, None, None, None)
    yield "single", ([spd(18)[None]], [image], geometry(3, padding=1), *rest)
    yield "groups", ([torch.stack(mats(4, 4))], [image], geometry(2, 2, groups=2), *rest)
    yield "bias", ([spd(19)[None]], [image], geometry(3), False, True, 0.9, None, 0.1, None)
    yield "reduce", ([spd(18)[None]], [image], geometry(3, padding=1), True, *rest[1:])
    scalars = (None, torch.tensor(0.5), None, torch.tensor(1.0))
    yield "tensors", ([spd(18)[None]], [image], geometry(3, dilation=2), False, False, *scalars)
    yield "bf16", ([spd(2)[None]], [image.bfloat16()], geometry(1), *rest)
    yield "empty", ([spd(18)[None]], [image[:0]], geometry(3), *rest)


def inverse_samples():
    batch = torch.stack(mats(5, 5))
    yield "single", ([batch[:1]], 0.01, [], "cholesky", [])
    yield "newton_schulz", ([batch], 0.01, [], "newton_schulz", [])
    yield "damping", ([batch, spd(3)[None]], None, [torch.ones(2), torch.ones(1)], "auto", [])
    yield (
        "vectors",
        ([batch, spd(3)[None]], 0.01, [], "auto", [torch.zeros(2, 5), torch.zeros(1, 3)]),
    )
    yield "strided", ([batch.mT], 0.01, [], "auto", [])
    yield "bf16", ([batch.bfloat16()], 0.01, [], "auto", [])
    yield "empty", ([torch.empty(0, 4, 4)], 0.01, [], "auto", [])


def kalman_samples():
    def state(*sizes):
        return (
            [torch.randn(d) for d in sizes],
            [torch.rand(d) + 0.1 for d in sizes],
            [torch.randn(2, d) for d in sizes],
        )

    tail = (torch.randn(2), torch.eye(2), "fdekf", "gaussian", 0.9, 0.1, 0.0, "gradient")
    yield "single", (*state(9), *tail)
    yield "blocks", (*state(9, 3, 1), *tail)
    yield (
        "vdekf",
        (*state(9), torch.randn(2), torch.eye(2), "vdekf", "gaussian", 1.0, 0.0, 0.0, "gradient"),
    )
    classes = (
        torch.tensor([0.5, -0.5]),
        torch.tensor([0.5, 0.5]),
        "fdekf",
        "categorical",
        1.0,
        0.0,
        0.5,
        "noise",
    )
    yield "categorical", (*state(9), *classes)
    means, variances, jacobians = state(6, 9)
    factored = [jacobians[0], torch.randn(2, 3), torch.randn(3)]
    yield "factored", (means, variances, factored, *tail, [1])
    mean, variance, _ = state(9)
    yield "strided", (mean, variance, [torch.randn(9, 2).mT], *tail)
    yield "strided_state", ([torch.randn(18)[::2]], variance, [torch.randn(2, 9)], *tail)
    yield (
        "fp64",
        tuple(
            [t.double() for t in v]
            if isinstance(v, list)
            else v.double()
            if isinstance(v, torch.Tensor)
            else v
            for v in (*state(9), *tail)
        ),
    )


def precondition_samples():
    none, three, five = torch.empty(0), torch.empty(3, 5), [torch.randn(3, 5)]
    yield "single", ([three], none, five, mats(3), mats(5), [None])
    yield (
        "list",
        (
            [torch.empty(3, 5), torch.empty(2, 2)],
            torch.empty(2),
            [torch.randn(3, 5), torch.randn(2, 2)],
            mats(3, 2),
            mats(5, 2),
            [None, None],
        ),
    )
    bias = (mats(3), mats(6), [torch.randn(3)])
    yield "bias", ([torch.empty(3, 6)], torch.empty(1), five, *bias)
    large = [torch.randn(20, 18)]
    yield "large", ([torch.empty(20, 18)], torch.empty(1), large, mats(20), mats(18), [None])
    strided = [torch.randn(6, 5)[::2]]
    yield "strided", ([torch.empty(5, 3).mT], none, strided, mats(3), mats(5), [None])
    yield "bf16", ([three], none, [five[0].bfloat16()], mats(3), mats(5), [None])


def rank1_samples():
    yield "single", ([torch.empty(9)], [torch.randn(9)], [torch.randn(9)], 0.1, None)
    yield "tensor", ([torch.empty(9)], [torch.randn(9)], [torch.randn(9)], None, torch.tensor(0.1))
    yield (
        "list",
        (
            [torch.empty(9), torch.empty(2, 3)],
            [torch.randn(9), torch.randn(2, 3)],
            [torch.randn(9), torch.randn(2, 3)],
            0.1,
            None,
        ),
    )
    yield "strided", ([torch.empty(18)[::2]], [torch.randn(18)[::2]], [torch.randn(9)], 0.1, None)
    yield (
        "bf16",
        (
            [torch.empty(9).bfloat16()],
            [torch.randn(9).bfloat16()],
            [torch.randn(9).bfloat16()],
            0.1,
            None,
        ),
    )


def rank1_step_samples():
    def lists(*shapes):
        return tuple([torch.randn(s) for s in shapes] for _ in range(3))

    yield "list", (*lists((3, 5), (4,)), 0.1, None, [0.1, 0.2], None, [1.0, 0.9], None)
    tenth = torch.tensor(0.1)
    yield "tensors", (*lists((3, 5), (4,)), None, tenth, [], tenth, [], tenth)
    params, grads, scores = lists((3, 5))
    numbers = (0.1, None, [0.1], None, [0.9], None)
    yield "strided", ([torch.randn(6, 5)[::2]], [torch.randn(5, 3).mT], scores, *numbers)
    half = [g.bfloat16() for g in grads], [u.bfloat16() for u in scores]
    yield "bf16", (params, *half, *numbers)


def moments_samples():
    state = [torch.zeros(3, 5), torch.zeros(4)], [torch.zeros(3, 5), torch.zeros(4)]
    grads = [torch.randn(3, 5), torch.randn(4)]
    yield "list", (*state, grads, [1.0, 2.0], 0.9, 0.999, 1e-8)
    yield "bf16", ([torch.zeros(4)], [torch.zeros(4)], [grads[1].bfloat16()], [1.0], 0.9, 0.99, 0.0)
    strided = [torch.randn(5, 3).mT]
    yield "strided", (state[0][:1], state[1][:1], strided, [1.0], 0.9, 0.99, 0.0)
    yield "empty", ([], [], [], [], 0.9, 0.999, 1e-8)


def grafted_samples():
    def lists(*shapes):
        return tuple([torch.rand(s) for s in shapes] for _ in range(4))

    both = lists((3, 5), (4,))
    numbers = (0.1, None, 0.99, None)
    tensors = (None, torch.tensor(0.1), None, torch.tensor(0.99))
    tail = ([1.0, 2.0], 0.9, 0.999, 1e-8)
    scales = torch.tensor([0.5, float("nan")], dtype=torch.float64)
    yield "list", (*both, scales, *numbers, *tail)
    yield "tensors", (*both, scales, *tensors, *tail)
    params, _, means, squares = lists((3, 5))
    cut = [torch.rand(3, 6)[:, :5]]
    yield "strided", (params, cut, means, squares, scales[:1], *numbers, [1.0], *tail[1:])


SAMPLES = [
    pytest.param(op, arguments, id=f"{op}-{name}")
    for op, samples in {
        "kron_factor_update_": kron_samples,
        "kron_factor_conv2d_update_": conv2d_samples,
        "damped_inverse": inverse_samples,
        "kalman_update_": kalman_samples,
        "precondition": precondition_samples,
        "rank1_precondition": rank1_samples,
        "rank1_step_": rank1_step_samples,
        "adam_moments_": moments_samples,
        "grafted_step_": grafted_samples,
    }.items()
    for name, arguments in samples()
]


@pytest.mark.parametrize(("op", "arguments"), SAMPLES)
def test_public_operator(op, arguments):
    opcheck(getattr(torch.ops.grng, op).default, arguments)


def private_samples():
    gram = torch.zeros(2, 2, dtype=torch.float64)
    yield (
        "_kron_factor_update_",
        (mats(9), [torch.randn(5, 9)], torch.zeros(1, dtype=torch.int32), False, 0.9, [0.1]),
    )
    yield (
        "_kron_factor_conv2d_update_",
        (
            [spd(18)[None]], [torch.randn(2, 2, 5, 6)], torch.zeros(1, dtype=torch.int32),
            [3, 3, 1, 1, 1, 1, 1, 1, 1], False, 0.9, [0.1],
        ),
    )  # fmt: skip
    yield (
        "_precondition_",
        (
            [torch.empty(3, 5)],
            torch.empty(1),
            [torch.randn(3, 5)],
            mats(3),
            mats(5),
            [torch.empty(0)],
        ),
    )
    norms = torch.zeros(1, dtype=torch.float64)
    one = tuple([torch.rand(3, 5)] for _ in range(4))
    length = torch.zeros((), dtype=torch.float64)
    yield "_rank1_step_", (one[0], length, *one[1:3], 0.1, [0.1], [0.9], 1e30)
    yield "_adam_moments_", (*one[:2], norms, one[2], [1.0], [1.0], 0.9, 0.999, 1e-8)
    yield "_grafted_step_", (*one, [0.5], [1.0], [1.0], 0.1, 1.0, 1e-8)
    yield "_kalman_gram_", (gram, [torch.rand(9)], [torch.randn(2, 9)])
    yield "_kalman_update_", (
        [torch.randn(6)], [torch.rand(6)], torch.zeros((), dtype=torch.int32),
        [torch.randn(2, 3), torch.randn(2)], torch.randn(2), [torch.eye(2)],
        0.0, 0, False, 1.0, 0.0, 0.0, False, [0],
    )  # fmt: skip
    yield "_kalman_update_", (
        [torch.randn(9)], [torch.rand(9)], torch.zeros((), dtype=torch.int32), [torch.randn(2, 9)],
        torch.randn(2), [torch.eye(2)], 0.0, 0, False, 1.0, 0.0, 0.0, False,
    )  # fmt: skip
    yield "_kalman_apply_", (
        [torch.randn(9)], [torch.rand(9)], [torch.randn(2, 9)], torch.randn(2), torch.eye(2) / 9,
        torch.zeros((), dtype=torch.int32), False, 1.0, 0.0,
    )  # fmt: skip


@pytest.mark.skipif(not backends()["cpu"].available, reason=backends()["cpu"].reason)
@pytest.mark.parametrize(
    ("op", "arguments"), [pytest.param(*s, id=s[0]) for s in private_samples()]
)
def test_private_operator_mutates_what_its_schema_says(op, arguments):
    opcheck(getattr(torch.ops.grng, op).default, arguments, test_utils="test_schema")


BAD = torch.zeros(3)


@pytest.mark.skipif(not backends()["cpu"].available, reason=backends()["cpu"].reason)
@pytest.mark.parametrize(
    ("op", "position", "value", "text"),
    [
        ("_kron_factor_update_", 0, [BAD], "factor has the wrong dtype, shape or layout"),
        ("_kron_factor_update_", 0, mats(8), "factor has the wrong dtype, shape or layout"),
        ("_kron_factor_update_", 0, [spd(18)[::2, ::2]], "factor has the wrong dtype, shape or layout"),
        ("_kron_factor_update_", 0, [spd(9).double()], "factor has the wrong dtype, shape or layout"),
        ("_kron_factor_update_", 1, [], "factors, xs and scales must have the same length"),
        ("_kron_factor_update_", 1, [BAD], "x must be a matrix"),
        ("_kron_factor_update_", 1, [torch.zeros(5, 9, dtype=torch.int32)], "dtype must be float32"),
        ("_kron_factor_update_", 2, torch.zeros(1), "info must be int32, one per factor"),
        ("_kron_factor_update_", 2, torch.zeros(2, dtype=torch.int32), "info must be int32, one per factor"),
        ("_kron_factor_update_", 5, [0.1, 0.1], "factors, xs and scales must have the same length"),
        ("_kron_factor_conv2d_update_", 0, mats(18), "factor has the wrong dtype, shape or layout"),
        ("_kron_factor_conv2d_update_", 1, [BAD], "x must be [B, C, H, W]"),
        ("_kron_factor_conv2d_update_", 3, [3, 3], "the geometry must be nine numbers"),
        ("_kron_factor_conv2d_update_", 3, [9] * 2 + [1] * 7, "the kernel is larger than its padded input"),
        ("_kron_factor_conv2d_update_", 3, [0] * 8 + [1], "the geometry of the convolution is out of range"),
        ("_kron_factor_conv2d_update_", 3, [1] * 8 + [3], "C divisible by the groups"),
        ("_precondition_", 0, [torch.zeros(3, 6)], "out must be a float32 matrix of the gradient's shape"),
        ("_precondition_", 1, torch.zeros(2), "dots has the wrong dtype, shape or layout"),
        ("_precondition_", 2, [torch.zeros(3, 5).double()], "grad must not be float64"),
        ("_precondition_", 2, [BAD], "grad must be a matrix"),
        ("_precondition_", 3, mats(4), "left must be a square float32 matrix"),
        ("_precondition_", 4, [spd(10)[::2, ::2]], "right must be a square float32 matrix with unit column"),
        ("_precondition_", 5, [torch.zeros(2)], "bias must have one element per row of grad"),
        ("_precondition_", 5, [torch.zeros(0)] * 2, "must have the same length"),
        ("_rank1_step_", 0, [], "one param, grad, score, lr and decay per block"),
        ("_rank1_step_", 0, [torch.zeros(3, 5).half()], "dtype must be float32 or float64"),
        ("_rank1_step_", 0, [torch.zeros(6, 5)[::2]], "param has the wrong dtype, size or layout"),
        ("_rank1_step_", 1, torch.zeros(1).double(), "norm has the wrong dtype, shape or layout"),
        ("_rank1_step_", 1, torch.zeros(()), "norm has the wrong dtype, shape or layout"),
        ("_rank1_step_", 2, [torch.zeros(3, 5).double()], "grad has the wrong dtype, size or layout"),
        ("_rank1_step_", 3, [torch.zeros(3, 4)], "score has the wrong dtype, size or layout"),
        ("_rank1_step_", 5, [0.1, 0.1], "one param, grad, score, lr and decay per block"),
        ("_rank1_step_", 6, [], "one param, grad, score, lr and decay per block"),
        ("_adam_moments_", 0, [], "the lists must have the same length"),
        ("_adam_moments_", 0, [torch.zeros(5, 3).mT], "the moments must be dense"),
        ("_adam_moments_", 1, [torch.zeros(3, 5).double()], "the moments must be dense, float32 or float64"),
        ("_adam_moments_", 1, [torch.zeros(6, 5)[::2]], "the moments must be dense"),
        ("_adam_moments_", 2, torch.zeros(1), "lengths has the wrong dtype, shape or layout"),
        ("_adam_moments_", 3, [torch.zeros(3, 4)], "grad must have the moments' layout"),
        ("_adam_moments_", 4, [], "the lists must have the same length"),
        ("_grafted_step_", 0, [torch.zeros(3, 4)], "param must have the moments' layout"),
        ("_grafted_step_", 1, [torch.zeros(3, 4)], "direction must have param's shape"),
        ("_grafted_step_", 1, [torch.zeros(3, 5).double()], "direction their dtype"),
        ("_grafted_step_", 2, [torch.zeros(3, 5).bfloat16()], "the moments must be dense, float32"),
        ("_grafted_step_", 4, [0.5, 0.5], "the lists must have the same length"),
        ("_kalman_gram_", 0, torch.zeros(2, 2), "gram has the wrong dtype, shape or layout"),
        ("_kalman_gram_", 0, torch.zeros(2, 3).double(), "gram has the wrong dtype, shape or layout"),
        ("_kalman_gram_", 1, [], "one jacobian per variance"),
        ("_kalman_gram_", 1, [torch.ones(8)], "jacobian must be float32 [outputs, d]"),
        ("_kalman_gram_", 1, [torch.ones(18)[::2]], "variance has the wrong dtype, shape or layout"),
        ("_kalman_gram_", 2, [torch.ones(2, 9).double()], "jacobian must be float32 [outputs, d]"),
        ("_kalman_gram_", 2, [torch.ones(3, 9)], "jacobian must be float32 [outputs, d]"),
        ("_kalman_update_", 0, [torch.ones(8)], "mean has the wrong dtype, shape or layout"),
        ("_kalman_update_", 0, [], "one mean, variance and jacobian per block"),
        ("_kalman_update_", 1, [torch.ones(18)[::2]], "variance has the wrong dtype, shape or layout"),
        ("_kalman_update_", 2, torch.zeros(1, dtype=torch.int32), "info has the wrong dtype"),
        ("_kalman_update_", 3, [torch.ones(3, 9)], "jacobian must be float32 [outputs, d]"),
        ("_kalman_update_", 3, [torch.ones(2, 9).double()], "jacobian must be float32 [outputs, d]"),
        ("_kalman_update_", 3, [torch.ones(2, 9, dtype=torch.int32)], "dtype must be float32"),
        ("_kalman_update_", 4, torch.ones(257), "innovation must be [outputs], at most 256"),
        ("_kalman_update_", 4, torch.ones(2).double(), "innovation must be a float32 vector"),
        ("_kalman_update_", 5, [torch.ones(3)], "noise has the wrong shape"),
        ("_kalman_update_", 5, [torch.ones(2, 1)], "noise has the wrong shape"),
        ("_kalman_update_", 5, [torch.ones(2, 2).double()], "noise must be a float32 vector"),
        ("_kalman_update_", 7, 3, "no such likelihood"),
        ("_kalman_apply_", 0, [torch.ones(8)], "mean has the wrong dtype, shape or layout"),
        ("_kalman_apply_", 0, [], "one mean, variance and jacobian per block"),
        ("_kalman_apply_", 3, torch.ones(3), "whitener has the wrong dtype, shape or layout"),
        ("_kalman_apply_", 4, torch.eye(2).double(), "whitener has the wrong dtype, shape or layout"),
        ("_kalman_apply_", 5, torch.zeros(1, dtype=torch.int32), "info has the wrong dtype, shape or layout"),
    ],
)  # fmt: skip
def test_private_operator_refuses_what_would_leave_memory(op, position, value, text):
    arguments = list(dict(private_samples())[op])
    arguments[position] = value
    with pytest.raises(RuntimeError) as caught:
        getattr(torch.ops.grng, op)(*arguments)
    assert text in str(caught.value)


@pytest.mark.parametrize("position", [0], ids=["gram"])
def test_private_operator_survives_a_scalar(position):
    """A tensor with no dimensions has no size(0) to read."""
    with pytest.raises((RuntimeError, IndexError)):
        torch.ops.grng._kalman_gram_(
            torch.tensor(0.0).double(), [torch.ones(3)], [torch.ones(1, 3)]
        )
