# SPDX-License-Identifier: Apache-2.0
"""hypothesis where it is installed; elsewhere its tests are skipped with that reason, and the rest run.

A GPU machine without a network may have pytest and no hypothesis.
"""

import importlib.util
from typing import Any

import pytest

if importlib.util.find_spec("hypothesis") is not None:
    import hypothesis.strategies as st
    from hypothesis import HealthCheck, given, settings
else:

    class _Anything:
        """Accepts what a decorator's arguments are made of."""

        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self

    st = HealthCheck = _Anything()

    def given(*strategies: Any, **named: Any) -> Any:
        def skipped(test: Any) -> Any:
            # Not the test itself: its parameters would be taken for fixtures.
            def stand_in() -> None:
                raise AssertionError("skipped")

            stand_in.__name__, stand_in.__doc__ = test.__name__, test.__doc__
            return pytest.mark.skip(reason="hypothesis is not installed")(stand_in)

        return skipped

    class settings:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            pass

        def __call__(self, test: Any) -> Any:
            return test

        @staticmethod
        def register_profile(*args: Any, **kwargs: Any) -> None:
            pass

        @staticmethod
        def load_profile(*args: Any, **kwargs: Any) -> None:
            pass


__all__ = ["HealthCheck", "given", "settings", "st"]
