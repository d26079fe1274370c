// SPDX-License-Identifier: Apache-2.0
// The largest eigenvalue of a symmetric positive semidefinite fp32 matrix of moderate scale, from a
// few products with a vector: what grng_kernels/damped_inverse/spectral_norm.py estimates.
//
// The Lanczos process takes more out of each product than power iteration does: eight products from
// a cold start come closer than sixteen power steps. Rows are padded with zeros to cache lines.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "elements.h"
#include "parallel.h"
#include "simd.h"

namespace grng {

constexpr int kColdProducts = 8, kWarmProducts = 4;
// Power steps for a matrix of an order up to kPowerOrder, multiples of four.
constexpr int kColdSteps = 16, kWarmSteps = 8;
constexpr int64_t kPowerOrder = 128;
// An estimate from below; one that is a little high only damps a little more.
constexpr float kNormSafety = 1.02f;
// Some of the cold start lets a vector that became orthogonal to the leading one recover at once.
constexpr float kColdShare = 0.1f;
// Rows of a product that one thread takes at a time.
constexpr int64_t kNormRows = 32;

// Floats of workspace for order n (padded): the Lanczos vectors and one more.
constexpr int64_t spectral_norm_workspace(int64_t padded) { return (kColdProducts + 2) * padded; }

template <class Isa>
GRNG_INLINE float dot(const float* a, const float* b, int64_t n) {
  using S = Simd<Isa, float>;
  constexpr int kVecs = 64 / Isa::kVectorBytes;
  typename S::Vec sum[kVecs] = {};
  for (int64_t i = 0; i < n; i += 16)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v)
      sum[v] += S::load(a + i + v * S::kLanes) * S::load(b + i + v * S::kLanes);
  double total = 0;
  for (const auto& s : sum) total += S::sum(s);
  return static_cast<float>(total);
}

// y += f x
template <class Isa>
GRNG_INLINE void add_scaled(float* y, float f, const float* x, int64_t n) {
  using S = Simd<Isa, float>;
  for (int64_t i = 0; i < n; i += S::kLanes) S::store(y + i, S::load(y + i) + f * S::load(x + i));
}

template <class Isa>
GRNG_INLINE void scale_by(float* y, float f, int64_t n) {
  using S = Simd<Isa, float>;
  for (int64_t i = 0; i < n; i += S::kLanes) S::store(y + i, f * S::load(y + i));
}

// y <- f x for four rows of the matrix at `row`.
template <class Isa>
GRNG_INLINE void multiply_rows4(float* y, const float* row, int64_t ld, const float* x, int64_t n) {
  using S = Simd<Isa, float>;
  constexpr int kVecs = 64 / Isa::kVectorBytes;
  typename S::Vec sum[4][kVecs] = {};
  for (int64_t j = 0; j < n; j += 16)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      const auto b = S::load_once(x + j + v * S::kLanes);
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t) sum[t][v] += S::load(row + t * ld + j + v * S::kLanes) * b;
    }
  typename S::Vec all[4];
  for (int t = 0; t < 4; ++t) {
    all[t] = sum[t][0];
    for (int v = 1; v < kVecs; ++v) all[t] += sum[t][v];
  }
  S::sum4(y, all);
}

// y <- a x, the padded order.
template <class Isa>
GRNG_INLINE void multiply_vector(float* y, const float* a, int64_t padded, const float* x,
                                 const Loop<Isa>& each) {
  each((padded + kNormRows - 1) / kNormRows, [=](int64_t block) GRNG_INLINE_LAMBDA {
    const int64_t end = std::min(padded, (block + 1) * kNormRows);
    for (int64_t i = block * kNormRows; i < end; i += 4)
      multiply_rows4<Isa>(y + i, a + i * padded, padded, x, padded);
  });
}

// Of a symmetric tridiagonal PSD matrix: the largest eigenvalue, and its vector of unit length.
inline double leading_pair(const double* diagonal, const double* off, int k, double* vector) {
  double y[kColdProducts] = {}, length = 0;
  for (int i = 0; i < k; ++i) vector[i] = 1;
  const auto multiply = [&] {
    for (int i = 0; i < k; ++i)
      y[i] = diagonal[i] * vector[i] + (i > 0 ? off[i - 1] * vector[i - 1] : 0) +
             (i + 1 < k ? off[i] * vector[i + 1] : 0);
  };
  // Power iteration: where it has not converged, the eigenvalues are as close as makes no matter.
  for (int round = 0; round < 12; ++round) {
    for (int step = 0; step < 8; ++step) {
      multiply();
      for (int i = 0; i < k; ++i) vector[i] = y[i];
    }
    length = 0;
    for (int i = 0; i < k; ++i) length += vector[i] * vector[i];
    if (!(length > 0)) return 0;
    for (int i = 0; i < k; ++i) vector[i] /= std::sqrt(length);
  }
  multiply();
  double value = 0;
  for (int i = 0; i < k; ++i) value += vector[i] * y[i];
  return value;
}

// y <- a x, `kLines` cache lines of it from column c on; a is symmetric, so rows serve as columns.
template <class Isa, int kLines>
GRNG_INLINE void multiply_lines(float* y, const float* a, int64_t padded, const float* x,
                                int64_t c) {
  using S = Simd<Isa, float>;
  constexpr int kVecs = kLines * 64 / Isa::kVectorBytes;
  // Two sums each, so that a narrow one does not wait for itself.
  typename S::Vec even[kVecs] = {}, odd[kVecs] = {};
  for (int64_t j = 0; j < padded; j += 2) {
    const auto first = S::broadcast(x + j), second = S::broadcast(x + j + 1);
#pragma GCC unroll 16
    for (int v = 0; v < kVecs; ++v) {
      even[v] += first * S::load(a + j * padded + c + v * S::kLanes);
      odd[v] += second * S::load(a + (j + 1) * padded + c + v * S::kLanes);
    }
  }
  for (int v = 0; v < kVecs; ++v) S::store(y + c + v * S::kLanes, even[v] + odd[v]);
}

// Power iteration for a matrix that lies in L1 or L2, where a product costs next to nothing and the
// sums of Lanczos would be most of the time. `x` is the start and becomes the vector.
template <class Isa>
GRNG_INLINE double power_iteration(const float* a, int64_t padded, float* x, float* y, int steps) {
  const auto multiply = [=](float* out, const float* in) GRNG_INLINE_LAMBDA {
    int64_t c = 0;
    for (; c + 64 <= padded; c += 64) multiply_lines<Isa, 4>(out, a, padded, in, c);
    for (; c < padded; c += 16) multiply_lines<Isa, 1>(out, a, padded, in, c);
  };
  // Entries are at most 1, so four products cannot leave the range.
  for (int step = 0; step < steps; step += 4) {
    multiply(y, x);
    multiply(x, y);
    multiply(y, x);
    multiply(x, y);
    const float square = dot<Isa>(x, x, padded);
    // Where asymmetry was all there was, nothing is left of the matrix, and the vector underflows.
    if (!(square > 0)) return 0;
    scale_by<Isa>(x, 1 / std::sqrt(square), padded);
  }
  multiply(y, x);
  return dot<Isa>(x, y, padded);
}

// The estimate, between the largest diagonal entry and the least of the infinity, Frobenius and
// trace norms. `vector` [n] is a start, all zero (or not finite) for none, and is replaced by an
// approximate eigenvector of unit length. `a` is [padded, padded], its largest entry near 1.
template <class Isa>
GRNG_INLINE float spectral_norm(const float* a, int64_t n, int64_t padded, float* vector,
                                float* workspace, const Loop<Isa>& each) {
  float* basis = workspace;
  float* next = workspace + kColdProducts * padded;
  // Bounds and the cold start: the longest row, which has a part along the leading eigenvector.
  float* sums = next;
  float* squares = next + padded;
  each((padded + kNormRows - 1) / kNormRows, [=](int64_t block) GRNG_INLINE_LAMBDA {
    using S = Simd<Isa, float>;
    const int64_t end = std::min(padded, (block + 1) * kNormRows);
    for (int64_t i = block * kNormRows; i < end; i += 4) {
      typename S::Vec sum[4] = {}, square[4] = {};
      for (int64_t j = 0; j < padded; j += S::kLanes)
#pragma GCC unroll 4
        for (int t = 0; t < 4; ++t) {
          const auto v = S::load(a + (i + t) * padded + j);
          sum[t] += v < 0 ? -v : v;
          square[t] += v * v;
        }
      S::sum4(sums + i, sum);
      S::sum4(squares + i, square);
    }
  });
  double infinity = 0, frobenius = 0, trace = 0, diagonal = 0;
  int64_t longest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double entry = a[i * padded + i];
    infinity = std::max(infinity, double{sums[i]});
    frobenius += squares[i];
    trace += entry;
    diagonal = std::max(diagonal, entry);
    if (squares[i] > squares[longest]) longest = i;
  }
  const double length = std::sqrt(double{squares[longest]});
  if (!(length > 0)) {
    std::memset(vector, 0, n * sizeof(float));
    return 0;
  }
  double given = 0;
  for (int64_t i = 0; i < n; ++i) given += double{vector[i]} * vector[i];
  // A length at the ends of the range of fp32 is no start; its inverse would leave it.
  const bool warm = given > 1e-60 && given < 1e60;
  const float cold_share = static_cast<float>((warm ? kColdShare : 1.0f) / length);
  std::memset(basis, 0, padded * sizeof(float));
  if (warm) {
    std::memcpy(basis, vector, n * sizeof(float));
    scale_by<Isa>(basis, static_cast<float>(1 / std::sqrt(given)), padded);
  }
  add_scaled<Isa>(basis, cold_share, a + longest * padded, padded);
  scale_by<Isa>(basis, 1 / std::sqrt(dot<Isa>(basis, basis, padded)), padded);

  const double bound = std::min({infinity, std::sqrt(frobenius), std::max(trace, diagonal)});
  const auto estimate = [=](double value) {
    return static_cast<float>(std::min(std::max(kNormSafety * value, diagonal), bound));
  };
  if (padded <= kPowerOrder) {
    const double value =
        power_iteration<Isa>(a, padded, basis, next, warm ? kWarmSteps : kColdSteps);
    std::memcpy(vector, basis, n * sizeof(float));
    return estimate(value);
  }
  double alpha[kColdProducts], beta[kColdProducts];
  int k = 0;
  for (const int products = warm ? kWarmProducts : kColdProducts; k < products;) {
    const float* q = basis + k * padded;
    multiply_vector<Isa>(next, a, padded, q, each);
    alpha[k] = dot<Isa>(q, next, padded);
    ++k;
    if (k == products) break;
    // Against all earlier vectors, twice: the recurrence alone loses orthogonality in fp32.
    for (int pass = 0; pass < 2; ++pass)
      for (int j = k - 1; j >= 0; --j)
        add_scaled<Isa>(next, -dot<Isa>(basis + j * padded, next, padded), basis + j * padded,
                        padded);
    const float rest = std::sqrt(dot<Isa>(next, next, padded));
    // The error of the value is at most the square of this share; less is rounding, not a
    // direction.
    if (!(rest > 1e-3 * alpha[0])) break;
    beta[k - 1] = rest;
    std::memcpy(basis + k * padded, next, padded * sizeof(float));
    scale_by<Isa>(basis + k * padded, 1 / rest, padded);
  }
  double weights[kColdProducts];
  const double value = leading_pair(alpha, beta, k, weights);
  std::memset(next, 0, padded * sizeof(float));
  for (int j = 0; j < k; ++j)
    add_scaled<Isa>(next, static_cast<float>(weights[j]), basis + j * padded, padded);
  std::memcpy(vector, next, n * sizeof(float));
  return estimate(value);
}

}  // namespace grng
