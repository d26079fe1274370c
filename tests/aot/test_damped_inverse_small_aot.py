# SPDX-License-Identifier: Apache-2.0
"""The kernel of ``damped_inverse`` for small matrices compiles everywhere: no spills, tensor cores used."""

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
    from tests.aot import damped_inverse_small, resources

    VARIANTS, ARCHS = damped_inverse_small.VARIANTS, resources.TRITON_ARCHS
else:
    VARIANTS, ARCHS = [], []


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("kind", "method"), VARIANTS)
def test_fits_and_uses_tensor_cores(kind, method, arch):
    compiled = damped_inverse_small.compile_small_inverse(kind, method, arch)
    report = resources.report_triton(compiled, f"{kind}-{method}", arch)
    assert report.stack == 0, report
    assert report.spills == 0, report
    assert report.shared <= resources.SHARED_LIMIT[arch], report
    assert 0 < report.registers <= 255, report
    assert report.tensor > 0, report
    # Several programs share a multiprocessor: most matrices of a call are small.
    if kind == "small":
        assert 2 * report.shared <= resources.SHARED_LIMIT[arch], report
    # Addresses into the caller's memory are 64 bits wide.
    ttir = compiled.asm["ttir"]
    kinds = re.findall(r"tt\.addptr .*?: tensor<[\dx]*!tt\.ptr<\w+>>, tensor<[\dx]*x?(i\d+)>", ttir)
    assert "i64" in kinds
    assert re.search(r"arith\.muli .*: tensor<[\dx]*i64>", ttir)


@pytest.mark.parametrize("arch", ARCHS)
def test_eliminating_two_columns_waits_for_no_other_warp(arch):
    """The innermost loop, entered 8 times per block: each warp holds what it needs of the pivots."""
    code = resources.sass_of(damped_inverse_small.compile_small_inverse("large", "direct", arch))
    lines, labels, loops = [], {}, []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label.group(1)] = len(lines)
        elif re.search(r"/\*[0-9a-f]{4,}\*/", line):
            target = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)
            if target and target.group(1) in labels:
                loops.append(lines[labels[target.group(1)] :])
            lines.append(line)
    innermost = [b for b in loops if sum("MUFU.RCP" in x for x in b) == 2 and len(b) < 1000]
    pairs = [body for body in innermost if sum("SHFL" in x for x in body) > 20]
    assert pairs, "the loop over pairs of columns was not found"
    assert not any("BAR.SYNC" in line for line in min(pairs, key=len))
