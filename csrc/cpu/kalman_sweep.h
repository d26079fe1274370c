// SPDX-License-Identifier: Apache-2.0
// What the two passes of the Kalman update do with one chunk of parameters.
//
// The chunk's rows of H come as fp32 with unit stride. Up to kNarrow outputs a column of H stays in
// registers; beyond, products run on tiles of rows over a copy of the chunk.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "elements.h"
#include "simd.h"

namespace grng::kalman {

// Elements of a chunk: short enough that narrow rows stay in L1 and wide ones in L2.
constexpr int64_t kChunk = 512;
constexpr int64_t chunk_length(int64_t outputs) { return outputs <= 256 ? kChunk : 128; }

// Outputs whose column fits in the registers next to what it is multiplied with.
template <class Isa>
constexpr int64_t kNarrow = Isa::kVectorBytes == 64 ? 16 : 8;
constexpr int64_t kMaxNarrow = 16, kMaxPairs = kMaxNarrow * (kMaxNarrow + 1) / 2;

inline int64_t pairs_of(int64_t outputs) { return outputs * (outputs + 1) / 2; }

// Into L2, so that memory works on the next chunk during the arithmetic of this one: the strips of
// a chunk are too short for the hardware to see a stream in them. Any address will do.
GRNG_INLINE void fetch_ahead(const float* p) { __builtin_prefetch(p, 0, 2); }

// ---- pass 1, narrow ----

// Sums of products of rows i >= j, at i (i + 1) / 2 + j, each in a few lanes of fp64: lanes of a
// chunk are fp32 sums of a few dozen products, and everything above them is fp64.
constexpr int64_t kSumLanes = 8;
struct NarrowSums {
  alignas(64) double lanes[kMaxPairs * kSumLanes];
};

// Rows [kBegin, kEnd) of the lower triangle; `weight` null means one.
template <class Isa, int kBegin, int kEnd, bool kWeighted>
GRNG_INLINE void add_rows(double* sums, const float* weight, const float* const* rows,
                          int64_t length) {
  using S = Simd<Isa, float>;
  typename S::Vec acc[kEnd - kBegin][kEnd] = {};
  for (int64_t k = 0; k < length; k += S::kLanes) {
    typename S::Vec left[kEnd - kBegin];
#pragma GCC unroll 16
    for (int i = 0; i < kEnd - kBegin; ++i) {
      left[i] = S::load(rows[kBegin + i] + k);
      fetch_ahead(rows[kBegin + i] + k + kChunk);
      if constexpr (kWeighted) left[i] *= S::load(weight + k);
    }
#pragma GCC unroll 16
    for (int j = 0; j < kEnd; ++j) {
      const typename S::Vec right = S::load_once(rows[j] + k);
#pragma GCC unroll 16
      for (int i = 0; i < kEnd - kBegin; ++i)
        if (j <= kBegin + i) acc[i][j] += left[i] * right;
    }
  }
  constexpr int kHalf = std::min<int>(S::kLanes, kSumLanes);
#pragma GCC unroll 16
  for (int i = 0; i < kEnd - kBegin; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < kEnd; ++j)
      if (j <= kBegin + i) {
        float lanes[S::kLanes];
        S::store(lanes, acc[i][j]);
        double* out = sums + (pairs_of(kBegin + i) + j) * kSumLanes;
        for (int v = 0; v < S::kLanes; v += kHalf)
          for (int l = 0; l < kHalf; ++l) out[l] += static_cast<double>(lanes[v + l]);
      }
}

// Where the rows that begin at kBegin end, so that their sums and operands fill the registers.
template <class Isa, int kBegin>
constexpr int rows_end() {
  constexpr int kMost = Isa::kVectorBytes == 64 ? 25 : 11;
  int sums = kBegin + 1, end = kBegin + 1;
  while (end < kNarrow<Isa> && sums + end + 1 <= kMost) sums += ++end;
  return end;
}

template <class Isa, bool kWeighted, int kBegin, int kEnd>
GRNG_INLINE void add_some_rows(double* sums, const float* weight, const float* const* rows,
                               int64_t outputs, int64_t length) {
  if (outputs >= kEnd) return add_rows<Isa, kBegin, kEnd, kWeighted>(sums, weight, rows, length);
  if constexpr (kEnd - 1 > kBegin)
    add_some_rows<Isa, kWeighted, kBegin, kEnd - 1>(sums, weight, rows, outputs, length);
}

template <class Isa, bool kWeighted, int kBegin = 0>
GRNG_INLINE void add_narrow(double* sums, const float* weight, const float* const* rows,
                            int64_t outputs, int64_t length) {
  if constexpr (kBegin < kNarrow<Isa>) {
    if (outputs <= kBegin) return;
    constexpr int kEnd = rows_end<Isa, kBegin>();
    add_some_rows<Isa, kWeighted, kBegin, kEnd>(sums, weight, rows, outputs, length);
    add_narrow<Isa, kWeighted, kEnd>(sums, weight, rows, outputs, length);
  }
}

// ---- pass 1, wide ----

// A tile of sums: kTileRows x 4 vectors, in registers.
template <class Isa>
constexpr int kTileRows = Isa::kVectorBytes == 64 ? 6 : 2;
constexpr int kTileCols = 4;
// Rows of a chunk, padded with zeros to whole tiles of either kind.
constexpr int64_t kRowPadding = 12;
inline int64_t padded_rows(int64_t outputs) {
  return (outputs + kRowPadding - 1) / kRowPadding * kRowPadding;
}

// sums, the packed lower triangle, += the products of rows [i0, ...) of `left` with all rows of `h`
// up to them.
template <class Isa>
GRNG_INLINE void add_tile_row(double* sums, const float* left, const float* h, int64_t stride,
                              int64_t outputs, int64_t i0, int64_t length) {
  using S = Simd<Isa, float>;
  constexpr int kRows = kTileRows<Isa>;
  const int64_t rows = std::min<int64_t>(kRows, outputs - i0);
  for (int64_t j0 = 0; j0 < i0 + rows; j0 += kTileCols) {
    typename S::Vec acc[kRows][kTileCols] = {};
    for (int64_t k = 0; k < length; k += S::kLanes) {
      typename S::Vec right[kTileCols];
#pragma GCC unroll 4
      for (int j = 0; j < kTileCols; ++j) right[j] = S::load_once(h + (j0 + j) * stride + k);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const typename S::Vec a = S::load(left + i * stride + k);
#pragma GCC unroll 4
        for (int j = 0; j < kTileCols; ++j) acc[i][j] += a * right[j];
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      if (i >= rows) continue;
      float four[kTileCols];
      S::sum4(four, acc[i]);
      double* out = sums + pairs_of(i0 + i);
      for (int64_t j = 0; j < kTileCols && j0 + j <= i0 + i; ++j)
        out[j0 + j] += static_cast<double>(four[j]);
    }
  }
}

// `h` holds padded_rows(outputs) rows, zero beyond the outputs; `left` is room for a tile of them.
template <class Isa>
GRNG_INLINE void add_wide(double* sums, const float* weight, float* left, const float* h,
                          int64_t stride, int64_t outputs, int64_t length) {
  constexpr int kRows = kTileRows<Isa>;
  for (int64_t i0 = 0; i0 < outputs; i0 += kRows) {
    const float* rows = h + i0 * stride;
    if (!weight) {
      add_tile_row<Isa>(sums, rows, h, stride, outputs, i0, length);
      continue;
    }
    for (int i = 0; i < kRows; ++i)
      for (int64_t k = 0; k < length; ++k) left[i * stride + k] = rows[i * stride + k] * weight[k];
    add_tile_row<Isa>(sums, left, h, stride, outputs, i0, length);
  }
}

// ---- the state in pass 1 ----

// The largest magnitudes of the state, with inf and NaN above all numbers, and negative variances.
struct Extremes {
  double mean = 0, variance = 0;
  bool negative = false;

  void include(const Extremes& other) {
    mean = larger(mean, other.mean);
    variance = larger(variance, other.variance);
    negative |= other.negative;
  }
};

// The same, lane by lane. All in integers: gcc 12 takes a comparison of wide vectors of floats
// apart before it knows the instruction set.
template <class Isa>
struct Seen {
  using S = Simd<Isa, float>;
  typedef uint32_t Words __attribute__((vector_size(Isa::kVectorBytes)));
  typename S::Magnitudes means = {}, variances = {}, negative = {};

  GRNG_INLINE void look(typename S::Vec mean, typename S::Vec variance) {
    means = S::larger(means, mean);
    variances = S::larger(variances, variance);
    // Above 0 for floats below zero, but not for -0, the smallest integer.
    const typename S::Magnitudes minus =
        reinterpret_cast<typename S::Magnitudes>(Words{} - reinterpret_cast<Words>(variance));
    negative = minus > negative ? minus : negative;
  }
  GRNG_INLINE Extremes extremes() const {
    Extremes found{S::largest(means), S::largest(variances), false};
    for (int l = 0; l < S::kLanes; ++l) found.negative |= negative[l] != 0;
    return found;
  }
};

template <class Isa>
GRNG_INLINE void look_at_state(Extremes& found, const float* mean, const float* variance,
                               int64_t length) {
  using S = Simd<Isa, float>;
  Seen<Isa> seen;
  for (int64_t k = 0; k < length; k += S::kLanes)
    seen.look(S::load(mean + k), S::load(variance + k));
  found.include(seen.extremes());
}

// ---- pass 2 ----
//
// Everything is scaled by sqrt(p): s = sqrt(p) h has squares below trace(S), so no product leaves
// the range of fp32 that S itself has not left.

struct Prediction {
  bool variational;  // p / (1 + t) instead of p (1 - t)
  float forgetting, process_noise;
};

template <class Isa>
GRNG_INLINE void write_state(float* mean, float* variance, typename Simd<Isa, float>::Vec step,
                             typename Simd<Isa, float>::Vec t, const Prediction& next) {
  using S = Simd<Isa, float>;
  using Vec = typename S::Vec;
  constexpr float kEps = std::numeric_limits<float>::epsilon();
  constexpr float kMax = std::numeric_limits<float>::max();
  Vec p = S::load(variance);
  if (next.variational) {
    p /= 1.0F + t;
  } else {
    // 1 - t > 0 in exact arithmetic; rounding must not make it zero or negative.
    const Vec left = 1.0F - t;
    p *= left > kEps ? left : kEps - Vec{};
  }
  if (next.forgetting != 1.0F) p /= next.forgetting;
  p += next.process_noise;
  S::store(variance, p < kMax ? p : kMax - Vec{});
  S::store(mean, S::load(mean) + step);
}

// `whitener` is lower triangular, kOutputs x kOutputs; length is a multiple of the lanes, and root
// holds the roots of the variance.
template <class Isa, int kOutputs>
GRNG_INLINE void apply_columns(float* mean, float* variance, const float* root,
                               const float* const* rows, const float* direction,
                               const float* whitener, const Prediction& next, int64_t length) {
  using S = Simd<Isa, float>;
  using Vec = typename S::Vec;
  for (int64_t k = 0; k < length; k += S::kLanes) {
    const Vec scale = S::load(root + k);
    Vec s[kOutputs], step = {}, t = {};
#pragma GCC unroll 16
    for (int c = 0; c < kOutputs; ++c) {
      s[c] = scale * S::load(rows[c] + k);
      fetch_ahead(rows[c] + k - kChunk);  // this pass walks backwards
      step += S::broadcast(direction + c) * s[c];
    }
#pragma GCC unroll 16
    for (int r = 0; r < kOutputs; ++r) {
      Vec y = {};
#pragma GCC unroll 16
      for (int c = 0; c < kOutputs; ++c)
        if (c <= r) y += S::broadcast(whitener + r * kOutputs + c) * s[c];
      t += y * y;
    }
    write_state<Isa>(mean + k, variance + k, scale * step, t, next);
  }
}

template <class Isa, int kOutputs = kNarrow<Isa>>
GRNG_INLINE void apply_narrow(int64_t outputs, float* mean, float* variance, const float* root,
                              const float* const* rows, const float* direction,
                              const float* whitener, const Prediction& next, int64_t length) {
  if constexpr (kOutputs > 0) {
    if (outputs == kOutputs)
      return apply_columns<Isa, kOutputs>(mean, variance, root, rows, direction, whitener, next,
                                          length);
    apply_narrow<Isa, kOutputs - 1>(outputs, mean, variance, root, rows, direction, whitener, next,
                                    length);
  }
}

// Elements of a strip of a chunk: its outputs lie together.
constexpr int kStripVecs = 4;
template <class Isa>
constexpr int64_t kStrip = kStripVecs * Simd<Isa, float>::kLanes;

// The rows of a whitener in groups of a tile, a group's elements of one column together: the
// coefficients of a group are read once, in order. `extents` skips zeros at the end of the rows.
template <class Isa>
GRNG_INLINE void pack_whitener(float* packed, int64_t* extents, const float* whitener,
                               int64_t outputs) {
  constexpr int kRows = kTileRows<Isa>;
  for (int64_t r0 = 0; r0 < outputs; r0 += kRows) {
    int64_t extent = 0;
    for (int64_t c = 0; c < outputs; ++c)
      for (int r = 0; r < kRows; ++r) {
        const float value = r0 + r < outputs ? whitener[(r0 + r) * outputs + c] : 0.0F;
        packed[r0 * outputs + c * kRows + r] = value;
        if (value != 0) extent = c + 1;
      }
    extents[r0 / kRows] = extent;
  }
}

// t[kStrip] = |W s|^2 of each column of s [outputs, kStrip]. The groups' sums of squares are added
// with compensation: one rounding for each row would be most of the error of a wide update.
template <class Isa>
GRNG_INLINE void squares_of_strip(float* t, const float* s, const float* packed,
                                  const int64_t* extents, int64_t outputs) {
  using S = Simd<Isa, float>;
  using Vec = typename S::Vec;
  constexpr int kRows = kTileRows<Isa>;
  Vec total[kStripVecs] = {}, lost[kStripVecs] = {};
  for (int64_t r0 = 0; r0 < outputs; r0 += kRows) {
    Vec acc[kRows][kStripVecs] = {};
    const float* w = packed + r0 * outputs;
    const int64_t extent = extents[r0 / kRows];
    for (int64_t c = 0; c < extent; ++c, w += kRows) {
      Vec right[kStripVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kStripVecs; ++v)
        right[v] = S::load_once(s + c * kStrip<Isa> + v * S::kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Vec a = S::broadcast(w + r);
#pragma GCC unroll 4
        for (int v = 0; v < kStripVecs; ++v) acc[r][v] += a * right[v];
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kStripVecs; ++v) {
      Vec squares = acc[0][v] * acc[0][v];
#pragma GCC unroll 8
      for (int r = 1; r < kRows; ++r) squares += acc[r][v] * acc[r][v];
      const Vec more = squares - lost[v], sum = total[v] + more;
      lost[v] = (sum - total[v]) - more;
      total[v] = sum;
    }
  }
  for (int v = 0; v < kStripVecs; ++v) S::store(t + v * S::kLanes, total[v]);
}

}  // namespace grng::kalman
