# SPDX-License-Identifier: Apache-2.0
"""What happens to RING in real training loops: heads used late, bypassed layers, copies, odd batches."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from grng import KFAC, RENG, RING
from grng.optim.base import PreconditionerError


def step(model, opt, rows=8, *, width=4, scale=1.0):
    out = model(torch.randn(rows, width) * scale)
    opt.observe(out)
    F.cross_entropy(out, torch.zeros(rows, dtype=torch.long)).backward()
    opt.step()
    opt.zero_grad()


class Bypassed(nn.Module):
    """Its first layer is used without its module: no hook ever runs."""

    def __init__(self):
        super().__init__()
        self.bypassed, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(F.linear(x, self.bypassed.weight, self.bypassed.bias))


@pytest.mark.parametrize("late", range(1, 7))
def test_a_head_that_is_first_used_late_is_trained(late):
    heads = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])
    opt = RING(heads)
    for _ in range(late):
        step(heads[0], opt)
    before = heads[1].weight.detach().clone()
    for _ in range(3):
        step(heads[1], opt)
    assert not torch.equal(heads[1].weight, before)
    assert "input_factor" in opt.state[heads[1].weight]


def test_a_model_with_a_demoted_layer_resumes_bitwise():
    torch.manual_seed(0)
    model = Bypassed()
    opt = RING(model)
    with pytest.warns(RuntimeWarning, match="bypassed"):
        step(model, opt)
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    resumed = RING(twin)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for net, o in ((model, opt), (twin, resumed)):
            torch.manual_seed(1)
            for _ in range(3):
                step(net, o)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_attention_resumes():
    def net():
        torch.manual_seed(0)
        return nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0)

    def once(model, opt):
        out = model(torch.randn(2, 3, 4))
        opt.observe(out, likelihood="gaussian")
        out.square().mean().backward()
        opt.step()
        opt.zero_grad()

    model = net()
    opt = RING(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        once(model, opt)
    assert opt.explain().count("MultiheadAttention") == 2
    for weight in (model.self_attn.in_proj_weight, model.self_attn.out_proj.weight):
        assert opt.state[weight]["output_factor"].count_nonzero() > 0
    other = net()
    resumed = RING(other)
    resumed.load_state_dict(opt.state_dict())
    other.load_state_dict(model.state_dict())
    for m, o in ((model, opt), (other, resumed)):
        torch.manual_seed(1)
        once(m, o)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_projections_of_attention_equal_those_of_linear_layers(batch_first, bias):
    """The same attention, written with two Linear layers, has the same factors."""

    class Own(nn.Module):
        def __init__(self, attention):
            super().__init__()
            self.qkv, self.out = nn.Linear(8, 24, bias=bias), nn.Linear(8, 8, bias=bias)
            names = [("qkv", "in_proj_"), ("out", "out_proj.")]
            state = attention.state_dict()
            self.load_state_dict(
                {
                    f"{mine}.{end}": state[f"{theirs}{end}"]
                    for mine, theirs in names
                    for end in (["weight", "bias"] if bias else ["weight"])
                }
            )

        def forward(self, x):
            q, k, v = (
                t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1)
            )
            mixed = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.out(mixed.transpose(1, 2).flatten(2))

    attention = nn.MultiheadAttention(8, 2, bias=bias, batch_first=batch_first).double()
    own = Own(attention).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    one, other = RING(attention), RING(own, sharing="expand")
    given = x if batch_first else x.transpose(0, 1)
    for opt, out in (
        (one, attention(given, given, given, need_weights=False)[0]),
        (other, own(x)),
    ):
        out = out if opt is other or batch_first else out.transpose(0, 1)
        opt.observe(out, likelihood="gaussian")
        out.square().mean().backward()
        opt.step()
    for mine, theirs in (
        (own.qkv.weight, attention.in_proj_weight),
        (own.out.weight, attention.out_proj.weight),
    ):
        for key in ("input_factor", "output_factor"):
            torch.testing.assert_close(other.state[mine][key], one.state[theirs][key])


def test_cross_attention_with_separate_projections_is_left_to_adamw():
    attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True)
    opt = RING(attention)
    q, k = torch.randn(2, 3, 8), torch.randn(2, 4, 6)
    attention(q, k, k)[0].square().mean().backward()
    opt.step()
    text = opt.explain()
    assert text.count("MultiheadAttention has no Kronecker factors here") >= 3
    assert "out_proj.weight" in text


def test_a_demoted_layer_takes_adamw_lr_and_follows_the_scheduler():
    model = Bypassed()
    opt = RING(model, adamw_lr=5e-5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda k: 1.0 if k < 1 else 0.0)
    before = model.bypassed.weight.detach().clone()
    with pytest.warns(RuntimeWarning):
        step(model, opt)
    moved = (model.bypassed.weight - before).abs().max().item()
    assert 0 < moved < 6e-5  # one AdamW step is at most its learning rate
    scheduler.step()
    after = model.bypassed.weight.detach().clone()
    step(model, opt)
    assert torch.equal(model.bypassed.weight, after)


def test_factors_of_another_size_are_refused_and_nothing_is_loaded():
    small, large = nn.Linear(4, 3), nn.Linear(5, 3)
    opt, other = RING(small), RING(large)
    step(small, opt)
    with pytest.raises(ValueError, match=r"input_factor of weight must have shape \[6, 6\]"):
        other.load_state_dict(opt.state_dict())
    assert not other.state


def test_a_copy_of_the_model_does_not_feed_the_statistics():
    model = nn.Sequential(nn.Linear(4, 3))
    opt = RING(model)
    twin = copy.deepcopy(model)
    twin(torch.randn(8, 4) * 1e3).sum().backward()
    step(model, opt)
    assert opt.state[model[0].weight]["input_factor"].max() < 100


def test_a_model_under_ring_can_be_saved_whole(tmp_path):
    model = nn.Sequential(nn.Linear(4, 3))
    opt = RING(model)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(loaded(torch.ones(1, 4)), model(torch.ones(1, 4)))
    step(model, opt)


def test_a_layer_called_with_a_keyword():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(input=x)

    model = Keyword()
    opt = RING(model)
    step(model, opt)
    assert "input_factor" in opt.state[model.layer.weight]


def a_model():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU())
    return nn.ModuleDict({"body": body, "left": nn.Linear(6, 3), "right": nn.Linear(6, 3)})


def train(model, opt, batches, seed):
    """Two heads on the same input, whose statistics are shared."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(batches):
        hidden = model["body"](torch.randn(8, 4, generator=generator))
        out = model["left"](hidden) + model["right"](hidden)
        if not isinstance(opt, RENG):
            opt.observe(out)
        loss = F.cross_entropy(out, torch.randint(0, 3, (8,), generator=generator))
        opt.backward(loss) if isinstance(opt, RENG) else loss.backward()
        opt.step()
        opt.zero_grad()


@pytest.mark.parametrize("way", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize(
    "build",
    [
        RING,
        lambda m: RING(m, stagger=True, refresh_every=3),
        lambda m: RING(m, step_length="kl_clip"),
        RENG,
        KFAC,
    ],
)
@pytest.mark.parametrize("steps", [0, 1, 5, 11])
def test_a_model_and_its_optimizer_are_copied_together_and_go_on_bitwise(build, way, steps):
    model = a_model()
    opt = build(model)
    opt.register_step_pre_hook(lambda *_: None)  # is no part of a copy, as in every torch optimizer
    train(model, opt, steps, 1)
    before = copy.deepcopy(model.state_dict())
    twin, twins = way((model, opt))
    train(twin, twins, 12, 2)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    train(model, opt, 12, 2)
    for key, value in model.state_dict().items():
        assert torch.equal(value, twin.state_dict()[key])
    assert twins.diagnostics() == opt.diagnostics() and twins.explain() == opt.explain()


def test_a_copy_of_a_scheduled_optimizer_steps_its_own_model():
    model = a_model()
    opt = RING(model)
    torch.optim.lr_scheduler.LinearLR(opt)  # binds a step to the instance
    before = copy.deepcopy(model.state_dict())
    twin, twins = copy.deepcopy((model, opt))
    train(twin, twins, 2, 1)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert any(not torch.equal(v, before[k]) for k, v in twin.state_dict().items())


def test_what_a_copied_optimizer_had_recorded_stays_behind():
    model = a_model()
    opt = RING(model)
    model["left"](model["body"](torch.randn(8, 4))).sum().backward()
    _, twins = copy.deepcopy((model, opt))
    assert not any(twins._capture.records.values()) and any(opt._capture.records.values())


def test_added_parameters_are_trained():
    model, extra = nn.Linear(4, 3), nn.Linear(3, 3)
    opt = RING(model, adamw_lr=0.01)
    opt.add_param_group({"params": list(extra.parameters())})
    before = extra.weight.detach().clone()
    step(nn.Sequential(model, extra), opt)
    assert 0 < (extra.weight - before).abs().max() < 0.011


def test_a_bias_whose_weight_was_frozen_later_is_trained_and_a_frozen_bias_is_not():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    opt = RING(model)
    step(model, opt)
    model[0].weight.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        step(model, opt)
    moved = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
    assert moved == [False, True, True, False]


def test_named_parameters_keep_their_names():
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    with pytest.warns(UserWarning, match="given parameters"):
        opt = RING([("p", p), ("q", q)])
    (p.sum() + q.sum()).backward()
    opt.step()
    assert (p < 1).all()
    assert (q < 1).all()
    assert opt.state_dict()["param_groups"][0]["param_names"] == ["p", "q"]


def test_large_finite_gradients_are_not_called_infinite():
    model = nn.Linear(1000, 1000, dtype=torch.float16)
    opt = RING(list(model.parameters()))
    for _ in range(5):
        model.weight.grad = torch.full_like(model.weight, 100.0)
        opt.step()
    assert model.weight.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_outputs_are_a_bad_step_and_not_a_crash(value):
    model = nn.Linear(4, 3)
    opt = RING(model)
    before = model.weight.detach().clone()
    step(model, opt, scale=value)
    assert torch.equal(model.weight, before)
    step(model, opt)
    assert not torch.equal(model.weight, before)


def test_micro_batches_draw_different_samples():
    model = nn.Linear(4, 8)
    opt = RING(model)
    for _ in range(4):
        out = model(torch.randn(2, 4))
        opt.observe(out, likelihood="gaussian")
        out.square().mean().backward()
    opt.step()
    assert torch.linalg.matrix_rank(opt.state[model.weight]["output_factor"]) == 8


@pytest.mark.parametrize("first", [True, False])
def test_an_empty_batch_changes_nothing_but_decay(first):
    model = nn.Linear(4, 3)
    opt = RING(model, weight_decay=0.0, betas=(0.0, 0.999))
    if not first:
        step(model, opt)
    before = model.weight.detach().clone()
    out = model(torch.randn(0, 4))
    opt.observe(out)
    out.sum().backward()
    opt.step()
    opt.zero_grad()
    assert torch.equal(model.weight, before)
    step(model, opt)
    assert not torch.equal(model.weight, before)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rho", torch.tensor(0.5)),
        ("lr", torch.tensor(float("nan"))),
        ("lr", torch.ones(2)),
        ("refresh_every", 2.5),
        ("kl_clip", torch.tensor(-1.0)),
    ],
)
def test_numbers_of_the_wrong_kind_are_named(name, value):
    with pytest.raises(ValueError, match=f"RING: {name} must be a"):
        RING(nn.Linear(4, 3), **{name: value})


def test_a_bias_of_another_dtype_than_its_weight():
    linear = torch.nn.Linear(8, 4)
    linear.bias.data = linear.bias.data.bfloat16()
    opt = RING(linear)
    before = linear.bias.detach().clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = linear(torch.randn(16, 8))
        opt.observe(logits)
        loss = logits.float().square().mean()
    loss.backward()
    opt.step()
    assert linear.bias.dtype == torch.bfloat16
    assert not torch.equal(linear.bias, before)


# ---- parameters that no layer owns ----


class WithGain(nn.Linear):
    """A linear layer of a subclass, with a parameter of its own that its owner uses."""

    def __init__(self):
        super().__init__(4, 3)
        self.gain = nn.Parameter(torch.ones(3))


class Scaled(WithGain):
    """Its weight does not meet the rows as a linear layer's does."""

    def forward(self, x):
        return super().forward(x) * self.gain


class Owner(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = WithGain()

    def forward(self, x):
        return self.layer(x) * self.layer.gain


@pytest.mark.parametrize("optimizer", [RING, KFAC])
def test_an_extra_parameter_of_a_layer_is_trained_and_explained(optimizer):
    model = Owner()
    opt = optimizer(model)
    assert "extra parameter of WithGain" in opt.explain()
    step(model, opt)
    assert not torch.equal(model.layer.gain, torch.ones(3))
    assert "input_factor" in opt.state[model.layer.weight]
    assert sum(len(g["params"]) for g in opt.param_groups) == 3


@pytest.mark.parametrize("optimizer", [RING, KFAC])
def test_a_linear_layer_with_a_forward_of_its_own_is_left_to_adamw(optimizer):
    model = nn.Sequential(Scaled(), nn.Linear(3, 3))
    opt = optimizer(model)
    assert opt.explain().count("Scaled has a forward of its own") == 3
    before = [p.detach().clone() for p in model.parameters()]
    step(model, opt)
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert "input_factor" not in opt.state[model[0].weight]
    assert "input_factor" in opt.state[model[1].weight]


def test_a_lazy_layer_is_left_to_adamw():
    text = RING(nn.Sequential(nn.LazyLinear(4), nn.LazyConv2d(4, 1), nn.Linear(4, 3))).explain()
    assert text.count("not initialized when the optimizer was made") == 2
    assert text.count("unknown") == 4  # shapes


def test_a_lazy_layer_is_trained_once_it_has_its_shape():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 3))
    opt = RING(model)
    model(torch.zeros(1, 4))
    before = model[0].weight.detach().clone()
    step(model, opt)
    assert not torch.equal(model[0].weight, before)


# ---- layers that a step does not use ----


@pytest.mark.parametrize("optimizer", [RING, KFAC])
def test_zero_gradients_of_an_unused_layer_do_not_demote_it(optimizer):
    heads = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])
    opt = optimizer(heads)
    before = heads[1].weight.detach().clone()
    for p in heads[1].parameters():
        p.grad = torch.zeros_like(p)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(heads[0], opt)
    assert torch.equal(heads[1].weight, before)
    assert not opt.state[heads[1].weight]
    step(heads[1], opt)
    assert "input_factor" in opt.state[heads[1].weight]
    assert not torch.equal(heads[1].weight, before)


def test_distributed_checkpoints_are_read_into_a_new_optimizer():
    state_dicts = pytest.importorskip("torch.distributed.checkpoint.state_dict")

    def build():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3))
        return net, RING(net, refresh_every=2)

    net, opt = build()
    for _ in range(3):
        step(net, opt)
    saved = copy.deepcopy(state_dicts.get_optimizer_state_dict(net, opt))
    twin, resumed = build()
    twin.load_state_dict(net.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        state_dicts.set_optimizer_state_dict(twin, resumed, saved)
    for model, o in ((net, opt), (twin, resumed)):
        torch.manual_seed(1)
        for _ in range(3):
            step(model, o)
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


# ---- state of other times, dtypes and places ----


def test_a_checkpoint_of_an_older_version_starts_anew_what_it_lacks():
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    opt = RING(model, step_length="kl_clip")
    step(model, opt)
    old = copy.deepcopy(opt.state_dict())
    for group in old["param_groups"]:
        for key in ("betas", "max_kl"):
            del group[key]
        group["momentum"] = 0.9
    weight, bias = old["state"][0], old["state"][1]
    del weight["direction_failures"], bias["momentum_buffer"]
    weight["momentum_buffer"] = torch.ones(3, 5)
    other = RING(model, step_length="kl_clip", betas=(0.5, 0.9), max_kl=0.2)
    other.load_state_dict(old)
    group = other.param_groups[0]
    assert group["betas"] == (0.5, 0.9)
    assert group["max_kl"] == 0.2
    assert group["step"] == 1
    assert "momentum_buffer" not in other.state[model.weight]
    before = model.weight.detach().clone()
    step(model, other)
    assert not torch.equal(model.weight, before)
    assert other.diagnostics()["model/direction_failures"] == 0
    grafted = RING(model)
    grafted.load_state_dict(old)
    step(model, grafted)


def test_step_counts_are_loaded_onto_the_host():
    model = nn.Linear(4, 3)
    opt = RING(model)
    step(model, opt)
    saved = copy.deepcopy(opt.state_dict())
    for state in saved["state"].values():
        state["step"] = state["step"].to("meta")
    # Without a GPU "meta" stands for another device. It has no values, so that the copy to the host, which
    # is what is asked for, is refused by torch.
    with pytest.raises(NotImplementedError, match="meta tensor"):
        opt.load_state_dict(saved)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("late", [True, False])
def test_narrow_parameters_change_between_curvature_and_adamw(dtype, late):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).to(dtype)
    opt = RING(model, lr=0.1)

    def once():
        before = model[0].bias.detach().clone()
        F.cross_entropy(model(torch.randn(8, 4, dtype=dtype)), torch.zeros(8).long()).backward()
        opt.step()
        opt.zero_grad()
        assert model[0].bias.isfinite().all()
        assert not torch.equal(model[0].bias, before)

    for frozen in (False, True, False) if late else (True, False, True):
        model[0].weight.requires_grad_(not frozen)
        once()


def test_the_wide_step_of_adamw_is_that_of_torch():
    torch.manual_seed(0)
    p, q = (nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.bfloat16)) for _ in range(2))
    master = nn.Parameter(q.detach().float())
    opt = RING([p], lr=0.1, adamw_lr=0.1, betas=(0.8, 0.95), weight_decay=0.3)
    reference = torch.optim.AdamW([master], lr=0.1, betas=(0.8, 0.95), weight_decay=0.3)
    zeros = torch.zeros(6)
    opt.state[p].update(step=torch.zeros(()), exp_avg=zeros.clone(), exp_avg_sq=zeros.clone())
    for _ in range(3):
        grad = torch.randn(6).bfloat16()
        p.grad, master.grad = grad.clone(), grad.float()
        opt.step()
        reference.step()
    assert opt.state[p]["exp_avg"].dtype == torch.float32
    torch.testing.assert_close(opt.state[p]["exp_avg"], reference.state[master]["exp_avg"])
    torch.testing.assert_close(opt.state[p]["exp_avg_sq"], reference.state[master]["exp_avg_sq"])
    torch.testing.assert_close(p.float(), master.detach(), rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("make", [nn.Module.double, nn.Module.float])
def test_a_model_cast_after_steps_is_named_and_its_state_can_be_loaded(make):
    model = nn.Sequential(nn.Linear(4, 3))
    model.to(torch.float32 if make is nn.Module.double else torch.float64)

    def once(opt):
        dtype = model[0].weight.dtype
        out = model(torch.randn(8, 4, dtype=dtype))
        opt.observe(out)
        out.square().mean().backward()
        opt.step()
        opt.zero_grad()

    opt = RING(model)
    once(opt)
    make(model)
    before = model[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"RING: 0 .*was moved or cast after the optimizer"):
        once(opt)
    assert torch.equal(model[0].weight, before)
    assert opt.param_groups[0]["step"] == 1
    model.zero_grad()
    resumed = RING(model)
    resumed.load_state_dict(opt.state_dict())
    once(resumed)
    assert not torch.equal(model[0].weight, before)
    assert resumed.state[model[0].weight]["input_factor"].dtype == model[0].weight.dtype


def test_factors_on_another_device_are_named():
    model = nn.Sequential(nn.Linear(4, 3))
    opt = RING(model)
    step(model, opt)
    state = opt.state[model[0].weight]
    state["input_factor"] = state["input_factor"].to("meta")
    with pytest.raises(RuntimeError, match=r"RING: 0 .*was moved or cast .*meta"):
        step(model, opt)


def test_loading_forgets_bad_steps_and_statistics():
    model = nn.Linear(4, 3)
    opt = RING(model, max_failures=1)
    step(model, opt)
    saved = copy.deepcopy(opt.state_dict())
    step(model, opt, scale=float("nan"))
    opt.observe(model(torch.randn(8, 4)))
    opt.load_state_dict(saved)
    assert opt.diagnostics()["skipped_steps_in_a_row"] == 0
    assert not any(opt._capture.records.values())
    step(model, opt, scale=float("nan"))  # the first bad one again
    with pytest.raises(PreconditionerError):
        step(model, opt, scale=float("nan"))
    assert not any(opt._capture.records.values())


@pytest.mark.parametrize("optimizer", [RING, KFAC])
def test_nothing_is_recorded_for_a_weight_that_was_frozen_later(optimizer):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    opt = optimizer(model)
    model[0].weight.requires_grad_(False)
    opt.observe(model(torch.randn(8, 4)))
    kept = {x.name: len(r) for x, r in opt._capture.records.items()}
    assert kept == {"0": 0, "1": 1}


def test_betas_are_those_of_adamw_too():
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    opt = RING([p], adamw_lr=0.1, betas=(0.5, 0.7), weight_decay=0.0)
    other = torch.optim.AdamW([q], lr=0.1, betas=(0.5, 0.7), weight_decay=0.0)
    for k in range(3):
        for x, o in ((p, opt), (q, other)):
            x.grad = torch.tensor([1.0, -2.0, 3.0]) * (1 + k)
            o.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize("optimizer", [RING, KFAC])
def test_a_learning_rate_with_a_dimension_is_named(optimizer):
    with pytest.raises(ValueError, match=f"{optimizer.__name__}: lr must be a number"):
        optimizer(nn.Linear(4, 3), lr=torch.tensor([0.1]))


def test_a_grad_scaler_changes_nothing_but_the_steps_it_skips():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    scaled = copy.deepcopy(plain)
    opts = [RING(m, refresh_every=3) for m in (plain, scaled)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
    for i in range(12):
        x, y = torch.randn(8, 4), torch.randint(0, 3, (8,))
        bad = i in (0, 5, 6)  # overflows: the scaler skips the step
        for model, opt in zip((plain, scaled), opts, strict=True):
            if bad and model is plain:
                continue
            out = model(x * (float("inf") if bad else 1.0))
            if not bad:
                opt.observe(out)
            loss = F.cross_entropy(out, y)
            if model is plain:
                loss.backward()
                opt.step()
            else:
                scaler.scale(loss).backward()
                scaler.step(opt)
                scaler.update()
            opt.zero_grad()
    for p, q in zip(plain.parameters(), scaled.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-4, atol=1e-6)
