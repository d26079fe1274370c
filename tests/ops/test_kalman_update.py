# SPDX-License-Identifier: Apache-2.0
"""``kalman_update_``: the diagonal filter against the full one, its positivity, its faults and errors."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import grng_kernels as gk
from grng_kernels import Info, kalman_update_
from grng_kernels.kalman_update.gpu import MAX_CUDA_OUTPUTS
from tests.cases import (
    MATRIX_LAYOUTS,
    STATE_DTYPES,
    assert_memory_that_ends_changes_nothing,
    assert_within_budget,
    dtype_id,
    far_apart,
    guarded,
    offset_by_one,
    spd,
)
from tests.ops.errors import REFUSED, assert_raises, refused
from tests.ops.kalman_oracles import dense_update, joseph_diagonal
from tests.properties import HealthCheck, given, settings, st

forms = pytest.mark.parametrize("form", ["fdekf", "vdekf"])
likelihoods = pytest.mark.parametrize("likelihood", ["gaussian", "categorical"])
# Outputs and parameters: tile and chunk edges of the kernels (4, 256), one of each, more outputs than
# parameters, and enough parameters for several slices.
SIZES = [(1, 1), (1, 300), (3, 17), (5, 1), (4, 256), (10, 700), (17, 257), (33, 20), (10, 20000)]
sizes = pytest.mark.parametrize(("outputs", "d"), SIZES, ids=str)


class State:
    """The arguments of one call."""

    def __init__(self, outputs, d, likelihood="gaussian", dtype=torch.float32, device="cpu"):
        self.mean = torch.randn(d)
        self.variance = torch.rand(d) + 0.01
        self.jacobian = torch.randn(outputs, d) / max(d, 1) ** 0.5
        if likelihood == "gaussian":
            self.innovation = torch.randn(outputs)
            self.noise = 0.2 * spd(outputs) + 0.1 * torch.eye(outputs)
        else:
            self.noise = torch.randn(outputs, dtype=torch.float64).softmax(0)
            self.innovation = -self.noise.clone()
            if outputs:
                self.innovation[0] += 1
        self.likelihood = likelihood
        for name in ("mean", "variance", "jacobian", "innovation", "noise"):
            setattr(self, name, getattr(self, name).to(device, dtype))

    def update(self, form="fdekf", **options):
        """Update copies of mean and variance; return them and info."""
        mean, variance = self.mean.clone(), self.variance.clone()
        info = kalman_update_(
            mean, variance, self.jacobian, self.innovation, self.noise,
            form=form, likelihood=self.likelihood, **options,
        )  # fmt: skip
        return mean, variance, info

    def yardstick(self, form="fdekf", forgetting=1.0, process_noise=0.0):
        mean, variance = dense_update(
            self.mean, self.variance, self.jacobian, self.innovation, self.noise,
            form=form, likelihood=self.likelihood, forgetting=forgetting, process_noise=process_noise,
        )  # fmt: skip
        return torch.from_numpy(mean), torch.from_numpy(variance)

    def plain(self, form="fdekf", forgetting=1.0, process_noise=0.0):
        """The equations with torch's operations, in the dtype of the state."""
        p, h, e = self.variance, self.jacobian, self.innovation
        if self.likelihood == "gaussian":
            s = (h * p) @ h.T + self.noise
            gain_t = torch.cholesky_solve(h * p, torch.linalg.cholesky(s))  # [C, d]
            mean = self.mean + gain_t.T @ e
            fdekf = p - p * (gain_t * h).sum(0)
            weight = torch.cholesky_inverse(torch.linalg.cholesky(self.noise))
        else:
            q = self.noise
            t = torch.diag(q.sqrt()) - torch.outer(q, q.sqrt())
            gram = (h * p) @ h.T
            lower = torch.linalg.cholesky(torch.eye(len(e)).to(p) + t.T @ gram @ t)
            inner = torch.cholesky_solve((t.T @ (gram @ e))[:, None], lower)[:, 0]
            mean = self.mean + p * (h.T @ (e - t @ inner))
            fdekf = p - p * p * torch.linalg.solve_triangular(
                lower, t.T @ h, upper=False
            ).square().sum(0)
            weight = t @ t.T
        vdekf = 1 / (1 / p + (h * (weight @ h)).sum(0))
        return mean, (fdekf if form == "fdekf" else vdekf) / forgetting + process_noise


# ---- closed forms ----


@forms
def test_scalar_formula(backend, form):
    mean, variance = torch.tensor([1.0]), torch.tensor([2.0])
    mean, variance = mean.to(backend.device), variance.to(backend.device)
    h, e = torch.tensor([[3.0]]).to(mean), torch.tensor([0.5]).to(mean)
    assert kalman_update_(mean, variance, h, e, 2.0, form=form).item() == Info.OK
    s = 3 * 2 * 3 + 2
    assert mean.item() == pytest.approx(1 + 2 * 3 / s * 0.5, rel=1e-6)
    want = 2 - (2 * 3) ** 2 / s if form == "fdekf" else 1 / (1 / 2 + 9 / 2)
    assert variance.item() == pytest.approx(want, rel=1e-6)


@forms
@pytest.mark.parametrize("power", [-20, -3, 10, 30])
def test_powers_of_two_in_the_units_of_the_outputs(backend, form, power):
    """Scaling H and e by 2^k and R by 4^k changes nothing, bitwise."""
    state = State(5, 300, device=backend.device)
    plain = state.update(form)
    for name, scale in (
        ("jacobian", 2.0**power),
        ("innovation", 2.0**power),
        ("noise", 4.0**power),
    ):
        setattr(state, name, getattr(state, name) * scale)
    scaled = state.update(form)
    assert all(torch.equal(a, b) for a, b in zip(plain, scaled, strict=True))


@forms
@pytest.mark.parametrize("power", [-10, 6])
def test_powers_of_four_in_the_units_of_the_parameters(backend, form, power):
    state = State(5, 300, device=backend.device)
    state.mean.zero_()
    mean, variance, _ = state.update(form)
    state.variance, state.jacobian = state.variance * 4.0**power, state.jacobian * 2.0**-power
    scaled_mean, scaled_variance, _ = state.update(form)
    assert torch.equal(scaled_mean, mean * 2.0**power)
    assert torch.equal(scaled_variance, variance * 4.0**power)


@forms
@likelihoods
def test_zero_jacobian_only_predicts(backend, form, likelihood):
    state = State(3, 17, likelihood, device=backend.device)
    state.jacobian.zero_()
    mean, variance, info = state.update(form, forgetting=0.5, process_noise=0.25)
    assert info.item() == Info.OK
    assert torch.equal(mean, state.mean)
    assert torch.equal(variance, state.variance / 0.5 + 0.25)


@forms
@likelihoods
def test_zero_variance_has_no_gain(backend, form, likelihood):
    state = State(3, 17, likelihood, device=backend.device)
    state.variance.zero_()
    mean, variance, info = state.update(form, process_noise=0.125)
    assert info.item() == Info.OK
    assert torch.equal(mean, state.mean)
    assert torch.equal(variance, torch.full_like(variance, 0.125))


def test_number_as_noise_is_that_times_the_identity(backend):
    state = State(5, 300, device=backend.device)
    state.noise = 0.25 * torch.eye(5, device=backend.device)
    want = state.update()
    state.noise = 0.25
    assert all(torch.equal(a, b) for a, b in zip(state.update(), want, strict=True))


def test_noise_may_be_an_integer(backend):
    state = State(5, 30, device=backend.device)
    state.noise = 2
    got = state.update()
    state.noise = 2.0
    assert all(torch.equal(a, b) for a, b in zip(got, state.update(), strict=True))


# ---- against the full filter ----


@forms
@likelihoods
@sizes
def test_error_is_at_most_twice_that_of_torch(backend, form, likelihood, outputs, d):
    if d > 3000:
        pytest.skip("the dense yardstick is too large: see the sliced test")
    state = State(outputs, d, likelihood, device=backend.device)
    options = {"forgetting": 0.98, "process_noise": 1e-3}
    mean, variance, info = state.update(form, **options)
    ref_mean, ref_variance = state.yardstick(form, **options)
    base_mean, base_variance = state.plain(form, **options)
    assert info.item() == Info.OK
    assert_within_budget(mean, ref_mean, base_mean)
    assert_within_budget(variance, ref_variance, base_variance)


@forms
@likelihoods
def test_several_slices_against_torch_in_fp64(backend, form, likelihood):
    """More parameters than one slice of the sums, against the equations in fp64."""
    state = State(10, 20000, likelihood, device=backend.device)
    mean, variance, _ = state.update(form)
    base_mean, base_variance = state.plain(form)
    for name in ("mean", "variance", "jacobian", "innovation", "noise"):
        setattr(state, name, getattr(state, name).double())
    ref_mean, ref_variance = state.plain(form)
    assert_within_budget(mean, ref_mean, base_mean)
    assert_within_budget(variance, ref_variance, base_variance)


@forms
@likelihoods
def test_fp64_equals_the_full_filter(form, likelihood, device):
    state = State(7, 60, likelihood, torch.float64, device)
    mean, variance, info = state.update(form, forgetting=0.9, process_noise=0.01)
    ref_mean, ref_variance = state.yardstick(form, forgetting=0.9, process_noise=0.01)
    assert info.item() == Info.OK
    torch.testing.assert_close(mean.cpu(), ref_mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(variance.cpu(), ref_variance, rtol=1e-12, atol=1e-12)


def test_fdekf_is_the_joseph_diagonal(device):
    state = State(7, 60, dtype=torch.float64, device=device)
    _, variance, _ = state.update()
    want = joseph_diagonal(state.variance, state.jacobian, state.noise)
    np.testing.assert_allclose(variance.cpu().numpy(), want, rtol=1e-12, atol=1e-13)


@likelihoods
@pytest.mark.parametrize("seed", range(5))
def test_fdekf_keeps_at_least_the_variance_of_vdekf(backend, likelihood, seed):
    torch.manual_seed(seed)
    state = State(7, 400, likelihood, device=backend.device)
    state.jacobian *= 5
    _, full, _ = state.update("fdekf")
    _, variational, _ = state.update("vdekf")
    slack = 4 * torch.finfo(torch.float32).eps * state.variance
    assert (full + slack >= variational).all()
    assert (full > variational + slack).any()


def test_categorical_with_two_classes_is_the_scalar_filter(device):
    """Two classes with logits (z, 0) are one Bernoulli output with variance q(1 − q)."""
    q, h = 0.3, torch.randn(1, 20, dtype=torch.float64, device=device)
    both = torch.cat([h, torch.zeros_like(h)])
    p = torch.rand(20, dtype=torch.float64, device=device) + 0.1
    mean, variance = torch.zeros_like(p), p.clone()
    e = torch.tensor([1 - q, q - 1], dtype=torch.float64, device=device)
    probabilities = torch.tensor([q, 1 - q], dtype=torch.float64, device=device)
    kalman_update_(mean, variance, both, e, probabilities, likelihood="categorical")
    r = q * (1 - q)
    gram = (h * p * h).sum()
    torch.testing.assert_close(mean, p * h[0] * (1 - q) / (1 + r * gram))
    torch.testing.assert_close(variance, p - p * p * h[0] ** 2 * r / (1 + r * gram))


@likelihoods
def test_probability_one_is_no_information(backend, likelihood):
    """R of a certain label is zero: nothing is learned and nothing divides by it."""
    state = State(4, 60, "categorical", device=backend.device)
    state.noise = torch.tensor([1.0, 0, 0, 0], device=backend.device)
    state.innovation.zero_()
    mean, variance, info = state.update("fdekf" if likelihood == "gaussian" else "vdekf")
    assert info.item() == Info.OK
    assert torch.equal(mean, state.mean)
    torch.testing.assert_close(variance, state.variance)


# ---- blocks and shapes ----


def cut(tensor, bounds, dim=0):
    return [t.clone() for t in tensor.split(bounds, dim=dim)]


@forms
@likelihoods
@pytest.mark.parametrize("bounds", [[17], [1, 16], [8, 0, 9], [0, 17], [5, 5, 7]], ids=str)
def test_blocks_are_one_state(backend, form, likelihood, bounds):
    state = State(3, 17, likelihood, device=backend.device)
    want_mean, want_variance, want_info = state.update(form)
    means, variances = cut(state.mean, bounds), cut(state.variance, bounds)
    jacobians = cut(state.jacobian, bounds, 1)
    info = kalman_update_(
        means, variances, jacobians, state.innovation, state.noise, form=form, likelihood=likelihood
    )
    assert torch.equal(info, want_info)
    base, ref = state.plain(form), state.yardstick(form)
    assert_within_budget(torch.cat(means), ref[0], base[0])
    assert_within_budget(torch.cat(variances), ref[1], base[1])
    torch.testing.assert_close(torch.cat(means), want_mean, rtol=1e-5, atol=1e-6)
    if len(bounds) == 1:
        assert torch.equal(means[0], want_mean)
        assert torch.equal(variances[0], want_variance)


@likelihoods
@pytest.mark.parametrize(("outputs", "d"), [(0, 5), (3, 0), (0, 0)])
def test_empty_input_changes_nothing(backend, likelihood, outputs, d):
    state = State(outputs, d, likelihood, device=backend.device)
    mean, variance, info = state.update()
    assert (info.item(), info.dtype, info.shape) == (Info.OK, torch.int32, ())
    assert torch.equal(mean, state.mean)
    assert torch.equal(variance, state.variance)


def test_more_blocks_than_a_side_of_a_grid():
    count = 66_000
    mean, variance = torch.zeros(count), torch.rand(count) + 0.1
    jacobian, e, noise = torch.randn(1, count), torch.tensor([0.5]), 2.0
    state = State(1, count)
    state.mean, state.variance, state.jacobian = mean, variance, jacobian
    state.innovation, state.noise = e, torch.tensor([[noise]])
    want = state.plain()
    means, variances = (list(t.clone().split(1)) for t in (mean, variance))
    jacobians = list(jacobian.split(1, dim=1))
    assert kalman_update_(means, variances, jacobians, e, noise).item() == Info.OK
    torch.testing.assert_close(torch.cat(means), want[0])
    torch.testing.assert_close(torch.cat(variances), want[1])


def test_pairs_of_tiles_fit_in_a_side_of_a_grid():
    """The CUDA kernel has one line of blocks for each pair of tiles of outputs."""
    source = (Path(__file__).parents[2] / "csrc" / "cuda" / "kalman_update.cu").read_text("utf-8")
    [tile] = re.findall(r"constexpr int kTile = (\d+)", source)
    tiles = -(-MAX_CUDA_OUTPUTS // int(tile))
    assert tiles * (tiles + 1) // 2 <= 65_535


@sizes
def test_memory_around_the_state_is_not_written(backend, outputs, d):
    state = State(outputs, d, device=backend.device)
    mean, check_mean = guarded(state.mean)
    variance, check_variance = guarded(state.variance)
    jacobian, _ = guarded(state.jacobian)
    want = state.update()
    kalman_update_(mean, variance, jacobian, state.innovation, state.noise)
    check_mean()
    check_variance()
    assert torch.equal(mean, want[0])
    assert torch.equal(variance, want[1])


@forms
@pytest.mark.parametrize("layout", MATRIX_LAYOUTS)
def test_layout_of_the_jacobian_does_not_matter(backend, form, layout):
    state = State(7, 300, device=backend.device)
    want = state.update(form)
    base, ref = state.plain(form), state.yardstick(form)
    state.jacobian = MATRIX_LAYOUTS[layout](state.jacobian)
    got = state.update(form)
    if backend.name == "reference":
        # The library's triangular solve and product may round another way for another layout.
        assert_within_budget(got[0], ref[0], base[0])
        assert_within_budget(got[1], ref[1], base[1])
    else:
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@forms
@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
def test_elements_further_apart_than_int32_reaches(backend, form, dim, tmp_path):
    state = State(2, 300, device=backend.device) if dim == 0 else State(5, 2, device=backend.device)
    want = state.update(form)
    state.jacobian = far_apart(state.jacobian, dim, tmp_path)
    got = state.update(form)
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["innovation", "noise"])
def test_expanded_small_arguments(backend, name):
    state = State(5, 60, device=backend.device)
    if name == "noise":
        state.noise, state.likelihood = (
            torch.tensor(0.2).expand(5).to(backend.device),
            "categorical",
        )
        state.innovation = state.innovation - state.innovation.mean()
    else:
        state.innovation = state.innovation[:1].expand(5)
    got = state.update()
    setattr(state, name, getattr(state, name).contiguous())
    assert all(torch.equal(a, b) for a, b in zip(got, state.update(), strict=True))


@pytest.mark.parametrize("expand", [(1, 60), (5, 1)], ids=["rows", "columns"])
def test_expanded_jacobian(backend, expand):
    state = State(5, 60, device=backend.device)
    state.jacobian = torch.randn(expand).to(backend.device).expand(5, 60)
    mean, variance, info = state.update()
    ref = state.yardstick()
    assert info.item() == Info.OK
    torch.testing.assert_close(mean.double().cpu(), ref[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(variance.double().cpu(), ref[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["innovation", "noise"])
def test_layout_of_the_small_arguments_does_not_matter(backend, name):
    state = State(5, 60, device=backend.device)
    want = state.update()
    value = getattr(state, name)
    buffer = torch.full([2 * n for n in value.shape], math.nan, device=backend.device)
    view = buffer[tuple(slice(None, None, 2) for _ in value.shape)]
    setattr(state, name, view.copy_(value))
    assert all(torch.equal(a, b) for a, b in zip(state.update(), want, strict=True))


@pytest.mark.parametrize("strided", ["mean", "variance"])
def test_automatic_choice_takes_a_strided_state(strided):
    state = State(5, 60)
    want = state.update()
    tensors = {"mean": state.mean.clone(), "variance": state.variance.clone()}
    buffer = torch.full((120,), 7.0)
    tensors[strided] = buffer[::2].copy_(tensors[strided])
    kalman_update_(*tensors.values(), state.jacobian, state.innovation, state.noise)
    torch.testing.assert_close(tensors["mean"], want[0])
    torch.testing.assert_close(tensors["variance"], want[1])
    assert (buffer[1::2] == 7).all()


def test_unaligned_pointers_after_an_aligned_call(backend):
    state = State(5, 300, device=backend.device)
    want = state.update()
    mean, variance = offset_by_one(state.mean), offset_by_one(state.variance)
    kalman_update_(
        mean, variance, *(offset_by_one(t) for t in (state.jacobian, state.innovation, state.noise))
    )
    assert torch.equal(mean, want[0])
    assert torch.equal(variance, want[1])


# ---- many steps, extreme scales ----


@forms
@likelihoods
def test_variance_stays_positive_over_many_steps(backend, form, likelihood):
    state = State(3, 20, likelihood, device=backend.device)
    state.jacobian *= 10
    mean, variance = state.mean.clone(), state.variance.clone()
    previous = variance.clone()
    for _ in range(200 if backend.name == "reference" else 1000):
        info = kalman_update_(
            mean, variance, state.jacobian, 0.1 * state.innovation, state.noise,
            form=form, likelihood=likelihood,
        )  # fmt: skip
        assert (variance <= previous).all()
        previous.copy_(variance)
    assert info.item() == Info.OK
    assert (variance > 0).all()
    assert mean.isfinite().all()


@forms
def test_tiny_noise_keeps_the_gain_below_one(backend, form):
    state = State(3, 20, device=backend.device)
    state.noise = 1e-30 * torch.eye(3, device=backend.device)
    mean, variance, info = state.update(form)
    assert mean.isfinite().all()
    assert (variance >= 0).all()
    assert (variance <= state.variance).all()
    if info.item() == Info.OK and form == "fdekf":
        # All three observations are believed: the new prediction error is zero.
        left = state.innovation - state.jacobian @ (mean - state.mean)
        assert (left.abs() < 1e-3 * state.innovation.abs().max()).all()


def test_forgetting_saturates_instead_of_overflowing(backend):
    state = State(3, 20, device=backend.device)
    state.jacobian.zero_()
    state.variance.fill_(3e38)
    _, variance, info = state.update(forgetting=0.5)
    assert info.item() == Info.OK
    assert (variance == torch.finfo(torch.float32).max).all()


exponents = st.floats(-30, 30)


@settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    p=exponents, h=exponents, r=exponents, e=exponents, spread=st.floats(0, 8), q=exponents,
    form=st.sampled_from(["fdekf", "vdekf"]), seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_scale_is_right_or_flagged(backend, p, h, r, e, spread, q, form, seed):
    """P, R, H and e from 1e-30 to 1e30, within one call as well: no NaN, 0 <= P_new <= P + Q."""
    torch.manual_seed(seed)
    d, outputs = 9, 3

    def magnitudes(exponent, *shape):
        spread_out = exponent + spread * (torch.rand(shape) - 0.5)
        return (10 ** spread_out.double().clamp(-30, 30)).float()

    state = State(outputs, d)
    state.variance = magnitudes(p, d)
    state.jacobian = magnitudes(h, outputs, d) * torch.randn(outputs, d).sign()
    state.noise = torch.diag(magnitudes(r, outputs))
    state.innovation = magnitudes(e, outputs)
    for name in ("mean", "variance", "jacobian", "innovation", "noise"):
        setattr(state, name, getattr(state, name).to(backend.device))
    process_noise = float(10**q)
    mean, variance, info = state.update(form, process_noise=process_noise)
    if info.item() != Info.OK:
        assert torch.equal(mean, state.mean)
        assert torch.equal(variance, state.variance)
        return
    assert mean.isfinite().all()
    assert variance.isfinite().all()
    assert (variance >= 0).all()
    assert (variance.double() <= (state.variance.double() + process_noise) * (1 + 1e-6)).all()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(h=st.floats(-12, 12), p=st.floats(-12, 12), r=st.floats(-6, 6), seed=st.integers(0, 1000))
def test_scalar_observation_at_any_moderate_scale(backend, h, p, r, seed):
    """One output has a closed form, so at every scale that fp32 holds the answer is checked, not only
    bounded."""
    torch.manual_seed(seed)
    variance = (torch.rand(9) + 0.5) * 10**p
    jacobian = torch.randn(1, 9) * 10**h
    noise = 10 ** (2 * h + p + r)
    innovation = torch.tensor([10.0**h])
    mean, new = torch.zeros(9).to(backend.device), variance.clone().to(backend.device)
    info = kalman_update_(mean, new, jacobian.to(new), innovation.to(new), noise)
    assert info.item() == Info.OK
    v, j = variance.double(), jacobian[0].double()
    s = (v * j * j).sum() + noise
    want_mean, want = v * j * innovation.double() / s, v - (v * j) ** 2 / s
    torch.testing.assert_close(
        mean.double().cpu(), want_mean, rtol=1e-5, atol=1e-6 * want_mean.abs().max().item()
    )
    assert ((new.double().cpu() - want).abs() <= 1e-6 * v).all()


# ---- faults ----


def assert_flagged(state, code, **options):
    mean, variance, info = state.update(**options)
    assert info.item() in ((code,) if isinstance(code, int) else code)
    torch.testing.assert_close(mean, state.mean, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(variance, state.variance, rtol=0, atol=0, equal_nan=True)


@forms
@likelihoods
@pytest.mark.parametrize("name", ["mean", "variance", "jacobian", "innovation", "noise"])
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("where", [0, -1], ids=["first", "last"])
def test_nonfinite_input_changes_nothing(backend, form, likelihood, name, value, where):
    state = State(5, 300, likelihood, device=backend.device)
    getattr(state, name).view(-1)[where] = value
    codes = (Info.NONFINITE_INPUT,)
    if backend.device == "cuda":
        codes += (Info.OVERFLOW,)
    assert_flagged(state, codes, form=form)


@forms
@likelihoods
@pytest.mark.parametrize("zero_column", [False, True], ids=["", "where the jacobian is zero"])
def test_negative_variance_is_flagged(backend, form, likelihood, zero_column):
    state = State(5, 300, likelihood, device=backend.device)
    state.variance[150] = -1e-3
    if zero_column:
        state.jacobian[:, 150] = 0
    assert_flagged(state, Info.NONFINITE_INPUT, form=form)


def test_fault_in_one_block_leaves_all_blocks(backend):
    state = State(3, 17, device=backend.device)
    means, variances = cut(state.mean, [5, 12]), cut(state.variance, [5, 12])
    jacobians = cut(state.jacobian, [5, 12], 1)
    variances[1][3] = -1
    before = [t.clone() for t in means + variances]
    info = kalman_update_(means, variances, jacobians, state.innovation, state.noise)
    assert info.item() == Info.NONFINITE_INPUT
    assert all(torch.equal(a, b) for a, b in zip(means + variances, before, strict=True))


@forms
def test_noise_that_is_not_positive_definite(backend, form):
    for noise in (-torch.eye(3), torch.zeros(3, 3), torch.diag(torch.tensor([1.0, -1e-3, 1.0]))):
        state = State(3, 17, device=backend.device)
        state.noise = noise.to(backend.device)
        assert_flagged(state, Info.NOT_CONVERGED, form=form)


@pytest.mark.parametrize(
    ("name", "value"), [("jacobian", 1e20), ("jacobian", 3e38), ("innovation", 3e38)]
)
@forms
def test_overflow_is_flagged(backend, form, name, value):
    """S, or the step of a parameter, leaves fp32: that is said, and never becomes a zero gain."""
    state = State(3, 17, device=backend.device)
    state.variance *= 100
    getattr(state, name).fill_(value)
    if name == "innovation":
        state.jacobian *= 1e-3
        state.noise *= 1e-6
    assert_flagged(state, Info.OVERFLOW, form=form)


@forms
def test_overflow_with_one_output_is_flagged(backend, form):
    """An infinite S of one output has a finite inverse, 0: the factorisation does not notice."""
    state = State(1, 4, device=backend.device)
    state.jacobian.fill_(1e20)
    state.variance.fill_(1.0)
    assert_flagged(state, Info.OVERFLOW, form=form)


@forms
def test_step_of_the_mean_beyond_the_range(backend, form):
    state = State(1, 1, device=backend.device)
    state.variance.fill_(1e30)
    state.jacobian.fill_(1e-15)
    state.noise.fill_(1.0)
    state.innovation.fill_(1e30)
    assert_flagged(state, Info.OVERFLOW, form=form)


def test_symmetric_noise_only_needs_one_triangle(backend):
    """Rounding-level asymmetry of R is no fault."""
    state = State(5, 60, device=backend.device)
    want = state.update()
    state.noise = state.noise + 1e-8 * torch.randn(5, 5).to(backend.device)
    got = state.update()
    assert got[2].item() == Info.OK
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-5)


def _blocks():
    sizes, outputs = (70_000, 3, 20_000), 60
    means, variances = [torch.zeros(d) for d in sizes], [torch.ones(d) for d in sizes]
    jacobians = [torch.randn(outputs, d) / 300 for d in sizes]
    return (
        means,
        variances,
        jacobians,
        torch.randn(outputs),
        torch.eye(outputs),
    ), means + variances


SHORT_OF_MEMORY = {"blocks": (_blocks, lambda a: kalman_update_(*a))}


def test_memory_that_ends_leaves_all_blocks_as_they_were():
    if not gk.backends()["cpu"].available:
        pytest.skip(gk.backends()["cpu"].reason)
    assert_memory_that_ends_changes_nothing(__name__, "blocks", 64 << 20)


# ---- errors ----

M, P, H, E, R = (torch.zeros(4), torch.ones(4), torch.ones(2, 4), torch.ones(2), torch.eye(2))
BIG = torch.zeros(64)
ERRORS = {
    "mean_no_tensor": (
        TypeError, "mean must be a tensor or a list of tensors, got int", {"mean": 1},
    ),
    "list_item_no_tensor": (
        TypeError,
        "jacobian must be a tensor or a list of tensors, got a list with str",
        {"mean": [M], "variance": [P], "jacobian": ["H"]},
    ),
    "tensor_and_list": (
        TypeError,
        "mean, variance and jacobian must all be tensors or all be lists",
        {"jacobian": [H]},
    ),
    "lengths": (
        ValueError,
        "the lists must have the same length, got mean: 1, variance: 2, jacobian: 1",
        {"mean": [M], "variance": [P, P], "jacobian": [H]},
    ),
    "no_blocks": (
        ValueError,
        "mean must have at least one block, got an empty list",
        {"mean": [], "variance": [], "jacobian": []},
    ),
    "form": (ValueError, "form must be one of fdekf, vdekf, got 'ekf'", {"form": "ekf"}),
    "likelihood": (
        ValueError,
        "likelihood must be one of gaussian, categorical, fisher, got 'poisson'",
        {"likelihood": "poisson"},
    ),
    "forgetting_tensor": (
        TypeError, "forgetting must be a number, got a tensor", {"forgetting": torch.tensor(1.0)},
    ),
    "forgetting_zero": (
        ValueError, "forgetting must be finite and in (0.0, 1.0], got 0.0", {"forgetting": 0.0},
    ),
    "forgetting_above_one": (
        ValueError, "forgetting must be finite and in (0.0, 1.0], got 1.5", {"forgetting": 1.5},
    ),
    "forgetting_nan": (
        ValueError, "forgetting must be finite and in (0.0, 1.0], got nan", {"forgetting": math.nan},
    ),
    "forgetting_text": (TypeError, "forgetting must be a number, got str", {"forgetting": "1"}),
    "process_noise_tensor": (
        TypeError, "process_noise must be a number, got a tensor", {"process_noise": torch.tensor(0.0)},
    ),
    "process_noise_negative": (
        ValueError, "process_noise must be finite and in [0.0, inf), got -1", {"process_noise": -1},
    ),
    "process_noise_infinite": (
        ValueError, "process_noise must be finite and in [0.0, inf), got inf", {"process_noise": math.inf},
    ),
    "mean_dtype": (
        TypeError, "mean must have dtype float32, float64, got bfloat16", {"mean": M.bfloat16()},
    ),
    "variance_dtype": (
        TypeError, "variance must have dtype float32, got float64", {"variance": P.double()},
    ),
    "jacobian_dtype": (
        TypeError,
        "jacobian must have dtype float32, bfloat16, float16, got float64",
        {"jacobian": H.double()},
    ),
    "half_jacobian_of_double_state": (
        TypeError,
        "jacobian must have dtype float64, got bfloat16",
        {"mean": M.double(), "variance": P.double(), "innovation": E.double(), "noise": R.double(),
         "jacobian": H.bfloat16()},
    ),
    "innovation_dtype": (
        TypeError, "innovation must have dtype float32, got int64", {"innovation": E.long()},
    ),
    "noise_dtype": (
        TypeError, "noise must have dtype float32, got float64", {"noise": R.double()},
    ),
    "second_mean_dtype": (
        TypeError,
        "mean[1] must have dtype float32, got float64",
        {"mean": [M, M.double()], "variance": [P, P], "jacobian": [H, H]},
    ),
    "innovation_rank": (
        ValueError, "innovation must be [C], got shape [2, 1]", {"innovation": torch.ones(2, 1)},
    ),
    "mean_rank": (ValueError, "mean must be [d], got shape [2, 2]", {"mean": torch.zeros(2, 2)}),
    "variance_shape": (
        ValueError, "variance must have shape [4] (as mean), got [5]", {"variance": torch.ones(5)},
    ),
    "jacobian_shape": (
        ValueError,
        "jacobian must have shape [2, 4] (outputs C, parameters d), got [4, 2]",
        {"jacobian": H.T},
    ),
    "block_is_named": (
        ValueError,
        "variance[1] must have shape [4] (as mean), got [3]",
        {"mean": [M, M], "variance": [P, P[:3]], "jacobian": [H, H]},
    ),
    "noise_shape": (
        ValueError, "noise must have shape [2] (diagonal of the noise), got [3]", {"noise": torch.ones(3)},
    ),
    "noise_zero": (ValueError, "noise must be finite and in (0.0, inf), got 0.0", {"noise": 0.0}),
    "noise_negative": (ValueError, "noise must be finite and in (0.0, inf), got -1", {"noise": -1}),
    "noise_nan": (ValueError, "noise must be finite and in (0.0, inf), got nan", {"noise": math.nan}),
    "noise_none": (TypeError, "noise must be a number, got NoneType", {"noise": None}),
    "noise_number_for_classes": (
        TypeError,
        "noise must be the probabilities [C] with likelihood='categorical', got float",
        {"noise": 1.0, "likelihood": "categorical"},
    ),
    "noise_matrix_for_classes": (
        ValueError,
        "noise must have shape [2] (class probabilities), got [2, 2]",
        {"likelihood": "categorical"},
    ),
    "mean_expanded": (
        ValueError,
        "mean is written in place and must not overlap itself, got strides [0] for shape [4]",
        {"mean": torch.zeros(1).expand(4)},
    ),
    "variance_expanded": (
        ValueError,
        "variance is written in place and must not overlap itself, got strides [0] for shape [4]",
        {"variance": torch.ones(1).expand(4)},
    ),
    "devices": (
        ValueError,
        "all tensors must be on one device, got innovation on cpu and jacobian on meta",
        {"jacobian": H.to("meta")},
    ),
    "mean_is_variance": (
        ValueError,
        "variance[0] and mean[0] overlap in memory, and one is written",
        {"mean": BIG[:4], "variance": BIG[:4]},
    ),
    "variance_overlaps_jacobian": (
        ValueError,
        "overlap in memory, and one is written",
        {"variance": BIG[:4], "jacobian": BIG[2:10].view(2, 4)},
    ),
    "mean_overlaps_innovation": (
        ValueError, "overlap in memory, and one is written", {"mean": BIG[:4], "innovation": BIG[3:5]},
    ),
    "same_block_twice": (
        ValueError,
        "overlap in memory, and one is written",
        {"mean": [BIG[:4], BIG[:4]], "variance": [P, P.clone()], "jacobian": [H, H]},
    ),
}  # fmt: skip


def call(**changes):
    arguments = {
        "mean": M.clone(), "variance": P.clone(), "jacobian": H, "innovation": E, "noise": R,
    } | changes  # fmt: skip
    names = ("mean", "variance", "jacobian", "innovation", "noise")
    positional = [arguments.pop(name) for name in names]
    return kalman_update_(*positional, **arguments)


@pytest.mark.parametrize("case", ERRORS)
def test_error_says_what_is_wrong(case):
    exception, text, changes = ERRORS[case]
    assert_raises(exception, text, call, **changes)
    with pytest.raises(exception, match=r"^kalman_update_: "):
        call(**changes)


@pytest.mark.parametrize("kind", REFUSED, ids=str)
def test_refused_dtypes_and_layouts(kind):
    with pytest.raises(TypeError, match=r"mean must (have dtype float32, float64|be a dense)"):
        call(mean=refused(kind, 4))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mean": torch.zeros(8)[::2]}, "it needs contiguous mean and variance"),
        (
            {
                "mean": M.double(),
                "variance": P.double(),
                "jacobian": H.double(),
                "innovation": E.double(),
                "noise": R.double(),
            },
            "it computes in fp32 only",
        ),
    ],
    ids=["strided", "fp64"],
)
def test_named_cpu_backend_says_what_it_cannot_do(changes, reason):
    with gk.use_backend("cpu"):
        assert_raises(RuntimeError, f"'cpu' was asked for, but {reason}", call, **changes)


@pytest.mark.parametrize("dtype", STATE_DTYPES, ids=dtype_id)
def test_state_keeps_its_dtype(dtype, device):
    state = State(3, 17, dtype=dtype, device=device)
    mean, variance, _ = state.update()
    assert mean.dtype == variance.dtype == dtype


@pytest.mark.parametrize(("name", "value"), [("forgetting", 1e-50), ("process_noise", 1e39)])
def test_numbers_that_fp32_cannot_hold_are_refused(name, value):
    state = State(3, 17)
    with pytest.raises(ValueError, match=f"{name} must stay finite"):
        state.update(**{name: value})


def test_an_innovation_that_is_no_tensor_is_named():
    state = State(3, 17)
    with pytest.raises(TypeError, match="innovation must be a tensor, got float"):
        kalman_update_(state.mean, state.variance, state.jacobian, 0.5, 1.0)


def test_a_bad_block_is_found_before_any_block_is_written():
    if not gk.backends()["cpu"].available:
        pytest.skip(gk.backends()["cpu"].reason)
    means, variances = [torch.zeros(3), torch.zeros(3)], [torch.ones(3), torch.ones(3)]
    with pytest.raises(RuntimeError, match="jacobian"):
        torch.ops.grng._kalman_apply_(
            means, variances, [torch.ones(2, 3), torch.ones(2, 4)], torch.ones(2), torch.eye(2),
            torch.zeros((), dtype=torch.int32), False, 1.0, 0.0,
        )  # fmt: skip
    assert all(torch.equal(m, torch.zeros(3)) for m in means)
