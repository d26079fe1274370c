// SPDX-License-Identifier: Apache-2.0
// What the two ways of inverting a damped matrix on the CPU share: one matrix at a time, or
// sixteen.
#pragma once

#include <cmath>
#include <cstdint>

#include "../kernels.h"

namespace grng {

// See grng_kernels/damped_inverse/reference.py.
constexpr float kFloor = 1e-36f, kResidualLimit = 1e-2f;
// More asymmetry than this share of the largest entry is not rounding.
inline float asymmetry_limit(Dtype dtype) {
  if (dtype == Dtype::kBFloat16) return 0x1.6a09e6p-4f;
  return dtype == Dtype::kFloat16 ? 0x1p-5f : 0x1.6a09e6p-12f;
}
// A given damping is at most 2^this times the largest entry after scaling: more would leave fp32.
constexpr int kDampingBits = 60;

// A power of two in two halves: itself may leave the range of fp32 where a product does not.
struct PowerOfTwo {
  float first, second;
  explicit PowerOfTwo(int exponent)
      : first(std::ldexp(1.0f, exponent / 2)), second(std::ldexp(1.0f, exponent - exponent / 2)) {}
  float times(float value) const { return value * first * second; }
};

}  // namespace grng
