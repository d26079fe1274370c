// SPDX-License-Identifier: Apache-2.0
// Damped inverses of equal small order, sixteen at a time: element [i, j] of all of them is one
// cache line, a lane for each matrix.
//
// A matrix of order 16 alone leaves most of a vector unit idle: each pivot and each product of the
// power iteration waits for the one before. Here sixteen wait together. Every lane is computed from
// its own matrix only, so who stands beside whom changes nothing.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "../kernels.h"
#include "damped_inverse_common.h"
#include "elements.h"
#include "simd.h"
#include "spectral_norm.h"
#include "transpose.h"

namespace grng {

// The most lanes, and the largest order: beyond it one matrix fills the vectors well enough.
constexpr int64_t kGroup = 16, kLargestGrouped = 32;
// Columns of a panel of the sweep.
constexpr int64_t kPanel = 4;

// Where the parts of the workspace lie, in floats. Orders are padded to the rows of a block.
struct GroupLayout {
  static constexpr int64_t kRows = 4;
  int64_t n, padded, flat, staged, raw, s, a, x, y, z, columns, total;

  explicit GroupLayout(int64_t n)
      : n(n),
        padded((n + kRows - 1) / kRows * kRows),
        flat((n * n + kGroup - 1) / kGroup * kGroup) {
    const int64_t square = padded * padded * kGroup, line = padded * kGroup;
    int64_t at = 0;
    const auto take = [&](int64_t floats) { return (at += floats) - floats; };
    staged = take(kGroup * flat), raw = take(kGroup * flat), s = take(square), a = take(square);
    x = take(line), y = take(line), z = take(line), columns = take(3 * kPanel * line);
    total = at;
  }
};

// A number for each lane.
struct alignas(64) PerLane {
  float at[kGroup];
};

// What is known of each lane between the passes.
struct GroupScalars {
  PerLane first, half, up_first, up_second;  // powers of two: see PowerOfTwo
  PerLane largest, asymmetry, norm, shift, squares, positive, written;
  bool legal[kGroup], any_warm = false, all_warm = true;
  PerLane warm, given_scale;
};

template <class In>
void convert(float* out, const ConstMatrix& m) {
  const In* data = static_cast<const In*>(m.data);
  for (int64_t i = 0; i < m.rows; ++i)
    for (int64_t j = 0; j < m.cols; ++j)
      out[i * m.cols + j] = static_cast<float>(data[i * m.row_stride + j * m.col_stride]);
}

inline void load_dense(float* out, const ConstMatrix& m) {
  if (m.dtype == Dtype::kBFloat16) return convert<BFloat16>(out, m);
  if (m.dtype == Dtype::kFloat16) return convert<_Float16>(out, m);
  if (m.col_stride == 1 && m.row_stride == m.cols)
    std::memcpy(out, m.data, m.rows * m.cols * sizeof(float));
  else
    convert<float>(out, m);
}

// One vector of lanes: S::kLanes matrices, from lane `lane` on.
template <class Isa>
struct LaneVector {
  using S = Simd<Isa, float>;
  using Vec = typename S::Vec;
  using Magnitudes = typename S::Magnitudes;
  const GroupLayout& at;
  GroupScalars& scalars;
  float* memory;  // of lane 0
  int64_t lane;

  GRNG_INLINE float* part(int64_t offset) const { return memory + offset + lane; }
  static GRNG_INLINE float* cell(float* p, int64_t i) { return p + i * kGroup; }
  GRNG_INLINE Vec get(const PerLane& p) const { return S::load(p.at + lane); }
  GRNG_INLINE void set(PerLane& p, Vec v) const { S::store(p.at + lane, v); }
  static GRNG_INLINE Vec as_floats(Magnitudes m) { return reinterpret_cast<Vec>(m); }
  static GRNG_INLINE Vec root(Vec v) {
    for (int i = 0; i < S::kLanes; ++i) v[i] = std::sqrt(v[i]);
    return v;
  }
  // 1 / sqrt(v), and zero for zero: where nothing is left of a matrix, nothing is left of a vector.
  static GRNG_INLINE Vec inverse_root(Vec v) {
    const Vec one = Vec{} + 1.0f;
    return v > 0 ? one / root(v > 0 ? v : one) : Vec{};
  }
  static GRNG_INLINE Vec least(Vec a, Vec b) { return a < b ? a : b; }
  static GRNG_INLINE Vec most(Vec a, Vec b) { return a > b ? a : b; }

  GRNG_INLINE void find_largest() const {
    Magnitudes largest = {};
    const float* raw = part(at.raw);
    for (int64_t e = 0; e < at.n * at.n; ++e)
      largest = S::larger(largest, S::load(raw + e * kGroup));
    set(scalars.largest, as_floats(largest));
  }

  GRNG_INLINE void symmetrise() const {
    const int64_t n = at.n, padded = at.padded;
    float* s = part(at.s);
    float* raw = part(at.raw);
    const Vec first = get(scalars.first), half = get(scalars.half);
    Magnitudes difference = {};
    for (int64_t i = 0; i < padded; ++i)
      for (int64_t j = i < n ? n : 0; j < padded; ++j) S::store(cell(s, i * padded + j), Vec{});
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j <= i; ++j) {
        const Vec a = S::load(cell(raw, i * n + j)) * first;
        const Vec b = S::load(cell(raw, j * n + i)) * first;
        const Vec mean = (a + b) * half;
        difference = S::larger(difference, a - b);
        S::store(cell(s, i * padded + j), mean);
        S::store(cell(s, j * padded + i), mean);
      }
    set(scalars.asymmetry, as_floats(difference) * (2.0f * half));
  }

  // y <- s x
  GRNG_INLINE void multiply(float* y, const float* x) const {
    constexpr int kRows = GroupLayout::kRows;
    const float* s = part(at.s);
    for (int64_t i = 0; i < at.padded; i += kRows) {
      Vec sum[kRows] = {};
      for (int64_t j = 0; j < at.n; ++j) {
        const Vec b = S::load_once(x + j * kGroup);
#pragma GCC unroll 4
        for (int t = 0; t < kRows; ++t)
          sum[t] += S::load(s + ((i + t) * at.padded + j) * kGroup) * b;
      }
#pragma GCC unroll 4
      for (int t = 0; t < kRows; ++t) S::store(y + (i + t) * kGroup, sum[t]);
    }
  }

  GRNG_INLINE Vec dot(const float* a, const float* b) const {
    Vec even = {}, odd = {};
    for (int64_t i = 0; i < at.padded; i += 2) {
      even += S::load(a + i * kGroup) * S::load(b + i * kGroup);
      odd += S::load(a + (i + 1) * kGroup) * S::load(b + (i + 1) * kGroup);
    }
    return even + odd;
  }

  GRNG_INLINE void scale(float* x, Vec f) const {
    for (int64_t i = 0; i < at.padded; ++i) S::store(x + i * kGroup, S::load(x + i * kGroup) * f);
  }

  // As spectral_norm.h has it for one matrix. `z` holds the given vectors; the new ones are in `x`.
  GRNG_INLINE void norm() const {
    const int64_t n = at.n, padded = at.padded;
    const float* s = part(at.s);
    float *x = part(at.x), *y = part(at.y), *z = part(at.z);
    Vec infinity = {}, frobenius = {}, trace = {}, diagonal = {}, longest = Vec{} - 1.0f;
    for (int64_t i = 0; i < n; ++i) {
      Vec sum[2] = {}, square[2] = {};
      for (int64_t j = 0; j < padded; j += 2)
#pragma GCC unroll 2
        for (int t = 0; t < 2; ++t) {
          const Vec v = S::load(s + (i * padded + j + t) * kGroup);
          sum[t] += v < 0 ? -v : v;
          square[t] += v * v;
        }
      const Vec entry = S::load(s + (i * padded + i) * kGroup), length = square[0] + square[1];
      infinity = most(infinity, sum[0] + sum[1]);
      frobenius += length;
      trace += entry;
      diagonal = most(diagonal, entry);
      const auto longer = length > longest;
      longest = longer ? length : longest;
      for (int64_t j = 0; j < padded; ++j) {
        const Vec old = S::load(x + j * kGroup);
        S::store(x + j * kGroup, longer ? S::load(s + (i * padded + j) * kGroup) : old);
      }
    }
    // The longest row, or a little of it beside the given vector.
    const Vec warm = get(scalars.warm), one = Vec{} + 1.0f;
    scale(x, inverse_root(longest) * (warm > 0 ? Vec{} + kColdShare : one));
    if (scalars.any_warm) {
      const Vec given = longest > 0 ? get(scalars.given_scale) : Vec{};
      for (int64_t i = 0; i < padded; ++i)
        S::store(x + i * kGroup, S::load(x + i * kGroup) + given * S::load(z + i * kGroup));
    }
    scale(x, inverse_root(dot(x, x)));
    const int steps = scalars.all_warm ? kWarmSteps : kColdSteps;
    for (int step = 0; step < steps; step += 4) {
      const bool some_stay = scalars.any_warm && step >= kWarmSteps;
      if (some_stay)
        for (int64_t i = 0; i < padded; ++i) S::store(z + i * kGroup, S::load(x + i * kGroup));
      multiply(y, x);
      multiply(x, y);
      multiply(y, x);
      multiply(x, y);
      scale(x, inverse_root(dot(x, x)));
      if (some_stay)
        for (int64_t i = 0; i < padded; ++i)
          S::store(x + i * kGroup, warm > 0 ? S::load(z + i * kGroup) : S::load(x + i * kGroup));
    }
    multiply(y, x);
    const Vec bound = least(least(infinity, root(frobenius)), most(trace, diagonal));
    set(scalars.norm, least(most(kNormSafety * dot(x, y), diagonal), bound));
  }

  // a, lower triangle <- -(s + shift I)^-1: the sweep of spd_inverse.h, in panels of kPanel columns
  // that are swept one by one.
  GRNG_INLINE void invert() const {
    const int64_t n = at.n, padded = at.padded;
    const float* s = part(at.s);
    float* a = part(at.a);
    const Vec shift = get(scalars.shift), one = Vec{} + 1.0f;
    // With the padding: rows are taken in pairs.
    for (int64_t i = 0; i < padded; ++i) {
      for (int64_t j = 0; j < padded; ++j)
        S::store(cell(a, i * padded + j), S::load(s + (i * padded + j) * kGroup));
      S::store(cell(a, i * padded + i), S::load(s + (i * padded + i) * kGroup) + shift);
    }
    // The panel's columns; what each was when its pivot came; and that divided by the pivot.
    float *columns = part(at.columns), *before = columns + kPanel * padded * kGroup,
          *divided = before + kPanel * padded * kGroup;
    Vec positive = one;
    for (int64_t k = 0; k < n; k += kPanel) {
      const int64_t width = std::min(kPanel, n - k);
      for (int64_t c = 0; c < width; ++c)
        for (int64_t i = 0; i < n; ++i) {
          const int64_t high = std::max(i, k + c), low = std::min(i, k + c);
          S::store(cell(columns, c * padded + i), S::load(cell(a, high * padded + low)));
        }
      for (int64_t c = 0; c < width; ++c) {
        float* own = cell(columns, c * padded);
        float *u = cell(before, c * padded), *t = cell(divided, c * padded);
        const Vec pivot = S::load(cell(own, k + c));
        // Not a number fails too. A failed matrix is finished with harmless numbers.
        const auto good = pivot > 0;
        positive = good ? positive : Vec{};
        const Vec d = one / (good ? pivot : one);
        for (int64_t i = 0; i < padded; ++i) {
          const Vec v = i < n ? S::load(cell(own, i)) : Vec{};
          S::store(cell(u, i), v);
          S::store(cell(t, i), v * d);
        }
        for (int64_t other = 0; other < width; ++other) {
          if (other == c) continue;
          float* rest = cell(columns, other * padded);
          const Vec f = S::load(cell(u, k + other));
          for (int64_t i = 0; i < n; ++i)
            S::store(cell(rest, i), S::load(cell(rest, i)) - f * S::load(cell(t, i)));
          S::store(cell(rest, k + c), S::load(cell(t, k + other)));
        }
        for (int64_t i = 0; i < n; ++i) S::store(cell(own, i), S::load(cell(t, i)));
        S::store(cell(own, k + c), -d);
      }
      for (int64_t i = 0; i < n; i += 2) {
        if (width == kPanel)
          subtract_panel<kPanel>(a, before, divided, i);
        else if (width == 3)
          subtract_panel<3>(a, before, divided, i);
        else if (width == 2)
          subtract_panel<2>(a, before, divided, i);
        else
          subtract_panel<1>(a, before, divided, i);
      }
      for (int64_t c = 0; c < width; ++c)
        for (int64_t i = 0; i < n; ++i) {
          const int64_t high = std::max(i, k + c), low = std::min(i, k + c);
          S::store(cell(a, high * padded + low), S::load(cell(columns, c * padded + i)));
        }
    }
    set(scalars.positive, positive);
  }

  // Rows i and i + 1 up to the diagonal, less the products of a panel. What that makes of the panel
  // itself is overwritten.
  template <int kWidth>
  GRNG_INLINE void subtract_panel(float* a, const float* before, const float* divided,
                                  int64_t i) const {
    const int64_t padded = at.padded;
    Vec t[2][kWidth];
#pragma GCC unroll 4
    for (int c = 0; c < kWidth; ++c) {
      t[0][c] = S::load(divided + (c * padded + i) * kGroup);
      t[1][c] = S::load(divided + (c * padded + i + 1) * kGroup);
    }
    for (int64_t j = 0; j < i + 2; ++j) {
      Vec sum[2] = {S::load(a + (i * padded + j) * kGroup),
                    S::load(a + ((i + 1) * padded + j) * kGroup)};
#pragma GCC unroll 4
      for (int c = 0; c < kWidth; ++c) {
        const Vec u = S::load_once(before + (c * padded + j) * kGroup);
        sum[0] -= t[0][c] * u;
        sum[1] -= t[1][c] * u;
      }
      S::store(cell(a, i * padded + j), sum[0]);
      S::store(cell(a, (i + 1) * padded + j), sum[1]);
    }
  }

  // raw <- the inverse in the scale of the factor; a <- the same, brought back, for the residual.
  GRNG_INLINE void finish() const {
    const int64_t n = at.n, padded = at.padded;
    float *a = part(at.a), *raw = part(at.raw);
    const Vec first = get(scalars.first), second = 2.0f * get(scalars.half);
    const Vec up_first = get(scalars.up_first), up_second = get(scalars.up_second);
    Magnitudes largest = {};
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j <= i; ++j) {
        const Vec v = S::load(cell(a, i * padded + j)) * -first * second;
        largest = S::larger(largest, v);
        S::store(cell(raw, i * n + j), v);
        S::store(cell(raw, j * n + i), v);
        const Vec back = v * up_first * up_second;
        S::store(cell(a, i * padded + j), back);
        S::store(cell(a, j * padded + i), back);
      }
    for (int64_t i = 0; i < padded; ++i)
      for (int64_t j = i < n ? n : 0; j < padded; ++j) S::store(cell(a, i * padded + j), Vec{});
    set(scalars.written, as_floats(largest));
  }

  // ‖I - M X‖_F^2 by the whole product.
  GRNG_INLINE void residual() const {
    constexpr int kRows = Isa::kVectorBytes == 64 ? 4 : 2;
    const int64_t n = at.n, padded = at.padded;
    const float *s = part(at.s), *a = part(at.a);
    const Vec shift = get(scalars.shift);
    Vec squares = {};
    for (int64_t i = 0; i < padded; i += kRows)
      for (int64_t c = 0; c < padded; c += kRows) {
        Vec sum[kRows][kRows] = {};
        for (int64_t j = 0; j < n; ++j) {
          Vec right[kRows];
#pragma GCC unroll 4
          for (int u = 0; u < kRows; ++u)
            right[u] = S::load_once(a + (j * padded + c + u) * kGroup);
#pragma GCC unroll 4
          for (int t = 0; t < kRows; ++t) {
            const Vec left = S::load_once(s + ((i + t) * padded + j) * kGroup);
#pragma GCC unroll 4
            for (int u = 0; u < kRows; ++u) sum[t][u] += left * right[u];
          }
        }
        for (int t = 0; t < kRows; ++t)
          for (int u = 0; u < kRows; ++u) {
            const float unit = i + t == c + u && i + t < n ? 1.0f : 0.0f;
            const Vec x = S::load(a + ((i + t) * padded + c + u) * kGroup);
            const Vec rest = unit - sum[t][u] - shift * x;
            squares += rest * rest;
          }
      }
    set(scalars.squares, squares);
  }
};

// Up to kGroup items of one order.
template <class Isa>
GRNG_INLINE void damped_inverse_group(DampedInverse* const* items, int64_t count, float* memory) {
  const int64_t n = items[0]->factor.rows;
  const GroupLayout at(n);
  GroupScalars scalars;
  float* staged = memory + at.staged;
  float* raw = memory + at.raw;
  const auto each_vector = [&](const auto& f) GRNG_INLINE_LAMBDA {
    for (int64_t lane = 0; lane < kGroup; lane += Simd<Isa, float>::kLanes)
      f(LaneVector<Isa>{at, scalars, memory, lane});
  };
  const auto turn = [&](float* out, int64_t ldo, int64_t step_out, const float* in, int64_t ldi,
                        int64_t step_in) GRNG_INLINE_LAMBDA {
    for (int64_t e = 0; e < at.flat; e += kGroup)
      transpose16<Isa>(out + e * step_out, ldo, in + e * step_in, ldi);
  };

  for (int64_t l = 0; l < kGroup; ++l) {
    float* to = staged + l * at.flat;
    std::memset(to + n * n, 0, (at.flat - n * n) * sizeof(float));
    // Lanes to spare compute what the first one does.
    if (l < count)
      load_dense(to, items[l]->factor);
    else
      std::memcpy(to, staged, n * n * sizeof(float));
  }
  turn(raw, kGroup, kGroup, staged, at.flat, 1);
  each_vector([](const auto& v) GRNG_INLINE_LAMBDA { v.find_largest(); });

  int exponents[kGroup];
  std::memset(memory + at.z, 0, at.padded * kGroup * sizeof(float));
  for (int64_t l = 0; l < kGroup; ++l) {
    const DampedInverse& item = *items[l < count ? l : 0];
    float& largest = scalars.largest.at[l];
    scalars.legal[l] = std::isfinite(largest) &&
                       (item.relative || (item.damping > 0 && std::isfinite(item.damping)));
    if (!scalars.legal[l]) {
      for (int64_t e = 0; e < n * n; ++e) raw[e * kGroup + l] = e % (n + 1) == 0 ? 1.0f : 0.0f;
      largest = 1;
    }
    int exponent = 1;
    if (largest > 0) std::frexp(largest, &exponent);
    if (!item.relative && scalars.legal[l]) {
      int of_damping;
      std::frexp(item.damping, &of_damping);
      exponent = std::max(exponent, of_damping - kDampingBits);
    }
    exponents[l] = exponent;
    const PowerOfTwo down(-exponent), up(exponent);
    scalars.first.at[l] = down.first;
    scalars.half.at[l] = 0.5f * down.second;
    scalars.up_first.at[l] = up.first;
    scalars.up_second.at[l] = up.second;
    double given = 0;
    if (item.vector)
      for (int64_t i = 0; i < n; ++i) given += double{item.vector[i]} * item.vector[i];
    // A length at the ends of the range of fp32 is no start; its inverse would leave it.
    const bool warm = given > 1e-60 && given < 1e60;
    if (warm)
      for (int64_t i = 0; i < n; ++i) memory[at.z + i * kGroup + l] = item.vector[i];
    scalars.warm.at[l] = warm ? 1.0f : 0.0f;
    scalars.given_scale.at[l] = warm ? static_cast<float>(1 / std::sqrt(given)) : 0.0f;
    scalars.any_warm |= warm;
    scalars.all_warm &= warm;
  }
  each_vector([](const auto& v) GRNG_INLINE_LAMBDA {
    v.symmetrise();
    v.norm();
  });
  bool symmetric[kGroup];
  for (int64_t l = 0; l < kGroup; ++l) {
    const DampedInverse& item = *items[l < count ? l : 0];
    const PowerOfTwo down(-exponents[l]);
    const float floor = down.times(kFloor), damping = static_cast<float>(item.damping);
    const float share = asymmetry_limit(item.factor.dtype) * down.times(scalars.largest.at[l]);
    symmetric[l] = scalars.asymmetry.at[l] <= std::max(share, floor);
    scalars.shift.at[l] = !scalars.legal[l] ? 1.0f
                          : item.relative   ? std::max(damping * scalars.norm.at[l], floor)
                                            : down.times(damping);
  }
  each_vector([](const auto& v) GRNG_INLINE_LAMBDA {
    v.invert();
    v.finish();
    v.residual();
  });

  turn(staged, at.flat, 1, raw, kGroup, kGroup);
  for (int64_t l = 0; l < count; ++l) {
    DampedInverse& item = *items[l];
    const PowerOfTwo up(exponents[l]);
    item.used = item.norm = 0;
    const bool positive = scalars.positive.at[l] > 0;
    if (scalars.legal[l]) {
      item.norm = up.times(scalars.norm.at[l]);
      item.used = up.times(scalars.shift.at[l]);
    }
    if (!scalars.legal[l] || !positive) {
      item.info = !scalars.legal[l] ? kNonfiniteInput : symmetric[l] ? kNotConverged : kAsymmetric;
      item.residual = scalars.legal[l] ? std::numeric_limits<float>::infinity()
                                       : std::numeric_limits<float>::quiet_NaN();
      std::memset(item.inverse, 0, n * n * sizeof(float));
      continue;
    }
    std::memcpy(item.inverse, staged + l * at.flat, n * n * sizeof(float));
    item.residual = std::sqrt(scalars.squares.at[l] / static_cast<float>(n));
    if (!symmetric[l]) {
      item.info = kAsymmetric;
    } else if (!std::isfinite(scalars.written.at[l])) {
      item.info = kOverflow;
    } else if (!(item.residual <= kResidualLimit)) {
      item.info = kNotConverged;
    } else {
      item.info = kOk;
      if (item.vector)
        for (int64_t i = 0; i < n; ++i) item.vector[i] = memory[at.x + i * kGroup + l];
    }
  }
}

}  // namespace grng
