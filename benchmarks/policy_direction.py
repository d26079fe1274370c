# SPDX-License-Identifier: Apache-2.0
"""How near the directions of RankOneNPG come to the exact natural gradient, on a small policy; no times.

``python benchmarks/policy_direction.py [--seeds N] [--out FOLDER]`` writes policy-direction.json and
table.md. A softmax policy of two actions over four numbers, as for balancing a pole, fp64. One action is
drawn in each of 256 random states; its worth is what pushing that way would do, and noise. All directions
have the same sampled gradient g; they differ in the Fisher matrix. The exact one has all actions of the 256
states, weighted by the policy, and the same damping: ``d* = (F + damping·I)⁻¹ g`` by a dense Cholesky factor.

``cosine`` is between a direction and d*. ``gain`` is what matters where steps have the length of a given
divergence: the first-order gain of the objective at equal damped divergence, as a part of that of d*, ``gᵀd``
over ``√(dᵀ(F + damping·I)d · gᵀd*)``, which is also the cosine in the metric ``F + damping·I``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from harness.environment import describe
from harness.files import write_json, write_text
from torch import Tensor, nn

from grng import RankOneNPG

STATES, WIDTH, ACTIONS, NOISE = 256, 16, 2, 1.0
DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0)
RANKS = (1, 8, 32, 128, STATES)
ITERATIONS = 10
# What the last layer of a new policy is multiplied by: one that is still open, and one that has decided much.
SHARPNESS = {"new": 1.0, "decided": 8.0}
DEFAULT_OUT = Path(__file__).parent / "results" / "policy-direction"


class Situation:
    """A policy, a batch drawn from it, its gradient and its exact Fisher matrix."""

    def __init__(self, seed: int, sharpness: float) -> None:
        torch.manual_seed(seed)
        self.policy = nn.Sequential(
            nn.Linear(4, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, ACTIONS)
        ).double()  # fmt: skip
        with torch.no_grad():
            self.policy[4].weight.mul_(sharpness)
        self.parameters = list(self.policy.parameters())
        self.states = torch.randn(STATES, 4, dtype=torch.float64)
        table = self.policy(self.states).log_softmax(-1)
        rows = torch.autograd.grad(
            table.reshape(-1),
            self.parameters,
            torch.eye(STATES * ACTIONS, dtype=torch.float64),
            is_grads_batched=True,
            retain_graph=True,
        )
        scores = torch.cat([row.reshape(STATES * ACTIONS, -1) for row in rows], 1)
        chances = table.detach().exp()
        self.entropy = float(-(chances * table.detach()).sum(-1).mean())
        weighted = scores * chances.reshape(-1, 1) / STATES
        self.fisher = weighted.mT @ scores
        self.actions = chances.multinomial(1)
        # Towards where the pole leans and falls.
        push = self.states[:, 2:].sum(-1, keepdim=True)
        worths = torch.cat([-push, push], 1)
        advantages = worths - (chances * worths).sum(-1, keepdim=True)
        noise = NOISE * torch.randn(STATES, 1, dtype=torch.float64)
        self.advantages = advantages.gather(1, self.actions) + noise
        loss = -(self._log_probs() * self.advantages).mean()
        self.gradient = _flat(torch.autograd.grad(loss, self.parameters))

    def _log_probs(self) -> Tensor:
        return self.policy(self.states).log_softmax(-1).gather(1, self.actions)

    def exact(self, damping: float) -> Tensor:
        """Return ``(F + damping·I)⁻¹ g``."""
        root = torch.linalg.cholesky(self._damped(damping))
        return torch.cholesky_solve(self.gradient[:, None], root)[:, 0]

    def taken(self, damping: float, scores: int, seed: int) -> Tensor:
        """Return the direction of a step that RankOneNPG makes."""
        before = [p.detach().clone() for p in self.parameters]
        optimizer = RankOneNPG(
            self.parameters, damping=damping, scores=scores, step_length="fixed", seed=seed
        )
        log_probs = self._log_probs()
        optimizer.observe(log_probs)
        (-(log_probs * self.advantages).mean()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        direction = _flat(before) - _flat(self.parameters)
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, before)
        return direction

    def by_conjugate_gradients(self, damping: float) -> Tensor:
        """Return what ten iterations make of the exact system."""
        matrix = self._damped(damping)
        found = torch.zeros_like(self.gradient)
        rest, along = self.gradient.clone(), self.gradient.clone()
        for _ in range(ITERATIONS):
            image = matrix @ along
            length = rest.dot(rest) / along.dot(image)
            found += length * along
            new = rest - length * image
            along = new + along * (new.dot(new) / rest.dot(rest))
            rest = new
        return found

    def judged(self, direction: Tensor, damping: float) -> tuple[float, float]:
        """Return cosine and gain of a direction."""
        best = self.exact(damping)
        cosine = direction.dot(best) / (direction.norm() * best.norm())
        curved = direction @ self._damped(damping) @ direction
        gain = self.gradient.dot(direction) / (curved * self.gradient.dot(best)).sqrt()
        return float(cosine), float(gain)

    def _damped(self, damping: float) -> Tensor:
        return self.fisher + damping * torch.eye(len(self.fisher), dtype=torch.float64)


def _flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def _directions(situation: Situation, damping: float, seed: int) -> Iterator[tuple[str, Tensor]]:
    yield "gradient", situation.gradient
    for rank in RANKS:
        name = f"m = {'all' if rank == STATES else rank}"
        yield name, situation.taken(damping, rank, seed)
    yield f"{ITERATIONS} conjugate gradients", situation.by_conjugate_gradients(damping)


def measure(seeds: int) -> list[dict[str, Any]]:
    """Return one row for each policy, damping and direction."""
    samples: dict[tuple[str, float, str], list[tuple[float, float]]] = {}
    entropies: dict[str, list[float]] = {}
    for kind, sharpness in SHARPNESS.items():
        for seed in range(seeds):
            situation = Situation(seed, sharpness)
            entropies.setdefault(kind, []).append(situation.entropy)
            for damping in DAMPINGS:
                for name, direction in _directions(situation, damping, seed):
                    found = situation.judged(direction, damping)
                    samples.setdefault((kind, damping, name), []).append(found)
    rows = []
    for (kind, damping, name), pairs in samples.items():
        row: dict[str, Any] = {"policy": kind, "damping": damping, "direction": name}
        row["entropy"] = statistics.mean(entropies[kind])
        for key, values in zip(("cosine", "gain"), zip(*pairs, strict=True), strict=True):
            row[key] = {
                "mean": statistics.mean(values),
                "deviation": statistics.stdev(values) if len(values) > 1 else 0.0,
                "least": min(values),
            }
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]], seeds: int) -> str:
    """Return the rows as Markdown, a table for each policy and measure."""
    parts = []
    for kind in SHARPNESS:
        mine = [r for r in rows if r["policy"] == kind]
        for key in ("cosine", "gain"):
            parts.append(
                f"**{kind} policy** (mean entropy {mine[0]['entropy']:.2f} of 0.69), {key} to the exact "
                f"damped natural gradient: mean ± standard deviation of {seeds} seeds\n"
            )
            parts.append(f"| direction | {' | '.join(f'damping {d:g}' for d in DAMPINGS)} |")
            parts.append("|---" * (1 + len(DAMPINGS)) + "|")
            for name in dict.fromkeys(r["direction"] for r in mine):
                cells = {r["damping"]: r[key] for r in mine if r["direction"] == name}
                text = " | ".join(
                    f"{cells[d]['mean']:.3f} ± {cells[d]['deviation']:.3f}" for d in DAMPINGS
                )
                parts.append(f"| {name} | {text} |")
            parts.append("")
    return "\n".join(parts)


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    options = parser.parse_args()
    rows = measure(options.seeds)
    text = table(rows, options.seeds)
    print(text)
    settings = {
        "seeds": options.seeds,
        "states": STATES,
        "weights": sum(p.numel() for p in Situation(0, 1.0).parameters),
        "actions": ACTIONS,
        "noise": NOISE,
        "sharpness": SHARPNESS,
    }
    content = {"environment": describe(torch.device("cpu")), "settings": settings, "rows": rows}
    write_json(options.out / "policy-direction.json", content)
    write_text(options.out / "table.md", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
