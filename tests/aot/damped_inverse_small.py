# SPDX-License-Identifier: Apache-2.0
"""What the kernel of ``damped_inverse`` for small matrices takes, compiled ahead of time. Needs no GPU."""

from tests.aot import resources

CLASSES = ("small", "large")
METHODS = ("direct", "newton_schulz")
# A Newton-Schulz step of order 128 does not fit.
VARIANTS = tuple((c, m) for c in CLASSES for m in METHODS if (c, m) != CLASSES[1:] + METHODS[1:])


def compile_small_inverse(kind, method, arch):
    """Compile one variant as ``launch`` does."""
    from grng_kernels.damped_inverse import triton_small

    large, direct = kind == "large", method == "direct"
    constants = {"LARGE": large, "DIRECT": direct, "PRECISION": triton_small.PRECISION}
    types = {
        "table_ptr": "*i64", "schedule_ptr": "*fp32", "first": "i32", "steps": "i32",
        "root_rho": "fp32", **dict.fromkeys(constants, "constexpr"),
    }  # fmt: skip
    function = triton_small._small_inverse_kernel
    return resources.compile_triton(
        function,
        {name: types[name] for name in function.arg_names},
        constants,
        ["table_ptr", "schedule_ptr"],
        arch,
        num_warps=triton_small.WARPS[large, direct],
        num_stages=1,
    )


def small_inverse_reports():
    """Yield the report of every variant."""
    for kind, method in VARIANTS:
        for arch in resources.TRITON_ARCHS:
            compiled = compile_small_inverse(kind, method, arch)
            name = f"damped_inverse-{kind}-{method}"
            yield resources.report_triton(compiled, name, arch)
