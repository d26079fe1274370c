// SPDX-License-Identifier: Apache-2.0
// The diagonal Kalman update on the CPU: a pass over the Jacobian that forms H diag(p) H^T and
// looks at the state, a small stage, and a pass that applies the gain. Both passes walk the
// parameters in chunks that fit in a cache, so H is read from memory once in each, and neither H*p
// nor the gain is ever stored. The blocks of parameters are one range of numbers to both: small
// ones cost nothing.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <iterator>
#include <limits>
#include <vector>

#include "../kernels.h"
#include "elements.h"
#include "kalman_gain.h"
#include "kalman_kronecker.h"
#include "kalman_rows.h"
#include "kalman_sweep.h"
#include "parallel.h"
#include "simd.h"

namespace grng {
namespace {

using namespace kalman;

// ---- the range of all parameters ----

// The sums depend on how the range is cut, so the cut depends on its length alone: the result is
// the same for any number of threads. At most 64 slices bounds the memory of their partial sums.
constexpr int64_t kMaxSlices = 64, kMinSlice = 8192;

struct Range {
  const KalmanPiece* blocks;
  int64_t count, outputs, length, slice, slices;
  std::vector<int64_t> starts;

  Range(const KalmanPiece* b, int64_t n, int64_t c) : blocks(b), count(n), outputs(c), starts(n) {
    length = 0;
    for (int64_t i = 0; i < n; ++i) {
      starts[i] = length;
      length += b[i].jacobian.cols;
    }
    slice = std::max(kMinSlice, (length + kMaxSlices - 1) / kMaxSlices);
    slice = (slice + kChunk - 1) / kChunk * kChunk;
    slices = (length + slice - 1) / slice;
  }

  // Calls f(block, first, length) for the chunks of a slice, from the last to the first on request.
  template <class F>
  GRNG_INLINE void for_chunks(int64_t number, bool backwards, const F& f) const {
    const int64_t begin = number * slice, end = std::min(length, begin + slice);
    const int64_t step = chunk_length(outputs);
    const auto after = [&](int64_t at) {
      return std::upper_bound(starts.begin(), starts.end(), at) - starts.begin();
    };
    const int64_t first = after(begin) - 1, last = after(end - 1) - 1;
    for (int64_t n = 0; n <= last - first; ++n) {
      const int64_t i = backwards ? last - n : first + n, d = blocks[i].jacobian.cols;
      const int64_t from = std::max<int64_t>(0, begin - starts[i]);
      const int64_t to = std::min(d, end - starts[i]), chunks = (to - from + step - 1) / step;
      for (int64_t c = 0; c < chunks; ++c) {
        const int64_t k = from + (backwards ? chunks - 1 - c : c) * step;
        f(blocks[i], k, std::min(step, to - k));
      }
    }
  }
};

// ---- rows of H ----

GRNG_INLINE bool is_direct(const ConstMatrix& h) {
  return h.dtype == Dtype::kFloat32 && (h.col_stride == 1 || h.cols <= 1);
}

// Calls f(mean, variance, rows, first, length) for parts of a chunk whose length is a multiple of
// the lanes: rows of H as they lie where that is possible, and padded copies where it is not. What
// f writes to the mean and the variance reaches the state. `room` holds outputs + 2 chunks.
template <class Isa, class F>
GRNG_INLINE void with_rows(const KalmanPiece& block, int64_t outputs, float* room, int64_t first,
                           int64_t length, bool written, const F& f) {
  const float* rows[kMaxNarrow];
  float *padded_mean = room + outputs * kChunk, *padded_variance = padded_mean + kChunk;
  for (int64_t done = 0, n; done < length; done += n) {
    float *mean = block.mean + first + done, *variance = block.variance + first + done;
    const int64_t left = length - done, lanes = left - left % Simd<Isa, float>::kLanes;
    const bool direct = is_direct(block.jacobian) && lanes > 0;
    // First what is whole vectors, without a copy where H is direct; then the rest, padded. All
    // layouts are cut the same way, so their sums are the same.
    n = lanes > 0 ? lanes : left;
    const int64_t whole = whole_lanes<Isa>(n);
    for (int64_t c = 0; c < outputs; ++c) {
      rows[c] = direct ? static_cast<const float*>(block.jacobian.data) +
                             c * block.jacobian.row_stride + first + done
                       : room + c * kChunk;
      if (!direct) fetch_row(room + c * kChunk, block.jacobian, c, first + done, n, whole);
    }
    if (whole > n) {
      copy_padded(padded_mean, mean, n, whole);
      copy_padded(padded_variance, variance, n, whole);
    }
    f(whole > n ? padded_mean : mean, whole > n ? padded_variance : variance, rows, whole);
    if (whole > n && written) {
      std::copy(padded_mean, padded_mean + n, mean);
      std::copy(padded_variance, padded_variance + n, variance);
    }
  }
}

// ---- pass 1 ----

// What one slice found: the packed lower triangles of its grams are in `sums`.
struct Slice {
  double* sums;  // weighted, and plain after it where that is wanted
  Extremes extremes;
};

int64_t gram_room(int64_t outputs) {
  return (padded_rows(outputs) + 6 + 2) * chunk_length(outputs) + kChunk * 2;
}

template <class Isa>
GRNG_INLINE void gram_narrow(Slice& out, const Range& range, bool plain, float* room,
                             int64_t number) {
  NarrowSums weighted, unweighted;
  const int64_t outputs = range.outputs, pairs = pairs_of(outputs);
  std::fill_n(weighted.lanes, pairs * kSumLanes, 0.0);
  if (plain) std::fill_n(unweighted.lanes, pairs * kSumLanes, 0.0);
  range.for_chunks(number, false,
                   [&](const KalmanPiece& block, int64_t first, int64_t length) GRNG_INLINE_LAMBDA {
                     with_rows<Isa>(
                         block, outputs, room, first, length, false,
                         [&](const float* mean, const float* variance, const float* const* rows,
                             int64_t n) GRNG_INLINE_LAMBDA {
                           look_at_state<Isa>(out.extremes, mean, variance, n);
                           add_narrow<Isa, true>(weighted.lanes, variance, rows, outputs, n);
                           if (plain)
                             add_narrow<Isa, false>(unweighted.lanes, nullptr, rows, outputs, n);
                         });
                   });
  for (int64_t i = 0; i < pairs * kSumLanes; ++i) {
    out.sums[i / kSumLanes] += weighted.lanes[i];
    if (plain) out.sums[pairs + i / kSumLanes] += unweighted.lanes[i];
  }
}

template <class Isa>
GRNG_INLINE void gram_wide(Slice& out, const Range& range, bool plain, float* room,
                           int64_t number) {
  const int64_t outputs = range.outputs, stride = chunk_length(outputs);
  const int64_t rows = padded_rows(outputs);
  float *left = room + rows * stride, *mean = left + 6 * stride, *variance = mean + stride;
  std::fill(room + outputs * stride, room + rows * stride, 0.0F);
  range.for_chunks(number, false,
                   [&](const KalmanPiece& block, int64_t first, int64_t length) GRNG_INLINE_LAMBDA {
                     const int64_t whole = whole_lanes<Isa>(length);
                     for (int64_t c = 0; c < outputs; ++c)
                       fetch_row(room + c * stride, block.jacobian, c, first, length, whole);
                     copy_padded(variance, block.variance + first, length, whole);
                     copy_padded(mean, block.mean + first, length, whole);
                     look_at_state<Isa>(out.extremes, mean, variance, whole);
                     add_wide<Isa>(out.sums, variance, left, room, stride, outputs, whole);
                     if (plain)
                       add_wide<Isa>(out.sums + pairs_of(outputs), nullptr, left, room, stride,
                                     outputs, whole);
                   });
}

void add_symmetric(double* gram, const double* packed, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j <= i; ++j) {
      gram[i * n + j] += packed[pairs_of(i) + j];
      gram[j * n + i] = gram[i * n + j];
    }
}

// gram += H diag(p) H^T, plain_gram (may be null) += H H^T.
Extremes form_grams(double* gram, double* plain_gram, const Range& range, const Threads& threads) {
  const int64_t size = pairs_of(range.outputs) * (plain_gram ? 2 : 1);
  std::vector<double> sums(static_cast<size_t>(range.slices * size));
  std::vector<Slice> slices(static_cast<size_t>(range.slices));
  const int64_t room = gram_room(range.outputs);
  const Buffer<float> rooms = allocate<float>(threads.count * room);
  std::atomic<int64_t> next_room{0};
  threads.run(range.slices, 1, [&](int64_t begin, int64_t end) {
    float* const mine = rooms.get() + next_room++ * room;
    for_this_cpu([&](auto isa) GRNG_INLINE_LAMBDA {
      using Isa = decltype(isa);
      for (int64_t i = begin; i < end; ++i) {
        slices[i].sums = sums.data() + i * size;
        if (range.outputs <= kNarrow<Isa>) {
          gram_narrow<Isa>(slices[i], range, plain_gram != nullptr, mine, i);
        } else {
          gram_wide<Isa>(slices[i], range, plain_gram != nullptr, mine, i);
        }
      }
    });
  });
  Extremes all;
  for (const Slice& slice : slices) {
    add_symmetric(gram, slice.sums, range.outputs);
    if (plain_gram) add_symmetric(plain_gram, slice.sums + pairs_of(range.outputs), range.outputs);
    all.include(slice.extremes);
  }
  return all;
}

// ---- pass 2 ----

struct Application {
  const Range* range;
  const float *direction, *whitener;  // as given, and packed where it is wide
  const int64_t* extents;
  Prediction next;
};

int64_t apply_room(int64_t outputs) { return (outputs + 4) * chunk_length(outputs) + 2 * kChunk; }

template <class Isa>
GRNG_INLINE void roots_of(float* root, const float* variance, int64_t length) {
  for (int64_t k = 0; k < length; ++k) root[k] = std::sqrt(variance[k]);
}

template <class Isa>
GRNG_INLINE void apply_slice_narrow(const Application& a, float* room, int64_t number) {
  const int64_t outputs = a.range->outputs;
  float* const root = room + (outputs + 2) * kChunk;
  a.range->for_chunks(
      number, true,
      [&](const KalmanPiece& block, int64_t first, int64_t length) GRNG_INLINE_LAMBDA {
        with_rows<Isa>(block, outputs, room, first, length, true,
                       [&](float* mean, float* variance, const float* const* rows, int64_t n)
                           GRNG_INLINE_LAMBDA {
                             roots_of<Isa>(root, variance, n);
                             apply_narrow<Isa>(outputs, mean, variance, root, rows, a.direction,
                                               a.whitener, a.next, n);
                           });
      });
}

template <class Isa>
GRNG_INLINE void apply_slice_wide(const Application& a, float* room, int64_t number) {
  using S = Simd<Isa, float>;
  constexpr int64_t kWidth = kStrip<Isa>;
  const int64_t outputs = a.range->outputs, stride = chunk_length(outputs);
  float *root = room + outputs * stride, *step = root + stride, *lost = step + stride,
        *row = lost + stride;
  a.range->for_chunks(
      number, true,
      [&](const KalmanPiece& block, int64_t first, int64_t length) GRNG_INLINE_LAMBDA {
        float *mean = block.mean + first, *variance = block.variance + first;
        const int64_t whole = (length + kWidth - 1) / kWidth * kWidth;
        roots_of<Isa>(root, variance, length);
        std::fill(root + length, root + whole, 0.0F);
        std::fill(step, step + 2 * stride, 0.0F);  // and lost
        for (int64_t c = 0; c < outputs; ++c) {
          fetch_row(row, block.jacobian, c, first, length, whole);
          const float direction = a.direction[c];
          for (int64_t k = 0; k < whole; k += kWidth) {
            float* s = room + k * outputs + c * kWidth;
            for (int64_t l = 0; l < kWidth; ++l) {
              s[l] = root[k + l] * row[k + l];
              // With compensation, as the sums of squares are.
              const float more = s[l] * direction - lost[k + l], sum = step[k + l] + more;
              lost[k + l] = (sum - step[k + l]) - more;
              step[k + l] = sum;
            }
          }
        }
        for (int64_t k = 0; k < whole; k += kWidth) {
          alignas(64) float t[kWidth], old_mean[kWidth], old_variance[kWidth];
          squares_of_strip<Isa>(t, room + k * outputs, a.whitener, a.extents, outputs);
          const int64_t n = std::min(kWidth, length - k);
          copy_padded(old_mean, mean + k, n, kWidth);
          copy_padded(old_variance, variance + k, n, kWidth);
          for (int64_t l = 0; l < kWidth; l += S::kLanes)
            write_state<Isa>(old_mean + l, old_variance + l,
                             S::load(root + k + l) * S::load(step + k + l), S::load(t + l), a.next);
          std::copy(old_mean, old_mean + n, mean + k);
          std::copy(old_variance, old_variance + n, variance + k);
        }
      });
}

bool is_lower_triangular(const float* w, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = i + 1; j < n; ++j)
      if (w[i * n + j] != 0) return false;
  return true;
}

void apply(const Range& range, const KalmanGain& gain, const Threads& threads) {
  const int64_t outputs = range.outputs, room = apply_room(outputs);
  const bool triangular = is_lower_triangular(gain.whitener, outputs);
  // All of it before any block is written: where there is no memory, no block has been.
  const Buffer<float> rooms = allocate<float>(threads.count * room);
  std::vector<float> packed(static_cast<size_t>(padded_rows(outputs) * outputs));
  std::vector<int64_t> extents(static_cast<size_t>(outputs));
  Application a{&range, gain.direction, gain.whitener, extents.data(), {}};
  a.next = {gain.variational, gain.forgetting, gain.process_noise};
  bool narrow = false;
  for_this_cpu([&](auto isa) GRNG_INLINE_LAMBDA {
    using Isa = decltype(isa);
    narrow = triangular && outputs <= kNarrow<Isa>;
    if (!narrow) pack_whitener<Isa>(packed.data(), extents.data(), gain.whitener, outputs);
  });
  if (!narrow) a.whitener = packed.data();
  std::atomic<int64_t> next_room{0};
  threads.run(range.slices, 1, [&](int64_t begin, int64_t end) {
    float* const mine = rooms.get() + next_room++ * room;
    for_this_cpu([&](auto isa) GRNG_INLINE_LAMBDA {
      using Isa = decltype(isa);
      // Backwards: what pass 1 read last is still in the caches.
      for (int64_t i = end - 1; i >= begin; --i) {
        if (narrow) {
          apply_slice_narrow<Isa>(a, mine, i);
        } else {
          apply_slice_wide<Isa>(a, mine, i);
        }
      }
    });
  });
}

// ---- faults ----

bool all_finite(const double* values, int64_t count) {
  return std::all_of(values, values + count, [](double x) { return std::isfinite(x); });
}

bool jacobians_are_finite(const Range& range) {
  std::vector<float> row(kChunk);
  for (int64_t i = 0; i < range.count; ++i) {
    const ConstMatrix& h = range.blocks[i].jacobian;
    for (int64_t c = 0; c < h.rows; ++c)
      for (int64_t k = 0; k < h.cols; k += kChunk) {
        const int64_t length = std::min(kChunk, h.cols - k);
        fetch_row(row.data(), h, c, k, length, length);
        if (!std::all_of(row.data(), row.data() + length, [](float x) { return std::isfinite(x); }))
          return false;
      }
  }
  return true;
}

}  // namespace

void kalman_gram_cpu(double* gram, const KalmanPiece* blocks, int64_t count, int64_t outputs,
                     const Threads& threads) {
  const Range range(blocks, count, outputs);
  if (range.length == 0 || outputs == 0) return;
  const Extremes found = form_grams(gram, nullptr, range, threads);
  // A negative variance is an error of the caller; as NaN it reaches the check of the gram.
  if (found.negative) gram[0] = std::numeric_limits<double>::quiet_NaN();
}

void kalman_apply_cpu(const KalmanPiece* blocks, int64_t count, const KalmanGain& gain,
                      const Threads& threads) {
  const Range range(blocks, count, gain.outputs);
  if (range.length > 0 && gain.outputs > 0) apply(range, gain, threads);
}

Info kalman_update_cpu(const KalmanUpdate& u, const Threads& threads) {
  const int64_t n = u.outputs;
  std::vector<KalmanPiece> dense;
  std::copy_if(u.blocks, u.blocks + u.count, std::back_inserter(dense),
               [](const KalmanPiece& block) { return !block.is_factored(); });
  const Range range(dense.data(), static_cast<int64_t>(dense.size()), n);
  KroneckerBlocks factored(u.blocks, u.count, n);
  if ((range.length == 0 && factored.empty()) || n == 0) return kOk;
  const int64_t noise_rows = u.likelihood == Likelihood::kCategorical ? 1 : n;
  const int64_t noise_count =
      u.likelihood == Likelihood::kCategorical ? n : noise_rows * u.noise_cols;
  if (!all_finite(u.innovation, n) || !all_finite(u.noise, noise_count) || !factored.finite())
    return kNonfiniteInput;

  Found found{Matrix(n, n), u.rho > 0 ? Matrix(n, n) : Matrix(), 0, 0};
  Extremes state = factored.weigh(threads);
  // Weighed, a factored block is a term of the sums like any other.
  std::vector<KalmanPiece> terms = dense;
  terms.insert(terms.end(), factored.terms().begin(), factored.terms().end());
  state.include(form_grams(found.gram.data.data(),
                           u.rho > 0 ? found.plain_gram.data.data() : nullptr,
                           Range(terms.data(), static_cast<int64_t>(terms.size()), n), threads));
  if (state.negative || !std::isfinite(state.mean) || !std::isfinite(state.variance))
    return kNonfiniteInput;
  if (!all_finite(found.gram.data.data(), n * n) ||
      (u.rho > 0 && !all_finite(found.plain_gram.data.data(), n * n)))
    return jacobians_are_finite(range) ? kOverflow : kNonfiniteInput;
  found.mean_max = state.mean;
  found.variance_max = state.variance;

  Gain gain;
  const Info info = gain_from_gram(gain, u, found);
  if (info != kOk) return info;
  const KalmanGain given{
      n, gain.direction.data(), gain.whitener.data(), u.variational, u.forgetting, u.process_noise};
  if (!factored.prepare(given, threads)) return kOverflow;
  apply(range, given, threads);
  factored.apply({u.variational, u.forgetting, u.process_noise}, threads);
  return kOk;
}

}  // namespace grng
