// SPDX-License-Identifier: Apache-2.0
// Products of bf16 in pairs, for CPUs with AVX512_BF16: one instruction adds two of them to each
// sum.
//
// A product of two bf16 numbers is exact in fp32, so each addition rounds as the fused one of the
// fp32 kernel does. The instruction adds the upper half of a pair first: with the earlier row there
// the order of the sums, and so every bit, is that of the fp32 kernel. Only denormal numbers
// differ: the instruction takes them for zero, as inputs and as sums.
#pragma once

#include <cstdint>
#include <cstring>

#include "elements.h"
#include "simd.h"

namespace grng {

// A row of a panel is two rows of the matrix: each element, kept as the bits of a float, has the
// earlier in its upper half.
struct PairProducts {
  static constexpr int64_t kRows = 2;

#if defined(GRNG_EMULATE_BF16_DOT)  // for tests, on any CPU
  static bool available() { return true; }
  template <class Vec>
  static GRNG_INLINE Vec add(Vec sum, Vec a, Vec b) {
    typedef uint32_t Bits __attribute__((vector_size(sizeof(Vec))));
    const auto flushed = [](Bits x) GRNG_INLINE_LAMBDA {
      return reinterpret_cast<Vec>((x & 0x7f800000u) == 0 ? x & 0x80000000u : x);
    };
    const Bits x = reinterpret_cast<Bits>(a), y = reinterpret_cast<Bits>(b);
    sum = flushed(reinterpret_cast<Bits>(sum));
    sum += flushed(x & 0xffff0000u) * flushed(y & 0xffff0000u);
    sum = flushed(reinterpret_cast<Bits>(sum));
    sum += flushed(x << 16) * flushed(y << 16);
    return flushed(reinterpret_cast<Bits>(sum));
  }
#elif defined(__x86_64__) && defined(__GNUC__)
  static bool available() {
    static const bool has =
        __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return has;
  }
  // By name: the function around it is compiled for all CPUs with AVX-512, and asks first.
  template <class Vec>
  static GRNG_INLINE Vec add(Vec sum, Vec a, Vec b) {
    if constexpr (sizeof(Vec) == 64) {
      asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
      return sum;
    } else {
      __builtin_unreachable();
    }
  }
#else
  static bool available() { return false; }
  template <class Vec>
  static GRNG_INLINE Vec add(Vec, Vec, Vec) {
    __builtin_unreachable();
  }
#endif
};

// Rows [begin, begin + rows) of a bf16 matrix as panels of pairs, `height` pairs apart; an odd row
// is paired with zeros. Returns the largest magnitude, ones of the bias included: inf or NaN where
// one is.
template <int64_t kWidth>
GRNG_INLINE double pack_pairs(float* packed, const ConstMatrix& x, bool bias, int64_t begin,
                              int64_t rows, int64_t height, int64_t panel_begin,
                              int64_t panel_end) {
  constexpr uint16_t kOne = 0x3f80, kMagnitude = 0x7fff;
  const uint16_t* data = static_cast<const uint16_t*>(x.data) + begin * x.row_stride;
  uint16_t largest[kWidth] = {};
  for (int64_t p = panel_begin; p < panel_end; ++p) {
    float* out = packed + p * height * kWidth;
    const int64_t first = p * kWidth, filled = std::min(kWidth, x.cols - first);
    for (int64_t r = 0; r < rows; r += 2, out += kWidth) {
      uint16_t both[2][kWidth] = {};
      for (int64_t k = 0; k < std::min<int64_t>(2, rows - r); ++k) {
        const uint16_t* in = data + (r + k) * x.row_stride + first * x.col_stride;
        if (filled == kWidth && x.col_stride == 1) {
          std::memcpy(both[k], in, sizeof(both[k]));
        } else {
          for (int64_t c = 0; c < filled; ++c) both[k][c] = in[c * x.col_stride];
          if (bias && filled < kWidth) both[k][filled] = kOne;
        }
      }
      uint32_t pairs[kWidth];
      for (int64_t c = 0; c < kWidth; ++c) {
        pairs[c] = uint32_t{both[0][c]} << 16 | both[1][c];
        const uint16_t a = both[0][c] & kMagnitude, b = both[1][c] & kMagnitude;
        const uint16_t larger_one = a > b ? a : b;
        largest[c] = larger_one > largest[c] ? larger_one : largest[c];
      }
      std::memcpy(out, pairs, sizeof(pairs));
    }
  }
  // The order of the magnitudes' bits is theirs, inf and NaN above all.
  uint16_t most = 0;
  for (uint16_t bits : largest) most = bits > most ? bits : most;
  return static_cast<float>(BFloat16{most});
}

}  // namespace grng
