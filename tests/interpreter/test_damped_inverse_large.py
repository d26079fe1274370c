# SPDX-License-Identifier: Apache-2.0
"""``damped_inverse`` above order 64 in Triton's interpreter: Newton-Schulz and the sweep of panels."""

import math

import pytest
import torch

from grng_kernels import Info, _table
from grng_kernels.damped_inverse import (
    reference,
    spectral_norm,
    triton_direct,
    triton_epilogue,
    triton_newton_schulz,
    triton_prologue,
)
from grng_kernels.damped_inverse.entry import Entry
from grng_kernels.damped_inverse.method_table import choose
from grng_kernels.damped_inverse.precision import Plan, Step
from tests.cases import MATRIX_LAYOUTS, guarded, inverse64, spd

MODULES = {"newton_schulz": triton_newton_schulz, "direct": triton_direct}
methods = pytest.mark.parametrize("method", MODULES)
SENTINEL = -1234567


@pytest.fixture(autouse=True)
def tables():
    """Tables of this test alone: another test may have had other matrices at the same addresses."""
    _table.clear()


@pytest.fixture(autouse=True)
def larger_programs(monkeypatch):
    """Half as many programs: the interpreter takes its time for each."""
    for module in (triton_prologue, triton_epilogue):
        monkeypatch.setattr(module, "ROWS", 64)


@pytest.fixture
def few_steps(monkeypatch):
    """Less power iteration, here and in the reference: it takes most of the time."""
    for module in (triton_prologue, spectral_norm):
        monkeypatch.setattr(module, "STEPS", 3)


def sharp(n):
    """A matrix whose norm a few steps find: Newton-Schulz must not be given too small a norm."""
    v = torch.randn(n, 1)
    return spd(n) + 30 * v @ v.mT / v.square().sum()


def entry(factor, damping=None, vector=None):
    factor = factor if factor.dim() == 3 else factor.unsqueeze(0)
    length, n = factor.shape[:2]
    if damping is not None:
        damping = torch.as_tensor(damping, dtype=torch.float32).expand(length).contiguous()
    return Entry(
        factor,
        damping,
        torch.zeros(length, n) if vector is None else vector.view(length, n),
        torch.full((length, n, n), math.nan),
        *(torch.full((length,), math.nan) for _ in range(3)),
        torch.full((length,), SENTINEL, dtype=torch.int32),
    )


def run(method, entries, rho=1e-2):
    MODULES[method].launch(entries, rho=rho)
    return entries


def results(e):
    return {name: getattr(e, name) for name in Entry._fields[2:]}


def assert_same(a, b):
    for name, value in results(a).items():
        torch.testing.assert_close(
            value,
            results(b)[name],
            rtol=0,
            atol=0,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def errors(e, i=0):
    """The largest error relative to the largest element: ours, and that of PyTorch in fp32."""
    a = e.factor[i].double()
    m = (a + a.mT) / 2 + e.used_damping[i].double() * torch.eye(len(a), dtype=torch.float64)
    ref = inverse64(m)
    base = torch.cholesky_inverse(torch.linalg.cholesky(m.float()))
    return [((x.double() - ref).abs().max() / ref.abs().max()).item() for x in (e.inverse[i], base)]


# ---- accuracy ----


@methods
def test_mixed_orders_in_one_call(method, few_steps):
    rho = 1e-2
    kinds = {65: "sharp", 100: "rank1", 128: "clustered", 130: "sharp"}
    entries = run(
        method, [entry(sharp(n) if kind == "sharp" else spd(n, kind)) for n, kind in kinds.items()]
    )
    for e in entries:
        want = reference.damped_inverse(e.factor, rho=rho, damping=None, method="cholesky")
        error, torch_error = errors(e)
        assert error <= 2 * torch_error, (len(e.factor[0]), error, torch_error)
        assert torch.equal(e.inverse, e.inverse.mT)
        assert e.info.item() == Info.OK
        torch.testing.assert_close(e.spectral_norm, want[2], rtol=2e-3, atol=0)
        torch.testing.assert_close(e.used_damping, rho**0.5 * e.spectral_norm, rtol=1e-6, atol=0)
        assert e.residual.item() <= 1e-5
        assert e.vector.norm().item() == pytest.approx(1, abs=1e-5)


@methods
@pytest.mark.parametrize("rho", [1e-1, 1e-4])
def test_errs_at_most_twice_as_much_as_torch(method, rho, few_steps):
    """Over several spectra together: a single matrix may flatter either by luck."""
    factors = [sharp(65), torch.stack([spd(65, "rank1"), spd(65, "cond1e8")])]
    entries = run(method, [entry(f) for f in factors], rho)
    pairs = [errors(e, i) for e in entries for i in range(len(e.info))]
    ours, theirs = (sum(column) for column in zip(*pairs, strict=True))
    assert ours <= 2 * theirs, pairs


def test_large_tiles_and_every_precision(monkeypatch, few_steps):
    """Both tile sizes in one call, and a plan that uses every precision on both sides."""
    monkeypatch.setattr(triton_newton_schulz, "LARGE", 129)
    steps = [
        ("bf16", "tf32x3"),
        ("bf16", "bf16x3"),
        ("tf32", "bf16"),
        ("bf16x3", "tf32"),
        ("tf32x3", "bf16x3"),
    ]
    plan = triton_newton_schulz.newton_schulz_plan(1e-1)
    numbers = [*plan.steps, *[plan.steps[-1]] * 5][:5]
    plan = Plan(
        plan.start, tuple(Step(s.a, s.b, *p) for s, p in zip(numbers, steps, strict=True)), 0.0
    )
    monkeypatch.setattr(triton_newton_schulz, "newton_schulz_plan", lambda rho: plan)
    entries = run("newton_schulz", [entry(sharp(n)) for n in (100, 130)], 1e-1)
    for e in entries:
        assert e.info.item() == Info.OK
        assert errors(e)[0] < 1e-6


def test_a_plan_of_one_step_gets_another(few_steps):
    [e] = run("newton_schulz", [entry(sharp(65))], 1e6)
    assert e.info.item() == Info.OK
    assert errors(e)[0] < 1e-6


def test_narrow_dtypes_are_computed_in_fp32(few_steps):
    narrow = [sharp(65).to(dtype) for dtype in (torch.bfloat16, torch.float16)]
    found = run("direct", [entry(f) for f in (*narrow, *(f.float() for f in narrow))])
    for a, b in zip(found[:2], found[2:], strict=True):
        assert_same(a, b)


def test_reported_residual_is_the_measured_one(few_steps):
    factor = spd(129, "cond1e8")
    [e] = run("direct", [entry(factor, damping=3e-8)], rho=None)
    m = factor.double() + 3e-8 * torch.eye(129)
    exact = (torch.eye(129) - m @ e.inverse[0].double()).norm().item() / 129**0.5
    assert exact > 1e-5
    assert exact / 3 < e.residual.item() < 3 * exact


# ---- layouts, grouping, memory ----


@methods
def test_grouped_or_alone_is_the_same_bitwise(method, few_steps):
    factors = [sharp(100), torch.stack([sharp(65), spd(65, "rank1")])]
    together = run(method, [entry(f) for f in factors])
    for e, f in zip(together, factors, strict=True):
        assert_same(e, run(method, [entry(f)])[0])


def test_layouts_give_the_same_bits(few_steps):
    factor = spd(65)
    views = [make(factor) for make in MATRIX_LAYOUTS.values()]
    plain, *others = run("direct", [entry(factor), *map(entry, views)])
    for view, e in zip(views, others, strict=True):
        assert view.stride() != factor.stride() or view.data_ptr() % 16
        assert_same(plain, e)


def test_asymmetry_is_averaged_away(few_steps):
    factor = (spd(65) * 64).round() / 64
    skew = (torch.randn(65, 65) * 8).round() / 64
    a, b = run("direct", [entry(factor), entry(factor + skew - skew.mT)])
    # The same scale, so the same sums: the average is exact.
    torch.testing.assert_close(b.inverse, a.inverse, rtol=1e-5, atol=1e-5)


@methods
def test_nothing_around_the_outputs_is_written(method, few_steps):
    base = entry(torch.stack([sharp(65), sharp(65)]))
    fields, checks = {}, []
    for name in ("vector", "inverse", "used_damping", "spectral_norm", "residual"):
        fields[name], check = guarded(getattr(base, name))
        checks.append(check)
    factor, check = guarded(base.factor)
    before = factor.clone()
    e = base._replace(factor=factor, **fields)
    run(method, [e])
    for c in (*checks, check):
        c()
    assert torch.equal(factor, before)
    assert e.inverse.isfinite().all()
    assert e.info.tolist() == [0, 0]


# ---- scales ----


@methods
def test_powers_of_two_pass_through(method, few_steps):
    factor, powers = sharp(65), (-100, 100)
    one, *rest = run(method, [entry(factor), *(entry(factor * 2.0**p) for p in powers)])
    for power, scaled in zip(powers, rest, strict=True):
        assert torch.equal(scaled.inverse, one.inverse * 2.0**-power)
        assert torch.equal(scaled.used_damping, one.used_damping * 2.0**power)
        assert torch.equal(scaled.spectral_norm, one.spectral_norm * 2.0**power)
        assert torch.equal(scaled.residual, one.residual)
        assert torch.equal(scaled.vector, one.vector)
        assert scaled.info.item() == Info.OK


@methods
def test_zero_matrix_gives_the_identity_over_the_floor(method, few_steps):
    [e] = run(method, [entry(torch.zeros(70, 70))])
    want = torch.eye(70, dtype=torch.float64) / reference.FLOOR
    assert (e.inverse[0].double() - want).abs().max().item() <= 5e-6 / reference.FLOOR
    assert e.used_damping.item() == pytest.approx(reference.FLOOR, rel=1e-6)
    assert (e.spectral_norm.item(), e.info.item()) == (0, Info.OK)


def test_matrix_far_below_the_floor_is_damped_by_the_floor(few_steps):
    [e] = run("direct", [entry(spd(65) * 2.0**-140)])
    assert e.info.item() == Info.OK
    assert e.used_damping.item() == pytest.approx(reference.FLOOR, rel=1e-6)


# ---- faults ----


@pytest.mark.parametrize(
    ("method", "value"), [("newton_schulz", math.nan), ("direct", math.inf)], ids=str
)
def test_a_bad_matrix_leaves_the_others_as_they_are(method, value, few_steps):
    good = torch.stack([sharp(65), sharp(65)])
    bad = torch.stack([good[0], sharp(65), good[1]])
    bad[1, 3, 64] = value
    clean, faulty = run(method, [entry(good)])[0], run(method, [entry(bad)])[0]
    assert faulty.info.tolist() == [0, Info.NONFINITE_INPUT, 0]
    assert faulty.residual.isnan().tolist() == [False, True, False]
    assert (faulty.vector[1] == 0).all()
    for name, field in results(clean).items():
        assert torch.equal(results(faulty)[name][[0, 2]], field), name


def test_bad_damping_on_the_device(few_steps):
    factor = spd(65).repeat(5, 1, 1)
    damping = torch.tensor([0.0, -1.0, math.nan, math.inf, 0.25])
    [e] = run("direct", [entry(factor, damping)], rho=None)
    assert e.info.tolist() == [*[Info.NONFINITE_INPUT] * 4, Info.OK]
    assert e.residual.isnan().tolist() == [*[True] * 4, False]
    assert e.used_damping[4].item() == 0.25
    assert errors(e, 4)[0] < 1e-6


def test_indefinite_matrix_is_reported_and_keeps_its_vector(few_steps):
    vector = torch.randn(130)
    factor = spd(130)
    factor[129, 129] = -3.0
    [e] = run("direct", [entry(factor, 0.01, vector.clone())], rho=None)
    assert e.info.item() == Info.NOT_CONVERGED
    assert torch.equal(e.vector[0], vector)


def test_damping_far_above_a_fading_factor(few_steps):
    """A layer that died leaves a factor that fades by its decay until nothing is left."""
    cases = ((1e-37, 100.0), (1e-39, 1.0), (0.0, 1e30))
    factors = torch.stack([spd(65) * scale for scale, _ in cases])
    damping = torch.tensor([d for _, d in cases])
    [e] = run("direct", [entry(factors, damping)], rho=None)
    assert e.info.tolist() == [Info.OK] * 3
    for x, used, given in zip(e.inverse, e.used_damping, damping, strict=True):
        torch.testing.assert_close(x * given, torch.eye(65), rtol=1e-6, atol=1e-6)
        assert used.item() == pytest.approx(given.item(), rel=1e-6)
    assert (e.residual < 1e-5).all()


# ---- the vector of the norm ----


def test_the_trace_bounds_the_norm(few_steps):
    """Rounding may leave a matrix indefinite, and then the trace is the least bound of all."""
    factor = spd(65, "rank1")
    factor.fill_diagonal_(0)
    [e] = run("direct", [entry(factor, damping=2.0)], rho=None)
    want, _ = spectral_norm.spectral_norm(factor[None])
    assert want.item() < 0.01 < torch.linalg.eigvalsh(factor)[-1].item()
    torch.testing.assert_close(e.spectral_norm, want, rtol=1e-6, atol=1e-12)


def test_start_vectors():
    factor = spd(65, "clustered")
    values, vectors = torch.linalg.eigh(factor.double())
    starts = torch.stack([
        torch.zeros(65),
        vectors[:, -1].float(),
        # Orthogonal to all leading ones.
        vectors[:, 0].float() * 3,
        torch.full((65,), math.nan),
    ])  # fmt: skip
    factors = factor.repeat(4, 1, 1)
    [e] = run("direct", [entry(factors, vector=starts.clone())])
    want = reference.damped_inverse(
        factors, rho=1e-2, damping=None, method="cholesky", vector=starts
    )
    torch.testing.assert_close(e.spectral_norm, want[2], rtol=1e-3, atol=0)
    assert (e.spectral_norm >= 0.999 * values[-1]).all()
    torch.testing.assert_close(e.vector.norm(dim=1), torch.ones(4), rtol=1e-5, atol=0)


# ---- which method ----


@pytest.mark.parametrize("n", [65, 768, 11008])
def test_the_table_answers_every_case(n):
    for count in (1, 36, 1000):
        assert choose(n, count, None) == "direct"
        assert choose(n, count, 1e-2) in ("direct", "newton_schulz")
    assert triton_direct.supports(n)
    assert not triton_direct.supports(64)
