# SPDX-License-Identifier: Apache-2.0
"""Which GPU kernel serves a Kalman update, and the update on the Triton one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from grng_kernels.kalman_update.innovation import gain_from_gram

# The largest grid of the CUDA kernel: 65535 tiles of 8 x 8 outputs.
MAX_CUDA_OUTPUTS = 2880
# The largest tile of the Triton kernels.
MAX_TRITON_OUTPUTS = 128
# Up to so many the CUDA kernel keeps a column in registers. Beyond, it reads H again for every pair of tiles
# and every row of the whitener, where the Triton kernels use tensor cores.
FEW_OUTPUTS = 16


def unsupported(
    problem: str | None, jacobians: Sequence[Tensor], outputs: int
) -> dict[str, str | None]:
    """Return why each of the GPU backends cannot serve a call, or None, the one to prefer first.

    Triton comes first for more than 16 outputs, and for a Jacobian in 16 bits, of which the CUDA kernel
    makes a copy in fp32. By prediction, not by measurement (``benchmarks/predict.py``). For few outputs in
    fp32 the two are within a factor of two in the model, on terms that it knows least about: to be measured.
    """

    def at_most(limit: int) -> str | None:
        return f"it serves at most {limit} outputs" if outputs > limit else None

    cuda = {"cuda": problem or at_most(MAX_CUDA_OUTPUTS)}
    triton = {"triton": problem or at_most(MAX_TRITON_OUTPUTS)}
    if outputs > FEW_OUTPUTS or any(h.dtype != torch.float32 for h in jacobians):
        return {**triton, **cuda}
    return {**cuda, **triton}


def run_triton(
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    jacobians: Sequence[Tensor],
    innovation: Tensor,
    noise: Tensor,
    *,
    form: str,
    likelihood: str,
    forgetting: float,
    process_noise: float,
    rho: float,
    regularization: str,
) -> Tensor:
    """Update in place and return info; all arguments as in the operator. No host sync.

    Four launches, three up to 16 outputs, and those of torch in the C x C stage.
    """
    from grng_kernels.kalman_update.triton_kernel import Passes

    # Whether a graph is being captured is asked of the current device.
    with torch.cuda.device_of(innovation):
        passes = Passes(means, variances, jacobians, innovation.shape[0])
        grams = passes.grams(plain=rho > 0)
        direction, whitener, info = gain_from_gram(
            grams.weighted,
            grams.plain,
            innovation,
            noise,
            form=form,
            likelihood=likelihood,
            rho=rho,
            regularization=regularization,
            mean_max=grams.mean_max,
            variance_max=grams.variance_max,
        )
        passes.apply(
            direction.contiguous(),
            whitener,
            info,
            variational=form == "vdekf",
            # The inverse of a Cholesky factor; the root of an information may be any matrix.
            triangular=likelihood == "gaussian",
            forgetting=forgetting,
            process_noise=process_noise,
        )
    return info
