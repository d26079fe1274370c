// SPDX-License-Identifier: Apache-2.0
// The inverse of a symmetric positive definite matrix in fp32, in place, in n^3 FLOPs.
//
// One sweep over panels of columns (Bientinesi, Gunter and van de Geijn 2008, "Families of
// algorithms related to the inversion of a symmetric positive definite matrix") instead of the
// three of LAPACK: Cholesky factor, its inverse, product of that. With D the diagonal block of
// panel K, C the other rows of its columns, and D = L L^T:
//
//   W = C L^-T,   A <- A - W W^T outside of K,   A_K <- W L^-1,   D <- -D^-1
//
// After the last panel A is minus the inverse. Nearly all of it is the product W W^T, of which only
// the lower triangle is computed. The operations on each element are those of a Cholesky
// factorisation in another order, so the error is that of LAPACK.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "parallel.h"
#include "simd.h"
#include "tiles.h"
#include "transpose.h"

namespace grng {

constexpr int64_t kSpdLine = 16;  // fp32 elements of a cache line; the smallest panel

// ---- products of small blocks; columns in cache lines ----

// Rows [0, kRows) of c (stride ldc) <- product, or c - product; kLines cache lines wide.
// `left(k, t)` is where the factor of row t for step k lies.
template <class Isa, int kLines, int kRows, bool kSubtract, class Left>
GRNG_INLINE void strip_product(float* c, int64_t ldc, const Left& left, const float* right,
                               int64_t ldr, int64_t begin, int64_t end) {
  using S = Simd<Isa, float>;
  using Vec = typename S::Vec;
  constexpr int kVecs = kLines * 64 / Isa::kVectorBytes;
  Vec acc[kRows][kVecs] = {};
  for (int64_t k = begin; k < end; ++k) {
    Vec b[kVecs];
#pragma GCC unroll 12
    for (int v = 0; v < kVecs; ++v) b[v] = S::load_once(right + k * ldr + v * S::kLanes);
#pragma GCC unroll 16
    for (int t = 0; t < kRows; ++t) {
      const Vec a = S::broadcast(left(k, t));
#pragma GCC unroll 12
      for (int v = 0; v < kVecs; ++v) acc[t][v] += a * b[v];
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < kRows; ++t)
#pragma GCC unroll 12
    for (int v = 0; v < kVecs; ++v) {
      float* at = c + t * ldc + v * S::kLanes;
      S::store(at, kSubtract ? S::load(at) - acc[t][v] : acc[t][v]);
    }
}

template <class Isa, int kLines>
constexpr int spd_rows() {
  return tile_rows<Isa, float>(kLines * 64 / Isa::kVectorBytes);
}

// c [rows, kLines lines] -= left^T right, `depth` steps; rows a multiple of 16. kLines a strip.
template <class Isa, int kLines>
GRNG_INLINE void subtract_transposed(float* c, int64_t ldc, const float* left, int64_t ldl,
                                     const float* right, int64_t ldr, int64_t rows, int64_t depth) {
  constexpr int kRows = spd_rows<Isa, kLines>();
  for (int64_t i = 0; i < rows; i += kRows) {
    const float* l = left + i;
    strip_product<Isa, kLines, kRows, true>(
        c + i * ldc, ldc, [=](int64_t k, int t) GRNG_INLINE_LAMBDA { return l + k * ldl + t; },
        right, ldr, 0, depth);
  }
}

// Rows of c [rows, kLines lines] <- left right, left [rows, depth] row-major with `begin` and `end`
// of the steps that are not zero for each block of 16 rows.
template <class Isa, int kLines, class Range>
GRNG_INLINE void set_product(float* c, int64_t ldc, const float* left, int64_t ldl,
                             const float* right, int64_t ldr, int64_t rows, const Range& range) {
  constexpr int kRows = spd_rows<Isa, kLines>();
  for (int64_t i = 0; i < rows; i += kRows) {
    const float* l = left + i * ldl;
    const auto [begin, end] = range(i / kSpdLine);
    strip_product<Isa, kLines, kRows, false>(
        c + i * ldc, ldc, [=](int64_t k, int t) GRNG_INLINE_LAMBDA { return l + t * ldl + k; },
        right, ldr, begin, end);
  }
}

struct Steps {
  int64_t begin, end;
};

// ---- the block on the diagonal ----

// inverse [16, 16] <- L^-1 (zero above the diagonal), where L L^T is the block whose upper triangle
// is given. Returns whether every pivot was positive.
template <class Isa>
GRNG_INLINE bool invert_factor16(float* inverse, int64_t ldi, const float* upper, int64_t ldu) {
  using S = Simd<Isa, float>;
  using Vec = typename S::Vec;
  constexpr int kVecs = 64 / Isa::kVectorBytes;
  Vec row[16][kVecs], inv[16][kVecs] = {};
  float line[16];
  for (int i = 0; i < 16; ++i)
    for (int v = 0; v < kVecs; ++v) row[i][v] = S::load(upper + i * ldu + v * S::kLanes);
  bool positive = true;
#pragma GCC unroll 16
  for (int k = 0; k < 16; ++k) {
    const float pivot = row[k][k / S::kLanes][k % S::kLanes];
    // Not a number fails too. A failed block is finished with harmless numbers.
    const bool good = pivot > 0;
    positive = positive && good;
    // In fp64: rounded once, since it is in every element of the row.
    const float scale = static_cast<float>(1 / std::sqrt(good ? double{pivot} : 1.0));
    inv[k][k / S::kLanes][k % S::kLanes] = 1.0f;
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      row[k][v] *= scale;
      inv[k][v] *= scale;
      S::store(line + v * S::kLanes, row[k][v]);
      S::store(inverse + k * ldi + v * S::kLanes, inv[k][v]);
    }
#pragma GCC unroll 16
    for (int j = k + 1; j < 16; ++j) {
      const Vec f = S::broadcast(line + j);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        row[j][v] -= f * row[k][v];
        inv[j][v] -= f * inv[k][v];
      }
    }
  }
  return positive;
}

// The inverse of the Cholesky factor of a panel's diagonal block, and its transpose: both
// [width, width], zero in the other triangle.
template <int kLines>
struct PanelFactor {
  static constexpr int64_t kWidth = kLines * kSpdLine;
  alignas(64) float lower[kWidth * kWidth], upper[kWidth * kWidth];
};

// From the lower triangle of `block`. Returns whether every pivot was positive.
template <class Isa, int kLines>
GRNG_INLINE bool factor_panel(PanelFactor<kLines>& f, const float* block, int64_t ld) {
  constexpr int64_t kWidth = PanelFactor<kLines>::kWidth;
  alignas(64) float u[kWidth * kWidth];  // the block's upper triangle, then what is left of it
  std::memset(f.lower, 0, sizeof(f.lower));
  for (int64_t i = 0; i < kLines; ++i)
    for (int64_t j = 0; j <= i; ++j)
      transpose16<Isa>(u + (j * kWidth + i) * kSpdLine, kWidth, block + (i * ld + j) * kSpdLine,
                       ld);
  bool positive = true;
#pragma GCC unroll 4
  for (int64_t p = 0; p < kLines; ++p) {
    alignas(64) float pivot[256], product[kSpdLine * kWidth];
    positive &= invert_factor16<Isa>(pivot, kSpdLine, u + (p * kWidth + p) * kSpdLine, kWidth);
    const auto whole = [](int64_t) GRNG_INLINE_LAMBDA { return Steps{0, kSpdLine}; };
    // The rows of the inverse that are done: the pivot's inverse times what stands there.
    float* done = f.lower + p * kSpdLine * kWidth;
    for (int64_t q = 0; q < p; ++q)
      set_product<Isa, 1>(done + q * kSpdLine, kWidth, pivot, kSpdLine, done + q * kSpdLine, kWidth,
                          kSpdLine, whole);
    for (int64_t i = 0; i < kSpdLine; ++i)
      std::memcpy(done + i * kWidth + p * kSpdLine, pivot + i * kSpdLine, 64);
    for (int64_t j = p + 1; j < kLines; ++j)
      set_product<Isa, 1>(product + j * kSpdLine, kWidth, pivot, kSpdLine,
                          u + (p * kWidth + j) * kSpdLine, kWidth, kSpdLine, whole);
    for (int64_t j = p + 1; j < kLines; ++j) {
      for (int64_t l = j; l < kLines; ++l)
        subtract_transposed<Isa, 1>(u + (j * kWidth + l) * kSpdLine, kWidth, product + j * kSpdLine,
                                    kWidth, product + l * kSpdLine, kWidth, kSpdLine, kSpdLine);
      for (int64_t q = 0; q <= p; ++q)
        subtract_transposed<Isa, 1>(f.lower + (j * kWidth + q) * kSpdLine, kWidth,
                                    product + j * kSpdLine, kWidth, done + q * kSpdLine, kWidth,
                                    kSpdLine, kSpdLine);
    }
  }
  std::memset(f.upper, 0, sizeof(f.upper));
  for (int64_t i = 0; i < kLines; ++i)
    for (int64_t j = 0; j <= i; ++j)
      transpose16<Isa>(f.upper + (j * kWidth + i) * kSpdLine, kWidth,
                       f.lower + (i * kWidth + j) * kSpdLine, kWidth);
  return positive;
}

// ---- the sweep ----

// A matrix of order `panels` * 16 kLines, of which the lower triangle is kept (whole cache lines of
// it); `packed` is as large as one panel.
template <int kLines>
struct Sweep {
  static constexpr int64_t kWidth = kLines * kSpdLine;
  float* a;
  int64_t ld, panels;
  float* packed;

  float* tile(int64_t i, int64_t j) const { return a + (i * ld + j) * kWidth; }
  float* packed_panel(int64_t i) const { return packed + i * kWidth * kWidth; }
};

// Row panel i of W, transposed and packed, and of the new columns of K.
template <class Isa, int kLines>
GRNG_INLINE void solve_panel(const Sweep<kLines>& s, const PanelFactor<kLines>& f, int64_t k,
                             int64_t i) {
  constexpr int64_t kWidth = Sweep<kLines>::kWidth;
  alignas(64) float turned[kWidth * kWidth];
  const auto turn = [](float* out, int64_t ldo, const float* in, int64_t ldi) GRNG_INLINE_LAMBDA {
    for (int64_t r = 0; r < kLines; ++r)
      for (int64_t c = 0; c < kLines; ++c)
        transpose16<Isa>(out + (c * ldo + r) * kSpdLine, ldo, in + (r * ldi + c) * kSpdLine, ldi);
  };
  // Left of the diagonal the rows of K hold the transposed columns; below it they are turned.
  const bool below = i > k;
  float* columns = below ? turned : s.tile(k, i);
  const int64_t ldc = below ? kWidth : s.ld;
  if (below) turn(turned, kWidth, s.tile(i, k), s.ld);
  float* w = s.packed_panel(i);
  set_product<Isa, kLines>(w, kWidth, f.lower, kWidth, columns, ldc, kWidth,
                           [](int64_t block)
                               GRNG_INLINE_LAMBDA { return Steps{0, (block + 1) * kSpdLine}; });
  set_product<Isa, kLines>(columns, ldc, f.upper, kWidth, w, kWidth, kWidth,
                           [](int64_t block)
                               GRNG_INLINE_LAMBDA { return Steps{block * kSpdLine, kWidth}; });
  if (below) turn(s.tile(i, k), s.ld, turned, kWidth);
}

// Rows [i, i + 16 or fewer) of a tile on the diagonal, up to the diagonal.
template <class Isa, int kLines, int kUpTo>
GRNG_INLINE void update_diagonal_rows(float* c, int64_t ld, const float* panel, int64_t depth) {
  constexpr int64_t kWidth = kLines * kSpdLine;
  if constexpr (kUpTo <= kLines) {
    subtract_transposed<Isa, kUpTo>(c + (kUpTo - 1) * kSpdLine * ld, ld,
                                    panel + (kUpTo - 1) * kSpdLine, kWidth, panel, kWidth, kSpdLine,
                                    depth);
    update_diagonal_rows<Isa, kLines, kUpTo + 1>(c, ld, panel, depth);
  }
}

template <class Isa, int kLines>
GRNG_INLINE void update_tile(const Sweep<kLines>& s, int64_t i, int64_t j) {
  constexpr int64_t kWidth = Sweep<kLines>::kWidth;
  if (i == j) {
    update_diagonal_rows<Isa, kLines, 1>(s.tile(i, i), s.ld, s.packed_panel(i), kWidth);
  } else {
    subtract_transposed<Isa, kLines>(s.tile(i, j), s.ld, s.packed_panel(i), kWidth,
                                     s.packed_panel(j), kWidth, kWidth, kWidth);
  }
}

// The diagonal block of K becomes minus its inverse.
template <class Isa, int kLines>
GRNG_INLINE void finish_panel(const Sweep<kLines>& s, const PanelFactor<kLines>& f, int64_t k) {
  constexpr int64_t kWidth = Sweep<kLines>::kWidth;
  float* block = s.tile(k, k);
  for (int64_t r = 0; r < kWidth; ++r) std::memset(block + r * s.ld, 0, kWidth * sizeof(float));
  update_diagonal_rows<Isa, kLines, 1>(block, s.ld, f.lower, kWidth);
}

// Replaces the lower triangle by that of minus the inverse. Returns whether the matrix was
// positive definite; if not, its content has no meaning.
template <class Isa, int kLines>
GRNG_INLINE bool invert_spd(const Sweep<kLines>& s, const Loop<Isa>& each) {
  PanelFactor<kLines> f;
  for (int64_t k = 0; k < s.panels; ++k) {
    if (!factor_panel<Isa>(f, s.tile(k, k), s.ld)) return false;
    const auto other = [k](int64_t i) { return i < k ? i : i + 1; };
    each(s.panels - 1, [&](int64_t i) GRNG_INLINE_LAMBDA { solve_panel<Isa>(s, f, k, other(i)); });
    each(tile_count(s.panels - 1), [&](int64_t t) GRNG_INLINE_LAMBDA {
      const TileIndex tile(t);
      update_tile<Isa>(s, other(tile.row), other(tile.col));
    });
    finish_panel<Isa>(s, f, k);
  }
  return true;
}

}  // namespace grng
