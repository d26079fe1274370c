# SPDX-License-Identifier: Apache-2.0
"""What users do to a model and to a batch: one clear error or a documented fallback each."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from grng import KFAC, RENG, RING

OPTIMIZERS = (RING, KFAC, RENG)
CLASSES = 3


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES)).to(dtype)


def step(model, opt, rows=8, *, dtype=torch.float32, x=None):
    x = torch.randn(rows, 4, dtype=dtype) if x is None else x
    out = model(x)
    opt.observe(out)
    F.cross_entropy(out, torch.arange(len(x)) % CLASSES).backward()
    opt.step()
    opt.zero_grad()


def copies(model):
    return [p.detach().clone() for p in model.parameters()]


def moved(model, before):
    return [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]


# ---- hooks that a user removed ----


def remove_all_hooks(model):
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_hooks_with_kwargs.clear()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_hooks_removed_before_the_first_step_leave_the_layers_to_adamw(optimizer):
    model = net()
    opt = optimizer(model)
    remove_all_hooks(model)
    before = copies(model)
    with pytest.warns(RuntimeWarning, match=r"no statistics reached 0, 2 .*hooks were removed"):
        step(model, opt)
    assert all(moved(model, before))
    assert opt.explain().count("its module's hooks never ran") == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, opt)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_hooks_removed_later_leave_the_factors_as_they_are_with_one_warning(optimizer):
    model = net()
    opt = optimizer(model, refresh_every=2)
    step(model, opt)
    kept = {p: opt.state[p]["input_factor"].clone() for p in (model[0].weight, model[2].weight)}
    remove_all_hooks(model)
    with pytest.warns(
        RuntimeWarning, match=r"no new statistics reach 0, 2: .*stay as they are"
    ) as w:
        for _ in range(6):
            before = copies(model)
            step(model, opt)
            assert all(moved(model, before))
    assert len(w) == 1
    for p, factor in kept.items():
        assert torch.equal(opt.state[p]["input_factor"], factor)


def test_layers_that_rest_are_not_said_to_have_lost_their_hooks():
    heads = nn.ModuleList([nn.Linear(4, CLASSES), nn.Linear(4, CLASSES)])
    opt = RING(heads, refresh_every=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for k in range(4):
            for p in heads[1 - k % 2].parameters():
                p.grad = torch.zeros_like(p)
            step(heads[k % 2], opt)
        out = heads[0](torch.randn(0, 4))
        opt.observe(out)
        out.sum().backward()
        opt.step()


# ---- weights with two owners, copies, casts ----


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = (nn.Linear(4, n) for n in (4, 4, CLASSES))
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(self.second(self.first(x).tanh()).tanh())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_tied_weight_is_trained_by_adamw_and_explained(optimizer):
    model = Tied()
    twin = copy.deepcopy(model)
    assert twin.second.weight is twin.first.weight
    opt = optimizer(model, adamw_lr=1e-2, weight_decay=0.1)
    other = torch.optim.AdamW([twin.first.weight], lr=1e-2, weight_decay=0.1)
    assert "shared: first.weight, second.weight" in opt.explain()
    x = torch.randn(8, 4)
    F.cross_entropy(twin(x), torch.arange(8) % CLASSES).backward()
    other.step()
    step(model, opt, x=x)
    assert torch.equal(model.first.weight, twin.first.weight)
    assert model.second.weight is model.first.weight
    assert "input_factor" in opt.state[model.head.weight]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_copied_model_is_trained_by_its_own_optimizer(optimizer):
    model = net()
    opt = optimizer(model)
    step(model, opt)
    twin = copy.deepcopy(model)
    other = optimizer(twin)
    other.load_state_dict(opt.state_dict())
    before = copies(model)
    x = torch.randn(8, 4)
    step(twin, other, x=x)
    assert not any(moved(model, before))
    step(model, opt, x=x)
    assert not any(moved(model, copies(twin)))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
def test_a_model_cast_before_the_first_step_has_the_state_of_its_new_dtype(optimizer, dtype):
    model = net()
    opt = optimizer(model)
    model.to(dtype)
    before = copies(model)
    step(model, opt, dtype=dtype)
    assert all(moved(model, before))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert opt.state[model[0].weight]["input_factor"].dtype == wide


# ---- batches ----


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("shape", [(1, 4), (4,)], ids=["one row", "no batch dimension"])
def test_a_batch_of_one(optimizer, shape):
    model = nn.Linear(4, CLASSES).double()
    opt = optimizer(model, refresh_every=1)
    for k in range(4):
        before = copies(model)
        x = torch.randn(shape, dtype=torch.float64)
        out = model(x)
        opt.observe(out)
        F.cross_entropy(out.view(1, -1), torch.tensor([1])).backward()
        opt.step()
        opt.zero_grad()
        assert all(moved(model, before))
        assert all(torch.isfinite(p).all() for p in model.parameters())
        if k == 0:
            row = torch.cat([x.flatten(), x.new_ones(1)])
            factor = opt.state[model.weight]["input_factor"]
            torch.testing.assert_close(factor, torch.outer(row, row))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_batch_that_is_not_finite_leaves_parameters_and_state_and_is_counted(optimizer, value):
    model = net()
    opt = optimizer(model, refresh_every=1)
    step(model, opt)
    before, state = copies(model), copy.deepcopy(opt.state_dict()["state"])
    x = torch.randn(8, 4)
    x[3, 2] = value
    step(model, opt, x=x)
    assert not any(moved(model, before))
    for i, kept in state.items():
        for key, old in kept.items():
            assert torch.equal(
                torch.as_tensor(opt.state_dict()["state"][i][key]), torch.as_tensor(old)
            )
    assert opt.diagnostics()["skipped_steps_in_a_row"] == 1
    assert not any(opt._capture.records.values()), "the statistics are dropped"
    step(model, opt)
    assert all(moved(model, before))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_statistics_of_an_input_that_was_overwritten_are_dropped_and_counted(optimizer):
    model = net(torch.float64)
    opt = optimizer(model, lr=0.0)
    buffer, xs = torch.zeros(8, 4, dtype=torch.float64), torch.randn(2, 8, 4, dtype=torch.float64)
    for x in xs:
        buffer.copy_(x)
        out = model(buffer)
        opt.observe(out)
        F.cross_entropy(out, torch.arange(8) % CLASSES).backward()
    with pytest.warns(RuntimeWarning, match=r"the input of 0 was changed in place .* clone\(\)"):
        opt.step()
    rows = torch.cat([xs[1], xs.new_ones(8, 1)], 1)
    torch.testing.assert_close(opt.state[model[0].weight]["input_factor"], rows.T @ rows / 8)
    report = opt.diagnostics()
    assert report["0/factor_failures"] == 1 and report["2/factor_failures"] == 0


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_layer_whose_only_input_was_overwritten_is_still_trained(optimizer, late):
    model = net()
    opt = optimizer(model, refresh_every=1)
    if late:
        step(model, opt)
        factor = opt.state[model[0].weight]["input_factor"].clone()
    before, x = copies(model), torch.randn(8, 4)
    out = model(x)
    opt.observe(out)
    F.cross_entropy(out, torch.arange(8) % CLASSES).backward()
    x.zero_()
    with pytest.warns(RuntimeWarning, match="the input of 0 was changed in place"):
        opt.step()
    assert all(moved(model, before))
    if late:
        assert torch.equal(opt.state[model[0].weight]["input_factor"], factor)
    assert opt.explain().count("its input was overwritten") == (0 if late else 2)


# ---- parameters that are in no group ----


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_parameter_that_is_unfrozen_later_is_named_once(optimizer):
    model = net()
    model[0].requires_grad_(False)
    opt = optimizer(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, opt)
    model[0].requires_grad_(True)
    before = copies(model)
    with pytest.warns(UserWarning, match=r"0\.weight, 0\.bias had requires_grad=False") as said:
        for _ in range(2):
            step(model, opt)
    assert len(said) == 1
    assert moved(model, before) == [False, False, True, True]


def test_a_parameter_that_is_unfrozen_and_added_is_trained_in_silence():
    model = net()
    model[0].requires_grad_(False)
    opt = RING(model)
    model[0].requires_grad_(True)
    opt.add_param_group({"params": list(model[0].parameters())})
    before = copies(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, opt)
    assert all(moved(model, before))


# ---- bare parameters, sparse gradients ----


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_parameters_without_their_model_are_said_to_have_no_curvature(optimizer):
    model = net()
    with pytest.warns(UserWarning, match=r"AdamW\. Pass the model itself, .*\(model\)") as said:
        optimizer(model.parameters())
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer(model)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_sparse_gradient_is_named_and_nothing_is_changed(optimizer):
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, CLASSES))
    opt = optimizer(model)
    before = copies(model)
    with pytest.raises(RuntimeError, match=r"gradient of 0\.weight is sparse: .* not supported"):
        step(model, opt, x=torch.arange(8))
    assert not any(moved(model, before))


# ---- arguments ----


@pytest.mark.parametrize(
    ("optimizer", "name"),
    [
        (RING, "step_length"),
        (RING, "fisher"),
        (RENG, "step_length"),
        (RENG, "fisher"),
        (KFAC, "fisher"),
    ],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
@pytest.mark.parametrize("value", ["none", "", None, 1])
def test_unknown_choices_are_named(optimizer, name, value):
    with pytest.raises(ValueError, match=rf"^{optimizer.__name__}: {name} must be one of .* got "):
        optimizer(nn.Linear(4, CLASSES), **{name: value})


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda o: o.sum(), ValueError, r"shape \[\.\.\., C\] with C >= 2, got \[\]"),
        (lambda o: o[:, :1], ValueError, r"with C >= 2, got \[8, 1\]"),
        (lambda o: o[:, :0], ValueError, r"with C >= 2, got \[8, 0\]"),
        (lambda o: (o, None), TypeError, "must be a tensor, got tuple"),
    ],
    ids=["scalar", "one-class", "no-class", "tuple"],
)
def test_outputs_of_a_wrong_shape_are_named(optimizer, make, error, said):
    model = net()
    opt = optimizer(model)
    out = model(torch.randn(8, 4))
    with pytest.raises(error, match=said):
        opt.observe(make(out))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("likelihood", ["gaussian", "categorical"])
@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_one_output_per_example_needs_a_dimension_of_its_own(optimizer, likelihood, fisher):
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    opt = optimizer(model, fisher=fisher)
    out = model(torch.randn(8, 4))
    with pytest.raises(ValueError, match=r"got \[8\]: .* outputs\.unsqueeze\(-1\)"):
        opt.observe(out.squeeze(-1), likelihood=likelihood)
    opt.observe(out.squeeze(-1).unsqueeze(-1), likelihood="gaussian")
    assert {r.terms for rs in opt._capture.records.values() for r in rs} == {8}


# ---- the first statistics are bad ----


@pytest.mark.parametrize("bad", ["input", "output"])
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [(RING, {}), (RING, {"max_factor_dim": 1}), (KFAC, {})],
    ids=["RING", "RING-diagonal", "KFAC"],
)
@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_a_factor_starts_with_its_first_good_statistics(
    optimizer, options, bad, on_device, monkeypatch
):
    if on_device:  # the counts stay tensors, as on a GPU
        for module in ("factors", "kfac"):
            monkeypatch.setattr(
                f"grng.optim.{module}.updates_so_far",
                lambda state: [state["output_updates"], state["input_updates"]],
            )
    runs = {}
    for spoiled in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(4, CLASSES).double()
        opt = optimizer(model, lr=0.0, refresh_every=1, **options)
        xs = torch.randn(4, 8, 4, dtype=torch.float64)
        for k, x in enumerate(xs):
            if k == 0 and not spoiled:
                opt.param_groups[0]["step"] += 1
                continue
            out = model(x)
            opt.observe(out)
            F.cross_entropy(out, torch.arange(8) % CLASSES).backward()
            if k == 0:
                ((record,),) = opt._capture.records.values()
                spoiled_one = record.layer_input if bad == "input" else record.output_grad
                spoiled_one.data.view(-1)[3] = torch.nan
            opt.step()
            opt.zero_grad()
        runs[spoiled] = opt.state[model.weight]
    torch.testing.assert_close(runs[True][f"{bad}_factor"], runs[False][f"{bad}_factor"])
    other = "output" if bad == "input" else "input"
    counts = {side: int(runs[True][f"{side}_updates"]) for side in (bad, other)}
    assert counts == {bad: 3, other: 4}
    assert int(runs[True]["factor_failures"]) == 1


def test_counts_of_an_older_checkpoint_serve_both_sides():
    model = net()
    opt = RING(model)
    step(model, opt)
    old = copy.deepcopy(opt.state_dict())
    for state in old["state"].values():
        if "input_updates" in state:
            state["updates"] = 7
            del state["input_updates"], state["output_updates"]
    other = RING(net())
    other.load_state_dict(old)
    state = other.state[other.param_groups[0]["params"][0]]
    assert int(state["input_updates"]) == int(state["output_updates"]) == 7
    assert state["input_updates"].dtype == torch.int32
    assert "updates" not in state


@pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.ones(1)], ids=str)
@pytest.mark.parametrize("make", [RING, RENG, KFAC])
def test_a_rate_that_a_schedule_spoiled_changes_nothing(make, value):
    model = nn.Linear(4, 3)
    opt = make(model)
    opt.observe(model(torch.randn(8, 4)))
    model(torch.randn(8, 4)).square().mean().backward()
    opt.param_groups[0]["lr"] = value
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(
        ValueError, match=r"lr of param_groups\[0\] must be a finite number or a 0-d"
    ):
        opt.step()
    assert not opt.state
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
