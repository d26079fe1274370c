# SPDX-License-Identifier: Apache-2.0
"""What differs between the CPU and a GPU: the stopwatch, empty caches, captured graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from harness.timer import Call, CpuStopwatch, CudaStopwatch, Stopwatch

# Larger than the last cache of any current CPU or GPU (triton.testing clears as much).
FLUSH_BYTES = 256 * 2**20
# A warm graph holds so many calls: the launch of the graph itself is then a small part of each.
CALLS_PER_GRAPH = 10


class NotCapturableError(RuntimeError):
    """A call cannot be part of a CUDA graph; the message says why."""


def stopwatch_for(device: torch.device) -> Stopwatch:
    """Return the stopwatch of a device."""
    return CudaStopwatch() if device.type == "cuda" else CpuStopwatch()


def cache_flush(device: torch.device) -> Callable[[], object]:
    """Return a call that leaves nothing of the inputs in the caches."""
    buffer = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device)
    return buffer.zero_


def _end_allocation(graph: torch.cuda.CUDAGraph) -> None:
    """Tell the allocator that a failed capture is over: torch does not get that far by itself."""
    with contextlib.suppress(Exception):
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), graph.pool())


def _first_cause(error: BaseException) -> BaseException:
    """Return what went wrong first: ending a broken capture raises once more."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def capture(call: Call, calls: int) -> Call:
    """Record consecutive calls in one CUDA graph.

    Args:
        call: Works on tensors that stay where they are.
        calls: How many go into the graph.

    Returns:
        The replay.

    Raises:
        NotCapturableError: Something in the call is not allowed in a graph.
    """
    # Not torch.cuda.graph: where the capture fails, it leaves its side stream the current one.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
            torch.cuda.synchronize()
            graph.capture_begin()
            try:
                for _ in range(calls):
                    call()
            finally:
                graph.capture_end()
    except Exception as error:
        _end_allocation(graph)
        torch.cuda.synchronize()
        cause = _first_cause(error)
        reason = str(cause).strip().split("\n")[0]
        raise NotCapturableError(f"{type(cause).__name__}: {reason}"[:200]) from error
    torch.cuda.synchronize()
    return graph.replay
