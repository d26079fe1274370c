# SPDX-License-Identifier: Apache-2.0
"""The C++ kernel of ``kalman_update_``, for CPU tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

# The C x C stage of the kernel is for at most so many outputs; beyond, torch factorises.
MAX_OUTPUTS = 256
_LIKELIHOODS = {"gaussian": 0, "categorical": 1, "fisher": 2}


def unsupported(
    means: Sequence[Tensor], variances: Sequence[Tensor], innovation: Tensor
) -> str | None:
    """Return why the streaming kernels (C++ and CUDA) cannot serve a call, or None."""
    if innovation.dtype != torch.float32:
        return "it computes in fp32 only"
    if not all(t.is_contiguous() for t in (*means, *variances)):
        return "it needs contiguous mean and variance"
    return None


def call(
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    jacobians: Sequence[Tensor],
    innovation: Tensor,
    noise: float | Tensor,
    *,
    form: str,
    likelihood: str,
    forgetting: float,
    process_noise: float,
    rho: float,
    regularization: str,
    inputs: Sequence[Tensor] = (),
    factored: Sequence[int] = (),
) -> Tensor:
    """Update in place and return info; all arguments as in :func:`~grng_kernels.kalman_update_`.

    ``jacobians`` has the outputs' side of a factored block; ``inputs`` those of the blocks ``factored``.

    Raises:
        RuntimeError: A shape, dtype or layout that the kernel does not serve, tensors that overlap (both
            found before anything is written, and named ``grng: ...``), or no memory.
    """
    info = torch.empty((), dtype=torch.int32, device="cpu")
    given, scale = ([noise], 0.0) if isinstance(noise, Tensor) else ([], float(noise))
    torch.ops.grng._kalman_update_.default(
        means,
        variances,
        info,
        [*jacobians, *inputs],
        innovation,
        given,
        scale,
        _LIKELIHOODS[likelihood],
        form == "vdekf",
        forgetting,
        process_noise,
        rho,
        regularization == "noise",
        factored,
    )
    return info
