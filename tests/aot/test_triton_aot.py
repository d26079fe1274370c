# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel and every config compiles for every architecture: no spills, tensor cores used."""

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
    import triton
    import triton.language as tl

    from tests.aot import resources

    def variants(**chosen):
        return [
            pytest.param(
                dtype, aligned, config, id=f"{dtype}-{tile}-{'aligned' * aligned or 'general'}"
            )
            for dtype, tile, aligned, config in resources.kron_factor_variants(**chosen)
        ]

    LINEAR, CONV2D = variants(), variants(conv2d=True)
    ARCHS = resources.TRITON_ARCHS

    PRECONDITION = [
        pytest.param(variant, arch, id=f"{resources.variant_name(variant)}-sm_{arch}")
        for variant in resources.precondition_variants()
        for arch in resources.TRITON_ARCHS
        # bf16 and fp16 differ in one conversion: one architecture is enough for both.
        if "float16" not in resources.variant_name(variant).split("-") or arch == 90
    ]

    @triton.jit
    def _old_offsets(x_ptr, rows, stride, BLOCK: tl.constexpr):
        offsets = tl.arange(0, BLOCK)
        tl.store(x_ptr + offsets * stride, rows, mask=offsets < rows)

else:
    LINEAR = CONV2D = ARCHS = PRECONDITION = []


def assert_fits(report, arch):
    assert report.stack == 0, report
    assert report.spills == 0, report
    assert report.shared <= resources.SHARED_LIMIT[arch], report
    assert 0 < report.registers <= 255, report


def assert_products_fit(dtype, aligned, config, arch, *, bias, conv2d=False):
    compiled = resources.compile_products(
        dtype, config, arch, aligned=aligned, bias=bias, conv2d=conv2d
    )
    report = resources.report_triton(compiled, dtype, arch)
    assert report.tensor > 0, report
    assert_fits(report, arch)
    return report


# With a bias first: it takes more registers than without.
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("dtype", "aligned", "config"), LINEAR)
def test_kron_factor_fits_and_uses_tensor_cores(dtype, aligned, config, arch):
    assert_products_fit(dtype, aligned, config, arch, bias=True)


@pytest.mark.parametrize(("dtype", "aligned", "config"), LINEAR)
def test_kron_factor_without_bias_is_pipelined_on_hopper(dtype, aligned, config):
    report = assert_products_fit(dtype, aligned, config, 90, bias=False)
    if config.block_n >= 64:
        assert report.hopper == report.tensor, report
    if aligned:
        assert report.copies > 0, report


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("dtype", "aligned", "config"), CONV2D)
def test_kron_factor_of_a_convolution_fits(dtype, aligned, config, arch):
    assert_products_fit(dtype, aligned, config, arch, bias=True, conv2d=True)


@pytest.mark.parametrize("conv2d", [False, True], ids=["linear", "conv2d"])
def test_kron_factor_in_fp16_fits(conv2d):
    for dtype, _, aligned, config in resources.kron_factor_variants(
        conv2d=conv2d, dtypes=("fp16",)
    ):
        assert_products_fit(dtype, aligned, config, 90, bias=False, conv2d=conv2d)


def test_two_programs_of_the_largest_tile_share_a_multiprocessor():
    """What the choice of 4 warps for it rests on: 64 Ki registers and 227 KiB of shared memory for two."""
    *_, config = max(resources.kron_factor_variants(dtypes=("bf16",)), key=lambda v: v[3].block_n)
    for bias in (False, True):
        report = assert_products_fit("bf16", True, config, 90, bias=bias)
        assert 2 * 32 * config.hopper_warps * report.registers <= 64 * 1024, report
        assert 2 * report.shared <= resources.SHARED_LIMIT[90], report


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("bias", "decay_tensor"), [(True, True), (False, False)])
def test_the_last_launch_fits(bias, decay_tensor, arch):
    compiled = resources.compile_commit(arch, bias=bias, decay_tensor=decay_tensor)
    assert_fits(resources.report_triton(compiled, "commit", arch), arch)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_the_check_of_a_convolution_fits(dtype, arch):
    compiled = resources.compile_conv2d_extremes(dtype, arch)
    assert_fits(resources.report_triton(compiled, "extremes", arch), arch)


def assert_offsets_are_64_bit(ttir):
    """Every tensor of offsets that is added to a pointer comes from 64-bit products."""
    offsets = re.findall(
        r"tt\.addptr .*?: tensor<[\dx]*!tt\.ptr<\w+>>, tensor<[\dx]*x?(i\d+)>", ttir
    )
    assert offsets, "no tensor of pointers found: has the text form changed?"
    assert set(offsets) == {"i64"}, f"offsets of type {sorted(set(offsets))}"
    assert re.search(r"arith\.muli .*: tensor<[\dx]*i64>", ttir), "no 64-bit product"
    # Products of tensors are offsets, all of them.
    assert not re.search(r"arith\.muli .*: tensor<[\dx]*i32>", ttir), "a 32-bit product of tensors"


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "general"])
@pytest.mark.parametrize("conv2d", [False, True], ids=["linear", "conv2d"])
def test_kron_factor_offsets_are_64_bit(conv2d, aligned):
    if conv2d and aligned:
        compiled = resources.compile_conv2d_extremes("bf16", 90)
    else:
        *_, config = next(resources.kron_factor_variants(conv2d=conv2d))
        compiled = resources.compile_products(
            "bf16", config, 90, aligned=aligned, bias=True, conv2d=conv2d
        )
    assert_offsets_are_64_bit(compiled.asm["ttir"])


def test_offsets_of_the_last_launch_are_64_bit():
    compiled = resources.compile_commit(90, bias=True)
    assert_offsets_are_64_bit(compiled.asm["ttir"])


@pytest.mark.parametrize(("variant", "arch"), PRECONDITION)
def test_precondition_fits_and_uses_tensor_cores(variant, arch):
    compiled = resources.compile_precondition(variant, arch)
    report = resources.report_triton(compiled, resources.variant_name(variant), arch)
    assert report.tensor > 0, report
    assert_fits(report, arch)


@pytest.mark.parametrize("dots", [False, True], ids=["", "dots"])
@pytest.mark.parametrize(
    ("variant", "arch"), [p for p in PRECONDITION if not p.values[0].aligned and p.values[0].bias]
)
def test_precondition_finish_fits(variant, arch, dots):
    compiled = resources.compile_precondition(variant, arch, "_finish_kernel", dots=dots)
    report = resources.report_triton(compiled, resources.variant_name(variant), arch)
    assert report.tensor > 0, report
    assert_fits(report, arch)


@pytest.mark.parametrize("arch", ARCHS)
def test_precondition_dots_fit(arch):
    variant = next(resources.precondition_variants())
    compiled = resources.compile_precondition(variant, arch, "_dots_kernel")
    assert_fits(resources.report_triton(compiled, "dots", arch), arch)


def wide_copies(compiled):
    """How many asynchronous copies of 16 bytes each stand in the machine code, and how many copies in all."""
    sass = resources.sass_of(compiled)
    return len(re.findall(r"\bLDGSTS\.E[.\w]*\.128\b", sass)), len(re.findall(r"\bLDGSTS\b", sass))


@pytest.mark.parametrize(
    ("variant", "arch"), [p for p in PRECONDITION if p.values[0].aligned and p.values[1] != 100]
)
def test_precondition_reads_aligned_inverses_16_bytes_at_a_time(variant, arch):
    """The compiler must believe the hints: addresses and strides that come from the table tell it nothing.

    Both orders of the product have their own loop. Each thread copies its share of a tile once per stage
    that is filled ahead and once in the loop.
    """
    config = variant.config
    share = config.block_k * config.block_d * 4 // 16 // (32 * config.num_warps)
    wide, _ = wide_copies(resources.compile_precondition(variant, arch))
    assert wide >= 2 * share * config.num_stages


def test_the_check_of_wide_copies_has_teeth():
    variant = next(v for v in resources.precondition_variants() if not v.aligned)
    wide, copies = wide_copies(resources.compile_precondition(variant, 90))
    assert wide == 0
    assert copies > 0


@pytest.mark.parametrize("kernel", resources.PRECONDITION_KERNELS if ARCHS else [])
@pytest.mark.parametrize("layout", ["aligned", "any-bias"])
def test_precondition_offsets_are_64_bit(layout, kernel):
    variant = next(
        v for v in resources.precondition_variants() if resources.variant_name(v).endswith(layout)
    )
    ttir = resources.compile_precondition(variant, 90, kernel).asm["ttir"]
    if kernel == "_dots_kernel":
        # Parts lie one after another: there is no product of tensors.
        assert set(re.findall(r"tt\.addptr .*?: tensor<.*>, tensor<[\dx]*x?(i\d+)>", ttir)) == {
            "i64"
        }
    else:
        assert_offsets_are_64_bit(ttir)


@pytest.mark.parametrize("arch", ARCHS)
def test_precondition_dots_take_a_stride_of_one(arch):
    """The launcher makes an argument that is 1 a constant, and that is what ``dots`` usually has."""
    from grng_kernels.precondition import triton_kernel

    compiled = resources.compile_triton(
        triton_kernel._dots_kernel,
        {
            "dots_ptr": "*fp32",
            "parts_ptr": "*fp32",
            "table_ptr": "*i64",
            "stride": "constexpr",
            "BLOCK": "constexpr",
        },
        {"stride": 1, "BLOCK": triton_kernel.DOTS_BLOCK},
        ["dots_ptr", "parts_ptr", "table_ptr"],
        arch,
        num_warps=1,
        num_stages=3,
    )
    assert_fits(resources.report_triton(compiled, "dots", arch), arch)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel", ["_dots_kernel", "_coefficient_kernel", "_apply_kernel"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
def test_rank_one_fits(dtype, kernel, arch):
    compiled = resources.compile_rank_one(dtype, arch, kernel)
    assert_fits(resources.report_triton(compiled, kernel, arch), arch)


def test_no_kernel_is_tuned_and_no_size_is_specialised():
    """Tuning runs a kernel many times, which an update in place does not survive; and a size that is 1 in one
    call and 2 in the next would be compiled twice."""
    from grng_kernels.kron_factor import triton_conv2d, triton_kernel
    from grng_kernels.precondition import triton_kernel as precondition

    for module, names in (
        (triton_kernel, resources.KRON_FACTOR_KERNELS),
        (triton_conv2d, resources.CONV2D_KERNELS),
        (precondition, resources.PRECONDITION_KERNELS),
    ):
        for name in names:
            kernel = getattr(module, name)
            assert isinstance(kernel, triton.JITFunction)
            sizes = {
                p.name
                for p in kernel.params
                if not p.is_constexpr and not p.name.endswith("_ptr") and not p.do_not_specialize
            }
            # A number in floating point is never a constant; the stride is 1 in every call of ours.
            assert sizes <= {"decay", "stride"}


def test_the_check_of_offsets_has_teeth():
    compiled = resources.compile_triton(
        _old_offsets,
        {"x_ptr": "*i32", "rows": "i32", "stride": "i32", "BLOCK": "constexpr"},
        {"BLOCK": 64},
        [],
        90,
        num_warps=4,
        num_stages=1,
    )
    with pytest.raises(AssertionError, match="offsets of type"):
        assert_offsets_are_64_bit(compiled.asm["ttir"])


def test_the_check_of_spills_has_teeth():
    """A tile far too large for its warps: what the tables must not hold."""
    from grng_kernels.kron_factor.triton_kernel import Config

    compiled = resources.compile_products(
        "bf16", Config(128, 32, 2, 2, 1), 80, aligned=True, bias=False
    )
    report = resources.report_triton(compiled, "bf16", 80)
    assert report.spills > 0
    with pytest.raises(AssertionError):
        assert_fits(report, 80)
