# SPDX-License-Identifier: Apache-2.0
"""Fused kernels for second-order optimizers: every operation has a reference, and is one function."""

from importlib.metadata import PackageNotFoundError, version

from grng_kernels._dispatch import BackendStatus, backends, use_backend
from grng_kernels.damped_inverse.op import damped_inverse
from grng_kernels.damped_inverse.reference import DampedInverse
from grng_kernels.grafting.op import adam_moments_, grafted_step_
from grng_kernels.info import Info
from grng_kernels.kalman_update.kronecker import KroneckerJacobian
from grng_kernels.kalman_update.op import kalman_update_
from grng_kernels.kron_factor.conv2d import kron_factor_conv2d_update_
from grng_kernels.kron_factor.op import kron_factor_update_
from grng_kernels.precondition.op import precondition
from grng_kernels.rank_one.op import rank1_precondition
from grng_kernels.rank_one.step import rank1_step_
from grng_kernels.spectral_norm.op import SpectralNorm, spectral_norm

try:
    __version__ = version("grng-kernels")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "BackendStatus",
    "DampedInverse",
    "Info",
    "KroneckerJacobian",
    "SpectralNorm",
    "__version__",
    "adam_moments_",
    "backends",
    "damped_inverse",
    "grafted_step_",
    "kalman_update_",
    "kron_factor_conv2d_update_",
    "kron_factor_update_",
    "precondition",
    "rank1_precondition",
    "rank1_step_",
    "spectral_norm",
    "use_backend",
]
