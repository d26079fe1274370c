// SPDX-License-Identifier: Apache-2.0
// The element types of inputs, and the largest magnitude of many elements.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../kernels.h"
#include "simd.h"

namespace grng {

inline int64_t size_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat64:
      return 8;
    case Dtype::kFloat32:
      return 4;
    case Dtype::kBFloat16:
    case Dtype::kFloat16:
      return 2;
  }
  return 0;
}

struct BFloat16 {
  uint16_t bits;
  explicit operator float() const {
    const uint32_t wide = uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
  }
};

// The larger of two magnitudes, either of which may be inf or NaN.
inline double larger(double a, double b) { return std::isfinite(a) && !(b <= a) ? b : a; }

// The largest magnitude of `count` elements, a multiple of a cache line; inf or NaN where one is.
template <class Isa, class T>
GRNG_INLINE double largest_magnitude(const T* data, int64_t count) {
  using S = Simd<Isa, T>;
  constexpr int kVecs = 64 / Isa::kVectorBytes * 4;
  typename S::Magnitudes largest[kVecs] = {};
  for (int64_t i = 0; i < count; i += kVecs * S::kLanes)
#pragma GCC unroll 16
    for (int v = 0; v < kVecs; ++v) {
      const int64_t at = i + v * S::kLanes;
      if (at < count) largest[v] = S::larger(largest[v], S::load(data + at));
    }
  // Ordered as integers, so the largest is found before anything is taken out of a vector.
  for (int v = 1; v < kVecs; ++v) largest[0] = largest[v] > largest[0] ? largest[v] : largest[0];
  return S::largest(largest[0]);
}

}  // namespace grng
