# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of ``precondition`` in a CUDA graph: their tables live as long as the graph."""

import pytest
import torch

from grng_kernels import precondition, use_backend
from grng_kernels.precondition import reference
from tests.cases import small_integers

pytestmark = pytest.mark.gpu
SHAPES = ((16, 768), (768, 16), (8, 65), (65, 8))


@pytest.fixture(autouse=True)
def backend():
    with use_backend("triton"):
        yield


def arguments():
    return (
        [small_integers(*shape, device="cuda") for shape in SHAPES],
        [small_integers(m, m, device="cuda") for m, _ in SHAPES],
        [small_integers(n, n, device="cuda") for _, n in SHAPES],
    )


def assert_right(outs, lists):
    for out, *item in zip(outs, *lists, strict=True):
        want = torch.empty_like(out)
        reference.precondition_into(want, *item)
        assert torch.equal(out, want)


@pytest.mark.parametrize("warm", [True, False], ids=["table there", "table built in the capture"])
def test_replay_reads_new_gradients(warm):
    lists = arguments()
    outs = [torch.zeros(shape, device="cuda") for shape in SHAPES]
    # The kernels are compiled before: that is not allowed while capturing.
    precondition(*lists)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    if warm:
        with torch.cuda.stream(stream):
            precondition(*lists, out=outs)
    with torch.cuda.graph(graph, stream=stream):
        precondition(*lists, out=outs)
    # Many other tables: enough to push out one that is not kept.
    for _ in range(40):
        precondition(*arguments())
    for scale in (1, 2):
        for grad in lists[0]:
            grad.mul_(scale)
        graph.replay()
        assert_right(outs, lists)


def test_call_after_a_capture_that_was_not_replayed():
    lists = arguments()
    outs = [torch.zeros(shape, device="cuda") for shape in SHAPES]
    precondition(*lists)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        precondition(*lists, out=outs)
    precondition(*lists, out=outs)
    assert_right(outs, lists)
