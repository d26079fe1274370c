# SPDX-License-Identifier: Apache-2.0
"""``rank1_precondition``: the public function, its checks, and the choice of a backend."""

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from grng_kernels import _checks, _dispatch
from grng_kernels._register import operator
from grng_kernels.rank_one import reference

OP = "rank1_precondition"
CPU_DTYPES = _checks.STATE_DTYPES


@overload
def rank1_precondition(
    grad: Tensor, score: Tensor, *, damping: float | Tensor, out: Tensor | None = None
) -> Tensor: ...
@overload
def rank1_precondition(
    grad: Sequence[Tensor],
    score: Sequence[Tensor],
    *,
    damping: float | Tensor,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]: ...
def rank1_precondition(
    grad: Tensor | Sequence[Tensor],
    score: Tensor | Sequence[Tensor],
    *,
    damping: float | Tensor,
    out: Tensor | Sequence[Tensor] | None = None,
) -> Tensor | list[Tensor]:
    """Inverse of ``damping·I + u uᵀ`` times the gradient: ``(g − u (uᵀg)/(damping + uᵀu)) / damping``.

    O(d) time and memory; no matrix is formed. A list is one vector cut into blocks: ``uᵀg`` and ``uᵀu`` run
    over all of them.

    Args:
        grad: ``g``, any shape, or a list of blocks; fp32, bf16, fp16 or fp64, any strides.
        score: ``u``, the gradient of the log-probability of the action; shapes and dtypes of ``grad``.
        damping: > 0; a number, or a 0-d tensor, whose value is not checked.
        out: Where to put the result, shapes and dtypes of ``grad``; overlaps no argument. Mutated.

    Returns:
        ``out``, or new tensors like ``grad``. There is no ``info``: nothing is kept, and a non-finite input
        gives a non-finite output.

    Raises:
        TypeError: A dtype or layout that is not accepted.
        ValueError: A wrong shape, device or number; an ``out`` that is expanded or overlaps an argument.

    Accuracy: dot products in fp64, the result rounded once to the dtype of ``grad``.
    Source: Huo et al. 2026 (rank-1 NPG), with the formula of Sherman & Morrison 1950.
    """
    single = isinstance(grad, Tensor)
    grads, scores = _checks.as_list(OP, "grad", grad), _checks.as_list(OP, "score", score)
    outs = None if out is None else _checks.as_list(OP, "out", out)
    lists = {"grad": grads, "score": scores} | ({} if outs is None else {"out": outs})
    given = {"grad": grad, "score": score} | ({} if out is None else {"out": out})
    _checks.check_same_form(OP, **given)
    _checks.check_lengths(OP, **lists)
    _checks.check_scalar(OP, "damping", damping, low=0.0, open_low=True)
    number, tensor = (
        (None, damping.detach()) if isinstance(damping, Tensor) else (float(damping), None)
    )
    for i, g in enumerate(grads):
        at = "" if single else f"[{i}]"
        _checks.check_dtype(OP, f"grad{at}", g)
        for name, tensors in lists.items():
            _checks.check_dtype(OP, f"{name}{at}", tensors[i], [g.dtype])
            _checks.check_shape(OP, f"{name}{at}", tensors[i], g.shape, "as grad")
            _checks.check_device(
                OP,
                {
                    "grad" if single else "grad[0]": grads[0],
                    f"{name}{at}": tensors[i],
                    "damping": tensor,
                },
            )
        if outs is not None:
            _checks.check_no_self_overlap(OP, f"out{at}", outs[i])
    results = outs if outs is not None else [torch.empty_like(g).detach() for g in grads]
    if results:
        _rank1_precondition_op(
            [t.detach() for t in results],
            [t.detach() for t in grads],
            [t.detach() for t in scores],
            number,
            tensor,
        )
    return results[0] if single else results


@operator("rank1_precondition", mutates_args=("outs",))
def _rank1_precondition_op(
    outs: Sequence[Tensor],
    grads: Sequence[Tensor],
    scores: Sequence[Tensor],
    damping: float | None,
    damping_tensor: Tensor | None,
) -> None:
    count = range(len(outs))
    _checks.check_no_overlap(
        OP,
        [(f"out[{i}]", outs[i]) for i in count],
        [(f"grad[{i}]", grads[i]) for i in count] + [(f"score[{i}]", scores[i]) for i in count],
    )
    value = damping if damping_tensor is None else damping_tensor
    assert value is not None, "the public function passes a number or a tensor"
    dtype = outs[0].dtype
    mixed = "it needs one dtype" if any(t.dtype != dtype for t in outs) else None
    name = str(dtype).removeprefix("torch.")
    problem = mixed or (None if dtype in CPU_DTYPES else f"it does not compute in {name}")
    backend = _dispatch.select(OP, outs[0].device, cpu=problem, triton=mixed)
    if backend != "reference":
        _run_kernel(backend, outs, grads, scores, value)
        return
    results = reference.rank1_precondition(grads, scores, damping=value)
    for out, result in zip(outs, results, strict=True):
        out.copy_(result)


def _run_kernel(
    backend: str,
    outs: Sequence[Tensor],
    grads: Sequence[Tensor],
    scores: Sequence[Tensor],
    damping: float | Tensor,
) -> None:
    grads, scores = [g.contiguous() for g in grads], [u.contiguous() for u in scores]
    dense = [
        out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
        for out in outs
    ]
    if backend == "cpu":
        torch.ops.grng._rank1_precondition_(dense, grads, scores, float(damping))
    else:
        from grng_kernels.rank_one import triton_kernel

        triton_kernel.launch(dense, grads, scores, damping)
    for out, result in zip(outs, dense, strict=True):
        if out is not result:
            out.copy_(result)


@_rank1_precondition_op.register_fake
def _(
    outs: Sequence[Tensor],
    grads: Sequence[Tensor],
    scores: Sequence[Tensor],
    damping: float | None,
    damping_tensor: Tensor | None,
) -> None:
    return None
