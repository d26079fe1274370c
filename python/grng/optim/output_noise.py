# SPDX-License-Identifier: Apache-2.0
"""The observation noise of a Kalman optimizer: known from the likelihood, given as a number, or estimated."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from grng.curvature import observation
from grng.curvature.observation import Observation

# Added to the estimate where it is used: a share of its mean, and a variance. An observation that is believed
# to be exact would move the weights without bound.
_RELATIVE_FLOOR, _FLOOR = 1e-2, 1e-6


class OutputNoise:
    """Turns outputs and targets into an observation, and an observation into arguments of the kernel.

    ``"fisher"``: softmax outputs are observed with the covariance that they state, ``diag(q) − q qᵀ``.
    A number: Gaussian noise of that variance. ``"ema"``: Gaussian noise, estimated: with the innovation
    ``e``, ``S = H P Hᵀ + R`` and the residual ``ε = R S⁻¹ e`` left after the update::

        R <- beta·R + (1 − beta)·(ε εᵀ + H P Hᵀ − H P Hᵀ S⁻¹ H P Hᵀ)

    whose expectation is R where R is right. For classes the probabilities of all but the reference are
    observed.
    """

    def __init__(self, owner: str, likelihood: str, noise: float | str, beta: float) -> None:
        known = isinstance(noise, (int, float)) and not isinstance(noise, bool)
        if known and not (math.isfinite(float(noise)) and float(noise) > 0):
            raise ValueError(f"{owner}: noise must be > 0, got {noise!r}")
        names = ("fisher", "ema") if likelihood == "categorical" else ("ema",)
        if not known and noise not in names:
            raise ValueError(
                f"{owner}: noise must be a number > 0 or one of {', '.join(names)} with "
                f"likelihood={likelihood!r}, got {noise!r}"
            )
        self.kind = "given" if known else str(noise)
        self._number = float(noise) if known else 1.0
        self._likelihood, self._beta = likelihood, beta
        # Estimated covariance [c, c] without its floor; None before the first observation. The optimizer
        # keeps it in its state. What an observation makes of it counts only once it was used.
        self.covariance: Tensor | None = None
        self._candidate: Tensor | None = None
        # Outputs observed of each sample; how many samples one observation is the mean of.
        self._outputs: int | None = None
        self._samples = 1

    def describe(self) -> str:
        """One line for ``explain()``."""
        if self.kind == "fisher":
            return "the covariance of the softmax outputs"
        if self.kind == "given":
            return f"variance {self._number:.3g}, given"
        if self.covariance is None:
            return "estimated, no observation yet"
        return f"estimated, now {float(self.covariance.diagonal().mean()):.3g}"

    # ---- outputs -> observation ----

    def observation(
        self, outputs: Tensor, targets: Tensor, batch: str, samples: int, generator: torch.Generator
    ) -> Observation:
        """Return directions, score and root for ``outputs [N, C]``; ``batch`` is one of ``BATCHES``.

        For Gaussian noise that is not sampled the score holds the errors, and the root the identity: the
        noise, which may have to be estimated first, comes in :meth:`arguments`.
        """
        self._candidate = None
        exact = outputs.detach().to(torch.promote_types(outputs.dtype, torch.float32))
        if self.kind == "fisher":
            q = exact.softmax(-1)
            if batch == "stacked":
                return observation.categorical(q, targets)
            if batch == "mean":
                return observation.mean_categorical(q, targets)
            error = F.one_hot(targets, q.shape[1]).to(q) - q
            return observation.sketch(error, observation.categorical_scores(q, samples, generator))
        directions, error = self._errors(exact, targets)
        n, self._outputs = error.shape
        self._samples = 1
        if batch == "sampled":
            self._estimate(_second_moment(error))
            lower, failed = torch.linalg.cholesky_ex(self._current(error))
            # There is none where errors are not finite, or far too large: the step skips what comes of it.
            lower = lower.where(failed == 0, math.nan)
            white = torch.randn(
                (samples, *error.shape), generator=generator, device=error.device, dtype=error.dtype
            )
            draws = torch.linalg.solve_triangular(lower, white, upper=False, left=False)
            score = torch.cholesky_solve(error.mT, lower).mT
            pull = [torch.einsum("...nc,ncd->...nd", t, directions) for t in (score, draws)]
            return observation.sketch(pull[0], pull[1])
        if batch == "mean":
            self._samples = n
            rows, error = directions.transpose(0, 1) / n, error.mean(0)
        else:
            rows = observation.spread(directions)
            error = error.flatten()
        return Observation(rows, error, torch.eye(len(error)).to(error))

    def probes(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return directions ``[k, N, C]`` of the first sample's outputs, and the unit of the prior (0-d).

        The unit is 1 for logits, relative to the likeliest class, and for numbers their first error.
        """
        exact = outputs.detach().to(torch.promote_types(outputs.dtype, torch.float32))
        n, c = exact.shape
        one, unit = torch.eye(c).to(exact), torch.ones_like(exact[0, 0])
        if self._likelihood == "categorical":
            one = observation.reference_last(exact[:1].softmax(-1))[1][0]
        else:
            unit = (targets.to(exact) - exact).square().mean().sqrt()
        rows = exact.new_zeros(len(one), n, c)
        rows[:, 0] = one
        return rows, unit

    def _errors(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return directions ``[N, c, C]`` of what is observed of each sample, and its errors ``[N, c]``."""
        n, c = outputs.shape
        if self._likelihood == "gaussian":
            return torch.eye(c).to(outputs).expand(n, c, c), targets.to(outputs) - outputs
        q = outputs.softmax(-1)
        error = F.one_hot(targets, c).to(q) - q
        derivative = torch.diag_embed(q) - q.unsqueeze(-1) * q.unsqueeze(-2)
        return derivative[:, :-1], error[:, :-1]

    # ---- observation -> arguments of the kernel ----

    def arguments(
        self, seen: Observation, gram: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor, str]:
        """Return ``(innovation, noise, likelihood)`` for ``kalman_update_``; the noise is estimated first.

        Args:
            seen: The observation.
            gram: Returns the covariance ``H P Hᵀ`` that the prior predicts for what is observed.
        """
        if self.kind == "fisher" or seen.is_sketch:
            return seen.score, seen.root, "fisher"
        error = seen.score
        if self.kind == "ema":
            self._estimate(self._matched(error, gram().to(error)))
        noise = self._current(error)
        return error, self._of_observation(noise, len(error)), "gaussian"

    def whiten(self, seen: Observation, change: Tensor) -> Tensor:
        """Return a change of the outputs in units of the noise: half its square is a KL divergence."""
        if self.kind == "fisher" or seen.is_sketch:
            return seen.root.mT @ change
        noise = self._of_observation(self._current(change), len(change))
        lower = torch.linalg.cholesky_ex(noise)[0]
        return torch.linalg.solve_triangular(lower, change.unsqueeze(-1), upper=False).squeeze(-1)

    def _of_observation(self, noise: Tensor, rows: int) -> Tensor:
        """The noise of the whole observation: of each sample, or of the mean of the samples."""
        noise = noise / self._samples
        return torch.block_diag(*([noise] * (rows // len(noise))))

    def commit(self) -> None:
        """Keep the estimate that the last observation led to."""
        if self._candidate is not None:
            self.covariance, self._candidate = self._candidate, None

    def _matched(self, error: Tensor, gram: Tensor) -> Tensor:
        """The expected covariance of one sample's noise, given this observation and the estimate so far."""
        outputs = len(error) if self._outputs is None else self._outputs
        start = torch.eye(outputs).to(error) * error.square().mean() * self._samples
        before = start if self.covariance is None else self.covariance.to(error)
        noise = self._of_observation(_floored(before), len(error))
        lower, failed = torch.linalg.cholesky_ex(gram + noise)
        if int(failed):
            return before
        residual = noise @ torch.cholesky_solve(error.unsqueeze(-1), lower)
        left = residual @ residual.mT + noise - noise @ torch.cholesky_solve(noise, lower)
        blocks = left.view(len(left) // outputs, outputs, len(left) // outputs, outputs)
        return blocks.diagonal(dim1=0, dim2=2).mean(-1) * self._samples

    def _estimate(self, moment: Tensor) -> None:
        if self.kind != "ema":
            return
        old = self.covariance
        new = moment if old is None else self._beta * old.to(moment) + (1 - self._beta) * moment
        self._candidate = (new + new.mT) / 2

    def _current(self, error: Tensor) -> Tensor:
        if self.kind == "ema":
            found = self._candidate if self._candidate is not None else self.covariance
            assert found is not None, "estimated before it is asked for"
            return _floored(found.to(error))
        outputs = error.shape[-1] if self._outputs is None else self._outputs
        return torch.eye(outputs).to(error) * self._number


def _floored(noise: Tensor) -> Tensor:
    floor = _RELATIVE_FLOOR * noise.diagonal().mean() + _FLOOR
    return noise + floor * torch.eye(len(noise)).to(noise)


def _second_moment(error: Tensor) -> Tensor:
    return error.mT @ error / len(error)
