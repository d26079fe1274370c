# SPDX-License-Identifier: Apache-2.0
"""How far RING moves the embeddings, which AdamW trains: less where they are small."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grng import RENG, RING
from grng.optim import fallback

ROWS, WIDTH, CLASSES = 11, 6, 3
LR = 0.01


class Model(nn.Module):
    """A bag of looked-up rows, a table that is no embedding, and a layer with curvature."""

    def __init__(self, rms: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS, WIDTH, dtype=dtype)
        self.bags = nn.EmbeddingBag(ROWS, WIDTH, mode="sum", dtype=dtype)
        self.shift = nn.Parameter(torch.zeros(WIDTH, dtype=dtype))
        self.head = nn.Linear(WIDTH, CLASSES, dtype=dtype)
        with torch.no_grad():
            for weight in (self.table.weight, self.bags.weight):
                weight *= rms / weight.square().mean().sqrt()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.table(tokens).mean(1) + self.bags(tokens) + self.shift)


def one_step(model: Model, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    device = model.shift.device
    tokens = torch.randint(0, ROWS, (8, 5), generator=generator).to(device)
    labels = torch.randint(0, CLASSES, (8,), generator=generator).to(device)
    logits = model(tokens)
    if hasattr(optimizer, "observe"):
        optimizer.observe(logits)
    F.cross_entropy(logits, labels).backward()
    optimizer.step()
    optimizer.zero_grad()


def largest_change(model: Model, before: Model, name: str) -> float:
    now, then = model.get_parameter(name), before.get_parameter(name)
    return float((now - then).detach().abs().max()) / LR


@pytest.mark.parametrize("optimizer", [RING, RENG])
@pytest.mark.parametrize(
    ("rms", "part"), [(0.02, 0.2), (0.05, 0.5), (0.0, 0.1), (1e-4, 0.1), (0.1001, 1.0), (3.0, 1.0)]
)
def test_step_of_a_small_embedding_is_short(optimizer: type[RING], rms: float, part: float) -> None:
    model = Model(rms)
    before = copy.deepcopy(model)
    one_step(model, optimizer(model, lr=LR, weight_decay=0.0, max_kl=None))
    # AdamW's first step moves each entry that has a gradient by the rate.
    for name in ("table.weight", "bags.weight"):
        assert largest_change(model, before, name) == pytest.approx(part, rel=2e-3)
    # Nothing else is shortened.
    assert largest_change(model, before, "shift") == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize(
    ("rms", "options"),
    [
        (0.5, {}),
        (0.02, {"adamw_lr": LR}),
        (0.02, {"step_length": "kl_clip", "adamw_lr": LR}),
    ],
    ids=str,
)
def test_other_embeddings_are_trained_by_plain_adamw(rms: float, options: dict) -> None:
    model = Model(rms)
    other = copy.deepcopy(model)
    optimizer = RING(model, lr=LR, weight_decay=0.1, **options)
    rival = torch.optim.AdamW(other.parameters(), lr=LR, weight_decay=0.1)
    one_step(model, optimizer)
    one_step(other, rival)
    for name in ("table.weight", "bags.weight", "shift"):
        torch.testing.assert_close(model.get_parameter(name), other.get_parameter(name))


def test_rate_of_a_kl_clip_is_not_shared() -> None:
    model = Model(0.02)
    before = copy.deepcopy(model)
    one_step(model, RING(model, lr=LR, step_length="kl_clip", weight_decay=0.0))
    assert largest_change(model, before, "table.weight") * LR == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = Model(0.02, dtype)
    before = copy.deepcopy(model)
    one_step(model, RING(model, lr=LR, weight_decay=0.0))
    tolerance = 2e-3 if dtype == torch.float64 else 0.05
    assert largest_change(model, before, "table.weight") == pytest.approx(0.2, rel=tolerance)
    assert model.table.weight.dtype == dtype


def test_rate_may_be_a_tensor_and_change() -> None:
    model = Model(0.02)
    optimizer = RING(model, lr=torch.tensor(LR), weight_decay=0.0)
    for group in optimizer.param_groups:
        group["lr"].mul_(0.5)
    before = copy.deepcopy(model)
    one_step(model, optimizer)
    assert largest_change(model, before, "table.weight") == pytest.approx(0.1, rel=2e-3)


def test_frozen_empty_and_unused_tables() -> None:
    model = Model(0.02)
    model.bags.weight.requires_grad_(False)
    model.unused = nn.Embedding(4, 2)
    model.empty = nn.Embedding(0, 2)
    before = copy.deepcopy(model)
    one_step(model, RING(model, lr=LR))
    assert torch.equal(model.bags.weight, before.bags.weight)
    assert torch.equal(model.unused.weight, before.unused.weight)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copy_goes_on_as_the_original(copied) -> None:  # type: ignore[no-untyped-def]
    model = Model(0.02)
    optimizer = RING(model, lr=LR)
    one_step(model, optimizer)
    twin, other = copied((model, optimizer))
    for seed in (1, 2):
        one_step(model, optimizer, seed)
        one_step(twin, other, seed)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_checkpoint_says_whether_steps_are_short() -> None:
    model = Model(0.02)
    optimizer = RING(model, lr=LR, adamw_lr=LR, weight_decay=0.0)
    second = copy.deepcopy(model)
    resumed = RING(second, lr=LR, weight_decay=0.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for net, opt in ((model, optimizer), (second, resumed)):
        one_step(net, opt)
    for a, b in zip(model.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_step_that_fails_leaves_the_embedding_or_moves_it_a_little(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Model(0.02)
    optimizer = RING(model, lr=LR, weight_decay=0.0)
    before = copy.deepcopy(model)
    calls = []
    original = fallback.adamw

    def failing(*arguments: object, **options: object) -> None:
        calls.append(len(arguments))
        if len(calls) == 3:
            raise MemoryError
        original(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(fallback, "adamw", failing)
    with pytest.raises(MemoryError):
        one_step(model, optimizer)
    changes = [largest_change(model, before, f"{name}.weight") for name in ("table", "bags")]
    assert sorted(changes) == pytest.approx([0.0, 0.2], rel=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_device_that_nobody_waits_for_has_the_same_step(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    model = Model(0.02, dtype)
    twin = copy.deepcopy(model)
    optimizer, other = RING(model, lr=LR, weight_decay=0.1), RING(twin, lr=LR, weight_decay=0.1)
    for seed in range(3):
        one_step(model, optimizer, seed)
        with monkeypatch.context() as patch:
            patch.setattr(fallback, "_can_be_asked", lambda parameter: False)
            one_step(twin, other, seed)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
def test_step_on_a_gpu_is_that_of_a_cpu() -> None:
    model = Model(0.02, torch.float64)
    twin = copy.deepcopy(model).cuda()
    before = copy.deepcopy(model)
    optimizer, other = (RING(net, lr=LR, weight_decay=0.0) for net in (model, twin))
    one_step(model, optimizer)
    one_step(twin, other)
    for name in ("table.weight", "bags.weight"):
        assert largest_change(twin.cpu(), before, name) == pytest.approx(0.2, rel=2e-3)


def test_explained() -> None:
    text = str(RING(Model(0.02)).explain())
    assert "Embedding has no Kronecker factors here; steps times min(1, RMS / 0.1)" in text
    assert "steps times" not in str(RING(Model(0.02), adamw_lr=1e-3).explain())


def test_embedding_that_is_tied_or_added_later() -> None:
    model = Model(0.02)
    model.out = nn.Linear(WIDTH, ROWS, bias=False)
    model.out.weight = model.table.weight
    before = copy.deepcopy(model)
    optimizer = RING(model, lr=LR, weight_decay=0.0)
    late = nn.Embedding(ROWS, WIDTH)
    optimizer.add_param_group({"params": late.parameters()})
    one_step(model, optimizer)
    assert largest_change(model, before, "table.weight") == pytest.approx(0.2, rel=2e-3)


def test_old_pickle_trains_embeddings_as_it_did() -> None:
    model = Model(0.02)
    optimizer = RING(model, lr=LR, weight_decay=0.0)
    state = optimizer.__getstate__()
    del state["_embeddings"]
    old = RING.__new__(RING)
    old.__setstate__(state)
    before = copy.deepcopy(model)
    one_step(model, old)
    assert largest_change(model, before, "table.weight") == pytest.approx(1.0, rel=1e-3)


def test_resumed_run_equals_the_uninterrupted_one() -> None:
    model = Model(0.02)
    optimizer = RING(model, lr=LR)
    one_step(model, optimizer)
    second = copy.deepcopy(model)
    resumed = RING(second, lr=LR)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in (1, 2, 3):
        one_step(model, optimizer, seed)
        one_step(second, resumed, seed)
    for a, b in zip(model.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
