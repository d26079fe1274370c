# SPDX-License-Identifier: Apache-2.0
"""The C x C stage between the two streaming passes: from ``H diag(p) Hᵀ`` to what the gain needs.

Both passes and this stage share one form for all variants. The second pass computes, per parameter,
``mean += p·hᵀ direction`` and ``t = p·‖whitener h‖²``, then ``p·(1 − t)`` (fdekf) or ``p/(1 + t)`` (vdekf).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from grng_kernels.info import Info
from grng_kernels.kalman_update.reference import softmax_root
from grng_kernels.kalman_update.regularization import regularised_noise, regularised_root


def largest_magnitude(tensors: Sequence[Tensor]) -> Tensor:
    """Return the largest absolute value in all tensors (fp64, 0-d), NaN where one is NaN."""
    # One pass without a temporary that propagates NaN; the infinity norm is ten times slower on a CPU.
    extremes = [torch.stack(torch.aminmax(t)) for t in tensors if t.numel()]
    return torch.cat(extremes).abs().amax().double()


def _finite(*tensors: Tensor) -> Tensor:
    """``all_finite`` for small tensors: one copy costs less than a call for each."""
    return torch.isfinite(torch.cat([t.reshape(-1) for t in tensors])).all()


def gain_from_gram(
    gram: Tensor,
    plain_gram: Tensor | None,
    innovation: Tensor,
    noise: Tensor,
    *,
    form: str,
    likelihood: str,
    rho: float,
    regularization: str,
    mean_max: Tensor,
    variance_max: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(direction [C], whitener [k, C], info)``: fp32, fp32, int32.

    ``gram`` is ``M = H diag(p) Hᵀ`` in fp64, and so is the arithmetic: C is small, and S can be far worse
    conditioned than fp32 resolves. ``plain_gram`` is ``H Hᵀ``, needed where ``rho > 0``. With
    ``S = M + R = L Lᵀ`` (Gaussian) ``direction = S⁻¹ e`` and ``whitener = L⁻¹``, or ``L_R⁻¹`` with
    ``R = L_R L_Rᵀ`` for vdekf; the information forms are those of ``reference.py``. No host sync: a failed
    factorisation is reported through ``info``.

    The second pass writes as it goes, so whether its results stay finite is decided here, from the largest
    magnitudes of the state (fp64, 0-d): for a direction ``u``, ``(h_iᵀu)² p_i <= uᵀ M u``, so every step is
    at most ``√(p_i · uᵀMu)``. Variances saturate.
    """
    e = innovation.double()
    finite = _finite(innovation, noise, mean_max, variance_max) & ~gram.isnan().any()
    gram_finite = _finite(gram) if plain_gram is None else _finite(gram, plain_gram)
    noise = noise.double()
    failed = torch.zeros((), dtype=torch.bool, device=e.device)
    if likelihood == "gaussian":
        if plain_gram is not None:
            noise, status = regularised_noise(noise, plain_gram, rho, regularization)
            failed = status != 0
        eye = torch.eye(len(e), dtype=torch.float64, device=e.device)
        lower, status = torch.linalg.cholesky_ex(gram + noise)
        direction = torch.cholesky_solve(e.unsqueeze(-1), lower).squeeze(-1)
        noise_lower, noise_status = torch.linalg.cholesky_ex(noise)
        failed = failed | (status != 0) | (noise_status != 0)
        factor, right = (lower, eye) if form == "fdekf" else (noise_lower, eye)
    else:
        root = softmax_root(noise) if likelihood == "categorical" else noise
        if plain_gram is not None:
            root, e, status = regularised_root(root, e, plain_gram, rho, regularization)
            failed = status != 0
        eye = torch.eye(root.shape[1], dtype=torch.float64, device=e.device)
        lower, status = torch.linalg.cholesky_ex(eye + root.mT @ gram @ root)
        inner = torch.cholesky_solve((root.mT @ (gram @ e)).unsqueeze(-1), lower)
        direction = e - (root @ inner).squeeze(-1)
        failed = failed | (status != 0)
        factor, right = (lower, root.mT) if form == "fdekf" else (eye, root.mT)
    whitener = torch.linalg.solve_triangular(factor, right, upper=False).float()
    # Rounding can leave this below zero where it is nearly nothing.
    step = (variance_max * (direction @ (gram @ direction)).clamp(min=0)).sqrt()
    direction = direction.float()
    within = mean_max + step <= torch.finfo(torch.float32).max
    in_range = gram_finite & _finite(direction, whitener) & within
    info = torch.where(failed, int(Info.NOT_CONVERGED), int(Info.OK))
    # A gram that overflowed fails the factorisation too, so it is asked for last.
    info = torch.where(in_range | (failed & gram_finite), info, int(Info.OVERFLOW))
    info = torch.where(finite, info, int(Info.NONFINITE_INPUT)).to(torch.int32)
    return direction, whitener.contiguous(), info
