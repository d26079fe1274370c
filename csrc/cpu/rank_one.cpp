// SPDX-License-Identifier: Apache-2.0
// (damping I + u u^T)^-1 g on the CPU: one pass for both dot products, one for the result.
//
// Both passes walk the blocks in chunks. The second goes backwards: what the first read last is
// still in the caches.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../kernels.h"
#include "parallel.h"
#include "simd.h"

namespace grng {
namespace {

// Elements. The sums depend on how the blocks are cut, so the cut depends on their lengths alone.
constexpr int64_t kChunk = 16384;

struct Chunk {
  const RankOneBlock* block;
  int64_t begin, length;
};

struct Sums {
  double score_grad = 0, score_score = 0;
};

// A vector of doubles, and as many elements of the tensors.
template <class Isa, class T>
struct Wide {
  static constexpr int kLanes = Isa::kVectorBytes / 8;
  typedef double Vec __attribute__((vector_size(Isa::kVectorBytes)));
  typedef T Narrow __attribute__((vector_size(kLanes * sizeof(T))));

  static GRNG_INLINE Vec load(const T* p) {
    Narrow v;
    std::memcpy(&v, p, sizeof(v));
    return __builtin_convertvector(v, Vec);
  }
  static GRNG_INLINE void store(T* p, Vec v) {
    const Narrow narrow = __builtin_convertvector(v, Narrow);
    std::memcpy(p, &narrow, sizeof(narrow));
  }
};

template <class Isa, class T>
GRNG_INLINE Sums dot_products(const T* grad, const T* score, int64_t length) {
  using W = Wide<Isa, T>;
  constexpr int kVecs = 4, kStep = kVecs * W::kLanes;
  typename W::Vec mixed[kVecs] = {}, square[kVecs] = {};
  int64_t k = 0;
  for (; k + kStep <= length; k += kStep)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      const typename W::Vec g = W::load(grad + k + v * W::kLanes),
                            u = W::load(score + k + v * W::kLanes);
      mixed[v] += u * g;
      square[v] += u * u;
    }
  Sums sums;
  for (int v = 0; v < kVecs; ++v)
    for (int lane = 0; lane < W::kLanes; ++lane) {
      sums.score_grad += mixed[v][lane];
      sums.score_score += square[v][lane];
    }
  for (; k < length; ++k) {
    const double g = grad[k], u = score[k];
    sums.score_grad += u * g;
    sums.score_score += u * u;
  }
  return sums;
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
void precondition(const std::vector<Chunk>& chunks, double damping, const Threads& threads) {
  const int64_t count = static_cast<int64_t>(chunks.size());
  std::vector<Sums> partial(chunks.size());
  threads.run(count, 4, [&](int64_t begin, int64_t end) {
    for_this_cpu([&](auto isa) GRNG_INLINE_LAMBDA {
      for (int64_t i = begin; i < end; ++i) {
        const Chunk& c = chunks[i];
        partial[i] = dot_products<decltype(isa), T>(static_cast<const T*>(c.block->grad) + c.begin,
                                                    static_cast<const T*>(c.block->score) + c.begin,
                                                    c.length);
      }
    });
  });
  Sums total;
  for (const Sums& s : partial) {
    total.score_grad += s.score_grad;
    total.score_score += s.score_score;
  }
  const double coefficient = total.score_grad / (damping + total.score_score);
  threads.run(count, 4, [&](int64_t begin, int64_t end) {
    for_this_cpu([&](auto isa) GRNG_INLINE_LAMBDA {
      for (int64_t i = end; i-- > begin;) {
        const Chunk& c = chunks[i];
        combine<decltype(isa), T>(
            static_cast<T*>(c.block->out) + c.begin, static_cast<const T*>(c.block->grad) + c.begin,
            static_cast<const T*>(c.block->score) + c.begin, c.length, coefficient, damping);
      }
    });
  });
}

}  // namespace

void rank_one_cpu(const RankOneBlock* blocks, int64_t count, Dtype dtype, double damping,
                  const Threads& threads) {
  std::vector<Chunk> chunks;
  for (const RankOneBlock* block = blocks; block < blocks + count; ++block)
    for (int64_t begin = 0; begin < block->length; begin += kChunk)
      chunks.push_back({block, begin, std::min(kChunk, block->length - begin)});
  if (dtype == Dtype::kFloat64) {
    precondition<double>(chunks, damping, threads);
  } else {
    precondition<float>(chunks, damping, threads);
  }
}

}  // namespace grng
