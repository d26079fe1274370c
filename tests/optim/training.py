# SPDX-License-Identifier: Apache-2.0
"""One small training run for every optimizer class, in all the ways that their contract is tested in."""

import copy
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from grng import KFAC, RENG, RING, LoKO, RankOneNPG, RKalman, SophiaG, SophiaH

CLASSES = 3


class Net(nn.Module):
    """Three projections of one input, a norm that is no layer with curvature, and a head."""

    def __init__(self, recompute=False):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, CLASSES)
        self.recompute = recompute

    def attend(self, x):
        return torch.tanh(self.q(x)) * self.k(x) + self.v(x)

    def forward(self, x):
        h = checkpoint(self.attend, x, use_reentrant=False) if self.recompute else self.attend(x)
        return self.head(self.norm(h))


class Way(NamedTuple):
    """A class with settings, and what it needs of a step."""

    make: Callable[..., Any]
    settings: dict[str, Any]
    rows: int = 8

    def __call__(self, model, **more):
        return self.make(model, **{**self.settings, **more})


# Refreshed every 4 steps, so that what lies between is seen too.
WAYS = {
    "RING": Way(RING, dict(lr=0.02, refresh_every=4)),
    "RING-stagger": Way(RING, dict(lr=0.02, refresh_every=4, stagger=True)),
    "RING-kl_clip": Way(RING, dict(lr=0.05, refresh_every=4, step_length="kl_clip")),
    "RING-exact": Way(RING, dict(lr=0.02, refresh_every=4, fisher="exact")),
    "RENG": Way(RENG, dict(lr=0.02, refresh_every=4, rho_gr=0.1)),
    "RENG-difference": Way(
        RENG, dict(lr=0.02, refresh_every=4, rho_gr=0.1, method="finite_difference")
    ),
    "KFAC": Way(KFAC, dict(lr=0.05, refresh_every=4, factor_every=2)),
    "KFAC-pytorch": Way(
        KFAC, dict(lr=0.05, refresh_every=4, factor_every=3, convention="kfac-pytorch")
    ),
    "SophiaG": Way(SophiaG, dict(lr=0.01, refresh_every=4)),
    "SophiaH": Way(SophiaH, dict(lr=0.01, refresh_every=4)),
    "RKalman": Way(RKalman, dict(batch="stacked")),
    "RKalman-factored": Way(RKalman, dict(forgetting=0.99), rows=1),
    "RKalman-full": Way(RKalman, dict(covariance="full", batch="stacked")),
    "RKalman-ema": Way(RKalman, dict(noise="ema", batch="mean")),
    "LoKO": Way(LoKO, dict(sigma0=0.3)),
    "RankOneNPG": Way(RankOneNPG, dict(lr=0.5, momentum=0.5)),
    "RankOneNPG-scores": Way(RankOneNPG, dict(lr=0.5, scores=3)),
    "RankOneNPG-fixed": Way(
        RankOneNPG, dict(lr=0.02, step_length="fixed", score="mean", weight_decay=0.1)
    ),
}
# One way for each class.
EACH = ("RING", "RENG", "KFAC", "SophiaG", "SophiaH", "RKalman", "LoKO", "RankOneNPG")
GRADIENT = ("RING", "RENG", "KFAC", "SophiaG", "SophiaH")
KRONECKER = ("RING", "RENG", "KFAC")
KALMAN = ("RKalman", "LoKO")


def new_net(dtype=torch.float32, **options):
    torch.manual_seed(5)
    return Net(**options).to(dtype)


def batch(number, rows=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(rows, 4, generator=generator).to(dtype)
    return x, torch.randint(0, CLASSES, (rows,), generator=generator)


def observe_actions(opt, out, number):
    """Show an optimizer of policies actions that were drawn from the outputs, as logits."""
    generator = torch.Generator().manual_seed(number)
    log_probs = out.log_softmax(-1)
    actions = log_probs.detach().float().exp().multinomial(1, generator=generator)
    opt.observe(log_probs.gather(1, actions))


def backward(way, model, opt, number, *, sign=1.0):
    """All of a step up to ``step()``: the batch ``number`` through the model, and back."""
    x, y = batch(number, way.rows, next(model.parameters()).dtype)
    if isinstance(opt, (RKalman, LoKO)):
        out = model(x)
        opt.observe(out, y)
        return F.cross_entropy(out, y).detach()

    def loss_of():
        out = model(x)
        if isinstance(opt, RankOneNPG):
            observe_actions(opt, out, number)
            return sign * F.cross_entropy(out, y)
        if isinstance(opt, SophiaH):
            loss = sign * F.cross_entropy(out, y)
            opt.observe(loss)
            return loss
        opt.observe(out)
        return sign * F.cross_entropy(out, y)

    if isinstance(opt, RENG):
        return opt.backward(loss_of if opt._method == "finite_difference" else loss_of())
    loss = loss_of()
    loss.backward()
    return loss


def train(way, model, opt, numbers, *, sign=1.0):
    for number in numbers:
        backward(way, model, opt, number, sign=sign)
        opt.step()
        opt.zero_grad()


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def same(one, other):
    """Whether two lists of tensors are equal, bit by bit."""
    return len(one) == len(other) and all(map(torch.equal, one, other))


def same_state(one, other):
    """Whether two state dicts have the same entries, dtypes and bits."""
    if isinstance(one, torch.Tensor):
        return (
            isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
        )
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_state(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same_state, one, other))
    return type(one) is type(other) and one == other


def snapshot(model, opt):
    """Parameters and state as they are now, to be compared with later."""
    return copy.deepcopy((values(model), opt.state_dict()))


def quietly(call, *args, **kwargs):
    """Call what may warn of bare parameters."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*given parameters and not a model")
        return call(*args, **kwargs)
