// SPDX-License-Identifier: Apache-2.0
// (factor + damping * I)^-1 on the CPU: everything that grng_kernels/damped_inverse/reference.py
// does, for many matrices of mixed sizes.
//
// A matrix is one thread's work, from its first element to its residual, while it stays in that
// thread's cache; the largest ones are shared by all threads, if otherwise one thread would finish
// late. The arithmetic is the same either way, so the number of threads cannot change a result.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "../kernels.h"
#include "damped_inverse_common.h"
#include "damped_inverse_small.h"
#include "elements.h"
#include "parallel.h"
#include "simd.h"
#include "spd_inverse.h"
#include "spectral_norm.h"
#include "transpose.h"

namespace grng {
namespace {

constexpr int64_t kLine = kSpdLine;
// See grng_kernels/damped_inverse/probes.py.
constexpr int64_t kProbes = 16;
// The diagonal beyond the matrix: its inverse must stay in range when the scale is taken out.
constexpr float kPadding = 0x1p60f;
// A matrix that is smaller is never shared by threads: they would wait for each other longer than
// they save.
constexpr int64_t kLeastShared = 640;
// Work (see `cost`) for which waking another thread does not pay.
constexpr double kLeastThreaded = 2e5;

int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// Cache lines in a panel of the sweep: as for a factor, and the wide panels have more work beside
// the product.
int panel_lines(int64_t n) {
  double least = std::numeric_limits<double>::infinity();
  int best = 1;
  const double each[] = {1.25, 1.1, 1.0};
  for (int lines = 1; lines <= 3; ++lines) {
    const double width = static_cast<double>(lines * kLine);
    const double order = static_cast<double>(round_up(n, lines * kLine));
    const double time = order * order * (order * each[lines - 1] + 2.0 * width);
    if (time < least) least = time, best = lines;
  }
  return best;
}

double cost(int64_t n) {
  const double order = static_cast<double>(round_up(n, kLine));
  return order * order * (order + 100) + 5e4;
}

// Where the parts of one matrix's workspace lie, in floats.
struct Layout {
  int64_t n, padded, sweep_order, sweep_ld;
  int lines;
  int64_t symmetric, swept, packed, vector, norm, probed, partial, total;

  explicit Layout(int64_t n) : n(n), padded(round_up(n, kLine)), lines(panel_lines(n)) {
    sweep_order = round_up(n, lines * kLine);
    // Rows a multiple of the page apart would share the same few lines of L1.
    sweep_ld = sweep_order + (sweep_order % 256 == 0 ? kLine : 0);
    int64_t at = 0;
    const auto take = [&](int64_t floats) {
      const int64_t begin = at;
      at += round_up(floats, kLine);
      return begin;
    };
    symmetric = take(padded * padded);
    swept = take(sweep_order * sweep_ld);
    packed = take(sweep_order * lines * kLine);
    vector = take(padded);
    norm = take(spectral_norm_workspace(padded));
    probed = take(2 * padded * kProbes);
    partial = take(padded / kLine);
    total = at;
  }
};

// ---- the vectors of signs ----

// What the residual is measured with: [n, 16] signs, and for n <= 16 the identity.
struct Probes {
  std::vector<float> signs, identity;

  explicit Probes(int64_t n) : signs(n * kProbes), identity(kProbes * kProbes) {
    for (size_t i = 0; i < signs.size(); ++i) {
      uint32_t h = static_cast<uint32_t>(i);
      h = (h ^ (h >> 16)) * 0x7feb352du;
      h = (h ^ (h >> 15)) * 0x846ca68bu;
      h ^= h >> 16;
      signs[i] = h >> 31 ? -1.0f : 1.0f;
    }
    for (int64_t i = 0; i < kProbes; ++i) identity[i * kProbes + i] = 1.0f;
  }
  const float* for_order(int64_t n) const { return n > kProbes ? signs.data() : identity.data(); }
};

// ---- reading ----

template <class In>
float load_rows(float* out, int64_t padded, const ConstMatrix& m, int64_t begin, int64_t end) {
  const In* data = static_cast<const In*>(m.data);
  float largest = 0;
  for (int64_t i = begin; i < end; ++i)
    for (int64_t j = 0; j < m.cols; ++j) {
      const float value = static_cast<float>(data[i * m.row_stride + j * m.col_stride]);
      out[i * padded + j] = value;
      const float magnitude = std::fabs(value);
      largest = magnitude <= largest ? largest : magnitude;  // keeps inf; NaN is not ordered
      if (std::isnan(value)) return value;
    }
  return largest;
}

// Rows of the factor as fp32, padded with zeros. Returns their largest magnitude.
template <class Isa>
GRNG_INLINE float load_block(float* out, int64_t padded, const ConstMatrix& m, int64_t begin) {
  const int64_t end = std::min(begin + kLine, m.rows);
  if (m.cols < padded || end < begin + kLine)
    std::memset(out + begin * padded, 0, kLine * padded * sizeof(float));
  if (m.dtype == Dtype::kFloat32 && m.col_stride == 1) {
    const float* data = static_cast<const float*>(m.data);
    for (int64_t i = begin; i < end; ++i)
      std::memcpy(out + i * padded, data + i * m.row_stride, m.cols * sizeof(float));
    return static_cast<float>(largest_magnitude<Isa>(out + begin * padded, (end - begin) * padded));
  }
  if (m.dtype == Dtype::kFloat32) return load_rows<float>(out, padded, m, begin, end);
  if (m.dtype == Dtype::kBFloat16) return load_rows<BFloat16>(out, padded, m, begin, end);
  return load_rows<_Float16>(out, padded, m, begin, end);
}

// Blocks of rows I: with their mirror images, the mean of the two times the scale. Returns the
// largest difference of the two, times the scale.
template <class Isa>
GRNG_INLINE float symmetrise_block(float* s, int64_t padded, int64_t block,
                                   const PowerOfTwo& scale) {
  using S = Simd<Isa, float>;
  typename S::Magnitudes largest = {};
  for (int64_t j = 0; j <= block; ++j) {
    alignas(64) float turned[256];
    float* low = s + (block * padded + j) * kLine;
    float* high = s + (j * padded + block) * kLine;
    transpose16<Isa>(turned, kLine, high, padded);
    for (int64_t r = 0; r < kLine; ++r)
      for (int64_t c = 0; c < kLine; c += S::kLanes) {
        const auto a = S::load(low + r * padded + c) * scale.first;
        const auto b = S::load(turned + r * kLine + c) * scale.first;
        S::store(low + r * padded + c, (a + b) * (0.5f * scale.second));
        largest = S::larger(largest, a - b);
      }
    if (j < block) transpose16<Isa>(high, padded, low, padded);
  }
  return static_cast<float>(S::largest(largest)) * scale.second;
}

// ---- inverting, writing ----

template <class Isa>
GRNG_INLINE void copy_lower(float* a, const Layout& at, const float* s, float shift,
                            int64_t block) {
  for (int64_t i = block * kLine; i < (block + 1) * kLine; ++i) {
    float* row = a + i * at.sweep_ld;
    const int64_t columns = i < at.padded ? (block + 1) * kLine : 0;
    if (columns > 0) std::memcpy(row, s + i * at.padded, columns * sizeof(float));
    // The sweep reads whole panels.
    const int64_t end = round_up(i + 1, at.lines * kLine);
    std::memset(row + columns, 0, (end - columns) * sizeof(float));
    row[i] = i < at.n ? row[i] + shift : kPadding;
  }
}

template <class Isa>
GRNG_INLINE void copy_line(float* out, const float* in) {
  using S = Simd<Isa, float>;
  for (int64_t c = 0; c < kLine; c += S::kLanes) S::store(out + c, S::load(in + c));
}

// Rows of block I of the result, and their mirror images. Returns the largest magnitude.
template <class Isa>
GRNG_INLINE float write_block(float* out, const Layout& at, const float* a, const PowerOfTwo& scale,
                              int64_t block) {
  using S = Simd<Isa, float>;
  typename S::Magnitudes largest = {};
  const int64_t n = at.n, rows = std::min(kLine, n - block * kLine);
  for (int64_t j = 0; j <= block; ++j) {
    alignas(64) float values[256], turned[256];
    const float* from = a + (block * at.sweep_ld + j) * kLine;
    for (int64_t r = 0; r < kLine; ++r)
      for (int64_t c = 0; c < kLine; c += S::kLanes) {
        const auto v = S::load(from + r * at.sweep_ld + c) * -scale.first * scale.second;
        largest = S::larger(largest, v);
        S::store(values + r * kLine + c, v);
      }
    float* low = out + block * kLine * n + j * kLine;
    float* high = out + j * kLine * n + block * kLine;
    if (rows == kLine) {
      for (int64_t r = 0; r < kLine; ++r) copy_line<Isa>(low + r * n, values + r * kLine);
      if (j < block) transpose16<Isa>(high, n, values, kLine);
      continue;
    }
    const int64_t columns = j < block ? kLine : rows;
    for (int64_t r = 0; r < rows; ++r)
      std::memcpy(low + r * n, values + r * kLine, columns * sizeof(float));
    if (j == block) continue;
    transpose16<Isa>(turned, kLine, values, kLine);
    for (int64_t r = 0; r < kLine; ++r)
      std::memcpy(high + r * n, turned + r * kLine, rows * sizeof(float));
  }
  return static_cast<float>(S::largest(largest));
}

// ---- the residual ----

// f(row, sum): sum = row of a [n, n], symmetric, times y [n, 16], for kRows rows from `begin` on.
// `kAcross`: elements of the row are taken from the column, where those of all rows lie side by
// side; far apart in memory they would come slowly.
template <class Isa, int kRows, bool kAcross, class F>
GRNG_INLINE void times_probes(const float* a, int64_t ld, int64_t n, const float* y, int64_t begin,
                              const F& f) {
  using S = Simd<Isa, float>;
  constexpr int kVecs = 64 / Isa::kVectorBytes;
  typename S::Vec acc[kRows][kVecs] = {};
  for (int64_t j = 0; j < n; ++j) {
    typename S::Vec b[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) b[v] = S::load_once(y + j * kProbes + v * S::kLanes);
#pragma GCC unroll 16
    for (int t = 0; t < kRows; ++t) {
      const auto x = S::broadcast(kAcross ? a + j * ld + begin + t : a + (begin + t) * ld + j);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) acc[t][v] += x * b[v];
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < kRows; ++t) f(begin + t, acc[t]);
}

template <class Isa, class F>
GRNG_INLINE void times_probes_block(const float* a, int64_t ld, int64_t n, const float* y,
                                    int64_t block, const F& f) {
  constexpr int kRows = Isa::kVectorBytes == 64 ? 8 : 2;
  const int64_t end = std::min(n, (block + 1) * kLine);
  int64_t i = block * kLine;
  if (n <= kPowerOrder) {
    for (; i + kRows <= end; i += kRows) times_probes<Isa, kRows, true>(a, ld, n, y, i, f);
  } else {
    for (; i + kRows <= end; i += kRows) times_probes<Isa, kRows, false>(a, ld, n, y, i, f);
  }
  for (; i < end; ++i) times_probes<Isa, 1, false>(a, ld, n, y, i, f);
}

// ‖I - M X‖_F / sqrt(n) through the probes, M = s + shift I and X = 2^exponent inverse.
template <class Isa>
GRNG_INLINE float measure_residual(const Layout& at, const float* inverse, const float* s,
                                   float shift, int exponent, const float* probes, float* workspace,
                                   float* partial, const Loop<Isa>& each) {
  const int64_t n = at.n, blocks = at.padded / kLine;
  float* scaled = workspace;  // the probes, times half of the power of two
  float* y = workspace + at.padded * kProbes;
  const PowerOfTwo power(exponent);
  for (int64_t i = 0; i < n * kProbes; ++i) scaled[i] = power.first * probes[i];
  each(blocks, [=](int64_t block) GRNG_INLINE_LAMBDA {
    using S = Simd<Isa, float>;
    times_probes_block<Isa>(inverse, n, n, scaled, block,
                            [=](int64_t row, const auto& sum) GRNG_INLINE_LAMBDA {
                              for (int64_t v = 0; v < kProbes / S::kLanes; ++v)
                                S::store(y + row * kProbes + v * S::kLanes, power.second * sum[v]);
                            });
  });
  each(blocks, [=](int64_t block) GRNG_INLINE_LAMBDA {
    using S = Simd<Isa, float>;
    typename S::Vec squares = {};
    times_probes_block<Isa>(
        s, at.padded, n, y, block, [&](int64_t row, const auto& sum) GRNG_INLINE_LAMBDA {
          for (int64_t v = 0; v < kProbes / S::kLanes; ++v) {
            const int64_t i = row * kProbes + v * S::kLanes;
            const auto rest = S::load(probes + i) - sum[v] - shift * S::load(y + i);
            squares += rest * rest;
          }
        });
    partial[block] = static_cast<float>(S::sum(squares));
  });
  double total = 0;
  for (int64_t b = 0; b < blocks; ++b) total += partial[b];
  const int64_t columns = n > kProbes ? kProbes : 1;
  return static_cast<float>(std::sqrt(total / static_cast<double>(n * columns)));
}

// ---- one matrix ----

template <class Isa>
GRNG_INLINE bool invert(const Layout& at, float* a, float* packed, const Loop<Isa>& each) {
  const int64_t panels = at.sweep_order / (at.lines * kLine);
  if (at.lines == 3) return invert_spd<Isa>(Sweep<3>{a, at.sweep_ld, panels, packed}, each);
  if (at.lines == 2) return invert_spd<Isa>(Sweep<2>{a, at.sweep_ld, panels, packed}, each);
  return invert_spd<Isa>(Sweep<1>{a, at.sweep_ld, panels, packed}, each);
}

template <class Isa>
GRNG_INLINE void damped_inverse(DampedInverse& item, float* workspace, const float* probes,
                                const Loop<Isa>& each) {
  const int64_t n = item.factor.rows;
  const Layout at(n);
  const int64_t blocks = at.padded / kLine;
  float* s = workspace + at.symmetric;
  float* a = workspace + at.swept;
  float* partial = workspace + at.partial;
  item.used = item.norm = item.residual = 0;
  const auto give_up = [&](Info info) {
    item.info = info;
    std::memset(item.inverse, 0, n * n * sizeof(float));
  };

  each(blocks, [=](int64_t b) GRNG_INLINE_LAMBDA {
    partial[b] = load_block<Isa>(s, at.padded, item.factor, b * kLine);
  });
  const auto largest_of_blocks = [=] {
    double all = 0;
    for (int64_t b = 0; b < blocks; ++b) all = larger(all, partial[b]);
    return all;
  };
  const double largest = largest_of_blocks();
  const bool legal = item.relative || (item.damping > 0 && std::isfinite(item.damping));
  if (!std::isfinite(largest) || !legal) {
    item.residual = std::numeric_limits<float>::quiet_NaN();
    return give_up(kNonfiniteInput);
  }
  int exponent = 1;
  if (largest > 0) std::frexp(largest, &exponent);
  if (!item.relative) {
    int of_damping;
    std::frexp(item.damping, &of_damping);
    exponent = std::max(exponent, of_damping - kDampingBits);
  }
  const PowerOfTwo down(-exponent), up(exponent);
  each(blocks, [=](int64_t b) GRNG_INLINE_LAMBDA {
    partial[b] = symmetrise_block<Isa>(s, at.padded, b, down);
  });
  // What is below the floor decides nothing; there the rounding is that of subnormal numbers.
  const float share = asymmetry_limit(item.factor.dtype) * down.times(static_cast<float>(largest));
  const bool symmetric = largest_of_blocks() <= std::max(share, down.times(kFloor));

  // The vector is kept where the inverse fails, so the estimate works on a copy.
  float* vector = workspace + at.vector;
  if (item.vector) {
    std::memcpy(vector, item.vector, n * sizeof(float));
  } else {
    std::memset(vector, 0, n * sizeof(float));
  }
  const float norm = spectral_norm<Isa>(s, n, at.padded, vector, workspace + at.norm, each);
  item.norm = up.times(norm);
  const float shift = item.relative
                          ? std::max(static_cast<float>(item.damping) * norm, down.times(kFloor))
                          : down.times(static_cast<float>(item.damping));
  item.used = up.times(shift);

  each(at.sweep_order / kLine,
       [=](int64_t b) GRNG_INLINE_LAMBDA { copy_lower<Isa>(a, at, s, shift, b); });
  if (!invert<Isa>(at, a, workspace + at.packed, each)) {
    item.residual = std::numeric_limits<float>::infinity();
    return give_up(symmetric ? kNotConverged : kAsymmetric);
  }
  each(blocks, [=](int64_t b) GRNG_INLINE_LAMBDA {
    partial[b] = write_block<Isa>(item.inverse, at, a, down, b);
  });
  const bool in_range = std::isfinite(largest_of_blocks());
  item.residual = measure_residual<Isa>(at, item.inverse, s, shift, exponent, probes,
                                        workspace + at.probed, partial, each);
  if (!symmetric) {
    item.info = kAsymmetric;
  } else if (!in_range) {
    item.info = kOverflow;
  } else if (!(item.residual <= kResidualLimit)) {
    item.info = kNotConverged;
  } else {
    item.info = kOk;
    if (item.vector) std::memcpy(item.vector, vector, n * sizeof(float));
  }
}

// ---- many ----

}  // namespace

void damped_inverse_cpu(DampedInverse* items, int64_t count, const Threads& threads) {
  std::vector<DampedInverse*> order;
  double left = 0;
  for (int64_t i = 0; i < count; ++i) {
    items[i].info = kOk;
    items[i].used = items[i].norm = items[i].residual = 0;
    if (items[i].factor.rows == 0) continue;
    order.push_back(&items[i]);
    left += cost(items[i].factor.rows);
  }
  if (order.empty()) return;
  std::stable_sort(order.begin(), order.end(), [](const DampedInverse* a, const DampedInverse* b) {
    return a->factor.rows > b->factor.rows;
  });
  // What one thread takes at a time: one matrix, or small ones of one order.
  std::vector<size_t> starts;
  for (size_t i = 0; i < order.size();) {
    starts.push_back(i);
    const int64_t n = order[i]->factor.rows;
    const size_t end = i + (n > kLargestGrouped ? 1 : kGroup);
    while (i < std::min(end, order.size()) && order[i]->factor.rows == n) ++i;
  }
  const size_t units = starts.size();
  starts.push_back(order.size());
  const int64_t wanted = std::min(threads.count, static_cast<int64_t>(units));
  const int64_t workers = left < kLeastThreaded ? 1 : wanted;
  // One at a time by all threads, until what is left can be shared out evenly.
  size_t shared = 0;
  for (; threads.count > 1 && shared < order.size(); ++shared) {
    const int64_t n = order[shared]->factor.rows;
    if (n < kLeastShared || cost(n) * static_cast<double>(threads.count) <= left) break;
    left -= cost(n);
  }
  const auto workspace_of = [&](size_t i) {
    if (i >= order.size()) return int64_t{0};
    // Of all that follow: those are no larger, but grouped ones may need more than one alone.
    const int64_t n = order[i]->factor.rows;
    const int64_t grouped = GroupLayout(std::min(n, kLargestGrouped)).total;
    return n > kLargestGrouped ? std::max(Layout(n).total, grouped) : grouped;
  };
  const int64_t each = workspace_of(shared);
  const Buffer<float> workspace =
      allocate<float>(std::max(shared > 0 ? workspace_of(0) : 0, workers * each));
  const Probes probes(order[0]->factor.rows);
  const auto work = [&](std::atomic<size_t>& next, size_t end, float* memory,
                        const Threads* inside) {
    for_this_cpu([&](auto isa) GRNG_INLINE_LAMBDA {
      using Isa = decltype(isa);
      for (size_t unit = next++; unit < end; unit = next++) {
        const size_t i = starts[unit];
        const int64_t n = order[i]->factor.rows;
        if (n <= kLargestGrouped)
          damped_inverse_group<Isa>(&order[i], static_cast<int64_t>(starts[unit + 1] - i), memory);
        else
          damped_inverse(*order[i], memory, probes.for_order(n), Loop<Isa>{inside});
      }
    });
  };
  std::atomic<size_t> first{0}, next{shared};
  work(first, shared, workspace.get(), &threads);
  if (workers == 1) return work(next, units, workspace.get(), nullptr);
  threads.run(workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      work(next, units, workspace.get() + worker * each, nullptr);
  });
}

}  // namespace grng
