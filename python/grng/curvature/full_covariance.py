# SPDX-License-Identifier: Apache-2.0
"""The Kalman update with a full covariance of the weights, for few of them.

What the diagonal forms approximate: ``P Hᵀ`` moves weights together, so nothing has to be said about their
coherence. It costs ``C·d²`` FLOPs and ``8·d²`` bytes, and is plain PyTorch.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grng_kernels import Info
from grng_kernels.kalman_update.regularization import regularised_root

# 134 MB of covariance; beyond, the square is what a step spends its time and memory on.
MAX_PARAMETERS = 4096


class FullCovariance:
    """The covariance of the weights of an optimizer that are trained, kept in a state dict.

    Weights without a variance yet have no rows in it and join later. Those that are frozen leave it, and when
    they are trained again begin with their variance and without correlations.
    """

    KEYS = ("covariance", "covariance_of")

    def __init__(self, state: dict[str, Any]) -> None:
        """Args: state: of the first parameter; holds ``covariance`` and ``covariance_of``."""
        self._state = state

    def of(self, places: Sequence[int], variances: Sequence[Tensor]) -> Tensor:
        """Return the covariance ``[d, d]`` (fp64) of these parameters, the tensor that is kept.

        Args:
            places: Numbers of the parameters, rising.
            variances: Of each. Where another filter changed them, the correlations are kept.
        """
        sizes = [[place, v.numel()] for place, v in zip(places, variances, strict=True)]
        known = self._state.get("covariance_of", [])
        if sizes == known:
            found: Tensor = self._state["covariance"]
            diagonal = torch.cat([v.reshape(-1) for v in variances])
            if not torch.equal(found.diagonal().to(diagonal.dtype), diagonal):
                self.rescale_(variances)
            return found
        grown = torch.diag(torch.cat([v.reshape(-1).double() for v in variances]))
        new, old = _offsets(sizes), _offsets(known)
        kept = [place for place in new if place in old]
        if kept:
            to = torch.cat([new[place] for place in kept]).to(grown.device)
            of = torch.cat([old[place] for place in kept]).to(grown.device)
            grown[to.unsqueeze(-1), to] = self._state["covariance"][of.unsqueeze(-1), of]
        self._state["covariance"], self._state["covariance_of"] = grown, sizes
        return grown

    def restore(self, before: dict[str, Any]) -> None:
        """Give the state the entries that it had before an update; ``before`` holds what there were."""
        for key in self.KEYS:
            self._state.pop(key, None)
        self._state.update(before)

    def rescale_(self, variances: Sequence[Tensor]) -> None:
        """Give the covariance these variances and keep its correlations."""
        covariance = self._state["covariance"]
        wanted = torch.cat([v.reshape(-1).double() for v in variances])
        before = covariance.diagonal()
        ratio = torch.where(before > 0, (wanted / before).sqrt(), 0.0)
        covariance.mul_(torch.outer(ratio, ratio))
        covariance.diagonal().copy_(wanted)


def _offsets(sizes: Sequence[Sequence[int]]) -> dict[int, Tensor]:
    """Where the weights of each parameter lie: indices by its number."""
    offsets, begin = {}, 0
    for place, size in sizes:
        offsets[place] = torch.arange(begin, begin + size)
        begin += size
    return offsets


def full_kalman_update_(
    mean: Tensor,
    covariance: Tensor,
    jacobian: Tensor,
    innovation: Tensor,
    noise: Tensor,
    *,
    likelihood: str,
    rho: float = 0.0,
    regularization: str = "gradient",
) -> Tensor:
    """Extended Kalman filter update of all weights together, in place.

    ``mean <- mean + P Hᵀ (H P Hᵀ + R)⁻¹ e`` and ``P⁻¹ <- P⁻¹ + Hᵀ R⁻¹ H``, in fp64 and Joseph's form. The
    diagonal of the result for a diagonal ``P`` is the result of ``grng_kernels.kalman_update_`` in its form
    ``"fdekf"``.

    Args:
        mean: ``[d]``, fp32 or fp64. Mutated.
        covariance: ``P``, symmetric, ``[d, d]``, fp64. Mutated; stays exactly symmetric.
        jacobian: ``H``, ``[C, d]``, of the dtype of ``mean``.
        innovation: ``[C]``.
        noise: As ``kalman_update_`` takes it, as a matrix.
        likelihood: ``"gaussian"`` or ``"fisher"``.
        rho: Strength of the gradient regularisation.
        regularization: See ``kalman_update_``.

    Returns:
        ``Info``, int32, 0-d; where it is not 0, nothing was changed.
    """
    h = jacobian.double()
    root, score, status = _information(innovation.double(), noise.double(), likelihood)
    if rho > 0:
        root, score, failed = regularised_root(root, score, h @ h.mT, rho, regularization)
        status = status | failed
    weighted = h @ covariance
    gram = weighted @ h.mT
    eye = torch.eye(root.shape[1], dtype=torch.float64, device=h.device)
    lower, failed = torch.linalg.cholesky_ex(eye + root.mT @ gram @ root)
    inner = torch.cholesky_solve((root.mT @ (gram @ score)).unsqueeze(-1), lower)
    step = weighted.mT @ (score - (root @ inner).squeeze(-1))
    # Joseph's form: a sum of two positive parts, where P minus what was learned would lose its sign to
    # rounding.
    observed = root.mT @ h
    gain = torch.cholesky_solve(root.mT @ weighted, lower).mT
    kept = covariance - gain @ (observed @ covariance)
    kept = kept - (kept @ observed.mT) @ gain.mT + gain @ gain.mT
    new_mean = mean + step.to(mean.dtype)
    if not all(bool(torch.isfinite(t).all()) for t in (mean, h, innovation, noise, covariance)):
        return _info(Info.NONFINITE_INPUT, mean)
    if int(status | failed) != 0:
        return _info(Info.NOT_CONVERGED, mean)
    if not all(bool(torch.isfinite(t).all()) for t in (new_mean, kept)):
        return _info(Info.OVERFLOW, mean)
    mean.copy_(new_mean)
    torch.add(kept, kept.mT, out=covariance).mul_(0.5)
    return _info(Info.OK, mean)


def _information(
    innovation: Tensor, noise: Tensor, likelihood: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return root and score of the Fisher information, and the status of the factorisation it took."""
    if likelihood == "fisher":
        return noise, innovation, torch.zeros((), dtype=torch.int32, device=noise.device)
    lower, status = torch.linalg.cholesky_ex(noise)
    eye = torch.eye(len(noise), dtype=noise.dtype, device=noise.device)
    root = torch.linalg.solve_triangular(lower.mT, eye, upper=True)
    return root, root @ (root.mT @ innovation), status


def _info(code: Info, like: Tensor) -> Tensor:
    return torch.tensor(int(code), dtype=torch.int32, device=like.device)
