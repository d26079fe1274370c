# SPDX-License-Identifier: Apache-2.0
"""Every GPU kernel once, on small odd shapes: what compute-sanitizer is to watch.

Run it as ``PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer python benchmarks/sanitize_subset.py``:
without the caching allocator every tensor is an allocation of its own, and a read past it is seen.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

import grng_kernels
from grng_kernels import kalman_update_, kron_factor_update_, precondition, use_backend

# One order per tile size of the Triton kernel, none a multiple of it; the last takes several tiles. Those of
# the second row are aligned.
ORDERS = (23, 61, 131, 8, 48, 136)
# Around the tile of 8 outputs, and on both sides of the 16 that are held in registers; then each tile of the
# Triton kernels.
OUTPUTS = (3, 11, 19)
TRITON_OUTPUTS = (1, 2, 3, 8, 11, 19, 37, 101)
ROWS, PARAMETERS = 37, 1003
# Both tiles of the small side, aligned and not, several splits, and two tiles of each.
WEIGHTS = (
    (5, 67),
    (67, 5),
    (12, 68),
    (68, 12),
    (16, 1100),
    (1100, 16),
    (20, 65),
    (68, 40),
    (101, 130),
)


def kron_factor() -> int:
    """Launch every variant for every input type, one by one and together; return how many calls."""
    calls = 0
    for bias in (False, True):
        factors, xs = [], []
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for width in ORDERS:
                xs.append(torch.ones(ROWS, width, device="cuda", dtype=dtype))
                factors.append(torch.eye(width + bias, device="cuda"))
                kron_factor_update_(factors[-1], xs[-1], decay=0.9, bias=bias)
                calls += 1
        kron_factor_update_(factors, xs, decay=0.9, bias=bias)
        calls += 1
    return calls


def kron_factor_conv2d() -> int:
    """Launch every variant of the convolution for every input type; return how many calls."""
    from grng_kernels.kron_factor.geometry import Conv2dGeometry
    from grng_kernels.kron_factor.triton_conv2d import launch_conv2d

    geometry = Conv2dGeometry((3, 2), stride=(2, 1), padding=(1, 1), dilation=(1, 2))
    calls = 0
    for bias in (False, True):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            xs = [torch.ones(2, c, 7, 9, device="cuda", dtype=dtype) for c in (1, 7, 13)]
            factors = [torch.eye(6 * x.shape[1] + bias, device="cuda")[None] for x in xs]
            info = torch.zeros(len(xs), dtype=torch.int32, device="cuda")
            launch_conv2d(
                factors, xs, info, geometry=geometry, decay=0.9, scales=[0.1] * len(xs), bias=bias
            )
            calls += 1
    return calls


def kalman_update() -> int:
    """Launch both passes in every form; return how many calls that were."""
    calls = 0
    for outputs in OUTPUTS:
        for form in ("fdekf", "vdekf"):
            blocks: list[list[Tensor]] = [
                [torch.zeros(d, device="cuda"), torch.ones(d, device="cuda")]
                for d in (PARAMETERS, 1)
            ]
            mean, variance = ([b[i] for b in blocks] for i in (0, 1))
            jacobian = [torch.ones(outputs, len(m), device="cuda") for m in mean]
            kalman_update_(
                mean, variance, jacobian, torch.ones(outputs, device="cuda"), 0.5, form=form
            )
            calls += 1
    return calls


def kalman_update_triton() -> int:
    """The same in Triton, for every type of the Jacobian, aligned and not; return how many calls."""
    calls = 0
    for outputs in TRITON_OUTPUTS:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for form, rho in (("fdekf", 0.0), ("vdekf", 0.1)):
                sizes = (PARAMETERS, 1, 1024)
                mean = [torch.zeros(d, device="cuda") for d in sizes]
                variance = [torch.ones(d, device="cuda") for d in sizes]
                jacobian = [torch.ones(outputs, d, device="cuda", dtype=dtype) for d in sizes]
                innovation = torch.ones(outputs, device="cuda")
                kalman_update_(mean, variance, jacobian, innovation, 0.5, form=form, rho=rho)
                calls += 1
    return calls


def two_sided() -> int:
    """Launch every variant of the two-sided product, with bias and inner products; return how many items."""
    from grng_kernels.precondition.triton_kernel import launch

    items = 0
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        grads = [torch.ones(shape, device="cuda", dtype=dtype) for shape in WEIGHTS]
        lefts = [torch.eye(m, device="cuda") for m, _ in WEIGHTS]
        rights = [torch.eye(n, device="cuda") for _, n in WEIGHTS]
        outs = precondition(grads, lefts, rights)
        biases = [grad[:, -1].contiguous() for grad in grads]
        dots = torch.empty(len(grads), device="cuda")
        launch(outs, [g[:, :-1].contiguous() for g in grads], lefts, rights, biases, dots)
        items += 2 * len(grads)
    return items


def damped_inverse_small() -> int:
    """Invert small matrices of every order and type in one list, and some alone; return how many calls."""
    from grng_kernels.damped_inverse.cuda_small import MAX_N, launch
    from grng_kernels.damped_inverse.entry import Entry

    def entry(n: int, dtype: torch.dtype, damping: float | None) -> Entry:
        factor = torch.eye(n, device="cuda", dtype=dtype).repeat(2, 1, 1)
        # A transposed one, whose last element ends its allocation.
        return Entry(
            factor.mT,
            None if damping is None else torch.full((2,), damping, device="cuda"),
            torch.zeros(2, n, device="cuda"),
            torch.empty(2, n, n, device="cuda"),
            *(torch.empty(2, device="cuda") for _ in range(3)),
            torch.empty(2, dtype=torch.int32, device="cuda"),
        )

    calls = 0
    for damping in (None, 0.5):
        rho = 0.01 if damping is None else None
        entries = [
            entry(n, dtype, damping)
            for dtype in (torch.bfloat16, torch.float16, torch.float32)
            for n in range(1, MAX_N + 1)
        ]
        launch(entries, rho=rho)
        for one in entries[:: MAX_N // 8 - 1]:
            launch([one], rho=rho)
            calls += 1
        calls += 1
    return calls


def main() -> int:
    """Run what is there; the last line counts it."""
    done = []
    for backend, work in (
        ("triton", kron_factor),
        ("triton", two_sided),
        ("triton", kron_factor_conv2d),
        ("cuda", kalman_update),
        ("triton", kalman_update_triton),
        ("cuda", damped_inverse_small),
    ):
        status = grng_kernels.backends()[backend]
        if not status.available:
            done.append(f"{work.__name__} left out: {status.reason}")
            continue
        with use_backend(backend):
            done.append(f"{work.__name__} {work()} calls")
    torch.cuda.synchronize()
    print("; ".join(done))
    return 0


if __name__ == "__main__":
    sys.exit(main())
