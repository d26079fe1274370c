# SPDX-License-Identifier: Apache-2.0
"""What the grouped factor update promises on a GPU alone: graphs, streams, and no wait for the device."""

import pytest
import torch

from grng_kernels import Info, kron_factor_update_, use_backend
from tests.cases import small_integers

pytestmark = pytest.mark.gpu
SHAPES = ((300, 16), (5000, 130), (70, 768), (64, 64))


@pytest.fixture(autouse=True)
def backend():
    with use_backend("triton"):
        yield


def inputs(dtype=torch.bfloat16):
    xs = [small_integers(*shape, dtype=dtype, device="cuda") for shape in SHAPES]
    return [torch.zeros(x.shape[1], x.shape[1], device="cuda") for x in xs], xs


def wanted(before, xs, decay, scale):
    pairs = zip(before, xs, strict=True)
    return [(decay * f.double() + scale * x.double().mT @ x.double()).float() for f, x in pairs]


@pytest.mark.parametrize("warm", [True, False], ids=["same tensors before", "other tensors before"])
def test_replays_of_a_graph_equal_eager_calls(warm):
    """Between capture and replay many other calls come by, which must not take the graph's table away."""
    factors, xs = inputs()
    first, first_xs = (factors, xs) if warm else inputs()
    kron_factor_update_(first, first_xs, decay=0.5, scale=0.25)
    torch.cuda.synchronize()
    for factor in factors:
        factor.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        info = kron_factor_update_(factors, xs, decay=0.5, scale=0.25)
    for _ in range(100):
        other, other_xs = inputs()
        kron_factor_update_(other, other_xs, decay=0.5, scale=0.25)
    want = [f.clone() for f in factors]
    for _ in range(3):
        for x in xs:
            x.copy_(small_integers(*x.shape, device="cuda"))
        want = wanted(want, xs, 0.5, 0.25)
        graph.replay()
        assert info.tolist() == [Info.OK] * len(xs)
        for factor, value in zip(factors, want, strict=True):
            torch.testing.assert_close(factor, value, rtol=1e-6, atol=1e-3)


def test_streams_have_tables_of_their_own():
    factors, xs = inputs()
    kron_factor_update_(factors, xs, decay=0.0, scale=1.0)
    want = [f.clone() for f in factors]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        kron_factor_update_(factors, xs, decay=0.0, scale=1.0)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(factors, want, strict=True))


def test_no_wait_for_the_device():
    factors, xs = inputs()
    decay = torch.tensor(0.5, device="cuda")
    kron_factor_update_(factors, xs, decay=decay)
    torch.cuda.set_sync_debug_mode("error")
    try:
        kron_factor_update_(factors, xs, decay=decay)
        # New tensors, and so a new table.
        kron_factor_update_([f.clone() for f in factors], [x.clone() for x in xs], decay=0.25)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_grouped_equals_one_by_one_bitwise():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        xs = [torch.randn(shape, device="cuda").to(dtype) for shape in SHAPES]
        together = [torch.eye(x.shape[1], device="cuda") for x in xs]
        alone = [f.clone() for f in together]
        kron_factor_update_(together, xs, decay=0.9)
        for factor, x in zip(alone, xs, strict=True):
            kron_factor_update_(factor, x, decay=0.9)
        assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
