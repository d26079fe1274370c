// SPDX-License-Identifier: Apache-2.0
// Elements of the Kalman update's Jacobian, of any layout and dtype, as fp32 in whole vectors.
#pragma once

#include <cstdint>

#include "../kernels.h"
#include "elements.h"
#include "simd.h"

namespace grng::kalman {

template <class T>
GRNG_INLINE void copy_row(float* out, const T* in, int64_t step, int64_t length) {
  if (step == 1) {
    for (int64_t k = 0; k < length; ++k) out[k] = static_cast<float>(in[k]);
  } else {
    for (int64_t k = 0; k < length; ++k) out[k] = static_cast<float>(in[k * step]);
  }
}

// out[0..length) = elements [first, first + length) of a row of H, and zeros up to `whole`.
GRNG_INLINE void fetch_row(float* out, const ConstMatrix& h, int64_t row, int64_t first,
                           int64_t length, int64_t whole) {
  const int64_t at = row * h.row_stride + first * h.col_stride;
  switch (h.dtype) {
    case Dtype::kBFloat16:
      copy_row(out, static_cast<const BFloat16*>(h.data) + at, h.col_stride, length);
      break;
    case Dtype::kFloat16:
      copy_row(out, static_cast<const _Float16*>(h.data) + at, h.col_stride, length);
      break;
    default:
      copy_row(out, static_cast<const float*>(h.data) + at, h.col_stride, length);
  }
  for (int64_t k = length; k < whole; ++k) out[k] = 0;
}

GRNG_INLINE void copy_padded(float* out, const float* in, int64_t length, int64_t whole) {
  for (int64_t k = 0; k < whole; ++k) out[k] = k < length ? in[k] : 0.0F;
}

template <class Isa>
constexpr int64_t whole_lanes(int64_t length) {
  constexpr int64_t kLanes = Simd<Isa, float>::kLanes;
  return (length + kLanes - 1) / kLanes * kLanes;
}

}  // namespace grng::kalman
