# SPDX-License-Identifier: Apache-2.0
"""The two-layer ReLU network of Zhang, Martens and Grosse (2019), and exact steps of its natural gradient.

"Fast Convergence of Natural Gradient Descent for Overparameterized Neural Networks": the network is
``u(x) = aᵀ relu(W x) / √m`` with fixed signs ``a`` and trained ``W [m, d]``, the loss ``‖u − y‖² / 2``, the
batch all ``n`` samples, everything in fp64. Row ``i`` of the Jacobian ``J [n, m d]`` is
``a ⊙ 1{W xᵢ > 0} ⊗ xᵢ / √m``: no product here needs ``J`` itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def allowed_stability(eta: float) -> float:
    """The largest C with which the theorem allows this step: the root of ``(1 − 2C) / (1 + C)² = eta``."""
    # eta C² + 2 (1 + eta) C − (1 − eta) = 0
    b = 1 + eta
    return (math.sqrt(b * b + eta * (1 - eta)) - b) / eta


class Start:
    """Samples, the weights of a seed, and what theory derives from the Jacobian there."""

    def __init__(self, inputs: Tensor, labels: Tensor, width: int, seed: int) -> None:
        """Draws the weights from the normal distribution, and the signs.

        Args:
            inputs: ``[n, d]`` fp64, of length 1.
            labels: ``[n]`` fp64.
            width: Hidden units m.
            seed: Of the weights.
        """
        generator = torch.Generator().manual_seed(seed)
        self.inputs, self.labels, self.width = inputs, labels, width
        self.weight = torch.randn(width, inputs.shape[1], generator=generator, dtype=torch.float64)
        self.signs = torch.randint(0, 2, (width,), generator=generator).double() * 2 - 1
        self.products = inputs @ inputs.T
        self.pattern = (inputs @ self.weight.T > 0).double()  # [n, m]
        self.gram = self.gram_of(self.pattern)
        self.spectrum, self._vectors = torch.linalg.eigh(self.gram)
        residual = self.network().residual()
        self._parts = (self._vectors.T @ residual).square() / residual.square().sum()

    def gram_of(self, pattern: Tensor) -> Tensor:
        """``J Jᵀ [n, n]`` of the Jacobian with this pattern of active units, or of a difference of two."""
        return self.products * (pattern @ pattern.T) / self.width

    @property
    def smallest(self) -> float:
        """Smallest eigenvalue of ``J Jᵀ``."""
        return float(self.spectrum[0])

    @property
    def largest(self) -> float:
        """Largest eigenvalue of ``J Jᵀ``."""
        return float(self.spectrum[-1])

    def network(self) -> Network:
        """A network with these weights."""
        return Network(self)

    def linear_ratio(self, eta: float, damping: float, step: int) -> float:
        """``‖u(k) − y‖² / ‖u(0) − y‖²`` if the Jacobian never changed.

        Args:
            eta: Step length.
            damping: Lambda.
            step: k.

        Returns:
            ``Σᵢ pᵢ (1 − eta μᵢ / (μᵢ + damping))^2k`` with the parts ``pᵢ`` of the first residual in the
            eigenvectors of ``J Jᵀ``.
        """
        factors = 1 - eta * self.spectrum / (self.spectrum + damping)
        return float((self._parts * factors.pow(2 * step)).sum())

    def bound(self, eta: float, damping: float) -> float:
        """Factor per step that bounds ``‖u − y‖²``: ``1 − eta μ_min / (μ_min + damping)``.

        Without damping that of the theorem, ``1 − eta``, which allows for a Jacobian that changes a little.
        With damping the paper has none: this is the same for the slowest direction, and bounds no more than
        :meth:`linear_ratio`, where the Jacobian never changes.
        """
        return 1 - eta * self.smallest / (self.smallest + damping)


class Network:
    """The network on its way."""

    def __init__(self, start: Start) -> None:
        """Args: start: samples and first weights."""
        self._start = start
        self.weight, self.signs = start.weight.clone(), start.signs

    def _outputs(self) -> tuple[Tensor, Tensor]:
        before = self._start.inputs @ self.weight.T
        outputs = before.relu() @ self.signs / math.sqrt(self._start.width)
        return outputs, (before > 0).double()

    def residual(self) -> Tensor:
        """``u − y``, ``[n]``."""
        return self._outputs()[0] - self._start.labels

    def _along(self, pattern: Tensor, weights: Tensor) -> Tensor:
        """``Jᵀ v`` for ``v [n]``, in the shape of the weights."""
        sums = pattern.T @ (weights.unsqueeze(1) * self._start.inputs)
        return self.signs.unsqueeze(1) * sums / math.sqrt(self._start.width)

    def natural_step(self, eta: float, damping: float) -> None:
        """``W <- W − eta Jᵀ (J Jᵀ + damping I)⁻¹ (u − y)``.

        Args:
            eta: Step length.
            damping: Lambda; with 0 ``J Jᵀ`` must be positive definite.

        Raises:
            ArithmeticError: It is not.
        """
        outputs, pattern = self._outputs()
        matrix = self._start.gram_of(pattern)
        matrix.diagonal().add_(damping)
        # By Cholesky's factor: batched LU is broken in some builds of torch for CPUs.
        factor, info = torch.linalg.cholesky_ex(matrix)
        if info:
            raise ArithmeticError("J Jᵀ is not positive definite")
        residual = (outputs - self._start.labels).unsqueeze(1)
        solved = torch.cholesky_solve(residual, factor).squeeze(1)
        self.weight = self.weight - eta * self._along(pattern, solved)

    def descent_step(self, eta: float) -> None:
        """``W <- W − eta Jᵀ (u − y)``."""
        outputs, pattern = self._outputs()
        self.weight = self.weight - eta * self._along(pattern, outputs - self._start.labels)

    def stability(self) -> float:
        """``2 ‖J − J(0)‖₂ / √μ_min``: the theorem calls the most that it may be C, and needs C < 1/2."""
        change = self._start.gram_of(self._outputs()[1] - self._start.pattern)
        squared = max(0.0, float(torch.linalg.eigvalsh(change)[-1]))
        return 2 * math.sqrt(squared) / math.sqrt(self._start.smallest)
