// SPDX-License-Identifier: Apache-2.0
// The check that comes before a factor is written, from largest magnitudes alone.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "../kernels.h"
#include "elements.h"

namespace grng {

// The largest magnitude that the diagonal keeps: it bounds every entry of a PSD matrix.
template <class T>
double held(const T* factor, int64_t n, double decay) {
  if (decay == 0) return 0;
  double largest = 0;
  for (int64_t i = 0; i < n; ++i)
    largest = larger(largest, std::abs(static_cast<double>(factor[i * n + i])));
  return decay * largest;
}

template <class T>
Info verdict(const FactorUpdate& item, double amax) {
  const int64_t n = item.x.cols + item.bias;
  const double old = held(static_cast<const T*>(item.factor), n, item.decay);
  // A scale that is finite as a double may be infinite in the dtype of the factor.
  if (!std::isfinite(amax) || !std::isfinite(old) || !std::isfinite(static_cast<T>(item.scale)))
    return kNonfiniteInput;
  // No sum of products of this batch, scaled or not, can exceed this bound.
  const double bound =
      amax * amax * static_cast<double>(item.x.rows) * std::max(1.0, std::abs(item.scale));
  return bound + old <= std::numeric_limits<T>::max() ? kOk : kOverflow;
}

}  // namespace grng
