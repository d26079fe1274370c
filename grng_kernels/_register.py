# SPDX-License-Identifier: Apache-2.0
"""Registration of operators with PyTorch: what ``torch.library.custom_op`` does, at a fraction of its cost.

A call through ``custom_op`` costs about 100 µs of Python more than the work of a small factor. Its extra
layers serve gradients, which the operators here do not define, and count mutations, which is done below.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

_LIBRARY = torch.library.Library("grng", "FRAGMENT")


@functools.cache
def _disabled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compiler.disable(function)  # type: ignore[no-any-return]


def _untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled code calls operators with the compiler's frame hook in place: it must not look in here."""
    # Where the compiler was never imported there is no hook, and importing it takes a second.
    return _disabled(function) if "torch._dynamo" in sys.modules else function


class Operator:
    """``torch.ops.grng.<name>``; calling it calls the operator."""

    def __init__(
        self, function: Callable[..., Any], name: str, mutates_args: Sequence[str]
    ) -> None:
        self.qualified_name = f"grng::{name}"
        self.__doc__ = function.__doc__
        schema = torch.library.infer_schema(function, mutates_args=mutates_args)
        tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
        _LIBRARY.define(name + schema, tags=tags)
        positions = [list(inspect.signature(function).parameters).index(m) for m in mutates_args]

        def implementation(*args: Any) -> Any:
            result = _untraced(function)(*args)
            for position in positions:
                torch.autograd.graph.increment_version(args[position])
            return result

        # One implementation for every device: it chooses the backend itself.
        _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
        self._call = getattr(torch.ops.grng, name).default

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Register what the compiler runs instead: shapes and dtypes of the results."""
        torch.library.register_fake(self.qualified_name, function, lib=_LIBRARY)
        return function


def operator(
    name: str, *, mutates_args: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], Operator]:
    """Register a function as ``torch.ops.grng.<name>``; its annotations give the schema.

    Args:
        name: Name of the operator.
        mutates_args: Parameters that are written: tensors or lists of tensors.

    Returns:
        A decorator that turns the function into an :class:`Operator`.
    """

    def register(function: Callable[..., Any]) -> Operator:
        return Operator(function, name, mutates_args)

    return register
