# SPDX-License-Identifier: Apache-2.0
"""What a backend of ``damped_inverse`` is given: matrices of one order, and where the results go."""

from typing import NamedTuple

from torch import Tensor


class Entry(NamedTuple):
    """``L`` matrices of order ``N``; everything a backend reads and writes about them.

    Attributes:
        factor: ``[L, N, N]``, any strides, fp32, bf16, fp16 or fp64. Read only.
        damping: ``[L]`` contiguous, dtype of ``inverse``: the one asked for, or None with ``rho``.
        vector: ``[L, N]`` contiguous, dtype of ``inverse``: start of the norm estimate, all zero for a cold
            start. Replaced by the new one where ``info`` is 0, and untouched elsewhere.
        inverse: ``[L, N, N]`` contiguous, fp32 (fp64 for fp64). Written, both triangles from one value.
        used_damping: ``[L]``, dtype of ``inverse``. Written.
        spectral_norm: ``[L]``, dtype of ``inverse``. Written.
        residual: ``[L]``, dtype of ``inverse``. Written.
        info: ``[L]``, int32. Written.
    """

    factor: Tensor
    damping: Tensor | None
    vector: Tensor
    inverse: Tensor
    used_damping: Tensor
    spectral_norm: Tensor
    residual: Tensor
    info: Tensor
