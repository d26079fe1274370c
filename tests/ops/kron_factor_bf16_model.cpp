// SPDX-License-Identifier: Apache-2.0
// The CPU kernel of kron_factor_update_ with the bf16 instruction replaced by a model of it, on one
// thread, for test_kron_factor_bf16_model.py.
#define GRNG_EMULATE_BF16_DOT
#include "../../csrc/cpu/kron_factor.cpp"

extern "C" int32_t kron_factor_bf16_model(float* factor, const void* x, int64_t rows, int64_t cols,
                                          int64_t row_stride, int64_t col_stride, bool bias,
                                          double decay, double scale) {
  const grng::Threads threads{1, [](int64_t begin, int64_t end, int64_t, grng::Threads::Body body,
                                    void* context) { body(begin, end, context); }};
  grng::FactorUpdate item{factor, {x, grng::Dtype::kBFloat16, rows, cols, row_stride, col_stride},
                          bias,   decay,
                          scale,  grng::kOk};
  grng::kron_factor_update_cpu(&item, 1, threads);
  return item.info;
}
