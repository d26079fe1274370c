# SPDX-License-Identifier: Apache-2.0
"""How one matrix or one update of a call ended."""

from enum import IntEnum


class Info(IntEnum):
    """The values of the ``info`` tensors, as LAPACK has them: 0 is success, and they stay on the device.

    Where ``info != 0`` the state that the call would have changed is exactly as it was, and a returned
    matrix must not be used.
    """

    OK = 0
    NONFINITE_INPUT = 1
    """An input holds NaN or infinity, or one that was not read on the host is out of its range."""
    NOT_CONVERGED = 2
    """A factorisation met a matrix that is not positive definite, or the residual is too large."""
    OVERFLOW = 3
    """All inputs are finite, but a result could leave the range of its dtype."""
    ASYMMETRIC = 4
    """A matrix that must be symmetric is not, by more than rounding explains."""
