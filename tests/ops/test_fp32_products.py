# SPDX-License-Identifier: Apache-2.0
"""Why the Triton kernel multiplies fp32 by three TF32 products and not by three bf16 products.

Both split a number in two and drop the product of the small parts; bf16 keeps 16 bits of it, TF32 keeps 22.
The arithmetic of the tensor cores is emulated: exact products and fp32 sums within a block of rows, then one
fp32 addition for each block, as the compiled kernel does it.
"""

import pytest
import torch

from tests.cases import assert_within_budget

BLOCK, ROWS = 32, 1024  # block_k of the kernel, and the most rows that one accumulator sums


def tf32(x):
    """Round to the 10 stored bits of TF32, to nearest, as cvt.rna does."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def bf16(x):
    return x.bfloat16().float()


def three_products(x, narrow):
    total = torch.zeros(x.shape[1], x.shape[1])
    for rows in x.split(ROWS):
        partial = torch.zeros_like(total)
        for block in rows.split(BLOCK):
            large = narrow(block)
            small = narrow(block - large)
            partial += small.mT @ large + large.mT @ small + large.mT @ large
        total += partial
    return total


SAMPLES = {
    "normal": lambda rows: torch.randn(rows, 129),
    "relu": lambda rows: torch.randn(rows, 129).relu(),
    "offset": lambda rows: torch.randn(rows, 129) + 3,
}
samples = pytest.mark.parametrize("kind", SAMPLES)


@samples
@pytest.mark.parametrize("rows", [512, 1024])
def test_three_tf32_products_are_as_good_as_fp32(kind, rows):
    x = SAMPLES[kind](rows)
    assert_within_budget(three_products(x, tf32), x.double().mT @ x.double(), x.mT @ x)


@samples
def test_three_bf16_products_are_not(kind):
    x = SAMPLES[kind](512)
    with pytest.raises(AssertionError, match="largest error"):
        assert_within_budget(three_products(x, bf16), x.double().mT @ x.double(), x.mT @ x)


if __name__ == "__main__":
    torch.manual_seed(0)
    print(
        f"{'samples':8} {'rows':>5}  largest error over largest value: torch fp32, tf32x3, bf16x3"
    )
    for kind, draw in SAMPLES.items():
        for rows in (512, 1024, 8192, 12608):
            x = draw(rows)
            ref = x.double().mT @ x.double()
            results = (x.mT @ x, three_products(x, tf32), three_products(x, bf16))
            errors = [((r - ref).abs().max() / ref.abs().max()).item() for r in results]
            print(f"{kind:8} {rows:5}  " + "  ".join(f"{e:.1e}" for e in errors))
