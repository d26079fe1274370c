// SPDX-License-Identifier: Apache-2.0
// Blocks of 16 x 16 fp32 elements, one cache line a row, turned over.
#pragma once

#include <cstdint>

#include "simd.h"

namespace grng {

// out [16, 16] <- in^T; the two may be the same.
template <class Isa>
GRNG_INLINE void transpose16(float* out, int64_t ldo, const float* in, int64_t ldi) {
#if defined(__x86_64__)
  if constexpr (Isa::kVectorBytes == 64) {
    using S = Simd<Isa, float>;
    using Vec = typename S::Vec;
    // gcc 12 takes shuffles of wide vectors apart before it knows the instruction set.
    Vec a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) a[i] = S::load(in + i * ldi);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {  // pairs of rows, then fours, within each quarter
      asm("vunpcklps %2, %1, %0" : "=v"(b[i]) : "v"(a[i]), "v"(a[i + 1]));
      asm("vunpckhps %2, %1, %0" : "=v"(b[i + 1]) : "v"(a[i]), "v"(a[i + 1]));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
      asm("vunpcklpd %2, %1, %0" : "=v"(a[i]) : "v"(b[i]), "v"(b[i + 2]));
      asm("vunpckhpd %2, %1, %0" : "=v"(a[i + 1]) : "v"(b[i]), "v"(b[i + 2]));
      asm("vunpcklpd %2, %1, %0" : "=v"(a[i + 2]) : "v"(b[i + 1]), "v"(b[i + 3]));
      asm("vunpckhpd %2, %1, %0" : "=v"(a[i + 3]) : "v"(b[i + 1]), "v"(b[i + 3]));
    }
    // Now quarter q of a[4g + c] holds rows 4g..4g+3 of column 4q + c.
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      Vec x, y, z, w;
      asm("vshuff32x4 $0x44, %2, %1, %0" : "=v"(x) : "v"(a[c]), "v"(a[4 + c]));
      asm("vshuff32x4 $0xee, %2, %1, %0" : "=v"(y) : "v"(a[c]), "v"(a[4 + c]));
      asm("vshuff32x4 $0x44, %2, %1, %0" : "=v"(z) : "v"(a[8 + c]), "v"(a[12 + c]));
      asm("vshuff32x4 $0xee, %2, %1, %0" : "=v"(w) : "v"(a[8 + c]), "v"(a[12 + c]));
      asm("vshuff32x4 $0x88, %2, %1, %0" : "=v"(b[c]) : "v"(x), "v"(z));
      asm("vshuff32x4 $0xdd, %2, %1, %0" : "=v"(b[4 + c]) : "v"(x), "v"(z));
      asm("vshuff32x4 $0x88, %2, %1, %0" : "=v"(b[8 + c]) : "v"(y), "v"(w));
      asm("vshuff32x4 $0xdd, %2, %1, %0" : "=v"(b[12 + c]) : "v"(y), "v"(w));
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) S::store(out + i * ldo, b[i]);
    return;
  }
#endif
  float copy[16][16];
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) copy[j][i] = in[i * ldi + j];
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) out[i * ldo + j] = copy[i][j];
}

}  // namespace grng
