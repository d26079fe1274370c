// SPDX-License-Identifier: Apache-2.0
// The two streaming passes of the diagonal Kalman update on CUDA: right and deterministic first.
//
// Pass 1: every block of threads sums an 8x8 tile of H diag(p) H^T over a fixed share of the
// elements; a second kernel adds the shares in a fixed order, in fp64. Pass 2: one thread per
// element.
#include <cuda_runtime.h>

#include "../kernels.h"

namespace grng {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTile = 8, kTileSize = kTile * kTile;
// Two blocks per multiprocessor of the largest current GPUs. A constant, so that the order of the
// sums, and with it every bit of the result, is the same on every device.
constexpr int kShares = 264;

__host__ __device__ int64_t tiles_of(int64_t outputs) { return (outputs + kTile - 1) / kTile; }

// Tile number t of the lower triangle, counted row by row.
__device__ void tile_position(int64_t t, int64_t* row, int64_t* col) {
  *row = 0;
  while ((*row + 1) * (*row + 2) / 2 <= t) ++*row;
  *col = t - *row * (*row + 1) / 2;
}

// partial [tiles, kShares, 8, 8]
__global__ void __launch_bounds__(kThreads)
    gram_partial_kernel(float* __restrict__ partial, const float* __restrict__ variance,
                        const float* __restrict__ jacobian, int64_t d, int64_t row_stride,
                        int64_t outputs) {
  int64_t tile_row, tile_col;
  tile_position(blockIdx.y, &tile_row, &tile_col);
  float acc[kTile][kTile] = {};
  for (int64_t k = blockIdx.x * int64_t{kThreads} + threadIdx.x; k < d;
       k += int64_t{kShares} * kThreads) {
    // A negative variance is an error of the caller; as NaN it reaches the check of the gram.
    const float p = variance[k] >= 0 ? variance[k] : __int_as_float(0x7fc00000);
    float left[kTile], right[kTile];
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      const int64_t r = tile_row * kTile + i, c = tile_col * kTile + i;
      left[i] = r < outputs ? p * jacobian[r * row_stride + k] : 0.f;
      right[i] = c < outputs ? jacobian[c * row_stride + k] : 0.f;
    }
#pragma unroll
    for (int i = 0; i < kTile; ++i)
#pragma unroll
      for (int j = 0; j < kTile; ++j) acc[i][j] += left[i] * right[j];
  }
  __shared__ float shared[kWarps][kTileSize];
#pragma unroll
  for (int i = 0; i < kTile; ++i)
#pragma unroll
    for (int j = 0; j < kTile; ++j) {
      float sum = acc[i][j];
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(~0u, sum, offset);
      if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32][i * kTile + j] = sum;
    }
  __syncthreads();
  if (threadIdx.x < kTileSize) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += shared[w][threadIdx.x];
    partial[(blockIdx.y * int64_t{kShares} + blockIdx.x) * kTileSize + threadIdx.x] = sum;
  }
}

// One block of 64 threads per tile.
__global__ void __launch_bounds__(kTileSize)
    gram_reduce_kernel(double* __restrict__ gram, const float* __restrict__ partial,
                       int64_t outputs) {
  int64_t tile_row, tile_col;
  tile_position(blockIdx.x, &tile_row, &tile_col);
  const int64_t r = tile_row * kTile + threadIdx.x / kTile,
                c = tile_col * kTile + threadIdx.x % kTile;
  if (r >= outputs || c > r) return;
  double sum = 0;
  for (int s = 0; s < kShares; ++s)
    sum += partial[(blockIdx.x * int64_t{kShares} + s) * kTileSize + threadIdx.x];
  sum += gram[r * outputs + c];
  gram[r * outputs + c] = sum;
  gram[c * outputs + r] = sum;
}

// Up to kRegisterRows outputs the scaled column of H lives in registers; above that it is read
// again for every row of the whitener, from L1.
constexpr int kRegisterRows = 16;

template <bool kInRegisters>
__global__ void __launch_bounds__(kThreads)
    apply_kernel(KalmanBlock block, KalmanGain gain, const int32_t* __restrict__ info) {
  if (*info != kOk) return;
  for (int64_t k = blockIdx.x * int64_t{kThreads} + threadIdx.x; k < block.d;
       k += int64_t{gridDim.x} * kThreads) {
    const float variance = block.variance[k], root = sqrtf(variance);
    const float* column = block.jacobian + k;
    float t = 0, step = 0;
    if constexpr (kInRegisters) {
      float s[kRegisterRows];
#pragma unroll
      for (int c = 0; c < kRegisterRows; ++c) {
        s[c] = c < gain.outputs ? root * column[c * block.row_stride] : 0.f;
        step += c < gain.outputs ? s[c] * gain.direction[c] : 0.f;
      }
#pragma unroll
      for (int r = 0; r < kRegisterRows; ++r) {
        if (r >= gain.outputs) break;
        float y = 0;
#pragma unroll
        for (int c = 0; c < kRegisterRows; ++c)
          y += c < gain.outputs ? gain.whitener[r * gain.outputs + c] * s[c] : 0.f;
        t += y * y;
      }
    } else {
      for (int64_t r = 0; r < gain.outputs; ++r) {
        float y = 0;
        for (int64_t c = 0; c < gain.outputs; ++c)
          y += gain.whitener[r * gain.outputs + c] * (root * column[c * block.row_stride]);
        t += y * y;
        step += root * column[r * block.row_stride] * gain.direction[r];
      }
    }
    // 1 - t > 0 in exact arithmetic; rounding must not make it zero or negative.
    const float posterior =
        gain.variational ? variance / (1 + t) : variance * fmaxf(1 - t, 1.1920929e-7f);
    block.mean[k] += root * step;
    block.variance[k] = fminf(posterior / gain.forgetting + gain.process_noise, 3.4028235e38f);
  }
}

}  // namespace

int64_t kalman_gram_cuda_workspace(int64_t outputs) {
  const int64_t tiles = tiles_of(outputs);
  return tiles * (tiles + 1) / 2 * kShares * kTileSize;
}

int kalman_gram_cuda(double* gram, float* workspace, const KalmanBlock& block, int64_t outputs,
                     void* stream) {
  if (block.d == 0 || outputs == 0) return cudaSuccess;
  const int64_t tiles = tiles_of(outputs), lower = tiles * (tiles + 1) / 2;
  // The y dimension of a grid ends at 65535 tiles: 2888 outputs.
  if (lower > 65535) return cudaErrorInvalidValue;
  const auto s = static_cast<cudaStream_t>(stream);
  gram_partial_kernel<<<dim3(kShares, static_cast<unsigned>(lower)), kThreads, 0, s>>>(
      workspace, block.variance, block.jacobian, block.d, block.row_stride, outputs);
  gram_reduce_kernel<<<static_cast<unsigned>(lower), kTileSize, 0, s>>>(gram, workspace, outputs);
  return cudaGetLastError();
}

int kalman_apply_cuda(const KalmanBlock& block, const KalmanGain& gain, const int32_t* info,
                      void* stream) {
  if (block.d == 0) return cudaSuccess;
  const int64_t wanted = (block.d + kThreads - 1) / kThreads;
  const auto blocks = static_cast<unsigned>(wanted < 4096 ? wanted : 4096);
  const auto s = static_cast<cudaStream_t>(stream);
  if (gain.outputs <= kRegisterRows) {
    apply_kernel<true><<<blocks, kThreads, 0, s>>>(block, gain, info);
  } else {
    apply_kernel<false><<<blocks, kThreads, 0, s>>>(block, gain, info);
  }
  return cudaGetLastError();
}

}  // namespace grng
