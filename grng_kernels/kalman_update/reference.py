# SPDX-License-Identifier: Apache-2.0
"""The diagonal Kalman update as its equations read: the gain is formed, nothing is fused."""

import torch
from torch import Tensor

from grng_kernels._precision import matmul
from grng_kernels.info import Info
from grng_kernels.kalman_update.regularization import regularised_noise, regularised_root


def softmax_root(probabilities: Tensor) -> Tensor:
    """Return ``T`` with ``T Tᵀ = diag(q) − q qᵀ``, the covariance of a one-hot label, ``[C, C]``.

    Several observations at once, ``q [N, C]``, give the block-diagonal ``[N·C, N·C]``.
    """
    root = probabilities.sqrt()
    blocks = torch.diag_embed(root) - probabilities.unsqueeze(-1) * root.unsqueeze(-2)
    return blocks if blocks.dim() == 2 else torch.block_diag(*blocks)


def kalman_update(
    mean: Tensor,
    variance: Tensor,
    jacobian: Tensor,
    innovation: Tensor,
    noise: Tensor,
    *,
    form: str,
    likelihood: str,
    forgetting: float,
    process_noise: float,
    rho: float = 0.0,
    regularization: str = "gradient",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(mean, variance, info)`` after one observation, in the dtype of ``mean``.

    With ``p = variance [d]``, ``H = jacobian [C, d]``, ``e = innovation [C]`` and ``R = noise``::

        S = H diag(p) Hᵀ + R          K = diag(p) Hᵀ S⁻¹          mean <- mean + K e
        fdekf:  p_i <- p_i (1 − p_i h_iᵀ S⁻¹ h_i)                 h_i = column i of H
        vdekf:  1/p_i <- 1/p_i + h_iᵀ R⁻¹ h_i
        then    p_i <- p_i / forgetting + process_noise           (prediction for the next observation)

    For ``likelihood="fisher"`` ``noise`` holds ``T [C, k]``, whose ``T Tᵀ`` is the information of the outputs
    (there ``R⁻¹``, but it may be singular), and ``innovation`` the score ``v`` (there ``R⁻¹ e``). With
    ``M = H diag(p) Hᵀ`` nothing is inverted but a matrix that is ``>= I``::

        K e = diag(p) Hᵀ (v − T (I + Tᵀ M T)⁻¹ Tᵀ M v)
        fdekf:  p_i <- p_i (1 − p_i ‖L⁻¹ Tᵀ h_i‖²),  L Lᵀ = I + Tᵀ M T        vdekf:  1/p_i += ‖Tᵀ h_i‖²

    ``"categorical"`` is this with ``T Tᵀ = diag(q) − q qᵀ`` of the probabilities ``q``, given as ``noise``,
    and ``v = innovation``. ``rho > 0`` changes ``R``, or ``T`` and ``v``, first: see ``regularization.py``.
    """
    p, h, e = variance, jacobian, innovation
    weighted = h * p  # [C, d]
    gram = matmul(weighted, h.mT)
    plain_gram = matmul(h, h.mT) if rho > 0 else gram
    status = torch.zeros((), dtype=torch.int32, device=mean.device)
    if likelihood == "gaussian":
        noise_in_force = noise
        if rho > 0:
            noise_in_force, status = regularised_noise(noise, plain_gram, rho, regularization)
        lower, status_1 = torch.linalg.cholesky_ex(gram + noise_in_force)
        noise_lower, status_2 = torch.linalg.cholesky_ex(noise_in_force)
        direction = torch.cholesky_solve(e.unsqueeze(-1), lower).squeeze(-1)
        whitened = torch.linalg.solve_triangular(lower, h, upper=False)
        information = torch.linalg.solve_triangular(noise_lower, h, upper=False)
        failed = (status != 0) | (status_1 != 0) | (status_2 != 0)
    else:
        root = softmax_root(noise) if likelihood == "categorical" else noise
        if rho > 0:
            root, e, status = regularised_root(root, e, plain_gram, rho, regularization)
        eye = torch.eye(root.shape[1], dtype=e.dtype, device=e.device)
        lower, status_1 = torch.linalg.cholesky_ex(eye + matmul(matmul(root.mT, gram), root))
        me = matmul(gram, e.unsqueeze(-1))
        inner = torch.cholesky_solve(matmul(root.mT, me), lower)
        direction = e - matmul(root, inner).squeeze(-1)
        information = matmul(root.mT, h)
        whitened = torch.linalg.solve_triangular(lower, information, upper=False)
        failed = (status != 0) | (status_1 != 0)
    new_mean = mean + matmul(weighted.mT, direction.unsqueeze(-1)).squeeze(-1)
    if form == "fdekf":
        shrink = 1 - p * whitened.square().sum(0)
        # Positive in exact arithmetic; rounding must not make it zero or negative.
        posterior = p * shrink.clamp(min=torch.finfo(p.dtype).eps)
    else:
        posterior = p / (1 + p * information.square().sum(0))
    # A variance that would overflow saturates: less is known than the dtype can say.
    new_variance = (posterior / forgetting + process_noise).clamp(max=torch.finfo(p.dtype).max)

    finite = all_finite([mean, p, h, innovation, noise]) & (p >= 0).all()
    in_range = all_finite([gram, plain_gram, new_mean, new_variance])
    info = torch.where(failed, int(Info.NOT_CONVERGED), int(Info.OK))
    # An S that overflowed fails the factorisation too: then overflow is the cause.
    info = torch.where(
        in_range | (failed & all_finite([gram, plain_gram])), info, int(Info.OVERFLOW)
    )
    info = torch.where(finite, info, int(Info.NONFINITE_INPUT)).to(torch.int32)
    ok = info == int(Info.OK)
    return torch.where(ok, new_mean, mean), torch.where(ok, new_variance, variance), info


def all_finite(tensors: list[Tensor]) -> Tensor:
    """Return whether every element of every tensor is finite (bool, 0-d, on their device)."""
    return torch.stack([torch.isfinite(t).all() for t in tensors]).all()
