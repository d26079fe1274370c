// SPDX-License-Identifier: Apache-2.0
// out = left * grad * right on the CPU for gradients with one small side, such as those of LoRA.
//
// The time of such a product is that of reading the large inverse, once. So all items are one piece
// of work, and gradients that meet the same inverse (the query and value projections of a layer)
// share its reading, while the next rows are fetched ahead.
//
// d is the larger side of a gradient and s the smaller. As [s, d] the gradients that share an
// inverse lie one below the other. The columns of the result are shared out in parts; each is
// summed by one thread, so the number of threads cannot change a result.
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
// Columns of gradients that one reading of an inverse serves, and how they are rounded up.
constexpr int64_t kMaxWidth = 64, kColumnTile = 8;
// Columns of the result in one part.
constexpr int64_t kPart = 768;
// Rows of the inverse that are read together: with the next ones they stay in L2.
constexpr int64_t kBlockRows = 16;
// Cache lines that are fetched ahead before each tile.
constexpr int kLinesPerTile = 24;

int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

bool is_wide(const Precondition& item) { return item.m <= item.n; }
int64_t small_side(const Precondition& item) { return std::min(item.m, item.n); }

// A wide gradient meets the columns of its inverse, a tall one the rows.
enum class Reads { kRows, kColumns };

// Gradients that share one large inverse.
struct Group {
  const float* large;
  int64_t stride, d, width;  // rows of length d in `grads` and in `results`
  Reads reads;
  std::vector<int64_t> items, first_column;
  int64_t grads, results;  // where they begin in the workspace
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
      groups.push_back({large, stride, d, 0, reads, {}, {}, 0, 0});
    }
    Group& group = groups[found->second];
    group.items.push_back(i);
    group.first_column.push_back(group.width);
    group.width += small_side(item);
  }
  return groups;
}

// ---- the gradients of a group as [width, d] ----

template <class In>
void gather(float* out, const Precondition& item) {
  const bool wide = is_wide(item);
  const In* grad = static_cast<const In*>(item.grad.data);
  const In* bias = static_cast<const In*>(item.bias);
  const int64_t s = small_side(item), d = std::max(item.m, item.n);
  const int64_t along = wide ? item.grad.col_stride : item.grad.row_stride;
  const int64_t across = wide ? item.grad.row_stride : item.grad.col_stride;
  // The last column is that of the bias: the last row here, or the last column here too.
  const int64_t rows = d - (bias && wide), columns = s - (bias && !wide);
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t i = 0; i < rows; ++i)
      out[c * d + i] = static_cast<float>(grad[i * along + c * across]);
  if (!bias) return;
  if (wide) {
    for (int64_t c = 0; c < s; ++c)
      out[c * d + rows] = static_cast<float>(bias[c * item.bias_stride]);
  } else {
    for (int64_t i = 0; i < d; ++i)
      out[columns * d + i] = static_cast<float>(bias[i * item.bias_stride]);
  }
}

void gather_any(float* out, const Precondition& item) {
  if (item.grad.dtype == Dtype::kFloat32) gather<float>(out, item);
  if (item.grad.dtype == Dtype::kBFloat16) gather<BFloat16>(out, item);
  if (item.grad.dtype == Dtype::kFloat16) gather<_Float16>(out, item);
}

void gather_group(float* grads, const Group& g, const Precondition* items) {
  std::memset(grads, 0, g.d * g.width * sizeof(float));
  for (size_t k = 0; k < g.items.size(); ++k)
    gather_any(grads + g.first_column[k] * g.d, items[g.items[k]]);
}

// ---- rows of the inverse times the gradients; both lie as [width, d] ----

// Brings rows [begin, end) of the inverse to L2, their columns [first, last), a few cache lines at
// a time.
class Prefetch {
 public:
  Prefetch(const Group& g, int64_t begin, int64_t end, int64_t first, int64_t last)
      : next_(g.large + begin * g.stride + first),
        row_end_(next_ + last - first),
        rows_(end - begin),
        columns_(last - first),
        stride_(g.stride) {}
  GRNG_INLINE void fetch() {
    for (int i = 0; i < kLinesPerTile && rows_ > 0; ++i) {
      __builtin_prefetch(next_, 0, 2);
      next_ += kLine;
      if (next_ >= row_end_) {
        row_end_ += stride_;
        next_ = row_end_ - columns_;
        --rows_;
      }
    }
  }

 private:
  const float *next_, *row_end_;
  int64_t rows_, columns_, stride_;
};

// results[c, j] += sum over rows i of grads[c, i] * a[i, j], for kColumnTile columns c and kVecs
// vectors of j.
template <class Isa, int kVecs>
GRNG_INLINE void backward_tile(float* results, const float* a, int64_t stride, const float* grads,
                               int64_t d, int64_t rows) {
  using S = Simd<Isa, float>;
  using Vec = typename S::Vec;
  constexpr int kTile = std::min<int>(kColumnTile, Isa::kAccumulators / kVecs);
  for (int c = 0; c < kColumnTile; c += kTile) {
    Vec sum[kTile][kVecs] = {};
    for (int64_t i = 0; i < rows; ++i) {
      Vec x[kVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) x[v] = S::load_once(a + i * stride + v * S::kLanes);
#pragma GCC unroll 8
      for (int t = 0; t < kTile; ++t) {
        const Vec y = S::broadcast(grads + i * kColumnTile + c + t);
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

// results[c, i + t] += sum over columns j < columns of grads[c, j] * a[t, j], for kColumnTile
// columns c and kRows rows t. Vectors run along j, so that a and the gradients are both read as
// they lie.
template <class Isa, int kRows>
GRNG_INLINE void forward_tile(float* results, const float* a, int64_t stride, const float* grads,
                              int64_t d, int64_t columns) {
  using S = Simd<Isa, float>;
  using Vec = typename S::Vec;
  constexpr int kTile = std::min<int>(kColumnTile, Isa::kAccumulators / kRows / 4 * 4);
  const int64_t whole = columns / S::kLanes * S::kLanes;
  for (int c = 0; c < kColumnTile; c += kTile) {
    Vec sum[kRows][kTile] = {};
    for (int64_t j = 0; j < whole; j += S::kLanes) {
      Vec x[kRows];
#pragma GCC unroll 4
      for (int t = 0; t < kRows; ++t) x[t] = S::load_once(a + t * stride + j);
#pragma GCC unroll 8
      for (int k = 0; k < kTile; ++k) {
        const Vec y = S::load_once(grads + (c + k) * d + j);
#pragma GCC unroll 4
        for (int t = 0; t < kRows; ++t) sum[t][k] += y * x[t];
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < kRows; ++t) {
      float totals[kTile];
#pragma GCC unroll 8
      for (int k = 0; k < kTile; k += 4) S::sum4(totals + k, sum[t] + k);
      for (int k = 0; k < kTile; ++k) {
        float rest = 0;
        for (int64_t j = whole; j < columns; ++j)
          rest += a[t * stride + j] * grads[(c + k) * d + j];
        results[(c + k) * d + t] += totals[k] + rest;
      }
    }
  }
}

// A few gradients with the elements that meet one row of the inverse side by side.
inline void copy_columns(float* own, const float* grads, int64_t d, int64_t rows) {
  for (int64_t t = 0; t < kColumnTile; ++t)
    for (int64_t i = 0; i < rows; ++i) own[i * kColumnTile + t] = grads[t * d + i];
}

// Columns [first, last) of the result, from all rows of the inverse.
template <class Isa>
GRNG_INLINE void multiply_columns(float* results, const Group& g, const float* grads, int64_t first,
                                  int64_t last) {
  constexpr int64_t kLanes = Simd<Isa, float>::kLanes;
  constexpr int64_t kStep = 3 * kLanes;
  for (int64_t begin = 0; begin < g.d; begin += kBlockRows) {
    const int64_t rows = std::min(kBlockRows, g.d - begin);
    const float* a = g.large + begin * g.stride;
    Prefetch ahead(g, begin + rows, std::min(g.d, begin + rows + kBlockRows), first, last);
    for (int64_t c = 0; c < g.width; c += kColumnTile) {
      float own[kBlockRows * kColumnTile];
      copy_columns(own, grads + c * g.d + begin, g.d, rows);
      float* out = results + c * g.d;
      int64_t j = first;
      for (; j + kStep <= last; j += kStep) {
        ahead.fetch();
        backward_tile<Isa, 3>(out + j, a + j, g.stride, own, g.d, rows);
      }
      for (; j + kLanes <= last; j += kLanes)
        backward_tile<Isa, 1>(out + j, a + j, g.stride, own, g.d, rows);
      for (; j < last; ++j)
        for (int64_t t = 0; t < kColumnTile; ++t) {
          float sum = 0;
          for (int64_t i = 0; i < rows; ++i) sum += own[i * kColumnTile + t] * a[i * g.stride + j];
          out[t * g.d + j] += sum;
        }
    }
  }
}

// The same from rows [first, last) of the inverse.
template <class Isa>
GRNG_INLINE void multiply_rows(float* results, const Group& g, const float* grads, int64_t first,
                               int64_t last) {
  constexpr int kRows = 3;
  for (int64_t begin = first; begin < last; begin += kBlockRows) {
    const int64_t end = std::min(last, begin + kBlockRows);
    Prefetch ahead(g, end, std::min(last, end + kBlockRows), 0, g.d);
    int64_t i = begin;
    for (; i + kRows <= end; i += kRows)
      for (int64_t c = 0; c < g.width; c += kColumnTile) {
        ahead.fetch();
        forward_tile<Isa, kRows>(results + c * g.d + i, g.large + i * g.stride, g.stride,
                                 grads + c * g.d, g.d, g.d);
      }
    for (; i < end; ++i)
      for (int64_t c = 0; c < g.width; c += kColumnTile)
        forward_tile<Isa, 1>(results + c * g.d + i, g.large + i * g.stride, g.stride,
                             grads + c * g.d, g.d, g.d);
  }
}

template <class Isa>
GRNG_INLINE void multiply_part(float* results, const Group& g, const float* grads, int64_t part) {
  const int64_t first = part * kPart, last = std::min(g.d, first + kPart);
  for (int64_t c = 0; c < g.width; ++c)
    std::memset(results + c * g.d + first, 0, (last - first) * sizeof(float));
  if (g.reads == Reads::kColumns) {
    multiply_columns<Isa>(results, g, grads, first, last);
  } else {
    multiply_rows<Isa>(results, g, grads, first, last);
  }
}

// ---- the result times the small inverse ----

template <class In>
double product_with(const Precondition& item) {
  const In* grad = static_cast<const In*>(item.grad.data);
  const In* bias = static_cast<const In*>(item.bias);
  double dot = 0;
  for (int64_t i = 0; i < item.m; ++i) {
    const float* out = item.out + i * item.out_row_stride;
    double row = 0;
    for (int64_t j = 0; j < item.grad.cols; ++j)
      row += static_cast<double>(out[j * item.out_col_stride]) *
             static_cast<float>(grad[i * item.grad.row_stride + j * item.grad.col_stride]);
    if (bias)
      row += static_cast<double>(out[item.grad.cols * item.out_col_stride]) *
             static_cast<float>(bias[i * item.bias_stride]);
    dot += row;
  }
  return dot;
}

template <class Isa>
GRNG_INLINE void finish_item(Precondition& item, const Group& g, const float* workspace,
                             int64_t first_column, bool with_dot) {
  const bool wide = is_wide(item);
  const int64_t s = small_side(item);
  const int64_t along = wide ? item.out_col_stride : item.out_row_stride;
  const int64_t across = wide ? item.out_row_stride : item.out_col_stride;
  using S = Simd<Isa, float>;
  alignas(kCacheLine) float small[kMaxPreconditionNarrow * kMaxPreconditionNarrow];
  for (int64_t a = 0; a < s; ++a)
    for (int64_t b = 0; b < s; ++b)
      small[a * s + b] =
          wide ? item.left[a * item.left_stride + b] : item.right[b * item.right_stride + a];
  const float* result = workspace + g.results + first_column * g.d;
  for (int64_t i = 0; i < g.d; i += S::kLanes) {
    // Past the end of a row lies the next one, or the padding of the workspace.
    typename S::Vec rows[kMaxPreconditionNarrow];
    for (int64_t b = 0; b < s; ++b) rows[b] = S::load(result + b * g.d + i);
    const int64_t now = std::min<int64_t>(S::kLanes, g.d - i);
    for (int64_t a = 0; a < s; ++a) {
      typename S::Vec sum = {}, other = {};
      int64_t b = 0;
      for (; b + 2 <= s; b += 2) {
        sum += S::broadcast(small + a * s + b) * rows[b];
        other += S::broadcast(small + a * s + b + 1) * rows[b + 1];
      }
      if (b < s) sum += S::broadcast(small + a * s + b) * rows[b];
      float out[S::kLanes];
      S::store(out, sum + other);
      float* to = item.out + i * along + a * across;
      if (along == 1) {
        std::memcpy(to, out, now * sizeof(float));
      } else {
        for (int64_t k = 0; k < now; ++k) to[k * along] = out[k];
      }
    }
  }
  if (!with_dot) return;
  if (item.grad.dtype == Dtype::kFloat32) item.dot = product_with<float>(item);
  if (item.grad.dtype == Dtype::kBFloat16) item.dot = product_with<BFloat16>(item);
  if (item.grad.dtype == Dtype::kFloat16) item.dot = product_with<_Float16>(item);
}

}  // namespace

void precondition_cpu(Precondition* items, int64_t count, bool with_dot, const Threads& threads) {
  std::vector<Group> groups = make_groups(items, count);
  struct Place {
    int64_t group, index;
  };
  std::vector<Place> parts, finishes;
  int64_t size = 0;
  for (int64_t k = 0; k < static_cast<int64_t>(groups.size()); ++k) {
    Group& g = groups[k];
    g.width = round_up(g.width, kColumnTile);
    g.grads = size;
    g.results = size + g.d * g.width;
    size += 2 * g.d * g.width;
    for (int64_t p = 0; p * kPart < g.d; ++p) parts.push_back({k, p});
    for (size_t i = 0; i < g.items.size(); ++i) finishes.push_back({k, static_cast<int64_t>(i)});
  }
  for (int64_t i = 0; i < count; ++i) items[i].dot = 0;
  if (groups.empty()) return;
  const Buffer<float> workspace = allocate<float>(size + kLine);
  run_dynamic(threads, static_cast<int64_t>(groups.size()), [&](auto, int64_t k) {
    gather_group(workspace.get() + groups[k].grads, groups[k], items);
  });
  run_dynamic(threads, static_cast<int64_t>(parts.size()),
              [&](auto isa, int64_t k) GRNG_INLINE_LAMBDA {
                const Group& g = groups[parts[k].group];
                multiply_part<decltype(isa)>(workspace.get() + g.results, g,
                                             workspace.get() + g.grads, parts[k].index);
              });
  run_dynamic(threads, static_cast<int64_t>(finishes.size()),
              [&](auto isa, int64_t k) GRNG_INLINE_LAMBDA {
                const Group& g = groups[finishes[k].group];
                const int64_t place = finishes[k].index;
                finish_item<decltype(isa)>(items[g.items[place]], g, workspace.get(),
                                           g.first_column[place], with_dot);
              });
}

}  // namespace grng
