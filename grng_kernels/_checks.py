# SPDX-License-Identifier: Apache-2.0
"""Argument checks shared by the ops. Each error names the op, the argument, what was expected and got."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STATE_DTYPES = (torch.float32, torch.float64)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def as_list(op: str, name: str, value: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors of a single-or-list argument.

    Raises:
        TypeError: ``value`` is neither a tensor nor a sequence of tensors.
    """
    if isinstance(value, Tensor):
        return [value]
    if not isinstance(value, (list, tuple)):
        raise TypeError(
            f"{op}: {name} must be a tensor or a list of tensors, got {type(value).__name__}"
        )
    for item in value:
        if not isinstance(item, Tensor):
            raise TypeError(
                f"{op}: {name} must be a tensor or a list of tensors, got a list with {type(item).__name__}"
            )
    return list(value)


def check_same_form(op: str, **arguments: Tensor | Sequence[Tensor]) -> None:
    """Check that the arguments are all tensors or all lists.

    Raises:
        TypeError: Some are tensors and some are not; the message says which.
    """
    if len({isinstance(value, Tensor) for value in arguments.values()}) > 1:
        got = ", ".join(
            f"{name}: {'a tensor' if isinstance(value, Tensor) else 'a list'}"
            for name, value in arguments.items()
        )
        *names, last = arguments
        raise TypeError(
            f"{op}: {', '.join(names)} and {last} must all be tensors or all be lists, got {got}"
        )


def check_lengths(op: str, **lists: Sequence[Tensor]) -> None:
    """Check that the lists of a grouped call have one entry per item.

    Raises:
        ValueError: The lengths differ.
    """
    lengths = {name: len(items) for name, items in lists.items()}
    if len(set(lengths.values())) > 1:
        got = ", ".join(f"{name}: {n}" for name, n in lengths.items())
        raise ValueError(f"{op}: the lists must have the same length, got {got}")


def check_dtype(
    op: str, name: str, tensor: Tensor, dtypes: Sequence[torch.dtype] = FLOAT_DTYPES
) -> None:
    """Check that a tensor is dense and of one of the accepted dtypes.

    Raises:
        TypeError: No tensor, or any other dtype or layout.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(
            f"{op}: {name} must be a dense (strided) tensor, got layout {tensor.layout}"
        )
    if tensor.dtype not in dtypes:
        raise TypeError(
            f"{op}: {name} must have dtype {_names(dtypes)}, got {_names([tensor.dtype])}"
        )


def check_shape(op: str, name: str, tensor: Tensor, shape: Sequence[int], why: str = "") -> None:
    """Check the exact shape of a tensor; ``why`` holds no size, which the compiler would take as fixed.

    Raises:
        ValueError: Any other shape.
    """
    if tuple(tensor.shape) != tuple(shape):
        reason = f" ({why})" if why else ""
        raise ValueError(
            f"{op}: {name} must have shape {list(shape)}{reason}, got {list(tensor.shape)}"
        )


def check_rank(op: str, name: str, tensor: Tensor, rank: int, form: str) -> None:
    """Check the number of dimensions of a tensor; ``form`` is how the message writes the shape.

    Raises:
        ValueError: Any other number of dimensions.
    """
    if tensor.dim() != rank:
        raise ValueError(f"{op}: {name} must be {form}, got shape {list(tensor.shape)}")


def check_square(op: str, name: str, tensor: Tensor) -> None:
    """Check that a tensor is one square matrix.

    Raises:
        ValueError: Any other shape.
    """
    if tensor.dim() != 2 or tensor.shape[0] != tensor.shape[1]:
        raise ValueError(f"{op}: {name} must be square [N, N], got shape {list(tensor.shape)}")


def check_device(op: str, tensors: dict[str, Tensor | None]) -> None:
    """Check that all tensors of a call are on one device.

    Raises:
        ValueError: They are not; the message names the first two that differ.
    """
    first: tuple[str, torch.device] | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if first is None:
            first = (name, tensor.device)
        elif tensor.device != first[1]:
            raise ValueError(
                f"{op}: all tensors must be on one device, got {first[0]} on {first[1]} "
                f"and {name} on {tensor.device}"
            )


def check_scalar(
    op: str,
    name: str,
    value: float | Tensor,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
) -> None:
    """Check a scalar argument: a finite Python number in range, or a 0-d floating-point tensor.

    The value of a tensor is not read here: that would make the host wait for the device.

    Raises:
        TypeError: Neither a number nor a floating-point tensor.
        ValueError: Out of range, NaN, or a tensor with dimensions.
    """
    if isinstance(value, Tensor):
        check_dtype(op, name, value)
        if value.dim() != 0:
            raise ValueError(
                f"{op}: {name} must be a number or a 0-d tensor, got {list(value.shape)}"
            )
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    low_ok = value > low if open_low else value >= low
    # Comparisons, not math.isfinite: the compiler cannot trace that on a symbolic number.
    if not (low_ok and value <= high and -math.inf < value < math.inf):
        left = "(" if open_low or low == -math.inf else "["
        right = ")" if high == math.inf else "]"
        raise ValueError(
            f"{op}: {name} must be finite and in {left}{low}, {high}{right}, got {value}"
        )
    largest, smallest = torch.finfo(torch.float32).max, 2.0**-149
    if not -largest <= value <= largest or (open_low and value - low < smallest):
        raise ValueError(
            f"{op}: {name} must stay finite and in its range when rounded to fp32, got {value}"
        )


def check_flag(op: str, name: str, value: bool) -> None:
    """Check an argument that is true or false.

    Raises:
        TypeError: It is something else.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be True or False, got {value!r}")


def check_choice(op: str, name: str, value: str, choices: Sequence[str]) -> None:
    """Check an argument that names one of a few things.

    Raises:
        ValueError: It names something else.
    """
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(choices)}, got {value!r}")


def check_no_self_overlap(op: str, name: str, tensor: Tensor) -> None:
    """Check that no two elements of an output share memory.

    Raises:
        ValueError: Two may: the tensor is expanded, or a view with strides that interleave.
    """
    if tensor.is_contiguous():
        return
    reach = 1
    dims = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, size in sorted(d for d in dims if d[1] > 1):
        if stride < reach:
            raise ValueError(
                f"{op}: {name} is written in place and must not overlap itself, got strides "
                f"{list(tensor.stride())} for shape {list(tensor.shape)}"
            )
        reach += (size - 1) * stride


def _extent(tensor: Tensor) -> tuple[int, int]:
    start = tensor.data_ptr()
    if tensor.numel() == 0:
        return start, start
    steps = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (steps + 1) * tensor.element_size()


def check_no_overlap(
    op: str, outputs: Sequence[tuple[str, Tensor]], inputs: Sequence[tuple[str, Tensor]]
) -> None:
    """Check that outputs share memory neither with each other nor with an input.

    Views that interleave in one piece of memory count as overlapping. Called inside the registered
    operators, where tensors are real: it reads addresses.

    Raises:
        ValueError: Two of them overlap.
    """
    spans = sorted(
        [(*_extent(t), True, name) for name, t in outputs]
        + [(*_extent(t), False, name) for name, t in inputs]
    )
    reach = {True: (0, ""), False: (0, "")}
    for start, end, written, name in spans:
        if start == end:
            continue
        for other_written in (True, False) if written else (True,):
            other_end, other = reach[other_written]
            if start < other_end:
                raise ValueError(f"{op}: {name} and {other} overlap in memory, and one is written")
        if end > reach[written][0]:
            reach[written] = (end, name)
