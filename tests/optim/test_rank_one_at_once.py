# SPDX-License-Identifier: Apache-2.0
"""RankOneNPG: the step that is one call of a kernel, beside the one that forms a direction."""

import math

import pytest
import torch
from torch import nn

import grng_kernels as kernels
from grng import RankOneNPG
from tests.optim.rank_one_policy import drawn, flat, policy, take_step
from tests.optim.training import same, values


@pytest.fixture
def ways(monkeypatch):
    """Which kernel each step called: ``rank1_step_`` (with what came of it), ``rank1_precondition``."""
    found = []
    for name in ("rank1_step_", "rank1_precondition"):
        real = getattr(kernels, name)

        def noted(*args, name=name, real=real, **kwargs):
            result = real(*args, **kwargs)
            refused = name == "rank1_step_" and not math.isfinite(result)
            found.append(f"{name} refused" if refused else name)
            return result

        monkeypatch.setattr(kernels, name, noted)
    return found


def two_groups(model, **settings):
    first, second = list(model.parameters())[:2], list(model.parameters())[2:]
    return RankOneNPG(
        [{"params": first, "lr": 0.5}, {"params": second, "weight_decay": 0.1}],
        step_length="fixed",
        **settings,
    )


def one_group(model, **settings):
    return RankOneNPG(model, step_length="fixed", **settings)


CASES = {
    "plain": (one_group, {}),
    "decay": (one_group, {"weight_decay": 0.2, "lr": 0.3}),
    "mean": (one_group, {"score": "mean"}),
    "maximize": (one_group, {"maximize": True, "lr": 0.2, "weight_decay": 0.1}),
    "whole numbers": (one_group, {"lr": 1, "damping": 1, "weight_decay": 0}),
    "tensor": (one_group, {"lr": torch.tensor(0.3, dtype=torch.float64), "weight_decay": 0.1}),
    "groups": (two_groups, {}),
    "groups-maximize": (two_groups, {"maximize": True}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_both_ways_make_the_same_steps(case, dtype, ways, monkeypatch):
    make, settings = CASES[case]
    results = []
    for at_once in (True, False):
        if not at_once:
            monkeypatch.setattr(RankOneNPG, "_step_at_once", lambda *_: False)
        model = policy(dtype)
        opt = make(model, **settings)
        reports = []
        for seed in range(3):
            take_step(model, opt, seed=seed)
            reports.append(opt.diagnostics())
        results.append((flat(model.parameters()), reports))
    assert ways == ["rank1_step_"] * 3 + ["rank1_precondition"] * 3
    assert not same(values(policy(dtype)), values(model))
    rtol = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(results[0][0], results[1][0], rtol=rtol, atol=rtol)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        assert one == pytest.approx(other, rel=rtol)


def test_what_has_no_gradient_and_what_no_action_depends_on(ways, monkeypatch):
    results = []
    for at_once in (True, False):
        if not at_once:
            monkeypatch.setattr(RankOneNPG, "_step_at_once", lambda *_: False)
        model, critic = policy(), nn.Parameter(torch.ones(4, dtype=torch.float64))
        late = nn.Parameter(torch.ones(2, dtype=torch.float64), requires_grad=False)
        opt = RankOneNPG(
            [*model.parameters(), critic, late], step_length="fixed", weight_decay=0.3, lr=0.5
        )
        log_probs, worth = drawn(model)
        opt.observe(log_probs)
        ((critic**2).sum() - (log_probs * worth).mean()).backward()
        model[0].bias.grad = None
        # It was not trained when the scores were taken.
        late.grad = torch.ones_like(late)
        still = model[0].bias.detach().clone()
        opt.step()
        assert torch.equal(model[0].bias, still)
        assert not torch.equal(critic, torch.ones_like(critic))
        results.append(flat([*model.parameters(), critic, late]))
    assert ways == ["rank1_step_", "rank1_precondition"]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


class Cast(nn.Module):
    def forward(self, x):
        return x.double()


OTHER = {
    "kl": (policy, {"step_length": "kl"}),
    "momentum": (policy, {"momentum": 0.5}),
    "bf16": (lambda: policy(torch.bfloat16), {}),
    "two dtypes": (lambda: nn.Sequential(*policy(torch.float32)[:2], Cast(), policy()[2]), {}),
}


@pytest.mark.parametrize("case", OTHER)
def test_what_is_not_plain_goes_the_other_way(case, ways):
    make, settings = OTHER[case]
    model = make()
    opt = RankOneNPG(model, **{"step_length": "fixed", **settings})
    before = values(model)
    take_step(model, opt)
    assert ways == ["rank1_precondition"]
    assert not same(before, values(model))


def test_signs_that_differ_go_the_other_way(ways):
    model = policy()
    first, second = list(model.parameters())[:2], list(model.parameters())[2:]
    groups = [{"params": first}, {"params": second, "maximize": True}]
    take_step(model, RankOneNPG(groups, step_length="fixed"))
    assert ways == ["rank1_precondition"]


def test_gradients_of_another_layout_go_the_other_way(ways):
    results = []
    for transposed in (False, True):
        model = policy()
        opt = RankOneNPG(model, step_length="fixed")
        log_probs, worth = drawn(model)
        opt.observe(log_probs)
        (-(log_probs * worth).mean()).backward()
        if transposed:
            model[0].weight.grad = model[0].weight.grad.mT.contiguous().mT
        opt.step()
        results.append(flat(model.parameters()))
    assert ways == ["rank1_step_", "rank1_precondition"]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_weights_that_share_memory_are_moved_one_after_another(ways):
    weight = nn.Parameter(torch.zeros(3))
    twin = nn.Parameter(weight.detach())
    opt = RankOneNPG([weight, twin], step_length="fixed", damping=1.0)
    opt.observe(weight[0])
    weight.grad, twin.grad = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, 3.0, 4.0])
    opt.step()
    assert ways == ["rank1_precondition"]
    torch.testing.assert_close(weight.detach(), torch.tensor([0.0, -4.0, -6.0]))


@pytest.mark.parametrize(
    ("dtype", "size", "damping"), [(torch.float64, 1e160, 1e10), (torch.float32, 1e38, 1e-2)]
)
def test_a_step_beyond_the_range_of_the_kernel_is_made(dtype, size, damping, ways):
    """Squares beyond fp64; and a long gradient of which the score leaves little."""
    p = nn.Parameter(torch.zeros(3, dtype=dtype))
    opt = RankOneNPG([p], step_length="fixed", damping=damping, lr=0.5)
    opt.observe(p[0])
    p.grad = torch.tensor([size, 0.0, 0.0], dtype=dtype)
    opt.step()
    assert ways == ["rank1_step_ refused", "rank1_precondition"]
    want = -0.5 * size / (1 + damping)
    assert p[0].item() == pytest.approx(want, rel=1e-6) and not p[1:].any()
    assert opt.diagnostics()["direction_norm"] == pytest.approx(-2 * want, rel=1e-6)


def test_a_direction_beyond_the_range_of_its_dtype_is_skipped(ways):
    p = nn.Parameter(torch.ones(3))
    opt = RankOneNPG([p], step_length="fixed", damping=1e-3, lr=1e-30)
    opt.observe(p[0])
    p.grad = torch.tensor([0.0, 1e37, 0.0])
    opt.step()
    assert ways == ["rank1_step_ refused", "rank1_precondition"]
    assert torch.equal(p.detach(), torch.ones(3))
    assert opt.diagnostics()["skipped"] == 1


def test_a_rate_that_no_kernel_takes_goes_the_other_way(ways):
    p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    opt = RankOneNPG([p], step_length="fixed", damping=1.0, lr=1e40)
    opt.observe(p[1])
    p.grad = torch.tensor([1e-40, 0.0], dtype=torch.float64)
    opt.step()
    assert ways == ["rank1_precondition"]
    assert p[0].item() == pytest.approx(-1.0)


def test_momentum_that_was_switched_off_is_forgotten(ways):
    model = policy()
    opt = RankOneNPG(model, step_length="fixed", momentum=0.5)
    take_step(model, opt)
    assert all("momentum_buffer" in opt.state[p] for p in model.parameters())
    opt.param_groups[0]["momentum"] = 0.0
    take_step(model, opt)
    assert ways == ["rank1_precondition", "rank1_step_"]
    assert not any(opt.state.values())
