// SPDX-License-Identifier: Apache-2.0
// The raw-pointer interface between library.cpp (which knows torch) and the kernels (which do not).
#pragma once

#include <cstdint>

namespace grng {

// The values of grng_kernels.Info; a test keeps the two lists equal.
enum Info : int32_t {
  kOk = 0,
  kNonfiniteInput = 1,
  kNotConverged = 2,
  kOverflow = 3,
  kAsymmetric = 4
};

enum class Dtype { kFloat32, kFloat64, kBFloat16, kFloat16 };

// The patches of a convolution as a matrix that is never built. Row (b, o1, o2), column (c, k1,
// k2): the element of channel c at line o1 * stride[0] + k1 * dilation[0] - padding[0], and the
// same for its column; zero outside.
struct PatchGrid {
  int64_t height, width, out_height, out_width;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  int64_t batch_stride, channel_stride, line_stride, column_stride;
};

// Element [i, j] of a matrix of any layout lies at data + i * row_stride + j * col_stride (in
// elements). With `patches` it is an element of those, and the strides mean nothing.
struct ConstMatrix {
  const void* data;
  Dtype dtype;
  int64_t rows, cols, row_stride, col_stride;
  const PatchGrid* patches = nullptr;
};

// How a CPU kernel runs a loop on the caller's thread pool of `count` threads.
struct Threads {
  int64_t count;
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

// ---- kron_factor_conv2d (csrc/cpu/kron_factor_conv2d.cpp) ----

// factor [groups, n, n] (row-major, n = channels / groups * kernel[0] * kernel[1] + bias)
// <- decay * factor + scale * P^T P, P the patches of a group.
struct ConvFactorUpdate {
  void* factor;
  const void* x;
  Dtype dtype;
  int64_t batch, channels, groups;
  PatchGrid grid;
  bool bias;
  double decay, scale;
  Info info;
};

// Performs every update and sets its info; where that is not kOk, no group of the factor is
// changed.
void kron_factor_conv2d_update_cpu(ConvFactorUpdate* items, int64_t count, const Threads& threads);

// ---- precondition (csrc/cpu/precondition.cpp) ----

// out [m, n] = left [m, m] * gradient [m, n] * right [n, n], and their inner product with the
// gradient. The inverses have unit column stride; m or n is at most kMaxPreconditionNarrow. With
// `bias` the gradient's last column lies there and grad has one column less; both have one dtype,
// not fp64.
constexpr int64_t kMaxPreconditionNarrow = 16;
struct Precondition {
  ConstMatrix grad;
  const void* bias;
  int64_t bias_stride;
  const float *left, *right;
  int64_t left_stride, right_stride;
  float* out;
  int64_t out_row_stride, out_col_stride, m, n;
  double dot;
};

void precondition_cpu(Precondition* items, int64_t count, bool with_dot, const Threads& threads);

// ---- damped_inverse (csrc/cpu/damped_inverse.cpp) ----

// inverse [n, n] (row-major) <- (factor + damping * I)^-1, both triangles from one value, of the
// symmetrised factor [n, n]. Not for fp64.
struct DampedInverse {
  ConstMatrix factor;
  float* inverse;
  // [n]: the start of the norm estimate, all zero for none; replaced where info is kOk. Null: none.
  float* vector;
  // Relative: rho's root, times the norm. Otherwise the damping itself; `used` is what was added.
  bool relative;
  double damping;
  float used, norm, residual;
  Info info;
};

// Performs every item and sets its results; where info is not kOk, the inverse must not be used.
void damped_inverse_cpu(DampedInverse* items, int64_t count, const Threads& threads);

// ---- rank_one (csrc/cpu/rank_one.cpp) ----

// A block of one long vector; all are contiguous, of one dtype, fp32 or fp64.
struct RankOneBlock {
  void* out;
  const void *grad, *score;
  int64_t length;
};

// out = (damping I + u u^T)^-1 g, with the dot products over all blocks, in fp64.
void rank_one_cpu(const RankOneBlock* blocks, int64_t count, Dtype dtype, double damping,
                  const Threads& threads);

// What a block of a step is made with: param <- decay param - lr (damping I + u u^T)^-1 g.
struct RankOneStepBlock {
  void* param;
  const void *grad, *score;
  int64_t length;
  double lr, decay;
};

// Returns the norm of the direction. Where a dot product is not finite, or |g| / damping is beyond
// `largest`, nothing is written and it is NaN.
double rank_one_step_cpu(const RankOneStepBlock* blocks, int64_t count, Dtype dtype, double damping,
                         double largest, const Threads& threads);

// ---- grafting (csrc/cpu/grafting.cpp) ----

// The moments of one tensor, and what corrects their start at zero: 1 / (1 - beta1^t) and
// 1 / sqrt(1 - beta2^t). All arrays have one order of elements and `length` of them.
struct AdamMoments {
  void *exp_avg, *exp_avg_sq;
  Dtype dtype;  // of the moments: fp32 or fp64
  int64_t length;
  double mean_scale, root_scale;
};

// exp_avg and exp_avg_sq <- their averages with grads[i]; lengths[i] = the norm of Adam's step.
struct AdamGradient {
  const void* grad;
  Dtype dtype;
};
void adam_moments_cpu(const AdamMoments* items, const AdamGradient* grads, double* lengths,
                      int64_t count, double beta1, double beta2, double eps,
                      const Threads& threads);

// param <- decay * param - lr * scale * direction; where the scale is no finite number, Adam's step
// in place of scale * direction. The param has the order of the moments. So has the direction, of
// their dtype, where `rows` is 0; otherwise it has rows of `cols` elements, of any strides.
struct GraftedStep {
  AdamMoments moments;
  void* param;
  Dtype param_dtype;
  const void* direction;
  double scale;
  int64_t rows, cols, col_stride;
  // Sizes and strides of the dimensions that the rows run over, outermost first.
  int64_t dims, size[4], stride[4];
};
void grafted_step_cpu(const GraftedStep* items, int64_t count, double lr, double decay, double eps,
                      const Threads& threads);

// ---- kalman_update (csrc/cpu/kalman_*.cpp, csrc/cuda/kalman_update.cu) ----

// One block of parameters: mean and variance [d] are contiguous, jacobian [outputs, d] of any
// layout and fp32, bf16 or fp16. The state is fp32. Where `inputs` has a row, [1, n], the block is
// factored: jacobian is [outputs, m], d = m n, and row c of H is kron(jacobian_c, inputs).
struct KalmanPiece {
  float *mean, *variance;
  ConstMatrix jacobian;
  ConstMatrix inputs = {};

  bool is_factored() const { return inputs.rows > 0; }
};

enum class Likelihood { kGaussian, kCategorical, kFisher };

// The whole update, as grng_kernels/kalman_update/op.py describes it.
struct KalmanUpdate {
  const KalmanPiece* blocks;
  int64_t count, outputs;
  const double* innovation;  // [outputs]
  // Gaussian: R [outputs, outputs]. Categorical: outputs probabilities, noise_cols to each
  // observation. Fisher: T [outputs, noise_cols].
  const double* noise;
  int64_t noise_cols;
  Likelihood likelihood;
  bool variational, raises_noise;
  double rho;
  float forgetting, process_noise;
};

// The C x C stage between the passes is for at most so many outputs.
constexpr int64_t kMaxKalmanOutputs = 256;
// Where the result is not kOk, nothing was written.
Info kalman_update_cpu(const KalmanUpdate& update, const Threads& threads);

// One block where everything is fp32 and jacobian [outputs, d] has unit column stride.
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

// gram [outputs, outputs] (fp64, row-major, symmetric) += H diag(p) H^T, summed over the blocks.
void kalman_gram_cpu(double* gram, const KalmanPiece* blocks, int64_t count, int64_t outputs,
                     const Threads& threads);
void kalman_apply_cpu(const KalmanPiece* blocks, int64_t count, const KalmanGain& gain,
                      const Threads& threads);

// The CUDA versions enqueue on `stream` and return a cudaError_t. `workspace` holds
// kalman_gram_cuda_workspace(outputs) floats. `info` is on the device: where *info != 0, apply
// writes nothing.
int64_t kalman_gram_cuda_workspace(int64_t outputs);
int kalman_gram_cuda(double* gram, float* workspace, const KalmanBlock& block, int64_t outputs,
                     void* stream);
int kalman_apply_cuda(const KalmanBlock& block, const KalmanGain& gain, const int32_t* info,
                      void* stream);

// ---- damped_inverse, small orders on CUDA (csrc/cuda/damped_inverse_small.cu) ----

// `count` matrices of order n <= kMaxDampedSmall: factor [count, n, n] of any layout (not fp64),
// damping [count] (null where rho decides it) and vector [count, n] are what
// grng_kernels/damped_inverse/entry.py says, and so are the results. All are on the device, and
// the results and the damping are contiguous fp32.
constexpr int64_t kMaxDampedSmall = 64;
struct DampedSmall {
  const void* factor;
  int64_t batch_stride, row_stride, col_stride;
  const float* damping;
  float *vector, *inverse, *used, *norm, *residual;
  int32_t* info;
  Dtype dtype;
  int32_t n, count;
  int32_t first;  // set by the launch
};

// Enqueues on `stream` and returns a cudaError_t; reorders the items. With `relative` the damping
// is rho_root times the norm.
int damped_inverse_small_cuda(DampedSmall* items, int64_t count, bool relative, float rho_root,
                              void* stream);

}  // namespace grng
