# SPDX-License-Identifier: Apache-2.0
"""A run that is saved and goes on elsewhere is the uninterrupted run, bit by bit, wherever it stopped."""

import copy
import io

import pytest
import torch
from torch import nn

from tests.optim.training import WAYS, Way, new_net, same, same_state, train, values

# Steps 0..9: a refresh is at 0, 1, 2, 4 and 8 (RING, RENG), at 0, 4 and 8 (KFAC, the Sophias).
STEPS = 10
# Compared over more than one refresh: what differs later, differs in the state then.
CYCLE = 5
ALL = pytest.mark.parametrize("name", WAYS)


def continued(way, model, opt, build):
    """A new model and a new optimizer, with what a file kept of the two."""
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    twin = build()
    with torch.no_grad():
        for p in twin.parameters():  # whatever the new process began with
            p.add_(1.0)
    other = way(twin)
    twin.load_state_dict(saved["model"])
    other.load_state_dict(saved["opt"])
    return twin, other


def check(way, build, steps=STEPS, run=train):
    whole = build()
    opt = way(whole)
    after = []
    for number in range(steps):
        run(way, whole, opt, [number])
        after.append(copy.deepcopy((values(whole), opt.state_dict())))
    model = build()
    first = way(model)
    for stop in range(steps):
        twin, other = continued(way, model, first, build)
        assert same_state(first.state_dict(), other.state_dict())
        last = min(stop + CYCLE, steps)
        for number in range(stop, last):
            run(way, twin, other, [number])
            assert same(values(twin), after[number][0]), (
                f"saved before {stop}, differs after {number}"
            )
        assert same_state(other.state_dict(), after[last - 1][1])
        run(way, model, first, [stop])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@ALL
def test_a_resumed_run_is_the_uninterrupted_one(name, dtype):
    check(WAYS[name], lambda: new_net(dtype))


@ALL
def test_a_run_that_is_resumed_after_every_step_is_the_uninterrupted_one(name):
    way = WAYS[name]
    whole = new_net()
    opt = way(whole)
    train(way, whole, opt, range(STEPS))
    model = new_net()
    resumed = way(model)
    for number in range(STEPS):
        model, resumed = continued(way, model, resumed, new_net)
        train(way, model, resumed, [number])
    assert same(values(whole), values(model))


@pytest.mark.parametrize(
    "name", ["RING", "RING-stagger", "KFAC", "SophiaG", "RKalman", "RankOneNPG"]
)
def test_a_resumed_run_with_steps_that_were_skipped(name):
    """Statistics, counts and schedules go on where a step with NaN changed nothing."""

    def run(way, model, opt, numbers):
        for number in numbers:
            train(way, model, opt, [number])
            if number % 3 == 1:
                before = values(model)
                bad = torch.full((way.rows, 4), float("nan")).to(before[0].dtype)
                out, y = model(bad), torch.zeros(way.rows, dtype=torch.long)
                if name == "RKalman":
                    opt.observe(out, y)
                elif name == "RankOneNPG":
                    opt.observe(out[:, 0])
                else:
                    nn.functional.cross_entropy(out, y).backward()
                opt.step()
                opt.zero_grad()
                assert same(before, values(model))

    check(WAYS[name], new_net, run=run)


class Uneven(nn.Module):
    """Two heads, of which each step uses one: layers have statistics of different ages."""

    def __init__(self):
        super().__init__()
        self.body, self.heads = nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])

    def forward(self, x):
        # Which one is told by the data, so that the run is the same whenever it is resumed.
        return self.heads[int(x.sum() > 0)](torch.tanh(self.body(x)))


@ALL
def test_a_resumed_run_with_heads_that_rest(name):
    def build():
        torch.manual_seed(5)
        return Uneven()

    check(WAYS[name], build)


@pytest.mark.parametrize("name", ["RING", "KFAC", "SophiaG", "RKalman", "RankOneNPG"])
def test_a_learning_rate_in_a_tensor_and_a_scheduler_resume(name):
    way = WAYS[name]

    def make(model):
        return way(model, lr=torch.tensor(way.settings.get("lr", 1.0)))

    def run(way, model, opt, numbers):
        for number in numbers:
            train(way, model, opt, [number])
            for group in opt.param_groups:
                group["lr"] *= 0.9

    check(Way(make, {}, way.rows), new_net, run=run)
