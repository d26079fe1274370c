// SPDX-License-Identifier: Apache-2.0
// What the CPU kernels share besides arithmetic: work handed out to threads, and aligned memory.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "../kernels.h"
#include "simd.h"

namespace grng {

// Runs f(isa, i) for i in [0, count), one at a time to whichever thread is free: costs differ.
template <class F>
void run_dynamic(const Threads& threads, int64_t count, const F& f) {
  std::atomic<int64_t> next{0};
  threads.run(count, 1, [&](int64_t, int64_t) {
    for_this_cpu([&](auto isa) GRNG_INLINE_LAMBDA {
      for (int64_t i = next++; i < count; i = next++) f(isa, i);
    });
  });
}

// Loops inside of one piece of work, in code that is compiled for one instruction set: by this
// thread alone, or by all. The body is compiled once for both.
template <class Isa>
struct Loop {
  const Threads* threads;  // null: this thread alone

  // Calls f(i) for every i in [0, count), in any order.
  template <class F>
  void operator()(int64_t count, const F& f) const {
    const auto part = [&](int64_t begin, int64_t end) GRNG_INLINE_LAMBDA {
      for (int64_t i = begin; i < end; ++i) f(i);
    };
    if (!threads) return run_on<Isa>(part, int64_t{0}, count);
    std::atomic<int64_t> next{0};
    threads->run(count, 1, [&](int64_t, int64_t) {
      for (int64_t i = next++; i < count; i = next++) run_on<Isa>(part, i, i + 1);
    });
  }
};

template <class T>
using Buffer = std::unique_ptr<T, decltype(&std::free)>;

constexpr int64_t kCacheLine = 64;

// Memory for `count` elements (none: a null pointer), aligned to a cache line. Not for use in a
// worker: it throws.
template <class T>
Buffer<T> allocate(int64_t count) {
  const int64_t bytes = (count * int64_t{sizeof(T)} + kCacheLine - 1) / kCacheLine * kCacheLine;
  Buffer<T> buffer(static_cast<T*>(std::aligned_alloc(kCacheLine, bytes)), std::free);
  if (!buffer && bytes > 0) throw std::bad_alloc();
  return buffer;
}

}  // namespace grng
