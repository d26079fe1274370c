# SPDX-License-Identifier: Apache-2.0
"""The full extended Kalman filter in numpy fp64: what the diagonal update is measured against."""

import numpy as np


def _numpy(t):
    return np.asarray(t.detach().double().cpu().numpy())


def dense_posterior(variance, jacobian, noise, likelihood):
    """The posterior covariance ``[d, d]`` of a diagonal prior, and ``K`` such that mean += K·e."""
    p, h, r = map(_numpy, (variance, jacobian, noise))
    if likelihood == "categorical":
        # Information form, without the inverse of a singular R: (P⁻¹ + HᵀRH)⁻¹, gain = that times Hᵀ.
        r = np.diag(r) - np.outer(r, r)
        root = np.sqrt(p)
        scaled = h * root
        information = np.eye(len(p)) + scaled.T @ r @ scaled
        posterior = root[:, None] * np.linalg.inv(information) * root
        return posterior, posterior @ h.T
    s = (h * p) @ h.T + r
    gain = np.linalg.solve(s, h * p).T
    return np.diag(p) - gain @ s @ gain.T, gain


def dense_update(
    mean, variance, jacobian, innovation, noise, *, form, likelihood, forgetting, process_noise
):
    """Mean and variance after one observation, fp64 numpy arrays."""
    p, h, e, r = map(_numpy, (variance, jacobian, innovation, noise))
    posterior, gain = dense_posterior(variance, jacobian, noise, likelihood)
    if form == "fdekf":
        new = np.diag(posterior)
    else:
        weight = np.diag(r) - np.outer(r, r) if likelihood == "categorical" else np.linalg.inv(r)
        new = p / (1 + p * np.einsum("ci,cd,di->i", h, weight, h))
    return _numpy(mean) + gain @ e, new / forgetting + process_noise


def joseph_diagonal(variance, jacobian, noise):
    """``p − 2 p kᵀh + kᵀ S k`` per parameter: the Joseph form of a Gaussian update."""
    p, h, r = map(_numpy, (variance, jacobian, noise))
    s = (h * p) @ h.T + r
    k = np.linalg.solve(s, h * p)
    return p - 2 * p * (k * h).sum(0) + np.einsum("ci,cd,di->i", k, s, k)
