# SPDX-License-Identifier: Apache-2.0
"""``explain()`` and ``diagnostics()``: what they say is true, readable, and read with one wait."""

import copy
import io
import pickle
import sys

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from rich.console import Console
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from grng import KFAC, RENG, RING, RKalman, SophiaG
from grng.reports import names
from grng.reports.text import WIDTH, Report, bytes_text, count_text, shortened

KRONECKER = (RING, RENG, KFAC)
CLASSES = 3


def mlp(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, CLASSES, bias=False)
    ).to(dtype)


def take_step(model, opt, x=None):
    x = torch.randn(8, 5, dtype=next(model.parameters()).dtype) if x is None else x
    out = model(x)
    opt.observe(out)
    F.cross_entropy(out, torch.arange(len(x)) % CLASSES).backward()
    opt.step()
    opt.zero_grad()


def peft_model(layers=12):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=8,
        num_labels=CLASSES,
    )
    return peft.get_peft_model(
        transformers.BertForSequenceClassification(config),
        peft.LoraConfig(r=4, target_modules=["query", "key", "value"], task_type="SEQ_CLS"),
    )


class Ids(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(input_ids=x).logits


# ---- numbers ----


@pytest.mark.parametrize("optimizer", KRONECKER)
def test_the_numbers_are_those_of_the_factors(optimizer):
    model = mlp(torch.float64)
    opt = optimizer(model, refresh_every=1)
    for _ in range(3):
        take_step(model, opt)
    report = opt.diagnostics()
    for name, layer in (("0", model[0]), ("3", model[3])):
        state = opt.state[layer.weight]
        for side in ("output", "input"):
            factor = state[f"{side}_factor"]
            damping = report[f"{name}/{side}_damping"]
            damped = factor + damping * torch.eye(len(factor), dtype=torch.float64)
            torch.testing.assert_close(
                damped @ state[f"{side}_inverse"], torch.eye(len(factor), dtype=torch.float64)
            )
            # Two estimates of norms, each 2 % high at most and some percent low.
            condition = float(torch.linalg.cond(damped))
            assert report[f"{name}/{side}_condition"] == pytest.approx(condition, rel=0.1)
            norm = float(torch.linalg.matrix_norm(factor, 2))
            assert report[f"{name}/{side}_norm"] == pytest.approx(norm, rel=0.1)
            assert report[f"{name}/{side}_residual"] == float(state[f"{side}_residual"])
    assert report["largest_condition"] == max(v for k, v in report.items() if "_condition" in k)
    assert report["step"] == 3 and report["kronecker_layers"] == 2
    assert report["adamw_parameters"] == 2


def test_a_diagonal_side_is_exact():
    torch.manual_seed(0)
    model = nn.Linear(5, 9)
    opt = RING(model, max_factor_dim=8)
    x = torch.randn(20, 5)
    F.cross_entropy(model(x), torch.arange(20) % 9).backward()
    opt.step()
    report = opt.diagnostics()
    diagonal = opt.state[model.weight]["output_factor"]
    damping = 1e-3**0.5 * float(diagonal.max())
    assert report["model/output_damping"] == pytest.approx(damping, rel=1e-6)
    condition = float((diagonal.max() + damping) / (diagonal.min() + damping))
    assert report["model/output_condition"] == pytest.approx(condition, rel=1e-5)


def test_of_blocks_the_worst_counts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2, bias=False), nn.Flatten())
    opt = KFAC(model, damping=1e-2)
    x = torch.randn(30, 4, 1, 1)
    x[:, 2:] *= 100
    F.cross_entropy(model(x), torch.arange(30) % 4).backward()
    opt.step()
    state = opt.state[model[0].weight]
    rows = [
        float(torch.linalg.cond(f + row[0] * torch.eye(2)))
        for f, row in zip(state["input_factor"], state["inversions"][2:], strict=True)
    ]
    assert rows[0] > 1.5 * rows[1]
    assert opt.diagnostics()["0/input_condition"] == pytest.approx(rows[0], rel=0.1)


def test_before_the_first_step_there_is_nothing_of_curvature():
    report = RING(mlp()).diagnostics()
    assert not any(key.endswith(("_damping", "_condition", "refresh_age")) for key in report)
    assert report["0/state_bytes"] > 0 and report["state_bytes"] > report["0/state_bytes"]


def test_the_age_of_a_refresh():
    model = mlp()
    opt = RING(model, refresh_every=4)
    ages = []
    for _ in range(9):
        take_step(model, opt)
        ages.append(opt.diagnostics()["largest_refresh_age"])
    # Refreshes at steps 0, 1, 2, 4 and 8.
    assert ages == [1, 1, 1, 2, 1, 2, 3, 4, 1]
    for state in opt.state.values():
        state.pop("inverted_at", None)
    assert opt.diagnostics()["largest_refresh_age"] == 1, "an older version did not keep it"


@pytest.mark.parametrize(
    ("options", "name"),
    [({"max_kl": 1e-9}, "max_kl"), ({"step_length": "kl_clip", "kl_clip": 1e-9}, "kl_clip")],
)
def test_what_was_kept_of_the_step(options, name):
    model = mlp()
    opt = RING(model, **options)
    assert "step_kept" not in opt.diagnostics() and name not in opt.explain()
    take_step(model, opt)
    kept = opt.diagnostics()["step_kept"]
    assert 0 < kept < 0.1
    assert f"{name} left {100 * kept:.3g} % of the last step" in opt.explain()
    free = RING(model, max_kl=1e9)
    take_step(model, free)
    assert free.diagnostics()["step_kept"] == 1


def test_a_skipped_step_is_told():
    model = mlp()
    opt = RING(model)
    take_step(model, opt)
    for lines in ("Skipped: 1 step in a row, for", "Skipped: 2 steps in a row, for"):
        model(torch.full((2, 5), float("nan"))).sum().backward()
        opt.step()
        opt.zero_grad()
        assert lines in opt.explain()


def test_failures_add_up_and_are_seen():
    model = mlp()
    opt = RING(model, refresh_every=1)
    take_step(model, opt)
    take_step(model, opt, torch.full((8, 5), 2e19))
    report = opt.diagnostics()
    assert report["0/factor_failures"] == report["factor_failures"] == 1
    [line] = [r for r in _curvature(opt) if r.startswith("0 ")]
    assert line.endswith(" 1")
    opt.state[model[3].weight]["inversions"][0, 3] = 2
    assert opt.diagnostics()["inverse_failures_in_a_row"] == 2
    assert "0 (2 in a row)" in opt.explain()


def _curvature(opt):
    lines = opt.explain().splitlines()
    return lines[next(i for i, x in enumerate(lines) if x.startswith("curvature")) :]


@pytest.mark.parametrize("optimizer", KRONECKER)
@pytest.mark.parametrize("report", ["explain", "diagnostics"])
def test_one_wait_for_all_numbers(optimizer, report, monkeypatch):
    model = nn.Sequential(mlp(), nn.Linear(CLASSES, CLASSES))
    opt = optimizer(model)
    take_step(model, opt)
    asked = []

    def counting(name):
        real = getattr(torch.Tensor, name)
        return lambda tensor, *args: asked.append(name) or real(tensor, *args)

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, counting(name))
    getattr(opt, report)()
    assert asked == ["tolist"]


def test_all_names_of_numbers_are_documented():
    model = mlp()
    opt = RING(model)
    take_step(model, opt)
    text = RING.diagnostics.__doc__
    for key in opt.diagnostics():
        short = key.rpartition("/")[2].removeprefix("output_").removeprefix("input_")
        assert f"``{short}``" in text, key


@pytest.mark.parametrize("optimizer", KRONECKER)
def test_a_report_changes_nothing(optimizer):
    runs = []
    for reporting in (False, True):
        model = mlp()
        opt = optimizer(model, refresh_every=2)
        for seed in range(5):
            torch.manual_seed(seed)
            take_step(model, opt)
            if reporting:
                opt.explain(), opt.diagnostics(), opt.memory_estimate()
        runs.append([p.detach().clone() for p in model.parameters()])
        assert all(len(s) > 0 for s in opt.state.values())
    assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))


# ---- costs ----


def test_the_flops_are_those_of_the_products():
    torch.manual_seed(0)
    model = nn.Linear(5, 7)
    report = RING(model).diagnostics()
    o, i, rows = 7, 6, 11
    with FlopCounterMode(display=False) as counter:
        torch.randn(o, o) @ torch.randn(o, i) @ torch.randn(i, i)
    assert report["flops_per_step"] == report["model/flops_per_step"] == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        for n in (o, i):
            torch.randn(n, rows) @ torch.randn(rows, n)
    # A triangle with its diagonal, and not the whole product.
    whole = counter.get_total_flops() / rows
    assert report["flops_per_row"] == whole / 2 + o + i
    assert report["flops_per_refresh"] == o**3 + 98 * o**2 + i**3 + 98 * i**2


def test_the_flops_of_diagonals_blocks_and_shared_inputs():
    torch.manual_seed(0)
    wide = RING(nn.Linear(5, 9, bias=False), max_factor_dim=8).diagnostics()
    assert wide["flops_per_step"] == 9 * 5 + 2 * 9 * 25
    assert wide["flops_per_row"] == 2 * 9 + 5 * 6
    assert wide["flops_per_refresh"] == 4 * 9 + 5**3 + 98 * 25
    one, four = (
        RING(nn.Conv2d(2 * g, 3 * g, 1, groups=g)).diagnostics()["flops_per_refresh"]
        for g in (1, 4)
    )
    assert four == 4 * one

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x):
            return self.one(x) + self.two(x).tanh()

    model = Two()
    opt = RING(model)
    before = opt.diagnostics()
    take_step(model, opt)
    after = opt.diagnostics()
    assert after["one/flops_per_refresh"] == before["one/flops_per_refresh"]
    assert before["two/flops_per_refresh"] - after["two/flops_per_refresh"] == 6**3 + 98 * 36
    assert before["two/flops_per_row"] - after["two/flops_per_row"] == 6 * 7
    assert "One input factor: one shares its with two" in opt.explain()


# ---- text ----


def test_a_peft_model_is_readable():
    model = Ids(peft_model())
    opt = RING(model)
    for k in range(2):
        text = opt.explain()
        lines = text.splitlines()
        assert max(map(len, lines)) <= WIDTH == 110
        # 12 blocks with q, k, v and two matrices each, and the head; twice once there is curvature.
        assert "73 layers with curvature (kronecker), 0 parameters without (adamw)" in lines[0]
        assert sum("lora_A (12)" in line for line in lines) == 3 * (k + 1)
        assert sum(line.startswith("classifier") for line in lines) == k + 1
        assert "4x4, 64 (diagonal)" in text and "64 (diagonal), 4x4" in text
        take_step(model, opt, torch.randint(0, 20, (8, 6)))
    shared = "encoder.layer.[0-11].attention.self.query.lora_A shares its with key, value"
    assert f"bert.{shared}" in opt.explain()
    full = opt.explain(full=True)
    name = "model.base_model.model.bert.encoder.layer.{}.attention.self.key.lora_B.default "
    assert all(full.count(name.format(k)) == 2 for k in range(12))


def test_layers_that_differ_in_more_than_numbers_have_lines_of_their_own():
    model = nn.ModuleDict(
        {
            "blocks": nn.ModuleList(nn.Linear(4, 4) for _ in range(3)),
            "other": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 5), nn.Linear(4, 4, bias=False)]),
        }
    )
    text = RING(model).explain()
    assert "blocks.[0-2] (3)  Linear + bias" in text
    assert "other.0           Linear + bias" in text
    assert "other.1           Linear + bias" in text
    assert "other.2           Linear   " in text
    assert RING(model).explain(full=True).count("blocks.") == 3


def test_what_adamw_trains_is_folded_too():
    model = nn.ModuleList(nn.LayerNorm(4) for _ in range(3))
    text = RING(model).explain()
    assert "[0-2].weight (3)" in text and "LayerNorm has no Kronecker factors here" in text
    assert text.count("LayerNorm") == 2
    assert RING(model).explain(full=True).count("LayerNorm") == 6


def test_rich_draws_it_and_is_not_needed(monkeypatch):
    model = mlp()
    opt = RING(model)
    take_step(model, opt)
    report = opt.explain()
    drawn = {}
    for width in (WIDTH, 60):
        console = Console(file=io.StringIO(), width=width, force_terminal=True, no_color=True)
        console.print(report)
        drawn[width] = console.file.getvalue()
    assert all(word in drawn[WIDTH] for word in report.split())
    # Headings are bold: it is no string that rich has printed.
    assert all("\x1b[1mkronecker" in text for text in drawn.values())
    for name in [n for n in sys.modules if n.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert str(opt.explain()) == report


def test_names_with_brackets_are_no_markup():
    model = nn.ModuleDict({"[red]": nn.Linear(3, 3)})
    console = Console(file=io.StringIO(), width=110)
    console.print(RING(model).explain())
    assert "[red]" in console.file.getvalue()


def test_a_report_is_text_that_can_be_copied():
    report = RING(mlp()).explain()
    assert isinstance(report, str) and "kronecker" in report
    for twin in (copy.deepcopy(report), pickle.loads(pickle.dumps(report))):
        assert type(twin) is Report and twin == report and twin.parts == report.parts
    full = RING(Ids(peft_model(2))).explain(full=True)
    assert pickle.loads(pickle.dumps(full)) == full and max(map(len, full.splitlines())) > WIDTH


def test_sizes_and_names_in_few_letters():
    assert [bytes_text(n) for n in (0, 999, 1000, 999_949, 999_950, 12_345_678)] == [
        "0 B", "999 B", "1.0 kB", "999.9 kB", "1.0 MB", "12.3 MB"
    ]  # fmt: skip
    assert count_text(5 * 10**15) == "5000.0 T"
    assert shortened("a.b.c.d", 7) == "a.b.c.d" and shortened("aa.bb.cc.dd", 10) == "aa.….cc.dd"
    assert shortened("aa.bb.cc.dd", 7) == "aa.….dd" and len(shortened("a" * 30, 24)) == 24
    assert names.together(["a.0.b.1", "a.2.b.3"]) == "a.*.b.*"
    assert names.together(["a.0", "a.1", "a.3", "a.10"]) == "a.[0-1,3,10]"
    assert names.common_ends(["a.b.x.s", "a.b.y.s"]) == ("a.b.", ".s")
    assert names.common_ends(["a.b", "a.b"]) == ("a.", "")
    assert names.common_ends(["a.0.b", "a.0.c"]) == ("a.", "") and names.common_ends(["a.b"]) == (
        "",
        "",
    )
    assert (
        names.difference("x.key.w", "x.query.w") == "key" and names.difference("a.b", "a") == "a.b"
    )


# ---- the others ----


@pytest.mark.parametrize("method", ["explain", "diagnostics"])
@pytest.mark.parametrize("optimizer", [RKalman, SophiaG])
def test_those_with_a_number_for_each_weight(optimizer, method):
    model = nn.Linear(4, CLASSES)
    opt = optimizer(model)
    assert "not yet" in opt.explain() or "none yet" in opt.explain()
    out, y = model(torch.randn(6, 4)), torch.arange(6) % CLASSES
    if optimizer is RKalman:
        opt.observe(out, y)
    else:
        opt.observe(out)
        F.cross_entropy(out, y).backward()
    opt.step()
    report, text = opt.diagnostics(), opt.explain()
    assert isinstance(text, Report) and max(map(len, text.splitlines())) <= WIDTH
    key = "variance" if optimizer is RKalman else "hessian"
    mean = float(opt.state[model.weight][key].mean())
    assert report[f"weight/{key}"] == pytest.approx(mean) and f"{mean:.3g}" in text
    assert bytes_text(int(report["state_bytes"])) in text
