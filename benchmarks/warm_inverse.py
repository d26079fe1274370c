# SPDX-License-Identifier: Apache-2.0
"""Whether Newton-Schulz should start from the inverse of ten steps ago: how far that is from the new one."""

from __future__ import annotations

import torch

from grng_kernels.damped_inverse.schedule import newton_schulz_schedule

DECAY, STEPS, ORDER = 0.95, 10, 256
TOLERANCE = 1e-4


def _products(residual: float) -> int:
    """Count the products from a start with a known residual: one to know it, and two a step after."""
    count = 1
    while residual > TOLERANCE:
        residual, count = residual**2, count + 2
    # The first step has its B X from the check.
    return max(count - 1, 1)


def _cold_products(rho: float) -> int:
    # The first step multiplies a multiple of the identity and needs one product less.
    return 2 * len(newton_schulz_schedule(1 + rho**-0.5, tolerance=TOLERANCE).steps) - 2


def main() -> None:
    """Print a row for each number of samples and each rho."""
    torch.manual_seed(0)
    scale = torch.logspace(0, -1, ORDER, dtype=torch.float64)
    eye = torch.eye(ORDER, dtype=torch.float64)
    print("rows     rho  spectral norm -> products  Frobenius norm -> products  products cold")
    for rows in (256, 2048, 8192):
        factor = torch.zeros(ORDER, ORDER, dtype=torch.float64)
        history = []
        for _ in range(120):
            x = torch.randn(rows, ORDER, dtype=torch.float64) * scale
            factor = DECAY * factor + (1 - DECAY) * (x.T @ x) / rows
            history.append(factor)
        for rho in (1e-1, 1e-2, 1e-4):
            old, new = (
                a + rho**0.5 * torch.linalg.matrix_norm(a, 2) * eye
                for a in (history[-1 - STEPS], history[-1])
            )
            rest = eye - new @ torch.linalg.inv(old)
            spectral = float(torch.linalg.matrix_norm(rest, 2))
            frobenius = float(torch.linalg.matrix_norm(rest))
            warm = [str(_products(r)) if r < 1 else "-" for r in (spectral, frobenius)]
            print(
                f"{rows:4} {rho:7.0e} {spectral:14.2f} {warm[0]:>11} {frobenius:15.2f} {warm[1]:>11} "
                f"{_cold_products(rho):14}"
            )


if __name__ == "__main__":
    main()
