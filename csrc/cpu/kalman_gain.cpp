// SPDX-License-Identifier: Apache-2.0
#include "kalman_gain.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "simd.h"

namespace grng::kalman {
namespace {

// Inner loops run over contiguous rows, so they are vectorised without reordering any sum.

// y += a x
GRNG_INLINE void axpy(double* y, double a, const double* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] += a * x[i];
}

GRNG_INLINE double dot(const double* x, const double* y, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

GRNG_INLINE Matrix product(const Matrix& a, const Matrix& b) {
  Matrix out(a.rows, b.cols);
  for (int64_t i = 0; i < a.rows; ++i)
    for (int64_t k = 0; k < a.cols; ++k)
      if (a[i][k] != 0) axpy(out[i], a[i][k], b[k], b.cols);
  return out;
}

GRNG_INLINE Matrix transposed(const Matrix& a) {
  Matrix out(a.cols, a.rows);
  for (int64_t i = 0; i < a.rows; ++i)
    for (int64_t j = 0; j < a.cols; ++j) out[j][i] = a[i][j];
  return out;
}

// The upper factor U with U^T U = a, of which only the lower triangle is read; false where a is not
// positive definite.
GRNG_INLINE bool factorise(Matrix& upper, const Matrix& a) {
  const int64_t n = a.rows;
  upper = Matrix(n, n);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = i; j < n; ++j) upper[i][j] = a[j][i];
  for (int64_t k = 0; k < n; ++k) {
    double* row = upper[k];
    if (!(row[k] > 0) || !std::isfinite(row[k])) return false;
    const double pivot = std::sqrt(row[k]);
    for (int64_t j = k; j < n; ++j) row[j] /= pivot;
    for (int64_t i = k + 1; i < n; ++i) axpy(upper[i] + i, -row[i], row + i, n - i);
  }
  return true;
}

// x <- U^-T x
GRNG_INLINE void solve_forward(const Matrix& upper, Matrix& x) {
  for (int64_t i = 0; i < upper.rows; ++i) {
    for (int64_t c = 0; c < x.cols; ++c) x[i][c] /= upper[i][i];
    for (int64_t j = i + 1; j < upper.rows; ++j)
      if (upper[i][j] != 0) axpy(x[j], -upper[i][j], x[i], x.cols);
  }
}

// x <- (U^T U)^-1 x of one column.
GRNG_INLINE void solve(const Matrix& upper, Matrix& x) {
  solve_forward(upper, x);
  for (int64_t i = upper.rows - 1; i >= 0; --i) {
    const double known = dot(upper[i] + i + 1, x[i + 1], upper.rows - i - 1);
    x[i][0] = (x[i][0] - known) / upper[i][i];
  }
}

GRNG_INLINE Matrix inverse_factor(const Matrix& upper) {
  const int64_t n = upper.rows;
  Matrix x(n, n);
  for (int64_t i = 0; i < n; ++i) x[i][i] = 1;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t c = 0; c <= i; ++c) x[i][c] /= upper[i][i];
    for (int64_t j = i + 1; j < n; ++j) axpy(x[j], -upper[i][j], x[i], i + 1);
  }
  return x;
}

GRNG_INLINE Matrix column(const double* values, int64_t n) {
  Matrix out(n, 1);
  std::copy(values, values + n, out.data.begin());
  return out;
}

// I + scale * root^T gram root
GRNG_INLINE Matrix information(const Matrix& root, const Matrix& gram, double scale) {
  Matrix out = product(transposed(root), product(gram, root));
  for (double& x : out.data) x *= scale;
  for (int64_t i = 0; i < out.rows; ++i) out[i][i] += 1;
  return out;
}

// T with T T^T = diag(q) - q q^T for each observation of `cols` classes, one block for each.
GRNG_INLINE Matrix softmax_root(const double* q, int64_t outputs, int64_t classes) {
  Matrix root(outputs, outputs);
  for (int64_t first = 0; first < outputs; first += classes)
    for (int64_t i = first; i < first + classes; ++i)
      for (int64_t j = first; j < first + classes; ++j)
        root[i][j] = (i == j ? std::sqrt(q[i]) : 0.0) - q[i] * std::sqrt(q[j]);
  return root;
}

// An orthogonal transformation of the rows keeps |W h|. Reflections from the last column on leave W
// lower triangular (in the last rows of a square matrix): half the products of pass 2.
GRNG_INLINE Matrix lower_triangular(Matrix w) {
  Matrix out(w.cols, w.cols);
  const int64_t missing = w.cols - w.rows;
  std::vector<double> v(w.rows), sums(w.cols);
  for (int64_t r = w.rows - 1; r > 0; --r) {
    const int64_t c = r + missing;
    double norm = 0;
    for (int64_t i = 0; i <= r; ++i) norm = std::hypot(norm, w[i][c]);
    if (norm == 0) continue;
    const double pivot = w[r][c] > 0 ? -norm : norm;
    double square = 0;
    for (int64_t i = 0; i <= r; ++i) {
      v[i] = (w[i][c] - (i == r ? pivot : 0.0)) / norm;
      square += v[i] * v[i];
    }
    std::fill(sums.begin(), sums.end(), 0.0);
    for (int64_t i = 0; i <= r; ++i) axpy(sums.data(), v[i], w[i], c);
    for (int64_t i = 0; i <= r; ++i) {
      axpy(w[i], -2 / square * v[i], sums.data(), c);
      w[i][c] = i == r ? pivot : 0;
    }
  }
  for (int64_t r = 0; r < w.rows; ++r) std::copy(w[r], w[r] + w.cols, out[r + missing]);
  return out;
}

// Beyond, the reflections cost more than they save, unless there are very many parameters.
constexpr int64_t kMaxReflected = 64;

struct Stage {
  Matrix direction, whitener;
};

GRNG_INLINE bool gaussian(Stage& out, const KalmanUpdate& u, const Found& found) {
  const int64_t n = u.outputs;
  Matrix noise(n, n), factor;
  std::copy(u.noise, u.noise + n * n, noise.data.begin());
  if (u.rho > 0) {
    Matrix total = noise;
    axpy(total.data.data(), u.rho, found.plain_gram.data.data(), n * n);
    if (u.raises_noise) {
      noise = std::move(total);
    } else {
      if (!factorise(factor, total)) return false;
      solve_forward(factor, noise);
      noise = product(transposed(noise), noise);
    }
  }
  Matrix noise_factor, s = noise;
  axpy(s.data.data(), 1, found.gram.data.data(), n * n);
  if (!factorise(factor, s) || !factorise(noise_factor, noise)) return false;
  out.direction = column(u.innovation, n);
  solve(factor, out.direction);
  out.whitener = inverse_factor(u.variational ? noise_factor : factor);
  return true;
}

GRNG_INLINE bool informed(Stage& out, const KalmanUpdate& u, const Found& found) {
  const int64_t n = u.outputs;
  Matrix root;
  if (u.likelihood == Likelihood::kCategorical) {
    root = softmax_root(u.noise, n, u.noise_cols);
  } else {
    root = Matrix(n, u.noise_cols);
    std::copy(u.noise, u.noise + n * u.noise_cols, root.data.begin());
  }
  Matrix score = column(u.innovation, n), factor;
  if (u.rho > 0) {
    if (!factorise(factor, information(root, found.plain_gram, u.rho))) return false;
    Matrix pull = product(transposed(root), product(found.plain_gram, score));
    if (u.raises_noise) {
      solve(factor, pull);
      axpy(score.data.data(), -u.rho, product(root, pull).data.data(), n);
      Matrix changed = transposed(root);
      solve_forward(factor, changed);
      root = transposed(changed);
    } else {
      axpy(score.data.data(), u.rho, product(root, pull).data.data(), n);
      root = product(root, transposed(factor));
    }
  }
  if (!factorise(factor, information(root, found.gram, 1))) return false;
  out.whitener = transposed(root);
  Matrix inner = product(out.whitener, product(found.gram, score));
  solve(factor, inner);
  axpy(score.data.data(), -1, product(root, inner).data.data(), n);
  out.direction = std::move(score);
  if (!u.variational) solve_forward(factor, out.whitener);
  return true;
}

GRNG_INLINE bool to_floats(std::vector<float>& out, const std::vector<double>& values) {
  bool finite = true;
  for (size_t i = 0; i < values.size(); ++i) {
    out[i] = static_cast<float>(values[i]);
    finite &= std::isfinite(out[i]);
  }
  return finite;
}

}  // namespace

Info gain_from_gram(Gain& gain, const KalmanUpdate& u, const Found& found) {
  Info info = kOk;
  for_this_cpu([&](auto) GRNG_INLINE_LAMBDA {
    const int64_t n = u.outputs;
    Stage stage;
    const bool solved = u.likelihood == Likelihood::kGaussian ? gaussian(stage, u, found)
                                                              : informed(stage, u, found);
    if (!solved) {
      info = kNotConverged;
      return;
    }
    if (u.likelihood != Likelihood::kGaussian) {
      if (n <= kMaxReflected) {
        stage.whitener = lower_triangular(std::move(stage.whitener));
      } else {
        stage.whitener.data.resize(static_cast<size_t>(n * n));  // rows of zeros
      }
    }
    // The second pass writes as it goes: whether its results stay finite is decided here. For a
    // direction u, (h_i^T u)^2 p_i <= u^T M u, so every step is at most sqrt(p_i u^T M u).
    const Matrix pulled = product(found.gram, stage.direction);
    const double square_step = dot(stage.direction.data.data(), pulled.data.data(), n);
    const double step = std::sqrt(found.variance_max * std::max(square_step, 0.0));
    const bool within =
        found.mean_max + step <= static_cast<double>(std::numeric_limits<float>::max());
    gain.direction.resize(static_cast<size_t>(n));
    gain.whitener.resize(static_cast<size_t>(n * n));
    const bool finite = to_floats(gain.direction, stage.direction.data);
    if (!to_floats(gain.whitener, stage.whitener.data) || !finite || !within) info = kOverflow;
  });
  return info;
}

}  // namespace grng::kalman
