// SPDX-License-Identifier: Apache-2.0
// The raw-pointer interface between library.cpp (which knows torch) and the kernels (which do not).
#pragma once

#include <cstdint>

namespace grng {

// The values of grng_kernels.Info; a test keeps the two lists equal.
enum Info : int32_t { kOk = 0, kNonfiniteInput = 1, kNotConverged = 2, kOverflow = 3 };

enum class Dtype { kFloat32, kFloat64, kBFloat16, kFloat16 };

// Element [i, j] of a matrix of any layout lies at data + i * row_stride + j * col_stride (in
// elements).
struct ConstMatrix {
  const void* data;
  Dtype dtype;
  int64_t rows, cols, row_stride, col_stride;
};

// How a CPU kernel runs a loop on the caller's thread pool.
struct Threads {
  using Body = void (*)(int64_t begin, int64_t end, void* context);
  void (*parallel_for)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);

  template <class F>
  void run(int64_t count, int64_t grain, const F& f) const {
    parallel_for(
        0, count, grain, [](int64_t b, int64_t e, void* c) { (*static_cast<const F*>(c))(b, e); },
        const_cast<void*>(static_cast<const void*>(&f)));
  }
};

// ---- kron_factor (csrc/cpu/kron_factor.cpp) ----

// factor [n, n] (row-major, n = x.cols + bias) <- decay * factor + scale * x^T x, both triangles
// from one value. The dtype of factor is fp64 for fp64 x and fp32 otherwise.
struct FactorUpdate {
  void* factor;
  ConstMatrix x;
  bool bias;
  double decay, scale;
  Info info;
};

// Performs every update and sets its info; where that is not kOk, the factor is unchanged.
void kron_factor_update_cpu(FactorUpdate* items, int64_t count, const Threads& threads);

// ---- kalman_update (csrc/cpu/kalman_update.cpp, csrc/cuda/kalman_update.cu) ----

// One block of parameters: mean and variance [d] are contiguous, jacobian [outputs, d] has unit
// column stride. Everything is fp32.
struct KalmanBlock {
  float* mean;
  float* variance;
  const float* jacobian;
  int64_t d, row_stride;
};

// What the second pass applies to every element, see grng_kernels/kalman_update/innovation.py.
struct KalmanGain {
  int64_t outputs;
  const float* direction;  // [outputs], S^-1 e: mean += p * (H^T direction)
  const float* whitener;   // [outputs, outputs], W: t = p * |W h|^2
  bool variational;        // p / (1 + t) instead of p * (1 - t)
  float forgetting, process_noise;
};

// gram [outputs, outputs] (fp64, row-major, symmetric) += H diag(p) H^T.
void kalman_gram_cpu(double* gram, const KalmanBlock& block, int64_t outputs,
                     const Threads& threads);
void kalman_apply_cpu(const KalmanBlock& block, const KalmanGain& gain, const Threads& threads);

// The CUDA versions enqueue on `stream` and return a cudaError_t. `workspace` holds
// kalman_gram_cuda_workspace(outputs) floats. `info` is on the device: where *info != 0, apply
// writes nothing.
int64_t kalman_gram_cuda_workspace(int64_t outputs);
int kalman_gram_cuda(double* gram, float* workspace, const KalmanBlock& block, int64_t outputs,
                     void* stream);
int kalman_apply_cuda(const KalmanBlock& block, const KalmanGain& gain, const int32_t* info,
                      void* stream);

}  // namespace grng
