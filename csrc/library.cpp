// SPDX-License-Identifier: Apache-2.0
// Every compiled operator: schemas, the checks that memory safety needs, and the bindings to the
// kernels.
//
// These are private operators. The public functions (grng_kernels/<op>/op.py) check their arguments
// first and say what is wrong in the user's terms; what is checked again here keeps a direct call
// from reading or writing out of bounds. Only the stable ABI of torch is used: one binary serves
// torch >= 2.10.
#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/macros/Macros.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "kernels.h"

#ifdef GRNG_CUDA
// A CPU-only torch does not export this: a strong reference would keep the library from loading
// there.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

grng::Threads threads_of_torch() {
  return {torch::stable::get_num_threads(),
          [](int64_t begin, int64_t end, int64_t grain, grng::Threads::Body body, void* context) {
            torch::stable::parallel_for(begin, end, grain,
                                        [&](int64_t b, int64_t e) { body(b, e, context); });
          }};
}

grng::Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return grng::Dtype::kFloat32;
    case ScalarType::Double:
      return grng::Dtype::kFloat64;
    case ScalarType::BFloat16:
      return grng::Dtype::kBFloat16;
    case ScalarType::Half:
      return grng::Dtype::kFloat16;
    default:
      STD_TORCH_CHECK(false, "grng: dtype must be float32, float64, bfloat16 or float16");
  }
}

void check_dense(const Tensor& t, ScalarType dtype, std::initializer_list<int64_t> sizes,
                 const char* name) {
  bool ok = t.scalar_type() == dtype && t.is_contiguous() &&
            t.dim() == static_cast<int64_t>(sizes.size());
  int64_t i = 0;
  for (int64_t size : sizes) ok = ok && t.size(i++) == size;
  STD_TORCH_CHECK(ok, "grng: ", name, " has the wrong dtype, shape or layout");
}

// The same for any shape with so many elements.
void check_size(const Tensor& t, ScalarType dtype, int64_t numel, const char* name) {
  STD_TORCH_CHECK(
      t.scalar_type() == dtype && t.is_contiguous() && static_cast<int64_t>(t.numel()) == numel,
      "grng: ", name, " has the wrong dtype, size or layout");
}

// Bytes [begin, end) that a tensor reaches, from its first element to its last.
struct Span {
  uintptr_t begin, end;
  bool written;
};

Span span_of(const Tensor& t, bool written) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.data_ptr());
  int64_t last = 0;
  for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
  const int64_t size = t.numel() > 0 ? (last + 1) * t.element_size() : 0;
  return {begin, begin + static_cast<uintptr_t>(size), written};
}

// What is written may overlap nothing else; what is only read may.
void check_no_overlap(std::vector<Span> spans) {
  std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) {
    return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;
  });
  uintptr_t written_to = 0, read_to = 0;
  for (const Span& s : spans) {
    if (s.begin == s.end) continue;
    STD_TORCH_CHECK(s.begin >= written_to && (!s.written || s.begin >= read_to),
                    "grng: tensors overlap in memory, and one is written");
    uintptr_t& reach = s.written ? written_to : read_to;
    reach = std::max(reach, s.end);
  }
}

// ---- kron_factor ----

void kron_factor_update(const Tensors factors, const Tensors xs, const Tensor info, bool bias,
                        double decay, const std::vector<double> scales) {
  const int64_t count = static_cast<int64_t>(factors.size());
  STD_TORCH_CHECK(
      count == static_cast<int64_t>(xs.size()) && count == static_cast<int64_t>(scales.size()),
      "grng: factors, xs and scales must have the same length");
  STD_TORCH_CHECK(info.scalar_type() == ScalarType::Int && info.is_contiguous() &&
                      static_cast<int64_t>(info.numel()) == count,
                  "grng: info must be int32, one per factor");
  std::vector<grng::FactorUpdate> items;
  std::vector<Span> spans;
  for (int64_t i = 0; i < count; ++i) {
    const Tensor& x = xs[i];
    STD_TORCH_CHECK(x.dim() == 2, "grng: x must be a matrix");
    const grng::ConstMatrix matrix{x.data_ptr(), dtype_of(x), x.size(0),
                                   x.size(1),    x.stride(0), x.stride(1)};
    const int64_t n = matrix.cols + bias;
    const bool wide = matrix.dtype == grng::Dtype::kFloat64;
    check_dense(factors[i], wide ? ScalarType::Double : ScalarType::Float, {n, n}, "factor");
    items.push_back({factors[i].data_ptr(), matrix, bias, decay, scales[i], grng::kOk});
    spans.push_back(span_of(factors[i], true));
    spans.push_back(span_of(x, false));
  }
  check_no_overlap(std::move(spans));
  grng::kron_factor_update_cpu(items.data(), count, threads_of_torch());
  int32_t* codes = static_cast<int32_t*>(info.data_ptr());
  for (int64_t i = 0; i < count; ++i) codes[i] = items[i].info;
}

// ---- kron_factor_conv2d ----

// Height and width of: kernel, stride, padding, dilation; then the number of groups.
constexpr size_t kGeometrySize = 9;
// Their largest value: sizes computed from them stay far from the end of int64.
constexpr int64_t kMaxGeometry = 1 << 20;

grng::PatchGrid patch_grid(const Tensor& x, const std::vector<int64_t>& g) {
  grng::PatchGrid grid{
      x.size(2),    x.size(3),    0,           0,           {g[0], g[1]}, {g[2], g[3]},
      {g[4], g[5]}, {g[6], g[7]}, x.stride(0), x.stride(1), x.stride(2),  x.stride(3)};
  const auto outputs = [&](int i, int64_t size) {
    const auto in_range = [](int64_t value, int64_t least) {
      return value >= least && value <= kMaxGeometry;
    };
    STD_TORCH_CHECK(in_range(grid.kernel[i], 1) && in_range(grid.stride[i], 1) &&
                        in_range(grid.padding[i], 0) && in_range(grid.dilation[i], 1) && size > 0,
                    "grng: the geometry of the convolution is out of range");
    const int64_t room = size + 2 * grid.padding[i] - grid.dilation[i] * (grid.kernel[i] - 1) - 1;
    STD_TORCH_CHECK(room >= 0, "grng: the kernel is larger than its padded input");
    return room / grid.stride[i] + 1;
  };
  grid.out_height = outputs(0, grid.height);
  grid.out_width = outputs(1, grid.width);
  return grid;
}

void kron_factor_conv2d_update(const Tensors factors, const Tensors xs, const Tensor info,
                               const std::vector<int64_t> geometry, bool bias, double decay,
                               const std::vector<double> scales) {
  const int64_t count = static_cast<int64_t>(factors.size());
  STD_TORCH_CHECK(
      count == static_cast<int64_t>(xs.size()) && count == static_cast<int64_t>(scales.size()),
      "grng: factors, xs and scales must have the same length");
  check_dense(info, ScalarType::Int, {count}, "info");
  STD_TORCH_CHECK(geometry.size() == kGeometrySize && geometry[8] > 0,
                  "grng: the geometry must be nine numbers");
  std::vector<grng::ConvFactorUpdate> items;
  std::vector<Span> spans;
  for (int64_t i = 0; i < count; ++i) {
    const Tensor& x = xs[i];
    const int64_t groups = geometry[8];
    STD_TORCH_CHECK(x.dim() == 4 && x.size(1) % groups == 0,
                    "grng: x must be [B, C, H, W], C divisible by the groups");
    const grng::PatchGrid grid = patch_grid(x, geometry);
    const grng::Dtype dtype = dtype_of(x);
    const int64_t n = x.size(1) / groups * grid.kernel[0] * grid.kernel[1] + bias;
    const bool wide = dtype == grng::Dtype::kFloat64;
    check_dense(factors[i], wide ? ScalarType::Double : ScalarType::Float, {groups, n, n},
                "factor");
    items.push_back({factors[i].data_ptr(), x.data_ptr(), dtype, x.size(0), x.size(1), groups, grid,
                     bias, decay, scales[i], grng::kOk});
    spans.push_back(span_of(factors[i], true));
    spans.push_back(span_of(x, false));
  }
  check_no_overlap(std::move(spans));
  grng::kron_factor_conv2d_update_cpu(items.data(), count, threads_of_torch());
  int32_t* codes = static_cast<int32_t*>(info.data_ptr());
  for (int64_t i = 0; i < count; ++i) codes[i] = items[i].info;
}

// ---- precondition ----

grng::ConstMatrix matrix_of(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 2, "grng: grad must be a matrix");
  return {t.data_ptr(), dtype_of(t), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

const float* check_inverse(const Tensor& t, int64_t n, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.dim() == 2 && t.size(0) == n &&
                      t.size(1) == n && (t.stride(1) == 1 || n <= 1),
                  "grng: ", name, " must be a square float32 matrix with unit column stride");
  return static_cast<const float*>(t.data_ptr());
}

// An empty bias means none, and an empty list none for all. `dots` is empty where they are not
// wanted.
void precondition(const Tensors outs, const Tensor dots, const Tensors grads, const Tensors lefts,
                  const Tensors rights, const Tensors biases) {
  const size_t count = outs.size();
  STD_TORCH_CHECK(count == grads.size() && count == lefts.size() && count == rights.size() &&
                      (biases.empty() || count == biases.size()),
                  "grng: outs, grads, lefts, rights and biases must have the same length");
  const bool with_dot = dots.numel() > 0;
  if (with_dot) check_dense(dots, ScalarType::Float, {static_cast<int64_t>(count)}, "dots");
  std::vector<grng::Precondition> items;
  std::vector<Span> spans;
  items.reserve(count);
  spans.reserve(5 * count);
  for (size_t i = 0; i < count; ++i) {
    const grng::ConstMatrix grad = matrix_of(grads[i]);
    const Tensor* bias = biases.empty() ? nullptr : &biases[i];
    const Tensor& out = outs[i];
    const bool has_bias = bias && bias->numel() > 0;
    const int64_t m = grad.rows, n = grad.cols + has_bias;
    STD_TORCH_CHECK(grad.dtype != grng::Dtype::kFloat64, "grng: grad must not be float64");
    STD_TORCH_CHECK(std::min(m, n) <= grng::kMaxPreconditionNarrow, "grng: grad is not narrow");
    STD_TORCH_CHECK(!has_bias || (bias->dim() == 1 && bias->size(0) == m &&
                                  bias->scalar_type() == grads[i].scalar_type()),
                    "grng: bias must have one element per row of grad, and its dtype");
    STD_TORCH_CHECK(out.scalar_type() == ScalarType::Float && out.dim() == 2 && out.size(0) == m &&
                        out.size(1) == n,
                    "grng: out must be a float32 matrix of the gradient's shape");
    items.push_back({grad, has_bias ? bias->data_ptr() : nullptr, has_bias ? bias->stride(0) : 0,
                     check_inverse(lefts[i], m, "left"), check_inverse(rights[i], n, "right"),
                     lefts[i].stride(0), rights[i].stride(0), static_cast<float*>(out.data_ptr()),
                     out.stride(0), out.stride(1), m, n, 0});
    spans.push_back(span_of(out, true));
    for (const Tensor* t : {&grads[i], &lefts[i], &rights[i]}) spans.push_back(span_of(*t, false));
    if (has_bias) spans.push_back(span_of(*bias, false));
  }
  check_no_overlap(std::move(spans));
  grng::precondition_cpu(items.data(), static_cast<int64_t>(count), with_dot, threads_of_torch());
  float* values = static_cast<float*>(dots.data_ptr());
  for (size_t i = 0; with_dot && i < count; ++i) values[i] = static_cast<float>(items[i].dot);
}

// ---- damped_inverse ----

// Hands out the memory of tensors that lie one after the other, whole pieces of each.
class Pieces {
 public:
  Pieces(const Tensors& tensors, const char* name) : tensors_(tensors), name_(name) {}

  float* take(int64_t numel) {
    if (numel == 0) return nullptr;
    while (left_ == 0 && at_ < tensors_.size()) {
      const Tensor& t = tensors_[at_++];
      left_ = static_cast<int64_t>(t.numel());
      check_size(t, ScalarType::Float, left_, name_);
      next_ = static_cast<float*>(t.data_ptr());
    }
    STD_TORCH_CHECK(numel <= left_, "grng: ", name_, " has too few elements");
    float* piece = next_;
    next_ += numel;
    left_ -= numel;
    return piece;
  }

  void check_used_up() const {
    bool used_up = left_ == 0;
    for (size_t i = at_; i < tensors_.size(); ++i) used_up = used_up && tensors_[i].numel() == 0;
    STD_TORCH_CHECK(used_up, "grng: ", name_, " has too many elements");
  }

 private:
  const Tensors& tensors_;
  const char* name_;
  size_t at_ = 0;
  int64_t left_ = 0;
  float* next_ = nullptr;
};

// `results` [3, matrices] (fp32): damping, norm and residual. `dampings` is empty where rho
// decides. `inverses` hold those of all factors in their order, several in one tensor or not;
// `vectors` the same, or they are empty: then every start is cold, and none is kept.
void damped_inverse(const Tensors inverses, const Tensors vectors, const Tensor results,
                    const Tensor info, const Tensors factors, const Tensors dampings,
                    double rho_root) {
  const size_t count = factors.size();
  STD_TORCH_CHECK(dampings.empty() || count == dampings.size(),
                  "grng: factors and dampings must have the same length");
  std::vector<grng::DampedInverse> items;
  items.reserve(count);
  std::vector<Span> spans;
  spans.reserve(inverses.size() + vectors.size() + count);
  Pieces all_inverses(inverses, "inverse"), all_vectors(vectors, "vector");
  for (size_t i = 0; i < count; ++i) {
    const Tensor& factor = factors[i];
    const int64_t dim = factor.dim();
    STD_TORCH_CHECK((dim == 2 || dim == 3) && factor.size(dim - 1) == factor.size(dim - 2),
                    "grng: factor must be [N, N] or [L, N, N]");
    const grng::Dtype dtype = dtype_of(factor);
    STD_TORCH_CHECK(dtype != grng::Dtype::kFloat64, "grng: factor must not be float64");
    const int64_t n = factor.size(dim - 1), length = dim == 3 ? factor.size(0) : 1;
    const int64_t step = dim == 3 ? factor.stride(0) : 0;
    if (!dampings.empty()) check_size(dampings[i], ScalarType::Float, length, "damping");
    const char* data = static_cast<const char*>(factor.data_ptr());
    const int64_t size = factor.element_size(), rows = factor.stride(dim - 2),
                  columns = factor.stride(dim - 1);
    for (int64_t l = 0; l < length; ++l) {
      const double damping =
          dampings.empty() ? rho_root : static_cast<const float*>(dampings[i].data_ptr())[l];
      const grng::ConstMatrix matrix{data + l * step * size, dtype, n, n, rows, columns};
      items.push_back({matrix, all_inverses.take(n * n),
                       vectors.empty() ? nullptr : all_vectors.take(n), dampings.empty(), damping,
                       0, 0, 0, grng::kOk});
    }
    spans.push_back(span_of(factor, false));
  }
  all_inverses.check_used_up();
  all_vectors.check_used_up();
  for (const Tensors* list : {&inverses, &vectors})
    for (const Tensor& t : *list) spans.push_back(span_of(t, true));
  const int64_t total = static_cast<int64_t>(items.size());
  check_size(results, ScalarType::Float, 3 * total, "results");
  check_size(info, ScalarType::Int, total, "info");
  check_no_overlap(std::move(spans));
  grng::damped_inverse_cpu(items.data(), total, threads_of_torch());
  float* values = static_cast<float*>(results.data_ptr());
  int32_t* codes = static_cast<int32_t*>(info.data_ptr());
  for (int64_t i = 0; i < total; ++i) {
    values[i] = items[i].used;
    values[total + i] = items[i].norm;
    values[2 * total + i] = items[i].residual;
    codes[i] = items[i].info;
  }
}

// ---- rank_one ----

void rank_one(const Tensors outs, const Tensors grads, const Tensors scores, double damping) {
  STD_TORCH_CHECK(outs.size() == grads.size() && outs.size() == scores.size(),
                  "grng: one out, grad and score per block");
  if (outs.empty()) return;
  const ScalarType dtype = outs[0].scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "grng: dtype must be float32 or float64");
  std::vector<grng::RankOneBlock> blocks;
  std::vector<Span> spans;
  for (size_t i = 0; i < outs.size(); ++i) {
    const int64_t length = outs[i].numel();
    check_size(outs[i], dtype, length, "out");
    check_size(grads[i], dtype, length, "grad");
    check_size(scores[i], dtype, length, "score");
    blocks.push_back({outs[i].data_ptr(), grads[i].data_ptr(), scores[i].data_ptr(), length});
    spans.push_back(span_of(outs[i], true));
    spans.push_back(span_of(grads[i], false));
    spans.push_back(span_of(scores[i], false));
  }
  check_no_overlap(std::move(spans));
  grng::rank_one_cpu(blocks.data(), static_cast<int64_t>(blocks.size()), dtype_of(outs[0]), damping,
                     threads_of_torch());
}

void rank_one_step(const Tensors params, const Tensor norm, const Tensors grads,
                   const Tensors scores, double damping, const std::vector<double> lrs,
                   const std::vector<double> decays, double largest) {
  const size_t count = params.size();
  STD_TORCH_CHECK(count > 0 && count == grads.size() && count == scores.size() &&
                      count == lrs.size() && count == decays.size(),
                  "grng: one param, grad, score, lr and decay per block");
  const ScalarType dtype = params[0].scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "grng: dtype must be float32 or float64");
  check_dense(norm, ScalarType::Double, {}, "norm");
  std::vector<grng::RankOneStepBlock> blocks;
  std::vector<Span> spans{span_of(norm, true)};
  for (size_t i = 0; i < count; ++i) {
    const int64_t length = params[i].numel();
    check_size(params[i], dtype, length, "param");
    check_size(grads[i], dtype, length, "grad");
    check_size(scores[i], dtype, length, "score");
    blocks.push_back({params[i].data_ptr(), grads[i].data_ptr(), scores[i].data_ptr(), length,
                      lrs[i], decays[i]});
    spans.push_back(span_of(params[i], true));
    spans.push_back(span_of(grads[i], false));
    spans.push_back(span_of(scores[i], false));
  }
  check_no_overlap(std::move(spans));
  *static_cast<double*>(norm.data_ptr()) =
      grng::rank_one_step_cpu(blocks.data(), static_cast<int64_t>(count), dtype_of(params[0]),
                              damping, largest, threads_of_torch());
}

// ---- grafting ----

// Whether elements that are next to each other in one are so in the other: one strided dimension
// then serves both.
bool same_layout(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i)
    if (a.size(i) != b.size(i) || (a.size(i) > 1 && a.stride(i) != b.stride(i))) return false;
  return true;
}

// No gap between the elements, in whatever order; with non-overlapping strides, one span of them.
bool is_dense(const Tensor& t) {
  const Span span = span_of(t, false);
  return span.end - span.begin == static_cast<uintptr_t>(t.numel()) * t.element_size();
}

grng::AdamMoments adam_moments_of(const Tensor& exp_avg, const Tensor& exp_avg_sq,
                                  double mean_scale, double root_scale) {
  const ScalarType dtype = exp_avg.scalar_type();
  STD_TORCH_CHECK((dtype == ScalarType::Float || dtype == ScalarType::Double) &&
                      exp_avg_sq.scalar_type() == dtype && is_dense(exp_avg) &&
                      same_layout(exp_avg, exp_avg_sq),
                  "grng: the moments must be dense, float32 or float64, and of one layout");
  return {exp_avg.data_ptr(), exp_avg_sq.data_ptr(),
          dtype_of(exp_avg),  static_cast<int64_t>(exp_avg.numel()),
          mean_scale,         root_scale};
}

void adam_moments(const Tensors exp_avgs, const Tensors exp_avg_sqs, const Tensor lengths,
                  const Tensors grads, const std::vector<double> mean_scales,
                  const std::vector<double> root_scales, double beta1, double beta2, double eps) {
  const size_t count = exp_avgs.size();
  STD_TORCH_CHECK(count == exp_avg_sqs.size() && count == grads.size() &&
                      count == mean_scales.size() && count == root_scales.size(),
                  "grng: the lists must have the same length");
  check_dense(lengths, ScalarType::Double, {static_cast<int64_t>(count)}, "lengths");
  std::vector<grng::AdamMoments> items;
  std::vector<grng::AdamGradient> gradients;
  std::vector<Span> spans{span_of(lengths, true)};
  for (size_t i = 0; i < count; ++i) {
    items.push_back(adam_moments_of(exp_avgs[i], exp_avg_sqs[i], mean_scales[i], root_scales[i]));
    STD_TORCH_CHECK(same_layout(exp_avgs[i], grads[i]), "grng: grad must have the moments' layout");
    gradients.push_back({grads[i].data_ptr(), dtype_of(grads[i])});
    spans.push_back(span_of(exp_avgs[i], true));
    spans.push_back(span_of(exp_avg_sqs[i], true));
    spans.push_back(span_of(grads[i], false));
  }
  check_no_overlap(std::move(spans));
  grng::adam_moments_cpu(items.data(), gradients.data(), static_cast<double*>(lengths.data_ptr()),
                         static_cast<int64_t>(count), beta1, beta2, eps, threads_of_torch());
}

void grafted_step(const Tensors params, const Tensors directions, const Tensors exp_avgs,
                  const Tensors exp_avg_sqs, const std::vector<double> scales,
                  const std::vector<double> mean_scales, const std::vector<double> root_scales,
                  double lr, double decay, double eps) {
  const size_t count = params.size();
  STD_TORCH_CHECK(count == directions.size() && count == exp_avgs.size() &&
                      count == exp_avg_sqs.size() && count == scales.size() &&
                      count == mean_scales.size() && count == root_scales.size(),
                  "grng: the lists must have the same length");
  std::vector<grng::GraftedStep> items;
  std::vector<Span> spans;
  for (size_t i = 0; i < count; ++i) {
    const Tensor &param = params[i], &direction = directions[i];
    grng::GraftedStep item{};
    item.moments = adam_moments_of(exp_avgs[i], exp_avg_sqs[i], mean_scales[i], root_scales[i]);
    STD_TORCH_CHECK(
        same_layout(exp_avgs[i], param) && direction.scalar_type() == exp_avgs[i].scalar_type(),
        "grng: param must have the moments' layout, direction their dtype");
    item.param = param.data_ptr();
    item.param_dtype = dtype_of(param);
    item.direction = direction.data_ptr();
    item.scale = scales[i];
    if (!same_layout(param, direction)) {
      const int64_t last = param.dim() - 1;
      bool fits = param.is_contiguous() && direction.dim() == param.dim() && 0 <= last && last <= 4;
      for (int64_t k = 0; fits && k <= last; ++k) fits = direction.size(k) == param.size(k);
      STD_TORCH_CHECK(fits, "grng: direction must have param's shape, of up to 5 dimensions");
      item.cols = param.size(last);
      item.col_stride = direction.stride(last);
      item.rows = item.cols > 0 ? item.moments.length / item.cols : 0;
      item.dims = last;
      for (int64_t k = 0; k < last; ++k) {
        item.size[k] = param.size(k);
        item.stride[k] = direction.stride(k);
      }
    }
    items.push_back(item);
    spans.push_back(span_of(param, true));
    for (const Tensor* t : {&direction, &exp_avgs[i], &exp_avg_sqs[i]})
      spans.push_back(span_of(*t, false));
  }
  check_no_overlap(std::move(spans));
  grng::grafted_step_cpu(items.data(), static_cast<int64_t>(count), lr, decay, eps,
                         threads_of_torch());
}

// ---- kalman_update ----

void check_state(const Tensor* mean, const Tensor& variance) {
  const int64_t d = variance.numel();
  check_dense(variance, ScalarType::Float, {d}, "variance");
  if (mean) check_dense(*mean, ScalarType::Float, {d}, "mean");
}

// All blocks are checked before any is written. Where `means` is empty, no mean will be written.
// The blocks with the rising numbers `factored` have a jacobian [outputs, m]; their inputs [n] lie
// behind the jacobians.
std::vector<grng::KalmanPiece> kalman_pieces(const Tensors& means, const Tensors& variances,
                                             const Tensors& jacobians, int64_t outputs,
                                             const std::vector<int64_t>& factored = {}) {
  const Tensor* const inputs = jacobians.data() + variances.size();
  std::vector<grng::KalmanPiece> pieces;
  pieces.reserve(variances.size());
  size_t next = 0;
  for (size_t i = 0; i < variances.size(); ++i) {
    const Tensor& h = jacobians[i];
    check_state(means.empty() ? nullptr : &means[i], variances[i]);
    grng::ConstMatrix x = {};
    if (next < factored.size() && factored[next] == static_cast<int64_t>(i)) {
      const Tensor& t = inputs[next++];
      STD_TORCH_CHECK(t.dim() == 1 && t.scalar_type() != ScalarType::Double,
                      "grng: inputs must be a float32 vector, or bfloat16 or float16");
      x = {t.data_ptr(), dtype_of(t), 1, t.size(0), 0, t.stride(0)};
    }
    const int64_t d = variances[i].numel(), width = x.rows > 0 ? x.cols : 1;
    STD_TORCH_CHECK(h.dim() == 2 && h.size(0) == outputs && h.size(1) * width == d &&
                        h.scalar_type() != ScalarType::Double,
                    "grng: jacobian must be float32 [outputs, d], or bfloat16 or float16");
    float* variance = static_cast<float*>(variances[i].data_ptr());
    pieces.push_back({means.empty() ? variance : static_cast<float*>(means[i].data_ptr()),
                      variance,
                      {h.data_ptr(), dtype_of(h), outputs, h.size(1), h.stride(0), h.stride(1)},
                      x});
  }
  STD_TORCH_CHECK(next == factored.size(), "grng: factored must be rising numbers of blocks");
  return pieces;
}

int64_t check_gram(const Tensor& gram) {
  const int64_t outputs = gram.size(0);
  check_dense(gram, ScalarType::Double, {outputs, outputs}, "gram");
  return outputs;
}

void kalman_gram(const Tensor gram, const Tensors variances, const Tensors jacobians) {
  const int64_t outputs = check_gram(gram);
  STD_TORCH_CHECK(variances.size() == jacobians.size(), "grng: one jacobian per variance");
  const auto blocks = kalman_pieces({}, variances, jacobians, outputs);
  grng::kalman_gram_cpu(static_cast<double*>(gram.data_ptr()), blocks.data(),
                        static_cast<int64_t>(blocks.size()), outputs, threads_of_torch());
}

grng::KalmanGain kalman_gain(const Tensor& direction, const Tensor& whitener, bool variational,
                             double forgetting, double process_noise) {
  const int64_t outputs = direction.numel();
  check_dense(direction, ScalarType::Float, {outputs}, "direction");
  check_dense(whitener, ScalarType::Float, {outputs, outputs}, "whitener");
  return {outputs,
          static_cast<const float*>(direction.data_ptr()),
          static_cast<const float*>(whitener.data_ptr()),
          variational,
          static_cast<float>(forgetting),
          static_cast<float>(process_noise)};
}

void kalman_apply(const Tensors means, const Tensors variances, const Tensors jacobians,
                  const Tensor direction, const Tensor whitener, const Tensor info,
                  bool variational, double forgetting, double process_noise) {
  const grng::KalmanGain gain =
      kalman_gain(direction, whitener, variational, forgetting, process_noise);
  check_dense(info, ScalarType::Int, {}, "info");
  STD_TORCH_CHECK(means.size() == variances.size() && means.size() == jacobians.size(),
                  "grng: one mean, variance and jacobian per block");
  if (*static_cast<const int32_t*>(info.data_ptr()) != grng::kOk) return;
  const auto blocks = kalman_pieces(means, variances, jacobians, gain.outputs);
  grng::kalman_apply_cpu(blocks.data(), static_cast<int64_t>(blocks.size()), gain,
                         threads_of_torch());
}

// The elements of a small fp32 tensor of any layout, in fp64.
std::vector<double> small_values(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && (t.dim() == 1 || t.dim() == 2),
                  "grng: ", name, " must be a float32 vector or matrix");
  const float* data = static_cast<const float*>(t.data_ptr());
  const int64_t rows = t.dim() == 2 ? t.size(0) : 1, cols = t.size(t.dim() - 1);
  const int64_t row_stride = t.dim() == 2 ? t.stride(0) : 0, col_stride = t.stride(t.dim() - 1);
  std::vector<double> values;
  values.reserve(static_cast<size_t>(rows * cols));
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j)
      values.push_back(static_cast<double>(data[i * row_stride + j * col_stride]));
  return values;
}

// What the kernel takes as noise; where none is given, `scale` times the identity.
std::vector<double> kalman_noise(const Tensors& given, double scale, grng::Likelihood likelihood,
                                 int64_t outputs, int64_t* cols) {
  const int64_t n = outputs;
  const bool gaussian = likelihood == grng::Likelihood::kGaussian;
  STD_TORCH_CHECK(given.size() == 1 || (given.empty() && gaussian), "grng: one tensor of noise");
  std::vector<double> values = given.empty() ? std::vector<double>(static_cast<size_t>(n), scale)
                                             : small_values(given[0], "noise");
  const bool flat = given.empty() || given[0].dim() == 1;
  *cols = flat ? static_cast<int64_t>(values.size()) : given[0].size(1);
  const int64_t count = static_cast<int64_t>(values.size());
  bool fits = flat ? count == n : given[0].size(0) == n;
  if (gaussian) fits = fits && *cols == n;
  if (likelihood == grng::Likelihood::kCategorical) fits = count == n;
  if (likelihood == grng::Likelihood::kFisher) fits = fits && !flat && *cols <= n;
  STD_TORCH_CHECK(fits, "grng: noise has the wrong shape");
  if (!gaussian || !flat) return values;
  std::vector<double> diagonal(static_cast<size_t>(n * n));
  for (int64_t i = 0; i < n; ++i) diagonal[i * n + i] = values[i];
  return diagonal;
}

// likelihood: 0 gaussian, 1 categorical, 2 fisher.
void kalman_update(const Tensors means, const Tensors variances, const Tensor info,
                   const Tensors jacobians, const Tensor innovation, const Tensors noise,
                   double noise_scale, int64_t likelihood, bool variational, double forgetting,
                   double process_noise, double rho, bool raises_noise,
                   const std::vector<int64_t> factored) {
  check_dense(info, ScalarType::Int, {}, "info");
  STD_TORCH_CHECK(
      means.size() == variances.size() && means.size() + factored.size() == jacobians.size(),
      "grng: one mean, variance and jacobian per block, and inputs of the factored");
  STD_TORCH_CHECK(innovation.dim() == 1 && innovation.size(0) <= grng::kMaxKalmanOutputs,
                  "grng: innovation must be [outputs], at most ", grng::kMaxKalmanOutputs);
  STD_TORCH_CHECK(0 <= likelihood && likelihood <= 2, "grng: no such likelihood");
  const int64_t outputs = innovation.size(0);
  const auto blocks = kalman_pieces(means, variances, jacobians, outputs, factored);
  const std::vector<double> error = small_values(innovation, "innovation");
  const grng::Likelihood kind = static_cast<grng::Likelihood>(likelihood);
  int64_t noise_cols = 0;
  const std::vector<double> values = kalman_noise(noise, noise_scale, kind, outputs, &noise_cols);

  std::vector<Span> spans;
  spans.reserve(2 * means.size() + jacobians.size() + 3);
  for (size_t i = 0; i < means.size(); ++i) {
    spans.push_back(span_of(means[i], true));
    spans.push_back(span_of(variances[i], true));
  }
  for (const Tensor& h : jacobians) spans.push_back(span_of(h, false));
  spans.push_back(span_of(info, true));
  spans.push_back(span_of(innovation, false));
  if (!noise.empty()) spans.push_back(span_of(noise[0], false));
  check_no_overlap(std::move(spans));

  *static_cast<int32_t*>(info.data_ptr()) = grng::kalman_update_cpu(
      {blocks.data(), static_cast<int64_t>(blocks.size()), outputs, error.data(), values.data(),
       noise_cols, kind, variational, raises_noise, rho, static_cast<float>(forgetting),
       static_cast<float>(process_noise)},
      threads_of_torch());
}

#ifdef GRNG_CUDA
void* current_stream(const Tensor& t) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "grng: this torch has no CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device(), &stream));
  return stream;
}

void check_launch(int error) { STD_TORCH_CHECK(error == 0, "grng: cudaError ", error); }

grng::KalmanBlock kalman_block(const Tensor* mean, const Tensor& variance, const Tensor& jacobian,
                               int64_t outputs) {
  const int64_t d = variance.numel();
  check_state(mean, variance);
  STD_TORCH_CHECK(jacobian.scalar_type() == ScalarType::Float && jacobian.dim() == 2 &&
                      jacobian.size(0) == outputs && jacobian.size(1) == d &&
                      (jacobian.stride(1) == 1 || d <= 1),
                  "grng: jacobian must be float32 [outputs, d] with unit column stride");
  return {mean ? static_cast<float*>(mean->data_ptr()) : nullptr,
          static_cast<float*>(variance.data_ptr()), static_cast<const float*>(jacobian.data_ptr()),
          d, jacobian.stride(0)};
}

// All blocks are checked before any is written.
std::vector<grng::KalmanBlock> kalman_blocks(const Tensors& means, const Tensors& variances,
                                             const Tensors& jacobians, int64_t outputs) {
  std::vector<grng::KalmanBlock> blocks;
  for (size_t i = 0; i < means.size(); ++i)
    blocks.push_back(kalman_block(&means[i], variances[i], jacobians[i], outputs));
  return blocks;
}

void kalman_gram_on_cuda(const Tensor gram, const Tensors variances, const Tensors jacobians) {
  const int64_t outputs = check_gram(gram);
  STD_TORCH_CHECK(variances.size() == jacobians.size(), "grng: one jacobian per variance");
  const torch::stable::accelerator::DeviceGuard guard(gram.get_device());
  if (variances.empty()) return;
  const Tensor workspace =
      torch::stable::new_empty(variances[0], {grng::kalman_gram_cuda_workspace(outputs)});
  for (size_t i = 0; i < variances.size(); ++i)
    check_launch(grng::kalman_gram_cuda(
        static_cast<double*>(gram.data_ptr()), static_cast<float*>(workspace.data_ptr()),
        kalman_block(nullptr, variances[i], jacobians[i], outputs), outputs, current_stream(gram)));
}

void kalman_apply_on_cuda(const Tensors means, const Tensors variances, const Tensors jacobians,
                          const Tensor direction, const Tensor whitener, const Tensor info,
                          bool variational, double forgetting, double process_noise) {
  const grng::KalmanGain gain =
      kalman_gain(direction, whitener, variational, forgetting, process_noise);
  check_dense(info, ScalarType::Int, {}, "info");
  STD_TORCH_CHECK(means.size() == variances.size() && means.size() == jacobians.size(),
                  "grng: one mean, variance and jacobian per block");
  const torch::stable::accelerator::DeviceGuard guard(info.get_device());
  for (const grng::KalmanBlock& block : kalman_blocks(means, variances, jacobians, gain.outputs))
    check_launch(grng::kalman_apply_cuda(block, gain, static_cast<const int32_t*>(info.data_ptr()),
                                         current_stream(info)));
}

// ---- damped_inverse, small orders ----

// All lists have one tensor per group of equal matrices; `dampings` is empty where rho decides.
void damped_inverse_small_on_cuda(const Tensors inverses, const Tensors vectors, const Tensors used,
                                  const Tensors norms, const Tensors residuals, const Tensors infos,
                                  const Tensors factors, const Tensors dampings, double rho_root) {
  const size_t count = factors.size();
  for (const Tensors* list : {&inverses, &vectors, &used, &norms, &residuals, &infos})
    STD_TORCH_CHECK(list->size() == count, "grng: the lists must have the same length");
  STD_TORCH_CHECK(dampings.empty() || dampings.size() == count,
                  "grng: one damping per factor, or none");
  if (count == 0) return;
  const auto device = factors[0].get_device();
  std::vector<grng::DampedSmall> items;
  std::vector<Span> spans;
  for (size_t i = 0; i < count; ++i) {
    const Tensor& factor = factors[i];
    STD_TORCH_CHECK(factor.dim() == 3 && factor.size(1) == factor.size(2) &&
                        factor.size(1) <= grng::kMaxDampedSmall,
                    "grng: factor must be [L, N, N] with N <= 64");
    const grng::Dtype dtype = dtype_of(factor);
    STD_TORCH_CHECK(dtype != grng::Dtype::kFloat64, "grng: factor must not be float64");
    const int64_t length = factor.size(0), n = factor.size(1);
    STD_TORCH_CHECK(length <= INT32_MAX / 2, "grng: too many matrices");
    check_dense(inverses[i], ScalarType::Float, {length, n, n}, "inverse");
    check_dense(vectors[i], ScalarType::Float, {length, n}, "vector");
    check_dense(infos[i], ScalarType::Int, {length}, "info");
    for (const Tensors* list : {&used, &norms, &residuals})
      check_dense((*list)[i], ScalarType::Float, {length}, "a result");
    if (!dampings.empty()) check_dense(dampings[i], ScalarType::Float, {length}, "damping");
    for (const Tensors* list : {&inverses, &vectors, &used, &norms, &residuals, &infos}) {
      STD_TORCH_CHECK((*list)[i].get_device() == device, "grng: tensors on several devices");
      spans.push_back(span_of((*list)[i], true));
    }
    for (const Tensors* list : {&factors, &dampings}) {
      if (list->empty()) continue;
      STD_TORCH_CHECK((*list)[i].get_device() == device, "grng: tensors on several devices");
      spans.push_back(span_of((*list)[i], false));
    }
    const auto floats = [i](const Tensors& list) {
      return static_cast<float*>(list[i].data_ptr());
    };
    items.push_back({factor.data_ptr(), factor.stride(0), factor.stride(1), factor.stride(2),
                     dampings.empty() ? nullptr : floats(dampings), floats(vectors),
                     floats(inverses), floats(used), floats(norms), floats(residuals),
                     static_cast<int32_t*>(infos[i].data_ptr()), dtype, static_cast<int32_t>(n),
                     static_cast<int32_t>(length), 0});
  }
  check_no_overlap(std::move(spans));
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_launch(grng::damped_inverse_small_cuda(items.data(), static_cast<int64_t>(count),
                                               dampings.empty(), static_cast<float>(rho_root),
                                               current_stream(factors[0])));
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(grng, m) {
  m.def(
      "_kron_factor_update_(Tensor(a!)[] factors, Tensor[] xs, Tensor(b!) info, bool bias, float "
      "decay, "
      "float[] scales) -> ()");
  m.def(
      "_kron_factor_conv2d_update_(Tensor(a!)[] factors, Tensor[] xs, Tensor(b!) info, int[] "
      "geometry, bool bias, float decay, float[] scales) -> ()");
  m.def(
      "_precondition_(Tensor(a!)[] outs, Tensor(b!) dots, Tensor[] grads, Tensor[] lefts, Tensor[] "
      "rights, Tensor[] biases) -> ()");
  m.def(
      "_damped_inverse_(Tensor(a!)[] inverses, Tensor(b!)[] vectors, Tensor(c!) results, "
      "Tensor(d!) "
      "info, Tensor[] factors, Tensor[] dampings, float rho_root) -> ()");
  m.def(
      "_rank1_precondition_(Tensor(a!)[] outs, Tensor[] grads, Tensor[] scores, float damping) -> "
      "()");
  m.def(
      "_rank1_step_(Tensor(a!)[] params, Tensor(b!) norm, Tensor[] grads, Tensor[] scores, float "
      "damping, float[] lrs, float[] decays, float largest) -> ()");
  m.def(
      "_adam_moments_(Tensor(a!)[] exp_avgs, Tensor(b!)[] exp_avg_sqs, Tensor(c!) lengths, "
      "Tensor[] grads, float[] mean_scales, float[] root_scales, float beta1, float beta2, float "
      "eps) -> ()");
  m.def(
      "_grafted_step_(Tensor(a!)[] params, Tensor[] directions, Tensor[] exp_avgs, Tensor[] "
      "exp_avg_sqs, float[] scales, float[] mean_scales, float[] root_scales, float lr, float "
      "decay, float eps) -> ()");
  m.def("_kalman_gram_(Tensor(a!) gram, Tensor[] variances, Tensor[] jacobians) -> ()");
  m.def(
      "_kalman_apply_(Tensor(a!)[] means, Tensor(b!)[] variances, Tensor[] jacobians, Tensor "
      "direction, "
      "Tensor whitener, Tensor info, bool variational, float forgetting, float process_noise) -> "
      "()");
  m.def(
      "_kalman_update_(Tensor(a!)[] means, Tensor(b!)[] variances, Tensor(c!) info, Tensor[] "
      "jacobians, Tensor innovation, Tensor[] noise, float noise_scale, int likelihood, bool "
      "variational, float forgetting, float process_noise, float rho, bool raises_noise, int[] "
      "factored=[]) -> ()");
  m.def(
      "_damped_inverse_small_cuda(Tensor(a!)[] inverses, Tensor(b!)[] vectors, Tensor(c!)[] used, "
      "Tensor(d!)[] norms, Tensor(e!)[] residuals, Tensor(f!)[] infos, Tensor[] factors, Tensor[] "
      "dampings, float rho_root) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(grng, CPU, m) {
  m.impl("_kron_factor_update_", TORCH_BOX(&kron_factor_update));
  m.impl("_kron_factor_conv2d_update_", TORCH_BOX(&kron_factor_conv2d_update));
  m.impl("_precondition_", TORCH_BOX(&precondition));
  m.impl("_damped_inverse_", TORCH_BOX(&damped_inverse));
  m.impl("_rank1_precondition_", TORCH_BOX(&rank_one));
  m.impl("_rank1_step_", TORCH_BOX(&rank_one_step));
  m.impl("_adam_moments_", TORCH_BOX(&adam_moments));
  m.impl("_grafted_step_", TORCH_BOX(&grafted_step));
  m.impl("_kalman_gram_", TORCH_BOX(&kalman_gram));
  m.impl("_kalman_apply_", TORCH_BOX(&kalman_apply));
  m.impl("_kalman_update_", TORCH_BOX(&kalman_update));
}

#ifdef GRNG_CUDA
STABLE_TORCH_LIBRARY_IMPL(grng, CUDA, m) {
  m.impl("_kalman_gram_", TORCH_BOX(&kalman_gram_on_cuda));
  m.impl("_kalman_apply_", TORCH_BOX(&kalman_apply_on_cuda));
  m.impl("_damped_inverse_small_cuda", TORCH_BOX(&damped_inverse_small_on_cuda));
}
#endif

#ifdef GRNG_CUDA
#define GRNG_BUILT_WITH_CUDA 1
#else
#define GRNG_BUILT_WITH_CUDA 0
#endif

// Loading the module registers the operators; the module itself only says how it was built.
static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit__C(void) {
  PyObject* module = PyModule_Create(&definition);
  if (module) PyModule_AddIntConstant(module, "built_with_cuda", GRNG_BUILT_WITH_CUDA);
  return module;
}
