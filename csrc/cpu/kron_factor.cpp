// SPDX-License-Identifier: Apache-2.0
// factor <- decay * factor + scale * x^T x on the CPU.
//
// Only tiles of the lower triangle are computed, half the work of a GEMM; each is stored to both
// triangles, so the factor is bitwise symmetric. Layout, dtype and the bias column are dealt with
// once, when rows of x are packed; the arithmetic sees contiguous panels only. The largest |x| is
// found on the way, and the factor is written only after the whole batch has been checked.
//
// Two ways to share the work, chosen by the shape alone so that the number of threads cannot change
// a result: small factors split the rows into chunks with sums of their own, added in a fixed order
// at the end; large ones split the tiles.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../kernels.h"
#include "bf16_dot.h"
#include "elements.h"
#include "factor_check.h"
#include "parallel.h"
#include "tiles.h"

namespace grng {
namespace {

// Rows packed at a time for a large factor: the sums of all tiles pass through the caches once for
// each, so more is better, until the packed rows leave the last cache.
constexpr int64_t kRowsPerPhase = 5 * kRowsPerBlock;
// Tiles of 4 x 4 panels are one piece of work: their sums and the rows they need share L2, and each
// packed panel is fetched once for four tiles.
constexpr int64_t kPanelsPerBlock = 4;
// The private sums of a chunk of rows must stay in L2: 220 KiB of fp32 for this many columns.
constexpr int64_t kMaxChunkedColumns = 336;
constexpr int64_t kMaxChunks = 32;
// Cache lines of the next rows that are fetched before each strip of the products: enough to have
// all of them when they are needed, few enough not to hold up the products.
constexpr int kLinesPerStrip = 32;

// ---- packing: rows of x as panels [panel][row][width], `height` rows apart ----

template <class Isa, class T, class P, class In>
GRNG_INLINE double pack_rows(T* packed, const ConstMatrix& x, bool bias, int64_t begin,
                             int64_t rows, int64_t height, int64_t panel_begin, int64_t panel_end) {
  using S = Simd<Isa, T>;
  constexpr int64_t kWidth = kWidthOf<T, P>;
  constexpr int kVecs = P::kCount * 64 / Isa::kVectorBytes;
  const int64_t n = x.cols + bias;
  const In* data = static_cast<const In*>(x.data) + begin * x.row_stride;
  typename S::Magnitudes largest = {};
  for (int64_t p = panel_begin; p < panel_end; ++p) {
    T* out = packed + p * height * kWidth;
    const int64_t first = p * kWidth, filled = std::min(kWidth, x.cols - first);
    for (int64_t r = 0; r < rows; ++r, out += kWidth) {
      const In* in = data + r * x.row_stride + first * x.col_stride;
      if (filled == kWidth && x.col_stride == 1) {
        for (int64_t c = 0; c < kWidth; ++c) out[c] = static_cast<T>(in[c]);
      } else {
        for (int64_t c = 0; c < filled; ++c) out[c] = static_cast<T>(in[c * x.col_stride]);
        for (int64_t c = filled; c < kWidth; ++c) out[c] = bias && first + c == n - 1 ? T{1} : T{0};
      }
#pragma GCC unroll 12
      for (int v = 0; v < kVecs; ++v) largest = S::larger(largest, S::load(out + v * S::kLanes));
    }
  }
  return S::largest(largest);
}

// Rows of patches, gathered. Their largest magnitude is found by whoever owns the images.
template <class T, class P, class In>
GRNG_INLINE void pack_patches(T* packed, const ConstMatrix& x, bool bias, int64_t begin,
                              int64_t rows, int64_t height, int64_t panel_begin,
                              int64_t panel_end) {
  constexpr int64_t kWidth = kWidthOf<T, P>;
  const PatchGrid& g = *x.patches;
  const int64_t taps = g.kernel[0] * g.kernel[1], size = g.out_height * g.out_width;
  for (int64_t p = panel_begin; p < panel_end; ++p) {
    const int64_t first = p * kWidth, filled = std::min(kWidth, x.cols - first);
    int64_t down[kWidth], right[kWidth], offset[kWidth];
    for (int64_t c = 0; c < filled; ++c) {
      const int64_t tap = (first + c) % taps;
      down[c] = tap / g.kernel[1] * g.dilation[0];
      right[c] = tap % g.kernel[1] * g.dilation[1];
      offset[c] = (first + c) / taps * g.channel_stride + down[c] * g.line_stride +
                  right[c] * g.column_stride;
    }
    T* out = packed + p * height * kWidth;
    for (int64_t r = begin; r < begin + rows; ++r, out += kWidth) {
      const int64_t place = r % size;
      const int64_t line = place / g.out_width * g.stride[0] - g.padding[0];
      const int64_t column = place % g.out_width * g.stride[1] - g.padding[1];
      const int64_t start =
          r / size * g.batch_stride + line * g.line_stride + column * g.column_stride;
      const In* in = static_cast<const In*>(x.data);
      const bool inside = line >= 0 && line + (g.kernel[0] - 1) * g.dilation[0] < g.height &&
                          column >= 0 && column + (g.kernel[1] - 1) * g.dilation[1] < g.width;
      if (inside) {
        for (int64_t c = 0; c < filled; ++c) out[c] = static_cast<T>(in[start + offset[c]]);
      } else {
        for (int64_t c = 0; c < filled; ++c) {
          const int64_t i = line + down[c], j = column + right[c];
          const bool covered = i >= 0 && i < g.height && j >= 0 && j < g.width;
          out[c] = covered ? static_cast<T>(in[start + offset[c]]) : T{0};
        }
      }
      for (int64_t c = filled; c < kWidth; ++c) out[c] = bias && first + c == x.cols ? T{1} : T{0};
    }
  }
}

template <class Isa, class T, class P, class In>
GRNG_INLINE double pack_any(T* packed, const ConstMatrix& x, bool bias, int64_t begin, int64_t rows,
                            int64_t height, int64_t panel_begin, int64_t panel_end) {
  if (!x.patches)
    return pack_rows<Isa, T, P, In>(packed, x, bias, begin, rows, height, panel_begin, panel_end);
  pack_patches<T, P, In>(packed, x, bias, begin, rows, height, panel_begin, panel_end);
  return bias;
}

// Returns the largest magnitude that was packed, ones of the bias included: inf or NaN where one
// is.
template <class Isa, class T, class P, class Dot>
GRNG_INLINE double pack(T* packed, const ConstMatrix& x, bool bias, int64_t begin, int64_t rows,
                        int64_t height, int64_t panel_begin, int64_t panel_end) {
  if constexpr (Dot::kRows == 2)
    return pack_pairs<kWidthOf<T, P>>(packed, x, bias, begin, rows, height, panel_begin, panel_end);
  switch (x.dtype) {
    case Dtype::kFloat64:
      if constexpr (sizeof(T) == 8)
        return pack_any<Isa, T, P, double>(packed, x, bias, begin, rows, height, panel_begin,
                                           panel_end);
      break;
    case Dtype::kFloat32:
      if constexpr (sizeof(T) == 4)
        return pack_any<Isa, T, P, float>(packed, x, bias, begin, rows, height, panel_begin,
                                          panel_end);
      break;
    case Dtype::kBFloat16:
      if constexpr (sizeof(T) == 4)
        return pack_any<Isa, T, P, BFloat16>(packed, x, bias, begin, rows, height, panel_begin,
                                             panel_end);
      break;
    case Dtype::kFloat16:
      if constexpr (sizeof(T) == 4)
        return pack_any<Isa, T, P, _Float16>(packed, x, bias, begin, rows, height, panel_begin,
                                             panel_end);
      break;
  }
  return std::numeric_limits<double>::quiet_NaN();
}

// Calls f with how rows of this matrix are multiplied: Products{} or PairProducts{}.
template <class T, class F>
GRNG_INLINE void with_dot(const ConstMatrix& x, const F& f) {
  if constexpr (sizeof(T) == 4) {
    if (x.dtype == Dtype::kBFloat16 && !x.patches && PairProducts::available())
      return f(PairProducts{});
  }
  f(Products{});
}

// Brings rows [begin, end) of a matrix to L2, a few cache lines at a time.
class Prefetch {
 public:
  Prefetch(const ConstMatrix& x, int64_t begin, int64_t end) {
    const int64_t size = size_of(x.dtype);
    // Of other layouts, too little would be of use.
    if (x.patches || x.col_stride != 1 || x.row_stride < x.cols) return;
    next_ = static_cast<const char*>(x.data) + begin * x.row_stride * size;
    row_end_ = next_ + x.cols * size;
    end_ = next_ + (end - begin) * x.row_stride * size;
    gap_ = (x.row_stride - x.cols) * size;
    row_ = x.cols * size;
  }
  GRNG_INLINE void fetch(int lines) {
    for (int i = 0; i < lines && next_ < end_; ++i) {
      __builtin_prefetch(next_, 0, 2);
      next_ += kCacheLine;
      if (next_ >= row_end_) {
        next_ += gap_;
        row_end_ += row_ + gap_;
      }
    }
  }

 private:
  const char *next_ = nullptr, *row_end_ = nullptr, *end_ = nullptr;
  int64_t gap_ = 0, row_ = 0;
};

// Writes the mirror image of 4 x 4 elements: element by element, it takes longer than the products
// of a short batch.
template <class T>
GRNG_INLINE void transpose4(T* out, int64_t out_stride, const T* in, int64_t in_stride) {
  typedef T Row __attribute__((vector_size(4 * sizeof(T))));
  typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> Index;
  typedef Index Order __attribute__((vector_size(4 * sizeof(T))));
  Row r[4];
  for (int i = 0; i < 4; ++i) std::memcpy(&r[i], in + i * in_stride, sizeof(Row));
  const Order low = {0, 4, 1, 5}, high = {2, 6, 3, 7}, first = {0, 1, 4, 5}, second = {2, 3, 6, 7};
  const Row a = __builtin_shuffle(r[0], r[1], low), b = __builtin_shuffle(r[0], r[1], high);
  const Row c = __builtin_shuffle(r[2], r[3], low), d = __builtin_shuffle(r[2], r[3], high);
  const Row columns[4] = {__builtin_shuffle(a, c, first), __builtin_shuffle(a, c, second),
                          __builtin_shuffle(b, d, first), __builtin_shuffle(b, d, second)};
  for (int j = 0; j < 4; ++j) std::memcpy(out + j * out_stride, &columns[j], sizeof(Row));
}

// Tile <- decay * tile + scale * sum, in both triangles; `sum` is used up. The products were summed
// apart from the factor and meet it once: adding each block to a large factor would round as often
// as there are blocks.
template <class T, class P>
GRNG_INLINE void commit_tile(const FactorUpdate& item, T* sum, TileIndex tile) {
  constexpr int64_t kWidth = kWidthOf<T, P>;
  const int64_t n = item.x.cols + item.bias;
  const T decay = static_cast<T>(item.decay), scale = static_cast<T>(item.scale);
  T* factor = static_cast<T*>(item.factor);
  const int64_t row0 = tile.row * kWidth, col0 = tile.col * kWidth;
  const int64_t height = std::min(kWidth, n - row0);
  for (int64_t i = 0; i < height; ++i) {
    // The diagonal tile stops at the diagonal: the rest of it is a mirror image.
    const int64_t width = tile.row == tile.col ? i + 1 : kWidth;
    T* out = factor + (row0 + i) * n + col0;
    T* in = sum + i * kWidth;
    if (decay != 0) {
      for (int64_t j = 0; j < width; ++j) in[j] = decay * out[j] + scale * in[j];
    } else {
      for (int64_t j = 0; j < width; ++j) in[j] = scale * in[j];
    }
    std::memcpy(out, in, width * sizeof(T));
  }
  const int64_t width = std::min(kWidth, n - col0);
  for (int64_t j = 0; j < width; j += 4) {
    int64_t i = tile.row == tile.col ? j : 0;
    const auto mirror_one_by_one = [&](int64_t end) {
      for (; i < end; ++i)
        for (int64_t k = j; k < std::min(j + 4, width); ++k)
          if (tile.row != tile.col || k < i)
            factor[(col0 + k) * n + row0 + i] = sum[i * kWidth + k];
    };
    if (tile.row == tile.col) mirror_one_by_one(std::min(j + 4, height));
    if (j + 4 <= width)
      for (; i + 4 <= height; i += 4)
        transpose4(factor + (col0 + j) * n + row0 + i, n, sum + i * kWidth + j, kWidth);
    mirror_one_by_one(height);
  }
}

// ---- large factors: the tiles are shared out ----

// Elements of workspace that update_by_tiles needs: the packed rows of a phase, then the sums.
template <class T, class P>
int64_t tiles_workspace(const FactorUpdate& item) {
  const int64_t panels = ceil_div(item.x.cols + item.bias, kWidthOf<T, P>);
  return panels * std::min(kRowsPerPhase, item.x.rows) * kWidthOf<T, P> +
         tile_count(panels) * kTileSizeOf<T, P>;
}

template <class T, class P, class Dot>
Info update_by_tiles(const FactorUpdate& item, T* packed, double* largest, const Threads& threads) {
  constexpr int64_t kWidth = kWidthOf<T, P>;
  const ConstMatrix& x = item.x;
  const int64_t panels = ceil_div(x.cols + item.bias, kWidth);
  const int64_t blocks = ceil_div(panels, kPanelsPerBlock);
  const int64_t phase = std::min(kRowsPerPhase, x.rows), height = ceil_div(phase, Dot::kRows);
  static_assert(kRowsPerBlock % Dot::kRows == 0);
  T* const sums = packed + panels * height * kWidth;
  double amax = 0;
  for (int64_t row = 0; row < x.rows; row += phase) {
    const int64_t rows = std::min(phase, x.rows - row);
    run_dynamic(threads, panels, [&](auto isa, int64_t p) GRNG_INLINE_LAMBDA {
      largest[p] =
          pack<decltype(isa), T, P, Dot>(packed, x, item.bias, row, rows, height, p, p + 1);
    });
    for (int64_t p = 0; p < panels; ++p) amax = larger(amax, largest[p]);
    if (!std::isfinite(amax)) return kNonfiniteInput;
    const bool first = row == 0, last = row + rows == x.rows;
    if (last) {
      const Info info = verdict<T>(item, amax);
      if (info != kOk) return info;
    }
    run_dynamic(threads, tile_count(blocks), [&](auto isa, int64_t b) GRNG_INLINE_LAMBDA {
      const TileIndex block(b);
      const int64_t row_end = std::min(panels, (block.row + 1) * kPanelsPerBlock);
      const int64_t col_end = std::min(panels, (block.col + 1) * kPanelsPerBlock);
      const auto for_each_tile = [&](const auto& f) GRNG_INLINE_LAMBDA {
        for (int64_t i = block.row * kPanelsPerBlock; i < row_end; ++i)
          for (int64_t j = block.col * kPanelsPerBlock; j < std::min(col_end, i + 1); ++j)
            f(TileIndex(i, j), sums + (tile_count(i) + j) * kTileSizeOf<T, P>);
      };
      if (first)
        for_each_tile(
            [](TileIndex, T* sum) { std::memset(sum, 0, kTileSizeOf<T, P> * sizeof(T)); });
      for (int64_t r = 0; r < rows; r += kRowsPerBlock)
        for_each_tile([&](TileIndex tile, T* sum) GRNG_INLINE_LAMBDA {
          const int64_t now = ceil_div(std::min(kRowsPerBlock, rows - r), Dot::kRows);
          add_product<decltype(isa), T, P, Dot>(
              sum, packed + (tile.row * height + r / Dot::kRows) * kWidth,
              packed + (tile.col * height + r / Dot::kRows) * kWidth, one_line(now),
              tile.row == tile.col, []() GRNG_INLINE_LAMBDA {});
        });
      if (last)
        for_each_tile([&](TileIndex tile, T* sum)
                          GRNG_INLINE_LAMBDA { commit_tile<T, P>(item, sum, tile); });
    });
  }
  return kOk;
}

// ---- small factors, any number of them: the rows are shared out ----

// Chunks of the rows of one factor: enough for many threads, each long enough that adding up the
// sums costs little beside making them.
int64_t chunk_rows(int64_t rows, int64_t n) {
  const int64_t least = std::max<int64_t>(4 * kRowsPerBlock, 4 * n);
  const int64_t wanted = std::max(least, ceil_div(rows, kMaxChunks));
  return ceil_div(wanted, kRowsPerBlock) * kRowsPerBlock;
}

template <class T, class P>
int64_t sums_size(int64_t n) {
  return tile_count(ceil_div(n, kWidthOf<T, P>)) * kTileSizeOf<T, P>;
}

// Sums of one chunk of rows [begin, end); returns the largest |x|.
template <class Isa, class T, class P, class Dot>
GRNG_INLINE double sum_rows(T* sum, const FactorUpdate& item, int64_t begin, int64_t end) {
  constexpr int64_t kWidth = kWidthOf<T, P>;
  const int64_t n = item.x.cols + item.bias, panels = ceil_div(n, kWidth);
  // On the stack: an allocation that fails in a worker could not be reported.
  alignas(kCacheLine) T packed[kMaxChunkedColumns * kRowsPerBlock];
  std::memset(sum, 0, sums_size<T, P>(n) * sizeof(T));
  // One panel of exactly these columns looks as x does: the usual ranks of LoRA need no packing.
  const bool is_packed = !item.x.patches && item.x.cols == kWidth && item.x.row_stride == kWidth &&
                         item.x.col_stride == 1 && !item.bias && size_of(item.x.dtype) == sizeof(T);
  double amax = 0;
  for (int64_t row = begin; row < end; row += kRowsPerBlock) {
    const int64_t rows = std::min(kRowsPerBlock, end - row);
    const T* block = packed;
    if (is_packed) {
      block = static_cast<const T*>(item.x.data) + row * kWidth;
      amax = larger(amax, largest_magnitude<Isa>(block, rows * kWidth));
    } else {
      amax = larger(amax, pack<Isa, T, P, Dot>(packed, item.x, item.bias, row, rows, kRowsPerBlock,
                                               0, panels));
    }
    // Packing waits for memory, the products do not: the next rows are on their way meanwhile.
    Prefetch ahead(item.x, row + rows, std::min(end, row + rows + kRowsPerBlock));
    T* tile = sum;
    for (int64_t i = 0; i < panels; ++i)
      for (int64_t j = 0; j <= i; ++j, tile += kWidth * kWidth)
        add_product<Isa, T, P, Dot>(tile, block + i * kRowsPerBlock * kWidth,
                                    block + j * kRowsPerBlock * kWidth,
                                    one_line(ceil_div(rows, Dot::kRows)), i == j,
                                    [&]() GRNG_INLINE_LAMBDA { ahead.fetch(kLinesPerStrip); });
  }
  return amax;
}

// Adds the sums of `parts` chunks, which lie one after another, and commits them.
template <class T, class P>
GRNG_INLINE void commit_rows(const FactorUpdate& item, T* sums, int64_t parts) {
  constexpr int64_t kTileSize = kTileSizeOf<T, P>;
  const int64_t n = item.x.cols + item.bias, size = sums_size<T, P>(n);
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t k = 0; k < size; ++k) sums[k] += sums[part * size + k];
  for (int64_t t = 0; t < size / kTileSize; ++t)
    commit_tile<T, P>(item, sums + t * kTileSize, TileIndex(t));
}

// The updates of one state dtype. Making it takes all the memory that they need, so that where
// there is none nothing has been written.
template <class T>
class Updates {
 public:
  explicit Updates(const std::vector<FactorUpdate*>& items) {
    int64_t tiles = 0, panels = 0, sums = 0;
    for (FactorUpdate* item : items) {
      const int64_t n = item->x.cols + item->bias;
      with_panels<T>(n, [&](auto p) {
        using P = decltype(p);
        const int64_t count = ceil_div(n, kWidthOf<T, P>);
        if (count * kWidthOf<T, P> > kMaxChunkedColumns) {
          large_.push_back(item);
          panels = std::max(panels, count);
          tiles = std::max(tiles, tiles_workspace<T, P>(*item));
          return;
        }
        const int64_t rows = item->x.rows, step = chunk_rows(rows, n);
        for (int64_t row = 0; row < rows; row += step, sums += sums_size<T, P>(n))
          chunks_.push_back(
              {static_cast<int64_t>(small_.size()), row, std::min(rows, row + step), sums, 0.0});
        small_.push_back(item);
        first_chunk_.push_back(static_cast<int64_t>(chunks_.size()));
      });
    }
    tiles_ = allocate<T>(tiles);
    sums_ = allocate<T>(sums);
    largest_.resize(panels);
  }

  void run(const Threads& threads) {
    run_small(threads);
    for (FactorUpdate* item : large_)
      with_panels<T>(item->x.cols + item->bias, [&](auto p) {
        with_dot<T>(item->x, [&](auto dot) {
          item->info = update_by_tiles<T, decltype(p), decltype(dot)>(*item, tiles_.get(),
                                                                      largest_.data(), threads);
        });
      });
  }

 private:
  struct Chunk {
    int64_t item, begin, end, sums;
    double amax;
  };

  void run_small(const Threads& threads) {
    if (small_.empty()) return;
    run_dynamic(threads, static_cast<int64_t>(chunks_.size()),
                [&](auto isa, int64_t c) GRNG_INLINE_LAMBDA {
                  Chunk& chunk = chunks_[c];
                  const FactorUpdate& item = *small_[chunk.item];
                  with_panels<T>(item.x.cols + item.bias, [&](auto p) GRNG_INLINE_LAMBDA {
                    with_dot<T>(item.x, [&](auto dot) GRNG_INLINE_LAMBDA {
                      chunk.amax = sum_rows<decltype(isa), T, decltype(p), decltype(dot)>(
                          sums_.get() + chunk.sums, item, chunk.begin, chunk.end);
                    });
                  });
                });
    const auto commit = [&](auto, int64_t i) GRNG_INLINE_LAMBDA {
      FactorUpdate& item = *small_[i];
      double amax = 0;
      for (int64_t c = first_chunk_[i]; c < first_chunk_[i + 1]; ++c)
        amax = larger(amax, chunks_[c].amax);
      item.info = verdict<T>(item, amax);
      if (item.info != kOk) return;
      with_panels<T>(item.x.cols + item.bias, [&](auto p) GRNG_INLINE_LAMBDA {
        commit_rows<T, decltype(p)>(item, sums_.get() + chunks_[first_chunk_[i]].sums,
                                    first_chunk_[i + 1] - first_chunk_[i]);
      });
    };
    if (small_.size() > 1) {
      run_dynamic(threads, static_cast<int64_t>(small_.size()), commit);
    } else {  // waking the threads would take longer
      for_this_cpu([&](auto isa) GRNG_INLINE_LAMBDA { commit(isa, 0); });
    }
  }

  std::vector<FactorUpdate*> small_, large_;
  std::vector<Chunk> chunks_;
  std::vector<int64_t> first_chunk_{0};
  std::vector<double> largest_;
  Buffer<T> tiles_{nullptr, std::free}, sums_{nullptr, std::free};
};

}  // namespace

void kron_factor_update_cpu(FactorUpdate* items, int64_t count, const Threads& threads) {
  std::vector<FactorUpdate*> narrow, wide;
  for (FactorUpdate* item = items; item < items + count; ++item) {
    item->info = kOk;
    if (item->x.rows == 0 || item->x.cols + item->bias == 0) continue;
    if (!(item->decay >= 0 && item->decay <= 1) || !std::isfinite(item->scale)) {
      item->info = kNonfiniteInput;
      continue;
    }
    (item->x.dtype == Dtype::kFloat64 ? wide : narrow).push_back(item);
  }
  Updates<float> in_fp32(narrow);
  Updates<double> in_fp64(wide);
  in_fp32.run(threads);
  in_fp64.run(threads);
}

}  // namespace grng
