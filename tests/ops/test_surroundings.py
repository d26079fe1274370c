# SPDX-License-Identifier: Apache-2.0
"""What surrounds a call does not change its result: threads, the user's switches, autograd, old memory."""

import os
import subprocess
import sys
import threading

import pytest
import torch

import grng_kernels as gk
from tests.cases import USER_SWITCHES, assert_within_budget, threads
from tests.ops.calls import OP_BACKEND_IDS, OP_BACKENDS, OPS, bitwise

pytestmark = pytest.mark.parametrize(("name", "backend"), OP_BACKENDS, ids=OP_BACKEND_IDS)


@pytest.fixture
def op(name, backend):
    with gk.use_backend(backend):
        yield OPS[name]


def in_fp64(op, inputs):
    """The yardstick: the reference with fp64 inputs."""
    with gk.use_backend("reference"):
        return op.run({k: t.double() for k, t in inputs.items()})


def assert_same_within_budget(op, inputs, got, base):
    for g, b, ref in zip(got, base, in_fp64(op, inputs), strict=True):
        if g.is_floating_point():
            # A measured residual is itself rounding error: only its size means something.
            if ref.abs().max() > 1e-4:
                assert g.dtype == b.dtype
                assert_within_budget(g, ref, b)
        else:
            assert torch.equal(g, b)


def test_same_input_twice_is_bitwise_equal(op):
    inputs = op.make()
    assert bitwise(op.run(inputs), op.run(inputs))


def test_number_of_threads_stays_within_budget(op, backend):
    inputs = op.make()
    with threads(1):
        one = op.run(inputs)
    with threads(2):
        two = op.run(inputs)
    assert_same_within_budget(op, inputs, two, one)
    if backend == "cpu":
        assert bitwise(one, two)


@pytest.mark.parametrize("switch", USER_SWITCHES)
def test_user_switch_keeps_fp32_results(op, switch):
    inputs = op.make()
    plain = op.run(inputs)
    with USER_SWITCHES[switch]():
        got = op.run(inputs)
    assert_same_within_budget(op, inputs, got, plain)


def test_inputs_that_require_grad(op):
    """No gradient is defined: the result says so at backward, and is never a silent zero."""
    inputs = op.make()
    plain = op.run(inputs)
    leaves = {k: t.clone().requires_grad_() for k, t in inputs.items()}
    got = op.run({k: t.clone() if k in ("mean", "variance") else t for k, t in leaves.items()})
    assert bitwise([g.detach() for g in got], plain)
    for tensor in got:
        if tensor.is_floating_point() and not tensor.requires_grad:
            with pytest.raises(RuntimeError, match="does not require grad"):
                tensor.sum().backward()
    assert leaves.get("x", torch.zeros(1)).grad is None


def test_inputs_stay_as_they_were(op):
    inputs = op.make()
    before = {k: t.clone() for k, t in inputs.items()}
    op.run(inputs)
    assert all(torch.equal(inputs[k], before[k]) for k in inputs)


def test_calls_from_two_threads_do_not_mix(op, backend):
    inputs = [op.make() for _ in range(4)]
    alone = [op.run(t) for t in inputs]
    results = [None] * 4

    def work(i):
        with gk.use_backend(backend):
            results[i] = op.run(inputs[i])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for got, want in zip(results, alone, strict=True):
        assert bitwise(got, want)


IN_A_FRESH_PROCESS = """
import sys, torch
import grng_kernels as gk
from tests.ops.calls import OPS, OP_BACKENDS
{switch}
failed = []
for name, backend in OP_BACKENDS:
    torch.manual_seed(5)
    op = OPS[name]
    with gk.use_backend(backend):
        try:
            inputs = op.make()
            torch.save([op.run(inputs), op.run(inputs)], sys.argv[1] + f"/{{name}}-{{backend}}.pt")
        except Exception as error:
            torch.save(f"{{type(error).__name__}}: {{error}}", sys.argv[1] + f"/{{name}}-{{backend}}.pt")
"""
SWITCHES = {
    # glibc then fills fresh memory with 0x7f, a huge number in fp32 and fp64.
    "dirty_memory": ("", {"MALLOC_PERTURB_": "128"}),
    # torch's newer interface to the same switch; it does not mix with the older one in one process.
    "new_precision_interface": ("torch.backends.mkldnn.matmul.fp32_precision = 'bf16'", {}),
}


@pytest.fixture(scope="module")
def fresh_process(tmp_path_factory):
    done = {}

    def results(switch, name, backend):
        if switch not in done:
            done[switch] = tmp_path_factory.mktemp(switch)
            line, environment = SWITCHES[switch]
            subprocess.run(
                [sys.executable, "-c", IN_A_FRESH_PROCESS.format(switch=line), str(done[switch])],
                env=os.environ | environment,
                check=True,
                timeout=300,
            )
        return torch.load(done[switch] / f"{name}-{backend}.pt")

    return results


@pytest.mark.parametrize("switch", SWITCHES)
def test_switch_of_a_whole_process_keeps_results(op, name, backend, switch, fresh_process):
    torch.manual_seed(5)
    inputs = op.make()
    plain = op.run(inputs)
    got = fresh_process(switch, name, backend)
    assert not isinstance(got, str), got
    assert_same_within_budget(op, inputs, got[0], plain)


def test_first_call_of_a_process_is_bitwise_the_second(name, backend, fresh_process):
    """Nothing is tuned, compiled or run twice behind the first call: a state is updated once."""
    got = fresh_process("dirty_memory", name, backend)
    assert not isinstance(got, str), got
    assert bitwise(*got)
