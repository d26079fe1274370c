# SPDX-License-Identifier: Apache-2.0
"""LoKO: the diagonal Kalman filter for low-rank adaptation that R-Kalman builds on."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from grng.curvature.jacobian import DEFAULT_BUDGET_MB
from grng.optim.kalman import KalmanOptimizer


class LoKO(KalmanOptimizer):
    """Extended Kalman filter with a diagonal covariance and an estimated observation noise.

    With the outputs' Jacobian ``H``, the innovation ``e`` and the noise ``R``, an exponential moving
    average::

        S = H diag(p) Hᵀ + R,     w <- w + diag(p) Hᵀ S⁻¹ e,     p_i <- p_i (1 − p_i h_iᵀ S⁻¹ h_i)

    This is :class:`grng.RKalman` without gradient regularisation and without its additions, as a baseline:
    use that class to learn well.

    Args:
        model: As in :class:`grng.RKalman`.
        lr: Factor of the step.
        sigma0: Standard deviation of the prior of the weights.
        prior: ``"global"``, ``"fan_in"`` or ``"output"``.
        beta: Forgetting factor of the noise.
        noise: ``"ema"``, a variance, or ``"fisher"`` for classes.
        likelihood: ``"categorical"`` or ``"gaussian"``.
        form: ``"fdekf"`` or ``"vdekf"``.
        forgetting: In (0, 1].
        process_noise: >= 0.
        batch: As in :class:`grng.RKalman`.
        max_rows: As in :class:`grng.RKalman`.
        max_failures: As in :class:`grng.RKalman`.
        jacobian_budget_mb: As in :class:`grng.RKalman`.
        jacobian: As in :class:`grng.RKalman`.

    Raises:
        ValueError: A hyperparameter is out of range, or the model has no trainable parameter.

    Source: Abdi et al. 2024, "LoKO: Low-Rank Kalman Optimizer"; the innovation term of the noise follows
    covariance matching, as its exact form is not public.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[Any],
        lr: float | Tensor = 1.0,
        *,
        sigma0: float = 0.05,
        prior: str = "global",
        beta: float = 0.96,
        noise: float | str = "ema",
        likelihood: str = "categorical",
        form: str = "fdekf",
        forgetting: float = 1.0,
        process_noise: float = 0.0,
        batch: str = "auto",
        max_rows: int = 32,
        max_failures: int = 100,
        jacobian_budget_mb: float = DEFAULT_BUDGET_MB,
        jacobian: str = "auto",
    ) -> None:
        super().__init__(
            model,
            dict(lr=lr, rho=0.0, forgetting=forgetting, process_noise=process_noise),
            sigma0=sigma0,
            prior=prior,
            likelihood=likelihood,
            noise=noise,
            beta=beta,
            form=form,
            covariance="diagonal",
            regularization="gradient",
            correct_coherence=False,
            max_kl=None,
            batch=batch,
            max_rows=max_rows,
            max_failures=max_failures,
            budget_mb=jacobian_budget_mb,
            jacobian=jacobian,
        )
