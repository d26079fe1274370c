# SPDX-License-Identifier: Apache-2.0
"""``rank1_step_``: against dense solves and the formula in fp64; all or nothing at NaN and infinity."""

import math

import pytest
import torch

from grng_kernels import rank1_step_, use_backend
from grng_kernels.rank_one import step as module
from tests.cases import ALL_DTYPES, STATE_DTYPES, dtype_id, guarded, offset_by_one, threads
from tests.ops.errors import REFUSED, assert_raises, refused
from tests.ops.test_rank_one import dense, sliced

CHUNK = 16384  # of the C++ kernel
DAMPING, LR, DECAY = 0.3, 0.7, 0.9
state_dtypes = pytest.mark.parametrize("dtype", STATE_DTYPES, ids=dtype_id)
needs_the_kernel = pytest.mark.parametrize("name", ["cpu"])


def draw(*shapes, dtype=torch.float32, device="cpu"):
    """Three lists of blocks: param, grad, score; a third of the gradient lies along the score."""
    params, grads, scores = ([torch.randn(s).to(device, dtype) for s in shapes] for _ in range(3))
    grads = [(g.double() + 0.5 * u.double()).to(dtype) for g, u in zip(grads, scores, strict=True)]
    return params, grads, scores


def flat(tensors):
    return torch.cat([t.detach().double().cpu().reshape(-1) for t in tensors])


def direction(grads, scores, damping=DAMPING):
    """In fp64, by the formula."""
    g, u = flat(grads), flat(scores)
    return (g - u * (u.dot(g) / (damping + u.dot(u)))) / damping


def assert_rounded_once(got, want):
    """Each element is the fp64 number ``want`` rounded to its dtype, up to what fp64 itself errs."""
    info = torch.finfo(got.dtype)
    slack = 1e-13 * want.abs().max().item()
    most = (0.5 * info.eps + 1e-13) * want.abs() + slack + info.smallest_normal * info.eps
    assert ((got.double().cpu() - want).abs() <= most).all()


# ---- values ----


@state_dtypes
@pytest.mark.parametrize("shape", [(), (1,), (17,), (3, 65), (2, 3, 5)], ids=str)
def test_the_step_is_along_the_dense_solve(backend, dtype, shape):
    [param], [grad], [score] = draw(shape, dtype=dtype, device=backend.device)
    d = dense(grad, score, DAMPING)
    want = DECAY * param.double().cpu() - LR * d
    norm = rank1_step_(param, grad, score, damping=DAMPING, lr=LR, decay=DECAY)
    assert_rounded_once(param, want)
    assert (norm.shape, norm.dtype, norm.device) == ((), torch.float64, param.device)
    assert norm.item() == pytest.approx(d.norm().item(), rel=1e-12)


# Around the widths of vectors, of an unrolled loop, and of chunks.
LENGTHS = [*range(1, 10), 15, 17, 31, 32, 33, 63, 65, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 33]


@state_dtypes
@pytest.mark.parametrize("n", LENGTHS)
def test_odd_lengths(backend, dtype, n):
    [start], grads, scores = draw((n,), dtype=dtype, device=backend.device)
    param, check = guarded(start)
    norm = rank1_step_(param, grads[0], scores[0], damping=DAMPING, lr=LR, decay=DECAY)
    d = direction(grads, scores)
    assert_rounded_once(param, DECAY * flat([start]) - LR * d)
    assert norm.item() == pytest.approx(d.norm().item(), rel=1e-12)
    check()


@state_dtypes
def test_blocks_are_one_vector_with_rates_of_their_own(backend, dtype):
    shapes = [(3, 5), (CHUNK + 7,), (0,), (), (2, 0), (7, 2, 2)]
    params, grads, scores = draw(*shapes, dtype=dtype, device=backend.device)
    before = [p.clone() for p in params]
    lrs, decays = [0.1, 0.2, 0.3, -0.4, 0.5, 0.0], [1.0, 0.9, 0.8, 0.0, 0.6, 1.0]
    norm = rank1_step_(params, grads, scores, damping=DAMPING, lr=lrs, decay=decays)
    d = direction(grads, scores)
    parts = d.split([p.numel() for p in params])
    for p, old, part, lr, decay in zip(params, before, parts, lrs, decays, strict=True):
        if p.numel():
            assert_rounded_once(p.reshape(-1), decay * flat([old]) - lr * part)
    assert torch.equal(params[-1], before[-1])
    assert norm.item() == pytest.approx(d.norm().item(), rel=1e-12)


def test_a_list_of_one_is_bitwise_the_single_form(backend):
    [param], [grad], [score] = draw((65,), device=backend.device)
    other = param.clone()
    norms = (
        rank1_step_(param, grad, score, damping=DAMPING, lr=LR),
        rank1_step_([other], [grad], [score], damping=DAMPING, lr=[LR]),
    )
    assert torch.equal(param, other) and torch.equal(*norms)


def test_a_gradient_along_the_score(backend):
    """g = 3u, uᵀu = 7, damping 1: d = 3u/8, exact."""
    score = torch.tensor([1.0, -1, 2, 1], device=backend.device)
    param = torch.zeros_like(score)
    norm = rank1_step_(param, 3 * score, score, damping=1.0, lr=2.0)
    assert torch.equal(param, -0.75 * score)
    assert norm.item() == pytest.approx(0.375 * math.sqrt(7), rel=1e-15)


def test_the_norm_does_not_cancel(backend):
    """g = u and uᵀu = 1e9·damping: of g 1e-9 is left, whose square fp64 cannot tell from 0 beside 1."""
    score = torch.ones(10**4, device=backend.device)
    damping = 1e-5
    norm = rank1_step_(torch.zeros_like(score), score, score, damping=damping, lr=1.0)
    assert norm.item() == pytest.approx(100 / (damping + 1e4), rel=1e-6)


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_nothing_to_move(backend, shape):
    empty = [torch.empty(shape, device=backend.device) for _ in range(3)]
    assert rank1_step_(*empty, damping=0.1, lr=0.1).item() == 0
    assert rank1_step_([], [], [], damping=0.1, lr=0.1).item() == 0
    assert rank1_step_([], [], [], damping=0.1, lr=[], decay=[]).item() == 0


def test_zero_everything(backend):
    param, zero = torch.ones(9, device=backend.device), torch.zeros(9, device=backend.device)
    assert rank1_step_(param, zero, zero.clone(), damping=1e-12, lr=1.0, decay=0.5).item() == 0
    assert torch.equal(param, torch.full_like(param, 0.5))


def test_tensors_equal_the_numbers(backend):
    params, grads, scores = draw((65,), (3,), device=backend.device)
    others = [p.clone() for p in params]
    want = rank1_step_(params, grads, scores, damping=0.375, lr=0.25, decay=0.75)
    for dtype in STATE_DTYPES:
        moved = [p.clone() for p in others]
        numbers = {
            name: torch.tensor(value, dtype=dtype, device=backend.device)
            for name, value in (("damping", 0.375), ("lr", 0.25), ("decay", 0.75))
        }
        assert torch.equal(rank1_step_(moved, grads, scores, **numbers), want)
        assert all(torch.equal(p, q) for p, q in zip(moved, params, strict=True))


@pytest.mark.parametrize("of_param", ALL_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("of_grad", ALL_DTYPES, ids=dtype_id)
def test_dtypes_that_the_kernel_does_not_take_are_rounded_once_too(device, of_param, of_grad):
    [start], grads, scores = draw((300,), dtype=of_grad, device=device)
    param = start.to(of_param)
    want = DECAY * flat([param]) - LR * direction(grads, scores)
    rank1_step_(param, grads[0], scores[0], damping=DAMPING, lr=LR, decay=DECAY)
    assert_rounded_once(param, want)


def test_the_range_of_a_direction_is_not_that_of_16_bits(device):
    param = torch.zeros(2, dtype=torch.float16, device=device)
    grad = torch.tensor([6e4, 0.0], dtype=torch.float16, device=device)
    norm = rank1_step_(param, grad, torch.zeros_like(grad), damping=1e-3, lr=1e-6)
    assert norm.item() == pytest.approx(grad[0].item() * 1e3)
    assert_rounded_once(param, -1e-3 * flat([grad]))


@pytest.mark.parametrize("which", [0, 1, 2], ids=["param", "grad", "score"])
@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.mT.contiguous().mT,
        sliced,
        offset_by_one,
    ],
    ids=["transposed", "sliced", "offset"],
)
def test_layout_does_not_matter(which, layout):
    tensors = [t[0] for t in draw((9, 17))]
    want = [t.clone() for t in tensors]
    norm = rank1_step_(*want, damping=DAMPING, lr=LR)
    tensors[which] = layout(tensors[which])
    assert rank1_step_(*tensors, damping=DAMPING, lr=LR).item() == pytest.approx(norm.item())
    torch.testing.assert_close(tensors[0], want[0], rtol=1e-6, atol=1e-6)


def test_expanded_inputs():
    param, score = torch.zeros(65), torch.randn(65)
    other = param.clone()
    one = torch.ones(1)
    rank1_step_(param, one.expand(65), score, damping=DAMPING, lr=LR)
    rank1_step_(other, torch.ones(65), score, damping=DAMPING, lr=LR)
    torch.testing.assert_close(param, other)


# ---- all or nothing ----

# Of two blocks: in a vector, behind the last whole one, in another chunk.
PLACES = [(0, 0), (0, 40), (1, 3), (1, CHUNK + 2)]


@state_dtypes
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("which", ["grad", "score"])
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_nothing_moves_where_a_number_is_not_finite(backend, dtype, which, value, place):
    params, grads, scores = draw((41,), (CHUNK + 3,), dtype=dtype, device=backend.device)
    (grads if which == "grad" else scores)[place[0]][place[1]] = value
    before = [p.clone() for p in params]
    assert rank1_step_(params, grads, scores, damping=DAMPING, lr=LR, decay=DECAY).isnan()
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))


@pytest.mark.parametrize(
    ("dtype", "largest"),
    [(torch.float32, torch.finfo(torch.float32).max), (torch.float64, 1e150)],
    ids=["fp32", "fp64"],
)
def test_nothing_moves_where_a_direction_may_leave_the_range(backend, dtype, largest):
    grad = torch.tensor([largest / 4, 0.0], dtype=dtype, device=backend.device)
    score = torch.tensor([0.0, 1.0], dtype=dtype, device=backend.device)
    for damping, moves in ((0.2500001, True), (0.2499999, False)):
        param = torch.zeros_like(grad)
        norm = rank1_step_(param, grad, score, damping=damping, lr=1e-30)
        assert bool(norm.isfinite()) is moves
        assert bool(param.any()) is moves
    # The bound is that of any score: one along the gradient makes the direction short, but is not looked at.
    param, along = torch.zeros_like(grad), torch.zeros_like(grad)
    along[0] = 1e10
    assert rank1_step_(param, grad, along, damping=0.2, lr=1e-30).isnan() and not param.any()


@pytest.mark.parametrize("which", ["grad", "score"])
def test_squares_beyond_fp64_move_nothing(backend, which):
    tensors = {
        name: torch.ones(9, dtype=torch.float64, device=backend.device)
        for name in ("param", "grad", "score")
    }
    tensors[which][3] = 1e160
    assert rank1_step_(**tensors, damping=1.0, lr=1.0).isnan()
    assert torch.equal(tensors["param"], torch.ones_like(tensors["param"]))


def test_squares_beyond_fp32_are_steps(backend):
    param = torch.zeros(3, device=backend.device)
    grad = torch.tensor([0.0, 1e25, -1e25], device=backend.device)
    score = torch.tensor([1e30, 0.0, 0.0], device=backend.device)
    assert rank1_step_(param, grad, score, damping=1.0, lr=1.0).item() == pytest.approx(
        1e25 * math.sqrt(2)
    )
    assert torch.equal(param, -grad)


@pytest.mark.parametrize("damping", [0.0, -1.0, math.nan, math.inf])
def test_a_damping_in_a_tensor_that_is_no_damping_moves_nothing(backend, damping):
    [param], [grad], [score] = draw((9,), device=backend.device)
    before = param.clone()
    number = torch.tensor(damping, device=backend.device)
    assert rank1_step_(param, grad, score, damping=number, lr=1.0).isnan()
    assert torch.equal(param, before)


def test_a_param_that_leaves_its_range_is_infinite(backend):
    param = torch.full((3,), 3e38, device=backend.device)
    grad = torch.full_like(param, -2.0)
    assert rank1_step_(param, grad, torch.zeros_like(param), damping=1.0, lr=1e38).isfinite()
    assert torch.equal(param, torch.full_like(param, math.inf))


# ---- which way a call goes ----


@needs_the_kernel
@pytest.mark.parametrize("count", [2, 3])
def test_threads_do_not_change_a_bit(name, count):
    params, grads, scores = draw((300_001,), (5,), (12 * CHUNK,))
    results = []
    with use_backend(name):
        for number in (1, count):
            moved = [p.clone() for p in params]
            with threads(number):
                norm = rank1_step_(moved, grads, scores, damping=DAMPING, lr=LR)
            results.append([*moved, norm])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_the_kernel
def test_the_usual_call_is_the_general_one_bit_for_bit(name, monkeypatch):
    params, grads, scores = draw((65, 3), (7,))
    others = [p.clone() for p in params]
    numbers = {"damping": DAMPING, "lr": [LR, -LR], "decay": DECAY}
    general = module._rank1_step_op
    with use_backend(name):
        with monkeypatch.context() as patched:
            patched.setattr(module, "_rank1_step_op", None)  # it is not called
            norm = rank1_step_(params, grads, scores, **numbers)
        monkeypatch.setattr(module, "_usual_call", lambda *_: None)
        assert torch.equal(rank1_step_(others, grads, scores, **numbers), norm)
    assert module._rank1_step_op is general
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def test_what_was_written_is_known_to_autograd(backend):
    [param], [grad], [score] = draw((5,), device=backend.device)
    for moved in (param, torch.nn.Parameter(param)):
        version = moved._version
        assert not rank1_step_(moved, grad, score, damping=DAMPING, lr=LR).requires_grad
        assert moved._version > version


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_gpu_backend_by_name_is_no_error(name):
    """An optimizer runs on one backend: of this op a GPU has torch's own kernels."""
    with use_backend(name):
        assert rank1_step_(*(torch.ones(3) for _ in range(3)), damping=1.0, lr=0.1).isfinite()


# ---- errors ----

P, G, U = torch.zeros(4), torch.ones(4), torch.ones(4)
BIG = torch.zeros(64)
ERRORS = {
    "param_no_tensor": (
        TypeError, "param must be a tensor or a list of tensors, got int", {"param": 1},
    ),
    "list_item_no_tensor": (
        TypeError,
        "score must be a tensor or a list of tensors, got a list with int",
        {"param": [P], "grad": [G], "score": [1]},
    ),
    "mixed_forms": (TypeError, "must all be tensors or all be lists", {"param": [P]}),
    "lengths": (
        ValueError,
        "the lists must have the same length, got param: 2, grad: 1, score: 1",
        {"param": [P, P], "grad": [G], "score": [U]},
    ),
    "damping_zero": (ValueError, "damping must be finite and in (0.0, inf), got 0.0", {"damping": 0.0}),
    "damping_tiny": (ValueError, "damping must stay finite and in its range", {"damping": 1e-50}),
    "damping_nan": (ValueError, "damping must be finite and in (0.0, inf), got nan", {"damping": math.nan}),
    "damping_text": (TypeError, "damping must be a number, got str", {"damping": "1"}),
    "damping_vector": (
        ValueError, "damping must be a number or a 0-d tensor, got [1]", {"damping": torch.ones(1)},
    ),
    "damping_device": (
        ValueError,
        "all tensors must be on one device, got param on cpu and damping on meta",
        {"damping": torch.tensor(1.0, device="meta")},
    ),
    "lr_nan": (ValueError, "lr must be finite", {"lr": math.nan}),
    "lr_huge": (ValueError, "lr must stay finite and in its range", {"lr": 1e39}),
    "lr_list_for_a_tensor": (TypeError, "lr must be a number, got list", {"lr": [0.1]}),
    "lr_count": (
        ValueError,
        "lr must be one number or one for each block, got 2 for 1",
        {"param": [P], "grad": [G], "score": [U], "lr": [0.1, 0.1]},
    ),
    "lr_item": (
        ValueError,
        "lr[1] must be finite",
        {"param": [P, P.clone()], "grad": [G, G], "score": [U, U], "lr": [0.1, math.inf]},
    ),
    "lr_item_tensor": (
        TypeError,
        "lr[0] must be a number, got Tensor",
        {"param": [P], "grad": [G], "score": [U], "lr": [torch.tensor(0.1)]},
    ),
    "decay_text": (TypeError, "decay must be a number, got str", {"decay": "x"}),
    "decay_device": (
        ValueError,
        "all tensors must be on one device, got param on cpu and decay on meta",
        {"decay": torch.tensor(1.0, device="meta")},
    ),
    "grad_shape": (ValueError, "grad must have shape [4] (as param), got [2, 2]", {"grad": G.view(2, 2)}),
    "score_dtype": (TypeError, "score must have dtype float32, got float64", {"score": U.double()}),
    "score_shape": (ValueError, "score must have shape [4] (as param), got [3]", {"score": U[:3]}),
    "item_is_named": (
        ValueError,
        "score[1] must have shape [4] (as param), got [3]",
        {"param": [P, P.clone()], "grad": [G, G], "score": [U, U[:3]]},
    ),
    "devices": (
        ValueError,
        "all tensors must be on one device, got param on cpu and grad on meta",
        {"grad": G.to("meta")},
    ),
    "param_expanded": (
        ValueError,
        "param is written in place and must not overlap itself, got strides [0] for shape [4]",
        {"param": torch.empty(1).expand(4)},
    ),
    "param_is_grad": (
        ValueError, "overlap in memory, and one is written", {"param": BIG[:4], "grad": BIG[:4]},
    ),
    "param_overlaps_score": (
        ValueError,
        "score[0] and param[0] overlap in memory, and one is written",
        {"param": BIG[:4], "score": BIG[3:7]},
    ),
    "same_param_twice": (
        ValueError,
        "param[1] and param[0] overlap in memory, and one is written",
        {"param": [P, P], "grad": [G, G], "score": [U, U]},
    ),
}  # fmt: skip


def call(**changes):
    arguments = {"param": P, "grad": G, "score": U, "damping": 0.1, "lr": 0.1} | changes
    return rank1_step_(**arguments)


@pytest.mark.parametrize("case", ERRORS)
def test_error_says_what_is_wrong_and_nothing_moves(case):
    exception, text, changes = ERRORS[case]
    assert_raises(exception, text, call, **changes)
    with pytest.raises(exception, match=r"^rank1_step_: "):
        call(**changes)
    assert not P.any() and not BIG.any()


@pytest.mark.parametrize("kind", REFUSED, ids=str)
@pytest.mark.parametrize("which", ["param", "grad"])
def test_refused_dtypes_and_layouts(kind, which):
    with pytest.raises(
        TypeError,
        match=rf"{which} must (have dtype float32, bfloat16, float16, float64|be a dense)",
    ):
        call(**{which: refused(kind, 4)})
