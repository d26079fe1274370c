// SPDX-License-Identifier: Apache-2.0
#include "kalman_kronecker.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "kalman_rows.h"
#include "simd.h"

namespace grng::kalman {
namespace {

// Elements of a slice, at least; the cut depends on the shapes alone.
constexpr int64_t kSliceElements = 16384;
// Products that are added in one lane of fp32 before the sum goes on in fp64.
constexpr int64_t kLaneSum = 64;
// Rows that share what is loaded of x.
constexpr int kRowsAtOnce = 4;

int64_t padded(int64_t n) {
  constexpr int64_t kLine = kCacheLine / sizeof(float);
  return (n + kLine - 1) / kLine * kLine;
}

// `n` elements and zeros to the end of a cache line.
template <class Isa>
GRNG_INLINE bool all_finite(const float* values, int64_t n) {
  return std::isfinite(largest_magnitude<Isa>(values, padded(n)));
}

// Of variances within fp32 a mean is, too; rounding must not make it infinite. `sum` has weights
// that add up to a half, so that no sum on the way leaves the range.
float mean_of(double sum) {
  constexpr double kMax = std::numeric_limits<float>::max();
  return static_cast<float>(std::isfinite(sum) ? std::min(2 * sum, kMax) : sum);
}

// sums[r] = row r of the variances times the squares, and what there is to know of the state.
template <class Isa, int kRows>
GRNG_INLINE void weigh_rows(double* sums, Seen<Isa>& seen, const float* mean, const float* variance,
                            const float* squares, int64_t cols) {
  using S = Simd<Isa, float>;
  using Vec = typename S::Vec;
  const int64_t whole = cols - cols % S::kLanes;
  for (int64_t k = 0; k < cols;) {
    Vec acc[4] = {};
    Seen<Isa> now = seen;
    const int64_t end = std::min(whole, k + kLaneSum * S::kLanes);
    for (; k < end; k += S::kLanes) {
      const Vec x = S::load_once(squares + k);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const Vec p = S::load_once(variance + r * cols + k);
        acc[r] += p * x;
        now.look(S::load(mean + r * cols + k), p);
      }
    }
    if (k == whole && k < cols) {
      const Vec x = S::load(squares + k);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        alignas(64) float m[S::kLanes], v[S::kLanes];
        copy_padded(m, mean + r * cols + k, cols - k, S::kLanes);
        copy_padded(v, variance + r * cols + k, cols - k, S::kLanes);
        acc[r] += S::load(v) * x;
        now.look(S::load(m), S::load(v));
      }
      k = cols;
    }
    seen = now;
    float four[4];
    S::sum4(four, acc);
    for (int r = 0; r < kRows; ++r) sums[r] += static_cast<double>(four[r]);
  }
}

template <class Isa>
GRNG_INLINE void apply_row(float* mean, float* variance, const float* x, const float* squares,
                           const float* pull, const float* weight, const Prediction& next,
                           int64_t cols) {
  using S = Simd<Isa, float>;
  using Vec = typename S::Vec;
  const Vec u = S::broadcast(pull), q = S::broadcast(weight);
  const auto write = [&](float* m, float* v, int64_t k) GRNG_INLINE_LAMBDA {
    const Vec p = S::load(v);
    write_state<Isa>(m, v, p * S::load(x + k) * u, p * S::load(squares + k) * q, next);
  };
  const int64_t whole = cols - cols % S::kLanes;
  for (int64_t k = 0; k < whole; k += S::kLanes) write(mean + k, variance + k, k);
  if (whole == cols) return;
  alignas(64) float m[S::kLanes], v[S::kLanes];
  copy_padded(m, mean + whole, cols - whole, S::kLanes);
  copy_padded(v, variance + whole, cols - whole, S::kLanes);
  write(m, v, whole);
  std::copy(m, m + (cols - whole), mean + whole);
  std::copy(v, v + (cols - whole), variance + whole);
}

}  // namespace

KroneckerBlocks::KroneckerBlocks(const KalmanPiece* blocks, int64_t count, int64_t outputs)
    : outputs_(outputs), memory_(nullptr, std::free) {
  int64_t size = 0;
  const auto taken = [&](const KalmanPiece& b) {
    return b.is_factored() && b.jacobian.cols > 0 && b.inputs.cols > 0 && outputs > 0;
  };
  const auto room = [&](const KalmanPiece& b) {
    return 2 * padded(b.inputs.cols) + (outputs + 4) * padded(b.jacobian.cols);
  };
  for (int64_t i = 0; i < count; ++i)
    if (taken(blocks[i])) size += room(blocks[i]);
  memory_ = allocate<float>(size);
  float* next = memory_.get();
  const auto piece = [&](int64_t n) {
    float* const mine = next;
    next += padded(n);
    return mine;
  };
  for (int64_t i = 0; i < count; ++i) {
    const KalmanPiece& given = blocks[i];
    if (!taken(given)) continue;
    Block b{};
    b.mean = given.mean;
    b.variance = given.variance;
    b.rows = given.jacobian.cols;
    b.cols = given.inputs.cols;
    for (float** part : {&b.x, &b.squares}) *part = piece(b.cols);
    for (float** part : {&b.y, &b.zeros, &b.pull, &b.weight}) {
      *part = piece(b.rows);
      std::fill_n(*part, padded(b.rows), 0.0F);
    }
    b.g = next;
    next += outputs * padded(b.rows);
    for_this_cpu([&](auto isa) GRNG_INLINE_LAMBDA { fill<decltype(isa)>(b, given); });
    // The mean of a term is nothing that will be written: it has no magnitude.
    terms_.push_back(
        {b.zeros, b.y, {b.g, Dtype::kFloat32, outputs, b.rows, padded(b.rows), 1}, {}});
    blocks_.push_back(b);
  }
  for (const Block& b : blocks_) {
    // Whole groups of rows, so that no group depends on the cut.
    const int64_t groups = (kSliceElements / kRowsAtOnce + b.cols - 1) / b.cols;
    for (int64_t row = 0; row < b.rows; row += groups * kRowsAtOnce)
      slices_.push_back({&b, row, std::min(b.rows, row + groups * kRowsAtOnce)});
  }
}

template <class Isa>
GRNG_INLINE void KroneckerBlocks::fill(Block& b, const KalmanPiece& given) {
  fetch_row(b.x, given.inputs, 0, 0, b.cols, padded(b.cols));
  const double largest = largest_magnitude<Isa>(b.x, padded(b.cols));
  finite_ &= std::isfinite(largest);
  int exponent = 0;
  if (std::isfinite(largest)) std::frexp(largest, &exponent);
  const double unit = std::ldexp(1.0, -exponent);
  double square = 0;
  for (int64_t k = 0; k < padded(b.cols); ++k) {
    b.x[k] = static_cast<float>(static_cast<double>(b.x[k]) * unit);
    square += static_cast<double>(b.x[k]) * static_cast<double>(b.x[k]);
  }
  b.norm = std::sqrt(square);
  const double half = square > 0 ? 0.5 / square : 0;
  for (int64_t k = 0; k < padded(b.cols); ++k)
    b.squares[k] =
        static_cast<float>(static_cast<double>(b.x[k]) * static_cast<double>(b.x[k]) * half);
  const double length = std::ldexp(b.norm, exponent);
  for (int64_t c = 0; c < outputs_; ++c) {
    float* const row = b.g + c * padded(b.rows);
    fetch_row(row, given.jacobian, c, 0, b.rows, padded(b.rows));
    finite_ &= all_finite<Isa>(row, b.rows);
    for (int64_t k = 0; k < b.rows; ++k)
      row[k] = static_cast<float>(static_cast<double>(row[k]) * length);
  }
}

Extremes KroneckerBlocks::weigh(const Threads& threads) {
  std::vector<Extremes> found(slices_.size());
  threads.run(static_cast<int64_t>(slices_.size()), 1, [&](int64_t begin, int64_t end) {
    for_this_cpu([&](auto isa) GRNG_INLINE_LAMBDA {
      using Isa = decltype(isa);
      for (int64_t s = begin; s < end; ++s) {
        const Block& b = *slices_[s].block;
        Seen<Isa> seen;
        for (int64_t i = slices_[s].begin, n; i < slices_[s].end; i += n) {
          double sums[kRowsAtOnce] = {};
          const float *mean = b.mean + i * b.cols, *variance = b.variance + i * b.cols;
          n = slices_[s].end - i >= kRowsAtOnce ? kRowsAtOnce : 1;
          if (n > 1) {
            weigh_rows<Isa, kRowsAtOnce>(sums, seen, mean, variance, b.squares, b.cols);
          } else {
            weigh_rows<Isa, 1>(sums, seen, mean, variance, b.squares, b.cols);
          }
          for (int64_t r = 0; r < n; ++r) b.y[i + r] = mean_of(sums[r]);
        }
        found[s] = seen.extremes();
      }
    });
  });
  Extremes all;
  for (const Extremes& one : found) all.include(one);
  return all;
}

template <class Isa>
GRNG_INLINE void KroneckerBlocks::prepare_rows(const Slice& strip, float* room,
                                               const float* direction, const float* packed,
                                               const int64_t* extents) const {
  constexpr int64_t kWidth = kStrip<Isa>;
  const Block& b = *strip.block;
  const int64_t n = strip.end - strip.begin;
  double pull[kWidth] = {};
  for (int64_t c = 0; c < outputs_; ++c) {
    float* const s = room + c * kWidth;
    copy_padded(s, b.g + c * padded(b.rows) + strip.begin, n, kWidth);
    const double u = static_cast<double>(direction[c]);
    for (int64_t l = 0; l < kWidth; ++l) pull[l] += u * static_cast<double>(s[l]);
  }
  alignas(64) float t[kWidth];
  squares_of_strip<Isa>(t, room, packed, extents, outputs_);
  const double scale = b.norm > 0 ? 1 / b.norm : 0;
  for (int64_t l = 0; l < n; ++l) {
    b.pull[strip.begin + l] = static_cast<float>(pull[l] * scale);
    b.weight[strip.begin + l] = 2 * t[l];
  }
}

bool KroneckerBlocks::prepare(const KalmanGain& gain, const Threads& threads) {
  if (blocks_.empty()) return true;
  std::vector<float> packed(static_cast<size_t>(padded_rows(outputs_) * outputs_));
  std::vector<int64_t> extents(static_cast<size_t>(outputs_));
  const int64_t room = outputs_ * kStrip<Avx512>;  // of the widest instruction set
  const Buffer<float> rooms = allocate<float>(threads.count * room);
  std::vector<Slice> strips;
  for_this_cpu([&](auto isa) GRNG_INLINE_LAMBDA {
    using Isa = decltype(isa);
    pack_whitener<Isa>(packed.data(), extents.data(), gain.whitener, outputs_);
    for (const Block& b : blocks_)
      for (int64_t i = 0; i < b.rows; i += kStrip<Isa>)
        strips.push_back({&b, i, std::min(b.rows, i + kStrip<Isa>)});
  });
  std::atomic<int64_t> next_room{0};
  // A grain: small products are not worth another thread.
  const int64_t grain = std::max<int64_t>(1, 65536 / (outputs_ * outputs_));
  threads.run(static_cast<int64_t>(strips.size()), grain, [&](int64_t begin, int64_t end) {
    float* const mine = rooms.get() + next_room++ * room;
    for_this_cpu([&](auto isa) GRNG_INLINE_LAMBDA {
      for (int64_t i = begin; i < end; ++i)
        prepare_rows<decltype(isa)>(strips[i], mine, gain.direction, packed.data(), extents.data());
    });
  });
  bool within = true;
  for_this_cpu([&](auto isa) GRNG_INLINE_LAMBDA {
    using Isa = decltype(isa);
    for (const Block& b : blocks_)
      within &= all_finite<Isa>(b.pull, b.rows) && all_finite<Isa>(b.weight, b.rows);
  });
  return within;
}

void KroneckerBlocks::apply(const Prediction& next, const Threads& threads) {
  threads.run(static_cast<int64_t>(slices_.size()), 1, [&](int64_t begin, int64_t end) {
    for_this_cpu([&](auto isa) GRNG_INLINE_LAMBDA {
      // Backwards: what the first pass read last is still in the caches.
      for (int64_t s = end - 1; s >= begin; --s) {
        const Block& b = *slices_[s].block;
        for (int64_t i = slices_[s].end - 1; i >= slices_[s].begin; --i)
          apply_row<decltype(isa)>(b.mean + i * b.cols, b.variance + i * b.cols, b.x, b.squares,
                                   b.pull + i, b.weight + i, next, b.cols);
      }
    });
  });
}

}  // namespace grng::kalman
