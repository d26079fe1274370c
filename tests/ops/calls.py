# SPDX-License-Identifier: Apache-2.0
"""One ordinary call of every op, for the promises that all ops make alike."""

from collections.abc import Callable
from typing import NamedTuple

import torch

import grng_kernels as gk
from tests.cases import spd


class Op(NamedTuple):
    backends: tuple[str, ...]
    make: Callable[[], dict[str, torch.Tensor]]  # fresh inputs, fp32
    run: Callable[[dict[str, torch.Tensor]], list[torch.Tensor]]  # every output and every state


def _kron(t):
    factor = t["factor"].clone()
    info = gk.kron_factor_update_(factor, t["x"], decay=0.9)
    return [factor, info]


def _conv2d(t):
    factor = t["factor"].clone()
    info = gk.kron_factor_conv2d_update_(factor, t["x"], kernel_size=3, padding=1, decay=0.9)
    return [factor, info]


def _patches(t):
    factor = t["factor"].clone()
    info = gk.kron_factor_conv2d_update_(factor, t["x"], kernel_size=(3, 2), decay=0.9, bias=True)
    return [factor, info]


def _narrow(t):
    # As many as the C++ kernel serves: both orientations, two of them on one inverse, one with a bias.
    grads = [t["wide"], t["wide"].clone(), t["tall"], t["tall"][:, :-1]]
    lefts, rights = (
        [t["small"], t["small"], t["large"], t["large"]],
        [t["large"]] * 2 + [t["small"]] * 2,
    )
    biases = [None, None, None, t["tall"][:, -1]]
    outs, dots = gk.precondition(grads, lefts, rights, bias_grad=biases, return_dot=True)
    return [*outs, dots]


def _grafting(t):
    param, mean, square = t["param"].clone(), t["mean"].clone(), t["square"].clone()
    norm = gk.adam_moments_(mean, square, t["grad"], step=3)
    scale = norm / 100
    gk.grafted_step_(param, t["direction"], mean, square, scale=scale, lr=0.1, decay=0.9, step=3)
    return [param, mean, square, norm]


def _rank_one_step(t):
    param = t["param"].clone()
    return [param, gk.rank1_step_(param, t["grad"], t["score"], damping=0.1, lr=0.1, decay=0.9)]


def _inverse(method):
    def run(t):
        return list(gk.damped_inverse(t["factor"], rho=1e-2, method=method))

    return run


def _kalman(likelihood, form):
    def run(t):
        mean, variance = t["mean"].clone(), t["variance"].clone()
        noise = t["noise"] if likelihood == "gaussian" else t["probabilities"]
        info = gk.kalman_update_(
            mean, variance, t["jacobian"], t["innovation"], noise, form=form, likelihood=likelihood
        )
        return [mean, variance, info]

    return run


def _kalman_inputs(outputs=10):
    return {
        "mean": torch.randn(700),
        "variance": torch.rand(700) + 0.1,
        "jacobian": torch.randn(outputs, 700),
        "innovation": torch.randn(outputs),
        "noise": spd(outputs) + torch.eye(outputs),
        "probabilities": torch.randn(outputs).softmax(0),
    }


OPS = {
    "kron_factor_update_": Op(
        ("reference", "cpu"),
        lambda: {"factor": spd(65), "x": torch.randn(130, 65)},
        _kron,
    ),
    "kron_factor_conv2d_update_": Op(
        ("reference", "cpu"),
        lambda: {"factor": spd(180), "x": torch.randn(2, 20, 9, 8)},
        _conv2d,
    ),
    "kron_factor_conv2d_update_-patches": Op(
        ("reference", "cpu"),
        lambda: {"factor": spd(13), "x": torch.randn(2, 2, 9, 8)},
        _patches,
    ),
    "damped_inverse-cholesky": Op(("auto",), lambda: {"factor": spd(65)}, _inverse("cholesky")),
    "damped_inverse-newton_schulz": Op(
        ("auto",), lambda: {"factor": spd(65)}, _inverse("newton_schulz")
    ),
    "precondition": Op(
        ("auto",),
        lambda: {"grad": torch.randn(65, 33), "left": spd(65), "right": spd(33)},
        lambda t: [gk.precondition(t["grad"], t["left"], t["right"])],
    ),
    "precondition-narrow": Op(
        ("reference", "cpu"),
        lambda: {
            "wide": torch.randn(8, 65),
            "tall": torch.randn(65, 8),
            "small": spd(8),
            "large": spd(65),
        },
        _narrow,
    ),
    "rank1_precondition": Op(
        ("auto",),
        lambda: {"grad": torch.randn(700), "score": torch.randn(700)},
        lambda t: [gk.rank1_precondition(t["grad"], t["score"], damping=0.1)],
    ),
    "rank1_step_": Op(
        ("reference", "cpu"),
        lambda: {name: torch.randn(700) for name in ("param", "grad", "score")},
        _rank_one_step,
    ),
    "grafting": Op(
        ("reference", "cpu"),
        lambda: {
            "param": torch.randn(33, 65),
            "mean": torch.randn(33, 65),
            "square": torch.rand(33, 65),
            "grad": torch.randn(33, 65),
            "direction": torch.randn(33, 65),
        },
        _grafting,
    ),
} | {
    f"kalman_update_-{likelihood}-{form}": Op(
        ("reference", "cpu"), _kalman_inputs, _kalman(likelihood, form)
    )
    for likelihood in ("gaussian", "categorical")
    for form in ("fdekf", "vdekf")
}
# More outputs than the CUDA kernel is chosen for.
OPS["kalman_update_-gaussian-wide"] = Op(
    ("reference", "cpu"), lambda: _kalman_inputs(40), _kalman("gaussian", "fdekf")
)

# (op, backend), for parametrisation.
OP_BACKENDS = [(name, backend) for name, op in OPS.items() for backend in op.backends]
OP_BACKEND_IDS = [f"{name}-{backend}" for name, backend in OP_BACKENDS]


def bitwise(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
