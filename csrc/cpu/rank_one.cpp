// SPDX-License-Identifier: Apache-2.0
// (damping I + u u^T)^-1 g on the CPU, written out or stepped along: one pass for the dot products,
// one for the result.
//
// Both passes walk the blocks in chunks. The second goes backwards: what the first read last is
// still in the caches.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "../kernels.h"
#include "parallel.h"
#include "simd.h"

namespace grng {
namespace {

// Elements. The sums depend on how the blocks are cut, so the cut depends on their lengths alone.
constexpr int64_t kChunk = 16384;

template <class Block>
struct Chunk {
  const Block* block;
  int64_t begin, length;

  template <class T>
  T* from(void* data) const {
    return static_cast<T*>(data) + begin;
  }
  template <class T>
  const T* from(const void* data) const {
    return static_cast<const T*>(data) + begin;
  }
};

template <class Block>
std::vector<Chunk<Block>> cut(const Block* blocks, int64_t count) {
  std::vector<Chunk<Block>> chunks;
  for (const Block* block = blocks; block < blocks + count; ++block)
    for (int64_t begin = 0; begin < block->length; begin += kChunk)
      chunks.push_back({block, begin, std::min(kChunk, block->length - begin)});
  return chunks;
}

struct Sums {
  double score_grad = 0, score_score = 0, grad_grad = 0;
};

// A vector of doubles, and as many elements of the tensors.
template <class Isa, class T>
struct Wide {
  static constexpr int kLanes = Isa::kVectorBytes / 8;
  typedef double Vec __attribute__((vector_size(Isa::kVectorBytes)));
  typedef T Narrow __attribute__((vector_size(kLanes * sizeof(T))));

  // gcc 12 takes a conversion of wide vectors apart before it knows the instruction set.
  static constexpr bool kByHand = sizeof(T) == 4 && Isa::kVectorBytes >= 32;

  static GRNG_INLINE Vec load(const T* p) {
#if defined(__x86_64__)
    if constexpr (kByHand) {
      Vec wide;
      asm("vcvtps2pd %1, %0" : "=v"(wide) : "m"(*reinterpret_cast<const T(*)[kLanes]>(p)));
      return wide;
    }
#endif
    Narrow v;
    std::memcpy(&v, p, sizeof(v));
    return __builtin_convertvector(v, Vec);
  }
  static GRNG_INLINE void store(T* p, Vec v) {
    Narrow narrow;
#if defined(__x86_64__)
    if constexpr (kByHand) {
      asm("vcvtpd2ps %1, %0" : "=v"(narrow) : "v"(v));
      std::memcpy(p, &narrow, sizeof(narrow));
      return;
    }
#endif
    narrow = __builtin_convertvector(v, Narrow);
    std::memcpy(p, &narrow, sizeof(narrow));
  }
};

// The third sum is left at 0 unless asked for.
template <class Isa, class T, bool kThird>
GRNG_INLINE Sums dot_products(const T* grad, const T* score, int64_t length) {
  using W = Wide<Isa, T>;
  constexpr int kVecs = 4, kStep = kVecs * W::kLanes;
  typename W::Vec mixed[kVecs] = {}, square[kVecs] = {}, third[kVecs] = {};
  int64_t k = 0;
  for (; k + kStep <= length; k += kStep)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      const typename W::Vec g = W::load(grad + k + v * W::kLanes),
                            u = W::load(score + k + v * W::kLanes);
      mixed[v] += u * g;
      square[v] += u * u;
      if constexpr (kThird) third[v] += g * g;
    }
  Sums sums;
  for (int v = 0; v < kVecs; ++v)
    for (int lane = 0; lane < W::kLanes; ++lane) {
      sums.score_grad += mixed[v][lane];
      sums.score_score += square[v][lane];
      if constexpr (kThird) sums.grad_grad += third[v][lane];
    }
  for (; k < length; ++k) {
    const double g = grad[k], u = score[k];
    sums.score_grad += u * g;
    sums.score_score += u * u;
    if constexpr (kThird) sums.grad_grad += g * g;
  }
  return sums;
}

// The first pass.
template <class T, bool kThird, class Block>
Sums sum_all(const std::vector<Chunk<Block>>& chunks, const Threads& threads) {
  std::vector<Sums> partial(chunks.size());
  threads.run(static_cast<int64_t>(chunks.size()), 4, [&](int64_t begin, int64_t end) {
    for_this_cpu([&](auto isa) GRNG_INLINE_LAMBDA {
      for (int64_t i = begin; i < end; ++i) {
        const Chunk<Block>& c = chunks[i];
        partial[i] = dot_products<decltype(isa), T, kThird>(
            c.template from<T>(c.block->grad), c.template from<T>(c.block->score), c.length);
      }
    });
  });
  Sums total;
  for (const Sums& s : partial) {
    total.score_grad += s.score_grad;
    total.score_score += s.score_score;
    total.grad_grad += s.grad_grad;
  }
  return total;
}

template <class Isa, class T>
GRNG_INLINE void combine(T* out, const T* grad, const T* score, int64_t length, double coefficient,
                         double damping) {
  using W = Wide<Isa, T>;
  int64_t k = 0;
  for (; k + W::kLanes <= length; k += W::kLanes)
    W::store(out + k, (W::load(grad + k) - coefficient * W::load(score + k)) / damping);
  for (; k < length; ++k)
    out[k] = static_cast<T>((double{grad[k]} - coefficient * double{score[k]}) / damping);
}

template <class T>
void precondition(const std::vector<Chunk<RankOneBlock>>& chunks, double damping,
                  const Threads& threads) {
  const Sums total = sum_all<T, false>(chunks, threads);
  const double coefficient = total.score_grad / (damping + total.score_score);
  threads.run(static_cast<int64_t>(chunks.size()), 4, [&](int64_t begin, int64_t end) {
    for_this_cpu([&](auto isa) GRNG_INLINE_LAMBDA {
      for (int64_t i = end; i-- > begin;) {
        const Chunk<RankOneBlock>& c = chunks[i];
        combine<decltype(isa), T>(
            c.template from<T>(c.block->out), c.template from<T>(c.block->grad),
            c.template from<T>(c.block->score), c.length, coefficient, damping);
      }
    });
  });
}

// What one element of a step is made with.
struct StepNumbers {
  double coefficient, scale, lr, decay;
};

// Returns the sum of the squares of the direction. It is not taken from the dot products: where the
// gradient is nearly a multiple of the score, they cancel.
template <class Isa, class T>
GRNG_INLINE double step(T* param, const T* grad, const T* score, int64_t length,
                        const StepNumbers& with) {
  using W = Wide<Isa, T>;
  constexpr int kVecs = 4, kStep = kVecs * W::kLanes;
  typename W::Vec square[kVecs] = {};
  int64_t k = 0;
  for (; k + kStep <= length; k += kStep)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      const int64_t at = k + v * W::kLanes;
      const typename W::Vec d =
          (W::load(grad + at) - with.coefficient * W::load(score + at)) * with.scale;
      square[v] += d * d;
      W::store(param + at, with.decay * W::load(param + at) - with.lr * d);
    }
  double sum = 0;
  for (int v = 0; v < kVecs; ++v)
    for (int lane = 0; lane < W::kLanes; ++lane) sum += square[v][lane];
  for (; k < length; ++k) {
    const double d = (double{grad[k]} - with.coefficient * double{score[k]}) * with.scale;
    sum += d * d;
    param[k] = static_cast<T>(with.decay * double{param[k]} - with.lr * d);
  }
  return sum;
}

template <class T>
double step_all(const std::vector<Chunk<RankOneStepBlock>>& chunks, double damping, double largest,
                const Threads& threads) {
  std::vector<double> partial(chunks.size());
  const Sums total = sum_all<T, true>(chunks, threads);
  const double scale = 1 / damping;
  // No direction is longer than the gradient times the scale. NaN passes no comparison.
  const bool usable = scale > 0 && std::sqrt(total.grad_grad) * scale <= largest &&
                      std::isfinite(total.score_grad) && std::isfinite(total.score_score);
  if (!usable) return std::numeric_limits<double>::quiet_NaN();
  const double coefficient = total.score_grad / (damping + total.score_score);
  threads.run(static_cast<int64_t>(chunks.size()), 4, [&](int64_t begin, int64_t end) {
    for_this_cpu([&](auto isa) GRNG_INLINE_LAMBDA {
      for (int64_t i = end; i-- > begin;) {
        const Chunk<RankOneStepBlock>& c = chunks[i];
        partial[i] = step<decltype(isa), T>(c.template from<T>(c.block->param),
                                            c.template from<T>(c.block->grad),
                                            c.template from<T>(c.block->score), c.length,
                                            {coefficient, scale, c.block->lr, c.block->decay});
      }
    });
  });
  double sum = 0;
  for (double s : partial) sum += s;
  return std::sqrt(sum);
}

}  // namespace

void rank_one_cpu(const RankOneBlock* blocks, int64_t count, Dtype dtype, double damping,
                  const Threads& threads) {
  const auto chunks = cut(blocks, count);
  if (dtype == Dtype::kFloat64) {
    precondition<double>(chunks, damping, threads);
  } else {
    precondition<float>(chunks, damping, threads);
  }
}

double rank_one_step_cpu(const RankOneStepBlock* blocks, int64_t count, Dtype dtype, double damping,
                         double largest, const Threads& threads) {
  const auto chunks = cut(blocks, count);
  return dtype == Dtype::kFloat64 ? step_all<double>(chunks, damping, largest, threads)
                                  : step_all<float>(chunks, damping, largest, threads);
}

}  // namespace grng
