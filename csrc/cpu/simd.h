// SPDX-License-Identifier: Apache-2.0
// One binary for every x86-64 CPU: kernels are templates over an instruction set, inlined into a
// function with the matching target attribute, which is chosen at run time.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

// Vectors wider than the baseline's never cross a call: every function that takes one is inlined.
#pragma GCC diagnostic ignored "-Wpsabi"

#define GRNG_INLINE inline __attribute__((always_inline))
// For lambdas that hold vector code: left out of line they would be compiled for the baseline.
#define GRNG_INLINE_LAMBDA __attribute__((always_inline))

namespace grng {

// Matrix kernels keep a tile of sums in registers: kAccumulators vectors at most, which leaves some
// for the operands. Eight hide the latency of the FMA units; more save loads.
struct Baseline {
  static constexpr int kVectorBytes = 16, kAccumulators = 12;
};
struct Avx2 {
  static constexpr int kVectorBytes = 32, kAccumulators = 12;
};
struct Avx512 {
  static constexpr int kVectorBytes = 64, kAccumulators = 24;
};

// Rows of a register tile that is `vectors` wide: a power of two, and no more than the elements of
// a cache line, so that it divides whatever is made of cache lines.
template <class Isa, class T>
constexpr int tile_rows(int vectors) {
  int rows = 64 / sizeof(T);
  while (rows > 1 && rows * vectors > Isa::kAccumulators) rows /= 2;
  return rows;
}

template <class Isa, class T>
struct Simd {
  static constexpr int kLanes = Isa::kVectorBytes / sizeof(T);
  typedef T Vec __attribute__((vector_size(Isa::kVectorBytes)));

  static GRNG_INLINE Vec load(const T* p) {
    Vec v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  // For a vector that is used many times: gcc would load it again for each, and a matrix kernel has
  // no load port to spare.
  static GRNG_INLINE Vec load_once(const T* p) {
    Vec v = load(p);
#if defined(__x86_64__)
    asm("" : "+v"(v));
#endif
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
  // sums[v] += y[v] times the kRepeat elements at p, which are repeated to the end of a vector.
  template <int kRepeat, int kVecs>
  static GRNG_INLINE void add_repeated(Vec (&sums)[kVecs], const Vec (&y)[kVecs], const T* p) {
    static_assert(kRepeat == 1 || kRepeat == 2 || kRepeat == 4);
#if defined(__x86_64__)
    // In place of a broadcast and a product: without the decoding of another instruction.
    if constexpr (Isa::kVectorBytes == 64 && sizeof(T) == 4 && kRepeat == 1) {
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        // A variable of its own: what an asm writes to an array is stored to memory each time.
        Vec sum = sums[v];
        asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(y[v]), "m"(*p));
        sums[v] = sum;
      }
      return;
    }
#endif
    Vec x;
    if constexpr (kRepeat == 1) {
      x = broadcast(p);
#if defined(__x86_64__)
    } else if constexpr (Isa::kVectorBytes >= 32 && sizeof(T) == 4 && kRepeat == 2) {
      asm("vbroadcastsd %1, %0" : "=v"(x) : "m"(*reinterpret_cast<const T(*)[2]>(p)));
    } else if constexpr (Isa::kVectorBytes == 64 && sizeof(T) == 4 && kRepeat == 4) {
      asm("vbroadcastf32x4 %1, %0" : "=v"(x) : "m"(*reinterpret_cast<const T(*)[4]>(p)));
    } else if constexpr (Isa::kVectorBytes == 32 && sizeof(T) == 4 && kRepeat == 4) {
      asm("vbroadcastf128 %1, %0" : "=x"(x) : "m"(*reinterpret_cast<const T(*)[4]>(p)));
#endif
    } else {
      for (int i = 0; i < kLanes; ++i) x[i] = p[i % kRepeat];
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) sums[v] += x * y[v];
  }
  // With the sign bit cleared, the order of the bit patterns is the order of the magnitudes, and
  // every inf and NaN lies above every finite number: one integer maximum finds both.
  using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef Bits Magnitudes __attribute__((vector_size(Isa::kVectorBytes)));
  static GRNG_INLINE Magnitudes larger(Magnitudes a, Vec v) {
    const Magnitudes b = reinterpret_cast<Magnitudes>(v) & std::numeric_limits<Bits>::max();
    return b > a ? b : a;
  }
  static GRNG_INLINE double largest(Magnitudes a) {
    Bits bits = 0;
    for (int i = 0; i < kLanes; ++i) bits = a[i] > bits ? a[i] : bits;
    T value;
    std::memcpy(&value, &bits, sizeof(value));
    return static_cast<double>(value);
  }
  // The sums of the lanes of four vectors.
  static GRNG_INLINE void sum4(T* sums, const Vec* v) {
#if defined(__x86_64__)
    // gcc 12 takes a shuffle of wide vectors apart before it knows the instruction set.
    if constexpr (Isa::kVectorBytes >= 32 && sizeof(T) == 4) {
      Vec low, high, a, b;
      const auto pairs =
          [&](Vec x, Vec y) GRNG_INLINE_LAMBDA {  // of every four lanes: x0+x2, y0+y2, x1+x3, y1+y3
            asm("vunpcklps %2, %1, %0" : "=v"(low) : "v"(x), "v"(y));
            asm("vunpckhps %2, %1, %0" : "=v"(high) : "v"(x), "v"(y));
            return low + high;
          };
      a = pairs(v[0], v[1]);
      b = pairs(v[2], v[3]);
      asm("vunpcklpd %2, %1, %0" : "=v"(low) : "v"(a), "v"(b));
      asm("vunpckhpd %2, %1, %0" : "=v"(high) : "v"(a), "v"(b));
      T fours[kLanes];
      store(fours, low + high);
      for (int k = 0; k < 4; ++k) sums[k] = fours[k];
      for (int i = 4; i < kLanes; ++i) sums[i % 4] += fours[i];
      return;
    }
#endif
    for (int k = 0; k < 4; ++k) sums[k] = static_cast<T>(sum(v[k]));
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
// Calls f(arguments...), compiled for an instruction set that this CPU is known to have.
template <class Isa, class F, class... Arguments>
void run_on(const F& f, Arguments... arguments) {
  const auto call = [&](auto) GRNG_INLINE_LAMBDA { f(arguments...); };
  if constexpr (std::is_same_v<Isa, Avx512>) {
    run_avx512(call);
  } else if constexpr (std::is_same_v<Isa, Avx2>) {
    run_avx2(call);
  } else {
    f(arguments...);
  }
}
#else
template <class F>
void for_this_cpu(const F& f) {
  f(Baseline{});
}
template <class Isa, class F, class... Arguments>
void run_on(const F& f, Arguments... arguments) {
  f(arguments...);
}
#endif

}  // namespace grng
