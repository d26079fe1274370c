// SPDX-License-Identifier: Apache-2.0
// The arithmetic of a Kronecker factor, half of a matrix product: tiles of left^T right, with the
// rows of both in panels that are contiguous and padded to whole cache lines.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace grng {

// Two panels of 96 rows and a tile of sums fit in L1 together.
constexpr int64_t kRowsPerBlock = 96;

// Columns of a panel, in 64-byte vectors. Three make the fastest tiles; another number may waste
// less on the padding and on the upper triangle of the diagonal tiles.
template <int kVectors>
struct Panels {
  static constexpr int kCount = kVectors;
};
template <class T, class P>
constexpr int64_t kWidthOf = P::kCount * 64 / int64_t{sizeof(T)};
template <class T, class P>
constexpr int64_t kTileSizeOf = kWidthOf<T, P> * kWidthOf<T, P>;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls f(Panels{}) for the width that costs least for a factor of order n.
template <class T, class F>
GRNG_INLINE void with_panels(int64_t n, const F& f) {
  // Time for each element of a tile, relative: a narrow tile loads more for each product, a wide
  // one presses on the registers. A tile on the diagonal takes the given share of another.
  const auto cost = [&](auto p, double each, double diagonal) {
    const double width = static_cast<double>(kWidthOf<T, decltype(p)>);
    const double panels = std::ceil(static_cast<double>(n) / width);
    return panels * ((panels - 1) / 2 + diagonal) * width * width * each;
  };
  const double one = cost(Panels<1>{}, 1.9, 1.0), two = cost(Panels<2>{}, 1.15, 0.9);
  const double three = cost(Panels<3>{}, 1.0, 0.8), four = cost(Panels<4>{}, 1.05, 0.65);
  const double least = std::min({one, two, three, four});
  if (least == three) return f(Panels<3>{});
  if (least == four) return f(Panels<4>{});
  if (least == two) return f(Panels<2>{});
  return f(Panels<1>{});
}

// How a row of one panel meets a row of another; kRows rows of a matrix lie in one of a panel.
struct Products {
  static constexpr int64_t kRows = 1;
  template <class Vec>
  static GRNG_INLINE Vec add(Vec sum, Vec a, Vec b) {
    return sum + a * b;
  }
};

// Which rows of two panels are multiplied: `lines` runs of `rows` each. Steps are in rows.
struct Run {
  int64_t lines, rows, line_step, row_step;
};

inline Run one_line(int64_t rows) { return {1, rows, 0, 1}; }

// ---- one tile: sum [width, width] += left^T right, over the rows of a run ----

// Rows [i, i + kRows) of the tile, its first kVecs vectors.
template <class Isa, class T, class P, class Dot, int kVecs, int kRows = tile_rows<Isa, T>(kVecs)>
GRNG_INLINE int64_t add_strip(T* sum, const T* left, const T* right, const Run& run, int64_t i) {
  using S = Simd<Isa, T>;
  using Vec = typename S::Vec;
  constexpr int64_t kWidth = kWidthOf<T, P>;
  Vec acc[kRows][kVecs] = {};
  for (int64_t line = 0; line < run.lines; ++line) {
    const T* l = left + line * run.line_step * kWidth + i;
    const T* r = right + line * run.line_step * kWidth;
    for (int64_t k = 0; k < run.rows; ++k) {
      Vec b[kVecs];
#pragma GCC unroll 12
      for (int v = 0; v < kVecs; ++v) b[v] = S::load_once(r + v * S::kLanes);
#pragma GCC unroll 16
      for (int t = 0; t < kRows; ++t) {
        const Vec a = S::broadcast(l + t);
#pragma GCC unroll 12
        for (int v = 0; v < kVecs; ++v) acc[t][v] = Dot::add(acc[t][v], a, b[v]);
      }
      l += run.row_step * kWidth;
      r += run.row_step * kWidth;
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < kRows; ++t)
#pragma GCC unroll 12
    for (int v = 0; v < kVecs; ++v) {
      T* out = sum + (i + t) * kWidth + v * S::kLanes;
      S::store(out, S::load(out) + acc[t][v]);
    }
  return i + kRows;
}

// A tile on the diagonal needs its lower triangle only: `diagonal` leaves out whole 64-byte
// columns, and what is left of a strip is taken higher. `before_strip` may fetch what comes next.
template <class Isa, class T, class P, class Dot = Products, class Each>
GRNG_INLINE void add_product(T* sum, const T* left, const T* right, const Run& run, bool diagonal,
                             const Each& before_strip) {
  constexpr int kVecs = 64 / Isa::kVectorBytes;
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < kWidthOf<T, P>;) {
    before_strip();
    const int64_t lines = diagonal ? i / kLine + 1 : P::kCount;
    if (P::kCount >= 4 && lines == 4) {
      i = add_strip<Isa, T, P, Dot, kVecs * std::min(4, P::kCount)>(sum, left, right, run, i);
    } else if (P::kCount >= 3 && lines == 3) {
      i = add_strip<Isa, T, P, Dot, kVecs * std::min(3, P::kCount)>(sum, left, right, run, i);
    } else if (P::kCount >= 2 && lines == 2) {
      i = add_strip<Isa, T, P, Dot, kVecs * std::min(2, P::kCount)>(sum, left, right, run, i);
    } else {
      i = add_strip<Isa, T, P, Dot, kVecs>(sum, left, right, run, i);
    }
  }
}

// The tiles of the lower triangle, counted row by row.
struct TileIndex {
  int64_t row, col;
  TileIndex(int64_t i, int64_t j) : row(i), col(j) {}
  explicit TileIndex(int64_t t)
      : row(static_cast<int64_t>((std::sqrt(8.0 * static_cast<double>(t) + 1) - 1) / 2)) {
    while ((row + 1) * (row + 2) / 2 <= t) ++row;
    while (row * (row + 1) / 2 > t) --row;
    col = t - row * (row + 1) / 2;
  }
};

inline int64_t tile_count(int64_t panels) { return panels * (panels + 1) / 2; }

}  // namespace grng
