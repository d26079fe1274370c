# SPDX-License-Identifier: Apache-2.0
"""Splits the time of a step into parts, by wrapping the functions that do them."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

PARTS = ("forward", "backward", "statistics", "refresh", "precondition", "update")


class Seam(NamedTuple):
    """A function that does one part of a step: attribute ``name`` of a module, a class or an object."""

    part: str
    owner: Any
    name: str


class Clock:
    """Seconds of each part since the last :meth:`take`; a part inside another is not counted there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._since = 0.0

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _switch(self) -> None:
        now = self._now()
        if self._running:
            part = self._running[-1]
            self._seconds[part] = self._seconds.get(part, 0.0) + now - self._since
        self._since = now

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what happens inside as this part."""
        self._switch()
        self._running.append(name)
        try:
            yield
        finally:
            self._switch()
            self._running.pop()

    def take(self) -> dict[str, float]:
        """Return the seconds of all parts, and start from zero."""
        taken, self._seconds = {p: self._seconds.get(p, 0.0) for p in PARTS}, {}
        return taken

    @contextlib.contextmanager
    def watching(self, seams: Sequence[Seam]) -> Iterator[None]:
        """Count the calls of some functions as their parts."""
        with contextlib.ExitStack() as stack:
            for seam in seams:
                stack.enter_context(self._wrapped(seam))
            yield

    @contextlib.contextmanager
    def _wrapped(self, seam: Seam) -> Iterator[None]:
        plain: Callable[..., Any] = getattr(seam.owner, seam.name)
        own = seam.name in vars(seam.owner)

        @functools.wraps(plain)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(seam.part):
                return plain(*args, **kwargs)

        setattr(seam.owner, seam.name, timed)
        try:
            yield
        finally:
            if own:
                setattr(seam.owner, seam.name, plain)
            else:
                delattr(seam.owner, seam.name)
