# SPDX-License-Identifier: Apache-2.0
"""Pretrained encoders of the hub, read once in a process and copied for every run."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from grng.tasks import hub
from grng.tasks.data import DataError
from grng.tasks.files import sha256_of
from grng.tasks.lora import add_lora

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"


@dataclass(frozen=True)
class Pretrained:
    """A pretrained model: which it is, and which of its files are needed."""

    # Of its folder below ``models/``.
    name: str
    repository: hub.Repository
    architecture: Literal["RobertaModel", "ViTModel"]
    files: tuple[str, ...]


ROBERTA = Pretrained(
    "roberta-base",
    hub.Repository("FacebookAI/roberta-base", "e2da8e2f811d1448a5b465c236feacd80ffbac7b", "model"),
    "RobertaModel",
    (CONFIG, WEIGHTS, TOKENIZER),
)
VIT = Pretrained(
    "vit-base-patch16-224-in21k",
    hub.Repository(
        "google/vit-base-patch16-224-in21k", "b4569560a39a0f1af58e3ddaf17facf20ab919b0", "model"
    ),
    "ViTModel",
    (CONFIG, WEIGHTS),
)


def _silent(message: str) -> None:
    del message


def obtain(
    which: Pretrained, data_dir: Path | None, report: Callable[[str], None] = _silent
) -> Path:
    """The folder of a pretrained model, ``DATA_DIR/models/NAME``, or fetched into it.

    Args:
        which: The model.
        data_dir: What ``--data-dir`` says; None is the cache folder.
        report: Receives a line before it is fetched.

    Returns:
        The folder.
    """

    def look(folder: Path) -> dict[str, list[Path]]:
        missing = [name for name in which.files if not (folder / name).is_file()]
        if missing:
            raise DataError(f"{folder}: lacks {', '.join(missing)}")
        return {name: [folder / name] for name in which.files}

    name = f"models/{which.name}"
    files = list(which.files)
    found = hub.obtain(name, which.repository, files, " ".join(files), look, data_dir, report)
    return found.folder


def checksums(which: Pretrained, data_dir: Path | None) -> dict[str, str]:
    """SHA-256 of the model's files, by name."""
    folder = obtain(which, data_dir)
    return {f"{which.name}/{name}": sha256_of(folder / name) for name in which.files}


@functools.cache
def _read(which: Pretrained, folder: Path) -> tuple[nn.Module, Any]:
    import transformers

    # Fresh weights are drawn for every model that is built: reading these must not draw any.
    with torch.random.fork_rng(devices=[]), _without_reports():
        try:
            config: Any = transformers.AutoConfig.from_pretrained(
                folder,
                local_files_only=True,
                # Fused attention cannot be differentiated twice.
                attn_implementation="eager",
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
            encoder, loaded = getattr(transformers, which.architecture).from_pretrained(
                folder,
                config=config,
                local_files_only=True,
                add_pooling_layer=False,
                output_loading_info=True,
            )
        # safetensors and transformers have errors of their own, some of them plain Exceptions.
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(f"{folder}: not a {which.architecture}: {reason}") from None
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise DataError(
            f"{folder / WEIGHTS}: lacks {len(missing)} weights of a {which.architecture}, the first "
            f"is {missing[0]}"
        )
    return encoder.float().eval(), config


def with_lora(which: Pretrained, data_dir: Path | None, rank: int) -> tuple[nn.Module, Any]:
    """The encoder with fresh LoRA matrices, without dropout: a step depends on nothing but its batch.

    Args:
        which: The model.
        data_dir: What ``--data-dir`` says.
        rank: Rank of the matrices, drawn from torch's global generator.

    Returns:
        ``(encoder, its configuration)``, on the CPU.
    """
    hub.require_libraries()
    encoder, config = _read(which, obtain(which, data_dir))
    return add_lora(copy.deepcopy(encoder), rank).train(), config


@contextmanager
def _without_reports() -> Iterator[None]:
    """Without the bars and tables that transformers prints while it reads weights."""
    from transformers.utils import logging

    level, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bar:
            logging.enable_progress_bar()
