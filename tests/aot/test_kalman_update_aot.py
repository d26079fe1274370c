# SPDX-License-Identifier: Apache-2.0
"""The Kalman update in Triton: every kernel compiles for every architecture, without spills."""

import importlib.util
import os
import re

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
    from tests.aot import kalman_update as kalman
    from tests.aot import resources

    VARIANTS = [
        pytest.param(variant, arch, id=f"{variant.name}-sm_{arch}")
        for arch in resources.TRITON_ARCHS
        for variant in kalman.variants()
        # fp16 is fp32 after one conversion: one architecture is enough for it.
        if variant.dtype != "fp16" or arch == 90
    ]
else:
    VARIANTS = []


@pytest.mark.parametrize(("variant", "arch"), VARIANTS)
def test_it_fits(variant, arch):
    compiled = kalman.compile_variant(variant, arch)
    report = resources.report_triton(compiled, variant.name, arch)
    print(report)
    assert (report.stack, report.spills) == (0, 0), report
    assert report.shared <= resources.SHARED_LIMIT[arch], report
    assert 0 < report.registers <= 255, report
    assert (report.tensor > 0) == variant.uses_tensor_cores, report
    if variant.uses_tensor_cores and arch == 90 and variant.rows >= 64:
        assert report.hopper == report.tensor, report
    # A whitener of 32 is one step of the loop, which has nothing to read ahead.
    if variant.uses_tensor_cores and variant.rows > 32:
        assert report.copies > 0, f"tiles are not read 16 bytes at a time: {report}"


@pytest.mark.parametrize(
    "kernel",
    ["_gram_narrow_kernel", "_apply_narrow_kernel", "_gram_wide_kernel", "_apply_wide_kernel"],
)
def test_offsets_into_the_blocks_are_64_bit(kernel):
    """What a column or a row of the Jacobian is multiplied with is a stride of 64 bits."""
    rows = 64 if "wide" in kernel else 8
    ttir = kalman.compile_variant(kalman.Variant(kernel, "bf16", rows), 90).asm["ttir"]
    # Of the pointers only the caller's are to bf16, beside the pieces of the whitener.
    strides = re.findall(r"arith\.muli .*: tensor<[\dx]*(i\d+)>", ttir)
    assert "i64" in strides
    offsets = re.findall(
        r"tt\.addptr .*?: tensor<[\dx]*!tt\.ptr<bf16>>, tensor<[\dx]*x?(i\d+)>", ttir
    )
    assert "i64" in offsets
    if "apply_wide" not in kernel:
        assert set(offsets) == {"i64"}


def test_no_size_is_specialised():
    """A size that is 1 in one call and 2 in the next would be compiled twice."""
    for variant in kalman.variants():
        *_, function = kalman._constants(variant)[:2]
        sizes = {
            p.name
            for p in function.params
            if not p.is_constexpr and not p.name.endswith("_ptr") and not p.do_not_specialize
        }
        # Numbers in floating point are never constants.
        assert sizes <= {"forgetting", "process_noise"}
