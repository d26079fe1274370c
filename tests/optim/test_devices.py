# SPDX-License-Identifier: Apache-2.0
"""A model on several devices: no call and no stack of numbers mixes them, and the steps are the same.

Without a GPU only the sorting can be run: the layers are said to be on two devices.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from grng import KFAC, RENG, RING
from grng.optim import devices


def train(make, *, dtype=torch.float64, places=("cpu", "cpu", "cpu")):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    model.to(dtype)
    for layer, place in zip(model[::2], places, strict=True):
        layer.to(place)
    opt = make(model)
    for _ in range(4):
        x = torch.randn(8, 4, dtype=dtype)
        for layer in model:
            weight = getattr(layer, "weight", x)
            x = layer(x.to(weight.device))
        opt.observe(x)
        F.cross_entropy(x, (torch.arange(8) % 3).to(x.device)).backward()
        opt.step()
        opt.zero_grad()
    return [p.detach().cpu() for p in model.parameters()]


MAKERS = {
    "RING": lambda m: RING(m, refresh_every=2),
    "RING-small-factors": lambda m: RING(m, refresh_every=2, max_factor_dim=5),
    "RING-kl_clip": lambda m: RING(m, refresh_every=2, step_length="kl_clip"),
    "RENG": lambda m: RENG(m, refresh_every=2),
    "KFAC": lambda m: KFAC(m, refresh_every=2),
    "KFAC-kfac-pytorch": lambda m: KFAC(m, refresh_every=2, convention="kfac-pytorch"),
}


@pytest.mark.parametrize("name", MAKERS)
def test_layers_that_are_sorted_into_several_calls_take_the_same_steps(name, monkeypatch):
    whole = train(MAKERS[name])
    calls = itertools.count()

    def in_turns(items, tensor_of):
        for item in items:
            assert isinstance(tensor_of(item), torch.Tensor)
        next(calls)
        return [part for part in (list(items[::2]), list(items[1::2])) if part]

    for module in ("factors", "grafting", "kfac"):
        monkeypatch.setattr(f"grng.optim.{module}.by_device", in_turns)
    parts = train(MAKERS[name])
    assert next(calls) > 0
    for got, want in zip(parts, whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_items_keep_their_order_within_a_device():
    items = [(i, torch.empty(1, device="meta" if i % 3 else "cpu")) for i in range(7)]
    found = devices.by_device(items, lambda item: item[1])
    assert [[i for i, _ in part] for part in found] == [[0, 3, 6], [1, 2, 4, 5]]
    assert devices.by_device([], lambda item: item) == []


@pytest.mark.gpu
@pytest.mark.parametrize("name", MAKERS)
def test_a_model_on_two_devices_takes_the_same_steps(name):
    alone = train(MAKERS[name])
    for places in (("cpu", "cuda", "cpu"), ("cuda", "cpu", "cuda")):
        for got, want in zip(train(MAKERS[name], places=places), alone, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("cls", [RING, RENG, KFAC])
@pytest.mark.parametrize("at", ["cpu", "cuda"])
def test_a_learning_rate_may_be_on_any_device(cls, at):
    alone = train(lambda m: cls(m, lr=0.02, refresh_every=2))
    lr = torch.tensor(0.02, dtype=torch.float64, device=at)
    found = train(lambda m: cls(m, lr=lr, refresh_every=2), places=("cpu", "cuda", "cpu"))
    for got, want in zip(found, alone, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


def test_a_number_goes_to_the_tensor_it_is_for():
    there, here = torch.empty(2, device="meta"), torch.tensor(0.5)
    assert devices.beside(0.5, there) == 0.5
    assert devices.beside(here, there) is here
    assert devices.beside(torch.empty((), device="meta"), there).device.type == "meta"
    tensors = [torch.ones(2), torch.full((3,), 2.0)]
    devices.scale_(tensors, here)
    devices.scale_(tensors, 0.5)
    assert [t.tolist() for t in tensors] == [[0.25] * 2, [0.5] * 3]
