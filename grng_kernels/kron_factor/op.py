# SPDX-License-Identifier: Apache-2.0
"""``kron_factor_update_``: the public function, its checks, and the choice of a backend."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from grng_kernels import _checks, _dispatch
from grng_kernels._register import operator
from grng_kernels.kron_factor import reference

OP = "kron_factor_update_"
_LARGEST_FP32 = torch.finfo(torch.float32).max
# Dtype of the factor for each dtype of x.
_STATE_DTYPE = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float64: torch.float64,
}


def kron_factor_update_(
    factor: Tensor | Sequence[Tensor],
    x: Tensor | Sequence[Tensor],
    *,
    decay: float | Tensor,
    scale: float | Tensor | None = None,
    bias: bool = False,
) -> Tensor:
    """Exponential moving average of a Kronecker factor, in place: ``factor <- decay·factor + scale·xᵀx``.

    Torch equivalent: ``factor.mul_(decay).addmm_(x.mT, x, alpha=scale)``. Both triangles are written
    from one value, so a symmetric factor stays bitwise symmetric; only its lower triangle is read.

    Args:
        factor: State, ``[N, N]``, contiguous or not, fp32 (fp64 for fp64 ``x``), or a list of such of
            mixed sizes. Mutated.
        x: Activations or output gradients, one sample per row: ``[rows, N]``, or ``[rows, N-1]`` with
            ``bias``; fp32, bf16, fp16 or fp64, any strides; a list for a list. Products are accumulated
            in the dtype of ``factor``. With no rows the factor is left as it is.
        decay: EMA decay in [0, 1], number or 0-d tensor. 0 ignores the old content, as BLAS does. Where
            ``torch.compile`` is used and it changes from call to call, a tensor saves compiling again.
        scale: Weight of ``xᵀx``, number or 0-d tensor; None means ``(1 - decay) / rows``.
        bias: Treat ``x`` as if it had a last column of ones. The column is never built.

    Returns:
        :class:`Info`, int32, on the device of ``factor``: 0-d for a tensor, ``[items]`` for a list.
        ``NONFINITE_INPUT`` where ``x`` or the diagonal of ``factor`` holds NaN or infinity, or a tensor
        ``decay`` is not in [0, 1]; ``OVERFLOW`` where
        ``decay·max|diag(factor)| + max|x|² · rows · max(1, |scale|)`` exceeds the range of the factor.
        There the factor is unchanged, bitwise; the other factors of the call are updated. Squares that
        underflow count as zero, without an error.

    Raises:
        TypeError: A dtype or layout that is not accepted.
        ValueError: A wrong shape, device or number; a factor that is expanded or overlaps another
            argument in memory.

    No gradient is defined: in autograd's eyes the result does not depend on ``x``.
    Accuracy: at most twice the error of PyTorch in the same dtype against fp64.
    Source: Martens & Grosse 2015 (K-FAC), section 5; the moving average of the factors.
    """
    done = _usual_call(factor, x, decay, scale, bias)
    if done is not None:
        return done
    single = isinstance(factor, Tensor)
    factors, xs = _checks.as_list(OP, "factor", factor), _checks.as_list(OP, "x", x)
    _checks.check_same_form(OP, factor=factor, x=x)
    _checks.check_lengths(OP, factor=factors, x=xs)
    _checks.check_flag(OP, "bias", bias)
    _checks.check_scalar(OP, "decay", decay, low=0.0, high=1.0)
    if scale is not None:
        _checks.check_scalar(OP, "scale", scale)
    scalars = {
        name: value
        for name, value in (("decay", decay), ("scale", scale))
        if isinstance(value, Tensor)
    }
    for i, (f, item) in enumerate(zip(factors, xs, strict=True)):
        at = "" if single else f"[{i}]"
        _check_item(at, f, item, bias)
        _checks.check_device(
            OP,
            {
                f"factor{'' if single else '[0]'}": factors[0],
                f"factor{at}": f,
                f"x{at}": item,
                **scalars,
            },
        )
    if not factors:
        return torch.zeros(0, dtype=torch.int32)
    info = _kron_factor_update_op(
        [f.detach() for f in factors],
        [item.detach() for item in xs],
        bias,
        *split_scalar(decay),
        *((None, None) if scale is None else split_scalar(scale)),
    )
    return info[0] if single else info


def _usual_call(
    factor: Tensor | Sequence[Tensor],
    x: Tensor | Sequence[Tensor],
    decay: float | Tensor,
    scale: float | Tensor | None,
    bias: bool,
) -> Tensor | None:
    """Run a call on the C++ kernel at once where nothing about it is unusual, else return None.

    What is accepted here passes every check of the general way, whose Python takes as long as the update of a
    small factor.
    """
    if not _dispatch.runs_at_once() or not isinstance(bias, bool):
        return None
    single = isinstance(factor, Tensor)
    factors = [factor] if isinstance(factor, Tensor) else factor
    xs = [x] if isinstance(x, Tensor) else x
    if not (isinstance(factors, list) and isinstance(xs, list)) or isinstance(x, Tensor) != single:
        return None
    if len(factors) != len(xs) or not xs:
        return None
    if not (type(decay) is float and 0.0 <= decay <= 1.0):
        return None
    if not (scale is None or (type(scale) is float and abs(scale) <= _LARGEST_FP32)):
        return None
    if not all(map(_is_usual, factors, xs, itertools.repeat(bias))):
        return None
    if not _dispatch.serves_cpu():
        return None
    scales = [(1.0 - decay) / max(item.shape[0], 1) if scale is None else scale for item in xs]
    info = torch.empty(() if single else (len(factors),), dtype=torch.int32, device="cpu")
    try:
        torch.ops.grng._kron_factor_update_.default(factors, xs, info, bias, decay, scales)
    except RuntimeError:
        # Nothing was written, tensors overlap: the general way says which.
        return None
    torch.autograd.graph.increment_version(factors)
    return info


def _is_usual(factor: Tensor, x: Tensor, bias: bool) -> bool:
    if type(factor) is not Tensor or type(x) is not Tensor:
        return False
    if factor.requires_grad or x.requires_grad or x.layout is not torch.strided:
        return False
    if not (factor.is_cpu and x.is_cpu and factor.is_contiguous()):
        return False
    shape, f_shape = x.shape, factor.shape
    if _STATE_DTYPE.get(x.dtype) is not factor.dtype or len(shape) != 2 or len(f_shape) != 2:
        return False
    return bool(f_shape[0] == f_shape[1] == shape[1] + bias)


def _check_item(at: str, factor: Tensor, x: Tensor, bias: bool) -> None:
    _checks.check_dtype(OP, f"x{at}", x)
    wide = x.dtype == torch.float64
    _checks.check_dtype(OP, f"factor{at}", factor, [torch.float64 if wide else torch.float32])
    _checks.check_square(OP, f"factor{at}", factor)
    n = factor.shape[0]
    if x.dim() != 2 or x.shape[1] != (n - 1 if bias else n):
        # Written out only here: a size in a text is a fixed number to the compiler.
        form = f"[rows, N-1] with N = {n} (bias=True)" if bias else f"[rows, N] with N = {n}"
        raise ValueError(f"{OP}: x{at} must be {form}, got shape {list(x.shape)}")
    _checks.check_no_self_overlap(OP, f"factor{at}", factor)


def split_scalar(value: float | Tensor) -> tuple[float | None, Tensor | None]:
    """Return a scalar as an operator takes it: a number or a tensor, and None for the other."""
    return (None, value.detach()) if isinstance(value, Tensor) else (float(value), None)


@operator("kron_factor_update_", mutates_args=("factors",))
def _kron_factor_update_op(
    factors: Sequence[Tensor],
    xs: Sequence[Tensor],
    bias: bool,
    decay: float | None,
    decay_tensor: Tensor | None,
    scale: float | None,
    scale_tensor: Tensor | None,
) -> Tensor:
    _checks.check_no_overlap(
        OP,
        [(f"factor[{i}]", f) for i, f in enumerate(factors)],
        [(f"x[{i}]", x) for i, x in enumerate(xs)],
    )
    the_decay = either(decay, decay_tensor)
    per_row = scale is None and scale_tensor is None
    scales = [
        (1 - the_decay) / max(x.shape[0], 1) if per_row else either(scale, scale_tensor) for x in xs
    ]
    info = torch.zeros(len(factors), dtype=torch.int32, device=factors[0].device)
    backend = _dispatch.select(
        OP, info.device, cpu=_cpu_unsupported(factors), triton=_triton_unsupported(xs)
    )
    if backend == "cpu":
        torch.ops.grng._kron_factor_update_(
            factors, xs, info, bias, float(the_decay), [float(s) for s in scales]
        )
        return info
    if backend == "triton":
        from grng_kernels.kron_factor.triton_kernel import launch

        launch(factors, xs, info, decay=the_decay, scales=scales, bias=bias)
        return info
    for i, (f, x, s) in enumerate(zip(factors, xs, scales, strict=True)):
        if x.shape[0] == 0 or f.shape[0] == 0:
            continue
        new, item_info = reference.kron_factor_update(f, x, decay=the_decay, scale=s, bias=bias)
        f.copy_(new)
        info[i] = item_info
    return info


@_kron_factor_update_op.register_fake
def _(
    factors: Sequence[Tensor],
    xs: Sequence[Tensor],
    bias: bool,
    decay: float | None,
    decay_tensor: Tensor | None,
    scale: float | None,
    scale_tensor: Tensor | None,
) -> Tensor:
    return factors[0].new_empty(len(factors), dtype=torch.int32)


def either(number: float | None, tensor: Tensor | None) -> float | Tensor:
    """Return the one of the two that is given."""
    if number is not None:
        return number
    assert tensor is not None, "the public function passes a number or a tensor"
    return tensor


def _cpu_unsupported(factors: Sequence[Tensor]) -> str | None:
    if all(f.is_contiguous() for f in factors):
        return None
    return "it needs contiguous factors"


def _triton_unsupported(xs: Sequence[Tensor]) -> str | None:
    if all(x.dtype != torch.float64 for x in xs):
        return None
    return "it has no fp64 products"
