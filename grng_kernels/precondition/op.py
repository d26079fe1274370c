# SPDX-License-Identifier: Apache-2.0
"""``precondition``: the public function, its checks, and the choice of a backend."""

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from grng_kernels import _checks, _dispatch
from grng_kernels._register import operator
from grng_kernels.precondition import reference

OP = "precondition"


@overload
def precondition(
    grad: Tensor, left: Tensor, right: Tensor, *, out: Tensor | None = None
) -> Tensor: ...
@overload
def precondition(
    grad: Sequence[Tensor],
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    *,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]: ...
def precondition(
    grad: Tensor | Sequence[Tensor],
    left: Tensor | Sequence[Tensor],
    right: Tensor | Sequence[Tensor],
    *,
    out: Tensor | Sequence[Tensor] | None = None,
) -> Tensor | list[Tensor]:
    """Kronecker-preconditioned gradient of one weight or of many: ``left · grad · right``.

    Torch equivalent: ``left @ grad @ right``.

    Args:
        grad: ``[m, n]`` (d_out, d_in), or a list of mixed sizes; fp32, bf16, fp16 or fp64, any strides.
        left: Inverse of the output-side factor, ``[m, m]``, or a list; fp32 or fp64.
        right: Inverse of the input-side factor, ``[n, n]``, or a list; fp32 or fp64.
        out: Where to put the result, same shapes, dtype of the result; overlaps no argument. Mutated.

    Returns:
        ``out``, or new tensors: the widest dtype among the three arguments. There is no ``info``: nothing
        is kept, and a non-finite input gives a non-finite output.

    Raises:
        TypeError: A dtype or layout that is not accepted.
        ValueError: A wrong shape or device; an ``out`` that is expanded or overlaps an argument.

    Accuracy: at most twice the error of PyTorch in the same dtype against fp64.
    Cost: ``2mn(m + n)`` FLOPs each.
    Source: Martens & Grosse 2015 (K-FAC), section 4.
    """
    single = isinstance(grad, Tensor)
    lists = {
        name: _checks.as_list(OP, name, value)
        for name, value in (("grad", grad), ("left", left), ("right", right))
    }
    given = {"grad": grad, "left": left, "right": right}
    if out is not None:
        lists["out"] = _checks.as_list(OP, "out", out)
        given["out"] = out
    _checks.check_same_form(OP, **given)
    _checks.check_lengths(OP, **lists)
    outputs = lists.get("out", [])
    results = []
    for i, (g, lo, hi) in enumerate(zip(lists["grad"], lists["left"], lists["right"], strict=True)):
        at = "" if single else f"[{i}]"
        _checks.check_dtype(OP, f"grad{at}", g)
        _checks.check_dtype(OP, f"left{at}", lo, _checks.STATE_DTYPES)
        _checks.check_dtype(OP, f"right{at}", hi, _checks.STATE_DTYPES)
        _checks.check_rank(OP, f"grad{at}", g, 2, "[m, n]")
        m, n = g.shape
        _checks.check_shape(OP, f"left{at}", lo, [m, m], "grad is [m, n]")
        _checks.check_shape(OP, f"right{at}", hi, [n, n], "grad is [m, n]")
        _checks.check_device(
            OP,
            {
                "grad" if single else "grad[0]": lists["grad"][0],
                f"grad{at}": g,
                f"left{at}": lo,
                f"right{at}": hi,
            },
        )
        dtype = torch.promote_types(torch.promote_types(g.dtype, lo.dtype), hi.dtype)
        if out is None:
            results.append(torch.empty(m, n, dtype=dtype, device=g.device))
        else:
            name = f"out{at}"
            _checks.check_dtype(OP, name, outputs[i], [dtype])
            _checks.check_shape(OP, name, outputs[i], [m, n], "as grad")
            _checks.check_no_self_overlap(OP, name, outputs[i])
            _checks.check_device(OP, {f"grad{at}": g, name: outputs[i]})
            results.append(outputs[i])
    if results:
        _precondition_op(
            [t.detach() for t in results],
            *([t.detach() for t in lists[name]] for name in ("grad", "left", "right")),
        )
    return results[0] if single else results


@operator("precondition", mutates_args=("outs",))
def _precondition_op(
    outs: Sequence[Tensor],
    grads: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
) -> None:
    count = range(len(outs))
    _checks.check_no_overlap(
        OP,
        [(f"out[{i}]", outs[i]) for i in count],
        [
            (f"{name}[{i}]", tensors[i])
            for name, tensors in (("grad", grads), ("left", lefts), ("right", rights))
            for i in count
        ],
    )
    # Item by item, so that a list gives what its items give.
    skinny = [
        i
        for i in count
        if _dispatch.select(OP, outs[i].device, triton=_triton_unsupported(outs[i])) == "triton"
    ]
    if skinny:
        from grng_kernels.precondition.triton_kernel import launch, supports

        skinny = [i for i in skinny if supports(*outs[i].shape)]

        def of(tensors: Sequence[Tensor]) -> list[Tensor]:
            return [tensors[i] for i in skinny]

        none = [None] * len(skinny)
        launch(of(outs), of(grads), of(lefts), of(rights), bias_grads=none, dots=None)
    for i in set(count).difference(skinny):
        outs[i].copy_(reference.precondition(grads[i], lefts[i], rights[i]))


@_precondition_op.register_fake
def _(
    outs: Sequence[Tensor],
    grads: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
) -> None:
    return None


def _triton_unsupported(out: Tensor) -> str | None:
    return "it has no fp64 products" if out.dtype == torch.float64 else None
