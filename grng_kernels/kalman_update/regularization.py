# SPDX-License-Identifier: Apache-2.0
"""How the noise, or the information, of the outputs changes under gradient regularisation.

The objective ``l + (rho/2)·‖∇l‖²``, linearised, is again a Gaussian one with another noise: with
``G = H Hᵀ`` (not weighted by the variance) ``Rt = R (R + rho·G)⁻¹ R <= R``. Curvature and innovation change
together. ``"noise"`` is the other reading of "modified observation noise", ``Rt = R + rho·G >= R``.
"""

import torch
from torch import Tensor

from grng_kernels._precision import matmul

REGULARIZATIONS = ("gradient", "noise")


def regularised_noise(
    noise: Tensor, plain_gram: Tensor, rho: float, regularization: str
) -> tuple[Tensor, Tensor]:
    """Return ``(Rt [C, C], status)``; the status is that of the factorisation it took, 0 for success."""
    total = noise + rho * plain_gram
    if regularization == "noise":
        return total, torch.zeros((), dtype=torch.int32, device=noise.device)
    lower, status = torch.linalg.cholesky_ex(total)
    half = torch.linalg.solve_triangular(lower, noise, upper=False)
    return matmul(half.mT, half), status


def regularised_root(
    root: Tensor, score: Tensor, plain_gram: Tensor, rho: float, regularization: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for information ``T Tᵀ`` in place of the noise: return ``(T' [C, k], v' [C], status)``.

    With ``B = I + rho·Tᵀ G T``: ``T' T'ᵀ = T B Tᵀ`` and ``v' = v + rho·T Tᵀ G v`` for ``"gradient"``,
    ``T' T'ᵀ = T B⁻¹ Tᵀ`` and ``v' = v − rho·T B⁻¹ Tᵀ G v`` for ``"noise"``: nothing singular is inverted.
    """
    eye = torch.eye(root.shape[1], dtype=root.dtype, device=root.device)
    lower, status = torch.linalg.cholesky_ex(eye + rho * matmul(root.mT, matmul(plain_gram, root)))
    pull = matmul(root.mT, matmul(plain_gram, score.unsqueeze(-1)))
    if regularization == "gradient":
        return matmul(root, lower), score + rho * matmul(root, pull).squeeze(-1), status
    changed = score - rho * matmul(root, torch.cholesky_solve(pull, lower)).squeeze(-1)
    return torch.linalg.solve_triangular(lower, root.mT, upper=False).mT, changed, status
