# SPDX-License-Identifier: Apache-2.0
"""Layers that are fed the same tensor: one accumulation and one inverse, and the steps of each alone."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import grng_kernels
from grng import RENG, RING
from grng.curvature import layers as curvature_layers
from grng.optim.shared_inputs import SharedInputs

CLASSES = 3


class Attention(nn.Module):
    """One head; ``make`` builds its projections."""

    def __init__(self, make=lambda name: nn.Linear(6, 6), *, recompute=False):
        super().__init__()
        for name in ("q", "k", "v", "o"):
            setattr(self, name, make(name))
        self.head = nn.Linear(6, CLASSES)
        self.recompute = recompute
        self.skipped = ""

    def attend(self, x):
        q, k, v = (x if n == self.skipped else getattr(self, n)(x) for n in ("q", "k", "v"))
        return self.o(F.scaled_dot_product_attention(q, k, v))

    def forward(self, x):
        x = checkpoint(self.attend, x, use_reentrant=False) if self.recompute else self.attend(x)
        return self.head(x.mean(1))


def step(model, opt, seed, *, parts=1, spoil=None):
    generator = torch.Generator().manual_seed(seed)
    dtype = model.head.weight.dtype
    for _ in range(parts):
        x = torch.randn(8, 5, 6, generator=generator).to(dtype)
        out = model(x)
        opt.observe(out)
        (F.cross_entropy(out, torch.arange(8) % CLASSES) / parts).backward()
    if spoil is not None:
        records = opt._capture.records[next(x for x in opt._layers if x.name == "q")]
        records[spoil].layer_input.data.view(-1)[3] = torch.nan
    opt.step()
    opt.zero_grad()


@pytest.fixture
def counted(monkeypatch):
    """How many factors were averaged, by their order, and how many matrices inverted."""
    counts = {"averaged": [], "inverted": []}
    average, invert = grng_kernels.kron_factor_update_, grng_kernels.damped_inverse
    thin = curvature_layers.diagonal_factor_update_

    def counted_average(factor, x, **options):
        counts["averaged"].append(len(factor))
        return average(factor, x, **options)

    def counted_thin(factor, x, **options):
        counts["averaged"].append(len(factor))
        return thin(factor, x, **options)

    def counted_invert(factors, **options):
        counts["inverted"] += [len(f) for f in factors]
        return invert(factors, **options)

    monkeypatch.setattr(grng_kernels, "kron_factor_update_", counted_average)
    monkeypatch.setattr(grng_kernels, "damped_inverse", counted_invert)
    monkeypatch.setattr(curvature_layers, "diagonal_factor_update_", counted_thin)
    return counts


def alone(monkeypatch):
    """Let nothing be shared."""
    monkeypatch.setattr(SharedInputs, "_key", lambda self, layer, records, sharing: layer)


def test_three_projections_are_averaged_and_inverted_once(counted):
    model = Attention()
    opt = RING(model, refresh_every=1)
    for k in range(3):
        for calls in counted.values():
            calls.clear()
        step(model, opt, k)
        # Order 7, with the bias: q, k and v together, o, the head. Order 6 and 3: the output sides.
        assert sorted(counted["averaged"]) == [3, 6, 6, 6, 6, 7, 7, 7]
        assert sorted(counted["inverted"]) == [3, 6, 6, 6, 6, 7, 7, 7]


@pytest.mark.parametrize(
    ("options", "how"),
    [
        ({}, {}),
        ({"step_length": "kl_clip"}, {}),
        ({"fisher": "exact", "sharing": "reduce"}, {}),
        ({"max_factor_dim": 5}, {}),
        ({}, {"parts": 3}),
        ({}, {"spoil": 0}),
        ({}, {"parts": 2, "spoil": 1}),
    ],
    ids=str,
)
@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "checkpoint"])
def test_the_steps_are_those_of_each_layer_alone(options, how, recompute, monkeypatch):
    torch.manual_seed(0)
    model = Attention(recompute=recompute)
    twin = copy.deepcopy(model)
    together = RING(model, refresh_every=3, **options)
    for k in range(8):
        step(model, together, k, **(how if k == 3 else {"parts": how.get("parts", 1)}))
    alone(monkeypatch)
    apart = RING(twin, refresh_every=3, **options)
    for k in range(8):
        step(twin, apart, k, **(how if k == 3 else {"parts": how.get("parts", 1)}))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
        for key, value in together.state[a].items():
            other = apart.state[b][key]
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other)), key


def test_layers_that_share_an_inverse_have_one_turn(counted):
    model = Attention()
    opt = RING(model, refresh_every=3, stagger=True)
    inverted = []
    for k in range(12):
        counted["inverted"].clear()
        step(model, opt, k)
        inverted.append(counted["inverted"].count(7))
    # q with k and v, o, the head: one at each step.
    assert inverted[3:] == [1] * 9


def test_low_rank_weights_share_the_wide_side(counted):
    class LoraLinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer = nn.Linear(6, 6).requires_grad_(False)
            self.lora_A = nn.ModuleDict({"default": nn.Linear(6, 2, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 6, bias=False)})

        def forward(self, x):
            low = self.lora_A["default"](x)
            return self.base_layer(x) + self.lora_B["default"](low)

    model = Attention(lambda name: LoraLinear())
    opt = RENG(model, refresh_every=1, max_factor_dim=5)
    step(model, opt, 0)
    # Order 6: q, k, v share one of A, o has one; four outputs of B. Order 7: the head.
    assert counted["averaged"].count(6) == 2 + 4
    assert counted["averaged"].count(7) == 1


@pytest.mark.parametrize("what", ["bias", "dropout", "copies"])
def test_other_inputs_are_not_shared(what, counted):
    def make(name):
        if what == "bias":
            return nn.Linear(6, 6, bias=name != "k")
        first = nn.Dropout(0.5) if what == "dropout" else Copy()
        return nn.Sequential(first, nn.Linear(6, 6))

    class Copy(nn.Module):
        def forward(self, x):
            return x.clone()

    model = Attention(make)
    step(model, RING(model), 0)
    # With biases, of q and v together, and of k without: one of order 6 more.
    sizes = counted["averaged"]
    assert (sizes.count(7), sizes.count(6)) == ((3, 5) if what == "bias" else (5, 4))


def test_a_layer_that_missed_statistics_goes_its_own_way(counted, monkeypatch):
    torch.manual_seed(0)
    model = Attention()
    twin = copy.deepcopy(model)
    opt = RING(model, refresh_every=1)

    def run(model, opt):
        for k in range(4):
            counted["averaged"].clear()
            model.skipped = "k" if k == 1 else ""
            step(model, opt, k)

    run(model, opt)
    assert counted["averaged"].count(7) == 4  # q and v, k, o, the head
    alone(monkeypatch)
    run(twin, RING(twin, refresh_every=1))
    assert counted["averaged"].count(7) == 5
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_resumed_run_shares_again(counted):
    torch.manual_seed(0)
    model = Attention()
    opt = RING(model, refresh_every=1)
    step(model, opt, 0)
    twin = copy.deepcopy(model)
    resumed = RING(twin, refresh_every=1)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    for m, o in ((model, opt), (twin, resumed)):
        counted["averaged"].clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            step(m, o, 1)
        assert counted["averaged"].count(7) == 3
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_resumed_run_does_not_share_what_differs(counted):
    model = Attention()
    opt = RING(model, refresh_every=1)
    step(model, opt, 0)
    saved = copy.deepcopy(opt.state_dict())
    place = [p is model.k.weight for g in opt.param_groups for p in g["params"]].index(True)
    saved["state"][place]["input_factor"] *= 2
    opt.load_state_dict(saved)
    counted["averaged"].clear()
    step(model, opt, 1)
    assert counted["averaged"].count(7) == 4
