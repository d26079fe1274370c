// SPDX-License-Identifier: Apache-2.0
// The C x C stage between the two passes of the Kalman update, in fp64. The same equations, with
// the same outcome, as grng_kernels/kalman_update/innovation.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../kernels.h"

namespace grng::kalman {

// Row-major, fp64.
struct Matrix {
  int64_t rows = 0, cols = 0;
  std::vector<double> data;

  Matrix() = default;
  Matrix(int64_t r, int64_t c) : rows(r), cols(c), data(static_cast<std::size_t>(r * c)) {}
  double* operator[](int64_t i) { return data.data() + i * cols; }
  const double* operator[](int64_t i) const { return data.data() + i * cols; }
};

// What pass 1 found: the weighted gram, the plain one where rho > 0 (empty otherwise), and the
// largest magnitudes of the state.
struct Found {
  Matrix gram, plain_gram;
  double mean_max, variance_max;
};

struct Gain {
  std::vector<float> direction;  // [outputs]
  std::vector<float> whitener;   // [outputs, outputs]
};

// Everything that pass 2 needs, if that is kOk. An infinite or NaN gram is for the caller to judge.
Info gain_from_gram(Gain& gain, const KalmanUpdate& update, const Found& found);

}  // namespace grng::kalman
