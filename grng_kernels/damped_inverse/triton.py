# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of ``damped_inverse``: which of them serves which matrices."""

from collections.abc import Sequence

import torch

from grng_kernels.damped_inverse.entry import Entry
from grng_kernels.damped_inverse.method_table import choose

# The largest order that the kernels for large matrices were written and compiled for.
MAX_ORDER = 11008


def unsupported(entry: Entry) -> str | None:
    """Return why the kernels cannot serve an entry, or None."""
    if entry.inverse.dtype == torch.float64:
        return "it computes in fp32"
    if entry.factor.shape[-1] > MAX_ORDER:
        return f"it serves orders up to {MAX_ORDER}"
    return None


def run(entries: Sequence[Entry], rho: float | None, method: str) -> None:
    """Fill in the results of entries that are supported."""
    # Not above: importing these imports Triton.
    from grng_kernels.damped_inverse import triton_direct, triton_newton_schulz, triton_small

    small: list[Entry] = []
    large: list[Entry] = []
    for entry in entries:
        held = triton_small.supports(entry.factor.shape[-1], method)
        (small if held else large).append(entry)
    if small:
        triton_small.launch(small, rho=rho, method=method)
    if not large:
        return
    if method == "auto":
        count = sum(e.factor.shape[0] for e in large)
        method = choose(max(e.factor.shape[-1] for e in large), count, rho)
    launch = triton_newton_schulz.launch if method == "newton_schulz" else triton_direct.launch
    launch(large, rho=rho)
