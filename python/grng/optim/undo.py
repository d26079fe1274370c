# SPDX-License-Identifier: Apache-2.0
"""A step that runs out of memory leaves the state as it was, so that it can be made again.

A state is a dict of tensors and numbers for each parameter. What a step replaces is put back from a copy of
these dicts, which costs nothing. What it writes in place it writes into clones, of :func:`write_copies`: of
the factors, on the steps that average statistics into them. Inverses are replaced, by the tensors that they
were computed into. Until such a step ends it needs so much memory more as the factors take.

Two things stay: AdamW's moments of layers, where a direction finds no memory after they were averaged; and
the step of the layers, where AdamW finds none for what it trains.
"""

import contextlib
from collections.abc import Iterator, MutableMapping
from typing import Any

from torch import Tensor

State = dict[str, Any]
# Of the parameter and not of its factors: a refresh does not write them.
_NOT_FACTORS = ("exp_avg", "exp_avg_sq", "momentum_buffer", "step")


@contextlib.contextmanager
def undone_on_error(
    states: MutableMapping[Any, State], *, but: type[BaseException]
) -> Iterator[None]:
    """Put the entries of all states back where an error comes, ``but`` one that is about the state itself."""
    before = {p: dict(state) for p, state in states.items()}
    try:
        yield
    except but:
        raise
    except BaseException:
        states.clear()
        states.update(before)
        raise


def write_copies(state: State, *, inverses: bool) -> None:
    """Let what comes write into clones of a layer's statistics, and of its ``inverses`` if asked for."""
    for key, value in state.items():
        is_replaced = key.endswith("_inverse") and not inverses
        if isinstance(value, Tensor) and key not in _NOT_FACTORS and not is_replaced:
            state[key] = value.clone()
