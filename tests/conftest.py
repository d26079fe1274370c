# SPDX-License-Identifier: Apache-2.0
"""What every test gets: a seed, allocations full of NaN inside the package, a backend, a device."""

import os
import sys
import zlib
from typing import NamedTuple

import pytest
import torch

import grng_kernels
from tests.properties import settings

SEED = os.environ.get("GRNG_TEST_SEED")
INT_SENTINEL = -1234567

settings.register_profile(
    "grng", derandomize=SEED is None, deadline=None, max_examples=60, database=None
)
settings.load_profile("grng")
# Workers of pytest-xdist share the cores: threads that wait for each other would take most of the time.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seed(request):
    """Seed torch from the test's name; the number is in the captured output of a failing test."""
    value = int(SEED) if SEED else zlib.crc32(request.node.nodeid.encode())
    print(f"to repeat: GRNG_TEST_SEED={value}")
    torch.manual_seed(value)
    return value


def _poison(tensor):
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.fill_(float("nan"))
    return tensor.fill_(True if tensor.dtype == torch.bool else INT_SENTINEL)


class _PoisonedTorch:
    """The module torch, as the package sees it in a test: its fresh memory is full of NaN."""

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, *args, **kwargs):
        return _poison(torch.empty(*args, **kwargs))

    def empty_like(self, *args, **kwargs):
        return _poison(torch.empty_like(*args, **kwargs))

    def empty_strided(self, *args, **kwargs):
        return _poison(torch.empty_strided(*args, **kwargs))


def _poisoned_new_empty(tensor, *args, **kwargs):
    fresh = _new_empty(tensor, *args, **kwargs)
    caller = sys._getframe(1).f_globals.get("__name__", "")
    return _poison(fresh) if caller.startswith("grng_kernels") else fresh


_new_empty = torch.Tensor.new_empty


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch):
    """Fill with NaN (integers: a sentinel) whatever the package allocates without initialising it."""
    for name, module in list(sys.modules.items()):
        if name.startswith("grng_kernels") and getattr(module, "torch", None) is torch:
            monkeypatch.setattr(module, "torch", _PoisonedTorch())
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned_new_empty)


class Backend(NamedTuple):
    name: str
    device: str


@pytest.fixture(
    params=[
        pytest.param(Backend("reference", "cpu"), id="reference"),
        pytest.param(Backend("cpu", "cpu"), id="cpu"),
        pytest.param(Backend("reference", "cuda"), id="reference-cuda", marks=pytest.mark.gpu),
        pytest.param(Backend("auto", "cuda"), id="fast-cuda", marks=pytest.mark.gpu),
    ]
)
def backend(request):
    """Each backend that an op with kernels of its own can run on here, already in force."""
    name, _ = request.param
    if name != "auto":
        status = grng_kernels.backends()[name]
        if not status.available:
            pytest.skip(f"backend {name}: {status.reason}")
    with grng_kernels.use_backend(name):
        yield request.param


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Each device, for the ops whose only backend is the reference."""
    return request.param
