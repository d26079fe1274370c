# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's Trainer: ``optimizer_cls_and_kwargs`` takes the class, and the model as its argument.

``compute_loss`` is the place for ``observe``. Without it the gradients of the loss serve as statistics
(the empirical Fisher information), and nothing else changes.

``python examples/hf_trainer.py`` (needs ``transformers`` and ``accelerate``)
"""

import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from grng import RING


class ObservingTrainer(Trainer):
    """Shows the optimizer the logits of each training batch."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        """Compute the loss as ever."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training:
            # Accelerate wraps the optimizer.
            getattr(self.optimizer, "optimizer", self.optimizer).observe(outputs.logits)
        return (loss, outputs) if return_outputs else loss


def main() -> list[float]:
    """Return the losses that the trainer logged."""
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
    model = BertForSequenceClassification(config)
    tokens = torch.randint(1, 100, (64, 12))
    data = [{"input_ids": row, "labels": int(row[0] % 3)} for row in tokens]
    with tempfile.TemporaryDirectory() as folder:
        trainer = ObservingTrainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=32,
                num_train_epochs=20,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=data,
            optimizer_cls_and_kwargs=(RING, {"model": model, "lr": 5e-3}),
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    losses = [float(loss) for loss in losses]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
