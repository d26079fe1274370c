# SPDX-License-Identifier: Apache-2.0
"""``rank1_step_``: the public function, its checks, and the choice of a backend."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grng_kernels import _checks, _dispatch
from grng_kernels._register import operator
from grng_kernels.rank_one import reference

OP = "rank1_step_"
# ‖d‖ is at most this: in fp64 its square is a number too.
LARGEST_FP32, LARGEST_FP64 = torch.finfo(torch.float32).max, 1e150
_SMALLEST_DAMPING = 2.0**-149
_PLAIN = (Tensor, nn.Parameter)

Tensors = Sequence[Tensor]
Numbers = float | Tensor | Sequence[float]


def rank1_step_(
    param: Tensor | Tensors,
    grad: Tensor | Tensors,
    score: Tensor | Tensors,
    *,
    damping: float | Tensor,
    lr: Numbers,
    decay: Numbers = 1.0,
) -> Tensor:
    """``param <- decay·param − lr·d`` with ``d = (damping·I + u uᵀ)⁻¹ g``; return how long d is.

    Torch equivalent: ``d = (g - u * (u @ g) / (damping + u @ u)) / damping``, then
    ``param.mul_(decay).sub_(lr * d)``; but d is not formed. A list is one vector cut into blocks: the
    products run over all of them.

    Args:
        param: What moves, any shape, or a list of blocks; fp32, bf16, fp16 or fp64. Mutated.
        grad: ``g``, shapes of ``param``; fp32, bf16, fp16 or fp64, any strides.
        score: ``u``, the gradient of the log-probability of the action; shapes of ``param``, dtypes of
            ``grad``.
        damping: > 0; a number, or a 0-d tensor, whose value is not checked.
        lr: A number, or for a list one number for each block, or a 0-d tensor, whose value is not checked.
        decay: As ``lr``.

    Returns:
        ``‖d‖₂`` over all blocks, fp64 0-d on the device. NaN: nothing was written. Then the gradient or
        the score has a NaN or infinity; or ``‖g‖/damping``, which no direction is longer than, is beyond the
        range of fp32; or, where all gradients are fp64, beyond 1e150, or the square of a norm is infinite;
        or a damping in a tensor is no positive, finite number.
        What ``lr·d`` and ``decay·param`` make of a finite direction is not looked at: a parameter
        that leaves the range of its dtype is infinite. There is no ``info``.

    Raises:
        TypeError: A dtype or layout that is not accepted.
        ValueError: A wrong shape, device or number; a ``param`` that is expanded or overlaps an argument.

    Accuracy: all in fp64, the parameter rounded once to its dtype. The norm is that of d before the rounding,
    summed element by element: it does not cancel where g is nearly a multiple of u.
    Cost: ``grad`` and ``score`` are read twice, ``param`` read and written once.
    Source: Huo et al. 2026 (rank-1 NPG), with the formula of Sherman & Morrison 1950.
    """
    usual = _usual_call(param, grad, score, damping, lr, decay)
    if usual is not None:
        return usual
    single = isinstance(param, Tensor)
    given = {"param": param, "grad": grad, "score": score}
    lists = {name: _checks.as_list(OP, name, value) for name, value in given.items()}
    _checks.check_same_form(OP, **given)
    _checks.check_lengths(OP, **lists)
    count = len(lists["param"])
    _checks.check_scalar(OP, "damping", damping, low=0.0, open_low=True)
    lrs, lr_tensor = _spread("lr", lr, count, single)
    decays, decay_tensor = _spread("decay", decay, count, single)
    scalars = {"damping": damping, "lr": lr, "decay": decay}
    on_device = {name: t for name, t in scalars.items() if isinstance(t, Tensor)}
    for i, g in enumerate(lists["grad"]):
        at = "" if single else f"[{i}]"
        _checks.check_dtype(OP, f"grad{at}", g)
        for name, tensors in lists.items():
            dtypes = [g.dtype] if name == "score" else _checks.FLOAT_DTYPES
            _checks.check_dtype(OP, f"{name}{at}", tensors[i], dtypes)
            _checks.check_shape(OP, f"{name}{at}", tensors[i], lists["param"][i].shape, "as param")
            first = {"param" if single else "param[0]": lists["param"][0]}
            _checks.check_device(OP, {**first, f"{name}{at}": tensors[i], **on_device})
        _checks.check_no_self_overlap(OP, f"param{at}", lists["param"][i])
    if not count:
        return torch.zeros((), dtype=torch.float64)
    return _rank1_step_op(  # type: ignore[no-any-return]
        *([t.detach() for t in tensors] for tensors in lists.values()),
        *_split(damping),
        lrs,
        lr_tensor,
        decays,
        decay_tensor,
    )


def _usual_call(
    param: Tensor | Tensors,
    grad: Tensor | Tensors,
    score: Tensor | Tensors,
    damping: float | Tensor,
    lr: Numbers,
    decay: Numbers,
) -> Tensor | None:
    """Run a call on CPU tensors at once where nothing about it is unusual, else return None.

    What is accepted here passes every check of the general way, but for dtypes, layouts and overlaps, which
    the C++ operator looks at before it writes: what it refuses goes the general way, where the error is said
    in the user's terms. The general way takes longer than the step of a small policy.
    """
    if not _dispatch.runs_at_once() or not _dispatch.serves_cpu():
        return None
    lists: tuple[Any, Any, Any] = (param, grad, score)
    if isinstance(param, Tensor):
        lists = ([param], [grad], [score])
        if type(lr) is list or type(decay) is list:
            return None
    elif not type(param) is type(grad) is type(score) is list:
        return None
    count = len(lists[0])
    lrs, decays = _usual_numbers(lr, lists), _usual_numbers(decay, lists)
    if lrs is None or decays is None or not (0 < count == len(lists[1]) == len(lists[2])):
        return None
    if type(damping) is not float or not _SMALLEST_DAMPING <= damping <= LARGEST_FP32:
        return None
    if not all(map(_is_usual, *lists, itertools.repeat(torch.is_grad_enabled()))):
        return None
    norm = torch.empty((), dtype=torch.float64, device="cpu")
    largest = LARGEST_FP64 if lists[0][0].dtype is torch.float64 else LARGEST_FP32
    params, *others = lists
    try:
        torch.ops.grng._rank1_step_.default(params, norm, *others, damping, lrs, decays, largest)
    except RuntimeError:
        # Nothing was written: the general way says why, or serves it.
        return None
    torch.autograd.graph.increment_version(params)
    return norm


def _usual_numbers(value: Numbers, lists: Sequence[Any]) -> list[float] | None:
    given: list[Any] = value if type(value) is list else [value] * len(lists[0])
    if len(given) != len(lists[0]):
        return None
    good = all(type(x) is float and -LARGEST_FP32 <= x <= LARGEST_FP32 for x in given)
    return given if good else None


def _is_usual(param: Any, grad: Any, score: Any, tracked: bool) -> bool:
    for t in (param, grad, score):
        if type(t) not in _PLAIN or (tracked and t.requires_grad):
            return False
    return bool(param.shape == grad.shape == score.shape)


def _spread(
    name: str, value: Numbers, count: int, single: bool
) -> tuple[list[float], Tensor | None]:
    """Return a number for each block; or a tensor for all, and no numbers.

    Raises:
        TypeError: Something that is no number.
        ValueError: Not finite, or not one for each block.
    """
    if isinstance(value, (list, tuple)) and not single:
        if len(value) != count:
            raise ValueError(
                f"{OP}: {name} must be one number or one for each block, got {len(value)} for {count}"
            )
        for i, item in enumerate(value):
            if isinstance(item, Tensor):
                raise TypeError(f"{OP}: {name}[{i}] must be a number, got Tensor")
            _checks.check_scalar(OP, f"{name}[{i}]", item)
        return [float(item) for item in value], None
    _checks.check_scalar(OP, name, value)  # type: ignore[arg-type]
    number, tensor = _split(value)  # type: ignore[arg-type]
    return ([] if number is None else [number] * count), tensor


def _split(value: float | Tensor) -> tuple[float | None, Tensor | None]:
    return (None, value.detach()) if isinstance(value, Tensor) else (float(value), None)


def _largest(grads: Tensors) -> float:
    wide = all(g.dtype == torch.float64 for g in grads)
    return LARGEST_FP64 if wide else LARGEST_FP32


def _cpu_unsupported(*lists: Tensors) -> str | None:
    dtype = lists[0][0].dtype
    for tensors in lists:
        for t in tensors:
            if t.dtype != dtype or dtype not in _checks.STATE_DTYPES:
                return "it needs one dtype, float32 or float64"
            if not t.is_contiguous():
                return "it needs contiguous tensors"
    return None


def _backend(device: torch.device, problem: str | None) -> str:
    """Choose; on a GPU torch's kernels serve whatever was asked for by name."""
    if _dispatch.requested_backend() in ("triton", "cuda"):
        return "reference"
    return _dispatch.select(OP, device, cpu=problem)


@operator("rank1_step_", mutates_args=("params",))
def _rank1_step_op(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    scores: Sequence[Tensor],
    damping: float | None,
    damping_tensor: Tensor | None,
    lrs: Sequence[float],
    lr_tensor: Tensor | None,
    decays: Sequence[float],
    decay_tensor: Tensor | None,
) -> Tensor:
    count = range(len(params))
    _checks.check_no_overlap(
        OP,
        [(f"param[{i}]", params[i]) for i in count],
        [(f"grad[{i}]", grads[i]) for i in count] + [(f"score[{i}]", scores[i]) for i in count],
    )
    value = damping if damping_tensor is None else damping_tensor
    assert value is not None, "the public function passes a number or a tensor"
    device, largest = params[0].device, _largest(grads)
    if _backend(device, _cpu_unsupported(params, grads, scores)) == "reference":
        return reference.rank1_step_(
            params,
            grads,
            scores,
            damping=value,
            lr=lrs if lr_tensor is None else [lr_tensor] * len(params),
            decay=decays if decay_tensor is None else [decay_tensor] * len(params),
            largest=largest,
        )
    rates = lrs if lr_tensor is None else [float(lr_tensor)] * len(params)
    kept = decays if decay_tensor is None else [float(decay_tensor)] * len(params)
    norm = torch.empty((), dtype=torch.float64)
    torch.ops.grng._rank1_step_(params, norm, grads, scores, float(value), rates, kept, largest)
    return norm


@_rank1_step_op.register_fake
def _(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    scores: Sequence[Tensor],
    damping: float | None,
    damping_tensor: Tensor | None,
    lrs: Sequence[float],
    lr_tensor: Tensor | None,
    decays: Sequence[float],
    decay_tensor: Tensor | None,
) -> Tensor:
    return params[0].new_empty((), dtype=torch.float64)
