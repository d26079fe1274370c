// SPDX-License-Identifier: Apache-2.0
// factor <- decay * factor + scale * x^T x on the CPU.
//
// Only tiles of the lower triangle are computed, half the work of a GEMM; each is stored to both
// triangles, so the factor is bitwise symmetric. Layout, dtype and the bias column are dealt with
// once, when rows of x are packed; the arithmetic sees contiguous panels only.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "../kernels.h"
#include "simd.h"

namespace grng {
namespace {

// A panel of 128 rows is 16 KiB: the two that are multiplied fit in L1 together.
constexpr int64_t kRowsPerBlock = 128;

template <class T>
constexpr int64_t kPanel = kPanelBytes / sizeof(T);

struct BFloat16 {
  uint16_t bits;
  explicit operator float() const {
    const uint32_t wide = uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
  }
};

// ---- the largest |x|, found before anything is written ----

// With the sign bit cleared, the order of the bit patterns is the order of the magnitudes, and
// every inf and NaN lies above every finite number: one integer maximum finds both.
template <class Bits>
GRNG_INLINE Bits max_magnitude(const Bits* x, int64_t rows, int64_t cols, int64_t row_stride,
                               int64_t col_stride) {
  constexpr Bits kMask = std::numeric_limits<Bits>::max() >> 1;
  Bits largest = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const Bits* row = x + r * row_stride;
    if (col_stride == 1) {
      for (int64_t c = 0; c < cols; ++c) largest = std::max<Bits>(largest, row[c] & kMask);
    } else {
      for (int64_t c = 0; c < cols; ++c)
        largest = std::max<Bits>(largest, row[c * col_stride] & kMask);
    }
  }
  return largest;
}

GRNG_INLINE double magnitude(const ConstMatrix& x, int64_t begin, int64_t end) {
  const auto scan = [&](auto zero_bits, auto zero_value) {
    using Bits = decltype(zero_bits);
    const Bits bits = max_magnitude(static_cast<const Bits*>(x.data) + begin * x.row_stride,
                                    end - begin, x.cols, x.row_stride, x.col_stride);
    auto value = zero_value;
    std::memcpy(&value, &bits, sizeof(bits));
    return value;
  };
  switch (x.dtype) {
    case Dtype::kFloat64:
      return scan(uint64_t{0}, double{0});
    case Dtype::kFloat32:
      return scan(uint32_t{0}, float{0});
    case Dtype::kBFloat16:
      return static_cast<float>(scan(uint16_t{0}, BFloat16{0}));
    case Dtype::kFloat16:
      return static_cast<float>(scan(uint16_t{0}, _Float16{0}));
  }
  return 0;
}

// The largest magnitude that the diagonal keeps: it bounds every entry of a PSD matrix.
template <class T>
double held(const T* factor, int64_t n, double decay) {
  if (decay == 0) return 0;
  double largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double value = std::abs(static_cast<double>(factor[i * n + i]));
    if (!std::isfinite(value)) return value;
    largest = std::max(largest, value);
  }
  return decay * largest;
}

Info check(const ConstMatrix& x, bool bias, double scale, double held, double limit,
           const Threads& threads) {
  if (!std::isfinite(held)) return kNonfiniteInput;
  constexpr int64_t kSlice = 64;
  const int64_t slices = (x.rows + kSlice - 1) / kSlice;
  std::vector<double> largest(slices);
  threads.run(slices, 1, [&](int64_t b, int64_t e) {
    for_this_cpu([&](auto) {
      for (int64_t s = b; s < e; ++s)
        largest[s] = magnitude(x, s * kSlice, std::min(x.rows, (s + 1) * kSlice));
    });
  });
  double amax = bias ? 1 : 0;
  for (double m : largest) {
    if (!std::isfinite(m)) return kNonfiniteInput;
    amax = std::max(amax, m);
  }
  // No sum of products of this batch, scaled or not, can exceed this bound.
  const double bound = amax * amax * static_cast<double>(x.rows) * std::max(1.0, std::abs(scale));
  return bound + held <= limit ? kOk : kOverflow;
}

// ---- packing: rows [begin, end) of x as panels [panel][row][kPanel] ----

template <class T, class In>
GRNG_INLINE void pack_rows(T* packed, const ConstMatrix& x, bool bias, int64_t begin, int64_t rows,
                           int64_t panel_begin, int64_t panel_end) {
  constexpr int64_t kWidth = kPanel<T>;
  const int64_t n = x.cols + bias;
  const In* data = static_cast<const In*>(x.data) + begin * x.row_stride;
  for (int64_t p = panel_begin; p < panel_end; ++p) {
    T* out = packed + p * kRowsPerBlock * kWidth;
    const int64_t first = p * kWidth, filled = std::min(kWidth, x.cols - first);
    for (int64_t r = 0; r < rows; ++r, out += kWidth) {
      const In* in = data + r * x.row_stride + first * x.col_stride;
      if (filled == kWidth && x.col_stride == 1) {
        for (int64_t c = 0; c < kWidth; ++c) out[c] = static_cast<T>(in[c]);
      } else {
        for (int64_t c = 0; c < kWidth; ++c)
          out[c] = c < filled                   ? static_cast<T>(in[c * x.col_stride])
                   : bias && first + c == n - 1 ? T{1}
                                                : T{0};
      }
    }
  }
}

template <class T>
GRNG_INLINE void pack(T* packed, const ConstMatrix& x, bool bias, int64_t begin, int64_t rows,
                      int64_t panel_begin, int64_t panel_end) {
  switch (x.dtype) {
    case Dtype::kFloat64:
      return pack_rows<T, double>(packed, x, bias, begin, rows, panel_begin, panel_end);
    case Dtype::kFloat32:
      return pack_rows<T, float>(packed, x, bias, begin, rows, panel_begin, panel_end);
    case Dtype::kBFloat16:
      if constexpr (sizeof(T) == 4)
        return pack_rows<T, BFloat16>(packed, x, bias, begin, rows, panel_begin, panel_end);
      return;
    case Dtype::kFloat16:
      if constexpr (sizeof(T) == 4)
        return pack_rows<T, _Float16>(packed, x, bias, begin, rows, panel_begin, panel_end);
      return;
  }
}

// ---- one tile: sum [kPanel, kPanel] += left^T right, over the rows of a block ----

template <class Isa, class T>
GRNG_INLINE void add_product(T* sum, const T* left, const T* right, int64_t rows) {
  using S = Simd<Isa, T>;
  using Vec = typename S::Vec;
  constexpr int64_t kWidth = kPanel<T>;
  constexpr int kVecs = kPanelBytes / Isa::kVectorBytes, kTile = Isa::kTileRows;
  for (int64_t i = 0; i < kWidth; i += kTile) {
    Vec acc[kTile][kVecs] = {};
    for (int64_t r = 0; r < rows; ++r) {
      Vec b[kVecs];
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) b[v] = S::load(right + r * kWidth + v * S::kLanes);
#pragma GCC unroll 8
      for (int t = 0; t < kTile; ++t) {
        const Vec a = S::broadcast(left + r * kWidth + i + t);
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) acc[t][v] += a * b[v];
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < kTile; ++t)
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) {
        T* out = sum + (i + t) * kWidth + v * S::kLanes;
        S::store(out, S::load(out) + acc[t][v]);
      }
  }
}

// Where one call keeps things. The products are summed apart from the factor and meet it once:
// adding each block to a large factor would round as often as there are blocks.
template <class T>
struct Update {
  T* factor;
  T* packed;  // one block of rows
  T* sums;    // the tiles of the lower triangle
  int64_t n;
  T decay, scale;
};

// Tile <- decay * tile + scale * sum, in both triangles.
template <class T>
GRNG_INLINE void commit_tile(const Update<T>& update, T* sum, int64_t tile_row, int64_t tile_col) {
  constexpr int64_t kWidth = kPanel<T>;
  const int64_t row0 = tile_row * kWidth, col0 = tile_col * kWidth;
  const int64_t height = std::min(kWidth, update.n - row0);
  for (int64_t i = 0; i < height; ++i) {
    // The diagonal tile stops at the diagonal: the rest of it is a mirror image.
    const int64_t width = tile_row == tile_col ? i + 1 : kWidth;
    T* out = update.factor + (row0 + i) * update.n + col0;
    T* in = sum + i * kWidth;
    if (update.decay != 0) {
      for (int64_t j = 0; j < width; ++j) in[j] = update.decay * out[j] + update.scale * in[j];
    } else {
      for (int64_t j = 0; j < width; ++j) in[j] = update.scale * in[j];
    }
    std::memcpy(out, in, width * sizeof(T));
  }
  for (int64_t j = 0; j < std::min(kWidth, update.n - col0); ++j) {
    T* out = update.factor + (col0 + j) * update.n + row0;
    for (int64_t i = tile_row == tile_col ? j + 1 : 0; i < height; ++i)
      out[i] = sum[i * kWidth + j];
  }
}

// Tile number t of the lower triangle, counted row by row.
template <class Isa, class T>
GRNG_INLINE void update_tiles(const Update<T>& update, int64_t rows, bool last, int64_t begin,
                              int64_t end) {
  constexpr int64_t kWidth = kPanel<T>;
  int64_t row = static_cast<int64_t>((std::sqrt(8.0 * static_cast<double>(begin) + 1) - 1) / 2);
  while ((row + 1) * (row + 2) / 2 <= begin) ++row;
  while (row * (row + 1) / 2 > begin) --row;
  int64_t col = begin - row * (row + 1) / 2;
  for (int64_t t = begin; t < end; ++t) {
    T* sum = update.sums + t * kWidth * kWidth;
    add_product<Isa, T>(sum, update.packed + row * kRowsPerBlock * kWidth,
                        update.packed + col * kRowsPerBlock * kWidth, rows);
    if (last) commit_tile(update, sum, row, col);
    if (++col > row) {
      ++row;
      col = 0;
    }
  }
}

template <class T>
using Buffer = std::unique_ptr<T, decltype(&std::free)>;

// Aligned to a cache line; `count` is a multiple of a panel's width.
template <class T>
Buffer<T> allocate(int64_t count) {
  Buffer<T> buffer(static_cast<T*>(std::aligned_alloc(kPanelBytes, count * sizeof(T))), std::free);
  if (!buffer) throw std::bad_alloc();
  return buffer;
}

template <class T>
void update_factor(T* factor, const ConstMatrix& x, bool bias, double decay, double scale,
                   const Threads& threads) {
  const int64_t n = x.cols + bias, panels = (n + kPanel<T> - 1) / kPanel<T>;
  const int64_t tiles = panels * (panels + 1) / 2, tile_size = kPanel<T> * kPanel<T>;
  const Buffer<T> packed = allocate<T>(panels * kRowsPerBlock * kPanel<T>);
  const Buffer<T> sums = allocate<T>(tiles * tile_size);
  std::memset(sums.get(), 0, tiles * tile_size * sizeof(T));
  const Update<T> update{factor, packed.get(), sums.get(), n, T(decay), T(scale)};
  for (int64_t row = 0; row < x.rows; row += kRowsPerBlock) {
    const int64_t rows = std::min(kRowsPerBlock, x.rows - row);
    const bool last = row + rows == x.rows;
    threads.run(panels, 1, [&](int64_t b, int64_t e) {
      for_this_cpu([&](auto) { pack(packed.get(), x, bias, row, rows, b, e); });
    });
    threads.run(tiles, 1, [&](int64_t b, int64_t e) {
      for_this_cpu([&](auto isa) { update_tiles<decltype(isa)>(update, rows, last, b, e); });
    });
  }
}

}  // namespace

Info kron_factor_update_cpu(void* factor, const ConstMatrix& x, bool bias, double decay,
                            double scale, const Threads& threads) {
  const bool wide = x.dtype == Dtype::kFloat64;
  const double limit =
      wide ? std::numeric_limits<double>::max() : std::numeric_limits<float>::max();
  if (!(decay >= 0 && decay <= 1) || !std::isfinite(scale)) return kNonfiniteInput;
  const int64_t n = x.cols + bias;
  const double old = wide ? held(static_cast<const double*>(factor), n, decay)
                          : held(static_cast<const float*>(factor), n, decay);
  const Info info = check(x, bias, scale, old, limit, threads);
  if (info != kOk) return info;
  if (wide) {
    update_factor(static_cast<double*>(factor), x, bias, decay, scale, threads);
  } else {
    update_factor(static_cast<float*>(factor), x, bias, decay, scale, threads);
  }
  return kOk;
}

}  // namespace grng
