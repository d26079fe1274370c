# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels of ``kalman_update_`` take, compiled ahead of time. Needs no GPU."""

from typing import NamedTuple

from tests.aot import resources

DTYPES = ("fp32", "bf16", "fp16")
TILES = (1, 2, 4, 8)


class Variant(NamedTuple):
    """One kernel; ``rows`` are the padded outputs, ``flag`` what it is compiled for beside the dtype."""

    kernel: str
    dtype: str
    rows: int
    flag: bool = False

    @property
    def name(self):
        return f"kalman{self.kernel.removesuffix('_kernel')}-{self.dtype}-{self.rows}-{self.flag:d}"

    @property
    def is_wide(self):
        return self.rows > 16

    @property
    def uses_tensor_cores(self):
        return self.kernel in ("_gram_wide_kernel", "_apply_wide_kernel")


def variants():
    """Yield every variant: three tiles of a narrow gram, a variational and a triangular form by the flag."""
    from grng_kernels.kalman_update.triton_wide import CONFIGS, HALF

    for rows in CONFIGS:
        for dtype in DTYPES:
            yield Variant("_gram_wide_kernel", dtype, rows)
            # Of one half all is read in any case.
            for triangular in (False, True) if rows > HALF else (True,):
                yield Variant("_apply_wide_kernel", dtype, rows, triangular)
        yield Variant("_split_kernel", "fp32", rows)
        yield Variant("_sum_kernel", "fp32", rows, True)
    for tile in TILES:
        for dtype in DTYPES:
            yield Variant("_gram_narrow_kernel", dtype, tile)
        yield Variant("_sum_kernel", "fp32", tile)
    for dtype in DTYPES:
        yield Variant("_gram_narrow_kernel", dtype, 8, True)
        for rows in (*TILES, 16):
            for variational in (False, True):
                yield Variant("_apply_narrow_kernel", dtype, rows, variational)


def _constants(variant):
    import torch
    import triton.language as tl

    from grng_kernels.kalman_update import triton_kernel, triton_narrow, triton_shares, triton_wide

    kernel, rows, flag = variant.kernel, variant.rows, variant.flag
    dtype = resources.torch_dtype(variant.dtype)
    constants = {
        "DTYPE": triton_shares.DTYPES[dtype],
        "ROWS": rows,
        "TILE": min(rows, triton_wide.HALF),
        "PAIRS": 3 if rows == 128 or (flag and rows == 8) else 1,
        "GRAMS": 1 + (kernel == "_sum_kernel" and flag),
        "VARIATIONAL": flag,
        "ONE_PIECE": dtype == torch.bfloat16,
        "PIECE": tl.bfloat16,
    }
    if kernel == "_sum_kernel":
        constants |= {"BLOCK": triton_kernel.SUM_BLOCK, "AT_ONCE": triton_kernel.SUM_SHARES}
        return constants, triton_kernel._sum_kernel, triton_kernel.SUM_WARPS, 3
    if not variant.is_wide:
        gram = kernel == "_gram_narrow_kernel"
        warps = triton_narrow.GRAM_WARPS if gram else triton_narrow.APPLY_WARPS
        lanes = triton_narrow.gram_lanes(rows) if gram else triton_narrow.APPLY_LANES
        return constants | {"LANES": lanes}, getattr(triton_narrow, kernel), warps, 3
    config = triton_wide.config_of(rows, dtype)
    function = getattr(triton_wide, kernel)
    if kernel == "_split_kernel":
        return constants | {"BLOCK": triton_wide.SPLIT_BLOCK}, function, 4, 3
    if kernel == "_gram_wide_kernel":
        return (
            constants | {"BLOCK_K": config.gram_k}, function, config.gram_warps, config.gram_stages
        )  # fmt: skip
    constants |= {
        "TRIANGULAR": flag, "HALF": min(rows, triton_wide.HALF), "BLOCK_D": config.apply_d,
        "BLOCK_K": config.apply_k,
    }  # fmt: skip
    return constants, function, config.apply_warps, config.apply_stages


def compile_variant(variant, arch):
    """Compile one variant as ``Passes`` launches it."""
    constants, function, warps, stages = _constants(variant)
    types = {
        "table_ptr": "*i64", "partial_ptr": "*fp32", "extremes_ptr": "*i32", "sums_ptr": "*fp64",
        "whitener_ptr": "*fp32", "direction_ptr": "*fp32", "info_ptr": "*i32", "pieces_ptr": "*bf16",
        "forgetting": "fp32", "process_noise": "fp32",
    }  # fmt: skip
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in function.arg_names
    }
    return resources.compile_triton(
        function,
        signature,
        {name: value for name, value in constants.items() if name in signature},
        [name for name in signature if name.endswith("_ptr")],
        arch,
        num_warps=warps,
        num_stages=stages,
    )


def reports():
    """Yield the report of every variant for every architecture."""
    for variant in variants():
        for arch in resources.TRITON_ARCHS:
            yield resources.report_triton(compile_variant(variant, arch), variant.name, arch)
