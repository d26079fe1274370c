# SPDX-License-Identifier: Apache-2.0
"""The cache of device tables: built once per key, bounded, and never emptied of what a graph reads."""

import gc
import weakref

import pytest
import torch

from grng_kernels import _table

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def empty(monkeypatch):
    """A cache of its own for every test."""
    for name in ("_recent", "_recorded", "_captured"):
        monkeypatch.setattr(_table, name, type(getattr(_table, name))())


@pytest.fixture
def capturing(monkeypatch):
    """A switch that makes the cache believe that a graph is being captured."""
    state = {"on": False}
    monkeypatch.setattr(_table, "_capturing", lambda device: state["on"])
    return state


@pytest.fixture
def room_for(monkeypatch):
    """Set how many entries are kept."""
    return lambda count: monkeypatch.setattr(_table, "CAPACITY", count)


class Builder:
    """Builds ``[number, number]`` and counts."""

    def __init__(self):
        self.built = []

    def get(self, number):
        def build():
            self.built.append(number)
            return _table.upload(torch.tensor([number, number]), CPU)

        return _table.cached(("key", number), CPU, build)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_upload_copies(dtype):
    values = torch.tensor([1, 2, -3], dtype=dtype)
    copy = _table.upload(values, CPU)
    assert torch.equal(copy, values)
    assert copy.data_ptr() != values.data_ptr()


def test_same_key_is_built_once():
    builder = Builder()
    first = builder.get(1)
    assert builder.get(1) is first
    assert builder.get(2).tolist() == [2, 2]
    assert builder.built == [1, 2]


def test_the_one_used_longest_ago_goes_first(room_for):
    room_for(2)
    builder = Builder()
    for number in (1, 2, 1, 3, 1, 2):
        assert builder.get(number).tolist() == [number, number]
    assert builder.built == [1, 2, 3, 2]


def test_evicted_entries_are_freed(room_for):
    room_for(1)
    builder = Builder()
    gone = weakref.ref(builder.get(1))
    builder.get(2)
    gc.collect()
    assert gone() is None


def test_entry_found_during_capture_stays(capturing, room_for):
    room_for(1)
    builder = Builder()
    data = builder.get(1)
    capturing["on"] = True
    assert builder.get(1) is data
    capturing["on"] = False
    for number in (2, 3, 4):
        builder.get(number)
    assert builder.get(1) is data
    assert builder.built == [1, 2, 3, 4]


def test_entries_kept_for_graphs_do_not_push_out_the_others(capturing, room_for):
    room_for(1)
    builder = Builder()
    builder.get(1)
    capturing["on"] = True
    builder.get(1)
    capturing["on"] = False
    for number in (2, 1, 2):
        builder.get(number)
    assert builder.built == [1, 2]


def test_entry_built_during_capture_stays_and_serves_nobody_else(capturing, room_for):
    """It is filled when the graph is replayed: before that it holds nothing."""
    room_for(1)
    builder = Builder()
    capturing["on"] = True
    kept = weakref.ref(builder.get(1))
    builder.get(1)
    capturing["on"] = False
    builder.get(1)
    for number in (2, 3):
        builder.get(number)
    gc.collect()
    assert builder.built == [1, 1, 1, 2, 3]
    assert kept() is not None


def test_nothing_stays_of_a_build_that_failed():
    builder = Builder()

    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        _table.cached(("key", 1), CPU, fail)
    assert builder.get(1).tolist() == [1, 1]


@pytest.mark.gpu
def test_streams_have_entries_of_their_own():
    built, device = [], torch.device("cuda", torch.cuda.current_device())

    def get():
        def build():
            built.append(1)
            return _table.upload(torch.tensor([7]), device)

        return _table.cached("key", device, build)

    first = get()
    with torch.cuda.stream(torch.cuda.Stream()):
        second = get()
        assert second.tolist() == [7]
    assert first.tolist() == [7]
    assert get() is first
    assert len(built) == 2
