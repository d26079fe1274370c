# SPDX-License-Identifier: Apache-2.0
"""What every op promises on a GPU alone: devices, streams, graphs, and the user's TF32 switches."""

import pytest
import torch

import grng_kernels as gk
from tests.ops.calls import OPS, bitwise

pytestmark = pytest.mark.gpu
ops = pytest.mark.parametrize("name", OPS)
# Ops whose every product is in a kernel of this package; the others call the library, which may sum in
# another order where a graph gives it another workspace.
OWN_PRODUCTS = (
    "kron_factor_update_",
    "kron_factor_conv2d_update_",
    "kron_factor_conv2d_update_-patches",
    "precondition-narrow",
)


def on(device, inputs):
    return {k: t.to(device) for k, t in inputs.items()}


def assert_same(name, got, want):
    if name in OWN_PRODUCTS:
        assert bitwise(got, want)
    else:
        for g, w in zip(got, want, strict=True):
            # A measured residual is itself rounding error.
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


@ops
def test_one_tensor_on_another_device_is_refused(name):
    """And named with the device that it is on, before anything is launched or written."""
    op = OPS[name]
    inputs = on("cuda", op.make())
    op.run(inputs)
    for argument in inputs:
        if argument in ("noise", "probabilities") and name.startswith("kalman_update_"):
            if (argument == "noise") != ("gaussian" in name):
                continue
        elsewhere = {**inputs, argument: inputs[argument].cpu()}
        if len(inputs) == 1:
            op.run(elsewhere)
            continue
        before = {k: t.clone() for k, t in elsewhere.items()}
        with pytest.raises(
            ValueError, match=r"all tensors must be on one device.* on cpu"
        ) as caught:
            op.run(elsewhere)
        assert "on cuda:0" in str(caught.value)
        assert all(torch.equal(t, before[k]) for k, t in elsewhere.items())


@ops
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_tensors_on_another_device_than_the_current_one(name):
    op, inputs = OPS[name], OPS[name].make()
    want = op.run(on("cuda:0", inputs))
    with torch.cuda.device(0):
        got = op.run(on("cuda:1", inputs))
        assert torch.cuda.current_device() == 0
    assert all(t.device == torch.device("cuda:1") for t in got)
    assert_same(name, [t.cpu() for t in got], [t.cpu() for t in want])


@ops
def test_a_side_stream_is_used_and_waits_for_nothing_else(name):
    """What the stream still has to write is what the op reads."""
    op = OPS[name]
    inputs, other = on("cuda", op.make()), on("cuda", op.make())
    want = op.run(inputs)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for k, t in other.items():
            t.copy_(inputs[k])
        got = op.run(other)
    stream.synchronize()
    assert_same(name, got, want)


@ops
def test_replays_of_a_graph_equal_eager_calls(name):
    op = OPS[name]
    inputs = on("cuda", op.make())
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        op.run(inputs)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        got = op.run(inputs)
    for _ in range(2):
        for k, t in on("cuda", op.make()).items():
            inputs[k].copy_(t)
        graph.replay()
        torch.cuda.synchronize()
        assert_same(name, got, op.run(inputs))


@ops
def test_tf32_switches_keep_fp32_results(name, monkeypatch):
    op = OPS[name]
    inputs = on("cuda", op.make())
    want = op.run(inputs)
    for module in (torch.backends.cuda.matmul, torch.backends.cudnn):
        monkeypatch.setattr(module, "allow_tf32", True)
    got = op.run(inputs)
    assert torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.allow_tf32
    assert bitwise(got, want)


@ops
def test_same_input_twice_is_bitwise_equal(name):
    inputs = on("cuda", OPS[name].make())
    assert bitwise(OPS[name].run(inputs), OPS[name].run(inputs))


@ops
def test_no_wait_for_the_device(name):
    inputs = on("cuda", OPS[name].make())
    OPS[name].run(inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        OPS[name].run(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_backend_of_these_tests_is_the_fast_one():
    with gk.use_backend("triton"):
        for name in OWN_PRODUCTS:
            OPS[name].run(on("cuda", OPS[name].make()))
