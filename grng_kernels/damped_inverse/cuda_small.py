# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernel for matrices of small order: one launch for any list of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from grng_kernels.damped_inverse.entry import Entry

# A matrix lives in the registers of at most four warps.
MAX_N = 64


def launch(entries: Sequence[Entry], *, rho: float | None) -> None:
    """Fill in the results of entries on one CUDA device, with no host sync; can be captured in a graph.

    One launch for 314 entries, of any number of matrices each and of mixed orders. What it is to do
    travels in the parameters of the kernel, so nothing is copied to the device before it.

    Args:
        entries: Of order at most MAX_N, not fp64, all with ``damping`` or none.
        rho: Decides the damping where the entries have none.
    """
    if not entries:
        return
    dampings: list[Tensor] = [e.damping for e in entries if e.damping is not None]
    torch.ops.grng._damped_inverse_small_cuda(
        [e.inverse for e in entries],
        [e.vector for e in entries],
        [e.used_damping for e in entries],
        [e.spectral_norm for e in entries],
        [e.residual for e in entries],
        [e.info for e in entries],
        [e.factor for e in entries],
        dampings,
        0.0 if rho is None else math.sqrt(rho),
    )


def unsupported(entry: Entry, method: str) -> str | None:
    """Return why the kernel cannot serve an entry, or None."""
    if entry.inverse.dtype == torch.float64:
        return "it computes in fp32"
    if entry.factor.shape[-1] > MAX_N:
        return f"it serves orders up to {MAX_N}"
    if method == "newton_schulz":
        return "it inverts by elimination"
    return None


def run(entries: Sequence[Entry], rho: float | None, method: str) -> None:
    """Fill in the results of entries that are supported."""
    launch(entries, rho=rho)
