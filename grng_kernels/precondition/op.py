# SPDX-License-Identifier: Apache-2.0
"""``precondition``: the public function, its checks, and the choice of a backend."""

from collections.abc import Sequence
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor

from grng_kernels import _checks, _dispatch, _precision
from grng_kernels._register import operator
from grng_kernels.precondition import reference

OP = "precondition"
# The C++ kernel is faster than library products where one side is at most this long, and either there are
# several gradients, or one whose large inverse the caches next to a core do not hold.
CPU_NARROW, CPU_FEW, CPU_LARGE = 16, 2, 1024

Tensors = Sequence[Tensor]
Bias = Tensor | Sequence[Tensor | None] | None


@overload
def precondition(
    grad: Tensor,
    left: Tensor,
    right: Tensor,
    *,
    bias_grad: Tensor | None = None,
    out: Tensor | None = None,
    return_dot: Literal[False] = False,
) -> Tensor: ...
@overload
def precondition(
    grad: Tensor,
    left: Tensor,
    right: Tensor,
    *,
    bias_grad: Tensor | None = None,
    out: Tensor | None = None,
    return_dot: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def precondition(
    grad: Tensors,
    left: Tensors,
    right: Tensors,
    *,
    bias_grad: Sequence[Tensor | None] | None = None,
    out: Tensors | None = None,
    return_dot: Literal[False] = False,
) -> list[Tensor]: ...
@overload
def precondition(
    grad: Tensors,
    left: Tensors,
    right: Tensors,
    *,
    bias_grad: Sequence[Tensor | None] | None = None,
    out: Tensors | None = None,
    return_dot: Literal[True],
) -> tuple[list[Tensor], Tensor]: ...
def precondition(
    grad: Tensor | Tensors,
    left: Tensor | Tensors,
    right: Tensor | Tensors,
    *,
    bias_grad: Bias = None,
    out: Tensor | Tensors | None = None,
    return_dot: bool = False,
) -> Tensor | list[Tensor] | tuple[Tensor, Tensor] | tuple[list[Tensor], Tensor]:
    """Kronecker-preconditioned gradient of one weight or of many: ``left · grad · right``.

    Torch equivalent: ``left @ grad @ right``; with a bias,
    ``left @ torch.cat([grad, bias_grad[:, None]], dim=1) @ right``, but nothing is concatenated.

    Args:
        grad: ``[m, n]`` (d_out, d_in), or a list of mixed sizes; fp32, bf16, fp16 or fp64, any strides.
        left: Inverse of the output-side factor, ``[m, m]``, or a list; fp32 or fp64.
        right: Inverse of the input-side factor, ``[n, n]`` (``[n+1, n+1]`` with a bias), or a list; fp32 or
            fp64. Items that are given the same tensor share its reading.
        bias_grad: Gradient of the bias, ``[m]``, dtype of ``grad``: the last column of the gradient. For
            lists a list, with None for a layer without bias.
        out: Where to put the result, same shapes, dtype of the result; overlaps no argument. Mutated.
        return_dot: Return the inner products ``<result, gradient>`` too, as a KL clip needs them.

    Returns:
        ``out``, or new tensors ``[m, n]`` (``[m, n+1]``, the last column that of the bias): the widest dtype
        among the arguments. With ``return_dot`` a pair of that and the inner products, on the device, 0-d for
        a tensor and ``[items]`` for a list; fp32, or fp64 where a result is. There is no ``info``: nothing is
        kept, and a non-finite input gives a non-finite output.

    Raises:
        TypeError: A dtype or layout that is not accepted.
        ValueError: A wrong shape or device; an ``out`` that is expanded or overlaps an argument.

    Accuracy: at most twice the error of PyTorch in the same dtype against fp64.
    Cost: ``2mn(m + n)`` FLOPs each.
    Source: Martens & Grosse 2015 (K-FAC), section 4.
    """
    usual = _usual_call(grad, left, right, bias_grad, return_dot) if out is None else None
    if usual is not None:
        results, dots = usual
        if isinstance(grad, Tensor):
            return (results[0], dots[0]) if return_dot else results[0]
        return (results, dots) if return_dot else results
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
    biases = _bias_list(bias_grad, single, len(lists["grad"]))
    outputs: list[Tensor | None] = [*lists["out"]] if out is not None else [None] * len(biases)
    results = [
        _check_item("" if single else f"[{i}]", lists["grad"][0], *item)
        for i, item in enumerate(
            zip(lists["grad"], lists["left"], lists["right"], biases, outputs, strict=True)
        )
    ]
    wide = any(r.dtype == torch.float64 for r in results)
    dots = torch.empty(
        len(results) if return_dot else 0,
        dtype=torch.float64 if wide else torch.float32,
        device=results[0].device if results else None,
    )
    if results:
        _precondition_op(
            [t.detach() for t in results],
            dots,
            *([t.detach() for t in lists[name]] for name in ("grad", "left", "right")),
            [None if b is None else b.detach() for b in biases],
        )
    if single:
        return (results[0], dots[0]) if return_dot else results[0]
    return (results, dots) if return_dot else results


def _usual_call(
    grad: Tensor | Tensors,
    left: Tensor | Tensors,
    right: Tensor | Tensors,
    bias_grad: Bias,
    dot: bool,
) -> tuple[list[Tensor], Tensor] | None:
    """Run a call on CPU tensors at once where nothing about it is unusual, else return None.

    What is accepted here passes every check of the general way, and its outputs are new, so they overlap
    nothing. The general way takes longer than the products of a small LoRA model.
    """
    if not _dispatch.runs_at_once() or not _dispatch.serves_cpu():
        return None
    single = isinstance(grad, Tensor)
    given = [[value] if single else value for value in (grad, left, right)]
    if not all(isinstance(c, list) and len(c) == len(given[0]) > 0 for c in given):
        return None
    if bias_grad is None:
        biases: Sequence[Tensor | None] = [None] * len(given[0])
    else:
        biases = [bias_grad] if single else bias_grad  # type: ignore[list-item,assignment]
        if not isinstance(biases, list) or len(biases) != len(given[0]):
            return None
    grads, lefts, rights = cast(list[list[Tensor]], given)
    if not all(map(_is_usual, grads, lefts, rights, biases)):
        return None
    shapes = [(len(lo), len(hi)) for lo, hi in zip(lefts, rights, strict=True)]
    narrow = cpu_serves(shapes)
    if _dispatch.requested_backend() == "cpu":
        narrow = [i for i, shape in enumerate(shapes) if 0 < min(shape) <= CPU_NARROW]
        if len(narrow) < len(shapes):
            return None
    return _run_usual(narrow, shapes, dot, grads, lefts, rights, biases)


def _run_usual(
    narrow: Sequence[int],
    shapes: Sequence[tuple[int, int]],
    dot: bool,
    grads: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
) -> tuple[list[Tensor], Tensor]:
    """Run the items at ``narrow`` on the C++ kernel and the rest on the library, into new memory."""
    outs: list[Tensor] = [*grads]
    for i in narrow:
        if biases[i] is None and grads[i].is_contiguous():
            outs[i] = torch.empty_like(grads[i])  # in half the time of torch.empty
        else:
            outs[i] = torch.empty(shapes[i], dtype=torch.float32, device="cpu")
    dots = torch.empty(len(outs) if dot else 0, dtype=torch.float32, device="cpu")
    if len(narrow) == len(outs):
        _run_cpu(dots, outs, grads, lefts, rights, biases)
        return outs, dots
    if narrow:
        values = dots.new_empty(len(narrow) if dot else 0)
        o, g, a, b = ([c[i] for i in narrow] for c in (outs, grads, lefts, rights))
        _run_cpu(values, o, g, a, b, [biases[i] for i in narrow])
        if dot:
            dots[narrow] = values
    done = set(narrow)
    plain = _precision.is_plain("cpu")
    for i in range(len(outs)):
        if i in done:
            continue
        # The memory of a result is asked for when it is needed, as in a plain product: large blocks that
        # are asked for at once are taken from the system and given back in every call.
        outs[i] = reference.precondition(grads[i], lefts[i], rights[i], biases[i], plain=plain)
        if dot:
            dots[i] = reference.inner_product(outs[i], grads[i], biases[i])
    return outs, dots


def cpu_serves(shapes: Sequence[Sequence[int]]) -> list[int]:
    """Return the places of the fp32 results ``[m, n]`` that ``auto`` leaves to the C++ kernel."""
    narrow = [i for i, shape in enumerate(shapes) if 0 < min(shape) <= CPU_NARROW]
    if len(narrow) >= CPU_FEW or any(max(shapes[i]) > CPU_LARGE for i in narrow):
        return narrow
    return []


def _is_usual(grad: Tensor, left: Tensor, right: Tensor, bias: Tensor | None) -> bool:
    for t in (grad, left, right) if bias is None else (grad, left, right, bias):
        if type(t) is not Tensor or t.dtype is not torch.float32 or t.requires_grad:
            return False
        if not t.is_cpu or t.layout is not torch.strided:
            return False
    shape = grad.shape
    if len(shape) != 2 or (bias is not None and bias.shape != shape[:1]):
        return False
    m, n = shape
    n += bias is not None
    # The C++ kernel reads whole rows of the inverses.
    return (
        left.shape == (m, m)
        and right.shape == (n, n)
        and left.is_contiguous()
        and right.is_contiguous()
    )


def _bias_list(bias_grad: Bias, single: bool, count: int) -> list[Tensor | None]:
    if bias_grad is None:
        return [None] * count
    if isinstance(bias_grad, Tensor) != single:
        raise TypeError(
            f"{OP}: bias_grad must be a tensor for a tensor and a list for a list, got "
            f"{type(bias_grad).__name__}"
        )
    if isinstance(bias_grad, Tensor):
        return [bias_grad]
    if not isinstance(bias_grad, (list, tuple)):
        raise TypeError(
            f"{OP}: bias_grad must be a tensor or a list of tensors and None, got "
            f"{type(bias_grad).__name__}"
        )
    if len(bias_grad) != count:
        raise ValueError(
            f"{OP}: the lists must have the same length, got grad: {count}, bias_grad: {len(bias_grad)}"
        )
    return list(bias_grad)


def _check_item(
    at: str,
    first: Tensor,
    grad: Tensor,
    left: Tensor,
    right: Tensor,
    bias: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """Check one item; return its ``out``, made where it was not given."""
    _checks.check_dtype(OP, f"grad{at}", grad)
    _checks.check_dtype(OP, f"left{at}", left, _checks.STATE_DTYPES)
    _checks.check_dtype(OP, f"right{at}", right, _checks.STATE_DTYPES)
    _checks.check_rank(OP, f"grad{at}", grad, 2, "[m, n]")
    m, n = grad.shape
    form = "grad is [m, n]"
    if bias is not None:
        _checks.check_dtype(OP, f"bias_grad{at}", bias, [grad.dtype])
        _checks.check_shape(OP, f"bias_grad{at}", bias, [m], form)
        n, form = n + 1, "grad is [m, n], and bias_grad one more column"
    _checks.check_shape(OP, f"left{at}", left, [m, m], form)
    _checks.check_shape(OP, f"right{at}", right, [n, n], form)
    tensors = {f"left{at}": left, f"right{at}": right, f"bias_grad{at}": bias}
    here = {"grad" if at == "" else "grad[0]": first, f"grad{at}": grad}
    _checks.check_device(OP, {**here, **tensors})
    dtype = torch.promote_types(torch.promote_types(grad.dtype, left.dtype), right.dtype)
    if out is None:
        return torch.empty(m, n, dtype=dtype, device=grad.device)
    name = f"out{at}"
    _checks.check_dtype(OP, name, out, [dtype])
    _checks.check_shape(
        OP, name, out, [m, n], "as grad" if bias is None else "as grad, and one more column"
    )
    _checks.check_no_self_overlap(OP, name, out)
    _checks.check_device(OP, {f"grad{at}": grad, name: out})
    return out


@operator("precondition", mutates_args=("outs", "dots"))
def _precondition_op(
    outs: Sequence[Tensor],
    dots: Tensor,
    grads: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
) -> None:
    count = range(len(outs))
    _checks.check_no_overlap(
        OP,
        [(f"out[{i}]", outs[i]) for i in count] + [("the inner products", dots)],
        [
            (f"{name}[{i}]", tensor)
            for name, tensors in (
                ("grad", grads),
                ("left", lefts),
                ("right", rights),
                ("bias_grad", biases),
            )
            for i, tensor in enumerate(tensors)
            if tensor is not None
        ],
    )
    # Item by item, so that a list gives what its items give.
    chosen: dict[tuple[str | None, str | None], str] = {}
    places: dict[str, list[int]] = {}
    for i in count:
        if outs[i].numel() == 0:  # an empty product: the reference has nothing to do
            continue
        cpu = _cpu_unsupported(lefts[i], rights[i], outs[i])
        triton = _triton_unsupported(outs[i])
        if (cpu, triton) not in chosen:
            chosen[cpu, triton] = _dispatch.select(OP, outs[i].device, cpu=cpu, triton=triton)
        places.setdefault(chosen[cpu, triton], []).append(i)
    if "cpu" in places and _dispatch.requested_backend() != "cpu":
        if not cpu_serves([outs[i].shape for i in places["cpu"]]):
            del places["cpu"]
    if "triton" in places:
        from grng_kernels.precondition.triton_kernel import supports

        places["triton"] = [i for i in places["triton"] if supports(*outs[i].shape)]
    _run_items(outs, dots, grads, lefts, rights, biases, places)


def _run_items(
    outs: Sequence[Tensor],
    dots: Tensor,
    grads: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    places: dict[str, list[int]],
) -> None:
    """Run the items at ``places`` of a kernel on it, and the rest on the reference."""
    rest = set(range(len(outs)))
    for backend, run in (("cpu", _run_cpu), ("triton", _run_triton)):
        items = places.get(backend, [])
        rest.difference_update(items)
        if not items:
            continue
        all_of_them = len(items) == len(outs)
        columns: tuple[Any, ...] = (outs, grads, lefts, rights, biases)
        mine = columns if all_of_them else [[c[i] for i in items] for c in columns]
        direct = all_of_them and dots.dtype == torch.float32
        values = (
            dots if direct or not len(dots) else dots.new_empty(len(items), dtype=torch.float32)
        )
        run(values, *mine)
        if len(dots) and not direct:
            for k, i in enumerate(items):
                dots[i] = values[k]
    for i in sorted(rest):
        reference.precondition_into(outs[i], grads[i], lefts[i], rights[i], biases[i])
        if len(dots):
            dots[i] = reference.inner_product(outs[i], grads[i], biases[i])


def _run_cpu(
    dots: Tensor,
    outs: Sequence[Tensor],
    grads: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
) -> None:
    # An empty tensor says that there is no bias, and no tensor that there is none at all.
    columns: list[Tensor] = []
    if any(b is not None for b in biases):
        none = torch.empty(0, device="cpu")
        columns = [none if b is None else b for b in biases]
    torch.ops.grng._precondition_.default(outs, dots, grads, lefts, rights, columns)


def _run_triton(
    dots: Tensor,
    outs: Sequence[Tensor],
    grads: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
) -> None:
    from grng_kernels.precondition.triton_kernel import launch

    launch(outs, grads, lefts, rights, bias_grads=biases, dots=dots if len(dots) else None)


@_precondition_op.register_fake
def _(
    outs: Sequence[Tensor],
    dots: Tensor,
    grads: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
) -> None:
    return None


def _cpu_unsupported(left: Tensor, right: Tensor, out: Tensor) -> str | None:
    if out.dtype == torch.float64:
        return "it has no fp64 products"
    if min(out.shape) > CPU_NARROW:
        return f"it serves gradients with a side of at most {CPU_NARROW}"
    if any(t.stride(1) != 1 and t.shape[1] > 1 for t in (left, right)):
        return "it needs inverses whose rows are contiguous"
    return None


def _triton_unsupported(out: Tensor) -> str | None:
    return "it has no fp64 products" if out.dtype == torch.float64 else None
