# SPDX-License-Identifier: Apache-2.0
"""``newton_schulz_plan``: a pure function of rho that names every product's precision."""

import pytest

from grng_kernels.damped_inverse.precision import newton_schulz_plan


@pytest.mark.parametrize("rho", [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-6])
def test_low_precision_comes_first_and_corrections_last(rho):
    plan = newton_schulz_plan(rho)
    assert plan is newton_schulz_plan(rho)
    rank = ["bf16", "tf32", "bf16x3", "tf32x3"]
    assert all(
        step.residual_precision in rank and step.precision in rank[:2] for step in plan.steps
    )
    order = [rank.index(step.residual_precision) for step in plan.steps]
    assert order == sorted(order)
    assert plan.steps[-1] == (2.0, -1.0, "tf32x3", plan.steps[-1].precision)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((0.0,), "rho must be finite and > 0, got 0.0"),
        ((float("nan"),), "rho must be finite and > 0, got nan"),
        ((1e-2, "fp8"), "precision must be one of auto, bf16, tf32, fp32, got 'fp8'"),
    ],
)
def test_errors(arguments, text):
    with pytest.raises(ValueError) as caught:
        newton_schulz_plan(*arguments)
    assert str(caught.value) == f"newton_schulz_plan: {text}"
