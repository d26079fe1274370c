# SPDX-License-Identifier: Apache-2.0
"""Libraries that only some tasks need."""

from __future__ import annotations

import importlib.util

from grng.tasks.data import DataError


def require(what: str, modules: tuple[str, ...], extra: str) -> None:
    """Checks that libraries are installed, without importing them.

    Args:
        what: Who needs them, for example ``"the text tasks"``.
        modules: Their names for ``import``.
        extra: The extra of this package that installs them.

    Raises:
        DataError: One is missing; the message says how to install it.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise DataError(f'{what} need {", ".join(missing)}: pip install "grng-kernels[{extra}]"')
