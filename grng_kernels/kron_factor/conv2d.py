# SPDX-License-Identifier: Apache-2.0
"""``kron_factor_conv2d_update_``: the public function, its checks, and the choice of a backend."""

from collections.abc import Sequence

import torch
from torch import Tensor

from grng_kernels import _checks, _dispatch
from grng_kernels._register import operator
from grng_kernels.kron_factor import conv2d_reference as reference
from grng_kernels.kron_factor.geometry import Conv2dGeometry
from grng_kernels.kron_factor.op import either, split_scalar

OP = "kron_factor_conv2d_update_"
Pair = int | Sequence[int]
# Sizes computed from the geometry stay far from the end of int64.
_LARGEST = 2**20


def kron_factor_conv2d_update_(
    factor: Tensor | Sequence[Tensor],
    x: Tensor | Sequence[Tensor],
    *,
    kernel_size: Pair,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    decay: float | Tensor,
    scale: float | Tensor | None = None,
    bias: bool = False,
    sharing: str = "expand",
) -> Tensor:
    """Exponential moving average of the input factor of a 2-d convolution, in place.

    ``factor <- decay·factor + scale·PᵀP``, where the rows of ``P`` are the patches that the kernel meets,
    in the order (b, o1, o2), and its columns (c, k1, k2) those of ``weight.flatten(1)``. Torch equivalent,
    for ``groups=1``: ``kron_factor_update_(factor, F.unfold(x, ...).mT.flatten(0, 1), ...)``; but the
    patches are not formed.

    The factor of the output gradients is that of a 1 x 1 kernel: ``x`` is then the gradient
    ``[B, C_out, O1, O2]``, with the same ``groups``.

    Args:
        factor: State, fp32 (fp64 for fp64 ``x``): ``[N, N]`` with ``N = C·K1·K2`` (plus one with ``bias``),
            or ``[groups, N, N]`` with ``N = C/groups·K1·K2`` (plus one) if ``groups > 1``. A list for a
            list. Mutated.
        x: Input of the convolution, ``[B, C, H, W]``, fp32, bf16, fp16 or fp64, any strides; or a list of
            inputs of mixed sizes that the same kernel geometry meets.
        kernel_size: As in ``torch.nn.Conv2d``, like the next three: a number or (height, width).
        stride: Steps of the kernel.
        padding: Zeros around ``x``; or ``"valid"``, or ``"same"`` where that is symmetric.
        dilation: Steps between the taps of the kernel.
        groups: As in ``torch.nn.Conv2d``; each group has a factor of its own.
        decay: EMA decay in [0, 1], number or 0-d tensor. 0 ignores the old content.
        scale: Weight of ``PᵀP``, number or 0-d tensor; None means ``(1 - decay) / rows of P``, which is the
            convention of curvlinops and of Eschenhagen et al. 2023.
        bias: Treat ``P`` as if it had a last column of ones. The column is never built.
        sharing: ``"expand"``: every position of the output is a sample, ``P [B·O1·O2, N]``. ``"reduce"``:
            every image is one, and its row the mean patch, ``P [B, N]``. For output gradients *reduce* is a
            sum instead of a mean: multiply ``scale`` by ``(O1·O2)²``.

    Returns:
        :class:`Info`, int32, on the device of ``factor``: 0-d for a tensor, ``[items]`` for a list, with the
        meanings of :func:`kron_factor_update_`. Where it is not 0, no group of that factor is changed.
        With ``"expand"`` all of ``x`` is checked, also what no patch covers.

    Raises:
        TypeError: A dtype, layout or kind of argument that is not accepted.
        ValueError: A wrong shape, device or number; a kernel larger than the padded input; a factor that is
            expanded or overlaps another argument in memory.

    No gradient is defined: in autograd's eyes the result does not depend on ``x``.
    Accuracy: at most twice the error of PyTorch in the same dtype against fp64.
    Memory: on the CPU, for each thread, a few lines of up to 64 channels and the sums for some distances of
    taps: 0.3 MB for a 3 x 3 kernel and images up to 64 wide, never more than 8 MB; for 1 x 1 kernels, few
    channels and very wide images what :func:`kron_factor_update_` needs.
    Source: Grosse & Martens 2016 (KFC); Eschenhagen et al. 2023 for expand and reduce.
    """
    single = isinstance(factor, Tensor)
    factors, xs = _checks.as_list(OP, "factor", factor), _checks.as_list(OP, "x", x)
    _checks.check_same_form(OP, factor=factor, x=x)
    _checks.check_lengths(OP, factor=factors, x=xs)
    geometry = _geometry(kernel_size, stride, padding, dilation, groups)
    _checks.check_choice(OP, "sharing", sharing, ("expand", "reduce"))
    _checks.check_flag(OP, "bias", bias)
    _checks.check_scalar(OP, "decay", decay, low=0.0, high=1.0)
    if scale is not None:
        _checks.check_scalar(OP, "scale", scale)
    scalars = {k: v for k, v in (("decay", decay), ("scale", scale)) if isinstance(v, Tensor)}
    for i, (f, item) in enumerate(zip(factors, xs, strict=True)):
        at = "" if single else f"[{i}]"
        _check_item(at, f, item, geometry, bias)
        first = {f"factor{'' if single else '[0]'}": factors[0]}
        _checks.check_device(OP, {**first, f"factor{at}": f, f"x{at}": item, **scalars})
    if not factors:
        return torch.zeros(0, dtype=torch.int32)
    info = _kron_factor_conv2d_update_op(
        [f.detach() if f.dim() == 3 else f.detach().unsqueeze(0) for f in factors],
        [item.detach() for item in xs],
        geometry.flat(),
        sharing == "reduce",
        bias,
        *split_scalar(decay),
        *((None, None) if scale is None else split_scalar(scale)),
    )
    return info[0] if single else info


def _pair(name: str, value: Pair, low: int) -> tuple[int, int]:
    numbers = (value, value) if isinstance(value, int) else value
    if (
        not isinstance(numbers, Sequence)
        or isinstance(numbers, str)
        or not all(isinstance(v, int) and not isinstance(v, bool) for v in numbers)
        or isinstance(value, bool)
    ):
        raise TypeError(f"{OP}: {name} must be an int or a pair of them, got {value!r}")
    if len(numbers) != 2 or any(not low <= v <= _LARGEST for v in numbers):
        raise ValueError(
            f"{OP}: {name} must be one or two numbers >= {low} (at most 2**20), got {value!r}"
        )
    return numbers[0], numbers[1]


def _geometry(
    kernel_size: Pair, stride: Pair, padding: Pair | str, dilation: Pair, groups: int
) -> Conv2dGeometry:
    kernel = _pair("kernel_size", kernel_size, 1)
    steps, spread = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
    if isinstance(groups, bool) or not isinstance(groups, int):
        raise TypeError(f"{OP}: groups must be an int, got {groups!r}")
    if groups < 1:
        raise ValueError(f"{OP}: groups must be >= 1, got {groups}")
    if isinstance(padding, str):
        _checks.check_choice(OP, "padding", padding, ("valid", "same"))
        reach = [d * (k - 1) for d, k in zip(spread, kernel, strict=True)]
        if padding == "same" and (any(r % 2 for r in reach) or steps != (1, 1)):
            raise ValueError(
                f"{OP}: padding 'same' must be symmetric, with stride 1: kernel_size {kernel}, dilation "
                f"{spread} and stride {steps} are not; pad x first and pass 'valid'"
            )
        padding = 0 if padding == "valid" else [r // 2 for r in reach]
    return Conv2dGeometry(kernel, steps, _pair("padding", padding, 0), spread, groups)


def _check_item(at: str, factor: Tensor, x: Tensor, geometry: Conv2dGeometry, bias: bool) -> None:
    _checks.check_dtype(OP, f"x{at}", x)
    wide = x.dtype == torch.float64
    _checks.check_dtype(OP, f"factor{at}", factor, [torch.float64 if wide else torch.float32])
    _checks.check_rank(OP, f"x{at}", x, 4, "[B, C, H, W]")
    if min(x.shape[1:]) < 1:
        raise ValueError(
            f"{OP}: x{at} must be [B, C, H, W] with C, H and W of at least 1, got shape {list(x.shape)}"
        )
    channels, groups = x.shape[1], geometry.groups
    if channels % groups:
        raise ValueError(
            f"{OP}: the channels of x{at} must be divisible by groups = {groups}, got {channels}"
        )
    if min(geometry.output_size(x.shape[2], x.shape[3])) < 1:
        raise ValueError(
            f"{OP}: the kernel must fit in the padded x{at}, got kernel_size {geometry.kernel_size} with "
            f"dilation {geometry.dilation} and padding {geometry.padding} for {list(x.shape)}"
        )
    n = channels // groups * geometry.kernel_size[0] * geometry.kernel_size[1] + bias
    shape = [n, n] if groups == 1 else [groups, n, n]
    form = "N = C/groups * K1 * K2 (+ 1 with bias)"
    _checks.check_shape(OP, f"factor{at}", factor, shape, f"[N, N], or [groups, N, N]; {form}")
    _checks.check_no_self_overlap(OP, f"factor{at}", factor)


@operator("kron_factor_conv2d_update_", mutates_args=("factors",))
def _kron_factor_conv2d_update_op(
    factors: Sequence[Tensor],
    xs: Sequence[Tensor],
    geometry: Sequence[int],
    reduce: bool,
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
    k1, k2, s1, s2, p1, p2, d1, d2, groups = geometry
    form = Conv2dGeometry((k1, k2), (s1, s2), (p1, p2), (d1, d2), groups)
    if reduce:
        xs = [reference.mean_patches(x, form) for x in xs]
        form = Conv2dGeometry((1, 1), groups=groups)
    the_decay = either(decay, decay_tensor)
    per_row = scale is None and scale_tensor is None
    scales = [
        (1 - the_decay) / max(x.shape[0] * form.places(x), 1)
        if per_row
        else either(scale, scale_tensor)
        for x in xs
    ]
    info = torch.zeros(len(factors), dtype=torch.int32, device=factors[0].device)
    contiguous = all(f.is_contiguous() for f in factors)
    backend = _dispatch.select(
        OP,
        info.device,
        cpu=None if contiguous else "it needs contiguous factors",
        triton="it has no fp64 products" if any(x.dtype == torch.float64 for x in xs) else None,
    )
    if backend == "cpu":
        torch.ops.grng._kron_factor_conv2d_update_(
            factors, xs, info, form.flat(), bias, float(the_decay), [float(s) for s in scales]
        )
        return info
    if backend == "triton":
        from grng_kernels.kron_factor.triton_conv2d import launch_conv2d

        launch_conv2d(factors, xs, info, geometry=form, decay=the_decay, scales=scales, bias=bias)
        return info
    for i, (f, x, s) in enumerate(zip(factors, xs, scales, strict=True)):
        if x.shape[0] == 0 or f.numel() == 0:
            continue
        new, item_info = reference.kron_factor_conv2d_update(
            f, x, geometry=form, decay=the_decay, scale=s, bias=bias
        )
        f.copy_(new)
        info[i] = item_info
    return info


@_kron_factor_conv2d_update_op.register_fake
def _(
    factors: Sequence[Tensor],
    xs: Sequence[Tensor],
    geometry: Sequence[int],
    reduce: bool,
    bias: bool,
    decay: float | None,
    decay_tensor: Tensor | None,
    scale: float | None,
    scale_tensor: Tensor | None,
) -> Tensor:
    return factors[0].new_empty(len(factors), dtype=torch.int32)
