// SPDX-License-Identifier: Apache-2.0
// AdamW's moments and a step of their length along another direction, on the CPU: one pass over
// everything each, and no temporary tensor. A tensor of the size of a model costs more to allocate
// than to fill.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../kernels.h"
#include "elements.h"
#include "parallel.h"
#include "simd.h"

namespace grng {
namespace {

// Elements. The sums depend on how the tensors are cut, so the cut depends on their lengths alone.
constexpr int64_t kChunk = 16384;
// Sums within one piece stay in the dtype of the moments, as many as a vector has lanes.
constexpr int64_t kPiece = 1024;
constexpr int64_t kLanes = 16;

GRNG_INLINE float number(BFloat16 x) { return static_cast<float>(x); }
GRNG_INLINE float number(_Float16 x) { return static_cast<float>(x); }
GRNG_INLINE float number(float x) { return x; }
GRNG_INLINE double number(double x) { return x; }

// Rounded to the nearest, ties to even.
template <class P>
GRNG_INLINE P rounded(float x) {
  if constexpr (std::is_same_v<P, BFloat16>) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    const uint32_t up = bits + 0x7fff + (bits >> 16 & 1);
    return {static_cast<uint16_t>((x == x ? up : bits | 0x400000) >> 16)};
  } else {
    return static_cast<P>(x);
  }
}
template <class P>
GRNG_INLINE P rounded(double x) {
  if constexpr (std::is_same_v<P, double>) return x;
  return rounded<P>(static_cast<float>(x));
}

// Of an item, from `begin` on: elements, or rows of a direction that has rows.
struct Chunk {
  int64_t item, begin, end;
};

// Compiled for the element types of one chunk.
template <class F>
GRNG_INLINE void with_element(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kFloat64:
      return f(double{});
    case Dtype::kBFloat16:
      return f(BFloat16{});
    case Dtype::kFloat16:
      return f(_Float16{});
    default:
      return f(float{});
  }
}

template <class T, class G>
GRNG_INLINE double update_moments(const AdamMoments& item, const G* grad, int64_t begin,
                                  int64_t end, double beta1, double beta2, T eps) {
  T* mean = static_cast<T*>(item.exp_avg);
  T* square = static_cast<T*>(item.exp_avg_sq);
  const T mean_scale = static_cast<T>(item.mean_scale),
          root_scale = static_cast<T>(item.root_scale);
  // Differences from 1 are taken before they are rounded.
  const T share = static_cast<T>(1 - beta1), kept = static_cast<T>(beta2),
          square_share = static_cast<T>(1 - beta2);
  double total = 0;
  for (int64_t from = begin; from < end; from += kPiece) {
    const int64_t to = std::min(end, from + kPiece);
    T sums[kLanes] = {};
    const auto one = [&](int64_t k, T& sum) GRNG_INLINE_LAMBDA {
      const T g = static_cast<T>(number(grad[k]));
      const T m = mean[k] + share * (g - mean[k]);
      const T v = kept * square[k] + square_share * (g * g);
      mean[k] = m;
      square[k] = v;
      const T u = m * mean_scale / (std::sqrt(v) * root_scale + eps);
      sum += u * u;
    };
    int64_t k = from;
    for (; k + kLanes <= to; k += kLanes)
      for (int64_t lane = 0; lane < kLanes; ++lane) one(k + lane, sums[lane]);
    for (; k < to; ++k) one(k, sums[0]);
    for (T s : sums) total += static_cast<double>(s);
  }
  return total;
}

// param and moments start at the chunk, the direction at the element that meets them.
template <class T, class P>
GRNG_INLINE void step(P* param, const T* direction, int64_t direction_stride, int64_t length,
                      T root, T lr, T decay) {
  // The scale in two halves: what an inverse of nearly nothing made huge needs a tiny one.
  if (direction_stride == 1) {
    for (int64_t k = 0; k < length; ++k)
      param[k] =
          rounded<P>(decay * static_cast<T>(number(param[k])) - lr * (direction[k] * root * root));
    return;
  }
  for (int64_t k = 0; k < length; ++k)
    param[k] = rounded<P>(decay * static_cast<T>(number(param[k])) -
                          lr * (direction[k * direction_stride] * root * root));
}

template <class T, class P>
GRNG_INLINE void adam_step(P* param, const AdamMoments& item, int64_t begin, int64_t end, T lr,
                           T decay, T eps) {
  const T* mean = static_cast<const T*>(item.exp_avg);
  const T* square = static_cast<const T*>(item.exp_avg_sq);
  const T mean_scale = static_cast<T>(item.mean_scale),
          root_scale = static_cast<T>(item.root_scale);
  for (int64_t k = begin; k < end; ++k) {
    const T u = mean[k] * mean_scale / (std::sqrt(square[k]) * root_scale + eps);
    param[k] = rounded<P>(decay * static_cast<T>(number(param[k])) - lr * u);
  }
}

int64_t row_offset(const GraftedStep& item, int64_t row) {
  int64_t offset = 0;
  for (int64_t i = item.dims - 1; i >= 0; --i) {
    offset += row % item.size[i] * item.stride[i];
    row /= item.size[i];
  }
  return offset;
}

template <class T, class P>
GRNG_INLINE void grafted_chunk(const GraftedStep& item, const Chunk& c, double lr, double decay,
                               double eps) {
  P* param = static_cast<P*>(item.param);
  const T* direction = static_cast<const T*>(item.direction);
  const T rate = static_cast<T>(lr), kept = static_cast<T>(decay);
  const int64_t wide = item.rows > 0 ? item.cols : 1;
  const T root = static_cast<T>(std::sqrt(item.scale));
  if (!std::isfinite(root))
    return adam_step<T>(param, item.moments, c.begin * wide, c.end * wide, rate, kept,
                        static_cast<T>(eps));
  if (item.rows == 0)
    return step<T>(param + c.begin, direction + c.begin, 1, c.end - c.begin, root, rate, kept);
  for (int64_t r = c.begin; r < c.end; ++r)
    step<T>(param + r * item.cols, direction + row_offset(item, r), item.col_stride, item.cols,
            root, rate, kept);
}

}  // namespace

void adam_moments_cpu(const AdamMoments* items, const AdamGradient* grads, double* lengths,
                      int64_t count, double beta1, double beta2, double eps,
                      const Threads& threads) {
  std::vector<Chunk> chunks;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t begin = 0; begin < items[i].length; begin += kChunk)
      chunks.push_back({i, begin, std::min(items[i].length, begin + kChunk)});
  std::vector<double> partial(chunks.size());
  threads.run(static_cast<int64_t>(chunks.size()), 4, [&](int64_t begin, int64_t end) {
    for_this_cpu([&](auto) GRNG_INLINE_LAMBDA {
      for (int64_t i = begin; i < end; ++i) {
        const Chunk& c = chunks[i];
        const AdamMoments& item = items[c.item];
        with_element(grads[c.item].dtype, [&](auto element) GRNG_INLINE_LAMBDA {
          const auto* grad = static_cast<const decltype(element)*>(grads[c.item].grad);
          partial[i] = item.dtype == Dtype::kFloat64
                           ? update_moments<double>(item, grad, c.begin, c.end, beta1, beta2, eps)
                           : update_moments<float>(item, grad, c.begin, c.end, beta1, beta2,
                                                   static_cast<float>(eps));
        });
      }
    });
  });
  std::fill(lengths, lengths + count, 0.0);
  for (size_t i = 0; i < chunks.size(); ++i) lengths[chunks[i].item] += partial[i];
  for (int64_t i = 0; i < count; ++i) lengths[i] = std::sqrt(lengths[i]);
}

void grafted_step_cpu(const GraftedStep* items, int64_t count, double lr, double decay, double eps,
                      const Threads& threads) {
  std::vector<Chunk> chunks;
  for (int64_t i = 0; i < count; ++i) {
    const bool in_rows = items[i].rows > 0;
    const int64_t length = in_rows ? items[i].rows : items[i].moments.length;
    const int64_t most = in_rows ? std::max<int64_t>(1, kChunk / items[i].cols) : kChunk;
    for (int64_t begin = 0; begin < length; begin += most)
      chunks.push_back({i, begin, std::min(length, begin + most)});
  }
  threads.run(static_cast<int64_t>(chunks.size()), 4, [&](int64_t begin, int64_t end) {
    for_this_cpu([&](auto) GRNG_INLINE_LAMBDA {
      for (int64_t i = begin; i < end; ++i) {
        const GraftedStep& item = items[chunks[i].item];
        with_element(item.param_dtype, [&](auto element) GRNG_INLINE_LAMBDA {
          using P = decltype(element);
          if (item.moments.dtype == Dtype::kFloat64) {
            grafted_chunk<double, P>(item, chunks[i], lr, decay, eps);
          } else {
            grafted_chunk<float, P>(item, chunks[i], lr, decay, eps);
          }
        });
      }
    });
  });
}

}  // namespace grng
