# SPDX-License-Identifier: Apache-2.0
"""The README's examples run as printed."""

import ast
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from grng import RankOneNPG

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def run_example(containing: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run the one Python block of the README that contains a text; ``names`` are given and changed."""
    [code] = [b for b in re.findall(r"```python\n(.*?)```", README, re.S) if containing in b]
    exec(code, names)
    return names


def test_ring_replaces_adamw_and_learns(capsys):
    torch.manual_seed(0)
    prototypes, labels = torch.randn(10, 64), torch.randint(0, 10, (1280,))
    inputs = prototypes[labels] + 0.5 * torch.randn(1280, 64)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    @torch.no_grad()
    def loss() -> float:
        return float(F.cross_entropy(model(inputs), labels))

    before = loss()
    loader = list(zip(inputs.split(64), labels.split(64), strict=True))
    run_example("RING(model)", {"model": model, "loader": loader, "F": F})
    assert loss() < 0.5 * before
    assert "kronecker" in capsys.readouterr().out.lower()


def test_rkalman_learns_from_a_stream(capsys):
    torch.manual_seed(0)
    prototypes, labels = torch.randn(10, 64), torch.randint(0, 10, (300,))
    stream = [(prototypes[y] + torch.randn(3, 64), y) for y in labels.split(3)]
    names = run_example("RKalman(model)", {"stream": stream})
    assert names["right"] > 0.5 * len(labels)
    assert "coherence" in capsys.readouterr().out


def test_an_actor_critic_is_trained_saved_and_loaded(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_example("agent.train(20_000", {})
    returns = ast.literal_eval(capsys.readouterr().out)
    # A policy that draws at random has about 20.
    assert len(returns) == 10 and min(returns) > 60
    assert names["agent"].steps >= 20_000


def test_a_policy_of_ones_own_is_trained():
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    states = torch.randn(64, 4)

    def policy(x):
        return torch.distributions.Categorical(logits=net(x))

    actions = policy(states).sample()
    names = {"policy": policy, "states": states, "actions": actions}
    names |= {"advantages": (actions == 1).float(), "optimizer": RankOneNPG(net)}
    before = float(policy(states).probs[:, 1].mean())
    run_example("optimizer.observe(log_probs)", names)
    assert float(policy(states).probs[:, 1].mean()) > before


def test_kernels_take_what_the_example_gives_them():
    torch.manual_seed(0)
    factor_a, factor_b = torch.zeros(9, 9), torch.eye(4)
    given = {
        "factor": torch.zeros(9, 9),
        "activations": torch.randn(32, 8),
        "factor_a": factor_a + torch.eye(9),
        "factor_b": factor_b,
        "conv_factor": torch.zeros(27, 27),
        "images": torch.randn(2, 3, 8, 8),
    }
    names = run_example("kron_factor_update_", given)
    assert [int(x) for x in (names["info"], *names["result"].info)] == [0, 0, 0]
    assert torch.count_nonzero(names["conv_factor"]) > 0


def test_a_peft_model_is_explained_as_printed(capsys, tmp_path, monkeypatch):
    torch.manual_seed(0)
    names = run_example("get_peft_model", {})
    [shown] = [b for b in re.findall(r"```text\n(.*?)```", README, re.S) if "kronecker" in b]
    # What is measured may differ in its digits, and so in its width, from machine to machine.
    assert _measured(capsys.readouterr().out) == _measured(shown)
    assert max(map(len, shown.splitlines())) <= 110
    monkeypatch.chdir(tmp_path)
    run_example("write_diagnostics", names)
    assert list((tmp_path / "runs").rglob("events.out.tfevents.*"))


def _measured(text: str) -> list[str]:
    """Return the lines, those of the table of curvature without their numbers."""
    lines, inside = [], False
    for line in text.strip().splitlines():
        inside = line.startswith("curvature") or (inside and line != "")
        words = line.split()
        # Names are shortened by as much as the numbers need.
        lines.append(words[0].rpartition(".")[2] if inside and words else " ".join(words))
    return [re.sub(r"left [\d.e-]+ %", "left # %", line) for line in lines]
