# SPDX-License-Identifier: Apache-2.0
"""How far RING steps: AdamW's length per layer, and the trust region in the true Fisher metric."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jvp

from grng import RING
from grng.curvature.layers import LinearLayer, Record
from grng.curvature.quadratic import fisher_along, out_of_order
from grng.optim.grafting import adam_steps, as_steps, graft, take_steps, update_moments


class Small(nn.Module):
    """A convolution, a linear layer used at several positions, a head."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3, padding=1)
        self.mix = nn.Linear(4, 5)
        self.head = nn.Linear(5, 3, bias=False)

    def forward(self, x):
        h = self.conv(x).tanh().transpose(1, 2)
        return self.head(self.mix(h).tanh().mean(1))


def small():
    torch.manual_seed(0)
    return Small().double(), torch.randn(7, 2, 6, dtype=torch.float64)


def true_form(model, x, step):
    """``ΔᵀFΔ`` of the mean categorical log-likelihood: ``mean of zᵀ(diag p − ppᵀ)z``, ``z = J Δ``."""
    weights = {n: p.detach() for n, p in model.named_parameters()}
    logits, z = jvp(lambda w: functional_call(model, w, (x,)), (weights,), (step,))
    p = logits.softmax(-1)
    return ((p * z.square()).sum(-1) - (p * z).sum(-1).square()).mean()


def observed(model, opt, x):
    logits = model(x)
    opt.observe(logits)
    F.cross_entropy(logits, torch.zeros(len(x), dtype=torch.long)).backward()


def random_step(model, opt):
    step = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    names = {p: n for n, p in model.named_parameters()}
    return step, [[step[names[p]] for p in layer.parameters] for layer in opt._layers]


def test_the_form_along_a_step_is_that_of_the_exact_fisher():
    model, x = small()
    opt = RING(model, fisher="exact")
    observed(model, opt, x)
    step, by_layer = random_step(model, opt)
    form = fisher_along(opt._layers, opt._capture.complete, by_layer)
    torch.testing.assert_close(form, true_form(model, x, step), rtol=1e-10, atol=0)


def test_sampled_labels_give_the_form_on_average():
    model, x = small()
    opt = RING(model)
    step, by_layer = random_step(model, opt)
    found = []
    for k in range(400):
        opt._observations = k
        observed(model, opt, x)
        found.append(fisher_along(opt._layers, opt._capture.complete, by_layer))
        opt._forget()
    mean, error = torch.stack(found).mean(), torch.stack(found).std() / 20
    assert (mean - true_form(model, x, step)).abs() < 4 * error


def test_micro_batches_give_the_form_of_one_large_batch():
    model, x = small()
    opt = RING(model, fisher="exact")
    step, by_layer = random_step(model, opt)
    for part in (x[:2], x[2:6]):
        observed(model, opt, part)
    form = fisher_along(opt._layers, opt._capture.complete, by_layer)
    torch.testing.assert_close(form, true_form(model, x[:6], step), rtol=1e-10, atol=0)


def test_without_statistics_there_is_no_form():
    model, _ = small()
    opt = RING(model)
    _, by_layer = random_step(model, opt)
    assert fisher_along(opt._layers, opt._capture.complete, by_layer) is None


@pytest.mark.parametrize("max_kl", [1e-2, 1e-4])
def test_a_long_step_is_cut_to_the_trust_region(max_kl):
    model, x = small()
    opt = RING(model, lr=3.0, fisher="exact", max_kl=max_kl, weight_decay=0.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    observed(model, opt, x)
    opt.step()
    moved = {n: p.detach() - before[n] for n, p in model.named_parameters()}
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(before[n])
    assert 0.5 * true_form(model, x, moved) == pytest.approx(max_kl, rel=1e-6)


def test_a_short_step_is_left_as_it_is():
    steps = []
    for max_kl in (None, 1.0):
        model, x = small()
        opt = RING(model, lr=1e-4, max_kl=max_kl)
        before = [p.detach().clone() for p in model.parameters()]
        observed(model, opt, x)
        opt.step()
        steps.append([p.detach() - b for p, b in zip(model.parameters(), before, strict=True)])
    for a, b in zip(*steps, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_the_ratio_holds_between_refreshes_and_survives_a_checkpoint():
    model, x = small()
    opt = RING(model, lr=3.0, max_kl=1e-3, refresh_every=50)
    for _ in range(4):
        observed(model, opt, x)
        opt.step()
        opt.zero_grad()
    twin = copy.deepcopy(model)
    while any(m._forward_hooks for m in twin.modules()):
        for m in twin.modules():
            m._forward_hooks.clear()
    resumed = RING(twin, lr=3.0, max_kl=1e-3, refresh_every=50)
    resumed.load_state_dict(opt.state_dict())
    for m, o in ((model, opt), (twin, resumed)):
        observed(m, o, x)
        o.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_every_layer_moves_as_far_as_adamw_would_move_it():
    model, x = small()
    twin = copy.deepcopy(model)
    opt = RING(model, lr=1e-3, max_kl=None, weight_decay=0.0)
    adamw = torch.optim.AdamW(twin.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(3):
        observed(model, opt, x)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = p.grad.clone()
        before = [p.detach().clone() for p in (*model.parameters(), *twin.parameters())]
        opt.step()
        adamw.step()
        opt.zero_grad()
        after = [p.detach() for p in (*model.parameters(), *twin.parameters())]
        moved = [a - b for a, b in zip(after, before, strict=True)]
        mine, theirs = moved[: len(moved) // 2], moved[len(moved) // 2 :]
        for pair in ((0, 1), (2, 3), (4,)):  # conv, mix, head: weight with bias
            norms = [
                torch.stack([step[i].square().sum() for i in pair]).sum().sqrt()
                for step in (mine, theirs)
            ]
            torch.testing.assert_close(norms[0], norms[1], rtol=1e-7, atol=0)


def test_moments_are_those_of_adamw():
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    twin = nn.Parameter(p.detach().clone())
    adamw, state = torch.optim.AdamW([twin], lr=0.1, weight_decay=0.0), {}
    for _ in range(5):
        p.grad = twin.grad = torch.randn_like(p)
        adamw.step()
        (length,) = update_moments([p], [state], (0.9, 0.999), 1e-8)
        (step,) = adam_steps([state], (0.9, 0.999), 1e-8)
        torch.testing.assert_close(length, step.norm(), rtol=1e-12, atol=0)
        with torch.no_grad():
            p.sub_(0.1 * step)
    torch.testing.assert_close(p, twin, rtol=1e-12, atol=0)


def grafted_steps(directions, params):
    """The steps that are taken, those of AdamW being the gradients' signs; and which directions served."""
    states = [{} for _ in params]
    lengths = update_moments(params, states, (0.9, 0.999), 1e-30)
    found = graft([[d] for d in directions], lengths)
    before = [p.detach().clone() for p in params]
    with torch.no_grad():
        moments = {"betas": (0.9, 0.999), "eps": 1e-30}
        take_steps(params, states, directions, found.scales, lr=1.0, decay=1.0, **moments)
    steps = [b - p.detach() for b, p in zip(before, params, strict=True)]
    formed = as_steps([[d] for d in directions], states, found, (0.9, 0.999), 1e-30)
    for (tensor,), factor, step in zip(*formed, steps, strict=True):
        torch.testing.assert_close(factor.to(tensor) * tensor, step)
    return steps, found.serves


def moving(grad):
    p = nn.Parameter(torch.zeros_like(grad))
    p.grad = grad
    return p


def test_a_direction_without_use_gives_way_to_the_step():
    params = [moving(torch.tensor([3.0, -4.0])) for _ in range(6)]
    directions = [
        torch.tensor([0.0, 2.0]),
        torch.tensor([1e30, 0.0]),  # its square is out of range
        torch.tensor([1e-30, 0.0]),
        torch.tensor([float("inf"), 0.0]),
        torch.tensor([float("nan"), 0.0]),
        torch.tensor([0.0, 0.0]),
    ]
    steps, serves = grafted_steps(directions, params)
    assert serves.tolist() == [True, True, True, False, False, False]
    root = 2**0.5
    torch.testing.assert_close(steps[0], torch.tensor([0.0, root]))
    torch.testing.assert_close(steps[1], torch.tensor([root, 0.0]))
    torch.testing.assert_close(steps[2], torch.tensor([root, 0.0]))
    for step in steps[3:]:
        torch.testing.assert_close(step, torch.tensor([1.0, -1.0]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_direction_that_is_not_finite_is_not_taken_where_there_is_no_step_either(value):
    steps, serves = grafted_steps([torch.full((2,), value)], [moving(torch.zeros(2))])
    assert serves.tolist() == [False]
    assert torch.equal(steps[0], torch.zeros(2))


def test_nothing_to_do_is_no_failure():
    steps, serves = grafted_steps([torch.zeros(2)], [moving(torch.zeros(2))])
    assert serves.tolist() == [True]
    assert torch.equal(steps[0], torch.zeros(2))


class Encoder(nn.Module):
    """A transformer layer and a head; ``flat`` feeds the head positions as rows."""

    def __init__(self, *, flat=False, batch_first=True):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            8, 2, 20, dropout=0.0, batch_first=batch_first, activation=torch.tanh
        )
        self.head = nn.Linear(8, 3)
        self.flat, self.batch_first = flat, batch_first

    def forward(self, x):
        h = self.layer(x if self.batch_first else x.transpose(0, 1))
        if not self.batch_first:
            h = h.transpose(0, 1)
        if self.flat:
            return self.head(h.flatten(0, 1)).unflatten(0, h.shape[:2]).mean(1)
        return self.head(h).mean(1)


@pytest.mark.parametrize("flat", [False, True])
def test_attention_and_flattened_heads_count_by_example(flat):
    torch.manual_seed(0)
    model = Encoder(flat=flat).double()
    x = torch.randn(5, 4, 8, dtype=torch.float64)
    opt = RING(model, fisher="exact")
    assert "MultiheadAttention" in opt.explain()
    observed(model, opt, x)
    step, by_layer = random_step(model, opt)
    owned = {id(p) for layer in opt._layers for p in layer.parameters}
    for n, p in model.named_parameters():
        if id(p) not in owned:
            step[n] = torch.zeros_like(p)
    form = fisher_along(opt._layers, opt._capture.complete, by_layer)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        wanted = true_form(model, x, step)
    torch.testing.assert_close(form, wanted, rtol=1e-9, atol=0)


@pytest.mark.parametrize("positions", [4, 10], ids=["unlike", "a multiple"])
def test_layers_that_are_fed_positions_first_are_left_out_of_the_form(positions):
    torch.manual_seed(0)
    model = Encoder(batch_first=False).double()
    x = torch.randn(5, positions, 8, dtype=torch.float64)
    opt = RING(model, fisher="exact", max_kl=1e9)
    observed(model, opt, x)
    strangers = out_of_order(opt._layers, opt._capture.complete)
    assert {layer.name for layer in strangers} == {"layer.linear1", "layer.linear2"}
    step, by_layer = random_step(model, opt)
    kept = [i for i, layer in enumerate(opt._layers) if layer not in strangers]
    owned = {id(p) for i in kept for p in opt._layers[i].parameters}
    for n, p in model.named_parameters():
        if id(p) not in owned:
            step[n] = torch.zeros_like(p)
    form = fisher_along(
        [opt._layers[i] for i in kept], opt._capture.complete, [by_layer[i] for i in kept]
    )
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        wanted = true_form(model, x, step)
    torch.testing.assert_close(form, wanted, rtol=1e-9, atol=0)
    with pytest.warns(
        RuntimeWarning, match=r"inputs of layer\.linear1, layer\.linear2 .*batch_first"
    ):
        opt.step()
    assert opt.state[opt._all_layers[0].weight]["fisher_ratio"] > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.zero_grad()
        observed(model, opt, x)
        opt.step()


@pytest.mark.parametrize(
    ("shapes", "terms", "strangers"),
    [
        ([(32, 4, 6), (32, 6)], 32, []),  # pooled
        ([(8, 4, 6), (32, 6)], 32, []),  # flattened
        ([(8, 4, 6), (8, 4, 6)], 32, []),  # a term for each position
        ([(1, 32, 6), (32, 6)], 32, []),  # the same, of one example
        ([(64, 49, 6), (16, 4, 6), (16, 6)], 16, []),  # windows
        ([(32, 6), (0, 6)], 32, []),
        ([(4, 32, 6), (32, 6)], 32, [0]),
        ([(6, 32, 6), (32, 6)], 32, [0]),
        ([(13, 6), (32, 6), (32, 4, 6)], 32, [0]),
        ([(13, 6), (32, 6)], None, []),
    ],
    ids=str,
)
def test_leading_dimensions_that_are_not_of_examples(shapes, terms, strangers):
    layers = [
        LinearLayer(str(i), m := nn.Linear(6, 2), m.weight, m.bias) for i in range(len(shapes))
    ]
    records = {
        x: [
            Record(
                torch.zeros(s),
                torch.zeros(*s[:-1], 2),
                terms=terms,
                observation=int(terms is not None),
            )
        ]
        for x, s in zip(layers, shapes, strict=True)
    }
    assert out_of_order(layers, records.__getitem__) == {layers[i] for i in strangers}


def test_attention_keeps_its_curvature_under_autocast():
    torch.manual_seed(0)
    model = Encoder()
    opt = RING(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        observed(model, opt, torch.randn(5, 4, 8))
    opt.step()
    assert opt.explain().count("MultiheadAttention") == 2
    for key in ("input_factor", "output_factor"):
        assert opt.state[model.layer.self_attn.in_proj_weight][key].count_nonzero() > 0


def test_one_attention_module_used_twice_has_two_passes():
    torch.manual_seed(0)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            h = self.attention(x, x, x)[0]
            return self.attention(h, h, h)[0].mean(1)

    model = Twice()
    opt = RING(model)
    observed(model, opt, torch.randn(3, 4, 8))
    for layer in opt._layers:
        edges = [opt._capture._edges[id(r)][0].node for r in opt._capture.records[layer]]
        assert len(edges) == len(set(edges)) == 2


def test_a_bad_statistic_does_not_lift_the_bound():
    model, x = small()
    opt = RING(model, lr=3.0, refresh_every=1, weight_decay=0.0)
    for k in range(3):
        observed(model, opt, x)
        ratio = opt.state[opt._all_layers[0].weight].get("fisher_ratio")
        if k == 2:
            opt._capture.records[opt._layers[1]][0].output_grad[0] = torch.nan
        opt.step()
        opt.zero_grad()
    assert ratio > 0
    assert torch.equal(opt.state[opt._all_layers[0].weight]["fisher_ratio"], ratio)


def test_a_layer_that_comes_late_does_not_lift_the_bound():
    model, x = small()
    model.head.weight.requires_grad_(False)
    opt = RING(nn.ModuleList([model.conv, model.mix]), lr=0.1, refresh_every=50)
    shared = opt.state[opt._all_layers[0].weight]
    for _ in range(3):
        observed(model, opt, x)
        opt.step()
        opt.zero_grad()
    before = shared["fisher_ratio"].clone()
    state = opt.state[model.mix.weight]
    for key in list(state):
        if key.startswith(("input", "output")) or key == "updates":
            del state[key]
    observed(model, opt, x)  # step 3 is no refresh: only the layer without curvature is recorded
    opt.step()
    assert torch.equal(shared["fisher_ratio"], before)


def test_half_precision_inputs_do_not_overflow_the_scores():
    layer = nn.Linear(4096, 2).half()
    opt = RING(layer)
    (only,) = opt._layers
    rows = torch.full((2, 4096), 20.0, dtype=torch.float16)
    grad = torch.ones(2, 2, dtype=torch.float16)
    scores = only.scores(rows, grad, [torch.ones(2, 4096), torch.ones(2)])
    torch.testing.assert_close(scores, torch.full((2,), 2 * (4096 * 20.0 + 1)))


def test_unbatched_images_are_one_example():
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 3)
    (layer,) = RING(conv)._layers
    x, grad = torch.randn(2, 5, 5), torch.randn(3, 3, 3)
    step = [torch.randn_like(conv.weight), torch.randn_like(conv.bias)]
    one = layer.scores(x, grad, step)
    torch.testing.assert_close(one, layer.scores(x[None], grad[None], step))
    torch.testing.assert_close(one, (F.conv2d(x, *step) * grad).sum()[None])
