// SPDX-License-Identifier: Apache-2.0
// One binary for every x86-64 CPU: kernels are templates over an instruction set, inlined into a
// function with the matching target attribute, which is chosen at run time.
#pragma once

#include <cstdint>
#include <cstring>

// Vectors wider than the baseline's never cross a call: every function that takes one is inlined.
#pragma GCC diagnostic ignored "-Wpsabi"

#define GRNG_INLINE inline __attribute__((always_inline))

namespace grng {

// Matrix kernels work on panels of 128 bytes: 2, 4 or 8 vectors. kTileRows panels of accumulators
// keep both FMA ports busy without spilling: 16 of 32 registers on AVX-512, 8 of 16 below.
constexpr int kPanelBytes = 128;
struct Baseline {
  static constexpr int kVectorBytes = 16, kTileRows = 1;
};
struct Avx2 {
  static constexpr int kVectorBytes = 32, kTileRows = 2;
};
struct Avx512 {
  static constexpr int kVectorBytes = 64, kTileRows = 8;
};

template <class Isa, class T>
struct Simd {
  static constexpr int kLanes = Isa::kVectorBytes / sizeof(T);
  typedef T Vec __attribute__((vector_size(Isa::kVectorBytes)));

  static GRNG_INLINE Vec load(const T* p) {
    Vec v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  static GRNG_INLINE void store(T* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }
  static GRNG_INLINE Vec broadcast(const T* p) {
#if defined(__x86_64__)
    // gcc 12 broadcasts in two halves, and the insert that joins them takes the port of the second
    // FMA unit: a third of the speed of a matrix kernel. Broadcasting from memory takes a load port
    // only.
    if constexpr (Isa::kVectorBytes == 64) {
      Vec v;
      if constexpr (sizeof(T) == 4) {
        asm("vbroadcastss %1, %0" : "=v"(v) : "m"(*p));
      } else {
        asm("vbroadcastsd %1, %0" : "=v"(v) : "m"(*p));
      }
      return v;
    }
#endif
    return *p - Vec{};
  }
  static GRNG_INLINE double sum(Vec v) {
    double total = 0;
    for (int i = 0; i < kLanes; ++i) total += v[i];
    return total;
  }
};

// Calls f(Isa{}) for the best instruction set of this CPU, with f compiled for it.
#if defined(__x86_64__) && defined(__GNUC__)
template <class F>
__attribute__((target("arch=x86-64-v4"), flatten)) void run_avx512(const F& f) {
  f(Avx512{});
}
template <class F>
__attribute__((target("arch=x86-64-v3"), flatten)) void run_avx2(const F& f) {
  f(Avx2{});
}
template <class F>
void for_this_cpu(const F& f) {
  static const bool avx512 =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx512) {
    run_avx512(f);
  } else if (avx2) {
    run_avx2(f);
  } else {
    f(Baseline{});
  }
}
#else
template <class F>
void for_this_cpu(const F& f) {
  f(Baseline{});
}
#endif

}  // namespace grng
