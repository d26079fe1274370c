# SPDX-License-Identifier: Apache-2.0
"""LoRA with PEFT: pass the model with its adapters; what is frozen costs nothing.

A LoRA matrix has one short side, whose factor is dense, and one long side. The state stays small.

``python examples/peft_lora.py`` (needs ``transformers`` and ``peft``)
"""

import peft
import torch
from transformers import BertConfig, BertForSequenceClassification

from grng import RING


def main() -> list[float]:
    """Return the loss of each step."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = peft.get_peft_model(
        BertForSequenceClassification(config),
        peft.LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"]),
    )
    opt = RING(model)
    tokens = torch.randint(1, 100, (32, 12))
    labels = tokens[:, 0] * 3 // 100
    losses = []
    for _ in range(80):
        outputs = model(input_ids=tokens, labels=labels)
        opt.observe(outputs.logits)
        outputs.loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(float(outputs.loss.detach()))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(opt.explain())
    return losses


if __name__ == "__main__":
    main()
