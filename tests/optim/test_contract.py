# SPDX-License-Identifier: Apache-2.0
"""The contract of ``torch.optim``, for every class with a model: what surrounds a step, what is loaded."""

import copy
import functools
import io
import warnings

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import lr_scheduler
from torch.utils._python_dispatch import TorchDispatchMode

from grng.optim import fallback
from tests.optim.training import (
    EACH,
    GRADIENT,
    KALMAN,
    KRONECKER,
    WAYS,
    backward,
    batch,
    new_net,
    observe_actions,
    quietly,
    same,
    same_state,
    snapshot,
    train,
    values,
)

each = pytest.mark.parametrize("name", EACH)
gradient = pytest.mark.parametrize("name", GRADIENT)
# Of what .grad holds, with or without a factorised Fisher matrix.
descending = pytest.mark.parametrize("name", [*GRADIENT, "RankOneNPG"])
kalman = pytest.mark.parametrize("name", KALMAN)
kronecker = pytest.mark.parametrize("name", KRONECKER)


def run(name, **more):
    way, model = WAYS[name], new_net()
    return way, model, way(model, **more)


# ---- learning rates and schedulers ----


@each
def test_a_tensor_learning_rate_is_that_number_and_stays_a_tensor(name):
    lr = WAYS[name].settings.get("lr", 1.0)
    results = []
    for given in (lr, torch.tensor(lr, dtype=torch.float64)):
        way, model, opt = run(name, lr=given)
        scheduler = lr_scheduler.ExponentialLR(opt, 0.9)
        for number in range(6):
            train(way, model, opt, [number])
            scheduler.step()
        results.append(values(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    # Torch's schedulers write into the tensor, so that each group has to have its own.
    lrs = [g["lr"] for g in opt.param_groups if isinstance(g["lr"], torch.Tensor)]
    assert lrs[0] is given
    assert len({id(x) for x in lrs}) == len(lrs) == (1 if name == "KFAC" else len(opt.param_groups))
    for x in lrs:
        assert float(x) == pytest.approx(lr * 0.9**6)


class Reads(TorchDispatchMode):
    """Counts how often a value of a tensor is asked for, for which a device would be waited for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@descending
def test_nothing_waits_for_a_learning_rate(name):
    counts = []
    for as_tensor in (False, True):
        way = WAYS[name]
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
        lr = way.settings["lr"]
        opt = way(model, lr=torch.tensor(lr) if as_tensor else lr)
        train(way, model, opt, [0])
        backward(way, model, opt, 1)
        with Reads() as reads:
            opt.step()
            counts.append(reads.count)
            assert float(next(iter(model.parameters())).sum()) < float("inf")
            assert reads.count == counts[-1] + 1  # the count counts
    assert counts[1] == counts[0]


@each
def test_schedulers_change_the_groups(name):
    way, model, opt = run(name)
    starts = [g["lr"] for g in opt.param_groups]
    scheduler = lr_scheduler.SequentialLR(
        opt,
        [
            lr_scheduler.LinearLR(opt, start_factor=0.5, total_iters=2),
            lr_scheduler.CosineAnnealingLR(opt, 4),
        ],
        milestones=[2],
    )
    assert [g["lr"] for g in opt.param_groups] == [0.5 * lr for lr in starts]
    for number in range(6):
        train(way, model, opt, [number])
        scheduler.step()
    assert all(abs(g["lr"]) < 1e-9 for g in opt.param_groups)
    before = values(model)
    for group in opt.param_groups:
        group["lr"] = 0.0
    train(way, model, opt, [6])
    assert same(before, values(model))


@gradient
def test_a_scheduler_that_cycles_the_momentum(name):
    way, model, opt = run(name)
    scheduler = lr_scheduler.OneCycleLR(
        opt, max_lr=0.02, total_steps=8, base_momentum=0.5, max_momentum=0.8
    )
    key = "momentum" if name == "KFAC" else "betas"
    seen = set()
    for number in range(7):
        train(way, model, opt, [number])
        scheduler.step()
        value = opt.param_groups[0][key]
        seen.add(value if name == "KFAC" else value[0])
    assert min(seen) < 0.55
    assert max(seen) <= 0.8
    assert all(p.isfinite().all() for p in model.parameters())


# ---- maximize ----


@descending
def test_maximize_takes_the_steps_of_the_negative_loss(name):
    results = []
    for sign, flag in ((1.0, False), (-1.0, True)):
        way, model, opt = run(name, maximize=flag)
        train(way, model, opt, range(6), sign=sign)
        backward(way, model, opt, 6, sign=sign)
        grads = [p.grad for p in model.parameters()]
        kept = [g.clone() for g in grads]
        opt.step()
        # Gradients are others': neither the tensors nor their values change.
        assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
        assert same(grads, kept)
        results.append((values(model), opt.state_dict()["state"], kept))
    assert same(results[0][0], results[1][0])
    assert same_state(results[0][1], results[1][1])
    assert same(results[0][2], [-g for g in results[1][2]])


# Not SophiaH, whose Hessian is that of the loss and changes its sign too.
@pytest.mark.parametrize("name", [n for n in GRADIENT if n != "SophiaH"])
def test_maximize_may_be_set_for_a_group(name):
    way, model, opt = run(name, weight_decay=0.0)
    twin = copy.deepcopy(model)
    other = way(twin, weight_decay=0.0, **({"max_kl": None} if name in ("RING", "RENG") else {}))
    if name in ("RING", "RENG"):
        opt.param_groups[0]["max_kl"] = None
    last = len(opt.param_groups) - 1
    opt.param_groups[last]["maximize"] = True
    before = values(model)
    train(way, model, opt, [0])
    train(way, twin, other, [0])
    for group, its in zip(opt.param_groups, other.param_groups, strict=True):
        for p, q in zip(group["params"], its["params"], strict=True):
            i = [x is p for x in model.parameters()].index(True)
            step, plain = p.detach() - before[i], q.detach() - before[i]
            expected = -plain if group is opt.param_groups[last] else plain
            torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-7)


@descending
@pytest.mark.parametrize("value", [1, None, "yes"])
def test_maximize_is_true_or_false(name, value):
    with pytest.raises(ValueError, match="maximize must be True or False"):
        run(name, maximize=value)


@kalman
def test_a_filter_has_no_flag_to_maximize(name):
    # It has no objective: an observation has no other sign.
    with pytest.raises(TypeError, match="maximize"):
        run(name, maximize=True)


# ---- closures, groups, hooks, clipping, recomputation ----


@each
def test_a_closure_is_a_step_like_any_other(name):
    way, model, opt = run(name)
    twin = copy.deepcopy(model)
    other = way(twin)
    for number in range(3):

        def closure(number=number):
            other.zero_grad()
            return backward(way, twin, other, number)

        loss = backward(way, model, opt, number)
        opt.step()
        opt.zero_grad()
        with torch.no_grad():
            found = other.step(closure)
        assert torch.equal(found, loss)
    assert same(values(model), values(twin))


@gradient
def test_a_closure_without_backward_changes_nothing(name):
    way, model, opt = run(name)
    train(way, model, opt, range(2))
    before = values(model), copy.deepcopy(opt.state_dict()["state"])

    def closure():
        x, y = batch(2)
        return F.cross_entropy(model(x), y)

    loss = opt.step(closure)
    assert loss.requires_grad
    assert same(before[0], values(model))
    assert same_state(before[1], opt.state_dict()["state"])
    train(way, model, opt, [3])
    assert not same(before[0], values(model))


@pytest.mark.parametrize("name", [*KALMAN, "RankOneNPG"])
def test_a_closure_that_observes_nothing_is_an_error(name):
    way, model, opt = run(name)
    train(way, model, opt, range(2))
    before = snapshot(model, opt)
    with pytest.raises(RuntimeError, match="needs an observation"):
        opt.step(lambda: None)
    assert same_state(before, snapshot(model, opt))
    train(way, model, opt, [2])


@each
def test_an_error_in_a_closure_comes_through(name):
    way, model, opt = run(name)
    train(way, model, opt, range(2))
    before = snapshot(model, opt)

    def closure():
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        opt.step(closure)
    assert same_state(before, snapshot(model, opt))


@each
def test_a_group_that_is_added_is_trained_and_loaded(name):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.scale = new_net(), nn.Parameter(torch.ones(3))

        def forward(self, x):
            return self.net(x) * self.scale

    def build():
        model = Scaled()
        opt = WAYS[name](model.net)
        opt.add_param_group({"params": [model.scale], "lr": 0.25})
        return model, opt

    (model, opt), way = build(), WAYS[name]
    before = model.scale.detach().clone()
    train(way, model, opt, range(3))
    assert opt.param_groups[-1]["lr"] == 0.25
    assert not torch.equal(model.scale, before)
    twin, other = build()
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(opt.state_dict())
    train(way, model, opt, range(3, 6))
    train(way, twin, other, range(3, 6))
    assert same(values(model), values(twin))


@each
def test_hooks_run_around_a_step(name):
    way, model, opt = run(name)
    seen = []
    opt.register_step_pre_hook(lambda o, a, k: seen.append(("before", same(old, values(model)))))
    opt.register_step_post_hook(lambda o, a, k: seen.append(("after", same(old, values(model)))))
    for number in range(2):
        old = values(model)
        train(way, model, opt, [number])
    assert seen == [("before", True), ("after", False)] * 2


@gradient
def test_clipped_gradients_leave_the_statistics_alone(name):
    # They are taken in observe(), before the gradients are clipped: what is clipped is the gradient only.
    results = []
    for clip in (False, True):
        way, model, opt = run(name)
        backward(way, model, opt, 0)
        if clip:
            total = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            assert total > 1e-2
        opt.step()
        results.append(opt.state_dict()["state"])
    kinds = ("input_factor", "output_factor", "hessian")
    plain, clipped = (
        {(i, k): v for i, s in state.items() for k, v in s.items() if k in kinds}
        for state in results
    )
    assert plain
    assert same_state(plain, clipped)
    key = "momentum_buffer" if name == "KFAC" else "exp_avg"
    assert not torch.equal(results[0][0][key], results[1][0][key])


@each
def test_recomputed_activations_change_nothing(name):
    way = WAYS[name]
    results = []
    for recompute in (False, True):
        model = new_net(recompute=recompute)
        opt = way(model)
        train(way, model, opt, range(5))
        results.append((values(model), opt.state_dict()))
    assert same_state(*results)


# ---- state dicts ----


def resaved(state_dict, **how):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, **how)


@pytest.mark.parametrize(
    "way_back",
    [
        copy.deepcopy,
        lambda s: resaved(s, weights_only=True),
        lambda s: resaved(s, weights_only=True, map_location="cpu"),
        lambda s: resaved(s, weights_only=True, map_location={"cpu": "cpu"}),
        lambda s: resaved(s, weights_only=False, mmap=False),
    ],
    ids=["plain", "weights_only", "map_location", "map_location-dict", "pickle"],
)
@each
def test_narrow_parameters_have_a_wide_state_after_loading(name, way_back):
    way, model = WAYS[name], new_net(torch.bfloat16)
    opt = way(model)
    train(way, model, opt, range(3))
    saved = way_back(opt.state_dict())
    untouched = copy.deepcopy(saved)
    twin = copy.deepcopy(model)
    other = way(twin)
    other.load_state_dict(state_dict=saved)
    assert same_state(other.state_dict(), opt.state_dict())
    assert other.state[twin.head.weight][entries(name)[0]].dtype == torch.float32
    train(way, model, opt, range(3, 6))
    train(way, twin, other, range(3, 6))
    assert same(values(model), values(twin))
    # What was loaded is a copy.
    assert same_state(saved, untouched)


@each
def test_a_state_is_all_tensors_numbers_and_plain_containers(name):
    def check(value):
        if isinstance(value, dict):
            return all(check(v) for v in value.values())
        if isinstance(value, (list, tuple)):
            return all(map(check, value))
        return isinstance(value, (torch.Tensor, int, float, str, bool, type(None)))

    way, model, opt = run(name)
    train(way, model, opt, range(5))
    assert check(opt.state_dict())


@each
def test_a_scheduler_and_its_optimizer_resume(name):
    def build():
        way, model, opt = run(name)
        return way, model, opt, lr_scheduler.StepLR(opt, 2, 0.5)

    way, model, opt, scheduler = build()
    _, twin, other, its = build()
    for number in range(3):
        train(way, model, opt, [number])
        scheduler.step()
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(opt.state_dict())
    its.load_state_dict(scheduler.state_dict())
    assert [g["lr"] for g in other.param_groups] == [g["lr"] for g in opt.param_groups]
    for m, o, s in ((model, opt, scheduler), (twin, other, its)):
        for number in range(3, 7):
            train(way, m, o, [number])
            s.step()
    assert same(values(model), values(twin))


# ---- state dicts of others, of other times, and not whole ----


BROKEN = {
    "no dict": (lambda s: [s], TypeError, "state_dict must be a dict"),
    "another dict": (lambda s: {"model": s}, ValueError, "must have 'state'"),
    "no groups": (lambda s: {"state": s["state"]}, ValueError, "must have 'param_groups'"),
    "another number of groups": (
        lambda s: {**s, "param_groups": s["param_groups"] * 3},
        ValueError,
        "different number of parameter groups",
    ),
    "a group of another size": (
        lambda s: {
            **s,
            "param_groups": [{**g, "params": g["params"][:-1]} for g in s["param_groups"]],
        },
        ValueError,
        "doesn't match the size",
    ),
    "a group without parameters": (
        lambda s: {
            **s,
            "param_groups": [
                {k: v for k, v in g.items() if k != "params"} for g in s["param_groups"]
            ],
        },
        ValueError,
        "doesn't match the size",
    ),
    "a state that is no dict": (
        lambda s: {**s, "state": {**s["state"], 0: torch.zeros(3)}},
        ValueError,
        r"the state of q.weight must be a dict",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
@each
def test_what_is_no_state_dict_of_this_model_is_refused_whole(name, how):
    breaks, error, message = BROKEN[how]
    way, model, opt = run(name)
    train(way, model, opt, range(2))
    saved = breaks(copy.deepcopy(opt.state_dict()))
    train(way, model, opt, [2])
    before, given = snapshot(model, opt), copy.deepcopy(saved)
    with pytest.raises(error, match=message):
        opt.load_state_dict(saved)
    assert same_state(before, snapshot(model, opt))
    assert same_state(saved, given)
    train(way, model, opt, [3])


def entries(name):
    """What a state cannot do without, by parameter."""
    if name in KALMAN:
        return ["variance", "prior"]
    if "Sophia" in name:
        return ["hessian", "exp_avg"]
    if name == "RankOneNPG":
        return ["momentum_buffer"]
    found = ["input_factor", "output_inverse", "input_residual"]
    return found if name == "KFAC" else [*found, "output_vector", "exp_avg", "exp_avg_sq", "step"]


# A state without momentum is that of a parameter without a gradient: nothing of it is missing.
@pytest.mark.parametrize(
    ("name", "fault"),
    [(n, "missing") for n in EACH if n != "RankOneNPG"] + [(n, "another shape") for n in EACH],
)
def test_a_state_that_is_not_whole_names_its_parameter(name, fault):
    way, model, opt = run(name)
    train(way, model, opt, range(3))
    head = model.head.weight
    number = [x is head for g in opt.param_groups for x in g["params"]].index(True)
    for key in entries(name):
        saved = copy.deepcopy(opt.state_dict())
        if fault == "missing":
            del saved["state"][number][key]
            message = rf"(state of head.weight lacks|{key} of head.weight must have shape)"
        elif isinstance(saved["state"][number][key], float) or key == "step":
            continue
        else:
            saved["state"][number][key] = torch.zeros(2, 7, 2)
            message = (
                rf"{key} of head.weight must have shape \[.*\], the state dict has \[2, 7, 2\]"
            )
        fresh = way(new_net())
        before = copy.deepcopy(fresh.state_dict())
        with pytest.raises(ValueError, match=message):
            fresh.load_state_dict(saved)
        assert same_state(before, fresh.state_dict())
        before = snapshot(model, opt)
        with pytest.raises(ValueError, match=message):
            opt.load_state_dict(saved)
        assert same_state(before, snapshot(model, opt))


@each
def test_a_state_dict_of_another_optimizer_is_refused_or_starts_anew(name):
    way, model, opt = run(name)
    torch_opt = torch.optim.AdamW(model.parameters(), lr=0.125)
    F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    torch_opt.step()
    torch_opt.zero_grad()
    saved = torch_opt.state_dict()
    if name in KRONECKER:
        # Two groups here, one there.
        with pytest.raises(ValueError, match="different number of parameter groups"):
            opt.load_state_dict(saved)
        assert not opt.state
    elif "Sophia" in name:
        with pytest.raises(
            ValueError, match=r"the state of q.weight lacks hessian, but has exp_avg"
        ):
            opt.load_state_dict(saved)
        assert not opt.state
    else:
        kept = dict(opt.param_groups[0])
        opt.load_state_dict(saved)
        assert opt.param_groups[0]["lr"] == 0.125
        own = "forgetting" if name in KALMAN else "damping"
        assert opt.param_groups[0][own] == kept[own]
    train(way, model, opt, range(2))


@kronecker
def test_bare_parameters_go_on_from_the_state_of_adamw(name):
    results = []
    for takes_over in (False, True):
        model = new_net()
        params = list(model.parameters())
        opt = torch.optim.AdamW(params, lr=0.01, weight_decay=0.1)
        for number in range(6):
            if takes_over and number == 3:
                saved = opt.state_dict()
                opt = quietly(WAYS[name].make, params, lr=0.01, adamw_lr=0.01)
                opt.load_state_dict(saved)
            x, y = batch(number)
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()
        results.append(values(model))
    assert same(*results)


@each
def test_settings_that_an_older_version_did_not_save_stay(name):
    way, model, opt = run(name)
    train(way, model, opt, range(3))
    saved = copy.deepcopy(opt.state_dict())
    kept = {"params", "lr", "step"}
    for group in saved["param_groups"]:
        for key in set(group) - kept:
            del group[key]
    twin = copy.deepcopy(model)
    other = way(twin)
    other.load_state_dict(saved)
    assert same_state(other.state_dict()["state"], opt.state_dict()["state"])
    assert [set(g) for g in other.param_groups] == [set(g) for g in opt.param_groups]


# Not those with Kronecker layers, which "meta" does not have: all share one loading.
@pytest.mark.parametrize("name", [n for n in EACH if n not in KRONECKER])
def test_a_state_goes_where_the_parameters_are(name):
    # Without a GPU "meta" stands for another device.
    way, model, opt = run(name)
    train(way, model, opt, range(3))
    other = way(copy.deepcopy(model).to("meta"))
    other.load_state_dict(opt.state_dict())
    for state in other.state.values():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                assert value.device.type == ("cpu" if key == "step" else "meta")


@descending
def test_a_schedule_may_make_numbers_of_numpy(name):
    # Of a Python float and its fp32 numpy makes fp32, which is no float.
    results = []
    for number in (float, np.float32):
        way, model, opt = run(name, lr=number(0.125))
        scheduler = lr_scheduler.LambdaLR(opt, lambda k, number=number: number(0.5) ** k)
        for k in range(3):
            train(way, model, opt, [k])
            scheduler.step()
        results.append(values(model))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


# ---- parameters of other kinds ----


@pytest.mark.parametrize("name", ["RING", "RENG"])
def test_weights_that_are_columns_of_one_matrix_take_the_steps_of_weights_that_are_not(name):
    results = []
    for apart in (False, True):
        way, model = WAYS[name], new_net()
        whole = torch.cat([model.q.weight, model.k.weight], 1).detach()
        for layer, part in zip((model.q, model.k), whole.chunk(2, 1), strict=True):
            layer.weight = nn.Parameter(part.clone() if apart else part)
        train(way, model, way(model), range(6))
        results.append(values(model))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_complex_parameters_are_trained_as_by_adamw_on_the_route_of_gpus(monkeypatch):
    # With foreach, which is torch's choice on a GPU only.
    adamw = functools.partial(fallback.adamw, foreach=True)
    monkeypatch.setattr(fallback, "adamw", adamw)

    def trained(make):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        opt = make([p])
        for number in range(3):
            p.grad = torch.randn(3, dtype=torch.complex64) * (1 + number)
            opt.step()
        return p.detach()

    want = trained(lambda params: torch.optim.AdamW(params, lr=0.1))
    got = trained(lambda params: quietly(WAYS["RING"].make, params, lr=0.1))
    torch.testing.assert_close(got, want)


# ---- distributed checkpoints ----


FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
NESTED = StateDictOptions()
options = pytest.mark.parametrize("option", [NESTED, FLAT], ids=["nested", "flat"])


@options
@pytest.mark.parametrize("name", [n for n in WAYS if n != "RKalman-full"])
def test_a_distributed_state_dict_goes_into_a_new_optimizer(name, option):
    way, model, opt = run(name)
    train(way, model, opt, range(6))
    saved = copy.deepcopy(get_optimizer_state_dict(model, opt, options=option))
    twin = copy.deepcopy(model)
    other = way(twin)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        set_optimizer_state_dict(twin, other, saved, options=option)
    assert same_state(other.state_dict()["state"], opt.state_dict()["state"])
    train(way, model, opt, range(6, 12))
    train(way, twin, other, range(6, 12))
    assert same(values(model), values(twin))


@options
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", [n for n in WAYS if not n.startswith(KALMAN)])
def test_a_distributed_checkpoint_is_read_in_place_into_a_new_optimizer(
    name, option, dtype, tmp_path
):
    way, model = WAYS[name], new_net(dtype)
    opt = way(model)
    train(way, model, opt, range(6))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: without processes
        dcp.save(
            {"opt": get_optimizer_state_dict(model, opt, options=option)}, checkpoint_id=tmp_path
        )
        twin = copy.deepcopy(model)
        other = way(twin)
        target = {"opt": get_optimizer_state_dict(twin, other, options=option)}
        dcp.load(target, checkpoint_id=tmp_path)
        set_optimizer_state_dict(twin, other, target["opt"], options=option)
    assert same_state(other.state_dict()["state"], opt.state_dict()["state"])
    train(way, model, opt, range(6, 12))
    train(way, twin, other, range(6, 12))
    assert same(values(model), values(twin))


@each
def test_an_optimizer_that_was_asked_for_its_state_before_the_first_step_goes_on_as_if_not(name):
    way, model = WAYS[name], new_net()
    model.rests = nn.Linear(4, 4)  # without gradients it has no state
    opt = way(model)
    twin = copy.deepcopy(model)
    other = way(twin)
    before = copy.deepcopy(other.param_groups)
    get_optimizer_state_dict(twin, other)
    assert same(values(model), values(twin))
    assert str(other.param_groups) == str(before)
    copied = copy.deepcopy((twin, other))
    train(way, model, opt, range(5))
    for m, o in ((twin, other), copied):
        train(way, m, o, range(5))
        assert same(values(model), values(m))
        assert same_state(opt.state_dict(), o.state_dict())


@pytest.mark.parametrize("goes_back", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", KRONECKER)
def test_a_model_that_was_tried_out_is_asked_for_its_state_as_one_that_was_not(name, goes_back):
    # By a summary, the compiler, a search for the batch size: before a checkpoint is read.
    way, model, opt = run(name)
    train(way, model, opt, range(6))
    _, twin, other = run(name)
    out = twin(batch(0)[0])
    if goes_back:
        out.sum().backward()
        other.zero_grad()
    form = get_optimizer_state_dict(twin, other)
    assert other.param_groups[0]["step"] == 0
    asked = get_optimizer_state_dict(model, opt)
    assert {k: set(v) for k, v in form["state"].items()} == {
        k: set(v) for k, v in asked["state"].items()
    }


@pytest.mark.parametrize("how", ["nested", "flat", "plain"])
@each
def test_a_checkpoint_from_before_the_first_step_is_a_new_start(name, how):
    way, model = WAYS[name], new_net()
    model.rests = nn.Linear(4, 4)
    opt = way(model)
    twin = copy.deepcopy(model)
    option = FLAT if how == "flat" else NESTED
    asked = way(twin)
    saved = get_optimizer_state_dict(twin, asked, options=option)
    other = way(twin)
    if how == "plain":
        other.load_state_dict(asked.state_dict())
    else:
        set_optimizer_state_dict(twin, other, saved, options=option)
    train(way, model, opt, range(5))
    train(way, twin, other, range(5))
    assert same(values(model), values(twin))
    assert same_state(opt.state_dict(), other.state_dict())


@pytest.mark.parametrize("name", KRONECKER)
def test_a_group_without_parameters_is_read_from_a_nested_state_dict(name):
    # As is that of AdamW where layers have all parameters. Flat, torch cannot read it.
    way, model = WAYS[name], nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    opt = way(model)
    train(way, model, opt, range(6))
    opt.param_groups[1]["lr"] = 0.125
    saved = copy.deepcopy(get_optimizer_state_dict(model, opt))
    twin = copy.deepcopy(model)
    other = way(twin)
    set_optimizer_state_dict(twin, other, saved)
    assert same_state(opt.state_dict(), other.state_dict())
    assert other.param_groups[1]["lr"] == 0.125


@gradient
def test_a_first_step_at_no_learning_rate_is_a_step(name):
    # As in a warm-up from zero: it has gradients, unlike that of a distributed checkpoint.
    way, model, opt = run(name)
    for group in opt.param_groups:
        group["lr"] = 0.0
    before = values(model)
    train(way, model, opt, [0])
    assert same(before, values(model))
    assert opt.param_groups[0]["step"] == 1
    key = "hessian" if "Sophia" in name else "input_factor"
    assert opt.state[model.head.weight][key].any()


# ---- other libraries ----


@each
def test_accelerate_wraps_an_optimizer(name):
    way, model, opt = run(name)
    twin = copy.deepcopy(model)
    other = way(twin)
    train(way, model, opt, range(2))
    train(way, twin, other, range(2))
    accelerator = Accelerator(cpu=True)
    wrapped_model, wrapped = accelerator.prepare(twin, other)
    assert same_state(opt.state_dict(), wrapped.state_dict())
    for number in range(2, 6):
        train(way, model, opt, [number])
        x, y = batch(number, way.rows)
        out = wrapped_model(x)
        if name in KALMAN:
            other.observe(out, y)
        else:
            loss = F.cross_entropy(out, y)
            if name == "RENG":
                other.observe(out)
                other.backward(loss)
            elif name == "RankOneNPG":
                observe_actions(other, out, number)
                accelerator.backward(loss)
            else:
                other.observe(loss if name == "SophiaH" else out)
                accelerator.backward(loss)
        wrapped.step()
        wrapped.zero_grad()
    assert same(values(model), values(twin))


# ---- CUDA graphs ----


@each
def test_a_step_in_a_cuda_graph_is_refused(name, monkeypatch):
    way, model, opt = run(name)
    train(way, model, opt, [0])
    backward(way, model, opt, 1)
    before = snapshot(model, opt)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="cannot be captured into a CUDA graph"):
        opt.step()
    assert same_state(before, snapshot(model, opt))
    monkeypatch.undo()
    opt.step()
    assert not same(before[0], values(model))
