# SPDX-License-Identifier: Apache-2.0
"""R-Kalman: a gradient-regularised Kalman filter over the weights, for learning from a stream."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from grng.curvature.jacobian import DEFAULT_BUDGET_MB
from grng.optim.kalman import KalmanOptimizer


class RKalman(KalmanOptimizer):
    """Extended Kalman filter with a diagonal covariance and gradient regularisation.

    The weights are the state, each observation ``(x, y)`` is used once. With the Jacobian ``H`` of the
    outputs, the score ``v`` of the outputs and their Fisher information ``T Tᵀ`` (softmax: ``v = y − q``,
    ``T Tᵀ = diag(q) − q qᵀ``)::

        T, v  <- those of the loss plus (rho/2)·‖gradient‖²
        w     <- w + lr·p·Hᵀ (I + T Tᵀ H diag(p) Hᵀ)⁻¹ v              p: variances of the weights
        1/p_i <- 1/p_i + κ_layer·‖Tᵀ h_i‖²                            κ: coherence, see below
        p     <- p / forgetting + process_noise

    There is no learning rate to search and no loss: ``observe(outputs, targets)`` takes the Jacobian,
    ``step()`` updates. ``κ``, the number of weights of a layer over the effective rank of its Fisher
    information, is measured as the filter runs; without it a diagonal filter forgets that a layer's outputs
    move together.

    Args:
        model: The model, whose trainable parameters form the state, or parameters as for any torch optimizer.
        lr: Factor of the step; 1 is the Kalman step. Schedulers may change it.
        sigma0: Standard deviation of the prior, in the unit that ``prior`` names.
        prior: ``"output"``: sigma0 is that of the outputs, predicted by the prior for the first observation
            (of logits relative to the likeliest class; of numbers in units of their first error);
            ``"fan_in"``: of weights, times ``1/√fan_in``; ``"global"``: of every weight.
        rho: Strength of the gradient regularisation, >= 0.
        regularization: ``"gradient"`` (exact) or ``"noise"`` (the other sign); see ``kalman_update_``.
        likelihood: ``"categorical"`` or ``"gaussian"``.
        noise: ``"fisher"`` (classes), ``"ema"`` (estimated), or the variance of Gaussian noise. By default
            ``"fisher"`` for classes and ``"ema"`` else.
        beta: Forgetting factor of the estimated noise.
        form: ``"vdekf"`` or ``"fdekf"``; see ``kalman_update_``.
        covariance: ``"diagonal"``, or ``"full"``, of ``8·d²`` bytes, for at most 4096 weights; without ``κ``.
        correct_coherence: Whether to use ``κ``; False is 1 for every layer.
        max_kl: Largest KL divergence that a step may predict for its own observation; the step is shortened
            to it, so that too wide a prior is no accident. None: no limit. ``"auto"``, where the noise is
            ``"fisher"``: 0.03 for each sample, and up to 1 for all of them together the better those so far
            were predicted before they were learned from (see ``grng.optim.evidence``), so 1 from 34 samples
            on; else None: the noise of a regression says nothing of how far to trust a model.
        forgetting: In (0, 1]: variances are divided by it after each observation.
        process_noise: Added to the variances after each observation.
        batch: How N samples in one call are observed. ``"stacked"``: each by itself, exact, ``N·(C−1)`` rows
            (``N·C`` for means); ``"sampled"``: exact gradient, information from ``max_rows`` drawn outcomes;
            ``"mean"``: the mean output as one observation with the noise of one over N; ``"auto"``: stacked
            up to ``max_rows`` rows, else sampled.
        max_rows: See ``batch``. Each row is a backward pass, batched as memory allows.
        max_failures: Observations in a row that cannot be used before :class:`PreconditionerError`; a sample
            with NaN is skipped and counted, and changes nothing.
        jacobian_budget_mb: Memory for the rows of one batched backward pass.
        jacobian: ``"auto"``: of a weight whose layer was fed a single vector, the two factors of its rows;
            ``"dense"``: always all rows.

    Raises:
        ValueError: A hyperparameter is out of range, or the model has no trainable parameter.

    Source: Dash et al. 2026, "Gradient Regularized Natural Gradients" (R-Kalman), in the form derived in
    ``kalman_update_``; Ollivier 2018 for softmax outputs; prior and coherence are additions.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[Any],
        lr: float | Tensor = 1.0,
        *,
        sigma0: float = 2.0,
        prior: str = "output",
        rho: float = 1e-2,
        regularization: str = "gradient",
        likelihood: str = "categorical",
        noise: float | str | None = None,
        beta: float = 0.96,
        form: str = "vdekf",
        covariance: str = "diagonal",
        correct_coherence: bool = True,
        max_kl: float | str | None = "auto",
        forgetting: float = 1.0,
        process_noise: float = 0.0,
        batch: str = "auto",
        max_rows: int = 32,
        max_failures: int = 100,
        jacobian_budget_mb: float = DEFAULT_BUDGET_MB,
        jacobian: str = "auto",
    ) -> None:
        if noise is None:
            noise = "fisher" if likelihood == "categorical" else "ema"
        super().__init__(
            model,
            dict(lr=lr, rho=rho, forgetting=forgetting, process_noise=process_noise),
            sigma0=sigma0,
            prior=prior,
            likelihood=likelihood,
            noise=noise,
            beta=beta,
            form=form,
            covariance=covariance,
            regularization=regularization,
            correct_coherence=correct_coherence,
            max_kl=max_kl,
            batch=batch,
            max_rows=max_rows,
            max_failures=max_failures,
            budget_mb=jacobian_budget_mb,
            jacobian=jacobian,
        )
