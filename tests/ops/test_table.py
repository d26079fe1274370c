# SPDX-License-Identifier: Apache-2.0
"""The cache of device tables: built once per key, bounded, and never emptied of what a graph reads."""

import gc
import weakref

import pytest
import torch

from grng_kernels import _table
from grng_kernels._table import TableCache

CPU = torch.device("cpu")


@pytest.fixture
def capturing(monkeypatch):
    """A switch that makes the cache believe that a graph is being captured."""
    state = {"on": False}
    monkeypatch.setattr(_table, "_capturing", lambda device: state["on"])
    return state


class Builder:
    """Builds ``[number, number]`` with the number as the plan, and counts."""

    def __init__(self):
        self.built = []

    def get(self, cache, number):
        def build():
            self.built.append(number)
            return [number, number], number

        return cache.get(CPU, ("key", number), build)


def test_table_holds_what_was_built():
    table = TableCache().get(CPU, "key", lambda: ([1, 2**62, -3], "plan"))
    assert table.plan == "plan"
    assert table.data.dtype == torch.int64
    assert table.data.tolist() == [1, 2**62, -3]


def test_same_key_is_built_once():
    builder, cache = Builder(), TableCache()
    first = builder.get(cache, 1)
    assert builder.get(cache, 1).data is first.data
    assert builder.get(cache, 2).data.tolist() == [2, 2]
    assert builder.built == [1, 2]


def test_the_one_used_longest_ago_goes_first():
    builder, cache = Builder(), TableCache(size=2)
    for number in (1, 2, 1, 3, 1, 2):
        assert builder.get(cache, number).plan == number
    assert builder.built == [1, 2, 3, 2]


def test_evicted_tables_are_freed():
    builder, cache = Builder(), TableCache(size=1)
    gone = weakref.ref(builder.get(cache, 1).data)
    builder.get(cache, 2)
    gc.collect()
    assert gone() is None


def test_table_found_during_capture_stays(capturing):
    builder, cache = Builder(), TableCache(size=1)
    data = builder.get(cache, 1).data
    capturing["on"] = True
    assert builder.get(cache, 1).data is data
    capturing["on"] = False
    for number in (2, 3, 4):
        builder.get(cache, number)
    assert builder.get(cache, 1).data is data
    assert builder.built == [1, 2, 3, 4]


def test_tables_kept_for_graphs_do_not_push_out_the_others(capturing):
    builder, cache = Builder(), TableCache(size=1)
    builder.get(cache, 1)
    capturing["on"] = True
    builder.get(cache, 1)
    capturing["on"] = False
    builder.get(cache, 2)
    builder.get(cache, 1)
    builder.get(cache, 2)
    assert builder.built == [1, 2]


def test_table_built_during_capture_stays_and_serves_nobody_else(capturing):
    """It is filled when the graph is replayed: before that it holds nothing."""
    builder, cache = Builder(), TableCache(size=1)
    capturing["on"] = True
    kept = weakref.ref(builder.get(cache, 1).data)
    builder.get(cache, 1)
    capturing["on"] = False
    builder.get(cache, 1)
    for number in (2, 3):
        builder.get(cache, number)
    gc.collect()
    assert builder.built == [1, 1, 1, 2, 3]
    assert kept() is not None


def test_nothing_stays_of_a_build_that_failed():
    builder, cache = Builder(), TableCache()

    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cache.get(CPU, ("key", 1), fail)
    assert builder.get(cache, 1).data.tolist() == [1, 1]


@pytest.mark.gpu
def test_streams_have_tables_of_their_own():
    builder, cache, device = [], TableCache(), torch.device("cuda", torch.cuda.current_device())

    def get():
        return cache.get(device, "key", lambda: (builder.append(1) or [7], None)).data

    first = get()
    with torch.cuda.stream(torch.cuda.Stream()):
        second = get()
        assert second.tolist() == [7]
    assert first.tolist() == [7]
    assert get() is first
    assert len(builder) == 2
