// SPDX-License-Identifier: Apache-2.0
// The kernel of csrc/cuda/damped_inverse_small.h with its threads as a loop, for
// test_damped_inverse_cuda_model.py.
#include <algorithm>
#include <cstdlib>
#include <limits>
#include <memory>
#include <vector>

#include "../../csrc/cuda/damped_inverse_small.h"

namespace {

using grng::DampedSmall;
using grng::damped_small::kProbes;
using grng::damped_small::Lane;
using grng::damped_small::Shared;

template <int P>
struct HostGroup {
  std::vector<Lane> lanes = std::vector<Lane>(Shared<P>::kThreads);
  int threads = Shared<P>::kThreads;

  template <class F>
  void each(const F& f) {
    for (int t = 0; t < threads; ++t) f(t, lanes[t]);
  }
  void sync() {}
  // The tree of the shuffles on the device.
  template <class F>
  float sum(const F& f) {
    float values[32], next[32];
    for (int i = 0; i < 32; ++i) values[i] = f(i);
    for (int offset = 16; offset > 0; offset /= 2) {
      for (int i = 0; i < 32; ++i) next[i] = values[i] + values[i ^ offset];
      std::memcpy(values, next, sizeof values);
    }
    return values[0];
  }
  template <class F>
  uint32_t largest(const F& f) {
    uint32_t all = 0;
    for (int i = 0; i < 32; ++i) all = std::max<uint32_t>(all, f(i));
    return all;
  }
  template <class F>
  uint32_t smallest(const F& f) {
    uint32_t all = std::numeric_limits<uint32_t>::max();
    for (int i = 0; i < 32; ++i) all = std::min<uint32_t>(all, f(i));
    return all;
  }
  void add_neighbour() {
    for (int t = 0; t < threads; t += 2)
      lanes[t].partial = lanes[t + 1].partial = lanes[t].partial + lanes[t + 1].partial;
  }
  bool any_failed() const {
    for (const Lane& lane : lanes)
      if (lane.failed != lanes[0].failed) std::abort();
    return lanes[0].failed;
  }
};

template <int P>
void run(const DampedSmall& item, bool relative, float rho_root) {
  std::vector<float> signs(P * kProbes);
  for (size_t e = 0; e < signs.size(); ++e)
    signs[e] = grng::damped_small::probe_sign(e / kProbes, e % kProbes);
  for (int index = 0; index < item.count; ++index) {
    // What was never written is NaN, as it may be on the device.
    auto shared = std::make_unique<Shared<P>>();
    std::memset(shared.get(), 0xff, sizeof *shared);
    HostGroup<P> group;
    std::memset(group.lanes.data(), 0xff, group.lanes.size() * sizeof(Lane));
    grng::damped_small::run<P>(group, *shared, signs.data(), item, index, relative, rho_root);
  }
}

}  // namespace

extern "C" void damped_inverse_small_model(const void* factor, const int64_t* strides, int dtype,
                                           int n, int count, const float* damping, float* vector,
                                           float* inverse, float* used, float* norm,
                                           float* residual, int32_t* info, float rho_root,
                                           int order) {
  const DampedSmall item{factor,  strides[0], strides[1], strides[2], damping, vector,
                         inverse, used,       norm,       residual,   info,    grng::Dtype{dtype},
                         n,       count,      0};
  if (order == 32) {
    run<32>(item, damping == nullptr, rho_root);
  } else {
    run<64>(item, damping == nullptr, rho_root);
  }
}
