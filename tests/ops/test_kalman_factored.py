# SPDX-License-Identifier: Apache-2.0
"""``kalman_update_`` with Jacobians of Kronecker structure, against the same Jacobians written out."""

import math

import pytest
import torch

import grng_kernels as gk
from grng_kernels import Info, KroneckerJacobian, kalman_update_, use_backend
from grng_kernels.kalman_update import op
from tests.cases import (
    MATRIX_LAYOUTS,
    STATE_DTYPES,
    assert_memory_that_ends_changes_nothing,
    assert_within_budget,
    dtype_id,
    guarded,
    offset_by_one,
    spd,
    threads,
)
from tests.ops.errors import assert_raises

forms = pytest.mark.parametrize("form", ["fdekf", "vdekf"])
likelihoods = pytest.mark.parametrize("likelihood", ["gaussian", "categorical", "fisher"])
needs_cpp = pytest.mark.skipif(
    not gk.backends()["cpu"].available, reason=gk.backends()["cpu"].reason
)
OUTPUTS = [1, 2, 9, 10, 40, 100]
# Rows and columns of weights: single ones, less and more than a vector, than a group of rows, than a lane's
# sum (64 vectors of 16) and than a slice.
SHAPES = [(1, 1), (1, 17), (17, 1), (3, 5), (5, 16), (64, 33), (13, 1100), (2, 20_001), (300, 70)]


class State:
    """One call: a list of blocks, an int for a dense one of that size, a pair for a factored one."""

    def __init__(self, outputs, blocks, likelihood="gaussian", device="cpu", dtype=torch.float32):
        sizes = [b if isinstance(b, int) else b[0] * b[1] for b in blocks]
        scale = max(1, sum(sizes)) ** -0.5
        self.means = [torch.randn(d).to(device, dtype) for d in sizes]
        self.variances = [(torch.rand(d) + 0.1).to(device, dtype) for d in sizes]
        self.jacobians = []
        for b in blocks:
            shape = (outputs, b) if isinstance(b, int) else (outputs, b[0])
            h = (scale * torch.randn(shape)).to(device, dtype)
            if not isinstance(b, int):
                h = KroneckerJacobian(h, torch.randn(b[1]).to(device, dtype))
            self.jacobians.append(h)
        noise = 0.2 * spd(outputs) + 0.1 * torch.eye(outputs)
        if likelihood == "categorical":
            noise = torch.randn(outputs).softmax(0)
        elif likelihood == "fisher":
            noise = noise[:, : max(1, outputs - 1)]
        self.small = [t.to(device, dtype) for t in (torch.randn(outputs), noise)]
        self.likelihood = likelihood

    def written_out(self, dtype=None):
        """The dense Jacobians, in ``dtype``, where factors in fp64 lose nothing."""
        dense = []
        for h in self.jacobians:
            if isinstance(h, KroneckerJacobian):
                g, x = (t.to(dtype or self.means[0].dtype) for t in h)
                h = torch.stack([torch.outer(row, x).reshape(-1) for row in g])
            dense.append(h.to(dtype or self.means[0].dtype))
        return dense

    def update(self, jacobians=None, dtype=None, **options):
        """The blocks of mean and variance afterwards, and info; the state itself stays."""
        dtype = dtype or self.means[0].dtype
        means, variances = (
            [t.to(dtype, copy=True) for t in s] for s in (self.means, self.variances)
        )
        info = kalman_update_(
            means, variances, self.jacobians if jacobians is None else jacobians,
            *(t.to(dtype) for t in self.small), likelihood=self.likelihood, **options,
        )  # fmt: skip
        return means, variances, info


def assert_accurate(state, **options):
    """As accurate as PyTorch with the Jacobian written out, both against fp64."""
    got = state.update(**options)
    with use_backend("reference"):
        base = state.update(state.written_out(), **options)
        exact = state.update(state.written_out(torch.float64), torch.float64, **options)
    assert got[2].item() == exact[2].item() == Info.OK
    for i in range(2):
        assert_within_budget(*(torch.cat(result[i]) for result in (got, exact, base)))


# ---- against the Jacobian written out ----


@forms
@pytest.mark.parametrize("rho", [0.0, 0.3])
@pytest.mark.parametrize("outputs", OUTPUTS)
def test_every_number_of_outputs(backend, outputs, form, rho):
    assert_accurate(State(outputs, [(37, 45)], device=backend.device), form=form, rho=rho)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("outputs", [3, 20])
def test_every_shape(backend, outputs, shape):
    outputs = min(outputs, shape[0] * shape[1])  # the promise is for C <= d
    options = {"forgetting": 0.98, "process_noise": 1e-3, "rho": 0.1}
    assert_accurate(State(outputs, [shape], device=backend.device), **options)


@forms
@likelihoods
@pytest.mark.parametrize("regularization", ["gradient", "noise"])
@pytest.mark.parametrize("outputs", [5, 70])
def test_likelihoods_and_regularisations(backend, outputs, regularization, likelihood, form):
    state = State(outputs, [(24, 31), 24], likelihood, backend.device)
    assert_accurate(state, form=form, rho=0.2, regularization=regularization)


@pytest.mark.parametrize("outputs", [2, 10, 40])
@pytest.mark.parametrize(
    "blocks",
    [[(30, 40), 30, (10, 30), 10], [700, (20, 20)], [(9, 7), 0, (0, 5), (4, 0), 3, (1, 1)]],
    ids=str,
)
def test_dense_and_factored_blocks_are_one_state(backend, outputs, blocks):
    assert_accurate(State(outputs, blocks, device=backend.device), rho=0.1)


def test_single_block_is_a_list_of_one(backend):
    state = State(5, [(12, 34)], device=backend.device)
    means, variances, _ = state.update()
    mean, variance = state.means[0].clone(), state.variances[0].clone()
    assert kalman_update_(mean, variance, state.jacobians[0], *state.small).item() == Info.OK
    assert torch.equal(mean, means[0])
    assert torch.equal(variance, variances[0])


@pytest.mark.parametrize("dtype", STATE_DTYPES, ids=dtype_id)
def test_expanded(dtype):
    state = State(4, [(3, 5)], dtype=dtype)
    h = state.jacobians[0].expanded()
    assert h.dtype == dtype
    assert torch.equal(h, state.written_out()[0])
    want = torch.stack(
        [torch.kron(g, state.jacobians[0].inputs) for g in state.jacobians[0].outputs]
    )
    assert torch.equal(h, want)


def test_fp64_state(device):
    state = State(4, [(3, 5), 7], device=device, dtype=torch.float64)
    got, want = state.update(), state.update(state.written_out())
    for a, b in zip(got[0] + got[1], want[0] + want[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@needs_cpp
@pytest.mark.parametrize("outputs", [256, 257])
def test_the_most_outputs_of_the_kernel_and_one_more(outputs):
    assert_accurate(State(outputs, [(40, 30), 50]), rho=0.1)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("which", ["outputs", "inputs", "both"])
def test_half_factors_are_those_in_fp32(backend, half, which):
    """Bitwise: 16-bit elements are fp32 numbers, and everything is computed in fp32."""
    state = State(7, [(20, 50), 20], device=backend.device)
    h = state.jacobians[0]
    halves = {n: t.to(half) if which in (n, "both") else t for n, t in h._asdict().items()}
    state.jacobians[0] = KroneckerJacobian(**{n: t.float() for n, t in halves.items()})
    want = state.update(rho=0.1)
    state.jacobians[0] = KroneckerJacobian(**halves)
    got = state.update(rho=0.1)
    assert all(torch.equal(a, b) for a, b in zip(got[0] + got[1], want[0] + want[1], strict=True))


@pytest.mark.parametrize("layout", MATRIX_LAYOUTS)
@pytest.mark.parametrize("outputs", [3, 40])
def test_layout_of_the_factors_does_not_matter(backend, outputs, layout):
    state = State(outputs, [(20, 50)], device=backend.device)
    want = state.update()
    g, x = state.jacobians[0]
    buffer = torch.full((100,), math.nan, device=backend.device)
    state.jacobians[0] = KroneckerJacobian(MATRIX_LAYOUTS[layout](g), buffer[::2].copy_(x))
    got = state.update()
    for a, b in zip(got[0] + got[1], want[0] + want[1], strict=True):
        if backend.name == "reference":
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(a, b)


def test_unaligned_pointers_and_guard_bands(backend):
    state = State(6, [(21, 37)], device=backend.device)
    want = state.update()
    mean, check_mean = guarded(state.means[0], margin=65)
    variance, check_variance = guarded(state.variances[0], margin=65)
    h = KroneckerJacobian(*(offset_by_one(t) for t in state.jacobians[0]))
    kalman_update_(mean, variance, h, *state.small)
    check_mean()
    check_variance()
    assert torch.equal(mean, want[0][0])
    assert torch.equal(variance, want[1][0])


@needs_cpp
@pytest.mark.parametrize("outputs", [2, 10, 40])
def test_same_bits_on_any_number_of_threads(outputs):
    state = State(outputs, [(400, 301), 400, (40, 9000)])
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(state.update(rho=0.1))
    for other in results[1:]:
        for a, b in zip(other[0] + other[1], results[0][0] + results[0][1], strict=True):
            assert torch.equal(a, b)


# ---- closed forms and scales ----


@forms
def test_zero_factor_only_predicts(backend, form):
    for zero in range(2):
        state = State(3, [(5, 20)], device=backend.device)
        state.jacobians[0][zero].zero_()
        means, variances, info = state.update(form=form, forgetting=0.5, process_noise=0.25)
        assert info.item() == Info.OK
        assert torch.equal(means[0], state.means[0])
        assert torch.equal(variances[0], state.variances[0] / 0.5 + 0.25)


@forms
@pytest.mark.parametrize("power", [-60, -7, 12, 55])
def test_a_power_of_two_may_sit_in_either_factor(backend, form, power):
    state = State(5, [(10, 30)], device=backend.device)
    want = state.update(form=form)
    g, x = state.jacobians[0]
    state.jacobians[0] = KroneckerJacobian(g * 2.0**power, x * 2.0**-power)
    got = state.update(form=form)
    assert all(torch.equal(a, b) for a, b in zip(got[0] + got[1], want[0] + want[1], strict=True))


@forms
@pytest.mark.parametrize(
    ("g", "x", "p"), [(1e15, 1e-30, 1e-3), (1e-12, 1e25, 1e-20), (1.0, 1e17, 1e-32)]
)
def test_far_scales(backend, form, g, x, p):
    state = State(4, [(11, 40)], device=backend.device)
    state.jacobians[0] = KroneckerJacobian(state.jacobians[0][0] * g, state.jacobians[0][1] * x)
    state.variances[0] *= p
    state.means[0].zero_()
    state.small[1] = state.small[1] * (g * g * x * x * p)
    state.small[0] = state.small[0] * (g * x * p**0.5)
    assert_accurate(state, form=form)


@forms
def test_variances_stay_positive_over_many_steps(backend, form):
    state = State(3, [(4, 6)], device=backend.device)
    state.jacobians[0].outputs.mul_(10)
    (mean,), (variance,) = state.means, state.variances
    for _ in range(300):
        before = variance.clone()
        info = kalman_update_(mean, variance, *state.jacobians, *state.small, form=form)
        assert info.item() == Info.OK
        assert (variance <= before).all()
    assert (variance > 0).all()


@needs_cpp
@pytest.mark.parametrize("outputs", [3, 40])
def test_saturated_variances_are_no_overflow(outputs):
    """The variances of the sums' terms are no means: what is as large as fp32 goes on."""
    state = State(outputs, [(5, 20)])
    state.variances[0].fill_(torch.finfo(torch.float32).max)
    state.jacobians[0].outputs.mul_(1e-19)
    state.means[0].zero_()
    with use_backend("reference"):
        want = state.update()
    got = state.update()
    assert got[2].item() == want[2].item() == Info.OK


# ---- faults ----


def assert_flagged(state, *codes, **options):
    means, variances, info = state.update(**options)
    assert info.item() in codes
    for a, b in zip(means + variances, state.means + state.variances, strict=True):
        assert torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))


@forms
@likelihoods
@pytest.mark.parametrize("name", ["mean", "variance", "outputs", "inputs"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("where", [0, -1], ids=["first", "last"])
def test_nonfinite_input_changes_nothing(backend, form, likelihood, name, value, where):
    state = State(5, [9, (7, 45), 7], likelihood, backend.device)
    targets = {"mean": state.means[1], "variance": state.variances[1]} | state.jacobians[
        1
    ]._asdict()
    targets[name].view(-1)[where] = value
    codes = [Info.NONFINITE_INPUT] + [Info.OVERFLOW] * (backend.device == "cuda")
    assert_flagged(state, *codes, form=form)


@pytest.mark.parametrize("where", [0, 100, -1])
def test_negative_variance_is_flagged(backend, where):
    state = State(5, [(7, 45), 7], device=backend.device)
    state.jacobians[0].inputs.zero_()
    state.variances[0][where] = -1e-3
    assert_flagged(state, Info.NONFINITE_INPUT)


@forms
@pytest.mark.parametrize(
    ("g", "x", "p"),
    [(1e20, 1.0, 1.0), (1.0, 1e20, 1.0), (1e30, 1e30, 1.0), (1e38, 1e38, 0.0), (1e25, 1e-5, 100.0)],
)
def test_what_leaves_the_range_is_flagged(backend, form, g, x, p):
    state = State(4, [8, (11, 40)], device=backend.device)
    state.jacobians[1].outputs.fill_(g)
    state.jacobians[1].inputs.fill_(x)
    state.variances[1].fill_(p)
    codes = [Info.OVERFLOW]
    if g * x > 1e39 and not (backend.name == "auto" and backend.device == "cpu"):
        codes.append(Info.NONFINITE_INPUT)  # of H, written out
    assert_flagged(state, *codes, form=form)


@needs_cpp
def test_gain_of_a_row_beyond_fp32_is_an_overflow():
    """A variance so small that its row's gain has no number in fp32: said before anything is written."""
    state = State(1, [5, (1, 1)])
    state.jacobians[0].fill_(0.0)
    state.jacobians[1] = KroneckerJacobian(torch.full((1, 1), 1e18), torch.ones(1))
    state.variances[1].fill_(1e-37)
    state.small = [torch.full((1,), 1e-3), torch.full((1, 1), 1e-6)]
    assert_flagged(state, Info.OVERFLOW, form="vdekf")


def _blocks():
    state = State(60, [(300, 200), 3, (50, 400)])
    arguments = (state.means, state.variances, state.jacobians, *state.small)
    return arguments, state.means + state.variances


SHORT_OF_MEMORY = {"blocks": (_blocks, lambda a: kalman_update_(*a))}


@needs_cpp
def test_memory_that_ends_leaves_all_blocks_as_they_were():
    assert_memory_that_ends_changes_nothing(__name__, "blocks", 64 << 20)


# ---- the ways in ----


@needs_cpp
def test_usual_call_is_the_general_one(monkeypatch):
    calls = []
    general = op._kalman_update_op
    monkeypatch.setattr(op, "_kalman_update_op", lambda *args: (calls.append(1), general(*args))[1])
    state = State(5, [(12, 34), 12])
    usual = state.update(rho=0.1)
    assert not calls
    monkeypatch.setattr(op, "_usual_call", lambda *args, **options: None)
    other = state.update(rho=0.1)
    assert len(calls) == 1
    assert all(
        torch.equal(a, b) for a, b in zip(usual[0] + usual[1], other[0] + other[1], strict=True)
    )


@needs_cpp
def test_h_is_never_formed(monkeypatch):
    def refuse(*args):
        raise AssertionError("expanded")

    monkeypatch.setattr(op.kronecker, "expand", refuse)
    state = State(5, [(12, 34), 12])
    assert state.update()[2].item() == Info.OK
    monkeypatch.setattr(op, "_usual_call", lambda *args, **options: None)
    assert state.update()[2].item() == Info.OK


def test_factors_that_require_grad(backend):
    state = State(3, [(4, 6)], device=backend.device)
    want = state.update()
    state.jacobians = [KroneckerJacobian(*(t.clone().requires_grad_() for t in state.jacobians[0]))]
    got = state.update()
    assert torch.equal(got[0][0], want[0][0]) and not got[0][0].requires_grad


def test_compiled_equals_eager():
    state = State(3, [(4, 6), 5])

    def call(means, variances, g, x, h, innovation, noise):
        return kalman_update_(means, variances, [KroneckerJacobian(g, x), h], innovation, noise)

    results = []
    for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        means, variances = ([t.clone() for t in s] for s in (state.means, state.variances))
        info = function(means, variances, *state.jacobians[0], state.jacobians[1], *state.small)
        results.append([*means, *variances, info])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---- errors ----

M, P, E, R = torch.zeros(6), torch.ones(6), torch.ones(2), torch.eye(2)
G, X = torch.ones(2, 3), torch.ones(2)
SHAPE_ERROR = (
    "outputs and inputs of jacobian must have shapes [C, m] and [n] with C = 2 outputs and m·n = 6 "
    "parameters, got "
)
ERRORS = {
    "outputs_no_tensor": (TypeError, "outputs of jacobian[0] must be a tensor, got str", "G", X),
    "inputs_no_tensor": (TypeError, "inputs of jacobian[0] must be a tensor, got float", G, 1.0),
    "outputs_dtype": (
        TypeError,
        "outputs of jacobian must have dtype float32, bfloat16, float16, got float64", G.double(), X,
    ),
    "inputs_dtype": (
        TypeError,
        "inputs of jacobian must have dtype float32, bfloat16, float16, got int64", G, X.long(),
    ),
    "outputs_rank": (ValueError, "outputs of jacobian must be [C, m], got shape [6]", G.flatten(), X),
    "inputs_rank": (ValueError, "inputs of jacobian must be [n], got shape [1, 2]", G, X[None]),
    "outputs": (ValueError, SHAPE_ERROR + "[3, 3] and [2]", torch.ones(3, 3), X),
    "size": (ValueError, SHAPE_ERROR + "[2, 3] and [3]", G, torch.ones(3)),
    "layout": (TypeError, "inputs of jacobian must be a dense (strided) tensor", G, X.to_sparse()),
    "device": (
        ValueError,
        "all tensors must be on one device, got innovation on cpu and inputs of jacobian on meta",
        G, X.to("meta"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_error_says_what_is_wrong(case):
    exception, text, g, x = ERRORS[case]
    jacobian = KroneckerJacobian(g, x)
    mean = M.clone()
    assert_raises(
        exception, f"kalman_update_: {text}", kalman_update_, mean, P.clone(), jacobian, E, R
    )
    assert torch.equal(mean, M)


def test_errors_name_the_block_and_the_form():
    state = State(2, [4, (3, 2)])
    bad = [state.jacobians[0], KroneckerJacobian(G, torch.ones(5))]
    assert_raises(
        ValueError, "outputs and inputs of jacobian[1] must have shapes", state.update, bad
    )
    text = "mean, variance and jacobian must all be tensors or all be lists"
    assert_raises(TypeError, text, kalman_update_, [M], [P], KroneckerJacobian(G, X), E, R)
    assert_raises(TypeError, text, kalman_update_, M, P, [KroneckerJacobian(G, X)], E, R)


@pytest.mark.parametrize("part", [0, 1], ids=["outputs", "inputs"])
def test_factor_that_overlaps_the_state(part):
    memory = torch.ones(20)
    factors = [G, X]
    factors[part] = memory[4:10].view(2, 3) if part == 0 else memory[5:7]
    text = "overlap in memory, and one is written"
    assert_raises(
        ValueError, text, kalman_update_, memory[:6], P.clone(), KroneckerJacobian(*factors), E, R
    )
    assert (memory == 1).all()


@needs_cpp
@pytest.mark.parametrize(
    ("inputs", "factored", "text"),
    [
        ([X], [], "one mean, variance and jacobian per block"),
        ([X, X], [0, 0], "factored must be rising numbers of blocks"),
        ([X], [1], "jacobian must be float32 [outputs, d]"),
        ([X], [-1], "jacobian must be float32 [outputs, d]"),
        ([torch.ones(3)], [0], "jacobian must be float32 [outputs, d]"),
        ([torch.ones(0)], [0], "jacobian must be float32 [outputs, d]"),
        ([X[None]], [0], "inputs must be a float32 vector"),
        ([X.double()], [0], "inputs must be a float32 vector"),
        ([torch.tensor(1.0)], [0], "inputs must be a float32 vector"),
    ],
)  # fmt: skip
def test_private_operator_refuses_what_would_leave_memory(inputs, factored, text):
    mean, info = M.clone(), torch.zeros((), dtype=torch.int32)
    with pytest.raises(RuntimeError) as caught:
        torch.ops.grng._kalman_update_(
            [mean],
            [P.clone()],
            info,
            [G, *inputs],
            E,
            [R],
            0.0,
            0,
            False,
            1.0,
            0.0,
            0.0,
            False,
            factored,
        )
    assert text in str(caught.value)
    assert torch.equal(mean, M)
