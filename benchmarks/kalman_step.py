# SPDX-License-Identifier: Apache-2.0
"""What one R-Kalman step on a LoRA model costs, part by part, beside an ordinary backward pass (CPU).

``python benchmarks/kalman_step.py [--models minilm,bert-large] [--rounds N] [--out FOLDER]`` prints a table
and writes it as JSON. One sentence, two classes, random weights of the model's sizes: times do not depend on
them. Parts take turns, each figure is the median. Memory is the peak of the resident memory over a step,
less that before it, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness.environment import describe
from kalman_memory import peak_of
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import grng
from grng.tasks.encoder import SentenceClassifier

CLASSES, TOKENS = 2, 32


@dataclass(frozen=True)
class Size:
    """An encoder with LoRA on query and value."""

    layers: int
    width: int
    heads: int
    rank: int
    vocabulary: int = 30522


SIZES = {"minilm": Size(6, 384, 12, 8), "bert-large": Size(24, 1024, 16, 8)}


def build(size: Size) -> nn.Module:
    """Return a model of this size with random weights; LoRA matrices and head are trainable."""
    import peft
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config: Any = BertConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.width,
        attn_implementation="eager",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    encoder: nn.Module = BertModel(config, add_pooling_layer=False).requires_grad_(False)
    lora = peft.LoraConfig(
        r=size.rank, lora_alpha=2 * size.rank, target_modules=["query", "value"], bias="none"
    )
    encoder = peft.inject_adapter_in_model(lora, encoder)
    for name, p in encoder.named_parameters():
        if (
            "lora_B" in name
        ):  # at their start, zero, A has no gradient and its part of a step is missing
            nn.init.normal_(p, std=0.02)
    return SentenceClassifier(encoder, size.width, CLASSES)


class Parts:
    """The parts of a step of one model."""

    def __init__(self, size: Size) -> None:
        self.model = build(size)
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = grng.RKalman(self.model)
        self.adamw = torch.optim.AdamW(self.trainable)
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(1, size.vocabulary, (1, TOKENS), generator=generator)
        self.target = torch.zeros(1, dtype=torch.int64)

    def outputs(self) -> Tensor:
        """Return the logits of one sentence, with their graph."""
        logits: Tensor = self.model(self.tokens)
        return logits

    def once(self) -> dict[str, float]:
        """Return seconds of every part of one AdamW step and one R-Kalman step."""
        seconds: dict[str, float] = {}

        def timed(name: str, call: Callable[[], Any]) -> Any:
            start = time.perf_counter()
            result = call()
            seconds[name] = time.perf_counter() - start
            return result

        loss = cross_entropy(timed("forward", self.outputs), self.target)
        timed("backward", loss.backward)
        timed("adamw step", self.adamw.step)
        self.adamw.zero_grad()
        outputs = self.outputs()
        timed("observe", lambda: self.optimizer.observe(outputs, self.target))
        timed("rkalman step", self.optimizer.step)
        return seconds


def memory(name: str, what: str) -> int:
    """Return the bytes that the step's peak lies above the memory before it."""
    parts = Parts(SIZES[name])

    def step() -> None:
        outputs = parts.outputs()
        if what == "adamw":
            cross_entropy(outputs, parts.target).backward()
            parts.adamw.step()
            parts.adamw.zero_grad()
        else:
            parts.optimizer.observe(outputs, parts.target)
            parts.optimizer.step()

    step()  # what is loaded or allocated once is there; the states too
    step()
    return peak_of(step)


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Return one row of the table: medians in ms, ratios, MB."""
    parts = Parts(SIZES[name])
    samples = [parts.once() for _ in range(rounds + 2)][2:]
    ms = {part: statistics.median(s[part] for s in samples) * 1e3 for part in samples[0]}
    row: dict[str, Any] = {
        "model": name,
        "parameters": sum(p.numel() for p in parts.model.parameters()),
        "trained_parameters": sum(p.numel() for p in parts.trainable),
        "classes": CLASSES,
        "tokens": TOKENS,
        "rounds": rounds,
        "ms": {part: round(value, 3) for part, value in ms.items()},
        "observe_per_backward": round(ms["observe"] / ms["backward"], 3),
        "step_per_adamw_step": round(
            sum(ms[p] for p in ("forward", "observe", "rkalman step"))
            / sum(ms[p] for p in ("forward", "backward", "adamw step")),
            3,
        ),
        "state_mb": round(
            sum(
                v.numel() * v.element_size()
                for state in parts.optimizer.state.values()
                for v in state.values()
                if isinstance(v, Tensor)
            )
            / 1e6,
            2,
        ),
    }
    for what in ("adamw", "rkalman"):
        command = [sys.executable, __file__, "--memory", name, what]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        row[f"{what}_peak_mb"] = round(int(done.stdout.split()[-1]) / 1e6, 1)
    return row


def main() -> int:
    """Measure the models that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(SIZES), help=f"of {', '.join(SIZES)}")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="folder for kalman_step.json")
    parser.add_argument("--memory", nargs=2, metavar=("MODEL", "WHAT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        print(memory(*options.memory))
        return 0
    environment = describe(torch.device("cpu"))
    rows = []
    for name in options.models.split(","):
        row = measure(name, options.rounds)
        rows.append(row)
        print(
            f"{name}: {row['trained_parameters']:,} of {row['parameters']:,} weights trained; ms "
            + ", ".join(f"{part} {value:.2f}" for part, value in row["ms"].items())
            + f"; observe {row['observe_per_backward']:.2f} of a backward, whole step "
            f"{row['step_per_adamw_step']:.2f} of AdamW's; peak MB {row['rkalman_peak_mb']} "
            f"(AdamW {row['adamw_peak_mb']}), state {row['state_mb']} MB",
            flush=True,
        )
    if options.out:
        text = json.dumps({"environment": environment, "rows": rows}, indent=2) + "\n"
        (options.out / "kalman_step.json").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
