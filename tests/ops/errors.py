# SPDX-License-Identifier: Apache-2.0
"""Tensors that no op accepts, and the check of an error message, shared by the tests of all ops."""

import re
import warnings

import pytest
import torch

SPARSE = "sparse"
QUANTISED = "quantised"
REFUSED = (
    *(torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn),
    SPARSE,
    QUANTISED,
)


def refused(kind, *shape):
    """A tensor of a dtype or layout that no op accepts."""
    if kind == SPARSE:
        return torch.ones(shape).to_sparse()
    if kind == QUANTISED:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.quantize_per_tensor(torch.ones(shape), 0.1, 0, torch.quint8)
    return torch.ones(shape).to(kind)


def assert_raises(exception, text, call, *args, **kwargs):
    """Assert that a call raises ``exception`` with ``text`` in its message, verbatim."""
    with pytest.raises(exception, match=re.escape(text)) as caught:
        call(*args, **kwargs)
    assert type(caught.value) is exception
    assert "\n" not in str(caught.value), "one line says it all"
