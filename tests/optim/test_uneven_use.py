# SPDX-License-Identifier: Apache-2.0
"""Layers that are not used in every step: their curvature ages by the optimizer's steps, like all others'."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from grng import RING

EVERY = 5


class Heads(nn.Module):
    """A body with two heads, of which a step uses one."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.heads = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)])

    def forward(self, x, head):
        return self.heads[head](self.body(x).tanh())


def train(model, opt, steps, *, set_to_none=True):
    """Use the heads in turn; yield after each step."""
    for k in steps:
        generator = torch.Generator().manual_seed(k)
        out = model(torch.randn(8, 4, generator=generator), k % 2)
        opt.observe(out)
        F.cross_entropy(out, torch.arange(8) % 3).backward()
        opt.step()
        opt.zero_grad(set_to_none)
        yield k


@pytest.mark.parametrize("stagger", [False, True])
@pytest.mark.parametrize("every", [EVERY, 4])
def test_a_layer_that_misses_the_refreshes_has_its_own(stagger, every):
    torch.manual_seed(0)
    model = Heads()
    opt = RING(model, refresh_every=every, stagger=stagger)
    states = [opt.state[x.weight] for x in opt._layers]
    seen = [(0, None, None)] * len(states)
    for k in train(model, opt, range(8 * every)):
        for i, state in enumerate(states):
            if "input_factor" not in state:
                continue
            count, inverse = int(state["output_updates"]), state["output_inverse"].clone()
            last, before, inverted = seen[i]
            changed = before is None or not torch.equal(before, inverse)
            seen[i] = (count, inverse, k if changed else inverted)
            # Used in every other step: a refresh is at most one step late, a staggered inverse one turn more.
            assert k - state["updated_at"] <= every
            assert k - seen[i][2] <= (2 * every + 2 if stagger else every)
            assert count >= last
    assert all(count >= 8 for count, _, _ in seen)


def test_the_ages_of_layers_survive_a_checkpoint_and_older_ones_load():
    torch.manual_seed(0)
    model = Heads()
    opt = RING(model, refresh_every=EVERY, stagger=True)
    list(train(model, opt, range(13)))
    twin, file = copy.deepcopy(model), io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = RING(twin, refresh_every=EVERY, stagger=True)
    resumed.load_state_dict(saved)
    for m, o in ((model, opt), (twin, resumed)):
        list(train(m, o, range(13, 40)))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)

    for state in saved["state"].values():
        state.pop("updated_at", None)
        state.pop("stale_since", None)
    older = RING(twin, refresh_every=EVERY, stagger=True)
    older.load_state_dict(saved)
    list(train(twin, older, range(13, 40)))
    for layer in older._layers:
        assert int(older.state[layer.weight]["output_updates"]) >= 7


# ---- the trust region ----


def ratio_of(opt):
    return opt.state[opt._all_layers[0].weight]["fisher_ratio"].clone()


def test_zero_gradients_of_a_resting_head_do_not_freeze_the_trust_region():
    torch.manual_seed(0)
    model = Heads()
    opt = RING(model, refresh_every=EVERY)
    ratios = {k: ratio_of(opt) for k in train(model, opt, range(31), set_to_none=False)}
    changes = [k for k in range(1, 31) if not torch.equal(ratios[k], ratios[k - 1])]
    assert {10, 15, 20, 25, 30} <= set(changes)


def test_a_layer_that_lost_its_hooks_does_not_freeze_the_trust_region():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    opt = RING(model, refresh_every=2, fisher="exact", max_kl=1e9, weight_decay=0.0)

    def step(x):
        opt.zero_grad()
        out = model(x)
        opt.observe(out)
        F.cross_entropy(out, torch.arange(len(x)) % 3).backward()
        opt.step()

    xs = torch.randn(7, 8, 4, dtype=torch.float64)
    step(xs[0])
    model[0]._forward_hooks.clear()
    with pytest.warns(RuntimeWarning, match="no new statistics reach 0"):
        for x in xs[1:6]:
            step(x)
    before = [p.detach().clone() for p in model[2].parameters()]
    hidden = model[1](model[0](xs[6])).detach()
    logits = model[2](hidden).detach()
    step(xs[6])  # step 6, a refresh
    moved = [b - p.detach() for p, b in zip(model[2].parameters(), before, strict=True)]
    change, p = F.linear(hidden, *moved), logits.softmax(-1)
    form = ((p * change.square()).sum(-1) - (p * change).sum(-1).square()).mean()
    length = sum(m.square().sum() for m in moved)
    torch.testing.assert_close(ratio_of(opt), form / length)
