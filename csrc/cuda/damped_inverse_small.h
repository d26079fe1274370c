// SPDX-License-Identifier: Apache-2.0
// The damped inverse of one matrix of order at most P (32 or 64) by a group of P * P / 32 threads:
// what grng_kernels/damped_inverse/reference.py does, in registers and shared memory.
//
// The matrix is inverted by symmetric sweeps without square roots, two pivots between barriers:
// such a step is one publication of two rows and one rank-2 update, and the next two rows are
// published before the rest of the update, so that the update hides the wait. Cholesky has the same
// chain of pivots, and then two more chains for the triangular inverse and its square.
//
// A group is a type with
//   each(f)    f(thread, lane) by every thread, `lane` being its own registers
//   sync()     what was written to `shared` before is seen by all afterwards
//   sum(f), largest(f), smallest(f)   of f(0) ... f(31), the same bits in every thread
//   add_neighbour()   lane.partial += that of thread ^ 1
// On the device (damped_inverse_small.cu) a thread runs f once; on the host a loop runs it for all
// threads, which is how the arithmetic is tested without a GPU. Within one each(), threads may not
// read what another writes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../kernels.h"

#ifdef __CUDACC__
#define GRNG_LANE __device__ __forceinline__
#define GRNG_UNROLL _Pragma("unroll")
// Code that runs once is fetched once: little of it, where nothing waits for it.
#define GRNG_UNROLL_4 _Pragma("unroll 4")
#define GRNG_ROLLED _Pragma("unroll 1")
#else
#define GRNG_LANE inline
#define GRNG_UNROLL
#define GRNG_UNROLL_4
#define GRNG_ROLLED
#endif

namespace grng::damped_small {

// See grng_kernels/damped_inverse: reference.py, probes.py and spectral_norm.py.
constexpr float kFloor = 1e-36f, kResidualLimit = 1e-2f, kNormSafety = 1.02f, kColdShare = 1e-3f;
constexpr int kProbes = 16, kPowerSteps = 16, kDampingBits = 60;
// Power steps between two normalisations. For them the matrix is scaled to a largest row sum near
// 1, so its norm is at least 1/16, and squares of the lengths stay in range.
constexpr int kStepsPerUnit = 8;
// A thread holds a tile of 8 x 4; for products with a vector, as many elements of one row.
constexpr int kTileRows = 8, kTileCols = 4, kOwn = kTileRows * kTileCols;
constexpr uint32_t kInfinityBits = 0x7f800000u, kNanBits = 0x7fc00000u;

// Shared memory of one group.
template <int P>
struct Shared {
  static constexpr int kThreads = P * P / kOwn;
  static_assert(kThreads >= P, "every row has a thread");
  // Rows start at 16 bytes and in different banks.
  static constexpr int kLd = P + 4;
  alignas(16) float matrix[P * kLd];
  alignas(16) float inverse[P * kLd];
  alignas(16) float pivots[2][2 * P];  // two rows each, in turn
  alignas(16) float vector[2][P];
  float given[P], row_sum[P], row_square[P];
  float scratch[kThreads];
};

// Registers of one thread.
struct Lane {
  float a[kOwn];
  // Pivot rows at this tile's rows and columns: the update that is still owed, see sweep_pair().
  float row[2][kTileRows], col[2][kTileCols];
  float partial;
  bool failed;
};

// ---- numbers ----

GRNG_LANE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

GRNG_LANE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// Ordered like the magnitudes, with infinity and NaN at the end.
GRNG_LANE uint32_t magnitude_bits(float x) { return bits_of(x) & 0x7fffffffu; }

// 1/d for d > 0 in the range of normal numbers: an estimate of 1 ulp and one Newton step.
GRNG_LANE float reciprocal(float d) {
#ifdef __CUDACC__
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(d));
#else
  const float r = 1.0f / d;
#endif
  return fmaf(r, fmaf(-d, r, 1.0f), r);
}

GRNG_LANE float from_half(uint16_t bits) {
#ifdef __CUDACC__
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
#else
  _Float16 x;
  memcpy(&x, &bits, sizeof x);
  return static_cast<float>(x);
#endif
}

// The exponent of frexp, of a positive number that may be denormal.
GRNG_LANE int exponent_of(float x) {
  const int biased = static_cast<int>(bits_of(x) >> 23);
  if (biased > 0) return biased - 126;
  return static_cast<int>(bits_of(x * 16777216.0f) >> 23) - 150;
}

// 2^exponent in two halves: itself may leave the range of fp32 where a product does not.
struct PowerOfTwo {
  float first, second;
  GRNG_LANE explicit PowerOfTwo(int exponent) {
    const int half = exponent / 2;
    first = float_of(static_cast<uint32_t>(half + 127) << 23);
    second = float_of(static_cast<uint32_t>(exponent - half + 127) << 23);
  }
  GRNG_LANE float times(float x) const { return x * first * second; }
};

// Zero stays zero: there is nothing to scale.
GRNG_LANE float unit_scale(float square) {
#ifdef __CUDACC__
  const float scale = rsqrtf(square);
#else
  const float scale = 1.0f / std::sqrt(square);
#endif
  return square > 0 ? scale : 0.0f;
}

// Sign of element i of probe p, for orders above kProbes: lowbias32 of Chris Wellons.
GRNG_LANE float probe_sign(int i, int p) {
  uint32_t h = static_cast<uint32_t>(i * kProbes + p);
  h = (h ^ (h >> 16)) * 0x7feb352du;
  h = (h ^ (h >> 15)) * 0x846ca68bu;
  h ^= h >> 16;
  return h >> 31 ? -1.0f : 1.0f;
}

// ---- the steps ----

// lane.a <- elements [m * kThreads / P + thread / P, thread % P] of the factor, zero outside.
template <int P, class Bits, class Convert>
GRNG_LANE void load_elements(const Bits* data, int64_t row_stride, int64_t col_stride, int n,
                             int thread, Lane& lane, Convert convert) {
  constexpr int kRows = Shared<P>::kThreads / P;
  const int i = thread / P, j = thread % P;
  const Bits* at = data + i * row_stride + j * col_stride;
  Bits raw[kOwn];
  GRNG_UNROLL
  for (int m = 0; m < kOwn; ++m) {
    const bool inside = i + m * kRows < n && j < n;
    raw[m] = inside ? at[m * kRows * row_stride] : Bits{0};
  }
  GRNG_UNROLL
  for (int m = 0; m < kOwn; ++m) lane.a[m] = convert(raw[m]);
}

template <int P>
GRNG_LANE void load(const DampedSmall& item, int64_t index, int thread, Lane& lane) {
  // A factor and its transpose have one symmetric part: the denser direction goes along a warp.
  const bool turned = item.row_stride < item.col_stride;
  const int64_t rows = turned ? item.col_stride : item.row_stride;
  const int64_t cols = turned ? item.row_stride : item.col_stride;
  const int64_t start = index * item.batch_stride;
  if (item.dtype == Dtype::kFloat32) {
    load_elements<P>(static_cast<const float*>(item.factor) + start, rows, cols, item.n, thread,
                     lane, [](float x) { return x; });
    return;
  }
  const bool brain = item.dtype == Dtype::kBFloat16;
  load_elements<P>(static_cast<const uint16_t*>(item.factor) + start, rows, cols, item.n, thread,
                   lane, [brain](uint16_t x) {
                     return brain ? float_of(static_cast<uint32_t>(x) << 16) : from_half(x);
                   });
}

// The row and the columns 4 m' + c of `own` element 4 m + c: a thread has 4 columns, then skips
// those of its neighbours in the row.
template <int P>
GRNG_LANE int slice_row(int thread) {
  return thread / (P / kOwn);
}
template <int P>
GRNG_LANE int slice_col(int thread, int m) {
  constexpr int kParts = P / kOwn;
  return 4 * (m / 4 * kParts + thread % kParts) + m % 4;
}

// lane.a <- the thread's slice of scale * (x + x^T) / 2
template <int P>
GRNG_LANE void symmetric_slice(const float* x, const PowerOfTwo& scale, int thread, Lane& lane) {
  const int i = slice_row<P>(thread);
  GRNG_UNROLL
  for (int m = 0; m < kOwn; ++m) {
    const int j = slice_col<P>(thread, m);
    const float both = 0.5f * scale.first * x[i * Shared<P>::kLd + j];
    lane.a[m] = (both + 0.5f * scale.first * x[j * Shared<P>::kLd + i]) * scale.second;
  }
}

template <int P>
GRNG_LANE void store_slice(float* x, int thread, const Lane& lane) {
  const int i = slice_row<P>(thread);
  GRNG_UNROLL
  for (int m = 0; m < kOwn; ++m) x[i * Shared<P>::kLd + slice_col<P>(thread, m)] = lane.a[m];
}

template <int P>
struct Tile {
  int row, col;  // of the tile's first element
  GRNG_LANE explicit Tile(int thread) {
    // A warp holds all rows of its columns, so that one warp alone touches the pivot's columns.
    constexpr int kTiles = P / kTileRows, kWide = 32 / kTiles;
    const int warp = thread / 32, in_warp = thread % 32;
    row = kTileRows * (in_warp / kWide);
    col = kTileCols * (warp * kWide + in_warp % kWide);
  }
};

// The slice times its part of v.
template <int P>
GRNG_LANE float slice_dot(const Lane& lane, const float* v, int thread) {
  float sum[4] = {};
  GRNG_UNROLL
  for (int m = 0; m < kOwn; ++m)
    sum[m % 4] = fmaf(lane.a[m], v[slice_col<P>(thread, m)], sum[m % 4]);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// The tile's share of the update by two pivots, for one of its rows.
GRNG_LANE void update_row(Lane& lane, int i) {
  GRNG_UNROLL
  for (int j = 0; j < kTileCols; ++j) {
    float& x = lane.a[i * kTileCols + j];
    // Summed before they meet the element: half as many roundings of its size.
    x -= fmaf(lane.row[1][i], lane.col[1][j], lane.row[0][i] * lane.col[0][j]);
  }
}

template <int P>
GRNG_LANE void publish(float* rows, const Tile<P>& tile, const Lane& lane, int i) {
  GRNG_UNROLL
  for (int j = 0; j < kTileCols; ++j) {
    rows[tile.col + j] = lane.a[i * kTileCols + j];
    rows[P + tile.col + j] = lane.a[(i + 1) * kTileCols + j];
  }
}

// One step of sweep(): pivots kTileRows * block + pair and the one after it. Everything but two
// rows of the update is owed until the next step.
template <int P, int pair>
GRNG_LANE void sweep_pair(Shared<P>& shared, int block, int thread, Lane& lane) {
  const Tile<P> tile(thread);
  const int k = kTileRows * block + pair;
  const float* rows = shared.pivots[pair / 2 % 2];
  const float d0 = rows[k], e = rows[k + 1], d1 = rows[P + k + 1];
  float row[2][kTileRows], col[2][kTileCols];
  GRNG_UNROLL
  for (int i = 0; i < kTileRows; ++i) {
    row[0][i] = rows[tile.row + i];
    row[1][i] = rows[P + tile.row + i];
  }
  GRNG_UNROLL
  for (int j = 0; j < kTileCols; ++j) {
    col[0][j] = rows[tile.col + j];
    col[1][j] = rows[P + tile.col + j];
  }
  GRNG_UNROLL
  for (int i = 0; i < kTileRows; ++i)
    if (i != pair && i != pair + 1) update_row(lane, i);

  // The pivots' own rows and columns become the product of the others with the inverse of their
  // block; as an update of zero, with other factors, that needs no case in the loops.
  const float r0 = reciprocal(d0), t = e * r0;
  const float s1 = fmaf(-e, t, d1), r1 = reciprocal(s1);
  lane.failed = lane.failed || !(d0 > 0) || !(s1 > 0);
  GRNG_UNROLL
  for (int i = 0; i < kTileRows; ++i) {
    lane.row[0][i] = row[0][i];
    lane.row[1][i] = fmaf(-t, row[0][i], row[1][i]);
  }
  GRNG_UNROLL
  for (int j = 0; j < kTileCols; ++j) {
    lane.col[0][j] = col[0][j] * r0;
    lane.col[1][j] = fmaf(-t, col[0][j], col[1][j]) * r1;
  }
  if (tile.row == kTileRows * block) {
    GRNG_UNROLL
    for (int j = 0; j < kTileCols; ++j)
      lane.a[pair * kTileCols + j] = lane.a[(pair + 1) * kTileCols + j] = 0;
    lane.row[0][pair] = -1, lane.row[1][pair] = t;
    lane.row[0][pair + 1] = 0, lane.row[1][pair + 1] = -1;
  }
  constexpr int kCol = pair % kTileCols;
  if (tile.col == k - kCol) {
    GRNG_UNROLL
    for (int i = 0; i < kTileRows; ++i)
      lane.a[i * kTileCols + kCol] = lane.a[i * kTileCols + kCol + 1] = 0;
    lane.col[0][kCol] = -r0, lane.col[1][kCol] = t * r1;
    lane.col[0][kCol + 1] = 0, lane.col[1][kCol + 1] = -r1;
  }

  constexpr int kNext = (pair + 2) % kTileRows;
  update_row(lane, kNext);
  update_row(lane, kNext + 1);
  if (tile.row == kTileRows * (block + (kNext == 0)))
    publish(shared.pivots[kNext / 2 % 2], tile, lane, kNext);
}

// shared.inverse <- the inverse of shared.matrix; its halves differ by rounding. `lane.failed`
// says, to every thread alike, that a pivot was not positive.
template <int P, class Group>
GRNG_LANE void sweep(Group& group, Shared<P>& shared, int n) {
  group.each([&](int thread, Lane& lane) {
    const Tile<P> tile(thread);
    GRNG_UNROLL
    for (int i = 0; i < kTileRows; ++i) {
      lane.row[0][i] = lane.row[1][i] = 0;
      GRNG_UNROLL
      for (int j = 0; j < kTileCols; ++j)
        lane.a[i * kTileCols + j] = shared.matrix[(tile.row + i) * Shared<P>::kLd + tile.col + j];
    }
    GRNG_UNROLL
    for (int j = 0; j < kTileCols; ++j) lane.col[0][j] = lane.col[1][j] = 0;
    lane.failed = false;
    if (tile.row == 0) publish(shared.pivots[0], tile, lane, 0);
  });
  const int blocks = (n + kTileRows - 1) / kTileRows;
  GRNG_ROLLED
  for (int block = 0; block < blocks; ++block) {
    group.sync();
    group.each([&](int t, Lane& lane) { sweep_pair<P, 0>(shared, block, t, lane); });
    group.sync();
    group.each([&](int t, Lane& lane) { sweep_pair<P, 2>(shared, block, t, lane); });
    group.sync();
    group.each([&](int t, Lane& lane) { sweep_pair<P, 4>(shared, block, t, lane); });
    group.sync();
    group.each([&](int t, Lane& lane) { sweep_pair<P, 6>(shared, block, t, lane); });
  }
  group.each([&](int thread, Lane& lane) {
    const Tile<P> tile(thread);
    GRNG_UNROLL
    for (int i = 2; i < kTileRows; ++i) update_row(lane, i);
    GRNG_UNROLL
    for (int i = 0; i < kTileRows; ++i) GRNG_UNROLL
    for (int j = 0; j < kTileCols; ++j)
      shared.inverse[(tile.row + i) * Shared<P>::kLd + tile.col + j] = -lane.a[i * kTileCols + j];
  });
}

// out [row][16] = x (symmetric) times in [row][16], the thread's share: one row, some probes.
template <int P>
GRNG_LANE void times_probes(const float* x, const float* in, int n, int thread, float* out) {
  constexpr int kShare = kProbes * P / Shared<P>::kThreads;
  const int i = thread % P, first = thread / P * kShare;
  GRNG_UNROLL
  for (int p = 0; p < kShare; ++p) out[p] = 0;
  GRNG_UNROLL_4
  for (int j = 0; j < n; ++j) {
    const float value = x[j * Shared<P>::kLd + i];
    GRNG_UNROLL
    for (int p = 0; p < kShare; ++p) out[p] = fmaf(value, in[j * kProbes + first + p], out[p]);
  }
}

// ‖I - M X‖_F / sqrt(n) through the probes; overwrites shared.inverse.
template <int P, class Group>
GRNG_LANE float residual(Group& group, Shared<P>& shared, const float* signs, int n) {
  constexpr int kShare = kProbes * P / Shared<P>::kThreads;
  float* product = shared.inverse;
  // For small orders the probes are the identity, and the product is the inverse.
  const bool identity = n <= kProbes;
  group.each([&](int thread, Lane& lane) {
    if (!identity) {
      times_probes<P>(shared.inverse, signs, n, thread, lane.a);
      return;
    }
    GRNG_UNROLL
    for (int p = 0; p < kShare; ++p)
      lane.a[p] = shared.inverse[thread % P * Shared<P>::kLd + thread / P * kShare + p];
  });
  group.sync();
  group.each([&](int thread, Lane& lane) {
    GRNG_UNROLL
    for (int p = 0; p < kShare; ++p)
      product[thread % P * kProbes + thread / P * kShare + p] = lane.a[p];
  });
  group.sync();
  group.each([&](int thread, Lane& lane) {
    times_probes<P>(shared.matrix, product, n, thread, lane.a);
    const int i = thread % P;
    float square = 0;
    GRNG_UNROLL
    for (int p = 0; p < kShare; ++p) {
      const int probe = thread / P * kShare + p;
      const float want = identity ? (i == probe ? 1.0f : 0.0f) : signs[i * kProbes + probe];
      square = fmaf(want - lane.a[p], want - lane.a[p], square);
    }
    shared.scratch[thread] = i < n ? square : 0.0f;
  });
  group.sync();
  const float total = group.sum([&](int lane) {
    float sum = 0;
    GRNG_UNROLL
    for (int t = 0; t < Shared<P>::kThreads; t += 32) sum += shared.scratch[t + lane];
    return sum;
  });
  return sqrtf(total / static_cast<float>(identity ? n : n * kProbes));
}

// The largest of shared.scratch, which holds bit patterns.
template <int P, class Group>
GRNG_LANE uint32_t largest_of_scratch(Group& group, const Shared<P>& shared) {
  return group.largest([&](int lane) {
    uint32_t all = 0;
    GRNG_UNROLL
    for (int t = 0; t < Shared<P>::kThreads; t += 32) {
      const uint32_t one = bits_of(shared.scratch[t + lane]);
      all = one > all ? one : all;
    }
    return all;
  });
}

// sum_i f(i) over the rows of the padded matrix
template <int P, class Group, class F>
GRNG_LANE float sum_rows(Group& group, F f) {
  return group.sum([&](int lane) {
    float sum = 0;
    GRNG_UNROLL
    for (int i = 0; i < P; i += 32) sum += f(i + lane);
    return sum;
  });
}

// The largest f(i) that is not negative, or zero.
template <int P, class Group, class F>
GRNG_LANE float largest_row(Group& group, F f) {
  return float_of(group.largest([&](int lane) {
    uint32_t all = 0;
    GRNG_UNROLL
    for (int i = 0; i < P; i += 32) {
      const float one = f(i + lane);
      all = one > 0 && bits_of(one) > all ? bits_of(one) : all;
    }
    return all;
  }));
}

struct Norm {
  float estimate, row_sum;
  int vector;   // which of shared.vector
  float scale;  // to unit length
};

// The slices of the scaled matrix are in lane.a, the matrix itself in shared.matrix, its rows' sums
// of magnitudes and squares in shared, and the start in shared.given.
template <int P, class Group>
GRNG_LANE Norm spectral_norm(Group& group, Shared<P>& shared, int n) {
  constexpr int kLd = Shared<P>::kLd;
  const auto diagonal_entry = [&](int i) { return i < n ? shared.matrix[i * kLd + i] : 0.0f; };
  const float row_sum = largest_row<P>(group, [&](int i) { return shared.row_sum[i]; });
  const float square = sum_rows<P>(group, [&](int i) { return shared.row_square[i]; });
  const float trace = sum_rows<P>(group, diagonal_entry);
  // Where no entry is positive, zero is the larger bound.
  const float diagonal = largest_row<P>(group, diagonal_entry);
  // The longest row is the cold start: it has a part along the leading eigenvector.
  const float longest = largest_row<P>(group, [&](int i) { return shared.row_square[i]; });
  const uint32_t start = group.smallest([&](int lane) {
    uint32_t first = P - 1;
    GRNG_UNROLL
    for (int i = P - 32; i >= 0; i -= 32)
      if (shared.row_square[i + lane] == longest) first = i + lane;
    return first;
  });
  const uint32_t given_bits = group.largest([&](int lane) {
    uint32_t all = 0;
    GRNG_UNROLL
    for (int i = 0; i < P; i += 32) {
      const uint32_t one = magnitude_bits(shared.given[i + lane]);
      all = one > all ? one : all;
    }
    return all;
  });
  const bool warm = given_bits > 0 && given_bits < kInfinityBits;
  const PowerOfTwo down(warm ? -exponent_of(float_of(given_bits)) : 0);
  const float given_scale = unit_scale(warm ? sum_rows<P>(group,
                                                          [&](int i) {
                                                            const float x =
                                                                down.times(shared.given[i]);
                                                            return x * x;
                                                          })
                                            : 0.0f);
  const float cold_scale = (warm ? kColdShare : 1.0f) * unit_scale(longest);
  group.each([&](int thread, Lane&) {
    if (thread >= P) return;
    const float cold = cold_scale * shared.matrix[start * kLd + thread];
    // Not even multiplied by zero: it may be NaN.
    shared.vector[0][thread] =
        warm ? fmaf(given_scale, down.times(shared.given[thread]), cold) : cold;
  });
  group.sync();

  const auto length = [&](int at) {
    return unit_scale(
        sum_rows<P>(group, [&](int i) { return shared.vector[at][i] * shared.vector[at][i]; }));
  };
  const auto multiply = [&](int at, float scale) {
    group.each([&](int thread, Lane& lane) {
      lane.partial = slice_dot<P>(lane, shared.vector[at], thread);
    });
    if constexpr (P > kOwn) group.add_neighbour();
    group.each([&](int thread, Lane& lane) {
      if (thread % (P / kOwn) == 0)
        shared.vector[1 - at][slice_row<P>(thread)] = scale * lane.partial;
    });
    group.sync();
  };
  const int exponent = row_sum > 0 ? exponent_of(row_sum) : 0;
  const float near_one = PowerOfTwo(exponent < -120 ? 120 : -exponent).times(1.0f);
  GRNG_ROLLED
  for (int step = 0; step < kPowerSteps; step += kStepsPerUnit) {
    const float scale = near_one * length(0);
    GRNG_ROLLED
    for (int pair = 0; pair < kStepsPerUnit; pair += 2) {
      multiply(0, pair == 0 ? scale : near_one);
      multiply(1, near_one);
    }
  }
  const float unit = length(0);
  multiply(0, unit);
  const float rayleigh =
      unit * sum_rows<P>(group, [&](int i) { return shared.vector[0][i] * shared.vector[1][i]; });
  const float bound = fminf(fminf(row_sum, sqrtf(square)), fmaxf(trace, diagonal));
  return {fminf(fmaxf(kNormSafety * rayleigh, diagonal), bound), row_sum, 0, unit};
}

// Everything about matrix `index` of an entry. `signs` [P, 16] are probe_sign().
template <int P, class Group>
GRNG_LANE void run(Group& group, Shared<P>& shared, const float* signs, const DampedSmall& item,
                   int64_t index, bool relative, float rho_root) {
  constexpr int kLd = Shared<P>::kLd, kThreads = Shared<P>::kThreads;
  const int n = item.n;
  float* inverse = item.inverse + index * n * n;
  float* vector = item.vector + index * n;
  const auto finish = [&](Info info, float used, float norm, float rest) {
    group.each([&](int thread, Lane&) {
      if (info == kNonfiniteInput || info == kNotConverged)
        for (int e = thread; e < n * n; e += kThreads) inverse[e] = 0;
      if (thread > 0) return;
      item.used[index] = used;
      item.norm[index] = norm;
      item.residual[index] = rest;
      item.info[index] = info;
    });
  };

  group.each([&](int thread, Lane& lane) {
    if (thread < P) shared.given[thread] = thread < n ? vector[thread] : 0.0f;
    load<P>(item, index, thread, lane);
    uint32_t largest = 0;
    GRNG_UNROLL
    for (int m = 0; m < kOwn; ++m) {
      const uint32_t one = magnitude_bits(lane.a[m]);
      largest = one > largest ? one : largest;
      shared.matrix[(thread / P + m * (kThreads / P)) * kLd + thread % P] = lane.a[m];
    }
    shared.scratch[thread] = float_of(largest);
  });
  group.sync();
  const uint32_t largest = largest_of_scratch<P>(group, shared);
  const float asked = relative ? 1.0f : item.damping[index];
  if (largest >= kInfinityBits || !(asked > 0) || bits_of(asked) >= kInfinityBits) {
    finish(kNonfiniteInput, 0, 0, float_of(kNanBits));
    return;
  }
  int exponent = largest > 0 ? exponent_of(float_of(largest)) : 1;
  // A damping far above a fading matrix would leave the range of fp32.
  const int least = exponent_of(asked) - kDampingBits;
  if (!relative && exponent < least) exponent = least;
  const PowerOfTwo down(-exponent), up(exponent);
  group.each(
      [&](int thread, Lane& lane) { symmetric_slice<P>(shared.matrix, down, thread, lane); });
  group.sync();
  group.each([&](int thread, Lane& lane) {
    store_slice<P>(shared.matrix, thread, lane);
    lane.partial = 0;
    GRNG_UNROLL
    for (int m = 0; m < kOwn; ++m) lane.partial += fabsf(lane.a[m]);
  });
  if constexpr (P > kOwn) group.add_neighbour();
  group.each([&](int thread, Lane& lane) {
    shared.row_sum[slice_row<P>(thread)] = lane.partial;
    lane.partial = 0;
    GRNG_UNROLL
    for (int m = 0; m < kOwn; ++m) lane.partial = fmaf(lane.a[m], lane.a[m], lane.partial);
  });
  if constexpr (P > kOwn) group.add_neighbour();
  group.each(
      [&](int thread, Lane& lane) { shared.row_square[slice_row<P>(thread)] = lane.partial; });
  group.sync();
  const Norm norm = spectral_norm<P>(group, shared, n);
  const float shift =
      relative ? fmaxf(rho_root * norm.estimate, down.times(kFloor)) : down.times(asked);

  // Scaled once more, now with the damping, so that no pivot is near an end of the range.
  const float size = fmaxf(norm.row_sum, shift);
  const int again = bits_of(size) < kInfinityBits && size > 0 ? exponent_of(size) : 0;
  const PowerOfTwo smaller(-again);
  group.each([&](int thread, Lane& lane) {
    const int i = slice_row<P>(thread);
    // Of the row's threads, the one whose slice has the diagonal.
    const bool owner = i / 4 % (P / kOwn) == thread % (P / kOwn);
    const float diagonal = owner ? shared.matrix[i * kLd + i] + shift : 0.0f;
    GRNG_UNROLL
    for (int m = 0; m < kOwn; ++m) lane.a[m] = smaller.times(lane.a[m]);
    store_slice<P>(shared.matrix, thread, lane);
    if (owner) shared.matrix[i * kLd + i] = i < n ? smaller.times(diagonal) : 1.0f;
  });
  group.sync();
  sweep<P>(group, shared, n);
  group.sync();
  const bool failed = group.any_failed();
  group.each([&](int thread, Lane& lane) {
    symmetric_slice<P>(shared.inverse, PowerOfTwo(0), thread, lane);
  });
  group.sync();
  group.each([&](int thread, Lane& lane) { store_slice<P>(shared.inverse, thread, lane); });
  group.sync();
  const PowerOfTwo back(-exponent - again);
  group.each([&](int thread, Lane&) {
    const int j = thread % P;
    uint32_t largest = 0;
    GRNG_UNROLL_4
    for (int i = thread / P; i < n; i += kThreads / P) {
      if (j >= n) break;
      const float value = back.times(shared.inverse[i * kLd + j]);
      inverse[i * n + j] = value;
      const uint32_t one = magnitude_bits(value);
      largest = one > largest ? one : largest;
    }
    shared.scratch[thread] = float_of(largest);
  });
  group.sync();
  const bool in_range = largest_of_scratch<P>(group, shared) < kInfinityBits;
  const float rest = residual<P>(group, shared, signs, n);
  const Info info = failed || !(rest <= kResidualLimit) ? kNotConverged
                    : in_range                          ? kOk
                                                        : kOverflow;
  group.each([&](int thread, Lane&) {
    if (info == kOk && thread < n) vector[thread] = norm.scale * shared.vector[norm.vector][thread];
  });
  finish(info, relative ? up.times(shift) : asked, up.times(norm.estimate), rest);
}

}  // namespace grng::damped_small
