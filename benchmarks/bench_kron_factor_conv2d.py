# SPDX-License-Identifier: Apache-2.0
"""Input factor of a convolution, ``A <- decay·A + scale·PᵀP``, with ``P`` the patches of the input.

The arithmetic that is counted is that of the triangle of the product of patches, ``rows·N·(N + 1)``, and
the memory traffic is one reading of the input and one update of the factor. A tap distance is shared by
many pairs of taps, so an algorithm that sums each distance once needs less arithmetic than that: a share
of the roofline above 1 shows that work was saved, not that the machine was faster than measured.

Warm only: the patches of all but the smallest shapes leave no cache anyhow, and a call takes much longer
than reading its input.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from harness import cli
from harness.case import Bench, Case, Contender, Plan, Role, our_backend, relative_error
from harness.memory import extra_bytes, in_fresh_process
from shapes import Convolution, chosen_convolutions
from torch import Tensor
from torch.nn import functional

from grng_kernels import kron_factor_conv2d_update_, use_backend

DECAY = 0.95
SCALE = 1 - DECAY
# Products are accumulated in fp32 for every input type: sums rounded to 16 bits are red.
LIMIT = 5e-5
# A call takes up to a second: so `make bench` stays short.
MAX_S = 2.0
# For larger factors the reference takes seconds: there the rivals alone are the comparison.
REFERENCE_ORDER = 1200
# Each contender's memory needs a process of its own, which takes seconds: one shape stands for all.
MEMORY_SHAPE = "3x3 28x28x128"
TINY = Convolution("tiny", 1, 2, 4, 3, padding=1)
Update = Callable[[Tensor, Tensor, Convolution], object]


def _ours(state: Tensor, x: Tensor, c: Convolution) -> object:
    return kron_factor_conv2d_update_(
        state, x, kernel_size=c.kernel, stride=c.stride, padding=c.padding, decay=DECAY
    )


def _reference(state: Tensor, x: Tensor, c: Convolution) -> object:
    with use_backend("reference"):
        return _ours(state, x, c)


def _unfolded(x: Tensor, c: Convolution) -> Tensor:
    columns = functional.unfold(x, c.kernel, padding=c.padding, stride=c.stride)
    return columns.mT.flatten(0, 1)


def _unfold_addmm(state: Tensor, x: Tensor, c: Convolution) -> object:
    patches = _unfolded(x.to(state.dtype), c)
    scale = SCALE / patches.shape[0]
    return torch.addmm(state, patches.mT, patches, beta=DECAY, alpha=scale, out=state)


def _double_unfold(state: Tensor, x: Tensor, c: Convolution) -> object:
    """Patches and factor the way kfac-pytorch has them: two slidings, a product, symmetrised."""
    x = functional.pad(x.to(state.dtype), [c.padding] * 4)
    windows = x.unfold(2, c.kernel, c.stride).unfold(3, c.kernel, c.stride)
    # [B, C, O1, O2, K1, K2]: positions first, so that a patch is a row.
    patches = windows.transpose(1, 2).transpose(2, 3).contiguous().view(-1, c.order)
    product = patches.t() @ (patches / patches.shape[0])
    product = (product + product.t()) / 2
    return state.mul_(DECAY).add_(product, alpha=SCALE)


UPDATES: dict[str, tuple[str, Role, Update]] = {
    "grng": ("", "ours", _ours),
    "grng reference": ("reference", "yardstick", _reference),
    "unfold, addmm out=": ("torch", "rival", _unfold_addmm),
    "double unfold": ("torch", "rival", _double_unfold),
}


def _data(c: Convolution, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.empty(c.batch, c.channels, c.size, c.size, device=device)
    return x.normal_(generator=generator).to(dtype)


def extra_memory(name: str, c: Convolution, dtype_name: str, device_name: str) -> int:
    """Return the bytes that one update takes beside input and factor; for a fresh process.

    Args:
        name: Of the contender.
        c: Shape.
        dtype_name: Of the input.
        device_name: Where.
    """
    device, dtype = torch.device(device_name), getattr(torch, dtype_name)
    update = UPDATES[name][2]
    update(torch.zeros(TINY.order, TINY.order, device=device), _data(TINY, dtype, device), TINY)
    # Filled, not only reserved: their pages belong to the arguments.
    state = torch.empty(c.order, c.order, device=device).fill_(0.0)
    x = _data(c, dtype, device)
    return extra_bytes(lambda: update(state, x, c), device)


def _memory_note(name: str, c: Convolution, x: Tensor) -> str:
    dtype_name = str(x.dtype).removeprefix("torch.")
    where = f"{name}, {c.name} {dtype_name}"
    try:
        extra = in_fresh_process(extra_memory, name, c, dtype_name, x.device.type)
    except Exception as error:
        return f"{where}: extra memory not measured ({type(error).__name__})"
    return f"{where}: extra memory {extra / 1e6:.1f} MB, {extra / x.nbytes:.0%} of x"


def _contender(name: str, c: Convolution, x: Tensor, start: Tensor, measure: bool) -> Contender:
    backend, role, update = UPDATES[name]
    notes: tuple[str, ...] = ()
    if role == "ours":
        backend, notes = our_backend({"cpu": "cpu"}, x.device)
    if measure and role != "yardstick":
        notes = (*notes, _memory_note(name, c, x))
    state = start.clone()

    def call() -> list[Tensor]:
        update(state, x, c)
        return [state]

    def reset() -> None:
        state.copy_(start)

    return Contender(name, backend, role, call, reset, notes)


def _case(plan: Plan, c: Convolution, dtype_name: str) -> Case:
    dtype = getattr(torch, dtype_name)
    x = _data(c, dtype, plan.device)
    # Old content as large as what is added: neither hides an error of the other.
    start = SCALE * torch.eye(c.order, device=plan.device)
    patches = _unfolded(x.double(), c)
    expected = torch.addmm(
        start.double(), patches.mT, patches, beta=DECAY, alpha=SCALE / patches.shape[0]
    )
    contenders = [_contender(name, c, x, start, c.name == MEMORY_SHAPE) for name in UPDATES]
    if contenders[0].backend == "reference" or c.order > REFERENCE_ORDER:
        contenders = [k for k in contenders if k.role != "yardstick"]
    return Case(
        op="kron_factor_conv2d",
        shape=c.name,
        dims={
            "batch": c.batch,
            "channels": c.channels,
            "size": c.size,
            "kernel": c.kernel,
            "stride": c.stride,
            "padding": c.padding,
            "rows": c.rows,
            "order": c.order,
            "count": c.count,
        },
        dtype=dtype_name,
        bytes=float(x.nbytes) + 8.0 * c.order**2,
        flops=float(c.rows) * c.order * (c.order + 1),
        error=relative_error([expected]),
        limit=LIMIT,
        contenders=contenders,
        states=("warm",),
        max_s=MAX_S,
    )


def cases(plan: Plan) -> Iterator[Case]:
    """Yield every case of the plan; ``sizes`` are channels of a 3 x 3 kernel on 14 x 14."""
    single = plan.sizes or ((4, 16) if plan.quick else ())
    batch = 2 if plan.quick else 16
    for dtype in plan.dtypes or ("float32",):
        default = () if plan.quick else ("resnet50-convs",)
        for group in chosen_convolutions(plan.shapes, default):
            for c in group.convolutions:
                yield _case(plan, c, dtype)
        for channels in single:
            c = Convolution(f"3x3 14x14x{channels}", batch, channels, 14, 3, padding=1)
            yield _case(plan, c, dtype)


BENCH = Bench(
    "kron_factor_conv2d",
    "kron_factor_conv2d_update_: moving average of the input factor of a convolution",
    cases,
)

if __name__ == "__main__":
    sys.exit(cli.main(BENCH))
