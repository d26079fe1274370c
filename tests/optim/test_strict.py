# SPDX-License-Identifier: Apache-2.0
"""``strict``: what else is a fallback with a warning is an error, before any parameter changes."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import grng_kernels
from grng import KFAC, RENG, RING, PreconditionerError

OPTIMIZERS = (RING, KFAC, RENG)
CLASSES = 3


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, CLASSES))


def backward(model, opt, *, observe=True, x=None):
    out = model(torch.randn(8, 4) if x is None else x)
    if observe:
        opt.observe(out)
    F.cross_entropy(out, torch.arange(8) % CLASSES).backward()


def take_step(model, opt, **options):
    backward(model, opt, **options)
    opt.step()
    opt.zero_grad()


def values_of(model):
    return [p.detach().clone() for p in model.parameters()]


def refuses(model, opt, match, **options):
    """The step raises, and no parameter moves."""
    before = values_of(model)
    with pytest.raises(PreconditionerError, match=match):
        take_step(model, opt, **options)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


# ---- at construction ----


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_matrices_that_adamw_would_train_are_named(optimizer):
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(7, 4),
            "norm": nn.LayerNorm(4),
            "deep": nn.Conv3d(2, 3, 2),
            "head": nn.Linear(4, 3),
        }
    )
    with pytest.raises(
        ValueError,
        match=rf"{optimizer.__name__}: strict, but AdamW would train embed.weight \[7, 4\] \(Embedding has "
        r"no Kronecker factors here\); deep.weight \[3, 2, 2, 2, 2\] \(Conv3d has no.*"
        r"strict=\(nn.Embedding,\)",
    ):
        optimizer(model, strict=True)
    with pytest.raises(ValueError, match=r"would train deep.weight \[3, 2, 2, 2, 2\] \(Conv3d"):
        optimizer(model, strict=(nn.Embedding,))
    optimizer(model, strict=(nn.Embedding, nn.Conv3d))
    model["deep"].requires_grad_(False)
    model["embed"].requires_grad_(False)
    assert "LayerNorm" in optimizer(model, strict=True).explain()


def test_a_tied_weight_is_allowed_with_one_of_its_owners():
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    model["head"].weight = model["embed"].weight
    with pytest.raises(ValueError, match=r"shared: embed.weight, head.weight"):
        RING(model, strict=())
    RING(model, strict=(nn.Embedding,))


def test_a_lazy_module_is_named():
    with pytest.raises(ValueError, match=r"0.weight unknown shape"):
        RING(nn.Sequential(nn.LazyLinear(4)), strict=True)


def test_too_many_are_counted():
    model = nn.ModuleList(nn.Embedding(2, 2) for _ in range(11))
    with pytest.raises(ValueError, match=r"7.weight \[2, 2\] \([^)]*\) and 3 more"):
        RING(model, strict=True)


def test_bare_parameters_and_other_values_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"RING: strict, but given parameters .*RING\(model\)"):
            RING(make_model().parameters(), strict=True)
    for value in (1, "yes", [nn.Embedding], (nn.Embedding(2, 2),), None):
        with pytest.raises(ValueError, match="KFAC: strict must be True, False, or a tuple"):
            KFAC(make_model(), strict=value)


# ---- in a step ----


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_without_fallbacks_is_that_without_strict(optimizer):
    runs = []
    for strict in (False, True):
        model = make_model()
        opt = optimizer(model, refresh_every=2, strict=strict)
        for _ in range(6):
            take_step(model, opt)
        runs.append(values_of(model))
        copy.deepcopy((model, opt))
    assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))


def remove_all_hooks(model):
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_hooks_with_kwargs.clear()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("late", "match"),
    [(False, "no statistics reached 0, 2"), (True, "no new statistics reach 0, 2")],
)
def test_hooks_that_are_gone(optimizer, late, match):
    model = make_model()
    opt = optimizer(model, refresh_every=1, strict=True)
    if late:
        take_step(model, opt)
    remove_all_hooks(model)
    for _ in range(2):
        refuses(model, opt, f"strict refuses a fallback: {match}")
        opt.zero_grad()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_input_that_was_overwritten(optimizer):
    model = make_model()
    opt = optimizer(model, refresh_every=1, strict=True)
    take_step(model, opt)
    for _ in range(2):
        x, before = torch.randn(8, 4), values_of(model)
        backward(model, opt, x=x)
        x.zero_()
        with pytest.raises(PreconditionerError, match="the input of 0 was changed in place"):
            opt.step()
        opt.zero_grad()
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    take_step(model, opt)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_statistics_without_observe(optimizer):
    model = make_model()
    opt = optimizer(model, refresh_every=1, strict=True)
    refuses(model, opt, r'as with fisher="empirical": observe\(\) was not called', observe=False)
    opt.zero_grad()
    take_step(model, opt)
    opt = optimizer(make_model(), refresh_every=1, strict=True, fisher="empirical")
    take_step(model, opt, observe=False)


def test_a_parameter_that_was_frozen_at_construction():
    model = make_model()
    model[2].weight.requires_grad_(False)
    opt = RING(model, strict=True)
    model[2].weight.requires_grad_(True)
    for _ in range(2):
        refuses(model, opt, r"2.weight had requires_grad=False")
        opt.zero_grad()


def test_examples_that_do_not_come_first():
    class TimeFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.head = nn.Linear(4, 6), nn.Linear(6, CLASSES)

        def forward(self, x):  # [5 positions, 8 examples, 4]
            return self.head(self.wide(x.transpose(0, 1).contiguous()).tanh().mean(0))

    model = TimeFirst()
    opt = RING(model, strict=True)
    for _ in range(2):
        refuses(model, opt, "do not have the examples of the loss", x=torch.randn(8, 5, 4))
        opt.zero_grad()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_failed_inverse_raises_in_the_step_after(optimizer, monkeypatch):
    model = make_model()
    opt = optimizer(model, refresh_every=1, strict=True, check_interval=100)
    take_step(model, opt)
    real = grng_kernels.damped_inverse

    def failing(*args, **kwargs):
        result = real(*args, **kwargs)
        return result._replace(info=[torch.full_like(i, 3) for i in result.info])

    with monkeypatch.context() as patched:
        patched.setattr(grng_kernels, "damped_inverse", failing)
        take_step(model, opt)
    refuses(model, opt, r"failed 1 times in a row, last with info 3 \(OVERFLOW\)")
    opt.zero_grad()
    # Said once: who goes on is not told of it again.
    take_step(model, opt)
    take_step(model, opt)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_statistics_that_overflow_raise_in_the_step_after(optimizer):
    model = make_model()
    opt = optimizer(model, refresh_every=1, strict=True)
    take_step(model, opt)
    take_step(model, opt, x=torch.full((8, 4), 2e19))
    refuses(model, opt, r"strict: 1 factor failures in 0, seen at step 2")


def test_failures_before_a_state_was_loaded_are_excused():
    model = make_model()
    opt = RING(model, refresh_every=1)
    take_step(model, opt)
    opt.state[model[0].weight]["factor_failures"] += 2
    other = copy.deepcopy(model)
    resumed = RING(other, refresh_every=1, strict=True)
    resumed.load_state_dict(opt.state_dict())
    take_step(other, resumed)
    resumed.state[other[0].weight]["factor_failures"] += 1
    refuses(other, resumed, "strict: 3 factor failures in 0")
