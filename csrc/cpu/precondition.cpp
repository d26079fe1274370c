// SPDX-License-Identifier: Apache-2.0
// out = left * grad * right on the CPU for gradients with one small side, such as those of LoRA.
//
// The time of such a product is that of reading the large inverse, once. So all items are one piece
// of work, and gradients that meet the same inverse (the query and value projections of a layer)
// share its reading, while the rows that come next are fetched ahead.
//
// d is the larger side of a gradient and s the smaller. The results of a group of gradients are
// shared out in parts along d; each element is summed by one thread, in an order that d alone
// decides, so the number of threads cannot change a result.
#include <algorithm>
#include <cstring>
#include <map>
#include <tuple>
#include <vector>

#include "../kernels.h"
#include "elements.h"
#include "parallel.h"
#include "simd.h"

namespace grng {
namespace {

constexpr int64_t kLine = 16;  // fp32 elements of a cache line
// Columns of gradients that one reading of an inverse serves, and how those of wide ones are
// rounded up.
constexpr int64_t kMaxWidth = 64, kColumnTile = 8;
// Rows of an inverse that a wide gradient takes at a time: many save passes over the results, but
// what one strip of them holds is to stay in L1 for all its columns.
constexpr int64_t kBlockRows = 64;
// Products that a tall gradient sums in registers before they are added to the rest: a longer
// chain would round more.
constexpr int64_t kChain = 256;
// Multiplications that are worth waking a thread for, and the least part of d.
constexpr int64_t kWorthwhile = 1 << 18, kLeastPart = 96;

int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

bool is_wide(const Precondition& item) { return item.m <= item.n; }
int64_t small_side(const Precondition& item) { return std::min(item.m, item.n); }

// A wide gradient meets the columns of its inverse, a tall one the rows.
enum class Reads { kRows, kColumns };

// Gradients that share one large inverse.
struct Group {
  const float* large;
  int64_t stride, d, width;
  Reads reads;
  std::vector<int64_t> items, first_column;
  int64_t workspace;  // where its own begins
};

std::vector<Group> make_groups(const Precondition* items, int64_t count) {
  std::vector<Group> groups;
  // The last group of each inverse. With tens of thousands of gradients, looking through all groups
  // would take longer than the products.
  std::map<std::tuple<const float*, int64_t, int64_t, Reads>, size_t> last;
  for (int64_t i = 0; i < count; ++i) {
    const Precondition& item = items[i];
    if (item.m == 0 || item.n == 0) continue;
    const bool wide = is_wide(item);
    const float* large = wide ? item.right : item.left;
    const int64_t stride = wide ? item.right_stride : item.left_stride;
    const int64_t d = std::max(item.m, item.n);
    const Reads reads = wide ? Reads::kColumns : Reads::kRows;
    const auto [found, is_new] = last.try_emplace({large, stride, d, reads}, groups.size());
    if (is_new || groups[found->second].width + small_side(item) > kMaxWidth) {
      found->second = groups.size();
      groups.push_back({large, stride, d, 0, reads, {}, {}, 0});
    }
    Group& group = groups[found->second];
    group.items.push_back(i);
    group.first_column.push_back(group.width);
    group.width += small_side(item);
  }
  return groups;
}

// ---- wide gradients: results [width, d] = gradients [width, d] * inverse ----

template <class In>
void copy_block(float* own, const Precondition& item, int64_t begin, int64_t rows) {
  const In* grad = static_cast<const In*>(item.grad.data);
  const int64_t given = std::min(rows, item.grad.cols - begin);
  for (int64_t c = 0; c < item.m; ++c, own += kBlockRows) {
    const In* from = grad + c * item.grad.row_stride + begin * item.grad.col_stride;
    if (item.grad.col_stride == 1) {
      for (int64_t i = 0; i < given; ++i) own[i] = static_cast<float>(from[i]);
    } else {
      for (int64_t i = 0; i < given; ++i)
        own[i] = static_cast<float>(from[i * item.grad.col_stride]);
    }
    // The last column is that of the bias.
    if (given < rows)
      own[given] = static_cast<float>(static_cast<const In*>(item.bias)[c * item.bias_stride]);
  }
}

// Columns [begin, begin + rows) of the gradients, as [width, kBlockRows].
void copy_blocks(float* own, const Group& g, const Precondition* items, int64_t begin,
                 int64_t rows) {
  for (size_t k = 0; k < g.items.size(); ++k) {
    const Precondition& item = items[g.items[k]];
    float* to = own + g.first_column[k] * kBlockRows;
    if (item.grad.dtype == Dtype::kFloat32) copy_block<float>(to, item, begin, rows);
    if (item.grad.dtype == Dtype::kBFloat16) copy_block<BFloat16>(to, item, begin, rows);
    if (item.grad.dtype == Dtype::kFloat16) copy_block<_Float16>(to, item, begin, rows);
  }
}

// results[c, j] += sum over rows i of grads[c, i] * a[i, j], for kColumnTile columns c and kVecs
// vectors of j. What lies `ahead` of a is fetched meanwhile.
template <class Isa, int kVecs, bool kFetch>
GRNG_INLINE void backward_tile(float* results, const float* a, int64_t stride, const float* grads,
                               int64_t d, int64_t rows, int64_t ahead) {
  using S = Simd<Isa, float>;
  using Vec = typename S::Vec;
  constexpr int kTile = std::min<int>(kColumnTile, Isa::kAccumulators / kVecs);
  for (int c = 0; c < kColumnTile; c += kTile) {
    Vec sum[kTile][kVecs] = {};
    const float* row = a;
    for (int64_t i = 0; i < rows; ++i, row += stride) {
      Vec x[kVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        if (kFetch && c == 0) __builtin_prefetch(row + ahead + v * S::kLanes, 0, 2);
        x[v] = S::load_once(row + v * S::kLanes);
      }
#pragma GCC unroll 8
      for (int t = 0; t < kTile; ++t) {
        const Vec y = S::broadcast(grads + (c + t) * kBlockRows + i);
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) sum[t][v] += y * x[v];
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < kTile; ++t)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        float* out = results + (c + t) * d + v * S::kLanes;
        S::store(out, S::load(out) + sum[t][v]);
      }
  }
}

// out[a, j] = sum over b of left[a, b] * results[b, j], for columns [first, last).
template <class Isa>
GRNG_INLINE void finish_wide(const Precondition& item, const float* results, int64_t d,
                             int64_t first, int64_t last) {
  using S = Simd<Isa, float>;
  const int64_t s = item.m;
  for (int64_t j = first; j < last; j += S::kLanes) {
    const int64_t now = std::min<int64_t>(S::kLanes, last - j);
    typename S::Vec rows[kMaxPreconditionNarrow];
    for (int64_t b = 0; b < s; ++b) {
      // Past the last column lies what another thread may be writing.
      float end[S::kLanes] = {};
      const float* from = results + b * d + j;
      if (now < S::kLanes) from = static_cast<float*>(std::memcpy(end, from, now * sizeof(float)));
      rows[b] = S::load(from);
    }
    for (int64_t a = 0; a < s; ++a) {
      const float* small = item.left + a * item.left_stride;
      typename S::Vec sum = {}, other = {};
      int64_t b = 0;
      for (; b + 2 <= s; b += 2) {
        sum += S::broadcast(small + b) * rows[b];
        other += S::broadcast(small + b + 1) * rows[b + 1];
      }
      if (b < s) sum += S::broadcast(small + b) * rows[b];
      float out[S::kLanes];
      S::store(out, sum + other);
      float* to = item.out + a * item.out_row_stride + j * item.out_col_stride;
      if (item.out_col_stride == 1 && now == S::kLanes) {
        std::memcpy(to, out, sizeof(out));
      } else {
        for (int64_t k = 0; k < now; ++k) to[k * item.out_col_stride] = out[k];
      }
    }
  }
}

// Columns [first, last) of the results of a group.
template <class Isa>
GRNG_INLINE void wide_part(const Group& g, const Precondition* items, float* results, int64_t first,
                           int64_t last) {
  constexpr int64_t kLanes = Simd<Isa, float>::kLanes;
  constexpr int64_t kStep = 3 * kLanes;
  const int64_t width = round_up(g.width, kColumnTile);
  alignas(kCacheLine) float own[kMaxWidth * kBlockRows];
  std::memset(own, 0, width * kBlockRows * sizeof(float));
  for (int64_t c = 0; c < width; ++c)
    std::memset(results + c * g.d + first, 0, (last - first) * sizeof(float));
  for (int64_t begin = 0; begin < g.d; begin += kBlockRows) {
    const int64_t rows = std::min(kBlockRows, g.d - begin);
    copy_blocks(own, g, items, begin, rows);
    const float* a = g.large + begin * g.stride;
    // The last block looks at itself once more.
    const int64_t ahead = begin + 2 * kBlockRows <= g.d ? kBlockRows * g.stride : 0;
    int64_t j = first;
    for (; j + kStep <= last; j += kStep) {
      backward_tile<Isa, 3, true>(results + j, a + j, g.stride, own, g.d, rows, ahead);
      for (int64_t c = kColumnTile; c < width; c += kColumnTile)
        backward_tile<Isa, 3, false>(results + c * g.d + j, a + j, g.stride, own + c * kBlockRows,
                                     g.d, rows, 0);
    }
    for (; j + kLanes <= last; j += kLanes)
      for (int64_t c = 0; c < width; c += kColumnTile)
        backward_tile<Isa, 1, true>(results + c * g.d + j, a + j, g.stride, own + c * kBlockRows,
                                    g.d, rows, ahead);
    for (; j < last; ++j)
      for (int64_t c = 0; c < width; ++c) {
        float sum = 0;
        for (int64_t i = 0; i < rows; ++i) sum += own[c * kBlockRows + i] * a[i * g.stride + j];
        results[c * g.d + j] += sum;
      }
  }
  for (size_t k = 0; k < g.items.size(); ++k)
    finish_wide<Isa>(items[g.items[k]], results + g.first_column[k] * g.d, g.d, first, last);
}

// ---- tall gradients: results [d, width] = inverse * gradients [d, width] ----

// A vector runs along the columns of the gradients. Where these are few, it takes kPair rows of
// them, side by side: element c * kPair + p of a packed line is that of column c and row p.
constexpr int64_t kPacked = 16;

int64_t pairing(int64_t width) { return width <= 4 ? 4 : width <= 8 ? 2 : 1; }

// Packed lines of a group: one for every `pair` rows and kPacked / pair columns.
int64_t packed_size(const Group& g) {
  const int64_t pair = pairing(g.width);
  return round_up(g.width * pair, kPacked) * round_up(g.d, pair) / pair;
}

template <class In>
void pack_item(float* packed, const Group& g, const Precondition& item, int64_t first_column) {
  const In* grad = static_cast<const In*>(item.grad.data);
  const In* bias = static_cast<const In*>(item.bias);
  const int64_t pair = pairing(g.width), per_tile = kPacked / pair;
  const int64_t tile_size = round_up(g.d, pair) / pair * kPacked;
  for (int64_t b = 0; b < item.n; ++b) {
    const int64_t c = first_column + b;
    const bool is_bias = b == item.grad.cols;
    const In* from = is_bias ? bias : grad + b * item.grad.col_stride;
    const int64_t step = is_bias ? item.bias_stride : item.grad.row_stride;
    float* to = packed + c / per_tile * tile_size + c % per_tile * pair;
    for (int64_t i = 0; i < g.d; ++i)
      to[i / pair * kPacked + i % pair] = static_cast<float>(from[i * step]);
  }
}

// The gradients of a group, packed; where one lies like that already, itself.
const float* pack_group(float* packed, const Group& g, const Precondition* items) {
  const Precondition& first = items[g.items[0]];
  if (g.items.size() == 1 && g.width == kPacked && !first.bias &&
      first.grad.dtype == Dtype::kFloat32 && first.grad.col_stride == 1 &&
      first.grad.row_stride == kPacked)
    return static_cast<const float*>(first.grad.data);
  std::memset(packed, 0, packed_size(g) * sizeof(float));
  for (size_t k = 0; k < g.items.size(); ++k) {
    const Precondition& item = items[g.items[k]];
    if (item.grad.dtype == Dtype::kFloat32) pack_item<float>(packed, g, item, g.first_column[k]);
    if (item.grad.dtype == Dtype::kBFloat16)
      pack_item<BFloat16>(packed, g, item, g.first_column[k]);
    if (item.grad.dtype == Dtype::kFloat16) pack_item<_Float16>(packed, g, item, g.first_column[k]);
  }
  return packed;
}

// sums[t] += the products of kSteps packed lines with row t of the inverse, for kRows rows.
template <class Isa, int kRows, int kPair, int kSteps, class Vec, int kVecs>
GRNG_INLINE void add_lines(Vec (&sums)[kRows][kVecs], const float* const (&a)[(kRows + 3) / 4],
                           int64_t stride, const float* packed) {
  using S = Simd<Isa, float>;
#pragma GCC unroll 16
  for (int k = 0; k < kSteps; ++k) {
    Vec y[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) y[v] = S::load_once(packed + k * kPacked + v * S::kLanes);
#pragma GCC unroll 16
    for (int t = 0; t < kRows; ++t)
      S::template add_repeated<kPair>(sums[t], y, a[t / 4] + t % 4 * stride + k * kPair);
  }
}

// results[t, c] for kRows rows and all columns of a group; what lies below is fetched meanwhile.
template <class Isa, int kRows, int kPair>
GRNG_INLINE void forward_tile(float* results, const Group& g, const float* a, const float* packed,
                              int64_t ahead) {
  using S = Simd<Isa, float>;
  using Vec = typename S::Vec;
  constexpr int kVecs = kPacked / S::kLanes, kColumns = kPacked / kPair;
  constexpr int kLines = kLine / kPair;  // packed lines that one cache line of a row meets
  const int64_t whole = g.d / kLine * kLine;
  for (int64_t column = 0; column < g.width; column += kColumns) {
    float totals[kRows][kPacked] = {};
    for (int64_t begin = 0; begin < g.d; begin += kChain * kPair) {
      const int64_t end = std::min(whole, begin + kChain * kPair);
      Vec sums[kRows][kVecs] = {};
      const float* rows[(kRows + 3) / 4];
#pragma GCC unroll 4
      for (int q = 0; q < (kRows + 3) / 4; ++q) rows[q] = a + q * 4 * g.stride + begin;
      int64_t j = begin;
      for (; j < end; j += kLine, packed += kLines * kPacked) {
        if (column == 0) {
#pragma GCC unroll 16
          for (int t = 0; t < kRows; ++t)
            __builtin_prefetch(rows[t / 4] + t % 4 * g.stride + ahead, 0, 2);
        }
        add_lines<Isa, kRows, kPair, kLines>(sums, rows, g.stride, packed);
#pragma GCC unroll 4
        for (int q = 0; q < (kRows + 3) / 4; ++q) rows[q] += kLine;
      }
      // What is left of the rows, with zeros after it.
      const int64_t stop = std::min(g.d, begin + kChain * kPair);
      for (; j < stop; j += kPair, packed += kPacked) {
        float rest[(kRows + 3) / 4 * 4][kPair] = {};
        for (int t = 0; t < kRows; ++t)
          for (int64_t p = 0; p < std::min<int64_t>(kPair, stop - j); ++p)
            rest[t][p] = a[t * g.stride + j + p];
        const float* lines[(kRows + 3) / 4];
        for (int q = 0; q < (kRows + 3) / 4; ++q) lines[q] = rest[4 * q];
        add_lines<Isa, kRows, kPair, 1>(sums, lines, kPair, packed);
      }
#pragma GCC unroll 16
      for (int t = 0; t < kRows; ++t)
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) {
          float* total = totals[t] + v * S::kLanes;
          S::store(total, S::load(total) + sums[t][v]);
        }
    }
    for (int t = 0; t < kRows; ++t)
      for (int c = 0; c < kColumns; ++c) {
        const float* p = totals[t] + c * kPair;
        results[t * kMaxWidth + column + c] = kPair == 4   ? (p[0] + p[1]) + (p[2] + p[3])
                                              : kPair == 2 ? p[0] + p[1]
                                                           : p[0];
      }
  }
}

// out[i, a] = sum over b of results[i, b] * right[b, a].
template <class Isa>
GRNG_INLINE void finish_tall(const Precondition& item, const float* small, const float* results,
                             int64_t first, int64_t rows) {
  using S = Simd<Isa, float>;
  constexpr int kVecs = kPacked / S::kLanes;
  for (int64_t t = 0; t < rows; ++t, results += kMaxWidth) {
    typename S::Vec sums[kVecs] = {};
    for (int64_t b = 0; b < item.n; ++b)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v)
        sums[v] += S::broadcast(results + b) * S::load(small + b * kPacked + v * S::kLanes);
    float out[kPacked];
    for (int v = 0; v < kVecs; ++v) S::store(out + v * S::kLanes, sums[v]);
    float* to = item.out + (first + t) * item.out_row_stride;
    for (int64_t k = 0; k < item.n; ++k) to[k * item.out_col_stride] = out[k];
  }
}

// Rows [first, last) of the results of a group.
template <class Isa, int kPair>
GRNG_INLINE void tall_part(const Group& g, const Precondition* items, const float* packed,
                           int64_t first, int64_t last) {
  constexpr int kRows = Isa::kAccumulators / (kPacked / Simd<Isa, float>::kLanes) / 2;
  alignas(kCacheLine) float results[kRows * kMaxWidth];
  alignas(kCacheLine) float small[kMaxPreconditionNarrow * kPacked] = {};
  const auto finish = [&](int64_t row, int64_t rows) GRNG_INLINE_LAMBDA {
    for (size_t k = 0; k < g.items.size(); ++k) {
      const Precondition& item = items[g.items[k]];
      if (g.items.size() > 1 || row == first)
        for (int64_t b = 0; b < item.n; ++b)
          std::memcpy(small + b * kPacked, item.right + b * item.right_stride,
                      item.n * sizeof(float));
      finish_tall<Isa>(item, small, results + g.first_column[k], row, rows);
    }
  };
  int64_t i = first;
  for (; i + kRows <= last; i += kRows) {
    const int64_t ahead = i + 2 * kRows <= last ? kRows * g.stride : 0;
    forward_tile<Isa, kRows, kPair>(results, g, g.large + i * g.stride, packed, ahead);
    finish(i, kRows);
  }
  for (; i < last; ++i) {
    forward_tile<Isa, 1, kPair>(results, g, g.large + i * g.stride, packed, 0);
    finish(i, 1);
  }
}

// ---- inner products ----

template <class Isa, class In>
GRNG_INLINE double product_with(const Precondition& item) {
  constexpr int kLanes = 8;
  const In* grad = static_cast<const In*>(item.grad.data);
  const In* bias = static_cast<const In*>(item.bias);
  double dot = 0;
  for (int64_t i = 0; i < item.m; ++i) {
    const float* out = item.out + i * item.out_row_stride;
    const In* row = grad + i * item.grad.row_stride;
    double sums[kLanes] = {};
    int64_t j = 0;
    if (item.out_col_stride == 1 && item.grad.col_stride == 1)
      for (; j + kLanes <= item.grad.cols; j += kLanes)
        for (int k = 0; k < kLanes; ++k)
          sums[k] += static_cast<double>(out[j + k]) * static_cast<float>(row[j + k]);
    for (; j < item.grad.cols; ++j)
      sums[0] += static_cast<double>(out[j * item.out_col_stride]) *
                 static_cast<float>(row[j * item.grad.col_stride]);
    if (bias)
      sums[0] += static_cast<double>(out[item.grad.cols * item.out_col_stride]) *
                 static_cast<float>(bias[i * item.bias_stride]);
    for (double sum : sums) dot += sum;
  }
  return dot;
}

template <class Isa>
GRNG_INLINE double product_with_gradient(const Precondition& item) {
  if (item.grad.dtype == Dtype::kBFloat16) return product_with<Isa, BFloat16>(item);
  if (item.grad.dtype == Dtype::kFloat16) return product_with<Isa, _Float16>(item);
  return product_with<Isa, float>(item);
}

}  // namespace

void precondition_cpu(Precondition* items, int64_t count, bool with_dot, const Threads& threads) {
  for (int64_t i = 0; i < count; ++i) items[i].dot = 0;
  std::vector<Group> groups = make_groups(items, count);
  if (groups.empty()) return;
  int64_t size = 0, work = 0;
  for (Group& g : groups) {
    const bool wide = g.reads == Reads::kColumns;
    g.workspace = size;
    size += wide ? round_up(g.width, kColumnTile) * g.d : packed_size(g);
    size = round_up(size, kLine);
    work += g.d * g.d * g.width;
  }
  // Every thread gets a few pieces, where there is enough for it to do.
  const int64_t wanted = std::min(threads.count == 1 ? 1 : 3 * threads.count, work / kWorthwhile);
  const int64_t per_group = wanted / static_cast<int64_t>(groups.size()) + 1;
  struct Part {
    const Group* group;
    int64_t first, last;
  };
  std::vector<Part> parts;
  for (const Group& g : groups) {
    const int64_t length = round_up(std::max(kLeastPart, (g.d + per_group - 1) / per_group), 48);
    for (int64_t first = 0; first < g.d; first += length)
      parts.push_back({&g, first, std::min(g.d, first + length)});
  }
  const Buffer<float> workspace = allocate<float>(size + kLine);
  // Parts of one group share its packed gradients, which are then made first.
  std::vector<const float*> packed(groups.size());
  if (per_group > 1)
    for (size_t k = 0; k < groups.size(); ++k)
      if (groups[k].reads == Reads::kRows)
        packed[k] = pack_group(workspace.get() + groups[k].workspace, groups[k], items);
  const auto run = [&](auto isa, int64_t k) GRNG_INLINE_LAMBDA {
    using Isa = decltype(isa);
    const Part& part = parts[k];
    const Group& g = *part.group;
    float* own = workspace.get() + g.workspace;
    if (g.reads == Reads::kColumns) return wide_part<Isa>(g, items, own, part.first, part.last);
    const float* gradients = packed[&g - groups.data()];
    if (!gradients) gradients = pack_group(own, g, items);
    const int64_t pair = pairing(g.width);
    if (pair == 4) return tall_part<Isa, 4>(g, items, gradients, part.first, part.last);
    if (pair == 2) return tall_part<Isa, 2>(g, items, gradients, part.first, part.last);
    tall_part<Isa, 1>(g, items, gradients, part.first, part.last);
  };
  if (wanted <= 1) {
    for (int64_t k = 0; k < static_cast<int64_t>(parts.size()); ++k)
      for_this_cpu([&](auto isa) GRNG_INLINE_LAMBDA { run(isa, k); });
  } else {
    run_dynamic(threads, static_cast<int64_t>(parts.size()), run);
  }
  if (!with_dot) return;
  const auto multiply = [&](auto isa, int64_t i) GRNG_INLINE_LAMBDA {
    if (items[i].m > 0 && items[i].n > 0)
      items[i].dot = product_with_gradient<decltype(isa)>(items[i]);
  };
  run_dynamic(threads, count, multiply);
}

}  // namespace grng
