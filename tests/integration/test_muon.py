# SPDX-License-Identifier: Apache-2.0
"""The rivals that are not one class of torch: Muon with AdamW, and SOAP."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from grng.compare.errors import UsageError
from grng.compare.muon import MuonWithAdamW
from grng.compare.optimizers import parse_spec
from grng.tasks import TASKS, ModelOptions


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 8)
        self.first = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.out = nn.Linear(8, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.out(self.frozen(self.norm(self.first(self.embedding(tokens)))))
        return found


def names(model: nn.Module, group: dict[str, object]) -> set[str]:
    known = {id(p): name for name, p in model.named_parameters()}
    # The view of a convolution has no name.
    return {known[id(p)] for p in group["params"] if id(p) in known}  # type: ignore[attr-defined]


def test_muon_has_the_hidden_matrices_alone() -> None:
    model = Model()
    optimizer = MuonWithAdamW(model)
    muon, adamw = optimizer.param_groups
    assert names(model, muon) == {"first.weight"}
    assert names(model, adamw) == {
        *("embedding.weight", "first.bias", "norm.weight", "norm.bias", "out.weight", "out.bias"),
    }


def test_steps_are_those_of_both_under_a_schedule() -> None:
    torch.manual_seed(0)
    model, twin = Model(), Model()
    twin.load_state_dict(model.state_dict())
    ours = MuonWithAdamW(model, lr=0.01, weight_decay=0.1)
    hidden = [twin.first.weight]
    rest = [p for p in twin.parameters() if p.requires_grad and p is not twin.first.weight]
    theirs: list[torch.optim.Optimizer] = [
        torch.optim.Muon(hidden, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=0.01, weight_decay=0.1),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(one, lambda step: 1 / (1 + step))
        for one in (ours, *theirs)
    ]
    tokens, labels = torch.randint(0, 5, (16,)), torch.randint(0, 3, (16,))
    for _ in range(3):
        for one, optimizers in ((model, [ours]), (twin, theirs)):
            nn.functional.cross_entropy(one(tokens), labels).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        for schedule in schedules:
            schedule.step()
    assert ours.param_groups[0]["lr"] == ours.param_groups[1]["lr"] == 0.01 / 4
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    assert len(ours.state) == 7


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, 64) / 8)
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.out = nn.Linear(4 * 64, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.second(torch.relu(self.first(images))) + self.positions.view(1, 1, 8, 8)
        found: torch.Tensor = self.out(hidden.flatten(1))
        return found


def test_convolutions_are_moved_as_matrices() -> None:
    torch.manual_seed(0)
    model, twin = Convolutions(), Convolutions()
    twin.load_state_dict(model.state_dict())
    ours = MuonWithAdamW(model, lr=0.01, weight_decay=0.1)
    images, labels = torch.randn(8, 1, 8, 8), torch.randint(0, 3, (8,))
    matrices = [
        nn.Parameter(c.weight.detach().clone().flatten(1)) for c in (twin.first, twin.second)
    ]
    muon = torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    rest = [p for p in twin.parameters() if p.dim() != 4]
    adamw = torch.optim.AdamW(rest, lr=0.01, weight_decay=0.1)
    for _ in range(3):
        nn.functional.cross_entropy(model(images), labels).backward()
        ours.step()
        ours.zero_grad()
        assert all(p.grad is None for p in model.parameters())
        nn.functional.cross_entropy(twin(images), labels).backward()
        for matrix, layer in zip(matrices, (twin.first, twin.second), strict=True):
            assert layer.weight.grad is not None
            matrix.grad = layer.weight.grad.flatten(1)
        muon.step()
        adamw.step()
        with torch.no_grad():
            for matrix, layer in zip(matrices, (twin.first, twin.second), strict=True):
                layer.weight.copy_(matrix.view_as(layer.weight))
        twin.zero_grad()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["vit", "resnet", "mlp"])
def test_muon_has_a_part_of_each_model(name: str) -> None:
    entry = TASKS["fashion-mnist"].models[name]
    model = entry.build(ModelOptions(hidden=(8, 8)))
    groups = MuonWithAdamW(model).param_groups
    assert len(groups) == 2
    # Position embeddings are a matrix that is none.
    assert not {"positions"} & names(model, groups[0])
    if name == "vit":
        assert "positions" in names(model, groups[1])


def test_torch_without_muon_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(UsageError, match=r"'muon' needs torch >= 2.9"):
        parse_spec("muon").build(nn.Linear(2, 2))


def test_soap_trains() -> None:
    pytest.importorskip("pytorch_optimizer")
    model = nn.Linear(4, 3)
    optimizer = parse_spec("soap:lr=0.01:precondition_frequency=2").build(model)
    inputs, labels = torch.randn(32, 4), torch.randint(0, 3, (32,))
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_missing_package_of_soap_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(UsageError, match="pip install --no-deps pytorch-optimizer"):
        parse_spec("soap").build(nn.Linear(2, 2))
