# SPDX-License-Identifier: Apache-2.0
"""``torch.compile(fullgraph=True)`` of the public functions equals eager, every mutated argument included."""

import pytest
import torch

import grng_kernels as gk
from tests.cases import spd


@pytest.fixture(autouse=True)
def poisoned_allocations():
    """The poison looks at its caller's frame, which the compiler cannot follow."""


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs():
    return {
        "factor": spd(9),
        "other_factor": spd(5),
        "x": torch.randn(12, 9),
        "other_x": torch.randn(3, 5).bfloat16(),
        "decay": torch.tensor(0.9),
        "mean": torch.randn(20),
        "variance": torch.rand(20) + 0.1,
        "first_block": torch.randn(4),
        "block_variance": torch.rand(4) + 0.1,
        "jacobian": torch.randn(3, 20),
        "block_jacobian": torch.randn(3, 4),
        "innovation": torch.randn(3),
        "noise": spd(3) + torch.eye(3),
        "vector": torch.zeros(9),
        "patches": spd(8),
        "reduced": spd(9),
        "image": torch.randn(3, 2, 5, 4),
        "grad": torch.randn(5, 9),
        "out": torch.zeros(5, 9),
        "score": torch.randn(5, 9),
        "rank1_out": torch.zeros(5, 9),
        "policy": torch.randn(5, 9),
        "bias": torch.randn(5),
        "bias_grad": torch.randn(5),
        "param": torch.randn(5, 9),
        "exp_avg": torch.zeros(5, 9),
        "exp_avg_sq": torch.zeros(5, 9),
    }


def inverses(t):
    right = gk.damped_inverse(t["factor"], rho=1e-2, spectral_vector=t["vector"])
    left = gk.damped_inverse([t["other_factor"], t["noise"]], damping=0.1)
    return right, left


def updates(t):
    """Every other op: states are read again after they were mutated."""
    info = gk.kron_factor_update_(
        [t["factor"], t["other_factor"]], [t["x"], t["other_x"]], decay=t["decay"]
    )
    conv = gk.kron_factor_conv2d_update_(
        t["patches"], t["image"], kernel_size=2, padding=1, decay=t["decay"]
    )
    reduced = gk.kron_factor_conv2d_update_(
        t["reduced"], t["image"], kernel_size=2, decay=0.9, bias=True, sharing="reduce"
    )
    preconditioned = gk.precondition(t["grad"], t["other_factor"], t["factor"])
    gk.precondition(t["grad"], t["other_factor"], t["factor"], out=t["out"])
    kalman = gk.kalman_update_(
        [t["first_block"], t["mean"]], [t["block_variance"], t["variance"]],
        [t["block_jacobian"], t["jacobian"]], t["innovation"], t["noise"], process_noise=0.01,
    )  # fmt: skip
    rank1 = gk.rank1_precondition(preconditioned, t["score"], damping=0.1)
    gk.rank1_precondition(t["grad"], t["score"], damping=0.1, out=t["rank1_out"])
    norm = gk.rank1_step_(
        [t["policy"], t["bias"]], [preconditioned, t["bias_grad"]], [t["score"], t["bias_grad"]],
        damping=0.1, lr=[0.1, 0.2], decay=0.9,
    )  # fmt: skip
    length = gk.adam_moments_(t["exp_avg"], t["exp_avg_sq"], t["grad"], step=1)
    gk.grafted_step_(
        t["param"], preconditioned, t["exp_avg"], t["exp_avg_sq"], scale=length, lr=0.1, step=1
    )
    used = t["factor"].sum() + t["mean"].sum() + t["out"].sum() + t["patches"].sum()
    return [info, conv, reduced, preconditioned, kalman, rank1, norm, length, used]


def step(t):
    """What an optimizer does: update, invert the updated factor, precondition with the inverse."""
    updated = updates(t)
    right, left = inverses(t)
    return [*updated, right, gk.precondition(t["grad"], left.inverse[0], right.inverse)]


UPDATED = (
    "factor", "other_factor", "mean", "variance", "first_block", "block_variance", "out", "rank1_out",
    "patches", "reduced", "policy", "bias", "param", "exp_avg", "exp_avg_sq",
)  # fmt: skip


@pytest.mark.parametrize(
    ("call", "states", "compiler"),
    [
        pytest.param(updates, UPDATED, "aot_eager", id="updates"),
        pytest.param(inverses, ("vector",), "aot_eager", id="inverses"),
        pytest.param(step, (*UPDATED, "vector"), "inductor", id="step-inductor"),
    ],
)
def test_compiled_equals_eager(call, states, compiler):
    eager = inputs()
    compiled, before = ({k: t.clone() for k, t in eager.items()} for _ in range(2))
    want = call(eager)
    got = torch.compile(call, backend=compiler, fullgraph=True)(compiled)
    for name, tensor in compiled.items():
        torch.testing.assert_close(
            tensor, eager[name], rtol=1e-6, atol=1e-6, msg=f"argument {name}"
        )
        assert torch.equal(tensor, before[name]) != (name in states), f"{name}: mutated or not"
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def convolution(n):
    factor = torch.zeros(4 * n.shape[0], 4 * n.shape[0])
    image = n[None, :, None]
    return gk.kron_factor_conv2d_update_(factor, image, kernel_size=2, padding=1, decay=0.9), factor


DYNAMIC = {
    "kron_factor_update_": lambda m, n: (gk.kron_factor_update_(m, n, decay=0.9), m),
    "kron_factor_conv2d_update_": lambda m, n: convolution(n),
    "damped_inverse": lambda m, n: gk.damped_inverse(m, rho=1e-2),
    "precondition": lambda m, n: gk.precondition(n.mT, m, torch.eye(n.shape[0])),
    "rank1_precondition": lambda m, n: gk.rank1_precondition(n, n + 1, damping=0.1),
    "rank1_step_": lambda m, n: (gk.rank1_step_(n, n + 1, n.square(), damping=0.1, lr=0.1), n),
    "adam_moments_": lambda m, n: (gk.adam_moments_(m, m + 1, m.mT * 2, step=2), m),
    "grafted_step_": lambda m, n: (
        gk.grafted_step_(
            n, n + 1, n + 2, n.square(), scale=m[0, 0].double().square(), lr=0.1, step=2
        ),
        n,
    )[1:],
    "kalman_update_": lambda m, n: (
        gk.kalman_update_(n[0], n[1].square(), n[2:], n[2:, 0].clone(), 0.1),
        n,
    ),
}


@pytest.mark.parametrize("op", DYNAMIC)
def test_dynamic_shapes_do_not_compile_again(op):
    """Every size is a symbol: none may be read, not even for the text of an error that is not raised."""
    graphs = []

    def counting(graph, _):
        graphs.append(graph)
        return graph.forward

    call = DYNAMIC[op]
    compiled = torch.compile(call, backend=counting, fullgraph=True, dynamic=True)
    for rows, n in ((12, 9), (7, 5), (33, 17)):
        arguments = spd(n), torch.randn(rows, n)
        copies = [t.clone() for t in arguments]
        for got, want in zip(compiled(*copies), call(*arguments), strict=True):
            torch.testing.assert_close(got, want)
    assert len(graphs) == 1


def test_numbers_that_change_from_step_to_step():
    """A bias-corrected decay is new at each step. As a tensor it needs no new graph; as a float it works.

    torch takes a float that goes to an operator as fixed, hence the argument that may be a tensor.
    """
    graphs = []

    def counting(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda f, x, decay: gk.kron_factor_update_(f, x, decay=decay),
        backend=counting,
        fullgraph=True,
    )
    for kind, most in ((torch.tensor, 1), (float, 6)):
        for step in range(1, 6):
            factor, x = spd(9), torch.randn(12, 9)
            other = factor.clone()
            decay = kind(1 - 1 / (step + 1))
            gk.kron_factor_update_(factor, x, decay=decay)
            compiled(other, x, decay)
            assert torch.equal(other, factor)
        assert len(graphs) <= most


@pytest.mark.parametrize("name", ["kron", "conv2d", "precondition", "rank1", "kalman"])
def test_inputs_that_require_grad_compile(name):
    """Ops are often called on parameters: the graph has no gradient, and no error either."""
    t = inputs()
    grad, jacobian = t["grad"].requires_grad_(), t["jacobian"].requires_grad_()
    image = t["image"].requires_grad_()
    calls = {
        "kron": lambda: gk.kron_factor_update_(t["factor"], grad, decay=0.9),
        "conv2d": lambda: gk.kron_factor_conv2d_update_(
            t["patches"], image, kernel_size=2, decay=0.9
        ),
        "precondition": lambda: gk.precondition(grad, spd(5), spd(9)),
        "rank1": lambda: gk.rank1_precondition(grad, t["score"], damping=0.1),
        "kalman": lambda: gk.kalman_update_(
            t["mean"], t["variance"], jacobian, t["innovation"], t["noise"]
        ),
    }
    result = torch.compile(calls[name], backend="aot_eager", fullgraph=True)()
    assert not result.requires_grad
