# SPDX-License-Identifier: Apache-2.0
"""Every variant of the kernels for damped inverses of orders above 64, compiled as ``launch`` does."""

import itertools
from typing import NamedTuple

from grng_kernels.damped_inverse import triton_direct as direct
from grng_kernels.damped_inverse import triton_epilogue as epilogue
from grng_kernels.damped_inverse import triton_newton_schulz as newton_schulz
from grng_kernels.damped_inverse import triton_prologue as prologue
from grng_kernels.damped_inverse.precision import Step
from tests.aot.resources import compile_triton

FRAME_CONSTANTS = {
    "ROWS": prologue.ROWS, "LINE": prologue.LINE, "CHUNK": prologue.CHUNK,
}  # fmt: skip
TYPES = {
    "table_ptr": "*i64", "ends_ptr": "*i64", "largest_ptr": "*i32", "high_ptr": "*bf16", "low_ptr": "*bf16",
    "left_low_ptr": "*bf16", "right_low_ptr": "*bf16", "root": "fp32",
    **dict.fromkeys(("start", "first_a", "first_b", "a", "b"), "fp32"),
}  # fmt: skip


class Variant(NamedTuple):
    """One kernel with its constants: what it is compiled for."""

    name: str
    function: object
    constants: dict
    types: dict
    num_warps: int
    num_stages: int
    uses_tensor_cores: bool


def frame_variants():
    """Yield the kernels before and after both methods."""
    for module, names in (
        (prologue, ("_scan_kernel", "_form_kernel", "_start_kernel", "_step_kernel", "_shift_kernel")),
        (epilogue, ("_write_kernel", "_probe_kernel", "_verdict_kernel")),
    ):  # fmt: skip
        for name in names:
            few = name in ("_scan_kernel", "_form_kernel", "_write_kernel")
            columns = prologue.GATHER_COLUMNS if few else prologue.COLUMNS
            for rayleigh in (False, True) if name == "_step_kernel" else (False,):
                constants = {
                    **FRAME_CONSTANTS,
                    "COLUMNS": columns,
                    "LOW": True,
                    "RAYLEIGH": rayleigh,
                }
                types = {"matrix_ptr": "*fp32" if rayleigh or module is epilogue else "*bf16"}
                label = name + "-fp32" * rayleigh
                function = getattr(module, name)
                yield Variant(label, function, constants, types, prologue.WARPS, 3, False)


def direct_variants():
    """Yield the kernels of the sweep of panels."""
    constants = {
        "PRECISION": direct.PRECISION, "BLOCK": direct.TILE, "BLOCK_K": direct.BLOCK_K,
        "CHUNK": prologue.CHUNK,
    }  # fmt: skip
    panel, update = direct._panel_kernel, direct._update_kernel
    for name, function, first, warps in (
        ("panel", panel, False, direct.PANEL_WARPS),
        ("update", update, False, direct.UPDATE_WARPS),
        ("first", update, True, direct.UPDATE_WARPS),
    ):
        given = {**constants, "FIRST": first}
        yield Variant(f"direct-{name}", function, given, {}, warps, direct.STAGES, not first)


def product_variants(arch):
    """Yield every precision, tile and purpose of a product on one architecture.

    What is written in more forms takes more registers: each tile is compiled with all that it is used for.
    """
    step = Step(2.0, -1.0, "bf16", "bf16")
    seen = set()
    for precision, mode, low in itertools.product(newton_schulz.CONFIGS, range(5), (True, False)):
        if mode == newton_schulz.LAST_RESIDUAL and precision != "tf32x3":
            continue
        operand = "*bf16" if precision.startswith("bf16") else "*fp32"
        changes = mode in (newton_schulz.APPLY, newton_schulz.FIRST_APPLY)
        product = newton_schulz.Product(mode, step, precision, changes, True, low)
        for config in newton_schulz.configs_of(product, arch < 90):
            name = f"{precision}-{config.block}-{('XB', 'XE', 'BB', 'BE', 'XB-last')[mode]}"
            if name in seen:
                continue
            seen.add(name)
            yield Variant(
                name, newton_schulz._product_kernel, newton_schulz.product_constants(product, config),
                {"left_ptr": operand, "right_ptr": operand}, config.num_warps, config.num_stages, True,
            )  # fmt: skip


def compile_variant(variant, arch):
    """Compile one variant for 80, 90 or 100."""
    function = variant.function
    constants = {k: v for k, v in variant.constants.items() if k in function.arg_names}
    types = {**TYPES, **variant.types, **dict.fromkeys(constants, "constexpr")}
    signature = {
        name: types.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        for name in function.arg_names
    }
    # Tables and workspaces come from torch's allocator; what the caller owns is read from the table.
    aligned = [name for name in signature if name.endswith("_ptr")]
    return compile_triton(
        function, signature, constants, aligned, arch,
        num_warps=variant.num_warps, num_stages=variant.num_stages,
    )  # fmt: skip
