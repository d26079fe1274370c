// SPDX-License-Identifier: Apache-2.0
// Damped inverses of matrices of order at most 64, of mixed sizes, in one launch: a block of four
// warps has one matrix of an order above 32, or four others, one per warp.
//
// What to do is told in the kernel's parameters, up to 32 KB of them: nothing is copied to the
// device first, nothing has to outlive the call, and a CUDA graph keeps its own copy.
#include <cuda_runtime.h>

#include <algorithm>
#include <limits>

#include "damped_inverse_small.h"

namespace grng {
namespace {

using damped_small::kProbes;
using damped_small::Lane;
using damped_small::Shared;

constexpr int kSmall = 32, kLarge = 64;
constexpr int kThreads = Shared<kLarge>::kThreads, kWarps = kThreads / 32;

// The largest parameters that CUDA takes everywhere, and since CUDA 12.1 on sm_70 and later. A
// launch copies them whole, so a short list has a kernel of its own.
constexpr int kParameterBytes[] = {4096, 32764};

template <bool kMany>
struct Batch {
  static constexpr int kCapacity =
      (kParameterBytes[kMany] - 4 * sizeof(int32_t)) / sizeof(DampedSmall);
  // Items of large order come first.
  int32_t items, large_items, large_matrices, small_matrices;
  float rho_root;
  bool relative;
  DampedSmall item[kCapacity];
};
static_assert(sizeof(Batch<false>) <= kParameterBytes[0]);
static_assert(sizeof(Batch<true>) <= kParameterBytes[1]);

template <int P>
struct DeviceGroup {
  int thread;
  Lane lane;

  template <class F>
  __device__ __forceinline__ void each(const F& f) {
    f(thread, lane);
  }
  __device__ __forceinline__ void sync() const {
    if constexpr (P == kLarge) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  }
  template <class F>
  __device__ __forceinline__ float sum(const F& f) const {
    float total = f(thread % 32);
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(~0u, total, offset);
    return total;
  }
  template <class F>
  __device__ __forceinline__ uint32_t largest(const F& f) const {
    return __reduce_max_sync(~0u, f(thread % 32));
  }
  template <class F>
  __device__ __forceinline__ uint32_t smallest(const F& f) const {
    return __reduce_min_sync(~0u, f(thread % 32));
  }
  __device__ __forceinline__ void add_neighbour() {
    lane.partial += __shfl_xor_sync(~0u, lane.partial, 1);
  }
  __device__ __forceinline__ bool any_failed() const { return lane.failed; }
};

// The last of items [begin, end) whose first matrix is not after this one.
template <class Batch>
__device__ int find_item(const Batch& batch, int begin, int end, int matrix) {
  while (end - begin > 1) {
    const int middle = (begin + end) / 2;
    (batch.item[middle].first <= matrix ? begin : end) = middle;
  }
  return begin;
}

template <bool kMany>
__global__ void __launch_bounds__(kThreads)
    damped_inverse_small_kernel(const __grid_constant__ Batch<kMany> batch) {
  __shared__ alignas(16) float signs[kLarge * kProbes];
  union Memory {
    Shared<kLarge> large;
    Shared<kSmall> small[kWarps];
  };
  __shared__ Memory memory;
  const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  for (int e = thread; e < kLarge * kProbes; e += kThreads)
    signs[e] = damped_small::probe_sign(e / kProbes, e % kProbes);
  __syncthreads();
  if (block < batch.large_matrices) {
    const DampedSmall& item = batch.item[find_item(batch, 0, batch.large_items, block)];
    DeviceGroup<kLarge> group{thread, {}};
    damped_small::run<kLarge>(group, memory.large, signs, item, block - item.first, batch.relative,
                              batch.rho_root);
    return;
  }
  const int matrix = (block - batch.large_matrices) * kWarps + thread / 32;
  if (matrix >= batch.small_matrices) return;
  const DampedSmall& item = batch.item[find_item(batch, batch.large_items, batch.items, matrix)];
  DeviceGroup<kSmall> group{thread % 32, {}};
  damped_small::run<kSmall>(group, memory.small[thread / 32], signs, item, matrix - item.first,
                            batch.relative, batch.rho_root);
}

template <bool kMany>
cudaError_t launch(const DampedSmall* items, int64_t count, bool relative, float rho_root,
                   cudaStream_t stream) {
  Batch<kMany> batch = {};
  batch.items = static_cast<int32_t>(count);
  batch.rho_root = rho_root;
  batch.relative = relative;
  int64_t large = 0, small = 0;
  for (int64_t i = 0; i < count; ++i) {
    const bool is_large = items[i].n > kSmall;
    int64_t& matrices = is_large ? large : small;
    batch.item[i] = items[i];
    batch.item[i].first = static_cast<int32_t>(matrices);
    batch.large_items += is_large;
    matrices += items[i].count;
    if (matrices > std::numeric_limits<int32_t>::max() / 2) return cudaErrorInvalidValue;
  }
  batch.large_matrices = static_cast<int32_t>(large);
  batch.small_matrices = static_cast<int32_t>(small);
  const int64_t blocks = large + (small + kWarps - 1) / kWarps;
  damped_inverse_small_kernel<kMany><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(batch);
  return cudaGetLastError();
}

}  // namespace

int damped_inverse_small_cuda(DampedSmall* items, int64_t count, bool relative, float rho_root,
                              void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  DampedSmall* end = std::remove_if(
      items, items + count, [](const DampedSmall& item) { return item.n == 0 || item.count == 0; });
  std::stable_partition(items, end, [](const DampedSmall& item) { return item.n > kSmall; });
  for (DampedSmall* at = items; at < end;) {
    const int64_t now = std::min<int64_t>(end - at, Batch<true>::kCapacity);
    const cudaError_t error = now <= Batch<false>::kCapacity
                                  ? launch<false>(at, now, relative, rho_root, s)
                                  : launch<true>(at, now, relative, rho_root, s);
    if (error != cudaSuccess) return error;
    at += now;
  }
  return cudaSuccess;
}

}  // namespace grng
