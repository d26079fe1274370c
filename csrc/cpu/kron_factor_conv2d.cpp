// SPDX-License-Identifier: Apache-2.0
// factor <- decay * factor + scale * P^T P, P the patches of a convolution, on the CPU.
//
// The entry for the taps k and k' of two channels sums x[c, u] * x[c', u + k' - k] over the
// positions u that tap k visits. It depends on k and k' through their distance, but for the border:
// two taps at the same distance visit the same positions except a few lines. So positions are cut
// into pieces that are visited as a whole by each tap, one product of channels is summed for every
// distance and piece, and an entry adds up its pieces. For a 3 x 3 kernel that is a quarter of the
// work of the patches' lower triangle, and the patches themselves are never formed. Nothing is
// subtracted, so nothing cancels.
//
// Where that does not pay (few channels, 1 x 1 kernels) the patches are gathered in blocks and go
// through the matrix kernel.
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <limits>
#include <map>
#include <type_traits>
#include <utility>
#include <vector>

#include "../kernels.h"
#include "elements.h"
#include "factor_check.h"
#include "parallel.h"
#include "tiles.h"

namespace grng {
namespace {

// Memory of one thread: sums of the pieces, and lines of two panels.
constexpr int64_t kSumsBytes = 144 << 10, kLinesBytes = 48 << 10;
// Packing a panel for one pair of panels costs about as much as this many products per element.
constexpr double kPackingCost = 40;
// Adding a piece to an entry costs about as much as this many products, and writing an entry.
constexpr double kPieceCost = 4, kEntryCost = 40;
// More memory than this for a thread is too much: very wide images.
constexpr int64_t kMaxWorkspace = 8 << 20;
// Nor must the plan of an item take more, which grows with the third power of a kernel's length.
constexpr int64_t kMaxPlan = 32 << 20;
// Products that cost less than those of patches by less than this are not worth the packing.
constexpr double kAdvantage = 1.3;

// ---- positions of one dimension ----

// Positions u = first, first + stride, ... (`count`) that each tap in `visits` meets, with the
// position at `distance` taps from u inside the image too.
struct Segment {
  int64_t distance, first, count;
  std::vector<char> visits;  // of every tap whether it is one of them
};

int64_t ceil_positive(int64_t a, int64_t b) { return a <= 0 ? 0 : ceil_div(a, b); }

// Cuts the positions of all taps of a dimension into segments, in the order of their distances.
std::vector<Segment> segments_of(const PatchGrid& g, int dim) {
  const int64_t taps = g.kernel[dim], stride = g.stride[dim];
  const int64_t size = dim ? g.width : g.height, outputs = dim ? g.out_width : g.out_height;
  struct Visit {
    int64_t tap, begin, end;
  };
  std::vector<Segment> segments;
  for (int64_t distance = 1 - taps; distance < taps; ++distance) {
    const int64_t shift = distance * g.dilation[dim];
    // The positions [begin, end) of each tap, in steps of the stride; taps whose positions differ
    // by a whole number of steps share segments.
    std::map<int64_t, std::vector<Visit>> classes;
    for (int64_t tap = std::max<int64_t>(0, -distance); tap < std::min(taps, taps - distance);
         ++tap) {
      const int64_t start = tap * g.dilation[dim] - g.padding[dim];
      const int64_t low = std::max<int64_t>(0, -shift), high = std::min(size, size - shift);
      const int64_t first = ceil_positive(low - start, stride);
      const int64_t last = std::min(outputs, ceil_positive(high - start, stride));
      if (first >= last) continue;
      const int64_t begin = start + first * stride;
      classes[begin % stride].push_back({tap, begin, start + last * stride});
    }
    for (const auto& [residue, visits] : classes) {
      std::vector<int64_t> cuts;
      for (const Visit& v : visits) cuts.insert(cuts.end(), {v.begin, v.end});
      std::sort(cuts.begin(), cuts.end());
      for (size_t i = 0; i + 1 < cuts.size(); ++i) {
        const int64_t begin = cuts[i], end = cuts[i + 1];
        if (begin == end) continue;
        Segment segment{distance, begin, (end - begin) / stride, std::vector<char>(taps)};
        bool any = false;
        for (const Visit& v : visits)
          if (v.begin <= begin && end <= v.end) any = (segment.visits[v.tap] = true);
        if (any) segments.push_back(std::move(segment));
      }
    }
  }
  return segments;
}

// ---- what is summed: pieces, and the distances they belong to ----

struct Piece {
  const Segment *down, *right;
};

struct Distance {
  int64_t down, right;
  std::vector<Piece> pieces;
  double positions = 0;
};

struct Plan {
  std::vector<Segment> down, right;
  std::vector<Distance> distances;
  int64_t halo;  // lines of the right panel before and after those of the left
};

bool is_canonical(const Distance& d) { return d.down > 0 || (d.down == 0 && d.right >= 0); }
bool is_zero(const Distance& d) { return d.down == 0 && d.right == 0; }

void add_distances(Plan& plan, const PatchGrid& g) {
  const auto by_distance = [](const std::vector<Segment>& segments, int64_t taps) {
    std::vector<std::vector<const Segment*>> found(2 * taps - 1);
    for (const Segment& s : segments) found[s.distance + taps - 1].push_back(&s);
    return found;
  };
  const auto down = by_distance(plan.down, g.kernel[0]);
  const auto right = by_distance(plan.right, g.kernel[1]);
  for (int64_t i = 0; i < static_cast<int64_t>(down.size()); ++i)
    for (int64_t j = 0; j < static_cast<int64_t>(right.size()); ++j) {
      Distance d{i + 1 - g.kernel[0], j + 1 - g.kernel[1], {}};
      for (const Segment* a : down[i])
        for (const Segment* b : right[j]) {
          d.pieces.push_back({a, b});
          d.positions += static_cast<double>(a->count) * static_cast<double>(b->count);
        }
      // Taps that meet nowhere have entries too: zeros, which age what the factor holds.
      plan.distances.push_back(std::move(d));
    }
}

// ---- one unit of work: a pair of panels, some distances, every image ----

struct Unit {
  int64_t group, row, col;  // panels row >= col
  int64_t begin, end;       // of the plan's distances
  double cost;
};

// One item, and what is prepared for it before anything is written.
struct Job {
  ConvFactorUpdate* item;
  std::vector<FactorUpdate> groups;
  int64_t channels;  // of a group
  bool by_distances = false;
  Plan plan;
  std::vector<Unit> units;
  int64_t max_pieces = 0;
  int64_t bytes = 0;  // of the workspace of a thread
};

// Lines [begin, end) of the channels of a panel as [line][column][width].
template <class T, class P, class In>
GRNG_INLINE void pack_lines(T* packed, const In* image, const PatchGrid& g, int64_t filled,
                            int64_t begin, int64_t end) {
  constexpr int64_t kWidth = kWidthOf<T, P>;
  for (int64_t line = begin; line < end; ++line, packed += g.width * kWidth) {
    const In* in = image + line * g.line_stride;
    if (g.channel_stride == 1) {
      for (int64_t w = 0; w < g.width; ++w)
        for (int64_t c = 0; c < filled; ++c)
          packed[w * kWidth + c] = static_cast<T>(in[w * g.column_stride + c]);
    } else {
      for (int64_t c = 0; c < filled; ++c)
        for (int64_t w = 0; w < g.width; ++w)
          packed[w * kWidth + c] = static_cast<T>(in[c * g.channel_stride + w * g.column_stride]);
    }
    for (int64_t w = 0; w < g.width; ++w)
      for (int64_t c = filled; c < kWidth; ++c) packed[w * kWidth + c] = T{0};
  }
}

// Calls f with a null pointer of the element type.
template <class T, class F>
GRNG_INLINE void with_elements(Dtype dtype, const F& f) {
  if constexpr (sizeof(T) == 8) {
    f(static_cast<const double*>(nullptr));
  } else if (dtype == Dtype::kFloat32) {
    f(static_cast<const float*>(nullptr));
  } else if (dtype == Dtype::kBFloat16) {
    f(static_cast<const BFloat16*>(nullptr));
  } else if (dtype == Dtype::kFloat16) {
    f(static_cast<const _Float16*>(nullptr));
  }
}

// Lines of a panel that fit in its share of the memory: at least one.
template <class T, class P>
int64_t lines_per_strip(const PatchGrid& g) {
  const int64_t line = g.width * kWidthOf<T, P> * int64_t{sizeof(T)};
  return std::min(g.height, std::max<int64_t>(1, kLinesBytes / line));
}

// Elements of memory of one thread: the sums of the pieces and of the ones, then two panels.
template <class T, class P>
int64_t workspace_size(const Job& job) {
  const PatchGrid& g = job.item->grid;
  const int64_t line = g.width * kWidthOf<T, P>, lines = lines_per_strip<T, P>(g);
  return job.max_pieces * (kTileSizeOf<T, P> + kWidthOf<T, P>)+line *
         (lines + std::min(g.height, lines + 2 * job.plan.halo));
}

template <class Isa, class T, class P>
GRNG_INLINE void add_ones(T* sum, const T* rows, const Run& run) {
  using S = Simd<Isa, T>;
  constexpr int64_t kWidth = kWidthOf<T, P>;
  for (int64_t v = 0; v < kWidth; v += S::kLanes) {
    typename S::Vec total = {};
    for (int64_t line = 0; line < run.lines; ++line)
      for (int64_t k = 0; k < run.rows; ++k)
        total += S::load(rows + (line * run.line_step + k * run.row_step) * kWidth + v);
    S::store(sum + v, S::load(sum + v) + total);
  }
}

// Sums every piece of the unit over all images.
template <class Isa, class T, class P, class In>
GRNG_INLINE void sum_pieces(T* sums, T* ones, T* lines, const Job& job, const Unit& unit) {
  constexpr int64_t kWidth = kWidthOf<T, P>;
  const PatchGrid& g = job.item->grid;
  const Plan& plan = job.plan;
  const bool diagonal = unit.row == unit.col;
  const int64_t strip = lines_per_strip<T, P>(g);
  // About as many rows at a time as the matrix kernel takes: they stay in L1 for all distances.
  const int64_t few = std::min(strip, std::max<int64_t>(1, kRowsPerBlock / g.width));
  T* const left_lines = lines;
  T* const right_lines = diagonal ? lines : lines + strip * g.width * kWidth;
  for (int64_t b = 0; b < job.item->batch; ++b) {
    const auto panel = [&](int64_t p) {
      return static_cast<const In*>(job.item->x) + b * g.batch_stride +
             (unit.group * job.channels + p * kWidth) * g.channel_stride;
    };
    const auto filled = [&](int64_t p) { return std::min(kWidth, job.channels - p * kWidth); };
    for (int64_t top = 0; top < g.height; top += strip) {
      const int64_t bottom = std::min(g.height, top + strip);
      // On the diagonal one set of lines serves both sides.
      const int64_t right_top = diagonal ? top : std::max<int64_t>(0, top - plan.halo);
      const int64_t right_bottom = std::min(g.height, bottom + plan.halo);
      pack_lines<T, P>(right_lines, panel(unit.col), g, filled(unit.col), right_top, right_bottom);
      if (!diagonal)
        pack_lines<T, P>(left_lines, panel(unit.row), g, filled(unit.row), top, bottom);
      for (int64_t line = top; line < bottom; line += few) {
        T *sum = sums, *one = ones;
        for (int64_t d = unit.begin; d < unit.end; ++d) {
          const Distance& distance = plan.distances[d];
          if (diagonal && !is_canonical(distance)) continue;
          for (const Piece& piece : distance.pieces) {
            const int64_t step = g.stride[0];
            const int64_t i = ceil_positive(line - piece.down->first, step);
            const int64_t end =
                std::min(piece.down->count,
                         ceil_positive(std::min(bottom, line + few) - piece.down->first, step));
            if (i < end) {
              const Run run{end - i, piece.right->count, step * g.width, g.stride[1]};
              const int64_t u = piece.down->first + i * step, w = piece.right->first;
              const T* left = left_lines + ((u - top) * g.width + w) * kWidth;
              const T* right =
                  right_lines + ((u + distance.down * g.dilation[0] - right_top) * g.width + w +
                                 distance.right * g.dilation[1]) *
                                    kWidth;
              add_product<Isa, T, P>(sum, left, right, run, diagonal && is_zero(distance),
                                     []() GRNG_INLINE_LAMBDA {});
              if (diagonal && is_zero(distance)) add_ones<Isa, T, P>(one, left, run);
            }
            sum += kWidth * kWidth;
            one += kWidth;
          }
        }
      }
    }
  }
}

template <class T>
void put(T* factor, int64_t n, int64_t i, int64_t j, const FactorUpdate& item, T sum) {
  if (i < j) std::swap(i, j);
  const T decay = static_cast<T>(item.decay), scale = static_cast<T>(item.scale);
  T& lower = factor[i * n + j];
  const T value = decay != 0 ? decay * lower + scale * sum : scale * sum;
  lower = value;
  factor[j * n + i] = value;
}

// Adds up the pieces of each pair of taps and writes its entries to both triangles.
template <class T, class P>
GRNG_INLINE void commit_pieces(const T* sums, const T* ones, const Job& job, const Unit& unit) {
  constexpr int64_t kWidth = kWidthOf<T, P>;
  const PatchGrid& g = job.item->grid;
  const FactorUpdate& item = job.groups[unit.group];
  T* const factor = static_cast<T*>(item.factor);
  const int64_t taps = g.kernel[0] * g.kernel[1], n = job.channels * taps + item.bias;
  const int64_t height = std::min(kWidth, job.channels - unit.row * kWidth);
  const int64_t width = std::min(kWidth, job.channels - unit.col * kWidth);
  const bool diagonal = unit.row == unit.col;
  for (int64_t d = unit.begin; d < unit.end; ++d) {
    const Distance& distance = job.plan.distances[d];
    if (diagonal && !is_canonical(distance)) continue;
    const bool lower_only = diagonal && is_zero(distance);
    const int64_t count = static_cast<int64_t>(distance.pieces.size());
    for (int64_t k1 = std::max<int64_t>(0, -distance.down);
         k1 < std::min(g.kernel[0], g.kernel[0] - distance.down); ++k1)
      for (int64_t k2 = std::max<int64_t>(0, -distance.right);
           k2 < std::min(g.kernel[1], g.kernel[1] - distance.right); ++k2) {
        T total[kWidth * kWidth] = {}, total_ones[kWidth] = {};
        for (int64_t p = 0; p < count; ++p) {
          const Piece& piece = distance.pieces[p];
          if (!piece.down->visits[k1] || !piece.right->visits[k2]) continue;
          for (int64_t e = 0; e < kWidth * kWidth; ++e) total[e] += sums[p * kWidth * kWidth + e];
          for (int64_t e = 0; e < kWidth; ++e) total_ones[e] += ones[p * kWidth + e];
        }
        const int64_t row_tap = k1 * g.kernel[1] + k2;
        const int64_t col_tap = (k1 + distance.down) * g.kernel[1] + k2 + distance.right;
        for (int64_t i = 0; i < height; ++i) {
          const int64_t row = (unit.row * kWidth + i) * taps + row_tap;
          for (int64_t j = 0; j < (lower_only ? i + 1 : width); ++j)
            put(factor, n, row, (unit.col * kWidth + j) * taps + col_tap, item,
                total[i * kWidth + j]);
          if (lower_only && item.bias) put(factor, n, n - 1, row, item, total_ones[i]);
        }
      }
    sums += count * kWidth * kWidth;
    ones += count * kWidth;
  }
}

// Pieces that are summed for a distance in a unit.
int64_t pieces_of(const Distance& d, bool diagonal) {
  return diagonal && !is_canonical(d) ? 0 : static_cast<int64_t>(d.pieces.size());
}

// Adds the units of a job, the longest first. More units than threads need split the distances; the
// sums, and so the bits, are the same for any split.
template <class T, class P>
void add_units(Job& job, int64_t threads) {
  const int64_t panels = ceil_div(job.channels, kWidthOf<T, P>);
  const int64_t pairs = tile_count(panels) * job.item->groups;
  const int64_t budget =
      std::max<int64_t>(1, kSumsBytes / (kTileSizeOf<T, P> * int64_t{sizeof(T)}));
  const int64_t parts = ceil_div(2 * threads, pairs);
  const int64_t count = static_cast<int64_t>(job.plan.distances.size());
  std::vector<Unit>& units = job.units;
  for (int64_t group = 0; group < job.item->groups; ++group)
    for (int64_t t = 0; t < tile_count(panels); ++t) {
      const TileIndex tile(t);
      const bool diagonal = tile.row == tile.col;
      double total = 0;
      for (const Distance& d : job.plan.distances)
        total += pieces_of(d, diagonal) ? d.positions : 0;
      Unit unit{group, tile.row, tile.col, 0, 0, 0};
      int64_t pieces = 0;
      for (int64_t d = 0; d < count; ++d) {
        const int64_t more = pieces_of(job.plan.distances[d], diagonal);
        const bool enough = unit.cost * static_cast<double>(parts) >= total;
        if (unit.end > unit.begin && (pieces + more > budget || enough)) {
          units.push_back(unit);
          unit = {group, tile.row, tile.col, d, d, 0};
          pieces = 0;
        }
        pieces += more;
        job.max_pieces = std::max(job.max_pieces, pieces);
        unit.cost += more ? job.plan.distances[d].positions : 0;
        unit.end = d + 1;
      }
      units.push_back(unit);
    }
  std::stable_sort(units.begin(), units.end(),
                   [](const Unit& a, const Unit& b) { return a.cost > b.cost; });
}

template <class T, class P>
void update_by_distances(const Job& job, char* workspace, const Threads& threads) {
  const int64_t units = static_cast<int64_t>(job.units.size());
  std::atomic<int64_t> next{0}, next_slot{0};
  threads.run(std::min(threads.count, units), 1, [&](int64_t, int64_t) {
    const int64_t slot = next_slot++;
    T* const sums = reinterpret_cast<T*>(workspace + slot * job.bytes);
    T* const ones = sums + job.max_pieces * kTileSizeOf<T, P>;
    T* const lines = ones + job.max_pieces * kWidthOf<T, P>;
    for_this_cpu([&](auto isa) GRNG_INLINE_LAMBDA {
      for (int64_t i = next++; i < units; i = next++) {
        std::memset(sums, 0, (lines - sums) * sizeof(T));
        with_elements<T>(job.item->dtype, [&](const auto* none) GRNG_INLINE_LAMBDA {
          using In = std::remove_const_t<std::remove_pointer_t<decltype(none)>>;
          sum_pieces<decltype(isa), T, P, In>(sums, ones, lines, job, job.units[i]);
        });
        commit_pieces<T, P>(sums, ones, job, job.units[i]);
      }
    });
  });
  if (job.item->bias)
    for (const FactorUpdate& item : job.groups) {
      const int64_t n = item.x.cols + 1;
      put(static_cast<T*>(item.factor), n, n - 1, n - 1, item, static_cast<T>(item.x.rows));
    }
}

// ---- which of the two ways ----

// Whether making the segments is worth while: each distance has up to two cuts for every tap, but
// no more segments than positions, and a segment lists all taps.
bool segments_pay(const Job& job) {
  const PatchGrid& g = job.item->grid;
  const FactorUpdate& group = job.groups[0];
  const double n = static_cast<double>(group.x.cols);
  const double products = static_cast<double>(group.x.rows) * n * n / 2;
  for (int dim = 0; dim < 2; ++dim) {
    const double taps = static_cast<double>(g.kernel[dim]);
    const double size = static_cast<double>(dim ? g.width : g.height);
    const double visits = 2 * taps * taps * std::min(2 * taps, size);
    if (visits > kMaxPlan || visits > products) return false;
  }
  return g.kernel[0] * g.kernel[1] > 1;
}

// Decided from the segments of the two dimensions: of all pairs of them, the sums are products of
// sums.
template <class T, class P>
bool distances_pay(const Job& job) {
  const PatchGrid& g = job.item->grid;
  if (job.plan.down.size() * job.plan.right.size() * sizeof(Piece) > kMaxPlan) return false;
  const auto totals = [](const std::vector<Segment>& segments) {
    std::array<double, 2> sums{};  // positions, and visits by taps
    for (const Segment& s : segments) {
      sums[0] += static_cast<double>(s.count);
      for (char v : s.visits) sums[1] += v;
    }
    return sums;
  };
  const auto down = totals(job.plan.down), right = totals(job.plan.right);
  const double width = static_cast<double>(kWidthOf<T, P>);
  const double panels = static_cast<double>(ceil_div(job.channels, kWidthOf<T, P>));
  const double images = static_cast<double>(job.item->batch);
  const FactorUpdate& group = job.groups[0];
  const double n = static_cast<double>(group.x.cols);
  const double products = panels * panels / 2 * width * width * images * down[0] * right[0];
  const double packing =
      images * panels * panels * width * static_cast<double>(g.height * g.width) * kPackingCost;
  const double commit = panels * panels / 2 * width * width * down[1] * right[1] * kPieceCost +
                        n * n / 2 * kEntryCost;
  return (products + packing + commit) * kAdvantage < static_cast<double>(group.x.rows) * n * n / 2;
}

// ---- the check, over the images: their elements are far fewer than those of the patches ----

template <class Isa, class T>
using Bits = typename Simd<Isa, T>::Bits;

// The order of bit patterns without the sign is the order of magnitudes; inf and NaN are largest.
template <class Isa, class T, class In>
GRNG_INLINE Bits<Isa, T> largest_bits(Bits<Isa, T> most, const In* data, int64_t count,
                                      int64_t stride) {
  const auto magnitude = [](In element) GRNG_INLINE_LAMBDA {
    const T value = static_cast<T>(element);
    Bits<Isa, T> bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits & std::numeric_limits<Bits<Isa, T>>::max();
  };
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) most = std::max(most, magnitude(data[i]));
  } else {
    for (int64_t i = 0; i < count; ++i) most = std::max(most, magnitude(data[i * stride]));
  }
  return most;
}

template <class Isa, class T, class In>
GRNG_INLINE double largest_of_image(const ConvFactorUpdate& item, int64_t b) {
  const PatchGrid& g = item.grid;
  const In* image = static_cast<const In*>(item.x) + b * g.batch_stride;
  Bits<Isa, T> most = 0;
  if (g.channel_stride == 1) {
    for (int64_t i = 0; i < g.height; ++i)
      for (int64_t j = 0; j < g.width; ++j)
        most = largest_bits<Isa, T>(most, image + i * g.line_stride + j * g.column_stride,
                                    item.channels, 1);
  } else {
    const bool dense = g.line_stride == g.width * g.column_stride;
    const int64_t runs = dense ? 1 : g.height;
    for (int64_t c = 0; c < item.channels; ++c)
      for (int64_t i = 0; i < runs; ++i)
        most = largest_bits<Isa, T>(most, image + c * g.channel_stride + i * g.line_stride,
                                    g.height / runs * g.width, g.column_stride);
  }
  T value;
  std::memcpy(&value, &most, sizeof(value));
  return static_cast<double>(value);
}

template <class T>
double largest_of(const ConvFactorUpdate& item, const Threads& threads) {
  std::vector<double> largest(item.batch);
  run_dynamic(threads, item.batch, [&](auto isa, int64_t b) GRNG_INLINE_LAMBDA {
    with_elements<T>(item.dtype, [&](const auto* none) GRNG_INLINE_LAMBDA {
      using In = std::remove_const_t<std::remove_pointer_t<decltype(none)>>;
      largest[b] = largest_of_image<decltype(isa), T, In>(item, b);
    });
  });
  double all = item.bias ? 1 : 0;
  for (double one : largest) all = larger(all, one);
  return all;
}

// ---- all items: first whatever can fail, then the updates ----

template <class T>
void prepare(Job& job, const Threads& threads) {
  ConvFactorUpdate& item = *job.item;
  const PatchGrid& g = item.grid;
  const int64_t columns = job.channels * g.kernel[0] * g.kernel[1], n = columns + item.bias;
  for (int64_t group = 0; group < item.groups; ++group) {
    const ConstMatrix patches{static_cast<const char*>(item.x) +
                                  group * job.channels * g.channel_stride * size_of(item.dtype),
                              item.dtype,
                              item.batch * g.out_height * g.out_width,
                              columns,
                              0,
                              0,
                              &g};
    job.groups.push_back({static_cast<T*>(item.factor) + group * n * n, patches, item.bias,
                          item.decay, item.scale, kOk});
  }
  // One verdict for all groups, before any is written.
  const double amax = largest_of<T>(item, threads);
  for (const FactorUpdate& group : job.groups)
    if (item.info == kOk) item.info = verdict<T>(group, amax);
  if (item.info != kOk || !segments_pay(job)) return;
  job.plan.down = segments_of(g, 0);
  job.plan.right = segments_of(g, 1);
  job.plan.halo = std::min(g.height, (g.kernel[0] - 1) * g.dilation[0]);
  with_panels<T>(job.channels, [&](auto p) {
    using P = decltype(p);
    if (!distances_pay<T, P>(job)) return;
    add_distances(job.plan, g);
    add_units<T, P>(job, threads.count);
    const int64_t size = workspace_size<T, P>(job) * int64_t{sizeof(T)};
    job.bytes = ceil_div(size, kCacheLine) * kCacheLine;
    job.by_distances = job.bytes <= kMaxWorkspace;
  });
}

template <class T>
void run(const Job& job, char* workspace, const Threads& threads) {
  with_panels<T>(job.channels,
                 [&](auto p) { update_by_distances<T, decltype(p)>(job, workspace, threads); });
}

}  // namespace

void kron_factor_conv2d_update_cpu(ConvFactorUpdate* items, int64_t count, const Threads& threads) {
  std::vector<Job> jobs;
  std::vector<FactorUpdate> patches;
  int64_t bytes = 0;
  jobs.reserve(count);
  for (ConvFactorUpdate* item = items; item < items + count; ++item) {
    item->info = kOk;
    if (item->batch == 0 || item->channels == 0) continue;
    if (!(item->decay >= 0 && item->decay <= 1) || !std::isfinite(item->scale)) {
      item->info = kNonfiniteInput;
      continue;
    }
    Job& job = jobs.emplace_back();
    job.item = item;
    job.channels = item->channels / item->groups;
    if (item->dtype == Dtype::kFloat64) {
      prepare<double>(job, threads);
    } else {
      prepare<float>(job, threads);
    }
    if (item->info != kOk) continue;
    if (job.by_distances) {
      bytes = std::max(bytes,
                       job.bytes * std::min(threads.count, static_cast<int64_t>(job.units.size())));
    } else {
      patches.insert(patches.end(), job.groups.begin(), job.groups.end());
    }
  }
  const Buffer<char> workspace = allocate<char>(bytes);
  kron_factor_update_cpu(patches.data(), static_cast<int64_t>(patches.size()), threads);
  for (const Job& job : jobs) {
    if (job.item->info != kOk || !job.by_distances) continue;
    if (job.item->dtype == Dtype::kFloat64) {
      run<double>(job, workspace.get(), threads);
    } else {
      run<float>(job, workspace.get(), threads);
    }
  }
}

}  // namespace grng
