// SPDX-License-Identifier: Apache-2.0
// The two streaming passes of the diagonal Kalman update on the CPU.
//
// Pass 1 forms H diag(p) H^T, pass 2 applies the gain. Both walk the parameters in chunks that fit
// in L1, so H is read from memory once per pass and neither H*p nor the gain is ever stored.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "../kernels.h"
#include "parallel.h"
#include "simd.h"

namespace grng {
namespace {

constexpr int64_t kChunk = 256;  // elements; 16 rows of H in 16 KiB
constexpr int kRowTile = 4;

// ---- pass 1 ----

// The sums depend on how d is cut, so the cut depends on d alone: the result is the same for any
// number of threads. At most 64 slices bounds the memory of their partial sums.
constexpr int64_t kMaxSlices = 64, kMinSlice = 8192;

int64_t slice_length(int64_t d) {
  const int64_t length = std::max(kMinSlice, (d + kMaxSlices - 1) / kMaxSlices);
  return (length + kChunk - 1) / kChunk * kChunk;
}

// gram[i0+i][j0+j] += sum over the chunk of weighted[i] * h[j], for a tile of rows. Chunks are
// padded with zeros to whole vectors.
template <class Isa>
GRNG_INLINE void add_products(double* gram, int64_t outputs, const float* weighted, const float* h,
                              int64_t i0, int64_t j0, int64_t length) {
  using S = Simd<Isa, float>;
  typename S::Vec acc[kRowTile][kRowTile] = {};
  for (int64_t k = 0; k < length; k += S::kLanes) {
    typename S::Vec b[kRowTile];
#pragma GCC unroll 4
    for (int j = 0; j < kRowTile; ++j) b[j] = S::load(h + (j0 + j) * kChunk + k);
#pragma GCC unroll 4
    for (int i = 0; i < kRowTile; ++i) {
      const typename S::Vec a = S::load(weighted + (i0 + i) * kChunk + k);
#pragma GCC unroll 4
      for (int j = 0; j < kRowTile; ++j) acc[i][j] += a * b[j];
    }
  }
  for (int i = 0; i < std::min<int64_t>(kRowTile, outputs - i0); ++i)
    for (int j = 0; j < std::min<int64_t>(kRowTile, outputs - j0); ++j)
      if (j0 + j <= i0 + i) gram[(i0 + i) * outputs + j0 + j] += S::sum(acc[i][j]);
}

int64_t padded_rows(int64_t outputs) { return (outputs + kRowTile - 1) / kRowTile * kRowTile; }

// Lower triangle of H diag(p) H^T over the elements [begin, end). scratch holds 2 * padded_rows(C)
// chunks, zero in the padded rows.
template <class Isa>
GRNG_INLINE void gram_range(double* gram, float* scratch, const KalmanBlock& block, int64_t outputs,
                            int64_t begin, int64_t end) {
  constexpr int64_t kLanes = Simd<Isa, float>::kLanes;
  const int64_t rows = padded_rows(outputs);
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  float *h = scratch, *weighted = scratch + rows * kChunk;
  for (int64_t k = begin; k < end; k += kChunk) {
    const int64_t length = std::min(kChunk, end - k),
                  whole = (length + kLanes - 1) / kLanes * kLanes;
    for (int64_t c = 0; c < outputs; ++c) {
      const float* in = block.jacobian + c * block.row_stride + k;
      const float* p = block.variance + k;
      float *row = h + c * kChunk, *product = weighted + c * kChunk;
      for (int64_t i = 0; i < length; ++i) {
        row[i] = in[i];
        // A negative variance is an error of the caller; as NaN it reaches the check of the gram.
        product[i] = (p[i] >= 0 ? p[i] : kNaN) * in[i];
      }
      for (int64_t i = length; i < whole; ++i) row[i] = product[i] = 0;
    }
    for (int64_t i = 0; i < outputs; i += kRowTile)
      for (int64_t j = 0; j <= i; j += kRowTile)
        add_products<Isa>(gram, outputs, weighted, h, i, j, whole);
  }
}

// ---- pass 2 ----

// y[r][:] = sum over c < extent[r] of W[r][c] * s[c][:] for a tile of rows; returns by adding the
// squares to t. `extent` skips the zeros of a triangular W.
template <class Isa>
GRNG_INLINE void add_squares(float* t, const float* s, const float* whitener, int64_t outputs,
                             int64_t r0, int64_t extent, int64_t length) {
  using S = Simd<Isa, float>;
  constexpr int kVecs = 2;
  const int rows = static_cast<int>(std::min<int64_t>(kRowTile, outputs - r0));
  const float* w[kRowTile];
  for (int r = 0; r < kRowTile; ++r) w[r] = whitener + (r0 + std::min(r, rows - 1)) * outputs;
  for (int64_t k = 0; k < length; k += kVecs * S::kLanes) {
    typename S::Vec acc[kRowTile][kVecs] = {};
    for (int64_t c = 0; c < extent; ++c) {
      typename S::Vec b[kVecs];
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) b[v] = S::load(s + c * kChunk + k + v * S::kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < kRowTile; ++r) {
        const typename S::Vec a = S::broadcast(w[r] + c);
#pragma GCC unroll 2
        for (int v = 0; v < kVecs; ++v) acc[r][v] += a * b[v];
      }
    }
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) {
      typename S::Vec total = S::load(t + k + v * S::kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < kRowTile; ++r)
        if (r < rows) total += acc[r][v] * acc[r][v];
      S::store(t + k + v * S::kLanes, total);
    }
  }
}

// Everything is scaled by sqrt(p): s = sqrt(p) h has squares below trace(S), so no product leaves
// the range of fp32 that S itself has not left.
template <class Isa>
GRNG_INLINE void apply_range(const KalmanBlock& block, const KalmanGain& gain,
                             const int64_t* extent, float* scratch, int64_t begin, int64_t end) {
  float *s = scratch, *root = s + gain.outputs * kChunk, *t = root + kChunk, *step = t + kChunk;
  for (int64_t k = begin; k < end; k += kChunk) {
    const int64_t length = std::min(kChunk, end - k);
    float *mean = block.mean + k, *variance = block.variance + k;
    for (int64_t i = 0; i < length; ++i) root[i] = std::sqrt(variance[i]);
    for (int64_t i = 0; i < kChunk; ++i) t[i] = step[i] = 0;
    for (int64_t c = 0; c < gain.outputs; ++c) {
      const float* in = block.jacobian + c * block.row_stride + k;
      const float direction = gain.direction[c];
      float* row = s + c * kChunk;
      for (int64_t i = 0; i < length; ++i) {
        row[i] = root[i] * in[i];
        step[i] += row[i] * direction;
      }
      for (int64_t i = length; i < kChunk; ++i) row[i] = 0;
    }
    for (int64_t r = 0; r < gain.outputs; r += kRowTile)
      add_squares<Isa>(t, s, gain.whitener, gain.outputs, r, extent[r / kRowTile], kChunk);
    constexpr float kEps = std::numeric_limits<float>::epsilon();
    constexpr float kMax = std::numeric_limits<float>::max();
    for (int64_t i = 0; i < length; ++i) {
      mean[i] += root[i] * step[i];
      // 1 - t > 0 in exact arithmetic; rounding must not make it zero or negative.
      const float posterior =
          gain.variational ? variance[i] / (1 + t[i]) : variance[i] * std::max(1 - t[i], kEps);
      variance[i] = std::min(posterior / gain.forgetting + gain.process_noise, kMax);
    }
  }
}

}  // namespace

void kalman_gram_cpu(double* gram, const KalmanBlock& block, int64_t outputs,
                     const Threads& threads) {
  const int64_t length = slice_length(block.d), slices = (block.d + length - 1) / length;
  std::vector<double> partial(slices * outputs * outputs);
  threads.run(slices, 1, [&](int64_t b, int64_t e) {
    std::vector<float> scratch(2 * padded_rows(outputs) * kChunk);
    for_this_cpu([&](auto isa) {
      for (int64_t s = b; s < e; ++s)
        gram_range<decltype(isa)>(partial.data() + s * outputs * outputs, scratch.data(), block,
                                  outputs, s * length, std::min(block.d, (s + 1) * length));
    });
  });
  for (int64_t s = 0; s < slices; ++s) {
    const double* in = partial.data() + s * outputs * outputs;
    for (int64_t i = 0; i < outputs; ++i)
      for (int64_t j = 0; j <= i; ++j) {
        gram[i * outputs + j] += in[i * outputs + j];
        gram[j * outputs + i] = gram[i * outputs + j];
      }
  }
}

void kalman_apply_cpu(const KalmanBlock* blocks, int64_t count, const KalmanGain& gain,
                      const Threads& threads) {
  std::vector<int64_t> extent((gain.outputs + kRowTile - 1) / kRowTile);
  for (int64_t r = 0; r < gain.outputs; ++r)
    for (int64_t c = 0; c < gain.outputs; ++c)
      if (gain.whitener[r * gain.outputs + c] != 0)
        extent[r / kRowTile] = std::max(extent[r / kRowTile], c + 1);
  // All of it before any block is written: where there is no memory, no block has been.
  const int64_t size = (gain.outputs + 3) * kChunk;
  const Buffer<float> scratch = allocate<float>(threads.count * size);
  for (const KalmanBlock* block = blocks; block < blocks + count; ++block) {
    const int64_t chunks = (block->d + kChunk - 1) / kChunk;
    std::atomic<int64_t> next_slot{0};
    threads.run(chunks, 8, [&](int64_t b, int64_t e) {
      float* const mine = scratch.get() + next_slot++ * size;
      for_this_cpu([&](auto isa) {
        apply_range<decltype(isa)>(*block, gain, extent.data(), mine, b * kChunk,
                                   std::min(block->d, e * kChunk));
      });
    });
  }
}

}  // namespace grng
