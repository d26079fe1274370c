# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of ``kalman_update_`` in the interpreter."""

import math

import pytest
import torch

from grng_kernels import Info, KroneckerJacobian, kalman_update_, use_backend
from grng_kernels.kalman_update import triton_kernel, triton_narrow, triton_wide
from grng_kernels.kalman_update.reference import kalman_update as reference
from grng_kernels.kalman_update.triton_shares import UNIT, cut
from tests.cases import MATRIX_LAYOUTS, assert_within_budget, dtype_id, guarded, offset_by_one, spd

# Around every padded size: of a lane's tile, of three tiles, and of the tensor cores.
OUTPUTS = (1, 2, 3, 8, 10, 16, 17, 32, 40, 100)
forms = pytest.mark.parametrize("form", ["fdekf", "vdekf"])
# One for each kind of kernel: a tile, three tiles, one half of ranks, two halves.
KINDS = (3, 10, 20, 70)
kinds = pytest.mark.parametrize("outputs", KINDS)


@pytest.fixture(autouse=True)
def triton_backend(monkeypatch):
    # Few large programs: the interpreter takes as long for a small one.
    monkeypatch.setattr(triton_kernel, "SUM_BLOCK", 1024)
    monkeypatch.setattr(triton_kernel, "SUM_SHARES", 16)
    with use_backend("triton"):
        yield


class Case:
    """The arguments of one call, the state in blocks."""

    def __init__(self, outputs, sizes=(150,), likelihood="gaussian", dtype=torch.float32):
        self.sizes, self.likelihood = list(sizes), likelihood
        d = sum(sizes)
        self.mean, self.variance = torch.randn(d), torch.rand(d) + 0.01
        self.jacobian = (torch.randn(outputs, d) / max(d, 1) ** 0.5).to(dtype)
        self.blocks = [h.contiguous() for h in self.jacobian.split(self.sizes, 1)]
        self.innovation = torch.randn(outputs)
        self.noise = 0.2 * spd(outputs) + 0.1 * torch.eye(outputs)
        if likelihood == "categorical":
            self.noise = torch.randn(outputs).softmax(0)
            self.innovation = -self.noise.clone()
            self.innovation[0] += 1
        elif likelihood == "fisher":
            self.noise = torch.randn(outputs, max(1, outputs // 2)) / outputs**0.5

    def update(self, **options):
        """Update a copy; return mean, variance, info."""
        means = [m.clone() for m in self.mean.split(self.sizes)]
        variances = [v.clone() for v in self.variance.split(self.sizes)]
        info = kalman_update_(
            means, variances, self.blocks, self.innovation, self.noise,
            likelihood=self.likelihood, **options,
        )  # fmt: skip
        return torch.cat(means), torch.cat(variances), info

    def wanted(self, dtype, **options):
        options = {"form": "fdekf", "forgetting": 1.0, "process_noise": 0.0} | options
        return reference(
            *(t.to(dtype) for t in (self.mean, self.variance, self.jacobian, self.innovation)),
            self.noise.to(dtype), likelihood=self.likelihood, **options,
        )[:2]  # fmt: skip

    def check(self, **options):
        """Twice the error of PyTorch in fp32 at most, both against fp64."""
        *got, info = self.update(**options)
        assert info.item() == Info.OK
        exact, plain = self.wanted(torch.float64, **options), self.wanted(torch.float32, **options)
        for result, wanted, base in zip(got, exact, plain, strict=True):
            assert_within_budget(result, wanted, base)

    def check_unchanged(self, code, **options):
        mean, variance, info = self.update(**options)
        assert info.item() == code
        for got, was in ((mean, self.mean), (variance, self.variance)):
            torch.testing.assert_close(got, was, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("outputs", OUTPUTS)
def test_error_is_at_most_twice_that_of_torch(outputs, dtype):
    Case(outputs, dtype=dtype).check()


@forms
@kinds
@pytest.mark.parametrize("likelihood", ["gaussian", "categorical", "fisher"])
def test_forms_and_likelihoods(outputs, likelihood, form):
    Case(outputs, likelihood=likelihood).check(form=form, forgetting=0.98, process_noise=1e-3)


@kinds
@pytest.mark.parametrize("likelihood", ["gaussian", "categorical"])
@pytest.mark.parametrize("regularization", ["gradient", "noise"])
def test_regularised(outputs, likelihood, regularization):
    Case(outputs, likelihood=likelihood).check(rho=0.3, regularization=regularization)


@kinds
def test_regularised_with_a_jacobian_in_bf16(outputs):
    Case(outputs, dtype=torch.bfloat16).check(rho=0.3)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize(
    "sizes", [[UNIT - 1, 0, 1, UNIT + 1, 16], [0, 75, 0], [3, 300, 8, 129]], ids=str
)
def test_blocks_are_one_state(outputs, sizes, dtype):
    Case(outputs, sizes, dtype=dtype).check()


@kinds
def test_one_parameter(outputs):
    """Fewer parameters than outputs: the step is a small difference of large sums, in any arithmetic."""
    case = Case(outputs, [1])
    *got, info = case.update()
    assert info.item() == Info.OK
    for result, wanted in zip(got, case.wanted(torch.float64), strict=True):
        torch.testing.assert_close(result.double(), wanted, rtol=1e-3, atol=1e-6)


def test_sums_as_a_launch_cuts_them(monkeypatch):
    monkeypatch.undo()
    with use_backend("triton"):
        Case(3, [600, 700]).check(rho=0.3)
        Case(20).check()


@kinds
def test_shares_that_begin_and_end_inside_of_blocks(outputs, monkeypatch):
    monkeypatch.setattr(triton_narrow, "UNIT", UNIT)
    sizes = [2 * UNIT + 7, 3, 5 * UNIT]
    assert len(cut(sizes, 1000, UNIT)) > 5
    Case(outputs, sizes).check()


@kinds
def test_mixed_types_of_the_jacobian(outputs):
    case = Case(outputs, [40, 60])
    case.blocks[0] = case.blocks[0].bfloat16()
    case.jacobian[:, :40] = case.blocks[0]
    case.check()


@kinds
def test_factored_jacobian_is_expanded(outputs):
    case = Case(outputs, [150, 20])
    factored = KroneckerJacobian(torch.randn(outputs, 15) / 12, torch.randn(10))
    case.jacobian[:, :150] = factored.expanded()
    case.blocks[0] = factored
    case.check()


@kinds
@pytest.mark.parametrize("layout", MATRIX_LAYOUTS)
def test_layout_of_the_jacobian_does_not_matter(outputs, layout):
    case = Case(outputs)
    want = case.update()
    case.blocks = [MATRIX_LAYOUTS[layout](h) for h in case.blocks]
    assert all(torch.equal(a, b) for a, b in zip(case.update(), want, strict=True))


@kinds
def test_expanded_jacobian(outputs):
    case = Case(outputs)
    case.jacobian = case.jacobian[:, :1].expand(-1, 150)
    case.blocks = [case.jacobian]
    case.check()


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_twice_the_same_bits(outputs, dtype):
    case = Case(outputs, [3, 200], dtype=dtype)
    first = case.update(rho=0.1)
    assert all(torch.equal(a, b) for a, b in zip(first, case.update(rho=0.1), strict=True))


@kinds
def test_aligned_or_not_the_same_bits(outputs):
    case = Case(outputs, [160])
    want = case.update()
    case.blocks = [offset_by_one(h) for h in case.blocks]
    assert all(torch.equal(a, b) for a, b in zip(case.update(), want, strict=True))


@kinds
def test_nothing_around_the_state_is_written(outputs):
    case = Case(outputs)
    mean, check_mean = guarded(case.mean)
    variance, check_variance = guarded(case.variance)
    jacobian, _ = guarded(case.blocks[0])
    kalman_update_(mean, variance, jacobian, case.innovation, case.noise)
    want = case.update()
    check_mean()
    check_variance()
    assert torch.equal(mean, want[0])
    assert torch.equal(variance, want[1])


@forms
@kinds
def test_certain_parameters_and_a_jacobian_of_zeros(outputs, form):
    """Bit for bit the prediction alone, where nothing is to be learned."""
    case = Case(outputs, [20, 30])
    case.variance[20:] = 0
    case.jacobian[:, :20] = 0
    case.blocks = [h.contiguous() for h in case.jacobian.split(case.sizes, 1)]
    mean, variance, info = case.update(form=form, forgetting=0.5, process_noise=0.25)
    assert info.item() == Info.OK
    assert torch.equal(mean, case.mean)
    assert torch.equal(variance, case.variance / 0.5 + 0.25)


# ---- faults ----


@kinds
@pytest.mark.parametrize("name", ["mean", "variance", "jacobian", "innovation", "noise"])
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("where", [0, -1], ids=["first", "last"])
def test_nonfinite_input_changes_nothing(outputs, name, value, where):
    case = Case(outputs)
    target = case.blocks[0] if name == "jacobian" else getattr(case, name)
    target.view(-1)[where] = value
    case.check_unchanged(Info.NONFINITE_INPUT)


@kinds
@pytest.mark.parametrize("zero_column", [False, True], ids=["", "where the jacobian is zero"])
def test_negative_variance_changes_no_block(outputs, zero_column):
    case = Case(outputs, [30, 70])
    case.variance[50] = -1e-3
    if zero_column:
        case.blocks[1][:, 20] = 0
    case.check_unchanged(Info.NONFINITE_INPUT)


@kinds
def test_infinite_jacobian_in_bf16_is_no_overflow(outputs):
    case = Case(outputs, dtype=torch.bfloat16)
    case.blocks[0][-1, 7] = -math.inf
    case.check_unchanged(Info.NONFINITE_INPUT)


@kinds
@pytest.mark.parametrize("value", [1e20, 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_overflow_is_flagged(outputs, value, dtype):
    case = Case(outputs, dtype=dtype)
    case.variance *= 100
    case.blocks[0].fill_(value)
    case.check_unchanged(Info.OVERFLOW)


@forms
@kinds
def test_noise_that_is_not_positive_definite(outputs, form):
    case = Case(outputs)
    case.noise = -torch.eye(outputs)
    case.check_unchanged(Info.NOT_CONVERGED, form=form)


def test_forgetting_saturates_instead_of_overflowing():
    case = Case(3)
    case.blocks[0].zero_()
    case.variance.fill_(3e38)
    assert (case.update(forgetting=0.5)[1] == torch.finfo(torch.float32).max).all()


def test_more_outputs_than_it_serves():
    assert triton_wide.MAX_OUTPUTS == 128
    with pytest.raises(RuntimeError, match="it serves at most 128 outputs"):
        Case(129, [5]).update()


# ---- shares ----


@pytest.mark.parametrize("unit", [UNIT, 1024])
@pytest.mark.parametrize(
    "lengths", [[1], [UNIT], [10**9], [3, 0, 10**5, 1], [1] * 3000, [0, 0, 7], [12288] * 48]
)
def test_shares_cover_every_column_once(lengths, unit):
    most = 264
    starts = cut(lengths, most, unit)
    assert starts[0][1] == 0
    assert starts[-1] == (len(lengths), 0)
    assert len(starts) - 1 <= most
    before = [sum(lengths[:i]) for i in range(len(lengths))] + [sum(lengths)]
    flat = [before[block] + column for block, column in starts]
    assert flat[0] == 0
    assert flat == sorted(flat)
    for block, column in starts[:-1]:
        # A share begins inside of a block, at a column that keeps its alignment.
        assert 0 <= column < lengths[block]
        assert column % UNIT == 0
