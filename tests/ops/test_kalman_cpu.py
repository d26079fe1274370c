# SPDX-License-Identifier: Apache-2.0
"""The C++ kernel of ``kalman_update_``: its paths, threads, layouts and half-precision Jacobians."""

import pytest
import torch

import grng_kernels as gk
from grng_kernels import Info, kalman_update_, use_backend
from grng_kernels.kalman_update import cpu, op
from tests.cases import MATRIX_LAYOUTS, assert_within_budget, spd, threads

pytestmark = pytest.mark.skipif(
    not gk.backends()["cpu"].available, reason=gk.backends()["cpu"].reason
)
halves = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
likelihoods = pytest.mark.parametrize("likelihood", ["gaussian", "categorical", "fisher"])
# Every number of outputs that stays in registers, and the edges of the tiles beyond.
OUTPUTS = [*range(1, 20), 24, 25, 64, 65, 101]


def state(outputs, d, likelihood="gaussian"):
    """Mean, variance, Jacobian, innovation and noise of one call."""
    noise = 0.2 * spd(outputs) + 0.1 * torch.eye(outputs)
    if likelihood == "categorical":
        noise = torch.randn(outputs).softmax(0)
    elif likelihood == "fisher":
        noise = noise[:, : max(1, outputs - 1)]
    h = torch.randn(outputs, d) / max(d, 1) ** 0.5
    return torch.randn(d), torch.rand(d) + 0.1, h, torch.randn(outputs), noise


def updated(mean, variance, *args, **options):
    mean, variance = mean.clone(), variance.clone()
    assert kalman_update_(mean, variance, *args, **options).item() == Info.OK
    return mean, variance


def assert_accurate(arguments, **options):
    got = updated(*arguments, **options)
    with use_backend("reference"):
        base = updated(*arguments, **options)
        exact = updated(*(t.double() for t in arguments), **options)
    for a, b, reference in zip(got, base, exact, strict=True):
        assert_within_budget(a, reference, b)


@pytest.mark.parametrize("form", ["fdekf", "vdekf"])
@pytest.mark.parametrize("outputs", OUTPUTS)
def test_every_number_of_outputs(outputs, form):
    # Whole chunks, whole vectors, and a rest.
    assert_accurate(state(outputs, 1135), form=form, rho=0.1)


@likelihoods
@pytest.mark.parametrize("regularization", ["gradient", "noise"])
@pytest.mark.parametrize("outputs", [16, 65, 257])
def test_small_stage_in_cpp_and_in_torch(likelihood, regularization, outputs):
    """The largest order that is reflected, one that is not, and one that torch factorises."""
    options = {"likelihood": likelihood, "rho": 0.2, "regularization": regularization}
    assert_accurate(state(outputs, 700, likelihood), **options)


@pytest.mark.parametrize("outputs", [2, 10, 40])
def test_same_bits_on_any_number_of_threads(outputs):
    arguments = state(outputs, 40_000)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(updated(*arguments, rho=0.1))
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0], strict=True))


@pytest.mark.parametrize("outputs", [3, 40])
def test_many_blocks_are_one_state(outputs):
    """Blocks shorter and longer than a chunk and than a slice; the cut of the sums is another one."""
    sizes = [3072] * 5 + [1, 0, 17, 30_000, 0, 511, 513, 2]
    mean, variance, h, error, noise = state(outputs, sum(sizes))
    whole = updated(mean, variance, h, error, noise)
    means, variances = ([b.clone() for b in t.split(sizes)] for t in (mean, variance))
    info = kalman_update_(means, variances, list(h.split(sizes, dim=1)), error, noise)
    assert info.item() == Info.OK
    torch.testing.assert_close(torch.cat(means), whole[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat(variances), whole[1], rtol=1e-5, atol=1e-6)


@halves
@pytest.mark.parametrize("layout", MATRIX_LAYOUTS)
@pytest.mark.parametrize("outputs", [7, 40])
def test_half_jacobian_is_that_in_fp32(half, layout, outputs):
    """Bitwise: 16-bit elements are fp32 numbers, and everything is computed in fp32."""
    mean, variance, h, error, noise = state(outputs, 1135)
    want = updated(mean, variance, h.to(half).float(), error, noise, rho=0.1)
    h = MATRIX_LAYOUTS[layout](h.to(half))
    got = updated(mean, variance, h, error, noise, rho=0.1)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@halves
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("outputs", [3, 300])
def test_half_jacobian_on_every_backend(half, backend, outputs):
    mean, variance, h, error, noise = state(outputs, 600)
    with use_backend(backend):
        want = updated(mean, variance, h.to(half).float(), error, noise)
        got = updated(mean, variance, h.to(half), error, noise)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@halves
@pytest.mark.parametrize("outputs", [3, 40])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_fault_in_a_half_jacobian_changes_nothing(half, outputs, value):
    mean, variance, h, error, noise = state(outputs, 60)
    h = h.to(half)
    h[-1, -1] = value
    before = mean.clone(), variance.clone()
    assert kalman_update_(mean, variance, h, error, noise).item() == Info.NONFINITE_INPUT
    assert torch.equal(mean, before[0]) and torch.equal(variance, before[1])


@pytest.mark.parametrize("outputs", [3, 40])
def test_blocks_of_different_dtypes(outputs):
    mean, variance, h, error, noise = state(outputs, 600)
    halves_of_h = [h[:, :300].bfloat16(), h[:, 300:].half()]
    want = updated(mean, variance, torch.cat([b.float() for b in halves_of_h], 1), error, noise)
    means, variances = ([b.clone() for b in t.split(300)] for t in (mean, variance))
    assert kalman_update_(means, variances, halves_of_h, error, noise).item() == Info.OK
    torch.testing.assert_close(torch.cat(means), want[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat(variances), want[1], rtol=1e-5, atol=1e-6)


# ---- the usual call ----


def count_calls(monkeypatch):
    """Count the calls that go the general way, through the registered operator."""
    calls = []
    general = op._kalman_update_op
    monkeypatch.setattr(op, "_kalman_update_op", lambda *args: (calls.append(1), general(*args))[1])
    return calls


@likelihoods
@pytest.mark.parametrize("as_list", [False, True])
def test_usual_call_is_the_general_one(monkeypatch, likelihood, as_list):
    calls = count_calls(monkeypatch)
    mean, variance, h, error, noise = state(5, 300, likelihood)
    results = []
    for usual in (True, False):
        m, v = mean.clone(), variance.clone()
        versions = m._version, v._version
        if not usual:
            monkeypatch.setattr(op, "_usual_call", lambda *args, **options: None)
        wrap = (lambda t: [t]) if as_list else (lambda t: t)
        info = kalman_update_(
            wrap(m), wrap(v), wrap(h), error, noise, likelihood=likelihood, rho=0.1
        )
        assert (m._version, v._version) > versions
        assert len(calls) == (0 if usual else 1)
        results.append((m, v, info))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("noise", [0.25, torch.tensor([0.1, 0.2, 0.3])], ids=["number", "diagonal"])
def test_usual_call_with_simple_noise(monkeypatch, noise):
    calls = count_calls(monkeypatch)
    mean, variance, h, error, _ = state(3, 300)
    full = torch.diag(noise) if isinstance(noise, torch.Tensor) else noise * torch.eye(3)
    want = updated(mean, variance, h, error, full)
    got = updated(mean, variance, h, error, noise)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert not calls


def test_more_outputs_than_the_small_stage_takes_go_the_general_way(monkeypatch):
    calls = count_calls(monkeypatch)
    updated(*state(cpu.MAX_OUTPUTS + 1, 300))
    assert len(calls) == 1
