# SPDX-License-Identifier: Apache-2.0
"""How much memory one call needs beyond its arguments."""

from __future__ import annotations

import mmap
import multiprocessing
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

import torch

CHUNK = 64 * 1024
# More than the difference between now and the peak can be: a guard, never reached.
MOST_BALLAST = 8 * 2**30

T = TypeVar("T")


def _peak_bytes() -> int:
    """Return the largest resident size so far; it never falls."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _up_to_the_peak() -> list[mmap.mmap]:
    """Take memory until the resident size is at its peak: any more is then seen."""
    ballast: list[mmap.mmap] = []
    start = _peak_bytes()
    while _peak_bytes() == start and len(ballast) * CHUNK < MOST_BALLAST:
        block = mmap.mmap(-1, CHUNK)
        for page in range(0, CHUNK, mmap.PAGESIZE):
            block[page] = 1
        ballast.append(block)
    return ballast


def extra_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Return the peak of the memory that one call takes, on top of what is held before it.

    On the CPU it is the growth of the peak resident size, as exact as the kernel counts (some hundred
    KB); what the allocator kept from earlier work and uses again is not seen, so call this in a fresh
    process, after a call on a tiny input has loaded the libraries. On a GPU the caching allocator
    counts.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    ballast = _up_to_the_peak()
    before = _peak_bytes()
    call()
    grown = _peak_bytes() - before
    for block in ballast:
        block.close()
    return grown


def in_fresh_process(function: Callable[..., T], *arguments: object) -> T:
    """Return ``function(*arguments)`` from a new process that has run nothing else."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()
