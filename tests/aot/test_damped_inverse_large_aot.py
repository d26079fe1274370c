# SPDX-License-Identifier: Apache-2.0
"""Damped inverses of orders above 64: every kernel compiles for every architecture, without spills."""

import importlib.util
import os

import pytest

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed"
    ),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
    ),
]

if importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") != "1":
    from tests.aot import damped_inverse_large as large
    from tests.aot import resources

    ARCHS = resources.TRITON_ARCHS
    VARIANTS = [
        pytest.param(variant, arch, id=f"{variant.name}-sm_{arch}")
        for arch in ARCHS
        for variant in (
            *large.frame_variants(), *large.direct_variants(), *large.product_variants(arch)
        )
    ]  # fmt: skip
else:
    VARIANTS = []


@pytest.mark.parametrize(("variant", "arch"), VARIANTS)
def test_it_fits(variant, arch):
    compiled = large.compile_variant(variant, arch)
    report = resources.report_triton(compiled, variant.name, arch)
    print(report)
    assert (report.stack, report.spills) == (0, 0), report
    assert report.shared <= resources.SHARED_LIMIT[arch], report
    assert 0 < report.registers <= 255, report
    assert (report.tensor > 0) == variant.uses_tensor_cores, report
    if arch == 90:
        assert report.hopper == report.tensor, report
    if variant.uses_tensor_cores and arch != 100:
        assert report.copies > 0, f"tiles are not read 16 bytes at a time: {report}"
